"""Compiles the native step: run at installation, so that nobody waits for it later."""

import sys

from pallas_kernels.decode_step.native.build import unavailable

if reason := unavailable():
    print(f"no native step: {reason}", file=sys.stderr)

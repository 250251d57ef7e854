"""Checks tables of the decode step in full: 132 CTAs, every preset, 1 to 16 tokens. Prints a line each; takes an hour.

python -m tests.tools.whole_tables --devices 8 --preset mimo-v2.5-pro --tokens 8     # one table
"""

import argparse
import time

from mimo_jax.config.geometry import target_of
from mimo_jax.config.presets import PRESETS, preset
from pallas_kernels.decode_step.assigned import CTAS, assigned_rows, shard_of
from pallas_kernels.decode_step.schedule import step_phases
from pallas_kernels.decode_step.validate import validate


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--devices", type=int, nargs="*", default=[1, 8])
    parser.add_argument("--preset", nargs="*", default=list(PRESETS))
    parser.add_argument("--tokens", type=int, nargs="*", default=[1, 4, 8, 16])
    args = parser.parse_args()
    for name in args.preset:
        for devices in args.devices:
            for tokens in args.tokens:
                rows = assigned_rows(step_phases(shard_of(target_of(preset(name)), devices), tokens), devices, CTAS)
                started = time.perf_counter()
                verdict = validate(rows) or "accepted"
                seconds = time.perf_counter() - started
                print(f"{name}, {devices} devices, {tokens} tokens: {len(rows)} rows, {seconds:.0f} s: {verdict}")


if __name__ == "__main__":
    main()

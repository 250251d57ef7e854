"""Mutated media files; `python -m tests.tools.fuzz_media --count N` runs any number."""

import json
import subprocess
import sys


def test_two_thousand_mutated_media_files():
    """Pictures, recordings and videos of 13 kinds: no crash, no hang, no flood of memory; one line, or a part."""
    command = [sys.executable, "-m", "tests.tools.fuzz_media", "--count", "2000"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-2000:]
    report = json.loads(done.stdout)
    counts = {
        end: sum(count for name, count in report.items() if name.endswith(end)) for end in ("rejected", "accepted")
    }
    assert counts["rejected"] + counts["accepted"] == 2000 and min(counts.values()) > 300

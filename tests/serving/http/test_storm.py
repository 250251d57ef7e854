"""The server of the bundled model stands a storm; `tests/tools/storm.py` has the whole one."""

import sys

import pytest

from tests.tools.storm import GROUPS, run

FEW = {"vanishing": 24, "streams": 8, "malformed": 80, "floods": 5}
MAY_BE = {
    "vanishing": {"at once", "in a stream", "in a reply", "in a body"},
    "slow": {"whole", "dropped"},
    "streams": {"whole"},
    "malformed": {"200", "400", "404", "413"},
    "oversized": {"413"},
    "deep": {"400"},
    "floods": {"400", "413", "cut"},
    "half-sent": {"open"},  # for as long as this waits
    "wrong-keys": {"401"},
}


@pytest.mark.skipif(sys.platform != "linux", reason="what a process holds is read in /proc")
def test_a_small_storm():
    """After each kind of bad client the server is as before; SIGTERM lets a stream end."""
    counts = {**dict.fromkeys(GROUPS, 4), **FEW}
    report = run(counts, warm=0, patience=0.5)
    assert report["exit_code"] == 0
    for name, count in counts.items():
        assert sum(report[name].get(outcome, 0) for outcome in MAY_BE[name]) == count, report[name]

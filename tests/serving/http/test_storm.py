"""The server of the bundled model stands a storm; `tests/tools/storm.py` has the whole one."""

from tests.tools.storm import GROUPS, run

FEW = {"vanishing": 24, "slow": 4, "streams": 8, "malformed": 60, "oversized": 3, "deep": 3, "floods": 5}


def test_a_small_storm():
    """After each kind of bad client it serves as before, and SIGTERM lets a stream end."""
    counts = {**dict.fromkeys(GROUPS, 4), **FEW}
    report = run(counts, warm=0, patience=1.0)
    assert report["exit_code"] == 0
    assert all(sum(v for k, v in report[name].items() if k in OUTCOMES[name]) == counts[name] for name in counts)

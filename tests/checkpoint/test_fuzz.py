"""Mutated checkpoint files; `python -m tests.tools.fuzz --count N` runs any number."""

from tests.tools import fuzz


def test_two_thousand_mutated_checkpoints() -> None:
    """No mutation of config, index or shards causes anything but one line: no crash, no hang, no flood of memory."""
    report = fuzz.run(2000)
    assert report["rejected"] > 1000
    assert report["accepted"] > 20  # the mutations are not all trivially bad

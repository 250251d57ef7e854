"""What rounding costs, measured: the exact model has no distance to itself, and calibration helps where it can."""

from pathlib import Path

import numpy as np
import pytest

from mimo_jax.evaluation import rounding
from tests.checkpoint.gguf_samples import write_llama


@pytest.fixture(scope="module")
def record(tmp_path_factory: pytest.TempPathFactory) -> dict:
    """Of a small random Llama-type GGUF, on the texts that are always there."""
    folder = tmp_path_factory.mktemp("rounding")
    write_llama(folder / "model.gguf")
    (folder / "text.txt").write_text("def f(x):\n    return x + 1  # and more of it\n" * 600)
    return rounding.compare(folder / "model.gguf", folder / "text.txt", 8, rounding.usual_texts(), 8)


def test_the_exact_model_is_no_distance_from_itself(record: dict) -> None:
    """But for the 16 bits in which its distributions are kept."""
    for losses in record["arms"]["exact"].values():
        assert abs(losses["kl"]) < 1e-2
    assert all(mean == half == 0 for mean, half in rounding.increases(record)["exact"].values())


def test_rounded_ones_are(record: dict) -> None:
    """Both arms are off by something, and by less than a model that knows nothing; the same windows for all."""
    exact = record["arms"]["exact"]
    for name in ("MXFP4, rounded plainly", "MXFP4, calibrated"):
        for text, losses in record["arms"][name].items():
            assert losses["nats_by_window"] != exact[text]["nats_by_window"]
            assert len(losses["nats_by_window"]) == 8
            assert np.isfinite(losses["bits_per_byte"]) and losses["kl"] < 5


def test_texts_are_there_with_every_python() -> None:
    """Code and prose, enough for windows; none of it is this package's, which is what models are calibrated on."""
    found = rounding.usual_texts()
    assert {name: sum(map(len, texts)) > 100_000 for name, texts in found.items()} == {"code": True, "prose": True}
    assert not any("mimo" in text.lower() for texts in found.values() for text in texts)
    assert Path(rounding.__file__).exists()

"""The advice on drafters says what was measured, and only what is certain."""

import pytest

from mimo_jax.evaluation.drafts import OWN_TEXTS, advice, kinds_of_prompts, models_of
from mimo_jax.loading import BUNDLED
from mimo_jax.tokenizer import Tokenizer


@pytest.mark.parametrize(
    ("speedups", "expected"),
    [
        ({"lookup": (1.5, 0.2), "dflash": (1.8, 0.3)}, "dflash"),
        ({"lookup": (1.5, 0.2), "dflash": (1.8, 0.9)}, "lookup"),
        ({"lookup": (1.5, 0.5), "dflash": (0.7, 0.1)}, "none"),
    ],
)
def test_only_what_is_certainly_faster_is_advised(speedups, expected):
    rows = {"plain": (1.0, 0.0), **speedups}
    found = {name: {"speedup": speedup, "speedup_half_width": half} for name, (speedup, half) in rows.items()}
    assert advice(found) == expected


def test_a_text_to_be_edited_begins_again():
    """Both kinds are made of the same pieces; the second has the whole piece, and its beginning once more."""
    tokenizer = Tokenizer.load(BUNDLED / "tokenizer.json")
    kinds = kinds_of_prompts(tokenizer, OWN_TEXTS, 3)
    for piece, edited in zip(*kinds.values(), strict=True):
        assert len(piece) == 128 and edited[:128] == piece and edited[-24:] == piece[:24]
        assert tokenizer.decode(edited[128:-24]).strip() == ""


def test_what_cannot_draft_is_named(capsys):
    """The bundled model on a CPU: its native step has no MTP layers."""
    assert {*models_of(BUNDLED)} == {"plain", "lookup", "dflash"}
    assert "draft 'mtp'" in capsys.readouterr().err

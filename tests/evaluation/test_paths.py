"""What the figures about paths in docs/results.md rest on: which functions, what counts, and how sure it is."""

import numpy as np
import pytest
from scipy.stats import binomtest

from mimo_jax.errors import UserError
from mimo_jax.evaluation.paths import functions_of, wilson
from mimo_jax.loading import BUNDLED
from mimo_jax.tokenizer import END_OF_TEXT, Tokenizer

FIRST = '''import os

@cached
def one(a,
        b):  # a comment
    """Text."""
    return a

def short(): return 1

class C:
    def method(self):
        return 2
'''
SECOND = "def two():\n    # nothing\n    pass\n"
BROKEN = "def three(:\n    pass\n"


@pytest.fixture(scope="module")
def tokenizer():
    return Tokenizer.load(BUNDLED / "tokenizer.json")


@pytest.fixture(scope="module")
def heldout(tokenizer):
    end = tokenizer.id_of(END_OF_TEXT)
    return np.array([token for text in (FIRST, SECOND, BROKEN) for token in (*tokenizer.encode(text), end)])


def test_functions_come_without_their_bodies(heldout, tokenizer):
    """Those at the top level of files that parse, with the decorator and without the body, after what precedes them."""
    first, second = functions_of(heldout, tokenizer, 2)
    assert first.header == "@cached\ndef one(a,\n        b):  # a comment\n"
    assert tokenizer.decode(first.prompt) == "import os\n\n" + first.header
    assert second.header == tokenizer.decode(second.prompt) == "def two():\n    # nothing\n"
    with pytest.raises(UserError, match="3 functions asked for, 2 are held out"):
        functions_of(heldout, tokenizer, 3)


@pytest.mark.parametrize(
    ("body", "compiles"),
    [("    return a", True), ("    return (a", False), ("", False), ("    yield\n  b", False), ("    a = '\0'", False)],
)
def test_a_body_counts_if_the_function_compiles(heldout, tokenizer, body, compiles):
    """By the interpreter's own compiler."""
    assert functions_of(heldout, tokenizer, 1)[0].compiles(body) is compiles


@pytest.mark.parametrize(("successes", "trials"), [(0, 5), (5, 5), (3, 40), (39, 40), (150, 300)])
def test_the_interval_is_wilsons(successes, trials):
    """As SciPy computes it."""
    expected = binomtest(successes, trials).proportion_ci(method="wilson")
    np.testing.assert_allclose(wilson(successes, trials), expected, atol=1e-9)

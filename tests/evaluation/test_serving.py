"""How waiting is counted."""

import itertools

import pytest

from mimo_jax.evaluation.serving import Reply, _counted
from mimo_jax.loading import BUNDLED
from mimo_jax.tokenizer import Tokenizer


def test_tokens_of_a_piece_share_its_time():
    """Three that came after 6 ms count as three times 2 ms; the first piece's are nobody's gap."""
    reply = Reply(1.0, [(1.5, 4), (1.506, 3), (1.51, 1)])
    assert reply.first == 0.5
    assert reply.gaps == pytest.approx([0.002, 0.002, 0.002, 0.004])


@pytest.mark.parametrize("sizes", [[1, 3, 2, 14], [20], [1] * 8 + [8] + [1] * 4])
def test_tokens_are_counted_by_their_text(sizes):
    """However a text arrives, a piece has the tokens that end in it; a server holds back letters that are not whole."""
    tokenizer = Tokenizer.load(BUNDLED / "tokenizer.json")
    ids = tokenizer.encode("def fib(n):\n    return 'é日本' if n else fib(n - 1)")[:20]
    ends = list(itertools.accumulate(sizes, initial=0))
    texts = [tokenizer.decode(ids[begin:end]) for begin, end in itertools.pairwise(ends)]
    pieces = list(zip(map(float, ends[1:]), texts))
    assert _counted(pieces, tokenizer, ids) == list(zip(map(float, ends[1:]), sizes))
    with pytest.raises(AssertionError):
        _counted([*pieces, (99.0, "more")], tokenizer, ids)

"""The drafters that DFlash is compared with draft what they are said to draft."""

import jax
import jax.numpy as jnp
import numpy as np

from mimo_jax.baselines import NgramDrafter
from mimo_jax.sampling import Greedy

DRAFTER = NgramDrafter()


def lookup(text: list[int], longest: int = 4, count: int = 7) -> list[int] | None:
    """Prompt lookup in plain Python: the latest place with the longest common suffix, copied on and on."""
    best, source = 0, None
    for place in range(len(text) - 1):
        size = 0
        while size < longest and size <= place and text[place - size] == text[len(text) - 1 - size]:
            size += 1
        if size and size >= best:
            best, source = size, place
    if source is None:
        return None
    copied = list(text)
    for step in range(count):
        copied.append(copied[source + 1 + step])
    return copied[-count:]


def test_ngrams_are_copied_from_the_latest_longest_match():
    """Drafts equal a plain Python lookup, over random texts of few symbols in one padded batch, absorbed in pieces."""
    rng = np.random.default_rng(0)
    lengths = rng.integers(2, 40, 200)
    texts = [rng.integers(0, 4, length).tolist() for length in lengths]
    cache = DRAFTER.init_cache(len(texts), 64)
    held = np.zeros(len(texts), np.int32)
    absorb = jax.jit(lambda cache, tokens, held, counts: DRAFTER.absorb({}, {}, cache, tokens, None, held, counts))
    while (held < lengths - 1).any():
        counts = np.minimum(rng.integers(0, 9, len(texts)), lengths - 1 - held).astype(np.int32)
        pieces = np.full((len(texts), 8), 3, np.int32)
        for piece, text, start, count in zip(pieces, texts, held, counts):
            piece[:count] = text[start : start + count]
        cache = absorb(cache, pieces, held, counts)
        held += counts
    last = jnp.array([text[-1] for text in texts])
    drafted = DRAFTER.propose({}, {}, cache, last, jnp.asarray(held), Greedy(), None).tokens.tolist()
    expected = [lookup(text) for text in texts]
    assert sum(row is not None for row in expected) > 150
    assert all(row is None or row == found for row, found in zip(expected, drafted))

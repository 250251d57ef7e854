"""The drafters that DFlash is compared with draft what they are said to draft."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np

from mimo_jax.config.model import SLIDING
from mimo_jax.decode.drafter import DraftContext, ReadTokens, Weights
from mimo_jax.decode.loop import row_keys
from mimo_jax.decode.sampling import Greedy
from mimo_jax.drafters.mtp import MtpDrafter
from mimo_jax.drafters.prompt_lookup import PromptLookupDrafter
from mimo_jax.modeling.backbone import Backbone
from tests.drafters.plain_lookup import look_up
from tests.tiny import random_params, random_tokens, tiny_config

DRAFTER = PromptLookupDrafter()


def test_ngrams_are_copied_from_the_latest_longest_match():
    """Drafts equal a plain Python lookup, over random texts of few symbols in one padded batch, read in pieces. Where
    three tokens match they are proposed.
    """
    rng = np.random.default_rng(0)
    lengths = rng.integers(2, 40, 200)
    texts = [rng.integers(0, 4, length).tolist() for length in lengths]
    cache = DRAFTER.init_cache(len(texts), 64)
    held = np.zeros(len(texts), np.int32)
    update = jax.jit(
        lambda cache, *read: DRAFTER.update_cache(Weights({}), cache, ReadTokens(read[0], read[0], None, *read[1:]))
    )
    while (held < lengths - 1).any():
        counts = np.minimum(rng.integers(0, 9, len(texts)), lengths - 1 - held).astype(np.int32)
        pieces = np.full((len(texts), 8), 3, np.int32)
        for piece, text, start, count in zip(pieces, texts, held, counts):
            piece[:count] = text[start : start + count]
        cache = update(cache, pieces, held, counts)
        held = held + counts  # a new array: JAX may still be reading the old one
    last = jnp.array([text[-1] for text in texts])
    draft = DRAFTER.propose(DraftContext(Weights({}), cache, last, jnp.asarray(held), Greedy(), None))
    expected = [look_up(text, longest=4) for text in texts]
    assert sum(row is not None for row, _ in expected) > 150
    assert all(row is None or row == found for (row, _), found in zip(expected, draft.tokens.tolist()))
    counts = [7 if matched >= 3 else 0 for _, matched in expected]
    assert draft.counts.tolist() == counts and {*counts} == {0, 7}


def test_mtp_drafts_are_those_of_the_layer_from_scratch():
    """Drafts of the cached MTP layer, read in pieces beyond its window, equal a recomputation of all its rows."""
    config = tiny_config(layer_pattern=(0, 1), moe_pattern=(0, 1), init_range=0.2)
    params, length, drafter = random_params(config), 21, MtpDrafter(config)
    text = random_tokens(config, 1, length + 1)
    _, features, _ = Backbone(config).apply({"params": params}, text[:, :length])
    cache, update, weights = drafter.init_cache(1, 64), jax.jit(drafter.update_cache), Weights(params)
    for start, count in ((0, 9), (9, 1), (10, 3), (13, 8)):  # the last token of a piece is padding
        piece = slice(start, start + count + 1)
        seen = dataclasses.replace(features, hidden=jnp.pad(features.hidden, [(0, 0), (0, 1), (0, 0)])[:, piece])
        cache = update(
            weights, cache, ReadTokens(text[:, piece], text[:, piece], seen, jnp.array([start]), jnp.array([count]))
        )
    context = DraftContext(weights, cache, text[:, length], jnp.array([length]), Greedy(), row_keys([0]))
    drafted = jax.jit(drafter.propose)(context).tokens

    def rows(module, hidden_BTD, tokens_BT):
        rotary = module._rotary(jnp.arange(tokens_BT.shape[1])[None])[SLIDING]
        return module.mtp[0](module.embed[tokens_BT], hidden_BTD, rotary)[0]

    hidden, tokens, expected = features.hidden, text[:, 1:], []
    for _ in range(drafter.block_size - 1):
        ahead = Backbone(config).apply({"params": params}, hidden, tokens, method=rows)[:, -1:]
        expected.append(int(jnp.argmax(ahead @ params["head"].T)))
        hidden = jnp.concatenate([hidden, ahead], axis=1)
        tokens = np.append(tokens, [[expected[-1]]], axis=1)
    assert drafted.tolist() == [expected] and len(set(expected)) > 3
    first = Backbone(config).apply({"params": params}, hidden[:, : length + 1], text, method="predict_ahead")[0]
    assert int(jnp.argmax(first[0, length - 1])) == expected[0]

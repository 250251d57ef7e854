"""Decoding through the cache gives the full forward pass's logits, however the tokens are cut up."""

import dataclasses
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mimo_jax.config.model import ModelConfig
from mimo_jax.modeling.backbone import Backbone
from mimo_jax.modeling.cache import MAX_BLOCK, Cache, init_cache
from tests.tiny import random_params, random_tokens, tiny_config

WINDOW = 8
CONFIG = tiny_config(sliding_window=WINDOW, mtp_layers=0)
PARAMS = random_params(CONFIG)
TOTAL = 72
TOKENS = random_tokens(CONFIG, 2, TOTAL)
PROMPTS = (WINDOW - 1, WINDOW, WINDOW + 1, 2 * WINDOW + 3)
# float32 through four layers in another summation order; logits of scale 3.
TOLERANCE = 1e-5


@partial(jax.jit, static_argnames=("config", "logits"))
def forward(params, tokens, cache=None, counts=None, config: ModelConfig = CONFIG, logits="all"):
    return Backbone(config).apply({"params": params}, tokens, cache, counts, logits)


@pytest.fixture(scope="module")
def full() -> np.ndarray:
    return np.asarray(forward(PARAMS, TOKENS)[0])


def fresh(capacity: int = TOTAL + MAX_BLOCK, batch: int = 2) -> Cache:
    return init_cache(CONFIG, batch, capacity)


def prefilled(length: int) -> tuple[np.ndarray, Cache]:
    """A prompt of `length` tokens through the bucket of 24, the rest of which is padding."""
    padded = np.zeros((2, 24), np.int32)
    padded[:, :length] = TOKENS[:, :length]
    logits, _, cache = forward(PARAMS, padded, fresh(), jnp.full(2, length))
    return logits[:, :length], cache


@pytest.mark.parametrize("prompt", PROMPTS)
@pytest.mark.parametrize("block", [1, MAX_BLOCK])
def test_prefill_then_decode_equals_full_forward(full, prompt, block):
    """A padded prompt, then tokens one by one or in the longest blocks: at every window edge logits are the same."""
    logits, cache = prefilled(prompt)
    np.testing.assert_allclose(logits, full[:, :prompt], atol=TOLERANCE)
    for start in range(prompt, prompt + 3 * MAX_BLOCK, block):
        step, _, cache = forward(PARAMS, TOKENS[:, start : start + block], cache)
        np.testing.assert_allclose(step, full[:, start : start + block], atol=TOLERANCE)
    assert cache.lengths.tolist() == [prompt + 3 * MAX_BLOCK] * 2


@pytest.mark.parametrize("chunk", [5, 16, 24])
def test_chunked_prefill_with_rows_of_different_lengths(full, chunk):
    """Rows of a batch may have any lengths: each is cut into chunks with its own padding, and stays itself."""
    lengths = np.array([2 * WINDOW + 3, 37])
    cache = fresh()
    found = [np.zeros((0, CONFIG.vocab_size), np.float32) for _ in lengths]
    for start in range(0, int(lengths.max()), chunk):
        counts = np.clip(lengths - start, 0, chunk)
        tokens = np.zeros((2, chunk), np.int32)
        for row, count in enumerate(counts):
            tokens[row, :count] = TOKENS[row, start : start + count]
        logits, _, cache = forward(PARAMS, tokens, cache, jnp.asarray(counts))
        found = [np.concatenate([old, logits[row, : counts[row]]]) for row, old in enumerate(found)]
    assert cache.lengths.tolist() == lengths.tolist()
    for row, length in enumerate(lengths):
        np.testing.assert_allclose(found[row], full[row, :length], atol=TOLERANCE)
    following = TOKENS[np.arange(2), lengths][:, None]
    step, _, _ = forward(PARAMS, following, cache)
    for row, length in enumerate(lengths):
        np.testing.assert_allclose(step[row, 0], full[row, length], atol=TOLERANCE)


@pytest.mark.parametrize("prompt", PROMPTS)
@pytest.mark.parametrize("kept", [0, 3, 7])
def test_a_block_can_be_taken_back(full, prompt, kept):
    """Rejected draft tokens leave no trace: write 8, keep some by shortening the lengths, and go on as before."""
    _, cache = prefilled(prompt)
    rng = np.random.default_rng(prompt)
    for start in range(prompt, prompt + 3 * (kept + 1), kept + 1):
        draft = rng.integers(0, CONFIG.vocab_size, (2, MAX_BLOCK)).astype(np.int32)
        draft[:, :kept] = TOKENS[:, start : start + kept]
        logits, _, cache = forward(PARAMS, draft, cache)
        np.testing.assert_allclose(logits[:, :kept], full[:, start : start + kept], atol=TOLERANCE)
        cache = dataclasses.replace(cache, lengths=cache.lengths - (MAX_BLOCK - kept))
        step, _, cache = forward(PARAMS, TOKENS[:, start + kept : start + kept + 1], cache)
        np.testing.assert_allclose(step[:, 0], full[:, start + kept], atol=TOLERANCE)


def test_only_the_last_logits_on_request(full):
    """`logits="last"` gives each row's last real position and nothing else."""
    lengths = jnp.array([5, 24])
    logits, _, _ = forward(PARAMS, TOKENS[:, :24], fresh(), lengths, logits="last")
    assert logits.shape == (2, 1, CONFIG.vocab_size)
    np.testing.assert_allclose(logits[:, 0], full[np.arange(2), np.asarray(lengths) - 1], atol=TOLERANCE)


def test_a_row_does_not_depend_on_its_batch_mates(full):
    """Changing one row changes nothing in another, bit for bit."""
    tokens = TOKENS.copy()
    tokens[1] = (tokens[1] + 1) % CONFIG.vocab_size
    np.testing.assert_array_equal(np.asarray(forward(PARAMS, tokens)[0][0]), full[0])

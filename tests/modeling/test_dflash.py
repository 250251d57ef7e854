"""The drafter against its published equations, and its three paths against each other.

A wrong draft cache never changes what is generated, only how much is accepted, so no test of the output can see it.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mimo_jax.config.drafter import LONGEST_MATCH, DrafterConfig
from mimo_jax.decode.drafter import DraftContext, ReadTokens, Weights
from mimo_jax.decode.sampling import Greedy
from mimo_jax.drafters.autoregressive import AutoregressiveDrafter
from mimo_jax.drafters.dflash import DFlashDrafter
from mimo_jax.errors import UserError
from mimo_jax.modeling.attention import heads_first
from mimo_jax.modeling.backbone import Features
from mimo_jax.modeling.cache import LayerCache
from mimo_jax.modeling.dflash import DFlash, abstract_drafter
from mimo_jax.training.drafter import draft_hidden
from tests.drafters.plain_lookup import look_up
from tests.tiny import TINY, tiny_drafter

CONFIG = tiny_drafter(
    target_layer_ids=(0, 2, 3),
    num_target_layers=4,
    vocab_size=250,
    window=12,
    backbone_rotary_base=500.0,
    rope_theta=100.0,
    value_scale=0.612,
    bias_rank=4,
)
RNG = np.random.default_rng(0)
LENGTH = 40
AUX = RNG.normal(size=(1, LENGTH, 3 * 64)).astype(np.float32)
ANCHOR = RNG.normal(size=64).astype(np.float32)
TARGET = {
    "embed": jnp.asarray(RNG.normal(size=(256, 64)), jnp.float32),
    "head": jnp.asarray(RNG.normal(size=(256, 64)), jnp.float32),
}


@functools.cache
def params(config: DrafterConfig = CONFIG) -> dict:
    """Random, with gains, sinks and mask off their neutral start."""
    rng = np.random.default_rng(1)
    return jax.tree.map(
        lambda leaf: jnp.asarray(rng.normal(0.3, 0.4, leaf.shape), jnp.float32), abstract_drafter(config)
    )


def rms(x, gain, eps=1e-5):
    return x / np.sqrt(np.mean(x * x, axis=-1, keepdims=True) + eps) * gain


def rotate_by_hand(x, position, theta, dims):
    """Half-split rotation of the first `dims` of a head vector at one position."""
    half = dims // 2
    angle = position * theta ** (-np.arange(half) * 2 / dims)
    first, second = x[..., :half], x[..., half:dims]
    rotated = [first * np.cos(angle) - second * np.sin(angle), second * np.cos(angle) + first * np.sin(angle)]
    return np.concatenate([*rotated, x[..., dims:]], axis=-1)


def by_the_equations(config: DrafterConfig, aux, anchor, start: int, mask_rows=None) -> np.ndarray:
    """The block's hidden rows after `start` context tokens, position by position, in float64.

    `mask_rows` are the rows after the anchor's; by default the mask vector.
    """
    p = jax.tree.map(lambda leaf: np.asarray(leaf, np.float64), params(config))
    heads, groups, dim = config.num_heads, config.num_heads // config.num_kv_heads, config.head_dim
    context = [rms(p["fuse"] @ aux[0, t], p["context_norm"]["weight"]) for t in range(start)]
    rows = [anchor.astype(np.float64)] + ([p["mask"]] * (config.block_size - 1) if mask_rows is None else mask_rows)
    for index in range(config.num_layers):
        layer = p[f"layers_{index}"]
        att = layer["attention"]

        def key_value(x, position, theta, att=att):
            key = rms((att["k"] @ x).reshape(-1, dim), att["k_norm"]["weight"])
            return rotate_by_hand(key, position, theta, config.rotary_dim), config.value_scale * (att["v"] @ x).reshape(
                -1, dim
            )

        normed = [rms(row, layer["input_norm"]["weight"]) for row in rows]
        held = [(t, *key_value(c, t, config.context_theta)) for t, c in enumerate(context)]
        block = [key_value(x, start + n, config.block_theta) for n, x in enumerate(normed)]
        for n, x in enumerate(normed):
            query = rms((att["q"] @ x).reshape(heads, dim), att["q_norm"]["weight"])
            query = rotate_by_hand(query, start + n, config.block_theta, config.rotary_dim)
            seen = [(k, v) for t, k, v in held if t + config.window > start + n] + block
            out = []
            for head in range(heads):
                scores = np.array([query[head] @ k[head // groups] for k, _ in seen]) / np.sqrt(dim)
                weights = np.exp(scores)
                total = weights.sum() + (np.exp(att["sink"][head]) if config.has_sink else 0)
                out.append(sum(w * v[head // groups] for w, (_, v) in zip(weights / total, seen)))
            rows[n] = rows[n] + att["o"] @ np.concatenate(out)
            x = rms(rows[n], layer["post_norm"]["weight"])
            gate, up = layer["mlp"]["gate"] @ x, layer["mlp"]["up"] @ x
            rows[n] = rows[n] + layer["mlp"]["down"] @ (gate / (1 + np.exp(-gate)) * up)
    return np.stack([rms(row, p["norm"]["weight"]) for row in rows])


@functools.partial(jax.jit, static_argnums=0)
def from_scratch(config: DrafterConfig, aux, anchor, start) -> jax.Array:
    """The module over the whole context at once."""
    module, positions = DFlash(config), jnp.arange(LENGTH)[None]
    layers = module.apply({"params": params(config)}, aux, positions, method="context")
    context = tuple(LayerCache(*map(heads_first, layer)) for layer in layers)
    return module.apply({"params": params(config)}, anchor[None], start[None], context, positions)[0]


def features(aux) -> Features:
    return Features(jnp.zeros((*aux.shape[:2], 64)), jnp.zeros((0, 0), jnp.int32), jnp.asarray(aux))


VARIANTS = {
    "published": CONFIG,
    "no sink": dataclasses.replace(CONFIG, has_sink=False),
    "mixed bases": dataclasses.replace(CONFIG, rotary_base="mixed"),
    "the backbone's base": dataclasses.replace(CONFIG, rotary_base="backbone"),
}


@pytest.mark.parametrize("name", VARIANTS)
@pytest.mark.parametrize("start", [1, 5, 12, 13, 30])
def test_the_block_follows_the_published_equations(name, start):
    """Injected context, both rotary bases, sinks, value scale and window give what MiMo's equations give."""
    expected = by_the_equations(VARIANTS[name], AUX, ANCHOR, start)
    found = from_scratch(VARIANTS[name], AUX, ANCHOR, jnp.array(start))
    np.testing.assert_allclose(found, expected, atol=2e-4, rtol=2e-4)


def test_the_context_is_strictly_before_the_anchor_and_within_the_window():
    """No feature at or after the anchor, or older than the window, reaches the block; every one between does."""
    start, reaching = 20, []
    base = np.asarray(from_scratch(CONFIG, AUX, ANCHOR, jnp.array(start)))
    for place in range(LENGTH):
        changed = AUX.copy()
        changed[0, place] += 1.0
        if not np.array_equal(from_scratch(CONFIG, changed, ANCHOR, jnp.array(start)), base):
            reaching.append(place)
    assert reaching == list(range(start - CONFIG.window + 1, start))


def test_the_ring_equals_a_recompute_whatever_was_rejected():
    """Reading rounds of 1 to 8 kept tokens, prefill longer than the ring included, drafts as from scratch."""
    proposer = DFlashDrafter(CONFIG)
    rng = np.random.default_rng(2)
    update, propose = jax.jit(proposer.update_cache), jax.jit(proposer.propose)
    weights, keys = Weights(TARGET, params()), jax.random.key(0)[None]
    for prefill in (1, 7, 25):
        cache = proposer.init_cache(1, 64)
        length = 0
        for size in [prefill] + [8] * 4:
            kept = size if length == 0 else int(rng.integers(1, 9))
            if length + kept > LENGTH:
                break
            block = np.full((1, size, AUX.shape[-1]), 99.0, np.float32)  # rejected rows hold rubbish
            block[:, :kept] = AUX[:, length : length + kept]
            tokens = jnp.zeros((1, size), jnp.int32)
            read = ReadTokens(tokens, tokens, features(block), jnp.array([length]), jnp.array([kept]))
            cache = update(weights, cache, read)
            length += kept
            context = DraftContext(weights, cache, jnp.array([17]), jnp.array([length]), Greedy(), keys)
            drafted = propose(context)
            hidden = from_scratch(CONFIG, AUX, TARGET["embed"][17], jnp.array(length))
            assert drafted.tokens[0].tolist() == greedy_by_hand(np.asarray(hidden))


def greedy_by_hand(hidden) -> list[int]:
    """Draft by draft: the head's logits of known ids plus W2 W1[previous], and the largest."""
    chosen, previous = [], 17
    for row in hidden[1:]:
        logits = np.asarray(TARGET["head"])[: CONFIG.vocab_size] @ row
        logits = logits + params()["bias_out"] @ params()["bias_in"][previous]
        previous = int(np.argmax(logits))
        chosen.append(previous)
    return chosen


def test_training_sees_what_inference_computes():
    """The block after an anchor in a training batch has the hidden rows that drafting there would have."""
    aux = np.concatenate([AUX, AUX[:, ::-1]])
    tokens = RNG.integers(0, 256, (2, LENGTH))
    anchors = np.array([[1, 5, 12, 30], [3, 13, 22, 39]])
    in_training = jax.jit(draft_hidden, static_argnums=(1, 2))
    trained = in_training(params(), CONFIG, "block", TARGET["embed"], aux, tokens, anchors)
    trained = np.asarray(trained).reshape(2, 4, CONFIG.block_size - 1, -1)
    for row in range(2):
        for column, anchor in enumerate(anchors[row]):
            embedded = TARGET["embed"][tokens[row, anchor]]
            expected = from_scratch(CONFIG, aux[row : row + 1], embedded, jnp.array(anchor))
            np.testing.assert_allclose(trained[row, column], expected[1:], atol=1e-4, rtol=1e-4)


GUESSING = dataclasses.replace(CONFIG, lookup=30, bias_rank=0)
TEXT = np.random.default_rng(4).integers(0, 3, LENGTH)  # so few symbols that suffixes of every length come back


def rows_by_hand(text: list[int]) -> list[np.ndarray]:
    """Mask vector, plus the projected embedding of what a lookup in plain Python finds, plus a row for the match."""
    tokens, matched = look_up(text[-GUESSING.lookup - 1 :], LONGEST_MATCH)
    mask, matrix, rows = (np.asarray(params(GUESSING)[name], np.float64) for name in ("mask", "guess", "matched"))
    guesses = np.asarray(TARGET["embed"])[tokens] @ matrix.T if tokens else np.zeros((7, 64))
    return list(mask + guesses + rows[matched])


@pytest.mark.parametrize("start", [1, 9, 24, 38])
def test_drafts_start_from_what_prompt_lookup_finds(start):
    """Drafts equal those of the equations with every draft's guess by hand, read in pieces."""
    proposer, cache, length = DFlashDrafter(GUESSING), DFlashDrafter(GUESSING).init_cache(1, 64), 0
    weights = Weights(TARGET, params(GUESSING))
    while length < start:
        kept = min(5, start - length)
        piece = slice(length, length + 8)
        tokens = jnp.asarray(TEXT[None, piece]).at[:, kept:].set(99)  # rejected
        seen = features(AUX[:, piece])
        read = ReadTokens(tokens, tokens, seen, jnp.array([length]), jnp.array([kept]))
        cache = proposer.update_cache(weights, cache, read)
        length += kept
    last, keys = jnp.array([TEXT[start]]), jax.random.key(0)[None]
    drafted = proposer.propose(DraftContext(weights, cache, last, jnp.array([start]), Greedy(), keys))
    anchor, rows = np.asarray(TARGET["embed"][TEXT[start]]), rows_by_hand(TEXT[: start + 1].tolist())
    hidden = by_the_equations(GUESSING, AUX, anchor, start, rows)[1:]
    preferred = np.argmax(hidden @ np.asarray(TARGET["head"])[: GUESSING.vocab_size].T, axis=-1)
    assert drafted.tokens[0].tolist() == preferred.tolist()


def test_training_sees_the_guesses_of_inference():
    """The blocks of a training row have the hidden rows of the equations, with guesses looked up before each anchor."""
    anchors = np.array([[1, 9, 24, 29]])
    in_training = jax.jit(draft_hidden, static_argnums=(1, 2))
    trained = in_training(params(GUESSING), GUESSING, "block", TARGET["embed"], AUX, TEXT[None], anchors)
    for block, anchor in zip(np.asarray(trained), anchors[0]):
        rows = rows_by_hand(TEXT[: anchor + 1].tolist())
        expected = by_the_equations(GUESSING, AUX, np.asarray(TARGET["embed"][TEXT[anchor]]), anchor, rows)
        np.testing.assert_allclose(block, expected[1:], atol=1e-3, rtol=1e-3)


def test_the_chain_drafts_what_it_was_trained_for():
    """The autoregressive control, token by token through its cache, proposes what one teacher-forced pass prefers."""
    config = dataclasses.replace(CONFIG, bias_rank=0)
    proposer, length = AutoregressiveDrafter(config), 25
    cache = proposer.init_cache(1, 64)
    zero, count = jnp.array([0]), jnp.array([length])
    tokens = jnp.zeros((1, length), jnp.int32)
    weights = Weights(TARGET, params(config))
    cache = proposer.update_cache(weights, cache, ReadTokens(tokens, tokens, features(AUX[:, :length]), zero, count))
    last, keys = jnp.array([17]), jax.random.key(0)[None]
    drafted = jax.jit(proposer.propose)(DraftContext(weights, cache, last, count, Greedy(), keys))
    text = np.zeros((1, LENGTH), int)
    text[0, length : length + 8] = [17, *drafted.tokens[0].tolist()]
    in_training = jax.jit(draft_hidden, static_argnums=(1, 2))
    hidden = in_training(params(config), config, "chain", TARGET["embed"], AUX, text, np.array([[length]]))
    preferred = np.argmax(np.asarray(hidden[0] @ TARGET["head"].T)[:, : config.vocab_size], axis=-1)
    assert drafted.tokens[0].tolist() == preferred.tolist()


def test_the_draft_cache_does_not_grow_with_the_context():
    """Rings of window + block rows and the text that is searched, whatever the capacity of the target's cache."""
    for capacity in (64, 100_000):
        shapes = [leaf.shape for leaf in jax.tree.leaves(DFlashDrafter(GUESSING).init_cache(3, capacity))]
        assert shapes == [(3, 2, CONFIG.window + CONFIG.block_size, 16)] * 4 + [(3, GUESSING.lookup)]


def test_a_small_vocabulary_is_never_left():
    """A drafter that knows fewer ids than the target's table has rows proposes none of the others."""
    target = {**TARGET, "head": TARGET["head"].at[250:].mul(1e3)}  # rows that would win everywhere
    proposer, cache = DFlashDrafter(CONFIG), DFlashDrafter(CONFIG).init_cache(8, 64)
    last, keys = jnp.arange(8), jax.random.split(jax.random.key(0), 8)
    weights = Weights(target, params())
    drafted = proposer.propose(DraftContext(weights, cache, last, jnp.zeros(8, jnp.int32), Greedy(), keys))
    assert int(drafted.tokens.max()) < CONFIG.vocab_size


@pytest.mark.parametrize(
    ("field", "value", "named"),
    [
        ("hidden_size", 96, "hidden_size=96, but the target has 64"),
        ("num_target_layers", 6, "num_target_layers=6, but the target has 4"),
        ("vocab_size", 300, "vocab_size=300, but the target's table has 256 rows"),
        ("mask_token_id", 256, "mask_token_id=256, but the target's table has 256 rows"),
    ],
)
def test_a_drafter_of_another_target_is_refused(field, value, named):
    """A geometry that does not fit the target is an error with both values."""
    with pytest.raises(UserError, match=named):
        dataclasses.replace(CONFIG, **{field: value}).check_fits(TINY)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("block_size", 17),
        ("block_size", 1),
        ("window", 7),
        ("target_layer_ids", (0, 4)),
        ("target_layer_ids", ()),
        ("num_kv_heads", 3),
        ("rotary_base", "both"),
        ("head_dim", 2),
        ("value_scale", -1.0),
        ("bias_rank", -1),
        ("lookup", 1 << 20),
        ("dtype", "float16"),
    ],
)
def test_impossible_geometry_is_named(field, value):
    """A value no drafter can have is an error that names the field."""
    with pytest.raises(UserError, match=field):
        dataclasses.replace(CONFIG, **{field: value})

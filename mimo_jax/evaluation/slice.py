"""One device's share of a model that needs several, as a model of its own: what a round takes there, without transfers.

The share of a tensor-parallel device is a model with that part of the heads, features and rows of the vocabulary; all
experts are there, each split. Weights are random, in the file format of the real ones.
"""

from __future__ import annotations

import dataclasses
import statistics
import time
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from mimo_jax import layouts
from mimo_jax.cli.memory import check_memory
from mimo_jax.config.drafter import DrafterConfig
from mimo_jax.config.model import ModelConfig
from mimo_jax.config.presets import drafter_preset, preset, preset_format
from mimo_jax.decode import loop
from mimo_jax.decode.controls import alike
from mimo_jax.decode.drafter import PLAIN, Draft, DraftContext, Drafter, NoDrafter, Weights
from mimo_jax.decode.sampling import Greedy
from mimo_jax.decode.step import FlaxStep
from mimo_jax.drafters.dflash import DFlashDrafter
from mimo_jax.modeling.cache import init_cache
from mimo_jax.planning.forecast import ACCEPTANCES, BOUNDS, all_reduces
from mimo_jax.planning.traffic import Plan, round_reads
from mimo_jax.sharding import MeshShape
from mimo_jax.weights.params import Weight, abstract_tree, array_bytes
from pallas_kernels.hardware import GPUS
from pallas_kernels.timing import seconds

SCALE = 119  # E8M0: 2^-8, so that sums of thousands of products stay near 1


@dataclasses.dataclass(frozen=True)
class BlankDrafter(NoDrafter):
    """Drafts nothing of value and takes no time: a round is what verifying a block takes."""

    block_size: int = 8

    def propose(self, context: DraftContext) -> Draft:
        # Ids that differ, so that they are routed differently.
        steps_M = jnp.arange(1, self.block_size)
        vocab_size = context.weights.target["embed"].shape[0]
        return Draft((context.anchor_B[:, None] * 31 + 7919 * steps_M) % vocab_size, None)


def share(config: ModelConfig, ways: int, layers: int | None) -> ModelConfig:
    """The share of one of `ways` tensor-parallel devices, of the first `layers` layers."""
    MeshShape(tensor=ways).check_divides(config)
    return dataclasses.replace(
        config,
        vocab_size=config.vocab_size // ways,
        layer_pattern=config.layer_pattern[:layers],
        moe_pattern=config.moe_pattern[:layers],
        num_heads=config.num_heads // ways,
        num_kv_heads=config.num_kv_heads // ways,
        sliding_num_kv_heads=config.sliding_num_kv_heads // ways,
        intermediate_size=config.intermediate_size // ways,
        moe_intermediate_size=config.moe_intermediate_size // ways,
        mtp_layers=0,
        bos_token_id=None,  # special ids may lie in another share
        eos_token_id=None,
        pad_token_id=None,
    )


def drafter_share(config: DrafterConfig, ways: int, layers: int) -> DrafterConfig:
    """The drafter's share, which reads as many of `layers` layers as the whole one reads of all."""
    return dataclasses.replace(
        config,
        vocab_size=config.vocab_size // ways,
        mask_token_id=0,
        num_heads=config.num_heads // ways,
        num_kv_heads=config.num_kv_heads // ways,
        intermediate_size=config.intermediate_size // ways,
        num_target_layers=layers,
        target_layer_ids=tuple(min(layer, layers - 1) for layer in config.target_layer_ids),
    )


def random_weights(table: Iterator[Weight]) -> Any:
    """Weights of random content, as files store them, made on the device leaf by leaf."""
    tree = abstract_tree(table)
    leaves, structure = jax.tree_util.tree_flatten_with_path(tree)
    keys = jax.random.split(jax.random.key(0), len(leaves))
    made = []
    for key, (path, leaf) in zip(keys, leaves):
        name = jax.tree_util.keystr(path, simple=True, separator="/")
        make = jax.jit(_random_leaf, static_argnums=(1, 2, 3))
        made.append(make(key, name.endswith("scales"), leaf.shape, leaf.dtype))
    return jax.tree.unflatten(structure, made)


def _random_leaf(key: jax.Array, is_scale: bool, shape: tuple[int, ...], dtype: Any) -> jax.Array:
    if dtype == jnp.uint8:
        return jnp.full(shape, SCALE, jnp.uint8) if is_scale else jax.random.bits(key, shape, jnp.uint8)
    if is_scale:
        return jnp.full(shape, 2.0**-8, dtype)
    return (0.02 * jax.random.normal(key, shape, jnp.float32)).astype(dtype)


def seconds_per_round(
    config: ModelConfig, weights: Weights, drafter: Drafter, context: int, rounds: int, repeats: int
) -> list[float]:
    """Seconds a round takes after `context` cached tokens: of each of `repeats` runs of `rounds`, compiled before."""
    decoder = loop.Decoder(FlaxStep(config, drafter.aux_layers), drafter)
    capacity = context + (rounds + 2) * drafter.block_size * (repeats + 1)
    cache = init_cache(config, 1, capacity)
    cache = dataclasses.replace(cache, lengths=jnp.full(1, context, jnp.int32))
    draft_cache = drafter.init_cache(1, capacity)
    logits, controls = jnp.zeros((1, config.vocab_size)), alike(Greedy(), (), 1)
    limits, keys = np.full(1, capacity, np.int32), loop.row_keys([0])
    state = loop.start(decoder, cache, draft_cache, logits, limits, keys, controls)
    found = []
    for _ in range(repeats + 1):
        started = time.perf_counter()
        state = loop.decode(decoder, weights, state, controls, rounds)
        jax.block_until_ready(state)
        found.append((time.perf_counter() - started) / rounds)
    return found[1:]


def streaming_read(nbytes: int, repeats: int) -> float:
    """Bytes per second of a sum over an array of `nbytes`, the median of `repeats`: what reading alone reaches."""
    data = jnp.ones((nbytes // 4 // 1024, 1024), jnp.float32)
    total = jax.jit(lambda array: jnp.sum(array, axis=0))
    return data.nbytes / statistics.median(seconds(total, data, repeats=repeats))


def measure(
    preset_name: str, ways: int, layers: int | None, contexts: list[int], rounds: int, repeats: int
) -> Iterator[dict[str, Any]]:
    """Rounds on the share of one of `ways` devices, one record each; the first says what was measured on.

    Its `streaming_read` is how fast reading alone is there, in bytes per second.
    """
    shape, drafter = MeshShape(tensor=ways), drafter_preset(preset_name)
    whole = Plan(preset(preset_name), preset_format(preset_name), drafter, shape, cache_itemsize=2)
    config = share(whole.config, ways, layers)
    drafter = drafter_share(drafter, ways, config.num_layers)
    plan = Plan(config, whole.file_format, drafter, MeshShape(), cache_itemsize=2)
    check_memory(array_bytes(plan.weights()), f"the share of {config.num_layers} layers")
    on_gpu = jax.default_backend() == "gpu"
    layout = None if on_gpu else "packed"
    _, config, params = layouts.for_device(config, random_weights(plan.weights()), layout=layout, consume=True)
    weights = Weights(params, random_weights(plan.drafter_weights()))
    reached = streaming_read((8 << 30) if on_gpu else (256 << 20), repeats)
    yield {"device": jax.devices()[0].device_kind, "layers": config.num_layers, "tp": ways, "streaming_read": reached}
    drafters = {"T=1": PLAIN, "T=8": BlankDrafter(), "T=8 + drafter": DFlashDrafter(drafter)}
    for context in contexts:
        for name, proposer in drafters.items():
            found = seconds_per_round(config, weights, proposer, context, rounds, repeats)
            median = statistics.median(found)
            read = sum(round_reads(plan, proposer.block_size, context, "drafter" in name).values())
            row = {
                "round": name,
                "context": context,
                "milliseconds": 1e3 * median,
                "lowest": 1e3 * min(found),
                "highest": 1e3 * max(found),
                "bytes": read,
                "of_datasheet": read / median / GPUS["h200"].bandwidth,
                "of_streaming_read": read / median / reached,
            }
            yield row | (_projected(whole, name, median) if config.num_layers == whole.config.num_layers else {})


def _projected(whole: Plan, name: str, round_seconds: float) -> dict[str, float]:
    """Tokens per second of the whole model, from a device's measured round and the sums that it leaves out."""
    has_drafter = "drafter" in name
    sums = all_reduces(whole, has_drafter) * BOUNDS["low"].all_reduce
    accepted = ACCEPTANCES[-1] if has_drafter else ACCEPTANCES[0]
    return {"projected_tokens_per_second": accepted / (round_seconds + sums)}

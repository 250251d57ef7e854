"""What the target's own uncertainty leaves to a drafter whose drafts do not see each other, when text is sampled."""

from __future__ import annotations

from functools import partial

import jax
import numpy as np
from jaxtyping import Array, Float, Int

from mimo_jax.cli.progress import progress
from mimo_jax.config.model import ModelConfig
from mimo_jax.decode.sampling import Sampled, probabilities
from mimo_jax.generation import Request, Result, generate_batch
from mimo_jax.loading import Model
from mimo_jax.modeling.backbone import Backbone
from mimo_jax.weights import Params


@partial(jax.jit, static_argnames="config")
def _distributions(
    params: Params, tokens_BT: Int[Array, "B T"], config: ModelConfig, strategy: Sampled
) -> Float[Array, "B T C"]:
    """The distribution of the token after each position."""
    return probabilities(strategy, Backbone(config).apply({"params": params}, tokens_BT)[0])


def entropy_per_token(model: Model, prompts: list[list[int]], results: list[Result], strategy: Sampled) -> float:
    """Mean entropy, in nats, of the distributions that the generated tokens were drawn from."""
    total, count = 0.0, 0
    length = max(len(prompt) + len(result.tokens) for prompt, result in zip(prompts, results))
    for prompt, result in zip(prompts, results):
        row = (prompt + result.tokens)[:-1]
        padded = np.array([row + [0] * (length - len(row))], np.int32)
        p_TC = np.asarray(_distributions(model.params, padded, model.config, strategy))[0, len(prompt) - 1 : len(row)]
        total -= float(np.sum(p_TC * np.log(np.maximum(p_TC, 1e-30))))
        count += len(p_TC)
    return total / count


def order_blind_bound(
    model: Model, prefixes: list[list[int]], strategy: Sampled, samples: int = 256, drafts: int = 7
) -> float:
    """Tokens per round, under the token-wise rule, of a drafter that knows every draft's marginal distribution
    perfectly.

    The marginals after each prefix are counted over `samples` continuations; blocks are drawn from their product and
    put before the target. Counting errors make it an estimate from below; prefixes must be equally long.
    """
    lengths = []
    with progress("order-blind bound", len(prefixes)) as bar:
        for number, prefix in enumerate(prefixes):
            seeds = range(number * samples, (number + 1) * samples)
            rows = generate_batch(model, [Request(prefix, strategy, drafts, seed) for seed in seeds])
            full = [row.tokens for row in rows if len(row.tokens) == drafts]  # a text that stopped has no marginals
            if full:
                lengths.append(_expected_length(model, prefix, np.array(full), strategy, number))
            bar.advance()
    return float(np.mean(lengths))


def _expected_length(model: Model, prefix: list[int], seen_BM: np.ndarray, strategy: Sampled, seed: int) -> float:
    """Mean of 1 + sum over drafts of the probability that all drafts up to it are accepted."""
    rng = np.random.default_rng(seed)
    drafts = seen_BM.shape[1]
    marginals_MC = np.stack([np.bincount(column, minlength=model.config.vocab_size) for column in seen_BM.T])
    marginals_MC = marginals_MC / len(seen_BM)
    # A column drawn on its own from what was seen there is a draw from that draft's marginal.
    drafts_BM = np.stack([rng.choice(column, 64) for column in seen_BM.T], axis=1).astype(np.int32)
    rows = np.concatenate([np.tile(np.array(prefix, np.int32), (len(drafts_BM), 1)), drafts_BM], axis=1)
    p_BMC = np.asarray(_distributions(model.params, rows, model.config, strategy))[:, len(prefix) - 1 : -1]
    p_BM = np.take_along_axis(p_BMC, drafts_BM[..., None], axis=2)[..., 0]
    ratio_BM = np.minimum(1.0, p_BM / marginals_MC[np.arange(drafts), drafts_BM])
    return 1.0 + float(np.mean(np.sum(np.cumprod(ratio_BM, axis=1), axis=1)))

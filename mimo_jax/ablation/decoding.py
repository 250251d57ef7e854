"""A checkpoint with its own drafter: tokens per round and per second, by how blocks are drafted and verified."""

from __future__ import annotations

import dataclasses
from functools import partial
from pathlib import Path
from typing import Any

from mimo_jax.ablation import heldout
from mimo_jax.ablation.experiments import Metrics, checkpoint_of
from mimo_jax.checkpoint.dflash import FOLDER, has_drafter
from mimo_jax.config.drafter import DrafterConfig
from mimo_jax.decode.sampling import strategy_at
from mimo_jax.drafters.dflash import DFlashDrafter
from mimo_jax.errors import UserError
from mimo_jax.evaluation.acceptance import continue_all, measure
from mimo_jax.loading import load, with_drafter

ROWS = 20  # prompts at a time


def check(settings: dict[str, Any]) -> None:
    if not has_drafter(checkpoint_of(settings)):
        raise UserError(f"study: model={settings['model']!r} has no drafter, which decoding needs")


def run(settings: dict[str, Any], seed: int, folder: Path) -> Metrics:
    checkpoint = checkpoint_of(settings)
    plain = load(checkpoint, layout="dense", draft="none")
    model = dataclasses.replace(
        with_drafter(plain, checkpoint / FOLDER, partial(_of_blocks, settings["block_size"])), rule=settings["rule"]
    )
    prompts = heldout.prompts(Path(settings["data"]), checkpoint, settings["prompts"], seed)
    strategy = strategy_at(settings["temperature"])
    results = continue_all(model, prompts, strategy, settings["tokens"], ROWS, "drafting")
    batches = {id(result.timing): result.timing for result in results}.values()
    seconds, tokens = sum(one.decode_seconds for one in batches), sum(one.generated_tokens for one in batches)
    return {"tokens_per_round": measure(results).tokens_per_round, "tokens_per_second": tokens / seconds}


def _of_blocks(size: int, config: DrafterConfig) -> DFlashDrafter:
    return DFlashDrafter(dataclasses.replace(config, block_size=size))

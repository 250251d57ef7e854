"""How well a drafter drafts after a short training, by its loss and its geometry."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

from mimo_jax.ablation import heldout
from mimo_jax.ablation.experiments import Metrics, checkpoint_of
from mimo_jax.ablation.training import trained
from mimo_jax.decode.sampling import strategy_at
from mimo_jax.drafters.dflash import DFlashDrafter
from mimo_jax.evaluation.acceptance import continue_all, measure
from mimo_jax.loading import load_dense
from mimo_jax.training.corpus import check_same_tokenizer, load_tokens
from mimo_jax.training.drafter import DraftTrainConfig, Geometry, drafter_for, init_state, training_update
from mimo_jax.training.self_distillation import DistillationConfig, generate_texts

TOKENS, ROWS, HUMAN_SHARE = 48, 20, 0.25
TEXTS_AT_ONCE = 128


def check(settings: dict[str, Any]) -> None:
    check_same_tokenizer(checkpoint_of(settings), Path(settings["data"]))


def run(settings: dict[str, Any], seed: int, folder: Path) -> Metrics:
    checkpoint, data = checkpoint_of(settings), Path(settings["data"])
    model, corpus = load_dense(checkpoint), load_tokens(data, "train")
    rows = min(settings["texts"], TEXTS_AT_ONCE)
    asked, place = DistillationConfig(rows=rows), folder / f"texts_{rows}"
    texts = generate_texts(model, corpus, asked, place, -(-settings["texts"] // rows))
    train = DraftTrainConfig(
        settings["steps"], settings["batch"], loss=settings["loss"], human_share=HUMAN_SHARE, seed=seed
    )
    geometry = Geometry(settings["layers"], settings["window"])
    config = drafter_for(model.config, model.tokenizer, geometry)
    config = dataclasses.replace(config, block_size=settings["block_size"], dtype="float32")
    update = training_update(texts, corpus, model, config, train)
    state = trained(init_state(config, train), update, range(train.steps))
    drafting = dataclasses.replace(model, drafter=DFlashDrafter(config), draft_params=state.params)
    prompts = heldout.prompts(data, checkpoint, settings["prompts"], seed)
    strategy = strategy_at(settings["temperature"])
    found = measure(continue_all(drafting, prompts, strategy, TOKENS, ROWS, "drafting"))
    return {"tokens_per_round": found.tokens_per_round, "first_accepted": found.conditional[0]}

"""From a finished run to a checkpoint folder as complete as the published ones."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

from mimo_jax.checkpoint.dflash import attach_drafter, write_drafter
from mimo_jax.checkpoint.export import write_checkpoint
from mimo_jax.config.model import ModelConfig
from mimo_jax.tokenizer import END_OF_TEXT, TURN_END, TURN_START, Tokenizer
from mimo_jax.training import drafter, run

# ChatML without a newline after the turn's end, as the family's template writes it; thinking is on by default.
CHAT_TEMPLATE = (
    "{%- for message in messages -%}"
    "{{ '<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>' }}"
    "{%- endfor -%}"
    "{%- if add_generation_prompt -%}"
    "{{ '<|im_start|>assistant\\n' }}"
    "{%- if enable_thinking is defined and not enable_thinking -%}{{ '<think></think>' }}{%- endif -%}"
    "{%- endif -%}"
)


def extra_files(config: ModelConfig, tokenizer: Tokenizer, tokenizer_json: bytes) -> dict[str, bytes]:
    """The files beside weights and config, by name."""
    stops = [tokenizer.id_of(END_OF_TEXT), tokenizer.id_of(TURN_END)]
    tokenizer_config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "model_max_length": config.max_position,
        "bos_token": END_OF_TEXT,
        "eos_token": TURN_END,
        "pad_token": END_OF_TEXT,
        "additional_special_tokens": [TURN_START, TURN_END],
        "add_bos_token": False,
        "clean_up_tokenization_spaces": False,
        "chat_template": CHAT_TEMPLATE,
    }
    generation_config = {
        "bos_token_id": config.bos_token_id,
        "eos_token_id": stops,
        "pad_token_id": config.pad_token_id,
        "do_sample": True,
        "temperature": 1.0,
        "top_p": 0.95,
    }
    return {
        "tokenizer.json": tokenizer_json,
        "tokenizer_config.json": json.dumps(tokenizer_config, indent=2).encode(),
        "generation_config.json": json.dumps(generation_config, indent=2).encode(),
    }


def export(run_directory: Path, tokenizer_path: Path, out: Path) -> dict[str, Any]:
    """Writes a finished run to `out` in the FP4-DFlash layout."""
    config, train = run.read_settings(run_directory)
    run.check_tokenizer(run_directory, tokenizer_path)
    state = run.latest_state(run_directory, config, train)
    tokenizer = Tokenizer.load(tokenizer_path)
    write_checkpoint(out, config, state.params, extra_files(config, tokenizer, tokenizer_path.read_bytes()))
    return {"checkpoint": str(out), "step": int(state.step)}


def export_drafter(
    run_directory: Path,
    out: Path | None,
    checkpoint: Path | None,
    expected: float | None,
    expected_published: float | None,
) -> dict[str, Any]:
    """Writes a finished run's drafter to the new folder `out`, or into a checkpoint in place of the one it has.

    `expected` is the tokens per round that were measured with its target, `expected_published` the same without extras.
    """
    config, train = drafter.read_settings(run_directory)
    state = drafter.latest_state(run_directory, config, train)
    accepted = {"acceptance_length": expected, "published_acceptance_length": expected_published}
    config = dataclasses.replace(config, **accepted)
    if checkpoint:
        attach_drafter(checkpoint, config, state.params)
    elif out:
        write_drafter(out, config, state.params)
    return {"drafter": str(checkpoint or out), "step": int(state.step)}

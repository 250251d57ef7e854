"""From a finished run to a checkpoint folder as complete as the published ones."""

from __future__ import annotations

import json
from pathlib import Path

from mimo_jax.config import ModelConfig
from mimo_jax.modeling.backbone import Params
from mimo_jax.tokenizer import END_OF_TEXT, TURN_END, TURN_START, Tokenizer

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


def export(out: Path, config: ModelConfig, params: Params, tokenizer_path: Path) -> None:
    """Writes `params` (float32 masters) to `out` in the FP4-DFlash layout."""
    from mimo_jax.checkpoint.huggingface import write_checkpoint

    tokenizer = Tokenizer.load(tokenizer_path)
    write_checkpoint(out, config, params, extra_files(config, tokenizer, tokenizer_path.read_bytes()))

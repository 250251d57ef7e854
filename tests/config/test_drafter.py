"""`dflash/config.json`, published and damaged."""

import dataclasses
import json
import random

import pytest

from mimo_jax.config.dflash import drafter_from_hf, drafter_to_hf, extras_of, with_extras
from mimo_jax.config.drafter import DrafterConfig
from mimo_jax.errors import UserError
from tests.tools.fuzz import mutate_value

PUBLISHED = {  # dflash/config.json of MiMo-V2.5-Pro-FP4-DFlash
    "architectures": ["DFlashDraftModel"],
    "attention_bias": False,
    "auto_map": {"AutoModel": "dflash.DFlashDraftModel"},
    "block_size": 8,
    "bos_token_id": 151643,
    "dflash_config": {
        "attention_sink_bias": True,
        "attention_value_scale": 0.612,
        "backbone_rotary_base": 5_000_000,
        "loss_decay_gamma": 7.0,
        "mask_token_id": 151669,
        "num_anchors": 4096,
        "swa_window_size": 1024,
        "target_layer_ids": [0, 15, 31, 47, 69],
        "use_swa": True,
    },
    "eos_token_id": 151645,
    "head_dim": 128,
    "hidden_size": 6144,
    "intermediate_size": 16384,
    "max_position_embeddings": 262_144,
    "model_type": "qwen3",
    "num_attention_heads": 128,
    "num_hidden_layers": 5,
    "num_key_value_heads": 8,
    "num_target_layers": 70,
    "partial_rotary_factor": 0.5,
    "rms_norm_eps": 1e-5,
    "rope_theta": 10_000,
    "sliding_window": 1024,
    "tie_word_embeddings": False,
    "v_head_dim": 128,
    "vocab_size": 152_064,
}
SMALL = DrafterConfig(
    hidden_size=16,
    intermediate_size=24,
    num_layers=2,
    num_heads=4,
    num_kv_heads=2,
    head_dim=8,
    target_layer_ids=(0, 2),
    num_target_layers=4,
    vocab_size=48,
    mask_token_id=50,
    window=16,
    backbone_rotary_base=1e4,
    value_scale=0.612,
)


def small(**changes) -> DrafterConfig:
    return dataclasses.replace(SMALL, **changes)


def published(**changes) -> dict:
    """The published config with changed keys; a dotted key (`dflash_config__x`) is a nested one, `...` removes."""
    values = json.loads(json.dumps(PUBLISHED))
    for key, value in changes.items():
        table, name = values, key
        if key.startswith("dflash_config__"):
            table, name = values["dflash_config"], key.removeprefix("dflash_config__")
        table.pop(name, None)
        if value is not ...:
            table[name] = value
    return values


def test_published_config_is_understood() -> None:
    """Every value of the published Pro config lands in its field."""
    assert drafter_from_hf(PUBLISHED) == DrafterConfig(
        hidden_size=6144,
        intermediate_size=16384,
        num_layers=5,
        num_heads=128,
        num_kv_heads=8,
        head_dim=128,
        target_layer_ids=(0, 15, 31, 47, 69),
        num_target_layers=70,
        vocab_size=152_064,
        mask_token_id=151_669,
        window=1024,
        block_size=8,
        rope_theta=10_000,
        backbone_rotary_base=5_000_000,
        partial_rotary_factor=0.5,
        value_scale=0.612,
        has_sink=True,
        norm_eps=1e-5,
        max_position=262_144,
    )


def test_written_config_has_the_published_values() -> None:
    """Writing the published geometry gives every published key that describes it back, and none of our own."""
    unread = {"bos_token_id", "eos_token_id"}
    untold = {"num_anchors", "loss_decay_gamma"}
    written = drafter_to_hf(drafter_from_hf(PUBLISHED), "bfloat16")
    assert {key for key in PUBLISHED if written.get(key) != PUBLISHED[key]} == unread | {"dflash_config"}
    nested = {key: value for key, value in PUBLISHED["dflash_config"].items() if key not in untold}
    assert written["dflash_config"] == nested


@pytest.mark.parametrize("changes", [{}, {"rotary_base": "mixed"}, {"backbone_rotary_base": None}])
def test_config_round_trip(changes: dict) -> None:
    """A config survives its file."""
    config = small(acceptance_length=2.5, **changes)
    assert drafter_from_hf(json.loads(json.dumps(drafter_to_hf(config, "bfloat16")))) == config


EXTRAS = {"bias_rank": 3, "lookup": 5, "acceptance_length": 4.5}


def test_extras_have_a_config_of_their_own() -> None:
    """The published config says nothing of extras and has the acceptance without them; theirs gives the rest back."""
    config = small(**EXTRAS, published_acceptance_length=2.5)
    published = drafter_to_hf(config, "bfloat16")
    assert published == drafter_to_hf(small(acceptance_length=2.5), "bfloat16")
    assert extras_of(config) == EXTRAS
    assert with_extras(drafter_from_hf(published), EXTRAS) == config


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"bias_rank": -1}, "bias_rank=-1 must be 0 or a rank"),
        ({"lookup": "256"}, "lookup='256' must be"),
        ({"acceptance_length": 0}, "acceptance_length=0 must be a positive number"),
    ],
)
def test_bad_extras_name_the_key(changes: dict, message: str) -> None:
    """The same of a config of extras."""
    with pytest.raises(UserError, match=f"^here/config.json: {message}"):
        with_extras(SMALL, {**EXTRAS, **changes}, "here/config.json")


BAD_CONFIGS = {
    "full attention": ({"dflash_config__use_swa": False}, r"dflash_config.use_swa=False .* expected True"),
    "attention left open": ({"dflash_config__use_swa": ...}, r"dflash_config.use_swa=None .* expected True"),
    "value width": ({"v_head_dim": 64}, "v_head_dim=64 must equal head_dim=128"),
    "two windows": ({"sliding_window": 512}, "sliding_window=512 must equal dflash_config.swa_window_size=1024"),
    "causal": ({"is_causal": True}, "is_causal=True is not supported"),
    "no nested table": ({"dflash_config": [1]}, "dflash_config must be a table"),
    "missing": ({"hidden_size": ..., "dflash_config__mask_token_id": None}, "hidden_size, dflash_config.mask_token_id"),
    "not a number": ({"hidden_size": [6144]}, r"hidden_size=\[6144\] must be a positive integer"),
    "a string": ({"rope_theta": "10000"}, "rope_theta='10000' must be a positive number"),
    "true": ({"num_key_value_heads": True}, "num_key_value_heads=True must be"),
    "negative": ({"dflash_config__swa_window_size": -1, "sliding_window": None}, "dflash_config.swa_window_size=-1"),
    "huge": ({"vocab_size": 10**30}, "vocab_size=10+ must be"),
    "longer than Python prints": ({"vocab_size": 10**5000}, "vocab_size takes more than 1000 characters"),
    "number for a list": ({"dflash_config__target_layer_ids": 3}, "target_layer_ids=3 must be a list"),
    "list of texts": ({"dflash_config__target_layer_ids": ["a"]}, r"target_layer_ids=\('a',\) must be a list of layer"),
    "layer beyond the target": ({"num_target_layers": 69}, "num_target_layers=69"),
    "block": ({"block_size": 1}, "block_size=1 must be a whole number in"),
    "rotary base": ({"dflash_config__rotary_base": ["drafter"]}, r"rotary_base=\['drafter'\] must be a string"),
    "unknown rotary base": ({"dflash_config__rotary_base": "x"}, "dflash_config.rotary_base='x' must be one of"),
    "other model": ({"model_type": "llama"}, "model_type='llama' is not supported; expected 'qwen3'"),
}


@pytest.mark.parametrize("case", BAD_CONFIGS)
def test_bad_configs_name_the_key(case: str) -> None:
    """A value the drafter cannot have is one line with the file's key, the value and the rule."""
    changes, message = BAD_CONFIGS[case]
    with pytest.raises(UserError, match=message) as caught:
        drafter_from_hf(published(**changes), "here/config.json")
    assert str(caught.value).startswith("here/config.json: ")


def test_any_json_is_a_config_or_an_error() -> None:
    """No JSON value anywhere in the config is anything but understood or a `UserError`."""
    for case in range(2000):
        values = mutate_value(random.Random(case), PUBLISHED)
        try:
            drafter_from_hf(values if isinstance(values, dict) else {})
        except UserError as error:
            assert "\n" not in str(error) and len(str(error)) < 2500

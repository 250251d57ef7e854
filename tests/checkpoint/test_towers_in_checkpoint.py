"""A checkpoint with towers: converted there and back bit for bit, its audio tokenizer carried, `load` finds them."""

import dataclasses
import json

import jax
import numpy as np
import pytest

import mimo_jax as mimo
from mimo_jax.checkpoint.audio_tokenizer import read_audio_tokenizer, write_audio_tokenizer
from mimo_jax.checkpoint.convert import to_huggingface, to_orbax, verify
from mimo_jax.checkpoint.huggingface import open_checkpoint
from mimo_jax.config.huggingface import from_hf
from mimo_jax.config.towers import MEDIA_TOKENS, AudioConfig, AudioTokenizerConfig, MediaConfig, VisionConfig
from mimo_jax.errors import UserError
from mimo_jax.modeling.audio_tokenizer import init_audio_tokenizer
from tests.checkpoint.samples import load_file, random_tensors, save_checkpoint, small

MEDIA = MediaConfig(**{name: index for index, name in enumerate(MEDIA_TOKENS)})
VISION = VisionConfig(64, (-1, 0, 1), 32, 48, num_heads=4, num_kv_heads=2, head_dim=16, patch=4)
AUDIO = AudioConfig(64, channels=3, hidden_size=32, num_layers=1, num_heads=4, intermediate_size=48, codes=16)
SEEING = small(vision=VISION, audio=AUDIO, media=MEDIA)
TOKENIZER = AudioTokenizerConfig((16, 8, 8), hidden_size=32, num_layers=3, num_heads=4, intermediate_size=48, mels=20)


def test_towers_go_there_and_back(tmp_path):
    """Every tensor of the towers has its bits after Orbax and after coming back; both kinds verify."""
    tensors = random_tensors(SEEING)
    source = save_checkpoint(tmp_path / "hf", SEEING, tensors)
    write_audio_tokenizer(source / "audio_tokenizer", TOKENIZER, init_audio_tokenizer(TOKENIZER, jax.random.key(0)))
    assert open_checkpoint(source).skipped == 0
    to_orbax(source, tmp_path / "orbax")
    to_huggingface(tmp_path / "orbax", tmp_path / "back")
    assert verify(tmp_path / "orbax")["verified"] and verify(tmp_path / "back")["verified"]
    back = {name: held for file in (tmp_path / "back").glob("*.safetensors") for name, held in load_file(file).items()}
    assert back.keys() == tensors.keys()
    for name in tensors:
        if name.startswith(("visual.", "audio_encoder.", "speech_embeddings.")):
            assert back[name] == (tensors[name][0], list(tensors[name][1].shape), tensors[name][1].tobytes())
    config = json.loads((tmp_path / "back" / "config.json").read_text())
    assert from_hf(config)[0] == SEEING
    assert read_audio_tokenizer(tmp_path / "back" / "audio_tokenizer")[0] == TOKENIZER


@pytest.mark.parametrize("layout", ["native", "packed", "dense"])
def test_load_keeps_towers_beside_the_text_model(tmp_path, layout):
    """As files store them, whatever the layout of the text model."""
    tensors = random_tensors(SEEING)
    source = save_checkpoint(tmp_path / "hf", SEEING, tensors)
    (source / "tokenizer.json").write_bytes((mimo.BUNDLED / "tokenizer.json").read_bytes())
    model = mimo.load(source, layout=layout)
    assert model.towers.params.keys() == {"vision", "audio"} and not model.towers.params.keys() & model.params.keys()
    held = np.asarray(model.towers.params["audio"]["speech_embeddings"][1])
    assert held.tobytes() == tensors["speech_embeddings.1.weight"][1].tobytes()


def test_a_config_without_towers_leaves_them_out(tmp_path):
    """A text model of such files is what it was: their tensors are counted and skipped."""
    config = dataclasses.replace(SEEING, vision=None, audio=None, media=None)
    source = save_checkpoint(tmp_path / "hf", config, random_tensors(SEEING))
    assert open_checkpoint(source).skipped == len(random_tensors(SEEING)) - len(random_tensors(config))


@pytest.mark.parametrize(
    ("table", "changes", "message"),
    [
        ("vision_config", {"depth": 4}, r"vision_config: depth=4, but vit_window_attn_types says 3"),
        ("vision_config", {"fullatt_block_indexes": [1]}, r"fullatt_block_indexes=\[1\], but"),
        ("vision_config", {"hidden_act": "gelu"}, "hidden_act='gelu' is not supported"),
        ("vision_config", {"out_hidden_size": 65}, "vision.out_size=65 must be hidden_size=64"),
        ("vision_config", {"vit_window_attn_types": 7}, "vit_window_attn_types=7 must be a list"),
        ("audio_config", {"input_full_attention": False}, "input_full_attention=False is not supported"),
        ("audio_config", {"speech_vocab_size": "16-17"}, "speech_vocab_size='16-17' must be one size"),
        ("audio_config", {"audio_channels": 0}, "audio_channels=0 must be a positive number"),
        ("processor_config", {"fps": -1}, "fps=-1 must be a positive number"),
        ("processor_config", {"image_token_id": 5}, r"image_token_id=\[0, 5\] must be given, and alike"),
        (None, {"audio_end_token_id": 96}, "media.audio_end must be a token id below vocab_size=96"),
        (None, {"vision_config": 3}, "vision_config=3 must be a table"),
    ],
)
def test_wrong_towers_are_named(tmp_path, table, changes, message):
    source = save_checkpoint(tmp_path / "hf", SEEING, {})
    values = json.loads((source / "config.json").read_text())
    (values[table] if table else values).update(changes)
    with pytest.raises(UserError, match=message):
        from_hf(values)

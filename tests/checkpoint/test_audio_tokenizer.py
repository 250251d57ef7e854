"""The folder `audio_tokenizer/`: written and read, its vocoder left alone, whatever is wrong in it named."""

import json

import jax
import numpy as np
import pytest
import safetensors.numpy

from mimo_jax.checkpoint.audio_tokenizer import audio_tokenizer_files, read_audio_tokenizer, write_audio_tokenizer
from mimo_jax.config.towers import AudioTokenizerConfig
from mimo_jax.errors import UserError
from mimo_jax.modeling.audio_tokenizer import init_audio_tokenizer

CONFIG = AudioTokenizerConfig(
    (16, 8), hidden_size=32, num_layers=3, num_heads=4, intermediate_size=48, window=5, mels=20
)


@pytest.fixture
def folder(tmp_path):
    params = init_audio_tokenizer(CONFIG, jax.random.key(0))
    write_audio_tokenizer(tmp_path / "audio_tokenizer", CONFIG, params, "float32")
    return tmp_path / "audio_tokenizer"


def test_what_is_written_is_read(folder):
    """Config and every weight, in float32; the checkpoint carries both files."""
    config, params = read_audio_tokenizer(folder)
    assert config == CONFIG
    jax.tree.map(np.testing.assert_array_equal, params, init_audio_tokenizer(CONFIG, jax.random.key(0)))
    assert sorted(audio_tokenizer_files(folder.parent)) == [
        "audio_tokenizer/config.json",
        "audio_tokenizer/model.safetensors",
    ]
    assert audio_tokenizer_files(folder) == {}


def changed_tensors(folder, change) -> None:
    path = folder / "model.safetensors"
    tensors = safetensors.numpy.load_file(path)
    change(tensors)
    safetensors.numpy.save_file(tensors, path)


def test_the_vocoder_is_left_alone(folder):
    """Tensors of the decoder, and what training keeps beside codebooks, are no business of the encoder."""
    more = {"decoder.conv.weight": np.ones(3), "encoder.quantizer.vq.layers.0._codebook.inited": np.ones(1)}
    changed_tensors(folder, lambda tensors: tensors.update(more))
    assert read_audio_tokenizer(folder)[0] == CONFIG


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda tensors: tensors.pop("encoder.conv1.weight"), "missing 'encoder.conv1.weight'"),
        (lambda tensors: tensors.pop("encoder.layers.2.fc2.bias"), "missing 'encoder.layers.2.fc2.bias'"),
        (lambda tensors: tensors.update(more=np.ones(2)), "unexpected 'more'"),
        (
            lambda tensors: tensors.update({"encoder.conv1.bias": np.ones(3, np.float32)}),
            r"'encoder.conv1.bias' is F32 \[3\]; the config needs F32 \[32\]",
        ),
        (
            lambda tensors: tensors.update({"encoder.conv1.bias": np.full(32, np.nan, np.float32)}),
            "tensor 'encoder.conv1.bias'",
        ),
    ],
)
def test_wrong_tensors_are_named(folder, change, message):
    changed_tensors(folder, change)
    with pytest.raises(UserError, match=message):
        read_audio_tokenizer(folder)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"encoder_causal": False}, "encoder_causal=False is not supported; expected True"),
        ({"hybrid_attention": False}, "hybrid_attention=False is not supported"),
        ({"encoder_attn_window_size": [5, 2]}, r"encoder_attn_window_size=\[5, 2\] must be"),
        ({"codebook_size": 3}, "codebook_size=3 must be a list"),
        ({"codebook_size": [8, 0]}, "codebook_size"),
        ({"d_model": 30}, "d_model=30 must be a multiple"),
        ({"encoder_layers": None}, "missing encoder_layers"),
    ],
)
def test_wrong_configs_are_named(folder, changes, message):
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))
    with pytest.raises(UserError, match=message):
        read_audio_tokenizer(folder)

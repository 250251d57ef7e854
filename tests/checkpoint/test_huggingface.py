"""Reading Hugging Face directories: every tensor exactly once, and every defect named."""

import json
import os
import shutil

import jax
import ml_dtypes
import numpy as np
import pytest

from mimo_jax.checkpoint.export import write_checkpoint
from mimo_jax.checkpoint.huggingface import open_checkpoint, read_checkpoint
from mimo_jax.checkpoint.orbax import leaf_digests
from mimo_jax.config.model import PUBLISHED, FileFormat
from mimo_jax.errors import UserError
from mimo_jax.modeling.backbone import abstract_params
from mimo_jax.weights import dequantize, quantize_fp8
from tests.checkpoint.samples import load_file, random_tensors, save_checkpoint, small

EXPERT = "model.layers.1.mlp.experts.2.up_proj.weight"


@pytest.mark.parametrize("name", ["dense", "fp8", "mxfp4"])
def test_bytes_are_carried(tmp_path, name: str) -> None:
    """Every tensor's bytes are in the tree unchanged, whole or sharded."""
    config, file_format = small(), FileFormat(name)
    tensors = random_tensors(config, file_format)
    whole = read_checkpoint(save_checkpoint(tmp_path / "one", config, tensors, file_format)).params
    found = read_checkpoint(save_checkpoint(tmp_path / "many", config, tensors, file_format, shards=5))
    assert (found.config, found.file_format) == (config, file_format)
    sharded = found.params
    assert leaf_digests(whole) == leaf_digests(sharded)
    assert sum(leaf.nbytes for leaf in jax.tree.leaves(whole)) == sum(array.nbytes for _, array in tensors.values())
    stack = whole["layers_1"]["moe"]["up"]
    codes = stack if name == "dense" else stack.codes
    assert np.asarray(codes)[2].tobytes() == tensors[EXPERT][1].tobytes()


def defect(name):
    return lambda function: DEFECTS.setdefault(name, function)


DEFECTS: dict = {}


@defect("one removed")
def _(tensors):
    del tensors[EXPERT]
    return rf"missing {EXPERT}"


@defect("one renamed")
def _(tensors):
    tensors["model.layers.1.mlp.experts.9.up_proj.weight"] = tensors.pop(EXPERT)
    return rf"missing {EXPERT}"


@defect("one extra")
def _(tensors):
    tensors["model.layers.0.mlp.gate.weight"] = tensors["model.layers.1.mlp.gate.weight"]
    return r"1 tensors that this model does not have: 'model.layers.0.mlp.gate.weight'"


@defect("mis-shaped")
def _(tensors):
    tensors[EXPERT] = "U8", tensors[EXPERT][1].reshape(16, 64)
    return rf"{EXPERT}' has shape \[16, 64\]; the config needs \[32, 32\]"


@defect("wrong dtype")
def _(tensors):
    array = tensors["model.layers.1.self_attn.o_proj.weight"][1]
    tensors["model.layers.1.self_attn.o_proj.weight"] = "F16", array.astype(np.float16)
    return r"is F16; expected BF16"


@defect("NaN scale byte")
def _(tensors):
    tensors[EXPERT + "_scale"][1][3, 1] = 0xFF
    return rf"{EXPERT}_scale: scale byte 0xFF \(NaN\) at index \[3, 1\]"


@defect("NaN FP8 scale")
def _(tensors):
    tensors["model.layers.0.mlp.up_proj.weight_scale_inv"][1][1, 0] = np.nan
    return r"up_proj.weight_scale_inv: scale nan at index \[1, 0\]"


@pytest.mark.parametrize("name", DEFECTS)
def test_defects_are_named(tmp_path, name: str) -> None:
    """A tensor removed, renamed, added, reshaped, retyped or poisoned is an error that names it."""
    config = small()
    tensors = random_tensors(config)
    message = DEFECTS[name](tensors)
    with pytest.raises(UserError, match=message):
        read_checkpoint(save_checkpoint(tmp_path / "hf", config, tensors, shards=2))


def edit_index(directory, change) -> None:
    path = directory / "model.safetensors.index.json"
    index = json.loads(path.read_text())
    change(index["weight_map"], directory)
    path.write_text(json.dumps(index))


def absent_shard(weights, directory):
    weights[EXPERT] = "model-00009-of-00002.safetensors"


def parent_path(weights, directory):
    weights[EXPERT] = "../model.safetensors"


def wrong_shard(weights, directory):
    weights[EXPERT] = next(shard for shard in weights.values() if shard != weights[EXPERT])


def unlisted_tensor(weights, directory):
    del weights[EXPERT]


def absent_tensor(weights, directory):
    weights["model.nothing"] = weights[EXPERT]


def doubled_tensor(weights, directory):
    shutil.copy(directory / weights[EXPERT], directory / "model_mtp.safetensors")


def stray_shard(weights, directory):
    shutil.copy(directory / weights[EXPERT], directory / "stray.safetensors")


def link_out(weights, directory):
    shard = directory / weights[EXPERT]
    shard.rename(directory.parent / "elsewhere.safetensors")
    shard.symlink_to(directory.parent / "elsewhere.safetensors")


def fifo(weights, directory):
    (directory / weights[EXPERT]).unlink()
    os.mkfifo(directory / weights[EXPERT])


def shard_is_directory(weights, directory):
    (directory / weights[EXPERT]).unlink()
    (directory / weights[EXPERT]).mkdir()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (absent_shard, "names 'model-00009-of-00002.safetensors', which is not in the directory"),
        (parent_path, "must be a plain .safetensors file name"),
        (wrong_shard, f"holds tensor '{EXPERT}', but model.safetensors.index.json puts it in"),
        (unlisted_tensor, f"holds tensor '{EXPERT}', but model.safetensors.index.json does not name it"),
        (absent_tensor, "tensor 'model.nothing' is not in"),
        (doubled_tensor, "is also in"),
        (stray_shard, "stray.safetensors: not named by"),
        (link_out, "a link out of the directory"),
        (fifo, "not a regular file"),
        (shard_is_directory, "not a regular file"),
    ],
)
def test_index_defects_are_named(tmp_path, change, message: str) -> None:
    """Whatever an index or its shards pretend, the answer is one line, and no path leaves the directory."""
    config = small()
    directory = save_checkpoint(tmp_path / "hf", config, random_tensors(config), shards=2)
    edit_index(directory, change)
    with pytest.raises(UserError, match=message):
        open_checkpoint(directory)


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("hidden_size", "64"),
        ("hidden_size", 2**39),
        ("vocab_size", -1),
        ("num_hidden_layers", 2),
        ("hybrid_layer_pattern", None),
        ("hybrid_layer_pattern", [0, [1], 0]),
        ("n_routed_experts", 2**39),
        ("num_nextn_predict_layers", 2**39),
        ("architectures", 3),
        ("architectures", {"0": 1}),
        ("eos_token_id", []),
        ("quantization_config", {"quant_method": "fp8", "weight_block_size": 3}),
        ("quantization_config", {"quant_method": "int3"}),
        ("quantization_config", {"quant_method": "fp8", "weight_block_size": [128, 128], "store_dtype": "fp2"}),
        ("hidden_act", "gelu"),
        ("model_type", "llama"),
    ],
)
def test_unknown_config_values_are_errors(tmp_path, key: str, value) -> None:
    """A config value this model family does not have ends in one line about config.json or the tensors, quickly."""
    config = small()
    directory = save_checkpoint(tmp_path / "hf", config, random_tensors(config))
    values = json.loads((directory / "config.json").read_text()) | {key: value}
    (directory / "config.json").write_text(json.dumps(values))
    with pytest.raises(UserError) as caught:
        open_checkpoint(directory)
    assert "\n" not in str(caught.value)


def test_other_modalities_are_left_out_by_name(tmp_path) -> None:
    """V2.5's vision and audio tensors are skipped by a stated list and counted; nothing else is."""
    config = small()
    tensors = random_tensors(config)
    for prefix in ("visual.", "audio_encoder.", "speech_embeddings."):
        tensors[f"{prefix}x.weight"] = "BF16", np.zeros((2, 2), ml_dtypes.bfloat16)
    assert open_checkpoint(save_checkpoint(tmp_path / "hf", config, tensors)).skipped == 3
    tensors["vision.x.weight"] = tensors.pop("visual.x.weight")
    with pytest.raises(UserError, match=r"does not have: 'vision\.x\.weight'"):
        open_checkpoint(save_checkpoint(tmp_path / "hf2", config, tensors))


def test_bf16_router_is_widened(tmp_path) -> None:
    """A BF16 router (V2.6) becomes float32 with the same values; a wider tensor is never narrowed."""
    config = small()
    tensors = random_tensors(config)
    name = "model.layers.1.mlp.gate.weight"
    tensors[name] = "BF16", tensors[name][1].astype(ml_dtypes.bfloat16)
    params = read_checkpoint(save_checkpoint(tmp_path / "hf", config, tensors)).params
    router = np.asarray(params["layers_1"]["moe"]["router"])
    assert router.dtype == np.float32
    np.testing.assert_array_equal(router, tensors[name][1].astype(np.float32))
    name = "model.layers.1.input_layernorm.weight"
    tensors[name] = "F32", tensors[name][1].astype(np.float32)
    with pytest.raises(UserError, match="is F32; expected BF16"):
        read_checkpoint(save_checkpoint(tmp_path / "hf2", config, tensors))


def decoded(packed: np.ndarray, scales: np.ndarray) -> np.ndarray:
    """The published MXFP4 formula, element by element."""
    values = np.array([0, 0.5, 1, 1.5, 2, 3, 4, 6, 0, -0.5, -1, -1.5, -2, -3, -4, -6])
    rows, half = packed.shape
    out = np.empty((rows, 2 * half))
    for m in range(half):
        out[:, 2 * m], out[:, 2 * m + 1] = values[packed[:, m] & 15], values[packed[:, m] >> 4]
    return out * np.repeat(2.0 ** (scales.astype(np.int64) - 127), 32, axis=1)


def masters(config):
    """Float32 parameters as training holds them."""
    rng = np.random.default_rng(0)
    return jax.tree.map(lambda leaf: rng.standard_normal(leaf.shape, np.float32), abstract_params(config))


def test_export_of_training_parameters(tmp_path) -> None:
    """Float32 masters become the published layout; an independent reader decodes what was quantised."""
    config = small()
    params = masters(config)
    write_checkpoint(tmp_path / "hf", config, params, {"tokenizer.json": b"{}"})
    files = {path.name for path in (tmp_path / "hf").iterdir()}
    assert files == {
        "config.json",
        "generation_config.json",
        "manifest.json",
        "model-00001-of-00001.safetensors",
        "model.safetensors.index.json",
        "model_mtp.safetensors",
        "tokenizer.json",
    }
    assert (tmp_path / "hf" / "model.safetensors.index.json").read_text().count("model_mtp") > 10
    held = load_file(tmp_path / "hf" / "model-00001-of-00001.safetensors")
    dtype, shape, data = held[EXPERT]
    assert (dtype, shape) == ("U8", [32, 32])
    packed = np.frombuffer(data, np.uint8).reshape(shape)
    scales = np.frombuffer(held[EXPERT + "_scale"][2], np.uint8).reshape(32, 2)
    weights = np.asarray(params["layers_1"]["moe"]["up"])[2]
    assert np.abs(decoded(packed, scales) - weights).max() <= np.abs(weights).max() / 4
    found = read_checkpoint(tmp_path / "hf")
    assert found.file_format == PUBLISHED
    params2 = found.params
    np.testing.assert_array_equal(np.asarray(dequantize(params2["layers_1"]["moe"]["up"]))[2], decoded(packed, scales))
    expected = quantize_fp8(np.asarray(params["layers_1"]["attention"]["qkv"]))
    assert np.asarray(params2["layers_1"]["attention"]["qkv"].codes).tobytes() == expected.codes.tobytes()


def test_export_is_read_by_torchs_safetensors(tmp_path) -> None:
    """The safetensors library opens the written files under torch with the same dtypes and bytes."""
    torch = pytest.importorskip("torch")
    library = pytest.importorskip("safetensors.torch")
    config = small()
    tensors = random_tensors(config)
    params = read_checkpoint(save_checkpoint(tmp_path / "in", config, tensors)).params
    write_checkpoint(tmp_path / "out", config, params, shard_bytes=50_000)
    index = json.loads((tmp_path / "out" / "model.safetensors.index.json").read_text())
    assert len(set(index["weight_map"].values())) > 3
    found = {}
    for shard in sorted(set(index["weight_map"].values())):
        part = library.load_file(tmp_path / "out" / shard)
        assert all(index["weight_map"][name] == shard for name in part)
        found |= part
    assert found.keys() == tensors.keys()
    assert index["metadata"]["total_size"] == sum(array.nbytes for _, array in tensors.values())
    kinds = {"U8": torch.uint8, "F32": torch.float32, "BF16": torch.bfloat16, "F8_E4M3": torch.float8_e4m3fn}
    for name, (dtype, array) in tensors.items():
        assert found[name].dtype == kinds[dtype] and tuple(found[name].shape) == array.shape
        assert found[name].view(torch.uint8).numpy().tobytes() == array.tobytes(), name


def test_nan_in_a_weight_to_quantise_writes_nothing(tmp_path) -> None:
    """NaN or Inf in an expert is an error naming tensor and index, and no directory appears."""
    config = small()
    params = masters(config)
    params["layers_1"]["moe"]["up"][2, 5, 7] = np.inf
    with pytest.raises(UserError, match=rf"{EXPERT}: inf at index \[5, 7\]"):
        write_checkpoint(tmp_path / "hf", config, params)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("codes", ["U8", "I8", "F4"])
@pytest.mark.parametrize("scales", ["U8", "F8_E8M0"])
def test_the_same_bytes_under_other_names_are_read(tmp_path, codes: str, scales: str) -> None:
    """Packed codes are called U8, I8 or F4, scales U8 or F8_E8M0: the bytes are the same, and so is what is read."""
    config, tensors = small(), random_tensors(small())
    expected = read_checkpoint(save_checkpoint(tmp_path / "one", config, tensors)).params
    directory = save_checkpoint(tmp_path / "other", config, tensors)
    path = directory / "model.safetensors"
    raw = path.read_bytes()
    size = int.from_bytes(raw[:8], "little")
    header = json.loads(raw[8 : 8 + size])
    for name, entry in header.items():
        if entry["dtype"] == "U8" and name.endswith(".weight_scale"):
            entry["dtype"] = scales
        elif entry["dtype"] == "U8":
            entry["dtype"] = codes
            entry["shape"][-1] *= 2 if codes == "F4" else 1
    text = json.dumps(header).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + raw[8 + size :])
    found = read_checkpoint(directory).params
    for one, other in zip(jax.tree.leaves(expected), jax.tree.leaves(found)):
        assert one.dtype == other.dtype and np.asarray(one).tobytes() == np.asarray(other).tobytes()


def test_codes_are_not_taken_for_scales(tmp_path) -> None:
    """A dtype that names other contents than a tensor has is still refused."""
    config, tensors = small(), random_tensors(small())
    name = "model.layers.1.mlp.experts.0.gate_proj.weight_scale"
    tensors[name] = "I8", tensors[name][1]
    with pytest.raises(UserError, match=r"weight_scale' is I8; expected U8"):
        read_checkpoint(save_checkpoint(tmp_path / "hf", config, tensors))

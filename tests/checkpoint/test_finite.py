"""NaN and infinity are refused where weights are read and where they are written."""

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

import mimo_jax as mimo
from mimo_jax.checkpoint import finite, orbax
from mimo_jax.checkpoint.dflash import read_drafter, write_drafter
from mimo_jax.checkpoint.export import write_checkpoint
from mimo_jax.checkpoint.finite import is_finite
from mimo_jax.checkpoint.huggingface import read_checkpoint
from mimo_jax.checkpoint.orbax import read_orbax, write_orbax
from mimo_jax.checkpoint.read import read
from mimo_jax.config.model import FileFormat
from mimo_jax.errors import UserError
from tests.checkpoint.samples import random_tensors, save_checkpoint, small


@pytest.mark.parametrize("dtype", [ml_dtypes.bfloat16, np.float16, ml_dtypes.float8_e4m3fn])
def test_two_maxima_find_what_isfinite_finds(dtype) -> None:
    """Among finite numbers of either sign, every bit pattern is judged as numpy judges it."""
    size = np.dtype(dtype).itemsize
    patterns = np.arange(1 << 8 * size, dtype=f"u{size}")
    with np.errstate(invalid="ignore"):
        expected = np.isfinite(patterns.view(dtype))
    assert not expected.all()
    numbers = np.array([1.5, -2.0, 0.0, 0.0], dtype)
    for pattern, is_number in zip(patterns, expected):
        numbers[3] = pattern.view(dtype)
        assert is_finite(numbers) == is_number


@pytest.mark.parametrize("value", [np.nan, -np.nan, np.inf, -np.inf])
def test_float32_beyond_the_first_piece(value: float) -> None:
    """The last number of a long array counts, and the largest ones are numbers."""
    numbers = np.full((1 << 19) + 3, np.finfo(np.float32).max)
    numbers[::2] *= -1
    assert is_finite(numbers) and is_finite(numbers[:0])
    numbers[-1] = value
    assert not is_finite(numbers)


CASES = {
    "BF16": ("mxfp4", "model.layers.1.self_attn.o_proj.weight", np.inf, r"value inf at index \[1, 2\]"),
    "F32": ("mxfp4", "model.layers.1.mlp.gate.weight", np.nan, r"value nan at index \[1, 2\]"),
    "E4M3": ("fp8", "model.layers.1.mlp.experts.2.up_proj.weight", np.nan, r"value nan at index \[1, 2\]"),
    "QKV": ("mxfp4", "model.layers.1.self_attn.qkv_proj.weight", -np.nan, r"value -?nan at index \[1, 2\]"),
    "dense QKV": ("dense", "model.layers.1.self_attn.qkv_proj.weight", -np.inf, r"value -inf at index \[1, 2\]"),
}


@pytest.mark.parametrize("case", CASES)
def test_loading_names_the_tensor_and_the_place(tmp_path, case: str) -> None:
    """A weight that is no finite number is refused with its tensor and its index there, on one device or on eight."""
    file_format, name, value, message = CASES[case]
    config = small()
    tensors = random_tensors(config, FileFormat(file_format))
    tensors[name][1][1, 2] = value
    save_checkpoint(tmp_path / "hf", config, tensors, FileFormat(file_format))
    with pytest.raises(UserError, match=f"{name}: {message}"):
        read_checkpoint(tmp_path / "hf")
    mesh = jax.make_mesh((8,), ("x",), axis_types=(jax.sharding.AxisType.Auto,))
    spread = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec("x"))
    whole = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec())
    with pytest.raises(UserError, match=f"{name}: {message}"):
        read(tmp_path / "hf", lambda path, shape: whole if shape[0] % 8 else spread)


def poisoned(params: dict, value: float) -> dict:
    norm = np.array(params["layers_1"]["input_norm"]["weight"])
    norm[5] = value
    return {**params, "layers_1": {**params["layers_1"], "input_norm": {"weight": norm}}}


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_exports_refuse_what_has_no_finite_value(tmp_path, value: float) -> None:
    """Neither export writes a checkpoint, manifest and all, of weights that are broken."""
    found = read(mimo.BUNDLED)
    params = poisoned(found.params, value)
    with pytest.raises(UserError, match=rf"layers.1.input_layernorm.weight: value {value} at index \[5\]"):
        write_checkpoint(tmp_path / "hf", found.config, params)
    with pytest.raises(UserError, match=rf"layers_1/input_norm/weight: value {value} at index \[5\]"):
        write_orbax(tmp_path / "orbax", found.config, found.file_format, params)
    assert list(tmp_path.iterdir()) == []


def test_float32_that_bfloat16_cannot_hold_is_refused(tmp_path) -> None:
    """A number that rounding makes infinite is no weight either."""
    found = read(mimo.BUNDLED)
    params = jax.tree.map(lambda leaf: leaf, found.params)
    params["norm"]["weight"] = np.full(found.config.hidden_size, 3.4e38, np.float32)
    with pytest.raises(UserError, match=r"model.norm.weight: value inf at index \[0\]"):
        write_checkpoint(tmp_path / "hf", found.config, params)


@pytest.mark.parametrize("on_host", [True, False])
def test_an_orbax_folder_is_checked_too(tmp_path, monkeypatch, on_host: bool) -> None:
    """Broken weights of an Orbax folder, packed scales included, are refused, where its arrays lie."""
    found = read(mimo.BUNDLED)
    down = found.params["layers_1"]["moe"]["down"]
    scales = np.array(down.scales)
    scales[1, 2, 0] = 0xFF
    broken = {**found.params["layers_1"]["moe"], "down": type(down)(down.codes, scales)}
    params = {**found.params, "layers_1": {**found.params["layers_1"], "moe": broken}}
    if not on_host:
        monkeypatch.setattr(finite, "_arrays_of", lambda leaf: [jnp.asarray(leaf)])
    with monkeypatch.context() as patch:
        patch.setattr(orbax, "check_leaves", lambda *_: None)
        write_orbax(tmp_path / "orbax", found.config, found.file_format, params)
    with pytest.raises(UserError, match=r"layers_1/moe/down/scales: scale byte 0xFF \(NaN\) at index \[1, 2, 0\]"):
        read_orbax(tmp_path / "orbax")


def test_a_drafter_is_checked_too(tmp_path) -> None:
    """A drafter with a weight, or a mask vector, that is no finite number is not written."""
    config, params = read_drafter(mimo.BUNDLED / "dflash")
    for name, message in (("mask", r"mask: value nan at index \[0\]"), ("norm", r"norm.weight: value nan at index")):
        broken = jax.tree.map(lambda leaf: np.full(leaf.shape, np.nan), params[name])
        with pytest.raises(UserError, match=message):
            write_drafter(tmp_path / "dflash", config, {**params, name: broken})

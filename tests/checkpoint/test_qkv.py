"""The orders of QKV in a file, proved with checkpoints whose every row encodes its own (chunk, head, row)."""

import ml_dtypes
import numpy as np
import pytest

from mimo_jax.checkpoint import huggingface, qkv
from mimo_jax.checkpoint.huggingface import open_checkpoint, probe_qkv, read_checkpoint, read_params
from mimo_jax.config.model import GLOBAL, SLIDING, FileFormat
from mimo_jax.config.presets import preset
from mimo_jax.errors import UserError
from mimo_jax.weights import dequantize
from mimo_jax.weights.params import qkv_rows
from tests.checkpoint.samples import random_tensors, save_checkpoint, small

# Rows per chunk 96 (one short block), 176 (two, the last short), and V2.5's fewer global than sliding KV heads.
GEOMETRIES = {
    "96 rows": {},
    "176 rows": {"num_kv_heads": 4, "sliding_num_kv_heads": 4, "head_dim": 44, "v_head_dim": 44},
    "unequal heads": {"num_kv_heads": 2, "sliding_num_kv_heads": 4, "head_dim": 36, "v_head_dim": 24},
}


def head_order(config, kind):
    """(letter, head, row) of Q, then K, then V."""
    for letter, heads, dim in (
        ("q", config.num_heads, config.head_dim),
        ("k", config.kv_heads(kind), config.head_dim),
        ("v", config.kv_heads(kind), config.v_head_dim),
    ):
        yield [(letter, head, row) for head in range(heads) for row in range(dim)]


def chunk_order(config, kind):
    """The published order: per chunk, its Q heads, its K heads, its V heads."""
    thirds = list(head_order(config, kind))
    chunks = config.qkv_chunks
    return [
        row
        for chunk in range(chunks)
        for third in thirds
        for row in third[chunk * len(third) // chunks : (chunk + 1) * len(third) // chunks]
    ]


def encoded(rows, width: int) -> np.ndarray:
    """[rows, width] of 4-bit digits, which FP8 holds exactly: letter, head, row high, row low, repeated."""
    digits = [("qkv".index(letter), head, row // 16, row % 16) for letter, head, row in rows]
    return np.tile(np.array(digits, np.float32), (1, width // 4))


def written(tmp_path, config, order: str):
    """A checkpoint with encoded projections. FP8 rows are divided by a scale that differs in every block."""
    file_format = FileFormat("fp8" if order == "interleaved" else "dense")
    tensors = random_tensors(config, file_format)
    kinds = {f"model.layers.{i}": kind for i, kind in enumerate(config.layer_pattern)}
    kinds["model.mtp.layers.0"] = SLIDING
    for prefix, kind in kinds.items():
        name = f"{prefix}.self_attn.qkv_proj.weight"
        width = config.hidden_size
        if order == "interleaved":
            codes = encoded(chunk_order(config, kind), width)
            tensors[name] = "F8_E4M3", codes.astype(ml_dtypes.float8_e4m3fn)
            grid = tensors[f"{name}_scale_inv"][1].shape
            tensors[f"{name}_scale_inv"] = "F32", 2.0 ** np.arange(np.prod(grid), dtype=np.float32).reshape(grid)
            continue
        del tensors[name]
        thirds = [encoded(third, width).astype(ml_dtypes.bfloat16) for third in head_order(config, kind)]
        if order == "contiguous":
            tensors[name] = "BF16", np.concatenate(thirds)
        else:
            for letter, third in zip("qkv", thirds):
                tensors[name.replace("qkv", letter)] = "BF16", third
    return save_checkpoint(tmp_path / "hf", config, tensors, file_format)


def heads_of(params, config, path: str, kind: int) -> np.ndarray:
    """The projection as the model splits it (mimo_jax/modeling/attention.py), in head order."""
    fused = np.asarray(dequantize(params[path]["attention"]["qkv"]))
    rows = np.cumsum([size // config.qkv_chunks for size in qkv_rows(config, kind)])
    parts = np.split(fused, rows[:-1], axis=1)
    return np.concatenate([part.reshape(-1, config.hidden_size) for part in parts])


@pytest.mark.parametrize("geometry", GEOMETRIES)
@pytest.mark.parametrize("order", ["interleaved", "contiguous", "separate"])
def test_every_row_lands_in_its_head(tmp_path, order: str, geometry: str) -> None:
    """Whatever the file's order, row r of head h ends up as row r of head h, with its own block's scale."""
    config = small(**GEOMETRIES[geometry])
    directory = written(tmp_path, config, order)
    source = open_checkpoint(directory)
    params = read_params(source)
    assert source.qkv_order == order
    assert probe_qkv(source, params) == 9
    layers = {f"layers_{i}": kind for i, kind in enumerate(config.layer_pattern)} | {"mtp_0": SLIDING}
    for path, kind in layers.items():
        rows = [row for third in head_order(config, kind) for row in third]
        expected = encoded(rows, config.hidden_size)
        if order == "interleaved":
            position = {row: index for index, row in enumerate(chunk_order(config, kind))}
            chunk_rows = len(position) // config.qkv_chunks
            blocks_per_chunk = -(-chunk_rows // 128)
            for index, row in enumerate(rows):
                chunk, within = divmod(position[row], chunk_rows)
                expected[index] *= 2.0 ** (chunk * blocks_per_chunk + within // 128)
        np.testing.assert_array_equal(heads_of(params, config, path, kind), expected)


@pytest.mark.parametrize("order", ["interleaved", "contiguous", "separate"])
def test_probe_detects_a_wrong_order(tmp_path, monkeypatch, order: str) -> None:
    """Reading one order as another, which passes every shape check, does not survive the probe."""
    config = small(**GEOMETRIES["176 rows"])
    directory = written(tmp_path, config, order)

    def wrong(source, weight, part, region, buffer, advance):
        right(source, weight, part, region, buffer, advance)
        if weight.path[-1] == "qkv" and part is weight.parts[0]:
            buffer[...] = np.roll(buffer, 1, axis=1)

    right = huggingface._fill
    monkeypatch.setattr(huggingface, "_fill", wrong)
    with pytest.raises(UserError, match=r"layers_0/attention/qkv: head \d+ of q differs"):
        read_checkpoint(directory)


def test_split_projections_read_as_their_own_tensors(tmp_path) -> None:
    """V2-Flash's separate FP8 tensors keep their ordinary grids."""
    config, file_format = small(fused_qkv=False), FileFormat("fp8")
    tensors = random_tensors(config, file_format)
    directory = save_checkpoint(tmp_path / "hf", config, tensors, file_format)
    found = read_checkpoint(directory)
    assert not found.config.fused_qkv
    for letter in "qkv":
        name = f"model.layers.1.self_attn.{letter}_proj.weight"
        held = found.params["layers_1"]["attention"][letter]
        assert np.asarray(held.codes).tobytes() == tensors[name][1].tobytes()
        assert np.asarray(held.scales).tobytes() == tensors[f"{name}_scale_inv"][1].tobytes()


@pytest.mark.parametrize(
    ("preset_name", "shapes", "chunks"),
    [
        ("mimo-v2.5-pro", [("global", GLOBAL, 27136, 216), ("sliding", SLIDING, 27136, 216)], 8),
        ("mimo-v2.5", [("global", GLOBAL, 13568, 108), ("sliding", SLIDING, 14848, 116)], 4),
    ],
)
def test_chunks_of_the_published_files(preset_name: str, shapes, chunks: int) -> None:
    """The published shapes give the published chunk counts; V2.5's sliding grid alone would allow several."""
    assert qkv.infer_chunks(preset(preset_name), shapes) == chunks


@pytest.mark.parametrize("shapes", [[("w", GLOBAL, 13568, 106)], [("w", GLOBAL, 13568, 212)]])
def test_unpadded_grid_is_an_error_with_its_numbers(shapes) -> None:
    """A contiguous grid (106 rows for 13568) is refused with both numbers and the one that was needed."""
    with pytest.raises(UserError, match=rf"13568 weight rows with {shapes[0][3]} scale rows|say \d+ chunks") as caught:
        qkv.infer_chunks(preset("mimo-v2.5"), shapes)
    assert "4" in str(caught.value)


def test_chunk_count_other_than_the_configs_is_an_error(tmp_path) -> None:
    """A file made for another tensor-parallel degree is refused, naming what was found and what was expected."""
    config, file_format = small(**GEOMETRIES["176 rows"]), FileFormat("fp8")
    tensors = random_tensors(config, file_format)
    for name in [name for name in tensors if name.endswith("qkv_proj.weight_scale_inv")]:
        tensors[name] = "F32", np.ones((6, 1), np.float32)  # two chunks of 352 rows
    directory = save_checkpoint(tmp_path / "hf", config, tensors, file_format)
    with pytest.raises(UserError, match="2 chunks, the config says 4"):
        read_checkpoint(directory)

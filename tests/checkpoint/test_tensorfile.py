"""The safetensors reader against the reference library and against hostile files."""

import json
import struct

import numpy as np
import pytest

from mimo_jax.checkpoint.files import tensorfile
from mimo_jax.checkpoint.files.tensorfile import TensorFile, TensorFileWriter
from mimo_jax.errors import UserError
from tests.checkpoint import samples


def raw(header: bytes | dict, data: bytes = b"", length: int | None = None) -> bytes:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text) if length is None else length) + text + data


def entry(dtype="U8", shape=(4,), offsets=(0, 4), **more) -> dict:
    return {"dtype": dtype, "shape": list(shape), "data_offsets": list(offsets), **more}


BAD_FILES = {
    "empty file": (b"", "header length"),
    "shorter than its length field": (b"\0" * 5, "header length"),
    "absurd header size": (raw(b"{}", length=2**63), "claims a header"),
    "header past the end": (raw(b"{}", length=3), "claims a header"),
    "no object": (raw(b"[1]"), "does not start"),
    "not JSON": (raw(b"{nonsense"), "not valid JSON"),
    "not UTF-8": (raw(b'{"\xff":1}'), "not valid JSON"),
    "deep nesting": (raw(b'{"a":' + b"[" * 200_000), "not valid JSON"),
    "huge integer": (raw(b'{"a":' + b"9" * 100_000 + b"}"), "not valid JSON"),
    "duplicate names": (raw(b'{"a":%s,"a":%s}' % ((json.dumps(entry()).encode(),) * 2), b"1234"), "appears twice"),
    "unknown dtype": (raw({"a": entry("F3")}, b"1234"), "dtype"),
    "unknown key": (raw({"a": entry(more=1)}, b"1234"), "expected exactly"),
    "missing key": (raw({"a": {"dtype": "U8"}}), "expected exactly"),
    "float shape": (raw({"a": entry(shape=(4.0,))}, b"1234"), "list of integers"),
    "negative shape": (raw({"a": entry(shape=(-4,))}, b"1234"), "list of integers"),
    "boolean shape": (raw({"a": entry(shape=(True, 4))}, b"1234"), "list of integers"),
    "rank 9": (raw({"a": entry(shape=(1,) * 8 + (4,))}, b"1234"), "axes"),
    "product beyond 64 bits": (raw({"a": entry(shape=(2**62, 2**62))}, b"1234"), "needs"),
    "product wraps to the size": (raw({"a": entry(shape=(2**32, 2**32, 1))}, b""), "needs"),
    "size differs from shape": (raw({"a": entry(shape=(3,))}, b"1234"), "needs"),
    "offsets reversed": (raw({"a": entry(shape=(0,), offsets=(4, 0))}, b"1234"), "needs"),
    "hole": (raw({"a": entry(offsets=(1, 5))}, b"12345"), "hole or an overlap"),
    "overlap": (raw({"a": entry(), "b": entry(offsets=(2, 6))}, b"123456"), "hole or an overlap"),
    "truncated data": (raw({"a": entry()}, b"123"), "truncated"),
    "trailing bytes": (raw({"a": entry()}, b"12345"), "truncated or padded"),
    "long name": (raw({"n" * 1025: entry()}, b"1234"), "1 to 1024"),
    "empty name": (raw({"": entry()}, b"1234"), "1 to 1024"),
    "metadata not strings": (raw({"__metadata__": {"a": 1}}), "__metadata__"),
}


@pytest.mark.parametrize("case", BAD_FILES)
def test_bad_files_are_named(case: str, tmp_path) -> None:
    """Each kind of damage is one line that names the file and the expectation."""
    content, message = BAD_FILES[case]
    (tmp_path / "x.safetensors").write_bytes(content)
    with pytest.raises(UserError, match=message) as caught:
        TensorFile(tmp_path / "x.safetensors")
    assert "x.safetensors" in str(caught.value) and "\n" not in str(caught.value) and len(str(caught.value)) < 2000


def test_every_truncation_is_an_error(tmp_path) -> None:
    """A file cut anywhere is never opened."""
    path = tmp_path / "x.safetensors"
    samples.save_file(path, {"a": ("U8", np.arange(9, dtype=np.uint8)), "b": ("F32", np.ones((2, 2), np.float32))})
    whole = path.read_bytes()
    for length in range(len(whole)):
        path.write_bytes(whole[:length])
        with pytest.raises(UserError):
            TensorFile(path)


def test_header_of_tiny_tensors_is_bounded(tmp_path) -> None:
    """A header that would cost twenty times its size in memory is refused before it is parsed."""
    header = {f"t{index}": entry(shape=(0,), offsets=(0, 0)) for index in range(60_000)}
    (tmp_path / "x.safetensors").write_bytes(raw(header))
    with pytest.raises(UserError, match="claims a header"):
        TensorFile(tmp_path / "x.safetensors")


def test_too_many_tensors(tmp_path, monkeypatch) -> None:
    """The number of tensors is bounded."""
    monkeypatch.setattr(tensorfile, "MAX_TENSORS", 3)
    header = {f"t{index}": entry(shape=(0,), offsets=(0, 0)) for index in range(4)}
    (tmp_path / "x.safetensors").write_bytes(raw(header))
    with pytest.raises(UserError, match="at most 3"):
        TensorFile(tmp_path / "x.safetensors")


def test_reads_what_the_library_writes_and_back(tmp_path) -> None:
    """Reader and writer agree with the safetensors library byte for byte, for every dtype a checkpoint has."""
    tensors = samples.random_tensors(samples.small())
    samples.save_file(tmp_path / "library.safetensors", tensors)
    opened = TensorFile(tmp_path / "library.safetensors")
    writer = TensorFileWriter(
        tmp_path / "ours.safetensors", {name: (dtype, array.shape) for name, (dtype, array) in tensors.items()}
    )
    for name, (dtype, array) in tensors.items():
        view = opened.read(name)
        assert view.dtype == array.dtype and view.tobytes() == array.tobytes() and opened.tensors[name].dtype == dtype
        assert not view.flags.writeable
        writer.write(name, view)
        opened.release(name)
        assert view.tobytes() == array.tobytes()  # released pages come back from the file
    writer.close()
    assert samples.load_file(tmp_path / "ours.safetensors") == samples.load_file(tmp_path / "library.safetensors")


def test_writer_holds_callers_to_the_plan(tmp_path) -> None:
    """A tensor of another shape, a second copy, or one never written is a bug that cannot reach the disk unseen."""
    writer = TensorFileWriter(tmp_path / "x.safetensors", {"a": ("U8", (2,)), "b": ("F32", (1,))})
    with pytest.raises(ValueError, match="announced"):
        writer.write("a", np.zeros(3, np.uint8))
    writer.write("a", np.zeros(2, np.uint8))
    with pytest.raises(ValueError, match="twice"):
        writer.write("a", np.zeros(2, np.uint8))
    with pytest.raises(ValueError, match="never written"):
        writer.close()
    writer.abort()

"""Files of `torch.save`, against torch itself and against files made to do harm."""

import io
import os
import pickle
import random
import struct
import time
import zipfile
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest

from mimo_jax.checkpoint.files.torchfile import TorchFile, TorchTensor, torch_file
from mimo_jax.errors import UserError
from tests.tools.fuzz import mutate_bytes

LIMIT = 1 << 20
VECTOR = np.linspace(-2, 3, 24).astype(ml_dtypes.bfloat16)


def opened(folder: Path, content: bytes) -> TorchFile:
    (folder / "x.pt").write_bytes(content)
    return TorchFile(folder / "x.pt", LIMIT)


def zipped(records: dict[str, bytes], compression: int = zipfile.ZIP_STORED) -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", compression) as archive:
        for name, data in records.items():
            archive.writestr(name, data)
    return buffer.getvalue()


def with_record(name: str, data: bytes) -> bytes:
    """Our own file with one record put in the place of another."""
    with zipfile.ZipFile(io.BytesIO(torch_file({"n": 1, "v": VECTOR}))) as archive:
        records = {entry: archive.read(entry) for entry in archive.namelist()}
    return zipped({**records, f"archive/{name}": data})


def tensor_pickle(shape: bytes = b"K\x18\x85", strides: bytes = b"K\x01\x85", offset: bytes = b"K\0") -> bytes:
    """A pickle of one tensor in a storage of 24 BF16, its numbers given as opcodes."""
    storage = b"(X\x07\0\0\0storagectorch\nBFloat16Storage\nX\x01\0\0\x000X\x03\0\0\0cpuK\x18tQ"
    hooks = b"\x89ccollections\nOrderedDict\n)R"
    body = b"ctorch._utils\n_rebuild_tensor_v2\n(" + storage + offset + shape + strides + hooks + b"tR"
    return b"\x80\x02}X\x01\0\0\0v" + body + b"s."


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32"])
def test_reads_what_torch_saves(dtype: str, tmp_path) -> None:
    """Numbers, text and tensors of the three dtypes come out as torch put them in, strided views too."""
    torch = pytest.importorskip("torch")
    base = torch.arange(24).to(getattr(torch, dtype))
    values = {"whole": base, "view": base.reshape(4, 6).T[1:, 2:], "n": 151669, "big": -(2**40), "x": 0.5, "none": None}
    torch.save({**values, "flag": True, "text": "é"}, tmp_path / "x.pt")
    file = TorchFile(tmp_path / "x.pt", LIMIT)
    assert {key: value for key, value in file.values.items() if not isinstance(value, TorchTensor)} == {
        "n": 151669,
        "big": -(2**40),
        "x": 0.5,
        "none": None,
        "flag": True,
        "text": "é",
    }
    for name in ("whole", "view"):
        read = file.read(file.values[name])
        assert read.shape == tuple(values[name].shape) and read.itemsize == base.itemsize
        np.testing.assert_array_equal(read.astype(np.float32), values[name].float().numpy())


def test_torch_reads_what_we_write(tmp_path) -> None:
    """`torch.load(weights_only=True)` gives back numbers, shapes and bits, and so do we."""
    torch = pytest.importorskip("torch")
    matrix = np.arange(6, dtype=np.float32).reshape(2, 3)
    content = torch_file({"n": 151669, "big": 2**40, "v": VECTOR, "m": matrix})
    theirs = torch.load(io.BytesIO(content), weights_only=True)
    assert theirs["n"] == 151669 and theirs["big"] == 2**40 and theirs["v"].dtype == torch.bfloat16
    assert theirs["v"].view(torch.int16).numpy().tobytes() == VECTOR.tobytes()
    assert theirs["m"].tolist() == matrix.tolist()
    ours = opened(tmp_path, content)
    assert ours.read(ours.values["v"]).tobytes() == VECTOR.tobytes()
    np.testing.assert_array_equal(ours.read(ours.values["m"]), matrix)


class Harm:
    """Unpickling it runs a command."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self):
        return os.system, (f"touch {self.path}",)


def test_malicious_pickle_is_refused_unexecuted(tmp_path) -> None:
    """A file that would run a command is refused, naming what it would have called, and the command does not run."""
    content = with_record("data.pkl", pickle.dumps({"v": Harm(tmp_path / "harmed")}, protocol=2))
    with pytest.raises(UserError, match=r"names '(posix|nt)\.system', which is refused"):
        opened(tmp_path, content)
    assert not (tmp_path / "harmed").exists()
    pickle.loads(pickle.dumps(Harm(tmp_path / "harmed")))
    assert (tmp_path / "harmed").exists()  # the attack works on whoever unpickles


BAD_PICKLES = {
    "memory filled by a memo index": (b"\x80\x02Nr" + struct.pack("<I", 1 << 31) + b".", "NoneType"),
    "hang in the hash of a nested key": (b"\x80\x02}" + b")\x85" + b"q\x00h\x00\x86" * 200 + b"Ns.", "strings"),
    "text longer than the file": (b"\x80\x02X\xff\xff\xff\xff.", "truncated"),
    "no end": (b"\x80\x02}", "truncated"),
    "empty": (b"", "truncated"),
    "no value": (b"\x80\x02.", "operands"),
    "not a dict": (b"\x80\x02K\x01.", "type int"),
    "an opcode of objects": (b"\x80\x02)\x81.", "opcode"),
    "a name without an end": (b"\x80\x02ctorch", "subsection not found"),
    "a call of a number": (b"\x80\x02K\x01)R.", "calls a value of type int"),
    "a reference to something else": (b"\x80\x02(NNNNNtQ.", "other than a storage"),
    "a mark that was never made": (b"\x80\x02t.", "pop from empty list"),
    "nested deeper than Python recurses": (b"\x80\x02)" + b"\x85" * 60_000 + b".", "type tuple"),
    "larger than it may be": (b"\x80\x02" + b"N" * (1 << 16) + b".", "at most 65536"),
    "negative shape": (tensor_pickle(shape=b"J\xff\xff\xff\xff\x85"), "natural numbers"),
    "shape that is no tuple": (tensor_pickle(shape=b"N"), "iterable"),
    "boolean offset": (tensor_pickle(offset=b"\x88"), "natural numbers"),
    "more strides than axes": (tensor_pickle(strides=b"K\x01K\x01\x86"), "1 axes and 2 strides"),
}


@pytest.mark.parametrize("case", BAD_PICKLES)
def test_bad_pickles_are_one_line(case: str, tmp_path) -> None:
    """A pickle made to hang, to fill memory or to leave the format ends at once as one short line naming the file."""
    pickled, message = BAD_PICKLES[case]
    started = time.thread_time()
    with pytest.raises(UserError, match=message) as caught:
        opened(tmp_path, with_record("data.pkl", pickled))
    assert "x.pt" in str(caught.value) and "\n" not in str(caught.value) and len(str(caught.value)) < 500
    assert time.thread_time() - started < 5  # seconds; a hang has none that would do


OUT_OF_BOUNDS = {
    "longer than the storage": (tensor_pickle(shape=b"K\x19\x85"), "shape \\[25\\]"),
    "offset": (tensor_pickle(offset=b"K\x01"), "reaches element 24"),
    "stride": (tensor_pickle(strides=b"K\x02\x85"), "reaches element 46"),
    "overlapping": (tensor_pickle(shape=b"K\x18K\x18\x86", strides=b"K\0K\0\x86"), "overlaps"),
    "empty": (tensor_pickle(shape=b"K\0\x85"), "shape \\[0\\]"),
}


@pytest.mark.parametrize("case", OUT_OF_BOUNDS)
def test_tensors_stay_within_their_storage(case: str, tmp_path) -> None:
    """Offset, shape and strides that leave the storage, or would multiply it, are errors and never a read."""
    pickled, message = OUT_OF_BOUNDS[case]
    file = opened(tmp_path, with_record("data.pkl", pickled))
    with pytest.raises(UserError, match=message):
        file.read(file.values["v"])


BAD_FILES = {
    "empty": (b"", "not a zip"),
    "text": (b"hello", "not a zip, which torch.save writes$"),
    "old form": (b"\x80\x02\x8a\nl\xfc\x9cF\xf9 j\xa8P\x19.\x80\x02M\xe9\x03.", "torch before 1.6"),
    "no pickle": (zipped({"archive/x": b""}), "0 records data.pkl"),
    "two pickles": (zipped({"a/data.pkl": b"}.", "b/data.pkl": b"}."}), "2 records data.pkl"),
    "compressed": (zipped({"a/data.pkl": b"}" + b"0" * 60_000}, zipfile.ZIP_DEFLATED), "compressed"),
    "big-endian": (zipped({"a/data.pkl": b"}.", "a/byteorder": b"big"}), "expected b'little'"),
    "larger than expected": (bytes(LIMIT + 1), "at most 1048576 were expected"),
}


@pytest.mark.parametrize("case", BAD_FILES)
def test_bad_files_are_named(case: str, tmp_path) -> None:
    """A file of another kind, compressed, big-endian or too large is an error that says so."""
    content, message = BAD_FILES[case]
    with pytest.raises(UserError, match=message):
        opened(tmp_path, content)


def test_storage_of_another_size(tmp_path) -> None:
    """A record that is missing, or not of the announced number of elements, is an error."""
    file = opened(tmp_path, with_record("data/0", b"1234"))
    with pytest.raises(UserError, match="4 bytes; 24 elements of BF16"):
        file.read(file.values["v"])
    file = opened(tmp_path, zipped({"archive/data.pkl": tensor_pickle()}))
    with pytest.raises(UserError, match="no record 'data/0'"):
        file.read(file.values["v"])


def test_mutated_files_are_read_or_refused(tmp_path) -> None:
    """Whatever happens to the bytes of a file, or of its pickle alone, it is read or refused with a `UserError`."""
    whole = torch_file({"n": 151669, "v": VECTOR})
    with zipfile.ZipFile(io.BytesIO(whole)) as archive:
        pickled = archive.read("archive/data.pkl")
    read = 0
    for case in range(1500):
        rng = random.Random(case)
        content = mutate_bytes(rng, whole) if case % 2 else with_record("data.pkl", mutate_bytes(rng, pickled))
        try:
            file = opened(tmp_path, content)
            for value in file.values.values():
                read += isinstance(value, TorchTensor) and file.read(value).size
        except UserError as error:
            assert "\n" not in str(error)
    assert read

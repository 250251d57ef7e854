"""Conversion there and back, verification, and what happens when the disk is full."""

import errno
import json
import os
import random
import shutil
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import pytest

from mimo_jax.checkpoint import orbax
from mimo_jax.checkpoint.convert import to_huggingface, to_orbax, verify
from mimo_jax.checkpoint.huggingface import read_checkpoint
from mimo_jax.checkpoint.manifest import new_directory
from mimo_jax.checkpoint.orbax import leaf_digests
from mimo_jax.checkpoint.read import read
from mimo_jax.cli import memory
from mimo_jax.config.model import PUBLISHED, FileFormat
from mimo_jax.errors import UserError
from mimo_jax.weights import quantize_mx
from mimo_jax.weights.params import abstract_tree, weights
from tests.checkpoint.samples import load_file, random_tensors, save_checkpoint, small

ROOT = Path(__file__).parents[2]


def run_script(*arguments: object, **environment: str) -> subprocess.CompletedProcess:
    """scripts/convert.py in its own process."""
    command = [sys.executable, str(ROOT / "scripts" / "convert.py"), *map(str, arguments)]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "JAX_PLATFORMS": "cpu", **environment}
    return subprocess.run(command, capture_output=True, text=True, env=environment, timeout=120, check=False)


@pytest.fixture(scope="module")
def converted(tmp_path_factory) -> Path:
    """A folder with hf (published layout, 3 shards), orbax (converted) and back (converted again)."""
    folder = tmp_path_factory.mktemp("converted")
    config = small()
    save_checkpoint(folder / "hf", config, random_tensors(config), shards=3)
    to_orbax(folder / "hf", folder / "orbax")
    to_huggingface(folder / "orbax", folder / "back")
    return folder


def test_round_trip_is_bit_exact(converted) -> None:
    """HF -> Orbax -> HF gives back every tensor's name, dtype, shape and bytes, and the tokenizer's files."""
    before, after = {}, {}
    for path in (converted / "hf").glob("*.safetensors"):
        before |= load_file(path)
    for path in (converted / "back").glob("*.safetensors"):
        after |= load_file(path)
    assert before == after
    assert (converted / "back" / "tokenizer_config.json").read_bytes() == (
        converted / "hf" / "tokenizer_config.json"
    ).read_bytes()
    for written in ("orbax", "back"):
        assert verify(converted / written)["verified"]


def test_either_kind_reads_the_same(converted) -> None:
    """`read` gives the same config and bits from both kinds of directory."""
    one, other = read(converted / "hf"), read(converted / "orbax")
    assert (one.config, one.file_format) == (other.config, other.file_format)
    params, params2 = one.params, other.params
    assert leaf_digests(params) == leaf_digests(params2)


@pytest.mark.parametrize("name", ["dense", "fp8"])
def test_other_formats_keep_their_bits_in_orbax(tmp_path, name: str) -> None:
    """BF16 and FP8 checkpoints, float32 dense weights included, survive conversion bit for bit."""
    config, file_format = small(), FileFormat(name, "float32" if name == "dense" else "bfloat16")
    save_checkpoint(tmp_path / "hf", config, random_tensors(config, file_format), file_format)
    to_orbax(tmp_path / "hf", tmp_path / "orbax")
    found = read(tmp_path / "orbax")
    assert (found.config, found.file_format) == (config, file_format)
    assert leaf_digests(found.params) == leaf_digests(read_checkpoint(tmp_path / "hf").params)


@pytest.mark.parametrize("is_fused", [True, False])
def test_fp8_checkpoint_becomes_fp4(tmp_path, is_fused: bool) -> None:
    """An FP8 checkpoint exports to FP4: its linears keep their bytes, its experts are rounded to MXFP4."""
    config, file_format = small(fused_qkv=is_fused), FileFormat("fp8")
    tensors = random_tensors(config, file_format)
    save_checkpoint(tmp_path / "hf", config, tensors, file_format)
    to_huggingface(tmp_path / "hf", tmp_path / "fp4")
    written = load_file(tmp_path / "fp4" / "model-00001-of-00001.safetensors")
    kept = [name for name in written if "experts" not in name]
    assert kept and all(written[name][2] == tensors[name][1].tobytes() for name in kept)
    name = "model.layers.1.mlp.experts.3.down_proj.weight"
    codes, scales = tensors[name][1].astype(np.float32), tensors[f"{name}_scale_inv"][1]
    exact = codes * scales  # one 128 x 128 block each
    found = read_checkpoint(tmp_path / "fp4")
    assert (found.file_format.name, found.config.fused_qkv) == ("mxfp4", is_fused)
    expected = quantize_mx(exact)
    assert np.asarray(found.params["layers_1"]["moe"]["down"].codes)[3].tobytes() == expected.codes.tobytes()
    assert written[f"{name}_scale"][2] == expected.scales.tobytes()


_SHARDED = """
import sys, jax, numpy as np
from jax.sharding import NamedSharding, PartitionSpec as P
from mimo_jax.checkpoint.read import read
from mimo_jax.checkpoint.manifest import new_directory
from mimo_jax.checkpoint.orbax import leaf_digests
assert len(jax.devices()) == 8
mesh = jax.make_mesh((8,), ("x",), axis_types=(jax.sharding.AxisType.Auto,))
def place(path, shape):
    return NamedSharding(mesh, P("x") if path[-1] in ("embed", "head") or path[-2] == "qkv" else P())
for directory in sys.argv[1:]:
    params = read(directory, place).params
    embed, codes = params["embed"], params["layers_1"]["attention"]["qkv"].codes
    assert len({str(shard.index) for shard in embed.addressable_shards}) == 8
    assert embed.addressable_shards[0].data.shape[0] * 8 == embed.shape[0]
    assert codes.addressable_shards[0].data.shape[0] * 8 == codes.shape[0]
    print(sorted(leaf_digests(params).items()))
"""


def test_same_checkpoint_opens_on_eight_devices(converted) -> None:
    """Both kinds of directory open sharded over 8 devices with the bits they have on one."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "JAX_PLATFORMS": "cpu"}
    environment["XLA_FLAGS"] = "--xla_force_host_platform_device_count=8"
    command = [sys.executable, "-c", _SHARDED, str(converted / "hf"), str(converted / "orbax")]
    result = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=120, check=False)
    assert result.returncode == 0, result.stderr
    expected = str(sorted(leaf_digests(read(converted / "orbax").params).items()))
    assert result.stdout.splitlines() == [expected, expected]


def test_a_kill_between_the_two_renames_loses_nothing(converted, tmp_path) -> None:
    """What an --overwrite had moved aside when it was killed comes back, and counts as existing."""
    shutil.copytree(converted / "orbax", tmp_path / ".out.replaced")
    with pytest.raises(UserError, match="already exists"):
        with new_directory(tmp_path / "out"):
            pass
    assert verify(tmp_path / "out")["verified"]


@pytest.mark.parametrize("text", ["[" * 3000 + "]" * 3000, '{"files": 3}', "{}", "", '{"a": ' * 900 + "1" + "}" * 900])
def test_nonsense_manifests_are_one_line(converted, tmp_path, text: str) -> None:
    """A manifest of any other content is an error that names it."""
    (tmp_path / "params").mkdir()
    (tmp_path / "manifest.json").write_text(text)
    for reader in (verify, read):
        with pytest.raises(UserError, match=r"manifest.json: (not valid JSON|damaged|expected a JSON object)"):
            reader(tmp_path)


@pytest.mark.parametrize("kind", ["orbax", "back"])
def test_verify_finds_every_flipped_bit(converted, kind: str) -> None:
    """Random single-bit flips over all files, small metadata and the manifest included, are all found."""
    rng = random.Random(kind)
    paths = [path for path in sorted((converted / kind).rglob("*")) if path.is_file() and path.stat().st_size]
    for trial in range(200):
        path = paths[trial % len(paths)] if trial < 100 else rng.choice(paths)
        position, bit = rng.randrange(path.stat().st_size), rng.randrange(8)
        flip(path, position, bit)
        try:
            with pytest.raises(UserError):
                verify(converted / kind)
        finally:
            flip(path, position, bit)
    assert verify(converted / kind)["verified"]


def flip(path: Path, position: int, bit: int) -> None:
    with path.open("r+b") as file:
        file.seek(position)
        byte = file.read(1)[0]
        file.seek(position)
        file.write(bytes([byte ^ (1 << bit)]))


def test_verify_finds_absent_and_added_files(converted) -> None:
    """A file removed, added or cut short is named; so is a directory that was never finished."""
    target = converted / "back" / "tokenizer_config.json"
    content = target.read_bytes()
    target.unlink()
    with pytest.raises(UserError, match=r"tokenizer_config.json is missing"):
        verify(converted / "back")
    target.write_bytes(content[:-1])
    with pytest.raises(UserError, match=r"tokenizer_config.json: damaged"):
        verify(converted / "back")
    target.write_bytes(content)
    (converted / "back" / "extra.txt").touch()
    with pytest.raises(UserError, match=r"extra.txt is not in the manifest"):
        verify(converted / "back")
    (converted / "back" / "extra.txt").unlink()
    with pytest.raises(UserError, match=r"manifest.json: not found"):
        verify(converted / "hf")


def test_damaged_orbax_directories_are_one_line(converted, tmp_path) -> None:
    """A model directory without its manifest, or with files of its tree missing, is a UserError, not a traceback."""
    shutil.copytree(converted / "orbax", tmp_path / "broken")
    manifest = tmp_path / "broken" / "manifest.json"
    content = manifest.read_bytes()
    manifest.unlink()
    with pytest.raises(UserError, match=r"manifest.json: not found"):
        read(tmp_path / "broken")
    manifest.write_bytes(content)
    victim = next(path for path in (tmp_path / "broken" / "params").rglob("*") if "/d/" in str(path))
    data = victim.read_bytes()
    victim.write_bytes(data[:-1])
    with pytest.raises(UserError, match=rf"{len(data) - 1} bytes; manifest.json lists {len(data)}"):
        read(tmp_path / "broken")
    victim.write_bytes(data)
    config = tmp_path / "broken" / "config.json"
    config.write_bytes(config.read_bytes().replace(b'"num_nextn_predict_layers": 1', b'"num_nextn_predict_layers": 9'))
    with pytest.raises(UserError, match=r"config.json: damaged"):
        read(tmp_path / "broken")
    shutil.copy(converted / "orbax" / "config.json", config)
    victim.unlink()
    with pytest.raises(UserError, match=r"no file; manifest.json lists"):
        read(tmp_path / "broken")
    for path in (tmp_path / "broken" / "params").rglob("d/*"):
        path.unlink()
    with pytest.raises(UserError, match="not a complete checkpoint") as caught:
        orbax.restore_tree(tmp_path / "broken" / "params", abstract_tree(weights(small(), PUBLISHED)))
    assert "\n" not in str(caught.value)


def test_destination_is_kept_unless_replaced_safely(converted, tmp_path) -> None:
    """An existing destination is refused; --overwrite replaces it only once the new one is whole."""
    config = small()
    source = save_checkpoint(tmp_path / "hf", config, random_tensors(config, seed=5))
    to_orbax(converted / "hf", tmp_path / "out")
    before = leaf_digests(read(tmp_path / "out").params)
    with pytest.raises(UserError, match="already exists; give --overwrite"):
        to_orbax(source, tmp_path / "out")
    (source / "config.json").write_text("{}")
    with pytest.raises(UserError, match=r"config.json"):
        to_orbax(source, tmp_path / "out", overwrite=True)
    assert leaf_digests(read(tmp_path / "out").params) == before
    with pytest.raises(UserError, match="lies in the source"):
        to_orbax(converted / "hf", converted / "hf" / "inner", overwrite=True)
    (tmp_path / "mine").mkdir()
    with pytest.raises(UserError, match=r"mine: has no manifest.json, so it is not a written checkpoint"):
        to_orbax(converted / "hf", tmp_path / "mine", overwrite=True)
    to_huggingface(converted / "orbax", tmp_path / "out", overwrite=True)
    assert verify(tmp_path / "out")["kind"] == "huggingface"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["hf", "mine", "out"]


@pytest.mark.parametrize("call", ["pwrite", "write", "fsync"])
def test_full_disk_leaves_nothing(converted, tmp_path, monkeypatch, call: str) -> None:
    """ENOSPC at any write is one line with the reason, and nothing is left behind."""
    original = getattr(os, call)
    for allowed in (0, 1, 3):
        left = [allowed]

        def failing(*arguments, left=left):
            left[0] -= 1
            if left[0] < 0:
                raise OSError(errno.ENOSPC, "No space left on device")
            return original(*arguments)

        monkeypatch.setattr(os, call, failing)
        with pytest.raises(UserError, match=r"out: could not be written \(No space left on device\)"):
            to_huggingface(converted / "orbax", tmp_path / "out")
        monkeypatch.undo()
        assert list(tmp_path.iterdir()) == []


def test_full_disk_below_orbax_leaves_nothing(converted, tmp_path) -> None:
    """A write that fails inside Orbax's own storage library is one line, exit code 2, nothing left behind."""
    limited = "import resource, signal, runpy, sys\n"
    limited += "signal.signal(signal.SIGXFSZ, signal.SIG_IGN)\n"
    limited += "resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, 20_000))\n"
    limited += f"sys.argv = ['convert.py', 'to-orbax', {str(converted / 'hf')!r}, {str(tmp_path / 'out')!r}]\n"
    limited += f"runpy.run_path({str(ROOT / 'scripts' / 'convert.py')!r}, run_name='__main__')\n"
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "JAX_PLATFORMS": "cpu"}
    command = [sys.executable, "-c", limited]
    result = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=120, check=False)
    assert result.returncode == 2
    assert "Traceback" not in result.stderr
    assert result.stderr.splitlines()[-1].startswith("error: ") and "could not be written" in result.stderr
    assert list(tmp_path.iterdir()) == []


def test_training_save_that_fails_leaves_no_step(tmp_path, monkeypatch) -> None:
    """A save that cannot be written is one line, and no step, whole or half, appears."""

    def full(path, *arguments, **options):
        Path(f"{path}.orbax-checkpoint-tmp").mkdir()
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(orbax.ocp, "save", full)
    with pytest.raises(UserError, match="No space left on device"):
        orbax.save_step(tmp_path / "run", 1, {"w": np.zeros(3)})
    assert orbax.steps(tmp_path / "run") == [] and list((tmp_path / "run").iterdir()) == []


def test_command_line(converted, tmp_path) -> None:
    """The script's last line is JSON with what was found and measured; bad input is one line and exit code 2."""
    result = run_script("to-orbax", converted / "hf", tmp_path / "out")
    assert result.returncode == 0, result.stderr
    report = json.loads(result.stdout.splitlines()[-1])
    assert (report["qkv_chunks"], report["probed_heads"], report["storage"]) == (8, 9, "mxfp4")
    assert report["array_bytes"] < report["peak_rss"] and report["ratio"] > 0
    assert "interleaved in 8 chunks" in result.stderr and "all equal" in result.stderr
    result = run_script("verify", tmp_path / "out")
    assert json.loads(result.stdout.splitlines()[-1])["verified"] is True
    result = run_script("to-hf", tmp_path / "nowhere", tmp_path / "x")
    assert result.returncode == 2 and result.stdout == ""
    assert result.stderr.startswith("error: ") and len(result.stderr.splitlines()) == 1


_MEMORY = """
import os, sys
from pathlib import Path
from mimo_jax.checkpoint.convert import to_orbax, to_huggingface
report = (to_orbax if sys.argv[1] == "to-orbax" else to_huggingface)(Path(sys.argv[2]), Path(sys.argv[3]))
print(report["peak_over_base"], report["array_bytes"])
"""


def test_peak_memory(tmp_path) -> None:
    """Converting holds the arrays once: 1.15 times their bytes, the largest tensor thrice, and what libraries take.

    Orbax keeps a tensor as it was read and as it is put, and in some runs reads the next one meanwhile.
    """
    config = small(
        num_experts=512, hidden_size=256, moe_intermediate_size=1024, layer_pattern=(0, 1), moe_pattern=(0, 1)
    )
    save_checkpoint(tmp_path / "hf", config, random_tensors(config))
    for direction, source, target in (("to-orbax", "hf", "orbax"), ("to-hf", "orbax", "back")):
        command = [sys.executable, "-c", _MEMORY, direction, str(tmp_path / source), str(tmp_path / target)]
        environment = {**os.environ, "PYTHONPATH": str(ROOT), "JAX_PLATFORMS": "cpu", "JAX_NUM_CPU_DEVICES": "8"}
        result = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=120, check=True)
        above, held = map(int, result.stdout.split())
        largest = 512 * 1024 * 256 // 2
        libraries = 48 << 20  # code and pools touched for the first time, whatever the checkpoint's size
        assert above <= 1.15 * held + 3 * largest + libraries, (direction, above, held)


def test_memory_helpers_agree() -> None:
    """Current memory never exceeds the peak by more than the clock between two readings."""
    assert 0 < memory.current_memory() <= memory.peak_memory() + (8 << 20)
    assert jax.devices()

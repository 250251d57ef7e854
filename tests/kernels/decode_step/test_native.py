"""The native step: its paths give one another's numbers, and a token has the same bits however it is read."""

import os
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

from mimo_jax.config.geometry import drafter_of, target_of
from mimo_jax.layouts import native
from pallas_kernels.decode_step import (
    NORMALLY,
    Drafter,
    Packed,
    Running,
    Target,
    draft,
    init_cache,
    init_draft_cache,
    least_kept,
    step,
)
from pallas_kernels.decode_step.native import build
from pallas_kernels.decode_step.native.layout import Blob, Stored, blocked, stored_fp8, unblocked
from pallas_kernels.decode_step.native.names import header, numbers_of, sizes_of
from pallas_kernels.decode_step.schedule import claimed_rows, draft_phases, encode, step_phases
from tests.tiny import (
    NATIVE_TOLERANCE,
    in_format,
    random_drafter_params,
    random_params,
    random_tokens,
    tiny_config,
    tiny_drafter,
)

PATHS = build.usable_paths()
CONFIG = tiny_config(hidden_size=96, moe_intermediate_size=64, mtp_layers=0, vocab_size=250)
FOLDER = Path(__file__).parent


def packed(name: str) -> Packed:
    params = in_format(CONFIG, random_params(CONFIG), name)
    return native.pack(CONFIG, params)[1][native.NATIVE]


def read(weights: Packed, chunks: list[np.ndarray], running: Running = NORMALLY) -> np.ndarray:
    """Logits of tokens that are read chunk after chunk."""
    target = target_of(CONFIG)
    cache, length, found = init_cache(target, 1, 64), 0, []
    for tokens in chunks:
        size = tokens.shape[1]
        lengths, counts = np.array([length], np.int32), np.array([size], np.int32)
        out = step(target, (), weights, tokens, cache, lengths, counts, False, running)
        cache, length = out.cache, length + size
        found.append(np.asarray(out.logits[0]))
    return np.concatenate(found)


def chunks_of(tokens: np.ndarray, size: int) -> list[np.ndarray]:
    """The first 16 tokens at once, the others `size` at a time."""
    return [tokens[:, :16], *(tokens[:, start : start + size] for start in range(16, tokens.shape[1], size))]


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("name", ["dense", "fp8", "mxfp4"])
def test_a_token_has_the_same_bits_alone_and_in_a_block(path, name):
    """T = 1, 4, 8 and 16 give equal bits in every file format, so drafted text is plain text by construction."""
    weights, tokens = packed(name), random_tokens(CONFIG, 1, 48)
    one, *others = (read(weights, chunks_of(tokens, size), Running(path)) for size in (1, 4, 8, 16))
    for found in others:
        np.testing.assert_array_equal(found, one)


@pytest.mark.parametrize("threads", [1, 2, 8])
def test_bits_do_not_depend_on_threads(threads):
    """One thread, two, and more than there are cores, with rows delayed at random, give equal bits."""
    weights, tokens = packed("mxfp4"), random_tokens(CONFIG, 1, 32)
    expected = read(weights, chunks_of(tokens, 8), Running(threads=1))
    for delays in (0, 1, 2):
        np.testing.assert_array_equal(
            read(weights, chunks_of(tokens, 8), Running(threads=threads, delays=delays)), expected
        )


@pytest.mark.parametrize("path", PATHS)
def test_paths_agree(path):
    """Vector widths change the order of a few sums, and pairs of bf16 the last bits of inputs; nothing else."""
    weights, tokens = packed("mxfp4"), random_tokens(CONFIG, 1, 32)
    expected = read(weights, [tokens], Running(PATHS[-1]))
    found = read(weights, [tokens], Running(path))
    np.testing.assert_allclose(found, expected, atol=NATIVE_TOLERANCE[path], rtol=0)


def sorted_threshold(p: np.ndarray, weights: np.ndarray, wanted: float) -> float:
    """What `least_kept` says of one row, by sorting it; entries that are equal count together."""
    for entry in np.unique(p)[::-1]:
        if weights[p >= entry].sum(dtype=np.float64) >= wanted:
            return float(entry)
    return 0.0


@pytest.mark.parametrize("spread", [0.0, 0.5, 5.0])
def test_a_filter_keeps_what_sorting_would_keep(spread):
    """Of rows that are flat, or steep, or have ties and zeros: by count, by mass, by the mass of some of them."""
    rng = np.random.default_rng(3)
    p = np.exp(np.round(rng.normal(size=(4, 2, 700)) * spread, 1)).astype(np.float32)
    p[:, :, ::7] = 0
    p /= p.sum(axis=-1, keepdims=True)
    masked = np.where(p > np.median(p), p, 0).astype(np.float32)
    for weights, wanted in ((np.ones_like(p), 50), (np.ones_like(p), 701), (p, 0.9), (masked, 0.3), (masked, 0.999)):
        found = np.asarray(least_kept(jnp.asarray(p), jnp.asarray(weights), wanted))[..., 0]
        wanted = np.float32(wanted)
        for row in np.ndindex(4, 2):
            assert found[row] == sorted_threshold(p[row], weights[row], wanted)


def test_rows_of_a_batch_have_lengths_of_their_own():
    """A row gives what it gives alone, whatever the others read; one that reads nothing keeps its cache."""
    target, weights, tokens = target_of(CONFIG), packed("mxfp4"), random_tokens(CONFIG, 3, 12)
    lengths, counts = np.zeros(3, np.int32), np.array([12, 5, 0], np.int32)
    out = step(target, (0,), weights, tokens, init_cache(target, 3, 64), lengths, counts, False)
    for row in (0, 1):
        alone = read(weights, [tokens[row : row + 1, : counts[row]]])
        np.testing.assert_array_equal(out.logits[row, : counts[row]], alone)
    for array in (out.logits, out.hidden, out.aux):
        assert not np.any(array[1, 5:]) and not np.any(array[2])
    assert all(not np.any(array[:, 2]) for array in out.cache)
    assert int(out.expert_counts.sum()) == 17 * CONFIG.experts_per_token * sum(CONFIG.moe_pattern)


@pytest.mark.parametrize("name", ["dense", "mxfp4"])
def test_a_nan_stays_visible(name):
    """A weight that is not a number reaches the logits of every token that uses it, in any format of experts."""
    params = random_params(CONFIG)
    params["layers_2"]["attention"]["o"] = params["layers_2"]["attention"]["o"].at[3, 4].set(np.nan)
    weights = native.pack(CONFIG, in_format(CONFIG, params, name))[1][native.NATIVE]
    assert np.isnan(read(weights, [random_tokens(CONFIG, 1, 3)])).all()


def test_more_tokens_than_the_cache_holds_are_refused():
    """Nothing is written past the end of a cache."""
    target, weights = target_of(CONFIG), packed("mxfp4")
    lengths, counts = np.array([60], np.int32), np.array([8], np.int32)
    with pytest.raises(Exception, match="more tokens than its cache has room for"):
        step(target, (), weights, np.zeros((1, 8), np.int32), init_cache(target, 1, 64), lengths, counts, False)


def test_longer_chunks_than_a_ring_keeps_are_refused():
    """The error names the number and the limit."""
    target, weights, none = target_of(CONFIG), packed("mxfp4"), np.zeros(1, np.int32)
    with pytest.raises(ValueError, match="129 tokens of each row in one call; at most 128"):
        step(target, (), weights, np.zeros((1, 129), np.int32), init_cache(target, 1, 512), none, none, False)


def test_the_cache_is_updated_in_place():
    """A donated cache is given back in its own memory: nothing of it is copied per round."""
    target, weights = target_of(CONFIG), packed("mxfp4")
    one = np.ones(1, np.int32)

    def run(cache):
        return step(target, (), weights, np.zeros((1, 1), np.int32), cache, one, one, False).cache

    cache = init_cache(target, 1, 64)
    places = [array.unsafe_buffer_pointer() for array in cache]
    updated = jax.jit(run, donate_argnums=0)(cache)
    assert [array.unsafe_buffer_pointer() for array in updated] == places


# --- how weights are laid out ---


def stored(name: str) -> Stored:
    rng = np.random.default_rng(0)
    if name == "mxfp4":
        return Stored(rng.integers(0, 256, (2, 40, 48), np.uint8), rng.integers(0, 255, (2, 40, 3), np.uint8))
    if name == "fp8":
        codes = rng.integers(0, 256, (2, 200, 160), np.uint8).view(ml_dtypes.float8_e4m3fn)
        return stored_fp8(codes, rng.random((2, 2, 2), np.float32))
    return Stored(rng.standard_normal((2, 40, 72)).astype(name))


@pytest.mark.parametrize("name", ["mxfp4", "fp8", "bfloat16", "float32"])
def test_a_layout_rearranges_bits_and_loses_none(name):
    """From the blocks of a matrix its bytes come back."""
    given = stored(name)
    back = unblocked(given, blocked(given)[0])
    np.testing.assert_array_equal(back.view(np.uint8), given.values.view(np.uint8))


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("name", ["mxfp4", "fp8"])
def test_every_code_is_decoded_exactly(path, name):
    """All 16 codes of E2M1 and 254 of E4M3, subnormals too, with scales, read off through a head of one-hot rows."""
    codes = np.arange(256, dtype=np.uint8)
    if name == "mxfp4":
        scales = np.array([[100 + row] for row in range(16)], np.uint8)
        head = Stored(np.tile(codes[:16] | codes[:16] << 4, (16, 1)), scales)
        values = np.array([0, 0.5, 1, 1.5, 2, 3, 4, 6])
        expected = np.repeat(np.concatenate([values, -values]), 2) * 2.0 ** (scales.astype(int) - 127)
    else:
        finite = np.where((codes & 127) == 127, 0, codes).reshape(8, 32).view(ml_dtypes.float8_e4m3fn)
        head = stored_fp8(finite, np.full((1, 1), 0.3, np.float32))
        expected = finite.astype(np.float32) * np.float32(0.3)
    np.testing.assert_allclose(columns_of(head, path), expected, rtol=2e-7)


def columns_of(head: Stored, path: str) -> np.ndarray:
    """What a model of no layers computes with a head of 32 columns: token i is embedded as the i-th unit vector, and so
    are rows of media in the place of tokens beyond its vocabulary.
    """
    target = Target(head.values.shape[0], 32, (), 1, 1, 1, 8, 8, 8, 8, 1, 1, 8, 2, 1, 1.0, 1.0, 1.0, 1e-12)
    blob = Blob(5)
    blob.add_table(0, np.eye(32, dtype=np.float32))
    blob.add_matrix(1, head)
    blob.add_vector(2, np.full(32, 32**-0.5))  # the norm makes the entry sqrt(32)
    blob.add_vector(3, np.ones(1))
    blob.add_vector(4, np.ones(1))
    weights = Packed(*map(jnp.asarray, blob.finish()))
    tokens, zero, all_of_them = np.arange(32, dtype=np.int32)[None], np.zeros(1, np.int32), np.full(1, 32, np.int32)
    media = jnp.eye(32)[target.vocab :]
    out = step(target, (), weights, tokens, init_cache(target, 1, 32), zero, all_of_them, False, Running(path), media)
    return np.asarray(out.logits[0]).T


# --- how it is compiled ---


def test_another_source_compiler_or_machine_is_another_library(monkeypatch, tmp_path):
    """A stale or a foreign binary has another name, so it is never loaded."""
    (path, *_) = PATHS
    compiler = next(filter(None, map(build.shutil.which, ("g++", "clang++", "c++"))))
    names = {build._digest(compiler, path)}
    with monkeypatch.context() as changed:
        changed.setattr(build, "header", lambda: header() + "// changed\n")
        names.add(build._digest(compiler, path))
    with monkeypatch.context() as changed:
        changed.setattr("jaxlib.__version__", "0.0.1")
        names.add(build._digest(compiler, path))
    with monkeypatch.context() as changed:
        changed.setattr(build, "_version", lambda compiler: "another")
        names.add(build._digest(compiler, path))
    with monkeypatch.context() as changed:
        changed.setattr(build, "FOLDER", tmp_path)
        for source in build.SOURCES:
            (tmp_path / source).write_bytes(
                (FOLDER.parents[2] / "pallas_kernels/decode_step/native" / source).read_bytes()
            )
        (tmp_path / "simd.h").write_text("// another\n")
        names.add(build._digest(compiler, path))
    assert len(names) == 5


def test_a_damaged_library_is_compiled_again(monkeypatch, tmp_path):
    """A file that is no library is replaced, not reported."""
    whole = build.library().read_bytes()
    monkeypatch.setenv(build.CACHE, str(tmp_path))
    monkeypatch.setattr(build, "_compile", lambda compiler, name, target: target.write_bytes(whole) and target)
    build.library().write_bytes(b"no library")
    assert build.load.__wrapped__().mimo_step
    assert build.library().read_bytes() == whole


def test_a_folder_that_cannot_be_written_is_said(monkeypatch):
    """The reason names the folder and the variable that names another."""
    monkeypatch.setenv(build.CACHE, "/proc/native")
    with pytest.raises(
        build.Unavailable, match=r"/proc/native cannot be written .*; name a folder in \$MIMO_NATIVE_CACHE"
    ):
        build.library()


def test_a_cpu_gets_the_paths_it_can_run(monkeypatch):
    """Features decide, the fastest path first; a machine that none serves is told so."""
    monkeypatch.setattr(build.platform, "machine", lambda: "x86_64")
    monkeypatch.setattr(build, "cpu_features", lambda: {"avx2", "fma", "f16c"})
    assert build.usable_paths() == ["avx2"]
    monkeypatch.setattr(
        build, "cpu_features", lambda: set(build.PATHS["avx512_bf16"].features) | {"avx2", "fma", "f16c"}
    )
    assert build.usable_paths() == ["avx512_bf16", "avx512", "avx2"]
    monkeypatch.setattr(build, "cpu_features", set)
    with pytest.raises(build.Unavailable, match="neither AVX2 nor NEON"):
        build.library()


def test_without_a_compiler_generating_still_works(tmp_path):
    """One line says what it costs and how to mend it; the text is the same."""
    script = Path(__file__).parents[3] / "scripts" / "generate.py"
    command = [sys.executable, str(script), "--greedy", "--draft", "none", "--max-tokens", "8", "--prompt", "def f(x):"]
    slow = {"CXX": "no-such-compiler", build.CACHE: str(tmp_path)}
    runs = [
        subprocess.run(command, env=os.environ | extra, capture_output=True, text=True, check=True)
        for extra in ({}, slow)
    ]
    natively, plainly = (run.stdout.splitlines()[:-3] for run in runs)
    assert natively == plainly
    (notice,) = [line for line in runs[1].stderr.splitlines() if "slower" in line]
    assert "no C++ compiler was found (no-such-compiler); install one" in notice


# --- races ---


def dump(path: Path, arrays: list) -> Path:
    with path.open("wb") as file:
        for array in map(np.ascontiguousarray, arrays):
            file.write(np.int64(array.nbytes).tobytes() + array.tobytes())
    return path


def step_arrays(target: Target, weights: Packed, batch: int, steps: int) -> list:
    cache = init_cache(target, batch, 64)
    shape = [batch, steps, cache.global_values.shape[3], cache.sliding_values.shape[3], sum(CONFIG.moe_pattern)]
    layers = [layer.is_sliding + 2 * layer.has_experts for layer in target.layers]
    return [
        *(sizes_of(target), numbers_of(target), np.array(layers, np.int32), np.array([0, 2], np.int32)),
        encode(claimed_rows(step_phases(target, steps, batch))),
        *(weights.bytes, weights.directory, random_tokens(CONFIG, batch, steps)),
        *(np.array([0, 20], np.int32), np.array([steps, steps - 3], np.int32)),
        *(*cache, np.array(shape, np.int32)),
    ]


def draft_arrays(drafter: Drafter, target: Packed, weights: Packed) -> list:
    cache = init_draft_cache(drafter, 2)
    return [
        *(sizes_of(drafter), numbers_of(drafter), encode(claimed_rows(draft_phases(drafter, 2)))),
        *(target.bytes, target.directory, weights.bytes, weights.directory),
        *(np.array([7, 8], np.int32), np.array([5, 40], np.int32), random_tokens(CONFIG, 2, drafter.lookup)),
        *(*cache, np.array([cache.values.shape[3]], np.int32)),
    ]


def test_the_thread_sanitizer_finds_no_race(tmp_path):
    """Rows that share memory are ordered by counters: target and drafter, on 2 and 8 threads, delayed at random."""
    compiler = next(filter(None, map(build.shutil.which, ("g++", "clang++"))))
    (tmp_path / "names.h").write_text(header())
    program, source = tmp_path / "harness", Path(build.__file__).parent
    flags = ("-std=c++17", "-O1", "-g", "-fsanitize=thread", "-ffp-contract=off", *build.PATHS[PATHS[-1]].flags)
    subprocess.run(
        [compiler, *flags, f"-I{tmp_path}", f"-I{source}", str(FOLDER / "harness.cc"), "-o", str(program)], check=True
    )
    drafter_config = tiny_drafter(hidden_size=96, vocab_size=250, bias_rank=16, lookup=24)
    drafter, weights = drafter_of(drafter_config, CONFIG), packed("mxfp4")
    drafts = native.pack_drafter(drafter_config, random_drafter_params(drafter_config))[native.NATIVE]
    for name, arrays in (
        ("step", step_arrays(target_of(CONFIG), weights, 2, 8)),
        ("draft", draft_arrays(drafter, weights, drafts)),
    ):
        run = subprocess.run([str(program), name, str(dump(tmp_path / name, arrays))], capture_output=True, text=True)
        assert run.stdout == "equal\n" and run.returncode == 0, run.stdout + run.stderr[:3000]


@pytest.mark.parametrize("bias_rank", [0, 16])
def test_drafts_are_as_likely_as_their_logits_say(bias_rank):
    """The likelihood beside a draft is the softmax of its logits, and of what the bias of the draft before adds."""
    config = tiny_drafter(hidden_size=96, vocab_size=250, bias_rank=bias_rank, lookup=24)
    drafter, params = drafter_of(config, CONFIG), random_drafter_params(config)
    arguments = (packed("mxfp4"), native.pack_drafter(config, params)[native.NATIVE])
    anchors, lengths, text = np.array([7, 8], np.int32), np.array([5, 40], np.int32), random_tokens(CONFIG, 2, 24)
    tokens, likely, logits = map(
        np.asarray, draft(drafter, *arguments, anchors, lengths, text, init_draft_cache(drafter, 2), True)
    )
    before = np.concatenate([anchors[:, None], tokens[:, :-1]], axis=1)
    total = logits[..., :250].astype(np.float64)
    if bias_rank:
        total += np.asarray(params["bias_in"], np.float64)[before] @ np.asarray(params["bias_out"], np.float64).T
    odds = np.exp(total - total.max(-1, keepdims=True))
    expected = np.take_along_axis(odds / odds.sum(-1, keepdims=True), tokens[..., None], -1)[..., 0]
    np.testing.assert_allclose(likely, expected, rtol=0.02)
    assert (likely > 1 / 250).all() and likely.max() < 1


def test_drafts_do_not_depend_on_threads_or_delays():
    """The drafter proposes the same tokens on one thread and on several."""
    config = tiny_drafter(hidden_size=96, vocab_size=250, bias_rank=16, lookup=24)
    drafter, weights = drafter_of(config, CONFIG), packed("mxfp4")
    drafts = native.pack_drafter(config, random_drafter_params(config))[native.NATIVE]
    anchors, lengths, text = np.array([7, 8], np.int32), np.array([5, 40], np.int32), random_tokens(CONFIG, 2, 24)

    def proposed(running: Running) -> list[np.ndarray]:
        cache = init_draft_cache(drafter, 2)
        return [
            np.asarray(out) for out in draft(drafter, weights, drafts, anchors, lengths, text, cache, True, running)
        ]

    expected = proposed(Running(threads=1))
    for running in (Running(threads=2), Running(threads=8, delays=1), Running(threads=2, delays=2)):
        for found, wanted in zip(proposed(running), expected):
            np.testing.assert_array_equal(found, wanted)

"""The Hopper layout is the published bytes in another order; the kernel reads them as the numbers they are."""

import jax
import ml_dtypes
import numpy as np
import pytest

from pallas_kernels import mxfp4
from pallas_kernels.expert_matmul import PackedExperts, from_hopper, hopper_layout, mosaic_tile, to_hopper, unfit
from pallas_kernels.expert_matmul.mosaic_plain import decode_tiles
from tests.kernels.expert_matmul.samples import on_device, packed_experts

# Hidden size, features: two tiles of gate and up per warp, or one; one K split, or several, of each matrix.
SIZES = [(512, 256), (512, 768), (1536, 256), (4096, 256), (6144, 256)]


def random_bytes(hidden: int, features: int) -> PackedExperts:
    rng = np.random.default_rng(hidden + features)

    def stack(rows: int, cols: int) -> tuple[np.ndarray, np.ndarray]:
        return tuple(rng.integers(0, 256, (2, rows, cols // part), dtype=np.uint8) for part in (2, 32))

    return PackedExperts(stack(features, hidden), stack(features, hidden), stack(hidden, features))


@pytest.mark.parametrize(("hidden", "features"), SIZES)
def test_the_layout_is_a_bijection(hidden, features):
    """Every byte of codes and scales comes back, all 256 scale bytes included; not a bit more is stored than given."""
    experts = random_bytes(hidden, features)
    hopper = to_hopper(experts)
    for before, after in zip(jax.tree.leaves(experts), jax.tree.leaves(from_hopper(hopper))):
        np.testing.assert_array_equal(before, after)
    assert sum(leaf.nbytes for leaf in jax.tree.leaves(hopper)) == sum(leaf.nbytes for leaf in jax.tree.leaves(experts))
    assert hopper.sizes == experts.sizes == (2, hidden, features)
    other_way = to_hopper(from_hopper(hopper))
    for before, after in zip(jax.tree.leaves(hopper), jax.tree.leaves(other_way)):
        np.testing.assert_array_equal(before, after)


def test_devices_rearrange_as_the_host_does():
    """JAX and numpy give the same words and the same bytes back."""
    experts = random_bytes(512, 256)
    hopper = to_hopper(experts)
    on_cpu = jax.jit(to_hopper)(on_device(experts))
    for one, other in zip(jax.tree.leaves(hopper), jax.tree.leaves(on_cpu)):
        np.testing.assert_array_equal(one, other)
    for one, other in zip(jax.tree.leaves(experts), jax.tree.leaves(jax.jit(from_hopper)(on_cpu))):
        np.testing.assert_array_equal(one, other)


@pytest.mark.parametrize("ways", [2, 4])
def test_a_slice_of_the_layout_is_the_layout_of_a_slice(ways):
    """Tensor parallel: devices split the whole stacks and hold exactly what their own features would give."""
    hidden, features = 512, 1024
    experts = random_bytes(hidden, features)
    whole, part = to_hopper(experts), features // ways
    for device in range(ways):
        rows = slice(device * part, (device + 1) * part)
        columns = [slice(device * part // size, (device + 1) * part // size) for size in (2, 32)]
        gate, up = (tuple(leaf[:, rows] for leaf in stack) for stack in (experts.gate, experts.up))
        down = tuple(leaf[..., where] for leaf, where in zip(experts.down, columns))
        own = to_hopper(PackedExperts(gate, up, down))
        np.testing.assert_array_equal(own.gate_up, np.split(whole.gate_up, ways, axis=2)[device])
        np.testing.assert_array_equal(own.down, np.split(whole.down, ways, axis=1)[device])


def registers_of(words: np.ndarray) -> list[np.ndarray]:
    """The four operand registers of words, by the instructions of the inline code."""
    rotated = [words << np.uint32(by) | words >> np.uint32(32 - by) if by else words for by in hopper_layout.ROTATIONS]
    registers = [word & np.uint32(mosaic_tile.CODE_BITS) for word in rotated]
    mantissa = words << np.uint32(hopper_layout.LAST_MANTISSA) & np.uint32(mosaic_tile.LAST_BITS[1])
    registers[3] = rotated[3] & np.uint32(mosaic_tile.LAST_BITS[0]) | mantissa
    return registers


def bf16(bits: np.ndarray) -> np.ndarray:
    return bits.astype(np.uint16).view(ml_dtypes.bfloat16).astype(np.float64)


def test_registers_hold_the_codes_of_the_word():
    """All contents of either half of a word: each register is its code's value times 2**-126, and no bit more."""
    halves = np.arange(65536, dtype=np.uint32)
    others = np.random.default_rng(0).permutation(halves)
    tiling = hopper_layout.gate_up_tiling(512, 16)
    for words in (halves | others << 16, others | halves << 16):
        registers = registers_of(words)
        # Word by word through the layout's inverse, 4 tiles of 256 words at a time.
        flat = words.reshape(-1, tiling.stage_tiles, 2 * tiling.span)
        tiles = np.zeros((flat.shape[0], tiling.stage_tiles, tiling.tile_words), np.uint32)
        tiles[..., : 2 * tiling.span] = flat
        stages = tiles.reshape(flat.shape[0], 1, 1, tiling.stage_words).view(np.int32)
        codes, _ = hopper_layout._from_stages(stages, tiling)
        elements = mxfp4.unpack(codes)  # [E, 32 rows, 512 columns]
        scale_one = np.full((*elements.shape[:-1], elements.shape[-1] // 32), 127, np.uint8)
        values = mxfp4.decode(elements, scale_one).reshape(
            -1, tiling.stage_items, 2, 8, 4, tiling.span // 64, 2, 4, 2, 2, 2
        )
        # stage, item, row half, row, warp, 64, block, thread, step, column pair, column -> as words lie
        values = values.transpose(0, 1, 4, 5, 3, 7, 6, 8, 9, 2, 10).reshape(-1, 4, 2)
        for number, register in enumerate(registers):
            for half in range(2):
                found = bf16(register >> np.uint32(16 * half) & np.uint32(0xFFFF)) * 2.0**126
                np.testing.assert_array_equal(found, values[:, number, half])


def test_scales_become_bf16_by_a_byte_permutation_and_a_shift():
    """Every scale byte that the kernel takes: the inline code's bf16 is the scale times 2**126, for both rows."""
    byte = np.arange(hopper_layout.LARGEST_SCALE + 1)
    stored = (byte + hopper_layout.SCALE_OFFSET & 255).astype(np.uint32)
    found = bf16(stored << 8 >> 1)
    np.testing.assert_array_equal(found, 2.0 ** (byte.astype(np.float64) - 127 + 126))
    # What `prmt` selects for block 0 and 1: bytes 0 and 1, or 2 and 3, into the upper bytes of the halves.
    for selector, bytes_of_block in zip(mosaic_tile.SCALE_BYTES, ((0, 1), (2, 3))):
        nibbles = [selector >> shift & 15 for shift in (0, 4, 8, 12)]
        assert (nibbles[1], nibbles[3]) == bytes_of_block and nibbles[0] == nibbles[2] == 4


def test_the_reference_decodes_the_layout():
    """The interpreter's decoding gives the exact weights of the published bytes, row by row."""
    experts = packed_experts()
    tiling = hopper_layout.down_tiling(512, 256)
    tiles = to_hopper(experts).down[:, 0].reshape(-1, tiling.tile_words)
    found = np.asarray(decode_tiles(on_device(tiles), tiling.span), np.float32)
    expected = mxfp4.decode(mxfp4.unpack(experts.down[0]), experts.down[1])
    np.testing.assert_array_equal(found.reshape(expected.shape), expected)


def test_what_does_not_fit_is_named():
    """A size without Hopper layout and a scale that the kernel cannot take are named with their value."""
    assert "16 x 192" in unfit(192, 16)
    assert "512 x 96" in unfit(512, 96)
    with pytest.raises(ValueError, match="512 x 96"):
        to_hopper(random_bytes(512, 96))
    scales = {"gate": np.array([[3, 128]], np.uint8), "up": np.array([[3, 129]], np.uint8)}
    assert "up: scale byte 129" in unfit(512, 256, scales)
    assert unfit(512, 256, {"gate": scales["gate"]}) is None

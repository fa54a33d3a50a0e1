"""Fragment and tile layouts: the emulation against formulas of the PTX ISA, a GPU against both."""

import shutil
import subprocess
from pathlib import Path

import cuda_kernels
import numpy as np
import pytest
import torch

PROBES = Path(__file__).with_name("cuda_probes")
# Words of a lane hold 4 signed bytes or 2 values of 16 bits.
S8, F16, BF16 = (np.int32, 4), (np.float32, 2), (np.float32, 2)


class Output:
    """What a probe printed, read piece by piece."""

    def __init__(self, raw: bytes):
        self.raw = raw

    def take(self, dtype: type, *shape: int) -> np.ndarray:
        size = int(np.prod(shape)) * np.dtype(dtype).itemsize
        piece, self.raw = self.raw[:size], self.raw[size:]
        return np.frombuffer(piece, dtype).reshape(shape)


def emulated(name: str) -> bytes:
    program = cuda_kernels.build_program(f"probes_{name}", [PROBES / f"{name}.cu"])
    return subprocess.run([program], capture_output=True, check=True, timeout=300).stdout


def mma_elements(per_word: int, b_words: int = 2):
    """(row, column) of A and (row, column) of B for each lane and element, of m16n8k(8 * per_word).

    With four words of B, of mma.sp with twice as many rows of B.

    PTX ISA, "Matrix Fragments for mma.m16n8k16 with floating point type" and "...m16n8k32": a word
    holds consecutive k; words 0, 2 of A are of row lane / 4, words 1, 3 of the row eight below;
    words 2, 3 of A and word 1 of B are of the second half of k.
    """
    lane = np.arange(32)[:, None, None]
    inside = np.arange(per_word)[None, None, :]
    word = np.arange(4)[None, :, None]
    k = (lane % 4) * per_word + inside
    half = 4 * per_word
    a = (lane // 4 + 8 * (word % 2) + 0 * inside, k + half * (word // 2))
    word = np.arange(b_words)[None, :, None]
    b = (k + half * word, lane // 4 + 0 * (word + inside))
    return [np.broadcast_arrays(*pair) for pair in (a, b)]


LANE = np.arange(32)[:, None]
SUM_ROW = LANE // 4 + 8 * (np.arange(4) // 2)
SUM_COLUMN = LANE % 4 * 2 + np.arange(4) % 2


def assert_sums_name_elements(sums: np.ndarray, per_word: int, b_words: int) -> None:
    """Each element of A alone meets the elements of B in its column: of A, if it is sparse, in the
    column of the stored one, the first two of each four."""
    (a_row, a_column), (b_row, b_column) = mma_elements(per_word, b_words)
    lane_of = np.zeros((4 * b_words * per_word, 8))
    index_of = np.zeros_like(lane_of)
    for lane in range(32):
        for i, (row, column) in enumerate(zip(b_row[lane].flat, b_column[lane].flat, strict=True)):
            lane_of[row, column], index_of[row, column] = lane + 1, i + 1
    if b_words == 4:
        a_column = a_column // 2 * 4 + a_column % 2
    for hot, (row, column) in enumerate(zip(a_row.flat, a_column.flat, strict=True)):
        for told, where in enumerate((lane_of, index_of)):
            expected = np.where(row == SUM_ROW, where[column][SUM_COLUMN], 0)
            np.testing.assert_array_equal(sums[hot, told], expected)


def metadata_group(bytes_: bool, selector: int, lane: int, nibble: int) -> tuple[int, int] | None:
    """The row of A, and which four of its columns, that these bits of a lane's metadata are of.

    PTX ISA, "Matrix Fragments for sparse mma.m16n8k64" (8-bit types): lanes 0 and 1 of four hold
    columns 0 to 31 of rows r and r + 8, lanes 2 and 3 columns 32 to 63. "...m16n8k32" (16-bit
    types): of the two lanes that the selector names, the first holds columns 0 to 15, the second 16
    to 31, of row r in the low half, of row r + 8 in the high half.
    """
    row, quarter = lane // 4, lane % 4
    if bytes_:
        return row + 8 * (quarter % 2), 8 * (quarter // 2) + nibble
    if quarter // 2 != selector:
        return None
    return row + 8 * (nibble // 4), 4 * (quarter % 2) + nibble % 4


@pytest.fixture(scope="module")
def sm80() -> Output:
    return Output(emulated("sm80"))


@pytest.fixture(scope="module")
def sm90a() -> Output:
    return Output(emulated("sm90a"))


def test_sm80_fragments(sm80):
    for sum_dtype, per_word in (S8, F16, BF16):
        sums = sm80.take(sum_dtype, 128 * per_word, 2, 32, 4)
        assert_sums_name_elements(sums, per_word, 2)
    for (sum_dtype, per_word), selector in ((S8, 0), (F16, 0), (F16, 1), (BF16, 0), (BF16, 1)):
        sums = sm80.take(sum_dtype, 128 * per_word, 2, 32, 4)
        assert_sums_name_elements(sums, per_word, 4)
        for hot, sums in enumerate(sm80.take(sum_dtype, 256, 32, 4)):
            row, group = metadata_group(per_word == 4, selector, hot // 8, hot % 8) or (-1, 0)
            np.testing.assert_array_equal(sums, np.where(row == SUM_ROW, group + 1, 0))
    fragments = sm80.take(np.uint32, 32, 4)
    word = np.arange(128, dtype=np.uint32) * np.uint32(0x01010101) + np.uint32(0x3020100)
    rows = word.reshape(4, 8, 4)  # matrix, row, word
    lanes = np.arange(32)
    np.testing.assert_array_equal(fragments, rows[:, lanes // 4, lanes % 4].T)
    valid = (np.arange(32) % 3 != 0)[:, None]
    for unit in (16, 4):
        copied = sm80.take(np.uint8, 32, unit)
        values = (np.arange(32 * unit) * 7 % 256).astype(np.uint8).reshape(32, unit)
        np.testing.assert_array_equal(copied, values * valid)
    byte = np.arange(256)
    np.testing.assert_array_equal(
        sm80.take(np.float16, 256, 2), np.stack([byte - 128, 127 - byte], 1)
    )
    low, minus = byte % 128 + 128, (byte & 128) + 128  # the second of a pair twice as large
    wide = sm80.take(np.uint16, 256, 2).astype(np.uint32) << 16
    np.testing.assert_array_equal(
        wide.view(np.float32), np.stack([low - minus, 2 * low - minus], 1)
    )
    assert sm80.take(np.uint8, 3, 2**13).all()  # as exact as math.cuh says
    np.testing.assert_array_equal(
        sm80.take(np.float32, 7), [0, np.inf, 1, -np.inf, np.inf, np.inf, 0]
    )
    assert not sm80.raw


def unswizzled(tile: np.ndarray) -> np.ndarray:
    """Rows of 128 bytes from a tile as it lies: unit u of row r is at unit u xor r % 8."""
    rows = np.arange(tile.shape[0])[:, None]
    units = np.arange(8)[None, :] ^ rows % 8
    return tile.reshape(-1, 8, 16)[rows, units].reshape(-1, 128)


def values_of(raw: np.ndarray, kind: str) -> np.ndarray:
    if kind == "s8":
        return raw.view(np.int8).astype(np.float64)
    dtype = torch.float16 if kind == "f16" else torch.bfloat16
    return torch.from_numpy(raw.copy()).view(dtype).double().numpy()


def probed_metadata() -> np.ndarray:
    """The words of some_metadata in sm90a.cu: [warp, lane, step]."""
    state = np.arange(256, dtype=np.uint32)
    word = np.zeros(256, np.uint32)
    for _ in range(8):
        state = state * np.uint32(1664525) + np.uint32(1013904223)
        word = word << 4 | np.uint32(0xED9C84) >> (state >> 24) % 6 * 4 & 15
    return word.reshape(4, 32, 2)


def sparse_columns(kind: str, selector: int) -> np.ndarray:
    """Which k each stored value of A stands for, [64, values of two steps].

    PTX ISA, "Matrix fragments for warpgroup-level multiply-accumulate operation with sparse matrix
    A". 8-bit types: of each four lanes, 0 and 2 hold row lane / 4, 1 and 3 the row eight below,
    first the lower 32 k, then the upper. 16-bit types: the two lanes that the selector names hold
    16 k each of row lane / 4 in their low halves, of the row eight below in their high ones.
    """
    values, per_lane = (32, 16) if kind == "s8" else (16, 8)
    warp, below, group, step, i = np.ix_(range(4), range(2), range(8), range(2), range(values))
    if kind == "s8":
        lane, field = 4 * group + below + 2 * (i // per_lane), i % per_lane
    else:
        lane, field = 4 * group + 2 * selector + i // per_lane, i % per_lane + 8 * below
    position = probed_metadata()[warp, lane, step] >> (2 * field).astype(np.uint32) & 3
    return (step * 2 * values + i // 2 * 4 + position).reshape(64, 2 * values)


def check_sparse_products(sm90a: Output, kind: str, a: np.ndarray, b: np.ndarray) -> None:
    values, dtype = (64, np.int32) if kind == "s8" else (32, np.float32)
    last = 0 if kind == "s8" else 1
    count_up = np.tile(np.arange(1, values + 1), (64, 1))
    diagonal = np.eye(256, 2 * values)
    for stored, dense, columns, selector in (
        (count_up, diagonal, 128, 0),
        (count_up, diagonal, 128, last),
        (a[:, :values], b, 64, 0),
        (a[:, :values], b, 128, 0),
        (a[:, :values], b, 176, last),
        (a[:, :values], b, 192, 0),
    ):
        spread = np.zeros((64, 2 * values))
        np.put_along_axis(spread, sparse_columns(kind, selector), stored, axis=1)
        whole = accumulators(sm90a.take(dtype, 4, 8, 4, columns // 8, 2, 2))
        np.testing.assert_array_equal(whole, (spread @ dense.T)[:, :columns])


def accumulators(sums: np.ndarray) -> np.ndarray:
    """Rows and columns of D from warp, row in eight, column pair, eight columns, row eight below,
    column of the pair."""
    return sums.transpose(0, 4, 1, 3, 2, 5).reshape(64, -1)


def test_sm90a_tiles_and_products(sm90a):
    tiles = sm90a.take(np.uint8, 2, 256, 128)
    pairs = sm90a.take(np.uint8, 2, 2, 64, 128)
    matrix = sm90a.take(np.uint8, 300, 208)
    numbers = np.zeros(300 * 208, np.uint32)
    state = 1
    for i in range(numbers.size):
        state = (state * 1664525 + 1013904223) % 2**32
        numbers[i] = state >> 24
    original = numbers.astype(np.uint8).reshape(300, 208)
    beyond = np.zeros((512, 256), np.uint8)
    beyond[:300, :208] = original
    np.testing.assert_array_equal(unswizzled(tiles[0]), beyond[:256, :128])
    np.testing.assert_array_equal(unswizzled(tiles[1]), beyond[256:, 128:])
    for block in range(2):
        for half in range(2):
            np.testing.assert_array_equal(
                unswizzled(pairs[block, half]), original[64 * half : 64 * half + 64, :128]
            )
    # Fragment i of lane l goes to row l / 4 of matrix i, whose address lane 8i + l / 4 brought.
    stored = np.zeros((512, 16), np.uint8)
    for base in range(0, 512, 32):
        for lane in range(32):
            for i in range(4):
                word = np.uint32(((base + lane) * 0x01010101 + i * 0x11223344) % 2**32)
                at = 4 * (lane % 4)
                stored[base + 8 * i + lane // 4, at : at + 4] = np.frombuffer(word.tobytes(), "u1")
    expected = original.copy()
    expected[256:300, 128:208] = stored.reshape(64, 128)[:44, :80]
    np.testing.assert_array_equal(matrix, expected)
    block, lane = np.ogrid[:8, :32]
    number = (100 * ((block + lane) % 8) + lane % 2).astype(np.uint64)
    read_remotely = sm90a.take(np.uint64, 8, 32, 2)
    np.testing.assert_array_equal(read_remotely, np.stack([number, ~number], -1))
    elements = np.arange(256, dtype=np.uint16).reshape(4, 8, 8)  # matrix, row, column
    transposed = sm90a.take(np.uint16, 4, 8, 8)
    np.testing.assert_array_equal(transposed, elements.transpose(0, 2, 1))

    for kind in ("s8", "f16", "bf16"):
        a = values_of(sm90a.take(np.uint8, 64, 128), kind)
        b = values_of(sm90a.take(np.uint8, 256, 128), kind)
        product = 2 * a @ b.T
        for columns in (8, 16, 32, 64, 128, 256):
            sums = sm90a.take(np.int32 if kind == "s8" else np.float32, 4, 8, 4, columns // 8, 2, 2)
            np.testing.assert_array_equal(accumulators(sums), product[:, :columns])
        check_sparse_products(sm90a, kind, a, b)
    assert not sm90a.raw


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("name", ["sm80", "sm90a"])
def test_gpu_agrees_with_the_emulation(name, tmp_path):
    nvcc = shutil.which("nvcc") or pytest.skip("nvcc was not found")
    capability = torch.cuda.get_device_capability()
    if name == "sm90a" and capability != (9, 0):
        pytest.skip("sm_90a code runs on compute capability 9.0 only")
    target = "90a" if name == "sm90a" else "{}{}".format(*capability)
    program = tmp_path / name
    command = [nvcc, "-std=c++20", f"-gencode=arch=compute_{target},code=sm_{target}"]
    command += [f"-I{cuda_kernels.ROOT / 'csrc'}", f"-I{PROBES / 'device'}"]
    subprocess.run([*command, str(PROBES / f"{name}.cu"), "-o", str(program)], check=True)
    output = subprocess.run([program], capture_output=True, check=True, timeout=60).stdout
    expected = emulated(name)
    assert len(output) == len(expected)
    differ = np.flatnonzero(np.frombuffer(output, "u1") != np.frombuffer(expected, "u1"))
    assert differ.size == 0, f"{differ.size} bytes differ, the first is byte {differ[0]}"

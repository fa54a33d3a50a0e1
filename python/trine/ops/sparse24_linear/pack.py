"""The packed 2:4 weight: two values and two 2-bit positions for every group of four columns.

`values` [N, 16 * ceil(K / 32)] holds the values in column order, `indices` uint8
[N, 4 * ceil(K / 32)] a nibble per group, low nibble first: the low two bits are the position of the
group's first value, the high two of its second, ascending. A group with fewer than two non-zeros
takes the lowest free positions with value 0.
"""

import torch
from torch import Tensor

COLUMNS = 32  # of a chunk: 16 fp32 values fill a 64-byte line, and its indices one uint32

DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.int8)


def _nibble_of_mask(mask: int) -> int:
    """The nibble of a group whose bit p of `mask` is set where position p is not zero."""
    taken = [p for p in range(4) if mask >> p & 1]
    free = [p for p in range(4) if not mask >> p & 1]
    first, second = sorted((taken + free)[:2])
    return first | second << 2


_NIBBLE_OF_MASK = torch.tensor([_nibble_of_mask(mask) for mask in range(16)], dtype=torch.uint8)


def pack_sparse24(dense: Tensor) -> tuple[Tensor, Tensor]:
    """Pack a matrix [N, K] with at most two non-zeros in each group of four columns.

    Args:
        dense: float32, bfloat16, float16, or int8 in [-127, 127]. -0.0 counts as zero.

    Returns:
        `values` in dense's dtype and `indices` uint8, laid out as the module describes.

    Raises:
        ValueError: another dtype or shape, -128 in int8, or a group with three or four non-zeros
            (the first one is named).
    """
    if dense.dtype not in DTYPES or dense.dim() != 2:
        raise ValueError(
            "pack_sparse24 takes a float32, bfloat16, float16 or int8 matrix [N, K]; got "
            f"{dense.dtype} {list(dense.shape)}"
        )
    if dense.dtype == torch.int8 and dense.numel() and dense.min() < -127:
        raise ValueError("pack_sparse24 takes int8 values in [-127, 127]; the weight holds -128")
    n, k = dense.shape
    padded = dense.new_zeros(n, COLUMNS * -(-k // COLUMNS))
    padded[:, :k] = torch.where(dense == 0, torch.zeros_like(dense), dense)  # -0.0 becomes 0.0
    groups = padded.view(n, padded.shape[1] // 4, 4)

    is_stored = groups != 0
    too_full = is_stored.sum(2) > 2
    if too_full.any():
        row, group = too_full.nonzero()[0].tolist()
        raise ValueError(
            "pack_sparse24 takes at most two non-zeros in four columns; row "
            f"{row} holds {int(is_stored[row, group].sum())} in columns {4 * group} to "
            f"{4 * group + 3}; prune the weight to 2:4 first"
        )
    mask = (is_stored << torch.arange(4, device=dense.device)).sum(2)
    nibbles = _NIBBLE_OF_MASK.to(dense.device)[mask]
    values = groups.gather(2, _positions(nibbles)).reshape(n, padded.shape[1] // 2)
    return values, nibbles[:, 0::2] | nibbles[:, 1::2] << 4


def unpack_sparse24(values: Tensor, indices: Tensor, k: int) -> Tensor:
    """The dense matrix [N, K], in the values' dtype, of a packed weight.

    Raises ValueError where the shapes or dtypes do not fit each other or `k`, and where a group's
    positions are not ascending (a damaged weight).
    """
    n, chunks = len(values), -(-k // COLUMNS)
    if values.shape != (n, 16 * chunks) or indices.shape != (n, 4 * chunks):
        raise ValueError(
            f"unpack_sparse24: K = {k} needs values [N, {16 * chunks}] and indices "
            f"[N, {4 * chunks}]; got {list(values.shape)} and {list(indices.shape)}"
        )
    if values.dtype not in DTYPES or indices.dtype != torch.uint8:
        raise ValueError(
            "unpack_sparse24 takes float32, bfloat16, float16 or int8 values and uint8 indices; "
            f"got {values.dtype} and {indices.dtype}"
        )
    positions = _positions(_nibbles(indices))
    damaged = positions[..., 0] >= positions[..., 1]
    if damaged.any():
        row, group = damaged.nonzero()[0].tolist()
        raise ValueError(
            f"unpack_sparse24: the positions of row {row}, group {group} are not ascending: the "
            "indices are damaged"
        )
    return expand_sparse24(values, indices, k)


def expand_sparse24(values: Tensor, indices: Tensor, k: int) -> Tensor:
    """`unpack_sparse24` without its checks, which a traced backward pass could not follow."""
    n, columns = values.shape[0], 2 * values.shape[1]
    dense = values.new_zeros(n, columns // 4, 4)
    dense = dense.scatter(2, _positions(_nibbles(indices)), values.view(n, columns // 4, 2))
    return dense.view(n, columns)[:, :k].contiguous()


def _nibbles(indices: Tensor) -> Tensor:
    """[N, bytes] to [N, groups], low nibble first."""
    return torch.stack((indices & 15, indices >> 4), dim=2).flatten(1)


def _positions(nibbles: Tensor) -> Tensor:
    """[N, groups] to int64 [N, groups, 2]."""
    return torch.stack((nibbles & 3, nibbles >> 2), dim=2).long()

"""The packed 2:4-sparse ternary weight: six bits for every four columns (a group).

A row is a string of bits, lowest first; group g is bits 6g to 6g + 5. Of these, bits 0 and 1 are
the column of the group's first value, 0 to 2, or 3 where there is none; bits 3 and 4 that of its
second value, 1 to 3, or 0 where there is none; bits 2 and 5 are set where that value is -1. A lone
value in column 3 is a second value, any other a first one. Groups past K hold no value.
"""

import torch
from torch import Tensor

_NO_FIRST, _NO_SECOND = 3, 0
_EMPTY = _NO_FIRST | _NO_SECOND << 3


def row_bytes(k: int) -> int:
    """The bytes of a packed row of `k` columns: whole 16, so that every row is aligned."""
    return 16 * -(-6 * -(-k // 4) // 128)


def _columns_of_mask(mask: int) -> tuple[int, int]:
    """The first and the second column of a group whose bit p of `mask` is set where p is not 0."""
    taken = [p for p in range(4) if mask >> p & 1]
    if len(taken) == 2:
        return taken[0], taken[1]
    if taken == [3]:
        return _NO_FIRST, 3
    return (taken[0] if taken else _NO_FIRST), _NO_SECOND


_COLUMNS_OF_MASK = torch.tensor([_columns_of_mask(mask) for mask in range(16)])


def _values_of_group(group: int) -> list[int]:
    """The four values that six bits stand for; where both lie in one column, +1 goes before -1."""
    values = [0] * 4
    for column, none, negative in (
        (group & 3, _NO_FIRST, group >> 2 & 1),
        (group >> 3 & 3, _NO_SECOND, group >> 5),
    ):
        if column != none and values[column] != 1:
            values[column] = -1 if negative else 1
    return values


_VALUES_OF_GROUP = torch.tensor([_values_of_group(group) for group in range(64)], dtype=torch.int8)


def pack_ternary24(codes: Tensor) -> Tensor:
    """Pack int8 values in {-1, 0, 1}, [N, K], to uint8 [N, 16 * ceil(6 * ceil(K / 4) / 128)].

    Raises ValueError for another dtype or shape, for other values, and for a group of four columns
    with three or four non-zeros (the first one is named).
    """
    if codes.dtype != torch.int8 or codes.dim() != 2:
        raise ValueError(
            f"pack_ternary24 takes an int8 matrix [N, K]; got {codes.dtype} {list(codes.shape)}"
        )
    if codes.numel() and (codes.min() < -1 or codes.max() > 1):
        raise ValueError(
            f"pack_ternary24 takes values in -1, 0, 1; the weight holds {int(codes.min())} to "
            f"{int(codes.max())}"
        )
    n, k = codes.shape
    bytes_per_row = row_bytes(k)
    triples = -(-bytes_per_row // 3)  # three bytes are four groups
    padded = codes.new_zeros(n, 16 * triples)
    padded[:, :k] = codes
    groups = padded.view(n, 4 * triples, 4)

    is_stored = groups != 0
    too_full = is_stored.sum(2) > 2
    if too_full.any():
        row, group = too_full.nonzero()[0].tolist()
        raise ValueError(
            "pack_ternary24 takes at most two non-zeros in four columns; row "
            f"{row} holds {int(is_stored[row, group].sum())} in columns {4 * group} to "
            f"{4 * group + 3}; prune the weight to 2:4 first"
        )
    mask = (is_stored << torch.arange(4, device=codes.device)).sum(2)
    columns = _COLUMNS_OF_MASK.to(codes.device)[mask]
    first, second = columns.unbind(2)
    negative = groups.gather(2, columns) < 0
    bits = (
        first
        | (negative[..., 0] & (first != _NO_FIRST)) << 2
        | second << 3
        | (negative[..., 1] & (second != _NO_SECOND)) << 5
    )
    words = bits.view(n, triples, 4) << torch.arange(0, 24, 6, device=codes.device)
    in_bytes = words.sum(2, keepdim=True) >> torch.tensor([0, 8, 16], device=codes.device)
    return in_bytes.to(torch.uint8).view(n, 3 * triples)[:, :bytes_per_row].contiguous()


def unpack_ternary24(packed_weight: Tensor, k: int) -> Tensor:
    """The int8 values [N, K] of a packed weight. Any bits stand for some."""
    n = packed_weight.shape[0]
    device = packed_weight.device
    triples = -(-k // 16)
    in_bytes = torch.nn.functional.pad(packed_weight, (0, 3))[:, : 3 * triples]
    words = in_bytes.reshape(n, triples, 3).int() << torch.tensor([0, 8, 16], device=device)
    bits = words.sum(2, keepdim=True) >> torch.arange(0, 24, 6, device=device) & 63
    return _VALUES_OF_GROUP.to(device)[bits].view(n, 16 * triples)[:, :k].contiguous()

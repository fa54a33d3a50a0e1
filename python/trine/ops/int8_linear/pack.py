"""The packed INT8 weight: rows of int8, zero-padded to whole 16-byte chunks."""

import torch
from torch import Tensor

CHUNK = 16  # bytes; vector loads, cp.async and TMA then work for any K


def pack_int8(weight: Tensor) -> Tensor:
    """Pack int8 values in [-127, 127], [N, K], to int8 [N, 16 * ceil(K / 16)], padding 0.

    Raises ValueError for another dtype or shape, and for -128 (it has no negative in int8, which
    the AVX2 kernel needs).
    """
    if weight.dtype != torch.int8 or weight.dim() != 2:
        raise ValueError(
            f"pack_int8 takes an int8 matrix [N, K]; got {weight.dtype} {list(weight.shape)}"
        )
    if weight.numel() and weight.min() < -127:
        raise ValueError("pack_int8 takes values in [-127, 127]; the weight holds -128")
    n, k = weight.shape
    packed = weight.new_zeros(n, CHUNK * -(-k // CHUNK))
    packed[:, :k] = weight
    return packed


def unpack_int8(packed_weight: Tensor, k: int) -> Tensor:
    """The int8 values [N, K] of a packed weight."""
    return packed_weight[:, :k].contiguous()

"""The packed ternary weight: two bits a value, 16 values to an int32, rows of whole 16 bytes."""

import torch
from torch import Tensor

CHUNK = 64  # values in 16 bytes, to which rows are padded


def pack_ternary(codes: Tensor) -> Tensor:
    """Pack int8 values in {-1, 0, 1}, [N, K], to int32 [N, 4 * ceil(K / 64)].

    A word holds 16 consecutive k; bits 2i..2i+1 of its byte j hold w + 1 of k = 4i + j. Padding
    has the code 1, which is w = 0.

    Raises ValueError for another dtype or shape, and for other values.
    """
    if codes.dtype != torch.int8 or codes.dim() != 2:
        raise ValueError(
            f"pack_ternary takes an int8 matrix [N, K]; got {codes.dtype} {list(codes.shape)}"
        )
    if codes.numel() and (codes.min() < -1 or codes.max() > 1):
        raise ValueError(
            f"pack_ternary takes values in -1, 0, 1; the weight holds {int(codes.min())} to "
            f"{int(codes.max())}"
        )
    n, k = codes.shape
    words = CHUNK // 16 * -(-k // CHUNK)
    padded = torch.ones(n, 16 * words, dtype=torch.uint8, device=codes.device)
    padded[:, :k] = codes + 1
    by_quarter = padded.view(n, words, 4, 4)  # word, i, j
    packed_bytes = (
        by_quarter[:, :, 0]
        | by_quarter[:, :, 1] << 2
        | by_quarter[:, :, 2] << 4
        | by_quarter[:, :, 3] << 6
    )
    return packed_bytes.reshape(-1).view(torch.int32).reshape(n, words)


def unpack_ternary(packed_weight: Tensor, k: int) -> Tensor:
    """The int8 values [N, K] of a packed weight."""
    n, words = packed_weight.shape
    packed_bytes = packed_weight.reshape(-1).view(torch.uint8).view(n, words, 1, 4)
    shifts = torch.tensor([0, 2, 4, 6], dtype=torch.uint8, device=packed_weight.device)
    codes = packed_bytes >> shifts[:, None] & 3
    return codes.reshape(n, 16 * words)[:, :k].to(torch.int8) - 1

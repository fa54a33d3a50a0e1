"""The packed weight of a convolution: sixteen output channels side by side, see int8_conv2d.h."""

import torch
from torch import Tensor
from torch.nn.functional import pad

BLOCK, QUAD = 16, 4


def is_depthwise(channels: int, out_channels: int, groups: int) -> bool:
    """Whether every channel is convolved by itself, one output channel each."""
    return groups > 1 and groups == channels == out_channels


def packed_shape(weight_shape: tuple[int, int, int, int], groups: int) -> tuple[int, ...]:
    """The shape of the packed form of a weight [N, C / groups, kh, kw]."""
    n, of_group, kh, kw = weight_shape
    if is_depthwise(of_group * groups, n, groups):
        return (-(-n // BLOCK), kh, kw, BLOCK)
    return (groups, -(-n // groups // BLOCK), kh, kw, -(-of_group // QUAD), BLOCK, QUAD)


def pack_conv2d(weight: Tensor, groups: int = 1) -> Tensor:
    """Pack int8 values in [-127, 127], [N, C / groups, kh, kw].

    Returns int8 [groups, ceil(N / groups / 16), kh, kw, ceil(C / groups / 4), 16, 4], padding 0;
    where every channel is convolved by itself (groups = C = N > 1), [ceil(C / 16), kh, kw, 16].

    Raises ValueError for another dtype or shape, groups that do not divide N, and -128.
    """
    if weight.dtype != torch.int8 or weight.dim() != 4:
        raise ValueError(
            "pack_conv2d takes int8 values [N, C / groups, kh, kw]; got "
            f"{weight.dtype} {list(weight.shape)}"
        )
    if groups < 1 or weight.shape[0] % groups:
        raise ValueError(f"pack_conv2d: groups = {groups} must divide N = {weight.shape[0]}")
    if weight.numel() and weight.min() < -127:
        raise ValueError("pack_conv2d takes values in [-127, 127]; the weight holds -128")
    n, of_group = weight.shape[:2]
    if is_depthwise(of_group * groups, n, groups):
        filled = pad(weight[:, 0], (0, 0, 0, 0, 0, -n % BLOCK))
        return filled.unflatten(0, (-1, BLOCK)).permute(0, 2, 3, 1).contiguous()
    by_group = weight.unflatten(0, (groups, n // groups))
    of_out = -(n // groups) % BLOCK
    filled = pad(by_group, (0, 0, 0, 0, 0, -of_group % QUAD, 0, of_out))
    blocks = filled.unflatten(2, (-1, QUAD)).unflatten(1, (-1, BLOCK))  # [g, b, 16, q, 4, kh, kw]
    return blocks.permute(0, 1, 5, 6, 3, 2, 4).contiguous()


def unpack_conv2d(packed_weight: Tensor, weight_shape: tuple[int, int, int, int]) -> Tensor:
    """The int8 values [N, C / groups, kh, kw] of a packed weight, given that shape."""
    n, of_group = weight_shape[:2]
    if packed_weight.dim() == 4:
        return packed_weight.permute(0, 3, 1, 2).flatten(0, 1)[:n, None].contiguous()
    groups = packed_weight.shape[0]
    blocks = packed_weight.permute(0, 1, 5, 4, 6, 2, 3)
    by_group = blocks.flatten(3, 4).flatten(1, 2)
    return by_group[:, : n // groups, :of_group].flatten(0, 1).contiguous()

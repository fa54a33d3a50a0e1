"""A layer as a matrix product: its input as rows, its weight as a matrix, their columns the same.

`layer(x)` is `layer_rows(layer, x) @ weight_matrix(layer).mT + bias`: for nn.Linear, for the Conv1D
of transformers, and for nn.Conv2d, where a row is one window of the image, its columns ordered as
(channel, height, width). A convolution of G > 1 groups is G products: rows [G, M, K], weight
[G, N / G, K].
"""

from __future__ import annotations

from collections.abc import Iterator

from torch import Tensor, nn
from torch.nn import functional

from trine.nn.packed import PackedLinear, is_conv1d


def is_calibrated(layer: nn.Module) -> bool:
    """Whether the layer is one of those above (or a packed linear layer)."""
    return isinstance(layer, nn.Linear | nn.Conv2d | PackedLinear) or is_conv1d(layer)


def layer_rows(layer: nn.Module, x: Tensor) -> Tensor:
    """The input x of `layer` as rows: [M, K]; for a convolution of several groups [G, M, K]."""
    if not isinstance(layer, nn.Conv2d):
        return x.reshape(x.shape[:-1].numel(), x.shape[-1])
    images = x if x.dim() == 4 else x[None]
    mode = "constant" if layer.padding_mode == "zeros" else layer.padding_mode
    padded = functional.pad(images, layer._reversed_padding_repeated_twice, mode)
    windows = functional.unfold(
        padded, layer.kernel_size, dilation=layer.dilation, stride=layer.stride
    )
    by_group = windows.unflatten(1, (layer.groups, -1))  # [B, G, K, windows of an image]
    rows = by_group.permute(1, 0, 3, 2).flatten(1, 2)
    return rows if layer.groups > 1 else rows[0]


def weight_matrix(layer: nn.Module) -> Tensor:
    """The weight as [N, K], for a convolution of several groups [G, N / G, K], without history.

    It may share the layer's memory: copy it before writing.
    """
    weight = layer.weight.detach()
    if is_conv1d(layer):
        return weight.T
    if not isinstance(layer, nn.Conv2d):
        return weight
    if layer.groups == 1:
        return weight.flatten(1)
    return weight.unflatten(0, (layer.groups, -1)).flatten(2)


def from_matrix(layer: nn.Module, matrix: Tensor) -> Tensor:
    """A matrix of the shape that `weight_matrix(layer)` has, in the shape of the layer's weight."""
    return matrix.T if is_conv1d(layer) else matrix.reshape(layer.weight.shape)


def row_chunks(layer: nn.Module, x: Tensor, most: int = 1 << 23) -> Iterator[Tensor]:
    """`layer_rows(layer, x)` in parts of about `most` elements, since windows overlap."""
    if not isinstance(layer, nn.Conv2d):
        rows = layer_rows(layer, x)
        yield from rows.split(max(1, most // max(1, rows.shape[1])))
        return
    images = x if x.dim() == 4 else x[None]
    window = layer.kernel_size[0] * layer.kernel_size[1]
    enlarged = window * images.shape[1:].numel() / (layer.stride[0] * layer.stride[1])
    for part in images.split(max(1, int(most // max(1, enlarged)))):
        yield layer_rows(layer, part)


def without_padding(layer: nn.Module, x: Tensor, mask: Tensor | None) -> Tensor:
    """The rows of x [B, T, K] that an attention mask [B, T] does not mark as padding."""
    if isinstance(layer, nn.Conv2d) or not isinstance(mask, Tensor):
        return x
    if mask.dim() != 2 or x.dim() != 3 or mask.shape != x.shape[:2]:
        return x
    return x[mask.to(x.device) != 0]

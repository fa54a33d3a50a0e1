"""What the layers of codes share: they can be made of codes that somebody else chose."""

from collections.abc import Callable
from typing import ClassVar

import torch
from torch import Tensor

from trine.nn.packed import PackedLinear
from trine.quantize.groups import CHUNK


class CodesLinear(PackedLinear):
    """A packed layer of codes and their scales; its constructor has `granularity`."""

    packed_weight: Tensor
    weight_scale: Tensor

    _pack: ClassVar[Callable[[Tensor], Tensor]]  # of codes [N, K]
    _granularity_of: ClassVar[Callable[[Tensor, int, int], str | int]]  # of scales, N and K

    @classmethod
    def from_codes(
        cls,
        codes: Tensor,
        weight_scale: Tensor,
        bias: Tensor | None = None,
        *,
        dtype: torch.dtype | str | None = None,
    ) -> "CodesLinear":
        """Pack a weight that is codes already.

        Args:
            codes: int8 [N, K]; values -1, 0, 1, for `Ternary24Linear` at most two non-zeros in
                every four columns; for `Int8WeightLinear` -127 to 127.
            weight_scale: [1] (of ternary codes), [N] or, but for `Ternary24Linear`, [N, groups];
                the granularity follows from it.
            bias: [N] or None.
            dtype: the layer's float dtype; that of the bias, or torch's default, where it is None.

        Raises ValueError for shapes or values that do not fit.
        """
        packed = cls._pack(codes)
        n, k = codes.shape
        if dtype is None and bias is not None:
            dtype = bias.dtype
        granularity = cls._granularity_of(weight_scale, n, k)
        has_bias = bias is not None
        layer = cls(k, n, has_bias, granularity=granularity, device="meta", dtype=dtype)
        if has_bias and bias.shape != (n,):
            raise ValueError(f"from_codes: bias has shape {list(bias.shape)}, expected [{n}]")
        layer.packed_weight = packed
        layer.weight_scale = weight_scale.detach().to(codes.device, torch.float32, copy=True)
        if has_bias:
            layer.bias = bias.detach().to(codes.device, layer._dtype, copy=True)
        return layer


def granularity_of(
    layer: str, weight_scale: Tensor, n: int, k: int, *, per_tensor: bool = True
) -> str | int:
    """How much of a weight [N, K] shares one of these scales: "tensor", "row" or a group size.

    Raises ValueError for another shape, in the name of `layer`, which may have no "tensor".
    """
    shape = tuple(weight_scale.shape)
    if per_tensor and shape == (1,):
        return "tensor"
    if shape == (n,):
        return "row"
    if len(shape) == 2 and shape[0] == n and shape[1] > 0 and k % shape[1] == 0:
        return k // shape[1]
    one = "[1], " if per_tensor else ""
    raise ValueError(
        f"{layer}: weight_scale has shape {list(shape)}, expected {one}[{n}] or "
        f"[{n}, groups] with groups that divide in_features = {k}"
    )


def shape_of_scale(
    layer: str, granularity: str | int, n: int, k: int, *, per_tensor: bool = True
) -> tuple[int, ...]:
    """The shape of the scales of a weight [N, K]; ValueError for another granularity."""
    if per_tensor and granularity == "tensor":
        return (1,)
    if granularity == "row":
        return (n,)
    is_group = isinstance(granularity, int) and granularity > 0 and granularity % CHUNK == 0
    if is_group and k > 0 and k % granularity == 0:
        return (n, k // granularity)
    tensor = "'tensor', " if per_tensor else ""
    raise ValueError(
        f"{layer}: granularity is {granularity!r}; it must be {tensor}'row' or a multiple of "
        f"{CHUNK} that divides in_features = {k}"
    )

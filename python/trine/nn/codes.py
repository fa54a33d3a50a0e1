"""What the layers of ternary codes share: they can be made of codes that somebody else chose."""

from collections.abc import Callable
from typing import ClassVar

import torch
from torch import Tensor

from trine.nn.packed import PackedLinear


class CodesLinear(PackedLinear):
    """A packed layer of codes in {-1, 0, 1} and their scales; its constructor has `granularity`."""

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
        """Pack a weight that is ternary already.

        Args:
            codes: int8 [N, K], values -1, 0, 1; for `Ternary24Linear` at most two non-zeros in
                every four columns.
            weight_scale: [1], [N] or, for `TernaryLinear`, [N, groups]; the granularity follows
                from it.
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

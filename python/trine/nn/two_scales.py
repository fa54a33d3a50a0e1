"""Linear layer with ternary weights whose positive and negative values have scales of their own."""

import torch
from torch import Tensor

from trine.nn.packed import PackedLinear
from trine.ops import QuantizedRows, pack_ternary, ternary_linear, unpack_ternary
from trine.ops._linear import in_autocast_dtype, linear_with_gradient, needs_grad
from trine.ops.ternary_linear.pack import CHUNK


class TwoScaleTernaryLinear(PackedLinear):
    """y = x @ (codes * a + |codes| * b).T + bias: weights a + b, b - a and 0, as TTQ trains them.

    Two products on `trine.ops.ternary_linear` of the same quantised rows, so twice the time and
    twice the memory of `TernaryLinear` (4 bits a weight).

    Buffers: packed_weight and packed_magnitude int32 [N, 4 * ceil(K / 64)], of the codes and of
    their magnitudes; weight_scale float32 [2], a and b; bias [N] or None.

    Args:
        in_features: K.
        out_features: N.
        bias: whether the layer has one.
        device, dtype: as for torch.nn.Linear; float32, bfloat16 or float16.
    """

    kind = "ternary-two-scales"

    packed_weight: Tensor
    packed_magnitude: Tensor
    weight_scale: Tensor

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool = True,
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype | str | None = None,
    ) -> None:
        super().__init__(in_features, out_features, dtype)
        words = CHUNK // 16 * -(-in_features // CHUNK)
        self._add_buffer("packed_weight", (out_features, words), torch.int32, device)
        self._add_buffer("packed_magnitude", (out_features, words), torch.int32, device)
        self._add_buffer("weight_scale", (2,), torch.float32, device)
        self._add_buffer("bias", (out_features,) if bias else None, self._dtype, device)

    @classmethod
    def from_codes(
        cls,
        codes: Tensor,
        weight_scale: Tensor,
        bias: Tensor | None = None,
        *,
        dtype: torch.dtype | str | None = None,
    ) -> "TwoScaleTernaryLinear":
        """Pack codes int8 [N, K] in {-1, 0, 1} with the scales a and b, [2].

        Raises ValueError for shapes or values that do not fit.
        """
        packed, (n, k) = pack_ternary(codes), codes.shape
        if weight_scale.shape != (2,) or (bias is not None and bias.shape != (n,)):
            raise ValueError(
                f"TwoScaleTernaryLinear needs weight_scale [2] and bias [{n}]; got "
                f"{list(weight_scale.shape)} and {None if bias is None else list(bias.shape)}"
            )
        if dtype is None and bias is not None:
            dtype = bias.dtype
        layer = cls(k, n, bias is not None, device="meta", dtype=dtype)
        layer.packed_weight = packed
        layer.packed_magnitude = pack_ternary(codes.abs())
        layer.weight_scale = weight_scale.detach().to(codes.device, torch.float32, copy=True)
        if bias is not None:
            layer.bias = bias.detach().to(codes.device, layer._dtype, copy=True)
        return layer

    def _run_op(self, x: Tensor, bias: Tensor | None) -> Tensor:
        x = in_autocast_dtype(x)
        buffers = self._buffers
        weight = (buffers["packed_weight"], buffers["packed_magnitude"], buffers["weight_scale"])
        if needs_grad(x, bias, *weight):
            return linear_with_gradient(_two_products, _dense_weight, x, bias, *weight)
        return _two_products(x, bias, *weight)

    def _dense_weight(self) -> Tensor:
        return _dense_weight(
            self.in_features, self.packed_weight, self.packed_magnitude, self.weight_scale
        )


def _two_products(
    x: Tensor, bias: Tensor | None, packed: Tensor, magnitude: Tensor, weight_scale: Tensor
) -> Tensor:
    """Both products, and their sum, in float32; rounded once to x's dtype."""
    quantised = QuantizedRows.of(x)
    rows = QuantizedRows(
        quantised.q, quantised.scale, quantised.sum, quantised.shape, torch.float32
    )
    with torch.autocast(x.device.type, enabled=False):
        of_codes = ternary_linear(rows, packed, weight_scale[:1])
        of_magnitudes = ternary_linear(rows, magnitude, weight_scale[1:], bias)
    return (of_codes + of_magnitudes).to(x.dtype)


def _dense_weight(k: int, packed: Tensor, magnitude: Tensor, weight_scale: Tensor) -> Tensor:
    of_codes, of_magnitudes = (unpack_ternary(p, k).float() for p in (packed, magnitude))
    return of_codes * weight_scale[0] + of_magnitudes * weight_scale[1]

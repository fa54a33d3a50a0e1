"""Linear layer that keeps two of every four weights of a row (2:4 sparsity)."""

from typing import Any

import torch
from torch import Tensor, nn

from trine.nn.packed import PackedLinear, dense_parts
from trine.ops import pack_sparse24, sparse24_linear
from trine.ops.sparse24_linear.pack import COLUMNS, expand_sparse24
from trine.quantize.weights import sparse24, sparse24_int8


class Sparse24Linear(PackedLinear):
    """y = x @ weight.T + bias with a 2:4-sparse weight, on `trine.ops.sparse24_linear`.

    Buffers: values [N, 16 * ceil(K / 32)] in the layer's float dtype or int8, indices uint8
    [N, 4 * ceil(K / 32)], weight_scale float32 [N] with int8 values (else None), bias [N] or None.

    Args:
        in_features: K.
        out_features: N.
        bias: whether the layer has one.
        values: "float" (activations stay float) or "int8" (activations are quantised per row).
        device, dtype: as for torch.nn.Linear; float32, bfloat16 or float16.

    Raises ValueError for other values or another dtype.
    """

    kind = "sparse24"

    values: Tensor
    indices: Tensor
    weight_scale: Tensor | None

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool = True,
        *,
        values: str = "float",
        device: torch.device | str | None = None,
        dtype: torch.dtype | str | None = None,
    ) -> None:
        super().__init__(in_features, out_features, dtype)
        if values not in ("float", "int8"):
            raise ValueError(f"Sparse24Linear: values is {values!r}; it must be 'float' or 'int8'")
        is_float = values == "float"
        if is_float:
            self.float_buffers = ("values", "bias")
        chunks = -(-in_features // COLUMNS)
        values_dtype = self._dtype if is_float else torch.int8
        scale_shape = None if is_float else (out_features,)
        self._add_buffer("values", (out_features, 16 * chunks), values_dtype, device)
        self._add_buffer("indices", (out_features, 4 * chunks), torch.uint8, device)
        self._add_buffer("weight_scale", scale_shape, torch.float32, device)
        self._add_buffer("bias", (out_features,) if bias else None, self._dtype, device)

    @classmethod
    def from_linear(cls, linear: nn.Module, *, values: str = "float") -> "Sparse24Linear":
        """Pack a dense layer; of every four weights the two of largest magnitude stay.

        Args:
            linear: torch.nn.Linear or transformers' Conv1D, float32, bfloat16 or float16. A layer
                that was not trained for it loses accuracy.
            values: "float" keeps them in the layer's dtype, "int8" quantises each row of them by
                its largest magnitude.

        Raises ValueError for another class or dtype, and for NaN or infinite weights.
        """
        weight, bias = dense_parts(linear)
        n, k = weight.shape
        layer = cls(k, n, bias is not None, values=values, device="meta", dtype=weight.dtype)
        kept, scale = sparse24_int8(weight) if values == "int8" else sparse24(weight)
        layer.values, layer.indices = pack_sparse24(kept)
        layer.weight_scale = scale
        layer.bias = bias
        return layer

    def _run_op(self, x: Tensor, bias: Tensor | None) -> Tensor:
        buffers = self._buffers
        values, indices, scale = buffers["values"], buffers["indices"], buffers["weight_scale"]
        return sparse24_linear(x, values, indices, bias, weight_scale=scale)

    def _dense_weight(self) -> Tensor:
        dense = expand_sparse24(self.values, self.indices, self.in_features)
        return dense if self.weight_scale is None else dense * self.weight_scale[:, None]

    def _options(self) -> dict[str, Any]:
        return {"values": "int8" if self.values.dtype == torch.int8 else "float"}

"""What `layer.weight` of a packed layer is: a tensor that is unpacked when its values are used."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch.utils._pytree import tree_map_only

if TYPE_CHECKING:
    from trine.nn.packed import PackedLayer

# Reading these needs no values. Some models read them in every call: T5 casts to `wo.weight.dtype`.
_METADATA = {
    Tensor.dtype.__get__,
    Tensor.device.__get__,
    Tensor.shape.__get__,
    Tensor.ndim.__get__,
    Tensor.is_cuda.__get__,
    Tensor.is_meta.__get__,
    Tensor.requires_grad.__get__,
    Tensor.size,
    Tensor.dim,
    Tensor.numel,
    Tensor.element_size,
    Tensor.is_floating_point,
}


class DenseWeight(Tensor):
    """The dense weight of a packed layer. Every operation on it gives a plain tensor."""

    _layer: PackedLayer

    @staticmethod
    def __new__(cls, layer: PackedLayer) -> DenseWeight:
        weight = torch.Tensor._make_wrapper_subclass(
            cls, layer.weight_shape(), dtype=layer.dtype, device=layer.device
        )
        weight._layer = layer
        return weight

    @classmethod
    def __torch_function__(cls, func, types, args=(), kwargs=None):
        if func in _METADATA:
            return super().__torch_function__(func, types, args, kwargs)
        return _on_plain_tensors(func, args, kwargs)

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        return _on_plain_tensors(func, args, kwargs)  # where C++ calls the operator


def _on_plain_tensors(func, args, kwargs):
    args, kwargs = tree_map_only(
        DenseWeight, lambda weight: weight._layer.dense_weight(), (args, kwargs or {})
    )
    return func(*args, **kwargs)

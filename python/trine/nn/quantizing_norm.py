"""Norms that quantise their result once, for all the packed layers that read it."""

from typing import TypeVar

import torch
from torch import Tensor, nn

from trine.ops import QuantizedRows

Norm = TypeVar("Norm", bound=nn.Module)


class _QuantizingNorm(nn.Module):
    """Before a norm of torch in the order of bases: its constructor, its state, its gradient."""

    weight: nn.Parameter | None
    eps: float | None

    def __init__(self, normalized_shape: int | tuple[int, ...], *args, **kwargs) -> None:
        super().__init__(normalized_shape, *args, **kwargs)
        if len(self.normalized_shape) != 1:
            raise ValueError(
                f"{type(self).__name__} takes rows of the last dimension; normalized_shape is "
                f"{tuple(self.normalized_shape)}"
            )

    def forward(self, x: Tensor) -> Tensor | QuantizedRows:
        if torch.is_grad_enabled() and (x.requires_grad or self._is_trained()):
            return super().forward(x)
        return self._quantized(x)

    def _is_trained(self) -> bool:
        return any(p is not None and p.requires_grad for p in self._parameters.values())

    def _quantized(self, x: Tensor) -> QuantizedRows:
        raise NotImplementedError


class QuantizingRMSNorm(_QuantizingNorm, nn.RMSNorm):
    """Takes the place of an RMSNorm that only `Int8Linear` and `TernaryLinear` read.

    In a Llama block, say, where query, key and value (or gate and up) follow a norm:

        block.input_layernorm = QuantizingRMSNorm.from_norm(block.input_layernorm)

    `trine.fuse_norms` finds such norms and does that where it pays. What it returns is a
    `QuantizedRows`, which such layers take in place of the tensor. Where a gradient is wanted it
    returns the tensor of torch.nn.RMSNorm, and the layers quantise it themselves. The state is the
    norm's.

    The norm is that of torch.nn.RMSNorm, whose result is rounded once. (transformers' norms round
    before they multiply by the weight, too: in bfloat16 and float16 theirs differ by a rounding.)

    Args: those of torch.nn.RMSNorm. Raises ValueError where normalized_shape is not one number.
    """

    @classmethod
    def from_norm(cls, norm: nn.Module) -> "QuantizingRMSNorm":
        """With the weight of `norm`, shared: torch.nn.RMSNorm, or one like transformers'.

        Its eps is the attribute `eps` or `variance_epsilon`. Raises ValueError where the
        constructor does.
        """
        eps = norm.eps if hasattr(norm, "eps") else norm.variance_epsilon
        weight = norm.weight
        shape = norm.normalized_shape if weight is None else tuple(weight.shape)
        return _with_state_of(cls(shape, eps, weight is not None, device="meta"), norm)

    def _quantized(self, x: Tensor) -> QuantizedRows:
        return QuantizedRows.of_rms_norm(x, self.weight, self.eps)


class QuantizingLayerNorm(_QuantizingNorm, nn.LayerNorm):
    """The same for LayerNorm, as it stands before the linear layers of a pre-norm block:

        block.layernorm_before = QuantizingLayerNorm.from_norm(block.layernorm_before)

    Args: those of torch.nn.LayerNorm. Raises ValueError where normalized_shape is not one number.
    """

    @classmethod
    def from_norm(cls, norm: nn.LayerNorm) -> "QuantizingLayerNorm":
        """With the weight and bias of `norm`, shared. Raises ValueError as the constructor does."""
        affine, bias = norm.weight is not None, norm.bias is not None
        return _with_state_of(cls(norm.normalized_shape, norm.eps, affine, bias, "meta"), norm)

    def _quantized(self, x: Tensor) -> QuantizedRows:
        return QuantizedRows.of_layer_norm(x, self.weight, self.bias, self.eps)


def _with_state_of(ours: Norm, norm: nn.Module) -> Norm:
    ours._parameters.update(norm._parameters)
    return ours.train(norm.training)

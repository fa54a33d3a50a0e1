"""What layers that train under quantisation share: the packed layer behind them in evaluation."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor, nn

from trine.quantize.batch_norm import FoldedNorm
from trine.quantize.input_range import InputRange


class QatLayer(nn.Module):
    """A dense layer that is used as if it were packed; in evaluation mode the packed layer is run.

    To be mixed into a layer of torch.nn, in front of it.
    """

    choice: str
    input_range: InputRange | None  # where activations have one scale: by the range seen
    norm: FoldedNorm | None  # the batch norm that the layer has taken up
    _packed: tuple[list[Tensor], nn.Module] | None = None

    @property
    def has_one_input_scale(self) -> bool:
        """Whether activations have one scale, which samples have to set before training."""
        return self._input_grid()[0] is not None

    def pack(self) -> nn.Module:
        """The packed layer that this one stands for; raises ValueError for NaN weights."""
        scale, zero_point = self._input_grid()
        plain = self._without_norm()
        if scale is None:
            return plain._pack().train(self.training)
        if not scale.detach().gt(0).all():
            raise ValueError(
                f"the scale of the activations is {scale.item()}; it must be positive: set it with "
                "prepare_qat(model, recipe, sample_inputs), or lower its learning rate"
            )
        packed = plain._pack(input_scale=scale, input_zero_point=zero_point)
        return packed.train(self.training)

    def float_layer(self) -> nn.Module:
        """The layer of torch.nn with the same shapes, on the meta device, as it would be folded."""
        raise NotImplementedError

    def _pack(self, **static_input: Tensor | None) -> nn.Module:
        raise NotImplementedError

    @torch.no_grad()
    def _without_norm(self) -> QatLayer:
        """The same layer with the weight and the bias that it is used with."""
        if self.norm is None:
            return self
        plain = copy.copy(self)  # whose parameters and modules are still this one's
        weight, bias = (nn.Parameter(t, False) for t in self.used(self.weight))
        plain._parameters = {**self._parameters, "weight": weight, "bias": bias}
        plain._modules = {**self._modules, "norm": None}
        return plain

    def used(self, weight: Tensor) -> tuple[Tensor, Tensor | None]:
        """What is quantised of `weight`, and the bias: with the batch norm folded into both."""
        if self.norm is None:
            return weight, self.bias
        return self.norm.fold_weight(weight), self.used_bias

    @property
    def used_bias(self) -> Tensor | None:
        return self.bias if self.norm is None else self.norm.fold_bias(self.bias, self.weight.dtype)

    @property
    def follows_batches(self) -> bool:
        """Whether the next forward pass normalises by the statistics of its own batch."""
        return self.training and self.norm is not None and not self.norm.frozen

    def _learned(self) -> list[Tensor]:
        """What is learned beside weight and bias."""
        return []

    def _input_grid(self) -> tuple[Tensor | None, Tensor | None]:
        """The scale of the activations and their zero point, where there is one for all."""
        return (None, None) if self.input_range is None else self.input_range.grid()

    def take_up(self, norm: FoldedNorm) -> None:
        """Do the work of the batch norm that follows the layer, too."""
        self.norm = norm.train(self.training)

    @torch.no_grad()
    def begin_input(self, low: Tensor, high: Tensor, mean_magnitude: Tensor) -> None:
        """Set where activations begin: the range [low, high], or a step that fits their E|x|."""
        if self.input_range is not None:
            self.input_range.begin(low, high)

    @torch.compiler.disable  # compiled code could not see that the weight has changed
    def _packed_layer(self) -> nn.Module:
        """The packed layer of the current state, made anew where the state has changed.

        The values themselves are compared, not version counters: averaging and loading often write
        through `weight.data`, which no counter shows. Reading them costs less than using them.
        """
        state = [self.weight, *self._learned(), *self._input_grid()]
        if self.norm is not None:
            state += [self.norm.weight, self.norm.running_var]
        state = [tensor.detach() for tensor in state if tensor is not None]
        if self._packed is not None:
            packed_from, packed = self._packed
            if all(map(_same, packed_from, state)):
                return packed
        self._packed = ([t.clone() for t in state], self.pack())
        return self._packed[1]

    def train(self, mode: bool = True) -> QatLayer:
        if mode:
            self._packed = None  # its memory is for the training now
        return super().train(mode)

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_packed": None}  # copies pack for themselves


def _same(a: Tensor, b: Tensor) -> bool:
    return a.dtype == b.dtype and a.device == b.device and torch.equal(a, b)

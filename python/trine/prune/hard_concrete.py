"""Masks that are learned with the weights: L0 regularisation through hard concrete gates."""

import math
from collections.abc import Iterable, Iterator

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from trine.prune.granularity import NM, Granularity, Weight
from trine.prune.layers import check_finite, prunable_layers
from trine.prune.report import PruningReport, pruning_report

__all__ = ["HardConcrete"]

# The paper's: temperature, and the interval to which gates are stretched before they are clipped.
BETA, GAMMA, ZETA = 2 / 3, -0.1, 1.1


class HardConcrete:
    """Trains weights W and gates z on loss(W * z) + lambda * E[number of weights that are not 0]
    (Louizos et al. 2018, arXiv:1712.01312).

        gates = HardConcrete(model, Neuron(), skip="last")
        optimizer = torch.optim.Adam(model.parameters())  # the gates' parameters are among them
        for batch in loader:
            (loss(model, batch) + 1e-4 * gates.penalty()).backward()
            optimizer.step()
            optimizer.zero_grad()
        model = gates.finish()

    A gate has one parameter, log alpha, and is drawn anew for each forward pass of the model in
    training: s = sigmoid((log u - log(1 - u) + log alpha) / beta) with u uniform,
    z = clamp(s * (zeta - gamma) + gamma, 0, 1). In evaluation mode it is
    clamp(sigmoid(log alpha) * (zeta - gamma) + gamma, 0, 1).

    Make it before the optimiser, DDP and torch.compile. Until `finish` the layers' weights are
    computed (torch.nn.utils.parametrize), and the model's state_dict has their originals and log
    alpha: to go on, make the gates as at first and load the model's state.

    Args:
        model: changed in place.
        granularity: what has a gate: weights, or groups of outputs with their biases.
        layers, skip: patterns of layer names, as for `prunable_layers`.
        dropped: the probability with which s is below 1/2 at first, in (0, 1).

    Raises ValueError, before anything is changed, for layers that cannot be pruned, N:M (gates know
    no pattern) and other values of `dropped`.
    """

    def __init__(
        self,
        model: nn.Module,
        granularity: Granularity | None = None,
        *,
        layers: str | Iterable[str] = "*",
        skip: str | Iterable[str] = (),
        dropped: float = 0.1,
    ) -> None:
        self.model, self.granularity = model, granularity or Weight()
        if isinstance(self.granularity, NM):
            raise ValueError("HardConcrete: gates know no pattern such as N:M; prune to it")
        if not 0 < dropped < 1:
            raise ValueError(f"HardConcrete: dropped is a probability in (0, 1), it is {dropped}")
        self.layers = prunable_layers(model, layers, skip)
        for name, layer in self.layers.items():
            check_finite(name, layer)
        ones = {
            name: layer.weight.detach().new_ones(()).expand_as(layer.weight)
            for name, layer in self.layers.items()
        }
        # How many weights hang on each gate.
        self.sizes = self.granularity.pool(self.layers, ones)
        start = math.log(1 - dropped) - math.log(dropped)
        self.log_alpha = {
            key: nn.Parameter(torch.full(size.shape, start, device=size.device))
            for key, size in self.sizes.items()
        }
        self._noise: dict[str, Tensor] = {}  # of the forward pass; layers that share gates share it
        self._kept: dict[str, Tensor] | None = None
        numbers = {
            key: torch.arange(size.numel(), device=size.device).reshape(size.shape)
            for key, size in self.sizes.items()
        }
        indices = self.granularity.masks(self.layers, numbers)
        for (name, which), index in indices.items():
            gated = _Gated(self, self.granularity.key(name), index)
            parametrize.register_parametrization(self.layers[name], which, gated)
        self._gated = list(indices)
        self._hook = model.register_forward_pre_hook(lambda *_: self._noise.clear())

    def parameters(self) -> Iterator[nn.Parameter]:
        """log alpha of all gates, e.g. for a learning rate of their own."""
        yield from self.log_alpha.values()

    def penalty(self) -> Tensor:
        """The expected number of weights that are not 0: the sum over gates of
        sigmoid(log alpha - beta * log(-gamma / zeta)) times the weights that hang on it."""
        return sum(
            (self.sizes[key] * (log_alpha - BETA * math.log(-GAMMA / ZETA)).sigmoid()).sum()
            for key, log_alpha in self.log_alpha.items()
        )

    def gate(self, key: str, training: bool) -> Tensor:
        """z of one key (a layer's name, or what its layers share): of this forward pass, or of
        evaluation mode."""
        log_alpha = self.log_alpha[key]
        if not training:
            return (log_alpha.sigmoid() * (ZETA - GAMMA) + GAMMA).clamp(0, 1)
        if key not in self._noise:
            u = torch.rand_like(log_alpha, requires_grad=False).clamp(1e-6, 1 - 1e-6)
            self._noise[key] = u.log() - (1 - u).log()
        s = ((self._noise[key] + log_alpha) / BETA).sigmoid()
        return (s * (ZETA - GAMMA) + GAMMA).clamp(0, 1)

    @torch.no_grad()
    def finish(self) -> nn.Module:
        """The plain model, its weights multiplied by the gates of evaluation mode."""
        if self._kept is not None:
            return self.model
        self._hook.remove()
        self._kept = {key: self.gate(key, training=False) != 0 for key in self.log_alpha}
        for name, which in self._gated:
            layer = self.layers[name]
            parameter = layer.parametrizations[which]
            gated = parameter[0].eval()(parameter.original)
            value = torch.where(gated == 0, 0, gated)  # without -0.0
            parametrize.remove_parametrizations(layer, which, leave_parametrized=False)
            getattr(layer, which).copy_(value)
        return self.model

    def removed(self) -> dict[str, list[int]]:
        """After `finish`: the outputs of each layer that are off, for `trine.prune.remove`."""
        return self.granularity.off(self.layers, self._finished())

    def dropped(self) -> list[str]:
        """After `finish`: the blocks that are off as a whole, for `trine.prune.drop_layers`."""
        return self.granularity.dropped(self._finished())

    def report(self) -> PruningReport:
        """After `finish`: what is 0, and what that saves."""
        return pruning_report(self.layers, self.removed())

    def _finished(self) -> dict[str, Tensor]:
        if self._kept is None:
            raise ValueError("HardConcrete: call finish() first; until then gates are random")
        return self._kept


class _Gated(nn.Module):
    """The parametrization of a weight or bias: times its gates."""

    def __init__(self, owner: HardConcrete, key: str, index: Tensor) -> None:
        super().__init__()
        self.log_alpha = owner.log_alpha[key]  # here it is one of the model's parameters
        self.register_buffer("index", index, persistent=False)
        self._owner, self._key = owner, key

    def forward(self, original: Tensor) -> Tensor:
        z = self._owner.gate(self._key, self.training)
        return original * z.flatten()[self.index].to(original.dtype)

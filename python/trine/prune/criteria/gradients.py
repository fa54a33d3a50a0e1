"""Criteria that look at the gradients of a loss."""

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils import _pytree as tree

from trine.prune.criteria.base import Criterion
from trine.prune.layers import wide

__all__ = ["SNIP", "Fisher", "GraSP", "Loss", "Taylor"]

Loss = Callable[[nn.Module, Any], Tensor]
Layers = Mapping[str, nn.Module]


class _Mean(Criterion):
    """A criterion that follows from the mean of something of each weight and its gradient.

    With data the mean is over its batches, at the weights as they are when scores are asked for;
    without over the updates of the training since scores were last asked for.
    """

    per_example = False

    def __init__(self, loss: Loss | None = None, batches: Iterable[Any] | None = None) -> None:
        if (loss is None) != (batches is None):
            raise ValueError(
                f"{type(self).__name__}: loss and batches belong together; give both, or neither "
                "to learn from the training"
            )
        self.loss, self.batches = loss, batches
        self._sums: dict[str, Tensor] = {}
        self._counts: dict[str, int] = {}
        self._over = False

    def statistic(self, weight: Tensor, grad: Tensor) -> Tensor:
        """What is averaged."""
        raise NotImplementedError

    def worth(self, weight: Tensor, mean: Tensor) -> Tensor:
        """The scores."""
        raise NotImplementedError

    @torch.no_grad()
    def collect(self, layers: Layers) -> None:
        if self.batches is not None:
            return
        if self._over:
            self._sums, self._counts, self._over = {}, {}, False
        for name, layer in layers.items():
            if layer.weight.grad is not None:
                value = self.statistic(wide(layer.weight), wide(layer.weight.grad)).clone()
                if name in self._sums:  # which may have been loaded to another device
                    value += self._sums[name].to(value.device)
                self._sums[name] = value
                self._counts[name] = self._counts.get(name, 0) + 1

    def scores(self, model: nn.Module, layers: Layers) -> dict[str, Tensor]:
        if self.batches is not None:
            means = self._calibrated(model, layers)
        else:
            means = {name: total / self._counts[name] for name, total in self._sums.items()}
            self._over = True
        for name in layers:
            if name not in means:
                raise ValueError(
                    f"{type(self).__name__}: no gradient has reached layer '{name}'; give loss and "
                    "batches, or prune after some updates, with collect() after backward passes"
                )
        return {
            name: self.worth(wide(layer.weight), means[name].to(layer.weight.device))
            for name, layer in layers.items()
        }

    def _calibrated(self, model: nn.Module, layers: Layers) -> dict[str, Tensor]:
        weights = _weights(layers, self)
        sums, count = [0.0] * len(weights), 0
        with left_as_it_was(model):
            for batch in self.batches:
                for part in _examples(batch) if self.per_example else (batch,):
                    for i, grad in enumerate(gradients(self, model, part, layers)):
                        sums[i] = sums[i] + self.statistic(wide(weights[i]), wide(grad))
                    count += 1
        _require_data(count, self)
        return dict(zip(layers, _over_processes(sums, count), strict=True))

    def state_dict(self) -> dict[str, Any]:
        return {"sums": self._sums, "counts": self._counts, "over": self._over}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self._sums, self._counts = dict(state["sums"]), dict(state["counts"])
        self._over = state["over"]


class SNIP(_Mean):
    """|w * g|, g the mean gradient: what the loss loses of a weight's connection, meant for the
    weights of the start (Lee et al. 2019, arXiv:1810.02340).

    Args:
        loss: called with the model and a batch, returns the batch's mean loss. The model is in
            whatever mode it is in; its buffers and the random streams stay as they were.
        batches: of one size; one is what the paper takes. None: the updates of the training.

    Raises ValueError where one of both is missing.
    """

    def statistic(self, weight: Tensor, grad: Tensor) -> Tensor:
        return grad

    def worth(self, weight: Tensor, mean: Tensor) -> Tensor:
        return (weight * mean).abs()


class Taylor(_Mean):
    """The mean over batches of (w * g)^2: the squared change of the loss to first order (Molchanov
    et al. 2019, arXiv:1906.10771). Arguments as of `SNIP`."""

    def statistic(self, weight: Tensor, grad: Tensor) -> Tensor:
        return (weight * grad).square()

    def worth(self, weight: Tensor, mean: Tensor) -> Tensor:
        return mean


class Fisher(_Mean):
    """w^2 / 2 times the mean over examples of g^2: the change of the loss to second order, with the
    diagonal of the empirical Fisher information for the Hessian (Theis et al. 2018,
    arXiv:1801.05787).

    Arguments as of `SNIP`; a gradient is computed for each row of each batch. Without data g is
    that of an update, whose rows are averaged before they are squared: a rougher estimate.
    """

    per_example = True

    def statistic(self, weight: Tensor, grad: Tensor) -> Tensor:
        return grad.square()

    def worth(self, weight: Tensor, mean: Tensor) -> Tensor:
        return weight.square() * mean / 2


class GraSP(Criterion):
    """w * (H g), g the gradient of the mean loss and H its Hessian with respect to all layers'
    weights: removing a weight of low score keeps or raises the norm of the gradient (Wang et al.
    2020, arXiv:2002.07376, whose score is the negative and removes the highest).

    Arguments as of `SNIP`, without None.
    """

    def __init__(self, loss: Loss, batches: Iterable[Any]) -> None:
        self.loss, self.batches = loss, batches

    def scores(self, model: nn.Module, layers: Layers) -> dict[str, Tensor]:
        batches, weights = list(self.batches), _weights(layers, self)
        _require_data(len(batches), self)
        with (
            left_as_it_was(model),
            sdpa_kernel(SDPBackend.MATH),
        ):  # others have no second derivative
            mean = self._sum(gradients(self, model, batch, layers) for batch in batches)
            mean = _over_processes(mean, len(batches))
            products = self._sum(
                self._product(model, batch, layers, weights, mean) for batch in batches
            )
        products = _over_processes(products, len(batches))
        return {
            name: layer.weight.detach() * product
            for (name, layer), product in zip(layers.items(), products, strict=True)
        }

    def _product(self, model, batch, layers, weights, vector) -> list[Tensor]:
        """The Hessian of a batch's loss times the vector."""
        grads = gradients(self, model, batch, layers, create_graph=True)
        with torch.enable_grad():
            along = sum((g * v).sum() for g, v in zip(grads, vector, strict=True))
        if not along.requires_grad:  # the loss is linear
            return [torch.zeros_like(weight) for weight in weights]
        return torch.autograd.grad(along, weights, allow_unused=True, materialize_grads=True)

    @staticmethod
    def _sum(parts: Iterator[Iterable[Tensor]]) -> list[Tensor]:
        total = list(next(iter(parts)))
        for part in parts:
            total = [a + b for a, b in zip(total, part, strict=True)]
        return total


def gradients(
    criterion: Any, model: nn.Module, batch: Any, layers: Layers, create_graph: bool = False
) -> tuple[Tensor, ...]:
    """Of the loss with respect to each layer's weight, in order; nothing is left in `.grad`."""
    with torch.enable_grad():
        loss = criterion.loss(model, batch)
        if not isinstance(loss, Tensor) or loss.numel() != 1 or not loss.requires_grad:
            raise ValueError(
                f"{type(criterion).__name__}: loss(model, batch) must return one number that "
                "depends on the weights"
            )
        weights = [layer.weight for layer in layers.values()]
        grads = torch.autograd.grad(
            loss.sum(), weights, allow_unused=True, create_graph=create_graph
        )
    for name, grad in zip(layers, grads, strict=True):
        if grad is None:
            raise ValueError(
                f"{type(criterion).__name__}: the loss of a batch does not depend on layer "
                f"'{name}'; leave it out with skip='{name}'"
            )
    return grads


@contextmanager
def left_as_it_was(model: nn.Module) -> Iterator[None]:
    """Buffers (running statistics) and the random streams are afterwards what they were."""
    buffers = [(buffer, buffer.clone()) for buffer in model.buffers()]
    devices = {p.device.index for p in model.parameters() if p.device.type == "cuda"}
    with torch.random.fork_rng(devices=sorted(devices)):
        try:
            yield
        finally:
            with torch.no_grad():
                for buffer, before in buffers:
                    buffer.copy_(before)


def _weights(layers: Layers, criterion: Criterion) -> list[nn.Parameter]:
    for name, layer in layers.items():
        if not layer.weight.requires_grad:
            raise ValueError(
                f"{type(criterion).__name__}: the weight of layer '{name}' is frozen; let it "
                f"require gradients, or leave it out with skip='{name}'"
            )
    return [layer.weight for layer in layers.values()]


def _require_data(count: int, criterion: Criterion) -> None:
    if not count:
        raise ValueError(
            f"{type(criterion).__name__}: there was no batch; give a list or a DataLoader, which "
            "can be read more than once"
        )


def _examples(batch: Any) -> Iterator[Any]:
    """The batch's rows, each as a batch of one."""
    leaves, structure = tree.tree_flatten(batch)
    sizes = {leaf.shape[0] for leaf in leaves if isinstance(leaf, Tensor) and leaf.dim()}
    if len(sizes) != 1:
        raise ValueError(
            "Fisher takes batches apart into rows: their tensors must have one size of the first "
            f"dimension, they have {sorted(sizes) or 'none'}"
        )
    for i in range(sizes.pop()):
        row = [x[i : i + 1] if isinstance(x, Tensor) and x.dim() else x for x in leaves]
        yield tree.tree_unflatten(row, structure)


@torch.no_grad()
def _over_processes(sums: list[Tensor], count: int) -> list[Tensor]:
    """The means of what all processes have added up."""
    sums = [total.clone() for total in sums]
    if dist.is_initialized():
        counts = sums[0].new_tensor([count], dtype=torch.float64)
        for total in (*sums, counts):
            dist.all_reduce(total)
        count = counts.item()
    return [total / count for total in sums]

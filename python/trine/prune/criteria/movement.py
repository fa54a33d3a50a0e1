"""Movement pruning: what matters is where a weight goes, not where it is."""

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from trine._bits import put
from trine.prune.criteria.base import Criterion

__all__ = ["Movement"]


class Movement(Criterion):
    """Scores S that are trained with the weights, through a straight-through estimator (Sanh et al.
    2020, arXiv:2005.07683).

    The forward pass has W' = W * mask(S), and the mask counts as the identity going back, so that
    dL/dS = dL/dW' * W, also where the mask is 0: what is pruned comes back, with the weight that it
    had, once its score is high enough. With plain gradient descent on S (the default) this is
    S = -learning_rate * sum over updates of W * dL/dW': weights that move away from 0 score high.

    Hard movement pruning is this under a ratio, `PerLayer` or `Global`; soft movement pruning is
    this under `Threshold`, with `penalty` driving scores down.

    With scores that begin at 0 the first masks are chosen by noise, and a trained network needs
    thousands of updates to get over that. `initial` begins with magnitudes instead (Sehwag et al.
    2020, arXiv:2002.10509): training then corrects what magnitude would choose.

    Args:
        learning_rate: of the scores, if `optimizer` is None.
        initial: S begins at initial * |W| / mean(|W|) of the layer; 0, as in the paper, at 0. With
            1, a rate is right that moves scores by about a tenth, and gradient descent better than
            Adam, which moves all alike.
        optimizer: made with the list of all layers' scores, e.g.
            lambda scores: torch.optim.AdamW(scores, 1e-2, weight_decay=0).
        penalty: lambda of the term lambda * sum(sigmoid(S)) of the loss, whose gradient is added;
            the loss itself needs nothing.

    Raises ValueError for a rate that is not positive or a negative penalty.
    """

    revives = True

    def __init__(
        self,
        learning_rate: float = 1.0,
        *,
        optimizer: Callable[[list[Tensor]], torch.optim.Optimizer] | None = None,
        penalty: float = 0.0,
        initial: float = 0.0,
    ) -> None:
        if not (learning_rate > 0 and penalty >= 0 and initial >= 0):
            raise ValueError(
                "Movement: learning_rate must be positive, penalty and initial not negative; they "
                f"are {learning_rate}, {penalty} and {initial}"
            )
        self.penalty, self.initial = penalty, initial
        self._make = optimizer or partial(torch.optim.SGD, lr=learning_rate)
        self._dense: dict[str, Tensor] = {}
        self._scores: dict[str, Tensor] = {}
        self._seen: set[str] = set()

    def start(self, layers: Mapping[str, nn.Module]) -> None:
        weights = {name: layer.weight.detach() for name, layer in layers.items()}
        # The weights with those that are pruned, which the model has as zeros.
        self._dense = {name: weight.clone() for name, weight in weights.items()}
        self._scores = {name: self._first(weight) for name, weight in weights.items()}
        self._optimizer = self._make(list(self._scores.values()))

    def _first(self, weight: Tensor) -> Tensor:
        size = weight.abs()
        # A layer of zeros has no magnitudes to tell apart.
        return size * (self.initial / size.mean().clamp_min(torch.finfo(size.dtype).tiny))

    @torch.no_grad()
    def collect(self, layers: Mapping[str, nn.Module]) -> None:
        self._remember(layers)
        for name, layer in layers.items():
            if layer.weight.grad is not None:
                score = self._scores[name]
                score.grad = self._dense[name] * layer.weight.grad
                if self.penalty:
                    slope = score.sigmoid()
                    score.grad += self.penalty * slope * (1 - slope)
                self._seen.add(name)
        with torch.enable_grad():
            self._optimizer.step()
        self._optimizer.zero_grad()

    def scores(self, model: nn.Module, layers: Mapping[str, nn.Module]) -> dict[str, Tensor]:
        for name in layers:
            if name not in self._seen:
                raise ValueError(
                    f"Movement: no gradient has reached layer '{name}'; prune after some updates "
                    "of a training, with collect() after their backward passes"
                )
        self._remember(layers)  # what is now to be pruned may come back
        return {name: self._scores[name].clone() for name in layers}

    @torch.no_grad()
    def _remember(self, layers: Mapping[str, nn.Module]) -> None:
        for name, layer in layers.items():
            dense = self._dense[name]
            put(layer.weight != 0, dense, layer.weight)

    def values(self, name: str) -> Tensor | None:
        return self._dense[name]

    def state_dict(self) -> dict[str, Any]:
        return {
            "dense": self._dense,
            "scores": self._scores,
            "optimizer": self._optimizer.state_dict(),
            "seen": sorted(self._seen),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        for name, score in self._scores.items():
            score.copy_(state["scores"][name])
            self._dense[name].copy_(state["dense"][name])
        self._optimizer.load_state_dict(state["optimizer"])
        self._seen = set(state["seen"])

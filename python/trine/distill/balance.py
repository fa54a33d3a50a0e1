"""How the terms of a loss are weighed against each other."""

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from trine.distill.objectives.base import Terms
from trine.distill.schedules import Scheduled, at_step

__all__ = ["Fixed", "GradientNorm", "Uncertainty", "class_balanced_weights"]


class Balance(nn.Module):
    """Makes one loss of terms: `balance(terms, step)`; `weights` has what each counted last."""

    weights: dict[str, float | Tensor]

    def forward(self, terms: Terms, step: int = 0) -> Tensor:
        raise NotImplementedError


class Fixed(Balance):
    """sum of weight * term; a weight is a number or a function of the step.

    Fixed({"hard": linear(1, 0.1, 1000), "soft": linear(0, 0.9, 1000)}) goes from labels to the
    teacher.

    Raises ValueError, when called, for a term without a weight or a weight without a term: one of
    the two is a misspelt name.
    """

    def __init__(self, weights: Mapping[str, Scheduled]) -> None:
        super().__init__()
        self.scheduled = dict(weights)
        self.weights = {}

    def forward(self, terms: Terms, step: int = 0) -> Tensor:
        _check_names(terms, self.scheduled)
        self.weights = {name: at_step(weight, step) for name, weight in self.scheduled.items()}
        # A term of weight 0 is left out: 0 times infinity would be NaN.
        return _sum(terms, {name: w for name, w in self.weights.items() if w != 0})


class GradientNorm(Balance):
    """Weights that give all terms gradients of equal norm: w_i = share_i * mean_j |g_j| / |g_i|,
    with g_i the gradient of term i by `parameters`. (The fixed point that GradNorm, Chen et al.
    2018, arXiv:1711.02257, moves towards, computed at once.)

    Every `every` steps each term is differentiated once more, which costs a backward pass a term;
    in between the weights stay. A term without a gradient keeps weight 1 times its share.

    Args:
        parameters: shared by all terms, e.g. the student's last common layer: few, for the cost.
        shares: relative importance of terms, 1 where none is given.
        every: steps from one computation to the next.
    """

    def __init__(
        self,
        parameters: Sequence[nn.Parameter],
        shares: Mapping[str, float] | None = None,
        *,
        every: int = 100,
    ) -> None:
        super().__init__()
        self.shared = list(parameters)  # a list: they are the student's, not this module's
        self.shares, self.every = dict(shares or {}), every
        self.weights = {}

    def forward(self, terms: Terms, step: int = 0) -> Tensor:
        if step % self.every == 0 or set(self.weights) != set(terms):
            self.weights = self._balanced(terms)
        return _sum(terms, self.weights)

    def _balanced(self, terms: Terms) -> dict[str, Tensor]:
        norms = {name: self._gradient_norm(term) for name, term in terms.items()}
        mean = torch.stack(list(norms.values())).mean()
        return {
            name: self.shares.get(name, 1.0) * torch.where(norm > 0, mean / norm, 1.0)
            for name, norm in norms.items()
        }

    def _gradient_norm(self, term: Tensor) -> Tensor:
        if not term.requires_grad:
            return torch.zeros_like(term)
        gradients = torch.autograd.grad(term, self.shared, retain_graph=True, allow_unused=True)
        norms = [torch.linalg.vector_norm(g.float()) for g in gradients if g is not None]
        return torch.linalg.vector_norm(torch.stack(norms)) if norms else torch.zeros_like(term)

    def get_extra_state(self) -> dict[str, float]:
        return {name: float(weight) for name, weight in self.weights.items()}

    def set_extra_state(self, state: dict[str, float]) -> None:
        self.weights = {name: torch.tensor(weight) for name, weight in state.items()}


class Uncertainty(Balance):
    """sum of exp(-s_i) / 2 * term_i + s_i / 2 with learned s_i = log sigma_i^2 (Kendall et al.
    2018, arXiv:1705.07115). The s_i start at 0 and are trained with the student.

    Args:
        names: of the terms.
    """

    def __init__(self, names: Sequence[str]) -> None:
        super().__init__()
        self.log_variances = nn.ParameterDict(
            {name: nn.Parameter(torch.zeros(())) for name in names}
        )
        self.weights = {}

    def forward(self, terms: Terms, step: int = 0) -> Tensor:
        _check_names(terms, self.log_variances)
        weights = {name: 0.5 * torch.exp(-s) for name, s in self.log_variances.items()}
        self.weights = {name: weight.detach() for name, weight in weights.items()}
        return _sum(terms, weights) + 0.5 * torch.stack(list(self.log_variances.values())).sum()


def class_balanced_weights(labels: Tensor, classes: int) -> Tensor:
    """A weight for each class, float32 [classes], inverse to how often it occurs: rows / (classes *
    count). Over these labels the mean weight of a row is 1. A class that does not occur gets 0.

    class_balanced_weights(train_labels, C)[labels] are `row_weight` of `softmax_kl` for a batch.
    """
    counts = torch.bincount(labels[labels >= 0].flatten(), minlength=classes).double()
    present = counts > 0
    weights = torch.where(present, counts.sum() / (present.sum() * counts.clamp(min=1)), 0.0)
    return weights.float()


def _check_names(terms: Terms, weights: Mapping[str, object]) -> None:
    for name in terms:
        if name not in weights:
            raise ValueError(
                f"the term '{name}' has no weight; there are weights for "
                + ", ".join(f"'{n}'" for n in weights)
            )
    for name in weights:
        if name not in terms:
            raise ValueError(
                f"the weight of '{name}' has no term; the terms are "
                + ", ".join(f"'{n}'" for n in terms)
            )


def _sum(terms: Terms, weights: Mapping[str, float | Tensor]) -> Tensor:
    weighed = [weight * terms[name] for name, weight in weights.items()]
    if not weighed:
        raise ValueError("all weights are 0; nothing is left to train on")
    total = weighed[0]
    for term in weighed[1:]:
        total = total + term
    return total

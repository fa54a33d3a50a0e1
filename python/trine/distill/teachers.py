"""Who teaches: where a teacher's view of a batch comes from.

A teacher is called with the batch and the student's view, and returns its own view. A frozen model
is one, several together, an exponential average of the student; a cache on disk is another
(cache.py). Whoever writes a function of that signature has written a teacher.
"""

import copy
from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor, nn

from trine.distill.calls import call, moved
from trine.distill.capture import Capture, unwrapped
from trine.distill.objectives.base import Batch, View

__all__ = ["Average", "Ensemble", "Frozen", "Teacher"]

Teacher = Callable[[Batch, View], View]


class Frozen:
    """A model that is not trained (offline distillation): in eval mode, without gradients.

    Args:
        model: is put into eval mode, its parameters no longer require gradients, and with `dtype`
            and `device` it is moved in place, as `nn.Module.to` does.
        paths: what to capture, as for `Capture`.
        dtype: a lower precision for it, e.g. torch.bfloat16. Float inputs are cast to it.
        device: one of its own. Batches go there, views come back to the student's device.
    """

    def __init__(
        self,
        model: nn.Module,
        paths: Mapping[str, str] | None = None,
        *,
        dtype: torch.dtype | None = None,
        device: torch.device | str | None = None,
    ) -> None:
        self.model = model.to(device=device, dtype=dtype).eval().requires_grad_(False)
        self.dtype, self.device = dtype, device
        self._capture = Capture(model, paths)

    @torch.no_grad()
    def __call__(self, batch: Batch, student: View) -> View:
        self.model.eval()  # somebody who puts all modules into training mode does not mean this one
        inputs = dict(batch) if self.device is None else moved(batch, self.device)
        if self.dtype is not None:
            inputs = {name: self._cast(value) for name, value in inputs.items()}
        _, view = call(self._capture, inputs)
        if self.device is None or not student:
            return view
        return moved(view, next(iter(student.values())).device)

    def _cast(self, value):
        if isinstance(value, Tensor) and value.is_floating_point():
            return value.to(self.dtype)
        return value


class Ensemble:
    """Several teachers as one: the view of the first, with the logits of all of them together.

    Args:
        teachers: each called with the same batch; their logits [..., C] have one shape.
        weights: one for each teacher, which count as shares of their sum; None: all the same;
            "confidence": for every row proportional to exp(-H), H the entropy of that teacher's
            distribution, so that a teacher who is sure counts more.
        mean: "arithmetic", of probabilities: logits = log(sum of w_i * softmax(z_i)), or
            "geometric", of logits: sum of w_i * z_i (Hinton et al. 2015 use either).

    Raises ValueError for weights that do not fit.
    """

    def __init__(
        self,
        teachers: Sequence[Teacher],
        weights: Sequence[float] | str | None = None,
        *,
        mean: str = "arithmetic",
    ) -> None:
        if mean not in ("arithmetic", "geometric"):
            raise ValueError(f"Ensemble: mean must be 'arithmetic' or 'geometric', it is '{mean}'")
        if isinstance(weights, str):
            if weights != "confidence":
                raise ValueError(
                    f"Ensemble: weights must be numbers, None or 'confidence', not '{weights}'"
                )
        elif weights is not None and (len(weights) != len(teachers) or not sum(weights) > 0):
            raise ValueError(
                f"Ensemble: weights must be {len(teachers)} numbers of positive sum, one for each "
                f"teacher; they are {list(weights)}"
            )
        self.teachers, self.weights, self.mean = list(teachers), weights, mean

    @torch.no_grad()
    def __call__(self, batch: Batch, student: View) -> View:
        views = [teacher(batch, student) for teacher in self.teachers]
        logits = torch.stack([view["logits"].float() for view in views])
        log_p = logits.log_softmax(-1)
        shares = self._shares(log_p)[..., None]
        if self.mean == "geometric":
            together = (shares * logits).sum(0)
        else:
            together = (log_p + shares.log()).logsumexp(0)
        return {**views[0], "logits": together}

    def _shares(self, log_p: Tensor) -> Tensor:
        """[teachers, ...], of sum 1 over teachers."""
        if self.weights == "confidence":
            return torch.special.entr(log_p.exp()).sum(-1).neg().softmax(0)
        weights = torch.tensor(self.weights or [1.0] * len(self.teachers), device=log_p.device)
        shares = weights / weights.sum()
        return shares.reshape(-1, *(1 for _ in log_p.shape[1:-1])).expand(log_p.shape[:-1])


class Average(Frozen):
    """A mean teacher (Tarvainen & Valpola 2017, arXiv:1703.01780): an exponential moving average of
    the student teaches it. Call `update(student)` after each step of the optimiser.

    Args:
        student: copied as it is now.
        decay: of the average, near 1.
        paths: as of `Frozen`.
    """

    def __init__(
        self, student: nn.Module, decay: float = 0.999, paths: Mapping[str, str] | None = None
    ) -> None:
        super().__init__(copy.deepcopy(unwrapped(student)), paths)
        self.decay = decay

    @torch.no_grad()
    def update(self, student: nn.Module) -> None:
        """average = decay * average + (1 - decay) * student; buffers are copied."""
        student = unwrapped(student)
        for own, new in zip(self.model.parameters(), student.parameters(), strict=True):
            own.lerp_(new, 1 - self.decay)
        for own, new in zip(self.model.buffers(), student.buffers(), strict=True):
            own.copy_(new)

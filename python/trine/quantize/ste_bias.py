"""How wrong the straight-through gradient is: against the gradient of the expected loss."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from trine.quantize.groups import split_group
from trine.quantize.weights import WEIGHT_RULES, dense, weight_rule

# The finite difference moves every weight by this share of the noise's spread: its error goes with
# the square, its variance with one over it.
STEP = 0.5


@dataclass(frozen=True)
class SteBias:
    """The two gradients along some directions, for one spread of the noise.

    spread: of the noise, as a multiple of mean |w|.
    straight_through: float64 [directions], the mean over the noise of the straight-through one.
    expected: float64 [directions], that of the expected loss.
    standard_error: float64 [directions], of their difference, from the number of samples.
    """

    spread: float
    straight_through: Tensor
    expected: Tensor
    standard_error: Tensor

    @property
    def bias(self) -> float:
        """||straight_through - expected|| / ||expected||."""
        return ((self.straight_through - self.expected).norm() / self.expected.norm()).item()

    @property
    def noise(self) -> float:
        """What `bias` would be about for no bias at all: sampling alone."""
        return (self.standard_error.norm() / self.expected.norm()).item()

    @property
    def cosine(self) -> float:
        """Between both, over the directions."""
        return torch.cosine_similarity(self.straight_through, self.expected, dim=0).item()


def ste_bias(
    loss: Callable[[Tensor], Tensor],
    weight: Tensor,
    quantise: str | Callable[[Tensor], Tensor],
    *,
    spreads: Sequence[float] = (0.05, 0.1, 0.2, 0.5, 1.0),
    noise: str = "normal",
    directions: int = 8,
    samples: int = 512,
    seed: int = 0,
    progress: Callable[[int], None] = lambda done: None,
) -> list[SteBias]:
    """Compare the straight-through gradient of a quantised weight with what it stands in for.

    The loss of a quantised weight, loss(Q(w)), is flat between jumps, so it has no gradient worth
    following. What training under noise follows is the expected loss E_u[loss(Q(w + s u))], u of
    zero mean, which is smooth. Its derivative along a direction d (each element +1 or -1) is
    measured by a central difference with the same noise on both sides,

        E_u[loss(Q(w + s u + h d)) - loss(Q(w + s u - h d))] / 2h,  h = s / 2,

    the straight-through estimator (Bengio et al. 2013, arXiv:1308.3432) along it is
    E_u[<loss'(Q(w + s u)), d>]. The difference is its bias.

    Args:
        loss: of a quantised weight, of `weight`'s shape; differentiable, the same each time.
        weight: floating, the master weight.
        quantise: a choice of `trine.quantize.QatLinear` that has a rule ("int8", "ternary", ...;
            the weight is then [N, K]), or a function from weight to quantised weight.
        spreads: s of the noise, each as a multiple of mean |w|.
        noise: "normal" (of variance 1) or "uniform" (in [-1/2, 1/2]).
        directions: how many, drawn at random.
        samples: of the noise, for each direction.
        seed: of directions and noise.
        progress: called after each spread with the number that are done.

    Raises:
        ValueError: an unknown choice or noise, NaN weights, no spread above 0, a loss that is not
            one value.
    """
    if isinstance(quantise, str):
        quantise = _of_choice(quantise)
    if noise not in ("normal", "uniform"):
        raise ValueError(f"ste_bias: noise is {noise!r}; it must be 'normal' or 'uniform'")
    if not spreads or min(spreads) <= 0 or directions < 1 or samples < 2:
        raise ValueError(
            "ste_bias needs spreads above 0, a direction and two samples; got "
            f"{list(spreads)}, {directions} and {samples}"
        )
    weight = weight.detach()
    if not weight.isfinite().all():
        raise ValueError("ste_bias: the weight holds NaN or infinity")
    draws = torch.Generator(weight.device).manual_seed(seed)
    unit = weight.abs().mean().item() or 1.0
    found = []
    for spread in spreads:
        pairs = [
            _along(loss, weight, quantise, spread * unit, noise, samples, draws)
            for _ in range(directions)
        ]
        straight, expected, error = torch.tensor(pairs, dtype=torch.float64).T
        found.append(SteBias(spread, straight, expected, error))
        progress(len(found))
    return found


def _along(
    loss: Callable[[Tensor], Tensor],
    weight: Tensor,
    quantise: Callable[[Tensor], Tensor],
    scale: float,
    noise: str,
    samples: int,
    draws: torch.Generator,
) -> tuple[float, float, float]:
    """Both derivatives along one direction, and the standard error of their difference."""

    def rand(draw: Callable[..., Tensor]) -> Tensor:
        return draw(weight.shape, generator=draws, device=weight.device, dtype=torch.float32)

    direction = torch.where(rand(torch.rand) < 0.5, -1.0, 1.0).to(weight.dtype)
    step = STEP * scale
    straight, differences = [], []
    for _ in range(samples):
        u = rand(torch.randn) if noise == "normal" else rand(torch.rand) - 0.5
        moved = weight + (scale * u).to(weight.dtype)
        values = quantise(moved).detach().requires_grad_()
        value = loss(values)
        if value.numel() != 1:
            raise ValueError(
                f"ste_bias: the loss has shape {list(value.shape)}; it must be one value"
            )
        (grad,) = torch.autograd.grad(value, values)
        straight.append((grad.double() * direction).sum().item())
        with torch.no_grad():
            ends = [loss(quantise(moved + sign * step * direction)).item() for sign in (1, -1)]
        differences.append((ends[0] - ends[1]) / (2 * step))
    gap = torch.tensor(straight).double() - torch.tensor(differences).double()
    return (
        math.fsum(straight) / samples,
        math.fsum(differences) / samples,
        gap.std().item() / math.sqrt(samples),
    )


def _of_choice(choice: str) -> Callable[[Tensor], Tensor]:
    if split_group(choice)[0] not in WEIGHT_RULES:
        raise ValueError(
            f"ste_bias: {choice!r} is not one of {', '.join(WEIGHT_RULES)}; give a function"
        )
    rule = weight_rule(choice)

    def quantise(weight: Tensor) -> Tensor:
        return dense(*rule(weight)).to(weight.dtype)

    return quantise


def draw_ste_bias(results: Sequence[SteBias], path: str | Path) -> None:
    """A picture (PNG, SVG or PDF, by the suffix): bias and cosine against the noise's spread."""
    from matplotlib.figure import Figure

    spreads = [result.spread for result in results]
    figure = Figure(figsize=(8, 3.4), layout="constrained")
    left, right = figure.subplots(1, 2)
    left.plot(spreads, [r.bias for r in results], "o-", color="#0072b2", label="bias")
    left.plot(spreads, [r.noise for r in results], "--", color="#999999", label="sampling alone")
    left.set_ylabel("|straight-through - expected| / |expected|")
    left.set_ylim(bottom=0)
    left.legend(frameon=False)
    right.plot(spreads, [r.cosine for r in results], "o-", color="#009e73")
    right.set_ylabel("cosine of the two gradients")
    right.set_ylim(-1.05, 1.05)
    for axes in (left, right):
        axes.set_xscale("log")
        axes.set_xlabel("spread of the noise, in mean |w|")
        axes.grid(alpha=0.2)
        axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=120)

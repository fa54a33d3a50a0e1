"""Every way to train a layer under quantisation: schemes, groups, convolutions, batch norms."""

from collections.abc import Iterable

import torch
from torch import Tensor, nn
from trine import Recipe
from trine.compress.recipe import OF_CONVOLUTIONS
from trine.quantize import QatSchedule, prepare_qat
from trine.quantize.groups import GROUPED
from trine.quantize.schemes import SCHEMES

OF_LINEAR = (*SCHEMES, *(f"{base}-g64" for base in GROUPED if base in SCHEMES))
OF_CONV = tuple(choice for choice in OF_CONVOLUTIONS if choice != "float")

# What is trained, by name: "KIND CHOICE", as "conv+norm int8-static".
CASES = tuple(
    f"{kind} {choice}"
    for kinds, choices in (
        (("linear", "linear+norm"), OF_LINEAR),
        (("conv", "grouped", "conv+norm"), OF_CONV),
    )
    for kind in kinds
    for choice in choices
)


def _layers(kind: str) -> nn.Sequential:
    if kind.startswith("linear"):
        layer, norm = nn.Linear(128, 6), nn.BatchNorm1d(6)
    else:
        groups = 2 if kind == "grouped" else 1
        layer, norm = nn.Conv2d(4, 6, 3, padding=1, groups=groups), nn.BatchNorm2d(6)
    with torch.no_grad():  # as after some training
        norm.running_mean.normal_()
        norm.running_var.uniform_(0.3, 3)
        norm.weight.normal_()
    return nn.Sequential(layer, norm) if kind.endswith("+norm") else nn.Sequential(layer)


class Together(nn.Module):
    """One network for each of the cases, side by side."""

    def __init__(self, cases: Iterable[str]) -> None:
        super().__init__()
        self.cases = nn.ModuleDict({name: _layers(name.split()[0]) for name in cases})

    def forward(self, rows: Tensor, images: Tensor) -> dict[str, Tensor]:
        return {
            name: case(rows if name.startswith("linear") else images)
            for name, case in self.cases.items()
        }


def inputs(batch: int = 8, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
    return torch.randn(batch, 128).to(dtype), torch.randn(batch, 4, 5, 5).to(dtype)


def prepared(*cases: str, dtype: torch.dtype = torch.float32, frozen: bool = True) -> Together:
    """In training under quantisation, batch norms frozen or not."""
    choices = {f"cases.{name}.*": name.split()[1] for name in cases}
    linear, conv = (
        {pattern: c for pattern, c in choices.items() if pattern.startswith("cases.linear") is kind}
        for kind in (True, False)
    )
    samples = inputs(16, dtype)
    qat = prepare_qat(Together(cases).to(dtype), Recipe(linear, conv=conv), samples)
    if qat.qat_folded and frozen:
        QatSchedule(qat, freeze_batch_norm=0)
    return qat


def loss_of(outputs: dict[str, Tensor]) -> Tensor:
    """Whose gradients are 1 over the batch for each example."""
    return sum(y.float().square().mean() for y in outputs.values())

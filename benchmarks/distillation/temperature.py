"""How the temperature would have to follow the batch size for the gradient to stay as noisy.

`trine.distill.schedules.temperature_for_batch` says T proportional to B^(-1/4) for soft targets
without the factor T^2. Here the noise is measured: of one student and teacher on scikit-learn's
digits the gradients of drawn batches, and how far they lie from the gradient of all images.

    python -m benchmarks.distillation.temperature
    python -m benchmarks.distillation.temperature --quick
"""

import math
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import TensorDataset
from trine.demo.digits import Mlp
from trine.distill.objectives import SoftTargets
from trine.distill.schedules import temperature_for_batch
from trine.evaluate import bootstrap_interval

from benchmarks.distillation.digits import load, shifted, teach
from benchmarks.study import Row, Study, parse_arguments


@dataclass(frozen=True)
class Settings:
    teacher_epochs: int = 30
    student_epochs: int = 3
    batches: tuple[int, ...] = (16, 32, 64, 128, 256)
    draws: int = 400  # of batches of each size
    temperatures: tuple[float, ...] = tuple(2 ** (i / 2) for i in range(13))  # 1 to 64
    width: int = 64
    reference: int = 64  # the batch whose noise the others are to have
    wanted: tuple[float, ...] = (2.0, 4.0, 20.0)  # at these temperatures


def gradients(
    student: nn.Module, teacher: nn.Module, images: Tensor, temperature: float, squared: bool
) -> Tensor:
    """[images, parameters]: of every image's loss, with the factor T^2 or without."""
    objective = SoftTargets(temperature, scale_by_t_squared=squared)
    parameters = list(student.parameters())
    with torch.no_grad():
        targets = teacher(images)
    rows = []
    for image, target in zip(images.split(1), targets.split(1), strict=True):
        (loss,) = objective({"logits": student(image)}, {"logits": target}, {}).values()
        rows.append(torch.cat([g.flatten() for g in torch.autograd.grad(loss, parameters)]))
    return torch.stack(rows)


def squared_noise(of_images: Tensor, batch: int, draws: int) -> Tensor:
    """[draws]: squared distances of batches' mean gradients from that of all images, which are
    drawn evenly, with replacement."""
    generator = torch.Generator().manual_seed(batch)
    mean = of_images.mean(0)
    found = []
    for _ in range(draws):
        chosen = torch.randint(len(of_images), (batch,), generator=generator)
        found.append((of_images[chosen].mean(0) - mean).square().sum())
    return torch.stack(found).double()


def temperature_of(noise: float, temperatures: Tensor, noises: Tensor) -> float:
    """Where the noise, which falls with T, has a value: on straight lines between logarithms."""
    x, y = temperatures.log(), noises.log()
    wanted = math.log(noise)
    above = int((y > wanted).sum())
    if not 0 < above < len(y):
        return math.nan  # beyond the temperatures that were measured
    share = (wanted - y[above - 1]) / (y[above] - y[above - 1])
    return torch.lerp(x[above - 1], x[above], share).exp().item()


def measure(settings: Settings, rows: TensorDataset) -> dict[str, Tensor]:
    """Squared noises [temperatures, batches, draws], without and with the factor T^2."""
    teacher = teach(
        Mlp(1200, dropout=0.5, seed=0), None, rows, 0, settings.teacher_epochs, transform=shifted
    )
    student = teach(Mlp(settings.width, seed=1), None, rows, 1, settings.student_epochs)
    found: dict[str, Tensor] = {}
    for name, squared in (("plain", False), ("T^2", True)):
        of_temperatures = []
        for temperature in settings.temperatures:
            of_images = gradients(student, teacher, rows.tensors[0], temperature, squared)
            of_batches = [squared_noise(of_images, b, settings.draws) for b in settings.batches]
            of_temperatures.append(torch.stack(of_batches))
        found[name] = torch.stack(of_temperatures)
    return found


def noises_of(squares: Tensor) -> Tensor:
    """[temperatures, batches]: roots of the mean squares."""
    return squares.mean(-1).sqrt()


def rows_of(settings: Settings, found: dict[str, Tensor]) -> list[Row]:
    temperatures = torch.tensor(settings.temperatures, dtype=torch.float64)
    noises = noises_of(found["plain"])
    reference = settings.batches.index(settings.reference)
    rows = []
    for start in settings.wanted:
        # On the line between the measured temperatures, as all that is read off here.
        target = read(start, temperatures, noises[:, reference])
        for column, batch in enumerate(settings.batches):
            if batch == settings.reference:
                continue
            rule = temperature_for_batch(start, settings.reference, batch)
            rows.append(
                Row(
                    f"{batch} images for {settings.reference} at T = {start:g}",
                    "T that keeps the noise",
                    temperature_of(target, temperatures, noises[:, column]),
                    interval_of(target, temperatures, found["plain"][:, column]),
                    published=f"B^(-1/4): {rule:.2f}",
                )
            )
    ends = noises_of(found["T^2"])[:, reference]
    at = [read(t, temperatures, ends) for t in settings.wanted]
    name = f"with T^2, at T = {settings.wanted[-1]:g} over {settings.wanted[0]:g}"
    rows.append(Row(name, "ratio of the noise", at[-1] / at[0], published="1: T changes nothing"))
    return rows


def read(temperature: float, temperatures: Tensor, noises: Tensor) -> float:
    """The noise at a temperature between those measured."""
    x, y = temperatures.log(), noises.log()
    right = int(torch.searchsorted(x, math.log(temperature)).clamp(1, len(x) - 1))
    share = (math.log(temperature) - x[right - 1]) / (x[right] - x[right - 1])
    return torch.lerp(y[right - 1], y[right], share).exp().item()


def interval_of(target: float, temperatures: Tensor, squares: Tensor) -> tuple[float, float]:
    """95%, the batches drawn again: the same ones at every T, so that all noises move alike."""
    middle = squares[len(squares) // 2]
    low, high = bootstrap_interval(middle)
    noises, mean = squares.mean(-1).sqrt(), middle.mean()
    ends = [
        temperature_of(target, temperatures, noises * (edge / mean).sqrt()) for edge in (low, high)
    ]
    return ends[0], ends[1]


def draw(settings: Settings, found: dict[str, Tensor], path: Path) -> None:
    """The noise over T for every batch size, and over B the T that keeps it, beside the rule's."""
    import matplotlib

    matplotlib.use("agg")
    from matplotlib import pyplot as plt

    temperatures = torch.tensor(settings.temperatures, dtype=torch.float64)
    noises = noises_of(found["plain"])
    reference = settings.batches.index(settings.reference)
    figure, (left, right) = plt.subplots(1, 2, figsize=(12, 4), layout="constrained")
    for column, batch in enumerate(settings.batches):
        left.loglog(temperatures, noises[:, column], "o-", markersize=3, label=f"{batch} images")
    slope = noises[-1, reference] * (temperatures[-1] / temperatures) ** 2
    left.loglog(temperatures, slope, "k:", label="1 / T^2")
    left.set(xlabel="temperature", ylabel="distance of a batch's gradient from the mean")
    for start, color in zip(settings.wanted, ("#0072b2", "#009e73", "#d55e00"), strict=True):
        target = read(start, temperatures, noises[:, reference])
        kept = [
            temperature_of(target, temperatures, noises[:, i]) for i in range(len(settings.batches))
        ]
        rule = [temperature_for_batch(start, settings.reference, b) for b in settings.batches]
        right.loglog(
            settings.batches, kept, "o", color=color, label=f"measured, from T = {start:g}"
        )
        right.loglog(settings.batches, rule, "-", color=color, label="B^(-1/4)")
    right.set(xlabel="images in a batch", ylabel="temperature that keeps the noise")
    right.set_xticks(settings.batches, [str(b) for b in settings.batches])
    right.minorticks_off()
    right.set_yticks([2, 4, 8, 16, 32], ["2", "4", "8", "16", "32"])
    left.legend(fontsize=8)
    right.legend(fontsize=8, loc="upper left", bbox_to_anchor=(1, 1))  # beside the points
    for axes in (left, right):
        axes.grid(alpha=0.2)
        axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=110)
    plt.close(figure)


def main() -> None:
    arguments = parse_arguments(__doc__, "benchmarks.distillation.temperature")
    torch.set_num_threads(1)
    settings = Settings(draws=100) if arguments.quick else Settings()
    about = {name: str(value) for name, value in asdict(settings).items()}
    study = Study("distillation-temperature", arguments, 1, about)

    def compute() -> dict[str, Any]:
        return measure(settings, load().train)

    found = study.part("noise of the gradient", compute)
    notes = (
        f"One student of 2 x {settings.width} after {settings.student_epochs} epochs on labels, "
        f"{settings.draws} batches of each size. The rule takes a row's gradient for proportional "
        "to 1 / T^2, which holds where T is large against the logits, here from 4 on; at 2 the "
        "noise falls less steeply, and T has to change more."
    )
    study.finish(rows_of(settings, found), lambda path: draw(settings, found, path), notes)


if __name__ == "__main__":
    main()

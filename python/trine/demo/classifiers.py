"""Train and distil: a teacher, its float students, and students that train as they will be served.

After Hinton et al. 2015 (arXiv:1503.02531): the teacher learns from shifted images under dropout;
the students see the plain images only, so that what they know of shifts they know from the teacher.
"""

from dataclasses import asdict, dataclass
from typing import Any

import torch
from rich.progress import Progress
from torch import Tensor, nn
from torch.nn import functional as F

import trine
from trine.demo.digits import Digits, Mlp, Rows, jitter
from trine.demo.settings import Settings
from trine.demo.stages import Stages
from trine.demo.training import Augment, Loss, Schedule, train
from trine.evaluate import bootstrap_interval, correct

# Of hidden units. 0.5, Hinton et al.'s, gave 98.4% on validation rows, 0.2 98.6% (two seeds' mean).
DROPOUT = 0.2
TECHNIQUES = ("ternary", "int8", "sparse24")


@dataclass(frozen=True)
class EndsTrial:
    """Whether the first and the last layer are better compressed as well, on validation rows."""

    technique: str
    validation_rows: int
    accuracy_float_ends: float
    accuracy_all_compressed: float
    difference_ci: tuple[float, float]  # 95%, paired: all compressed minus float ends
    compress_ends: bool

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


@dataclass(frozen=True)
class Classifiers:
    """The trained models, in evaluation mode; `students` by technique, ready to be converted."""

    teacher: nn.Module
    alone: nn.Module
    distilled: nn.Module
    students: dict[str, nn.Module]
    ends: list[EndsTrial]


def train_classifiers(
    digits: Digits, settings: Settings, stages: Stages, progress: Progress
) -> Classifiers:
    """Train every model, or take it from `stages`; the same settings give the same weights."""

    def trained(
        name: str, model: nn.Module, loss: Loss, epochs: int, augment: Augment | None = None
    ) -> nn.Module:
        bar = progress.add_task(name, total=epochs)
        stages.trained(
            name.replace(" ", "-").replace(",", ""),
            model,
            lambda model: train(
                model,
                digits.train.images,
                digits.train.labels,
                loss,
                Schedule(epochs, seed=settings.seed),
                augment=augment,
                on_epoch=lambda: progress.advance(bar),
            ),
        )
        progress.update(bar, completed=epochs)
        return model

    seed = settings.seed
    teacher = trained(
        "teacher",
        Mlp(settings.teacher_width, dropout=DROPOUT, seed=seed),
        hard_labels,
        settings.teacher_epochs,
        jitter,
    )
    soft = soft_targets(teacher, settings.temperature, settings.alpha)
    student = Mlp(settings.student_width, seed=seed)
    again = Mlp(settings.student_width, seed=seed)
    alone = trained("student alone", student, hard_labels, settings.student_epochs)
    distilled = trained("student distilled", again, soft, settings.student_epochs)

    students, ends = {}, []
    for technique in TECHNIQUES:
        float_ends, whole = (
            trained(
                f"student {technique}, {which}",
                trine.quantize.prepare_qat(distilled, trine.Recipe(linear={layers: technique})),
                soft,
                settings.qat_epochs,
            )
            for which, layers in (("float ends", "hidden"), ("whole", "*"))
        )
        trial = compare_ends(technique, float_ends, whole, digits.validation)
        students[technique] = whole if trial.compress_ends else float_ends
        ends.append(trial)
    return Classifiers(teacher, alone, distilled, students, ends)


def hard_labels(logits: Tensor, images: Tensor, labels: Tensor) -> Tensor:
    return F.cross_entropy(logits, labels)


def soft_targets(teacher: nn.Module, temperature: float, alpha: float) -> Loss:
    """The distillation loss with `teacher` looking at the very images that the student sees."""

    def loss(logits: Tensor, images: Tensor, labels: Tensor) -> Tensor:
        with torch.no_grad():
            teacher_logits = teacher(images)
        return trine.distill.distillation_loss(
            logits, teacher_logits, labels, temperature=temperature, alpha=alpha
        )

    return loss


def compare_ends(
    technique: str, float_ends: nn.Module, whole: nn.Module, validation: Rows
) -> EndsTrial:
    """The ends stay float unless that is worse by more than the validation rows leave to chance."""
    with torch.inference_mode():
        kept, compressed = (
            correct(model(validation.images), validation.labels).double()
            for model in (float_ends, whole)
        )
    interval = bootstrap_interval(compressed - kept)
    return EndsTrial(
        technique,
        len(validation.labels),
        kept.mean().item(),
        compressed.mean().item(),
        interval,
        compress_ends=interval[0] > 0,
    )

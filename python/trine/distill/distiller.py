"""Training a student on what a teacher says, on one process or many."""

from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn

from trine.distill import processes
from trine.distill.calls import call
from trine.distill.capture import Capture
from trine.distill.objectives.base import Batch, Objective
from trine.distill.settings import Training
from trine.distill.teachers import Teacher

if TYPE_CHECKING:
    from trine.prune import Pruner
    from trine.quantize import QatSchedule

__all__ = ["Distiller"]


class Lesson(nn.Module):
    """All that is trained, called as one: a batch in, the loss and its terms out."""

    def __init__(
        self, student: Capture, teacher: Teacher | None, objective: Objective, balance: nn.Module
    ) -> None:
        super().__init__()
        self.student, self.objective, self.balance = student.model, objective, balance
        self._capture = student
        self._teacher = [teacher]  # in a list: a module is not to be trained for being a teacher

    def forward(self, batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
        _, student = call(self._capture, batch)
        (teacher,) = self._teacher
        view = {} if teacher is None else teacher(batch, student)
        terms = self.objective(student, view, batch)
        return self.balance(terms, batch["step"]), terms


class Distiller:
    """Trains a student on what a teacher says.

        distiller = Distiller(
            student,
            Frozen(teacher),
            Together(SoftTargets(4.0), Labels()),
            Fixed({"soft": 0.7, "hard": 0.3}),
            training=Training(epochs=10),
            folder="out/student",
        )
        student = distiller.fit(loader, evaluate=lambda model: accuracy(model, validation))

    A job that is killed goes on when it is started again with the same folder: on the CPU it ends
    with the bits of one that was not. `torchrun --nproc-per-node=N` runs it in N processes, each
    with its share of the batches: their gradients are averaged, so an update sees N batches, and is
    that of one process with N times the batch where each batch counts as many rows.

    Args:
        student: trained in place.
        teacher: `Frozen(model)`, a cache, several in an `Ensemble`, an `Average`; None where
            objectives need none (`Exits`, `LearnTogether`).
        objective: what student and teacher should have in common.
        balance: weighs the objective's terms.
        paths: what to capture in the student, as for `Capture`.
        transform: called with each batch and the student, returns the batch to learn from:
            augmentation, what the student writes itself (`OnPolicy`), what a generator makes
            (`DataFree`). One that has a state_dict is in the checkpoint.
        pruner: a `trine.prune.Pruner` of the student, made without an optimiser, to prune it as it
            learns. Scores count from when it is done; call its `finish` after `fit`.
        schedule: a `trine.quantize.QatSchedule` of the student, stepped after each update.
        training: settings.
        folder: for the checkpoint, the history (history.jsonl, curves.png) and the final weights
            (student.safetensors); None: nothing is written, and a killed job starts again.
        tensorboard: scalars, too, in folder/tensorboard.
        progress: a line on stderr, by the first process.

    `history` has a row of numbers for each update, and one for each evaluation.

    Raises:
        ValueError: a launch that is not what the settings ask for, fp16 without a GPU; from `fit`,
            a folder with another training's checkpoint, a loss that is not finite.
    """

    def __init__(
        self,
        student: nn.Module,
        teacher: Teacher | None,
        objective: Objective,
        balance: nn.Module,
        *,
        paths: Mapping[str, str] | None = None,
        transform: Callable[[Batch, nn.Module], Batch] | None = None,
        pruner: "Pruner | None" = None,
        schedule: "QatSchedule | None" = None,
        training: Training | None = None,
        folder: str | Path | None = None,
        tensorboard: bool = False,
        progress: bool = False,
    ) -> None:
        self.training = training or Training()
        self.accelerator = processes.accelerator_for(self.training)
        self.folder = None if folder is None else Path(folder)
        self.teacher, self.student, self.transform = teacher, student, transform
        self.pruner, self.schedule = pruner, schedule
        self.lesson = Lesson(Capture(student, paths), teacher, objective, balance)
        self.tensorboard, self.progress = tensorboard, progress
        self.history: list[dict[str, Any]] = []

    def fit(
        self, loader: Iterable[Any], evaluate: Callable[[nn.Module], float] | None = None
    ) -> nn.Module:
        """Train, or go on, to the end.

        Args:
            loader: a DataLoader whose batches are mappings or (inputs, labels). With several
                processes each takes its share of the batches.
            evaluate: called with the student (with `ema`, its average) in eval mode, in every
                process; returns a score, higher is better.

        Returns:
            The student with the weights of its best score, or its last where nothing evaluates it;
            with `ema` those of the average.
        """
        from trine.distill.run import Run  # imports what nobody needs who does not train

        run = Run(self, loader, evaluate)
        self.history = run.history.rows
        try:
            run.resume()
            run.train()
        finally:
            run.history.close()
        run.finish()
        return self.student

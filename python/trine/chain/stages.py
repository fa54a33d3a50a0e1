"""What the stages of a recipe do: each takes a model and gives a changed one."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import nn
from torch.utils.data import DataLoader

import trine
from trine.calibration import SecondMoment
from trine.compress.recipe import Recipe
from trine.distill.balance import Fixed
from trine.distill.distiller import Distiller
from trine.distill.objectives import Labels, SoftTargets, Together
from trine.distill.recipe_file import checked, read_training
from trine.distill.settings import Training
from trine.distill.teachers import Frozen
from trine.prune import prune_structured
from trine.quantize import QatSchedule
from trine.quantize.input_range import InputRange


@dataclass(frozen=True)
class Ground:
    """What all stages have in common.

    teacher: the model at the beginning. train, validation: loaders of batches with labels. samples:
    a batch without them, as the model is called when it serves.
    """

    teacher: nn.Module
    train: DataLoader
    validation: DataLoader
    samples: Mapping[str, Any]

    def inputs(self) -> Iterator[dict[str, Any]]:
        """The training batches without labels, in an order that is always the same."""
        again = DataLoader(
            self.train.dataset,
            self.train.batch_size,
            shuffle=True,
            generator=torch.Generator().manual_seed(0),
            collate_fn=self.train.collate_fn,
        )
        for batch in again:
            yield {name: value for name, value in batch.items() if name != "labels"}


class Stage:
    """A dataclass of the settings of one stage."""

    name: ClassVar[str]
    is_last: ClassVar[bool] = False  # what it makes does not train, so that nothing can follow

    @classmethod
    def read(cls, said: Any, where: str, example: str) -> Stage:
        """From what the file says; ValueError names the place."""
        given = checked(cls, said, where, example)
        try:
            return cls(**given)
        except (TypeError, ValueError) as error:
            raise ValueError(f"{where}: {error}") from None

    def apply(self, model: nn.Module, ground: Ground, folder: Path) -> nn.Module:
        """A changed model; `model` may be changed as well. `folder` keeps what is half done."""
        raise NotImplementedError


@dataclass(frozen=True)
class Factorize(Stage):
    """`trine.factorize.factorize`: one of rank, energy, parameters and speedup must be given.

    method: "svd", or "svd+24" with a 2:4 rest. calibrate: how many batches are looked at to find
    what matters for the outputs; 0: the weights alone. prefer: "speed" keeps layers whose factors
    are not measured to be faster, "size" changes all that get smaller.
    """

    name = "factorize"

    rank: int | None = None
    energy: float | None = None
    parameters: float | None = None
    speedup: float | None = None
    method: str = "svd"
    calibrate: int = 0
    prefer: str = "speed"
    layers: str | Iterable[str] = "*"
    skip: str | Iterable[str] = ()

    def __post_init__(self) -> None:
        given = [n for n in ("rank", "energy", "parameters", "speedup") if getattr(self, n)]
        if len(given) != 1:
            raise ValueError(
                "give one of rank, energy, parameters, speedup; it has "
                f"{', '.join(given) or 'none'}"
            )
        if self.method not in ("svd", "svd+24") or self.prefer not in ("speed", "size"):
            raise ValueError(
                f"method is {self.method!r}, prefer is {self.prefer!r}; the method must be 'svd' "
                "or 'svd+24', prefer 'speed' or 'size'"
            )
        self._ranks()

    def _ranks(self) -> trine.factorize.Ranks:
        kinds = {
            "rank": trine.factorize.Rank,
            "energy": trine.factorize.Energy,
            "parameters": trine.factorize.Parameters,
            "speedup": trine.factorize.Speedup,
        }
        return next(kind(getattr(self, n)) for n, kind in kinds.items() if getattr(self, n))

    def apply(self, model: nn.Module, ground: Ground, folder: Path) -> nn.Module:
        moments = None
        if self.calibrate:
            moments = trine.calibrate(model, ground.inputs(), SecondMoment, batches=self.calibrate)
        method = {"svd": trine.factorize.Svd, "svd+24": trine.factorize.SvdWithSparse24}
        measured = self.prefer == "speed" or self.speedup is not None
        return trine.factorize.factorize(
            model,
            self._ranks(),
            method[self.method](moments),
            layers=self.layers,
            skip=self.skip,
            sample_inputs=ground.samples if measured else None,
        )


@dataclass(frozen=True)
class Prune(Stage):
    """`trine.prune.prune_structured`: really smaller layers, by the magnitude of weights."""

    name = "prune"

    ratio: float | Mapping[str, float]
    kinds: tuple[str, ...] = ("neuron", "channel", "head")
    scope: str = "layer"
    multiple_of: int = 8
    keep: str | Iterable[str] = ()

    def apply(self, model: nn.Module, ground: Ground, folder: Path) -> nn.Module:
        return prune_structured(
            model,
            ground.samples,
            self.ratio,
            kinds=self.kinds,
            scope=self.scope,
            multiple_of=self.multiple_of,
            keep=self.keep,
        )


@dataclass(frozen=True)
class Distill(Stage):
    """Training on the labels and on the answers of the model at the top of the recipe.

    weight: of the teacher's answers against the labels, 0 to 1.
    """

    name = "distill"

    temperature: float = 2.0
    weight: float = 0.5
    training: Training = field(default_factory=Training)

    @classmethod
    def read(cls, said: Any, where: str, example: str) -> Stage:
        given = checked(cls, said, where, example)
        try:
            given["training"] = Training(
                **read_training(given.get("training", {}), f"{where}: training")
            )
            return cls(**given)
        except (TypeError, ValueError) as error:
            raise ValueError(f"{where}: {error}") from None

    def __post_init__(self) -> None:
        if not 0 <= self.weight <= 1 or not self.temperature > 0:
            raise ValueError(
                f"weight is {self.weight}, temperature is {self.temperature}; the weight must be "
                "from 0 to 1, the temperature above 0"
            )

    def apply(self, model: nn.Module, ground: Ground, folder: Path) -> nn.Module:
        distiller = Distiller(
            model,
            Frozen(ground.teacher),
            Together(SoftTargets(self.temperature), Labels()),
            Fixed({"soft": self.weight, "hard": 1 - self.weight}),
            schedule=self._schedule(model, ground),
            training=self.training,
            folder=folder / "training",
            progress=True,
        )
        return distiller.fit(ground.train)

    def _schedule(self, model: nn.Module, ground: Ground) -> QatSchedule | None:
        return None


@dataclass(frozen=True)
class Qat(Distill):
    """`Distill` under quantisation, then `trine.convert`: what is trained is what is served.

    Ranges of activations, and batch norms that are folded, are frozen for the last third.

    linear: as in `trine.Recipe`. pruned_decay: that of SR-STE for layers that become 2:4.
    """

    name = "qat"
    is_last = True

    linear: str | Mapping[str, str] = "int8"
    pruned_decay: float = 2e-4

    def __post_init__(self) -> None:
        super().__post_init__()
        Recipe(self.linear)

    def apply(self, model: nn.Module, ground: Ground, folder: Path) -> nn.Module:
        student = trine.quantize.prepare_qat(
            model, Recipe(self.linear), ground.samples, pruned_decay=float(self.pruned_decay)
        )
        return trine.convert(super().apply(student, ground, folder).eval())

    def _schedule(self, model: nn.Module, ground: Ground) -> QatSchedule | None:
        after = self.training.updates(len(ground.train)) * 2 // 3
        if model.qat_folded:
            return QatSchedule(model, freeze_ranges=after, freeze_batch_norm=after)
        has_ranges = any(isinstance(module, InputRange) for module in model.modules())
        return QatSchedule(model, freeze_ranges=after) if has_ranges else None


@dataclass(frozen=True)
class Compress(Stage):
    """`trine.compress`: packed layers without training, where they are measured to be faster."""

    name = "compress"
    is_last = True

    linear: str | Mapping[str, str] = "int8"
    prefer: str = "speed"

    def __post_init__(self) -> None:
        Recipe(self.linear, self.prefer)

    def apply(self, model: nn.Module, ground: Ground, folder: Path) -> nn.Module:
        return trine.compress(model, Recipe(self.linear, self.prefer), ground.samples)


STAGES: dict[str, type[Stage]] = {
    stage.name: stage for stage in (Prune, Factorize, Distill, Qat, Compress)
}

"""What `trine distill recipe.yaml` asks for: read, checked, and explained where it is wrong."""

from collections.abc import Mapping
from dataclasses import MISSING, asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

from trine.distill.ready_made import ReadyMade, distilbert, minilm, tinybert
from trine.distill.settings import Training

__all__ = ["EXAMPLE", "Data", "DistillationJob"]

EXAMPLE = """\
teacher: ./my-bert          # a classifier of Hugging Face: a folder, or a name on its hub
student: tinybert           # or distilbert, minilm
options: {layers: 4, hidden: 312}      # of the student; may be left out
data:
  train: train.tsv          # .tsv, .csv (with a line of names) or .jsonl
  validation: dev.tsv
  text: sentence            # columns
  label: label              # 0, 1, ...
training: {epochs: 3, learning_rate: 5e-4}
stages:                     # what differs in one of them; may be left out
  inner: {epochs: 10}
out: out/student
"""
STUDENTS = {"distilbert": distilbert, "minilm": minilm, "tinybert": tinybert}


@dataclass(frozen=True)
class Data:
    """Files of labelled sentences."""

    train: Path
    validation: Path
    text: str = "text"
    label: str = "label"
    max_length: int = 128
    batch: int = 32


@dataclass(frozen=True)
class DistillationJob:
    """A whole recipe; paths in it are relative to its file."""

    teacher: str
    student: str
    data: Data
    out: Path
    options: Mapping[str, Any] = field(default_factory=dict)
    training: Training = field(default_factory=Training)
    stages: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)

    @classmethod
    def read(cls, path: Path) -> "DistillationJob":
        """Raises ValueError, naming the place, for what the file should not say or lacks."""
        said = read_yaml(path, EXAMPLE)
        said = checked(cls, said, str(path), EXAMPLE)
        said["data"] = read_data(said["data"], path, EXAMPLE)
        if said["student"] not in STUDENTS:
            raise ValueError(
                f"{path}: student must be one of {', '.join(STUDENTS)}; it is {said['student']!r}"
            )
        if (path.parent / said["teacher"]).exists():
            said["teacher"] = str(path.parent / said["teacher"])
        said["out"] = path.parent / said["out"]
        said["training"] = Training(**read_training(said.get("training", {}), f"{path}: training"))
        said["stages"] = {
            name: read_training(changes, f"{path}: stages: {name}")
            for name, changes in said.get("stages", {}).items()
        }
        settings = {"training": asdict(said["training"])}
        settings |= {f"stages: {name}": changes for name, changes in said["stages"].items()}
        for place, changes in settings.items():
            if changes.get("parallel") == "fsdp":  # a stage's shards are no student for the next
                raise ValueError(
                    f"{path}: {place}: parallel must be auto, none or ddp here, not fsdp; shards "
                    "are for Distiller"
                )
        return cls(**said)

    def make(self, teacher: Any) -> ReadyMade:
        """The student and its stages, of the loaded teacher."""
        try:
            made = STUDENTS[self.student](teacher, **self.options)
        except TypeError as error:
            raise ValueError(f"options of {self.student}: {error}") from None
        names = [stage.name for stage in made.stages]
        for name in self.stages:
            if name not in names:
                raise ValueError(f"{self.student} has no stage {name!r}; it has {', '.join(names)}")
        return made


def read_yaml(path: Path, example: str) -> Any:
    """What a YAML file says. Raises ValueError where there is none."""
    try:
        import yaml
    except ImportError:
        raise ImportError("recipes are YAML: pip install pyyaml") from None
    try:
        return yaml.safe_load(path.read_text())
    except FileNotFoundError:
        raise ValueError(f"there is no file {path}; a recipe looks like\n{example}") from None
    except yaml.YAMLError as error:
        raise ValueError(f"{path} is not YAML: {error}") from None


def read_data(said: Any, path: Path, example: str) -> Data:
    """The files of labelled sentences of a recipe at `path`, which must be there."""
    data = checked(Data, said, f"{path}: data", example)
    for name in ("train", "validation"):
        data[name] = path.parent / data[name]
        if not data[name].exists():
            raise ValueError(f"{path}: data: {name}: there is no file {data[name]}")
    return Data(**data)


def read_training(said: Any, where: str) -> dict[str, Any]:
    """Arguments of `Training`. YAML takes 5e-4 for text, because it has no point."""
    words = {"optimizer", "decay", "precision", "parallel"}
    return {
        name: float(value) if isinstance(value, str) and name not in words else value
        for name, value in checked(Training, said, where, "").items()
    }


def checked(kind: type, said: Any, where: str, example: str) -> dict[str, Any]:
    """What was said, of the fields of a dataclass."""
    if not isinstance(said, Mapping):
        raise ValueError(f"{where} must be a mapping of names to values; it is {said!r}")
    known = {f.name: f for f in fields(kind)}
    for name in said:
        if name not in known:
            raise ValueError(f"{where} has no {name!r}; it has {', '.join(known)}")
    for name, of_kind in known.items():
        needed = of_kind.default is MISSING and of_kind.default_factory is MISSING
        if needed and name not in said:
            raise ValueError(f"{where} lacks {name!r}; a recipe looks like\n{example}")
    return dict(said)

"""What `trine compress recipe.yaml` asks for: read, checked, and explained where it is wrong."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from trine.chain.stages import STAGES, Stage
from trine.distill.recipe_file import Data, checked, read_data, read_yaml

EXAMPLE = """\
model: ./my-bert            # a classifier of Hugging Face: a folder, or a name on its hub
data:
  train: train.tsv          # .tsv, .csv (with a line of names) or .jsonl
  validation: dev.tsv
  text: sentence            # columns
  label: label              # 0, 1, ...
stages:                     # one after the other, in any order; qat or compress come last
  - prune: {ratio: 0.25}                            # heads and neurons; smaller layers
  - factorize: {parameters: 0.7, calibrate: 16, layers: "*.encoder.*"}    # low rank
  - distill: {training: {epochs: 2, learning_rate: 5e-5}}    # the model at the top teaches
  - qat:                    # distillation under quantisation, 2:4 where it says sparse24
      linear: {"*classifier": float, "*.intermediate.*": sparse24-int8, "*": int8}
      training: {epochs: 1, learning_rate: 2e-5}
out: out/small
"""


@dataclass(frozen=True)
class ChainJob:
    """A whole recipe; paths in it are relative to its file."""

    model: str
    data: Data
    stages: tuple[Stage, ...]
    out: Path

    @classmethod
    def read(cls, path: Path) -> ChainJob:
        """Raises ValueError, naming the place, for what the file should not say or lacks."""
        said = checked(cls, read_yaml(path, EXAMPLE), str(path), EXAMPLE)
        said["data"] = read_data(said["data"], path, EXAMPLE)
        if (path.parent / str(said["model"])).exists():
            said["model"] = str(path.parent / said["model"])
        said["stages"] = _stages(said["stages"], f"{path}: stages")
        said["out"] = path.parent / said["out"]
        return cls(**said)


def _stages(said: Any, where: str) -> tuple[Stage, ...]:
    if not isinstance(said, list) or not said:
        raise ValueError(f"{where} must be a list of stages; a recipe looks like\n{EXAMPLE}")
    stages = []
    for number, entry in enumerate(said, 1):
        place = f"{where}: {number}"
        if not isinstance(entry, Mapping) or len(entry) != 1:
            raise ValueError(
                f"{place} must be one name with its settings, as in 'factorize: {{rank: 8}}'; it "
                f"is {entry!r}"
            )
        ((name, settings),) = entry.items()
        if name not in STAGES:
            raise ValueError(f"{place}: {name!r} is no stage; there are {', '.join(STAGES)}")
        stages.append(STAGES[name].read(settings or {}, f"{place}: {name}", EXAMPLE))
        if len(stages) > 1 and stages[-2].is_last:
            raise ValueError(
                f"{place}: {name} cannot follow {stages[-2].name}, whose layers are packed and "
                "train no more"
            )
    return tuple(stages)

"""Trained weights kept in the output folder, so that a job that was killed resumes after them."""

import hashlib
import json
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

PACKAGE = Path(__file__).parents[1]


class Stages:
    """A folder of weights, each with a fingerprint of everything that they follow from.

    Args:
        folder: where they lie; made where it is missing.
        common: what every stage depends on (settings; JSON can hold it). The versions in use and
            trine's own code, compiled and not, are added to it.
        fresh: use nothing that is already there.
    """

    def __init__(self, folder: Path, common: Mapping[str, Any], *, fresh: bool = False) -> None:
        self.folder = folder
        self.fresh = fresh
        folder.mkdir(parents=True, exist_ok=True)
        known = {"settings": common, "torch": torch.__version__, "code": _code_digest()}
        self._fingerprint = hashlib.sha256(json.dumps(known, sort_keys=True).encode()).hexdigest()

    def trained(self, name: str, model: nn.Module, train: Callable[[nn.Module], None]) -> bool:
        """Bring `model` to its trained weights: the kept ones, or by `train(model)`.

        Leaves it in eval mode. Returns whether the weights were kept ones. A file that is damaged
        or was made otherwise counts as absent.
        """
        path = self.folder / f"{name}.safetensors"
        kept = None if self.fresh else self._read(path)
        if kept is None:
            train(model)
            beside = path.with_suffix(".new")
            save_file(model.state_dict(), beside, {"fingerprint": self._fingerprint})
            os.replace(beside, path)
        else:
            model.load_state_dict(kept)
        model.eval()
        return kept is not None

    def _read(self, path: Path) -> dict[str, Tensor] | None:
        try:
            with safe_open(path, framework="pt") as kept:
                if (kept.metadata() or {}).get("fingerprint") != self._fingerprint:
                    return None
                return {name: kept.get_tensor(name) for name in kept.keys()}  # noqa: SIM118
        except (FileNotFoundError, SafetensorError):
            return None


def _code_digest() -> str:
    digest = hashlib.sha256()
    for path in sorted(p for p in PACKAGE.rglob("*") if p.suffix in (".py", ".so")):
        digest.update(path.relative_to(PACKAGE).as_posix().encode())
        digest.update(path.read_bytes())
    return digest.hexdigest()

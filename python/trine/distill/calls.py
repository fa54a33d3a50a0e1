"""How a model is called with a batch."""

import inspect
from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from trine.distill.capture import Capture, unwrapped
from trine.distill.objectives.base import Batch, View

__all__ = ["NOT_FOR_MODELS", "as_batch", "call", "moved"]

# What a batch says to objectives and not to models. Labels stay out, too: models of Hugging Face
# would compute a loss of their own.
NOT_FOR_MODELS = frozenset(
    {"labels", "other_labels", "share", "index", "step", "row_weight", "prompt_ids", "prompt_mask"}
)


def as_batch(batch: Any) -> dict[str, Any]:
    """A loader's batch by name: a mapping as it is, (inputs, labels) as "inputs" and "labels".

    Raises ValueError for anything else.
    """
    if isinstance(batch, Mapping):
        return dict(batch)
    if isinstance(batch, torch.Tensor):
        return {"inputs": batch}
    if isinstance(batch, (tuple, list)) and 1 <= len(batch) <= 2:
        return dict(zip(("inputs", "labels"), batch, strict=False))
    raise ValueError(
        f"a batch must be a mapping or (inputs, labels); the loader gave a {type(batch).__name__}"
        + (f" of {len(batch)}" if isinstance(batch, (tuple, list)) else "")
    )


def call(capture: Capture, batch: Batch) -> tuple[Any, View]:
    """A model's output and view: with batch["inputs"], or with what its forward has names for."""
    if "inputs" in batch:
        return capture(batch["inputs"])
    return capture(**_arguments(unwrapped(capture.model), batch))


def _arguments(model: nn.Module, batch: Batch) -> dict[str, Any]:
    parameters = inspect.signature(model.forward).parameters
    takes_any = any(p.kind is p.VAR_KEYWORD for p in parameters.values())
    arguments = {
        name: value
        for name, value in batch.items()
        if name not in NOT_FOR_MODELS and (takes_any or name in parameters)
    }
    if not arguments:
        raise ValueError(
            f"the batch has nothing that {type(model).__name__}.forward takes "
            f"({', '.join(parameters)}); it has {', '.join(batch)}"
        )
    return arguments


def moved(values: Mapping[str, Any], device: torch.device | str | None) -> dict[str, Any]:
    """All tensors on the device."""
    return {
        name: value.to(device, non_blocking=True) if isinstance(value, torch.Tensor) else value
        for name, value in values.items()
    }

"""What each linear layer is called with in a run over sample inputs."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from trine.calibration.probe import probing, run


@dataclass(frozen=True)
class Call:
    """One way to call a linear layer: with x of that many rows (all but the last dimension)."""

    rows: int
    dtype: torch.dtype
    autocast: torch.dtype | None  # the dtype that autocast imposes on the call, None without it


def call_of(x: Tensor) -> Call:
    """The one that is being made with x."""
    rows, device = x.numel() // x.shape[-1], x.device.type
    enabled = torch.is_autocast_enabled(device)
    return Call(rows, x.dtype, torch.get_autocast_dtype(device) if enabled else None)


def as_batches(sample_inputs: Any) -> list[Any]:
    """The batches in `sample_inputs`: a list is one of batches, anything else is one batch.

    A batch is a tensor (the only argument), a tuple (positional arguments) or a mapping (keyword
    arguments, as tokenizers give). Raises ValueError for anything else, and where there is none.
    """
    batches = list(sample_inputs) if isinstance(sample_inputs, list) else [sample_inputs]
    for batch in batches:
        if not isinstance(batch, Tensor | tuple | Mapping):
            raise ValueError(
                "sample_inputs must be a tensor, a tuple of arguments, a mapping of keyword "
                f"arguments, or a list of such; got {type(batch).__name__}"
            )
    if not batches:
        raise ValueError("sample_inputs is an empty list; compress measures at the shapes in it")
    return batches


def observe(
    model: nn.Module, layers: Mapping[str, nn.Module], batches: list[Any]
) -> dict[str, Counter[Call]]:
    """How often each of `layers` is called with which rows and dtype, over all `batches`.

    The model itself is not run: a copy is (see `trine.calibration.probe.probing`). What the model
    raises comes through.
    """
    calls: dict[str, Counter[Call]] = {name: Counter() for name in layers}

    def count(name: str):
        def hook(module: nn.Module, args: tuple, kwargs: dict) -> None:
            x = args[0] if args else next(iter(kwargs.values()))
            if x.numel():
                calls[name][call_of(x)] += 1

        return hook

    with probing(model) as probe:
        for name in layers:
            probe.get_submodule(name).register_forward_pre_hook(count(name), with_kwargs=True)
        for batch in batches:
            run(probe, batch)
    return calls

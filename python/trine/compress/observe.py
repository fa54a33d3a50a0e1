"""What each layer is called with in a run over sample inputs."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from trine.calibration.probe import probing, run
from trine.compress.layers import signature


@dataclass(frozen=True)
class Call:
    """One way to call a layer.

    rows: of x, all but its last dimension; for an embedding indices, for a convolution images.
    """

    rows: int
    dtype: torch.dtype
    autocast: torch.dtype | None  # the dtype that autocast imposes on the call, None without it
    image: tuple[int, int] | None = None  # height and width, for a convolution
    channels_last: bool = False

    @classmethod
    def of(cls, layer: nn.Module, x: Tensor) -> Call:
        if isinstance(layer, nn.Embedding):
            return cls(x.numel(), x.dtype, None)
        if isinstance(layer, nn.Conv2d):
            last = x.dim() == 4 and x.is_contiguous(memory_format=torch.channels_last)
            last = last and not x.is_contiguous()
            images, size = x.shape[:-3].numel(), tuple(x.shape[-2:])
            return replace(call_of(x), rows=images, image=size, channels_last=last)
        return call_of(x)

    def example(self, layer: nn.Module) -> Tensor:
        """Random data for such a call; the caller's random state stays as it is."""
        generator, device = torch.Generator().manual_seed(0), layer.weight.device
        if isinstance(layer, nn.Embedding):
            v = layer.num_embeddings
            return torch.randint(v, (self.rows,), generator=generator).to(device, self.dtype)
        if isinstance(layer, nn.Conv2d):
            x = torch.randn(self.rows, layer.in_channels, *self.image, generator=generator)
            layout = torch.channels_last if self.channels_last else torch.contiguous_format
            return x.to(device, self.dtype).contiguous(memory_format=layout)
        k = signature(layer)[0]
        return torch.randn(self.rows, k, generator=generator).to(device, self.dtype)


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
                calls[name][Call.of(module, x)] += 1

        return hook

    with probing(model) as probe:
        for name in layers:
            probe.get_submodule(name).register_forward_pre_hook(count(name), with_kwargs=True)
        for batch in batches:
            run(probe, batch)
    return calls

"""The manifest of a checkpoint: what its tensors are and how the model around them is built.

JSON in the header of a safetensors file. `tensors` names every parameter and buffer (those outside
of the state_dict too, since a loaded model must have them) with dtype, shape and sha256; `aliases`
the further names of tied ones; `layers` the packed layers with kind and constructor arguments;
`model` how the rest is built, where that can be described; `edits`, where there are any, what was
changed in the structure that `like` returns; `report` what `compress` recorded, with its recipe.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from trine._C import version
from trine.compress.edits import Edit, recorded
from trine.compress.rebuild import describe
from trine.compress.report import CompressionReport
from trine.nn import PackedLayer, layer_kinds
from trine.quantize.qat_layer import QatLayer

FORMAT = "trine"
FORMAT_VERSION = 1

# What data of another form raises; RuntimeError for sizes beyond 64 bits and for endless nesting.
_MALFORMED = (AttributeError, KeyError, RuntimeError, TypeError, ValueError)


@dataclass(frozen=True)
class Manifest:
    """All of it; see the head of this file."""

    tensors: dict[str, dict[str, Any]]
    aliases: dict[str, str]
    layers: dict[str, PackedLayer]
    model: dict[str, Any] | None
    report: CompressionReport | None
    edits: list[Edit]

    def to_header(self) -> dict[str, str]:
        """The metadata of the safetensors header: one entry, since their order is not kept."""
        data = {
            "format_version": FORMAT_VERSION,
            "trine_version": version,
            "tensors": self.tensors,
            "aliases": self.aliases,
            "layers": {
                name: {"kind": layer.kind, "config": layer.config()}
                for name, layer in self.layers.items()
            },
            "model": self.model,
            "report": None if self.report is None else self.report.to_dict(),
        }
        if self.edits:
            data["edits"] = self.edits
        return {FORMAT: json.dumps({**data, "sha256": _hash_of(data)})}

    @classmethod
    def from_header(cls, metadata: Mapping[str, str] | None) -> Manifest:
        """The manifest in a header, with layers that hold no values yet.

        Raises ValueError where it is none, damaged, malformed or of another version.
        """
        text = (metadata or {}).get(FORMAT)
        if text is None:
            raise ValueError("it is a safetensors file without a manifest, not saved by trine.save")
        try:
            data = json.loads(text)
            intact = data.pop("sha256") == _hash_of(data)
        except _MALFORMED as error:
            raise ValueError(f"its manifest is damaged ({error!r})") from error
        if not intact:
            raise ValueError("its manifest is damaged (the sha256 differs)")
        if data.get("format_version") != FORMAT_VERSION:
            raise ValueError(
                f"it has format version {data.get('format_version')}, written by trine "
                f"{data.get('trine_version')}; this is trine {version}, which reads format version "
                f"{FORMAT_VERSION}"
            )
        try:
            report = data["report"]
            if not isinstance(data.get("edits", []), list):
                raise ValueError("its edits are no list")
            if not set(data["aliases"].values()) <= data["tensors"].keys():
                raise ValueError("an alias is one of no tensor")
            return cls(
                tensors=dict(data["tensors"]),
                aliases=dict(data["aliases"]),
                layers={name: _empty_layer(**entry) for name, entry in data["layers"].items()},
                model=data["model"],
                report=None if report is None else CompressionReport.from_dict(report),
                edits=data.get("edits", []),
            )
        except _MALFORMED as error:
            raise ValueError(f"its manifest is malformed ({error!r})") from error


def _hash_of(data: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(data).encode()).hexdigest()


def _empty_layer(kind: str, config: Mapping[str, Any]) -> PackedLayer:
    if kind not in layer_kinds:
        raise ValueError(f"{kind!r} is no kind of layer here; known are {', '.join(layer_kinds)}")
    return layer_kinds[kind](**config, device="meta")


def manifest_of(model: nn.Module, tensors: Mapping[str, Tensor], aliases: dict) -> Manifest:
    """The manifest of `model`, whose tensors were listed by `tensors_of`."""
    report = getattr(model, "report", None)
    return Manifest(
        tensors={name: tensor_entry(tensor) for name, tensor in tensors.items()},
        aliases=aliases,
        layers={
            name: layer for name, layer in model.named_modules() if isinstance(layer, PackedLayer)
        },
        model=describe(model),
        report=report if isinstance(report, CompressionReport) else None,
        edits=recorded(model) or [],
    )


def tensor_entry(tensor: Tensor) -> dict[str, Any]:
    """Dtype, shape and sha256 of the values of a tensor in main memory."""
    values = tensor.detach().contiguous().reshape(-1).view(torch.uint8).numpy()
    return {**tensor_kind(tensor), "sha256": hashlib.sha256(values).hexdigest()}


def tensor_kind(tensor: Tensor) -> dict[str, Any]:
    """Dtype and shape, as a manifest holds them."""
    return {"dtype": str(tensor.dtype).removeprefix("torch."), "shape": list(tensor.shape)}


def check_savable(model: nn.Module, tensors: Mapping[str, Tensor], aliases: Mapping) -> None:
    """Raises ValueError for what a checkpoint cannot hold."""
    for name, module in model.named_modules():
        if isinstance(module, QatLayer):
            raise ValueError(
                f"save: layer {name!r} is still in training under quantisation; save "
                "trine.convert(model), or torch.save the training state"
            )
    for name, tensor in tensors.items():
        if tensor.is_meta or tensor.is_quantized or tensor.layout is not torch.strided:
            raise ValueError(
                f"save: {name!r} is sparse, quantised by torch or on the meta device; only plain "
                "tensors with values can be saved"
            )
    unknown = model.state_dict().keys() - tensors.keys() - aliases.keys()
    if unknown:
        raise ValueError(
            f"save: the model's state holds {sorted(unknown)[0]!r}, which is no parameter or "
            "buffer; only those can be saved"
        )

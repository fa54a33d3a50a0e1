"""Save a compressed model as one safetensors file, and load it whole or not at all."""

from __future__ import annotations

import os
import secrets
from collections.abc import Callable, Mapping
from os import PathLike
from pathlib import Path

import torch
from torch import Tensor, nn

from trine.compress.edits import apply, restore, skeleton
from trine.compress.layers import (
    close_fast_paths,
    float_layer,
    require_module,
)
from trine.compress.manifest import (
    Manifest,
    check_savable,
    manifest_of,
    tensor_entry,
    tensor_kind,
)
from trine.compress.rebuild import build
from trine.compress.save_pretrained import prepare_save_pretrained
from trine.compress.tensors import tensor_slots, tensors_of
from trine.nn import PackedLayer

# What can be replaced by a packed layer, for messages.
_CALLED = {"Linear": "linear layer", "Conv2d": "convolution", "Embedding": "embedding"}


def save(model: nn.Module, path: str | PathLike) -> None:
    """Write `model` to one safetensors file with a manifest that rebuilds its structure.

    The file at `path` is replaced in one step: whatever happens meanwhile, it is the old one or
    the new one, whole. All parameters and buffers are saved; hooks and the mode are not. A process
    that is killed may leave an unfinished `.NAME.*.part` beside the file, to be deleted by hand
    (where machines share a disk, nobody can tell whether its writer still lives).

    Raises:
        ValueError: the model is still in training under quantisation (`trine.convert` it first),
            holds state other than parameters and buffers, or a tensor that is sparse, quantised by
            torch or on the meta device; safetensors is missing.
        OSError: the file cannot be written.
    """
    require_module(model, "save")
    safetensors = _safetensors()
    tensors, aliases = tensors_of(model)
    check_savable(model, tensors, aliases)
    # Each its own memory: safetensors refuses tensors that overlap, which views of one may.
    values = {name: _in_main_memory(tensor) for name, tensor in tensors.items()}
    manifest = manifest_of(model, values, aliases)

    def write(part: Path) -> None:
        try:
            safetensors.torch.save_file(values, part, manifest.to_header())
        except safetensors.SafetensorError as error:
            raise OSError(f"cannot write {str(path)!r}: {error}") from error

    _write_beside_and_rename(Path(path), write)


def load(path: str | PathLike, *, like: Callable[[], nn.Module] | None = None) -> nn.Module:
    """The model saved at `path`, on the CPU and in evaluation mode; it gives the same bits.

    The whole file and its fit to the model are checked before anything is put into the model.
    Nothing in the file is run.

    Args:
        path: a file written by `save`.
        like: returns the float model, as it was before compression (also before pruning and
            factorising), on the CPU. None where the manifest suffices: for models made of
            nn.Sequential and other common torch.nn modules, and for models of transformers.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: the file is damaged, incomplete, of another format version or no checkpoint of
            trine; the model that `like` returned has other layers, names, shapes, dtypes or ties
            than the one that was saved; `like` is needed; safetensors is missing.
    """
    if isinstance(like, nn.Module):
        raise ValueError("like must be a function that returns the float model, not the model")
    try:
        manifest, values = _read(path)
        return _assemble(manifest, values, like)
    except ValueError as error:
        raise ValueError(f"cannot load {str(path)!r}: {error}") from error


def _safetensors():
    try:
        import safetensors.torch
    except ImportError as error:
        raise ValueError("checkpoints need safetensors; pip install 'trine[checkpoint]'") from error
    return safetensors


def _in_main_memory(tensor: Tensor) -> Tensor:
    return tensor.detach().to("cpu", copy=True, memory_format=torch.contiguous_format)


def _write_beside_and_rename(path: Path, write: Callable[[Path], None]) -> None:
    path = path.resolve()  # through a link, so that the file is replaced and not the link
    part = path.with_name(f".{path.name}.{os.getpid()}.{secrets.token_hex(4)}.part")
    try:
        part.touch()
        mode = part.stat().st_mode
        write(part)
        part.chmod(mode)  # as the user's umask has it, not as the writer left it
        _flush_to_disk(part)
        part.replace(path)
        _flush_to_disk(path.parent)
    finally:
        part.unlink(missing_ok=True)


def _flush_to_disk(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _read(path: str | PathLike) -> tuple[Manifest, dict[str, Tensor]]:
    """The manifest and all tensors, every byte checked against its hash."""
    safetensors = _safetensors()
    try:
        with safetensors.safe_open(path, framework="pt") as file:
            manifest = Manifest.from_header(file.metadata())
            if set(file.keys()) != manifest.tensors.keys():
                names = sorted(set(file.keys()) ^ manifest.tensors.keys())
                raise ValueError(f"file and manifest list different tensors: {', '.join(names)}")
            values = {}
            for name, entry in manifest.tensors.items():
                # A copy: the file stays mapped otherwise, and whoever writes it changes the model.
                values[name] = file.get_tensor(name).clone()
                if tensor_entry(values[name]) != entry:
                    raise ValueError(f"tensor {name!r} is damaged (the sha256 differs)")
    except safetensors.SafetensorError as error:
        raise ValueError(f"it is incomplete or no safetensors file ({error})") from error
    return manifest, values


def _assemble(
    manifest: Manifest, values: Mapping[str, Tensor], like: Callable[[], nn.Module] | None
) -> nn.Module:
    model = _float_model(manifest, like)
    replacements = _replacements(manifest, model)
    # What is built from the manifest has the default dtype, and takes on that of the values.
    _check_fit(manifest, model, replacements, dtypes=like is not None and not manifest.edits)

    model = _replace(model, replacements)
    _fill(model, manifest, values)
    close_fast_paths(model)
    restore(model, manifest.edits)
    prepare_save_pretrained(model)
    if manifest.report is not None:
        model.report = manifest.report
    return model.eval()


def _float_model(manifest: Manifest, like: Callable[[], nn.Module] | None) -> nn.Module:
    if like is None and manifest.model is None:
        raise ValueError(
            "its manifest does not describe the whole model, only its layers; pass "
            "like=a function that returns the float model"
        )
    if like is None:
        # First without memory: the description may ask for no more than what the file holds.
        twin = build(manifest.model, device="meta")
        _check_fit(manifest, twin, _replacements(manifest, twin), dtypes=False)
        return build(manifest.model)
    model = like()
    if not isinstance(model, nn.Module):
        raise ValueError(f"like returned {type(model).__name__}; expected a torch.nn.Module")
    if any(not parameter.is_cpu for parameter in model.parameters()):
        raise ValueError("like must return the model on the CPU; move it after loading")
    if manifest.edits:
        # First without memory, and so that a model that does not fit stays as it is.
        twin = skeleton(model)
        with torch.device("meta"):
            apply(twin, manifest.edits)
        _check_fit(manifest, twin, _replacements(manifest, twin), dtypes=False)
        with torch.random.fork_rng(devices=[]):
            apply(model, manifest.edits)
    return model


def _replacements(manifest: Manifest, model: nn.Module) -> dict[nn.Module, PackedLayer]:
    """The packed layers of the manifest by the float layers whose place they take."""
    modules = dict(model.named_modules())
    replacements = {}
    for name, packed in manifest.layers.items():
        kind, saved = float_layer(packed)
        here = float_layer(modules[name]) if name in modules else None
        if here is None or here[0] != kind:
            raise ValueError(f"the model has no {_CALLED[kind]} {name!r}, but the saved one has")
        for key, value in here[1].items():
            if value != saved[key]:
                raise ValueError(
                    f"layer {name!r} has {key} = {value} in the model, {saved[key]} in the file"
                )
        replacements[modules[name]] = packed
    _tie(manifest)
    return replacements


def _tie(manifest: Manifest) -> None:
    """Have packed layers hold the same tensors where those of the saved model did."""
    for name, first in manifest.aliases.items():
        (path, _, key), (other, _, other_key) = name.rpartition("."), first.rpartition(".")
        if path in manifest.layers and other in manifest.layers:
            mine, theirs = manifest.layers[path]._buffers, manifest.layers[other]._buffers
            if key in mine and other_key in theirs and mine[key].shape == theirs[other_key].shape:
                mine[key] = theirs[other_key]


def _check_fit(
    manifest: Manifest,
    model: nn.Module,
    replacements: Mapping[nn.Module, nn.Module],
    *,
    dtypes: bool,
) -> None:
    """Raises ValueError where the model, with its packed layers, has not just the saved tensors."""
    tensors, aliases = tensors_of(model, replacements)
    here, saved = tensors.keys() | aliases.keys(), manifest.tensors.keys() | manifest.aliases.keys()
    if here != saved:
        name = min(here ^ saved)
        where = "the file" if name in here else "the model"
        raise ValueError(f"{name!r} is missing in {where}; it must be the same float model")
    if aliases != manifest.aliases:
        name = min(set(aliases.items()) ^ set(manifest.aliases.items()))[0]
        raise ValueError(f"{name!r} is tied to another tensor in the model than in the file")
    for name, tensor in tensors.items():
        kind, entry = tensor_kind(tensor), manifest.tensors[name]
        for key in ("shape", "dtype") if dtypes else ("shape",):
            if kind[key] != entry[key]:
                raise ValueError(
                    f"{name!r} has {key} {kind[key]} in the model, {entry[key]} in the file"
                )


def _replace(model: nn.Module, replacements: Mapping[nn.Module, nn.Module]) -> nn.Module:
    if model in replacements:
        return replacements[model]
    for module in list(model.modules()):
        for key, child in module._modules.items():
            if child in replacements:
                module._modules[key] = replacements[child]
    return model


def _fill(model: nn.Module, manifest: Manifest, values: Mapping[str, Tensor]) -> None:
    for name, module, key in tensor_slots(model):
        value = values[manifest.aliases.get(name, name)]
        if key in module._parameters:
            module._parameters[key].data = value  # in place: ties and other references hold
        else:
            module._buffers[key] = value

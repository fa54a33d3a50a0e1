"""Moving outliers from activations into weights, where int8 has room for them."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from itertools import islice
from typing import Any

import torch
from torch import Tensor, nn

# How many linear layers before one are tried as what makes its input: in a gated MLP "up" is the
# last but one before "down", in attention "value" the last before "output".
LOOK_BACK = 3


def smooth(
    model: nn.Module,
    data: Any,
    *,
    alpha: float = 0.5,
    batches: int | None = None,
    progress: Callable[[int], None] = lambda done: None,
) -> nn.Module:
    """A float copy of `model` that computes the same, with inputs that int8 fits better.

    SmoothQuant (Xiao et al. 2023, arXiv:2211.10438): column j of a linear layer's input is divided,
    and column j of its weight multiplied, by

        s_j = max |x_j|^alpha / max |w_j|^(1 - alpha)

    (w_j over all layers that share the input). The division costs nothing where it can be done in
    the weights of what makes the input: a norm (of which only those linear layers read), or a
    linear layer with nothing but scaling or mixing of rows in between (value and output of an
    attention, up and down of a gated MLP). Which those are is found by trying, on the first batch:
    factors that are powers of two leave every bit of the model's outputs where it can be done.

    Args:
        model: any module; it is not touched.
        data: as for `trine.calibrate`.
        alpha: how much of the difficulty moves, in [0, 1]; the paper's 0.5 suits most models.
        batches: how many batches are read at the most; all by default.
        progress: called after each batch with the number that are done.

    Returns:
        The copy, in evaluation mode. Its attribute `smoothed` names the layers whose inputs were
        divided, each with where that is done.

    Raises:
        ValueError: alpha outside [0, 1], no layer that can be smoothed, or as `trine.calibrate`.
    """
    # Imported here because they build on this package.
    from trine.calibration import ColumnRange, calibrate
    from trine.compress.layers import copy_model, linear_layers, obstacles

    if not 0 <= alpha <= 1:
        raise ValueError(f"smooth: alpha is {alpha}; it must lie in [0, 1]")
    blocked = obstacles(model)
    names = [name for name in linear_layers(model) if name not in blocked]
    if isinstance(data, Iterator):
        data = list(islice(data, batches))  # it is read twice
    ranges = calibrate(
        model, data, ColumnRange, layers=names or None, batches=batches, progress=progress
    )
    changed = copy_model(model, {}).eval()
    batch = data if isinstance(data, Tensor | tuple | Mapping) else next(iter(data))
    expected = _outputs(changed, batch)
    draws = torch.Generator().manual_seed(0)
    smoothed: dict[str, str] = {}
    for pair in _pairs(changed, names, batch):
        if smoothed.keys() & set(pair.readers):
            continue
        readers = [changed.get_submodule(name) for name in pair.readers]
        maker = changed.get_submodule(pair.maker)
        before = [copy.deepcopy(layer.state_dict()) for layer in (maker, *readers)]
        _move(_powers_of_two(ranges[pair.readers[0]].absmax, draws), maker, readers)
        same = all(map(torch.equal, _outputs(changed, batch), expected))
        for layer, state in zip((maker, *readers), before, strict=True):
            layer.load_state_dict(state)
        if same:
            _move(_scale(ranges[pair.readers[0]].absmax, readers, alpha), maker, readers)
            expected = _outputs(changed, batch)
            smoothed.update(dict.fromkeys(pair.readers, pair.maker))
    if not smoothed:
        raise ValueError(
            "smooth: no linear layer has an input that the layer before it could divide; quantise "
            "the model without it"
        )
    changed.smoothed = smoothed
    return changed


@dataclass(frozen=True)
class _Pair:
    """Linear layers that read one tensor, and what might divide it."""

    maker: str
    readers: tuple[str, ...]


def _pairs(model: nn.Module, names: list[str], batch: Any) -> Iterator[_Pair]:
    """Candidates, from one run: norms by the very tensor that they give, linear layers by size."""
    made: list[tuple[str, Tensor]] = []  # by norms and linear layers, in order
    read: dict[int, tuple[Tensor, list[str], list[str]]] = {}  # tensor, its readers, makers so far

    def note_output(name: str):
        return lambda module, args, output: made.append((name, output))

    def note_input(name: str):
        def hook(module: nn.Module, args: tuple) -> None:
            if args:
                makers = [maker for maker, _ in made]
                read.setdefault(id(args[0]), (args[0], [], makers))[1].append(name)

        return hook

    hooks = [
        module.register_forward_hook(note_output(name))
        for name, module in model.named_modules()
        if name in names or _is_norm(module)
    ]
    hooks += [model.get_submodule(n).register_forward_pre_hook(note_input(n)) for n in names]
    try:
        _outputs(model, batch)
    finally:
        for hook in hooks:
            hook.remove()
    for tensor, readers, makers in read.values():
        readers = tuple(dict.fromkeys(readers))
        exact = [name for name, output in made if output is tensor]
        before = [name for name in makers if not _is_norm(model.get_submodule(name))]
        for maker in [*exact, *reversed(before[-LOOK_BACK:])]:
            if _width(model.get_submodule(maker)) == tensor.shape[-1]:
                yield _Pair(maker, readers)


def _is_norm(module: nn.Module) -> bool:
    """LayerNorm, RMSNorm, and those of transformers' models: one factor for each column."""
    weight = getattr(module, "weight", None)
    return "Norm" in type(module).__name__ and isinstance(weight, Tensor) and weight.dim() == 1


def _width(maker: nn.Module) -> int:
    """The columns of what it gives."""
    is_rows = isinstance(maker, nn.Linear) or _is_norm(maker)
    return maker.weight.shape[0] if is_rows else maker.weight.shape[1]


def _scale(absmax: Tensor, readers: list[nn.Module], alpha: float) -> Tensor:
    """s [K] in float32; 1 for columns that hold nothing but 0 on one of the sides."""
    from trine.calibration import weight_matrix

    largest = torch.stack([weight_matrix(r).float().abs().amax(0) for r in readers]).amax(0)
    absmax = absmax.float()
    scale = absmax.pow(alpha) / largest.pow(1 - alpha)
    return torch.where((absmax > 0) & (largest > 0), scale, 1.0)


def _powers_of_two(like: Tensor, draws: torch.Generator) -> Tensor:
    """Far enough from 1 that no bend between maker and reader would go unnoticed."""
    exponents = torch.randint(-5, 6, like.shape, generator=draws)
    return torch.exp2(exponents.float()).to(like.device)


@torch.no_grad()
def _move(scale: Tensor, maker: nn.Module, readers: list[nn.Module]) -> None:
    """Divide the columns of what `maker` gives, multiply them in the weights of `readers`."""
    for tensor in (maker.weight, getattr(maker, "bias", None)):
        if tensor is not None:
            is_by_row = tensor.dim() == 2 and isinstance(maker, nn.Linear)
            tensor.copy_(tensor.float() / (scale[:, None] if is_by_row else scale))
    for reader in readers:
        by_column = scale if isinstance(reader, nn.Linear) else scale[:, None]
        reader.weight.copy_(reader.weight.float() * by_column)


def _outputs(model: nn.Module, batch: Any) -> list[Tensor]:
    from torch.utils._pytree import tree_leaves

    from trine.calibration.probe import probing, run

    with probing(model) as probe:
        return [leaf for leaf in tree_leaves(run(probe, batch)) if isinstance(leaf, Tensor)]

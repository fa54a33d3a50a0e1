"""From a float model to one that trains under quantisation."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any

from torch import nn

from trine.quantize.batch_norm import FoldedNorm
from trine.quantize.fold import fold_batch_norm, norms_to_fold
from trine.quantize.groups import misfit, split_group
from trine.quantize.observers import MeanMagnitude, MinMax
from trine.quantize.qat import QatLinear
from trine.quantize.qat_conv import QatConv2d
from trine.quantize.qat_embedding import QatEmbedding
from trine.quantize.qat_layer import QatLayer

if TYPE_CHECKING:
    from trine.compress.recipe import Recipe


def prepare_qat(
    model: nn.Module,
    recipe: Recipe,
    sample_inputs: Any = None,
    *,
    batch_norms: Mapping[str, str] | None = None,
    pruned_decay: float = 0.0,
) -> nn.Module:
    """A copy of `model` whose layers anticipate being packed as `recipe` says.

    The chosen nn.Linear layers become `QatLinear` layers, the chosen nn.Conv2d layers `QatConv2d`,
    the chosen nn.Embedding layers `QatEmbedding`, with the same parameters under the same names; a
    table that an embedding shares with linear layers (see `trine.Recipe`) stays one parameter.
    Train the copy as usual, then call `trine.convert`. Layers that cannot be replaced (their weight
    is shared, computed, or read by another module; their padding has no kernel) and transformers'
    Conv1D stay float; the copy's attribute `qat_skipped` names them with the reason.

    A batch norm that alone reads a chosen layer is folded into its weights, which are quantised as
    folded (see `FoldedNorm`), and an nn.Identity takes its place; the copy's attribute
    `qat_folded` says which. Then, as where activations have one scale, `QatSchedule.step` is to be
    called after each update.

    Args:
        model: any module; it is not touched.
        recipe: its `linear`, `conv` and `embedding` choose for each layer by name; `prefer` has no
            meaning here.
        sample_inputs: data as for `trine.calibrate`, needed where a layer is to be "int8-static" or
            "int8-lsq": it says where the scale of their activations begins. Its first batch shows
            which batch norms can be folded; without it none is, but those of `batch_norms`.
        batch_norms: names of layers, each with that of the batch norm after it, to be folded in
            place of those that `sample_inputs` show; {} for none.
        pruned_decay: of the layers that become 2:4, see `QatLinear`; `trine.prune.sr_ste` uses it.

    Raises:
        ValueError: no layer is left to train under quantisation, a group size does not divide a
            layer's input features, names in `batch_norms` of no such pair, the model cannot be
            copied, sample inputs are missing, or as `trine.calibrate` does.
    """
    # Imported here because trine.compress builds on this package.
    from trine.compress.edits import recorded, restore, skeleton
    from trine.compress.layers import (
        close_fast_paths,
        copy_model,
        linear_layers,
        obstacles,
        obstacles_of,
        require_module,
    )
    from trine.compress.recipe import Recipe
    from trine.compress.ties import tables_of

    require_module(model, "prepare_qat")
    if not isinstance(recipe, Recipe):
        raise ValueError(f"prepare_qat takes a trine.Recipe; got {type(recipe).__name__}")
    replacements: dict[nn.Module, QatLayer] = {}
    copies: Copies = {}
    tables = tables_of(model, recipe)
    skipped: dict[str, str] = dict(tables.left_alone)
    blocked = obstacles(model)
    for name, layer in linear_layers(model).items():
        choice = recipe.choice(name)
        if choice == "float":
            continue
        if name in blocked and name not in tables.followers:
            skipped[name] = blocked[name]
        elif not isinstance(layer, nn.Linear):
            skipped[name] = f"{type(layer).__name__} has no form for training under quantisation"
        else:
            if reason := misfit(choice, layer.in_features):
                raise ValueError(f"prepare_qat: layer {name!r} is to be {choice!r}, but {reason}")
            decay = pruned_decay if "24" in split_group(choice)[0] else 0.0
            replacements[layer] = _qat_linear(layer, choice, decay, copies)
    convolutions = {n: m for n, m in model.named_modules() if type(m) is nn.Conv2d}
    blocked = obstacles_of(model, convolutions)
    for name, layer in convolutions.items():
        choice = recipe.conv_choice(name)
        if choice == "float":
            continue
        try:
            if name in blocked:
                raise ValueError(blocked[name])
            replacements[layer] = _qat_conv(layer, choice, copies)
        except ValueError as reason:
            skipped[name] = str(reason)
    for name in (name for names in tables.together.values() for name in names):
        layer = model.get_submodule(name)
        if isinstance(layer, nn.Embedding):
            replacements[layer] = _qat_embedding(layer, copies)
    if not replacements:
        reasons = "; ".join(f"{name}: {reason}" for name, reason in skipped.items())
        raise ValueError(
            "prepare_qat: the recipe and the model leave no nn.Linear, nn.Conv2d or nn.Embedding "
            "to train under quantisation" + (f" ({reasons})" if reasons else "")
        )
    if isinstance(sample_inputs, Iterator):
        sample_inputs = list(sample_inputs)  # they are read twice
    names = {module: name for name, module in model.named_modules()}
    chosen = {names[layer]: qat for layer, qat in replacements.items()}
    found = norms_to_fold(model, sample_inputs, batch_norms)
    folded = {name: norm for name, norm in found.items() if name in chosen}
    if batch_norms is not None and (odd := batch_norms.keys() - chosen.keys()):
        raise ValueError(
            f"prepare_qat: {min(odd)!r} of batch_norms is no layer to train under quantisation"
        )
    for name, norm in folded.items():
        chosen[name].take_up(FoldedNorm(model.get_submodule(norm)))
    fixed = {name: qat for name, qat in chosen.items() if qat.has_one_input_scale}
    _begin_input_scales(model, fixed, sample_inputs)
    gone = {model.get_submodule(norm): nn.Identity() for norm in folded.values()}
    prepared = copy_model(model, {**replacements, **copies, **gone})
    close_fast_paths(prepared, QatLinear)
    prepared.qat_skipped, prepared.qat_folded = skipped, folded
    if folded:
        twin = fold_batch_norm(skeleton(model), batch_norms=folded)
        restore(prepared, recorded(twin))
    return prepared


# Parameters, and their copies: what several modules share they go on sharing.
Copies = dict[nn.Parameter, nn.Parameter]


def _copied(parameter: nn.Parameter | None, copies: Copies) -> nn.Parameter | None:
    return None if parameter is None else copies.setdefault(parameter, copy.deepcopy(parameter))


def _qat_linear(linear: nn.Linear, choice: str, pruned_decay: float, copies: Copies) -> QatLinear:
    layer = QatLinear(
        linear.in_features,
        linear.out_features,
        linear.bias is not None,
        device="meta",
        choice=choice,
        pruned_decay=pruned_decay,
    )
    layer.to_empty(device=linear.weight.device)
    layer.weight = _copied(linear.weight, copies)
    layer.bias = _copied(linear.bias, copies)
    layer.begin()
    return layer.train(linear.training)


def _qat_conv(conv: nn.Conv2d, choice: str, copies: Copies) -> QatConv2d:
    layer = QatConv2d(
        conv.in_channels,
        conv.out_channels,
        conv.kernel_size,
        conv.stride,
        conv.padding,
        conv.dilation,
        conv.groups,
        conv.bias is not None,
        conv.padding_mode,
        conv.weight.device,
        conv.weight.dtype,
        choice=choice,
    )
    layer.weight = _copied(conv.weight, copies)
    layer.bias = _copied(conv.bias, copies)
    return layer.train(conv.training)


def _qat_embedding(embedding: nn.Embedding, copies: Copies) -> QatEmbedding:
    layer = QatEmbedding(
        embedding.num_embeddings,
        embedding.embedding_dim,
        embedding.padding_idx,
        scale_grad_by_freq=embedding.scale_grad_by_freq,
        sparse=embedding.sparse,
        device="meta",
    )
    layer.weight = _copied(embedding.weight, copies)
    return layer.train(embedding.training)


def _begin_input_scales(model: nn.Module, layers: dict[str, QatLayer], sample_inputs: Any) -> None:
    """Set the ranges and steps of the activations of `layers` to what the model's samples show."""
    if not layers:
        return
    if sample_inputs is None:
        raise ValueError(
            f"prepare_qat: layer {next(iter(layers))!r} gets one scale for its activations; give "
            "sample_inputs, from which it is found"
        )
    from trine.calibration import Several, calibrate  # they build on this package, too

    seen = calibrate(
        model,
        sample_inputs,
        lambda: Several(ends=MinMax(), magnitude=MeanMagnitude()),
        layers=layers,
    )
    for name, layer in layers.items():
        layer.begin_input(*seen[name].ends.range(), seen[name].magnitude.mean)

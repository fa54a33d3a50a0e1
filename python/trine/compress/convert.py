"""From a model trained under quantisation to one that serves packed weights."""

from torch import nn

from trine.compress.edits import record, skeleton
from trine.compress.layers import copy_model, require_module
from trine.compress.packed_copy import packed_copy
from trine.compress.ties import share_tables
from trine.quantize.qat_layer import QatLayer


def convert(model: nn.Module) -> nn.Module:
    """A copy of `model` in which every layer in training under quantisation is the packed one.

    (`QatLinear`, `QatConv2d` or `QatEmbedding`, each the layer that it stands for, with the bias of
    the batch norm that it has taken up; a table that several layers share is packed once.) Nothing
    else changes, and `model` is not touched. In evaluation mode both give the same bits.

    Raises:
        ValueError: the model holds no QatLinear, a weight holds NaN or infinity, the model cannot
            be copied, a weight is sharded over processes, or a batch norm that a layer has taken
            up was trained without `QatSchedule`.
    """
    require_module(model, "convert")
    layers = {name: m for name, m in model.named_modules() if isinstance(m, QatLayer)}
    if not layers:
        raise ValueError(
            "convert: the model holds no QatLinear; make one with trine.quantize.prepare_qat, or "
            "use trine.compress on a model that was trained in float"
        )
    packed = {layer: _pack(name, layer) for name, layer in layers.items()}
    share_tables(packed)
    small = packed_copy(model, packed)
    record(_in_floats(model), small)
    return small


def _in_floats(model: nn.Module) -> nn.Module:
    """The structure that was trained, without values: a float layer for each one in training."""
    twin = skeleton(model)
    layers = {m: m.float_layer() for m in twin.modules() if isinstance(m, QatLayer)}
    return copy_model(twin, layers)


def _pack(name: str, layer: QatLayer) -> nn.Module:
    try:
        if hasattr(layer.weight, "full_tensor"):
            raise ValueError(
                "its weight is spread over processes; load the full state "
                "(torch.distributed.checkpoint.state_dict) into a model of prepare_qat in one "
                "process, and convert that"
            )
        if layer.norm is not None:
            layer.norm.require_moved()
        return layer.pack()
    except ValueError as error:
        raise ValueError(f"convert: layer '{name}': {error}") from error

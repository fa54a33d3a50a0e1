"""From a model trained under quantisation to one that serves packed weights."""

from torch import nn

from trine.compress.layers import require_module
from trine.compress.packed_copy import packed_copy
from trine.quantize.qat_layer import QatLayer


def convert(model: nn.Module) -> nn.Module:
    """A copy of `model` in which every layer in training under quantisation is the packed one.

    (`QatLinear` or `QatConv2d`, each the layer that it stands for.) Nothing else changes, and
    `model` is not touched. In evaluation mode both give the same bits.

    Raises:
        ValueError: the model holds no QatLinear, a weight holds NaN or infinity, or the model
            cannot be copied.
    """
    require_module(model, "convert")
    layers = {name: m for name, m in model.named_modules() if isinstance(m, QatLayer)}
    if not layers:
        raise ValueError(
            "convert: the model holds no QatLinear; make one with trine.quantize.prepare_qat, or "
            "use trine.compress on a model that was trained in float"
        )
    packed = {layer: _pack(name, layer) for name, layer in layers.items()}
    return packed_copy(model, packed)


def _pack(name: str, layer: QatLayer) -> nn.Module:
    try:
        return layer.pack()
    except ValueError as error:
        raise ValueError(f"convert: layer '{name}': {error}") from error

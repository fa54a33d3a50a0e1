"""From a model trained under quantisation to one that serves packed weights."""

from torch import nn

from trine.compress.layers import (
    close_fast_paths,
    copy_model,
    require_module,
)
from trine.compress.save_pretrained import prepare_save_pretrained
from trine.quantize.qat import QatLinear


def convert(model: nn.Module) -> nn.Module:
    """A copy of `model` in which every `QatLinear` is the packed layer that it stands for.

    Nothing else changes, and `model` is not touched. In evaluation mode both give the same bits.

    Raises:
        ValueError: the model holds no QatLinear, a weight holds NaN or infinity, or the model
            cannot be copied.
    """
    require_module(model, "convert")
    layers = {name: m for name, m in model.named_modules() if isinstance(m, QatLinear)}
    if not layers:
        raise ValueError(
            "convert: the model holds no QatLinear; make one with trine.quantize.prepare_qat, or "
            "use trine.compress on a model that was trained in float"
        )
    packed = {layer: _pack(name, layer) for name, layer in layers.items()}
    converted = copy_model(model, packed)
    close_fast_paths(converted)
    prepare_save_pretrained(converted)
    return converted


def _pack(name: str, layer: QatLinear) -> nn.Module:
    try:
        return layer.pack()
    except ValueError as error:
        raise ValueError(f"convert: layer '{name}': {error}") from error

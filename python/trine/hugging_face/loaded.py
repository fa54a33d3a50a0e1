"""Whether transformers' loading reached every tensor of the packed layers."""

from torch import nn

from trine.nn import PackedLayer


def check_loaded(model: nn.Module) -> None:
    """Raises ValueError naming a tensor of a packed layer that no checkpoint held.

    transformers itself only warns, and leaves what lay in memory.
    """
    for name, layer in model.named_modules():
        if not isinstance(layer, PackedLayer):
            continue
        for key, tensor in layer.named_buffers():
            if not getattr(tensor, "_is_hf_initialized", False):  # its mark of what was loaded
                raise ValueError(
                    f"{name}.{key} is missing in the checkpoint, or could not be read; without it "
                    "the layer would compute nonsense"
                )

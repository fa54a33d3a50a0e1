"""Tensors that packed layers share, where transformers knows of tied weights.

It ties parameters: it saves one of them, and ties the others to it after loading. Packed tensors
are buffers, which it saves by the same rule but cannot tie, so that this is done here.
"""

from __future__ import annotations

from transformers import PreTrainedModel

from trine.nn import PackedLayer

# Of an embedding and of an output layer that is tied to it.
_SHARED = ("packed_weight", "weight_scale")

Ties = dict[str, str]  # names of tensors, as transformers has them: the tied one, the one it is


def _ties(model: PreTrainedModel) -> tuple[Ties, Ties]:
    """The ties of parameters that are left, and those of packed tensors.

    A tied bias is none any more: a packed layer has its own.
    """
    packed = {name for name, m in model.named_modules() if isinstance(m, PackedLayer)}
    left: Ties = {}
    of_packed: Ties = {}
    for target, source in model.all_tied_weights_keys.items():
        (layer, _, key), (other, _, _) = target.rpartition("."), source.rpartition(".")
        if layer not in packed:
            left[target] = source
        elif key in _SHARED:
            of_packed[target] = source
        elif key == "weight" and other in packed:
            of_packed |= {f"{layer}.{name}": f"{other}.{name}" for name in _SHARED}
    return left, of_packed


def declare_ties(model: PreTrainedModel) -> None:
    """Have save_pretrained write each shared tensor once."""
    left, of_packed = _ties(model)
    _set(model, left | {t: s for t, s in of_packed.items() if _same(model, t, s)})


def hide_ties(model: PreTrainedModel) -> Ties:
    """Of a model that is to be loaded: take away what the checkpoint holds under another name."""
    left, of_packed = _ties(model)
    for target in of_packed:
        layer, _, key = target.rpartition(".")
        model.get_submodule(layer)._non_persistent_buffers_set.add(key)
    model.all_tied_weights_keys = left
    return of_packed


def restore_ties(model: PreTrainedModel, ties: Ties) -> None:
    """Have the loaded model share what `hide_ties` took away."""
    for target, source in ties.items():
        layer, _, key = target.rpartition(".")
        module = model.get_submodule(layer)
        module._non_persistent_buffers_set.discard(key)
        setattr(module, key, model.get_buffer(source))
    _set(model, model.all_tied_weights_keys | ties)


def _same(model: PreTrainedModel, target: str, source: str) -> bool:
    return model.get_buffer(target) is model.get_buffer(source)


def _set(model: PreTrainedModel, ties: Ties) -> None:
    if ties != model.all_tied_weights_keys or any(key.endswith(_SHARED) for key in ties):
        model._tied_weights_keys, model.all_tied_weights_keys = ties, dict(ties)

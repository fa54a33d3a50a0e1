"""A copy of a model that serves packed layers, whatever chose them."""

from __future__ import annotations

from collections.abc import Mapping

from torch import nn

from trine.compress.layers import close_fast_paths, copy_model
from trine.compress.save_pretrained import prepare_save_pretrained


def packed_copy(model: nn.Module, packed: Mapping[nn.Module, nn.Module]) -> nn.Module:
    """A copy of `model` with packed layers in place of some of its own.

    What would leave them aside is closed: the fast path of torch's encoder layers, and a
    save_pretrained that could not be read again. Raises ValueError where it cannot be copied.
    """
    copied = copy_model(model, packed)
    close_fast_paths(copied)
    prepare_save_pretrained(copied)
    return copied

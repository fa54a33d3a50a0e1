"""What a mask chooses, by bits: PyTorch's `masked_fill_` and `where` in a fraction of the time that
they take on the CPU, where they go through a bool mask element by element."""

import torch
from torch import Tensor

_INTEGERS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}  # by bytes


def clear(tensor: Tensor, mask: Tensor) -> None:
    """tensor[mask] = 0, whatever is there; `mask` is bool, of the same shape."""
    if _has_integers(tensor):
        bits, all_or_none = _bits(tensor, mask)
        bits.bitwise_and_(all_or_none.bitwise_not_())
    else:
        tensor.masked_fill_(mask, 0)


def put(tensor: Tensor, mask: Tensor, values: Tensor) -> None:
    """tensor[mask] = values[mask]; `mask` is bool and `values` numbers, of the same shape."""
    if _has_integers(tensor):
        bits, all_or_none = _bits(tensor, mask)
        differing = bits ^ values.to(tensor.dtype).view(bits.dtype)
        bits.bitwise_xor_(differing.bitwise_and_(all_or_none))
    else:
        tensor.copy_(torch.where(mask, values, tensor))


def _has_integers(tensor: Tensor) -> bool:
    return tensor.device.type == "cpu" and tensor.element_size() in _INTEGERS


def _bits(tensor: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
    """The tensor's own memory as integers, and integers of all bits where the mask is true, none
    elsewhere."""
    integer = _INTEGERS[tensor.element_size()]
    return tensor.view(integer), mask.to(integer).neg_()

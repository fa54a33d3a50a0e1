"""What a mask chooses, by bits: PyTorch's `masked_fill_` and `where` in a fraction of the time that
they take on the CPU, where they go through a bool mask element by element."""

import torch
from torch import Tensor

_INTEGERS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}  # by bytes


def clear(mask: Tensor, *tensors: Tensor) -> None:
    """tensor[mask] = 0, whatever is there; `mask` is bool, of the shape of each tensor."""
    bits: dict[torch.dtype, Tensor] = {}  # where the mask is false
    for tensor in tensors:
        if _has_integers(tensor):
            integer = _INTEGERS[tensor.element_size()]
            if integer not in bits:
                bits[integer] = mask.to(integer).sub_(1)
            tensor.view(integer).bitwise_and_(bits[integer])
        else:
            tensor.masked_fill_(mask, 0)


def only(mask: Tensor, tensor: Tensor) -> Tensor:
    """A new tensor with 0 where `mask`, bool of the same shape, is false."""
    if not _has_integers(tensor):
        return torch.where(mask, tensor, 0)
    integer = _INTEGERS[tensor.element_size()]
    return mask.to(integer).neg_().bitwise_and_(tensor.view(integer)).view(tensor.dtype)


def put(mask: Tensor, tensor: Tensor, values: Tensor) -> None:
    """tensor[mask] = values[mask]; `mask` is bool and `values` numbers, of the same shape."""
    if _has_integers(tensor):
        integer = _INTEGERS[tensor.element_size()]
        bits = tensor.view(integer)
        differing = bits ^ values.to(tensor.dtype).view(integer)
        bits.bitwise_xor_(differing.bitwise_and_(mask.to(integer).neg_()))
    else:
        tensor.copy_(torch.where(mask, values, tensor))


def _has_integers(tensor: Tensor) -> bool:
    return tensor.device.type == "cpu" and tensor.element_size() in _INTEGERS

"""Tensors with nothing behind them: one byte read too far ends the process."""

import ctypes
import mmap

import torch
from torch import Tensor

_libc = ctypes.CDLL(None, use_errno=True)
_PROT_NONE = 0


def at_end_of_memory(tensor: Tensor) -> Tensor:
    """A contiguous copy of `tensor` whose last byte is followed by a page that cannot be read."""
    size = tensor.numel() * tensor.element_size()
    usable = -(-size // mmap.PAGESIZE) * mmap.PAGESIZE
    memory = mmap.mmap(-1, usable + mmap.PAGESIZE)
    start = ctypes.addressof(ctypes.c_char.from_buffer(memory))
    if _libc.mprotect(ctypes.c_void_p(start + usable), mmap.PAGESIZE, _PROT_NONE) != 0:
        raise OSError(ctypes.get_errno(), "mprotect failed")
    copy = torch.frombuffer(
        memory, dtype=tensor.dtype, count=tensor.numel(), offset=usable - size
    ).reshape(tensor.shape)
    return copy.copy_(tensor)

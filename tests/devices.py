"""The GPU that tests run on, and tensors moved there as they lie in memory."""

import functools
import importlib
import os
from collections.abc import Callable

import torch
from torch import Tensor
from torch.utils._pytree import tree_map_only
from trine import _C, _library

# "cpu" tries the tests themselves where there is no GPU.
DEVICE = os.environ.get("TRINE_TEST_DEVICE", "cuda")
ABSENT = "torch sees no CUDA device"


def is_visible() -> bool:
    return DEVICE != "cuda" or torch.cuda.is_available()


def devices_to_test(op: str) -> list[str]:
    """The device, where it is there and compiled kernels of `op` run on it."""
    compiled = f" {op}/" in _C.cuda_kernels
    loaded = DEVICE != "cuda" or _library.cuda_library.loaded
    return [DEVICE] if compiled and loaded and is_visible() else []


def moved(tensor: Tensor, device: str = DEVICE) -> Tensor:
    """`tensor` on `device` with the same strides and offset, so in an equal block of memory."""
    if tensor.requires_grad or tensor.numel() == 0:
        return tensor.to(device)
    block = torch.empty(0, dtype=tensor.dtype).set_(tensor.untyped_storage())
    on_device = block.to(device, copy=True)
    return on_device.as_strided(tensor.size(), tensor.stride(), tensor.storage_offset())


def all_moved(arguments: object, device: str = DEVICE) -> object:
    return tree_map_only(Tensor, lambda tensor: moved(tensor, device), arguments)


def on_device(op: Callable, device: str = DEVICE) -> Callable:
    """`op` as a function of tensors on the CPU that runs on `device`."""

    @functools.wraps(op)
    def run(*arguments, **options):
        result = op(*all_moved(arguments, device), **all_moved(options, device))
        return tree_map_only(Tensor, Tensor.cpu, result)

    return run


def smallest_tiles(put: Callable = setattr) -> None:
    """Keeps Triton from measuring which tiles are fastest: that takes seconds at each shape, and
    changes no bit. These are those that every GPU has the memory for."""
    for op in (
        "int8_linear",
        "int8_weight_linear",
        "int8_conv2d",
        "ternary_linear",
        "sparse24_linear",
    ):
        tuned = importlib.import_module(f"trine.ops.{op}.triton")._tuned
        put(tuned, "configs", tuned.configs[:1])

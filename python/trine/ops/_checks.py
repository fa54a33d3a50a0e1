"""What the fakes of the ops check alike, and what an op says where it has no kernel."""

import torch
from torch import Tensor
from torch.autograd import forward_ad

FLOAT_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def check_rows(op: str, x: Tensor, max_k: int | None = None) -> None:
    """Raise ValueError unless `x` is floating and [..., K] with K <= `max_k`."""
    if x.dtype not in FLOAT_DTYPES:
        raise ValueError(
            f"{op}: x must be float32, bfloat16 or float16, it is {x.dtype}; convert it with .to()"
        )
    if x.dim() == 0:
        raise ValueError(f"{op}: x must have at least one dimension, [..., K]; it is a scalar")
    if max_k is not None:
        _check_k(op, x.shape[-1], max_k)


def _check_k(op: str, k: int, max_k: int) -> None:
    if k > max_k:
        raise ValueError(f"{op}: K = {k} exceeds {max_k}, beyond which int32 sums could overflow")


def check_quantized_rows(
    op: str, q: Tensor, scale: Tensor, sum: Tensor, dtype: torch.dtype, max_k: int
) -> None:
    """Raise ValueError unless these are what `quantize_rows` gives, with K <= `max_k`."""
    if q.dim() != 2 or q.dtype != torch.int8:
        raise ValueError(f"{op}: q must be int8 [M, K]")
    for name, tensor, expected in (("scale", scale, torch.float32), ("sum", sum, torch.int32)):
        if tensor.dim() != 1 or tensor.shape[0] != q.shape[0] or tensor.dtype != expected:
            kind = str(expected).removeprefix("torch.")
            raise ValueError(f"{op}: {name} must be {kind} [{q.shape[0]}], one value per row of q")
    if dtype not in FLOAT_DTYPES:
        raise ValueError(f"{op}: dtype must be float32, bfloat16 or float16, it is {dtype}")
    _check_k(op, q.shape[1], max_k)


def check_groups(op: str, weight_scale: Tensor, k: int) -> None:
    """Raise ValueError unless the columns of `weight_scale` [N, groups] cut K into such groups."""
    groups = weight_scale.shape[1]
    if groups == 0 or k == 0 or k % groups or k // groups % 64:
        raise ValueError(
            f"{op}: weight_scale has {groups} groups per row, which must cut K = {k} into groups "
            "of a multiple of 64 values"
        )


def check_one_device(op: str, *tensors: Tensor | None) -> None:
    """Raise ValueError unless all tensors are on one device.

    Where one is on the meta device PyTorch calls the fake, whose result on another device would be
    uninitialised memory.
    """
    devices = {t.device for t in tensors if t is not None}
    if len(devices) > 1:
        names = " and ".join(sorted(map(str, devices)))
        raise ValueError(f"{op}: all tensors must be on one device, they are on {names}")


def in_forward_mode() -> bool:
    """Whether tensors may carry tangents (torch.func.jvp, torch.autograd.forward_ad)."""
    return forward_ad._current_level >= 0


def refuse_tangents(op: str, *tensors: Tensor | None) -> None:
    """Raise NotImplementedError for a tensor with a tangent: PyTorch would drop it silently."""
    if any(t is not None and forward_ad.unpack_dual(t).tangent is not None for t in tensors):
        raise NotImplementedError(
            f"{op} has no forward-mode derivative; take it in backward mode (torch.autograd.grad)"
        )


def explain_missing_kernel(op: str) -> None:
    """Make `op` say in one sentence where it has no kernel; PyTorch would list dispatch keys.

    PyTorch calls the default kernel where the tensors' backend has none of its own, so that no
    other call takes longer.
    """

    def refuse(*args, **kwargs):
        tensors = [a for a in (*args, *kwargs.values()) if isinstance(a, Tensor)]
        check_one_device(op, *tensors)
        for t in tensors:
            if t.layout != torch.strided or t.is_quantized:
                kind = "quantized" if t.is_quantized else t.layout
                raise ValueError(
                    f"{op}: all tensors must be dense, one is {kind}; convert it with .to_dense() "
                    "or .dequantize()"
                )
        raise ValueError(
            f"{op} has no kernel for the device '{tensors[0].device.type}' here; move the tensors "
            "to the CPU, or see trine.backends.describe()"
        )

    torch.library.impl(f"trine::{op}", "default", refuse)

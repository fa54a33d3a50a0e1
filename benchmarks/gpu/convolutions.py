"""Convolutions on the GPU: bf16, channels last, against torch's own in the same layout."""

from collections.abc import Sequence
from functools import partial

import torch
from torch import Tensor
from torch.nn import functional
from trine.nn import Int8Conv2d
from trine.ops import int8_conv2d
from trine.ops.int8_conv2d import reference

from benchmarks.case import Comparison, WrongResult, relative_error
from benchmarks.ceilings import Work
from benchmarks.gpu.entries import Entries, kernel_of, rotated_copies
from benchmarks.measure import Call

OP = "int8_conv2d"
NAMES = ("batch", "channels", "out_channels", "kernel", "groups", "stride", "side")
Shape = tuple[int, int, int, int, int, int, int]


def comparison(shape: Shape, device: str, rotated: int) -> Comparison:
    """Of one layer, padded by half of its kernel; quantising is included."""
    batch, channels, out_channels, kernel, groups, stride, side = shape
    conv = torch.nn.Conv2d(
        channels, out_channels, kernel, stride, kernel // 2, groups=groups, bias=False
    ).to(device, torch.bfloat16)
    conv = conv.to(memory_format=torch.channels_last)
    x = torch.randn(batch, channels, side, side, device=device).bfloat16()
    x = x.contiguous(memory_format=torch.channels_last)
    layer = Int8Conv2d.from_conv(conv)
    options = {"stride": layer.stride, "padding": layer.padding, "groups": groups}
    y = conv(x)
    macs = y.numel() * channels // groups * kernel**2
    moved = x.nbytes + y.nbytes
    entries = Entries(dict(zip(NAMES, shape, strict=True)))

    def ours() -> tuple[list[Call], float]:
        arguments = (x, layer.packed_weight, layer.weight_scale)
        actual = int8_conv2d(*arguments, **options)
        if not torch.equal(actual, reference.int8_conv2d(*arguments, **options)):
            raise WrongResult(f"{OP} differs from its definition")
        calls = [
            partial(int8_conv2d, *copy, **options) for copy in rotated_copies(arguments, rotated)
        ]
        return calls, relative_error(actual, y.double())

    def theirs(dtype: torch.dtype) -> tuple[Sequence[Call], None]:
        def run(x: Tensor, weight: Tensor) -> Tensor:
            return functional.conv2d(x, weight, **options)

        given = tuple(t.detach().to(dtype) for t in (x, conv.weight))
        return [partial(run, *copy) for copy in rotated_copies(given, rotated)], None

    about = dict(op=OP, rivals=("conv2d bf16", "conv2d fp16"), baseline="conv2d bf16")
    work = Work(bytes_moved=moved + layer.packed_weight.nbytes, int8_ops=2 * macs)
    entries.enter(OP, work, ours, kernel=kernel_of(OP), **about)
    work = Work(bytes_moved=moved + conv.weight.nbytes, bf16_ops=2 * macs)
    for name, dtype in (("conv2d bf16", torch.bfloat16), ("conv2d fp16", torch.float16)):
        entries.enter(name, work, partial(theirs, dtype))
    return entries.comparison()

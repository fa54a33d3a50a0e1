"""int8_conv2d against torch.nn.Conv2d in fp32 and bf16, alternating; quantising is included.

python -m benchmarks.bench_int8_conv2d [--threads 1]
"""

import argparse
from functools import partial

import pytest
import torch
from rich.console import Console
from torch import Tensor, nn
from trine.evaluate.latency import alternate
from trine.nn import Int8Conv2d
from trine.ops import int8_conv2d
from trine.ops.int8_conv2d import reference

from benchmarks.case import WrongResult, kernel_of
from benchmarks.table import number, table_of

# Batch, channels, output channels, kernel, groups, stride, height and width: ResNet's layers at 224
# pixels, those of a small one at 32, and depthwise ones as MobileNet has them.
SHAPES = (
    (1, 3, 64, 7, 1, 2, 224),
    (1, 64, 64, 3, 1, 1, 56),
    (1, 64, 256, 1, 1, 1, 56),
    (1, 128, 128, 3, 1, 1, 28),
    (1, 256, 256, 3, 1, 1, 14),
    (1, 256, 512, 1, 1, 1, 14),
    (1, 512, 512, 3, 1, 1, 7),
    (32, 16, 16, 3, 1, 1, 32),
    (32, 64, 64, 3, 1, 1, 8),
    (1, 128, 128, 3, 128, 1, 28),
    (32, 96, 96, 3, 96, 1, 16),
)


def layers(shape: tuple[int, ...]) -> tuple[nn.Conv2d, Int8Conv2d, Tensor]:
    """The dense layer, ours, and an input; raises WrongResult where ours is not its definition."""
    batch, channels, out_channels, kernel, groups, stride, side = shape
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        conv = nn.Conv2d(channels, out_channels, kernel, stride, kernel // 2, groups=groups)
        x = torch.randn(batch, channels, side, side)
    ours = Int8Conv2d.from_conv(conv)
    arguments = (x, ours.packed_weight, ours.weight_scale, ours.bias)
    options = {"stride": ours.stride, "padding": ours.padding, "groups": groups}
    if not torch.equal(
        int8_conv2d(*arguments, **options), reference.int8_conv2d(*arguments, **options)
    ):
        raise WrongResult("int8_conv2d differs from its definition")
    return conv, ours, x


def operations(shape: tuple[int, ...]) -> int:
    batch, channels, out_channels, kernel, groups, stride, side = shape
    return 2 * batch * out_channels * channels // groups * kernel**2 * (side // stride) ** 2


@torch.inference_mode()
def main() -> None:
    summary, _, example = __doc__.partition("\n\n")
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.bench_int8_conv2d", description=summary, epilog=example
    )
    parser.add_argument("--threads", type=int, default=1)
    torch.set_num_threads(parser.parse_args().threads)
    heads = ("us", "GOP/s", "channels last", "fp32", "bf16", "x fp32", "x bf16")
    title = f"int8_conv2d ({kernel_of('int8_conv2d')}), {torch.get_num_threads()} threads: us"
    table = table_of(title, ("B, C, N, kernel, groups, stride, side",), heads)
    for shape in SHAPES:
        conv, ours, x = layers(shape)
        calls = {
            "ours": partial(ours, x),
            "last": partial(ours, x.contiguous(memory_format=torch.channels_last)),
            "fp32": partial(conv, x),
            "bf16": partial(layers(shape)[0].bfloat16(), x.bfloat16()),
        }
        seconds = alternate(calls, rounds=15, sample_seconds=2e-3)
        us = {name: 1e6 * value for name, value in seconds.items()}
        table.add_row(
            ", ".join(map(str, shape)),
            number(us["ours"]),
            number(operations(shape) / us["ours"] / 1e3),
            *(number(us[name]) for name in ("last", "fp32", "bf16")),
            *(number(us[name] / us["ours"], 2) for name in ("fp32", "bf16")),
        )
    Console(width=130).print(table)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_int8_conv2d(benchmark, shape):
    _, ours, x = layers(shape)
    with torch.inference_mode():
        benchmark(ours, x)


if __name__ == "__main__":
    main()

"""int8_conv2d's CUDA kernels, run on the CPU: right in every schedule, planted bugs are caught."""

import functools
import random
import struct
from dataclasses import dataclass

import numpy as np
import pytest
import torch
from cuda_kernels import BY_SCHEDULE, Mutant
from cuda_trials import Trial, assert_caught, outcomes
from linear_inputs import DTYPES
from test_int8_conv2d import inputs
from torch import Tensor
from trine.ops.int8_conv2d import reference

SEEDS = (1, random.SystemRandom().randrange(2, 2**31))  # a failure names its seed
# (B, C, N, kernel, groups, stride, padding, dilation, H, W). The emulation's GPU has 5
# multiprocessors: that many large tiles of y are taken for large ones.
SHAPES = (
    (1, 1, 1, (1, 1), 1, (1, 1), (0, 0), (1, 1), 1, 1),
    # Words of a few channels, as in a first layer: one step of 64 values, several, many taps.
    (2, 3, 5, (3, 3), 1, (1, 1), (1, 1), (1, 1), 4, 3),
    (1, 20, 33, (2, 3), 1, (2, 1), (0, 2), (1, 2), 6, 5),
    (1, 2, 4, (7, 7), 1, (3, 2), (3, 3), (1, 1), 5, 6),
    # Whole units: more steps than stages; steps that begin in the midst of a tap; three tiles.
    (1, 16, 20, (3, 3), 1, (1, 1), (1, 1), (1, 1), 3, 4),
    (1, 48, 70, (3, 2), 1, (1, 2), (1, 0), (2, 1), 5, 4),
    (2, 16, 40, (1, 1), 1, (1, 1), (0, 0), (1, 1), 7, 11),
    # Groups, of words and of units.
    (1, 6, 9, (2, 2), 3, (1, 1), (1, 0), (1, 1), 3, 3),
    (1, 32, 68, (1, 2), 2, (1, 1), (0, 1), (1, 1), 2, 3),
    (1, 4, 8, (3, 3), 4, (2, 2), (1, 1), (1, 1), 5, 5),  # two outputs for each channel
    # Large tiles.
    (1, 16, 65, (1, 1), 1, (1, 1), (0, 0), (1, 1), 23, 23),
    # Depthwise: a part of a block of channels and several, pixels of several blocks.
    (2, 3, 3, (3, 3), 3, (1, 1), (1, 1), (1, 1), 5, 4),
    (1, 37, 37, (3, 2), 37, (2, 1), (2, 1), (1, 2), 7, 6),
    (1, 16, 16, (1, 1), 16, (1, 1), (0, 0), (1, 1), 17, 16),
)


@dataclass(frozen=True)
class ConvCase:
    shape: tuple
    x: Tensor
    packed_weight: Tensor
    weight_scale: Tensor
    bias: Tensor | None
    options: dict

    def encode(self) -> bytes:
        b, c, n, kernel, groups, stride, padding, dilation, height, width = self.shape
        sizes = (c, height, width, n, groups, *kernel, *stride, *padding, *dilation)
        bias_type = -1 if self.bias is None else DTYPES.index(self.bias.dtype)
        flags = (self.channels_last, "input_scale" in self.options, bias_type)
        x = self.x.permute(0, 2, 3, 1) if self.channels_last else self.x
        tensors = [x, self.packed_weight, self.weight_scale]
        tensors += [] if self.bias is None else [self.bias]
        tensors += [
            self.options[k] for k in ("input_scale", "input_zero_point") if k in self.options
        ]
        raw = [t.contiguous().view(-1).view(torch.uint8).numpy().tobytes() for t in tensors]
        numbers = (DTYPES.index(self.x.dtype), b, *sizes, *flags)
        return struct.pack(f"<{len(numbers)}q", *numbers) + b"".join(raw)

    @property
    def channels_last(self) -> bool:
        return not self.x.is_contiguous()

    def decode(self, answer: bytes) -> list[Tensor]:
        (expected,) = self.expected
        y = torch.from_numpy(np.frombuffer(answer, np.uint8).copy()).view(expected.dtype)
        if not self.channels_last:
            return [y.reshape(expected.shape)]
        return [y.reshape(expected.permute(0, 2, 3, 1).shape).permute(0, 3, 1, 2)]

    @functools.cached_property
    def expected(self) -> list[Tensor]:
        arguments = (self.x, self.packed_weight, self.weight_scale, self.bias)
        return [reference.int8_conv2d(*arguments, **self.options)]


def case(shape, dtype=torch.float32, bias=True, static=False, channels_last=False) -> ConvCase:
    arguments, options = inputs(shape, dtype, bias, static, channels_last)
    return ConvCase(shape, *arguments, options)


@functools.cache
def cases() -> list[ConvCase]:
    """Small ones first: most bugs show there."""
    torch.manual_seed(0)
    made = []
    for i, shape in enumerate(SHAPES):
        made.append(case(shape, DTYPES[i % 3], i % 2 == 0, i % 3 == 1, i % 4 < 2))
        if shape[0] > 1:
            made.append(case(shape, DTYPES[(i + 1) % 3], i % 2 == 1, i % 3 != 1, i % 4 >= 2))
    for static in (False, True):  # what stands in for a number, zeros, and a scale far off
        bad = case((5, 4, 6, (2, 2), 1, (1, 1), (1, 1), (1, 1), 3, 3), static=static)
        bad.x[1], bad.x[2, 0, 0, 0], bad.x[3, 1, 2, 2] = 0, torch.nan, torch.inf
        bad.x[4] *= 1e30
        made.append(bad)
    # An image that several blocks search for its largest magnitude, which is in its last part.
    long = case((1, 1, 1, (1, 1), 1, (9, 90), (0, 0), (1, 1), 10, 901))
    long.x[0, 0, -1, -1] = 50
    made.append(long)
    return sorted(made, key=lambda one: one.expected[0].numel() * one.packed_weight.numel())


@pytest.fixture(scope="module")
def outcome(request):
    yield from outcomes(request, lambda _: cases())


@pytest.mark.parametrize("trial", [Trial("int8_conv2d", seeds=SEEDS)], ids=str)
def test_matches_reference(trial, outcome):
    outcome(trial)


PRODUCT, IMAGES = "int8_conv2d/cuda.cu", "int8_conv2d/images.cuh"
DEPTHWISE, PATCHES = "int8_conv2d/depthwise.cuh", "int8_conv2d/patches.cuh"
# What it shares with the linear layers has its bugs planted there.
MUTANTS = (
    Mutant(
        "k's of a fragment swapped", PRODUCT, "8 * step + 4 * half +", "8 * step + 4 - 4 * half +"
    ),
    Mutant("wrong place in a unit", PRODUCT, "at % kCopyBytes),\n", "0),\n"),
    Mutant(
        "patches behind the last read",
        PRODUCT,
        "patch[round] != nullptr && k < values",
        "k < values",
        "outside of|far from",
    ),
    Mutant(
        "weight blocks behind the last read",
        PRODUCT,
        "block < blocks && from < block_bytes",
        "from < block_bytes",
        "outside of the weight",
    ),
    Mutant(
        "behind the end of a weight block",
        PRODUCT,
        "block < blocks && from < block_bytes",
        "block < blocks",
        "outside of the weight",
    ),
    Mutant(
        "channels of the next group",
        PRODUCT,
        "conv.linear.m - m0, in_group - n0,",
        "conv.linear.m - m0, shape.out_channels - n0,",
        BY_SCHEDULE,
    ),
    Mutant("group of the image forgotten", PRODUCT, "group * shape.group_bytes", "0"),
    Mutant(
        "group of the weight forgotten", PRODUCT, "weight + group * blocks * block_bytes", "weight"
    ),
    Mutant("group of the result forgotten", PRODUCT, "= group * in_group + n0 + n", "= n0 + n"),
    Mutant("scale of the first image", PRODUCT, "sum, row.image, column", "sum, 0, column"),
    Mutant(
        "half a weight summed",
        PRODUCT,
        "at += kSumThreads * kBytes",
        "at += 2 * kSumThreads * kBytes",
    ),
    Mutant("sums read too early", PRODUCT, "= sum;\n  __syncthreads();", "= sum;"),
    Mutant(
        "channels behind the last summed",
        PRODUCT,
        "if (n < in_group) minus",
        "minus",
        "outside of the column|the column .* was overrun",
    ),
    Mutant(
        "stride of the other side",
        PATCHES,
        "pixel.y * shape.stride_h",
        "pixel.y * shape.stride_w",
        BY_SCHEDULE,
    ),
    Mutant(
        "dilation forgotten",
        PATCHES,
        "y * shape.dilation_h * shape.row_bytes",
        "y * shape.row_bytes",
    ),
    Mutant("depthwise: mask forgotten", DEPTHWISE, "taps & 0xffu << 8 * c", "taps >> 8 * c"),
    Mutant(
        "depthwise: pixels behind the last written",
        DEPTHWISE,
        "if (m >= conv.linear.m) continue;",
        "",
        "outside of",
    ),
    Mutant(
        "depthwise: channels behind the last written",
        DEPTHWISE,
        "if (n >= conv.linear.n) continue;",
        "",
        "outside of|was overrun",
    ),
    Mutant("padding is 0", IMAGES, "uint32_t bits = uint32_t(zero_point)", "uint32_t bits = 0"),
    Mutant(
        "largest of the first image", IMAGES, "images.most[image * kConvMostParts +", "images.most["
    ),
    Mutant("channels of the next group read", IMAGES, "first + j < of_group", "true", BY_SCHEDULE),
    Mutant("NaN let through", IMAGES, "finite ? *images.input_scale", "true ? *images.input_scale"),
)


@pytest.mark.parametrize("trial", [Trial("int8_conv2d", bug) for bug in MUTANTS], ids=str)
def test_planted_bug_is_caught(trial, outcome):
    assert_caught(trial, outcome)

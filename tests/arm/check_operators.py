"""Every op on Arm's instruction sets, under qemu-aarch64, against the references in plain PyTorch.

`make test-arm` builds the program and runs this. This machine's compiled library plays no part.
"""

import importlib
import struct
import subprocess
import sys
import types
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cache
from itertools import product
from pathlib import Path

import pytest
import torch
from torch import Tensor

ROOT = Path(__file__).parents[2]
PROGRAM = ROOT / "build/arm/operators"
sys.path.insert(0, str(ROOT / "tests"))


def reference(op: str) -> types.ModuleType:
    """The reference of `op`, without the packages around it, which load the compiled library."""
    for name in ("trine", "trine.ops", *(f"trine.ops.{op}" for op in OPS)):
        if name not in sys.modules:
            sys.modules[name] = types.ModuleType(name)
            sys.modules[name].__path__ = [str(ROOT / "python" / name.replace(".", "/"))]
    return importlib.import_module(f"trine.ops.{op}.reference")


OPS = (
    "quantize_rows",
    "norm_quantize_rows",
    "int8_conv2d",
    "int8_embedding",
    "int8_linear",
    "int8_weight_linear",
    "ternary_linear",
    "sparse24_linear",
    "ternary24_linear",
    "softmax_kl",
)
(
    quantize_rows,
    norms,
    int8_conv2d,
    int8_embedding,
    int8_linear,
    int8_weight_linear,
    ternary_linear,
    sparse24_linear,
    ternary24_linear,
    softmax_kl,
) = map(reference, OPS)
CODES = importlib.import_module("trine.ops.activation").CODES
pack_conv2d = importlib.import_module("trine.ops.int8_conv2d.pack").pack_conv2d

# Only now: it imports a reference, too.
from linear_inputs import (  # noqa: E402
    DTYPES,
    SHAPES,
    assert_same_bits,
    assert_within_sum_bound,
    difficult_rows,
)

# ---- calls ----

# As the program numbers them.
TYPES = (
    *(torch.uint8, torch.int8, torch.int32, torch.float16, torch.float32, torch.bfloat16),
    *(torch.int64, torch.bool),
)


@dataclass
class Call:
    """A call of an op, and what must hold of its results."""

    op: str
    tensors: tuple[Tensor | None, ...]
    check: Callable[..., None]
    numbers: tuple[float, ...] = ()
    strings: tuple[str, ...] = ()
    threads: int = 1

    def __str__(self) -> str:
        shapes = [t if t is None else f"{t.dtype}{list(t.shape)}" for t in self.tensors]
        return f"{self.op} {shapes} {self.numbers} {self.threads} threads"

    def encoded(self) -> bytes:
        parts = [of_string(self.op), of_integers(self.threads, len(self.tensors))]
        parts += [of_tensor(tensor) for tensor in self.tensors]
        parts += [of_integers(len(self.numbers)), *(struct.pack("d", x) for x in self.numbers)]
        parts += [of_integers(len(self.strings)), *map(of_string, self.strings)]
        return b"".join(parts)


def of_integers(*values: int) -> bytes:
    return struct.pack(f"{len(values)}q", *values)


def of_string(text: str) -> bytes:
    return of_integers(len(text)) + text.encode()


def of_tensor(tensor: Tensor | None) -> bytes:
    if tensor is None:
        return of_integers(-1)
    sizes, strides = tensor.shape, tensor.stride()
    reached = 1 + sum((size - 1) * stride for size, stride in zip(sizes, strides, strict=True))
    values = tensor.as_strided((reached if tensor.numel() else 0,), (1,))
    data = values.clone().view(torch.uint8).numpy().tobytes()
    header = of_integers(TYPES.index(tensor.dtype), len(sizes), *sizes, *strides, len(data))
    return header + data


def as_tensor(data: bytes, like: Tensor) -> Tensor:
    values = torch.frombuffer(bytearray(data), dtype=like.dtype) if data else like.new_empty(0)
    return values.view(like.shape)


def same_bits(*expected: Tensor) -> Callable[..., None]:
    def check(*results: bytes) -> None:
        for result, value in zip(results, expected, strict=True):
            assert_same_bits(as_tensor(result, value), value)

    return check


# ---- inputs ----

# Every height of a tile of rows, more rows than one tile or panel takes, several blocks and slices.
MORE_SHAPES = (
    *((m, 19, 100) for m in range(1, 35)),
    (2, 40, 130),
    (9, 300, 64),
    (30, 37, 4200),
    (1, 18, 8300),
    (64, 50, 320),
)


def padded(x: Tensor) -> Tensor:
    """Equal to `x`, with NaN between its rows."""
    rows = torch.full((x.shape[0], x.shape[1] + 3), torch.nan, dtype=x.dtype)
    rows[:, : x.shape[1]] = x
    return rows[:, : x.shape[1]]


def linear_cases() -> Iterator[tuple[tuple[int, int, int], torch.dtype, bool, int]]:
    """Shapes with a dtype, whether there is a bias, and a number of threads."""
    for i, (shape, dtype) in enumerate(product(SHAPES, DTYPES)):
        yield shape, dtype, i % 2 == 0, 1 + i % 3
    for i, shape in enumerate(MORE_SHAPES):
        yield shape, DTYPES[i % 3], i % 2 == 0, 1 + i % 4


def activated_cases() -> Iterator[tuple[str, tuple]]:
    """Some of those cases, of all kinds, with each activation."""
    for i, case in enumerate(linear_cases()):
        if i % 2 == 0:
            yield [*CODES][i // 2 % 3], case


def code_of(activation: str | None) -> tuple[float]:
    return (float(CODES.get(activation, 0)),)


def calls_of_quantize_rows() -> Iterator[Call]:
    for dtype in DTYPES:
        for m, k in ((1, 1), (3, 7), (2, 8), (5, 37), (4, 64), (3, 1001), (0, 5), (2, 0)):
            x = padded(torch.randn(m, k).to(dtype))
            yield Call("quantize_rows", (x,), same_bits(*quantize_rows.quantize_rows(x)))
        for k in (1, 16, 45):
            x = difficult_rows(k, dtype)
            yield Call("quantize_rows", (x,), same_bits(*quantize_rows.quantize_rows(x)))


def calls_of_norm_quantize_rows() -> Iterator[Call]:
    def call(norm: str, *arguments, threads: int = 1) -> Call:
        op = f"{norm}_norm_quantize_rows"
        check = same_bits(*getattr(norms, op)(*arguments))
        *tensors, eps = arguments
        return Call(op, tuple(tensors), check, (eps,), threads=threads)

    shapes = ((1, 1), (3, 7), (2, 8), (5, 37), (4, 64), (3, 1001), (2, 8200), (0, 5), (2, 0))
    for norm, count in (("rms", 1), ("layer", 2)):
        for dtype in DTYPES:
            for m, k in shapes:
                x, *rest, eps = norms.example_inputs(norm, m, k, dtype)
                yield call(norm, padded(x), *rest, eps, threads=1 + m % 3)
                yield call(norm, x, *(None for _ in rest), eps)
            for k in (1, 16, 45):
                yield call(norm, difficult_rows(k, dtype), *torch.randn(count, k), 0.0)


def on_rows(call: Call, x: Tensor) -> Call:
    """The same call of a linear op, of rows quantised before."""
    tensors = (*quantize_rows.quantize_rows(x), *call.tensors[1:4])
    numbers = (float(TYPES.index(x.dtype)), *call.numbers)
    return Call(f"{call.op}_rows", tensors, call.check, numbers, threads=call.threads)


def calls_of_int8_linear() -> Iterator[Call]:
    def call(x, packed, scale, bias=None, static=None, threads=1, activation=None) -> Call:
        tensors, options = (x, packed, scale, bias, None, None), {}
        if static is not None:
            input_scale, zero_point = torch.tensor(static[0]), torch.tensor(static[1]).int()
            tensors = (x, packed, scale, bias, input_scale, zero_point)
            options = {"input_scale": input_scale, "input_zero_point": zero_point}
        y = int8_linear.int8_linear(x, packed, scale, bias, **options, activation=activation)
        return Call("int8_linear", tensors, same_bits(y), code_of(activation), threads=threads)

    for shape, dtype, bias, threads in linear_cases():
        x, *weight = int8_linear.example_inputs(*shape, dtype, bias)
        yield (dynamic := call(x, *weight, threads=threads))
        yield on_rows(dynamic, x)
        yield call(padded(x), *weight, (0.03, 5), threads)
    for activation, (shape, dtype, bias, threads) in activated_cases():
        x, *weight = int8_linear.example_inputs(*shape, dtype, bias)
        yield (dynamic := call(x, *weight, threads=threads, activation=activation))
        yield on_rows(dynamic, x)
    values = torch.cat([torch.linspace(-14, 14, 999), torch.tensor([torch.nan, torch.inf, -0.0])])
    nothing, ones = torch.zeros(len(values), 16, dtype=torch.int8), torch.ones(len(values))
    for activation in CODES:
        yield call(ones[None, :16], nothing, ones, values, activation=activation)
    for k, dtype in product((1, 37, 130), DTYPES):
        _, *weight = int8_linear.example_inputs(1, 7, k, dtype)
        for static in (None, (0.5, -128), (0.02, 100)):
            yield call(difficult_rows(k, dtype), *weight, static)
    packed = torch.full((5, 2048), -127, dtype=torch.int8)
    for m in (1, 4, 20):  # the largest products that there are
        yield call(torch.full((m, 2048), 3.0), packed, torch.ones(5))
        yield call(torch.full((m, 2048), -300.0), packed, torch.ones(5), None, (1.0, 127))


def calls_of_int8_weight_linear() -> Iterator[Call]:
    def call(x, packed, scale, bias=None, threads=1) -> Call:
        y = int8_weight_linear.int8_weight_linear(x, packed, scale, bias)
        dense = int8_weight_linear.dequantised(packed, scale, x.shape[1])
        magnitude = x.double().abs() @ dense.abs().T
        unscaled = x.double().abs() @ packed[:, : x.shape[1]].double().abs().T

        def check(result: bytes) -> None:
            assert_within_sum_bound(as_tensor(result, y), y, magnitude, x.shape[1], unscaled)

        return Call("int8_weight_linear", (x, packed, scale, bias), check, threads=threads)

    for shape, dtype, bias, threads in linear_cases():
        x, *weight = int8_weight_linear.example_inputs(*shape, dtype, bias)
        yield call(padded(x) if bias else x, *weight, threads=threads)
    for m, n, k, groups in ((1, 5, 64, 1), (2, 17, 256, 4), (7, 33, 384, 3), (30, 20, 1280, 20)):
        for dtype in DTYPES:
            inputs = int8_weight_linear.example_inputs(m, n, k, dtype, True, groups)
            yield call(*inputs, threads=m % 3 + 1)
    for k, dtype, repeats in product((1, 37, 130), DTYPES, (1, 5)):
        _, *weight = int8_weight_linear.example_inputs(1, 7, k, dtype)
        yield call(difficult_rows(k, dtype).repeat(repeats, 1), *weight)


def calls_of_int8_conv2d() -> Iterator[Call]:
    """General, depthwise, grouped; both orders in memory; dynamic and static activations."""
    shapes = (  # B, C, N, kernel, groups, stride, padding, dilation, H, W
        (2, 3, 20, (3, 3), 1, (1, 1), (1, 1), (1, 1), 9, 7),
        (1, 21, 40, (3, 2), 1, (2, 1), (1, 0), (1, 2), 8, 9),
        (1, 37, 37, (5, 5), 37, (2, 2), (2, 2), (1, 1), 11, 10),
        (2, 12, 24, (3, 3), 3, (1, 1), (1, 1), (2, 2), 9, 9),
    )
    for shape, dtype, last, static in product(shapes, DTYPES, (False, True), (False, True)):
        b, c, n, kernel, groups, stride, padding, dilation, height, width = shape
        weight = torch.randint(-127, 128, (n, c // groups, *kernel), dtype=torch.int8)
        x = torch.randn(b, c, height, width).to(dtype)
        x[-1, 0, 0, 0] *= 100
        fixed = (torch.tensor([0.03]), torch.tensor([-7], dtype=torch.int32))
        arguments = (pack_conv2d(weight, groups), torch.rand(n) / 64, torch.randn(n))
        options = {"stride": stride, "padding": padding, "dilation": dilation, "groups": groups}
        if static:
            options |= {"input_scale": fixed[0], "input_zero_point": fixed[1]}
        y = int8_conv2d.int8_conv2d(x, *arguments, **options)
        if last:
            x, y = (t.permute(0, 2, 3, 1).contiguous() for t in (x, y))
        numbers = tuple(map(float, (*stride, *padding, *dilation, groups, last)))
        tensors = (x, *arguments, *(fixed if static else (None, None)))
        threads = 3 if last else 1
        yield Call("int8_conv2d", tensors, same_bits(y), numbers, threads=threads)


def calls_of_int8_embedding() -> Iterator[Call]:
    sizes, indices = (0, 1, 7, 8, 9, 16, 37, 130), (torch.int64, torch.int32)
    for d, dtype, index in product(sizes, DTYPES, indices):
        *tensors, d, dtype = int8_embedding.example_inputs((9,), 5, d, dtype, index)
        y = int8_embedding.int8_embedding(*tensors, d, dtype)
        numbers = (float(d), float(TYPES.index(dtype)))
        yield Call("int8_embedding", tuple(tensors), same_bits(y), numbers, threads=1 + d % 3)


def calls_of_ternary_linear() -> Iterator[Call]:
    def call(x, packed, scale, bias=None, threads=1, activation=None) -> Call:
        y = ternary_linear.ternary_linear(x, packed, scale, bias, activation=activation)
        tensors, code = (x, packed, scale, bias), code_of(activation)
        return Call("ternary_linear", tensors, same_bits(y), code, threads=threads)

    for shape, dtype, bias, threads in linear_cases():
        for scale_shape in ((), None):
            x, *weight = ternary_linear.example_inputs(*shape, dtype, bias, scale_shape)
            yield (called := call(padded(x) if bias else x, *weight, threads=threads))
            yield on_rows(called, x)
    for m, n, k, groups in ((1, 5, 64, 1), (2, 17, 256, 4), (7, 33, 384, 3), (20, 20, 1280, 20)):
        for dtype in DTYPES:
            inputs = ternary_linear.example_inputs(m, n, k, dtype, True, (n, groups))
            yield call(*inputs, threads=m % 3 + 1)
            yield call(*inputs, activation=[*CODES][m % 3])
    for activation, (shape, dtype, bias, threads) in activated_cases():
        x, *weight = ternary_linear.example_inputs(*shape, dtype, bias)
        yield (called := call(x, *weight, threads=threads, activation=activation))
        yield on_rows(called, x)
    for k, dtype in product((1, 37, 130), DTYPES):
        _, *weight = ternary_linear.example_inputs(1, 7, k, dtype)
        yield call(difficult_rows(k, dtype), *weight)
    packed = torch.full((5, 512), -0x55555556, dtype=torch.int32)
    for m in (1, 4, 20):  # the largest sums that there are: all codes 2
        yield call(torch.full((m, 8192), 3.0), packed, torch.ones(5))


def calls_of_sparse24_linear() -> Iterator[Call]:
    def call(x, values, indices, bias=None, scale=None, threads=1) -> Call:
        y = sparse24_linear.sparse24_linear(x, values, indices, bias, weight_scale=scale)
        check = within_bound(x, values, indices, y) if scale is None else same_bits(y)
        tensors = (x, values, indices, bias, scale)
        return Call("sparse24_linear", tensors, check, threads=threads)

    for i, (shape, dtype, bias, threads) in enumerate(linear_cases()):
        for values_dtype in (DTYPES[i % 3], torch.int8):
            inputs = sparse24_linear.example_inputs(*shape, dtype, values_dtype, bias)
            (x, *weight), scale = inputs
            yield call(padded(x), *weight, scale.get("weight_scale"), threads)
    for k, dtype, integer, repeats in product((1, 37, 130), DTYPES, (False, True), (1, 5)):
        inputs = sparse24_linear.example_inputs(1, 7, k, dtype, torch.int8 if integer else dtype)
        (_, *weight), scale = inputs
        yield call(difficult_rows(k, dtype).repeat(repeats, 1), *weight, scale.get("weight_scale"))


def calls_of_ternary24_linear() -> Iterator[Call]:
    def call(x, packed, scale, bias=None, threads=1) -> Call:
        y = ternary24_linear.ternary24_linear(x, packed, scale, bias)
        return Call("ternary24_linear", (x, packed, scale, bias), same_bits(y), threads=threads)

    for shape, dtype, bias, threads in linear_cases():
        for scale_shape in ((), None):
            x, *weight = ternary24_linear.example_inputs(*shape, dtype, bias, scale_shape)
            yield call(padded(x) if bias else x, *weight, threads=threads)
    for k, dtype in product((1, 37, 130), DTYPES):
        _, *weight = ternary24_linear.example_inputs(1, 7, k, dtype)
        yield call(difficult_rows(k, dtype), *weight)
    # The largest sums that there are: two values of 1 in every group.
    packed = torch.tensor([0x08, 0x82, 0x20], dtype=torch.uint8).repeat(5, 512)
    for m in (1, 4, 20):
        yield call(torch.full((m, 8192), 3.0), packed, torch.ones(5))


def within_bound(x: Tensor, values: Tensor, indices: Tensor, expected: Tensor):
    magnitude = sparse24_linear.sparse_product(x.abs(), values.abs(), indices)

    def check(result: bytes) -> None:
        assert_within_sum_bound(as_tensor(result, expected), expected, magnitude, x.shape[1])

    return check


def calls_of_softmax_kl() -> Iterator[Call]:
    for i, (n, temperature) in enumerate(product((1, 7, 8, 9, 100, 511, 512, 513, 1300), (1, 4))):
        for j, dtype in enumerate(DTYPES):
            student, teacher = softmax_kl.example_inputs(3, classes=n)
            student, teacher = padded(student.to(dtype)), teacher.to(DTYPES[(i + j) % 3])
            yield softmax_kl_call(student, teacher, temperature, 1 + j)
    for offset in (1e4, -1e4):
        student, teacher = softmax_kl.example_inputs(4, classes=3000)
        yield softmax_kl_call(student + offset, teacher - offset, 2.0)
        rising = torch.linspace(-1, 1, 3000)
        yield softmax_kl_call(student + offset * rising, teacher + rising, 1.0)
    for i, (divergence, n) in enumerate(product(softmax_kl.DIVERGENCES, (1, 9, 100, 1300))):
        student, teacher = (z.to(DTYPES[i % 3]) for z in softmax_kl.example_inputs(3, classes=n))
        yield softmax_kl_call(student, teacher, 2.0, 1, divergence, 0.3)
        labels = torch.randint(n, (3,))
        yield softmax_kl_call(student, teacher, 2.0, 1, divergence, 0.3, labels, None, 0.1, 1.5, 9)
        k = min(n, 5)
        indices = torch.rand(3, n).argsort(1)[:, :k].contiguous()
        known = torch.log_softmax(teacher.float(), -1).gather(1, indices)
        yield softmax_kl_call(student, known, 2.0, 1, divergence, 0.3, labels, indices)
    # A row in three parts, which the threads share.
    yield softmax_kl_call(*softmax_kl.example_inputs(1, classes=40000), 2.0, 2)
    yield same_logits_call()
    yield special_rows_call()


def softmax_kl_call(
    student,
    teacher,
    temperature,
    threads=1,
    divergence="forward_kl",
    beta=0.5,
    labels=None,
    indices=None,
    smoothing=0.0,
    scale=1.0,
    cap=0.0,
) -> Call:
    s, t = (logits.double().requires_grad_() for logits in (student, teacher))
    options = (None, None, temperature, divergence, beta, smoothing, student.shape[-1])
    terms = softmax_kl.rows(s, t, indices, labels, *options, scale, cap, scale, cap, False)
    sum(term.sum() for term in terms).backward()
    terms = [term.detach() for term in terms]

    def check(*results: bytes) -> None:
        for result, term in zip(results, terms, strict=False):
            actual = as_tensor(result, term.float()).double()
            assert (actual - term).norm() <= 1e-5 * term.norm() + 1e-6
        assert_gradient(as_tensor(results[2], student), s.grad)
        if indices is None:
            assert_gradient(as_tensor(results[3], teacher), t.grad)

    upstream = (torch.ones_like(term, dtype=torch.float32) for term in terms)
    tensors = (*upstream, student, teacher, indices, labels)
    numbers = (float(temperature), beta, smoothing, scale, cap)
    return Call("softmax_kl", tensors, check, numbers, (divergence,), threads)


def assert_gradient(actual: Tensor, truth: Tensor) -> None:
    """Within 1e-5 of the truth's norm, beside what rounding to a 16-bit dtype must lose."""
    wide = actual.dtype == torch.float32
    unavoidable = 0 if wide else (truth.to(actual.dtype).double() - truth).norm()
    assert (actual.double() - truth).norm() <= 1e-5 * truth.norm() + 1.1 * unavoidable + 1e-7


def unlabelled_call(student, teacher, temperature, check) -> Call:
    tensors = (torch.ones(len(student)), torch.empty(0), student, teacher, None, None)
    numbers = (temperature, 0.5, 0.0, 1.0, 0.0)
    return Call("softmax_kl", tensors, check, numbers, ("forward_kl",))


def same_logits_call() -> Call:
    """No divergence, and no gradient, exactly."""
    logits, _ = softmax_kl.example_inputs(4, classes=1001)
    check = same_bits(torch.zeros(4), torch.zeros(0), torch.zeros(4, 1001), torch.zeros(4, 1001))
    return unlabelled_call(logits, logits, 3.0, check)


def special_rows_call() -> Call:
    """NaN, +inf or nothing but -inf spoil their row and no other; -inf in both costs nothing."""
    student, teacher = softmax_kl.example_inputs(6, classes=21)
    student[0, 3], teacher[1, 20], student[2] = torch.nan, torch.inf, -torch.inf
    student[3, 5] = -torch.inf
    student[4, 2] = teacher[4, 2] = -torch.inf
    expected = softmax_kl.softmax_kl(student, teacher, 1.0, "none")
    expected[:4] = torch.tensor([torch.nan, torch.nan, torch.nan, torch.inf])

    def check(*results: bytes) -> None:
        losses = as_tensor(results[0], expected.float()).double()
        torch.testing.assert_close(losses, expected, rtol=1e-5, atol=0, equal_nan=True)
        for result in results[2:]:
            gradient = as_tensor(result, student)
            assert gradient[:3].isnan().all()
            assert gradient[4:].isfinite().all()

    return unlabelled_call(student, teacher, 1.0, check)


# ---- running them ----

# What a processor of each kind can run; qemu's `max` has everything.
PROCESSORS = {
    "cortex-a53": ["scalar", "neon"],
    "neoverse-n1": ["scalar", "neon", "dotprod"],
    "max": ["scalar", "neon", "dotprod", "i8mm"],
}
# Which kernels each op has.
FLOAT, INTEGER = ["scalar", "neon"], ["scalar", "dotprod", "i8mm"]
KERNELS = {
    "quantize_rows": FLOAT,
    "norm_quantize_rows": FLOAT,
    "softmax_kl": FLOAT,
    "sparse24_linear (float values)": FLOAT,
    "sparse24_linear (int8 values)": INTEGER,
    "int8_conv2d": ["scalar", "dotprod"],
    "int8_embedding": FLOAT,
    "int8_linear": INTEGER,
    "int8_weight_linear": FLOAT,
    "ternary_linear": INTEGER,
    "ternary24_linear": INTEGER,
}


def emulate(cpu: str, *arguments: str | Path) -> str:
    command = ["qemu-aarch64", "-cpu", cpu, str(PROGRAM), *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, f"{' '.join(command)}: status {done.returncode}, {done.stderr}"
    return done.stdout


@pytest.mark.parametrize("cpu", PROCESSORS)
def test_kernels_are_chosen_by_what_the_processor_has(cpu):
    isas, *chosen = emulate(cpu).splitlines()
    assert isas.split() == PROCESSORS[cpu]
    assert dict(line.split(": ") for line in chosen) == {
        op: [isa for isa in kernels if isa in PROCESSORS[cpu]][-1]
        for op, kernels in KERNELS.items()
    }


@cache
def calls_of(op: str) -> list[Call]:
    torch.manual_seed(0)
    return list(globals()[f"calls_of_{op}"]())


def decoded(data: bytes) -> Iterator[list[bytes]]:
    """The results of each call in turn."""
    at = 0

    def take(size: int) -> bytes:
        nonlocal at
        at += size
        return data[at - size : at]

    def integer() -> int:
        return struct.unpack("q", take(8))[0]

    while at < len(data):
        yield [take(integer()) for _ in range(integer())]


# Each set on a processor that has no more.
@pytest.mark.parametrize("cpu", PROCESSORS)
@pytest.mark.parametrize("op", OPS)
def test_matches_reference(op, cpu, tmp_path):
    calls = calls_of(op)
    (tmp_path / "calls").write_bytes(b"".join(call.encoded() for call in calls))
    emulate(cpu, PROCESSORS[cpu][-1], tmp_path / "calls", tmp_path / "results")
    wrong = []
    for call, results in zip(calls, decoded((tmp_path / "results").read_bytes()), strict=True):
        try:
            call.check(*results)
        except AssertionError as failure:
            wrong.append(f"{call}: {failure}")
    assert not wrong, "\n".join([f"{len(wrong)} of {len(calls)} calls, among them", *wrong[:10]])

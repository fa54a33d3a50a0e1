"""Compares the Triton kernels with the references; runs under TRITON_INTERPRET=1, or on a GPU.

A process of its own: Triton reads the variable when it is first imported. `test_triton.py` starts
it, and `python tests/run_triton.py cuda` does on a machine with a GPU.
"""

import functools
import itertools
import sys
from collections.abc import Callable
from importlib import import_module

import pytest
import torch
import trine
from devices import all_moved, smallest_tiles
from linear_inputs import (
    DTYPES,
    assert_same_bits,
    assert_within_sum_bound,
    difficult_rows,
    non_contiguous,
)
from test_int8_conv2d import inputs as conv_inputs
from test_softmax_kl import operator_arguments
from test_softmax_kl_divergences import assert_close
from test_softmax_kl_options import NAMES, log_probabilities
from test_sparse24_linear import VALUES_DTYPES, assert_is_result
from torch import Tensor
from trine.ops import _triton_kernels
from trine.ops.activation import CODES
from trine.ops.activation.reference import activated
from trine.ops.int8_conv2d import reference as conv
from trine.ops.int8_conv2d.triton import int8_conv2d
from trine.ops.int8_embedding import reference as embedding
from trine.ops.int8_embedding.triton import int8_embedding
from trine.ops.int8_linear import reference as int8
from trine.ops.int8_linear.triton import int8_linear, int8_linear_rows
from trine.ops.int8_weight_linear import reference as int8_weight
from trine.ops.int8_weight_linear.triton import int8_weight_linear
from trine.ops.norm_quantize_rows import reference as norms
from trine.ops.norm_quantize_rows import triton as norms_on_triton
from trine.ops.quantize_rows import reference as rows
from trine.ops.quantize_rows.triton import quantize_rows
from trine.ops.softmax_kl import reference as kl
from trine.ops.softmax_kl.triton import softmax_kl, softmax_kl_backward
from trine.ops.sparse24_linear import pack_sparse24
from trine.ops.sparse24_linear import reference as sparse24
from trine.ops.sparse24_linear.triton import sparse24_linear
from trine.ops.ternary24_linear import reference as ternary24
from trine.ops.ternary24_linear.triton import ternary24_linear
from trine.ops.ternary_linear import reference as ternary
from trine.ops.ternary_linear.triton import ternary_linear, ternary_linear_rows

SHAPES = ((1, 1, 1), (1, 17, 100), (3, 16, 16), (17, 33, 65), (5, 3, 200), (0, 4, 32), (2, 3, 0))

# (B, C, N, kernel, groups, stride, padding, dilation, H, W): tiles with the pixels of two images,
# patches of more than one step, and steps of several taps.
CONVOLUTIONS = (
    (2, 3, 18, (3, 3), 1, (1, 1), (1, 1), (1, 1), 4, 3),
    (1, 9, 5, (2, 3), 1, (2, 1), (0, 2), (1, 2), 5, 5),
    (1, 6, 4, (1, 2), 2, (1, 2), (1, 0), (1, 1), 3, 4),
    (2, 18, 18, (3, 2), 18, (2, 1), (1, 1), (1, 2), 4, 4),  # depthwise
)


def check(run, reference, device: str, *arguments, **named) -> None:
    def moved(value):
        return value.to(device) if isinstance(value, Tensor) else value

    actual = run(*map(moved, arguments), **{name: moved(v) for name, v in named.items()})
    expected = reference(*arguments, **named)
    if isinstance(expected, Tensor):
        actual, expected = (actual,), (expected,)
    for a, e in zip(actual, expected, strict=True):
        assert_same_bits(a.cpu(), e)


def check_norm(norm: str, device: str, *arguments) -> None:
    op = f"{norm}_norm_quantize_rows"
    check(getattr(norms_on_triton, op), getattr(norms, op), device, *arguments)


def try_norms(device: str, dtype: torch.dtype) -> None:
    for norm, none in (("rms", (None,)), ("layer", (None, None))):
        for k in (1, 37, 130):
            check_norm(norm, device, difficult_rows(k, dtype), *none, 1e-5)
        for k in (0, 1, 5, 300, norms.SUM_LANES + 3):
            check_norm(norm, device, *norms.example_inputs(norm, 2, k, dtype))
        x, *rest, _ = norms.example_inputs(norm, 4, 70, dtype)
        for rows_of_x in non_contiguous(x):
            check_norm(norm, device, rows_of_x, *(values.float() for values in rest), 0.0)


def check_sparse24(device: str, *arguments, **named) -> None:
    on_device = all_moved((arguments, named), device)
    assert_is_result(sparse24_linear(*on_device[0], **on_device[1]).cpu(), *arguments, **named)


def try_sparse24(device: str) -> None:
    on_device = [values for values in VALUES_DTYPES if values != torch.float32]
    for values_dtype, dtype in itertools.product(on_device, DTYPES):
        for shape in SHAPES:
            arguments, scale = sparse24.example_inputs(*shape, dtype, values_dtype)
            check_sparse24(device, *arguments, **scale)
        (_, *weight), scale = sparse24.example_inputs(1, 7, 130, dtype, values_dtype)
        check_sparse24(device, difficult_rows(130, dtype), *weight, **scale)
    for x in non_contiguous(torch.randn(4, 130)):
        check_sparse24(device, x, *weight, **scale)

    # Row 1 stores a filling 0 in column 0, row 0 nothing; NaN is in few rows of many.
    weight = torch.tensor([[0, 1, 1, 0], [0, 0, 1, 0], [2, 0, 1, 0]]).half()
    x = torch.ones(20, 4)
    x[3::7, 0], x[4::7, 0] = torch.nan, torch.inf
    check_sparse24(device, x.half(), *pack_sparse24(weight))

    arguments, _ = sparse24.example_inputs()
    with pytest.raises(ValueError, match="float32 values have no kernel on this device"):
        sparse24_linear(*all_moved(arguments, device))


def try_int8_weight(device: str) -> None:
    def check_call(x, packed_weight, weight_scale, bias) -> None:
        arguments = (x, packed_weight, weight_scale, bias)
        actual = int8_weight_linear(*all_moved(arguments, device)).cpu()
        k, n = x.shape[-1], len(packed_weight)
        dense = int8_weight.dequantised(packed_weight, weight_scale, k)
        codes = packed_weight[:, :k].double().abs()
        magnitude = x.reshape(x.shape[:-1].numel(), k).double().abs() @ dense.abs().T
        expected = int8_weight.int8_weight_linear(*arguments)
        assert actual.shape == expected.shape
        rows = (t.reshape(-1, n) for t in (actual, expected))
        unscaled = x.reshape(magnitude.shape[0], k).double().abs() @ codes.T
        assert_within_sum_bound(*rows, magnitude, k, unscaled)

    for dtype, shape in itertools.product(DTYPES, SHAPES):
        check_call(*int8_weight.example_inputs(*shape, dtype))
    for i, (m, n, k, groups) in enumerate(((1, 17, 128, 2), (18, 5, 192, 3), (3, 33, 64, 1))):
        check_call(*int8_weight.example_inputs(m, n, k, DTYPES[i], i != 1, groups))
    _, *weight = int8_weight.example_inputs(1, 7, 130)
    for dtype in DTYPES:
        check_call(difficult_rows(130, dtype), *weight)
    for x in non_contiguous(torch.randn(4, 130)):
        check_call(x, *weight)


def try_ternary24(device: str) -> None:
    def check_call(*arguments) -> None:
        check(ternary24_linear, ternary24.ternary24_linear, device, *arguments)

    for dtype, shape in itertools.product(DTYPES, SHAPES):
        check_call(*ternary24.example_inputs(*shape, dtype))
    _, *weight = ternary24.example_inputs(1, 7, 130, scale_shape=(1,))
    for x in (difficult_rows(130, torch.float32), *non_contiguous(torch.randn(4, 130))):
        check_call(x, *weight)


def try_int8_conv2d(device: str) -> None:
    def check_call(x, *weight, input_scale=None, input_zero_point=None, **options) -> None:
        named = {"input_scale": input_scale, "input_zero_point": input_zero_point}
        last = not x.is_contiguous()

        def run(x, *weight, **static):
            x = x.permute(0, 2, 3, 1) if last else x
            y = int8_conv2d(x, *weight, *map(list, sizes), options["groups"], last, **static)
            return y.permute(0, 3, 1, 2) if last else y

        sizes = (options["stride"], options["padding"], options["dilation"])
        check(
            run, lambda *a, **n: conv.int8_conv2d(*a, **n, **options), device, x, *weight, **named
        )

    for i, shape in enumerate(CONVOLUTIONS):
        for j in range(2):
            dtype, static, last = DTYPES[(i + j) % 3], j == 1, (i + j) % 2 == 0
            arguments, options = conv_inputs(shape, dtype, i % 2 == 0, static, last)
            check_call(*arguments, **options)
    for static in (False, True):
        arguments, options = conv_inputs((5, *CONVOLUTIONS[2][1:]), static=static)
        x = arguments[0]
        x[1], x[2, 0, 0, 0], x[3, 1, 2, 3] = 0, torch.nan, torch.inf
        x[4] *= 1e30
        check_call(*arguments, **options)
    check_call(arguments[0][:0], *arguments[1:], **options)


def softmax_kl_results(device: str, upstream: Tensor, student, teacher, **options):
    """Divergences, cross entropies, and the gradients of both, weighted by `upstream`."""
    upstream, *arguments = all_moved(
        [upstream, *operator_arguments(student, teacher, **options)], device
    )
    soft, hard, saved = softmax_kl(*arguments)
    wanted = [False] if options.get("teacher_indices") is not None else [False, True]
    of_hard = upstream[: hard.numel()]
    gradients = [softmax_kl_backward(upstream, of_hard, *arguments, saved, to) for to in wanted]
    return [result.cpu() for result in (soft, hard, *gradients)]


def check_softmax_kl(device: str, student: Tensor, teacher: Tensor, **options) -> None:
    upstream = torch.linspace(-1, 2, student[..., 0].numel())
    logits = [z.double().requires_grad_() for z in (student, teacher)]
    soft, hard = kl.rows(*operator_arguments(*logits, **options))
    loss = (soft * upstream).sum() + (hard * upstream[: hard.numel()]).sum()
    actual = softmax_kl_results(device, upstream, student, teacher, **options)
    truths = [soft, hard, *torch.autograd.grad(loss, logits[: len(actual) - 2])]
    for a, truth in zip(actual, truths, strict=True):
        assert_close(a, truth.detach(), 1e-5, 1e-7)


def try_softmax_kl(device: str) -> None:
    rows, classes = 2, 150
    labels = torch.randint(classes, (rows,))
    seen = {"student_cap": 9.0, "student_scale": 1.5, "teacher_scale": 0.5, "teacher_cap": 0.0}
    hard = {"labels": labels, "label_smoothing": 0.1, "class_weight": torch.rand(classes)}
    mask = {"row_mask": torch.tensor([True, False])}
    values, indices = log_probabilities(rows, 5, classes)
    indices[0, 1] = -1
    for i, name in enumerate(NAMES):
        student, teacher = kl.example_inputs(rows, classes=classes)
        student, teacher = student.to(DTYPES[i % 3]), teacher.to(DTYPES[i % 2])
        check = functools.partial(check_softmax_kl, device, student, divergence=name, beta=0.3)
        check(teacher, **(seen if i % 2 else {"labels": labels}))
        check(torch.log_softmax(teacher.float(), -1), teacher_is_log=True, **mask)
        check(values, teacher_indices=indices.int() if i % 2 else indices, **hard, **seen)
        for result in softmax_kl_results(
            device, torch.ones(rows), student, student, divergence=name
        ):
            assert (result == 0).all()

        # NaN, infinity and nothing but -inf concern their rows alone, and padding none. A row
        # that does not count, or whose upstream is 0, passes on 0.
        bad = torch.cat([student[:1].repeat(6, 1).float(), torch.full((6, 3), torch.nan)], 1)
        bad[0, 3], bad[1, 140], bad[2, :150], bad[3:5] = torch.nan, torch.inf, -torch.inf, torch.nan
        good = bad[5:].repeat(6, 1)
        soft, *_, of_student, of_teacher = softmax_kl_results(
            device,
            torch.tensor([1.0, 1, 1, 0, 1, 1]),
            *((bad, good) if i % 2 else (good, bad)),
            divergence=name,
            classes=classes,
            row_mask=torch.arange(6) != 4,
        )
        assert soft[:4].isnan().all()
        assert (soft[4:] == 0).all()
        for gradient in (of_student, of_teacher):
            assert gradient[:3, :classes].isnan().all()
            assert (gradient[3:] == 0).all()
            assert (gradient[:, classes:] == 0).all()
    every = torch.arange(classes).expand(rows, -1)
    whole = torch.log_softmax(torch.randn(rows, classes), -1)
    check_softmax_kl(device, student, whole, teacher_indices=every)
    for strided in non_contiguous(student):
        check_softmax_kl(device, strided, teacher, temperature=0.7)
    lacking = teacher.float().index_fill(1, labels, -torch.inf)
    assert softmax_kl_results(device, torch.ones(rows), lacking, teacher)[0].isinf().all()
    for shape in ((0, 5), (2, 0)):
        soft, *_, gradient = softmax_kl_results(
            device, torch.ones(shape[0]), *torch.ones(2, *shape)
        )
        assert (soft == 0).all()
        assert gradient.shape == shape
    for wrong, message in (
        ({"temperature": 0.0}, "temperature must be positive"),
        ({"divergence": "kl"}, "divergence must be one of 'forward_kl'"),
        ({"divergence": "jsd", "beta": 1.0}, "beta of 'jsd' must lie between 0 and 1"),
        ({"student_cap": -1.0}, "soft-caps must be positive"),
    ):
        with pytest.raises(ValueError, match=message):
            softmax_kl(*operator_arguments(student, teacher, **wrong))


def try_int8_embedding(device: str) -> None:
    for dtype in DTYPES:
        for shape, d in (((3,), 1), ((2, 3), 37), ((), 128), ((4,), 1100), ((0, 2), 5), ((2,), 0)):
            for index in (torch.int64, torch.int32):
                arguments = embedding.example_inputs(shape, 7, d, dtype, index)
                check(int8_embedding, embedding.int8_embedding, device, *arguments)


def main(device: str) -> None:
    smallest_tiles()
    torch.manual_seed(0)
    try_sparse24(device)
    try_ternary24(device)
    try_int8_weight(device)
    try_int8_conv2d(device)
    try_softmax_kl(device)
    try_int8_embedding(device)
    for dtype in DTYPES:
        for k in (1, 37, 130):
            check(quantize_rows, rows.quantize_rows, device, difficult_rows(k, dtype))
        try_norms(device, dtype)
        for m, n, k in SHAPES:
            for op, op_reference in (
                (int8_linear_rows, int8.int8_linear),
                (ternary_linear_rows, ternary.ternary_linear),
            ):
                module = int8 if op is int8_linear_rows else ternary
                x, *weight = module.example_inputs(m, n, k, dtype)
                expected = op_reference(x, *weight)
                given = (*rows.quantize_rows(x), *weight, dtype)
                check(op, lambda *_, y=expected: y, device, *given)
            for activation, code in CODES.items():
                for op, module in ((int8_linear, int8), (ternary_linear, ternary)):
                    inputs = module.example_inputs(m, n, k, dtype)
                    y = getattr(module, op.__name__)(*inputs, activation=activation)
                    check(op, lambda *_, y=y: y, device, *inputs, code)
            check(int8_linear, int8.int8_linear, device, *int8.example_inputs(m, n, k, dtype))
            check(
                ternary_linear,
                ternary.ternary_linear,
                device,
                *ternary.example_inputs(m, n, k, dtype),
            )
    _, weight, scale, bias = int8.example_inputs(8, 18, 130)
    for x in (difficult_rows(130, torch.float32), *non_contiguous(torch.randn(4, 130))):
        check(int8_linear, int8.int8_linear, device, x, weight, scale, None)
        for zero_point in (None, 0, 7, -128):
            static = {"input_scale": torch.tensor([0.02])}
            if zero_point is not None:
                static["input_zero_point"] = torch.tensor([zero_point], dtype=torch.int32)
            check(int8_linear, int8.int8_linear, device, x, weight, scale, bias.half(), **static)
    check(
        ternary_linear,
        ternary.ternary_linear,
        device,
        *ternary.example_inputs(3, 5, 70, scale_shape=(1,)),
    )
    for n, k, groups in ((5, 128, 2), (17, 384, 2), (40, 192, 3)):
        arguments = ternary.example_inputs(3, n, k, scale_shape=(n, groups))
        check(ternary_linear, ternary.ternary_linear, device, *arguments)
    grid = torch.cat([torch.linspace(-14, 14, 3001), torch.tensor([torch.nan, -torch.inf, 1e30])])
    nothing, ones = torch.zeros(len(grid), 16, dtype=torch.int8), torch.ones(len(grid))
    for activation, code in CODES.items():
        y = activated(grid, activation)[None]
        check(int8_linear, lambda *_, y=y: y, device, ones[None, :16], nothing, ones, grid, code)
    # Behind the operators, and gone from there again.
    arguments = [a.to(device) for a in int8.example_inputs(2, 3, 40)]
    with trine.backends.triton_kernels(device):
        assert calls_triton(lambda: trine.ops.int8_linear(*arguments))
    always = device == "cuda" and _triton_kernels.in_force()
    assert calls_triton(lambda: trine.ops.int8_linear(*arguments)) == always
    print("equal bits")


def calls_triton(run: Callable[[], Tensor]) -> bool:
    """Whether `run` gets to the Triton kernel."""
    module = import_module("trine.ops.int8_linear.triton")
    called, kernel = [], module.int8_linear

    def spy(*args, **kwargs):
        called.append(True)
        return kernel(*args, **kwargs)

    module.int8_linear = spy
    try:
        run()
    finally:
        module.int8_linear = kernel
    return bool(called)


if __name__ == "__main__":
    main(sys.argv[1] if len(sys.argv) > 1 else "cpu")

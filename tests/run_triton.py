"""Compares the Triton kernels with the references; runs under TRITON_INTERPRET=1, or on a GPU.

A process of its own: Triton reads the variable when it is first imported. `test_triton.py` starts
it, and `python tests/run_triton.py cuda` does on a machine with a GPU.
"""

import itertools
import sys
from collections.abc import Callable
from importlib import import_module

import pytest
import torch
import trine
from devices import all_moved, smallest_tiles
from linear_inputs import DTYPES, assert_same_bits, difficult_rows, non_contiguous
from test_sparse24_linear import VALUES_DTYPES, assert_is_result
from torch import Tensor
from trine.ops import _triton_kernels
from trine.ops.int8_linear import reference as int8
from trine.ops.int8_linear.triton import int8_linear, int8_linear_rows
from trine.ops.quantize_rows import reference as rows
from trine.ops.quantize_rows.triton import quantize_rows
from trine.ops.rms_norm_quantize_rows import reference as norm
from trine.ops.rms_norm_quantize_rows.triton import rms_norm_quantize_rows
from trine.ops.sparse24_linear import pack_sparse24
from trine.ops.sparse24_linear import reference as sparse24
from trine.ops.sparse24_linear.triton import sparse24_linear
from trine.ops.ternary24_linear import reference as ternary24
from trine.ops.ternary24_linear.triton import ternary24_linear
from trine.ops.ternary_linear import reference as ternary
from trine.ops.ternary_linear.triton import ternary_linear, ternary_linear_rows

SHAPES = ((1, 1, 1), (1, 17, 100), (3, 16, 16), (17, 33, 65), (5, 3, 200), (0, 4, 32), (2, 3, 0))


def check(run, reference, device: str, *arguments, **named) -> None:
    def moved(value):
        return value.to(device) if isinstance(value, Tensor) else value

    actual = run(*map(moved, arguments), **{name: moved(v) for name, v in named.items()})
    expected = reference(*arguments, **named)
    if isinstance(expected, Tensor):
        actual, expected = (actual,), (expected,)
    for a, e in zip(actual, expected, strict=True):
        assert_same_bits(a.cpu(), e)


fused = norm.rms_norm_quantize_rows


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


def try_ternary24(device: str) -> None:
    def check_call(*arguments) -> None:
        check(ternary24_linear, ternary24.ternary24_linear, device, *arguments)

    for dtype, shape in itertools.product(DTYPES, SHAPES):
        check_call(*ternary24.example_inputs(*shape, dtype))
    _, *weight = ternary24.example_inputs(1, 7, 130, scale_shape=(1,))
    for x in (difficult_rows(130, torch.float32), *non_contiguous(torch.randn(4, 130))):
        check_call(x, *weight)


def main(device: str) -> None:
    smallest_tiles()
    torch.manual_seed(0)
    try_sparse24(device)
    try_ternary24(device)
    for dtype in DTYPES:
        for k in (1, 37, 130):
            check(quantize_rows, rows.quantize_rows, device, difficult_rows(k, dtype))
            check(rms_norm_quantize_rows, fused, device, difficult_rows(k, dtype), None, 1e-5)
        for k in (0, 1, 5, 300, norm.SUM_LANES + 3):
            check(rms_norm_quantize_rows, fused, device, *norm.example_inputs(2, k, dtype))
        x, weight, _ = norm.example_inputs(4, 70, dtype)
        for rows_of_x in non_contiguous(x):
            check(rms_norm_quantize_rows, fused, device, rows_of_x, weight.float(), 0.0)
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

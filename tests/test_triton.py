"""The Triton kernels: equal bits under the interpreter, and what the compiler makes of them."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

triton = pytest.importorskip("triton", reason="Triton is not installed")

TESTS = Path(__file__).parent


def run_comparison(device: str, **environment: str) -> str:
    command = [sys.executable, "-W", "ignore", TESTS / "run_triton.py", device]
    return subprocess.run(
        command, check=True, capture_output=True, text=True, env={**os.environ, **environment}
    ).stdout


def test_interpreted_kernels_give_the_bits_of_the_reference():
    assert run_comparison("cpu", TRITON_INTERPRET="1") == "equal bits\n"


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_compiled_kernels_give_the_bits_of_the_reference():
    assert run_comparison("cuda") == "equal bits\n"


def ptx(kernel, pointers: dict[str, str], constants: dict[str, object], capability: int) -> str:
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    signature = {name: pointers.get(name, "i32") for name in kernel.arg_names}
    signature |= dict.fromkeys(constants, "constexpr")
    source = ASTSource(kernel, signature, constexprs=constants)
    target = GPUTarget("cuda", capability, 32)
    options = {"enable_fp_fusion": False, "sanitize_overflow": False, "debug": kernel.debug}
    compiled = triton.compile(source, target=target, options=options)
    return compiled.asm["ptx"]


def int8_ptx(capability: int) -> str:
    from trine.ops.int8_linear.triton import int8_linear_kernel

    pointers = {"q": "*i8", "weight": "*i8", "y": "*bf16", "column_minus": "*i32"}
    pointers |= dict.fromkeys(("x_scale", "weight_scale", "bias"), "*fp32")
    constants = {"HAS_MINUS": True, "HAS_BIAS": True}
    constants |= {"BLOCK_M": 64, "BLOCK_N": 64, "BLOCK_K": 64}
    return ptx(int8_linear_kernel, pointers, constants, capability)


def conv_ptx(capability: int) -> str:
    from trine.ops.int8_conv2d.triton import int8_conv2d_kernel

    return _conv_ptx(int8_conv2d_kernel, {"BLOCK_K": 64}, capability)


def depthwise_ptx(capability: int) -> str:
    from trine.ops.int8_conv2d.triton import depthwise_kernel

    return _conv_ptx(depthwise_kernel, {}, capability)


def _conv_ptx(kernel, block_k: dict[str, int], capability: int) -> str:
    pointers = {"q": "*i8", "weight": "*i8", "y": "*bf16", "column_minus": "*i32"}
    pointers |= dict.fromkeys(("x_scale", "weight_scale", "bias"), "*fp32")
    constants = {"HAS_MINUS": True, "HAS_BIAS": True, "BLOCK_M": 64, "BLOCK_N": 64}
    return ptx(kernel, pointers, constants | block_k, capability)


def images_ptx(static: bool, capability: int) -> str:
    from trine.ops.int8_conv2d.triton_images import quantize_images_kernel

    pointers = {"x": "*bf16", "most": "*i32", "q": "*i8", "scale": "*fp32"}
    pointers |= {"input_scale": "*fp32", "zero_point": "*i32"}
    constants = {"STATIC": static, "HAS_ZERO_POINT": static, "PARTS": 64, "SIZE": 1024}
    return ptx(quantize_images_kernel, pointers, constants, capability)


def static_images_ptx(capability: int) -> str:
    return images_ptx(True, capability)


def dynamic_images_ptx(capability: int) -> str:
    return images_ptx(False, capability)


def embedding_ptx(capability: int) -> str:
    from trine.ops.int8_embedding.triton import int8_embedding_kernel

    pointers = {"indices": "*i64", "codes": "*i8", "scale": "*fp32", "y": "*bf16"}
    return ptx(int8_embedding_kernel, pointers, {"BLOCK": 1024}, capability)


def ternary_ptx(capability: int) -> str:
    from trine.ops.ternary_linear.triton import ternary_linear_kernel

    pointers = {"q": "*i8", "weight": "*u8", "y": "*bf16"}
    pointers |= dict.fromkeys(("x_scale", "weight_scale", "bias"), "*fp32")
    constants = {"PER_TENSOR": False, "GROUPED": True, "HAS_BIAS": True}
    constants |= {"BLOCK_M": 64, "BLOCK_N": 64, "BLOCK_BYTES": 32}
    return ptx(ternary_linear_kernel, pointers, constants, capability)


def ternary24_ptx(capability: int) -> str:
    from trine.ops.ternary24_linear.triton import ternary24_linear_kernel

    pointers = {"q": "*i8", "weight": "*u8", "y": "*bf16"}
    pointers |= dict.fromkeys(("x_scale", "weight_scale", "bias"), "*fp32")
    constants = {"PER_TENSOR": False, "HAS_BIAS": True}
    constants |= {"BLOCK_M": 64, "BLOCK_N": 64, "BLOCK_GROUPS": 32}
    return ptx(ternary24_linear_kernel, pointers, constants, capability)


def sparse24_ptx(x: str, values: str, capability: int) -> str:
    from trine.ops.sparse24_linear.triton import sparse24_linear_kernel

    pointers = {"x": f"*{x}", "values": f"*{values}", "indices": "*u8", "y": "*bf16"}
    pointers |= dict.fromkeys(("x_scale", "weight_scale", "bias"), "*fp32")
    constants = {"WIDEN": x != values, "HAS_BIAS": True}
    constants |= {"BLOCK_M": 16, "BLOCK_N": 64, "BLOCK_K": 64}
    return ptx(sparse24_linear_kernel, pointers, constants, capability)


def weight_only_ptx(x: str, capability: int) -> str:
    from trine.ops.int8_weight_linear.triton import int8_weight_linear_kernel

    pointers = {"x": f"*{x}", "weight": "*i8", "y": f"*{x}"}
    pointers |= {"weight_scale": "*fp32", "bias": "*fp32"}
    constants = {"WIDEN": x == "fp32", "HAS_BIAS": True}
    constants |= {"BLOCK_M": 16, "BLOCK_N": 64, "BLOCK_K": 64}
    return ptx(int8_weight_linear_kernel, pointers, constants, capability)


def sparse24_int8_ptx(capability: int) -> str:
    return sparse24_ptx("i8", "i8", capability)


def quantize_ptx(capability: int) -> str:
    from trine.ops._triton import quantize_rows_kernel

    pointers = {"x": "*fp32", "q": "*i8", "scale": "*fp32", "total": "*i32"}
    return ptx(quantize_rows_kernel, pointers, {"BLOCK": 1024}, capability)


def norm_ptx(capability: int) -> str:
    from trine.ops.norm_quantize_rows.triton import norm_quantize_rows_kernel

    pointers = {"x": "*bf16", "weight": "*fp32", "bias": "*bf16", "q": "*i8", "scale": "*fp32"}
    pointers |= {"total": "*i32", "count": "fp32", "eps": "fp32"}
    constants = {"IS_LAYER": True, "HAS_WEIGHT": True, "HAS_BIAS": True}
    constants |= {"LEVELS": 12, "BLOCK": 4096}
    return ptx(norm_quantize_rows_kernel, pointers, constants, capability)


def static_ptx(capability: int) -> str:
    from trine.ops._triton import quantize_rows_static_kernel

    pointers = {"x": "*fp32", "q": "*i8", "scale": "*fp32"}
    pointers |= {"input_scale": "*fp32", "zero_point": "*i32"}
    return ptx(quantize_rows_static_kernel, pointers, {"BLOCK": 1024}, capability)


PRODUCTS = (int8_ptx, conv_ptx, ternary_ptx, ternary24_ptx, sparse24_int8_ptx)
QUANTIZERS = (quantize_ptx, norm_ptx, static_ptx, static_images_ptx, dynamic_images_ptx)


@pytest.mark.parametrize("capability", [80, 90])
@pytest.mark.parametrize(
    "compile_kernel",
    [*PRODUCTS, *QUANTIZERS, depthwise_ptx],
)
def test_compiled_kernels_round_as_the_others(compile_kernel, capability):
    """What the interpreter cannot show: no approximate division, no product fused with a sum."""
    code = compile_kernel(capability)
    assert not re.search(r"\bdiv\.(full|approx)", code)
    assert not re.search(r"\bfma\.", code)
    if compile_kernel in QUANTIZERS:
        assert "div.rn.f32" in code
        assert ("sqrt.rn.f32" in code) == (compile_kernel is norm_ptx)
        assert "sqrt.approx" not in code
    elif compile_kernel in PRODUCTS:
        assert re.search(r"\b(mma\.sync|wgmma\.mma_async)\S*\.s32\.s8\.s8", code)


@pytest.mark.parametrize("capability", [80, 90])
def test_int8_embedding_rounds_and_asserts(capability):
    code = embedding_ptx(capability)
    assert re.search(r"\bmul\.(rn\.)?f32", code)
    assert not re.search(r"\bfma\.", code)
    assert "__assertfail" in code


@pytest.mark.parametrize("capability", [80, 90])
@pytest.mark.parametrize("direction", ["forward", "backward"])
def test_softmax_kl_approximates_no_more_than_powers_of_2(direction, capability):
    """With all options, in backward those of a partial teacher."""
    from trine.ops.softmax_kl import triton as softmax_kl

    backward = direction == "backward"
    kernel = softmax_kl.softmax_kl_backward_kernel if backward else softmax_kl.softmax_kl_kernel
    pointers = dict.fromkeys(("student", "teacher", "gradient"), "*bf16")
    pointers |= {"labels": "*i64", "indices": "*i64", "row_mask": "*i1"}
    vectors = ("saved", "soft", "hard", "grad_soft", "grad_hard", "class_weight")
    pointers |= dict.fromkeys(vectors, "*fp32")
    numbers = ("temperature", "rate", "beta", "of_label", "of_each")
    of_models = ("student_scale", "student_cap", "teacher_scale", "teacher_cap")
    pointers |= dict.fromkeys((*numbers, *of_models), "fp32")
    constants = {"KIND": 2, "REVERSED": True, "STUDENT_SEEN": 2, "TEACHER_SEEN": 1}
    constants |= {"SMOOTHED": True, "SLOTS": 64 if backward else 0, "BLOCK": 1024}
    if backward:
        constants["FOR_TEACHER"] = False
    code = ptx(kernel, pointers, constants, capability)
    assert "ex2.approx" in code
    assert not re.search(r"\b(lg2|tanh)\.approx|\.local\.", code)


@pytest.mark.parametrize("capability", [80, 90])
@pytest.mark.parametrize("dtype", ["fp16", "bf16"])
def test_a_sparse_weight_of_the_type_of_x_uses_tensor_cores(dtype, capability):
    kind = dtype.replace("fp16", "f16")
    code = sparse24_ptx(dtype, dtype, capability)
    assert re.search(rf"\b(mma\.sync|wgmma\.mma_async)\S*\.f32\.{kind}\.{kind}", code)


@pytest.mark.parametrize("capability", [80, 90])
@pytest.mark.parametrize("dtype", ["fp16", "bf16"])
def test_int8_weights_meet_16_bit_rows_on_tensor_cores(dtype, capability):
    kind = dtype.replace("fp16", "f16")
    code = weight_only_ptx(dtype, capability)
    assert re.search(rf"\b(mma\.sync|wgmma\.mma_async)\S*\.f32\.{kind}\.{kind}", code)


def test_int8_weights_meet_float32_rows_in_float32():
    assert not re.search(r"mma\.|tf32", weight_only_ptx("fp32", 80))


def test_a_sparse_weight_of_another_type_is_multiplied_in_float32():
    assert not re.search(r"mma\.|tf32", sparse24_ptx("fp32", "bf16", 80))

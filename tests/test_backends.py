"""Instruction sets: what lowering switches off, and what comes back."""

import pytest
from trine import _C, backends
from trine.ops import _triton_kernels


def in_force() -> dict[str, str]:
    return {op: _C.kernel_in_force(op) for op in _C.kernels()}


def test_every_op_has_a_kernel_for_any_processor():
    with backends.cpu_isa("scalar"):
        assert set(in_force().values()) == {"scalar"}


def test_the_fastest_kernel_that_this_processor_runs_is_in_force():
    for op, isas in _C.kernels().items():
        assert _C.kernel_in_force(op) == next(isa for isa in isas if isa in backends.cpu_isas())


def test_what_is_for_tests_is_used_only_when_named():
    assert not {*in_force().values()} & {*_C.test_isas()}
    for name in backends.cpu_isas():
        with backends.cpu_isa(name):
            assert not {*in_force().values()} & {*_C.test_isas()}
    for name in _C.test_isas():
        with backends.cpu_isa(name):
            assert _C.kernel_in_force("int8_linear") == name


def test_lowering_nests():
    before = in_force()
    for outer in backends.cpu_isas():
        with backends.cpu_isa(outer):
            lowered = in_force()
            assert _C.enabled_isa() == outer
            for inner in backends.cpu_isas():
                with backends.cpu_isa(inner):
                    assert _C.enabled_isa() == inner
                assert in_force() == lowered
    assert in_force() == before


@pytest.mark.skipif("avx512" not in backends.cpu_isas(), reason="needs a processor with AVX-512")
def test_an_instruction_set_is_a_set_not_a_rung():
    """AVX-512 includes AVX2 and not AVX-VNNI, which stands between them in the list."""
    with backends.cpu_isa("avx512"):
        assert _C.kernel_in_force("quantize_rows") == "avx512"
        assert _C.kernel_in_force("int8_linear") == "avx2"


def test_unknown_instruction_sets_are_named():
    with (
        pytest.raises(ValueError, match="unknown instruction set 'avx3'"),
        backends.cpu_isa("avx3"),
    ):
        pass


def test_describe_says_what_was_switched_off():
    with backends.cpu_isa("scalar"):
        (entry,) = (op for op in backends.describe().ops if op.op == "quantize_rows")
    assert entry.kernel == "scalar"
    for isa in _C.kernels()["quantize_rows"][:-1]:
        assert isa in entry.reason


def test_describe_names_triton_where_it_serves(monkeypatch):
    monkeypatch.setattr(_triton_kernels, "in_force", lambda: True)
    for entry in backends.describe().ops:
        has_kernel = entry.op.split()[0] in _triton_kernels.OPS.values()
        assert (entry.cuda_kernels == ("triton",)) == has_kernel

"""What holds for every op at any shape, not only at those that somebody thought of.

The same bits for any number of threads, on every instruction set (integer ops), and while other
Python threads use the same weights.
"""

from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from instruction_sets import isas_to_test
from linear_inputs import DTYPES
from torch import Tensor, nn
from trine import backends, ops
from trine.nn import PackedLinear, pack_linear

LINEAR = ("int8", "int8-weight", "ternary", "sparse24", "sparse24-int8", "ternary24")
EXACT = ("int8", "ternary", "sparse24-int8", "ternary24")
THREADS = (1, 2, 3, 7, 16)

# Small enough to be quick, large enough that threads share the work: some 256k products each.
shapes = st.tuples(st.integers(1, 70), st.integers(1, 300), st.integers(1, 600))
dtypes = st.sampled_from(DTYPES)


def difficult(m: int, k: int, dtype: torch.dtype) -> Tensor:
    """Random rows, always the same for a shape, of which one may be zero and one may hold NaN."""
    torch.manual_seed(0)
    x = torch.randn(m, k)
    x[m // 2] *= m % 3
    x[m // 3, k // 2] = torch.nan if k % 5 == 0 else 1.0
    return x.to(dtype)


def packed(choice: str, n: int, k: int) -> PackedLinear:
    torch.manual_seed(1)
    return pack_linear(nn.Linear(k, n), choice)


def bits(tensors: Tensor | tuple[Tensor, ...]) -> list[Tensor]:
    """Each value as an integer, so that NaN equals NaN and 0 differs from -0."""
    as_integers = {4: torch.int32, 2: torch.int16, 1: torch.int8}
    tensors = (tensors,) if isinstance(tensors, Tensor) else tensors
    return [t.contiguous().view(as_integers[t.element_size()]) for t in tensors]


def assert_one_result(results: list[Tensor | tuple[Tensor, ...]]) -> None:
    first, *others = map(bits, results)
    for other in others:
        assert all(map(torch.equal, first, other))


def with_each_number_of_threads(call) -> list[Tensor | tuple[Tensor, ...]]:
    results = []
    for count in THREADS:
        torch.set_num_threads(count)
        results.append(call())
    return results


class TestAnyNumberOfThreads:
    @pytest.fixture(autouse=True)
    def _restored(self, threads):
        """`threads` puts the old number back."""

    @pytest.mark.parametrize("choice", LINEAR)
    @settings(max_examples=12, deadline=None)
    @given(shape=shapes, dtype=dtypes)
    def test_linear(self, choice, shape, dtype):
        m, n, k = shape
        layer = packed(choice, n, k)
        x = difficult(m, k, dtype)
        with torch.no_grad():
            assert_one_result(with_each_number_of_threads(lambda: layer(x)))

    @settings(max_examples=12, deadline=None)
    @given(m=st.integers(1, 200), k=st.integers(1, 3000), dtype=dtypes)
    def test_quantize_rows(self, m, k, dtype):
        x = difficult(m, k, dtype)
        assert_one_result(with_each_number_of_threads(lambda: ops.quantize_rows(x)))

    @settings(max_examples=12, deadline=None)
    @given(m=st.integers(1, 200), classes=st.integers(1, 3000), dtype=dtypes)
    def test_softmax_kl(self, m, classes, dtype):
        torch.manual_seed(0)
        student, teacher = (torch.randn(m, classes, dtype=dtype) for _ in range(2))
        student.requires_grad_()

        def loss_and_gradient():
            loss = ops.softmax_kl(student, teacher)
            return loss.detach(), *torch.autograd.grad(loss, student)

        assert_one_result(with_each_number_of_threads(loss_and_gradient))


class TestEveryInstructionSet:
    @pytest.mark.parametrize("choice", EXACT)
    @settings(max_examples=20, deadline=None)
    @given(shape=shapes, dtype=dtypes)
    def test_linear(self, choice, shape, dtype):
        m, n, k = shape
        layer = packed(choice, n, k)
        x = difficult(m, k, dtype)
        results = []
        for isa in isas_to_test():
            with torch.no_grad(), backends.cpu_isa(isa):
                # A NaN may have any payload.
                results.append(layer(x).nan_to_num(nan=1e4))
        assert_one_result(results)

    @settings(max_examples=20, deadline=None)
    @given(m=st.integers(1, 20), k=st.integers(1, 300), dtype=dtypes)
    def test_quantize_rows(self, m, k, dtype):
        x = difficult(m, k, dtype)
        results = []
        for isa in isas_to_test("quantize_rows"):
            with backends.cpu_isa(isa):
                q, scale, total = ops.quantize_rows(x)
                results.append((q, scale.nan_to_num(nan=-1), total))
        assert_one_result(results)


@pytest.mark.parametrize("choice", LINEAR)
def test_python_threads_share_a_layer(choice):
    """Each thread has inputs of its own, of different sizes, and its own scratch memory."""
    layer = packed(choice, 50, 130)
    inputs = [torch.randn(m, 130) for m in (1, 3, 9, 33, 64, 5)]
    with torch.no_grad():
        alone = [layer(x) for x in inputs]

        def in_a_thread(i: int) -> Tensor:
            with torch.no_grad():  # it holds for one thread
                return layer(inputs[i % len(inputs)])

        with ThreadPoolExecutor(8) as pool:
            together = list(pool.map(in_a_thread, range(240)))
    for i, y in enumerate(together):
        assert torch.equal(y, alone[i % len(inputs)])

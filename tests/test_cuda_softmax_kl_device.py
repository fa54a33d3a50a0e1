"""softmax_kl on a GPU: the cases of its kernels' emulation, accuracy at size, graphs, streams.

Without a GPU `TRINE_TEST_DEVICE=cpu` tries the cases on the CPU's kernels.
"""

import pytest
import torch
from devices import ABSENT, DEVICE, devices_to_test, is_visible
from linear_inputs import DTYPES, assert_same_bits
from test_cuda_softmax_kl_on_cpu import Case, cases, example, top_k
from torch import Tensor
from trine.ops import softmax_kl
from trine.ops.softmax_kl import reference

if not is_visible():
    pytest.skip(ABSENT, allow_module_level=True)
if not devices_to_test("softmax_kl"):
    pytest.skip("softmax_kl has no compiled kernels here", allow_module_level=True)

needs_cuda = pytest.mark.skipif(DEVICE != "cuda", reason="has no meaning on the CPU")


@pytest.mark.parametrize("at_once", [False, True])
@pytest.mark.parametrize("number", range(len(cases())))
def test_every_case_of_the_emulation(number, at_once):
    case = cases()[number]
    for actual, expected in zip(case.run(DEVICE, at_once), case.expected, strict=True):
        case.check(actual.cpu(), expected)


def large() -> list[Case]:
    """Enough blocks for any order of them to show."""
    labels = torch.arange(2000)
    return [
        Case(*example(2000, 1001, torch.bfloat16), labels=labels % 1001),
        Case(*example(300, 20001, torch.float32), divergence="jsd"),
        Case(*example(40, 128256, torch.bfloat16), labels=labels[:40]),
        Case(*example(20, 128256, torch.float32), divergence="jsd", factor=0.3),
        top_k(300, 20000, 50, torch.bfloat16, divergence="reverse_kl"),
    ]


@pytest.mark.parametrize("at_once", [False, True])
@pytest.mark.parametrize("number", range(5))
def test_many_blocks_give_the_same_bits_every_time(number, at_once):
    case = large()[number]
    first = case.run(DEVICE, at_once)
    for actual, expected in zip(first, case.expected, strict=True):
        case.check(actual.cpu(), expected)
    for _ in range(2 if DEVICE == "cpu" else 20):
        for again, before in zip(case.run(DEVICE, at_once), first, strict=True):
            assert_same_bits(again, before)


@needs_cuda
def test_accuracy_of_bf16_at_the_size_of_a_language_model():
    torch.manual_seed(0)
    student, teacher = ((3 * torch.randn(512, 128256, device=DEVICE)).bfloat16() for _ in range(2))
    student.requires_grad_()
    loss = softmax_kl(student, teacher, 2.0, "sum")
    (gradient,) = torch.autograd.grad(loss, student)
    total, error, norm = 0.0, 0.0, 0.0
    for s, t, g in zip(
        student.detach().split(64), teacher.split(64), gradient.split(64), strict=True
    ):
        wide = s.double().requires_grad_()
        truth = reference.softmax_kl(wide, t, 2.0, "sum")
        (expected,) = torch.autograd.grad(truth, wide)
        total += truth.item()
        error += (g - expected).square().sum().item()
        norm += expected.square().sum().item()
    assert abs(loss.item() / total - 1) <= 1e-5
    assert (error / norm) ** 0.5 <= 5e-3


def loss_and_gradient(student: Tensor, teacher: Tensor) -> tuple[Tensor, Tensor]:
    loss = softmax_kl(student, teacher, 2.0)
    return loss.detach(), torch.autograd.grad(loss, student)[0]


@needs_cuda
@pytest.mark.parametrize("dtype", DTYPES)
def test_in_a_graph_and_without_waiting(dtype):
    """Capturing fails where an op waits for the device; torch's own waits are errors."""
    inputs = [t.to(DEVICE) for t in example(700, 5000, dtype)]
    others = [t.to(DEVICE) for t in example(700, 5000, dtype)]
    inputs[0].requires_grad_()
    others[0].requires_grad_()
    expected = loss_and_gradient(*others)  # also loads the kernels
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            captured = loss_and_gradient(*inputs)
        with torch.no_grad():
            for now, other in zip(inputs, others, strict=True):
                now.copy_(other)
        graph.replay()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    for actual, wanted in zip(captured, expected, strict=True):
        assert_same_bits(actual, wanted)


@needs_cuda
def test_on_the_stream_of_the_caller():
    """The logits are written on that stream, late: another would read what was before."""
    late, teacher = (t.to(DEVICE) for t in example(700, 5000, torch.bfloat16))
    expected = softmax_kl(late, teacher, 1.0, "none")
    written = torch.zeros_like(late)
    torch.cuda.synchronize()
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        torch.cuda._sleep(100_000_000)  # cycles: some 50 ms
        written.copy_(late)
        result = softmax_kl(written, teacher, 1.0, "none")
    stream.synchronize()
    assert_same_bits(result, expected)

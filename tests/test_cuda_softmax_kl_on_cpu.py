"""The CUDA kernels of softmax_kl, run on the CPU against the reference, as they are and with bugs.

The emulation's exponentials are as wrong as the PTX ISA allows.
"""

import functools
import math
import struct
from dataclasses import dataclass, replace

import numpy as np
import pytest
import torch
from cuda_kernels import BY_SCHEDULE, Mutant
from cuda_trials import Trial, assert_caught, outcomes
from linear_inputs import DTYPES
from test_cuda_on_cpu import SEEDS, padded
from torch import Tensor
from trine.ops.softmax_kl import reference

KINDS = {
    "forward_kl": (0, False),
    "reverse_kl": (0, True),
    "jsd": (1, False),
    "skewed_forward_kl": (2, False),
    "skewed_reverse_kl": (2, True),
    "total_variation": (3, False),
}


def bits(number: float) -> int:
    return struct.unpack("<I", struct.pack("<f", number))[0]


def raw(t: Tensor | None) -> bytes:
    """The storage from the first value to the last: behind it begins what must not be read."""
    if t is None or not t.numel():
        return b""
    extent = sum((size - 1) * step for size, step in zip(t.shape, t.stride(), strict=True)) + 1
    return torch.as_strided(t, (extent,), (1,)).view(torch.uint8).numpy().tobytes()


@dataclass(frozen=True)
class Case:
    student: Tensor  # [rows, width], rows contiguous
    teacher: Tensor
    divergence: str = "forward_kl"
    beta: float = 0.5
    temperature: float = 1.0
    classes: int | None = None
    labels: Tensor | None = None
    class_weight: Tensor | None = None
    label_smoothing: float = 0.0
    row_mask: Tensor | None = None
    seen: tuple[float, float, float, float] = (1.0, 0.0, 1.0, 0.0)  # scale, cap of both
    teacher_is_log: bool = False
    indices: Tensor | None = None
    grad_soft: Tensor | None = None
    grad_hard: Tensor | None = None
    factor: float = 1.0  # that the student's gradient is scaled by afterwards
    alignment: int = 16  # of the logits and their gradients
    exact: bool = False  # what is expected is 0, to the last bit
    losses_only: bool = False  # the reference has no gradient where logits are infinite

    @property
    def rows(self) -> int:
        return self.student.shape[0]

    @property
    def count(self) -> int:
        return self.student.shape[1] if self.classes is None else self.classes

    @functools.cached_property
    def upstream(self) -> tuple[Tensor, Tensor]:
        ones = torch.ones(self.rows)
        return tuple(ones if g is None else g for g in (self.grad_soft, self.grad_hard))

    def logits(self, t: Tensor, scale: float, cap: float, temperature: float) -> list[int]:
        rate = (cap or scale) / temperature / math.log(2)
        slope = scale / cap if cap else 0.0
        numbers = [DTYPES.index(t.dtype), t.stride(0) * t.element_size(), bits(rate), bits(slope)]
        return [*numbers, max(self.alignment, t.element_size()), len(raw(t))]

    def encode(self) -> bytes:
        kind, reversed_ = KINDS[self.divergence]
        of_teacher = (1.0, 0.0, 1.0)  # log-probabilities
        if not self.teacher_is_log and self.indices is None:
            of_teacher = (*self.seen[2:], self.temperature)
        sides = [
            (self.student, *self.seen[:2], self.temperature),
            (self.teacher, *of_teacher),
        ]
        if reversed_:
            sides.reverse()
        tensors = [side[0] for side in sides]
        tensors += [self.row_mask, self.labels, self.class_weight, self.indices, *self.upstream]
        tensors += [torch.tensor(self.factor)]
        mask, labels, weight, indices = (len(raw(t)) for t in tensors[2:6])
        numbers = [self.rows, self.count, reversed_, kind, bits(self.beta)]
        numbers += [number for side in sides for number in self.logits(*side)]
        numbers += [mask, labels, weight, bits(self.label_smoothing)]
        numbers += [bits((self.seen[1] or self.seen[0]) / math.log(2))]
        if self.indices is None:
            numbers += [0, 0, 0, 0]
        else:
            numbers += [1, self.indices.shape[1], self.indices.dtype == torch.int64, indices]
        for width, dtype in self.gradients():
            numbers += [width, max(self.alignment, dtype.itemsize)]
        return struct.pack(f"<{len(numbers)}q", *numbers) + b"".join(map(raw, tensors))

    def gradients(self) -> list[tuple[int, torch.dtype]]:
        """Width and type of the student's and the teacher's."""
        of_teacher = 0 if self.indices is not None else self.teacher.shape[1]
        return [(self.student.shape[1], self.student.dtype), (of_teacher, self.teacher.dtype)]

    def decode(self, answer: bytes) -> list[Tensor]:
        found = torch.from_numpy(np.frombuffer(answer, np.uint8).copy())
        shapes = [((self.rows,), torch.float32)]
        shapes += [((self.rows * (self.labels is not None),), torch.float32)]
        shapes += [((self.rows, width), dtype) for width, dtype in self.gradients() if width]
        counts = [math.prod(shape) for shape, _ in shapes]
        pieces = found.split(
            [n * dtype.itemsize for n, (_, dtype) in zip(counts, shapes, strict=True)]
        )
        decoded = [
            (piece.view(dtype) if len(piece) else torch.empty(0, dtype=dtype)).view(shape)
            for piece, (shape, dtype) in zip(pieces, shapes, strict=True)
        ]
        return decoded[:2] if self.losses_only else decoded

    def run(self, device: str, at_once: bool = False) -> list[Tensor]:
        """The same from the operators on `device`; `at_once`: the student's gradient in forward."""
        shift = self.alignment if self.alignment < 16 else 0

        def there(t: Tensor | None) -> Tensor | None:
            """With equal strides; logits at an address that is no multiple of 16, if that is so."""
            if t is None or not t.numel():
                return None if t is None else t.to(device)
            values = torch.frombuffer(bytearray(shift) + raw(t), dtype=t.dtype).to(device)
            return values.as_strided(t.shape, t.stride(), shift // t.element_size())

        tensors = (self.student, self.teacher, self.indices, self.labels, self.class_weight)
        arguments = [
            there(t) if i < 2 or t is None else t.to(device) for i, t in enumerate(tensors)
        ]
        arguments += [None if self.row_mask is None else self.row_mask.to(device), self.temperature]
        arguments += [self.divergence, self.beta, self.label_smoothing, self.count, *self.seen]
        arguments += [self.teacher_is_log]
        upstream = [g.to(device) for g in self.upstream]
        upstream[1] = upstream[1] if self.labels is not None else upstream[1][:0]
        ops = torch.ops.trine
        if at_once:
            soft, hard, of_student, saved = ops.softmax_kl_with_gradient(*arguments, *upstream)
        else:
            soft, hard, saved = ops.softmax_kl(*arguments)
        if self.losses_only:
            return [soft, hard]
        if not at_once:
            of_student = ops.softmax_kl_backward(*upstream, *arguments, saved, False)
        ops.softmax_kl_scale_(of_student, torch.tensor(self.factor, device=device))
        (width, _), (teacher_width, _) = self.gradients()
        results = [soft, hard, *([of_student] if width else [])]
        if teacher_width:
            results.append(ops.softmax_kl_backward(*upstream, *arguments, saved, True))
        return results

    @functools.cached_property
    def expected(self) -> list[Tensor]:
        inputs = [t.double().requires_grad_() for t in (self.student, self.teacher)]
        soft, hard = reference.rows(
            *inputs,
            self.indices,
            self.labels,
            self.class_weight,
            self.row_mask,
            self.temperature,
            self.divergence,
            self.beta,
            self.label_smoothing,
            self.count,
            *self.seen,
            self.teacher_is_log,
        )
        upstream = [g.double() for g in self.upstream]
        total = (soft * upstream[0]).sum()
        if self.labels is not None:
            total = total + (hard * upstream[1]).sum()
        wanted = inputs if self.indices is None else inputs[:1]
        empty = not (self.rows and self.count)
        gradients = (
            [torch.zeros_like(t) for t in wanted] if empty else torch.autograd.grad(total, wanted)
        )
        gradients = [gradients[0] * self.factor, *gradients[1:]]
        losses = [soft.detach(), hard.detach()]
        return losses if self.losses_only else [*losses, *(g for g in gradients if g.shape[1])]

    def check(self, actual: Tensor, expected: Tensor) -> None:
        """Each row within the tolerance of its own norm: a row's bug does not hide behind others.

        A gradient that is small because it cancels has the rounding of what cancelled: `floor`.
        """
        assert torch.equal(actual.isnan(), expected.isnan()), (
            "Tensor-likes are not alike: NaN where a number should be"
        )
        if self.exact:
            assert torch.equal(actual, torch.zeros_like(actual)), "Tensor-likes are not exactly 0"
            return
        infinite = expected.isinf()
        assert torch.equal(actual[infinite].double(), expected[infinite]), (
            "Tensor-likes are not alike: infinity"
        )
        finite = torch.where(expected.isfinite(), expected, 0.0)
        error = torch.where(expected.isfinite(), actual.double(), 0.0) - finite
        rounding = {torch.float32: 0.0, torch.bfloat16: 2.0**-8, torch.float16: 2.0**-11}
        allowed = 1e-5 + rounding[actual.dtype]
        norm, of_error = (t.abs() if t.dim() == 1 else t.norm(dim=1) for t in (finite, error))
        floor = 1e-6 + (2e-6 * norm.max() if norm.numel() else 0)
        worst = (of_error / (allowed * norm + floor)).max() if norm.numel() else 0
        assert worst <= 1, (
            f"Tensor-likes are not close: the error is {worst:.2g} times what is allowed"
        )


def example(rows: int, classes: int, dtype: torch.dtype, teacher: torch.dtype | None = None):
    student, of_teacher = reference.example_inputs(rows, classes=classes)
    return student.to(dtype), of_teacher.to(teacher or dtype)


def top_k(rows: int, classes: int, count: int, dtype: torch.dtype = torch.float32, **options):
    """A case whose teacher is known of `count` classes of each row."""
    student, teacher = example(rows, classes, dtype)
    best = torch.log_softmax(teacher.double(), 1).topk(min(count, classes), sorted=False)
    values, indices = best.values.to(dtype), best.indices
    return Case(student, values, indices=indices, **options)


CLUSTERS = (
    (2100, torch.bfloat16, {"labels": torch.tensor([2090, 1]), "factor": 0.0}),
    (2051, torch.bfloat16, {"alignment": 2, "temperature": 2.0}),
    (5003, torch.bfloat16, {"divergence": "jsd", "row_mask": torch.tensor([True, False])}),
    (2100, torch.float32, {"classes": 2099, "factor": 2.0}),
    (4200, torch.float32, {"divergence": "skewed_reverse_kl", "beta": 0.3}),
    (9000, torch.bfloat16, {"classes": 8993, "labels": torch.tensor([4, 8992])}),
    (33000, torch.float32, {}),
)


def all_cases() -> list[Case]:
    torch.manual_seed(0)
    cases = []

    def add(student: Tensor, teacher: Tensor, **options) -> None:
        cases.append(Case(student, teacher, **options))

    # Each type, a warp's row and a block's, whole chunks and not.
    for i, dtype in enumerate(DTYPES):
        for j, (rows, classes) in enumerate(((9, 1), (3, 37), (1, 600), (1, 2057 + i))):
            add(*example(rows, classes, dtype), divergence=list(KINDS)[(i + j) % 6])
    other = {torch.float32: torch.bfloat16, torch.bfloat16: torch.float16}
    for dtype, teacher in other.items():
        add(*example(2, 64, dtype, teacher), temperature=2.0)
        add(*example(2, 72, teacher, dtype), divergence="jsd", beta=0.2)
    # Every divergence with every other option, in the precise arithmetic and the fast one.
    labels = torch.tensor([3, -100, 99, 50])
    mask = torch.tensor([True, False, True, True])
    weight = torch.rand(100) + 0.5
    hard = {"labels": labels, "row_mask": mask, "class_weight": weight, "label_smoothing": 0.1}
    hard |= {"grad_hard": torch.tensor([0.5, 7.0, -2.0, 0.0]), "grad_soft": torch.arange(4.0)}
    seen = (0.7, 5.0, 1.3, 4.0)
    for divergence in KINDS:
        for dtype in (torch.float32, torch.bfloat16):
            inputs = example(4, 104, dtype)
            of_some = {"divergence": divergence, "beta": 0.4, "temperature": 2.0}
            cases.append(top_k(4, 100, 7, dtype, seen=(1.2, 6.0, 1.0, 0.0), **of_some, **hard))
            add(*inputs, divergence=divergence, classes=100, temperature=3.0, seen=seen, **hard)
            log = {"teacher_is_log": True, "beta": 0.9, "temperature": 1.2}
            add(*inputs, divergence=divergence, **log, seen=(1.5, 0.0, 1.0, 0.0))
            add(inputs[0] * 1e3, inputs[0] * 1e3, divergence=divergence, beta=0.3, exact=True)
            inputs = [t.clone() for t in inputs]
            inputs[0][1, 7] = inputs[1][1, 7] = -math.inf  # of both: counts 0
            inputs[0][2, 5], inputs[1][3, 6], inputs[0][0, 1] = -math.inf, -math.inf, math.nan
            add(*inputs, divergence=divergence, losses_only=True)
    # Far from 0, and far apart; rows of nothing, rows masked out, no rows.
    for dtype in (torch.float32, torch.bfloat16):
        student, teacher = example(3, 300, dtype)
        add(student * 1e3 + 5e3, teacher * 1e3 - 5e3, temperature=500.0)
        rising = torch.linspace(-60, 60, 300).to(dtype)
        add(student + rising, teacher + rising, labels=torch.tensor([0, 299, 7]), temperature=9.0)
        add(torch.full_like(student, -math.inf), teacher, losses_only=True)
        add(student, teacher, row_mask=torch.tensor([False] * 3), exact=True)
        add(student[:, :0], teacher[:, :0])
        add(student[:0], teacher[:0])
        add(student, teacher, grad_soft=torch.zeros(3), labels=labels[1:].abs())
    # Nearly equal: differences of probabilities must not cancel.
    for dtype in (torch.float32, torch.float16):
        _, teacher = example(2, 300, dtype)
        student = (teacher + 5e-2 * torch.randn(2, 300)).to(dtype)
        add(student, teacher, grad_soft=torch.full((2,), 1e4))
    x = torch.logspace(-7, 1, 40)[:, None]
    pair = torch.cat([0 * x, -x], 1)
    add(pair.flip(1), pair, grad_soft=1 / x.flatten())
    # Addresses: none aligned, both misaligned alike, each in its own way; more than one part.
    student, teacher = example(3, 67, torch.bfloat16)
    add(student, teacher, alignment=2)
    add(student, padded(teacher, 6), classes=61)
    add(*example(3, 67, torch.float32), divergence="jsd", alignment=4)
    add(*example(1, 16400, torch.bfloat16), divergence="reverse_kl", classes=16396, factor=0.3)
    # Two, four and eight blocks, the last one's part shorter or misaligned; beyond a cluster.
    for classes, dtype, options in CLUSTERS:
        add(*example(1 if classes > 10000 else 2, classes, dtype), **options)
    # Teachers of all classes, of none, with unused places, in 32 bits; more than one part.
    cases.append(top_k(2, 9, 9))
    cases.append(top_k(2, 9, 0, torch.float16))
    some = top_k(3, 70, 12, divergence="jsd")
    some.indices[:, 3:5] = -1
    cases.append(replace(some, indices=some.indices.int()))
    cases.append(top_k(1, 16396, 300, torch.bfloat16, labels=torch.tensor([16390])))
    return cases


@functools.cache
def cases() -> list[Case]:
    """Small ones first: most bugs show there."""
    return sorted(all_cases(), key=lambda case: case.student.numel())


@pytest.fixture(scope="module")
def outcome(request):
    def cases_of(trial: Trial) -> list[Case]:
        """The bugs of the one pass show where a row has several blocks or chunks a thread."""
        long_only = trial.mutant is not None and trial.capability == 90
        return [case for case in cases() if not long_only or case.count > 2048]

    yield from outcomes(request, cases_of)


@pytest.mark.parametrize(
    "trial", [Trial("softmax_kl", capability=c, seeds=SEEDS[2:]) for c in (80, 90)], ids=str
)
def test_matches_reference(trial, outcome):
    outcome(trial)


KERNELS, ROWS, SUMS = (f"softmax_kl/{name}" for name in ("cuda.cu", "rows.cuh", "sums.cuh"))
ELEMENTS, GRADIENT, TOP_K = (f"softmax_kl/{name}.cuh" for name in ("elements", "gradient", "top_k"))
MUTANTS = (
    Mutant("missing barrier", SUMS, "= sums;\n  __syncthreads();", "= sums;"),
    Mutant("sums of one warp alone", SUMS, "sums = of_warps[lane % kWarps]", "sums = of_warps[0]"),
    Mutant(
        "origins that move apart",
        SUMS,
        "(sums.weighted + sums.second * (up_first - up_second))",
        "sums.weighted",
    ),
    Mutant("the wrong sign", ELEMENTS, "p_larger ? -p * e : q * e", "p_larger ? -p * e : -q * e"),
    Mutant("series beyond its bound", ELEMENTS, "fabsf(log2_quotient) < kClose", "true"),
    Mutant(
        "alignment ignored",
        ROWS,
        "while (body < begin + kChunk && ((rows.misalignment(body) | ...) != 0))",
        "while (false)",
        "not aligned to its size",
    ),
    Mutant(
        "chunk behind the row's end",
        ROWS,
        "if (j + i * step < body_end) load",
        "load",
        "outside of the (first|second) logits",
    ),
    Mutant(
        "padding not written",
        KERNELS,
        "if (last && to.width > end) fill_with_zeros(out, group, end, int(to.width));",
        "",
    ),
    Mutant("label without its smoothing", GRADIENT, "factor * (1 - hard.smoothing)", "factor"),
    Mutant(
        "marks that are set before they are cleared",
        TOP_K,
        "marks[i] = 0;\n  __syncthreads();",
        "marks[i] = 0;",
    ),
    Mutant(
        "bins overwritten by the tail",
        TOP_K,
        "__syncthreads();  // the bins come over what has been written",
        "",
    ),
    Mutant("mask ignored", ROWS, "problem.row_mask == nullptr ||", "true ||"),
)


ONE_PASS, PARKED = "softmax_kl/cuda_sm90a.cu", "softmax_kl/parked.cuh"
ONE_PASS_MUTANTS = (
    Mutant(
        "sums read before they are there",
        ONE_PASS,
        "shared[0] = own;\n  cluster_sync();",
        "shared[0] = own;",
        BY_SCHEDULE,
    ),
    Mutant("sums of the wrong block", ONE_PASS, "uint32_t(rank))", "uint32_t(rank / 2))"),
    Mutant(
        "blocks that return before others have read",
        ONE_PASS,
        "if (blocks > 1) cluster_wait();",
        "",
        "which has returned",
    ),
    Mutant(
        "four blocks for eight",
        ONE_PASS,
        "combine_lanes<kPrecise, kMostBlocks>",
        "combine_lanes<kPrecise, 4>",
    ),
    Mutant(
        "slopes of one block",
        ONE_PASS,
        "of_cluster(added_up(group, own), blocks)",
        "added_up(group, own)",
    ),
    Mutant(
        "padding of the row not written",
        ONE_PASS,
        "if (rank == blocks - 1) fill_with_zeros(",
        "if (false) fill_with_zeros(",
    ),
    Mutant(
        "every block the first part",
        ONE_PASS,
        "rank * classes < end ? rank * classes",
        "0 < end ? 0",
        "shared array",
    ),
    Mutant(
        "words read before they are there",
        PARKED,
        "copy_async_wait<kAhead - 1>",
        "copy_async_wait<kAhead>",
    ),
    Mutant(
        "chunks over one another",
        PARKED,
        "(slot * kUnits + unit) *",
        "(slot * (kUnits - 1) + unit) *",
    ),
    Mutant(
        "room for one chunk less", PARKED, "+ threads - 1) / threads", ") / threads", "shared array"
    ),
)


@pytest.mark.parametrize(
    "trial",
    [
        *(Trial("softmax_kl", mutant) for mutant in MUTANTS),
        *(Trial("softmax_kl", mutant, capability=90) for mutant in ONE_PASS_MUTANTS),
    ],
    ids=str,
)
def test_planted_bug_is_caught(trial, outcome):
    assert_caught(trial, outcome)

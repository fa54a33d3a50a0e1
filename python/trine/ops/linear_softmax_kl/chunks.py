"""The loss, and the gradients that are wanted, a few rows at a time: [rows, vocabulary] never is.

What bounds it: four matrix products (two logits, two gradients), beside which the loss is small. A
chunk's logits are computed, its losses taken, the student's logits overwritten by their gradient,
and that multiplied at once: gradients are made together with the loss.

The weight's gradient is a sum over all chunks, in fp32: in the result itself where that is fp32 (as
it is under autocast), beside a result of 16 bits where the memory limit has room for it. Otherwise
it is taken afterwards by blocks of classes over all rows, whose statistics are known by then: both
logits are computed twice, six products in all, but for the last chunk, which is still there.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from trine.ops.linear_softmax_kl.heads import (
    BLOCK_SHARE,
    Head,
    Rows,
    aligned,
    in_steps,
    padded,
)
from trine.ops.softmax_kl.reference import seen

_forward = torch.ops.trine.softmax_kl.default
_backward = torch.ops.trine.softmax_kl_backward.default

# On the CPU a chunk is overwritten by its gradient in this many pieces, each small enough to come
# from a cache the second time; elsewhere at once, into fresh memory: a GPU wants all of the rows.
_PIECES = 24
# Where classes are taken in blocks, these are at least so many; less would starve the products.
_LEAST_CLASSES = 1024


class Options(NamedTuple):
    """What the raw ops take after their tensors, in their order."""

    temperature: float
    divergence: str
    beta: float
    label_smoothing: float
    classes: int
    student_scale: float
    student_cap: float
    teacher_scale: float
    teacher_cap: float
    teacher_is_log: bool


class Targets(NamedTuple):
    """What the raw ops take after both logits: what rows are compared with, and which count."""

    indices: Tensor | None
    labels: Tensor | None
    class_weight: Tensor | None
    mask: Tensor | None

    def of(self, rows: Rows, chunk: slice) -> "Targets":
        mask = None if rows.mask is None else rows.mask[chunk]
        indices, labels = rows.of(self.indices, chunk), rows.of(self.labels, chunk)
        return Targets(indices, labels, self.class_weight, mask)


class Wanted(NamedTuple):
    """Which gradients are."""

    hidden: bool
    weight: bool
    bias: bool


class Results(NamedTuple):
    soft: Tensor  # of each row, as the raw op gives them
    hard: Tensor
    hidden: Tensor  # gradients; empty where they are not wanted
    weight: Tensor
    bias: Tensor


class Plan(NamedTuple):
    """What fits into the limit; one row is taken whatever it needs."""

    rows: int  # of a chunk
    piece: int  # rows that are overwritten by their gradient at a time
    weight_sums: torch.dtype | None  # None: the weight's gradient is taken afterwards, by classes


def plan(
    student: Head,
    teacher: Head,
    rows: Rows,
    targets: Targets,
    classes: int,
    wanted: Wanted,
    limit: int,
) -> Plan:
    pieces = _PIECES if student.hidden.device.type == "cpu" else 1
    of_gradient = padded(classes) * student.dtype.itemsize
    of_log_sum = 0
    if wanted.weight and student.weight.dtype != torch.float32 and targets.labels is not None:
        of_log_sum = classes * 3 * 4
    row = student.row_bytes(rows, classes) + teacher.row_bytes(rows, classes)
    if any(wanted):
        row += of_gradient // pieces + of_log_sum // _PIECES
    if wanted.hidden and _apart(student, rows):
        row += 4 * student.hidden.shape[1]
    limit -= (student.converts + teacher.converts) * (limit // BLOCK_SHARE)

    def fitting(space: int) -> int:
        if any(wanted) and space < _PIECES * row:  # then a piece is a row
            space -= of_log_sum + (of_gradient if pieces > 1 else 0)
        return max(1, space // row)

    most, sums = fitting(limit), torch.float32
    if wanted.weight and student.weight.dtype != torch.float32:
        beside = 4 * student.weight.numel()
        if rows.count <= most:
            sums = student.weight.dtype  # of one chunk: nothing is summed
        elif beside <= limit // 2:
            most = fitting(limit - beside - limit // BLOCK_SHARE)
        elif targets.indices is None:
            sums = None
        else:
            sums = student.weight.dtype
    size = -(-rows.count // -(-max(1, rows.count) // most))  # chunks of one size
    return Plan(max(1, size), max(1, size // pieces) if any(wanted) else max(1, size), sums)


def losses_and_gradients(
    student: Head,
    teacher: Head,
    targets: Targets,
    options: Options,
    coefficients: tuple[Tensor | None, Tensor | None],
    wanted: Wanted,
    limit: int,
) -> Results:
    """Both losses of each row; the gradients are those of sum(c * soft + d * hard)."""
    rows = Rows(len(student.hidden), targets.mask)
    planned = plan(student, teacher, rows, targets, options.classes, wanted, limit)
    by_classes = wanted.weight and planned.weight_sums is None
    results = _results(student, targets, wanted)
    weight_sums = None
    if wanted.weight and not by_classes:
        weight_sums = results.weight
        if weight_sums.dtype != planned.weight_sums:
            weight_sums = torch.empty_like(weight_sums, dtype=planned.weight_sums)
    work = _Work(student, teacher, rows, targets, options, coefficients)
    known, last = work.by_rows(planned, wanted, results, weight_sums, keep=by_classes)
    if by_classes:
        work.by_classes(known, last, results.weight, limit)
    elif wanted.weight and weight_sums is not results.weight:
        results.weight.copy_(weight_sums)
    if wanted.weight:
        results.weight[options.classes if rows.count else 0 :].zero_()
    return results


def _results(student: Head, targets: Targets, wanted: Wanted) -> Results:
    hidden, weight = student.hidden, student.weight
    fp32 = {"dtype": torch.float32, "device": hidden.device}
    return Results(
        torch.zeros(len(hidden), **fp32),
        torch.zeros(0 if targets.labels is None else len(hidden), **fp32),
        hidden.new_zeros(hidden.shape if wanted.hidden else 0),
        weight.new_empty(weight.shape if wanted.weight else 0),
        torch.zeros(len(weight) if wanted.bias else 0, **fp32),
    )


def _apart(student: Head, rows: Rows) -> bool:
    """Whether the gradient of `hidden` cannot be summed where it belongs."""
    return rows.index is not None or student.hidden.dtype != student.gradient_dtype


def _put_hidden_gradient(
    of_logits: Tensor, student: Head, rows: Rows, chunk: slice, into: Tensor
) -> None:
    if not _apart(student, rows):
        student.hidden_gradient(of_logits, into[chunk])
        return
    gradient = torch.empty_like(into[chunk], dtype=student.gradient_dtype)
    student.hidden_gradient(of_logits, gradient)
    rows.put(gradient, chunk, into)


class Known(NamedTuple):
    """Of some rows."""

    saved: Tensor  # by the raw op
    log_sum: Tensor | None  # of exp(logit), where there are labels


class Chunk(NamedTuple):
    rows: slice
    hidden: Tensor
    of_logits: Tensor  # the gradient


class _Work(NamedTuple):
    student: Head
    teacher: Head
    rows: Rows
    targets: Targets
    options: Options
    coefficients: tuple[Tensor | None, Tensor | None]

    def by_rows(
        self,
        planned: Plan,
        wanted: Wanted,
        results: Results,
        weight_sums: Tensor | None,
        keep: bool,
    ) -> tuple[list[Known], Chunk | None]:
        """Everything but the weight's gradient, where there are no sums of it. Returns what is to
        `keep` for it: of each piece, and of the last chunk."""
        student, teacher, rows, targets, options, _ = self
        every, known, last = slice(0, options.classes), [], None
        memories = [head.memory(planned.rows, options.classes) for head in (student, teacher)]
        for chunk in rows.chunks(planned.rows):
            hidden = student.rows(rows, chunk)
            s = student.logits(hidden, every, memories[0])
            t = teacher.logits(teacher.rows(rows, chunk), every, memories[1])
            for piece in rows.chunks(planned.piece, chunk):
                here = slice(piece.start - chunk.start, piece.stop - chunk.start)
                given = (s[here], t[here], *targets.of(rows, piece), *options)
                soft, hard, saved = _forward(*given)
                rows.put(soft, piece, results.soft)
                if targets.labels is not None:
                    rows.put(hard, piece, results.hard)
                if keep:
                    known.append(Known(saved, _log_sum(s[here, every], targets, options)))
                if any(wanted):
                    gradient = _backward(*self.upstream(piece), *given, saved, False)
                    if wanted.bias:
                        results.bias[every] += gradient[:, every].sum(0, dtype=torch.float32)
                    if piece == chunk:
                        s = gradient
                    else:
                        s[here] = gradient
                    del gradient  # before the next one is made
            if wanted.hidden:
                _put_hidden_gradient(s[:, every], student, rows, chunk, results.hidden)
            if weight_sums is not None:
                sums, add = weight_sums[every], chunk.start > 0
                student.weight_gradient(s[:, every], hidden, sums, add)
            if keep and chunk.stop == rows.count:
                last = Chunk(chunk, hidden, s[:, every])
        return known, last

    def by_classes(self, known: list[Known], last: Chunk, into: Tensor, limit: int) -> None:
        """The weight's gradient by blocks of classes, each over all rows.

        A row's soft gradient at some columns needs of the others only what forward has saved. The
        hard one needs the label, too, which the raw op would look for in the block."""
        student, teacher, rows = self.student, self.teacher, self.rows
        saved = torch.cat([piece.saved for piece in known])
        log_sums = None
        if self.targets.labels is not None:
            log_sums = torch.cat([piece.log_sum for piece in known])
        others = slice(0, last.rows.start)
        size, width = self.sizes(others.stop, limit - last.of_logits.untyped_storage().nbytes())
        memories = [head.memory(size, width) for head in (student, teacher)]
        for block in in_steps(slice(0, self.options.classes), width):
            sums = torch.empty_like(into[block], dtype=torch.float32)
            student.weight_gradient(last.of_logits[:, block], last.hidden, sums, add=False)
            for chunk in in_steps(others, size):
                hidden = student.rows(rows, chunk)
                s = student.logits(hidden, block, memories[0])
                t = teacher.logits(teacher.rows(rows, chunk, block), block, memories[1])
                gradient = self.soft_gradient(s, t, saved[chunk], chunk, block)
                s, gradient = (x[:, : block.stop - block.start] for x in (s, gradient))
                if log_sums is not None:
                    gradient += self.hard_gradient(s, log_sums[chunk], chunk, block)
                student.weight_gradient(gradient, hidden, sums, add=True)
            into[block].copy_(sums)

    def upstream(self, chunk: slice) -> tuple[Tensor, Tensor]:
        c, d = (self.rows.of(values, chunk) for values in self.coefficients)
        return c, c[:0] if d is None else d

    def sizes(self, count: int, limit: int) -> tuple[int, int]:
        """Rows, of `count`, and classes that are taken at a time: all rows, unless the classes get
        too few."""
        student, teacher, rows = self.student, self.teacher, self.rows
        row = student.row_bytes(rows, 0) + teacher.row_bytes(rows, 0)
        # Both logits, the gradient, and what the cross entropy's takes.
        element = 2 * student.dtype.itemsize + teacher.dtype.itemsize
        element += 0 if self.targets.labels is None else 6 * 4
        class_ = 10 * student.hidden.shape[1]  # a sum in fp32, a product on its way there
        space = limit - _LEAST_CLASSES * class_
        size = max(1, min(count, space // (row + _LEAST_CLASSES * element)))
        return size, aligned((limit - size * row) // (size * element + class_))

    def soft_gradient(
        self, s: Tensor, t: Tensor, saved: Tensor, chunk: slice, block: slice
    ) -> Tensor:
        options = self.options._replace(classes=block.stop - block.start, label_smoothing=0.0)
        c, _ = self.upstream(chunk)
        targets = Targets(None, None, None, self.targets.of(self.rows, chunk).mask)
        return _backward(c, c[:0], s, t, *targets, *options, saved, False)

    def hard_gradient(self, s: Tensor, log_sum: Tensor, chunk: slice, block: slice) -> Tensor:
        options, (_, labels, weight, mask) = self.options, self.targets.of(self.rows, chunk)
        _, d = self.upstream(chunk)
        if mask is not None:
            labels, d = torch.where(mask, labels, 0), torch.where(mask, d, 0)
        if weight is None:
            weight = s.new_ones(options.classes, dtype=torch.float32)
        of_each = options.label_smoothing / options.classes * weight
        of_label = (1 - options.label_smoothing) * weight[labels]
        z = seen(s.float(), options.student_scale, options.student_cap)
        gradient = (z - log_sum[:, None]).exp_()
        gradient *= (of_label + of_each.sum())[:, None]
        gradient -= of_each[block]
        at = labels - block.start
        within = (at >= 0) & (at < s.shape[1])
        at = torch.where(within, at, 0)
        gradient.scatter_add_(1, at[:, None], torch.where(within, -of_label, 0)[:, None])
        gradient *= (d * options.student_scale)[:, None]
        if options.student_cap:
            gradient *= 1 - (z / options.student_cap).square_()
        return gradient.masked_fill_((d == 0)[:, None], 0)


def _log_sum(s: Tensor, targets: Targets, options: Options) -> Tensor | None:
    """Of a student's probabilities for its labels; a few rows at a time, for it is in fp32."""
    if targets.labels is None:
        return None
    steps = in_steps(slice(0, len(s)), max(1, len(s) // _PIECES))
    scale, cap = options.student_scale, options.student_cap
    return torch.cat([seen(s[step].float(), scale, cap).logsumexp(1) for step in steps])

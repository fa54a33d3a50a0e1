"""The rows that count, and the last linear layers of two models, whose logits are made in parts."""

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

# fp32 weights are multiplied in blocks of these bytes on the CPU. A product of a few rows with a
# large matrix packs all of it first: with one of 32000 x 1024, 256 rows took 1.2 times as long as
# in blocks, 170 rows 1.5 times.
_PACKED_BYTES = 4 << 20
# Of the memory limit: what blocks of weights in another dtype take, or of products on their way to
# fp32.
BLOCK_SHARE = 8
# Rows of logits begin at multiples of this many: products on tensor cores want 16 bytes, and a
# vocabulary may have any size.
_ALIGN = 64


def _without_instructions() -> frozenset[torch.dtype]:
    """Of 16 bits, for which oneDNN finds none on this processor: PyTorch's own products then take
    many times as long as fp32 ones. On Zen 3, 128 rows, 2000 classes: bf16 787 ms, in fp32 29."""
    if not torch.backends.mkldnn.is_available():  # what PyTorch multiplies with is not known
        return frozenset()
    found = {
        torch.bfloat16: torch.ops.mkldnn._is_mkldnn_bf16_supported(),
        torch.float16: torch.ops.mkldnn._is_mkldnn_fp16_supported(),
    }
    return frozenset(dtype for dtype, supported in found.items() if not supported)


FASTER_IN_FP32 = _without_instructions()


class Rows:
    """Those that count. On the CPU no others are taken. A GPU would have to be waited for to know
    how many these are: there the others are taken as zeros, for 0 * NaN would be NaN."""

    def __init__(self, rows: int, mask: Tensor | None) -> None:
        self.index, self.mask, self.count = None, None, rows
        if mask is not None and mask.device.type != "cpu":
            self.mask = mask
        elif mask is not None and not mask.all():
            self.index = mask.nonzero().squeeze(1)
            self.count = len(self.index)

    def chunks(self, size: int, of: slice | None = None) -> Iterator[slice]:
        return in_steps(slice(0, self.count) if of is None else of, size)

    def of(self, values: Tensor | None, chunk: slice) -> Tensor | None:
        if values is None or self.index is None:
            return None if values is None else values[chunk]
        return values.index_select(0, self.index[chunk])

    def put(self, values: Tensor, chunk: slice, into: Tensor) -> None:
        if self.index is None:
            into[chunk].copy_(values)
        else:
            into.index_copy_(0, self.index[chunk], values.to(into.dtype))


@dataclass(frozen=True)
class Head:
    """logits = hidden @ weight.T + bias in `dtype`; without a weight `hidden` are the logits."""

    hidden: Tensor
    weight: Tensor | None
    bias: Tensor | None
    dtype: torch.dtype
    limit: int  # of memory, in bytes

    @property
    def converts(self) -> bool:
        return self.weight is not None and self.weight.dtype != self.dtype

    @property
    def few(self) -> int:
        """Classes of which a share of the limit holds the weights in 16 bits, or a product of that
        size on its way to fp32."""
        return aligned(self.limit // BLOCK_SHARE // (8 * max(1, self.weight.shape[1])))

    def row_bytes(self, rows: Rows, classes: int) -> int:
        """Of a row's logits and hidden values, where they are not used as they are."""
        gathered = rows.index is not None or (rows.mask is not None and self.weight is not None)
        size = self.hidden.itemsize if gathered else 0
        if self.hidden.dtype != self.dtype:
            size += self.dtype.itemsize
        logits = 0 if self.weight is None else padded(classes) * self.dtype.itemsize
        return self.hidden.shape[1] * size + logits

    def rows(self, rows: Rows, chunk: slice, classes: slice = slice(None)) -> Tensor:
        """What logits() takes for these classes."""
        if self.weight is None:
            return rows.of(self.hidden[:, classes], chunk)
        hidden = rows.of(self.hidden, chunk)
        if rows.mask is not None:
            hidden = torch.where(rows.mask[chunk, None], hidden, 0)
        return hidden.to(self.dtype)

    def memory(self, rows: int, classes: int) -> Tensor | None:
        """For the logits, and columns of padding."""
        if self.weight is None:
            return None
        return self.hidden.new_empty(rows, padded(classes), dtype=self.dtype)

    def logits(self, hidden: Tensor, classes: slice, memory: Tensor | None) -> Tensor:
        """Of these rows and classes, and padding."""
        if memory is None:
            return hidden
        out = memory[: len(hidden)]
        step = classes.stop
        if self.converts:
            step = self.few
        elif self.dtype == torch.float32 and hidden.device.type == "cpu":
            step = aligned(_PACKED_BYTES // (4 * max(1, hidden.shape[1])))
        for block in in_steps(classes, step):
            columns = out[:, block.start - classes.start : block.stop - classes.start]
            if self.bias is None:
                torch.mm(hidden, self.weights(block).T, out=columns)
            else:
                bias = self.bias[block].to(self.dtype)
                torch.addmm(bias, hidden, self.weights(block).T, out=columns)
        return out

    def weights(self, block: slice) -> Tensor:
        return self.weight[block].to(self.dtype)

    @property
    def gradient_dtype(self) -> torch.dtype:
        """In which that of `hidden` is summed over blocks of classes; there may be one alone."""
        return torch.float32 if self.converts else self.dtype

    def hidden_gradient(self, of_logits: Tensor, out: Tensor) -> None:
        """Of some rows, in the gradient's dtype."""
        classes = of_logits.shape[1]
        for block in in_steps(slice(0, classes), self.few if self.converts else classes):
            multiply(of_logits[:, block], self.weights(block), out, add=block.start > 0)

    def weight_gradient(self, of_logits: Tensor, hidden: Tensor, out: Tensor, add: bool) -> None:
        """Of the classes of `of_logits`; `out` may be fp32 where the factors have 16 bits."""
        classes = of_logits.shape[1]
        apart = out.dtype != hidden.dtype and not out.is_cuda
        for block in in_steps(slice(0, classes), self.few if apart else classes):
            multiply(of_logits[:, block].T, hidden, out[block], add)


def dtype_of_products(weight: Tensor | None, dtype: torch.dtype) -> torch.dtype:
    """In which a linear layer of `dtype` is computed; `dtype` where there is none."""
    faster_in_fp32 = weight is not None and weight.is_cpu and dtype in FASTER_IN_FP32
    return torch.float32 if faster_in_fp32 else dtype


def padded(classes: int) -> int:
    return -(-classes // _ALIGN) * _ALIGN


def aligned(classes: int) -> int:
    """About as many, and one at least."""
    return max(1, classes // _ALIGN * _ALIGN or classes)


def in_steps(whole: slice, step: int) -> Iterator[slice]:
    for at in range(whole.start, whole.stop, step):
        yield slice(at, min(at + step, whole.stop))


def multiply(a: Tensor, b: Tensor, out: Tensor, add: bool) -> None:
    """out = a @ b, or out += a @ b; `out` may be fp32 where the factors have 16 bits."""
    if out.dtype == a.dtype:
        torch.addmm(out, a, b, out=out) if add else torch.mm(a, b, out=out)
    elif out.is_cuda:
        aten = torch.ops.aten
        if add:
            aten.addmm.dtype_out(out, a, b, out.dtype, out=out)
        else:
            aten.mm.dtype_out(a, b, out.dtype, out=out)
    else:
        product = a @ b
        out.add_(product) if add else out.copy_(product)

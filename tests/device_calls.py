"""Calls of every op at shapes that reach every CUDA kernel, each with what it must give.

`python tests/device_calls.py` makes them all on the GPU and compares, in any process: a memory
checker's, for instance. Inputs are made on the CPU, so that the op's own kernels are all that runs.
"""

import itertools
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

import torch
import trine  # noqa: F401  (registers the operators)
from devices import ABSENT, DEVICE, all_moved, is_visible
from linear_inputs import (
    DTYPES,
    assert_same_bits,
    exact_int8_weight_inputs,
    exact_sparse24_inputs,
)
from test_int8_conv2d import inputs as conv_inputs
from torch import Tensor
from trine import ops
from trine.ops.activation import CODES
from trine.ops.int8_conv2d import reference as conv
from trine.ops.int8_embedding import reference as embedding
from trine.ops.int8_linear import reference as int8
from trine.ops.int8_weight_linear import reference as int8_weight
from trine.ops.norm_quantize_rows import reference as norms
from trine.ops.quantize_rows import reference as rows
from trine.ops.sparse24_linear import reference as sparse24
from trine.ops.ternary24_linear import reference as ternary24
from trine.ops.ternary_linear import reference as ternary

# (M, N, K). Few rows: one, two, four and eight tiles of activations, and more weight rows in a
# block where N fills the GPU with them. Many rows: tails in every direction, several tiles of y.
FEW_ROWS = ((1, 17, 100), (3, 8460, 80), (13, 33, 257), (13, 8460, 80), (29, 18, 130))
FEW_ROWS += ((29, 8460, 80), (61, 33, 1030))
MANY_ROWS = ((65, 257, 700), (130, 16, 129), (70, 24, 64), (513, 300, 200), (300, 3, 2100))
EMPTY = ((0, 4, 32), (4, 0, 32), (4, 3, 0), (70, 3, 0))
# (M, N, K, groups)
GROUPED = ((1, 5, 64, 1), (13, 17, 256, 4), (70, 35, 576, 3))
# (B, C, N, kernel, groups, stride, padding, dilation, H, W). Tiles of 128 x 32, 64 x 64 and, where
# they fill a GPU, 128 x 128, each from words and from whole units; depthwise.
CONVOLUTIONS = (
    (2, 3, 20, (7, 7), 1, (2, 2), (3, 3), (1, 1), 33, 30),
    (1, 32, 66, (3, 3), 2, (1, 1), (1, 1), (1, 1), 14, 15),
    (1, 5, 60, (2, 3), 1, (1, 2), (0, 1), (1, 2), 9, 12),
    (2, 64, 64, (3, 3), 1, (1, 1), (1, 1), (2, 2), 17, 19),
    (1, 9, 130, (1, 1), 1, (1, 1), (0, 0), (1, 1), 130, 133),
    (1, 16, 129, (3, 1), 1, (1, 1), (1, 0), (1, 1), 128, 130),
    (2, 37, 37, (3, 5), 37, (1, 2), (1, 2), (1, 1), 21, 20),
)
# Rows that 8, 32, 128, 512 and 1024 threads work on, and longer ones.
# (indices, V, D): a slice of a warp and several, rows of y that begin at whole chunks and not.
EMBEDDINGS = (
    ((3,), 50, 1),
    ((2, 70), 9, 384),
    ((5,), 7, 1030),
    ((300,), 1000, 4096),
    ((0, 2), 3, 8),
)
ROW_LENGTHS = (0, 1, 37, 256, 1001, 4096, 16384, 20001, 65537)


@dataclass(frozen=True)
class Call:
    op: str
    reference: Callable
    arguments: tuple  # on the CPU, as is what `expected` gives
    options: dict[str, Tensor | str] = field(default_factory=dict)

    def __str__(self) -> str:
        shapes = ["x".join(map(str, t.shape)) for t in self.arguments if isinstance(t, Tensor)][:2]
        return f"{self.op} {' '.join([*shapes, *self.options])}"

    def run(self, device: str = DEVICE) -> Tensor | tuple[Tensor, ...]:
        arguments, options = all_moved(self.arguments, device), all_moved(self.options, device)
        return getattr(ops, self.op)(*arguments, **options)

    def expected(self) -> tuple[Tensor, ...]:
        return as_tuple(self.reference(*self.arguments, **self.options))


def as_tuple(result: Tensor | tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    return (result,) if isinstance(result, Tensor) else result


def assert_gives(result: Tensor | tuple[Tensor, ...], expected: tuple[Tensor, ...]) -> None:
    for a, e in zip(as_tuple(result), expected, strict=True):
        assert_same_bits(a.cpu(), e)


def norm_call(norm: str, *shape, inputs: tuple | None = None) -> Call:
    op = f"{norm}_norm_quantize_rows"
    return Call(op, getattr(norms, op), inputs or norms.example_inputs(norm, *shape))


def calls() -> Iterator[Call]:
    torch.manual_seed(0)
    for i, k in enumerate(ROW_LENGTHS):
        yield Call("quantize_rows", rows.quantize_rows, rows.example_inputs(3, k, DTYPES[i % 3]))
        if k:
            yield norm_call("rms", 3, k, DTYPES[i % 3], i % 2 == 0)
            yield norm_call("layer", 3, k, DTYPES[(i + 1) % 3], i % 2 == 0)
    yield Call("quantize_rows", rows.quantize_rows, rows.example_inputs(1000, 100))
    for norm in ("rms", "layer"):
        x, *rest, eps = norms.example_inputs(norm, 1000, 136, torch.bfloat16)
        yield norm_call(norm, inputs=(x, *(values.float() for values in rest), eps))
    for i, (shape, v, d) in enumerate(EMBEDDINGS):
        for index in (torch.int64, torch.int32):
            inputs = embedding.example_inputs(shape, v, d, DTYPES[i % 3], index)
            yield Call("int8_embedding", embedding.int8_embedding, inputs)
    for i, (m, n, k) in enumerate((*FEW_ROWS, *MANY_ROWS, *EMPTY)):
        dtype, bias = DTYPES[i % 3], i % 2 == 0
        inputs = int8.example_inputs(m, n, k, dtype, bias)
        yield Call("int8_linear", int8.int8_linear, inputs)
        scale_shape = (1,) if i % 4 == 0 else None
        inputs = ternary.example_inputs(m, n, k, dtype, bias, scale_shape)
        yield Call("ternary_linear", ternary.ternary_linear, inputs)
        inputs = ternary24.example_inputs(m, n, k, dtype, bias, scale_shape)
        yield Call("ternary24_linear", ternary24.ternary24_linear, inputs)
    for m, n, k in (FEW_ROWS[2], MANY_ROWS[0]):
        options = {"input_scale": torch.tensor(0.03)}
        for zero_point in (None, -128, 7):
            if zero_point is not None:
                options |= {"input_zero_point": torch.tensor(zero_point, dtype=torch.int32)}
            inputs = int8.example_inputs(m, n, k, torch.bfloat16)
            yield Call("int8_linear", int8.int8_linear, inputs, dict(options))
    for i, (m, n, k) in enumerate((*FEW_ROWS, *MANY_ROWS, *EMPTY)):
        inputs, scale = sparse24.example_inputs(m, n, k, DTYPES[i % 3], torch.int8, i % 2 == 0)
        yield Call("sparse24_linear", sparse24.sparse24_linear, inputs, scale)
        inputs = exact_int8_weight_inputs(m, n, k, DTYPES[i % 3], i % 2 == 0)
        yield Call("int8_weight_linear", int8_weight.int8_weight_linear, inputs)
        inputs = exact_sparse24_inputs(m, n, k, DTYPES[1 + i % 2], i % 3 == 0)
        yield Call("sparse24_linear", sparse24.sparse24_linear, inputs)
    for i, shape in enumerate(CONVOLUTIONS):
        inputs, options = conv_inputs(shape, DTYPES[i % 3], i % 2 == 0, i % 3 == 0, i % 4 < 2)
        yield Call("int8_conv2d", conv.int8_conv2d, inputs, options)
    for dtype, (m, n, k, groups) in itertools.product(DTYPES, GROUPED):
        inputs = exact_int8_weight_inputs(m, n, k, dtype, groups=groups)
        yield Call("int8_weight_linear", int8_weight.int8_weight_linear, inputs)
    for m, n, k, groups in GROUPED:
        inputs = ternary.example_inputs(m, n, k, torch.float16, scale_shape=(n, groups))
        yield Call("ternary_linear", ternary.ternary_linear, inputs)
        yield Call("ternary_linear", ternary.ternary_linear, inputs, {"activation": "gelu"})
    for i, (m, n, k) in enumerate((*FEW_ROWS, *MANY_ROWS)):
        for j, activation in enumerate(CODES):
            options, dtype = {"activation": activation}, DTYPES[(i + j) % 3]
            inputs = int8.example_inputs(m, n, k, dtype)
            yield Call("int8_linear", int8.int8_linear, inputs, options)
            inputs = ternary.example_inputs(m, n, k, dtype)
            yield Call("ternary_linear", ternary.ternary_linear, inputs, options)


def main() -> int:
    if not is_visible():
        print(f"device_calls: {ABSENT}", file=sys.stderr)
        return 2
    count = 0
    for count, call in enumerate(calls(), 1):  # noqa: B007
        assert_gives(call.run(), call.expected())
    print(f"{count} calls, every result right")
    return 0


if __name__ == "__main__":
    sys.exit(main())

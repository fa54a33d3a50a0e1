"""What is compared, in the order of its importance: a run that is cut short has answered the goals
first."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cache, partial
from importlib import import_module

from benchmarks.case import Comparison
from benchmarks.gpu import convolutions, embeddings, losses, rows
from benchmarks.gpu.convolutions import Shape as Convolution
from benchmarks.gpu.embeddings import Shape as Embedding
from benchmarks.gpu.goals import CLASSES
from benchmarks.gpu.layers import Layer

LINEAR = (
    "ternary_linear",
    "ternary24_linear",
    "int8_linear",
    "int8_weight_linear",
    "sparse24_linear",
)
OPS = (*rows.IN_PYTORCH, *LINEAR, convolutions.OP, embeddings.OP, *losses.OPS)

Shape = tuple[int, int]
Rows = tuple[int, ...]


@dataclass(frozen=True)
class Plan:
    layers: tuple[tuple[Shape, Rows], ...]  # (N, K), and the rows of activations
    # The same for comparisons that take seconds to start: Triton chooses its tiles by measurement,
    # torch.compile compiles.
    slow_start: tuple[tuple[Shape, Rows], ...]
    quantized: tuple[Shape, ...]  # (M, K), of the ops that quantise rows alone
    losses: tuple[tuple[int, int, str], ...] = ()  # (rows, classes, dtype)
    linear_losses: tuple[tuple[int, int, int], ...] = ()  # (rows, width, classes)
    convolutions: tuple[Convolution, ...] = ()
    embeddings: tuple[Embedding, ...] = ()

    def comparisons(
        self, ops: Sequence[str], device: str, rotated: int
    ) -> Iterator[tuple[str, Callable[[], Comparison]]]:
        """The suite of each, and what makes it; `rotated`: bytes of copies of each weight."""
        linear = [
            variant
            for op in LINEAR
            if op in ops
            for variant in import_module(f"benchmarks.bench_{op}").OPS
            if "fp32" not in variant.variant  # values that have no kernel on a GPU
        ]

        def of_layers(
            entries: Sequence[tuple[Shape, Rows]], slow_start: bool
        ) -> Iterator[Callable]:
            for (n, k), counts in entries if linear else ():
                # Made with its first comparison, kept until the last: where it does not fit in the
                # memory, comparisons fail and the run goes on.
                layer = cache(partial(Layer, linear, n, k, max(counts), device, rotated))
                yield from (
                    lambda m=m, layer=layer: layer().comparison(m, slow_start) for m in counts
                )

        yield from (("linear", make) for make in of_layers(self.layers, slow_start=False))
        for op in (op for op in rows.IN_PYTORCH if op in ops):
            for shape in self.quantized:
                yield op, partial(rows.comparison, op, shape, device, rotated)
        for convolution in self.convolutions if convolutions.OP in ops else ():
            make = partial(convolutions.comparison, convolution, device, rotated)
            yield convolutions.OP, make
        for embedding in self.embeddings if embeddings.OP in ops else ():
            yield embeddings.OP, partial(embeddings.comparison, embedding, device)
        if "linear_softmax_kl" in ops:
            for shape in self.linear_losses:
                yield "linear_softmax_kl", partial(losses.linear_softmax_kl, shape, device)
        for shape in self.losses if "softmax_kl" in ops else ():
            for divergence in losses.DIVERGENCES:
                make = partial(losses.softmax_kl, shape, divergence, device, rotated)
                yield f"softmax_kl {shape[2]} {divergence}", make
        slow = of_layers(self.slow_start, slow_start=True)
        yield from (("linear, Triton too", make) for make in slow)


_ROWS = (1, 2, 4, 8, 16, 32, 64, 256, 1024, 4096)
_FEWER = (1, 16, 32, 1024, 4096)
# 64 MB of ternary weight, INT8 at 8192^3: what goals speak of comes first.
_LARGE, _CUBE = (16384, 16384), (8192, 8192)
_OTHER = ((14336, 4096), (4096, 4096), (6912, 2560), (2560, 2560))
# ResNet's layers, the first one of three channels, and a depthwise one.
_RESNET = ((256, 256, 3, 1, 1, 14), (64, 64, 3, 1, 1, 56), (256, 64, 1, 1, 1, 56))
_OTHERS = ((3, 64, 7, 1, 2, 224), (512, 512, 3, 1, 1, 7), (128, 128, 3, 128, 1, 28))
_LOSS, _LINEAR_LOSS = (8192, CLASSES, "bf16"), (8192, 4096, CLASSES)

FULL = Plan(
    layers=(
        (_LARGE, _ROWS),
        (_CUBE, (*_ROWS, 8192)),
        *((layer, _ROWS) for layer in _OTHER),
    ),
    slow_start=((_CUBE, (1, 16, 256, 4096)), ((4096, 4096), (1, 16, 256, 4096))),
    quantized=((8192, 8192), (1, 4096), (16, 4096), (256, 8192), (4096, 4096), (4096, 14336)),
    losses=(_LOSS, (4096, 32000, "fp32"), (4096, 32000, "bf16")),
    linear_losses=(_LINEAR_LOSS,),
    convolutions=tuple((batch, *layer) for batch in (1, 64) for layer in (*_RESNET, *_OTHERS)),
    # A token, a sentence and a long batch, of Llama 3's table.
    embeddings=tuple((m, CLASSES, 4096) for m in (1, 512, 16384)),
)
QUICK = Plan(
    layers=((_LARGE, _FEWER), (_CUBE, (*_FEWER, 8192))),
    slow_start=((_CUBE, (1, 4096)),),
    quantized=((8192, 8192), (1, 4096)),
    losses=(_LOSS,),
    linear_losses=(_LINEAR_LOSS,),
    convolutions=tuple((64, *layer) for layer in _RESNET),
    embeddings=((16384, CLASSES, 4096),),
)

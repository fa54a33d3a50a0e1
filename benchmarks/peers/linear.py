"""Linear layers that pip can install: float, INT8 with dynamic activations, sparse.

Each function takes a dense weight, float32 [N, K], and gives `copies` layers that hold equal
weights in memory of their own (fewer, where a copy costs seconds to make), each a function of an
input that returns the call to time.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor, nn

from benchmarks.case import Bind
from benchmarks.ceilings import Work

Make = Callable[[Tensor, int, int], list[Bind]]  # of weight, copies, threads


@dataclass(frozen=True)
class Peer:
    name: str
    group: str  # fp32, bf16, int8, sparse: an op names the groups that it is judged by
    make: Make
    bits_per_weight: float

    def work(self, m: int, n: int, k: int) -> Work:
        ops = 2 * m * n * k
        integer = self.group == "int8"
        read = round(n * k * self.bits_per_weight / 8)
        return Work(read, int8_ops=ops) if integer else Work(read, fp32_ops=ops)

    def stands_for(self, weight: Tensor) -> Tensor:
        return weight


def _dense(weight: Tensor) -> nn.Linear:
    n, k = weight.shape
    layer = nn.Linear(k, n, bias=False)
    layer.weight = nn.Parameter(weight.clone(), requires_grad=False)
    return layer


def _bind(layer: Callable[[Tensor], Tensor]) -> Bind:
    return lambda x: partial(layer, x)


def linear_fp32(weight: Tensor, copies: int, threads: int) -> list[Bind]:
    return [_bind(_dense(weight)) for _ in range(copies)]


def linear_bf16(weight: Tensor, copies: int, threads: int) -> list[Bind]:
    def bind(layer: nn.Module, x: Tensor) -> Callable[[], Tensor]:
        return partial(layer, x.bfloat16())

    return [partial(bind, _dense(weight).bfloat16()) for _ in range(copies)]


def torch_dynamic(engine: str) -> Make:
    """torch.ao.quantization.quantize_dynamic as its tutorial calls it, on one of its engines."""

    def make(weight: Tensor, copies: int, threads: int) -> list[Bind]:
        from torch.ao.quantization import quantize_dynamic

        before = torch.backends.quantized.engine
        torch.backends.quantized.engine = engine
        try:
            model = nn.Sequential(_dense(weight))
            return [
                _bind(quantize_dynamic(model, {nn.Linear}, torch.qint8)[0]) for _ in range(copies)
            ]
        finally:
            torch.backends.quantized.engine = before

    return make


def int_mm(weight: Tensor, copies: int, threads: int) -> list[Bind]:
    """torch._int_mm between the obvious lines of PyTorch; a scale for each row, as ours."""
    scale = weight.abs().amax(1) / 127
    codes = torch.round(weight / scale[:, None]).to(torch.int8)

    def run(codes: Tensor, x: Tensor) -> Tensor:
        x_scale = x.abs().amax(1, keepdim=True) / 127
        q = torch.round(x / x_scale).to(torch.int8)
        return torch._int_mm(q, codes.T).float() * x_scale * scale

    return [_bind(partial(run, codes.clone())) for _ in range(copies)]


def torchao_int8(weight: Tensor, copies: int, threads: int) -> list[Bind]:
    from torchao.quantization import Int8DynamicActivationInt8WeightConfig, quantize_

    def make() -> nn.Module:
        model = nn.Sequential(_dense(weight))
        quantize_(model, Int8DynamicActivationInt8WeightConfig())
        return model[0]

    return [_bind(make()) for _ in range(copies)]


PEERS = [
    Peer("nn.Linear fp32", "fp32", linear_fp32, 32),
    Peer("nn.Linear bf16", "bf16", linear_bf16, 16),
    Peer("torch dynamic x86", "int8", torch_dynamic("x86"), 8),
    Peer("torch dynamic onednn", "int8", torch_dynamic("onednn"), 8),
    Peer("torch dynamic fbgemm", "int8", torch_dynamic("fbgemm"), 8),
    Peer("torch._int_mm", "int8", int_mm, 8),
    Peer("torchao INT8", "int8", torchao_int8, 8),
]

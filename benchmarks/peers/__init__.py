"""What a user would run instead: one function for each, on the same weights and inputs.

A function takes a dense weight, float32 [N, K], and gives `copies` layers that hold equal weights
in memory of their own (fewer, where a copy costs seconds to make), each a function of an input that
returns the call to time.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

from torch import Tensor
from trine.quantize.weights import sparse24, ternary_absmean

from benchmarks.case import Bind
from benchmarks.ceilings import Work
from benchmarks.peers import compiled, linear
from benchmarks.peers.ggml import ggml
from benchmarks.peers.onnx import onnx_int8


@dataclass(frozen=True)
class Peer:
    name: str
    group: str  # an op names the groups that it is judged by
    make: Callable[[Tensor, int, int], list[Bind]]  # of weight, copies, threads
    bits_per_weight: float
    stands_for: Callable[[Tensor], Tensor] = Tensor.contiguous  # what it multiplies by
    compiles: bool = False  # for seconds, at each shape

    def work(self, m: int, n: int, k: int) -> Work:
        ops = 2 * m * n * k
        read = round(n * k * self.bits_per_weight / 8)
        integer = self.group in ("int8", "ternary")
        return Work(read, int8_ops=ops) if integer else Work(read, fp32_ops=ops)


def _ternary(weight: Tensor) -> Tensor:
    codes, scale = ternary_absmean(weight)
    return codes * scale


def _ggml_ternary(weight: Tensor, copies: int, threads: int) -> list[Bind]:
    return ggml("TQ2_0", _ternary(weight), copies, threads)


PEERS = [
    Peer("nn.Linear fp32", "fp32", linear.linear_fp32, 32),
    Peer("nn.Linear bf16", "bf16", linear.linear_bf16, 16),
    *(
        Peer(f"torch dynamic {engine}", "int8", partial(linear.torch_dynamic, engine), 8)
        for engine in ("x86", "onednn", "fbgemm")
    ),
    Peer("torch._int_mm", "int8", linear.int_mm, 8),
    Peer("pt2e x86", "int8", compiled.pt2e_x86, 8, compiles=True),
    Peer("torchao", "int8", linear.torchao_int8, 8),
    Peer("torchao compiled", "int8", compiled.torchao_compiled, 8, compiles=True),
    Peer("ONNX Runtime s8", "int8", partial(onnx_int8, "QInt8"), 8),
    Peer("ONNX Runtime u8", "int8", partial(onnx_int8, "QUInt8"), 8),
    Peer("ggml Q8_0", "int8", partial(ggml, "Q8_0"), 8.5),
    Peer("ggml TQ2_0", "ternary", _ggml_ternary, 66 / 32, stands_for=_ternary),
    Peer("torch._weight_int8pack_mm", "int8 weight", linear.weight_int8pack_mm, 8),
    Peer("torchao weight-only", "int8 weight", linear.torchao_int8_weight, 8),
    Peer("torch CSR", "sparse", linear.csr, 32, stands_for=lambda weight: sparse24(weight)[0]),
]

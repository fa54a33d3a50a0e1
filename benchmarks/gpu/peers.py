"""What a user would run on the GPU instead, on bf16 activations and the same weights."""

from collections.abc import Callable
from functools import cache, partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.sparse import SparseSemiStructuredTensorCUSPARSELT, SparseSemiStructuredTensorCUTLASS
from trine.quantize.weights import sparse24, sparse24_int8

from benchmarks.case import Bind
from benchmarks.peers import Peer, linear

LEAST_ROWS = 32  # torch._int_mm takes no fewer than 17 on CUDA; these fill its smallest tile


def quantise(x: Tensor) -> tuple[Tensor, Tensor]:
    wide = x.float()
    scale = wide.abs().amax(1, keepdim=True) / 127
    return torch.round(wide / scale).to(torch.int8), scale


def dequantise(acc: Tensor, x_scale: Tensor, scale: Tensor) -> Tensor:
    return (acc.float() * x_scale * scale).bfloat16()


@cache
def compiled(function: Callable) -> Callable:
    """For every shape at once: to compile it for each would take minutes."""
    return torch.compile(function, dynamic=True)


def _int_mm(wrap: Callable, weight: Tensor, copies: int, threads: int) -> list[Bind]:
    scale = weight.abs().amax(1) / 127
    codes = torch.round(weight / scale[:, None]).to(torch.int8)
    before, after = wrap(quantise), wrap(dequantise)

    def run(codes: Tensor, x: Tensor) -> Tensor:
        q, x_scale = before(x)
        q = F.pad(q, (0, 0, 0, max(0, LEAST_ROWS - len(q))))
        return after(torch._int_mm(q, codes.T)[: len(x)], x_scale, scale)

    return [_bind(partial(run, codes.clone())) for _ in range(copies)]


def _bind(layer: Callable[[Tensor], Tensor]) -> Bind:
    return lambda x: partial(layer, x)


def _linear_bf16(weight: Tensor, copies: int, threads: int) -> list[Bind]:
    return [_bind(linear.dense_layer(weight.bfloat16())) for _ in range(copies)]


def _triton_matmul(weight: Tensor, copies: int, threads: int) -> list[Bind]:
    from benchmarks.gpu.triton_matmul import matmul

    def run(weight: Tensor, x: Tensor) -> Tensor:
        return matmul(x, weight)

    return [_bind(partial(run, weight.bfloat16())) for _ in range(copies)]


def _torchao(weight: Tensor, copies: int, threads: int) -> list[Bind]:
    return [_bind(linear.torchao_layer(weight.bfloat16())) for _ in range(copies)]


def _bitsandbytes(weight: Tensor, copies: int, threads: int) -> list[Bind]:
    from bitsandbytes.nn import Linear8bitLt

    def layer() -> nn.Module:
        n, k = weight.shape
        made = Linear8bitLt(k, n, bias=False, has_fp16_weights=False)
        made.load_state_dict({"weight": weight.half().cpu()})
        return made.to(weight.device)

    return [_bind(layer()) for _ in range(copies)]


def _semi_structured(backend: type, weight: Tensor, copies: int, threads: int) -> list[Bind]:
    kept = _kept(weight)
    return [_bind(partial(_linear, backend.from_dense(kept))) for _ in range(copies)]


def _linear(weight: Tensor, x: Tensor) -> Tensor:
    return F.linear(x, weight)


def _cusparselt_int8(weight: Tensor, copies: int, threads: int) -> list[Bind]:
    codes, scale = sparse24_int8(weight)

    def run(compressed: Tensor, x: Tensor) -> Tensor:
        q, x_scale = quantise(x)
        q = F.pad(q, (0, 0, 0, -len(q) % LEAST_ROWS))
        acc = torch._cslt_sparse_mm(compressed, q.T, out_dtype=torch.int32).T
        return dequantise(acc[: len(x)], x_scale, scale)

    return [_bind(partial(run, torch._cslt_compress(codes))) for _ in range(copies)]


def _kept(weight: Tensor) -> Tensor:
    return sparse24(weight.bfloat16())[0]


def _kept_int8(weight: Tensor) -> Tensor:
    codes, scale = sparse24_int8(weight)
    return codes * scale[:, None]


# `compiles`: starting it takes seconds, so it is compared at fewer shapes.
PEERS = (
    Peer("nn.Linear bf16", "bf16", _linear_bf16, 16),
    Peer("torch._int_mm", "int8", partial(_int_mm, lambda function: function), 8),
    Peer("torch._int_mm compiled", "int8", partial(_int_mm, compiled), 8, compiles=True),
    Peer("Triton bf16 matmul", "bf16", _triton_matmul, 16, compiles=True),
    Peer(
        "cuSPARSELt bf16",
        "sparse",
        partial(_semi_structured, SparseSemiStructuredTensorCUSPARSELT),
        9,
        stands_for=_kept,
    ),
    Peer(
        "CUTLASS 2:4 bf16",
        "sparse",
        partial(_semi_structured, SparseSemiStructuredTensorCUTLASS),
        9,
        stands_for=_kept,
    ),
    Peer("cuSPARSELt int8", "sparse", _cusparselt_int8, 5, stands_for=_kept_int8),
    Peer("torchao", "int8", _torchao, 8, compiles=True),
    Peer("bitsandbytes", "int8", _bitsandbytes, 8, compiles=True),
)

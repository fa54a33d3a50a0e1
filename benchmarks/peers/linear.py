"""Linear layers of eager PyTorch: float, INT8 with dynamic activations, sparse."""

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor, nn
from trine.quantize.weights import sparse24 as keep_two_of_four

from benchmarks.case import Bind


def dense_layer(weight: Tensor) -> nn.Linear:
    n, k = weight.shape
    layer = nn.Linear(k, n, bias=False, device="meta")  # no values that are replaced at once
    layer.weight = nn.Parameter(weight.clone(), requires_grad=False)
    return layer


def _bind(layer: Callable[[Tensor], Tensor]) -> Bind:
    return lambda x: partial(layer, x)


def linear_fp32(weight: Tensor, copies: int, threads: int) -> list[Bind]:
    return [_bind(dense_layer(weight)) for _ in range(copies)]


def linear_bf16(weight: Tensor, copies: int, threads: int) -> list[Bind]:
    def bind(layer: nn.Module, x: Tensor) -> Callable[[], Tensor]:
        return partial(layer, x.bfloat16())

    return [partial(bind, dense_layer(weight).bfloat16()) for _ in range(copies)]


def torch_dynamic(engine: str, weight: Tensor, copies: int, threads: int) -> list[Bind]:
    """torch.ao.quantization.quantize_dynamic as its tutorial calls it, on one of its engines."""
    from torch.ao.quantization import quantize_dynamic

    before = torch.backends.quantized.engine
    torch.backends.quantized.engine = engine
    try:
        model = nn.Sequential(dense_layer(weight))
        layers = [quantize_dynamic(model, {nn.Linear}, torch.qint8)[0] for _ in range(copies)]
    finally:
        torch.backends.quantized.engine = before
    return [_bind(layer) for layer in layers]


def int_mm(weight: Tensor, copies: int, threads: int) -> list[Bind]:
    """torch._int_mm between the obvious lines of PyTorch; a scale for each row, as ours."""
    scale = weight.abs().amax(1) / 127
    codes = torch.round(weight / scale[:, None]).to(torch.int8)

    def run(codes: Tensor, x: Tensor) -> Tensor:
        x_scale = x.abs().amax(1, keepdim=True) / 127
        q = torch.round(x / x_scale).to(torch.int8)
        return torch._int_mm(q, codes.T).float() * x_scale * scale

    return [_bind(partial(run, codes.clone())) for _ in range(copies)]


def torchao_layer(weight: Tensor) -> nn.Module:
    from torchao.quantization import Int8DynamicActivationInt8WeightConfig, quantize_

    model = nn.Sequential(dense_layer(weight))
    quantize_(model, Int8DynamicActivationInt8WeightConfig())
    return model[0]


def torchao_int8(weight: Tensor, copies: int, threads: int) -> list[Bind]:
    return [_bind(torchao_layer(weight)) for _ in range(copies)]


def weight_int8pack_mm(weight: Tensor, copies: int, threads: int) -> list[Bind]:
    """PyTorch's weight-only INT8, which takes bf16 activations and a scale for each row."""
    scale = weight.abs().amax(1) / 127
    codes = torch.round(weight / scale[:, None]).to(torch.int8)

    def bind(codes: Tensor, x: Tensor) -> Callable[[], Tensor]:
        return partial(torch._weight_int8pack_mm, x.bfloat16(), codes, scale.bfloat16())

    return [partial(bind, codes.clone()) for _ in range(copies)]


def torchao_int8_weight(weight: Tensor, copies: int, threads: int) -> list[Bind]:
    """torchao's weight-only INT8 in eager mode, in bf16."""
    from torchao.quantization import Int8WeightOnlyConfig, quantize_

    def bind(layer: nn.Module, x: Tensor) -> Callable[[], Tensor]:
        return partial(layer, x.bfloat16())

    models = [nn.Sequential(dense_layer(weight)).bfloat16() for _ in range(copies)]
    for model in models:
        quantize_(model, Int8WeightOnlyConfig())
    return [partial(bind, model[0]) for model in models]


def csr(weight: Tensor, copies: int, threads: int) -> list[Bind]:
    """torch.sparse: the product as its documentation writes it, weight first."""
    sparse = keep_two_of_four(weight)[0].to_sparse_csr()

    def run(sparse: Tensor, x: Tensor) -> Tensor:
        return (sparse @ x.T).T

    return [_bind(partial(run, sparse.clone())) for _ in range(copies)]

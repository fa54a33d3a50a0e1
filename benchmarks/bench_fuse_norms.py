"""A norm with the INT8 layers that read it, apart and fused by `trine.fuse_norms`.

    python -m benchmarks.bench_fuse_norms --threads 2

"apart": the norm writes its result, and each layer quantises it; "torch": the same with float
layers.
"""

import argparse
from collections.abc import Callable
from functools import partial

import pytest
import torch
import trine
from rich.console import Console
from torch import Tensor, nn
from transformers.models.llama.modeling_llama import LlamaRMSNorm
from trine.evaluate.latency import alternate
from trine.nn import pack_linear

from benchmarks.table import number, table_of

NORMS: dict[str, Callable[[int], nn.Module]] = {
    "nn.LayerNorm": nn.LayerNorm,
    "nn.RMSNorm": nn.RMSNorm,
    "LlamaRMSNorm": LlamaRMSNorm,
}
# Rows, K, N, layers: projections of an attention block and the first layer behind it.
SHAPES = tuple(
    (rows, k, n, layers)
    for k, n, layers in ((768, 768, 3), (768, 3072, 1), (2560, 2560, 3))
    for rows in (1, 32, 197)
)


class Block(nn.Module):
    def __init__(self, norm: nn.Module, layers: list[nn.Module]) -> None:
        super().__init__()
        self.norm, self.layers = norm, nn.ModuleList(layers)

    def forward(self, x: Tensor) -> list[Tensor]:
        normed = self.norm(x)
        return [layer(normed) for layer in self.layers]


def blocks(name: str, shape: tuple[int, ...]) -> tuple[dict[str, nn.Module], Tensor]:
    rows, k, n, count = shape
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        dense = [nn.Linear(k, n) for _ in range(count)]
        x = torch.randn(rows, k)
    norm = NORMS[name](k)
    apart = Block(norm, [pack_linear(layer, "int8") for layer in dense])
    fused = trine.fuse_norms(apart, x, timer=lambda calls: {"apart": 2.0, "fused": 1.0})
    return {"torch": Block(norm, dense), "apart": apart, "fused": fused}, x


@torch.inference_mode()
def main() -> None:
    summary, _, example = __doc__.partition("\n\n")
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.bench_fuse_norms", description=summary, epilog=example
    )
    parser.add_argument("--threads", type=int, default=1)
    torch.set_num_threads(parser.parse_args().threads)
    title = f"a norm and its INT8 layers, {torch.get_num_threads()} threads: us"
    table = table_of(title, ("norm", "M, K, N, layers"), ("torch", "apart", "fused", "x apart"))
    for name in NORMS:
        for shape in SHAPES:
            made, x = blocks(name, shape)
            calls = {kind: partial(block, x) for kind, block in made.items()}
            us = {kind: 1e6 * s for kind, s in alternate(calls, rounds=15).items()}
            values = (number(us[kind]) for kind in made)
            table.add_row(
                name,
                ", ".join(map(str, shape)),
                *values,
                number(us["apart"] / us["fused"], 2),
            )
    Console(width=130).print(table)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("name", NORMS)
def test_fused_norm(benchmark, name, shape):
    made, x = blocks(name, shape)
    with torch.inference_mode():
        benchmark(made["fused"], x)


if __name__ == "__main__":
    main()

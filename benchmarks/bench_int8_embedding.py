"""int8_embedding against torch.nn.Embedding and torch's byte embeddings, alternating.

python -m benchmarks.bench_int8_embedding [--threads 1]
"""

import argparse
from functools import partial

import pytest
import torch
from rich.console import Console
from torch import Tensor, nn
from trine.evaluate.latency import alternate
from trine.ops import int8_embedding, pack_int8
from trine.ops.int8_embedding import reference
from trine.quantize import int8_absmax

from benchmarks.case import WrongResult, kernel_of
from benchmarks.measure import Call
from benchmarks.table import number, table_of

# Rows, V and D: a token, a sentence and a batch of BERT's, GPT-2's and Llama's tables. Random rows
# of a table come from memory but for the smallest.
SHAPES = (
    (1, 30522, 384),
    (128, 30522, 384),
    (4096, 30522, 384),
    (1, 50257, 768),
    (512, 50257, 768),
    (1, 128256, 2048),
    (512, 128256, 2048),
)
# So many batches of indices in turn, so that rows do not stay in the caches.
BATCHES = 16


def calls(rows: int, v: int, d: int) -> dict[str, Call]:
    """Ours and theirs; raises WrongResult where ours is not its definition."""
    generator = torch.Generator().manual_seed(0)
    table = torch.randn(v, d, generator=generator)
    codes, scale = int8_absmax(table)
    packed, narrow = pack_int8(codes), table.bfloat16()
    batches = [torch.randint(v, (rows,), generator=generator) for _ in range(BATCHES)]
    for dtype in (torch.float32, torch.bfloat16):
        arguments = (batches[0], packed, scale, d, dtype)
        if not torch.equal(int8_embedding(*arguments), reference.int8_embedding(*arguments)):
            raise WrongResult("int8_embedding differs from its definition")
    quantized = torch.ops.quantized.embedding_bag_byte_prepack(table)  # a scale and offset a row
    bags = torch.arange(rows)

    def torch_byte(indices: Tensor) -> Tensor:
        return torch.ops.quantized.embedding_bag_byte_rowwise_offsets(quantized, indices, bags)

    def each(run) -> Call:
        return lambda: [run(indices) for indices in batches]

    return {
        "ours": each(lambda at: int8_embedding(at, packed, scale, d)),
        "ours bf16": each(lambda at: int8_embedding(at, packed, scale, d, torch.bfloat16)),
        "fp32": each(partial(nn.functional.embedding, weight=table)),
        "bf16": each(partial(nn.functional.embedding, weight=narrow)),
        "torch byte": each(torch_byte),
    }


@torch.inference_mode()
def main() -> None:
    summary, _, example = __doc__.partition("\n\n")
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.bench_int8_embedding", description=summary, epilog=example
    )
    parser.add_argument("--threads", type=int, default=1)
    torch.set_num_threads(parser.parse_args().threads)
    heads = (
        "ours",
        "GB/s",
        "fp32",
        "torch byte",
        "ours bf16",
        "bf16",
        "x fp32",
        "x byte",
        "x bf16",
    )
    title = f"int8_embedding ({kernel_of('int8_embedding')}), {torch.get_num_threads()} threads: us"
    table = table_of(title, ("rows, V, D",), heads)
    for rows, v, d in SHAPES:
        seconds = alternate(calls(rows, v, d), rounds=15, sample_seconds=2e-3)
        us = {name: 1e6 * value / BATCHES for name, value in seconds.items()}
        table.add_row(
            f"{rows}, {v}, {d}",
            number(us["ours"]),
            number(rows * 5 * d / us["ours"] / 1e3),  # reads bytes, writes floats
            *(number(us[name]) for name in ("fp32", "torch byte", "ours bf16", "bf16")),
            *(number(us[name] / us["ours"], 2) for name in ("fp32", "torch byte")),
            number(us["bf16"] / us["ours bf16"], 2),
        )
    Console(width=130).print(table)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_int8_embedding(benchmark, shape):
    with torch.inference_mode():
        benchmark(calls(*shape)["ours"])


if __name__ == "__main__":
    main()

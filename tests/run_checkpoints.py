"""In a process of its own: load every checkpoint of a folder, run it, keep what it returns.

Arguments: the folder, and numbers of threads. For each NAME.trine there is NAME.inputs, keyword
arguments; the tensors returned under T threads go to NAME.outputsT.
"""

import sys
from pathlib import Path

import torch
import trine


def run(model: torch.nn.Module, inputs: dict) -> list[torch.Tensor]:
    """All tensors that the model returns, in order."""
    with torch.inference_mode():
        outputs = model(**inputs)
    if isinstance(outputs, torch.Tensor):
        return [outputs.clone()]
    return [value.clone() for value in outputs.values() if isinstance(value, torch.Tensor)]


if __name__ == "__main__":
    folder, *thread_counts = sys.argv[1:]
    for file in Path(folder).glob("*.trine"):
        model, inputs = trine.load(file), torch.load(file.with_suffix(".inputs"))
        for threads in thread_counts:
            torch.set_num_threads(int(threads))
            torch.save(run(model, inputs), file.with_suffix(f".outputs{threads}"))

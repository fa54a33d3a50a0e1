"""Loads a saved model in a process of its own, runs it once, and writes what it gave.

    python -m trine.demo.serve < job.json

The job: {"model": path, "architecture": "mlp" or "encoder", "options": {...}, "threads": int,
"inputs": path, "outputs": path}. Inputs and outputs are safetensors files.
"""

import json
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

import trine
from trine.demo.digits import Mlp
from trine.demo.sentences import empty_encoder


@dataclass(frozen=True)
class Architecture:
    """What builds an untrained model in any process."""

    architecture: str
    options: dict[str, Any]

    def build(self) -> nn.Module:
        if self.architecture == "mlp":
            return Mlp(**self.options).eval()
        return empty_encoder(self.options)


def outputs(model: nn.Module, inputs: Mapping[str, Tensor]) -> Tensor:
    """What the model gives: logits, or the hidden states of every token."""
    with torch.inference_mode():
        result = model(**inputs)
    return result if isinstance(result, Tensor) else result.last_hidden_state


def serve_in_fresh_process(
    saved: Path, architecture: Architecture, inputs: Mapping[str, Tensor]
) -> Tensor:
    """Load the file `saved` in a new Python process and return its outputs on `inputs`.

    Raises RuntimeError with the process's own words where it fails.
    """
    with tempfile.TemporaryDirectory() as folder:
        job = {
            "model": str(saved.resolve()),
            **asdict(architecture),
            "threads": torch.get_num_threads(),
            "inputs": f"{folder}/inputs.safetensors",
            "outputs": f"{folder}/outputs.safetensors",
        }
        save_file({name: tensor.contiguous() for name, tensor in inputs.items()}, job["inputs"])
        done = subprocess.run(
            [sys.executable, "-m", "trine.demo.serve"],
            input=json.dumps(job),
            capture_output=True,
            text=True,
        )
        if done.returncode:
            raise RuntimeError(f"serving {saved.name} in a fresh process failed:\n{done.stderr}")
        return load_file(job["outputs"])["outputs"]


def same_bits(a: Tensor, b: Tensor) -> bool:
    """Equal down to the sign of zero and the payload of NaN."""
    bits = torch.uint8
    return a.shape == b.shape and a.dtype == b.dtype and torch.equal(a.view(bits), b.view(bits))


def main() -> None:
    job = json.load(sys.stdin)
    torch.set_num_threads(job["threads"])
    architecture = Architecture(job["architecture"], job["options"])
    model = trine.load(job["model"], like=architecture.build).eval()
    save_file({"outputs": outputs(model, load_file(job["inputs"])).contiguous()}, job["outputs"])


if __name__ == "__main__":
    main()

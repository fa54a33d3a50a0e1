"""A small distillation with everything random in it, for tests that kill it or spread it.

python run_distiller.py FOLDER [--parallel ddp] [--die-at CALL]: writes FOLDER/student.safetensors.
"""

import argparse
import json
import os
import signal
from pathlib import Path

import torch
from torch import nn
from torch.utils.data import DataLoader, Dataset
from trine.distill import (
    Average,
    Distiller,
    Ensemble,
    Fixed,
    Frozen,
    GradientNorm,
    Numbered,
    Training,
)
from trine.distill.objectives import (
    ContrastiveRepresentation,
    Hint,
    Labels,
    SoftTargets,
    Together,
)


class Examples(Dataset):
    """64 of them; with `noise` drawn anew each time, as augmentation does."""

    def __init__(self, noise: float) -> None:
        draws = torch.Generator().manual_seed(0)
        self.x, self.noise = torch.randn(64, 8, generator=draws), noise
        self.y = (self.x.sum(1) > 0).long()

    def __len__(self) -> int:
        return len(self.x)

    def __getitem__(self, i: int):
        return self.x[i] + self.noise * torch.randn(8), self.y[i]


def network(width: int, dropout: float, seed: int) -> nn.Module:
    torch.manual_seed(seed)
    layers = nn.ModuleList(
        nn.Sequential(nn.Linear(a, width), nn.ReLU(), nn.Dropout(dropout)) for a in (8, width)
    )

    class Network(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layers, self.head = layers, nn.Linear(width, 2)

        def forward(self, x):
            for layer in self.layers:
                x = layer(x)
            return self.head(x)

    return Network()


class Dies:
    """A teacher that kills the process in the middle of a step."""

    def __init__(self, teacher, call: int) -> None:
        self.teacher, self.left = teacher, call

    def __call__(self, batch, student):
        self.left -= 1
        if self.left == 0:
            os.kill(os.getpid(), signal.SIGKILL)
        return self.teacher(batch, student)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--parallel", default="auto")
    parser.add_argument("--processes", type=int)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--die-at", type=int, default=0, help="call of the teacher")
    parser.add_argument("--random", action="store_true", help="dropout, augmentation and workers")
    parser.add_argument("--save-every", type=int)
    parser.add_argument("--contrast", action="store_true", help="CRD; writes FOLDER/banks-RANK.pt")
    options = parser.parse_args()

    student = network(12, 0.2 if options.random else 0.0, seed=1)
    objective = Together(SoftTargets(2.0), Labels(), Hint("h", "h", nn.Linear(12, 20)))
    weights = {"soft": 0.5, "hard": 0.5, "hint": 0.1}
    balance, teacher = Fixed(weights), Frozen(network(20, 0.0, seed=2), {"h": "layers.1"})
    if options.random:
        balance = GradientNorm([student.head.weight], weights, every=3)
        # A teacher that learns, too; its features come from the first.
        average = Average(student, 0.8)
        together = Ensemble([teacher, average])

        def teacher(batch, view):
            return together(batch, view)

        teacher.update, teacher.model = average.update, average.model
    data = Examples(0.1 if options.random else 0.0)
    if options.contrast:
        data = Numbered(data)
        objective = ContrastiveRepresentation("h", "h", 12, 20, 64, negatives=8, width=6)
        balance = Fixed({"contrastive": 1.0})
        begun = {name: bank.clone() for name, bank in objective.named_buffers()}
    if options.die_at:
        dying = Dies(teacher, options.die_at)
        for name in ("update", "model"):
            if options.random:
                setattr(dying, name, getattr(teacher, name))
        teacher = dying
    distiller = Distiller(
        student,
        teacher,
        objective,
        balance,
        paths={"h": "layers.1"},
        training=Training(
            epochs=3,
            accumulate=2,
            learning_rate=0.01,
            ema=0.7,
            parallel=options.parallel,
            processes=options.processes,
            save_every=options.save_every,
        ),
        folder=options.folder,
    )
    workers = 2 if options.random else 0
    loader = DataLoader(data, options.batch, shuffle=True, num_workers=workers)

    report = {}

    def score(model):
        assert not model.training
        report["held"] = sum(getattr(p, "_local_tensor", p).numel() for p in model.parameters())
        data = Examples(0.0)
        return -nn.functional.cross_entropy(model(data.x), data.y).item()

    distiller.fit(loader, score)
    report["processes"] = distiller.accelerator.num_processes
    rank = distiller.accelerator.process_index
    (options.folder / f"report-{rank}.json").write_text(json.dumps(report))
    if options.contrast:
        banks = {"begun": begun, "ended": dict(objective.named_buffers())}
        torch.save(banks, options.folder / f"banks-{rank}.pt")


if __name__ == "__main__":
    main()

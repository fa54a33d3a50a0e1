"""A small training with pruning, for the test that spreads it over processes.

python run_pruner.py FOLDER: under torchrun; writes FOLDER/RANK.pt.
"""

import sys
from pathlib import Path

import torch
import torch.distributed as dist
from torch import nn
from trine.prune import SNIP, Cubic, Fisher, Global, PerLayer, Pruner, RigL, Weight

X = torch.randn(16, 6, generator=torch.Generator().manual_seed(0))
Y = (X.sum(1) > 0).long()


def loss_of(model, batch):
    return nn.functional.cross_entropy(model(batch[0]), batch[1])


def trained(rank: int, count: int) -> dict[str, torch.Tensor]:
    """Weights after two prunings, one of them calibrated, on this process's share of each batch."""
    x, y = X[rank::count], Y[rank::count]
    result = {}
    for name, criterion, scope, schedule in (
        ("calibrated", SNIP(loss_of, [(x, y)]), Global(0.5), RigL(end=6, every=2)),
        ("examples", Fisher(loss_of, [(x, y)]), PerLayer(0.5), Cubic(0, 3)),
    ):
        torch.manual_seed(1)
        model = nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 2))
        optimizer = torch.optim.Adam(model.parameters(), 0.01)
        parts = (criterion, Weight(), scope, schedule)
        pruner = Pruner(model, *parts, optimizer=optimizer)
        spread = nn.parallel.DistributedDataParallel(model) if count > 1 else model
        for _ in range(6):
            optimizer.zero_grad()
            loss_of(spread, (x, y)).backward()
            optimizer.step()
            pruner.step()
        result |= {f"{name}.{n}": value for n, value in pruner.finish().state_dict().items()}
    return result


if __name__ == "__main__":
    dist.init_process_group("gloo")
    weights = trained(dist.get_rank(), dist.get_world_size())
    torch.save(weights, Path(sys.argv[1]) / f"{dist.get_rank()}.pt")
    dist.destroy_process_group()

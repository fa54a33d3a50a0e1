"""A training under quantisation of every case, for the test that spreads it over processes.

python run_qat.py FOLDER: under torchrun; writes FOLDER/MODE-RANK.pt for copies and for shards.
"""

import sys
from pathlib import Path

import torch
import torch.distributed as dist
import trine
from qat_cases import CASES, inputs, loss_of, prepared
from torch import nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from trine.quantize import QatSchedule

UPDATES, ACCUMULATED, BATCH = 3, 2, 8


def data() -> list[tuple]:
    """For every update its batches, for all processes together."""
    torch.manual_seed(7)
    return [[inputs(BATCH) for _ in range(ACCUMULATED)] for _ in range(UPDATES)]


def made() -> nn.Module:
    torch.manual_seed(3)
    return prepared(*CASES, frozen=False)


def trained(model: nn.Module, called: nn.Module, rank: int, count: int) -> None:
    schedule = QatSchedule(model, freeze_ranges=2, freeze_batch_norm=2)
    optimizer = torch.optim.SGD(model.parameters(), 1e-2)
    for update in data():
        optimizer.zero_grad()
        for rows, images in update:
            loss_of(called(rows[rank::count], images[rank::count])).backward()
        optimizer.step()
        schedule.step()


def spread(mode: str, rank: int, count: int) -> dict:
    model = made()
    if mode == "ddp":
        called = nn.parallel.DistributedDataParallel(model)
    else:
        mesh = init_device_mesh("cpu", (count,))
        for case in model.cases.values():
            fully_shard(case, mesh=mesh)
        called = fully_shard(model, mesh=mesh)
    trained(model, called, rank, count)
    state = get_model_state_dict(model, options=StateDictOptions(full_state_dict=True))
    objects, error = [state], ""
    if mode == "fsdp":
        try:
            trine.convert(model)
        except ValueError as raised:
            error = str(raised)
    dist.broadcast_object_list(objects)  # full in the first process alone
    whole = made().eval()
    whole.load_state_dict(objects[0])
    small, x = trine.convert(whole), inputs()
    with torch.no_grad():
        served, evaluated = small(*x), called.eval()(*x)
    return {
        "buffers": dict(model.named_buffers()),
        "parameters": {n: p for n, p in objects[0].items() if n in dict(whole.named_parameters())},
        "error": error,
        "same bits": [name for name in served if torch.equal(served[name], evaluated[name])],
    }


if __name__ == "__main__":
    dist.init_process_group("gloo")
    rank, count = dist.get_rank(), dist.get_world_size()
    for mode in ("ddp", "fsdp"):
        result = spread(mode, rank, count)
        torch.save(result, Path(sys.argv[1]) / f"{mode}-{rank}.pt")
    dist.destroy_process_group()

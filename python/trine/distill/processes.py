"""One process or many: what accelerate and torch's fully_shard do, and that it is what was asked.

Sharding is torch's own: on the CPU accelerate's runs plain copies and says nothing.
"""

import os
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from trine.distill.settings import Training

__all__ = [
    "accelerator_for",
    "everyones",
    "full_state",
    "of_first",
    "set_full_state",
    "spread",
    "synchronised",
    "whole_from_first",
]


def accelerator_for(training: Training):
    """accelerate's Accelerator, of the launch that the settings ask for.

    Raises ValueError where the launch is another one.
    """
    try:
        from accelerate import Accelerator, DataLoaderConfiguration
        from accelerate.utils import DistributedDataParallelKwargs
    except ImportError:
        raise ImportError("Distiller runs on accelerate: pip install accelerate") from None
    if os.environ.get("ACCELERATE_USE_FSDP", "").lower() == "true":
        raise ValueError(
            "accelerate was launched with its own FSDP, which on the CPU runs plain copies; start "
            "with torchrun and Training(parallel='fsdp'), which is torch's fully_shard"
        )
    launched_on_cpu = os.environ.get("ACCELERATE_USE_CPU", "").lower() == "true"
    if launched_on_cpu and "WORLD_SIZE" not in os.environ and training.processes is None:
        raise ValueError(
            "accelerate launch --cpu starts one process, whatever --num_processes says; start "
            "several with torchrun, or confirm one with Training(processes=1)"
        )
    accelerator = Accelerator(
        # Where there is no device it has to be told: it would not join the other processes.
        cpu=not torch.accelerator.is_available(),
        mixed_precision="no",  # the loop's own: accelerate's can't change within a process
        dataloader_config=DataLoaderConfiguration(use_seedable_sampler=True),
        # Of a student only a part may take part, e.g. no pooler where tokens are compared.
        kwargs_handlers=[DistributedDataParallelKwargs(find_unused_parameters=True)],
    )
    count, launched = accelerator.num_processes, int(os.environ.get("WORLD_SIZE", 1))
    if launched != count:
        raise ValueError(
            f"{launched} processes were launched and accelerate runs as {count}; each would train "
            "the whole by itself. Start with torchrun"
        )
    if training.processes is not None and training.processes != count:
        raise ValueError(
            f"Training asks for {training.processes} processes and there are {count}; start it "
            f"with torchrun --nproc-per-node={training.processes}"
        )
    if training.parallel in ("ddp", "fsdp") and count == 1:
        raise ValueError(
            f"Training asks for '{training.parallel}' and there is one process; start it with "
            "torchrun --nproc-per-node=N"
        )
    if training.parallel == "none" and count > 1:
        raise ValueError(f"Training asks for one process (parallel='none') and there are {count}")
    if training.precision == "fp16" and accelerator.device.type == "cpu":
        raise ValueError("fp16 training needs a GPU; on the CPU use precision='bf16' or 'fp32'")
    if training.precision == "fp16" and training.parallel == "fsdp":
        raise ValueError("fp16 is not scaled right with 'fsdp'; use precision='bf16'")
    return accelerator


def spread(lesson: nn.Module, accelerator: Any, training: Training) -> nn.Module:
    """The lesson as it is called in this process: itself, a copy among equals, or a shard."""
    if training.parallel != "fsdp":
        return accelerator.prepare_model(lesson)
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    lesson.to(accelerator.device)
    mesh = init_device_mesh(accelerator.device.type, (accelerator.num_processes,))
    for module in lesson.student.modules():
        if isinstance(module, nn.ModuleList):  # layers: gathered one at a time
            for layer in module:
                fully_shard(layer, mesh=mesh)
    fully_shard(lesson.student, mesh=mesh)  # evaluations call it by itself
    return fully_shard(lesson, mesh=mesh)


@contextmanager
def synchronised(module: nn.Module, is_update: bool) -> Iterator[None]:
    """Gradients of all processes are averaged in the backward pass of an update's last batch."""
    if hasattr(module, "set_requires_gradient_sync"):
        module.set_requires_gradient_sync(is_update)
        yield
    else:
        no_sync = getattr(module, "no_sync", nullcontext)
        with nullcontext() if is_update else no_sync():
            yield


def of_first(value: float) -> float:
    """The first process's, in all of them."""
    values = [value]
    if dist.is_initialized():
        dist.broadcast_object_list(values, src=0)
    return values[0]


def everyones(value: Any) -> list[Any]:
    """Of each process, in all of them."""
    if not dist.is_initialized():
        return [value]
    values = [None] * dist.get_world_size()
    dist.all_gather_object(values, value)
    return values


def full_state(module: nn.Module) -> dict[str, Tensor]:
    """The whole module's state on the CPU, a copy; with shards only in the first process."""
    from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict

    whole = StateDictOptions(full_state_dict=True, cpu_offload=True)
    state = get_model_state_dict(module, options=whole)
    return {name: value.clone() for name, value in state.items()}


def set_full_state(module: nn.Module, state: dict[str, Tensor]) -> None:
    """What `full_state` returned, given by the first process."""
    from torch.distributed.checkpoint.state_dict import set_model_state_dict

    set_model_state_dict(module, state, options=whole_from_first())


def whole_from_first():
    """For torch's set_state_dict: a whole state, which the first process has."""
    from torch.distributed.checkpoint.state_dict import StateDictOptions

    return StateDictOptions(full_state_dict=True, broadcast_from_rank0=dist.is_initialized())

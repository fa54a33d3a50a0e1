"""Whose answers a cache holds, and to what: hashes of teachers and of examples."""

import hashlib

import torch
from torch import Tensor, nn

from trine.distill.calls import NOT_FOR_MODELS
from trine.distill.objectives.base import Batch
from trine.distill.teachers import Teacher

__all__ = ["fingerprints_of", "index_of", "teacher_hash", "token_mask"]


def teacher_hash(teacher: Teacher) -> str:
    """Of the weights of all models that it holds, their names and shapes."""
    digest = hashlib.sha256()
    parts = getattr(teacher, "teachers", [teacher])
    for part in parts:
        model = part if isinstance(part, nn.Module) else getattr(part, "model", None)
        if not isinstance(model, nn.Module):
            raise ValueError(
                "a teacher to be cached must be Frozen(model), or several of those in an Ensemble; "
                f"it is a {type(part).__name__}"
            )
        for name, tensor in sorted(model.state_dict().items()):
            digest.update(f"{name} {tensor.dtype} {list(tensor.shape)}".encode())
            flat = tensor.detach().cpu().contiguous().flatten()
            digest.update(flat.view(torch.uint8).numpy().tobytes() if flat.numel() else b"")
    return digest.hexdigest()


def fingerprints_of(batch: Batch) -> Tensor:
    """uint8 [B, 8]: of each example's inputs, but for padding, which depends on the batch."""
    names = ["inputs"] if "inputs" in batch else _input_names(batch)
    where = token_mask(batch)
    prints = []
    for i in range(len(index_of(batch))):
        digest = hashlib.blake2b(digest_size=8)
        for name in names:
            values = batch[name][i].detach().cpu()
            if where is not None and values.shape[:1] == where.shape[1:]:
                values = values[where[i]]
            digest.update(f"{name} {values.dtype} {list(values.shape)}".encode())
            if values.numel():
                digest.update(values.contiguous().flatten().view(torch.uint8).numpy().tobytes())
        prints.append(torch.frombuffer(bytearray(digest.digest()), dtype=torch.uint8))
    return torch.stack(prints)


def _input_names(batch: Batch) -> list[str]:
    of_models = (n for n, v in batch.items() if isinstance(v, Tensor) and v.dim() >= 1)
    return sorted(set(of_models) - NOT_FOR_MODELS - {"attention_mask"})


def token_mask(batch: Batch) -> Tensor | None:
    """bool [B, L], on the CPU."""
    mask = batch.get("attention_mask")
    return None if mask is None else mask.bool().cpu()


def index_of(batch: Batch) -> list[int]:
    if "index" not in batch:
        raise ValueError(
            "a cached teacher knows examples by their number: the batch needs 'index'; wrap the "
            "data set in trine.distill.Numbered"
        )
    return torch.as_tensor(batch["index"]).tolist()

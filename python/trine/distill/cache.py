"""What a teacher says of a data set, kept on disk: computed once, read in any order.

A folder holds shards, safetensors files of a range of examples each, and manifest.json, which names
them and says whose answers they are. A shard is written beside and renamed, then the manifest, so
that a killed job leaves whole shards, and goes on from there. Of each example are kept

- offsets int64 [examples + 1]: where the rows of an example begin; an image or a sentence to be
  classified has one row, a text one for each token that is not padding
- log_probabilities [rows, k], in float16 or float32, and indices [rows, k], int16 where the classes
  allow it, else int32; of a cache of everything only the former, [rows, classes]
- fingerprints uint8 [examples, 8], of the inputs
"""

import json
import os
from collections.abc import Callable, Iterable
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from trine.distill.calls import as_batch
from trine.distill.fingerprints import fingerprints_of, index_of, teacher_hash, token_mask
from trine.distill.objectives.base import Batch, View
from trine.distill.teachers import Teacher

__all__ = ["CachedTeacher", "Numbered", "cache_teacher"]

_FORMAT = 2
_MANIFEST = "manifest.json"
_MOST_OPEN_SHARDS = 8
_DTYPES = {"float16": torch.float16, "float32": torch.float32}


class Numbered(torch.utils.data.Dataset):
    """A data set whose items are mappings and say their number, as "index"; of a pair (x, y) they
    become "inputs" and "labels"."""

    def __init__(self, dataset: Any) -> None:
        self.dataset = dataset

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, index: int) -> Any:
        return {**as_batch(self.dataset[index]), "index": index}


def cache_teacher(
    teacher: Teacher,
    loader: Iterable[Any],
    folder: str | os.PathLike[str],
    top_k: int | None = 64,
    *,
    temperature: float = 1.0,
    dtype: str = "float16",
    examples_per_shard: int = 8192,
    progress: Callable[[int], None] = lambda examples: None,
) -> "CachedTeacher":
    """Write what `teacher` says of every example, or go on with what a killed job has written.

    Memory is that of one shard, whatever the number of examples. 100,000 rows of 32,000 classes at
    k = 64 take 26 MB.

    Args:
        teacher: `Frozen(model)`, or any other.
        loader: batches in the order of their examples, each with "index" [B] counting up from 0:
            `DataLoader(Numbered(dataset), batch_size=...)`, not shuffled, nothing drawn at random.
        folder: is made; one that holds another teacher's or data set's answers is refused.
        top_k: how many classes of a row are kept; None: all.
        temperature: of the softmax whose logarithms are kept. What is not in the top k can't be
            softened afterwards; without top_k leave it at 1, for there the loss may choose.
        dtype: of log-probabilities: "float16" is good to 3 digits, "float32" takes 1.5 to 2 times
            the space.
        examples_per_shard: written at once.
        progress: called with the number of examples that are done.

    Returns:
        The cache, a teacher for `SoftTargets(top_k=True)`, or of everything for plain ones.

    Raises:
        ValueError: a folder with a cache of something else, batches out of order.
    """
    if dtype not in _DTYPES:
        raise ValueError(f"cache_teacher: dtype must be 'float16' or 'float32', it is '{dtype}'")
    if top_k is None and temperature != 1:
        raise ValueError(
            "cache_teacher: without top_k leave temperature at 1; the loss softens what it reads"
        )
    folder = Path(folder)
    about = {
        "format": _FORMAT,
        "teacher": teacher_hash(teacher),
        "top_k": top_k,
        "temperature": temperature,
        "dtype": dtype,
        "classes": None,
        "of_tokens": None,
        "shards": [],
        "complete": False,
    }
    if (folder / _MANIFEST).exists():
        about = _to_go_on_with(_read_manifest(folder), about, folder)
    folder.mkdir(parents=True, exist_ok=True)
    known = _known_fingerprints(folder, about)
    done, seen = len(known), 0
    pending: list[dict[str, Tensor]] = []

    def write() -> None:
        nonlocal pending, done
        about["shards"].append(_write_shard(folder, len(about["shards"]), pending))
        done += len(pending)
        pending = []
        _write_manifest(folder, about)

    for raw in loader:
        batch = as_batch(raw)
        index = index_of(batch)
        expected = list(range(seen, seen + len(index)))
        if index != expected:
            raise ValueError(
                f"cache_teacher: the loader's batches must hold examples in their order; after "
                f"{seen} examples came number {index[0]}. Turn shuffling off"
            )
        prints = fingerprints_of(batch)
        if not torch.equal(prints[: max(0, len(known) - seen)], known[seen : seen + len(index)]):
            raise ValueError(f"cache_teacher: {folder} holds the answers to another data set")
        missing = max(0, done + len(pending) - seen)  # the first of the batch that is
        seen += len(index)
        if missing >= len(index):
            continue
        shape, answers = _answers(teacher, batch, prints, top_k, temperature, dtype)
        about |= shape
        pending += answers[missing:]
        while len(pending) >= examples_per_shard:
            later, pending = pending[examples_per_shard:], pending[:examples_per_shard]
            write()
            pending = later
        progress(seen)
    if pending:
        write()
    if seen < done:
        raise ValueError(
            f"cache_teacher: {folder} has answers for {done} examples and the loader gave {seen}; "
            "it is another data set's"
        )
    about["complete"] = True
    _write_manifest(folder, about)
    return CachedTeacher(folder)


class CachedTeacher:
    """A teacher that reads its answers: `cache_teacher` wrote them.

    Called with a batch that has "index", it checks that the inputs are those that the teacher saw,
    and returns "top_log_probabilities" and "top_indices" [B, (tokens,) k] with "top_temperature",
    or of a cache of everything "logits". Tokens that are padding have indices of -1.

    It holds no file contents, only maps them; processes may share a folder, and a copy that goes to
    a worker by pickling opens the files again.

    Args:
        folder: of the cache.
        teacher: the one whose answers they should be; None: not checked.

    Raises:
        ValueError: another teacher's cache, one that was not finished, a shard that is missing or
            has another size than it was written with; when called, an example that is not in the
            cache or whose inputs have changed.
    """

    def __init__(self, folder: str | os.PathLike[str], teacher: Teacher | None = None) -> None:
        self.folder = Path(folder)
        self.about = _read_manifest(self.folder)
        if not self.about["complete"]:
            raise ValueError(
                f"the teacher cache in {self.folder} was not finished; call cache_teacher again to "
                "go on"
            )
        if teacher is not None and teacher_hash(teacher) != self.about["teacher"]:
            raise ValueError(f"the cache in {self.folder} holds another teacher's answers")
        self._starts = [0]
        for shard in self.about["shards"]:
            path = self.folder / shard["file"]
            size = path.stat().st_size if path.exists() else None
            if size != shard["bytes"]:
                raise ValueError(
                    f"{path} is "
                    + ("missing" if size is None else f"{size} bytes long, not {shard['bytes']}")
                    + "; delete the folder and cache the teacher again"
                )
            self._starts.append(self._starts[-1] + shard["examples"])
        self._open = lru_cache(_MOST_OPEN_SHARDS)(self._open_shard)

    def __len__(self) -> int:
        return self._starts[-1]

    def __reduce__(self):
        return CachedTeacher, (self.folder,)

    def _open_shard(self, number: int):
        from safetensors import safe_open

        return safe_open(self.folder / self.about["shards"][number]["file"], framework="pt")

    def read(self, index: int) -> dict[str, Tensor]:
        """What is kept of one example: log_probabilities, indices, fingerprint."""
        if not 0 <= index < len(self):
            raise ValueError(
                f"the teacher cache has examples 0 to {len(self) - 1}; example {index} is not "
                "among them"
            )
        number = next(i for i, end in enumerate(self._starts[1:]) if index < end)
        shard, at = self._open(number), index - self._starts[number]
        begin, end = shard.get_slice("offsets")[at : at + 2].tolist()
        kept = {"fingerprint": shard.get_slice("fingerprints")[at]}
        kept["log_probabilities"] = shard.get_slice("log_probabilities")[begin:end].float()
        if self.about["top_k"] is not None:
            kept["indices"] = shard.get_slice("indices")[begin:end].long()
        return kept

    def __call__(self, batch: Batch, student: View) -> View:
        indices, prints = index_of(batch), fingerprints_of(batch)
        examples = [self.read(i) for i in indices]
        for index, example, seen in zip(indices, examples, prints, strict=True):
            if not torch.equal(example["fingerprint"], seen):
                raise ValueError(
                    f"example {index} is not what the teacher saw when its answers were cached; "
                    "cache it again, and leave random augmentation out of cached training"
                )
        top = self.about["top_k"] is not None
        names = {"log_probabilities": ("top_log_probabilities" if top else "logits")}
        fill = {"log_probabilities": 0.0}
        if top:
            names["indices"], fill["indices"] = "top_indices", -1
        where = token_mask(batch) if self.about["of_tokens"] else None
        device = next(iter(student.values())).device if student else None
        view = {}
        for kept, name in names.items():
            rows = torch.cat([example[kept] for example in examples])
            if where is not None:
                values = rows.new_full((*where.shape, rows.shape[1]), fill[kept])
                values[where] = rows
                rows = values
            elif self.about["of_tokens"]:  # without padding, as many in each text
                rows = rows.unflatten(0, (len(examples), -1))
            view[name] = rows.to(device)
        if top:
            view["top_temperature"] = torch.tensor(self.about["temperature"])
        return view


def _answers(
    teacher: Teacher,
    batch: Batch,
    prints: Tensor,
    top_k: int | None,
    temperature: float,
    dtype: str,
) -> tuple[dict[str, Any], list[dict[str, Tensor]]]:
    """The number of classes and whether tokens have them, and what to keep of each example."""
    logits = teacher(batch, {})["logits"].float()
    classes = logits.shape[-1]
    kept = {"log_probabilities": (logits / temperature).log_softmax(-1)}
    if top_k is not None:
        if top_k > classes:
            raise ValueError(f"cache_teacher: top_k = {top_k} of {classes} classes")
        values, indices = kept["log_probabilities"].topk(top_k, -1)
        small = classes <= torch.iinfo(torch.int16).max
        kept = {
            "log_probabilities": values,
            "indices": indices.to(torch.int16 if small else torch.int32),
        }
    kept["log_probabilities"] = kept["log_probabilities"].to(_DTYPES[dtype])
    kept = {name: values.cpu() for name, values in kept.items()}
    shape = {"classes": classes, "of_tokens": logits.dim() == 3}
    where = token_mask(batch) if shape["of_tokens"] else None
    answers = []
    for i in range(logits.shape[0]):
        rows = {name: values[i].reshape(-1, values.shape[-1]) for name, values in kept.items()}
        if where is not None:
            rows = {name: values[where[i]] for name, values in rows.items()}
        answers.append({**rows, "fingerprint": prints[i]})
    return shape, answers


def _known_fingerprints(folder: Path, about: dict[str, Any]) -> Tensor:
    """Of all examples that a killed job has left answers for."""
    from safetensors import safe_open

    prints = [torch.empty(0, 8, dtype=torch.uint8)]
    for shard in about["shards"]:
        with safe_open(folder / shard["file"], framework="pt") as opened:
            prints.append(opened.get_tensor("fingerprints"))
    return torch.cat(prints)


def _write_shard(folder: Path, number: int, examples: list[dict[str, Tensor]]) -> dict[str, Any]:
    from safetensors.torch import save_file

    counts = torch.tensor([0, *(len(e["log_probabilities"]) for e in examples)])
    tensors = {
        name: torch.cat([e[name] for e in examples])
        for name in ("log_probabilities", "indices")
        if name in examples[0]
    }
    tensors["offsets"] = counts.cumsum(0)
    tensors["fingerprints"] = torch.stack([e["fingerprint"] for e in examples])
    path = folder / f"shard-{number:05}.safetensors"
    partial = path.with_suffix(".part")
    save_file(tensors, partial)
    partial.replace(path)
    return {"file": path.name, "examples": len(examples), "bytes": path.stat().st_size}


def _write_manifest(folder: Path, about: dict[str, Any]) -> None:
    partial = folder / f"{_MANIFEST}.part"
    partial.write_text(json.dumps(about, indent=1))
    partial.replace(folder / _MANIFEST)


def _read_manifest(folder: Path) -> dict[str, Any]:
    path = folder / _MANIFEST
    if not path.exists():
        raise ValueError(f"{folder} holds no teacher cache; cache_teacher makes one")
    about = json.loads(path.read_text())
    if about.get("format") != _FORMAT:
        raise ValueError(f"{path} is of format {about.get('format')}; this version reads {_FORMAT}")
    return about


def _to_go_on_with(found: dict, wanted: dict, folder: Path) -> dict:
    """What a killed job left, if it is what is wanted now."""
    for name, what in (
        ("teacher", "another teacher's answers"),
        ("top_k", f"top_k = {found['top_k']}"),
        ("temperature", f"temperature = {found['temperature']}"),
        ("dtype", f"dtype = '{found['dtype']}'"),
    ):
        if found[name] != wanted[name]:
            raise ValueError(
                f"cache_teacher: {folder} holds a cache with {what}; choose another folder, or "
                "delete it"
            )
    return found

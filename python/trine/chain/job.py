"""`trine compress`: a classifier of sentences goes through the stages of a recipe."""

from __future__ import annotations

import copy
import hashlib
import json
import os
import shutil
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Any

from torch import nn
from torch.utils.data import DataLoader

from trine.chain.recipe_file import ChainJob
from trine.chain.stages import Ground, Stage
from trine.compress import load, save
from trine.compress.layers import bytes_of
from trine.distill.job import accuracy_of, batch_of, read_sentences
from trine.evaluate import alternate

Row = dict[str, Any]


def run(job: ChainJob) -> list[Row]:
    """Do what is left to do, and write `model.trine` and the tokenizer into `job.out`.

    Every stage has a folder of its own there with its model (for `trine.load`) and, where it
    trains, its checkpoint, history and curves. A job that was killed goes on after the last stage
    that was finished, in a training after its last checkpoint; where the recipe or its files have
    changed, stages are done again from there on. Reports go to stderr.

    Returns:
        A row for the model at the beginning and for each stage: `name`, `accuracy` on the
        validation data, `bytes` of parameters and buffers, `milliseconds` for one sentence and
        `speedup`, how many times as fast as at the beginning.

    Raises:
        ValueError: several processes, a folder in `job.out` that holds something else, and what the
            stages raise, which is named.
    """
    from transformers import AutoModelForSequenceClassification, AutoTokenizer

    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise ValueError("the stages run in one process; start them without torchrun")
    tokenizer = AutoTokenizer.from_pretrained(job.model)
    start = AutoModelForSequenceClassification.from_pretrained(job.model).eval()
    ground = _ground(job, start, tokenizer)
    model, rows = copy.deepcopy(start), [_measured("model", start, ground)]
    for number, stage in enumerate(job.stages, 1):
        folder = job.out / f"{number}-{stage.name}"
        row = _begin(folder, _fingerprint(job, number))
        if row is None:
            _say(f"{folder.name} ...")
            changed = _apply(stage, model, ground, folder)
            save(changed, folder / "model.trine")
        # What was saved goes on, so that a job that was killed has the same bits.
        model = load(folder / "model.trine")
        if row is None:
            row = _measured(folder.name, model, ground)
            _write(folder, {"fingerprint": _fingerprint(job, number), "row": row})
        rows.append(row)
        _say(f"{folder.name}: accuracy {row['accuracy']:.1%}, {row['bytes'] / 1e6:.2f} MB")
    save(model, job.out / "model.trine")
    tokenizer.save_pretrained(job.out)
    return rows


def _ground(job: ChainJob, start: nn.Module, tokenizer: Any) -> Ground:
    def loader(path: Path, *, shuffle: bool) -> DataLoader:
        return DataLoader(
            read_sentences(path, job.data, start.config.num_labels),
            job.data.batch,
            shuffle=shuffle,
            collate_fn=lambda rows: batch_of(rows, tokenizer, job.data.max_length),
        )

    validation = loader(job.data.validation, shuffle=False)
    one = batch_of([validation.dataset[0]], tokenizer, job.data.max_length)
    one.pop("labels")
    return Ground(start, loader(job.data.train, shuffle=True), validation, one)


def _apply(stage: Stage, model: nn.Module, ground: Ground, folder: Path) -> nn.Module:
    try:
        changed = stage.apply(model, ground, folder)
    except ValueError as error:
        raise ValueError(f"stage {folder.name}: {error}") from error
    for report in ("report", "removal_report"):
        if hasattr(changed, report):
            _say(str(getattr(changed, report)))
    return changed.eval()


def _measured(name: str, model: nn.Module, ground: Ground) -> Row:
    calls = {"start": ground.teacher, "now": model}
    seconds = alternate({key: lambda m=m: m(**ground.samples) for key, m in calls.items()})
    return {
        "name": name,
        "accuracy": accuracy_of(model, ground.validation),
        "bytes": bytes_of(model),
        "milliseconds": 1e3 * seconds["now"],
        "speedup": seconds["start"] / seconds["now"],
    }


# ---- what is done already ----


def _begin(folder: Path, fingerprint: str) -> Row | None:
    """The row of a stage that was finished; None for one to be done or to go on with."""
    state = folder / "stage.json"
    if folder.exists():
        if not state.exists():
            raise ValueError(f"{folder} is in the way: it holds no stage of a recipe; move it")
        found = json.loads(state.read_text())
        if found["fingerprint"] == fingerprint:
            return found["row"]
        shutil.rmtree(folder)  # of another recipe, as its stage.json says
    folder.mkdir(parents=True)
    _write(folder, {"fingerprint": fingerprint, "row": None})
    return None


def _write(folder: Path, state: dict[str, Any]) -> None:
    part = folder / ".stage.json.part"
    part.write_text(json.dumps(state, indent=1))
    part.replace(folder / "stage.json")


def _fingerprint(job: ChainJob, number: int) -> str:
    """Of all that the first so many stages depend on."""
    files = [job.data.train, job.data.validation]
    if Path(job.model).is_dir():
        files += sorted(path for path in Path(job.model).iterdir() if path.is_file())
    hashes = [_hash_of(path) for path in files]
    stages = [(stage.name, asdict(stage)) for stage in job.stages[:number]]
    said = json.dumps([job.model, asdict(job.data), hashes, stages], default=str)
    return hashlib.sha256(said.encode()).hexdigest()


def _hash_of(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while part := file.read(1 << 20):
            digest.update(part)
    return digest.hexdigest()


def _say(text: str) -> None:
    print(text, file=sys.stderr)

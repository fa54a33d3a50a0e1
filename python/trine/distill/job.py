"""`trine distill`: a classifier of sentences, made small by a recipe."""

import csv
import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.utils.data import DataLoader

from trine.distill.distiller import Distiller
from trine.distill.recipe_file import Data, DistillationJob
from trine.distill.settings import Training
from trine.evaluate import alternate, correct

__all__ = ["run"]


def run(job: DistillationJob) -> dict[str, dict[str, float]]:
    """Train the student, stage by stage, and write it beside its tokenizer.

    Every stage has a folder of its own in job.out, with its checkpoint, history and curves; a job
    that was killed goes on. Returns accuracy, parameters and milliseconds (of one sentence) of
    teacher and student; under torchrun in the first process, in the others nothing.
    """
    from transformers import AutoModelForSequenceClassification, AutoTokenizer

    torch.manual_seed(job.training.seed)
    tokenizer = AutoTokenizer.from_pretrained(job.teacher)
    teacher = AutoModelForSequenceClassification.from_pretrained(job.teacher)
    made = job.make(teacher)

    def loader(path: Path, *, shuffle: bool) -> DataLoader:
        return DataLoader(
            read_sentences(path, job.data, teacher.config.num_labels),
            job.data.batch,
            shuffle=shuffle,
            collate_fn=lambda rows: batch_of(rows, tokenizer, job.data.max_length),
        )

    train, validation = (
        loader(path, shuffle=path == job.data.train)
        for path in (job.data.train, job.data.validation)
    )
    for number, stage in enumerate(made.stages):
        is_last = number + 1 == len(made.stages)
        distiller = Distiller(
            made.student,
            made.teacher,
            stage.objective,
            stage.balance,
            paths=made.paths,
            training=Training(**{**asdict(job.training), **job.stages.get(stage.name, {})}),
            folder=job.out / stage.name,
            progress=True,
        )
        evaluate = (lambda model: accuracy_of(model, validation)) if is_last else None
        distiller.fit(train, evaluate)
    if not distiller.accelerator.is_main_process:
        return {}
    made.student.save_pretrained(job.out)
    tokenizer.save_pretrained(job.out)
    one = batch_of([validation.dataset[0]], tokenizer, job.data.max_length)
    one.pop("labels")
    models = {"teacher": teacher.eval(), "student": made.student.eval()}
    seconds = alternate({name: lambda m=m: m(**one) for name, m in models.items()})
    return {
        name: {
            "accuracy": accuracy_of(model, validation),
            "parameters": sum(p.numel() for p in model.parameters()),
            "milliseconds": 1e3 * seconds[name],
        }
        for name, model in models.items()
    }


def read_sentences(path: Path, data: Data, classes: int) -> list[tuple[str, int]]:
    """Texts and labels of a file; ValueError, with the line, for one that has not both."""
    if path.suffix == ".jsonl":
        rows = [json.loads(line) for line in path.read_text().splitlines() if line.strip()]
    elif path.suffix in (".tsv", ".csv"):
        # A tab-separated file has no quoting: a quotation mark in it is part of a sentence.
        how = {"delimiter": "\t", "quoting": csv.QUOTE_NONE} if path.suffix == ".tsv" else {}
        with path.open(newline="") as file:
            rows = list(csv.DictReader(file, **how))
    else:
        raise ValueError(f"{path} must be .tsv, .csv or .jsonl")
    examples = []
    for number, row in enumerate(rows):
        text, label = row.get(data.text), row.get(data.label)
        if text is None or label is None:
            raise ValueError(
                f"{path}: row {number + 1} lacks {data.text!r} or {data.label!r}; it has "
                + ", ".join(map(repr, row))
            )
        if not str(label).isdigit() or int(label) >= classes:
            raise ValueError(
                f"{path}: row {number + 1}: the label {label!r} is none of 0 to {classes - 1}, "
                "which the teacher knows"
            )
        examples.append((text, int(label)))
    if not examples:
        raise ValueError(f"{path} holds no examples")
    return examples


def batch_of(rows: list[tuple[str, int]], tokenizer: Any, max_length: int) -> dict[str, Any]:
    texts, labels = zip(*rows, strict=True)
    batch = tokenizer(
        list(texts), padding=True, truncation=True, max_length=max_length, return_tensors="pt"
    )
    return {**batch, "labels": torch.tensor(labels)}


@torch.no_grad()
def accuracy_of(model: nn.Module, loader: DataLoader) -> float:
    """The share of right answers."""
    was_training, right = model.training, []
    model.eval()
    device = next(model.parameters()).device
    for batch in loader:
        inputs = {name: value.to(device) for name, value in batch.items() if name != "labels"}
        right.append(correct(model(**inputs).logits.cpu(), batch["labels"]))
    model.train(was_training)
    return torch.cat(right).double().mean().item()

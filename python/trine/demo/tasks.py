"""The two tasks, measured: the digit classifiers, and the sentence encoder."""

from pathlib import Path
from typing import Any

import torch
from rich.progress import Progress

import trine
from trine.demo.classifiers import Classifiers
from trine.demo.digits import Digits
from trine.demo.rows import Candidate, Row, measure
from trine.demo.sentences import embed, load_encoder, load_sentences
from trine.demo.serve import Architecture, outputs
from trine.demo.settings import Settings
from trine.evaluate import (
    accuracy,
    agreement,
    bootstrap_interval,
    correct,
    cosine_similarities,
    pairwise_rank_correlation,
)

BATCHES = (1, 32)
ENCODER_BATCH = 32  # sentences per forward pass when embedding all of them


def digits_rows(
    trained: Classifiers, digits: Digits, settings: Settings, folder: Path, progress: Progress
) -> list[Row]:
    """The teacher, the float students and the compressed ones, judged on the test images."""
    teacher = Architecture("mlp", {"width": settings.teacher_width})
    student = Architecture("mlp", {"width": settings.student_width})
    name = f"Student 2x{settings.student_width}"
    candidates = [
        Candidate(f"Teacher 2x{settings.teacher_width}", "float", trained.teacher, teacher),
        Candidate(f"{name} alone", "float", trained.alone, student),
        Candidate(f"{name} distilled", "float, distilled", trained.distilled, student),
    ]
    candidates += [
        Candidate(
            f"{name} {technique}",
            f"{technique} QAT, distilled",
            trine.convert(simulated),
            student,
            simulated,
            baseline=f"{name} distilled",
        )
        for technique, simulated in trained.students.items()
    ]
    bar = progress.add_task("digits: save, serve, time", total=len(candidates))
    rows = measure(
        candidates,
        "digits",
        {str(n): {"images": digits.test.images[:n]} for n in BATCHES},
        folder,
        rounds=101,  # calls of some 100 us: many samples cost little and steady the median
        tick=lambda: progress.advance(bar),
    )
    test = {"images": digits.test.images}
    taught = outputs(trained.teacher, test)
    for row, candidate in zip(rows, candidates, strict=True):
        logits = outputs(candidate.model, test)
        row.accuracy = accuracy(logits, digits.test.labels)
        row.accuracy_ci = bootstrap_interval(correct(logits, digits.test.labels))
        row.agreement = agreement(logits, taught)
    return rows


def sentence_rows(
    settings: Settings, folder: Path, progress: Progress
) -> tuple[list[Row], dict[str, Any]]:
    """The float encoder and the one with every linear layer in INT8; and what is known by layer."""
    bar = progress.add_task("sentences: compress", total=5)
    encoder = load_encoder()
    texts = load_sentences(settings.sentences)
    middle = sorted(texts, key=len)[len(texts) // 2]  # a sentence of median length, for batch 1
    batches = {str(n): encoder.tokenize([middle] if n == 1 else texts[:n]) for n in BATCHES}
    progress.advance(bar)

    # By size, so that every linear layer is swapped; each is measured all the same.
    recipe = trine.Recipe(linear="int8", prefer="size")
    small = trine.compress(encoder.model, recipe, list(batches.values()))
    progress.advance(bar)
    architecture = Architecture("encoder", encoder.config)
    rows = measure(
        [
            Candidate("MiniLM-L6 float", "float", encoder.model, architecture),
            Candidate(
                "MiniLM-L6 int8",
                "int8 after training, all linear layers",
                small,
                architecture,
                trine.quantize.prepare_qat(encoder.model, recipe).eval(),
                baseline="MiniLM-L6 float",
            ),
        ],
        "sentences",
        batches,
        folder,
        rounds=11,
        tick=lambda: progress.advance(bar),
    )
    tokens = [
        encoder.tokenize(texts[start : start + ENCODER_BATCH])
        for start in range(0, len(texts), ENCODER_BATCH)
    ]
    exact, quantised = (
        torch.cat([embed(model, batch) for batch in tokens]) for model in (encoder.model, small)
    )
    for row, embeddings in zip(rows, (exact, quantised), strict=True):
        cosines = cosine_similarities(exact, embeddings)
        row.cosine_mean, row.cosine_min = cosines.mean().item(), cosines.min().item()
        row.rank_correlation = pairwise_rank_correlation(exact, embeddings)
    progress.advance(bar)
    facts = {"sentences": len(texts), "compression": small.report.to_dict()}
    return rows, facts

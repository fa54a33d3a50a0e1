"""Language models in INT8 and ternary, on the source of Python's standard library.

One decoder in float; the same in INT8 after training; and, trained under quantisation from new
weights on the same text in as many updates, with ternary linear layers: by a threshold (TWN), with
two learned scales (TTQ), and by the mean magnitude with int8 activations (BitNet b1.58). The
embedding, which is the output layer, too, stays float, as BitNet's does. Perplexity is of files
that none of them has seen.

    python -m benchmarks.quantization.language
    python -m benchmarks.quantization.language --quick
"""

import math
import platform
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path

import torch
import trine
from torch import Tensor, nn
from trine import Recipe
from trine.distill import Training
from trine.distill.objectives import Labels
from trine.evaluate import alternate
from trine.quantize import post_training, prepare_qat

from benchmarks.language import Texts, decoder, fit, load_texts, nats
from benchmarks.study import (
    SEEDS,
    Row,
    Study,
    bytes_on_disk,
    gain,
    mean_over_seeds,
    parse_arguments,
)


@dataclass(frozen=True)
class Settings:
    """Sizes: of texts in bytes, of everything else in tokens, blocks or updates."""

    train_bytes: int = 2_000_000
    test_bytes: int = 100_000
    vocabulary: int = 1024
    length: int = 128  # of a block
    width: int = 64
    layers: int = 2
    batch: int = 4
    updates: int = 250
    learning_rate: float = 8e-3


QUICK = Settings(test_bytes=50_000, updates=100)

AFTER = {"INT8, after training": "int8"}
TRAINED = {"TWN": "ternary-twn", "TTQ": "ternary-ttq", "BitNet b1.58": "ternary"}
PUBLISHED = 12.87 / 12.33  # BitNet b1.58 against float, 700M (Ma et al. 2024, arXiv:2402.17764)


def recipe(choice: str) -> Recipe:
    return Recipe({"lm_head": "float", "*": choice})


def load(settings: Settings, folder: Path | None = None) -> Texts:
    sizes = (settings.train_bytes, settings.test_bytes, settings.vocabulary, settings.length)
    return load_texts(*sizes, folder=folder)


def make(settings: Settings, name: str, seed: int) -> nn.Module:
    """The model of that name before training: the same weights for all of a seed."""
    model = decoder(
        seed,
        vocabulary=settings.vocabulary,
        length=settings.length,
        width=settings.width,
        layers=settings.layers,
        deviation=settings.width**-0.5,
    )
    return prepare_qat(model, recipe(TRAINED[name])) if name in TRAINED else model


def taught(settings: Settings, name: str, texts: Texts, seed: int) -> nn.Module:
    """Trained, and as it is served."""
    model = make(settings, name, seed)
    updates = settings.updates
    epochs = math.ceil(updates / (len(texts.train) // settings.batch))
    training = Training(
        epochs=epochs, steps=updates, learning_rate=settings.learning_rate, seed=seed
    )
    labels, weights = Labels(shift=True), {"hard": 1.0}
    fit(model, None, labels, weights, texts.train, training, batch=settings.batch)
    return trine.convert(model) if name in TRAINED else model


def packed(model: nn.Module, name: str, texts: Texts) -> nn.Module:
    """INT8 after training; scales of activations are found in each call, data shows only shapes."""
    return post_training(model, recipe(AFTER[name]), [{"input_ids": texts.train.ids[:2]}])


def run_seed(study: Study, settings: Settings, texts: Texts, seed: int) -> dict[str, Tensor]:
    """The test blocks' mean losses, by model."""
    model = make(settings, "float", seed).eval()

    def trained():
        model.load_state_dict(taught(settings, "float", texts, seed).state_dict())
        return {"weights": model.state_dict(), "nats": nats(model, texts.test)}

    found = {"float": study.part(f"float, seed {seed}", trained)}
    model.load_state_dict(found["float"]["weights"])
    for name in AFTER:

        def after(name: str = name):
            return {"nats": nats(packed(model, name, texts), texts.test)}

        found[name] = study.part(f"{name}, seed {seed}", after)
    for name in TRAINED:

        def under(name: str = name):
            return {"nats": nats(taught(settings, name, texts, seed), texts.test)}

        found[name] = study.part(f"{name}, seed {seed}", under)
    return {name: of["nats"] for name, of in found.items()}


def times_and_sizes(settings: Settings, texts: Texts) -> dict[str, dict[str, float]]:
    """Of each model: milliseconds of a token and of a block, bytes on disk; whatever weights."""
    plain = make(settings, "float", 0).eval()
    models = {"float": plain}
    models |= {name: packed(plain, name, texts) for name in AFTER}
    models |= {name: trine.convert(make(settings, name, 0).eval()) for name in TRAINED}
    ids = {f"{length} tokens": texts.train.ids[:1, :length] for length in (1, settings.length)}
    calls = {
        (name, size): partial(model, input_ids=of_size)
        for name, model in models.items()
        for size, of_size in ids.items()
    }
    times = alternate(calls, rounds=21, sample_seconds=2e-3)
    return {
        name: {size: 1e3 * times[name, size] for size in ids} | {"bytes": bytes_on_disk(model)}
        for name, model in models.items()
    }


def rows_of(found: Mapping[str, Tensor], facts: Mapping[str, Mapping[str, float]]) -> list[Row]:
    """`found`: nats per token [seeds, blocks] of each model."""
    perplexities, gaps = [], []
    for name, of_blocks in found.items():
        mean, ends = mean_over_seeds(of_blocks)
        perplexities.append(
            Row(
                name,
                "perplexity per token",
                math.exp(mean),
                tuple(math.exp(end) for end in ends),
                bytes=int(facts[name]["bytes"]),
                latency_ms={key: ms for key, ms in facts[name].items() if key != "bytes"},
            )
        )
        if name == "float":
            continue
        value, ends = gain(of_blocks, found["float"])
        gaps.append(
            Row(
                name,
                "perplexity, times that of float",
                math.exp(value),
                tuple(math.exp(end) for end in ends),
                published=round(PUBLISHED, 3) if name == "BitNet b1.58" else None,
            )
        )
    return perplexities + gaps


def draw(rows: list[Row], path: Path) -> None:
    """Perplexity against bytes."""
    import matplotlib

    matplotlib.use("agg")
    from matplotlib import pyplot as plt

    figure, axes = plt.subplots(figsize=(7, 4), layout="constrained")
    sized = [row for row in rows if row.bytes is not None]
    smallest = min(row.bytes for row in sized)
    for row in sized:
        low, high = row.interval
        megabytes = row.bytes / 1e6
        axes.plot([megabytes] * 2, [low, high], color="#0072b2", linewidth=2)
        axes.plot(megabytes, row.value, "o", color="#0072b2")
        left = row.bytes == smallest  # where no other name is
        axes.annotate(
            row.name,
            (megabytes, row.value),
            (-7 if left else 7, 0),
            textcoords="offset points",
            ha="right" if left else "left",
            va="center",
        )
    axes.set_xlabel("MB on disk")
    axes.set_ylabel("perplexity per token")
    axes.set_xlim(0, 1.2e-6 * max(row.bytes for row in sized))
    axes.grid(alpha=0.2)
    axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=110)
    plt.close(figure)


def main() -> None:
    arguments = parse_arguments(__doc__, "benchmarks.quantization.language")
    torch.set_num_threads(1)  # figures of one thread
    settings = QUICK if arguments.quick else Settings()
    about = {**asdict(settings), "python": platform.python_version()}
    parts = 1 + len(SEEDS) * (1 + len(AFTER) + len(TRAINED))
    study = Study("quantization-language", arguments, parts, about)
    texts = load(settings)
    facts = study.part("times and sizes", lambda: times_and_sizes(settings, texts))
    facts.pop("seconds")
    runs = [run_seed(study, settings, texts, seed) for seed in SEEDS]
    rows = rows_of({name: torch.stack([run[name] for run in runs]) for name in runs[0]}, facts)
    tokens = settings.updates * settings.batch * settings.length
    study.finish(
        rows,
        partial(draw, rows),
        f"{settings.layers} layers of {settings.width}; modules of Python "
        f"{platform.python_version()}'s standard library: {settings.updates} updates of "
        f"{settings.batch} blocks of {settings.length} tokens, {tokens:,} tokens in all, drawn "
        f"from {settings.train_bytes:,} bytes; {len(texts.test):,} blocks of other files to test "
        "on. The embedding stays float in all of them; of the learning rates tried this one is the "
        "best for float, on validation text. The published gap is of 700M weights "
        "trained on 100 billion tokens. Here none has converged: a gap below 1 says who learns "
        "faster in so few updates, not who ends lower. The layers are so small that INT8 and "
        "ternary ones save bytes, no time. Times are of one thread.",
    )


if __name__ == "__main__":
    main()

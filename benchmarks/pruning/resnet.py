"""Structured pruning of a small ResNet to half its multiply-adds, on digits of 32 x 32 pixels.

A ResNet of He et al. 2016 for small images (three stages of 16, 32 and 64 channels) on
scikit-learn's digits, enlarged. Each of its groups of coupled channels loses the same share, those
worth least by the Taylor criterion (Molchanov et al. 2019) on the training images; what is left
learns from labels and from the whole one as its teacher. The control has the pruned one's shape and
training but none of its weights.

    python -m benchmarks.pruning.resnet
    python -m benchmarks.pruning.resnet --quick
"""

import copy
from functools import partial

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from trine.evaluate import alternate
from trine.prune import Taylor, macs, prune_structured

from benchmarks.distillation.digits import Split, load
from benchmarks.resnet import BATCH, PIXELS, TEMPERATURE, enlarged, resnet, right, train
from benchmarks.study import (
    SEEDS,
    Row,
    Study,
    bytes_on_disk,
    gain,
    mean_over_seeds,
    parse_arguments,
)

SHARE = 0.5  # of the multiply-adds that stay


def halved(model: nn.Module, split: Split) -> nn.Module:
    """With the least share of channels gone that leaves half of the multiply-adds."""
    model = copy.deepcopy(model).requires_grad_(True)  # as a teacher it is frozen
    images, labels = split.train.tensors
    images, example = enlarged(images), torch.zeros(1, 1, PIXELS, PIXELS)
    batches = list(zip(images.split(BATCH), labels.split(BATCH), strict=True))
    criterion = Taylor(lambda model, batch: F.cross_entropy(model(batch[0]), batch[1]), batches)
    goal = SHARE * macs(model, example)
    layers = {n: m for n, m in model.named_modules() if isinstance(m, nn.Conv2d | nn.Linear)}
    scores = criterion.scores(model, layers)
    for percent in range(20, 60):
        small = prune_structured(
            model,
            example,
            percent / 100,
            importance=lambda model, layers: {name: scores[name] for name in layers},
            multiple_of=1,
        )
        if small.removal_report.macs_after <= goal:
            return small
    raise AssertionError("no ratio leaves so few multiply-adds")


def shuffled(model: nn.Module, seed: int) -> nn.Module:
    """The same shape with new weights."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(100 + seed)
        for module in model.modules():
            if hasattr(module, "reset_parameters"):
                module.reset_parameters()
    return model


def run_seed(study: Study, split: Split, seed: int, epochs: int) -> tuple[dict, dict]:
    """Which test images each model gets right, and the models."""
    dense = resnet(seed).eval()

    def trained():
        train(dense, None, split, seed, epochs)
        return {"weights": dense.state_dict(), "right": right(dense, split.test)}

    found = {"whole": study.part(f"whole, seed {seed}", trained)}
    dense.load_state_dict(found["whole"]["weights"])
    models = {"whole": dense.eval()}

    def cut():
        small = halved(dense, split)
        before = right(small.eval(), split.test)
        train(small, dense, split, seed, epochs // 2)
        return {"right": right(small, split.test), "before": before}

    def control():
        model = train(shuffled(halved(dense, split), seed), dense, split, seed, epochs // 2)
        return {"right": right(model, split.test)}

    models["pruned"] = halved(dense, split).eval()
    found["pruned"] = study.part(f"pruned, seed {seed}", cut)
    found["at once"] = {"right": found["pruned"]["before"]}
    found["new"] = study.part(f"new weights, seed {seed}", control)
    return {name: of["right"] for name, of in found.items()}, models


NAMES = {
    "whole": "whole",
    "pruned": "half the MACs, then trained with its teacher",
    "at once": "half the MACs, not trained",
    "new": "control: that shape from new weights, same training",
}


def rows_of(correct_of: dict[str, Tensor], models: dict[str, nn.Module]) -> list[Row]:
    """`correct_of`: 100 for a right image, 0 otherwise, [seeds, images]."""
    batches = {"batch 1": torch.rand(1, 1, PIXELS, PIXELS)}
    batches["batch 32"] = torch.rand(32, 1, PIXELS, PIXELS)
    calls = {(m, b): partial(models[m], x) for m in models for b, x in batches.items()}
    times = alternate(calls)
    latency = {m: {b: 1e3 * times[m, b] for b in batches} for m in models}
    _, interval = mean_over_seeds(correct_of["whole"])
    rows = []
    for name, percent in correct_of.items():
        model = "whole" if name == "whole" else "pruned"
        value, of = mean_over_seeds(percent)
        goal = interval[0] if name == "pruned" else None
        row = Row(
            NAMES[name],
            "test accuracy, %",
            value,
            of,
            bytes=bytes_on_disk(models[model]),
            latency_ms=latency[model],
            goal=goal,
            met=goal is None or value >= goal,
        )
        rows.append(row)
    value, of = gain(correct_of["pruned"], correct_of["whole"])
    rows.append(Row("pruned against whole", "gain, points", value, of))
    counts = [macs(m, batches["batch 1"]) for m in (models["pruned"], models["whole"])]
    share = counts[0] / counts[1]
    rows.append(Row("pruned", "share of the MACs", share, goal=SHARE, met=share <= SHARE))
    for batch in batches:
        speed = latency["whole"][batch] / latency["pruned"][batch]
        rows.append(Row("pruned", f"speed-up, {batch}", speed))
    return rows


def main() -> None:
    arguments = parse_arguments(__doc__, "benchmarks.pruning.resnet")
    torch.set_num_threads(1)
    epochs = 8 if arguments.quick else 24
    settings = {"epochs": epochs, "batch": BATCH, "temperature": TEMPERATURE, "share": SHARE}
    study = Study("pruning-resnet", arguments, 3 * len(SEEDS), settings)
    split = load()
    found = [run_seed(study, split, seed, epochs) for seed in SEEDS]
    correct_of = {n: torch.stack([100.0 * of[n] for of, _ in found]) for n in NAMES}
    notes = (
        f"{len(split.train)} training and {len(split.test)} test images; the goal of the pruned "
        "model is the lower end of the whole one's interval. Size and times are of seed 0; all are "
        "trained half as long after pruning as before."
    )
    study.finish(rows_of(correct_of, found[0][1]), notes=notes)


if __name__ == "__main__":
    main()

"""A small ResNet in INT8, after training and in it, on digits of 32 x 32 pixels.

Convolutions and linear layer of a float ResNet become INT8, with a scale for each image ("dynamic")
or one that is found beforehand ("static"): after training, and by training under quantisation that
goes on from the float weights. Batch norms are folded into the convolutions before. Times are of
whole models, beside float `nn.Conv2d` in both layouts of memory and bfloat16, taking turns.

    python -m benchmarks.quantization.resnet
    python -m benchmarks.quantization.resnet --quick
"""

import copy
from collections.abc import Mapping
from functools import partial

import torch
import trine
from torch import Tensor, nn
from trine import Recipe
from trine.evaluate import alternate
from trine.quantize import QatSchedule, fold_batch_norm, post_training, prepare_qat

from benchmarks.distillation.digits import Split, load
from benchmarks.resnet import BATCH, PIXELS, enlarged, resnet, right, train
from benchmarks.study import (
    SEEDS,
    Row,
    Study,
    bytes_on_disk,
    gain,
    mean_over_seeds,
    parse_arguments,
)

CHOICES = {"dynamic": "int8", "static": "int8-static"}
QAT_RATE = 1e-3  # a third of what float weights are trained with


def recipe(scales: str) -> Recipe:
    return Recipe(linear=CHOICES[scales], conv=CHOICES[scales])


def batches(split: Split) -> list[Tensor]:
    """All training images, to find ranges by."""
    return list(enlarged(split.train.tensors[0]).split(BATCH))


def folded(model: nn.Module) -> nn.Module:
    """With the batch norms in the convolutions before them."""
    return fold_batch_norm(model, torch.zeros(1, 1, PIXELS, PIXELS))


def after_training(model: nn.Module, scales: str, split: Split) -> nn.Module:
    return post_training(folded(model), recipe(scales), batches(split))


def in_training(model: nn.Module, scales: str, split: Split, seed: int, epochs: int) -> nn.Module:
    """The packed model; ranges and batch norms move in the first half of the updates."""
    qat = prepare_qat(model, recipe(scales), batches(split))
    half = epochs * (len(split.train) // BATCH) // 2
    schedule = QatSchedule(qat, freeze_ranges=half, freeze_batch_norm=half)
    train(qat, None, split, seed, epochs, learning_rate=QAT_RATE, after_update=schedule.step)
    return trine.convert(qat.eval())


def run_seed(study: Study, split: Split, seed: int, epochs: int) -> dict[str, Tensor]:
    """Which test images each model gets right."""
    model = resnet(seed).eval()

    def trained():
        train(model, None, split, seed, epochs)
        return {"weights": model.state_dict(), "right": right(model, split.test)}

    found = {"float": study.part(f"float, seed {seed}", trained)}
    model.load_state_dict(found["float"]["weights"])
    model.eval()
    for scales in CHOICES:

        def packed(scales: str = scales):
            return {"right": right(after_training(model, scales, split), split.test)}

        def taught(scales: str = scales):
            small = in_training(model, scales, split, seed, epochs // 3)
            return {"right": right(small, split.test)}

        found[f"PTQ, {scales}"] = study.part(f"PTQ {scales}, seed {seed}", packed)
        found[f"QAT, {scales}"] = study.part(f"QAT {scales}, seed {seed}", taught)
    return {name: of["right"] for name, of in found.items()}


FLOAT, INT8 = "float, norms folded", "INT8, dynamic"


def forms(split: Split) -> dict[str, nn.Module]:
    """What is timed: weights do not matter to it."""
    model = resnet(0).eval()
    found = {"float, as trained": model, FLOAT: folded(model)}
    found["bfloat16, norms folded"] = folded(model).bfloat16()
    return found | {f"INT8, {scales}": after_training(model, scales, split) for scales in CHOICES}


def latencies(models: Mapping[str, nn.Module]) -> dict[str, dict[str, float]]:
    """Milliseconds by model, batch and layout of memory."""
    calls = {}
    for name, model in models.items():
        channels_last = copy.deepcopy(model).to(memory_format=torch.channels_last)
        dtype = next(model.parameters(), torch.empty(0)).dtype
        for size in (1, 32):
            planes = torch.rand(size, 1, PIXELS, PIXELS, dtype=dtype)
            pixels = torch.rand(size, PIXELS, PIXELS, 1, dtype=dtype).permute(0, 3, 1, 2)
            calls[name, f"batch {size}"] = partial(model, planes)
            calls[name, f"batch {size}, channels_last"] = partial(channels_last, pixels)
    times = alternate(calls, rounds=41, sample_seconds=2e-3)
    found: dict[str, dict[str, float]] = {name: {} for name in models}
    for (name, batch), seconds in times.items():
        found[name][batch] = 1e3 * seconds
    return found


def times_and_sizes(split: Split) -> dict[str, dict[str, float]]:
    models = forms(split)
    times = latencies(models)
    return {name: {**times[name], "bytes": bytes_on_disk(m)} for name, m in models.items()}


def form_of(name: str) -> str:
    """The model that takes as long and as many bytes."""
    return FLOAT if name == "float" else f"INT8, {name.rpartition(' ')[2]}"


def rows_of(correct_of: dict[str, Tensor], facts: dict[str, dict[str, float]]) -> list[Row]:
    """`correct_of`: 100 for a right image, 0 otherwise, [seeds, images]. `facts`: of the forms."""
    latency = {name: {k: v for k, v in of.items() if k != "bytes"} for name, of in facts.items()}
    _, (low, _) = mean_over_seeds(correct_of["float"])
    accuracies, gains, speeds = [], [], []
    for name, percent in correct_of.items():
        form, is_float = form_of(name), name == "float"
        value, interval = mean_over_seeds(percent)
        accuracies.append(
            Row(
                name if is_float else f"INT8 {name}",
                "test accuracy, %",
                value,
                interval,
                bytes=int(facts[form]["bytes"]),
                latency_ms={k: ms for k, ms in latency[form].items() if "," not in k},
                goal=None if is_float else low,
                met=is_float or value >= low,
            )
        )
        if not is_float:
            value, interval = gain(percent, correct_of["float"])
            gains.append(Row(f"INT8 {name}", "points more than float", value, interval))
    for name in facts:
        if name == FLOAT:
            continue
        for batch, ms in latency[name].items():
            speed = latency[FLOAT][batch] / ms
            goal = 1.0 if name == INT8 else None
            metric = f"times as fast, {batch}"
            speeds.append(Row(name, metric, speed, goal=goal, met=goal is None or speed > goal))
    return accuracies + gains + speeds


def main() -> None:
    arguments = parse_arguments(__doc__, "benchmarks.quantization.resnet")
    torch.set_num_threads(1)
    epochs = 6 if arguments.quick else 24
    settings = {"epochs": epochs, "batch": BATCH, "qat_rate": QAT_RATE}
    parts = 1 + len(SEEDS) * (1 + 2 * len(CHOICES))
    study = Study("quantization-resnet", arguments, parts, settings)
    split = load()
    facts = study.part("times and sizes", lambda: times_and_sizes(split))
    facts.pop("seconds")
    found = [run_seed(study, split, seed, epochs) for seed in SEEDS]
    correct_of = {name: torch.stack([100.0 * of[name] for of in found]) for name in found[0]}
    notes = (
        f"{len(split.train)} training and {len(split.test)} test images; the goal of the INT8 "
        f"models is the lower end of the float one's interval. Faster: than '{FLOAT}' with the "
        "same layout of memory. QAT has a third of the epochs of float. Times are of one thread; "
        "with three million multiply-adds to an image, much of a call at batch 1 passes between "
        "layers."
    )
    study.finish(rows_of(correct_of, facts), notes=notes)


if __name__ == "__main__":
    main()

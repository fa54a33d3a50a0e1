"""A fine-tuned MiniLM-L6 on SST-2 in integers: what each way of quantising leaves of it.

INT8 after training: activations with a scale for each row, or with one scale by an observer (the
one that keeps the logits best on dev.tsv), smoothed, rounded by GPTQ; INT8 trained under
quantisation; ternary weights by GPTQ, trained with few labels alone, and with the float model as
their teacher too (soft targets, hidden states, attention maps; that needs no labels, so it sees
phrases without: as in practice, where there is a model, much text, and few labels). For comparison
trained with all the labels that the float model had. Three float models, fine-tuned with three
seeds; everything is made of each.

    python -m benchmarks.quantization.sst2 --data DIR
    python -m benchmarks.quantization.sst2 --data DIR --quick
    python -m benchmarks.quantization.sst2 --data DIR --whole
"""

import argparse
import copy
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from functools import cached_property, partial
from typing import Any

import torch
import trine
from torch import Tensor, nn
from trine import Recipe
from trine.distill import Distiller, Fixed, Frozen, Training
from trine.distill.objectives import Labels, SoftTargets, Together
from trine.evaluate import cosine_similarities
from trine.quantize import QatSchedule, observers, post_training, prepare_qat, smooth

from benchmarks import sst2
from benchmarks.sst2 import Phrases, Sst2
from benchmarks.study import (
    SEEDS,
    Row,
    Study,
    bytes_on_disk,
    gain,
    mean_over_seeds,
    parse_arguments,
)

BATCH = 32
TEMPERATURE = 2.0
WEIGHTS = {"soft": 1.0, "hard": 0.5, "hidden": 1.0, "attention": 5.0}
OBSERVERS = {
    kind.__name__: kind
    for kind in (
        observers.MinMax,
        observers.MovingAverage,
        observers.Percentile,
        observers.MeanSquaredError,
        observers.Entropy,
    )
}
# What little is outside of the encoder's layers gets 8 bits; the word embeddings stay.
TERNARY = {"*encoder.layer.*": "ternary-twn-g128", "*": "int8"}

INT8 = ("INT8 dynamic", "INT8 static", "INT8 static, SmoothQuant", "INT8 GPTQ")
AFTER_TRAINING = (*INT8, "ternary GPTQ")
ALONE, DISTILLED = "ternary QAT, few labels", "ternary QAT, few labels, distilled"
TRAINED = ("INT8 static, QAT", ALONE, DISTILLED, "ternary QAT, all labels")


@dataclass(frozen=True)
class Amounts:
    """calibration: phrases that ranges and GPTQ are of. dev: phrases that the observer is chosen
    on. few: labelled phrases of what is trained with few labels. unlabelled: phrases that the
    distilled see beside these, of `least` tokens or more. Updates of each."""

    calibration: int
    dev: int
    few: int
    unlabelled: int
    int8_updates: int
    ternary_updates: int
    least: int = sst2.LONG


def amounts_of(arguments: argparse.Namespace) -> Amounts:
    if arguments.quick:
        return Amounts(32, 100, few=250, unlabelled=2000, int8_updates=5, ternary_updates=10)
    if arguments.whole:
        return Amounts(1024, 10**9, 8000, 10**9, int8_updates=600, ternary_updates=6000, least=1)
    return Amounts(128, 500, few=1000, unlabelled=12_000, int8_updates=20, ternary_updates=400)


def training_of(name: str, amounts: Amounts, seed: int) -> Training:
    ternary = name.startswith("ternary")
    updates = amounts.ternary_updates if ternary else amounts.int8_updates
    return Training(
        epochs=updates,
        steps=updates,
        learning_rate=3e-4 if ternary else 2e-5,
        decay="linear",
        precision=sst2.PRECISION,
        seed=seed,
    )


@dataclass(frozen=True)
class Task:
    """A float model and what it is quantised with."""

    dense: nn.Module
    calibration: list[dict[str, Tensor]]
    observer: str

    @cached_property
    def ternary(self) -> nn.Module:
        """Its ternary form by GPTQ."""
        return post_training(self.dense, Recipe(TERNARY), self.calibration, rounding="gptq")


def after_training(name: str, task: Task) -> nn.Module:
    """The float model with packed layers, of one of AFTER_TRAINING."""
    if name == "INT8 dynamic":
        return post_training(task.dense, Recipe("int8"), task.calibration)
    if name == "INT8 GPTQ":
        return post_training(task.dense, Recipe("int8"), task.calibration, rounding="gptq")
    if name == "ternary GPTQ":
        return task.ternary
    calm = name == "INT8 static, SmoothQuant"
    model = smooth(task.dense, task.calibration) if calm else task.dense
    observer = OBSERVERS[task.observer]
    return post_training(model, Recipe("int8-static"), task.calibration, observer=observer)


def towards_ternary(task: Task) -> nn.Module:
    """The float model with each ternary weight half way to what GPTQ makes of it.

    So training begins with GPTQ's codes, which lose far less than those of the nearest values, and
    each weight as near to the next code as it was.
    """
    model = copy.deepcopy(task.dense)
    with torch.no_grad():
        for name, layer in task.ternary.named_modules():
            if isinstance(layer, trine.nn.TernaryLinear):
                weight = model.get_submodule(name).weight
                weight.lerp_(layer.weight, 0.5)
    return model


def phrases_of(name: str, data: Sst2, amounts: Amounts) -> Phrases:
    """What one of TRAINED learns from."""
    if name not in (ALONE, DISTILLED):
        return data.labelled
    few = data.labelled.rows(slice(amounts.few))
    if name == ALONE:
        return few
    others = data.unlabelled + data.labelled.rows(slice(amounts.few, None)).without_labels()
    return few + others.at_least(amounts.least).rows(slice(amounts.unlabelled))


def trained(name: str, task: Task, data: Sst2, amounts: Amounts, seed: int) -> nn.Module:
    """The packed model that training under quantisation makes of the float one."""
    ternary = name.startswith("ternary")
    start = towards_ternary(task) if ternary else task.dense
    recipe = Recipe(TERNARY if ternary else "int8-static")
    student = sst2.without_word_vectors(prepare_qat(start, recipe, task.calibration).train())
    training = training_of(name, amounts, seed)
    teacher, objectives = None, [Labels()]
    if name == DISTILLED:
        dense = copy.deepcopy(task.dense)
        objectives += [SoftTargets(TEMPERATURE), *sst2.inner_objectives(student, dense)]
        teacher = Frozen(dense, dtype=sst2.DTYPE)
    distiller = Distiller(
        student,
        teacher,
        Together(*objectives),
        Fixed(WEIGHTS if teacher else {"hard": 1.0}),
        transform=None if ternary else follow_ranges(student, training.steps),
        training=training,
    )
    rows = phrases_of(name, data, amounts)
    return trine.convert(sst2.logits_only(distiller.fit(rows.loader(BATCH)).eval()))


def follow_ranges(model: nn.Module, updates: int) -> Callable[[dict, nn.Module], dict]:
    """For a Distiller: before each batch the ranges of activations move to what the one before it
    had, but stay in the last third."""
    schedule = QatSchedule(model, freeze_ranges=updates * 2 // 3)

    def step(batch: dict[str, Any], student: nn.Module) -> dict[str, Any]:
        schedule.step()
        return batch

    return step


def best_observer(dense: nn.Module, calibration: list, rows: Phrases) -> dict[str, Any]:
    """The one whose static INT8 moves the logits of `rows` least, and by how much each does."""
    expected = sst2.logits(dense, rows)
    moved = {}
    for name in OBSERVERS:
        model = after_training("INT8 static", Task(dense, calibration, name))
        moved[name] = (sst2.logits(model, rows) - expected).abs().mean().item()
    return {"observer": min(moved, key=moved.get), **moved}


def of_float(dense: nn.Module, rows: Phrases) -> dict[str, Tensor]:
    right, embeddings = sst2.right_and_embeddings(dense, rows)
    return {"right": right, "embeddings": embeddings, "cosine": torch.ones(len(rows))}


def judged(model: nn.Module, of_dense: Tensor, rows: Phrases) -> dict[str, Tensor]:
    """Which rows are right, and the cosine of each embedding with the float model's."""
    right, embeddings = sst2.right_and_embeddings(model, rows)
    return {"right": right, "cosine": cosine_similarities(embeddings, of_dense)}


def run_seed(
    study: Study, data: Sst2, task: Task, amounts: Amounts, seed: int, own: Tensor
) -> dict[str, dict[str, Tensor]]:
    """What `judged` says of every model made of one float model, whose embeddings are `own`."""
    models = {name: partial(after_training, name, task) for name in AFTER_TRAINING}
    models |= {name: partial(trained, name, task, data, amounts, seed) for name in TRAINED}
    return {
        name: study.part(f"{name}, seed {seed}", lambda make=make: judged(make(), own, data.test))
        for name, make in models.items()
    }


def form_of(name: str) -> str:
    """The model with the same layers: it takes as long and as many bytes."""
    if name.startswith("ternary"):
        return "ternary GPTQ"
    return "INT8 static" if "static" in name else "INT8 dynamic" if "INT8" in name else name


def times_and_sizes(task: Task, rows: Phrases) -> dict[str, dict[str, float]]:
    """Of each form: milliseconds by batch size, bytes on disk."""
    forms = dict.fromkeys(form_of(name) for name in AFTER_TRAINING)
    models = {"float": task.dense} | {name: after_training(name, task) for name in forms}
    times = sst2.latency_ms(models, rows)
    return {name: {**times[name], "bytes": bytes_on_disk(model)} for name, model in models.items()}


KEYS = ("right", "cosine")
POINTS = "accuracy against float, points"
MEAN_COSINE, WORST_COSINE = ("cosine of embeddings with float's, " + of for of in ("mean", "worst"))
GOALS = dict.fromkeys(INT8, -0.5) | {DISTILLED: -3.0}
COSINE_GOAL = 0.99
PUBLISHED = {"INT8 static, QAT": "92.24 (BERT-base, dev; Zafrir et al. 2019)"}


def rows_of(results: dict[str, dict[str, Tensor]], facts: dict[str, dict[str, float]]) -> list[Row]:
    """`results`: by model "right", bool [seeds, sentences], and "cosine", of the same shape."""
    percent = {name: 100.0 * found["right"] for name, found in results.items()}
    accuracies, gains, cosines = [], [], []
    for name, scores in percent.items():
        form = facts[form_of(name)]
        accuracies.append(
            Row(
                name,
                "accuracy, %",
                *mean_over_seeds(scores),
                bytes=int(form["bytes"]),
                latency_ms={key: value for key, value in form.items() if key != "bytes"},
                published=PUBLISHED.get(name),
            )
        )
        if name == "float":
            continue
        value, interval = gain(scores, percent["float"])
        goal = GOALS.get(name)
        met = goal is None or value >= goal
        gains.append(Row(name, POINTS, value, interval, goal=goal, met=met))
        cosine = results[name]["cosine"]
        value, interval = mean_over_seeds(cosine)
        goal = COSINE_GOAL if name in INT8 else None
        met = goal is None or value >= goal
        cosines.append(Row(name, MEAN_COSINE, value, interval, goal=goal, met=met))
        cosines.append(Row(name, WORST_COSINE, cosine.min().item()))
    value, interval = gain(percent[DISTILLED], percent[ALONE])
    title = "ternary QAT, few labels: distilled - alone"
    gains.append(Row(title, "points", value, interval, goal=0.0, met=value > 0))
    return accuracies + gains + sorted(cosines, key=lambda row: row.metric)


def main() -> None:
    arguments = parse_arguments(
        __doc__, "benchmarks.quantization.sst2", data=sst2.DATA, subset=True
    )
    scale, amounts = sst2.scale_of(arguments, SEEDS[0]), amounts_of(arguments)
    data = Sst2.load(arguments.data, scale.labelled)
    if arguments.quick:
        data = replace(data, test=data.test.rows(slice(None, None, 4)))
    settings = {"labelled": len(data.labelled), "teacher": asdict(scale.teacher)}
    settings |= {"amounts": asdict(amounts), "weights": WEIGHTS, "temperature": TEMPERATURE}
    settings |= {"ternary": TERNARY, "batch": BATCH}
    settings |= {name: asdict(training_of(name, amounts, 0)) for name in TRAINED}
    parts = 2 + len(SEEDS) * (1 + len(AFTER_TRAINING) + len(TRAINED))
    study = Study("quantization-sst2", arguments, parts, settings)
    calibration, found, models = data.calibration(amounts.calibration), {}, {}
    for seed in SEEDS:
        training = replace(scale.teacher, seed=seed)
        part = partial(lambda of: of_float(data.teacher(of), data.test), training)
        found[seed] = {"float": study.part(f"float, seed {seed}", part)}
        models[seed] = data.teacher(training)
    some = data.dev.rows(slice(amounts.dev))
    chosen = study.part("observer", lambda: best_observer(models[SEEDS[0]], calibration, some))
    tasks = {seed: Task(dense, calibration, chosen["observer"]) for seed, dense in models.items()}
    for seed, task in tasks.items():
        own = found[seed]["float"]["embeddings"]
        found[seed] |= run_seed(study, data, task, amounts, seed, own)
    facts = study.part("times and sizes", lambda: times_and_sizes(tasks[SEEDS[0]], data.test))
    results = {
        name: {key: torch.stack([of[name][key] for of in found.values()]) for key in KEYS}
        for name in ("float", *AFTER_TRAINING, *TRAINED)
    }
    few, many = (len(phrases_of(name, data, amounts)) for name in (ALONE, DISTILLED))
    notes = (
        f"The float models are MiniLM-L6 fine-tuned on {len(data.labelled)} labelled phrases. "
        f"Static ranges are by {chosen['observer']}, over {amounts.calibration} phrases. What is "
        f"trained has {amounts.int8_updates} (INT8) or {amounts.ternary_updates} (ternary) updates "
        f"of {BATCH} phrases. Few labels are {few}; the distilled also see {many - few} phrases "
        f"without label, of at least {amounts.least} tokens. Ternary weights begin half way "
        "between the float ones and those of GPTQ. Ternary are the linear layers of the encoder; "
        "the word embeddings, half of the weights, stay in float and are most of the bytes. The "
        "published model is larger and has all labels and far longer training."
    )
    study.finish(rows_of(results, facts), notes=notes)


if __name__ == "__main__":
    main()

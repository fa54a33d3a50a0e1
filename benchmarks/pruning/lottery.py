"""Winning tickets on scikit-learn's digits: Frankle & Carbin 2019 against random initial weights.

A network of 2 x 100 units is trained, a fifth of its weights that are left (those of least
magnitude, of all layers together) is removed, and those that stay go back to what they were before
training; again, until 5% are left. At each size the same connections are also trained from new
random weights. Where that ends worse, the ticket won by its initial weights, not by its shape.

    python -m benchmarks.pruning.lottery
    python -m benchmarks.pruning.lottery --quick
"""

import argparse
from pathlib import Path

import torch
from torch import Tensor, nn
from trine.demo.digits import Mlp
from trine.evaluate import correct
from trine.prune import Global, Iterative, Magnitude, OneShot, Pruner, Weight

from benchmarks.distillation.digits import Split, load
from benchmarks.study import SEEDS, Row, Study, mean_over_seeds, parse_arguments

WIDTH = 100
LEFT = 0.05  # of the weights, after all rounds
ROUNDS = 13  # each leaves 0.05 ** (1 / 13) = 79%: the paper removes a fifth a round
SHOWN = 0.21  # the study compares from here downwards
BATCH, RATE = 60, 1.2e-3  # the paper's, of Adam
LOOK_EVERY = 10


class Training:
    """Updates of one network, in a random order that its seed decides.

    `right`: which test images it gets right where the loss on the validation images is least, which
    is after `updates` updates: the paper's early stopping. `final`: after the last update.
    """

    def __init__(self, model: nn.Module, split: Split, seed: int) -> None:
        self.model, self.split = model, split
        self.draws = torch.Generator().manual_seed(seed)
        self.optimizer = torch.optim.Adam(model.parameters(), RATE)

    def run(self, updates: int, pruner: Pruner | None = None) -> dict[str, Tensor | int]:
        images, labels = self.split.train.tensors
        least, found = float("inf"), {}
        for update in range(1, updates + 1):
            rows = torch.randint(len(labels), (BATCH,), generator=self.draws)
            loss = nn.functional.cross_entropy(self.model(images[rows]), labels[rows])
            self.optimizer.zero_grad()
            loss.backward()
            self.optimizer.step()
            if update % LOOK_EVERY == 0:
                now, right = self._look()
                if now < least:
                    least, found = now, {"right": right, "updates": update}
            if pruner is not None:
                pruner.step()
        return {**found, "final": right}

    @torch.no_grad()
    def _look(self) -> tuple[float, Tensor]:
        images, labels = self.split.validation.tensors
        loss = nn.functional.cross_entropy(self.model(images), labels).item()
        test, of_test = self.split.test.tensors
        return loss, correct(self.model(test), of_test)


def tickets(split: Split, seed: int, updates: int) -> dict[str, list]:
    """One network through all rounds, with the connections that were left in each."""
    model = Mlp(WIDTH, seed=seed)
    training = Training(model, split, seed)
    pruner = Pruner(
        model,
        Magnitude(),
        Weight(),
        Global(1 - LEFT),
        Iterative(ROUNDS, updates, rewind=0),
        optimizer=training.optimizer,
    )
    found = []
    for _ in range(ROUNDS + 1):
        shape = {name: mask.clone() for name, mask in pruner.masks().items()}
        found.append({"shape": shape, **training.run(updates, pruner)})
    return {"rounds": found}


def again(shape: dict[str, Tensor], split: Split, seed: int, updates: int) -> dict[str, Tensor]:
    """The connections of a ticket, trained from other initial weights."""
    model = Mlp(WIDTH, seed=1000 + seed)
    weights = dict(model.named_parameters())
    with torch.no_grad():
        for name, mask in shape.items():
            weights[name].masked_fill_(~mask, 0)
    training = Training(model, split, seed)
    off = sum((~mask).sum().item() for mask in shape.values())
    of_all = sum(p.numel() for p in weights.values() if p.dim() > 1)
    # The zeros are the least: they are what is pruned, and stay so.
    pruner = Pruner(
        model,
        Magnitude(),
        Weight(),
        Global(off / of_all),
        OneShot(),
        optimizer=training.optimizer,
    )
    return training.run(updates, pruner)


def left_after(done: int) -> float:
    return LEFT ** (done / ROUNDS)


def rows_of(results: dict[str, dict[int, list]]) -> list[Row]:
    """`results`: by kind and round, what each seed found."""
    rows, whole = [], scores(results["ticket"][0], "right")
    rows.append(Row("all weights", "test accuracy, %", *mean_over_seeds(whole)))
    for done in results["again"]:
        share = f"{left_after(done):.1%} of the weights"
        ticket, other = (scores(results[kind][done], "right") for kind in ("ticket", "again"))
        rows.append(Row(f"{share}, ticket", "test accuracy, %", *mean_over_seeds(ticket)))
        rows.append(Row(f"{share}, new weights", "test accuracy, %", *mean_over_seeds(other)))
    first, gains = min(results["again"]), []
    for done in results["again"]:
        name = f"ticket at {left_after(done):.1%} against new weights"
        ticket, other = (scores(results[kind][done], "right") for kind in ("ticket", "again"))
        gains.append(ticket - other)
        published = 0.5 if done == first else None
        rows.append(gain_row(name, gains[-1], published))
    rows.append(gain_row("tickets of all these sizes", torch.stack(gains).mean(0)))
    for done in results["again"]:
        name = f"ticket at {left_after(done):.1%} against new weights"
        times = mean_updates(results["again"][done]) / mean_updates(results["ticket"][done])
        published = 2.51 if done == first else None
        judged = {"published": published, "goal": 1.0, "met": times > 1}
        rows.append(Row(name, "times as few updates to the least validation loss", times, **judged))
    return rows


def gain_row(name: str, gains: Tensor, published: float | None = None) -> Row:
    """`gains` [seeds, images], in points. The goal is met where the whole interval is above 0."""
    value, interval = mean_over_seeds(gains)
    judged = {"published": published, "goal": 0.0, "met": interval[0] > 0}
    return Row(name, "higher accuracy, points", value, interval, **judged)


def scores(of_seeds: list, which: str) -> Tensor:
    """100 for a test image that is right, else 0: [seeds, images]."""
    return torch.stack([100.0 * found[which] for found in of_seeds])


def mean_updates(of_seeds: list) -> float:
    return sum(found["updates"] for found in of_seeds) / len(of_seeds)


def draw(results: dict[str, dict[int, list]], path: Path) -> None:
    import matplotlib

    matplotlib.use("agg")
    from matplotlib import pyplot as plt

    figure, panels = plt.subplots(1, 2, figsize=(10, 4), layout="constrained")
    for kind, label, color in (
        ("ticket", "ticket: its initial weights", "#0072b2"),
        ("again", "the same connections, new random weights", "#d55e00"),
    ):
        rounds = results[kind]
        share = [100 * left_after(done) for done in rounds]
        means = [mean_over_seeds(scores(found, "right")) for found in rounds.values()]
        low, high = zip(*(interval for _, interval in means), strict=True)
        panels[0].plot(share, [value for value, _ in means], "o-", color=color, label=label)
        panels[0].fill_between(share, low, high, color=color, alpha=0.15, linewidth=0)
        updates = [mean_updates(found) for found in rounds.values()]
        panels[1].plot(share, updates, "o-", color=color, label=label)
    panels[0].set_ylabel("test accuracy, %, where validation loss is least")
    panels[1].set_ylabel("updates to the least validation loss")
    for axes in panels:
        axes.set_xscale("log")
        ticks = [100, 50, 20, 10, 5]
        axes.set_xticks(ticks, [f"{tick}%" for tick in ticks])
        axes.minorticks_off()
        axes.invert_xaxis()
        axes.set_xlabel("weights left")
        axes.grid(alpha=0.2)
        axes.spines[["top", "right"]].set_visible(False)
    panels[0].legend(frameon=False)
    figure.savefig(path, dpi=110)
    plt.close(figure)


def run(arguments: argparse.Namespace) -> None:
    updates = 300 if arguments.quick else 1500
    compared = [done for done in range(ROUNDS + 1) if left_after(done) < SHOWN]
    settings = {"updates": updates, "width": WIDTH, "rounds": ROUNDS, "left": LEFT}
    parts = len(SEEDS) * (1 + len(compared))
    study = Study("pruning-lottery", arguments, parts, settings)
    split = load()
    results = {"ticket": {done: [] for done in range(ROUNDS + 1)}}
    results["again"] = {done: [] for done in compared}
    for seed in SEEDS:
        found = study.part(f"tickets, seed {seed}", lambda s=seed: tickets(split, s, updates))
        for done, of_round in enumerate(found["rounds"]):
            results["ticket"][done].append(of_round)
        for done in compared:
            shape = found["rounds"][done]["shape"]
            part = study.part(
                f"new weights at {left_after(done):.1%}, seed {seed}",
                lambda shape=shape, s=seed: again(shape, split, s, updates),
            )
            results["again"][done].append(part)
    notes = (
        f"{len(split.train)} training and {len(split.test)} test images of 8 x 8 pixels; the "
        "paper's figures are of a 300-100 network on MNIST with 21.1% of its weights."
    )
    study.finish(rows_of(results), lambda path: draw(results, path), notes)


def main() -> None:
    torch.set_num_threads(1)  # the network is too small to share
    run(parse_arguments(__doc__, "benchmarks.pruning.lottery"))


if __name__ == "__main__":
    main()

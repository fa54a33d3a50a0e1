"""The study of lottery tickets: what it trains from which weights, and what it makes of that."""

import pytest
import torch
from trine.demo.digits import Mlp

from benchmarks.pruning import lottery


@pytest.fixture(scope="module")
def split():
    return lottery.load()


def test_connections_of_a_ticket_are_trained_from_other_weights(split, monkeypatch):
    monkeypatch.setattr(lottery, "ROUNDS", 3)
    found = lottery.tickets(split, 0, 20)["rounds"]
    total = sum(p.numel() for p in Mlp(lottery.WIDTH).parameters() if p.dim() > 1)
    for done, of_round in enumerate(found):
        off = sum((~mask).sum().item() for mask in of_round["shape"].values())
        assert off == round((1 - 0.05 ** (done / 3)) * total)
    seen = []
    monkeypatch.setattr(lottery, "Mlp", lambda *a, **k: seen.append(Mlp(*a, **k)) or seen[-1])
    lottery.again(found[3]["shape"], split, 0, 20)
    for name, parameter in seen[0].named_parameters():
        if parameter.dim() > 1:
            assert torch.equal(parameter != 0, found[3]["shape"][name])
            assert not torch.equal(parameter, dict(Mlp(lottery.WIDTH).named_parameters())[name])


def test_rows_and_picture(tmp_path):
    images, compared = 40, [7, 13]

    def found(right: int, updates: int):
        return [{"right": torch.arange(images) < right, "updates": updates}] * 3

    results = {
        "ticket": {done: found(36, 100) for done in range(14)},
        "again": {done: found(30, 250) for done in compared},
    }
    rows = lottery.rows_of(results)
    gains = [row for row in rows if row.metric == "higher accuracy, points"]
    assert [row.value for row in gains] == [15.0, 15.0, 15.0]
    assert all(row.met for row in gains)
    assert [row.value for row in rows if "times" in row.metric] == [2.5, 2.5]
    lottery.draw(results, tmp_path / "tickets.png")
    assert (tmp_path / "tickets.png").stat().st_size > 10_000

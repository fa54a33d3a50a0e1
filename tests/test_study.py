"""What the studies in benchmarks/ share."""

import json
import os
from functools import partial

import pytest
import torch

from benchmarks import study
from benchmarks.study import Row, Study, gain, mean_over_seeds, parse_arguments


@pytest.fixture(autouse=True)
def elsewhere(tmp_path, monkeypatch):
    monkeypatch.setattr(study, "FOLDER", tmp_path)
    monkeypatch.setattr(study, "UNFINISHED", tmp_path / "unfinished")


def arguments(*given: str):
    return parse_arguments("A study.\n\nOf something.", "benchmarks.test", given)


def test_a_gain_is_paired():
    hard = torch.rand(3, 400) < torch.linspace(0, 1, 400)  # some examples are hard for everybody
    better = hard | (torch.rand(3, 400) < 0.02)
    value, (low, high) = gain(better, hard)
    assert value == pytest.approx((better.double() - hard.double()).mean().item())
    assert low <= value <= high
    _, alone = mean_over_seeds(better)
    assert high - low < (alone[1] - alone[0]) / 3


def test_a_stopped_study_goes_on(tmp_path):
    calls = []

    def part(name: str):
        calls.append(name)
        return {"weights": torch.arange(3.0), "name": name}

    first = Study("test-it", arguments(), 2, {"epochs": 1})
    first.part("a/b c", lambda: part("a"))
    again = Study("test-it", arguments("--resume"), 2, {"epochs": 1})
    found = again.part("a/b c", lambda: part("a"))
    again.part("d", lambda: part("d"))
    assert calls == ["a", "d"]
    assert found["weights"].tolist() == [0, 1, 2]
    with pytest.raises(SystemExit, match="other settings"):
        Study("test-it", arguments("--resume"), 2, {"epochs": 2})
    Study("test-it", arguments(), 2, {"epochs": 1}).part("a/b c", lambda: part("a"))
    assert calls == ["a", "d", "a"]


def test_parts_at_once_are_processes_of_one_thread(capfd):
    def part(name: str):
        return {"name": name, "process": os.getpid(), "threads": torch.get_num_threads()}

    threads = torch.get_num_threads()
    first = Study("test-it", arguments(), 4, {})
    first.part("a", lambda: part("a"))
    computes = {name: partial(part, name) for name in ("a", "b", "c", "d")}
    found = first.parts_at_once(computes)
    assert list(found) == ["a", "b", "c", "d"]
    assert [of["name"] for of in found.values()] == list(found)
    assert [of["threads"] for of in found.values()] == [threads, 1, 1, 1]
    assert len({of["process"] for of in found.values()}) == 4
    assert torch.get_num_threads() == threads
    again = Study("test-it", arguments("--resume"), 4, {})
    assert again.parts_at_once(computes) == found


def test_a_part_that_fails_ends_the_study_and_leaves_what_is_done(capfd, monkeypatch):
    monkeypatch.setattr(torch, "get_num_threads", lambda: 1)  # one after the other

    def fails():
        raise ValueError("no weights")

    made = Study("test-it", arguments(), 2, {})
    with pytest.raises(SystemExit, match="'b' failed, see above; --resume"):
        made.parts_at_once({"a": lambda: {"x": 1}, "b": fails})
    assert "no weights" in capfd.readouterr().err
    again = Study("test-it", arguments("--resume"), 2, {})
    found = again.parts_at_once({"a": fails, "b": lambda: {"x": 2}})
    assert [of["x"] for of in found.values()] == [1, 2]


def test_forked_parts_need_a_machine_without_cuda_in_sight(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    with pytest.raises(SystemExit, match="run it with CUDA_VISIBLE_DEVICES="):
        study.without_cuda()
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    study.without_cuda()


def test_seconds_are_of_all_starts(tmp_path, monkeypatch):
    clock = [100.0]
    monkeypatch.setattr(study.time, "perf_counter", lambda: clock[0])

    def part(seconds: float):
        clock[0] += seconds
        return {}

    Study("test-it", arguments(), 2, {}).part("a", lambda: part(7))
    clock[0] += 1000  # stopped
    again = Study("test-it", arguments("--resume"), 2, {})
    again.part("a", lambda: part(7))
    again.part("b", lambda: part(30))
    again.finish([Row("a", "errors, %", 2.5)])
    assert json.loads((tmp_path / "test-it.json").read_text())["seconds"] == 37


def test_nothing_to_resume():
    with pytest.raises(SystemExit, match="nothing to resume"):
        Study("test-it", arguments("--resume"), 2, {})


def test_what_is_written(tmp_path, capsys):
    made = Study("test-it", arguments("--quick"), 1, {"epochs": 1})
    rows = [
        Row("a", "errors, %", 2.5, (2.0, 3.0), bytes=2_000_000, latency_ms={"batch 1": 0.25}),
        Row("b against a", "points", -0.5, (-1.0, 0.5), published=0.7, goal=0.0, met=False),
    ]
    made.finish(rows, notes="Of two.")
    written = json.loads((tmp_path / "test-it.json").read_text())
    assert written["quick"]
    assert written["notes"] == "Of two."
    keys = ["name", "metric", "value", "interval", "bytes", "latency_ms"]
    keys += ["published", "goal", "met"]
    assert [list(row) for row in written["rows"]] == [keys, keys]
    assert written["rows"][1]["met"] is False
    assert (tmp_path / "test-it.png").stat().st_size > 1000
    assert "NO" in capsys.readouterr().out


def test_data_that_is_not_there(tmp_path, capsys):
    with pytest.raises(SystemExit):
        parse_arguments("A.", "b", ["--data", str(tmp_path)], data="sst2/train.tsv")
    assert "holds sst2/train.tsv" in capsys.readouterr().err


def test_only_a_study_of_a_subset_has_a_whole():
    assert parse_arguments("A.", "b", ["--whole"], subset=True).whole
    for given, subset in ((["--whole"], False), (["--whole", "--quick"], True)):
        with pytest.raises(SystemExit):
            parse_arguments("A.", "b", given, subset=subset)

"""The parts of the benchmark that could mislead: what is left out, refused, and written."""

import io
import json
from types import SimpleNamespace

import pytest
import torch
from rich.console import Console

from benchmarks import instructions, measure, results, roofline, run
from benchmarks.bench_int8_linear import OPS as INT8_OPS
from benchmarks.bench_int8_weight_linear import OPS as INT8_WEIGHT_OPS
from benchmarks.bench_softmax_kl import TEMPERATURE, nearest_subgradient
from benchmarks.bench_sparse24_linear import OPS as SPARSE_OPS
from benchmarks.bench_ternary24_linear import OPS as TERNARY24_OPS
from benchmarks.bench_ternary_linear import OPS as TERNARY_OPS
from benchmarks.case import Comparison, Contestant, WrongResult, relative_error
from benchmarks.ceilings import Ceilings, Work, best_of
from benchmarks.linear_cases import check
from benchmarks.measure import Timed, Timing, in_turns
from benchmarks.table import standing

CEILINGS = Ceilings(1, dram_gb_s=20, l3_gb_s=60, l2_gb_s=100, int8_gop_s=400, fp32_gflop_s=100)
LINEAR_OPS = [*INT8_OPS, *INT8_WEIGHT_OPS, *TERNARY_OPS, *SPARSE_OPS, *TERNARY24_OPS]


@pytest.fixture
def clock(monkeypatch):
    """A clock that only calls advance, and a record of how long the process had to wait."""
    clock = SimpleNamespace(now=0.0, waited=0.0)
    monkeypatch.setattr(measure.time, "perf_counter", lambda: clock.now)
    monkeypatch.setattr(measure.time, "sleep", lambda seconds: None)
    monkeypatch.setattr(measure, "seconds_waited", lambda: clock.waited)
    return clock


def _call(clock, *seconds, waits=()):
    """Takes `seconds` one after the other, the last for good; waits at the calls in `waits`."""
    left, calls = list(seconds), iter(range(10**6))

    def timed():
        clock.now += left.pop(0) if len(left) > 1 else left[0]
        clock.waited += 0.5 if next(calls) in waits else 0.0

    return Timed(timed, before=lambda: None)


def test_disturbed_samples_are_left_out_counted_and_made_up_for(clock):
    # the first call is the warm-up, then samples 1 9 1 9 1 1 1, of which the 9s had to wait
    timed = _call(clock, 1.0, 1.0, 9.0, 1.0, 9.0, 1.0, waits=(2, 4))
    assert in_turns({"a": timed}, 5, 1e6) == {"a": Timing(1.0, 7, 2)}


def test_a_slow_call_ends_early_and_a_fast_one_goes_on(clock):
    calls = {"slow": _call(clock, 6.0), "fast": _call(clock, 0.5), "endless": _call(clock, 99.0)}
    assert in_turns(calls, 7, 5.0) == {
        "slow": Timing(6.0, 3, 0),
        "fast": Timing(0.5, 7, 0),
        "endless": Timing(99.0, 1, 0),
    }


def test_where_every_sample_is_disturbed_all_count_and_the_table_says_so(clock):
    timed = _call(clock, 2.0, waits=range(100))
    timing = in_turns({"a": timed}, 5, 1e6)["a"]
    assert timing == Timing(2.0, 10, 10)
    assert "all" in _printed(_rows({"ours": timing, "peer": timing}))


def test_a_wake_up_is_no_disturbance_and_a_long_sample_forgives_more():
    assert not measure.is_disturbed(1e-3, 10e-6)
    assert measure.is_disturbed(1e-3, 30e-6)
    assert not measure.is_disturbed(1.0, 0.01)
    assert measure.is_disturbed(1.0, 0.03)


def test_waiting_is_accounted_for():
    before = measure.seconds_waited()
    assert 0 <= before <= measure.seconds_waited()


@pytest.mark.parametrize("op", LINEAR_OPS, ids=lambda op: op.name)
def test_a_wrong_kernel_is_refused(op):
    packed = op.pack(torch.randn(7, 64) / 8)
    x = torch.randn(5, 64).to(op.dtype)
    y = op.run(x, *packed.arguments)
    assert 0 <= check(op, packed, x, y) < 0.02
    # The smallest mistakes: one value by 1% of the result's size; one that is not a number.
    for wrong in (y[3, 2] + 0.01 * y.abs().max(), torch.nan):
        spoilt = y.clone()
        spoilt[3, 2] = wrong
        with pytest.raises(WrongResult):
            check(op, packed, x, spoilt)


def _rows(timings):
    work = Work(bytes_moved=20_000_000, int8_ops=40_000_000)
    ours = Contestant(
        "ours", None, work, 0.01, op="some_op", kernel="avx2", rivals=("peer",), baseline="peer"
    )
    peer = Contestant("peer", None, work, 0.02)
    comparison = Comparison({"M": 1, "N": 2, "K": 3}, "cold", [ours, peer])
    return results.rows_of("linear", comparison, timings, CEILINGS)


def _printed(rows):
    console = Console(width=200, record=True, file=io.StringIO())
    console.print(standing([row for row in rows if row["op"]], "some_op"))
    return console.export_text()


def test_rows_and_table_say_how_ours_stands():
    ours, peer = _rows({"ours": Timing(2e-3, 5, 0), "peer": Timing(3e-3, 5, 1)})
    assert ours["x_best"] == ours["x_baseline"] == 1.5
    assert ours["best_peer"] == "peer"
    assert (ours["gb_s"], ours["gop_s"]) == (10.0, 20.0)
    assert (ours["bound"], ours["share"]) == ("dram read", 0.5)
    assert peer["op"] is None
    text = _printed([ours])
    for shown in ("1 2 3", "2000", "10.0", "20.0", "50%", "dram", "1.50", "peer", "1.0e-02"):
        assert shown in text


def test_the_nearest_cache_that_holds_the_bytes_is_the_ceiling_of_hot_ones():
    work = Work(bytes_moved=100_000)
    assert CEILINGS.seconds(work, cold=False) == (1e-6, "l2 read")
    assert CEILINGS.seconds(work, cold=True) == (5e-6, "dram read")


def test_the_better_of_nearby_ceilings_counts():
    faster = Ceilings(1, dram_gb_s=10, l3_gb_s=70, l2_gb_s=90, int8_gop_s=500, fp32_gflop_s=90)
    assert best_of([CEILINGS, faster]) == Ceilings(1, 20, 70, 100, 500, 100)


def test_processors_of_one_name_get_files_of_their_own():
    zen4 = {"cpu family": "25", "model": "17"}
    assert results.slug("AMD EPYC", zen4) == "amd-epyc-25-17"
    assert results.slug("AMD EPYC", {**zen4, "cpu family": "26"}) != results.slug("AMD EPYC", zen4)
    assert results.slug("Some (R) CPU @ 2", {}) == "some-r-cpu-2"


def test_a_run_is_written_whole_or_not_at_all(tmp_path):
    facts = {"slug": "some-cpu", "processor": "Some CPU"}
    rows = _rows({"ours": Timing(2e-3, 5, 0), "peer": Timing(3e-3, 5, 1)})
    path = results.write(facts, [CEILINGS], rows, [], tmp_path)
    assert path == tmp_path / "some-cpu.json"
    assert json.loads(path.read_text())["rows"] == rows
    before = path.read_bytes()
    with pytest.raises(TypeError):
        results.write(facts, [CEILINGS], [{"not": object()}], [], tmp_path)
    assert path.read_bytes() == before
    assert list(tmp_path.iterdir()) == [path]


def test_the_picture_is_written_beside_the_results(tmp_path):
    rows = []
    for m in (1, 8):
        for weights in ("hot", "cold"):
            work = Work(bytes_moved=65536, int8_ops=2 * m * 65536)
            about = dict(op="int8_linear", rivals=("torchao",), baseline="torchao")
            ours = Contestant("int8_linear", None, work, 0.01, **about)
            comparison = Comparison(
                {"M": m, "N": 256, "K": 256}, weights, [ours, Contestant("torchao", None, work, 0)]
            )
            timings = {"int8_linear": Timing(1e-5, 5, 0), "torchao": Timing(2e-5, 5, 0)}
            rows += results.rows_of("linear", comparison, timings, CEILINGS)
    facts = {"slug": "some-cpu", "processor": "Some CPU", "isa": "avx2", "torch": "2.13"}
    path = results.write(facts, [CEILINGS], rows, [], tmp_path)
    picture = roofline.draw(results.read(path), path)
    assert picture == tmp_path / "some-cpu.png"
    assert picture.read_bytes().startswith(b"\x89PNG")
    assert sorted(tmp_path.iterdir()) == [path, picture]


def test_the_count_is_read_from_what_callgrind_prints():
    report = (
        "==7== Events    : Ir\n==7== Collected : 20774770\n==7== \n==7== I   refs:      20,774,770"
    )
    assert instructions.collected(report) == 20774770


def test_an_unfinished_run_is_resumed_where_it_was_begun(tmp_path, monkeypatch):
    monkeypatch.setattr(run, "UNFINISHED", tmp_path)
    facts = {"slug": "some-processor", "isa": "avx2"}
    found = run.Measured([CEILINGS], [{"us": 1.0}], [], ["1 threads: softmax_kl"])
    with pytest.raises(SystemExit, match="nothing to resume"):
        run.resumed(facts)
    run._write(facts | {"parts": found.parts}, found, tmp_path)
    assert run.resumed(facts) == found
    with pytest.raises(SystemExit, match="of another machine, build or command"):
        run.resumed(facts | {"isa": "scalar"})


def test_parts_of_a_run():
    def names(*arguments: str) -> list[str]:
        return [str(part) for part in run.parts(run.parse_arguments(["cpu", *arguments]), 2)]

    assert names("--op", "int8_linear", "--quick") == ["2 threads: linear 2560 x 2560"]
    assert names("--op", "softmax_kl") == ["2 threads: softmax_kl"]
    assert len(names()) == len(run.OTHER) + 3


@pytest.mark.parametrize("side", [-1.0, 0.0, 1.0])
def test_total_variation_may_have_either_slope_where_p_and_q_agree_and_nowhere_else(side):
    """By hand: T * p * (slope - mean slope) / rows, the slope of one class planted."""
    torch.manual_seed(0)
    student = torch.randn(3, 40, dtype=torch.float64)
    teacher = torch.randn(3, 40, dtype=torch.float64)
    p, q = (torch.softmax(z / TEMPERATURE, -1) for z in (student, teacher))
    teacher[1, 5] = student[1, 5]
    for _ in range(60):  # until p and q of a class agree, but for a rounding of fp32
        p, q = (torch.softmax(z / TEMPERATURE, -1) for z in (student, teacher))
        teacher[1, 5] += TEMPERATURE * (p[1, 5] * (1 + 2.0**-24) / q[1, 5]).log()

    def gradient(slope: torch.Tensor) -> torch.Tensor:
        mean = (p * slope).sum(-1, keepdim=True)
        return TEMPERATURE * p * (slope - mean) / len(p)

    slope = (p - q).sign() / 2
    truth = gradient(slope)
    planted = slope.clone()
    planted[1, 5] = side / 2
    student.requires_grad_()
    judged = nearest_subgradient(gradient(planted), truth, student, teacher, 1.0)
    assert relative_error(gradient(planted), judged) < 1e-9
    planted[1, 6] *= -1  # where p and q do not agree
    judged = nearest_subgradient(gradient(planted), truth, student, teacher, 1.0)
    assert relative_error(gradient(planted), judged) > 1e-2

"""The GPU's benchmark, on the CPU: graphs and events are stand-ins, all else is what runs there."""

import dataclasses
import math
from types import SimpleNamespace

import pytest
import torch
from trine import ops

from benchmarks import results
from benchmarks.bench_int8_linear import OPS as INT8_OPS
from benchmarks.ceilings import Work
from benchmarks.gpu import ceilings as gpu_ceilings
from benchmarks.gpu import goals
from benchmarks.gpu import layers as gpu_layers
from benchmarks.gpu import losses as gpu_losses
from benchmarks.gpu import peers as gpu_peers
from benchmarks.gpu import rows as gpu_rows
from benchmarks.gpu import run as gpu
from benchmarks.gpu import timing as gpu_timing
from benchmarks.gpu.ceilings import GpuCeilings
from benchmarks.gpu.entries import rotated_copies
from benchmarks.gpu.losses import DIVERGENCES
from benchmarks.gpu.plan import OPS as GPU_OPS
from benchmarks.gpu.plan import Plan
from benchmarks.measure import Timing
from benchmarks.run import parse_arguments

GPU = {"copy_gb_s": 4000.0, "read_gb_s": 3900.0, "bf16_tflop_s": 700.0, "int8_top_s": 1200.0}


@pytest.fixture
def no_gpu_needed(monkeypatch):
    """Graphs and events on the CPU, and nothing that compiles."""

    def capture(calls):
        def replay():
            for call in calls:
                call()

        return replay

    def seconds(run):
        run()
        return 1e-3

    monkeypatch.setattr(gpu_timing, "capture", capture)
    monkeypatch.setattr(gpu_timing, "seconds", seconds)
    monkeypatch.setattr(gpu_timing, "transient_bytes", lambda call: 3 << 20)
    for module in (gpu_rows, gpu_peers, gpu_losses):
        monkeypatch.setattr(module, "compiled", lambda function: function)
    monkeypatch.setattr(gpu_rows, "_in_triton", lambda op, *a: getattr(ops, op)(*a))
    monkeypatch.setattr(gpu_layers, "_in_triton", lambda op, *arguments: op.run(*arguments))
    small = GpuCeilings(**GPU)
    monkeypatch.setattr(gpu_ceilings, "measure", lambda device: small)


TINY = Plan(
    layers=(((48, 128), (1, 3)),),
    slow_start=(((32, 256), (2,)),),
    quantized=((8, 64), (1, 40)),
    losses=((70, 40, "fp32"),),
    linear_losses=((5, 16, 40),),
    convolutions=((2, 4, 6, 3, 2, 2, 7),),
    embeddings=((3, 50, 40),),
)


def _gpu_run(tmp_path, plan=TINY, until=math.inf):
    run = gpu.Run({"slug": "some-gpu", "l2_bytes": 1000}, tmp_path)
    gpu.measure(run, plan, GPU_OPS, "cpu", until)
    run.write()
    return run, results.read(tmp_path / "some-gpu.json")


def test_a_gpu_run_compares_ours_with_every_peer(no_gpu_needed, tmp_path, capsys):
    run, saved = _gpu_run(tmp_path)
    assert saved["rows"] == run.rows
    assert saved["machine"]["finished"]
    assert len(saved["ceilings"]) == 2
    assert not any(failure["wrong"] for failure in saved["failures"])
    names = {(row["name"], row.get("M"), row.get("N")) for row in saved["rows"]}
    for op in ("ternary_linear", "int8_linear"):
        assert {(op, 1, 48), (op, 3, 48), (op, 2, 32), (f"{op} triton", 2, 32)} <= names
    for peer in ("nn.Linear bf16", "torch._int_mm"):
        assert {(peer, 1, 48), (peer, 3, 48)} <= names
    assert ("torch._int_mm compiled", 2, 32) in names
    for op in ("quantize_rows", "rms_norm_quantize_rows", "layer_norm_quantize_rows"):
        assert {(op, 8, None), (f"{op} triton", 1, None)} <= names
    assert {("int8_embedding", 3, None), ("embedding bf16", 3, None)} <= names
    for name in ("int8_conv2d", "conv2d bf16", "conv2d fp16"):
        assert (name, None, None) in names
    losses = [f"fp32 {divergence}" for divergence in DIVERGENCES]
    for name in ("softmax_kl", "eager", "torch.compile"):
        assert {(f"{name} {loss}", None, None) for loss in losses} <= names
    assert {(name, None, None) for name in ("linear_softmax_kl", "eager", "torch.compile")} <= names
    absent = {failure["name"] for failure in saved["failures"]}
    assert {("sparse24_linear bf16", 3, 48), ("sparse24_linear int8", 2, 32)} <= names
    semi_structured = {"cuSPARSELt bf16", "cuSPARSELt int8", "CUTLASS 2:4 bf16"}
    liger = {"Liger", *(f"Liger {loss}" for loss in losses)}
    others = {"torchao", "bitsandbytes", "Triton bf16 matmul"}
    assert absent <= others | semi_structured | liger
    (row,) = (r for r in saved["rows"] if (r["name"], r.get("M")) == ("int8_linear", 3))
    assert row["error"] < 0.03
    assert row["baseline"] == "nn.Linear bf16"
    gpu.show(saved)
    assert "not measured" in capsys.readouterr().out


def test_a_gpu_run_keeps_what_it_has_when_time_is_over(no_gpu_needed, tmp_path):
    run, saved = _gpu_run(tmp_path, until=-1)
    assert not saved["rows"]
    assert [failure["reason"] for failure in run.failures] == ["the time that was given is over"]


def test_a_wrong_cuda_kernel_is_not_timed(no_gpu_needed, monkeypatch, tmp_path):
    spoilt = dataclasses.replace(INT8_OPS[0], run=lambda *a: INT8_OPS[0].run(*a) * 1.01)
    monkeypatch.setattr("benchmarks.bench_int8_linear.OPS", [spoilt])
    monkeypatch.setattr(ops, "quantize_rows", lambda x: (x.to(torch.int8), x[:, 0], x[:, 0]))
    run, saved = _gpu_run(tmp_path)
    refused = {failure["name"] for failure in run.failures if failure["wrong"]}
    assert {"int8_linear", "int8_linear triton", "quantize_rows"} <= refused
    assert "ternary_linear" not in refused
    assert not {row["name"] for row in saved["rows"]} & refused


@pytest.mark.parametrize("op", ["softmax_kl", "linear_softmax_kl"])
def test_a_wrong_loss_is_not_timed(no_gpu_needed, monkeypatch, tmp_path, op):
    right = getattr(ops, op)

    def wrong_in_the_last_row(student, *others, **options):
        spoilt = student.clone()
        spoilt[-1] *= 1.5
        return right(spoilt, *others, **options)

    monkeypatch.setattr(ops, op, wrong_in_the_last_row)
    plan = Plan((), (), (), losses=((70, 40, "bf16"),), linear_losses=((5, 16, 40),))
    run, saved = _gpu_run(tmp_path, plan)
    refused = {failure["name"].split(" ")[0] for failure in run.failures if failure["wrong"]}
    assert refused == {op}
    assert not {row["name"].split(" ")[0] for row in saved["rows"]} & refused


def test_a_cuda_kernel_that_raises_counts_as_wrong(no_gpu_needed, monkeypatch, tmp_path):
    def broken(*arguments):
        raise RuntimeError("CUDA error: an illegal memory access was encountered")

    monkeypatch.setattr(ops, "quantize_rows", broken)
    run, _ = _gpu_run(tmp_path, Plan((), (), ((2, 40),)))
    (failure,) = (f for f in run.failures if f["name"] == "quantize_rows")
    assert failure["wrong"]
    assert "illegal memory access" in failure["reason"]


def test_copies_fill_what_is_rotated_and_are_never_one():
    t = torch.zeros(100, dtype=torch.uint8)
    assert len(rotated_copies((t,), 1000)) == 10
    assert len(rotated_copies((t,), 10**9)) == 256
    several = rotated_copies((t,), 10)
    assert len(several) == 2
    assert several[0][0].data_ptr() != several[1][0].data_ptr()


def test_gpu_samples_are_long_and_the_first_round_is_dropped(monkeypatch):
    monkeypatch.setattr(gpu_timing, "capture", lambda calls: list(calls))
    # of a graph of two calls: uploaded, then 0.1 ms; so twenty times as many fill 2 ms
    left = [9.0, 1e-4]
    monkeypatch.setattr(gpu_timing, "seconds", lambda replay: left.pop(0))
    recorded = gpu_timing.record([lambda: None, lambda: None])
    assert (recorded.calls, len(recorded.replay)) == (40, 40)
    left[:] = [9.0, 4.0, 8.0, 12.0]
    timing = gpu_timing.in_turns({"a": gpu_timing.Recorded(None, 4)}, 3)
    assert timing == {"a": Timing(2.0, 3, 0)}


def test_calls_without_a_graph_say_what_memory_they_hold_beside_results(monkeypatch):
    called = []
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    monkeypatch.setattr(torch.cuda, "memory_allocated", lambda: 1000)
    monkeypatch.setattr(torch.cuda, "reset_peak_memory_stats", called.clear)
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda: 1000 + 700 * len(called))
    results = torch.zeros(25), torch.zeros(10, dtype=torch.bfloat16)
    recorded = gpu_timing.launched([lambda: called.append(0) or results] * 2)
    assert (recorded.calls, recorded.transient_bytes) == (2, 700 - 120)
    recorded.replay()
    assert len(called) == 3


def _gpu_rows(times):
    """Rows as a run would write them, from {(name, M, N, K): us}."""
    rows = []
    for (name, m, n, k), us in times.items():
        bits = {"ternary_linear": 2, "int8_linear": 8, "sparse24_linear bf16": 9}.get(name, 16)
        size = n * k * bits // 8 if n else 3 * m * k
        rows.append({"name": name, "M": m, "K": k, "us": us, "gb_s": size / us / 1e3})
        rows[-1] |= {"N": n} if n else {}
        rows[-1] |= {"bytes_moved": size} if bits < 16 else {}
    return rows


def test_goals_on_a_saved_run():
    side, cube = 16384, 8192
    times = {("ternary_linear", m, side, side): 20.0 + m / 8 for m in (1, 2, 4, 8, 16)}
    times |= {("int8_linear", m, side, side): 100.0 for m in (1, 16)}
    times[("int8_linear", 32, side, side)] = 80.0
    times[("nn.Linear bf16", 1, side, side)] = 100.0
    times |= {("nn.Linear bf16", 4096, n, n): 400.0 for n in (side, cube)}
    times |= {
        ("ternary_linear", 4096, side, side): 200.0,
        ("ternary_linear", 4096, cube, cube): 300.0,
    }
    times |= {("int8_linear", cube, cube, cube): 1000.0, ("quantize_rows", cube, None, cube): 90.0}
    times |= {("nn.Linear bf16", 4096, 2560, 2560): 10.0}
    sparse = ((4096, cube, 200.0), (4096, 2560, 10.0), (1, side, 80.0), (1, 2560, 1.0))
    times |= {("sparse24_linear bf16", m, n, n): us for m, n, us in sparse}
    saved = {"ceilings": [GPU, GPU | {"copy_gb_s": 3000.0}], "rows": _gpu_rows(times)}
    judged = {goal.text: goal.judge(goals.Result(saved)) for goal in goals.GOALS}
    share, six, flat, prefill, cubed, int8, few, bf16_peer, bf16_cube, bf16_few, *_ = (
        judged.values()
    )
    assert share == ("0.83", "reached", "M 1 N 16384 K 16384")  # 67.1 MB in 20.125 us, of 4000
    assert six == ("4.97", "not reached", "M 1 N 16384 K 16384")
    assert flat == ("1.09", "reached", "N 16384 K 16384")
    assert prefill == ("1.33", "not reached", "M 4096 N 8192 K 8192, the worst of 2")
    assert cubed == ("1.01", "reached", "1208 TOPS, cuBLASLt 1200, of 1000 us all in all")
    assert int8 == ("", "not measured", "")
    assert few == ("0.67", "not reached", "M 1 N 16384 K 16384, the worst of 3")
    assert bf16_peer == ("", "not measured", "")
    assert bf16_cube == ("2.00", "reached", "M 4096 N 8192 K 8192")  # 2560^2 is less than 4096^3
    assert bf16_few == ("1.25", "not reached", "M 1 N 16384 K 16384")


def test_goals_of_the_losses():
    loss = {"rows": 8192, "classes": 128256}
    whole = loss | {"K": 4096}
    rows = [
        {"name": "softmax_kl bf16 jsd", **loss, "gb_s": 3000.0},
        {"name": "softmax_kl bf16 forward_kl", **loss, "gb_s": 3500.0},
        {"name": "softmax_kl bf16 jsd", **loss, "classes": 32000, "gb_s": 1.0},
        {"name": "linear_softmax_kl", **whole, "us": 60e3, "gop_s": 573e3},
        {"name": "Liger", **whole, "us": 90e3, "gop_s": 382e3},
    ]
    rows[3]["transient_bytes"] = 500 << 20
    judged = [goal.judge(goals.Result({"ceilings": [GPU], "rows": rows})) for goal in goals.GOALS]
    shape = "K 4096 rows 8192 classes 128256"
    assert judged[-4:] == [
        ("1.33", "not reached", "jsd rows 8192 classes 128256, the worst of 2"),
        ("573.00", "not reached", shape),
        ("1.50", "reached", shape),
        ("500.00", "reached", shape),
    ]
    del rows[3]["transient_bytes"], rows[4]
    judged = [goal.judge(goals.Result({"ceilings": [GPU], "rows": rows})) for goal in goals.GOALS]
    assert judged[-2:] == [("", "not measured", "")] * 2


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_one_sentence_says_so(capsys):
    assert gpu.main(SimpleNamespace()) == 2
    assert capsys.readouterr().err.count("\n") == 1


def test_ceilings_of_a_gpu_are_rates(monkeypatch):
    monkeypatch.setattr(gpu_timing, "seconds", lambda run: run() is None or 1e-3)
    measured = gpu_ceilings.measure("cpu", copied=4000, side=32)
    assert measured == GpuCeilings(0.008, 0.004, 2 * 32**3 / 1e9, 2 * 32**3 / 1e9)
    assert measured.seconds(Work(bytes_moved=8_000_000), cold=True) == (1.0, "memory")
    assert measured.seconds(Work(bf16_ops=2 * 32**3), cold=True) == (pytest.approx(1e-3), "bf16")


@pytest.mark.parametrize(("options", "folder"), [((), "results"), (("--quick",), "out/gpu")])
def test_the_command_measures_writes_and_prints(
    no_gpu_needed, monkeypatch, tmp_path, capsys, options, folder
):
    found = SimpleNamespace(
        name="Some GPU 200", major=9, minor=0, multi_processor_count=132, L2_cache_size=1000
    )
    found.total_memory = 1 << 30
    measure = gpu.measure
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(results, "FOLDER", tmp_path / "results")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: found)
    monkeypatch.setattr(
        gpu, "measure", lambda run, plan, ops, device, until: measure(run, TINY, ops, "cpu", until)
    )
    parsed = parse_arguments(["gpu", "--op", "int8_linear", *options] if options else ["gpu"])
    assert gpu.main(parsed) == 0
    path = tmp_path / folder / "some-gpu-200.json"
    saved = results.read(path)
    assert saved["machine"]["capability"] == "9.0"
    assert saved["machine"]["finished"]
    ops = {row["op"] for row in saved["rows"] if row["op"]}
    assert ops == ({"int8_linear"} if options else set(GPU_OPS))
    assert "goals" in capsys.readouterr().out


def test_a_layer_that_does_not_fit_is_a_failure_and_the_run_goes_on(
    no_gpu_needed, monkeypatch, tmp_path
):
    def layer(ops, n, k, *rest):
        if n == 48:
            raise torch.OutOfMemoryError("tried to allocate 2 GiB")
        return make(ops, n, k, *rest)

    make = gpu_layers.Layer
    monkeypatch.setattr("benchmarks.gpu.plan.Layer", layer)
    run, saved = _gpu_run(tmp_path)
    assert ["2 GiB" in failure["reason"] for failure in run.failures[:2]] == [True, True]
    assert {row.get("N") for row in saved["rows"]} == {32, None}

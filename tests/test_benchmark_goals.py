"""What a saved run reached: figures by hand, from rows by hand."""

import json
from types import SimpleNamespace

import pytest

from benchmarks import cpu_goals, run
from benchmarks.gpu import goals as gpu_goals

CEILINGS = {
    threads: {"threads": threads, "dram_gb_s": rate, "l3_gb_s": 60.0, "l2_gb_s": 100.0}
    | {"int8_gop_s": 400.0 * threads, "fp32_gflop_s": 100.0 * threads}
    for threads, rate in ((1, 20.0), (2, 30.0))
}


def _linear(name, m, us, threads=1, weights="cold", share=0.5, bound="int8", n=2560):
    row = {"suite": "linear", "op": name.split()[0], "name": name, "M": m, "N": n, "K": 2560}
    row |= {"threads": threads, "weights": weights, "us": us, "gb_s": 1e4 / us}
    return row | {"share": share, "bound": bound}


def _loss(name, us, rows=1024, classes=32000, threads=2):
    row = {"suite": "softmax_kl", "op": "softmax_kl", "name": name, "rows": rows}
    return row | {"classes": classes, "threads": threads, "weights": "", "us": us}


ROWS = [
    _linear("ternary_linear", 1, 100.0, share=0.9, bound="dram read"),
    _linear("ternary_linear", 1, 90.0, share=0.8, bound="dram read", n=4096),
    _linear("ternary_linear", 1, 1.0, share=0.1, threads=2, bound="dram read"),
    _linear("ternary_linear", 1, 400.0, weights="hot"),  # 25 GB/s
    _linear("int8_linear", 1, 300.0),
    _linear("sparse24_linear int8", 1, 200.0),
    _linear("int8_linear", 8, 50.0),
    _linear("int8_linear", 8, 25.0, threads=2),
    _linear("int8_linear", 32, 100.0),
    _linear("int8_linear", 32, 80.0, threads=2),
    _linear("int8_linear", 32, 95.0, weights="hot"),
    _linear("sparse24_linear int8", 32, 100.0),
    _linear("sparse24_linear int8", 32, 190.0, weights="hot"),
    _linear("int8_linear", 128, 10.0, threads=2),  # nothing of one thread to compare with
    _loss("softmax_kl fp32 forward_kl", 60e3),
    _loss("softmax_kl fp32 forward_kl", 1.0, threads=1),
    _loss("softmax_kl bf16 forward_kl", 66e3),
    _loss("softmax_kl fp32 jsd", 96e3),
    _loss("softmax_kl fp32 total_variation", 72e3),
    _loss("softmax_kl fp32 jsd + cross-entropy", 100e3),
    _loss("eager fp32 jsd + cross-entropy", 700e3),
    {"suite": "minilm", "op": "minilm", "name": "INT8 eager", "tokens": 128, "threads": 1}
    | {"us": 14e3, "error": 0.002},
    {"suite": "call_overhead", "op": "call_overhead", "name": "int8", "x_baseline": 0.8},
    {"suite": "call_overhead", "op": None, "name": "nn.Linear"},
]
EXPECTED = {
    "ternary_linear, 1 row, from memory": (
        "0.80",
        "not reached",
        "M 1 N 4096 K 2560, the worst of 2",
    ),
    "ternary_linear, 1 row, 2560^2 from the caches": ("25.00", "reached", "M 1 N 2560 K 2560"),
    "int8_linear, 8 rows, from memory": ("0.50", "not reached", "M 8 N 2560 K 2560"),
    "int8_linear, 512 rows, from memory": ("", "not measured", ""),
    "2:4 int8, 1 row": ("1.50", "reached", "M 1 N 2560 K 2560"),
    "2:4 int8, 32 rows": ("0.50", "not reached", "M 32 N 2560 K 2560, the worst of 2"),
    "2:4 fp32, 1 row": ("", "not measured", ""),
    "softmax_kl fp32, 1024 x 32000": ("60.00", "reached", "rows 1024 classes 32000"),
    "softmax_kl: time in bf16": ("1.10", "not reached", "rows 1024 classes 32000"),
    "softmax_kl, KL either way and JSD: times as fast as eager, large": (
        ("7.00", "not reached", "jsd + cross-entropy rows 1024 classes 32000")
    ),
    "softmax_kl: time of other": (
        "1.60",
        "not reached",
        "jsd rows 1024 classes 32000, the worst of 2",
    ),
    "MiniLM-L6, 128 tokens: ms": ("14.00", "reached", "tokens 128"),
    "MiniLM-L6: cosine": ("1.00", "reached", "INT8 eager"),
    "a call": ("1.25", "reached", "int8 "),
    "two threads, 8 rows": (
        "1.25",
        "not reached",
        "int8_linear M 32 N 2560 K 2560, the worst of 2",
    ),
}


@pytest.fixture(scope="module")
def judged():
    result = cpu_goals.Result({"ceilings": list(CEILINGS.values()), "rows": ROWS})
    return {goal.text: goal.judge(result) for goal in cpu_goals.goals_of("avx512vnni")}


@pytest.mark.parametrize("begin", EXPECTED)
def test_goals_of_a_processor(judged, begin):
    (found,) = (verdict for text, verdict in judged.items() if text.startswith(begin))
    assert found == EXPECTED[begin]


def test_a_second_thread_reads_no_more_than_the_memory_gives(judged):
    # 300 us alone, 250 with two threads, where memory gives 1.5 times as much
    rows = [
        _linear("int8_linear", 1, us, t, bound="dram read") for t, us in ((1, 300.0), (2, 250.0))
    ]
    result = cpu_goals.Result({"ceilings": list(CEILINGS.values()), "rows": rows})
    where = "int8_linear M 1 N 2560 K 2560: 1.20 of 1.50"
    assert cpu_goals.OF_ALL[-1].judge(result) == ("0.80", "not reached", where)


def test_goals_of_a_processor_with_no_more_than_avx2():
    rows = [
        _linear("ternary_linear", 8, 100.0) | {"gop_s": 150.0},
        _linear("ternary_linear", 8, 200.0, n=4096) | {"gop_s": 110.0},
        _linear("ternary_linear", 1, 1000.0, n=4096) | {"K": 4096},  # 10 GB/s
        _linear("torch dynamic fbgemm", 32, 85.0),
        *ROWS,
    ]
    result = cpu_goals.Result({"ceilings": list(CEILINGS.values()), "rows": rows})
    found = {goal.text: goal.judge(result) for goal in cpu_goals.goals_of("avx2")}
    assert {text: verdict for text, verdict in found.items() if text.startswith("ternary")} == {
        "ternary_linear, 1 row, 4096^2 from memory: GB/s of packed weights": (
            ("10.00", "reached", "M 1 N 4096 K 4096")
        ),
        "ternary_linear, 1 row, 2560^2 from the caches: GB/s of packed weights": (
            ("25.00", "reached", "M 1 N 2560 K 2560")
        ),
        "ternary_linear, 8 rows, from memory: GOP/s": (
            ("110.00", "not reached", "M 8 N 4096 K 2560, the worst of 2")
        ),
    } | {
        f"ternary_linear, {rows} rows, from memory: GOP/s": ("", "not measured", "")
        for rows in (32, 128, 512)
    }
    fbgemm = found["int8_linear, which is exact: times as fast as fbgemm, which saturates"]
    assert fbgemm == ("0.85", "reached", "M 32 N 2560 K 2560")
    losses = found["softmax_kl, KL either way and JSD: times as fast as eager"]
    assert losses[:2] == ("7.00", "reached")


@pytest.mark.parametrize(
    ("machine", "goals"),
    [
        ({"isa": "avx2"}, cpu_goals.goals_of("avx2")),
        ({"isa": "avx512bf16"}, cpu_goals.goals_of("avx512bf16")),
        ({}, gpu_goals.GOALS),
    ],
)
def test_goals_of_nothing_are_not_measured(tmp_path, capsys, machine, goals):
    path = tmp_path / "some.json"
    path.write_text(json.dumps({"machine": machine, "ceilings": [], "rows": []}))
    assert run.judge(SimpleNamespace(file=path)) == 0
    assert capsys.readouterr().out.count("not measured") == len(goals)


@pytest.mark.parametrize("text", ['{"rows": []}', "[]", "nothing"])
def test_what_is_no_result_has_no_goals(tmp_path, capsys, text):
    path = tmp_path / "other.json"
    path.write_text(text)
    assert run.judge(SimpleNamespace(file=path)) == 2
    assert "is no result of" in capsys.readouterr().err

"""The report: rendered from results, with everything inside."""

import json
import re

import pytest
from trine import report


def row(name: str, task: str, **known) -> dict:
    judged = ("accuracy", "accuracy_ci", "agreement", "bit_exact_convert", "bit_exact_reload")
    empty = dict.fromkeys((*judged, "cosine_mean", "cosine_min", "rank_correlation"))
    times = {"latency_ms": {"1": 0.5, "32": 2.0}, "speedup": {"1": 1.25, "32": 0.5}}
    return {"name": name, "technique": "float", "task": task, "bytes": 10**6, **empty, **times} | (
        known
    )


@pytest.fixture
def results() -> dict:
    timing = {"dtype": "float32", "calls": 1, "float_seconds": 3e-3, "compressed_seconds": 1e-3}
    layers = [
        {"name": "deep.query", "timings": [{**timing, "rows": 7}, {**timing, "rows": 224}]},
        {"name": "never.reached", "timings": []},
    ]
    judged = {"accuracy": 0.9, "accuracy_ci": [0.85, 0.95], "agreement": 0.97}
    alike = {"cosine_mean": 0.99, "cosine_min": 0.98, "rank_correlation": 0.97}
    checks = {"bit_exact_convert": True, "bit_exact_reload": False}
    return {
        "trine": "1",
        "torch": "2",
        "python": "3",
        "processor": "a <fast> one",
        "isa": "scalar",
        "threads": 2,
        "seconds": 12.0,
        "settings": {
            "temperature": 4.0,
            "alpha": 0.7,
            "teacher_width": 9,
            "student_width": 8,
            "teacher_epochs": 3,
            "student_epochs": 2,
            "qat_epochs": 1,
            "seed": 0,
        },
        "digits": {"train": 30, "validation": 20, "test": 10},
        "rows": [
            row("Teacher", "digits", **judged),
            row("Student", "digits", **judged, **checks),
            row("Encoder", "sentences", **alike, **checks),
        ],
        "ends": [
            {
                "technique": "ternary",
                "validation_rows": 20,
                "accuracy_float_ends": 0.9,
                "accuracy_all_compressed": 0.8,
                "difference_ci": [-0.2, 0.0],
                "compress_ends": False,
            }
        ],
        "encoder": {"sentences": 5, "compression": {"layers": layers, "swapped": 1}},
    }


def test_page_holds_everything_itself(results):
    page = report.render(results)
    assert page.count("<svg") == page.count("</svg>") == 4
    assert "://" not in page
    references = re.findall(r"""(?:src|href)\s*=\s*["']([^"']*)|url\(([^)]*)\)""", page)
    assert all(target.startswith("#") for pair in references for target in pair if target)
    assert not re.search(r"<(?:link|script|img|iframe|object)\b", page)


def test_page_shows_the_results(results):
    page = report.render(results)
    for said in ("90.0% [85.0, 95.0]", "97.0%", "0.98000", "1.25x", "deep.query", "float ends"):
        assert said in page
    assert "a &lt;fast&gt; one" in page
    assert page.count('class="bad">different') == 2
    assert page.count('class="good">same') == 2
    assert "never.reached" not in page  # it was not measured


def test_plots_follow_the_colours_of_the_page(results):
    from trine.report import plots

    svg = plots.latency_bars(results["rows"])
    assert "currentColor" in svg
    assert plots.INK not in svg


def test_write_replaces_whole_files(results, tmp_path):
    (tmp_path / "report.json").write_text("old")
    report.write(results, tmp_path)
    assert json.loads((tmp_path / "report.json").read_text()) == results
    assert (tmp_path / "report.html").read_text(encoding="utf-8") == report.render(results)
    assert {path.name for path in tmp_path.iterdir()} == {"report.json", "report.html"}


def test_nothing_is_written_that_json_lacks(results, tmp_path):
    results["rows"][0]["accuracy"] = float("nan")
    with pytest.raises(ValueError, match="JSON"):
        report.write(results, tmp_path)
    assert list(tmp_path.iterdir()) == []

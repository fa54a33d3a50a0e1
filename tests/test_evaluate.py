"""Size and accuracy: bootstrap intervals against the exact binomial, ranks against a definition."""

import math

import pytest
import torch
from torch import nn
from trine import evaluate


def binomial_quantile(share: float, rows: int, probability: float) -> float:
    """The smallest count / rows whose cumulative binomial probability reaches `share`."""
    total = 0.0
    for count in range(rows + 1):
        total += math.comb(rows, count) * probability**count * (1 - probability) ** (rows - count)
        if total >= share:
            return count / rows
    raise AssertionError("the probabilities sum to less than 1")


@pytest.mark.parametrize(("rows", "right"), [(360, 347), (50, 20), (360, 359)])
@pytest.mark.parametrize("confidence", [0.95, 0.8])
def test_bootstrap_matches_the_exact_binomial(rows, right, confidence):
    # Resampling n yes-or-no values draws a binomial count, so its quantiles are known exactly.
    values = torch.arange(rows) < right
    low, high = evaluate.bootstrap_interval(values, confidence=confidence)
    tail = (1 - confidence) / 2
    # One count of slack: the empirical quantile of finitely many draws may sit one step beside.
    assert low == pytest.approx(binomial_quantile(tail, rows, right / rows), abs=1.001 / rows)
    assert high == pytest.approx(binomial_quantile(1 - tail, rows, right / rows), abs=1.001 / rows)
    assert low <= right / rows <= high


def test_bootstrap_of_real_values_matches_plain_resampling():
    values = torch.randn(40, dtype=torch.float64)
    rows = torch.randint(40, (20_000, 40), generator=torch.Generator().manual_seed(1))
    means = values[rows].mean(1)
    expected = means.quantile(torch.tensor([0.025, 0.975], dtype=torch.float64)).tolist()
    # The tolerance is a twentieth of the interval's width; 20 000 draws err by about a fiftieth.
    width = expected[1] - expected[0]
    assert evaluate.bootstrap_interval(values) == pytest.approx(expected, abs=0.05 * width)


def test_bootstrap_is_repeatable_and_sees_no_spread_where_there_is_none():
    values = torch.tensor([True, False] * 30)
    assert evaluate.bootstrap_interval(values) == evaluate.bootstrap_interval(values)
    assert evaluate.bootstrap_interval(values) != evaluate.bootstrap_interval(
        values, confidence=0.5
    )
    assert evaluate.bootstrap_interval(torch.ones(7)) == (1.0, 1.0)


@pytest.mark.parametrize(
    ("values", "confidence", "said"),
    [
        (torch.ones(0), 0.95, "rows >= 1"),
        (torch.ones(3, 2), 0.95, "rows >= 1"),
        (torch.ones(3), 1.0, "confidence"),
        (torch.ones(3), 0.0, "confidence"),
    ],
)
def test_bootstrap_refuses(values, confidence, said):
    with pytest.raises(ValueError, match=said):
        evaluate.bootstrap_interval(values, confidence=confidence)


def test_accuracy_and_agreement():
    logits = torch.tensor([[0.0, 2.0], [3.0, 1.0], [0.0, 1.0], [math.nan, 1.0]])
    assert evaluate.correct(logits, torch.tensor([1, 0, 0, 0])).tolist() == [
        True,
        True,
        False,
        False,
    ]
    assert evaluate.accuracy(logits, torch.tensor([1, 0, 0, 0])) == 0.5
    teacher = torch.tensor([[0.0, 1.0], [1.0, 0.0], [5.0, 0.0], [0.0, 1.0]])
    assert evaluate.agreement(logits, teacher) == 0.5


def test_accuracy_refuses_labels_that_do_not_fit():
    with pytest.raises(ValueError, match="labels"):
        evaluate.accuracy(torch.zeros(3, 2), torch.zeros(2, dtype=torch.int64))


def test_cosine_similarities():
    a = torch.tensor([[1.0, 0.0], [1.0, 1.0], [2.0, 0.0]])
    b = torch.tensor([[0.0, 3.0], [1.0, 0.0], [-1.0, 0.0]])
    expected = [0.0, math.sqrt(0.5), -1.0]
    assert evaluate.cosine_similarities(a, b).tolist() == pytest.approx(expected, abs=1e-12)


def spearman_by_definition(x: list[float], y: list[float]) -> float:
    def ranks(values):
        return [
            sum(other < value for other in values) + (values.count(value) + 1) / 2
            for value in values
        ]

    rx, ry = ranks(x), ranks(y)
    mean = (len(x) + 1) / 2
    covariance = sum((p - mean) * (q - mean) for p, q in zip(rx, ry, strict=True))
    spread = [sum((p - mean) ** 2 for p in r) for r in (rx, ry)]
    return covariance / math.sqrt(spread[0] * spread[1])


def test_pairwise_rank_correlation_matches_the_definition_with_ties():
    # Axis-aligned rows have similarities of exactly 0 and 1 only: many ties.
    a = torch.eye(3, dtype=torch.float64)[[0, 1, 0, 2, 1, 1]]
    b = a + torch.rand(6, 3, dtype=torch.float64)

    def similarities(rows):
        unit = rows / rows.norm(dim=1, keepdim=True)
        return [float(unit[i] @ unit[j]) for i in range(6) for j in range(i + 1, 6)]

    expected = spearman_by_definition(similarities(a), similarities(b))
    assert evaluate.pairwise_rank_correlation(a, b) == pytest.approx(expected, abs=1e-12)
    assert evaluate.pairwise_rank_correlation(b, b * 3) == pytest.approx(1, abs=1e-12)


def test_pairwise_rank_correlation_refuses_too_few_rows():
    with pytest.raises(ValueError, match="3 or more"):
        evaluate.pairwise_rank_correlation(torch.ones(2, 4), torch.ones(2, 4))


def test_memory_bytes_counts_shared_storage_once():
    model = nn.Sequential(nn.Linear(4, 4, bias=False), nn.Linear(4, 4, bias=False))
    model.register_buffer("scale", torch.ones(3, dtype=torch.float16))
    assert evaluate.memory_bytes(model) == 2 * 64 + 6
    model[1].weight = model[0].weight
    assert evaluate.memory_bytes(model) == 64 + 6


def test_disk_bytes(tmp_path):
    (tmp_path / "deep").mkdir()
    (tmp_path / "deep" / "a").write_bytes(b"12345")
    (tmp_path / "b").write_bytes(b"123")
    assert evaluate.disk_bytes(tmp_path / "b") == 3
    assert evaluate.disk_bytes(tmp_path) == 8

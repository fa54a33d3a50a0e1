"""Measure a model: how long it takes, how big it is, how good it is."""

from trine.evaluate.accuracy import (
    accuracy,
    agreement,
    bootstrap_interval,
    correct,
    cosine_similarities,
    pairwise_rank_correlation,
)
from trine.evaluate.latency import alternate
from trine.evaluate.size import disk_bytes, memory_bytes

__all__ = [
    "accuracy",
    "agreement",
    "alternate",
    "bootstrap_interval",
    "correct",
    "cosine_similarities",
    "disk_bytes",
    "memory_bytes",
    "pairwise_rank_correlation",
]

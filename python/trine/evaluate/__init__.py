"""Measure a model: how long it takes, how big it is, how good it is."""

from trine.evaluate.latency import alternate

__all__ = ["alternate"]

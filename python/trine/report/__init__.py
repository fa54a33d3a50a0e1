"""The report of a demo run: one page that needs nothing else, and the same as JSON."""

from trine.report.page import BASELINE, render, write

__all__ = ["BASELINE", "render", "write"]

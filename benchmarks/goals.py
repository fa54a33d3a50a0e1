"""Goals, and whether a saved run reached them: ratios and shares within that run.

    python -m benchmarks.run goals benchmarks/results/<processor or GPU>.json

Each goal is judged by the worst of the shapes that it speaks of, as far as they were measured.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from rich.table import Table

from benchmarks.table import SHAPE, number, table_of

Figures = Iterator[tuple[float, str]]  # and the shape or the numbers it comes from


@dataclass(frozen=True)
class Goal:
    text: str
    goal: float
    figures: Callable[[Any], Figures]  # of a result, as the list of goals wants it
    at_most: bool = False

    def judge(self, result: Any) -> tuple[str, str, str]:
        """The worst figure, the verdict, and where it is from."""
        found = list(self.figures(result))
        if not found:
            return "", "not measured", ""
        figure, where = (max if self.at_most else min)(found)
        reached = figure <= self.goal if self.at_most else figure >= self.goal
        of = f", the worst of {len(found)}" if len(found) > 1 else ""
        return number(figure, 2), "reached" if reached else "not reached", where + of


def at(row: Mapping) -> str:
    return " ".join(f"{key} {row[key]}" for key in SHAPE if key in row)


def table(result: Any, goals: Sequence[Goal]) -> Table:
    shown = table_of("goals", ("",), ("goal", "figure"), ("", "where"))
    for goal in goals:
        figure, verdict, where = goal.judge(result)
        bound = ("<= " if goal.at_most else ">= ") + f"{goal.goal:g}"
        shown.add_row(goal.text, bound, figure, verdict, where)
    return shown

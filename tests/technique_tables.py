"""The table of techniques that a room's README holds, and the examples in it."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType

# Every test there is, those in classes too.
TESTS = {
    name
    for path in Path(__file__).parent.glob("test_*.py")
    for name in re.findall(r"^ *def (test_\w+)\(", path.read_text(), re.MULTILINE)
}


@dataclass(frozen=True)
class Technique:
    """A row: what it is called, the names that serve it, the tests that check its formula."""

    title: str
    names: tuple[str, ...]
    checks: tuple[str, ...]

    def check(self, *rooms: ModuleType) -> None:
        """Its names are public in one of the rooms, and there is a check of its formula."""
        assert self.names
        for name in self.names:
            assert any(name in room.__all__ for room in rooms), name
        assert self.checks
        assert set(self.checks) <= TESTS


@dataclass(frozen=True)
class Readme:
    techniques: list[Technique]
    examples: list[str]  # of Python

    @property
    def names(self) -> set[str]:
        return {name for technique in self.techniques for name in technique.names}


def readme_of(room: ModuleType) -> Readme:
    text = Path(room.__file__).with_name("README.md").read_text()
    rows = [
        [cell.strip() for cell in line.strip("|").split("|")]
        for line in text.splitlines()
        if line.startswith("| ") and not line.startswith("| technique")
    ]
    techniques = [
        Technique(title, _quoted(names), _quoted(checks)) for title, names, checks, _ in rows
    ]
    return Readme(techniques, re.findall(r"```python\n(.*?)```", text, re.DOTALL))


def _quoted(cell: str) -> tuple[str, ...]:
    return tuple(re.findall(r"`(\w+)`", cell))

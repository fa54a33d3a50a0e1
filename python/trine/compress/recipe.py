"""What is to become of a model's linear layers: which layer gets which kind, and what decides."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Any

# What `compress` and `prepare_qat` can make of a layer, and what only training can.
PACKED = ("int8", "ternary", "ternary-twn", "sparse24", "sparse24-int8", "ternary24")
TRAINED = ("int8-static", "int8-lsq", "ternary-ttq")
CHOICES = (*PACKED, *TRAINED, "float")
PREFERENCES = ("speed", "size")


@dataclass(frozen=True)
class Recipe:
    """Which compressed kind each linear layer is meant to get.

    linear: one choice for every layer, or a mapping from patterns of layer names to choices, as in
        ``{"lm_head": "float", "*.mlp.*": "sparse24", "*": "int8"}``. Choices are "int8", "ternary",
        "ternary-twn", "sparse24", "sparse24-int8", "ternary24", "float" and, for `prepare_qat`
        alone, "int8-static", "int8-lsq" and "ternary-ttq" (see `trine.quantize.QatLinear`).
        Patterns are those of fnmatch, case-sensitive, tried in order: the first that matches the
        layer's whole name decides. A layer that none matches stays float.
    prefer: "speed" swaps a layer only where the compressed one is measured faster; "size" wherever
        it is smaller.

    Raises ValueError for an unknown choice, pattern or preference.
    """

    linear: str | Mapping[str, str] = "int8"
    prefer: str = "speed"

    def __post_init__(self) -> None:
        if self.prefer not in PREFERENCES:
            raise ValueError(f"Recipe: prefer is {self.prefer!r}; it must be one of {PREFERENCES}")
        if isinstance(self.linear, str):
            _check_choice(self.linear, "linear")
            return
        if not isinstance(self.linear, Mapping):
            raise ValueError(
                f"Recipe: linear is {self.linear!r}; it must be one of {CHOICES} "
                "or a mapping from patterns of layer names to those"
            )
        for pattern, choice in self.linear.items():
            if not isinstance(pattern, str) or not pattern:
                raise ValueError(
                    f"Recipe: {pattern!r} is no pattern; a pattern is a non-empty string such as "
                    "'*.mlp.*'"
                )
            _check_choice(choice, f"linear[{pattern!r}]")
        # A private copy: the caller's mapping may change, a recipe does not.
        object.__setattr__(self, "linear", dict(self.linear))

    def choice(self, name: str) -> str:
        """The choice for the layer of that name, "float" where no pattern matches."""
        if isinstance(self.linear, str):
            return self.linear
        for pattern, choice in self.linear.items():
            if fnmatchcase(name, pattern):
                return choice
        return "float"

    def to_dict(self) -> dict[str, Any]:
        """Plain data for JSON; the order of the patterns is part of it."""
        linear = self.linear if isinstance(self.linear, str) else dict(self.linear)
        return {"linear": linear, "prefer": self.prefer}

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Recipe:
        """The recipe that `to_dict` described; ValueError for anything else."""
        if not isinstance(data, Mapping) or set(data) - {"linear", "prefer"}:
            raise ValueError(
                f"Recipe: expected a mapping with keys linear and prefer, got {data!r}"
            )
        return cls(**data)


def _check_choice(choice: object, where: str) -> None:
    if choice not in CHOICES:
        raise ValueError(f"Recipe: {where} is {choice!r}; it must be one of {CHOICES}")

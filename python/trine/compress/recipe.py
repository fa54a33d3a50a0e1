"""What is to become of a model's layers: which layer gets which kind, and what decides."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Any

from trine.quantize.groups import split_group

# What `compress` and `prepare_qat` can make of a layer, and what only training can.
PACKED = (
    *("int8", "int8-weight", "ternary", "ternary-twn"),
    *("sparse24", "sparse24-int8", "ternary24"),
)
TRAINED = ("int8-static", "int8-lsq", "ternary-ttq")
CHOICES = (*PACKED, *TRAINED, "float")
OF_CONVOLUTIONS = ("int8", "int8-static", "float")
OF_EMBEDDINGS = ("int8", "float")
PREFERENCES = ("speed", "size")
_ALLOWED = {"linear": CHOICES, "conv": OF_CONVOLUTIONS, "embedding": OF_EMBEDDINGS}


@dataclass(frozen=True)
class Recipe:
    """Which compressed kind each linear layer, 2-d convolution and embedding is meant to get.

    linear: one choice for every layer, or a mapping from patterns of layer names to choices, as in
        ``{"lm_head": "float", "*.mlp.*": "sparse24", "*": "int8"}``. Choices are "int8",
        "int8-weight" (activations stay floats), "ternary", "ternary-twn", "sparse24",
        "sparse24-int8", "ternary24", "float" and, for `prepare_qat` alone, "int8-static",
        "int8-lsq" and "ternary-ttq" (see `trine.quantize.QatLinear`). "int8-weight", "ternary" and
        "ternary-twn" may end in a group size, a multiple of 64, as in "ternary-g128": so many
        columns of a row share one scale, not the whole row or weight.
        Patterns are those of fnmatch, case-sensitive, tried in order: the first that matches the
        layer's whole name decides. A layer that none matches stays float.
    conv: the same for nn.Conv2d: "int8", "float" and, with training or data, "int8-static".
    embedding: the same for nn.Embedding: "int8" or "float". Where its table is the weight of linear
        layers, too, all become int8 or none: they go on sharing it, and `linear` must say "int8"
        for them.
    prefer: "speed" swaps a layer only where the compressed one is measured faster, an embedding
        where it is not slower; "size" wherever it is smaller.

    Raises ValueError for an unknown choice, pattern or preference, and a wrong group size.
    """

    linear: str | Mapping[str, str] = "int8"
    prefer: str = "speed"
    conv: str | Mapping[str, str] = "float"
    embedding: str | Mapping[str, str] = "float"

    def __post_init__(self) -> None:
        if self.prefer not in PREFERENCES:
            raise ValueError(f"Recipe: prefer is {self.prefer!r}; it must be one of {PREFERENCES}")
        for kind, allowed in _ALLOWED.items():
            _check_choices(getattr(self, kind), kind, allowed)
            if isinstance(getattr(self, kind), Mapping):
                # A private copy: the caller's mapping may change, a recipe does not.
                object.__setattr__(self, kind, dict(getattr(self, kind)))

    def choice(self, name: str) -> str:
        """The choice for the linear layer of that name, "float" where no pattern matches."""
        return _choice_for(name, self.linear)

    def conv_choice(self, name: str) -> str:
        """The choice for the convolution of that name, "float" where no pattern matches."""
        return _choice_for(name, self.conv)

    def embedding_choice(self, name: str) -> str:
        """The choice for the embedding of that name, "float" where no pattern matches."""
        return _choice_for(name, self.embedding)

    def to_dict(self) -> dict[str, Any]:
        """Plain data for JSON; the order of the patterns is part of it."""
        kinds = {kind: getattr(self, kind) for kind in _ALLOWED}
        plain = {key: v if isinstance(v, str) else dict(v) for key, v in kinds.items()}
        return {**plain, "prefer": self.prefer}

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Recipe:
        """The recipe that `to_dict` described; ValueError for anything else."""
        if not isinstance(data, Mapping) or set(data) - {*_ALLOWED, "prefer"}:
            raise ValueError(
                f"Recipe: expected a mapping with keys {', '.join(_ALLOWED)} and prefer, "
                f"got {data!r}"
            )
        return cls(**data)


def _choice_for(name: str, choices: str | Mapping[str, str]) -> str:
    if isinstance(choices, str):
        return choices
    return next((c for pattern, c in choices.items() if fnmatchcase(name, pattern)), "float")


def _check_choices(given: object, kind: str, allowed: tuple[str, ...]) -> None:
    if isinstance(given, str):
        _check_choice(given, kind, allowed)
        return
    if not isinstance(given, Mapping):
        raise ValueError(
            f"Recipe: {kind} is {given!r}; it must be one of {allowed} "
            "or a mapping from patterns of layer names to those"
        )
    for pattern, choice in given.items():
        if not isinstance(pattern, str) or not pattern:
            raise ValueError(
                f"Recipe: {pattern!r} is no pattern; a pattern is a non-empty string such as "
                "'*.mlp.*'"
            )
        _check_choice(choice, f"{kind}[{pattern!r}]", allowed)


def _check_choice(choice: object, where: str, allowed: tuple[str, ...]) -> None:
    try:
        base = split_group(choice)[0] if isinstance(choice, str) else choice
    except ValueError as error:
        raise ValueError(f"Recipe: {where} is {error}") from None
    if base not in allowed:
        raise ValueError(f"Recipe: {where} is {choice!r}; it must be one of {allowed}")

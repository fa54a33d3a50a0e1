"""The group size that a choice may end in: so many columns of a row share one scale."""

from __future__ import annotations

# Choices that have such a form, and what a group is a multiple of: a chunk of the packed weights.
GROUPED = ("ternary", "ternary-twn", "int8-weight")
CHUNK = 64


def split_group(choice: str) -> tuple[str, int | None]:
    """A choice without its group size, and that: "ternary-g128" is ("ternary", 128).

    None stands for a choice without one. Raises ValueError for a size that is no multiple of 64,
    and for a choice that has no form with groups.
    """
    base, _, digits = choice.rpartition("-g")
    if not digits.isdecimal() or not base:
        return choice, None
    if base not in GROUPED:
        raise ValueError(
            f"{choice!r} has a group size, and {base!r} no form with a scale for each group; "
            f"{', '.join(GROUPED)} have"
        )
    group = int(digits)
    if group == 0 or group % CHUNK:
        raise ValueError(
            f"{choice!r} has groups of {group} columns; a group is a multiple of {CHUNK}, as in "
            f"'{base}-g{2 * CHUNK}'"
        )
    return base, group


def misfit(choice: str, in_features: int) -> str | None:
    """Why a layer of so many input features cannot have the choice's groups; None where it can."""
    _, group = split_group(choice)
    if group is None or (in_features and in_features % group == 0):
        return None
    return f"groups of {group} columns do not divide its {in_features} input features"

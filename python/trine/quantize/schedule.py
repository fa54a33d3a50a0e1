"""What changes in the course of a training under quantisation: ranges are followed, then frozen."""

from __future__ import annotations

from torch import nn

from trine.quantize.input_range import InputRange


class QatSchedule:
    """Call `step` after each update of the weights.

    It moves the ranges of the "int8-static" layers to what they have seen (in all processes of a
    distributed training together, so every process has to call it), and freezes them after a
    number of updates: what the last ones teach the weights then stays true of the packed model.

    Args:
        model: from `prepare_qat`.
        freeze_ranges: the number of updates after which the ranges stay; None: never.

    Raises ValueError for a model without such ranges.
    """

    def __init__(self, model: nn.Module, *, freeze_ranges: int | None = None) -> None:
        self.ranges = [module for module in model.modules() if isinstance(module, InputRange)]
        if not self.ranges:
            raise ValueError(
                "QatSchedule: the model has no layer whose activations have a range; only "
                "'int8-static' ones have"
            )
        self.freeze_ranges, self.updates = freeze_ranges, 0
        self._freeze()

    def step(self) -> None:
        for input_range in self.ranges:
            input_range.update()
        self.updates += 1
        self._freeze()

    def _freeze(self) -> None:
        frozen = self.freeze_ranges is not None and self.updates >= self.freeze_ranges
        for input_range in self.ranges:
            input_range.frozen = frozen

    def state_dict(self) -> dict[str, int]:
        return {"updates": self.updates}

    def load_state_dict(self, state: dict[str, int]) -> None:
        self.updates = state["updates"]
        self._freeze()

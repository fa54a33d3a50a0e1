"""What changes in the course of a training under quantisation, and comes to rest."""

from __future__ import annotations

from torch import nn

from trine.quantize.batch_norm import FoldedNorm
from trine.quantize.input_range import InputRange


class QatSchedule:
    """Call `step` after each update of the weights.

    It moves the ranges of the "int8-static" layers, and the running statistics of batch norms that
    layers have taken up, to what they have seen since: the extremes and the means over all batches
    and processes, one all-reduce for each layer, so every process of a distributed training has to
    call it. After a number of updates it freezes them: what the last updates teach the weights then
    stays true of the packed model. With batch norms frozen, training computes what evaluation does.

    Args:
        model: from `prepare_qat`.
        freeze_ranges: the number of updates after which the ranges stay; None: never.
        freeze_batch_norm: the number of updates after which batch norms use their running
            statistics, which stay; None: never.

    Raises ValueError for a model that has neither, or no batch norm to be frozen.
    """

    def __init__(
        self,
        model: nn.Module,
        *,
        freeze_ranges: int | None = None,
        freeze_batch_norm: int | None = None,
    ) -> None:
        self.ranges = [module for module in model.modules() if isinstance(module, InputRange)]
        self.norms = [module for module in model.modules() if isinstance(module, FoldedNorm)]
        if not self.ranges and not self.norms:
            raise ValueError(
                "QatSchedule: the model has no layer whose activations have a range, which only "
                "'int8-static' ones have, and none that has taken up a batch norm"
            )
        if freeze_batch_norm is not None and not self.norms:
            raise ValueError(
                "QatSchedule: freeze_batch_norm is given, but no layer has taken up a batch norm; "
                "prepare_qat folds those that its sample_inputs or batch_norms show"
            )
        self.freeze_ranges, self.freeze_batch_norm = freeze_ranges, freeze_batch_norm
        self.updates = 0
        self._freeze()

    def step(self) -> None:
        for followed in (*self.ranges, *self.norms):
            followed.update()
        self.updates += 1
        self._freeze()

    def _freeze(self) -> None:
        for followed, after in (
            (self.ranges, self.freeze_ranges),
            (self.norms, self.freeze_batch_norm),
        ):
            for module in followed:
                module.frozen = after is not None and self.updates >= after

    def state_dict(self) -> dict[str, int]:
        return {"updates": self.updates}

    def load_state_dict(self, state: dict[str, int]) -> None:
        self.updates = state["updates"]
        self._freeze()

"""What a criterion of pruning is."""

from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn

__all__ = ["Criterion"]


class Criterion:
    """Says what each weight is worth: a score for each, of which the higher are kept.

    Only `scores` has to be written. A criterion that needs the weights of the start overrides
    `start`, one that learns from training overrides `collect`, and one that keeps anything
    overrides `state_dict` and `load_state_dict`. In several processes (DDP) all must come to the
    same scores: gradients are averaged when `collect` is called, calibration is the criterion's own
    affair.

    `model` is the one that is pruned, `layers` those of its layers that are, by name; each has a
    parameter `weight`, of shape [N, K] (nn.Linear), [K, N] (transformers' Conv1D) or
    [N, K, ...] (convolutions). Nothing of them may be changed.
    """

    # Whether weights that are pruned go on being scored, and so may come back.
    revives = False

    def scores(self, model: nn.Module, layers: Mapping[str, nn.Module]) -> dict[str, Tensor]:
        """The scores by layer, each a floating tensor of the shape of that layer's weight.

        Raises ValueError where it can't tell, e.g. since no gradient has arrived.
        """
        raise NotImplementedError

    def start(self, layers: Mapping[str, nn.Module]) -> None:
        """Called once, before anything is pruned or trained."""

    def collect(self, layers: Mapping[str, nn.Module]) -> None:
        """Called after each backward pass of an update, before the optimiser's step."""

    def values(self, name: str) -> Tensor | None:
        """The weights that pruned ones of the layer come back with; None: 0."""
        return None

    def state_dict(self) -> dict[str, Any]:
        """What it keeps, as plain data and tensors."""
        return {}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """What `state_dict` returned."""

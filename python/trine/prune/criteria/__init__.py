"""What weights are worth: one file for each source of that knowledge, one signature for all."""

from trine.prune.criteria.base import Criterion
from trine.prune.criteria.calibrated import SparseGPT, Wanda
from trine.prune.criteria.weights import Change, Magnitude, Random

__all__ = ["Change", "Criterion", "Magnitude", "Random", "SparseGPT", "Wanda"]

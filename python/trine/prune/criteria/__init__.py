"""What weights are worth: one file for each source of that knowledge, one signature for all."""

from trine.prune.criteria.base import Criterion
from trine.prune.criteria.calibrated import SparseGPT, Wanda
from trine.prune.criteria.gradients import SNIP, Fisher, GraSP, Taylor
from trine.prune.criteria.movement import Movement
from trine.prune.criteria.weights import Change, Magnitude, Random

__all__ = [
    "SNIP",
    "Change",
    "Criterion",
    "Fisher",
    "GraSP",
    "Magnitude",
    "Movement",
    "Random",
    "SparseGPT",
    "Taylor",
    "Wanda",
]

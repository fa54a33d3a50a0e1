"""Quantisation of weights, and training that anticipates it."""

from trine.quantize import observers
from trine.quantize.prepare import prepare_qat
from trine.quantize.qat import QatLinear
from trine.quantize.schedule import QatSchedule
from trine.quantize.weights import int8_absmax, ternary_absmean, ternary_twn, two_of_four

__all__ = [
    "QatLinear",
    "QatSchedule",
    "int8_absmax",
    "observers",
    "prepare_qat",
    "ternary_absmean",
    "ternary_twn",
    "two_of_four",
]

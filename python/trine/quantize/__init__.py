"""Quantisation of weights, and training that anticipates it."""

from trine.quantize import observers
from trine.quantize.post_training import post_training
from trine.quantize.prepare import prepare_qat
from trine.quantize.qat import QatLinear
from trine.quantize.rounding import gptq
from trine.quantize.schedule import QatSchedule
from trine.quantize.smooth import smooth
from trine.quantize.weights import int8_absmax, ternary_absmean, ternary_twn, two_of_four

__all__ = [
    "QatLinear",
    "QatSchedule",
    "gptq",
    "int8_absmax",
    "observers",
    "post_training",
    "prepare_qat",
    "smooth",
    "ternary_absmean",
    "ternary_twn",
    "two_of_four",
]

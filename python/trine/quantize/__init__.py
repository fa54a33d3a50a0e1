"""Quantisation of weights, and training that anticipates it."""

from trine.quantize.prepare import prepare_qat
from trine.quantize.qat import QatLinear
from trine.quantize.weights import int8_absmax, ternary_absmean, two_of_four

__all__ = ["QatLinear", "int8_absmax", "prepare_qat", "ternary_absmean", "two_of_four"]

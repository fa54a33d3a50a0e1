"""Quantisation of weights, and training that anticipates it."""

from trine.quantize.weights import int8_absmax, ternary_absmean, two_of_four

__all__ = ["int8_absmax", "ternary_absmean", "two_of_four"]

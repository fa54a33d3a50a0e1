"""Quantisation of weights, and training that anticipates it."""

from trine.quantize import observers
from trine.quantize.fold import fold_batch_norm
from trine.quantize.post_training import post_training
from trine.quantize.prepare import prepare_qat
from trine.quantize.qat import QatLinear
from trine.quantize.qat_conv import QatConv2d
from trine.quantize.qat_embedding import QatEmbedding
from trine.quantize.rounding import gptq
from trine.quantize.schedule import QatSchedule
from trine.quantize.smooth import smooth
from trine.quantize.ste_bias import SteBias, draw_ste_bias, ste_bias
from trine.quantize.weights import int8_absmax, ternary_absmean, ternary_twn, two_of_four

__all__ = [
    "QatConv2d",
    "QatEmbedding",
    "QatLinear",
    "QatSchedule",
    "SteBias",
    "draw_ste_bias",
    "fold_batch_norm",
    "gptq",
    "int8_absmax",
    "observers",
    "post_training",
    "prepare_qat",
    "smooth",
    "ste_bias",
    "ternary_absmean",
    "ternary_twn",
    "two_of_four",
]

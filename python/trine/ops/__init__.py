"""The operators: functions on tensors, on whatever backend the tensors' device has."""

from trine.ops.int8_conv2d import int8_conv2d, pack_conv2d, unpack_conv2d
from trine.ops.int8_embedding import int8_embedding
from trine.ops.int8_linear import int8_linear, pack_int8, unpack_int8
from trine.ops.int8_weight_linear import int8_weight_linear
from trine.ops.linear_softmax_kl import linear_softmax_kl
from trine.ops.norm_quantize_rows import layer_norm_quantize_rows, rms_norm_quantize_rows
from trine.ops.quantize_rows import quantize_rows
from trine.ops.quantized_rows import QuantizedRows
from trine.ops.softmax_kl import softmax_kl
from trine.ops.sparse24_linear import pack_sparse24, sparse24_linear, unpack_sparse24
from trine.ops.ternary24_linear import pack_ternary24, ternary24_linear, unpack_ternary24
from trine.ops.ternary_linear import pack_ternary, ternary_linear, unpack_ternary

__all__ = [
    "QuantizedRows",
    "int8_conv2d",
    "int8_embedding",
    "int8_linear",
    "int8_weight_linear",
    "layer_norm_quantize_rows",
    "linear_softmax_kl",
    "pack_conv2d",
    "pack_int8",
    "pack_sparse24",
    "pack_ternary",
    "pack_ternary24",
    "quantize_rows",
    "rms_norm_quantize_rows",
    "softmax_kl",
    "sparse24_linear",
    "ternary24_linear",
    "ternary_linear",
    "unpack_conv2d",
    "unpack_int8",
    "unpack_sparse24",
    "unpack_ternary",
    "unpack_ternary24",
]

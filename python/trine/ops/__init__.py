"""The operators: functions on tensors, on whatever backend the tensors' device has."""

from trine.ops.int8_linear import int8_linear, pack_int8, unpack_int8
from trine.ops.quantize_rows import quantize_rows
from trine.ops.ternary_linear import pack_ternary, ternary_linear, unpack_ternary

__all__ = [
    "int8_linear",
    "pack_int8",
    "pack_ternary",
    "quantize_rows",
    "ternary_linear",
    "unpack_int8",
    "unpack_ternary",
]

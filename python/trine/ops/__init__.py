"""The operators: functions on tensors, on whatever backend the tensors' device has."""

from trine.ops.int8_linear import int8_linear, pack_int8, unpack_int8
from trine.ops.quantize_rows import quantize_rows

__all__ = ["int8_linear", "pack_int8", "quantize_rows", "unpack_int8"]

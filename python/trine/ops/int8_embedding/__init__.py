"""Rows of an int8 table, dequantised as they are read."""

import torch
from torch import Tensor

from trine.ops._checks import FLOAT_DTYPES, check_one_device, explain_missing_kernel
from trine.ops._linear import needs_grad
from trine.ops.int8_linear.pack import CHUNK

_op = torch.ops.trine.int8_embedding.default


def int8_embedding(
    indices: Tensor,
    packed_weight: Tensor,
    weight_scale: Tensor,
    embedding_dim: int,
    dtype: torch.dtype = torch.float32,
) -> Tensor:
    """y[..., :] = codes[indices[...]] * weight_scale[indices[...]].

    The product in float32, then one rounding to `dtype`: the same bits on every backend. The table
    is laid out as the weight of `int8_linear`, so that an output layer that is tied to the
    embedding can share it.

    Args:
        indices: int64 or int32, any shape, in [0, V).
        packed_weight: int8 [V, 16 * ceil(D / 16)], from `pack_int8`.
        weight_scale: float32 [V].
        embedding_dim: D.
        dtype: of the result; float32, bfloat16 or float16.

    Returns:
        [..., D], for indices [...]. No gradient flows to the table.

    Raises:
        ValueError: shapes or dtypes that do not fit, a scale that requires a gradient.
        IndexError: an index outside of [0, V), before anything is computed. On a GPU that is found
            while the kernel runs and stops the process' use of it, as torch.nn.functional.embedding
            does.
    """
    if needs_grad(weight_scale):
        raise ValueError(
            "int8_embedding gives no gradient to its scales; train a dense table and pack it "
            "afterwards, or detach them"
        )
    return _op(indices, packed_weight, weight_scale, embedding_dim, dtype)


explain_missing_kernel("int8_embedding")


@torch.library.register_fake("trine::int8_embedding")
def _fake(indices, packed_weight, weight_scale, embedding_dim, dtype):
    check_one_device("int8_embedding", indices, packed_weight, weight_scale)
    _check(
        indices.dtype in (torch.int64, torch.int32),
        f"indices must be int64 or int32, they are {indices.dtype}; convert them with .to()",
    )
    _check(packed_weight.dtype == torch.int8, "packed_weight must be int8")
    _check(weight_scale.dtype == torch.float32, "weight_scale must be float32")
    width = CHUNK * ((embedding_dim + CHUNK - 1) // CHUNK)
    _check(
        embedding_dim >= 0 and packed_weight.dim() == 2 and packed_weight.shape[1] == width,
        f"embedding_dim = {embedding_dim} needs a packed_weight [V, {width}]; pack the table with "
        "trine.ops.pack_int8",
    )
    v = packed_weight.shape[0]
    _check(
        weight_scale.dim() == 1 and weight_scale.shape[0] == v,
        f"weight_scale must be [{v}], one scale per row of packed_weight",
    )
    _check(dtype in FLOAT_DTYPES, f"dtype must be float32, bfloat16 or float16, it is {dtype}")
    return indices.new_empty(*indices.shape, embedding_dim, dtype=dtype)


def _check(condition: bool, message: str) -> None:
    if not condition:
        raise ValueError(f"int8_embedding: {message}")

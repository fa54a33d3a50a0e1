"""What `int8_embedding` means, in plain PyTorch. Slow and obvious; tests compare against it."""

import torch
from torch import Tensor


def int8_embedding(
    indices: Tensor,
    packed_weight: Tensor,
    weight_scale: Tensor,
    embedding_dim: int,
    dtype: torch.dtype = torch.float32,
) -> Tensor:
    rows = packed_weight[indices.long(), :embedding_dim].float()
    return (rows * weight_scale[indices.long()][..., None]).to(dtype)


def example_inputs(
    shape: tuple[int, ...] = (2, 3),
    v: int = 7,
    d: int = 37,
    dtype: torch.dtype = torch.float32,
    index_dtype: torch.dtype = torch.int64,
) -> tuple[Tensor, Tensor, Tensor, int, torch.dtype]:
    """Random arguments of `int8_embedding`; the packed table is laid out by hand."""
    packed_weight = torch.zeros(v, 16 * ((d + 15) // 16), dtype=torch.int8)
    packed_weight[:, :d] = torch.randint(-127, 128, (v, d))
    indices = torch.randint(v, shape, dtype=index_dtype)
    return indices, packed_weight, torch.rand(v) / 64, d, dtype

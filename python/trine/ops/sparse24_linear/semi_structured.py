"""2:4 weights from and to PyTorch's own compressed tensors, whichever library lays them out."""

import torch
from torch import Tensor
from torch.sparse import SparseSemiStructuredTensor, to_sparse_semi_structured

from trine.ops.sparse24_linear.pack import pack_sparse24, unpack_sparse24


@torch.no_grad()
def from_semi_structured(tensor: SparseSemiStructuredTensor) -> tuple[Tensor, Tensor]:
    """Pack what `torch.sparse.to_sparse_semi_structured` compressed, by way of the dense matrix.

    Args:
        tensor: [N, K], of CUTLASS or cuSPARSELt; float32, bfloat16, float16 or int8.

    Returns:
        `values` and `indices` as from `pack_sparse24`.

    Raises:
        ValueError: another kind of tensor, or what `pack_sparse24` refuses.
    """
    if not isinstance(tensor, SparseSemiStructuredTensor):
        raise ValueError(
            "from_semi_structured takes a torch.sparse.SparseSemiStructuredTensor; got "
            f"{type(tensor).__name__}; pack a dense matrix with pack_sparse24"
        )
    return pack_sparse24(tensor.to_dense())


@torch.no_grad()
def to_semi_structured(values: Tensor, indices: Tensor, k: int) -> SparseSemiStructuredTensor:
    """The packed weight as `torch.sparse.to_sparse_semi_structured` compresses its dense matrix.

    Args:
        values, indices: from `pack_sparse24`, on a CUDA device; bfloat16, float16 or int8.
        k: columns of the dense matrix.

    Raises:
        ValueError: what `unpack_sparse24` refuses, and float32 values: PyTorch keeps one of each
            two of those.
        RuntimeError: what PyTorch refuses: tensors that are not on a CUDA device, and N and K that
            are not multiples of what its libraries take (32 and 128 suit all).
    """
    if values.dtype == torch.float32:
        raise ValueError(
            "to_semi_structured: PyTorch's float32 form keeps one of each two columns, which would "
            "drop values; store the weight as bfloat16, float16 or int8"
        )
    return to_sparse_semi_structured(unpack_sparse24(values, indices, k))

"""An embedding of few dimensions and what makes them many."""

from __future__ import annotations

import torch
from torch import Tensor, nn


class LowRankEmbedding(nn.Module):
    """y = projection(embedding(indices)): a table [V, r], then a linear layer r -> D (ALBERT).

    Args:
        num_embeddings: V.
        embedding_dim: D, of what it returns.
        rank: r, at least 1.
        padding_idx: as for torch.nn.Embedding.
        device, dtype: as for torch.nn.Embedding.

    Raises ValueError for a rank below 1.
    """

    def __init__(
        self,
        num_embeddings: int,
        embedding_dim: int,
        rank: int,
        padding_idx: int | None = None,
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        if rank < 1:
            raise ValueError(f"LowRankEmbedding: rank is {rank}; it must be at least 1")
        self.num_embeddings, self.embedding_dim = num_embeddings, embedding_dim
        self.rank, self.padding_idx = rank, padding_idx
        kind = {"device": device, "dtype": dtype}
        self.embedding = nn.Embedding(num_embeddings, rank, padding_idx, **kind)
        self.projection = nn.Linear(rank, embedding_dim, bias=False, **kind)

    @classmethod
    def from_factors(
        cls, first: Tensor, second: Tensor, padding_idx: int | None = None
    ) -> LowRankEmbedding:
        """The embedding of table `second @ first`, which keeps `second` [V, r].

        first: [r, D], of the same dtype.
        """
        (rank, d), v = first.shape, len(second)
        layer = cls(v, d, rank, padding_idx, device="meta", dtype=first.dtype)
        layer.embedding.weight = nn.Parameter(second)
        layer.projection.weight = nn.Parameter(first.T.contiguous())
        return layer

    def forward(self, indices: Tensor) -> Tensor:
        return self.projection(self.embedding(indices))

    @property
    def weight(self) -> Tensor:
        """The dense table [V, D], made anew each time; gradients flow through it."""
        return self.embedding.weight @ self.projection.weight.T

    def extra_repr(self) -> str:
        return f"{self.num_embeddings}, {self.embedding_dim}, rank={self.rank}"

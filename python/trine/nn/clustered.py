"""Layers whose weights are a few values (or short vectors) and a number of one for each place.

They save storage, on disk and in memory, and no time: the weight is decoded in every call.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional


class ClusteredWeight(nn.Module):
    """A weight [rows, columns] as `codebook` [2^bits, group] and packed `codes`.

    weight[n, g * group + i] = codebook[code[n, g], i]: each code stands for `group` columns in a
    row. The codebook is a parameter and trains: the gradient of an entry is the sum of those of all
    weights that it stands for (Han et al., arXiv:1510.00149). The codes, a uint8 buffer
    [rows, ceil(columns / group / 8) * bits], stay: every 8 codes are `bits` bytes, the first code
    in the lowest bits of the first byte.

    Raises ValueError for bits that are not from 1 to 8, and a group that does not divide the
    columns.
    """

    codes: Tensor

    def __init__(
        self,
        rows: int,
        columns: int,
        bits: int,
        group: int,
        device: torch.device | str | None,
        dtype: torch.dtype | None,
    ) -> None:
        super().__init__()
        if not 1 <= bits <= 8:
            raise ValueError(f"{type(self).__name__}: bits is {bits}; it must be from 1 to 8")
        if group < 1 or columns % group:
            raise ValueError(
                f"{type(self).__name__}: group is {group}; it must divide the {columns} columns"
            )
        self.bits, self.group = bits, group
        self.columns = columns
        empty = torch.full((2**bits, group), torch.nan, device=device, dtype=dtype)
        self.codebook = nn.Parameter(empty)
        width = -(-columns // group // 8) * bits
        self.register_buffer("codes", torch.zeros(rows, width, dtype=torch.uint8, device=device))

    @property
    def weight(self) -> Tensor:
        """The dense weight [rows, columns], decoded each time; gradients flow to the codebook."""
        return self._decode(self.codes)

    def _decode(self, codes: Tensor) -> Tensor:
        """Rows of packed codes [..., bytes] as weights [..., columns]."""
        numbers = unpack_codes(codes, self.columns // self.group, self.bits)
        return self.codebook[numbers].flatten(-2)


def pack_codes(codes: Tensor, bits: int) -> Tensor:
    """Integers in [0, 2^bits), [rows, count], as uint8 [rows, ceil(count / 8) * bits]."""
    padded = functional.pad(codes.long(), (0, -codes.shape[1] % 8)).unflatten(1, (-1, 8))
    words = (padded << (bits * torch.arange(8, device=codes.device))).sum(2)
    parts = words[..., None] >> (8 * torch.arange(bits, device=codes.device)) & 255
    return parts.flatten(1).to(torch.uint8)


def unpack_codes(packed: Tensor, count: int, bits: int) -> Tensor:
    """What `pack_codes` packed, int64 [..., count]."""
    parts = packed.long().unflatten(-1, (-1, bits))
    words = (parts << (8 * torch.arange(bits, device=packed.device))).sum(-1)
    codes = words[..., None] >> (bits * torch.arange(8, device=packed.device)) & (2**bits - 1)
    return codes.flatten(-2)[..., :count]


class ClusteredLinear(ClusteredWeight):
    """y = x @ weight.T + bias with a weight of 2^bits different values, or short vectors.

    Args:
        in_features: K.
        out_features: N.
        bits: of a code, 1 to 8.
        group: how many weights of a row share one code; it divides K.
        bias, device, dtype: as for torch.nn.Linear.
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bits: int,
        group: int = 1,
        bias: bool = True,
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(out_features, in_features, bits, group, device, dtype)
        self.in_features, self.out_features = in_features, out_features
        zeros = torch.zeros(out_features, device=device, dtype=dtype) if bias else None
        self.bias = None if zeros is None else nn.Parameter(zeros)

    def forward(self, x: Tensor) -> Tensor:
        return functional.linear(x, self.weight, self.bias)

    def extra_repr(self) -> str:
        return f"{self.in_features}, {self.out_features}, bits={self.bits}, group={self.group}"


class ClusteredEmbedding(ClusteredWeight):
    """An embedding table of 2^bits different values, or short vectors; it decodes the rows used.

    Args:
        num_embeddings: V.
        embedding_dim: D.
        bits, group, device, dtype: as for `ClusteredLinear`; the group divides D.
        padding_idx: kept for those who read it; the row is what its codes say.
    """

    def __init__(
        self,
        num_embeddings: int,
        embedding_dim: int,
        bits: int,
        group: int = 1,
        padding_idx: int | None = None,
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(num_embeddings, embedding_dim, bits, group, device, dtype)
        self.num_embeddings, self.embedding_dim = num_embeddings, embedding_dim
        self.padding_idx = padding_idx

    def forward(self, indices: Tensor) -> Tensor:
        return self._decode(self.codes[indices])

    def extra_repr(self) -> str:
        sizes = f"{self.num_embeddings}, {self.embedding_dim}"
        return f"{sizes}, bits={self.bits}, group={self.group}"

"""An embedding whose table is int8."""

from typing import Any

import torch
from torch import Tensor, nn

from trine.nn.packed import FLOAT_DTYPES, PackedLayer
from trine.ops import int8_embedding, pack_int8, unpack_int8
from trine.ops.int8_linear.pack import CHUNK
from trine.quantize.weights import int8_absmax


class Int8Embedding(PackedLayer):
    """y[..., :] = codes[indices[...]] * weight_scale[indices[...]], on `trine.ops.int8_embedding`.

    Buffers: packed_weight int8 [V, 16 * ceil(D / 16)], weight_scale float32 [V], as `Int8Linear`
    has them: an output layer that is tied to the embedding can hold the same tensors.

    Args:
        num_embeddings: V.
        embedding_dim: D.
        padding_idx: as for torch.nn.Embedding, where it says which row gets no gradient. Here none
            does; it is kept for models that read it.
        device, dtype: as for torch.nn.Embedding; float32, bfloat16 or float16.
    """

    kind = "int8-embedding"
    float_buffers = ()

    packed_weight: Tensor
    weight_scale: Tensor

    def __init__(
        self,
        num_embeddings: int,
        embedding_dim: int,
        padding_idx: int | None = None,
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype | str | None = None,
    ) -> None:
        super().__init__(dtype)
        self.num_embeddings, self.embedding_dim = num_embeddings, embedding_dim
        self.padding_idx = padding_idx
        packed_d = CHUNK * -(-embedding_dim // CHUNK)
        self._add_buffer("packed_weight", (num_embeddings, packed_d), torch.int8, device)
        self._add_buffer("weight_scale", (num_embeddings,), torch.float32, device)

    @classmethod
    def from_embedding(cls, embedding: nn.Embedding) -> "Int8Embedding":
        """Pack a dense table, each row by its largest magnitude.

        Args:
            embedding: torch.nn.Embedding, float32, bfloat16 or float16.

        Raises ValueError for another class or dtype, for `max_norm`, and for NaN or infinite
        weights.
        """
        if not isinstance(embedding, nn.Embedding):
            raise ValueError(
                f"from_embedding takes torch.nn.Embedding; got {type(embedding).__name__}"
            )
        weight = embedding.weight.detach()
        if weight.dtype not in FLOAT_DTYPES:
            raise ValueError(
                f"from_embedding: the weight is {weight.dtype}; convert the layer to float32, "
                "bfloat16 or float16 first"
            )
        refuse_max_norm(embedding)
        if weight.is_meta:
            raise ValueError("from_embedding: the weight is on the meta device; load it first")
        if not weight.isfinite().all():
            raise ValueError(
                "from_embedding: the weight holds NaN or infinity; it cannot be quantised"
            )
        return cls.from_codes(
            *int8_absmax(weight), padding_idx=embedding.padding_idx, dtype=weight.dtype
        )

    @classmethod
    def from_codes(
        cls,
        codes: Tensor,
        weight_scale: Tensor,
        *,
        padding_idx: int | None = None,
        dtype: torch.dtype | str | None = None,
    ) -> "Int8Embedding":
        """Pack codes int8 [V, D], -127 to 127, and their scales [V]."""
        packed, (v, d) = pack_int8(codes), codes.shape
        if weight_scale.shape != (v,):
            raise ValueError(
                f"Int8Embedding: weight_scale has shape {list(weight_scale.shape)}, not [{v}]"
            )
        layer = cls(v, d, padding_idx, device="meta", dtype=dtype)
        layer.packed_weight = packed
        layer.weight_scale = weight_scale.detach().to(codes.device, torch.float32, copy=True)
        return layer

    def forward(self, indices: Tensor) -> Tensor:
        buffers = self._buffers
        table = buffers["packed_weight"], buffers["weight_scale"]
        return int8_embedding(indices, *table, self.embedding_dim, self._dtype)

    def weight_shape(self) -> tuple[int, int]:
        return self.num_embeddings, self.embedding_dim

    def _dense_weight(self) -> Tensor:
        return unpack_int8(self.packed_weight, self.embedding_dim) * self.weight_scale[:, None]

    def config(self) -> dict[str, Any]:
        return {
            "num_embeddings": self.num_embeddings,
            "embedding_dim": self.embedding_dim,
            "padding_idx": self.padding_idx,
            "dtype": str(self.dtype).removeprefix("torch."),
        }


def refuse_max_norm(embedding: nn.Embedding) -> None:
    """Raise ValueError for `max_norm`: such an embedding changes its table as it is read."""
    if embedding.max_norm is not None:
        raise ValueError(
            f"max_norm is {embedding.max_norm}: such an embedding rescales rows of its table as "
            "they are read; rescale them all and set max_norm to None first"
        )

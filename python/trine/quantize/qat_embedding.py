"""Quantisation-aware training of embeddings: in evaluation the bits of `Int8Embedding`."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional

from trine import nn as packed_nn  # a package that imports this one: used in calls only
from trine.ops._linear import needs_grad
from trine.quantize.qat_layer import QatLayer
from trine.quantize.weights import int8_rows


class QatEmbedding(QatLayer, nn.Embedding):
    """nn.Embedding with a dense master table that is used as if it were int8.

    In both modes the rows that are looked up are those of the packed table, bit for bit; in
    evaluation mode the kernel gives them. Gradients flow to the looked-up rows of the master table
    through the straight-through estimator, as those of nn.Embedding do (`padding_idx`,
    `scale_grad_by_freq` and `sparse` hold); nothing is clamped, for a row's scale is that of its
    largest magnitude.

    Args: as for torch.nn.Embedding; `max_norm` must be None.
    """

    choice = "int8"
    input_range = norm = None

    def __init__(self, *args, **kwargs) -> None:
        super().__init__(*args, **kwargs)
        packed_nn.int8_embedding.refuse_max_norm(self)

    def forward(self, indices: Tensor) -> Tensor:
        packed = None if self.training else self._packed_layer()
        if packed is not None and not needs_grad(self.weight):
            return packed(indices)
        rows = functional.embedding(
            indices,
            self.weight,
            self.padding_idx,
            scale_grad_by_freq=self.scale_grad_by_freq,
            sparse=self.sparse,
        )
        return _ThroughRows.apply(rows)

    def float_layer(self) -> nn.Embedding:
        shape = self.num_embeddings, self.embedding_dim
        return nn.Embedding(*shape, self.padding_idx, device="meta", dtype=self.weight.dtype)

    def _pack(self) -> nn.Module:
        return packed_nn.Int8Embedding.from_embedding(self)


class _ThroughRows(torch.autograd.Function):
    """Rows [..., D] as int8 and back, each by its own scale; the identity in the backward pass."""

    @staticmethod
    def forward(ctx, rows: Tensor) -> Tensor:
        # Not reshape(-1, D): D may be 0.
        q, scale = int8_rows(rows.reshape(rows.shape[:-1].numel(), rows.shape[-1]))
        return (q.float() * scale[:, None]).to(rows.dtype).reshape(rows.shape)

    @staticmethod
    def backward(ctx, grad: Tensor) -> Tensor:
        return grad

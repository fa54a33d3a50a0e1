"""nn.MultiheadAttention made of plain linear layers, with any number of heads."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional


class SeparateAttention(nn.Module):
    """What nn.MultiheadAttention computes, from nn.Linear `q_proj`, `k_proj`, `v_proj`, `out_proj`.

    There the heads fill the width; here `num_heads` heads of `head_dim` may be fewer, so that heads
    can be removed, and each projection is a layer that is called and can be packed. It is called in
    the same way and returns the same, but for these: nested tensors are not taken, weights are
    averaged over the heads that there are, and a mask [N * num_heads, L, S] has one for each.

    Args:
        embed_dim: width of the queries and the output.
        num_heads, head_dim: the projections make num_heads * head_dim features.
        kdim, vdim: widths of keys and values; None: `embed_dim`.
        dropout: of the attention weights in training.
        bias, batch_first, device, dtype: as for nn.MultiheadAttention.
    """

    # nn.TransformerEncoderLayer's fast path, which would read weights, asks for this one first.
    in_proj_bias = None

    def __init__(
        self,
        embed_dim: int,
        num_heads: int,
        head_dim: int,
        kdim: int | None = None,
        vdim: int | None = None,
        dropout: float = 0.0,
        bias: bool = True,
        batch_first: bool = False,
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.num_heads, self.head_dim = num_heads, head_dim
        self.dropout, self.batch_first = dropout, batch_first
        kind, width = {"bias": bias, "device": device, "dtype": dtype}, num_heads * head_dim
        self.q_proj = nn.Linear(embed_dim, width, **kind)
        self.k_proj = nn.Linear(embed_dim if kdim is None else kdim, width, **kind)
        self.v_proj = nn.Linear(embed_dim if vdim is None else vdim, width, **kind)
        self.out_proj = nn.Linear(width, embed_dim, **kind)

    @classmethod
    def from_attention(cls, attention: nn.MultiheadAttention) -> SeparateAttention:
        """All heads of `attention`, whose parameters (and gradients) are copied.

        Raises ValueError where it adds keys of its own (add_bias_kv, add_zero_attn).
        """
        if attention.bias_k is not None or attention.add_zero_attn:
            raise ValueError(
                "SeparateAttention has no keys of its own (add_bias_kv, add_zero_attn)"
            )
        separate = cls(
            attention.embed_dim,
            attention.num_heads,
            attention.head_dim,
            attention.kdim,
            attention.vdim,
            attention.dropout,
            attention.in_proj_bias is not None,
            attention.batch_first,
            device="meta",
        )
        for name, (whole, part) in origins(attention).items():
            layer, _, key = name.partition(".")
            setattr(separate.get_submodule(layer), key, _piece(getattr(attention, whole), part))
        separate.out_proj.weight = _piece(attention.out_proj.weight)
        if attention.out_proj.bias is not None:
            separate.out_proj.bias = _piece(attention.out_proj.bias)
        return separate.train(attention.training)

    @property
    def embed_dim(self) -> int:
        return self.q_proj.in_features

    @property
    def kdim(self) -> int:
        return self.k_proj.in_features

    @property
    def vdim(self) -> int:
        return self.v_proj.in_features

    @property
    def bias(self) -> Tensor | None:
        return self.q_proj.bias

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        key_padding_mask: Tensor | None = None,
        need_weights: bool = True,
        attn_mask: Tensor | None = None,
        average_attn_weights: bool = True,
        is_causal: bool = False,
    ) -> tuple[Tensor, Tensor | None]:
        """Outputs, and the attention weights [N, L, S] or [N, num_heads, L, S], or None.

        `is_causal` says that `attn_mask` is the causal one. Raises ValueError where that is missing
        and for inputs or masks of a wrong shape.
        """
        batched = query.dim() == 3
        if not batched:
            query, key, value = (x.unsqueeze(0) for x in (query, key, value))
            key_padding_mask = None if key_padding_mask is None else key_padding_mask.unsqueeze(0)
        elif not self.batch_first:
            query, key, value = (x.transpose(0, 1) for x in (query, key, value))
        if is_causal and attn_mask is None:
            raise ValueError("is_causal says that attn_mask is causal; pass that mask, too")
        causal = is_causal and key_padding_mask is None and not need_weights
        mask = None if causal else self._mask(query, key, key_padding_mask, attn_mask)
        q, k = self._heads(self.q_proj, query), self._heads(self.k_proj, key)
        v = self._heads(self.v_proj, value)
        dropout, weights = self.dropout if self.training else 0.0, None
        if need_weights:
            scores = q * self.head_dim**-0.5 @ k.transpose(-2, -1)
            weights = (scores if mask is None else scores + mask).softmax(-1)
            weights = functional.dropout(weights, dropout, self.training)
            out = weights @ v
        else:
            out = functional.scaled_dot_product_attention(q, k, v, mask, dropout, causal)
        out = self.out_proj(out.transpose(1, 2).flatten(2))
        if not batched:
            out, weights = out.squeeze(0), None if weights is None else weights.squeeze(0)
        elif not self.batch_first:
            out = out.transpose(0, 1)
        if weights is not None and average_attn_weights:
            weights = weights.mean(-3)
        return out, weights

    def _heads(self, layer: nn.Module, x: Tensor) -> Tensor:
        """[N, T, ...] -> [N, num_heads, T, head_dim], of the values what is left of head_dim."""
        return layer(x).unflatten(-1, (self.num_heads, -1)).transpose(1, 2)

    def _mask(
        self, query: Tensor, key: Tensor, padding: Tensor | None, attn_mask: Tensor | None
    ) -> Tensor | None:
        """What is added to the scores [N, num_heads, L, S]; False and 0 leave them as they are."""
        (n, length, _), source = query.shape, key.shape[1]
        mask = None
        if attn_mask is not None:
            shapes = {2: (length, source), 3: (n * self.num_heads, length, source)}
            if tuple(attn_mask.shape) != shapes.get(attn_mask.dim()):
                raise ValueError(
                    f"attn_mask has shape {list(attn_mask.shape)}; with {self.num_heads} heads it "
                    f"is {list(shapes[2])} or {list(shapes[3])}"
                )
            mask = _added(attn_mask, query.dtype)
            if mask.dim() == 3:
                mask = mask.unflatten(0, (n, self.num_heads))
        if padding is not None:
            if tuple(padding.shape) != (n, source):
                raise ValueError(
                    f"key_padding_mask has shape {list(padding.shape)}; expected {[n, source]}"
                )
            padding = _added(padding, query.dtype)[:, None, None]
            mask = padding if mask is None else mask + padding
        return mask

    def extra_repr(self) -> str:
        return f"num_heads={self.num_heads}, head_dim={self.head_dim}, dropout={self.dropout}"


def origins(attention: nn.MultiheadAttention) -> dict[str, tuple[str, int | None]]:
    """Of which parameter, and of which third of it, each of the input projections' is made."""
    found: dict[str, tuple[str, int | None]] = {}
    for third, layer in enumerate("qkv"):
        own = attention.in_proj_weight is None
        whole = f"{layer}_proj_weight" if own else "in_proj_weight"
        found[f"{layer}_proj.weight"] = whole, None if own else third
        if attention.in_proj_bias is not None:
            found[f"{layer}_proj.bias"] = "in_proj_bias", third
    return found


def third_of(whole: Tensor, third: int | None) -> Tensor:
    """A copy of that third of the rows, or of all."""
    return (whole if third is None else whole.chunk(3)[third]).detach().clone()


def _piece(whole: nn.Parameter, third: int | None = None) -> nn.Parameter:
    piece = nn.Parameter(third_of(whole, third), whole.requires_grad)
    piece.grad = None if whole.grad is None else third_of(whole.grad, third)
    return piece


def _added(mask: Tensor, dtype: torch.dtype) -> Tensor:
    """A mask as what is added to scores: -inf where it is True."""
    if mask.dtype != torch.bool:
        return mask.to(dtype)
    return torch.zeros_like(mask, dtype=dtype).masked_fill(mask, -torch.inf)

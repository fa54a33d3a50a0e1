"""Embedding tables as a narrow table and a projection, with the output head tied to them."""

from __future__ import annotations

from torch import nn

from trine.compress.layers import bytes_of, require_module
from trine.compress.report import require_place_for_report
from trine.factorize.factorize import changed_copy
from trine.factorize.layers import require_values
from trine.factorize.ranks import Ranks
from trine.factorize.report import LayerChange
from trine.factorize.svd import Svd
from trine.nn.low_rank import LowRankLinear
from trine.nn.low_rank_embedding import LowRankEmbedding


def factorize_embedding(model: nn.Module, name: str, ranks: Ranks) -> nn.Module:
    """A copy of `model` whose embedding is a table [V, r] and a projection r -> D (ALBERT).

    The best of that rank in the norm of the table: E = U_r (U_r^T W), as `Svd`. Where a linear
    layer's weight is tied to the table (the output head of a language model: logits = h W^T), that
    layer becomes a `trine.nn.LowRankLinear` of the same product: its `second` is tied to the narrow
    table, its `first`, the small projection transposed, is its own and may part from the
    embedding's in training. Do not call transformers' `tie_weights` on the copy.

    Args:
        model: any module. It is not touched.
        name: of the nn.Embedding.
        ranks: `Rank(64)`, `Energy(0.9)` or `Parameters(0.3)`.

    Returns:
        The copy with a `report`.

    Raises:
        ValueError: there is no such nn.Embedding, it has `max_norm`, `sparse` gradients or a
            forward of its own, is tied to something else than nn.Linear or nn.Embedding, or holds
            NaN; a rank that it does not have, or that would take as many parameters.
    """
    require_module(model, "factorize_embedding")
    require_place_for_report(model, "factorize_embedding")
    table = dict(model.named_modules()).get(name)
    _check(name, table)
    tied = _tied(model, name, table)
    plan = Svd().plan(name, table)
    rank = ranks.choose({name: plan}, None)[name]
    if rank is None or plan.size(rank) >= plan.dense:
        raise ValueError(
            f"factorize_embedding: no rank of {name!r} is worth it: rank {rank or 'r'} would take "
            f"{plan.size(rank or 1)} parameters, the table takes {plan.dense}"
        )
    narrow = plan.build(rank)
    replacements: dict[nn.Module, nn.Module] = {table: narrow}
    for other in tied.values():
        is_table = isinstance(other, nn.Embedding)
        replacements[other] = narrow if is_table else _head(other, narrow)
    before = bytes_of(nn.ModuleList(replacements))
    after = bytes_of(nn.ModuleList(replacements.values()))
    with_head = f", with {', '.join(map(repr, tied))}" if tied else ""
    reason = f"rank {rank}{with_head}"
    return changed_copy(
        model, replacements, [LayerChange(name, True, reason, before, after, plan.error(narrow))]
    )


def _check(name: str, table: nn.Module | None) -> None:
    if type(table) is not nn.Embedding or "forward" in vars(table):
        raise ValueError(
            f"factorize_embedding: {name!r} is {type(table).__name__}; it must be an nn.Embedding"
        )
    if table.max_norm is not None or table.sparse or table.scale_grad_by_freq:
        raise ValueError(
            f"factorize_embedding: {name!r} has max_norm, sparse gradients or gradients scaled by "
            "frequency, which the factors could not keep"
        )
    require_values(name, table, "factorize_embedding")


def _tied(model: nn.Module, name: str, table: nn.Embedding) -> dict[str, nn.Module]:
    """The other modules whose weight is that of the table, by name."""
    tied = {}
    for other_name, module in model.named_modules():
        for key, parameter in module._parameters.items():
            if module is table or parameter is not table.weight:
                continue
            if key != "weight" or type(module) not in (nn.Linear, nn.Embedding):
                raise ValueError(
                    f"factorize_embedding: {name!r} is tied to {key!r} of {other_name!r}, a "
                    f"{type(module).__name__}; it can be tied to nn.Linear and nn.Embedding only"
                )
            tied[other_name] = module
    return tied


def _head(head: nn.Linear, narrow: LowRankEmbedding) -> LowRankLinear:
    bias = None if head.bias is None else head.bias.detach().clone()
    first = narrow.projection.weight.detach().T.contiguous()
    made = LowRankLinear.from_factors(first, narrow.embedding.weight.detach(), bias)
    made.second.weight = narrow.embedding.weight
    return made.train(head.training)

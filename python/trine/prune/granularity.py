"""What is kept or removed as one: single weights, or groups of them.

A granularity adds the scores of each group, and spreads what was decided for a group over its
weights again. Groups have keys: mostly the layer's name, another where several layers share groups.
"""

from collections.abc import Mapping
from fnmatch import fnmatchcase

import torch
from torch import Tensor, nn

from trine.nn.packed import is_conv1d
from trine.prune.layers import by_row
from trine.prune.one_shot import keep

__all__ = ["NM", "Channel", "Granularity", "Head", "Layer", "Neuron", "Weight"]

Layers = Mapping[str, nn.Module]
Groups = dict[str, Tensor]


class Granularity:
    """The weights of some layers in groups."""

    def key(self, name: str) -> str:
        """The key of the groups of the layer of that name."""
        return name

    def pool(self, layers: Layers, scores: Mapping[str, Tensor]) -> Groups:
        """The sum of the scores of each group, by key."""
        raise NotImplementedError

    def spread(self, layers: Layers, groups: Groups) -> dict[str, Tensor]:
        """The value of its group for each weight, by layer, in the shape of the weight."""
        raise NotImplementedError

    def masks(self, layers: Layers, groups: Groups) -> dict[tuple[str, str], Tensor]:
        """The value of its group for each element of what it governs, by layer and parameter."""
        spread = self.spread(layers, groups)
        return {(name, "weight"): values for name, values in spread.items()}

    def off(self, layers: Layers, kept: Groups) -> dict[str, list[int]]:
        """The outputs of each layer that are not kept, where groups are outputs."""
        return {}

    def dropped(self, kept: Groups) -> list[str]:
        """The keys of which nothing is kept, where groups are whole layers."""
        return []

    def protect(self, groups: Groups) -> Groups:
        """Group scores in which those that must stay are infinite."""
        return groups

    def most(self, groups: int) -> int:
        """How many of so many groups of one key may be removed."""
        return groups


class Weight(Granularity):
    """Every weight by itself."""

    def pool(self, layers: Layers, scores: Mapping[str, Tensor]) -> Groups:
        return {name: by_row(layer, scores[name]) for name, layer in layers.items()}

    def spread(self, layers: Layers, groups: Groups) -> dict[str, Tensor]:
        return {name: _like_weight(layer, groups[name]) for name, layer in layers.items()}


class NM(Weight):
    """At least `m - n` of every `m` consecutive inputs of an output are removed in the end: N:M
    sparsity (2:4: `NM(2, 4)`), reached with a ratio of 1 - n/m.

    Among equals the first stays, as in `trine.quantize.two_of_four`; a last group of fewer than m
    keeps up to n. What is 2:4 packs into `trine.nn.Sparse24Linear` without further loss.

    Raises ValueError unless 0 < n < m.
    """

    def __init__(self, n: int, m: int) -> None:
        if not 0 < n < m:
            raise ValueError(f"NM: n of m needs 0 < n < m; got n={n}, m={m}")
        self.n, self.m = n, m

    def protect(self, groups: Groups) -> Groups:
        return {
            key: scores.masked_fill(keep(scores, (self.n, self.m), rows_apart=True), torch.inf)
            for key, scores in groups.items()
        }

    def most(self, groups: int) -> int:
        return -(-groups * (self.m - self.n) // self.m)


class _Rows(Granularity):
    """Groups of whole outputs: rows of the weight [N, K], and their biases."""

    def index(self, name: str, layer: nn.Module) -> Tensor:
        """The group of each of the layer's rows: int64 [N]."""
        raise NotImplementedError

    def pool(self, layers: Layers, scores: Mapping[str, Tensor]) -> Groups:
        groups: Groups = {}
        for name, layer in layers.items():
            key, index = self.key(name), self.index(name, layer)
            rows = by_row(layer, scores[name]).sum(1, dtype=torch.float64)
            of_layer = rows.new_zeros(int(index.max()) + 1).index_add(0, index, rows)
            if key in groups and len(groups[key]) != len(of_layer):
                raise ValueError(
                    f"the layers of '{key}' have {len(groups[key])} and {len(of_layer)} groups; "
                    "those that share groups must have equally many"
                )
            groups[key] = groups.get(key, 0) + of_layer
        return groups

    def spread(self, layers: Layers, groups: Groups) -> dict[str, Tensor]:
        spread = {}
        for name, rows in self._rows(layers, groups).items():
            columns = by_row(layers[name], layers[name].weight).shape[1]
            spread[name] = _like_weight(layers[name], rows[:, None].expand(-1, columns))
        return spread

    def masks(self, layers: Layers, groups: Groups) -> dict[tuple[str, str], Tensor]:
        rows = self._rows(layers, groups)
        biased = [name for name, layer in layers.items() if layer.bias is not None]
        return super().masks(layers, groups) | {(name, "bias"): rows[name] for name in biased}

    def off(self, layers: Layers, kept: Groups) -> dict[str, list[int]]:
        rows = self._rows(layers, kept).items()
        off = {name: (~of_layer).nonzero().flatten().tolist() for name, of_layer in rows}
        return {name: outputs for name, outputs in off.items() if outputs}

    def _rows(self, layers: Layers, groups: Groups) -> dict[str, Tensor]:
        """The value of its group for each output [N], by layer."""
        return {n: groups[self.key(n)][self.index(n, layer)] for n, layer in layers.items()}

    def protect(self, groups: Groups) -> Groups:
        """The best of each layer stays: without any there were no layer."""
        best = {key: scores.argmax() for key, scores in groups.items()}
        return {key: scores.index_fill(0, best[key], torch.inf) for key, scores in groups.items()}

    def most(self, groups: int) -> int:
        return groups - 1


class Neuron(_Rows):
    """Outputs of linear layers. Raises ValueError for other layers."""

    def index(self, name: str, layer: nn.Module) -> Tensor:
        if not (isinstance(layer, nn.Linear) or is_conv1d(layer)):
            raise ValueError(f"Neuron: layer '{name}' is a {type(layer).__name__}; use Channel")
        return _each_row(layer)


class Channel(_Rows):
    """Output channels of convolutions. Raises ValueError for other layers."""

    def index(self, name: str, layer: nn.Module) -> Tensor:
        if isinstance(layer, nn.Linear) or is_conv1d(layer):
            raise ValueError(f"Channel: layer '{name}' is a {type(layer).__name__}; use Neuron")
        return _each_row(layer)


class Head(_Rows):
    """Attention heads: the chosen layers of one parent module (query, key and value) share them.

    A head is removed by removing its outputs of all of them; choose at least the value's layer, and
    not the one behind the attention. With grouped queries the groups are the heads: `heads` is the
    number of key-value heads.

    Args:
        heads: how many there are in a layer.
        fused: how many projections are fused in one layer, one after the other (GPT-2's c_attn: 3).

    Raises ValueError for a layer whose outputs do not divide so.
    """

    def __init__(self, heads: int, *, fused: int = 1) -> None:
        self.heads, self.fused = heads, fused

    def index(self, name: str, layer: nn.Module) -> Tensor:
        rows = _each_row(layer)
        width, rest = divmod(len(rows), self.heads * self.fused)
        if rest or not width:
            raise ValueError(
                f"Head: layer '{name}' has {len(rows)} outputs, which are not {self.fused} times "
                f"{self.heads} heads"
            )
        return rows // width % self.heads

    def key(self, name: str) -> str:
        return name.rpartition(".")[0]


class Layer(_Rows):
    """Whole layers, which compete with each other: for the scope `Global`.

    Args:
        blocks: a pattern of module names, e.g. "encoder.layer.*": all chosen layers inside of one
            such module are removed together. None: every layer by itself.

    Raises ValueError for a layer that is in no block.
    """

    def __init__(self, blocks: str | None = None) -> None:
        self.blocks = blocks

    def index(self, name: str, layer: nn.Module) -> Tensor:
        return torch.zeros_like(_each_row(layer))

    def off(self, layers: Layers, kept: Groups) -> dict[str, list[int]]:
        return {}

    def dropped(self, kept: Groups) -> list[str]:
        return [key for key, is_kept in kept.items() if not is_kept.any()]

    def key(self, name: str) -> str:
        if self.blocks is None:
            return name
        key = ".".join(name.split(".")[: self.blocks.count(".") + 1])
        if not fnmatchcase(key, self.blocks):
            raise ValueError(f"Layer: '{name}' is in no block '{self.blocks}'; leave it out")
        return key

    def protect(self, groups: Groups) -> Groups:
        return groups

    def most(self, groups: int) -> int:
        return groups


def _each_row(layer: nn.Module) -> Tensor:
    weight = by_row(layer, layer.weight)
    return torch.arange(weight.shape[0], device=weight.device)


def _like_weight(layer: nn.Module, matrix: Tensor) -> Tensor:
    return matrix.T if is_conv1d(layer) else matrix.reshape(layer.weight.shape)

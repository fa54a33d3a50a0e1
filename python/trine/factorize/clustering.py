"""Weights as numbers of a few values (k-means): for storage."""

from __future__ import annotations

from collections.abc import Callable, Iterable

import torch
from torch import Tensor, nn

from trine.calibration import weight_matrix
from trine.compress.layers import bytes_of, require_module
from trine.factorize.factorize import changed_copy
from trine.factorize.layers import choose_layers
from trine.factorize.matrices import relative_error
from trine.factorize.report import LayerChange
from trine.nn.clustered import ClusteredEmbedding, ClusteredLinear, ClusteredWeight, pack_codes

_CHUNK = 1 << 24  # distances held at a time
_SEEDED = 1 << 14  # points that the first centroids are chosen from


def cluster(
    model: nn.Module,
    bits: int,
    *,
    group: int = 1,
    layers: str | Iterable[str] = "*",
    skip: str | Iterable[str] = (),
    turns: int = 30,
    progress: Callable[[int], None] = lambda done: None,
) -> nn.Module:
    """A copy of `model` whose weights are stored as codes of `bits` bits and a codebook per layer.

    k-means over the weights of a layer (deep compression, Han et al., arXiv:1510.00149), or with
    `group` > 1 over runs of that many weights of a row (vector quantisation; Gong et al.,
    arXiv:1412.6115): 2^bits centroids, bits / group bits a weight. This saves storage, not time:
    the layers decode their weight in every call, which takes longer; `decoded` makes dense layers
    of them again. Codebooks and biases train.

    Args:
        model: any module. It is not touched. nn.Linear, transformers' Conv1D and nn.Embedding are
            changed.
        bits: of a code, 1 to 8.
        group: how many weights of a row share a code; a layer whose columns it does not divide
            stays as it is.
        layers, skip: patterns of fnmatch for names.
        turns: the most rounds of k-means; they end when nothing changes.
        progress: called after each layer with the number that are done.

    Returns:
        The copy with a `report`: the errors are ||W - W'||_F / ||W||_F.

    Raises:
        ValueError: bits or group out of range, no layer to change, a layer asked for by its name
            that must stay, NaN or infinity in a weight, a model that cannot be copied.
    """
    if not 1 <= bits <= 8 or group < 1 or turns < 1:
        raise ValueError(
            f"cluster: bits is {bits}, group is {group}, turns is {turns}; bits must be from 1 to "
            "8, the others at least 1"
        )
    kinds = (nn.Linear, nn.Embedding)
    chosen, stay = choose_layers(model, kinds, layers, skip, "cluster")
    rows, replacements = [], {}
    for name, layer in chosen.items():
        weight, before = weight_matrix(layer), bytes_of(layer)
        reason = stay.get(name)
        if reason is None and weight.shape[1] % group:
            reason = f"{group} does not divide its {weight.shape[1]} columns"
        if reason is None:
            made = _clustered(layer, weight, bits, group, turns)
            if bytes_of(made) < before:
                replacements[layer] = made
                error = relative_error(weight, made.weight.detach())
                what = f"{bits / group:.3g} bits a weight"
                rows.append(LayerChange(name, True, what, before, bytes_of(made), error))
                progress(len(rows))
                continue
            reason = f"codes and codebook would take {bytes_of(made)} bytes"
        rows.append(LayerChange(name, False, reason, before, before))
        progress(len(rows))
    return changed_copy(model, replacements, rows)


def decoded(model: nn.Module) -> nn.Module:
    """A copy in which every layer that `cluster` made is nn.Linear or nn.Embedding again.

    Of the decoded weight: it computes the same, at the speed of a dense layer.

    Raises ValueError where the model holds none, or cannot be copied.
    """
    require_module(model, "decoded")
    layers = {n: m for n, m in model.named_modules() if isinstance(m, ClusteredWeight)}
    if not layers:
        raise ValueError("decoded: the model holds no clustered layer; cluster makes them")
    rows = [
        LayerChange(name, True, "decoded", bytes_of(layer), layer.weight.nbytes)
        for name, layer in layers.items()
    ]
    return changed_copy(model, {layer: _dense(layer) for layer in layers.values()}, rows)


def _clustered(
    layer: nn.Module, weight: Tensor, bits: int, group: int, turns: int
) -> ClusteredWeight:
    rows, columns = weight.shape
    centroids, codes = kmeans(weight.reshape(-1, group).float(), 2**bits, turns)
    if isinstance(layer, nn.Embedding):
        made = ClusteredEmbedding(rows, columns, bits, group, layer.padding_idx, device="meta")
    else:
        made = ClusteredLinear(columns, rows, bits, group, layer.bias is not None, device="meta")
        if layer.bias is not None:
            made.bias = nn.Parameter(layer.bias.detach().clone())
    made.codebook = nn.Parameter(centroids.to(weight.dtype))
    made.codes = pack_codes(codes.reshape(rows, columns // group), bits)
    return made.train(layer.training)


def _dense(layer: ClusteredWeight) -> nn.Module:
    weight = nn.Parameter(layer.weight.detach().contiguous())
    if isinstance(layer, ClusteredEmbedding):
        sizes = layer.num_embeddings, layer.embedding_dim
        made = nn.Embedding(*sizes, layer.padding_idx, device="meta")
    else:
        sizes = layer.in_features, layer.out_features
        made = nn.Linear(*sizes, layer.bias is not None, device="meta")
        if layer.bias is not None:
            made.bias = nn.Parameter(layer.bias.detach().clone())
    made.weight = weight
    return made.train(layer.training)


def kmeans(points: Tensor, k: int, turns: int) -> tuple[Tensor, Tensor]:
    """Lloyd's algorithm: k centroids [k, D] of points [M, D], and the nearest of each point [M].

    Numbers (D = 1) start from centroids at equal distances from the least to the largest, which
    keeps the rare large weights (Han et al., section 3.2), vectors from k-means++ of a fixed seed.
    A centroid that no point is nearest to moves to the point that is worst off.
    """
    centroids = _spaced(points, k) if points.shape[1] == 1 else _spread(points, k)
    nearest, distances = _nearest(points, centroids)
    for _ in range(turns):
        counts = torch.bincount(nearest, minlength=k)
        sums = torch.zeros(k, points.shape[1], dtype=torch.double, device=points.device)
        sums.index_add_(0, nearest, points.double())
        moved = (sums / counts.clamp(min=1)[:, None]).to(points.dtype)
        empty = (counts == 0).nonzero()[:, 0][: len(points)]
        moved[empty] = points[distances.topk(len(empty)).indices]
        before, centroids = nearest, moved
        nearest, distances = _nearest(points, centroids)
        if torch.equal(nearest, before):
            break
    return centroids, nearest


def _nearest(points: Tensor, centroids: Tensor) -> tuple[Tensor, Tensor]:
    """The number of the nearest centroid of each point, and the squared distance to it."""
    if points.shape[1] == 1:
        ordered, order = centroids[:, 0].sort()
        middles = (ordered[1:] + ordered[:-1]) / 2
        nearest = order[torch.bucketize(points[:, 0], middles)]
    else:
        parts = points.split(max(1, _CHUNK // len(centroids)))
        nearest = torch.cat([torch.cdist(part, centroids).argmin(1) for part in parts])
    return nearest, (points - centroids[nearest]).square().sum(1)


def _spaced(points: Tensor, k: int) -> Tensor:
    low, high = points.min().item(), points.max().item()
    return torch.linspace(low, high, k, device=points.device, dtype=points.dtype)[:, None]


def _spread(points: Tensor, k: int) -> Tensor:
    """k-means++ (Arthur and Vassilvitskii 2007) on a sample: each far from those before."""
    generator = torch.Generator().manual_seed(0)
    sample = points[torch.randperm(len(points), generator=generator)[:_SEEDED].to(points.device)]
    chosen = [sample[0]]
    distances = (sample - chosen[0]).square().sum(1)
    for _ in range(k - 1):
        total = distances.double().cumsum(0).cpu()
        at = torch.rand(1, generator=generator, dtype=torch.double) * total[-1]
        chosen.append(sample[min(int(torch.searchsorted(total, at)), len(sample) - 1)])
        distances = torch.minimum(distances, (sample - chosen[-1]).square().sum(1))
    return torch.stack(chosen)

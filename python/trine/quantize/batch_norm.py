"""Batch norms that the layer before them takes up: its weights are scaled, its bias is shifted."""

from __future__ import annotations

import copy

import torch
from torch import Tensor, distributed
from torch.nn.modules.batchnorm import _BatchNorm

from trine.quantize.followed import Followed


class FoldedNorm(Followed):
    """A batch norm inside of the layer that it follows, whose weights are quantised as folded.

    With running statistics mu, sigma^2 (eps is in it), batch statistics mu_B, sigma_B^2, and a
    layer y = W x + b, the layer in evaluation is

        Q(W gamma / sigma) x + beta + (b - mu) gamma / sigma.

    In training it is, as Krishnamoorthi 2018 (arXiv:1806.08342, section 3.2.2) has it, with weights
    that do not jump from batch to batch,

        Q(W gamma / sigma) x * sigma / sigma_B + beta - (mu_B - b) gamma / sigma_B,

    mu_B and sigma_B of the float products W x + b, through which gradients flow, too. Once it is
    frozen, training computes what evaluation does.

    Parameters and buffers are those of the batch norm. Running statistics move when `update` is
    called (by `QatSchedule`): by the mean over the batches and the processes since. `seen` is
    [2N + 1]: the sums of their means and unbiased variances, and how many they were.

    Args:
        norm: it is copied.
    """

    NOTHING = 0.0

    def __init__(self, norm: _BatchNorm) -> None:
        mean = norm.running_mean
        super().__init__(torch.empty(2 * mean.numel() + 1, device=mean.device))
        self.eps, self.momentum = norm.eps, norm.momentum
        self.weight, self.bias = copy.deepcopy(norm.weight), copy.deepcopy(norm.bias)
        for name in ("running_mean", "running_var", "num_batches_tracked"):
            self.register_buffer(name, copy.deepcopy(getattr(norm, name)))
        self.was_moved = False

    def fold_weight(self, weight: Tensor) -> Tensor:
        """W gamma / sigma, in the shape [N, ...] and the dtype of `weight`."""
        factor = _followed_by(self._over(self._sigma()), weight.dim() - 1)
        return (weight.float() * factor).to(weight.dtype)

    def fold_bias(self, bias: Tensor | None, dtype: torch.dtype) -> Tensor:
        """beta + (b - mu) gamma / sigma, [N]."""
        mean = self.running_mean.float()
        shift = -mean if bias is None else bias.float() - mean
        return self._shifted(shift * self._over(self._sigma())).to(dtype)

    def of_batch(self, y: Tensor, products: Tensor, bias: Tensor | None) -> Tensor:
        """What the layer gives in training, until it is frozen.

        Args:
            y: [B, N, ...] Q(W gamma / sigma) x.
            products: [B, N, ...] W x, in floats.
            bias: b [N] or None.

        Raises ValueError where there is one value for each of the N.
        """
        values = products.numel() // max(1, products.shape[1])
        if values == 1:
            raise ValueError(
                f"a batch norm in training needs more than one value for each of its "
                f"{products.shape[1]} channels; the batch has one"
            )
        over = [dim for dim in range(products.dim()) if dim != 1]
        variance, mean = torch.var_mean(products.float(), over, correction=0)
        self._watch(mean if bias is None else mean + bias, variance * (values / (values - 1)))
        sigma = (variance + self.eps).sqrt()
        shift = self._shifted(-mean * self._over(sigma))
        if bias is not None:
            shift = shift + 0 * bias  # DistributedDataParallel wants a gradient of every parameter
        ratio, shift = (_followed_by(t, y.dim() - 2) for t in (self._sigma() / sigma, shift))
        return (y.float() * ratio + shift).to(y.dtype)

    def _sigma(self) -> Tensor:
        return (self.running_var.float() + self.eps).sqrt()

    def _over(self, sigma: Tensor) -> Tensor:
        """gamma / sigma."""
        return 1 / sigma if self.weight is None else self.weight.float() / sigma

    def _shifted(self, values: Tensor) -> Tensor:
        return values if self.bias is None else values + self.bias.float()

    @torch.no_grad()
    def _watch(self, mean: Tensor, variance: Tensor) -> None:
        self.seen.add_(torch.cat((mean, variance, mean.new_ones(1))))

    def _reduction(self) -> distributed.ReduceOp:
        return distributed.ReduceOp.SUM

    def _move(self) -> None:
        count = self.seen[-1]
        if count == 0:
            return
        self.num_batches_tracked += 1
        share = 1 / self.num_batches_tracked.item() if self.momentum is None else self.momentum
        mean, variance = (self.seen[:-1] / count).chunk(2)
        self.running_mean.lerp_(mean.to(self.running_mean.dtype), share)
        self.running_var.lerp_(variance.to(self.running_var.dtype), share)
        self.was_moved = True

    def require_moved(self) -> None:
        """Raises ValueError where a training has left the running statistics behind."""
        if self.seen[-1] and not self.was_moved:
            raise ValueError(
                "its batch norm has seen batches, but its running statistics were never moved; "
                "call QatSchedule(model).step() after each update of the weights"
            )

    def extra_repr(self) -> str:
        return f"{self.running_mean.numel()}, eps={self.eps}, momentum={self.momentum}"


def _followed_by(values: Tensor, dims: int) -> Tensor:
    """values [N] as [N, 1, ...], with so many dimensions more."""
    return values.reshape(-1, *[1] * dims)

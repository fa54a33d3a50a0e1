"""RMSNorm that quantises its result once, for all the packed layers that read it."""

import torch
from torch import Tensor, nn

from trine.ops import QuantizedRows


class QuantizingRMSNorm(nn.Module):
    """Takes the place of an RMSNorm that only `Int8Linear` and `TernaryLinear` read.

    In a Llama block, say, where query, key and value (or gate and up) follow a norm:

        block.input_layernorm = QuantizingRMSNorm(norm.weight, norm.variance_epsilon)

    What it returns is a `QuantizedRows`, which such layers take in place of the tensor. Where a
    gradient is wanted it returns the tensor of `torch.nn.functional.rms_norm`, and the layers
    quantise it themselves. The state is the norm's. Put it in after loading: checkpoints of
    `trine.save` hold the model with the norms that it was built with.

    The norm is that of torch.nn.RMSNorm, whose result is rounded once. (transformers' norms round
    before they multiply by the weight, too: in bfloat16 and float16 theirs differ by a rounding.)

    Args:
        weight: [K], shared, not copied; or None.
        eps: None is torch.finfo(x.dtype).eps.
    """

    weight: nn.Parameter | None

    def __init__(self, weight: nn.Parameter | None, eps: float | None = None) -> None:
        super().__init__()
        self.register_parameter("weight", weight)
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor | QuantizedRows:
        weight = self.weight
        wanted = x.requires_grad or (weight is not None and weight.requires_grad)
        if torch.is_grad_enabled() and wanted:
            return nn.functional.rms_norm(x, x.shape[-1:], weight, self.eps)
        return QuantizedRows.of_rms_norm(x, weight, self.eps)

    def extra_repr(self) -> str:
        return f"{None if self.weight is None else len(self.weight)}, eps={self.eps}"

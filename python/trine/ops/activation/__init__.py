"""The activations that linear ops apply in fp32 to what they computed, before they round it.

csrc/common/activation.h defines them and says how far they are from their formulas.
"""

import torch
from torch import Tensor

# By name the number that operators take: C++'s enum Activation.
CODES = {"relu": 1, "gelu": 2, "gelu_tanh": 3}


def activation_code(op: str, activation: str | None) -> int:
    """What the operator `op` takes for this name; 0 for None. Raises ValueError for another one."""
    if activation is None:
        return 0
    if activation not in CODES:
        raise ValueError(
            f"{op}: activation is {activation!r}; it must be None, 'relu', 'gelu' or 'gelu_tanh'"
        )
    return CODES[activation]


def check_code(op: str, code: int) -> None:
    """Raise ValueError for a number that the operators do not take."""
    if code not in (0, *CODES.values()):
        raise ValueError(
            f"{op}: activation must be 0 (none), 1 (relu), 2 (gelu) or 3 (gelu_tanh), it is {code}"
        )


def gradient(code: int, grad_y: Tensor, x: Tensor) -> Tensor:
    """The gradient to `x`, float32, of the activation with this number: that of its formula."""
    if code == CODES["relu"]:
        return torch.where(x > 0, grad_y, 0.0)
    approximate = "tanh" if code == CODES["gelu_tanh"] else "none"
    return torch.ops.aten.gelu_backward(grad_y, x, approximate=approximate)

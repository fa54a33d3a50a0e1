"""What the weights of transformers' BitNet layers mean, in trine's terms.

Its two linear classes store one scale with opposite meanings, and three forms of weight:

| class, mode            | weight                       | y                               |
|------------------------|------------------------------|---------------------------------|
| BitLinear              | uint8 [N/4, K], packed       | acc / (weight_scale * s) + bias |
| AutoBitLinear, offline | float codes; a file may pack | (acc / s + bias) * weight_scale |
| AutoBitLinear, online  | float, quantised every call  | (acc / s) * mean(abs(w)) + bias |

with s = 127 / max(absmax, 1e-5) of each row of x and acc the product of codes. trine computes
(acc * (absmax / 127)) * weight_scale + bias, so the first scale is inverted and the second class's
bias is multiplied by its scale.
"""

import torch
from torch import Tensor

ROWS_PER_BYTE = 4


def unpack_codes(packed: Tensor) -> Tensor:
    """int8 [N, K] from uint8 [N / 4, K]: bits 2i and 2i + 1 of row r are row i * N / 4 + r."""
    codes = torch.cat([packed >> shift & 3 for shift in range(0, 2 * ROWS_PER_BYTE, 2)])
    if (codes == 3).any():
        raise ValueError("a packed weight holds the code 3; only 0, 1 and 2 stand for -1, 0 and 1")
    return codes.to(torch.int8) - 1


def codes_of(weight: Tensor) -> Tensor:
    """int8 [N, K] from a weight of transformers' offline mode, packed or as floats."""
    if weight.dtype == torch.uint8:
        return unpack_codes(weight)
    codes = weight.to(torch.int8)
    if not (torch.equal(codes.to(weight.dtype), weight) and (codes.abs() <= 1).all()):
        raise ValueError(
            "an unpacked weight holds values other than -1, 0 and 1; weights that are quantised in "
            'every call belong to a model whose quantization_mode is "online"'
        )
    return codes


def quantize_online(weight: Tensor) -> tuple[Tensor, Tensor]:
    """Codes and float32 scale [1] of transformers' `WeightQuant`: by 1 / mean |w|.

    The scale is rounded to the weight's dtype, as transformers' quantised weight is.
    """
    wide = weight.float()
    if not wide.isfinite().all():
        raise ValueError("the weight holds NaN or infinity; it cannot be quantised")
    inverse = 1.0 / wide.abs().mean().clamp(min=1e-5)
    codes = (wide * inverse).round().clamp(-1, 1).to(torch.int8)
    return codes, (1.0 / inverse).to(weight.dtype).float().reshape(1)


def scale_and_bias(
    weight_scale: Tensor, bias: Tensor | None, *, divides: bool
) -> tuple[Tensor, Tensor | None]:
    """trine's float32 scale and bias from those of an offline layer.

    divides: whether the layer divides by its scale (BitLinear) or multiplies (AutoBitLinear).

    Raises ValueError for a scale that is zero, NaN or infinite.
    """
    scale = weight_scale.float().reshape(-1)
    if not (scale.isfinite() & (scale != 0)).all():
        raise ValueError(f"weight_scale is {scale.tolist()}; it must be finite and not zero")
    if divides:
        return 1.0 / scale, bias
    return scale, None if bias is None else (bias.float() * scale).to(bias.dtype)

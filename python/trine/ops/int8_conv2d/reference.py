"""What `int8_conv2d` means, in plain PyTorch. Slow and obvious; tests compare against it.

Integer sums are taken in float64, where they are exact; every other step rounds to fp32 once, in
the order that the kernels keep.
"""

from torch import Tensor
from torch.nn import functional

from trine.ops.int8_conv2d.pack import unpack_conv2d
from trine.ops.quantize_rows.reference import quantize_rows, quantize_rows_static


def int8_conv2d(
    x: Tensor,
    packed_weight: Tensor,
    weight_scale: Tensor,
    bias: Tensor | None = None,
    *,
    stride: tuple[int, int] = (1, 1),
    padding: tuple[int, int] = (0, 0),
    dilation: tuple[int, int] = (1, 1),
    groups: int = 1,
    input_scale: Tensor | None = None,
    input_zero_point: Tensor | None = None,
) -> Tensor:
    kernel = packed_weight.shape[1:3] if packed_weight.dim() == 4 else packed_weight.shape[2:4]
    shape = (len(weight_scale), x.shape[1] // groups, *kernel)
    images = x.flatten(1)
    if input_scale is None:
        q, scale, _ = quantize_rows(images)
        zero_point = 0
    else:
        q, scale = quantize_rows_static(images, input_scale, input_zero_point)
        zero_point = 0 if input_zero_point is None else int(input_zero_point)
    # The padding stands for 0, which is the zero point.
    values = (q.double() - zero_point).reshape(x.shape)
    weight = unpack_conv2d(packed_weight, shape).double()
    acc = functional.conv2d(values, weight, None, stride, padding, dilation, groups).float()
    y = (acc * scale[:, None, None, None]) * weight_scale[:, None, None]
    if bias is not None:
        y = y + bias.float()[:, None, None]
    return y.to(x.dtype)

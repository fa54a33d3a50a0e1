"""A model's tensors as a GGUF file: TQ2_0 or TQ1_0 for ternary layers, Q8_0 for INT8 ones."""

from __future__ import annotations

from collections.abc import Callable
from os import PathLike
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from trine.compress.layers import require_module
from trine.export.files import written_beside
from trine.nn import Int8Linear, PackedLinear, TernaryLinear
from trine.ops import unpack_int8, unpack_ternary

_TERNARY_BLOCK, _INT8_BLOCK = 256, 32  # consecutive columns of a row that share a scale
TERNARY_TYPES = ("TQ2_0", "TQ1_0")


def to_gguf(
    model: nn.Module,
    path: str | PathLike,
    *,
    ternary: str = "TQ2_0",
    name: Callable[[str], str] = str,
    architecture: str = "trine",
) -> None:
    """Write every tensor of `model` to a GGUF file.

    Codes are exact; GGUF's scales are float16, so that a weight may differ by 2^-11 of itself.
    Biases, norms and all that is not packed keep their values: float32 and float16 as they are,
    bfloat16 as BF16. What a program needs to run the model (names of its own, hyperparameters) is
    for the caller to know: this writes tensors.

    Args:
        model: with `TernaryLinear` or `Int8Linear` layers, or none.
        path: replaced in one step.
        ternary: "TQ2_0" (2.06 bits a weight, quicker) or "TQ1_0" (1.69 bits).
        name: what a tensor is called in the file, from its name here, a layer's weight being
            "layer.weight"; gguf.TensorNameMap has those of llama.cpp.
        architecture: the file's general.architecture.

    Raises:
        ValueError: K of a layer is not a multiple of 256 (INT8: 32), the group size of its scales
            is not a multiple of 256, a scale is beyond float16, a layer is of another kind or has
            static activations; gguf is missing.
    """
    require_module(model, "to_gguf")
    gguf = _library()
    if ternary not in TERNARY_TYPES:
        raise ValueError(f"to_gguf: ternary is {ternary!r}; it must be one of {TERNARY_TYPES}")
    tensors = _tensors_of(model, ternary)  # checked before a file is made
    with written_beside(path) as part:
        writer = gguf.GGUFWriter(part, architecture)
        for key, (values, kind) in tensors.items():
            raw = None if kind is None else gguf.GGMLQuantizationType[kind]
            writer.add_tensor(name(key), values, raw_dtype=raw)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()


def blocks_of(layer: PackedLinear, ternary: str = "TQ2_0") -> tuple[np.ndarray, str]:
    """The weight of a layer as GGUF's blocks, uint8 [N, bytes of a row], and their type's name.

    Raises ValueError as `to_gguf` does.
    """
    k = layer.in_features
    if isinstance(layer, TernaryLinear):
        _check_divides(k, _TERNARY_BLOCK, f"in_features = {k}", ternary)
        codes = unpack_ternary(layer.packed_weight.cpu(), k)
        return _ternary_blocks(codes, _float16(_scales(layer)), ternary), ternary
    if isinstance(layer, Int8Linear):
        if layer.input_scale is not None:
            raise ValueError("its activations are static, which GGUF cannot hold")
        _check_divides(k, _INT8_BLOCK, f"in_features = {k}", "Q8_0")
        codes = unpack_int8(layer.packed_weight.cpu(), k)
        return _int8_blocks(codes, _float16(layer.weight_scale.cpu()[:, None])), "Q8_0"
    raise ValueError(
        f"a {type(layer).__name__} has no type in GGUF; only ternary and INT8 have one"
    )


def _tensors_of(model: nn.Module, ternary: str) -> dict[str, tuple[np.ndarray, str | None]]:
    found: dict[str, tuple[np.ndarray, str | None]] = {}
    inside: set[str] = set()
    for path, layer in model.named_modules():
        if isinstance(layer, PackedLinear):
            prefix = f"{path}." if path else ""
            try:
                found[f"{prefix}weight"] = blocks_of(layer, ternary)
            except ValueError as error:
                raise ValueError(f"to_gguf: layer {path!r}: {error}") from error
            rest = layer._buffers.keys() - set(layer.float_buffers)
            inside |= {prefix + key for key in rest}
    for key, tensor in model.state_dict().items():
        if key not in inside:
            found[key] = _plain(tensor)
    return found


def _plain(tensor: Tensor) -> tuple[np.ndarray, str | None]:
    values = tensor.detach().cpu().contiguous()
    if values.dtype == torch.bfloat16:
        return values.view(torch.uint8).numpy(), "BF16"
    return values.numpy(), None


def _scales(layer: TernaryLinear) -> Tensor:
    """float32 [N or 1, K / 256 or 1]: one for each block."""
    scale = layer.weight_scale.cpu()
    if scale.dim() < 2:
        return scale[:, None]
    size = layer.in_features // scale.shape[1]
    _check_divides(size, _TERNARY_BLOCK, f"the group size {size}", "a ternary type")
    return scale.repeat_interleave(size // _TERNARY_BLOCK, 1)


def _ternary_blocks(codes: Tensor, scales: np.ndarray, ternary: str) -> np.ndarray:
    """gguf's own packing of the codes, as if their scale were 1; then the scale."""
    gguf = _library()
    n, k = codes.shape
    packed = gguf.quants.quantize(codes.float().numpy(), gguf.GGMLQuantizationType[ternary])
    blocks = packed.reshape(n, k // _TERNARY_BLOCK, -1)
    blocks[:, :, -2:] = np.broadcast_to(scales, blocks.shape[:2])[..., None].view(np.uint8)
    return blocks.reshape(n, -1)


def _int8_blocks(codes: Tensor, scales: np.ndarray) -> np.ndarray:
    n, k = codes.shape
    values = codes.numpy().view(np.uint8).reshape(n, k // _INT8_BLOCK, _INT8_BLOCK)
    scale = np.ascontiguousarray(np.broadcast_to(scales, values.shape[:2]))[..., None]
    return np.concatenate([scale.view(np.uint8), values], axis=-1).reshape(n, -1)


def _float16(scales: Tensor) -> np.ndarray:
    half = scales.half()
    lost = ~half.isfinite() | ((half == 0) & (scales != 0))
    if lost.any():
        raise ValueError(
            f"its weight_scale {scales[lost][0].item():.3g} is beyond float16, in which GGUF keeps "
            "scales"
        )
    return half.numpy()


def _check_divides(size: int, block: int, what: str, kind: str) -> None:
    if size % block:
        raise ValueError(f"{what} is not a multiple of {block}, the block of {kind}")


def _library() -> Any:
    try:
        import gguf
    except ImportError as error:
        raise ValueError("to_gguf needs gguf; pip install 'trine[export]'") from error
    return gguf

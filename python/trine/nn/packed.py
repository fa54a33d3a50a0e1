"""What the packed linear layers share: their state, its dtypes, and how it is loaded."""

from collections.abc import Callable
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.sparse import SparseSemiStructuredTensor

from trine.nn.dense_weight import DenseWeight

FLOAT_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


class PackedLayer(nn.Module):
    """A layer whose compressed weight lies in buffers, with the dtypes that its kernel needs.

    It takes the place of a layer of torch.nn; a checkpoint knows it by its `kind`.

    Only the buffers named in `float_buffers` follow `.half()` and `.to(dtype)`; codes and scales
    keep their dtype. Constructing one makes it empty, to be loaded; until then it gives NaN, so
    that a forgotten load shows.
    """

    kind: ClassVar[str]
    float_buffers: tuple[str, ...] = ("bias",)

    bias: Tensor | None
    weight_scale: Tensor | None

    def __init__(self, dtype: torch.dtype | str | None) -> None:
        super().__init__()
        self._dtype = _float_dtype(dtype)

    def _add_buffer(
        self,
        name: str,
        shape: tuple[int, ...] | None,
        dtype: torch.dtype,
        device: torch.device | str | None,
    ) -> None:
        """Register a buffer that is yet to be loaded, or None where `shape` is None."""
        unset = torch.nan if dtype.is_floating_point else 0
        buffer = None if shape is None else torch.full(shape, unset, dtype=dtype, device=device)
        self.register_buffer(name, buffer)

    def _add_input_grid(self, is_static: bool, device: torch.device | str | None) -> None:
        """The buffers of activations that have one scale and zero point, or None."""
        shape = (1,) if is_static else None
        self._add_buffer("input_scale", shape, torch.float32, device)
        self._add_buffer("input_zero_point", shape, torch.int32, device)

    def _set_input_grid(
        self, scale: Tensor | None, zero_point: Tensor | None, device: torch.device
    ) -> None:
        """Fill those buffers; the zero point is 0 where it is None."""
        if scale is None:
            return
        zero = torch.zeros(1) if zero_point is None else zero_point
        self.input_scale = scale.detach().to(device, torch.float32).reshape(1)
        self.input_zero_point = zero.detach().to(device, torch.int32).reshape(1)

    @property
    def dtype(self) -> torch.dtype:
        """The layer's float dtype: that of `weight` and of the bias."""
        following = (self._buffers[name] for name in self.float_buffers)
        return next((tensor.dtype for tensor in following if tensor is not None), self._dtype)

    @property
    def device(self) -> torch.device:
        return next(tensor.device for tensor in self._buffers.values() if tensor is not None)

    @property
    def weight(self) -> Tensor:
        """The dense weight that the packed one stands for, of the float layer's shape; read-only.

        It is unpacked when its values are used, each time; its dtype and device cost nothing.
        """
        return self.dense_weight() if torch.compiler.is_compiling() else DenseWeight(self)

    def dense_weight(self) -> Tensor:
        """`weight` as a plain tensor of its own."""
        return self._dense_weight().to(self.dtype)

    def _dense_weight(self) -> Tensor:
        raise NotImplementedError

    def weight_shape(self) -> tuple[int, ...]:
        """Of `weight`."""
        raise NotImplementedError

    def config(self) -> dict[str, Any]:
        """The constructor arguments that make this layer again, empty; JSON can hold them."""
        raise NotImplementedError

    def extra_repr(self) -> str:
        return ", ".join(f"{name}={value}" for name, value in self.config().items())

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "PackedLayer":
        following = {id(self._buffers[name]) for name in self.float_buffers}

        def keep_dtype(tensor: Tensor) -> Tensor:
            moved = fn(tensor)
            if moved.dtype == tensor.dtype or id(tensor) in following:
                return moved
            return tensor.to(moved.device)

        self._dtype = fn(torch.empty(0, dtype=self.dtype, device=self.device)).dtype
        return super()._apply(keep_dtype, recurse)

    def _load_from_state_dict(
        self, state_dict, prefix, local_metadata, strict, missing_keys, unexpected_keys, error_msgs
    ) -> None:
        errors = self._loading_errors(state_dict, prefix)
        if errors:  # reported by load_state_dict; nothing of this layer changes
            error_msgs.extend(errors)
            return
        super()._load_from_state_dict(
            state_dict, prefix, local_metadata, strict, missing_keys, unexpected_keys, error_msgs
        )

    def _loading_errors(self, state_dict: dict[str, Tensor], prefix: str) -> list[str]:
        """What is wrong with the part of `state_dict` that is meant for this layer."""
        given = [name for name in self._buffers if prefix + name in state_dict]
        if not given:
            return []  # a partial checkpoint; load_state_dict(strict=True) reports it
        errors = []
        for name, buffer in self._buffers.items():
            key, tensor = prefix + name, state_dict.get(prefix + name)
            if buffer is None and tensor is not None:
                errors.append(f"{key}: {type(self).__name__} was made without {name}.")
            elif buffer is not None and tensor is None:
                errors.append(f"{key} is missing, though {prefix + given[0]} is there.")
            elif buffer is not None and tensor.shape != buffer.shape:
                errors.append(
                    f"{key} has shape {list(tensor.shape)}, expected {list(buffer.shape)}."
                )
            elif buffer is not None and not self._dtype_fits(name, tensor):
                errors.append(
                    f"{key} is {tensor.dtype}, expected {buffer.dtype}; "
                    "the checkpoint was cast after packing."
                )
        return errors

    def _dtype_fits(self, name: str, tensor: Tensor) -> bool:
        if name in self.float_buffers:
            return tensor.dtype in FLOAT_DTYPES
        return tensor.dtype == self._buffers[name].dtype


class PackedLinear(PackedLayer):
    """A linear layer with a frozen compressed weight, called like `torch.nn.Linear`.

    Gradients flow to the input alone. `from_linear` packs a dense layer.
    """

    takes_quantized_rows = False  # `trine.ops.QuantizedRows` in place of x

    def __init__(
        self, in_features: int, out_features: int, dtype: torch.dtype | str | None
    ) -> None:
        super().__init__(dtype)
        self.in_features = in_features
        self.out_features = out_features

    def weight_shape(self) -> tuple[int, int]:
        return self.out_features, self.in_features

    def forward(self, x: Tensor) -> Tensor:
        return self.with_bias(x, self._buffers["bias"])

    def with_bias(self, x: Tensor, bias: Tensor | None) -> Tensor:
        """What the layer gives with this bias in place of its own."""
        if x.dim() == 0 or x.shape[-1] != self.in_features:
            raise ValueError(
                f"{type(self).__name__}: the input has shape {list(x.shape)}, "
                f"expected [..., {self.in_features}]"
            )
        return self._run_op(x, bias)

    def _run_op(self, x: Tensor, bias: Tensor | None) -> Tensor:
        """Calls the op. Reads `_buffers`: an attribute that nn.Module looks up costs 0.5 us."""
        raise NotImplementedError

    def _options(self) -> dict[str, Any]:
        """The constructor's arguments beyond those of nn.Linear, as JSON can hold them."""
        return {}

    def config(self) -> dict[str, Any]:
        return {
            "in_features": self.in_features,
            "out_features": self.out_features,
            "bias": self.bias is not None,
            "dtype": str(self.dtype).removeprefix("torch."),
            **self._options(),
        }


def activation_option(activation: str | None) -> dict[str, Any]:
    """What `_options` says of it: nothing without one, as in checkpoints from before there was."""
    return {} if activation is None else {"activation": activation}


def dense_parts(linear: nn.Module) -> tuple[Tensor, Tensor | None]:
    """The weight [N, K] and bias of a dense layer that is to be packed, without their history.

    Takes `torch.nn.Linear` and transformers' `Conv1D` (whose weight is [K, N]); a weight may be one
    that PyTorch compressed (`torch.sparse.SparseSemiStructuredTensor`). Raises ValueError
    for another class, for a dtype that the kernels lack, and for NaN or infinite weights.
    """
    if not isinstance(linear, nn.Linear) and not is_conv1d(linear):
        raise ValueError(
            "from_linear takes torch.nn.Linear or transformers' Conv1D; "
            f"got {type(linear).__name__}"
        )
    weight = linear.weight.detach()
    if isinstance(weight, SparseSemiStructuredTensor):
        weight = weight.to_dense()
    if weight.dtype not in FLOAT_DTYPES:
        raise ValueError(
            f"from_linear: the weight is {weight.dtype}; convert the layer to float32, bfloat16 or "
            "float16 first"
        )
    if weight.is_meta:
        raise ValueError("from_linear: the weight is on the meta device; load the layer first")
    if not weight.isfinite().all():
        raise ValueError("from_linear: the weight holds NaN or infinity; it cannot be quantised")
    bias = None if linear.bias is None else linear.bias.detach().clone()
    return weight.T if is_conv1d(linear) else weight, bias


def is_conv1d(module: nn.Module) -> bool:
    """Whether `module` is transformers' `Conv1D`: a linear layer with a transposed weight."""
    return any(
        base.__name__ == "Conv1D" and base.__module__ == "transformers.pytorch_utils"
        for base in type(module).__mro__
    )


def _float_dtype(dtype: torch.dtype | str | None) -> torch.dtype:
    if dtype is None:
        return torch.get_default_dtype()
    found = getattr(torch, dtype, None) if isinstance(dtype, str) else dtype
    if found not in FLOAT_DTYPES:
        raise ValueError(f"dtype is {dtype!r}; it must be float32, bfloat16 or float16")
    return found

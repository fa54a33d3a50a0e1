"""BitNet checkpoints read straight into packed layers, through transformers' own loading."""

from __future__ import annotations

from os import PathLike
from typing import Any

from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel
from transformers.core_model_loading import ConversionOps, WeightConverter, WeightRenaming
from transformers.quantizers import HfQuantizer, register_quantization_config, register_quantizer
from transformers.quantizers.quantizers_utils import should_convert_module
from transformers.utils.quantization_config import BitNetQuantConfig

from trine.compress.save_pretrained import prepare_save_pretrained
from trine.hugging_face.bitnet_weights import codes_of, quantize_online, scale_and_bias
from trine.hugging_face.loaded import check_loaded
from trine.nn import NormedTernaryLinear, TernaryLinear
from trine.ops import pack_ternary

METHOD = "trine-bitnet"
_OF_THE_HUB = ("cache_dir", "force_download", "local_files_only", "revision", "subfolder", "token")


def load_bitnet(path: str | PathLike, **loading: Any) -> PreTrainedModel:
    """See `trine.from_bitnet`."""
    config = loading.pop("config", None) or AutoConfig.from_pretrained(
        path, **{key: loading[key] for key in _OF_THE_HUB if key in loading}
    )
    stored = getattr(config, "quantization_config", None)
    stored = stored if isinstance(stored, dict) or stored is None else stored.to_dict()
    if stored is None or stored.get("quant_method") != "bitnet":
        raise ValueError(
            f"from_bitnet: the configuration of {str(path)!r} has no quantization_config with "
            'quant_method "bitnet"; a float model is made small with trine.compress'
        )
    config.quantization_config = {**stored, "quant_method": METHOD}
    model = AutoModelForCausalLM.from_pretrained(path, config=config, **loading)
    prepare_save_pretrained(model)
    return model.eval()


def without_quantization(model: PreTrainedModel) -> None:
    """Takes transformers' marks of a quantisation method off a model."""
    for owner, name in (
        (model, "hf_quantizer"),
        (model, "quantization_method"),
        (model, "is_quantized"),
        (getattr(model, "config", None), "quantization_config"),
    ):
        if name in vars(owner):
            delattr(owner, name)


@register_quantization_config(METHOD)
class _BitNetFileConfig(BitNetQuantConfig):
    """A file's own BitNet configuration, to be read by `_BitNetFileQuantizer`."""

    def __init__(self, **stored: Any) -> None:
        super().__init__(**stored)
        self.quant_method = METHOD

    @property
    def online(self) -> bool:
        return self.linear_class == "autobitlinear" and self.quantization_mode == "online"


@register_quantizer(METHOD)
class _BitNetFileQuantizer(HfQuantizer):
    """Packed layers in place of the linear ones before loading; their scales' meaning after it."""

    quantization_config: _BitNetFileConfig

    is_trainable = False

    def is_serializable(self) -> bool:
        return False

    def _process_model_before_weight_loading(self, model: PreTrainedModel, **kwargs: Any) -> None:
        stored = self.quantization_config
        kept = self.get_modules_to_not_convert(
            model, stored.modules_to_not_convert, model._keep_in_fp32_modules
        )
        for name, module in list(model.named_modules()):
            if isinstance(module, nn.Linear) and should_convert_module(name, kept):
                model.set_submodule(name, self._empty(module))

    def _empty(self, linear: nn.Linear) -> TernaryLinear:
        stored = self.quantization_config
        shape = linear.in_features, linear.out_features, linear.bias is not None
        dtype = linear.weight.dtype
        if stored.use_rms_norm:
            eps = stored.rms_norm_eps
            return NormedTernaryLinear(*shape, eps=eps, device="meta", dtype=dtype)
        return TernaryLinear(*shape, device="meta", dtype=dtype)

    def get_weight_conversions(self) -> list[WeightConverter | WeightRenaming]:
        codes = WeightConverter(r"\.weight$", ".packed_weight", [_ToPackedWeight(self)])
        return [WeightRenaming(r"\.rms_norm\.weight$", ".norm_weight"), codes]

    def _process_model_after_weight_loading(self, model: PreTrainedModel, **kwargs: Any) -> None:
        check_loaded(model)
        divides = self.quantization_config.linear_class == "bitlinear"
        for name, layer in model.named_modules():
            if isinstance(layer, TernaryLinear) and not self.quantization_config.online:
                try:
                    layer.weight_scale, layer.bias = scale_and_bias(
                        layer.weight_scale, layer.bias, divides=divides
                    )
                except ValueError as error:
                    raise ValueError(f"from_bitnet: layer {name!r}: {error}") from error
        model._weight_conversions = None  # the names in the model are now those to be saved
        without_quantization(model)


class _ToPackedWeight(ConversionOps):
    """Any form of BitNet weight to trine's, on integers."""

    def __init__(self, hf_quantizer: _BitNetFileQuantizer) -> None:
        self.hf_quantizer = hf_quantizer  # its presence keeps the file's dtype

    def convert(
        self,
        input_dict: dict[str, list[Tensor]],
        *,
        full_layer_name: str,
        model: nn.Module,
        **_: Any,
    ) -> dict[str, Tensor]:
        (weight,) = next(iter(input_dict.values()))
        layer = full_layer_name.removesuffix(".packed_weight")
        if not self.hf_quantizer.quantization_config.online:
            return {full_layer_name: pack_ternary(codes_of(weight))}
        dtype = model.get_submodule(layer).dtype
        codes, scale = quantize_online(weight.to(dtype))
        return {full_layer_name: pack_ternary(codes), f"{layer}.weight_scale": scale}

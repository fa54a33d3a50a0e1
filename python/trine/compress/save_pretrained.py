"""What save_pretrained does once layers of its model are packed: right, or not at all."""

from __future__ import annotations

import sys
from types import MethodType

from torch import nn

from trine.compress.edits import recorded
from trine.nn import PackedLayer


def prepare_save_pretrained(model: nn.Module) -> None:
    """See that nothing is lost by the save_pretrained of `model` or of one inside it.

    A model of transformers is given a `trine.TrineConfig` that describes its packed layers, so that
    from_pretrained reads them. Where it could not, because the model is another library's, was
    quantised by another method or changed its structure, save_pretrained says so.
    """
    for module in model.modules():
        if hasattr(module, "save_pretrained") and (
            recorded(model) != []
            or any(isinstance(child, PackedLayer) for child in module.modules())
        ):
            reason = _reason_against(module, model)
            if reason is not None:
                module._trine_unsaved = reason
                module.save_pretrained = MethodType(_refuse, module)
    library = sys.modules.get("transformers")
    if library is not None and any(isinstance(m, library.PreTrainedModel) for m in model.modules()):
        from trine.hugging_face.config import describe_packed_layers

        describe_packed_layers(model)


def _reason_against(module: nn.Module, model: nn.Module) -> str | None:
    library = sys.modules.get("transformers")
    if library is None or not isinstance(module, library.PreTrainedModel):
        return f"the from_pretrained of {type(module).__name__}"
    stored = getattr(module.config, "quantization_config", None)
    if stored is not None and getattr(stored, "quant_method", None) != "trine":
        return "a quantisation method beside trine"
    if recorded(model) != []:
        return "from_pretrained, after its structure was changed,"
    return None


def _refuse(self: nn.Module, *args: object, **kwargs: object) -> None:
    raise ValueError(
        f"{self._trine_unsaved} could not read what save_pretrained would write; "
        "use trine.save and trine.load"
    )

"""INT8 layers that go through torch.compile: torchao's, and PyTorch 2 export for x86."""

from functools import partial

import torch
from torch import Tensor, nn

from benchmarks.case import Bind
from benchmarks.measure import Call
from benchmarks.peers.linear import dense_layer, torchao_layer


def torchao_compiled(weight: Tensor, copies: int, threads: int) -> list[Bind]:
    """Compiled once for each shape: the weight is an argument of the compiled code."""
    torch._dynamo.reset()  # else the shapes of earlier layers count against its limit
    compiled = torch.compile(_call, dynamic=False)
    return [partial(_bound, compiled, torchao_layer(weight)) for _ in range(copies)]


def _call(layer: nn.Module, x: Tensor) -> Tensor:
    return layer(x)


def _bound(compiled, layer: nn.Module, x: Tensor) -> Call:
    return partial(compiled, layer, x)


def pt2e_x86(weight: Tensor, copies: int, threads: int) -> list[Bind]:
    """Export, X86InductorQuantizer with dynamic activations, Inductor with frozen weights.

    Each shape is compiled for itself, and the weight with it: that takes seconds, so there is one.
    """

    def bind(x: Tensor) -> Call:
        from torch._inductor import config
        from torchao.quantization.pt2e.quantize_pt2e import convert_pt2e, prepare_pt2e
        from torchao.quantization.pt2e.quantizer import x86_inductor_quantizer as x86

        with torch.inference_mode(False), torch.no_grad(), config.patch(freezing=True):
            exported = torch.export.export(nn.Sequential(dense_layer(weight)), (x,)).module()
            quantizer = x86.X86InductorQuantizer()
            quantizer.set_global(x86.get_default_x86_inductor_quantization_config(is_dynamic=True))
            prepared = prepare_pt2e(exported, quantizer)
            prepared(x)
            layer = torch.compile(convert_pt2e(prepared), dynamic=False)
            layer(x)
        return partial(layer, x)

    return [bind]

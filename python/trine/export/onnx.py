"""A model with packed layers as an ONNX file, which any runtime of that format serves."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from os import PathLike
from typing import Any

import torch
from torch import nn
from torch.export import ExportedProgram

from trine.export.files import written_beside
from trine.export.program import to_program

_UNPACKING = ("BitShift", "BitwiseAnd")  # of ternary weights


def to_onnx(
    model: nn.Module,
    path: str | PathLike,
    example_inputs: Any,
    *,
    dynamic_shapes: Any = None,
    input_names: Sequence[str] | None = None,
    output_names: Sequence[str] | None = None,
) -> None:
    """Write `model` to an ONNX file whose packed layers give, in ONNX Runtime, the bits of trine.

    INT8 layers become row quantisation and MatMulInteger. Ternary weights stay two bits in the
    file; the graph unpacks them. With static activations INT8 becomes QuantizeLinear and
    DequantizeLinear around a MatMul, which runtimes fuse: these are within float32's rounding of
    trine. All other operators are PyTorch's translations, with the roundings of the runtime.

    Args:
        model: in evaluation mode, on the CPU.
        path: replaced in one step. Weights beyond 2 GB go to a file beside it, `path` + ".data".
        example_inputs, dynamic_shapes: as for `trine.export.to_program`.
        input_names, output_names: of the graph; PyTorch's own by default.

    Raises:
        ValueError: what `to_program` raises; an operator of trine has no form in ONNX; onnxscript
            is missing.
    """
    try:
        import onnxscript.optimizer

        from trine.export.onnx_ops import OPSET, translation_table
    except ImportError as error:
        raise ValueError("to_onnx needs onnxscript; pip install 'trine[export]'") from error
    program = to_program(model, example_inputs, dynamic_shapes=dynamic_shapes)
    table = translation_table()
    _check_translated(program, {str(operator) for operator in table})
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # torch's own, of its tree specifications
        exported = torch.onnx.export(
            program,
            dynamo=True,
            opset_version=OPSET,
            custom_translation_table=table,
            input_names=input_names,
            output_names=output_names,
            optimize=False,
            verbose=False,
        )
    # Folding the unpacking would make four times as much of the file.
    onnxscript.optimizer.optimize_ir(
        exported.model, should_fold=lambda node: False if node.op_type in _UNPACKING else None
    )
    for node in exported.model.graph.all_nodes():
        node.metadata_props.clear()  # stack traces with this machine's paths, half of a small file
    with written_beside(path) as part:
        exported.save(part)


def _check_translated(program: ExportedProgram, known: set[str]) -> None:
    for node in program.graph.nodes:
        name = str(node.target)
        if node.op == "call_function" and name.startswith("trine.") and name not in known:
            stack = node.meta.get("nn_module_stack") or {"": ("the model", None)}
            layer = list(stack.values())[-1][0]
            raise ValueError(
                f"to_onnx: {name.removesuffix('.default')} of layer {layer!r} has no form in ONNX; "
                "INT8 and ternary layers have one; keep that layer float"
            )

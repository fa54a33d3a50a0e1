"""Models with packed layers for other runtimes: ONNX, GGUF, torch.export, AOTInductor."""

from trine.export.gguf import to_gguf
from trine.export.onnx import to_onnx
from trine.export.program import library, to_package, to_program

__all__ = ["library", "to_gguf", "to_onnx", "to_package", "to_program"]

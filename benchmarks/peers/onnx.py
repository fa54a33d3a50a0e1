"""ONNX Runtime's dynamic INT8, as its quantiser writes it: uint8 activations, a scale a tensor."""

import tempfile
from collections.abc import Callable
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import torch
from torch import Tensor, nn

from benchmarks.case import Bind
from benchmarks.measure import Call


def onnx_int8(weight_type: str, weight: Tensor, copies: int, threads: int) -> list[Bind]:
    """Weights per channel, QInt8 or QUInt8."""
    model = _quantised(weight, weight_type)
    return [partial(_bind, _session(model, threads), weight.shape[0]) for _ in range(copies)]


def _session(model: bytes, threads: int):
    """All sessions share one pool of threads: pools of their own would spin against each other.

    Its size holds for the process, and must be set before the first session.
    """
    import onnxruntime as ort

    if not _pool_size:
        ort.set_default_logger_severity(3)
        ort.set_global_thread_pool_sizes(threads, 1)
        _pool_size.append(threads)
    if _pool_size != [threads]:
        raise RuntimeError(f"its threads are {_pool_size[0]} in this process, not {threads}")
    options = ort.SessionOptions()
    options.use_per_session_threads = False
    return ort.InferenceSession(model, options, providers=["CPUExecutionProvider"])


_pool_size: list[int] = []

Encoder = Callable[..., SimpleNamespace]  # of tokens by name: has last_hidden_state


def _bind(session, n: int, x: Tensor) -> Call:
    """Input and output stay where they are: nothing is copied but what the layer itself copies."""
    y = torch.empty(x.shape[0], n)
    binding = session.io_binding()
    binding.bind_input("x", "cpu", 0, "float32", list(x.shape), x.data_ptr())
    binding.bind_output("y", "cpu", 0, "float32", list(y.shape), y.data_ptr())

    def call(x: Tensor) -> Tensor:  # x is held: the binding knows but its address
        session.run_with_iobinding(binding)
        return y

    return partial(call, x)


def _quantised(weight: Tensor, weight_type: str) -> bytes:
    """y = x @ weight.T through onnxruntime's own quantiser."""
    import onnx
    from onnx import TensorProto, helper

    n, k = weight.shape
    graph = helper.make_graph(
        [helper.make_node("MatMul", ["x", "w"], ["y"], name="product")],
        "linear",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["M", k])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, ["M", n])],
        [onnx.numpy_helper.from_array(weight.T.contiguous().numpy(), "w")],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
    return _quantise_dynamic(model, weight_type)


def _quantise_dynamic(model, weight_type: str) -> bytes:
    """`model`: what onnxruntime's quantiser takes, a path or a loaded model."""
    from onnxruntime.quantization import QuantType, quantize_dynamic

    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "quantised.onnx"
        quantize_dynamic(model, path, per_channel=True, weight_type=getattr(QuantType, weight_type))
        return path.read_bytes()


def onnx_encoder(model: nn.Module, tokens: dict[str, Tensor], threads: int) -> Encoder:
    """A transformer through torch.onnx and the quantiser, called like the model itself."""
    with tempfile.TemporaryDirectory() as folder:
        path = str(Path(folder) / "encoder.onnx")
        torch.onnx.export(model, kwargs=tokens, f=path, dynamo=True, verbose=False)
        session = _session(_quantise_dynamic(path, "QInt8"), threads)

    def run(**tokens: Tensor) -> SimpleNamespace:
        states = session.run(None, {name: ids.numpy() for name, ids in tokens.items()})[0]
        return SimpleNamespace(last_hidden_state=torch.from_numpy(states))

    return run

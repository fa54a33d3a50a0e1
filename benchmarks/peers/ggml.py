"""ggml's quantised matrix products (llama.cpp), through the libraries that llama-cpp-python builds.

Only those are loaded, with ctypes; the package itself is not imported.
"""

import ctypes
import importlib.util
from ctypes import POINTER, Structure, byref, c_bool, c_int, c_int64, c_size_t, c_uint32, c_void_p
from functools import cache, partial
from pathlib import Path

import torch
from torch import Tensor

from benchmarks.case import Bind
from benchmarks.measure import Call

TYPES = {"F32": 0, "Q8_0": 8, "TQ2_0": 35}  # enum ggml_type
BLOCK = {"Q8_0": 32, "TQ2_0": 256}  # weights that share a scale: K must be a multiple
CONTEXT_BYTES = 1 << 20  # beside the data: descriptions of tensors, a graph


class _InitParams(Structure):
    _fields_ = [("mem_size", c_size_t), ("mem_buffer", c_void_p), ("no_alloc", c_bool)]


class _Plan(Structure):
    _fields_ = [
        ("work_size", c_size_t),
        ("work_data", c_void_p),
        ("n_threads", c_int),
        ("threadpool", c_void_p),
        ("abort_callback", c_void_p),
        ("abort_callback_data", c_void_p),
        ("use_ref", c_bool),
    ]


class _PoolParams(Structure):
    _fields_ = [
        ("cpumask", c_bool * 512),
        ("n_threads", c_int),
        ("prio", c_int),
        ("poll", c_uint32),
        ("strict_cpu", c_bool),
        ("paused", c_bool),
    ]


@cache
def _library() -> ctypes.CDLL:
    spec = importlib.util.find_spec("llama_cpp")
    if spec is None:
        raise ImportError("pip install llama-cpp-python (it compiles llama.cpp: some 15 min)")
    folder = Path(spec.submodule_search_locations[0]) / "lib"
    ctypes.CDLL(str(folder / "libggml-base.so"), mode=ctypes.RTLD_GLOBAL)
    library = ctypes.CDLL(str(folder / "libggml-cpu.so"), mode=ctypes.RTLD_GLOBAL)
    base = ctypes.CDLL(str(folder / "libggml-base.so"))
    for name, result, arguments in (
        ("ggml_init", c_void_p, [_InitParams]),
        ("ggml_free", None, [c_void_p]),
        ("ggml_new_tensor_2d", c_void_p, [c_void_p, c_int, c_int64, c_int64]),
        ("ggml_mul_mat", c_void_p, [c_void_p, c_void_p, c_void_p]),
        ("ggml_new_graph", c_void_p, [c_void_p]),
        ("ggml_build_forward_expand", None, [c_void_p, c_void_p]),
        ("ggml_get_data", c_void_p, [c_void_p]),
        ("ggml_threadpool_params_default", _PoolParams, [c_int]),
        ("ggml_threadpool_new", c_void_p, [POINTER(_PoolParams)]),
        ("ggml_graph_plan", _Plan, [c_void_p, c_int, c_void_p]),
        ("ggml_graph_compute", c_int, [c_void_p, POINTER(_Plan)]),
        (
            "ggml_quantize_chunk",
            c_size_t,
            [c_int, c_void_p, c_void_p, c_int64, c_int64, c_int64, c_void_p],
        ),
    ):
        function = getattr(library if hasattr(library, name) else base, name)
        function.restype, function.argtypes = result, arguments
        setattr(library, name, function)
    library.ggml_cpu_init()
    return library


class _Context:
    """Memory that tensors and a graph are made in; freed with the last reference."""

    def __init__(self, size: int) -> None:
        self.pointer = _library().ggml_init(_InitParams(CONTEXT_BYTES + size, None, False))

    def __del__(self) -> None:
        _library().ggml_free(self.pointer)

    def tensor(self, kind: str, rows: int, columns: int) -> int:
        return _library().ggml_new_tensor_2d(self.pointer, TYPES[kind], columns, rows)


def ggml(kind: str, weight: Tensor, copies: int, threads: int) -> list[Bind]:
    """ggml_mul_mat with weights of type `kind`; it quantises the activations in blocks itself."""
    library = _library()
    n, k = weight.shape
    if k % BLOCK[kind]:
        raise ValueError(f"K must be a multiple of {BLOCK[kind]}")
    layers = []
    for _ in range(copies):
        context = _Context(2 * n * k)
        packed = context.tensor(kind, n, k)
        data = library.ggml_get_data(packed)
        library.ggml_quantize_chunk(TYPES[kind], weight.data_ptr(), data, 0, n, k, None)
        layers.append(partial(_bind, context, packed, n, threads))
    return layers


@cache
def _threads(threads: int) -> int:
    """One pool for all layers."""
    parameters = _library().ggml_threadpool_params_default(threads)
    return _library().ggml_threadpool_new(byref(parameters))


def _bind(weights: _Context, packed: int, n: int, threads: int, x: Tensor) -> Call:
    library, (m, k) = _library(), x.shape
    context = _Context(4 * m * (n + k))
    inputs = context.tensor("F32", m, k)
    ctypes.memmove(library.ggml_get_data(inputs), x.data_ptr(), 4 * m * k)
    product = library.ggml_mul_mat(context.pointer, packed, inputs)
    graph = library.ggml_new_graph(context.pointer)
    library.ggml_build_forward_expand(graph, product)
    plan = library.ggml_graph_plan(graph, threads, _threads(threads))
    scratch = torch.empty(max(1, plan.work_size), dtype=torch.uint8)
    plan.work_data = scratch.data_ptr()
    result = (ctypes.c_float * (m * n)).from_address(library.ggml_get_data(product))
    y = torch.frombuffer(result, dtype=torch.float32).reshape(m, n)

    def call(*held: object) -> Tensor:
        if library.ggml_graph_compute(graph, byref(plan)) != 0:
            raise RuntimeError("ggml_graph_compute failed")
        return y

    return partial(call, scratch, context, weights)

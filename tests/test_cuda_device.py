"""What only a GPU can show: every kernel's bits there, graphs, streams, no waiting, layers on it.

The tests of each op run there, too (`isa` in conftest.py). Without a GPU
`TRINE_TEST_DEVICE=cpu pytest tests/test_cuda_device.py` tries those that have a meaning on the CPU.
"""

import functools
import importlib.util
import shutil
import subprocess
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import cuda_kernels
import pytest
import torch
import trine
from cuda_kernels import ROOT
from device_calls import Call, as_tuple, assert_gives, calls, norm_call
from devices import ABSENT, DEVICE, all_moved, is_visible, moved, smallest_tiles
from linear_inputs import (
    DTYPES,
    assert_same_bits,
    difficult_rows,
    exact_sparse24_inputs,
    non_contiguous,
)
from test_cuda_linear_on_cpu import cases_of
from test_cuda_sass import build_tool
from test_cuda_sparse24_on_cpu import cases_of as sparse24_cases
from torch import Tensor, nn
from torch.sparse import SparseSemiStructuredTensor
from trine import _library, backends, ops
from trine.nn import pack_linear
from trine.ops import _triton_kernels
from trine.ops.int8_linear import reference as int8
from trine.ops.norm_quantize_rows import reference as norms
from trine.ops.quantize_rows import reference as rows
from trine.ops.sparse24_linear import (
    from_semi_structured,
    pack_sparse24,
    to_semi_structured,
    unpack_sparse24,
)
from trine.ops.sparse24_linear import reference as sparse24
from trine.ops.ternary_linear import reference as ternary

if not is_visible():
    pytest.skip(ABSENT, allow_module_level=True)

PROBES = ROOT / "tests" / "cuda_probes" / "device"
FEW = 64  # rows, that another kernel takes
needs_cuda = pytest.mark.skipif(DEVICE != "cuda", reason="has no meaning on the CPU")
# One call of each kernel that has enough blocks for any order of them to show.
LARGE = (
    Call("quantize_rows", rows.quantize_rows, rows.example_inputs(2000, 1001, torch.bfloat16)),
    norm_call("rms", 2000, 1001, torch.bfloat16),
    norm_call("layer", 2000, 1001, torch.bfloat16),
    Call("int8_linear", int8.int8_linear, int8.example_inputs(7, 9000, 1030, torch.bfloat16)),
    Call("int8_linear", int8.int8_linear, int8.example_inputs(700, 3000, 530, torch.bfloat16)),
    Call("ternary_linear", ternary.ternary_linear, ternary.example_inputs(7, 9000, 1030)),
    Call("ternary_linear", ternary.ternary_linear, ternary.example_inputs(700, 3000, 530)),
    Call(
        "ternary_linear",
        ternary.ternary_linear,
        ternary.example_inputs(90, 3000, 512, scale_shape=(3000, 4)),
    ),
    *(
        Call("sparse24_linear", sparse24.sparse24_linear, exact_sparse24_inputs(*shape))
        for shape in ((7, 9000, 1030, torch.bfloat16), (700, 3000, 530, torch.float16))
    ),
    # The four tiles of sm_90a, on an H100 or H200.
    *(
        Call("sparse24_linear", sparse24.sparse24_linear, *inputs)
        for m, n in ((700, 3000), (1300, 2300), (1500, 2900), (2100, 2900))
        for inputs in (
            (exact_sparse24_inputs(m, n, 256, torch.bfloat16),),
            sparse24.example_inputs(m, n, 256, torch.bfloat16, torch.int8),
        )
    ),
)
large = pytest.mark.parametrize("call", LARGE, ids=str)
LINEAR = {"int8_linear": int8, "ternary_linear": ternary}
LAYERS = ("int8", "ternary", "sparse24-int8")  # those whose op has kernels here


@pytest.fixture(params=["compiled", "triton"])
def backend(request, monkeypatch):
    """Behind the operators, inside the test."""
    if request.param == "compiled":
        if DEVICE == "cuda" and not _library.cuda_library.loaded:
            pytest.skip(f"the CUDA library is {_library.cuda_library.status}")
        yield request.param
        return
    if importlib.util.find_spec("triton") is None:
        pytest.skip("Triton is not installed")
    if DEVICE == "cpu":
        from triton import knobs

        if not knobs.runtime.interpret:
            pytest.skip("on the CPU Triton needs TRITON_INTERPRET=1")
    smallest_tiles(monkeypatch.setattr)
    with backends.triton_kernels(DEVICE):
        yield request.param


def fresh(call: Call) -> Call:
    """The same call with other values of x."""
    x, *rest = call.arguments
    inputs = (torch.randint(-8, 9, x.shape).to(x.dtype), *rest)
    return Call(call.op, call.reference, inputs, call.options)


# --- bits --------------------------------------------------------------------------------------


@pytest.mark.skipif(
    DEVICE == "cuda" and not _library.cuda_library.loaded, reason=_library.cuda_library.status
)
@pytest.mark.parametrize("call", list(calls()), ids=str)
def test_every_kernel_gives_the_bits_of_the_reference(call):
    assert_gives(call.run(), call.expected())


@large
def test_many_blocks_give_the_same_bits_every_time(backend, call):
    arguments, expected = all_moved(call.arguments), call.expected()
    op = getattr(ops, call.op)
    for _ in range(2 if DEVICE == "cpu" else 20):
        assert_gives(op(*arguments), expected)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("m", [8, 80])
def test_difficult_and_strided_rows(backend, dtype, m):
    _, *int8_rest = int8.example_inputs(1, 19, 130, dtype)
    _, *ternary_rest = ternary.example_inputs(1, 19, 130, dtype)
    x = difficult_rows(130, dtype).repeat(m // 8, 1)
    for rows_ in (x, *non_contiguous(x)):
        for op, reference, rest in (
            ("quantize_rows", rows.quantize_rows, ()),
            ("rms_norm_quantize_rows", norms.rms_norm_quantize_rows, (torch.rand(130), 1e-5)),
            (
                "layer_norm_quantize_rows",
                norms.layer_norm_quantize_rows,
                (*torch.rand(2, 130), 1e-5),
            ),
            ("int8_linear", int8.int8_linear, int8_rest),
            ("ternary_linear", ternary.ternary_linear, ternary_rest),
        ):
            call = Call(op, reference, (rows_, *rest))
            assert_gives(call.run(), call.expected())


@pytest.mark.parametrize("offset", [1, 2, 3])
@pytest.mark.parametrize("m", [2, 80])
def test_x_bias_and_scale_at_any_address(backend, m, offset):
    """Weights begin at multiples of 16 bytes, as torch's memory does; nothing else need."""
    for op, module in LINEAR.items():
        reference = getattr(module, op)
        x, weight, scale, bias = module.example_inputs(m, 33, 128, torch.bfloat16)
        shifted = [
            torch.cat([t.flatten()[:offset], t.flatten()])[offset:] for t in (x, scale, bias)
        ]
        x, scale, bias = shifted[0].view_as(x), *shifted[1:]
        call = Call(op, reference, (x, weight, scale, bias))
        assert all_moved(call.arguments)[3].data_ptr() % 16 == 2 * offset
        assert_gives(call.run(), call.expected())


@pytest.mark.parametrize("k", [37, 128])
@pytest.mark.parametrize("op", ["int8_linear", "ternary_linear"])
def test_rows_quantized_before(backend, op, k):
    """As they are where whole 128 bytes make a row, and from any address; padded otherwise."""
    x, *rest = all_moved(LINEAR[op].example_inputs(5, 33, k, torch.bfloat16))
    given = ops.QuantizedRows.of(x)
    shifted = torch.cat([given.q.flatten()[:1], given.q.flatten()])[1:].view_as(given.q)
    for q in (given.q, shifted):
        y = getattr(ops, op)(ops.QuantizedRows(q, given.scale, given.sum, x.shape, x.dtype), *rest)
        assert_same_bits(y, getattr(ops, op)(x, *rest))


@needs_cuda
@pytest.mark.parametrize("op", ["int8_linear", "ternary_linear"])
def test_a_weight_between_multiples_of_16_bytes_is_refused(op):
    x, weight, scale, bias = all_moved(LINEAR[op].example_inputs(2, 5, 128))
    shifted = torch.cat([weight.flatten()[:1], weight.flatten()])[1:].view_as(weight)
    with pytest.raises(ValueError, match="must begin at a multiple of 16 bytes; clone it"):
        getattr(ops, op)(x, shifted, scale, bias)


@needs_cuda
def test_sparse24_values_that_have_no_kernel():
    for x_dtype, values_dtype, message in (
        (torch.float32, torch.float32, "float32 values have no kernel on this device"),
        (torch.float32, torch.bfloat16, "must have the dtype of float values"),
    ):
        inputs, _ = sparse24.example_inputs(3, 5, 37, x_dtype, values_dtype)
        with pytest.raises(ValueError, match=message):
            ops.sparse24_linear(*all_moved(inputs))


@needs_cuda
@pytest.mark.parametrize("cutlass", [True, False])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.int8])
def test_sparse24_from_and_to_pytorchs_compressed_tensors(dtype, cutlass, monkeypatch):
    if not (cutlass or torch.backends.cusparselt.is_available()):
        pytest.skip("this PyTorch has no cuSPARSELt")
    monkeypatch.setattr(SparseSemiStructuredTensor, "_FORCE_CUTLASS", cutlass)
    (_, values, indices, _), _ = sparse24.example_inputs(1, 64, 256, torch.bfloat16, dtype)
    expected = pack_sparse24(unpack_sparse24(values, indices, 256))
    compressed = to_semi_structured(*all_moved(expected), 256)
    for actual, wanted in zip(from_semi_structured(compressed), expected, strict=True):
        assert_same_bits(actual.cpu(), wanted)


@needs_cuda
@pytest.mark.parametrize("spread", [1.0, 1e-3])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("m", [1, 16, 64, 300])
def test_sparse24_sums_stay_within_their_bound(m, dtype, spread):
    """Sums of one sign, whose rounding the tensor cores do not average out, and small numbers."""
    inputs, _ = sparse24.example_inputs(m, 40, 8192, dtype, dtype, bias=False)
    x, values, indices = (inputs[0] * spread).abs(), inputs[1].abs(), inputs[2]
    exact = sparse24.sparse_product(x, values, indices)
    actual = ops.sparse24_linear(*all_moved((x, values, indices))).double().cpu()
    bound = 4 * torch.finfo(torch.float32).eps * 8192**0.5 + torch.finfo(dtype).eps
    assert ((actual - exact).abs() <= bound * exact + torch.finfo(dtype).tiny).all()


@needs_cuda
def test_tensors_on_two_devices():
    x, weight, scale, bias = int8.example_inputs()
    with pytest.raises(ValueError, match="on one device"):
        ops.int8_linear(x.to(DEVICE), weight, scale, bias)


def case_program(op: str, folder: Path) -> Path:
    """The program of tests/cuda_on_cpu that runs an op's kernels on a case, for this GPU."""
    # Away from the emulation, whose headers they would find first.
    for name in (f"{op}.cpp", "linear_case.h", "driver.h"):
        shutil.copy(cuda_kernels.EMULATION / name, folder)
    kernels = (*sorted((ROOT / "csrc" / op).glob("cuda*.cu")), ROOT / "csrc/quantize_rows/cuda.cu")
    sources = (folder / f"{op}.cpp", PROBES / "driver.cu", *kernels)
    architecture = "{}{}".format(*torch.cuda.get_device_capability())
    flags = ["-std=c++20", "-O2", "-fmad=false", f"-I{ROOT / 'csrc'}", f"-I{folder}"]
    flags += [f"-I{PROBES}", "-include", str(PROBES / "capability.h")]
    nvcc = build_tool("nvcc")

    def compile_source(source: Path) -> str:
        target = "90a" if source.stem.endswith("sm90a") else architecture
        compiled = str(folder / f"{source.parent.name}-{source.name}.o")
        generation = f"-gencode=arch=compute_{target},code=sm_{target}"
        command = [nvcc, *flags, generation, "-x", "cu", "-c", str(source), "-o", compiled]
        subprocess.run(command, check=True)
        return compiled

    with ThreadPoolExecutor() as pool:
        objects = list(pool.map(compile_source, sources))
    subprocess.run([nvcc, *objects, "-o", str(folder / op)], check=True)
    return folder / op


@needs_cuda
@pytest.mark.parametrize("op", ["int8_linear", "ternary_linear", "sparse24_linear"])
def test_many_rows_as_on_an_older_gpu(op, tmp_path):
    """The kernel of sm_80, in whose place another serves on sm_90, on the emulation's cases."""
    program = case_program(op, tmp_path)
    of_op = functools.partial(cases_of, op) if op in LINEAR else sparse24_cases
    cases = [case for case in (*of_op(80), *of_op(90)) if len(case.x) > FEW]
    assert cases
    for case in cases:
        answer = cuda_kernels.run(program, 0, case.encode(), capability=80)
        for actual, expected in zip(case.decode(answer), case.expected, strict=True):
            assert_same_bits(actual, expected)


# --- how the device is used --------------------------------------------------------------------


@needs_cuda
@large
def test_in_a_graph(backend, call):
    """Capturing fails where an op waits for the device or works on another stream."""
    arguments = all_moved(call.arguments)
    op = getattr(ops, call.op)
    op(*arguments)  # loads the kernel, which a capture does not allow
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = op(*arguments)
    again = fresh(call)
    for now in (again, call, again):
        arguments[0].copy_(now.arguments[0])
        for output in as_tuple(captured):
            output.fill_(77)
        graph.replay()
        assert_gives(captured, now.expected())


@needs_cuda
@large
def test_on_the_stream_of_the_caller(backend, call):
    """x is written on that stream, late: an op on another stream would read what was before."""
    x, *rest = all_moved(call.arguments)
    written, late = torch.zeros_like(x), x
    op = getattr(ops, call.op)
    op(written, *rest)
    torch.cuda.synchronize()
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        torch.cuda._sleep(100_000_000)  # cycles: some 50 ms
        written.copy_(late)
        result = op(written, *rest)
    stream.synchronize()
    assert_gives(result, call.expected())


@needs_cuda
@large
def test_without_waiting_for_the_device(backend, call):
    """torch's own waits are errors, and the call returns while the device still sleeps."""
    arguments = all_moved(call.arguments)
    op = getattr(ops, call.op)
    op(*arguments)
    torch.cuda.synchronize()
    done = torch.cuda.Event()
    torch.cuda.set_sync_debug_mode("error")
    try:
        torch.cuda._sleep(200_000_000)
        result = op(*arguments)
        done.record()
        assert not done.query()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert_gives(result, call.expected())


@needs_cuda
@pytest.mark.skipif(DEVICE == "cuda" and torch.cuda.device_count() < 2, reason="needs two GPUs")
@large
def test_on_another_device_than_the_current_one(call):
    assert_gives(call.run("cuda:1"), call.expected())


# --- the rest of PyTorch -----------------------------------------------------------------------


@large
def test_opcheck(call):
    small = Call(call.op, call.reference, (call.arguments[0][:3], *call.arguments[1:]))
    operator = getattr(torch.ops.trine, call.op).default
    torch.library.opcheck(operator, all_moved(small.arguments))


def model(choice: str) -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(
        pack_linear(nn.Linear(130, 70), choice), nn.ReLU(), pack_linear(nn.Linear(70, 33), choice)
    )


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("choice", LAYERS)
def test_layers_move_there(backend, choice, dtype):
    cpu = model(choice).to(dtype)
    there = model(choice).to(dtype).to(DEVICE)
    assert {t.device.type for t in there.state_dict().values()} == {torch.device(DEVICE).type}
    for m in (1, 9, 65):
        x = torch.randn(2, m, 130).to(dtype)
        with torch.inference_mode():
            assert_same_bits(there(x.to(DEVICE)).cpu(), cpu(x))


@pytest.mark.parametrize("choice", LAYERS)
def test_a_checkpoint_goes_there(choice, tmp_path):
    before = model(choice).eval()
    trine.save(before, tmp_path / "model.trine")
    there = trine.load(tmp_path / "model.trine").to(DEVICE)
    x = torch.randn(5, 130)
    with torch.inference_mode():
        assert_same_bits(there(x.to(DEVICE)).cpu(), before(x))
    trine.save(there, tmp_path / "again.trine")  # and back
    with torch.inference_mode():
        assert_same_bits(trine.load(tmp_path / "again.trine")(x), before(x))


@pytest.mark.parametrize("choice", LAYERS)
def test_compile(choice):
    there = model(choice).to(DEVICE)
    compiled = torch.compile(there, fullgraph=True)
    x = torch.randn(9, 130, device=DEVICE)
    with torch.inference_mode():
        assert_same_bits(compiled(x), there(x))


@pytest.mark.parametrize("choice", LAYERS)
def test_autocast(choice):
    there = model(choice)[0].to(DEVICE)
    x = torch.randn(9, 130, device=DEVICE)
    with torch.inference_mode(), torch.autocast(DEVICE, torch.bfloat16):
        y = there(x)
    assert y.dtype == torch.bfloat16
    with torch.inference_mode():
        assert_same_bits(y, there(x.bfloat16()))


@pytest.mark.parametrize("choice", LAYERS)
def test_gradients(choice):
    def gradients(device: str) -> list[Tensor]:
        layer = model(choice)[0].to(device)
        x = torch.randn(9, 130, generator=torch.Generator().manual_seed(1)).to(device)
        layer.bias.requires_grad_()
        layer(x.requires_grad_()).square().sum().backward()
        return [x.grad.cpu(), layer.bias.grad.cpu()]

    for there, cpu in zip(gradients(DEVICE), gradients("cpu"), strict=True):
        torch.testing.assert_close(there, cpu, rtol=1e-4, atol=1e-4)


@needs_cuda
def test_describe_names_the_device():
    for entry in backends.describe().ops:
        if entry.cuda_kernels:
            assert torch.cuda.get_device_name() in entry.cuda_reason


@needs_cuda
@pytest.mark.skipif(not _triton_kernels.available(), reason="Triton is not installed")
def test_triton_chooses_its_tiles_by_measurement():
    """The other tests take the smallest; here Triton tries them all."""
    call = LARGE[3]
    with backends.triton_kernels(DEVICE):
        assert_gives(call.run(), call.expected())


def test_moved_tensors_lie_as_they_did():
    for t in (*non_contiguous(torch.randn(4, 10)), torch.arange(7)[3:]):
        there = moved(t)
        assert (there.stride(), there.storage_offset()) == (t.stride(), t.storage_offset())
        assert_same_bits(there.cpu(), t)

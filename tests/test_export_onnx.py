"""trine.export.to_onnx: what ONNX Runtime makes of the file, against trine."""

import onnx
import onnxruntime as ort
import pytest
import torch
import transformers as hf
import trine
from torch import Tensor, nn
from trine.export import to_onnx
from trine.nn import (
    Int8Linear,
    Int8WeightLinear,
    NormedTernaryLinear,
    QuantizingLayerNorm,
    Sparse24Linear,
    TernaryLinear,
    TwoScaleTernaryLinear,
    pack_linear,
)

BATCH = torch.export.Dim.DYNAMIC


def _codes(n: int, k: int) -> Tensor:
    return torch.randint(-1, 2, (n, k), dtype=torch.int8)


def _normed(k: int) -> NormedTernaryLinear:
    layer = TernaryLinear.from_codes(_codes(5, k), torch.rand(1), torch.rand(5))
    return NormedTernaryLinear.from_ternary(layer, torch.rand(k) + 0.5, 1e-5)


LAYERS = {
    "int8": lambda: Int8Linear.from_linear(nn.Linear(200, 33)),
    "int8 without bias": lambda: Int8Linear.from_linear(nn.Linear(64, 5, bias=False)),
    "int8 fp16": lambda: Int8Linear.from_linear(nn.Linear(40, 7).half()),
    "ternary": lambda: TernaryLinear.from_linear(nn.Linear(200, 33)),
    "ternary by row": lambda: TernaryLinear.from_codes(_codes(9, 100), torch.rand(9)),
    "ternary with two scales": lambda: TwoScaleTernaryLinear.from_codes(
        _codes(9, 100), torch.rand(2), torch.rand(9)
    ),
    "ternary with a norm": lambda: _normed(100),
    "ternary with a norm of many columns, fp16": lambda: _normed(9000).half(),
    "ternary by group": lambda: TernaryLinear.from_codes(_codes(9, 192), torch.rand(9, 3)),
}


def _session(path) -> ort.InferenceSession:
    options = ort.SessionOptions()
    options.intra_op_num_threads = 1
    return ort.InferenceSession(path, options, providers=["CPUExecutionProvider"])


def _run(session, *inputs: Tensor) -> Tensor:
    names = [entry.name for entry in session.get_inputs()]
    feeds = {name: x.numpy() for name, x in zip(names, inputs, strict=True)}
    return torch.from_numpy(session.run(None, feeds)[0])


def _rows(k: int, dtype: torch.dtype) -> Tensor:
    """[3, 4, K] with rows of every kind that quantisation treats apart."""
    x = torch.randn(3, 4, k) * torch.logspace(-3, 3, 12).reshape(3, 4, 1)
    x[0, 1] = 0
    x[0, 2, 3] = torch.nan
    x[1, 0, -1] = torch.inf
    x[1, 1] *= 2.0**-125  # counts as zero
    x[2, 3, :2] = torch.tensor([127.0, 63.5])  # half way between two codes
    return x.to(dtype)


@pytest.mark.parametrize("activation", ["relu", "gelu", "gelu_tanh"])
def test_activations_of_layers(activation, tmp_path):
    """ReLU with equal bits; ONNX's GELU is another approximation of the same function."""
    model = nn.Sequential(LAYERS["int8"](), TernaryLinear.from_linear(nn.Linear(33, 7))).eval()
    for layer in model:
        layer.activation = activation
    x = torch.randn(4, 200)
    to_onnx(model, tmp_path / "m.onnx", x, dynamic_shapes=({0: BATCH},))
    y = _run(_session(tmp_path / "m.onnx"), x)
    with torch.no_grad():
        if activation == "relu":
            assert torch.equal(y, model(x))
        else:  # a step of int8 between the layers may round otherwise
            torch.testing.assert_close(y, model(x), rtol=0.02, atol=0.02)


@pytest.mark.parametrize("name", LAYERS)
def test_a_layer_gives_equal_bits_for_other_shapes_than_the_example(name, tmp_path):
    layer = LAYERS[name]().eval()
    _assert_equal_bits(layer, layer.in_features, layer.dtype, tmp_path / "m.onnx")


def _assert_equal_bits(model: nn.Module, k: int, dtype: torch.dtype, path) -> None:
    example = torch.randn(2, 2, k, dtype=dtype)
    to_onnx(model, path, example, dynamic_shapes=({0: BATCH, 1: BATCH},))
    x = _rows(k, dtype)
    y, expected = _run(_session(path), x), model(x)
    assert y.dtype == dtype
    assert expected.isnan().any(-1).sum() == 2
    assert torch.equal(y.isnan(), expected.isnan())
    assert torch.equal(y.nan_to_num(), expected.nan_to_num())


@pytest.mark.parametrize(("k", "dtype"), [(100, torch.float32), (9000, torch.float16)])
def test_a_layer_norm_that_quantises_gives_equal_bits(k, dtype, tmp_path):
    norm = QuantizingLayerNorm(k)
    norm.weight.data, norm.bias.data = torch.rand(2, k) + 0.5
    model = nn.Sequential(norm, pack_linear(nn.Linear(k, 5), "int8"))
    model = model.to(dtype).eval().requires_grad_(False)
    _assert_equal_bits(model, k, dtype, tmp_path / "m.onnx")


def test_a_model_gives_equal_bits_and_keeps_two_bits_a_weight(tmp_path):
    model = nn.Sequential(
        pack_linear(nn.Linear(256, 512), "ternary"),
        nn.ReLU(),
        pack_linear(nn.Linear(512, 256), "ternary"),
        nn.ReLU(),
        pack_linear(nn.Linear(256, 16), "int8"),
    ).eval()
    path = tmp_path / "m.onnx"
    names = {"input_names": ["x"], "output_names": ["y"]}
    to_onnx(model, path, torch.randn(2, 256), dynamic_shapes=({0: BATCH},), **names)
    onnx.checker.check_model(path, full_check=True)
    session, x = _session(path), torch.randn(7, 256)
    assert [entry.name for entry in session.get_inputs() + session.get_outputs()] == ["x", "y"]
    assert torch.equal(_run(session, x), model(x))
    packed = sum(buffer.nbytes for buffer in model.buffers())
    assert path.stat().st_size < packed + 16_000  # unpacked to int8 it were 196,608 more
    assert list(tmp_path.iterdir()) == [path]
    assert b".py" not in path.read_bytes()  # no paths of the machine that wrote it


@pytest.mark.parametrize("group", [None, 64])
def test_weight_only_int8_is_a_product_with_its_dequantised_weight(group, tmp_path):
    layer = Int8WeightLinear.from_linear(nn.Linear(192, 65), group=group).eval()
    to_onnx(layer, tmp_path / "m.onnx", torch.randn(2, 192), dynamic_shapes=({0: BATCH},))
    x = torch.randn(30, 192)
    torch.testing.assert_close(_run(_session(tmp_path / "m.onnx"), x), layer(x))
    assert (tmp_path / "m.onnx").stat().st_size < sum(b.nbytes for b in layer.buffers()) + 8_000


def test_static_int8_is_quantise_and_dequantise_around_a_product(tmp_path):
    scale, zero = torch.tensor([0.03]), torch.tensor([5], dtype=torch.int32)
    layer = Int8Linear.from_linear(nn.Linear(64, 9), input_scale=scale, input_zero_point=zero)
    to_onnx(layer.eval(), tmp_path / "m.onnx", torch.randn(2, 64), dynamic_shapes=({0: BATCH},))
    operators = [node.op_type for node in onnx.load(tmp_path / "m.onnx").graph.node]
    assert operators == ["QuantizeLinear", "DequantizeLinear", "DequantizeLinear", "MatMul", "Add"]
    x = torch.randn(30, 64) * 3  # beyond the range, too
    y, expected = _run(_session(tmp_path / "m.onnx"), x), layer(x)
    assert (y - expected).norm() < 1e-6 * expected.norm()


def test_a_model_of_transformers_with_dynamic_axes(tmp_path):
    config = hf.BertConfig(
        vocab_size=97,
        hidden_size=32,
        num_hidden_layers=1,
        num_attention_heads=4,
        intermediate_size=64,
    )
    model = hf.BertModel(config).eval()
    tokens = torch.randint(0, 97, (2, 9))
    example = {"input_ids": tokens, "attention_mask": torch.ones_like(tokens)}
    small = trine.compress(model, trine.Recipe("int8", prefer="size"), example)
    axes = {0: BATCH, 1: BATCH}
    to_onnx(small, tmp_path / "m.onnx", example, dynamic_shapes={key: axes for key in example})
    tokens = torch.randint(0, 97, (3, 14))
    mask = (torch.arange(14) < torch.tensor([[14], [5], [9]])).long()
    y = _run(_session(tmp_path / "m.onnx"), tokens, mask)
    with torch.no_grad():
        expected = small(tokens, mask).last_hidden_state
    # The float operators round otherwise, and a code here and there with them.
    assert (y - expected).norm() < 5e-3 * expected.norm()


def test_what_has_no_form_in_onnx_is_named(tmp_path):
    model = nn.Sequential(nn.Linear(8, 8), Sparse24Linear.from_linear(nn.Linear(8, 8)))
    path, x = tmp_path / "m.onnx", torch.randn(2, 8)
    with pytest.raises(ValueError, match="in training mode"):
        to_onnx(model, path, x)
    with pytest.raises(ValueError, match=r"trine\.sparse24_linear of layer '1' has no form in ONN"):
        to_onnx(model.eval(), path, x)
    with pytest.raises(ValueError, match="example_inputs must be a tensor"):
        to_onnx(model, path, [x])
    with pytest.raises(ValueError, match=r"takes a torch\.nn\.Module"):
        to_onnx(x, path, x)
    assert not list(tmp_path.iterdir())

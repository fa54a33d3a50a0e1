"""trine.export.to_gguf: what gguf's reader and dequantiser make of the file."""

import gguf
import numpy as np
import pytest
import torch
from torch import nn
from trine.export import to_gguf
from trine.nn import Int8Linear, Sparse24Linear, TernaryLinear
from trine.ops import unpack_int8, unpack_ternary


def _read(path) -> dict[str, tuple[str, np.ndarray]]:
    return {
        tensor.name: (
            tensor.tensor_type.name,
            gguf.quants.dequantize(tensor.data, tensor.tensor_type),
        )
        for tensor in gguf.GGUFReader(path).tensors
    }


def _codes(n: int, k: int) -> torch.Tensor:
    return torch.randint(-1, 2, (n, k), dtype=torch.int8)


@pytest.mark.parametrize("ternary", ["TQ2_0", "TQ1_0"])
@pytest.mark.parametrize("scales", [(1,), (6,), (6, 2)])
def test_ternary_codes_are_exact_and_scales_are_float16(ternary, scales, tmp_path):
    layer = TernaryLinear.from_codes(_codes(6, 1024), torch.rand(scales) + 0.01)
    layer.packed_weight[0] = 0x55555555  # a row of zeros: no block of it has a largest value
    to_gguf(nn.Sequential(layer), tmp_path / "m.gguf", ternary=ternary)
    kind, weight = _read(tmp_path / "m.gguf")["0.weight"]
    assert kind == ternary
    codes = unpack_ternary(layer.packed_weight, 1024)
    scale = layer.weight_scale.half().float().reshape(-1, 1 if len(scales) < 2 else 2)
    expected = codes * scale.repeat_interleave(1024 // scale.shape[1], 1)
    assert np.array_equal(weight, expected.numpy())


def test_int8_and_float_tensors(tmp_path):
    model = nn.Sequential(
        Int8Linear.from_linear(nn.Linear(96, 5)), nn.LayerNorm(5).bfloat16(), nn.Linear(5, 3).half()
    )
    nn.init.normal_(model[1].weight)
    to_gguf(model, tmp_path / "m.gguf", name=lambda name: f"net.{name}", architecture="mine")
    reader = gguf.GGUFReader(tmp_path / "m.gguf")
    assert reader.get_field("general.architecture").contents() == "mine"
    found = _read(tmp_path / "m.gguf")
    assert {name: kind for name, (kind, _) in found.items()} == {
        "net.0.weight": "Q8_0",
        "net.0.bias": "F32",
        "net.1.weight": "BF16",
        "net.1.bias": "BF16",
        "net.2.weight": "F16",
        "net.2.bias": "F16",
    }
    scale = model[0].weight_scale.half().float()
    codes = unpack_int8(model[0].packed_weight, 96)
    assert np.array_equal(found["net.0.weight"][1], (codes * scale[:, None]).numpy())
    for name in ("0.bias", "1.weight", "2.weight"):
        expected = model.state_dict()[name].float().numpy()
        assert np.array_equal(found[f"net.{name}"][1], expected)


@pytest.mark.parametrize(
    ("layer", "message"),
    [
        (lambda: TernaryLinear.from_linear(nn.Linear(320, 4)), "320 is not a multiple of 256"),
        (lambda: Int8Linear.from_linear(nn.Linear(48, 4)), "48 is not a multiple of 32"),
        (
            lambda: TernaryLinear.from_codes(_codes(2, 256), torch.ones(2, 2)),
            "group size 128 is not a multiple of 256",
        ),
        (lambda: TernaryLinear.from_codes(_codes(2, 256), torch.ones(1) * 1e6), "beyond float16"),
        (lambda: TernaryLinear.from_codes(_codes(2, 256), torch.ones(1) * 1e-9), "beyond float16"),
        (
            lambda: Int8Linear.from_linear(nn.Linear(32, 4), input_scale=torch.ones(1)),
            "its activations are static",
        ),
        (lambda: Sparse24Linear.from_linear(nn.Linear(32, 4)), "Sparse24Linear has no type in GGU"),
    ],
)
def test_what_gguf_cannot_hold_is_refused_by_layer(layer, message, tmp_path):
    with pytest.raises(ValueError, match=f"layer '0': .*{message}"):
        to_gguf(nn.Sequential(layer()), tmp_path / "m.gguf")
    with pytest.raises(ValueError, match="ternary is 'Q4_0'"):
        to_gguf(nn.Sequential(), tmp_path / "m.gguf", ternary="Q4_0")
    assert not list(tmp_path.iterdir())

"""Rows quantised once: every linear op that takes them gives the bits that it gives for the tensor,
and a norm before layers quantises for all that read it."""

import pytest
import torch
from linear_inputs import DTYPES, SHAPES, assert_same_bits, difficult_rows
from memory_guard import at_end_of_memory
from torch import Tensor, nn
from trine import nn as packed_nn
from trine.nn import QuantizingLayerNorm, QuantizingRMSNorm
from trine.ops import QuantizedRows, int8_linear, quantize_rows, ternary_linear
from trine.ops.int8_linear import reference as int8_reference
from trine.ops.norm_quantize_rows import reference as norm_reference
from trine.ops.ternary_linear import reference as ternary_reference

OPS = {
    "int8": (int8_linear, int8_reference),
    "ternary": (ternary_linear, ternary_reference),
}
each_op = pytest.mark.parametrize("choice", OPS)


@each_op
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
def test_gives_what_the_float_tensor_gives(isa, choice, shape, dtype):
    op, reference = OPS[choice]
    x, *weight = reference.example_inputs(*shape, dtype)
    assert_same_bits(op(QuantizedRows.of(x), *weight), op(x, *weight))


@each_op
def test_difficult_rows_and_layouts(isa, choice):
    op, reference = OPS[choice]
    _, *weight = reference.example_inputs(1, 7, 37)
    x = difficult_rows(37, torch.float16)
    assert_same_bits(op(QuantizedRows.of(x), *weight), op(x, *weight))
    x = torch.randn(2, 3, 37)
    rows = QuantizedRows.of(x)
    y = op(rows, *weight)
    assert y.shape == (2, 3, 7)
    assert_same_bits(y, op(x, *weight))
    strided = rows.q.repeat_interleave(2, 1)[:, ::2]
    for q in (rows.q.T.contiguous().T, strided, at_end_of_memory(rows.q)):
        other = QuantizedRows(q, rows.scale.repeat(2)[:6], rows.sum, rows.shape, rows.dtype)
        assert_same_bits(op(other, *weight), y)


@each_op
def test_number_of_threads_changes_nothing(choice, threads):
    op, reference = OPS[choice]
    x, *weight = reference.example_inputs(40, 300, 500)
    rows = QuantizedRows.of(x)
    threads(1)
    alone = op(rows, *weight)
    threads(3)
    assert torch.equal(op(rows, *weight), alone)


@each_op
def test_autocast_gives_its_dtype(choice):
    op, reference = OPS[choice]
    x, *weight = reference.example_inputs(3, 5, 37)
    with torch.autocast("cpu", torch.bfloat16):
        y = op(QuantizedRows.of(x.bfloat16().float()), *weight)
        assert_same_bits(y, op(x.bfloat16(), *weight))


@each_op
@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_errors(choice, device):
    op, reference = OPS[choice]
    x, *weight = (t.to(device) for t in reference.example_inputs(3, 5, 37))
    rows = QuantizedRows.of(x)

    def call(q=rows.q, scale=rows.scale, sum=rows.sum, dtype=rows.dtype):
        return op(QuantizedRows(q, scale, sum, q.shape, dtype), *weight)

    with pytest.raises(ValueError, match=r"q must be int8 \[M, K\]"):
        call(q=rows.q.int())
    with pytest.raises(ValueError, match=r"q must be int8 \[M, K\]"):
        call(q=rows.q[None])
    with pytest.raises(ValueError, match=r"scale must be float32 \[3\], one value per row"):
        call(scale=rows.scale[:2])
    with pytest.raises(ValueError, match=r"scale must be float32 \[3\], one value per row"):
        call(scale=rows.scale.double())
    with pytest.raises(ValueError, match=r"sum must be int32 \[3\], one value per row"):
        call(sum=rows.sum[:, None])
    with pytest.raises(ValueError, match="dtype must be float32, bfloat16 or float16"):
        call(dtype=torch.float64)
    with pytest.raises(ValueError, match="x has K = 100 columns"):
        op(QuantizedRows.of(torch.randn(3, 100, device=device)), *weight)
    wide = torch.zeros(1, 1, dtype=torch.int8, device=device).expand(3, 2**22 + 1)
    with pytest.raises(ValueError, match="K = 4194305 exceeds"):
        call(q=wide)
    with pytest.raises(ValueError, match="on one device"):
        call(q=rows.q.to("meta"), scale=torch.zeros(3))
    with pytest.raises(ValueError, match="carry no gradient"):
        op(rows, *weight[:-1], weight[-1].requires_grad_())


def test_what_takes_no_quantised_rows_says_so():
    rows = QuantizedRows.of(torch.randn(2, 36))
    with pytest.raises(ValueError, match="x must be a tensor"):
        packed_nn.pack_linear(nn.Linear(36, 5), "sparse24-int8")(rows)
    static = packed_nn.Int8Linear.from_linear(nn.Linear(36, 5), input_scale=torch.tensor(0.1))
    with pytest.raises(ValueError, match="input_scale is for x that is not quantised yet"):
        static(rows)
    with pytest.raises(ValueError, match=r"has shape \[2, 36\], expected \[\.\.\., 40\]"):
        packed_nn.pack_linear(nn.Linear(40, 5), "int8")(rows)


@each_op
def test_opcheck(choice):
    _, reference = OPS[choice]
    op = getattr(torch.ops.trine, f"{choice}_linear_rows").default
    for dtype in (torch.float32, torch.bfloat16):
        x, *weight = reference.example_inputs(3, 5, 37, dtype)
        torch.library.opcheck(op, (*quantize_rows(x), *weight, dtype))


class Attention(nn.Module):
    """The beginning of one: three projections of a norm."""

    def __init__(self, choice: str, norm: nn.Module) -> None:
        super().__init__()
        self.norm = norm
        self.projections = nn.ModuleList(
            packed_nn.pack_linear(nn.Linear(48, n), choice) for n in (48, 16, 16)
        )

    def forward(self, x: Tensor) -> list[Tensor]:
        normed = self.norm(x)
        shape = (*normed.shape[:-1], -1, 16)  # models ask it of what the norm returns
        return [projection(normed).view(shape) for projection in self.projections]


NORMS = {
    "rms": lambda k: QuantizingRMSNorm(k, 1e-5),
    "layer": QuantizingLayerNorm,
    "layer without bias": lambda k: QuantizingLayerNorm(k, bias=False),
    "layer without weight": lambda k: QuantizingLayerNorm(k, elementwise_affine=False),
}


def example_norm(kind: str, k: int = 48) -> nn.Module:
    norm = NORMS[kind](k)
    for parameter in norm.parameters():
        parameter.data = 1 + torch.randn(k) / 4
    return norm


@each_op
@pytest.mark.parametrize("kind", NORMS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_norm_before_projections(choice, kind, dtype):
    norm = example_norm(kind)
    model = Attention(choice, norm).to(dtype)
    x = torch.randn(2, 3, 48).to(dtype)
    parameters = [norm.weight] if kind == "rms" else [norm.weight, norm.bias]
    definition = getattr(norm_reference, f"{kind.split()[0]}_norm")
    with torch.no_grad():
        normed = definition(x, *parameters, 1e-5).view_as(x)
        expected = [projection(normed).view(2, 3, -1, 16) for projection in model.projections]
        for actual, one in zip(model(x), expected, strict=True):
            assert_same_bits(actual, one)
        is_compiled = dtype == torch.float32 and kind in ("rms", "layer")
        compiled = torch.compile(model, fullgraph=True) if is_compiled else model
        for actual, one in zip(compiled(x), expected, strict=True):
            assert_same_bits(actual, one)


def test_norms_of_a_llama():
    """transformers' attention and feed-forward blocks take what the norm gives, as it is."""
    hf = pytest.importorskip("transformers")
    sizes = {"hidden_size": 64, "intermediate_size": 96, "vocab_size": 50}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "num_hidden_layers": 2}
    model = hf.LlamaForCausalLM(hf.LlamaConfig(**sizes, **heads)).eval()
    for block in model.model.layers:
        pack(block)
    ids = torch.randint(0, 50, (2, 7))
    with torch.no_grad():
        before = model(ids).logits
        for block in model.model.layers:
            for name in ("input_layernorm", "post_attention_layernorm"):
                setattr(block, name, QuantizingRMSNorm.from_norm(getattr(block, name)))
        # The norms differ by roundings, which a q now and then makes one step of int8.
        torch.testing.assert_close(model(ids).logits, before, rtol=0, atol=0.02)


def pack(block: nn.Module, choice: str = "int8") -> None:
    for name, layer in list(block.named_modules()):
        if isinstance(layer, nn.Linear):
            block.set_submodule(name, packed_nn.pack_linear(layer, choice))


class Block(nn.Module):
    """Of a pre-norm transformer (ViT, GPT-2): each norm is read by linear layers alone."""

    def __init__(self, norm: type[nn.LayerNorm]) -> None:
        super().__init__()
        self.norm1, self.norm2 = norm(48), norm(48)
        self.query, self.key, self.value = (nn.Linear(48, 48) for _ in range(3))
        self.up, self.down = nn.Linear(48, 96), nn.Linear(96, 48)

    def forward(self, x: Tensor) -> Tensor:
        normed = self.norm1(x)
        heads = [part(normed).unflatten(-1, (4, 12)).transpose(1, 2) for part in self.parts()]
        x = x + nn.functional.scaled_dot_product_attention(*heads).transpose(1, 2).flatten(2)
        return x + self.down(nn.functional.gelu(self.up(self.norm2(x))))

    def parts(self) -> tuple[nn.Module, ...]:
        return self.query, self.key, self.value


@each_op
def test_pre_norm_block(choice):
    """Served, it differs from the block with torch's norms by roundings; in training not at all."""
    block, fused = Block(nn.LayerNorm), Block(QuantizingLayerNorm)
    for parameter in block.parameters():
        parameter.data += torch.randn(parameter.shape) / 8
    fused.load_state_dict(block.state_dict())
    pack(block, choice)
    pack(fused, choice)
    x = torch.randn(2, 5, 48)
    with torch.no_grad():
        expected = block(x)
        torch.testing.assert_close(fused(x), expected, rtol=0, atol=0.05)
        assert isinstance(fused.norm1(x), QuantizedRows)
    trained = [torch.randn(2, 5, 48), torch.randn(2, 5, 48, requires_grad=True)]
    for x in trained:  # of the norms alone, and of x, too
        results = []
        for model in (block, fused):
            model.zero_grad()
            y = model(x)
            y.square().sum().backward()
            given = [x] if x.requires_grad else []
            results.append([y, *(leaf.grad.clone() for leaf in (*given, *model.parameters()))])
            x.grad = None
        for a, b in zip(*results, strict=True):
            assert torch.equal(a, b)


@pytest.mark.parametrize("kind", ["rms", "layer"])
def test_norm_gives_a_tensor_where_a_gradient_is_wanted(kind):
    torchs = {"rms": nn.RMSNorm, "layer": nn.LayerNorm}[kind](48)
    torchs.weight.data = torch.rand(48)
    ours = type(example_norm(kind)).from_norm(torchs.train())
    assert ours.weight is torchs.weight
    assert (ours.eps, ours.training) == (torchs.eps, True)
    x = torch.randn(3, 48, requires_grad=True)
    assert torch.equal(ours(x), torchs(x))
    ours.requires_grad_(False)
    assert torch.equal(ours(x), torchs(x))
    assert isinstance(ours(x.detach()), QuantizedRows)
    with torch.no_grad():
        assert isinstance(ours(x), QuantizedRows)
    ours.load_state_dict(torchs.state_dict())
    assert repr(ours) == repr(torchs).replace(type(torchs).__name__, type(ours).__name__)


def test_a_norm_over_several_dimensions_is_refused():
    with pytest.raises(ValueError, match=r"of the last dimension; normalized_shape is \(3, 4\)"):
        QuantizingLayerNorm((3, 4))
    with pytest.raises(ValueError, match="rows of the last dimension"):
        QuantizingRMSNorm.from_norm(nn.RMSNorm((3, 4)))

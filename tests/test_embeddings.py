"""INT8 embeddings: the layer, tables that output layers share, recipes, training, checkpoints."""

import copy
import json

import pytest
import torch
import trine
from fake_timers import says
from linear_inputs import DTYPES
from test_compress_transformers import FACTORIES, TOKENS
from torch import nn
from trine import Recipe, TrineConfig
from trine.nn import Int8Embedding, Int8Linear, layer_kinds
from trine.quantize import QatEmbedding, post_training, prepare_qat

BOTH = Recipe("int8", embedding="int8", prefer="size")
# The modules that share the table, and the other embeddings, of which BERT has one with two rows.
SHARED = {
    "bert": ("bert.embeddings.word_embeddings", "cls.predictions.decoder"),
    "gpt2": ("transformer.wte", "lm_head"),
}
OTHERS = {"bert": 2, "gpt2": 1}


class Tied(nn.Module):
    """A table that an output layer with a bias shares."""

    def __init__(self, v: int = 30, d: int = 20) -> None:
        super().__init__()
        self.table, self.body = nn.Embedding(v, d, padding_idx=1), nn.Linear(d, d)
        self.head = nn.Linear(d, v)
        self.head.weight = self.table.weight

    def forward(self, indices: torch.Tensor) -> torch.Tensor:
        return self.head(self.body(self.table(indices)).relu())


IDS = torch.tensor([[3, 1, 4, 1, 5], [9, 2, 6, 5, 29]])


def share_one_table(model: nn.Module, *names: str) -> bool:
    first, *others = (model.get_submodule(name) for name in names)
    return all(
        getattr(first, key) is getattr(other, key)
        for other in others
        for key in ("packed_weight", "weight_scale")
    )


class TestLayer:
    @pytest.mark.parametrize("dtype", DTYPES)
    def test_rows_against_float64(self, dtype):
        """Each row by its largest magnitude, from the formula: at most half a step from float."""
        table = nn.Embedding(50, 33, padding_idx=3).to(dtype)
        layer, indices = Int8Embedding.from_embedding(table), torch.randint(50, (4, 7))
        wide = table.weight.double()
        step = (wide.abs().amax(1, keepdim=True) / 127).float().double()
        expected = ((wide / step).round() * step)[indices]
        atol = 1e-6 if dtype == torch.float32 else 2e-2
        torch.testing.assert_close(layer(indices).double(), expected, rtol=0, atol=atol)
        assert layer(indices).dtype == dtype
        assert (
            (layer(indices).double() - wide[indices]).abs() <= step[indices] * 0.51 + atol
        ).all()
        assert (layer(indices[indices == 3]) == 0).all()

    @pytest.mark.parametrize("dtype", DTYPES)
    def test_weight_is_what_the_rows_are(self, dtype):
        layer = Int8Embedding.from_embedding(nn.Embedding(9, 20).to(dtype))
        assert torch.equal(layer.weight, layer(torch.arange(9)))
        assert layer.weight.shape == (9, 20)
        assert layer.weight.dtype == dtype

    def test_state(self):
        layer = Int8Embedding.from_embedding(nn.Embedding(9, 20, padding_idx=2))
        again = layer_kinds[layer.kind](**json.loads(json.dumps(layer.config())))
        assert again(torch.arange(9)).isnan().all()  # empty
        again.load_state_dict(layer.state_dict())
        assert torch.equal(again(torch.arange(9)), layer(torch.arange(9)))
        half = nn.Sequential(copy.deepcopy(layer)).half()[0]
        assert half(torch.arange(9)).dtype == half.weight.dtype == torch.float16
        assert torch.equal(half.weight_scale, layer.weight_scale)
        assert not list(layer.parameters())
        assert str(layer) == (
            "Int8Embedding(num_embeddings=9, embedding_dim=20, padding_idx=2, dtype=float32)"
        )

    def test_errors(self):
        spoilt = nn.Embedding(3, 4)
        spoilt.weight.data[1, 1] = torch.nan
        for message, embedding in (
            ("takes torch.nn.Embedding; got Linear", nn.Linear(3, 4)),
            ("max_norm is 2.0: such an embedding rescales", nn.Embedding(3, 4, max_norm=2.0)),
            ("torch.float64; convert", nn.Embedding(3, 4).double()),
            ("holds NaN or infinity", spoilt),
            ("on the meta device", nn.Embedding(3, 4, device="meta")),
        ):
            with pytest.raises(ValueError, match=message):
                Int8Embedding.from_embedding(embedding)
        with pytest.raises(IndexError, match=r"\[0, 30\), one is 30"):
            trine.compress(Tied(), BOTH, IDS)(torch.tensor([30]))
        with pytest.raises(ValueError, match="embedding is 'ternary'"):
            Recipe(embedding="ternary")


class TestCompress:
    @pytest.mark.parametrize(("ratio", "swapped"), [(0.97, True), (0.8, False), (1.1, True)])
    def test_alone_it_is_swapped_where_it_is_not_slower(self, ratio, swapped):
        model = nn.Sequential(nn.Embedding(30, 20), nn.Linear(20, 4))
        small = trine.compress(
            model, Recipe("float", embedding="int8"), IDS.int(), timer=says(ratio)
        )
        assert isinstance(small[0], Int8Embedding) == swapped
        row = small.report.layers[0]
        assert (row.name, row.choice, row.swapped) == ("0", "int8", swapped)
        assert row.bytes_after == (30 * 32 + 30 * 4 if swapped else 30 * 20 * 4)
        assert (row.timings[0].rows, row.timings[0].dtype) == (10, "int32")

    def test_patterns_and_what_is_left_alone(self):
        model = nn.ModuleDict(
            {
                "a": nn.Embedding(5, 8),
                "b": nn.Embedding(5, 8),
                "norm": nn.Embedding(5, 8, max_norm=1.0),
                "head": nn.Linear(8, 5),
            }
        )
        model.forward = None
        recipe = Recipe("float", embedding={"b": "float", "*": "int8"})
        rows = trine.compress.__globals__["candidates_of"](model, recipe)
        assert rows.units == [("a",)]
        assert rows.kept["b"] == "the recipe leaves it float"
        assert "max_norm is 1.0" in rows.kept["norm"]
        assert "a" not in trine.compress.__globals__["candidates_of"](model, Recipe()).layers

    def test_a_shared_table_is_packed_once_or_not_at_all(self):
        model = Tied()
        small = trine.compress(model, BOTH, IDS)
        assert share_one_table(small, "table", "head")
        packed, of_head = 30 * 32 + 30 * 4, 30 * 4
        by_name = {row.name: row for row in small.report.layers}
        assert by_name["table"].bytes_after == packed
        assert (by_name["head"].bytes_before, by_name["head"].bytes_after) == (of_head, of_head)
        assert small.report.model_bytes_after == packed + of_head + by_name["body"].bytes_after
        assert "all layers of one table (table, head) together" in by_name["head"].reason
        # What the head computes is what Int8Linear of the same weight does.
        x = torch.randn(3, 20)
        assert torch.equal(small.head(x), Int8Linear.from_linear(model.head)(x))

        kept = trine.compress(model, Recipe(embedding="int8"), IDS, timer=says(0.9))
        assert kept.head.weight is kept.table.weight
        assert kept.report.swapped == 0

    @pytest.mark.parametrize(
        ("recipe", "reason"),
        [
            (
                Recipe("ternary", embedding="int8"),
                "for which the recipe says 'ternary', not 'int8'",
            ),
            (Recipe({"head": "float", "*": "int8"}, embedding="int8"), "says 'float', not 'int8'"),
        ],
    )
    def test_a_shared_table_needs_int8_for_all(self, recipe, reason):
        small = trine.compress(Tied(), recipe, IDS, timer=says(2))
        by_name = {row.name: row for row in small.report.layers}
        assert reason in by_name["table"].reason
        assert not by_name["head"].swapped
        assert small.head.weight is small.table.weight

    def test_ties_hold_in_copies_and_casts(self):
        small = trine.compress(Tied(), BOTH, IDS)
        for changed in (copy.deepcopy(small), copy.deepcopy(small).half(), small.to("cpu")):
            assert share_one_table(changed, "table", "head")


@pytest.mark.parametrize("name", SHARED)
class TestModels:
    @pytest.fixture
    def small(self, name):
        small = trine.compress(FACTORIES[name]().eval(), BOTH, TOKENS)
        assert share_one_table(small, *SHARED[name])
        found = [m for m in small.modules() if isinstance(m, Int8Embedding)]
        assert len(found) == 1 + OTHERS[name]
        return small

    def test_near_the_float_model(self, name):
        model = FACTORIES[name]().eval()
        small = trine.compress(model, BOTH, TOKENS)
        expected, actual = model(**TOKENS).logits, small(**TOKENS).logits
        assert (actual - expected).norm() < 0.05 * expected.norm()

    def test_saved_and_loaded_with_equal_bits(self, name, small, tmp_path):
        trine.save(small, tmp_path / "a.trine")
        size = (tmp_path / "a.trine").stat().st_size
        for like in (None, FACTORIES[name]):
            again = trine.load(tmp_path / "a.trine", like=like)
            assert share_one_table(again, *SHARED[name])
            assert torch.equal(again(**TOKENS).logits, small(**TOKENS).logits)
            trine.save(again, tmp_path / "b.trine")
            assert (tmp_path / "b.trine").stat().st_size == size

    def test_saved_by_transformers(self, name, small, tmp_path):
        small.save_pretrained(tmp_path)
        with torch.no_grad():
            again = type(small).from_pretrained(tmp_path)
            assert share_one_table(again, *SHARED[name])
            assert torch.equal(again(**TOKENS).logits, small(**TOKENS).logits)

    def test_quantised_while_loading(self, name, tmp_path):
        model = FACTORIES[name]().eval()
        model.save_pretrained(tmp_path / "float")
        config = TrineConfig("int8", embedding="int8")
        small = type(model).from_pretrained(tmp_path / "float", quantization_config=config)
        assert share_one_table(small, *SHARED[name])
        small.save_pretrained(tmp_path / "small")
        again = type(model).from_pretrained(tmp_path / "small")
        assert again.config.quantization_config.embedding == "int8"
        assert share_one_table(again, *SHARED[name])
        assert torch.equal(again(**TOKENS).logits, small(**TOKENS).logits)

    def test_trained_and_converted_with_equal_bits(self, name):
        qat = prepare_qat(FACTORIES[name](), BOTH).train()
        table, head = map(qat.get_submodule, SHARED[name])
        assert isinstance(table, QatEmbedding)
        assert table.weight is head.weight
        optimizer = torch.optim.SGD(qat.parameters(), 0.1)
        for _ in range(2):
            optimizer.zero_grad()
            qat(**TOKENS, labels=TOKENS["input_ids"]).loss.backward()
            optimizer.step()
        small = trine.convert(qat.eval())
        assert share_one_table(small, *SHARED[name])
        with torch.no_grad():
            assert torch.equal(small(**TOKENS).logits, qat(**TOKENS).logits)

    def test_after_training(self, name):
        small = post_training(FACTORIES[name](), BOTH, [TOKENS], rounding="gptq")
        assert share_one_table(small, *SHARED[name])


class TestQat:
    @pytest.mark.parametrize("dtype", DTYPES)
    def test_bits_of_the_packed_layer_in_both_modes(self, dtype):
        qat = prepare_qat(nn.Sequential(nn.Embedding(30, 20)).to(dtype), BOTH)
        small = trine.convert(qat)
        assert isinstance(small[0], Int8Embedding)
        for mode in (True, False):
            assert torch.equal(qat.train(mode)(IDS), small(IDS))

    def test_gradients_of_rows_against_float64(self):
        """Each looked-up row gets the sum of its gradients; the padding row gets none."""
        table = nn.Embedding(30, 20, padding_idx=1)
        (qat,) = prepare_qat(nn.Sequential(table), BOTH)
        upstream = torch.randn(2, 5, 20)
        expected = torch.zeros(30, 20, dtype=torch.float64)
        for i, index in enumerate(IDS.flatten().tolist()):
            if index != 1:
                expected[index] += upstream.reshape(-1, 20)[i].double()
        for mode in (True, False):
            qat.zero_grad()
            qat.train(mode)(IDS).backward(upstream)
            torch.testing.assert_close(qat.weight.grad.double(), expected, rtol=0, atol=1e-6)

    def test_what_cannot_train_is_named(self):
        model = nn.Sequential(nn.Embedding(5, 4, max_norm=1.0), nn.Linear(4, 2))
        assert "max_norm" in prepare_qat(model, BOTH).qat_skipped["0"]
        with pytest.raises(ValueError, match=r"leave no nn\.Linear, nn\.Conv2d or nn\.Embedding"):
            prepare_qat(model, Recipe("float", embedding="int8"))

    def test_a_bias_shared_with_a_parent_stays_shared(self):
        qat = prepare_qat(FACTORIES["bert"](), BOTH)
        assert qat.cls.predictions.decoder.bias is qat.cls.predictions.bias


def test_post_training_shows_later_layers_the_packed_table():
    model = Tied()
    seen = []
    model.body.register_forward_pre_hook(lambda module, args: seen.append(args[0].clone()))
    small = post_training(model, BOTH, [IDS], rounding="gptq")
    assert torch.equal(seen[-1], small.table(IDS))

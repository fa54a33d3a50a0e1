"""`trine compress recipe.yaml`: one recipe chains techniques on one model, to its serving."""

import json
import os
import subprocess
import sys

import pytest
import torch
import trine
from trine import cli
from trine.chain import ChainJob, run
from trine.chain import job as chain_job
from trine.chain.recipe_file import EXAMPLE
from trine.chain.stages import STAGES, Compress
from trine.nn import Int8Linear, LowRankLinear, Sparse24Linear
from typer.testing import CliRunner

transformers = pytest.importorskip("transformers")
WORDS = ["good", "fine", "nice", "bad", "poor", "dull", "film", "story", "very", "not"]
RECIPE = """\
model: model
data: {train: train.tsv, validation: train.tsv, text: sentence, batch: 8}
stages:
  - factorize: {rank: 4, layers: "*attention*", calibrate: 2, prefer: size}
  - distill: {training: {epochs: 2, learning_rate: 5e-3}}
  - qat:
      linear: {"classifier": float, "*.intermediate.*": sparse24-int8, "*": int8}
      weight: 0.8
      training: {epochs: 1, learning_rate: 1e-3}
out: out
"""


def write_files(folder):
    """A model of two layers that knows nothing, 24 sentences, and what to do."""
    torch.manual_seed(0)
    vocabulary = folder / "vocab.txt"
    vocabulary.write_text("\n".join(["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *WORDS]))
    tokenizer = transformers.BertTokenizerFast(str(vocabulary))
    config = transformers.BertConfig(
        vocab_size=len(tokenizer),
        hidden_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=32,
        max_position_embeddings=16,
    )
    tokenizer.save_pretrained(folder / "model")
    transformers.BertForSequenceClassification(config).save_pretrained(folder / "model")
    lines = [f"{WORDS[i % 6]} {WORDS[6 + i % 4]}\t{int(i % 6 < 3)}" for i in range(24)]
    (folder / "train.tsv").write_text("sentence\tlabel\n" + "\n".join(lines) + "\n")
    (folder / "recipe.yaml").write_text(RECIPE)
    return folder / "recipe.yaml"


@pytest.fixture
def recipe(tmp_path):
    return write_files(tmp_path)


@pytest.fixture(scope="module")
def done(tmp_path_factory):
    """The recipe of a job that ran to its end, and what it said."""
    path = write_files(tmp_path_factory.mktemp("done"))
    return path, invoke(str(path))


def invoke(*arguments: str):
    return CliRunner().invoke(cli.app, ["compress", *arguments], env={"COLUMNS": "200"})


SERVE = """
import sys, torch, transformers, trine
model = trine.load(sys.argv[1] + "/model.trine")
batch = transformers.AutoTokenizer.from_pretrained(sys.argv[1])(
    ["good film", "very dull story"], padding=True, return_tensors="pt"
)
with torch.inference_mode():
    torch.save((dict(batch), model(**batch).logits), sys.argv[1] + "/served.pt")
"""


def test_distillation_two_of_four_low_rank_and_qat_on_one_model(done):
    recipe, result = done
    assert result.exit_code == 0, result.output
    out = recipe.parent / "out"
    model = trine.load(out / "model.trine")
    query = model.bert.encoder.layer[1].attention.self.query
    assert isinstance(query, LowRankLinear)
    assert isinstance(query.first, Int8Linear)
    assert isinstance(query.second, Int8Linear)
    between = model.bert.encoder.layer[0].intermediate.dense
    assert isinstance(between, Sparse24Linear)
    assert between.weight_scale is not None
    assert isinstance(model.classifier, torch.nn.Linear)

    # Served elsewhere, it gives the bits of the model here.
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    subprocess.run([sys.executable, "-c", SERVE, out], check=True, env=environment)
    batch, logits = torch.load(out / "served.pt")
    with torch.inference_mode():
        assert torch.equal(model(**batch).logits, logits)

    lines = [line for line in result.output.splitlines() if line.endswith("times as fast")]
    for line, name in zip(lines, ("model", "1-factorize", "2-distill", "3-qat"), strict=True):
        assert line.startswith(name)
    assert "trine.load(" in result.output
    rows = [
        json.loads((out / name / "stage.json").read_text())["row"]
        for name in ("1-factorize", "2-distill", "3-qat")
    ]
    assert rows[2]["bytes"] < rows[1]["bytes"] == rows[0]["bytes"]
    history = (out / "3-qat" / "training" / "history.jsonl").read_text().splitlines()
    assert len(history) == 3


def noted(applied: list, apply):
    def note(stage, *arguments):
        applied.append(stage.name)
        return apply(stage, *arguments)

    return note


def test_a_job_that_was_killed_ends_with_the_same_bits(done, recipe, monkeypatch):
    apply = chain_job._apply

    def killed(stage, model, ground, folder):
        changed = apply(stage, model, ground, folder)
        if stage.name == "distill":
            raise KeyboardInterrupt
        return changed

    monkeypatch.setattr(chain_job, "_apply", killed)
    job, applied = ChainJob.read(recipe), []
    with pytest.raises(KeyboardInterrupt):
        run(job)
    assert not (job.out / "2-distill" / "model.trine").exists()
    monkeypatch.setattr(chain_job, "_apply", noted(applied, apply))
    run(job)
    assert applied == ["distill", "qat"]
    models = [path / "out" / "model.trine" for path in (done[0].parent, recipe.parent)]
    states = [trine.load(path).state_dict() for path in models]
    torch.testing.assert_close(*states, rtol=0, atol=0)

    # Nothing is done again; where the recipe changed, all from there on.
    applied.clear()
    run(job)
    assert applied == []
    recipe.write_text(RECIPE.replace("weight: 0.8", "weight: 0.7"))
    run(ChainJob.read(recipe))
    assert applied == ["qat"]
    assert models[0].read_bytes() != models[1].read_bytes()


def test_pruning_and_compression_are_stages(recipe):
    start, _, _ = RECIPE.partition("stages:")
    stages = "  - prune: {ratio: 0.5, multiple_of: 4, kinds: [neuron]}\n"
    stages += '  - factorize: {parameters: 0.6, prefer: size, method: svd, skip: "classifier"}\n'
    stages += "  - compress: {linear: int8, prefer: size}\n"
    recipe.write_text(f"{start}stages:\n{stages}out: out\n")
    rows = run(ChainJob.read(recipe))
    sizes = [row["bytes"] for row in rows]
    assert sizes == sorted(sizes, reverse=True)
    assert len(set(sizes)) == 4
    model = trine.load(recipe.parent / "out" / "model.trine")
    assert model.bert.encoder.layer[0].intermediate.dense.out_features == 16


def test_a_folder_of_something_else_is_not_deleted(recipe):
    job = ChainJob.read(recipe)
    (job.out / "1-factorize").mkdir(parents=True)
    (job.out / "1-factorize" / "mine.txt").write_text("mine")
    with pytest.raises(ValueError, match="1-factorize is in the way"):
        run(job)
    assert (job.out / "1-factorize" / "mine.txt").exists()


def test_what_a_stage_refuses_names_the_stage(recipe):
    recipe.write_text(RECIPE.replace("rank: 4", "rank: 400"))
    result = invoke(str(recipe))
    assert result.exit_code == 1
    assert "trine compress: stage 1-factorize: layer 'bert.encoder.layer.0" in result.output


def test_several_processes_are_refused(recipe, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(ValueError, match="without torchrun"):
        run(ChainJob.read(recipe))


def test_the_example_is_a_recipe(tmp_path):
    result = invoke("--example")
    assert result.output == EXAMPLE
    (tmp_path / "recipe.yaml").write_text(result.output)
    for name in ("train.tsv", "dev.tsv"):
        (tmp_path / name).touch()
    job = ChainJob.read(tmp_path / "recipe.yaml")
    assert [stage.name for stage in job.stages] == ["prune", "factorize", "distill", "qat"]
    assert job.stages[2].training.learning_rate == 5e-5
    assert Compress() == STAGES["compress"].read({}, "", "")
    assert "trine compress recipe.yaml" in invoke("--help").output


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("model: model", "", "lacks 'model'; a recipe looks like"),
        ("train: train.tsv", "train: none.tsv", "data: train: there is no file"),
        ("- factorize:", "- svd:", "stages: 1: 'svd' is no stage; there are prune, factorize"),
        ("rank: 4", "ranks: 4", "stages: 1: factorize has no 'ranks'; it has rank, energy"),
        ("rank: 4", "rank: 4, energy: 0.9", "give one of rank, energy, parameters, speedup"),
        ("rank: 4, ", "", "it has none"),
        ("rank: 4", "energy: 2", "stages: 1: factorize: Energy: the share is 2"),
        ("prefer: size", "prefer: beauty", "prefer is 'beauty'"),
        ("weight: 0.8", "weight: 3", "stages: 3: qat: weight is 3"),
        ("epochs: 2", "epoch: 2", "stages: 2: distill: training has no 'epoch'"),
        ("epochs: 2", "epochs: 0", "stages: 2: distill: Training: epochs must be at least 1"),
        ("float", "int3", "stages: 3: qat: Recipe: linear"),
        ("  - distill", "  - qat: {}\n  - distill", "3: distill cannot follow qat, whose layers"),
        ("stages:", "stages: []\nold:", "has no 'old'"),
    ],
)
def test_what_is_wrong_is_said(recipe, old, new, message):
    recipe.write_text(RECIPE.replace(old, new, 1))
    result = invoke(str(recipe))
    assert result.exit_code == 1
    assert message in result.output

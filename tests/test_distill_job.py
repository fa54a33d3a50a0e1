"""`trine distill recipe.yaml`, from files to a student that transformers load."""

import json

import pytest
import torch
from launch import launch
from safetensors.torch import load_file
from trine import cli
from trine.distill.job import read_sentences
from trine.distill.recipe_file import EXAMPLE, Data, DistillationJob
from typer.testing import CliRunner

transformers = pytest.importorskip("transformers")
WORDS = ["good", "fine", "nice", "bad", "poor", "dull", "film", "story", "very", "not"]


@pytest.fixture
def recipe(tmp_path):
    """A teacher of four layers that knows nothing, 24 sentences, and what to do."""
    torch.manual_seed(0)
    vocabulary = tmp_path / "vocab.txt"
    vocabulary.write_text("\n".join(["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *WORDS]))
    tokenizer = transformers.BertTokenizerFast(str(vocabulary))
    config = transformers.BertConfig(
        vocab_size=len(tokenizer),
        hidden_size=16,
        num_hidden_layers=4,
        num_attention_heads=2,
        intermediate_size=16,
        max_position_embeddings=16,
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
    )
    tokenizer.save_pretrained(tmp_path / "teacher")
    transformers.BertForSequenceClassification(config).save_pretrained(tmp_path / "teacher")
    lines = [f"{WORDS[i % 6]} {WORDS[6 + i % 4]}\t{int(i % 6 < 3)}" for i in range(24)]
    (tmp_path / "train.tsv").write_text("sentence\tlabel\n" + "\n".join(lines) + "\n")
    path = tmp_path / "recipe.yaml"
    path.write_text(
        "teacher: teacher\nstudent: tinybert\noptions: {layers: 2, hidden: 8, intermediate: 8}\n"
        "data: {train: train.tsv, validation: train.tsv, text: sentence, batch: 8}\n"
        "training: {epochs: 1, learning_rate: 5e-3}\nstages: {inner: {epochs: 2}}\nout: out\n"
    )
    return path


def invoke(*arguments: str):
    return CliRunner().invoke(cli.app, ["distill", *arguments], env={"COLUMNS": "200"})


def test_from_files_to_a_student(recipe):
    result = invoke(str(recipe))
    assert result.exit_code == 0, result.output
    out = recipe.parent / "out"
    student = transformers.AutoModelForSequenceClassification.from_pretrained(out)
    assert student.config.num_hidden_layers == 2
    assert transformers.AutoTokenizer.from_pretrained(out)("good film")["input_ids"]
    rows = [json.loads(r) for r in (out / "inner" / "history.jsonl").read_text().splitlines()]
    assert len(rows) == 6  # two epochs of three batches, no scores
    rows = [json.loads(r) for r in (out / "prediction" / "history.jsonl").read_text().splitlines()]
    assert len([row for row in rows if "score" in row]) == 1
    assert "the student is in" in result.output
    for name, parameters in (("teacher", None), ("student", student.num_parameters())):
        (line,) = (row for row in result.output.splitlines() if row.startswith(name))
        assert parameters is None or f"{parameters:,}" in line
        assert line.endswith(" ms")


def test_two_processes_make_the_student_of_one(recipe):
    """Two batches of 4 are one of 8."""
    text, out = recipe.read_text(), recipe.parent
    result = launch("-m", "trine", "distill", str(recipe))
    assert result.returncode == 0, result.stderr
    two = text.replace("batch: 8", "batch: 4").replace("out: out", "out: two")
    two = two.replace("{epochs: 1, ", "{epochs: 1, parallel: ddp, processes: 2, ")
    recipe.write_text(two)
    result = launch("-m", "trine", "distill", str(recipe), processes=2)
    assert result.returncode == 0, result.stderr
    assert result.stdout.count("the student is in") == 1
    students = [load_file(out / name / "model.safetensors") for name in ("out", "two")]
    torch.testing.assert_close(students[1], students[0], rtol=1e-4, atol=1e-6)


def test_the_example_is_a_recipe(tmp_path):
    result = invoke("--example")
    assert result.output == EXAMPLE
    (tmp_path / "recipe.yaml").write_text(result.output)
    for name in ("train.tsv", "dev.tsv"):
        (tmp_path / name).touch()
    job = DistillationJob.read(tmp_path / "recipe.yaml")
    assert job.training.learning_rate == 5e-4
    assert job.stages == {"inner": {"epochs": 10}}
    assert job.data.train == tmp_path / "train.tsv"
    assert "trine distill recipe.yaml" in invoke("--help").output


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        (
            "student: tinybert",
            "student: tiny",
            "student must be one of distilbert, minilm, tiny",
        ),
        ("teacher: teacher", "", "lacks 'teacher'; a recipe looks like"),
        ("epochs: 1", "epoch: 1", "training has no 'epoch'; it has epochs, steps"),
        ("epochs: 1", "epochs: 0", "epochs must be at least 1"),
        ("train: train.tsv", "train: none.tsv", "data: train: there is no file"),
        (
            "{inner: {epochs: 2}}",
            "{first: {epochs: 2}}",
            "has no stage 'first'; it has inner, ",
        ),
        ("layers: 2,", "depth: 2,", "unexpected keyword argument 'depth'"),
        ("out: out", "out: [", "is not YAML"),
        ("epochs: 1", "parallel: fsdp", "parallel must be auto, none or ddp here, not fsdp"),
        ("epochs: 2", "parallel: fsdp", "stages: inner: parallel must be auto, none or ddp here"),
    ],
)
def test_recipes_that_are_wrong(recipe, old, new, message):
    text = recipe.read_text()
    assert old in text
    recipe.write_text(text.replace(old, new))
    result = invoke(str(recipe))
    assert result.exit_code == 1
    assert message in result.output


def test_what_is_missing_is_said(recipe, monkeypatch):
    monkeypatch.setattr(cli, "DISTILL_NEEDS", ("torch", "no_such_package"))
    result = invoke(str(recipe))
    assert "trine distill needs no_such_package" in result.output
    assert "pip install 'trine[distill]'" in result.output


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("a.tsv", 'text\tlabel\n"good\t1\n', None),
        ("a.csv", 'text,label\n"good, very",1\n', None),
        ("a.jsonl", '{"text": "good", "label": 1}\n', None),
        ("a.txt", "good 1", "must be .tsv, .csv or .jsonl"),
        ("a.tsv", "sentence\tlabel\ngood\t1\n", "row 1 lacks 'text' or 'label'; it has 'sentence'"),
        ("a.tsv", "text\tlabel\ngood\t1\nbad\t2\n", "row 2: the label '2' is none of 0 to 1"),
        ("a.tsv", "text\tlabel\n", "holds no examples"),
    ],
)
def test_files_of_sentences(tmp_path, name, text, message):
    (tmp_path / name).write_text(text)
    data = Data(tmp_path, tmp_path)
    if message is not None:
        with pytest.raises(ValueError, match=message):
            read_sentences(tmp_path / name, data, 2)
        return
    ((sentence, label),) = read_sentences(tmp_path / name, data, 2)
    assert label == 1
    assert sentence in ('"good', "good, very", "good")

"""DistillationTrainer and the ready-made students, on small random models of transformers."""

import json
from pathlib import Path

import pytest
import torch
from launch import launch
from safetensors.torch import load_file
from torch import nn
from trine.distill import Distiller, Fixed, Frozen, Training, distilbert, minilm, tinybert
from trine.distill.objectives import HiddenStates, Labels, SoftTargets, Together
from trine.distill.ready_made import projections

transformers = pytest.importorskip("transformers")
pytest.importorskip("accelerate")
from trine.distill import DistillationTrainer  # noqa: E402  (needs both)

SCRIPT = Path(__file__).with_name("run_trainer.py")

VOCABULARY = 50


def bert(layers=4, hidden=24, task="SequenceClassification"):
    config = transformers.BertConfig(
        vocab_size=VOCABULARY,
        hidden_size=hidden,
        num_hidden_layers=layers,
        num_attention_heads=4,
        intermediate_size=32,
        max_position_embeddings=16,
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
    )
    return getattr(transformers, f"BertFor{task}")(config)


def gpt2(layers):
    dropout = dict.fromkeys(("resid_pdrop", "embd_pdrop", "attn_pdrop"), 0.0)
    config = transformers.GPT2Config(
        vocab_size=VOCABULARY, n_positions=16, n_embd=16, n_layer=layers, n_head=2, **dropout
    )
    return transformers.GPT2LMHeadModel(config)


def t5(layers):
    config = transformers.T5Config(
        vocab_size=VOCABULARY,
        d_model=16,
        d_kv=8,
        d_ff=32,
        num_layers=layers,
        num_heads=2,
        dropout_rate=0.0,
        decoder_start_token_id=0,
    )
    return transformers.T5ForConditionalGeneration(config)


def examples(labels, count=16):
    """Sentences of 5 to 8 tokens, padded to 8."""
    draws = torch.Generator().manual_seed(1)
    made = []
    for _ in range(count):
        ids = torch.randint(3, VOCABULARY, (8,), generator=draws)
        mask = torch.arange(8) < torch.randint(5, 9, (1,), generator=draws)
        ids[~mask] = 0
        made.append({"input_ids": ids, "attention_mask": mask.long()})
    for item in made:
        ids, mask = item["input_ids"], item["attention_mask"].bool()
        if labels == "classes":
            item["labels"] = ids[0] % 2
        else:
            item["labels"] = torch.where(mask, ids, -100)
    return made


def trainer(student, tmp_path, **options):
    settings = {
        "output_dir": str(tmp_path),
        "max_steps": 4,
        "per_device_train_batch_size": 4,
        "learning_rate": 1e-3,
        "report_to": [],
        "logging_steps": 1,
        "save_strategy": "no",
        "disable_tqdm": True,
        "use_cpu": True,
        **options.pop("settings", {}),
    }
    return DistillationTrainer(student, transformers.TrainingArguments(**settings), **options)


SOFT_AND_HARD = Fixed({"soft": 0.7, "hard": 0.3})


@pytest.mark.parametrize("task", ["classification", "masked", "causal", "seq2seq"])
def test_every_task_trains_on_the_objective(task, tmp_path):
    """The first loss is the objective's of the untrained student, by plain torch."""
    make = {
        "classification": bert,
        "masked": lambda layers: bert(layers, task="MaskedLM"),
        "causal": gpt2,
        "seq2seq": t5,
    }[task]
    teacher, student = make(3).eval(), make(2).eval()
    of_tokens = task != "classification"
    data = examples("tokens" if of_tokens else "classes", 4)
    batch = {name: torch.stack([item[name] for item in data]) for name in data[0]}
    labels = batch["labels"]
    with torch.no_grad():  # models given labels make the decoder's inputs themselves
        s, t = (model(**batch).logits for model in (student, teacher))
    if task == "causal":
        s, t, labels = s[:, :-1], t[:, :-1], labels[:, 1:]
    counted = (labels != -100).flatten()
    s, t = (z.flatten(0, -2)[counted].double() for z in (s, t))
    soft = 4 * nn.functional.kl_div(
        (s / 2).log_softmax(1), (t / 2).log_softmax(1), log_target=True, reduction="batchmean"
    )
    expected = 0.7 * soft + 0.3 * nn.functional.cross_entropy(s, labels.flatten()[counted])
    shift = task == "causal"
    rows = "labels" if of_tokens else None
    made = trainer(
        student,
        tmp_path,
        teacher=Frozen(teacher),
        objective=Together(SoftTargets(2.0, labels=rows, shift=shift), Labels(shift=shift)),
        balance=SOFT_AND_HARD,
        train_dataset=data,
        eval_dataset=data,
    )
    made.train()
    first = next(row for row in made.state.log_history if "loss" in row)
    assert first["loss"] == pytest.approx(expected.item(), rel=1e-3)
    assert first["soft"] == pytest.approx(soft.item(), rel=1e-3)
    assert made.evaluate()["eval_loss"] < first["loss"]


def with_adapter(tmp_path, **options):
    teacher, student = bert(3, hidden=24), bert(2, hidden=16)
    return trainer(
        student,
        tmp_path,
        teacher=Frozen(teacher, {"last": "bert.encoder.layer.2"}),
        objective=HiddenStates([("last", "last")], nn.Linear(16, 24, bias=False)),
        balance=Fixed({"hidden": 1.0}),
        paths={"last": "bert.encoder.layer.1"},
        train_dataset=examples("classes"),
        adapter_rate=5.0,
        **options,
    )


def test_adapters_are_trained_and_kept_beside_the_model(tmp_path):
    torch.manual_seed(0)
    whole = with_adapter(tmp_path / "whole", settings={"save_strategy": "steps", "save_steps": 2})
    before = whole.distillation["objective"].projection.weight.detach().clone()
    whole.create_optimizer()
    rates = [group["lr"] for group in whole.optimizer.param_groups]
    assert rates[-1] == pytest.approx(5 * rates[0])
    whole.train()
    after = whole.distillation["objective"].projection.weight
    assert not torch.equal(before, after)
    saved = transformers.BertForSequenceClassification.from_pretrained(
        tmp_path / "whole" / "checkpoint-4"
    )
    assert not [name for name in saved.state_dict() if "distillation" in name]

    torch.manual_seed(0)
    resumed = with_adapter(tmp_path / "resumed")
    resumed.train(resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-2"))
    again = resumed.distillation["objective"].projection.weight
    torch.testing.assert_close(again, after)
    torch.testing.assert_close(
        resumed.model.state_dict(), whole.model.state_dict(), rtol=1e-5, atol=1e-7
    )


def test_two_processes_give_the_result_of_one(tmp_path):
    """Two batches of 4 are one of 8, also for the adapter, of which each process has another."""
    one, two = tmp_path / "one", tmp_path / "two"
    for folder, batch, processes in ((one, 8, None), (two, 4, 2)):
        folder.mkdir()
        done = launch(str(SCRIPT), str(folder), str(batch), processes=processes)
        assert done.returncode == 0, done.stderr
        for rank in range(processes or 1):
            report = json.loads((folder / f"report-{rank}.json").read_text())
            assert report == {"processes": processes or 1, "steps": 4}
    torch.testing.assert_close(
        load_file(two / "model.safetensors"),
        load_file(one / "model.safetensors"),
        rtol=1e-5,
        atol=1e-7,
    )
    expected = torch.load(one / "adapter-0.pt")
    for rank in range(2):
        torch.testing.assert_close(torch.load(two / f"adapter-{rank}.pt"), expected)


def test_a_launch_that_would_run_something_else(monkeypatch, tmp_path):
    """On a machine without a GPU, several processes that know nothing of each other."""
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(ValueError, match="2 processes were launched and the Trainer runs as 1"):
        with_adapter(tmp_path, settings={"use_cpu": False})


@pytest.mark.parametrize("make", [distilbert, tinybert, minilm])
def test_ready_made_students_learn(make):
    torch.manual_seed(0)
    teacher = bert(4)
    options = {} if make is distilbert else {"layers": 2, "hidden": 12, "intermediate": 16}
    made = make(teacher, **options)
    assert made.student.config.num_hidden_layers == 2
    assert len(made.student.bert.encoder.layer) == 2
    loader = torch.utils.data.DataLoader(examples("classes"), 8)
    for stage in made.stages:
        distiller = Distiller(
            made.student,
            made.teacher,
            stage.objective,
            stage.balance,
            paths=made.paths,
            training=Training(epochs=15, learning_rate=3e-3, warmup=0.0),
        )
        distiller.fit(loader)
        losses = [row["loss"] for row in distiller.history]
        assert sum(losses[-2:]) < sum(losses[:2]), stage.name


def test_what_ready_made_students_look_at():
    teacher = bert(4)
    made = distilbert(teacher)
    layers = teacher.bert.encoder.layer
    for kept, layer in zip(made.student.bert.encoder.layer, (1, 3), strict=True):
        assert torch.equal(kept.output.dense.weight, layers[layer].output.dense.weight)
    assert made.paths == {"last": "bert.encoder.layer.1"}
    made = minilm(bert(4), layers=2, hidden=12, intermediate=16)
    assert made.paths["k"] == "bert.encoder.layer.1.attention.self.key"
    made = tinybert(bert(4), layers=2, hidden=12, intermediate=16)
    hidden, attention = made.stages[0].objective.objectives
    assert hidden.layers == [(f"hidden_states.{m}", f"hidden_states.{2 * m}") for m in range(3)]
    assert attention.layers == [("attentions.0", "attentions.1"), ("attentions.1", "attentions.3")]
    with pytest.raises(ValueError, match="no separate layers for queries"):
        projections(gpt2(2))

"""A small DistillationTrainer with an adapter, for a test that spreads it over processes.

python run_trainer.py FOLDER BATCH: writes model.safetensors, adapter-RANK.pt, report-RANK.json.
"""

import json
import sys
from pathlib import Path

import torch
import transformers
from torch import nn
from trine.distill import DistillationTrainer, Fixed, Frozen
from trine.distill.objectives import HiddenStates, Labels, SoftTargets, Together


def bert(layers: int, hidden: int):
    config = transformers.BertConfig(
        vocab_size=50,
        hidden_size=hidden,
        num_hidden_layers=layers,
        num_attention_heads=4,
        intermediate_size=32,
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
    )
    return transformers.BertForSequenceClassification(config)


def main() -> None:
    folder, batch = Path(sys.argv[1]), int(sys.argv[2])
    arguments = transformers.TrainingArguments(
        output_dir=str(folder),
        num_train_epochs=2,
        per_device_train_batch_size=batch,
        learning_rate=1e-2,
        optim="sgd",  # Adam would blow up what differs in rounding
        report_to=[],
        save_strategy="no",
        disable_tqdm=True,
        use_cpu=True,
    )
    torch.manual_seed(0)
    teacher, student = bert(2, 24), bert(1, 16)
    ids = torch.randint(3, 50, (16, 8))
    data = [{"input_ids": row, "labels": row[0] % 2} for row in ids]
    torch.manual_seed(1000 * arguments.process_index)  # the first process's adapter is what counts
    adapter = nn.Linear(16, 24, bias=False)
    trainer = DistillationTrainer(
        student,
        arguments,
        teacher=Frozen(teacher, {"h": "bert.encoder.layer.1"}),
        objective=Together(
            SoftTargets(2.0), Labels(), HiddenStates([("h", "h")], adapter, mask=None)
        ),
        balance=Fixed({"soft": 0.5, "hard": 0.5, "hidden": 0.1}),
        paths={"h": "bert.encoder.layer.0"},
        train_dataset=data,
    )
    trainer.train()
    report = {"processes": arguments.world_size, "steps": trainer.state.global_step}
    (folder / f"report-{arguments.process_index}.json").write_text(json.dumps(report))
    torch.save(adapter.state_dict(), folder / f"adapter-{arguments.process_index}.pt")
    if arguments.process_index == 0:
        student.save_pretrained(folder)


if __name__ == "__main__":
    main()

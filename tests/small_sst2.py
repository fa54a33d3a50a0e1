"""SST-2 made small: an encoder with random weights, and phrases of a few letters."""

import random
from pathlib import Path

import pytest
import torch
from trine.demo.sentences import Encoder

from benchmarks import sst2, study

A = 5  # the token id of "a"


def tokenize(texts: list[str]) -> dict[str, torch.Tensor]:
    """A letter is a token."""
    rows = [torch.tensor([ord(c) - ord("a") + A for c in text if c != " "]) for text in texts]
    ids = torch.nn.utils.rnn.pad_sequence(rows, batch_first=True)
    return {"input_ids": ids, "attention_mask": (ids > 0).long()}


def text_of(ids: torch.Tensor) -> str:
    return "".join(chr(i - A + ord("a")) for i in ids.tolist())


def make_encoder(layers: int) -> Encoder:
    from transformers import BertConfig, BertModel

    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=40,
        hidden_size=16,
        num_hidden_layers=layers,
        num_attention_heads=2,
        intermediate_size=32,
        max_position_embeddings=32,
    )
    return Encoder(BertModel(config).eval(), tokenize, config.to_dict())


def write_data(folder: Path) -> None:
    """folder/sst2/*.tsv: a phrase is positive where it has an a, and negative where it has a b."""
    draws = random.Random(0)
    (folder / "sst2").mkdir()
    for name, count in (("train", 300), ("dev", 20), ("test", 40)):
        lines = ["sentence\tlabel"]
        for _ in range(count):
            positive = draws.random() < 0.5
            letters = draws.choices("cdef", k=draws.randint(0, 5)) + ["ab"[not positive]] * 3
            draws.shuffle(letters)
            lines.append(f"{' '.join(letters)} \t{int(positive)}")
        text = "\n".join(lines) + "\n"
        (folder / "sst2" / f"{name}.tsv").write_text(text, encoding="utf-8")


def stand_in(patch: pytest.MonkeyPatch, folder: Path, layers: int) -> Path:
    """Studies take the encoder and the data of `folder`, and write there; --data of it."""
    patch.setattr(sst2, "TEACHERS", folder / "teachers")
    patch.setattr(sst2, "load_encoder", lambda: make_encoder(layers))
    patch.setattr(study, "FOLDER", folder)
    patch.setattr(study, "UNFINISHED", folder / "unfinished")
    write_data(folder)
    return folder

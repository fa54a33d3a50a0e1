"""What the studies on SST-2 share: its phrases, the fine-tuned encoder that they begin with, and
how a model is judged.

SST-2 (Socher et al. 2013, in the form of GLUE): is a phrase of a film review positive? DIR/sst2
holds train.tsv, phrases and sentences; dev.tsv, more of them, for decisions; test.tsv, the usual
872 sentences, for the figures.
"""

import argparse
import copy
import csv
import hashlib
import json
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset, Sampler
from trine.backends import cpu_isas
from trine.demo.sentences import Encoder, load_encoder, pooled
from trine.distill import Distiller, Fixed, Training
from trine.distill.fingerprints import teacher_hash
from trine.distill.objectives import (
    AttentionMaps,
    HiddenStates,
    Labels,
    Objective,
    View,
    uniform_layers,
)
from trine.evaluate import alternate, correct

DATA = "sst2/train.tsv"  # for parse_arguments
TEACHERS = Path("out/sst2")
CLASSES = 2
# Of training. 16 bits are twice as fast where the processor multiplies them, three times as slow
# where it does not, and as accurate.
PRECISION = "bf16" if "avx512bf16" in cpu_isas() else "fp32"
DTYPE = {"bf16": torch.bfloat16, "fp32": torch.float32}[PRECISION]
JUDGED_AT_ONCE = 64
# Tokens of the phrases of train.tsv that are most like test.tsv's sentences, which have 25 on
# average where all phrases have 13. To follow a teacher on those teaches more of such sentences.
LONG = 16


@dataclass(frozen=True)
class Scale:
    """How much of SST-2 there is to learn from.

    labelled: rows of train.tsv with their labels, drawn at random. The others are known without
    labels. teacher: how the encoder is fine-tuned on them.
    """

    labelled: int
    teacher: Training


def scale_of(arguments: argparse.Namespace, seed: int) -> Scale:
    """The subset and the training of `--quick`, of `--whole`, and of neither."""
    rows, epochs = 8000, 2
    if arguments.quick:
        rows, epochs = 2000, 1
    elif arguments.whole:
        rows, epochs = 10**9, 3
    training = Training(
        epochs=epochs, learning_rate=1e-4, decay="linear", precision=PRECISION, seed=seed
    )
    return Scale(rows, training)


class Phrases(Dataset):
    """Token ids [rows, longest], padded; how many of them count; labels, -100 where unknown."""

    def __init__(self, ids: Tensor, lengths: Tensor, labels: Tensor) -> None:
        self.ids, self.lengths, self.labels = ids, lengths, labels

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, row: int) -> dict[str, Tensor]:
        ids = self.ids[row, : self.lengths[row]]
        return {"input_ids": ids, "labels": self.labels[row], "index": row}

    def rows(self, rows: Tensor | slice) -> "Phrases":
        return Phrases(self.ids[rows], self.lengths[rows], self.labels[rows])

    def at_least(self, tokens: int) -> "Phrases":
        return self.rows(self.lengths >= tokens)

    def without_labels(self) -> "Phrases":
        return Phrases(self.ids, self.lengths, torch.full_like(self.labels, -100))

    def __add__(self, other: "Phrases") -> "Phrases":
        pairs = zip(vars(self).values(), vars(other).values(), strict=True)
        return Phrases(*(torch.cat(pair) for pair in pairs))

    def loader(self, batch: int) -> DataLoader:
        """Of batches as models of Hugging Face and a `Distiller` take them, in random order."""
        return DataLoader(self, batch_sampler=ByLength(self.lengths, batch), collate_fn=padded)

    def in_order(self, batch: int = JUDGED_AT_ONCE) -> Iterator[tuple[Tensor, dict[str, Tensor]]]:
        """All rows by length: their numbers, and the batch."""
        for rows in self.lengths.argsort(stable=True).split(batch):
            yield rows, padded([self[row] for row in rows])


class ByLength(Sampler[list[int]]):
    """Random batches of rows of nearly the same length, so that there is little padding.

    Rows are shuffled, sorted by length within `pool` batches, and the batches shuffled again; with
    torch's random numbers, which a `Distiller` seeds.
    """

    def __init__(self, lengths: Tensor, batch: int, pool: int = 32) -> None:
        self.lengths, self.batch, self.pool = lengths, batch, pool

    def __len__(self) -> int:
        return -(-len(self.lengths) // self.batch)

    def __iter__(self) -> Iterator[list[int]]:
        batches: list[list[int]] = []
        for rows in torch.randperm(len(self.lengths)).split(self.batch * self.pool):
            by_length = rows[self.lengths[rows].argsort(stable=True)]
            batches += [rows.tolist() for rows in by_length.split(self.batch)]
        for number in torch.randperm(len(batches)).tolist():
            yield batches[number]


def padded(rows: list[dict[str, Tensor]]) -> dict[str, Tensor]:
    """One batch of single rows: ids padded with 0, as BERT's are, and the mask that says so."""
    ids = nn.utils.rnn.pad_sequence([row["input_ids"] for row in rows], batch_first=True)
    lengths = torch.tensor([len(row["input_ids"]) for row in rows])
    mask = (torch.arange(ids.shape[1]) < lengths[:, None]).long()
    batch = {"input_ids": ids, "attention_mask": mask}
    for name in rows[0].keys() - {"input_ids"}:
        batch[name] = torch.stack([torch.as_tensor(row[name]) for row in rows])
    return batch


def read(path: Path, encoder: Encoder) -> Phrases:
    """A file of "sentence<TAB>label" with that line as its head."""
    with path.open(encoding="utf-8", newline="") as lines:
        rows = list(csv.reader(lines, delimiter="\t", quoting=csv.QUOTE_NONE))
    if rows[:1] != [["sentence", "label"]] or len(rows) < 2 or {len(row) for row in rows} != {2}:
        raise ValueError(f"{path} must have lines 'sentence<TAB>label' with that one as the first")
    texts, labels = zip(*rows[1:], strict=True)
    if not set(labels) <= {"0", "1"}:
        raise ValueError(f"{path}: labels must be 0 or 1; there are {sorted(set(labels))}")
    tokens = encoder.tokenize([text.strip() for text in texts])
    lengths = tokens["attention_mask"].sum(1)
    return Phrases(tokens["input_ids"], lengths, torch.tensor([int(label) for label in labels]))


def classifier(encoder: Encoder) -> nn.Module:
    """The encoder with a new head for two classes, as Hugging Face has it.

    Attention is computed step by step: for short rows that is faster than torch's fused one, whose
    backward pass takes six times as long there.
    """
    from transformers import AutoConfig, AutoModelForSequenceClassification

    config = AutoConfig.for_model(**{**encoder.config, "num_labels": CLASSES})
    model = AutoModelForSequenceClassification.from_config(config, attn_implementation="eager")
    model.base_model.load_state_dict(encoder.model.state_dict())
    return model.train()


def without_word_vectors(model: nn.Module) -> nn.Module:
    """The same model, whose word embeddings will not be trained.

    They are half of the encoder's weights: a pass over all of them with each update would take as
    long as the rest of it, for words that few rows have.
    """
    model.get_input_embeddings().requires_grad_(False)
    return model


def without_dropout(model: nn.Module) -> nn.Module:
    """The same model, which drops nothing in training: whoever learns from a teacher's hidden
    states, seeing hardly any row twice, learns faster so."""
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    return model


@dataclass(frozen=True)
class Sst2:
    """labelled, unlabelled: of train.tsv, no row in both; dev, test: whole."""

    encoder: Encoder
    labelled: Phrases
    unlabelled: Phrases
    dev: Phrases
    test: Phrases

    @staticmethod
    def load(folder: Path, labelled: int, encoder: Encoder | None = None) -> "Sst2":
        """From DIR, which holds sst2/; `labelled` rows are drawn, the same every time."""
        encoder = encoder or load_encoder()
        names = ("train", "dev", "test")
        train, dev, test = (read(folder / "sst2" / f"{n}.tsv", encoder) for n in names)
        order = torch.randperm(len(train), generator=torch.Generator().manual_seed(0))
        known, others = train.rows(order[:labelled]), train.rows(order[labelled:])
        return Sst2(encoder, known, others.without_labels(), dev, test)

    def calibration(self, phrases: int, batch: int = 32) -> list[dict[str, Tensor]]:
        """Batches of so many labelled phrases, without labels; the same ones every time."""
        some = torch.randperm(len(self.labelled), generator=torch.Generator().manual_seed(1))
        rows = self.labelled.rows(some[:phrases])
        names = ("input_ids", "attention_mask")
        return [{name: of[name] for name in names} for _, of in rows.in_order(batch)]

    def teacher(self, training: Training) -> nn.Module:
        """The encoder fine-tuned on the labelled rows, from out/sst2 where it has been before.

        In eval mode, all its weights trainable. The file's name is a fingerprint of the encoder, of
        the rows and of the settings (the seed is one): studies that agree on them share it.
        """
        with torch.random.fork_rng():
            torch.manual_seed(training.seed)  # the head's weights
            model = classifier(self.encoder)
        digest = hashlib.sha256(teacher_hash(model).encode())
        digest.update(json.dumps(asdict(training), sort_keys=True).encode())
        for tensor in (self.labelled.ids, self.labelled.lengths, self.labelled.labels):
            digest.update(tensor.contiguous().numpy().tobytes())
        path = TEACHERS / f"teacher-{digest.hexdigest()[:16]}.safetensors"
        if path.exists():
            model.load_state_dict(load_file(path))
            return model.eval()
        fine_tune(without_word_vectors(model), self.labelled, training)
        path.parent.mkdir(parents=True, exist_ok=True)
        beside = path.with_suffix(f".{training.seed}.part")
        save_file({name: w.contiguous() for name, w in model.state_dict().items()}, beside)
        beside.replace(path)
        return model.requires_grad_(True).eval()


def fine_tune(model: nn.Module, rows: Phrases, training: Training, batch: int = 32) -> nn.Module:
    """Train all of `model` that is trainable on labels alone; in eval mode afterwards."""
    objective, balance = Labels(), Fixed({"hard": 1.0})
    distiller = Distiller(model, None, objective, balance, training=training, progress=True)
    return distiller.fit(rows.loader(batch)).eval()


def hidden_states(student: nn.Module, teacher: nn.Module) -> Objective:
    """Each layer of the student learns from what one of the teacher gives out, evenly spread. Both
    models give these states out from now on."""
    student.config.output_hidden_states = teacher.config.output_hidden_states = True
    pairs = pairs_of_layers(student, teacher)
    return HiddenStates([(f"hidden_states.{m + 1}", f"hidden_states.{g + 1}") for m, g in pairs])


class Remembering:
    """A teacher in eval mode that has been asked once about each row and knows its hidden states,
    in bf16 (5 kB a token), and logits. Batches are of these very rows and say their "index"."""

    @torch.no_grad()
    def __init__(self, model: nn.Module, rows: Phrases) -> None:
        self.model = copy.deepcopy(model)  # `hidden_states` looks at its config, and changes it
        self.begins = rows.lengths.cumsum(0) - rows.lengths  # of each row, among all tokens
        self.tokens: dict[str, Tensor] = {}  # [tokens, width], by layer
        self.logits = torch.empty(len(rows), CLASSES)
        for numbers, batch in rows.in_order():
            names = ("input_ids", "attention_mask")
            output = model(**{name: batch[name] for name in names}, output_hidden_states=True)
            self.logits[numbers] = output.logits.float()
            places, counts = self.places(numbers, batch), batch["attention_mask"].bool()
            for layer, states in enumerate(output.hidden_states[1:], 1):
                name = f"hidden_states.{layer}"
                if name not in self.tokens:
                    size = (int(rows.lengths.sum()), states.shape[-1])
                    self.tokens[name] = torch.empty(size, dtype=torch.bfloat16)
                self.tokens[name][places[counts]] = states[counts].bfloat16()

    def places(self, numbers: Tensor, batch: Mapping[str, Tensor]) -> Tensor:
        """Where the tokens of these rows are, [rows, longest]; padding is at a row's last token."""
        mask = batch["attention_mask"]
        return self.begins[numbers, None] + (mask.cumsum(1) - 1)

    def __call__(self, batch: Mapping[str, Tensor], student: View) -> View:
        places = self.places(batch["index"], batch)
        states = {name: of[places] for name, of in self.tokens.items()}
        return {**states, "logits": self.logits[batch["index"]]}


def inner_objectives(student: nn.Module, teacher: nn.Module) -> list[Objective]:
    """Hidden states and attention maps, as TinyBERT has them. Both models give them out from now
    on."""
    student.config.output_attentions = teacher.config.output_attentions = True
    maps = [(f"attentions.{m}", f"attentions.{g}") for m, g in pairs_of_layers(student, teacher)]
    return [hidden_states(student, teacher), AttentionMaps(maps)]


def pairs_of_layers(student: nn.Module, teacher: nn.Module) -> list[tuple[int, int]]:
    layers = uniform_layers(student.config.num_hidden_layers, teacher.config.num_hidden_layers)
    return list(enumerate(layers))


def logits_only(model: nn.Module) -> nn.Module:
    """The same model, which gives out no inner states (see `inner_objectives`)."""
    model.config.output_hidden_states = model.config.output_attentions = False
    return model


def right(model: nn.Module, rows: Phrases) -> Tensor:
    """Which rows the model gets right: bool [rows]."""
    return correct(logits(model, rows), rows.labels)


@torch.inference_mode()
def logits(model: nn.Module, rows: Phrases) -> Tensor:
    """What the model says of all rows: float32 [rows, classes]."""
    found = torch.empty(len(rows), CLASSES)
    for numbers, batch in rows.in_order():
        found[numbers] = logits_of(model, batch).float()
    return found


@torch.inference_mode()
def right_and_embeddings(model: nn.Module, rows: Phrases) -> tuple[Tensor, Tensor]:
    """What `right` returns, and the mean over each row's tokens of what the encoder gives (see
    `trine.demo.sentences.embed`): float32 [rows, width]."""
    found = torch.empty(len(rows), CLASSES)
    means = torch.empty(len(rows), model.config.hidden_size)
    for numbers, batch in rows.in_order():
        names = ("input_ids", "attention_mask")
        output = model(**{name: batch[name] for name in names}, output_hidden_states=True)
        found[numbers] = output.logits.float()
        means[numbers] = pooled(output.hidden_states[-1].float(), batch["attention_mask"])
    return correct(found, rows.labels), means


def logits_of(model: nn.Module, batch: Mapping[str, Tensor]) -> Tensor:
    output = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"])
    return output if isinstance(output, Tensor) else output.logits


def latency_ms(models: Mapping[str, nn.Module], rows: Phrases) -> dict[str, dict[str, float]]:
    """Milliseconds of a call with 1 and with 32 rows, all models in turns; by model, then batch.

    The rows are those around the median length, so there is hardly any padding.
    """
    by_length = rows.lengths.argsort(stable=True)
    found: dict[str, dict[str, float]] = {name: {} for name in models}
    for size in (1, 32):
        first = max(0, (len(rows) - size) // 2)
        batch = padded([rows[row] for row in by_length[first : first + size]])
        calls = {name: partial(logits_of, model, batch) for name, model in models.items()}
        for name, seconds in alternate(calls).items():
            found[name][f"batch {size}"] = seconds * 1e3
    return found

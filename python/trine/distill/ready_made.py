"""Published ways to make a small encoder of a large one: DistilBERT, TinyBERT, MiniLM.

Each takes a model of Hugging Face with one list of encoder layers (BERT, RoBERTa, ELECTRA, MPNet,
...), for classification or for masked tokens, and returns what a `Distiller` or a
`DistillationTrainer` needs, stage by stage.
"""

import copy
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import nn

from trine.distill.balance import Fixed
from trine.distill.objectives import (
    AttentionMaps,
    HiddenStates,
    Labels,
    Objective,
    SelfRelations,
    SoftTargets,
    Together,
    uniform_layers,
)
from trine.distill.succession import longest_list, student_from_teacher
from trine.distill.teachers import Frozen

__all__ = ["ReadyMade", "Stage", "distilbert", "minilm", "tinybert"]

# What the last parts of paths are called, of the three projections in one attention layer.
_PROJECTIONS = (
    ("query", "key", "value"),
    ("q_proj", "k_proj", "v_proj"),
    ("q_lin", "k_lin", "v_lin"),
    ("q", "k", "v"),
)


@dataclass(frozen=True)
class Stage:
    """One training: what it is called, its objective, and the weights of its terms."""

    name: str
    objective: Objective
    balance: nn.Module


@dataclass(frozen=True)
class ReadyMade:
    """A student and how it learns: for each of `stages` train the student, in this order.

    made = tinybert(teacher)
    for stage in made.stages:
        Distiller(made.student, made.teacher, stage.objective, stage.balance,
                  paths=made.paths).fit(loader)
    """

    student: nn.Module
    teacher: Frozen
    stages: list[Stage]
    paths: Mapping[str, str] = field(default_factory=dict)


def distilbert(teacher: nn.Module, *, temperature: float = 2.0) -> ReadyMade:
    """DistilBERT (Sanh et al. 2019, arXiv:1910.01108): every second layer of the teacher; soft
    targets, labels and the cosine of the last hidden states, weighed 5, 2 and 1.

    Args:
        teacher: for classification (labels [B]) or masked tokens (labels [B, L], -100 where none
            is asked for; soft targets count there only).
        temperature: of the soft targets.
    """
    path = longest_list(teacher)
    count = len(teacher.get_submodule(path))
    student = student_from_teacher(teacher, uniform_layers(max(1, count // 2), count), path)
    last = len(student.get_submodule(path)) - 1
    objective = Together(
        SoftTargets(temperature, labels=_label_rows(teacher)),
        Labels(),
        HiddenStates([("last", "last")], loss="cosine"),
    )
    balance = Fixed({"soft": 5.0, "hard": 2.0, "hidden": 1.0})
    return ReadyMade(
        student,
        Frozen(teacher, {"last": f"{path}.{count - 1}"}),
        [Stage("distil", objective, balance)],
        {"last": f"{path}.{last}"},
    )


def tinybert(
    teacher: nn.Module, layers: int = 4, hidden: int = 312, intermediate: int = 1200
) -> ReadyMade:
    """TinyBERT (Jiao et al. 2020, arXiv:1909.10351): a narrower student of fewer layers. First its
    embeddings, hidden states (through one learned projection) and attention maps follow the
    teacher's, layer m those of layer m * teacher's / student's; then its predictions.

    The paper compares attention before the softmax and we what the models return, after it. Both
    models compute attention eagerly, for other ways do not return the maps.

    Args:
        teacher: for classification, or for masked tokens.
        layers, hidden, intermediate: of the student; its heads are the teacher's where they divide
            hidden, else the largest divisor of both.
    """
    student = _smaller(teacher, layers, hidden, intermediate)
    for model in (student, teacher):
        model.set_attn_implementation("eager")
        model.config.output_attentions = model.config.output_hidden_states = True
    mapped = uniform_layers(layers, teacher.config.num_hidden_layers)
    # hidden_states.0 is the embeddings' output, i + 1 that of layer i.
    states = [("hidden_states.0", "hidden_states.0")] + [
        (f"hidden_states.{m + 1}", f"hidden_states.{g + 1}") for m, g in enumerate(mapped)
    ]
    maps = [(f"attentions.{m}", f"attentions.{g}") for m, g in enumerate(mapped)]
    projection = nn.Linear(hidden, teacher.config.hidden_size, bias=False)
    inner = Together(HiddenStates(states, projection), AttentionMaps(maps))
    prediction = SoftTargets(1.0, labels=_label_rows(teacher))
    return ReadyMade(
        student,
        Frozen(teacher),
        [
            Stage("inner", inner, Fixed({"hidden": 1.0, "attention": 1.0})),
            Stage("prediction", prediction, Fixed({"soft": 1.0})),
        ],
    )


def minilm(
    teacher: nn.Module, layers: int = 6, hidden: int = 384, intermediate: int = 1536
) -> ReadyMade:
    """MiniLM (Wang et al. 2020, arXiv:2002.10957): the last layer's query-key and value-value
    relations, and nothing else; then soft targets and labels of the task, half and half.

    Args:
        teacher: for classification, or for masked tokens.
        layers, hidden, intermediate: of the student, which has the teacher's heads if they divide
            hidden (else as `tinybert`).
    """
    student = _smaller(teacher, layers, hidden, intermediate)
    of_student, of_teacher = projections(student), projections(teacher)
    names = {letter: letter for letter in "qkv"}
    relations = SelfRelations(names, names, student.config.num_attention_heads)
    task = Together(SoftTargets(1.0, labels=_label_rows(teacher)), Labels())
    return ReadyMade(
        student,
        Frozen(teacher, of_teacher),
        [
            Stage("relations", relations, Fixed({"relations": 1.0})),
            Stage("prediction", task, Fixed({"soft": 0.5, "hard": 0.5})),
        ],
        of_student,
    )


def projections(model: nn.Module) -> dict[str, str]:
    """Paths of the queries, keys and values of the last layer, as "q", "k" and "v".

    Raises ValueError for a model that does not compute the three by layers of their own.
    """
    path = longest_list(model)
    last = f"{path}.{len(model.get_submodule(path)) - 1}"
    inner = dict(model.get_submodule(last).named_modules())
    for names in _PROJECTIONS:
        found = [next((p for p in inner if p.rpartition(".")[2] == n), None) for n in names]
        if all(found):
            return {letter: f"{last}.{p}" for letter, p in zip("qkv", found, strict=True)}
    raise ValueError(
        f"{last} has no separate layers for queries, keys and values; give SelfRelations the paths "
        "of what it has"
    )


def _smaller(teacher: nn.Module, layers: int, hidden: int, intermediate: int) -> nn.Module:
    """A model of the teacher's class and vocabulary, with new weights."""
    config = copy.deepcopy(teacher.config)
    heads = teacher.config.num_attention_heads
    changes: dict[str, Any] = {
        "num_hidden_layers": layers,
        "hidden_size": hidden,
        "intermediate_size": intermediate,
        "num_attention_heads": max(n for n in range(1, heads + 1) if not (heads % n or hidden % n)),
    }
    for name, value in changes.items():
        if not hasattr(config, name):
            raise ValueError(
                f"{type(teacher).__name__} has no {name} in its configuration; make the student "
                "yourself and use the objectives directly"
            )
        setattr(config, name, value)
    return type(teacher)(config)


def _label_rows(teacher: nn.Module) -> str | None:
    """For masked tokens the labels say which ones count; every example of a classification does."""
    return None if type(teacher).__name__.endswith("ForSequenceClassification") else "labels"

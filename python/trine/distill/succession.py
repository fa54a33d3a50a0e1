"""Students that become teachers, and where a student begins."""

import copy
from collections.abc import Callable, Iterable, Iterator, Sequence

from torch import nn

__all__ = ["longest_list", "renumber_layers", "student_from_teacher", "succession"]

# What configurations of Hugging Face call the number of layers.
_LAYER_COUNTS = ("num_hidden_layers", "n_layers", "n_layer", "num_layers", "encoder_layers")
_DECODER_COUNTS = ("num_decoder_layers", "decoder_layers")


def succession(
    teacher: nn.Module,
    students: Iterable[nn.Module],
    teach: Callable[[nn.Module, nn.Module], nn.Module],
) -> Iterator[nn.Module]:
    """Each student learns from the one before: `teach(student, teacher)` trains and returns it.

    Students of one architecture are born-again generations (Furlanello et al. 2018,
    arXiv:1805.04770), ever smaller ones teacher assistants (Mirzadeh et al. 2020,
    arXiv:1902.03393). Yields each student when it is trained; generations make an `Ensemble`, too.
    """
    for student in students:
        teacher = teach(student, teacher)
        yield teacher


def student_from_teacher(
    teacher: nn.Module, layers: Sequence[int], path: str | None = None
) -> nn.Module:
    """A copy of the teacher that has only some of its layers, with their weights (DistilBERT, Sanh
    et al. 2019, arXiv:1910.01108: every second one).

    Args:
        teacher: is left as it is.
        layers: their numbers in the teacher, in the student's order; `uniform_layers` picks some.
        path: of the ModuleList of layers; None: the longest that the teacher has.

    Returns:
        The student, trainable and in training mode. A configuration of Hugging Face, and the
        numbers that its layers carry for the cache of keys and values, are brought up to date.

    Raises:
        ValueError: no such list, or two of the same length to choose from; a layer that there is
            not.
    """
    student = copy.deepcopy(teacher).requires_grad_(True).train()
    path = longest_list(student) if path is None else path
    parent, _, name = path.rpartition(".")
    try:
        kept = student.get_submodule(path)
    except AttributeError:
        kept = None
    if not isinstance(kept, nn.ModuleList):
        raise ValueError(f"student_from_teacher: the teacher has no list of layers at '{path}'")
    count = len(kept)
    if not layers or not all(0 <= layer < count for layer in layers):
        raise ValueError(
            f"student_from_teacher: '{path}' has layers 0 to {count - 1}; asked for {list(layers)}"
        )
    chosen = nn.ModuleList(copy.deepcopy(kept[layer]) for layer in layers)
    setattr(student.get_submodule(parent), name, chosen)
    renumber_layers(student, path, layers, count)
    return student


def renumber_layers(model: nn.Module, path: str, numbers: Sequence[int], count: int) -> None:
    """Bring up to date what counts the layers of the list at `path`, of which some were taken out.

    Args:
        model: with the list as it is now.
        numbers: which of the `count` layers it had these are, in order.
    """
    for number, layer in enumerate(model.get_submodule(path)):
        for module in layer.modules():
            if hasattr(module, "layer_idx"):
                module.layer_idx = number
    parts = path.split(".")
    holders = [model.get_submodule(".".join(parts[:end])) for end in range(len(parts))]
    whole = getattr(model, "config", None)
    for config in {id(c): c for m in holders if (c := getattr(m, "config", None))}.values():
        names = _DECODER_COUNTS if "decoder" in parts else _LAYER_COUNTS
        if "decoder" in parts and config is not whole:  # the decoder's own, as T5 has it
            names = (*_DECODER_COUNTS, *_LAYER_COUNTS)
        if not any(hasattr(config, name) for name in names):
            names = _LAYER_COUNTS
        for name in names:
            if getattr(config, name, None) == count:
                setattr(config, name, len(numbers))
        types = getattr(config, "layer_types", None)
        if types is not None and len(types) == count:
            config.layer_types = [types[number] for number in numbers]


def longest_list(model: nn.Module) -> str:
    """The path of a model's list of layers; ValueError where that is not clear."""
    lists = {n: len(m) for n, m in model.named_modules() if isinstance(m, nn.ModuleList)}
    longest = [name for name, length in lists.items() if length == max(lists.values())]
    if len(longest) != 1:
        raise ValueError(
            "student_from_teacher: give path=, the list of layers; the teacher has "
            + (", ".join(f"'{n}' of {m}" for n, m in lists.items()) or "none")
        )
    return longest[0]

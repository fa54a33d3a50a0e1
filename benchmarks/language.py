"""What the studies of language models share: the source of Python's standard library in tokens, a
small decoder, and how it is trained and judged.
"""

import sysconfig
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset
from trine.distill import Distiller, Fixed, Numbered, Training

BATCH, PROMPT = 16, 32


class Blocks(Dataset):
    """Text cut into blocks of the same length; each is its own label, its beginning a prompt."""

    def __init__(self, ids: Tensor) -> None:
        self.ids = ids

    def __len__(self) -> int:
        return len(self.ids)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        ids = self.ids[index]
        prompt = ids[:PROMPT]
        return {
            "input_ids": ids,
            "labels": ids,
            "prompt_ids": prompt,
            "prompt_mask": torch.ones_like(prompt),
        }


@dataclass(frozen=True)
class Texts:
    train: Blocks
    test: Blocks
    validation: Blocks | None = None


def source_files(folder: Path | None = None) -> dict[str, list[Path]]:
    """The library's modules that are one file, by name: every tenth is for testing."""
    folder = Path(sysconfig.get_path("stdlib")) if folder is None else folder
    files: dict[str, list[Path]] = {"train": [], "test": []}
    for number, path in enumerate(sorted(folder.glob("*.py"))):
        files["test" if number % 10 == 7 else "train"].append(path)
    return files


def load_texts(
    train_bytes: int,
    test_bytes: int,
    vocabulary: int,
    length: int,
    *,
    validation_bytes: int = 0,
    folder: Path | None = None,
) -> Texts:
    """The texts' first bytes, in tokens of a byte-level BPE that knows the training text.

    The last bytes of the training files are for validation.

    Raises ValueError where the library has fewer bytes.
    """
    from tokenizers import ByteLevelBPETokenizer

    files = source_files(folder)
    whole = {name: b"".join(path.read_bytes() for path in files[name]) for name in files}
    for name, size in (("train", train_bytes + validation_bytes), ("test", test_bytes)):
        if len(whole[name]) < size:
            raise ValueError(
                f"the library's {name} files have {len(whole[name])} bytes, not {size}"
            )
    texts = {"train": whole["train"][:train_bytes], "test": whole["test"][:test_bytes]}
    if validation_bytes:
        texts["validation"] = whole["train"][-validation_bytes:]
    tokenizer = ByteLevelBPETokenizer()
    lines = texts["train"].decode(errors="ignore").splitlines(keepends=True)
    tokenizer.train_from_iterator(lines, vocabulary, show_progress=False)

    def blocks(text: bytes) -> Blocks:
        ids = torch.tensor(tokenizer.encode(text.decode(errors="ignore")).ids)
        whole = len(ids) // length * length
        return Blocks(ids[:whole].reshape(-1, length))

    return Texts(**{name: blocks(text) for name, text in texts.items()})


def decoder(
    seed: int,
    *,
    vocabulary: int,
    length: int,
    width: int,
    layers: int,
    deviation: float = 0.02,
) -> nn.Module:
    """A decoder like Llama, whose output layer shares the weights of its embedding.

    deviation: of the weights that it begins with.
    """
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=vocabulary,
        hidden_size=width,
        intermediate_size=8 * width // 3,
        num_hidden_layers=layers,
        num_attention_heads=4,
        max_position_embeddings=length,
        tie_word_embeddings=True,
        initializer_range=deviation,
        bos_token_id=None,
        eos_token_id=None,
        pad_token_id=None,
    )
    torch.manual_seed(seed)
    return LlamaForCausalLM(config)


def fit(
    model: nn.Module,
    teacher: Any,
    objective: nn.Module,
    weights: Mapping[str, float],
    blocks: Dataset,
    training: Training,
    transform: Any = None,
    batch: int = BATCH,
) -> nn.Module:
    """`model`, trained through `blocks` as often as `training` says."""
    distiller = Distiller(
        model, teacher, objective, Fixed(weights), transform=transform, training=training
    )
    loader = DataLoader(Numbered(blocks), batch, shuffle=True, drop_last=True)
    return distiller.fit(loader).eval()


@torch.no_grad()
def nats(model: nn.Module, blocks: Blocks) -> Tensor:
    """Of each block, the mean cross entropy of its tokens but the first."""
    losses = []
    for ids in blocks.ids.split(BATCH):
        logits = model(input_ids=ids).logits[:, :-1].flatten(0, 1)
        of_tokens = F.cross_entropy(logits, ids[:, 1:].flatten(), reduction="none")
        losses.append(of_tokens.reshape(len(ids), -1).mean(1))
    return torch.cat(losses)

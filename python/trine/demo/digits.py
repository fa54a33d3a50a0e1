"""scikit-learn's handwritten digits, and the networks of Hinton et al. 2015 cut to their size."""

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

SIDE = 8  # an image is 8 x 8 pixels
CLASSES = 10
SPLIT_SEED = 0


@dataclass(frozen=True)
class Rows:
    """images: float32 [rows, 64] in [0, 1]; labels: int64 [rows]."""

    images: Tensor
    labels: Tensor


@dataclass(frozen=True)
class Digits:
    """The fixed split. Only `test` is reported; `validation` is what decisions are made on."""

    train: Rows
    validation: Rows
    test: Rows


def load_digits() -> Digits:
    """The 1797 images, split once and for all, each class in the same proportion everywhere."""
    from sklearn.datasets import load_digits as load
    from sklearn.model_selection import train_test_split

    pixels, labels = load(return_X_y=True)
    images = torch.tensor(pixels / 16, dtype=torch.float32)  # the pixels are integers 0 to 16
    labels = torch.tensor(labels, dtype=torch.int64)

    def cut(rows, share: float):
        return train_test_split(
            rows, test_size=share, stratify=labels[rows], random_state=SPLIT_SEED
        )

    seen, test = cut(torch.arange(len(labels)).numpy(), 0.2)
    train, validation = cut(seen, 0.2)
    return Digits(*(Rows(images[rows], labels[rows]) for rows in (train, validation, test)))


class Mlp(nn.Module):
    """64 pixels -> `width` -> `width` -> 10 logits, with ReLU.

    Args:
        width: units of each of the two hidden layers.
        dropout: the share of hidden units dropped in training. (Hinton et al. also dropped inputs;
            of an 8 x 8 image too little is left then.)
        seed: of the initial weights.
    """

    def __init__(self, width: int, *, dropout: float = 0.0, seed: int = 0) -> None:
        super().__init__()
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            self.first = nn.Linear(SIDE * SIDE, width)
            self.hidden = nn.Linear(width, width)
            self.last = nn.Linear(width, CLASSES)
        self.drop = nn.Dropout(dropout)

    def forward(self, images: Tensor) -> Tensor:
        x = self.drop(self.first(images).relu())
        x = self.drop(self.hidden(x).relu())
        return self.last(x)


def jitter(images: Tensor, draws: torch.Generator) -> Tensor:
    """Shift every image by up to one pixel each way, bilinearly, with zeros moving in.

    Hinton et al. shifted 28 x 28 images by up to two pixels; half a pixel and none gave a worse
    teacher on the validation rows.
    """
    # affine_grid measures in half image widths: one pixel is 2 / SIDE.
    shift = (torch.rand(len(images), 2, generator=draws) * 2 - 1) * (2 / SIDE)
    move = torch.eye(2, 3).repeat(len(images), 1, 1)
    move[:, :, 2] = shift
    square = images.reshape(-1, 1, SIDE, SIDE)
    grid = F.affine_grid(move, list(square.shape), align_corners=False)
    return F.grid_sample(square, grid, align_corners=False).reshape(images.shape)

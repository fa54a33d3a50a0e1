"""What the studies of a small ResNet share: digits of 32 x 32 pixels, the network of He et al. 2016
for small images (three stages of 16, 32 and 64 channels), and how it is trained and judged.
"""

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset
from trine.demo.digits import CLASSES, SIDE, jitter
from trine.distill import Distiller, Fixed, Frozen, Training
from trine.distill.objectives import Labels, SoftTargets, Together
from trine.evaluate import correct

from benchmarks.distillation.digits import Split

PIXELS = 32
BATCH = 32
TEMPERATURE = 4.0


class Block(nn.Module):
    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(inputs, outputs, 3, stride, 1, bias=False)
        self.norm1 = nn.BatchNorm2d(outputs)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, 1, 1, bias=False)
        self.norm2 = nn.BatchNorm2d(outputs)
        self.shortcut = nn.Identity()
        if stride > 1:
            conv = nn.Conv2d(inputs, outputs, 1, stride, bias=False)
            self.shortcut = nn.Sequential(conv, nn.BatchNorm2d(outputs))

    def forward(self, x: Tensor) -> Tensor:
        inner = self.norm2(self.conv2(self.norm1(self.conv1(x)).relu()))
        return (inner + self.shortcut(x)).relu()


def resnet(seed: int) -> nn.Module:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return nn.Sequential(
            nn.Conv2d(1, 16, 3, 2, 1, bias=False),
            nn.BatchNorm2d(16),
            nn.ReLU(),
            Block(16, 16, 1),
            Block(16, 32, 2),
            Block(32, 64, 2),
            nn.AdaptiveAvgPool2d(1),
            nn.Flatten(),
            nn.Linear(64, CLASSES),
        )


def enlarged(images: Tensor) -> Tensor:
    """[N, 64] -> [N, 1, 32, 32]."""
    small = images.reshape(-1, 1, SIDE, SIDE)
    return F.interpolate(small, (PIXELS, PIXELS), mode="bilinear", align_corners=False)


def shifted(batch, model):
    """Each image moved by up to a pixel of the original, then enlarged."""
    draws = torch.Generator().manual_seed(int(torch.randint(2**62, ())))
    return {**batch, "inputs": enlarged(jitter(batch["inputs"], draws))}


def train(
    model: nn.Module,
    teacher: nn.Module | None,
    split: Split,
    seed: int,
    epochs: int,
    *,
    learning_rate: float = 3e-3,
    after_update: Callable[[], None] | None = None,
) -> nn.Module:
    """On labels, and on the teacher's soft targets where there is one."""

    def next_batch(batch: dict[str, Tensor], model: nn.Module) -> dict[str, Tensor]:
        if after_update is not None:
            after_update()
        return shifted(batch, model)

    objective, weights = Labels(), {"hard": 1.0}
    if teacher is not None:
        objective = Together(SoftTargets(TEMPERATURE), Labels())
        weights = {"soft": 0.7, "hard": 0.3}
    distiller = Distiller(
        model,
        None if teacher is None else Frozen(teacher),
        objective,
        Fixed(weights),
        transform=next_batch,
        training=Training(epochs=epochs, learning_rate=learning_rate, seed=seed),
    )
    distiller.fit(DataLoader(split.train, BATCH, shuffle=True, drop_last=True))
    return model.eval()


@torch.no_grad()
def right(model: nn.Module, rows: TensorDataset) -> Tensor:
    """Which of `rows` the model gets right."""
    images, labels = rows.tensors
    return correct(model(enlarged(images)), labels)

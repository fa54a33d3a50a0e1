"""More inputs for a teacher to speak about: transforms of batches, drawn with torch's numbers.

Each is called with a batch and the student and returns a batch: `Distiller(transform=...)`.
"""

import torch
from torch import Tensor, nn

from trine.distill.objectives.base import Batch

__all__ = ["CropAndFlip", "Mixup", "ReplaceTokens", "Several"]


class Several:
    """One transform after the other."""

    def __init__(self, *transforms) -> None:
        self.transforms = transforms

    def __call__(self, batch: Batch, student: nn.Module) -> Batch:
        for transform in self.transforms:
            batch = transform(batch, student)
        return batch


class ReplaceTokens:
    """Each token gives way to another with some probability (after TinyBERT's augmentation, Jiao et
    al. 2020, arXiv:1909.10351, which chooses by a language model).

    Args:
        candidates: int64 [n] to draw from evenly. The token ids of a whole corpus, one after the
            other, draw each token as often as it occurs.
        probability: of a replacement.
        keep: ids that stay as they are (special tokens).
        key: name of the ids in the batch; padding, by "attention_mask", stays, too.
    """

    def __init__(
        self,
        candidates: Tensor,
        probability: float = 0.15,
        keep: tuple[int, ...] = (),
        *,
        key: str = "input_ids",
    ) -> None:
        if not 0 <= probability <= 1 or len(candidates) == 0:
            raise ValueError(
                "ReplaceTokens: needs candidates and a probability in [0, 1]; it has "
                f"{len(candidates)} and {probability}"
            )
        self.candidates, self.probability = candidates, probability
        self.keep, self.key = torch.tensor(keep, dtype=torch.long), key

    def __call__(self, batch: Batch, student: nn.Module) -> Batch:
        ids = batch[self.key]
        drawn = self.candidates.to(ids.device)[
            torch.randint(len(self.candidates), ids.shape, device=ids.device)
        ]
        replaced = torch.rand(ids.shape, device=ids.device) < self.probability
        replaced &= ~torch.isin(ids, self.keep.to(ids.device))
        if "attention_mask" in batch:
            replaced &= batch["attention_mask"].bool()
        return {**batch, self.key: torch.where(replaced, drawn, ids)}


class CropAndFlip:
    """Images shifted by up to `padding` pixels each way, zeros coming in, and mirrored at random.

    Args:
        padding: the largest shift.
        flip: whether half of the images are mirrored left to right (digits and text: False).
        key: name of the images [B, C, H, W] in the batch.
    """

    def __init__(self, padding: int = 4, *, flip: bool = True, key: str = "inputs") -> None:
        self.padding, self.flip, self.key = padding, flip, key

    def __call__(self, batch: Batch, student: nn.Module) -> Batch:
        images = batch[self.key]
        count, _, height, width = images.shape
        device, p = images.device, self.padding
        shifts = torch.randint(2 * p + 1, (2, count, 1, 1), device=device)
        rows = shifts[0] + torch.arange(height, device=device)[:, None]  # of the padded image
        columns = shifts[1] + torch.arange(width, device=device)
        if self.flip:
            mirrored = torch.rand(count, 1, 1, device=device) < 0.5
            columns = torch.where(mirrored, columns.flip(-1), columns)
        padded = nn.functional.pad(images, (p, p, p, p))
        which = torch.arange(count, device=device)[:, None, None]
        # The indices stand around the channels' slice, and so their axes come first.
        return {**batch, self.key: padded[which, :, rows, columns].movedim(-1, 1)}


class Mixup:
    """Pairs of inputs mixed (Zhang et al. 2018, arXiv:1710.09412): share * x + (1 - share) * x'
    with one share of each batch from Beta(alpha, alpha).

    The teacher sees what the student sees. `Labels` finds "other_labels" and "share" in the batch
    and mixes both cross entropies; a student that learns from the teacher alone needs neither.

    Args:
        alpha: of the Beta distribution.
        key: name of the inputs in the batch, floating.
    """

    def __init__(self, alpha: float = 0.2, *, key: str = "inputs") -> None:
        if not alpha > 0:
            raise ValueError(f"Mixup: alpha must be positive, it is {alpha}")
        self.alpha, self.key = alpha, key

    def __call__(self, batch: Batch, student: nn.Module) -> Batch:
        inputs = batch[self.key]
        both = torch.tensor([self.alpha, self.alpha])
        # Two Gamma variables make a Beta one; torch.distributions draws both at once.
        share = torch.distributions.Dirichlet(both).sample()[0].item()
        order = torch.randperm(len(inputs), device=inputs.device)
        mixed = {**batch, self.key: share * inputs + (1 - share) * inputs[order]}
        if "labels" in batch:
            mixed |= {"other_labels": batch["labels"][order], "share": share}
        return mixed

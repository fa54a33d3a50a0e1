"""Text that teachers and students write themselves: black-box and on-policy distillation.

Models are causal language models of Hugging Face, or anything with their `generate`. Prompts are
padded on the left, so that what is written follows each of them directly.
"""

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

from trine.distill.losses import IGNORED_LABEL
from trine.distill.objectives.base import Batch
from trine.distill.schedules import Scheduled, at_step

__all__ = ["OnPolicy", "sequence_targets", "written_by"]


@torch.no_grad()
def written_by(model: nn.Module, batch: Batch, **options: Any) -> dict[str, Tensor]:
    """What a model writes after the prompts of a batch, to train on (sequence-level distillation,
    Kim & Rush 2016, arXiv:1606.07947, where the model is the teacher).

    Args:
        model: put into eval mode for it.
        batch: with "prompt_ids" and "prompt_mask" [B, P], padded on the left.
        options: of `generate`: max_new_tokens, do_sample, num_beams, ...; pad_token_id is needed
            where answers end at different places.

    Returns:
        "input_ids" and "attention_mask" [B, P + new], "labels" with -100 for prompt and padding:
        of what follows the first end-of-text token nothing counts.

    Raises ValueError for a batch without prompts, or prompts not padded on the left.
    """
    for name in ("prompt_ids", "prompt_mask"):
        if name not in batch:
            raise ValueError(f"the batch has no '{name}'; prompts [B, P] are padded on the left")
    prompts, mask = batch["prompt_ids"], batch["prompt_mask"]
    if not mask[:, -1].all():
        raise ValueError("prompts must be padded on the left: the last column has padding")
    was_training = model.training
    model.eval()
    try:
        ids = model.generate(input_ids=prompts, attention_mask=mask, **options)
    finally:
        model.train(was_training)
    new = ids[:, prompts.shape[1] :]
    written = torch.ones_like(new)
    end = options.get("eos_token_id", getattr(model.generation_config, "eos_token_id", None))
    if end is not None:
        ended = torch.isin(new, torch.as_tensor(end, device=new.device)).int()
        written = (ended.cumsum(1) - ended == 0).to(mask.dtype)  # the end itself counts
    attention = torch.cat([mask, written.to(mask.dtype)], 1)
    labels = torch.cat([torch.full_like(prompts, IGNORED_LABEL), new], 1)
    return {
        "input_ids": ids,
        "attention_mask": attention,
        "labels": torch.where(attention.bool(), labels, IGNORED_LABEL),
    }


class OnPolicy:
    """A transform for `Distiller`: some batches are what the student writes itself (GKD, Agarwal et
    al. 2024, arXiv:2306.13649), so that the teacher corrects the mistakes that it makes.

    With `SoftTargets(labels="labels", shift=True)` and the batch's own texts in the other batches.

    Args:
        share: lambda, the probability that a batch is the student's; a number or a function of the
            step: piecewise([0, 0.5], [1000]) lets an untrained student learn to write first.
        options: of `generate`; sampling (do_sample=True) if not said otherwise.
    """

    def __init__(self, share: Scheduled = 0.5, **options: Any) -> None:
        if not callable(share) and not 0 <= share <= 1:
            raise ValueError(f"OnPolicy: share must lie in [0, 1], it is {share}")
        self.share, self.options = share, {"do_sample": True, **options}

    def __call__(self, batch: Batch, student: nn.Module) -> Batch:
        if torch.rand(()) >= at_step(self.share, int(batch.get("step", 0))):
            return batch
        kept = {k: v for k, v in batch.items() if k not in ("input_ids", "attention_mask")}
        return {**kept, **written_by(student, batch, **self.options)}


def sequence_targets(
    teacher: nn.Module, loader: Iterable[Batch], **options: Any
) -> list[dict[str, Tensor]]:
    """What a teacher writes after all prompts of a loader: one example each, to train on."""
    examples = []
    for batch in loader:
        made = written_by(teacher, batch, **options)
        for row in range(len(made["input_ids"])):
            real = made["attention_mask"][row].bool()
            examples.append({name: made[name][row][real].cpu() for name in made})
    return examples

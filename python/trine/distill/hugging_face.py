"""Distillation in Hugging Face's Trainer."""

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from trine.distill.calls import call
from trine.distill.capture import Capture
from trine.distill.objectives.base import Batch, Objective
from trine.distill.teachers import Teacher

try:
    from transformers import PreTrainedModel, Trainer
except ImportError:
    raise ImportError("DistillationTrainer needs transformers: pip install transformers") from None

__all__ = ["DistillationTrainer"]

_ADAPTERS = "distillation.pt"


class DistillationTrainer(Trainer):
    """`transformers.Trainer` with an objective in the place of the model's own loss.

    Everything else is the Trainer's: arguments, collators, evaluation, checkpoints, resuming,
    launchers. Works for classification, masked, causal and sequence-to-sequence models; labels go
    to the objective and not to the model. What an objective learns itself (adapters) is optimised
    and kept in checkpoints beside the model, in distillation.pt, and is not part of the model.

    Args:
        model: the student.
        args: TrainingArguments. `remove_unused_columns=False` lets "index" through for a cache.
        teacher: `Frozen(model)`, a cache, an `Ensemble`, ...; None where the objective needs none.
        objective: what student and teacher should have in common.
        balance: weighs the objective's terms.
        paths: what to capture in the student, as for `Capture`.
        adapter_rate: the learning rate of the objective's own parameters, as a multiple of args'.
        rest: as for `transformers.Trainer`.

    Raises ValueError where torchrun started more processes than the Trainer runs as.
    """

    def __init__(
        self,
        model: nn.Module,
        args: Any = None,
        *,
        teacher: Teacher | None,
        objective: Objective,
        balance: nn.Module,
        paths: Mapping[str, str] | None = None,
        adapter_rate: float = 1.0,
        **rest: Any,
    ) -> None:
        super().__init__(model=model, args=args, **rest)
        launched = int(os.environ.get("WORLD_SIZE", 1))
        if launched != self.args.world_size:
            raise ValueError(
                f"{launched} processes were launched and the Trainer runs as "
                f"{self.args.world_size}; each would train the whole by itself. On a machine "
                "without a GPU it needs TrainingArguments(use_cpu=True)"
            )
        # The objective's terms are means; the Trainer is to divide them by the accumulated batches.
        self.model_accepts_loss_kwargs = False
        self.teacher, self.adapter_rate = teacher, adapter_rate
        self.distillation = nn.ModuleDict({"objective": objective, "balance": balance})
        self.distillation.to(self.args.device)
        if dist.is_initialized():  # each process has made adapters of its own
            for tensor in self.distillation.state_dict().values():
                if isinstance(tensor, Tensor):
                    dist.broadcast(tensor, src=0)
        self._capture = Capture(model, paths)
        self._terms: dict[str, list[float]] = {}
        self._begins_update = True

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: Tensor | int | None = None,
    ) -> Tensor | tuple[Tensor, Any]:
        batch = {**self._with_decoder_inputs(inputs), "step": self.state.global_step}
        self.distillation.train(model.training)
        self._capture.model = model  # as the Trainer has wrapped it
        output, student = call(self._capture, batch)
        teacher = {} if self.teacher is None else self.teacher(batch, student)
        terms = self.distillation["objective"](student, teacher, batch)
        loss = self.distillation["balance"](terms, batch["step"])
        if model.training:
            for name, term in terms.items():
                self._terms.setdefault(name, []).append(float(term.detach()))
        return (loss, output) if return_outputs else loss

    def _with_decoder_inputs(self, inputs: dict[str, Any]) -> Batch:
        """A sequence-to-sequence model makes them of labels, which it does not get."""
        model = self.accelerator.unwrap_model(self.model)
        config = getattr(model, "config", None)
        made = {"decoder_input_ids", "decoder_inputs_embeds"} & set(inputs)
        if not getattr(config, "is_encoder_decoder", False) or made or "labels" not in inputs:
            return inputs
        labels = inputs["labels"]
        shift = getattr(model, "prepare_decoder_input_ids_from_labels", None)
        ids = shift(labels=labels) if shift is not None else model._shift_right(labels)
        return {**inputs, "decoder_input_ids": ids}

    def training_step(self, *args: Any, **kwargs: Any) -> Tensor:
        """The Trainer's, and what it does with the model's gradients done with the objective's:
        begun anew for each update, averaged over processes, clipped (by themselves)."""
        if self._begins_update:
            self.distillation.zero_grad()
        loss = super().training_step(*args, **kwargs)
        self._begins_update = self.accelerator.sync_gradients
        with_gradient = [p for p in self.distillation.parameters() if p.grad is not None]
        if self._begins_update and with_gradient:
            if dist.is_initialized():
                for parameter in with_gradient:
                    dist.all_reduce(parameter.grad)
                    parameter.grad /= dist.get_world_size()
            if self.args.max_grad_norm:
                nn.utils.clip_grad_norm_(with_gradient, self.args.max_grad_norm)
        return loss

    def create_optimizer(self, *args: Any, **kwargs: Any) -> torch.optim.Optimizer:
        is_new = self.optimizer is None
        optimizer = super().create_optimizer(*args, **kwargs)
        own = [p for p in self.distillation.parameters() if p.requires_grad]
        if is_new and own:
            rate = self.args.learning_rate * self.adapter_rate
            optimizer.add_param_group(
                {"params": own, "lr": rate, "weight_decay": self.args.weight_decay}
            )
        return optimizer

    def log(self, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        """The means of the terms since the last time stand beside the loss."""
        if "loss" in logs:
            logs = {**logs, **{name: sum(v) / len(v) for name, v in self._terms.items()}}
            self._terms.clear()
        super().log(logs, *args, **kwargs)

    def _save(self, output_dir: str | None = None, state_dict: Any = None) -> None:
        super()._save(output_dir, state_dict)
        if self.distillation.state_dict():
            path = Path(output_dir or self.args.output_dir) / _ADAPTERS
            partial = path.with_suffix(".part")
            torch.save(self.distillation.state_dict(), partial)
            partial.replace(path)

    def _load_from_checkpoint(
        self, resume_from_checkpoint: str, model: PreTrainedModel | None = None
    ) -> None:
        super()._load_from_checkpoint(resume_from_checkpoint, model)
        path = Path(resume_from_checkpoint) / _ADAPTERS
        if path.exists():
            state = torch.load(path, map_location="cpu", weights_only=True)
            self.distillation.load_state_dict(state)

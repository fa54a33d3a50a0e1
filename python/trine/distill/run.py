"""One run of a Distiller: the loop, and what a checkpoint holds of it.

The checkpoint is one file, whatever the number of processes, and torch.load trusts all of it:
weights, the optimiser's state, the average, where the run is, the random streams of each process.
"""

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_state_dict,
    set_state_dict,
)

from trine.distill import processes
from trine.distill.calls import as_batch
from trine.distill.history import History
from trine.distill.objectives.base import Batch
from trine.distill.random_streams import Stream

if TYPE_CHECKING:
    from trine.distill.distiller import Distiller

_CHECKPOINT, _STUDENT = "checkpoint.pt", "student.safetensors"
# Streams of random numbers, by what draws from them.
_SPLIT, _LOADER, _LESSON = range(3)


class Run:
    def __init__(
        self,
        owner: "Distiller",
        loader: Iterable[Any],
        evaluate: Callable[[nn.Module], float] | None,
    ) -> None:
        self.training, self.evaluate, self.teacher = owner.training, evaluate, owner.teacher
        self.transform, self.pruner, self.schedule = owner.transform, owner.pruner, owner.schedule
        self.accelerator, self.lesson = owner.accelerator, owner.lesson
        self.student = owner.lesson.student
        self.rank = self.accelerator.process_index
        self.folder, is_first = owner.folder, self.accelerator.is_main_process
        if self.folder is not None:
            self.folder.mkdir(parents=True, exist_ok=True)
        # The same in all processes: it decides who sees which example.
        with Stream(self.training.seed, _SPLIT).drawing():
            self.loader = self.accelerator.prepare_data_loader(loader)
        self.module = processes.spread(self.lesson, self.accelerator, self.training)
        student = list(self.student.parameters())
        of_student = {id(p) for p in student}
        adapters = [p for p in self.lesson.parameters() if id(p) not in of_student]
        self.optimizer = self.training.make_optimizer(student, adapters)
        if self.pruner is not None:
            self.pruner.attach(self.optimizer)
        self.scaler = None
        if self.training.precision == "fp16":
            self.scaler = torch.amp.GradScaler(self.accelerator.device.type)
        self.peaks = [group["lr"] for group in self.optimizer.param_groups]
        self.steps = self.training.updates(len(self.loader))
        self.average: dict[str, Tensor] | None = None
        if self.training.ema is not None:
            parameters = self.student.named_parameters()
            self.average = {name: p.detach().clone() for name, p in parameters}
        self.draws = Stream(self.training.seed, _LESSON, self.rank)
        self.position = {"epoch": 0, "batch": 0, "step": 0, "best": None, "worse": 0, "over": False}
        self.best: dict[str, Tensor] | None = None
        self.history = History(
            self.folder if is_first else None,
            tensorboard=owner.tensorboard and is_first,
            show=owner.progress and is_first,
        )

    # The loop

    def train(self) -> None:
        while not self.position["over"]:
            self.train_epoch()

    def train_epoch(self) -> None:
        epoch, count = self.position["epoch"], len(self.loader)
        if hasattr(self.loader, "set_epoch"):
            self.loader.set_epoch(epoch)
        order = Stream(self.training.seed, _LOADER, epoch, self.rank)
        with order.drawing():
            batches = iter(self.loader)
        for number in range(count):
            with order.drawing():
                batch = next(batches)
            if number < self.position["batch"]:
                continue  # seen before the job was killed; the loader draws what it drew then
            first = number - number % self.training.accumulate
            of_update = min(self.training.accumulate, count - first)
            self.learn(as_batch(batch), of_update, is_update=number - first + 1 == of_update)
            if self.position["over"]:
                return

    def learn(self, batch: Batch, of_update: int, is_update: bool) -> None:
        """One batch, one of `of_update` whose gradients make an update."""
        position = self.position
        batch["step"] = position["step"]
        self.lesson.train()
        with self.draws.drawing(), processes.synchronised(self.module, is_update):
            if self.transform is not None:
                batch = {**self.transform(batch, self.student), "step": batch["step"]}
            with self.autocast():
                loss, terms = self.module(batch)
            loss = loss / of_update
            (loss if self.scaler is None else self.scaler.scale(loss)).backward()
        position["batch"] += 1
        if not is_update:
            return
        self.update()
        position["step"] += 1
        if position["batch"] == len(self.loader):
            position.update(epoch=position["epoch"] + 1, batch=0)
        self.note(batch, of_update, loss=loss * of_update, **terms)
        self.after_update()

    def autocast(self) -> torch.autocast:
        """16 bits for what is safe in them, with "fp32" for nothing."""
        dtype = {"fp16": torch.float16}.get(self.training.precision, torch.bfloat16)
        enabled = self.training.precision != "fp32"
        return torch.autocast(self.accelerator.device.type, dtype, enabled)

    @torch.no_grad()
    def average_in(self) -> None:
        """Let the average follow the student; what is pruned stays 0 in it, too."""
        for name, parameter in self.student.named_parameters():
            self.average[name].lerp_(parameter, 1 - self.training.ema)
        for name, mask in ({} if self.pruner is None else self.pruner.masks()).items():
            self.average[name].masked_fill_(~mask, 0)

    def update(self) -> None:
        share = self.training.rate_at(self.position["step"], self.steps)
        for group, peak in zip(self.optimizer.param_groups, self.peaks, strict=True):
            group["lr"] = peak * share
        if self.scaler is not None:
            self.scaler.unscale_(self.optimizer)
        elif self.pruner is not None:  # with a scaler later: gradients may not be finite
            self.pruner.collect()
        if self.training.clip is not None:
            nn.utils.clip_grad_norm_(self.lesson.parameters(), self.training.clip)
        if self.scaler is None:
            self.optimizer.step()
        else:
            self.scaler.step(self.optimizer)
            self.scaler.update()
        if self.pruner is not None:
            self.pruner.step()
        if self.schedule is not None:
            self.schedule.step()
        self.optimizer.zero_grad()
        if self.average is not None:
            self.average_in()
        if hasattr(self.teacher, "update"):
            self.teacher.update(self.student)

    def note(self, batch: Batch, batches: int, **values: Tensor) -> None:
        """A row of the history: the numbers of an update's last batch."""
        examples = next(v.shape[0] for v in batch.values() if isinstance(v, Tensor) and v.dim())
        numbers = {name: float(value.detach()) for name, value in values.items()}
        if not torch.tensor(numbers["loss"]).isfinite():
            raise ValueError(
                f"the loss became {numbers['loss']} at step {self.position['step']}; a lower "
                f"learning rate, a longer warm-up or clipping may help. Its terms: {numbers}"
            )
        numbers["learning_rate"] = self.optimizer.param_groups[0]["lr"]
        seen = examples * batches * self.accelerator.num_processes
        self.history.add(self.when() | numbers, seen, self.steps)

    def when(self) -> dict[str, int]:
        return {name: self.position[name] for name in ("step", "epoch")}

    def after_update(self) -> None:
        position = self.position
        position["over"] = position["step"] >= self.steps

        def due(every: int | None) -> bool:
            if position["over"]:
                return True
            return position["batch"] == 0 if every is None else position["step"] % every == 0

        if self.evaluate is not None and due(self.training.evaluate_every):
            self.judge()
        if self.folder is not None and due(self.training.save_every):
            self.save()

    # Judging

    def judge(self) -> None:
        position = self.position
        with self.averaged(), torch.no_grad():
            self.lesson.eval()
            score = processes.of_first(float(self.evaluate(self.student)))
            self.history.add(self.when() | {"score": score}, 0, self.steps)
            if self.pruner is not None and not self.pruner.done:
                return  # a model that is yet to lose weights is not the best
            if position["best"] is None or score > position["best"]:
                position.update(best=score, worse=0)
                self.best = processes.full_state(self.student)
                return
        position["worse"] += 1
        if self.training.patience is not None and position["worse"] >= self.training.patience:
            position["over"] = True

    @contextmanager
    def averaged(self) -> Iterator[None]:
        """The student with its average's weights, if there is one."""
        if self.average is None:
            yield
            return
        with torch.no_grad():
            own = {name: p.detach().clone() for name, p in self.student.named_parameters()}
            self._set_parameters(self.average)
            try:
                yield
            finally:
                self._set_parameters(own)

    @torch.no_grad()
    def _set_parameters(self, values: dict[str, Tensor]) -> None:
        for name, parameter in self.student.named_parameters():
            parameter.copy_(values[name])

    # Checkpoints

    def save(self) -> None:
        options = StateDictOptions(full_state_dict=True, cpu_offload=True)
        lesson, optimizer = get_state_dict(self.lesson, self.optimizer, options=options)
        with self.averaged():
            average = None if self.average is None else processes.full_state(self.student)
        draws = processes.everyones(self.draws.state)
        if self.accelerator.is_main_process:
            teacher = getattr(self.teacher, "update", None)
            transform = getattr(self.transform, "state_dict", dict)
            state = {
                "training": asdict(self.training),
                "lesson": lesson,
                "optimizer": optimizer,
                "average": average,
                "best": self.best,
                "position": self.position,
                "draws": draws,
                "scaler": None if self.scaler is None else self.scaler.state_dict(),
                "transform": transform(),
                "pruner": None if self.pruner is None else self.pruner.state_dict(),
                "schedule": None if self.schedule is None else self.schedule.state_dict(),
                "teacher": None if teacher is None else self.teacher.model.state_dict(),
            }
            partial = self.folder / f"{_CHECKPOINT}.part"
            torch.save(state, partial)
            partial.replace(self.folder / _CHECKPOINT)
        self.accelerator.wait_for_everyone()

    def resume(self) -> None:
        """Go on from the folder's checkpoint, if it has one."""
        if self.folder is None or not (self.folder / _CHECKPOINT).exists():
            return
        state = torch.load(self.folder / _CHECKPOINT, map_location="cpu", weights_only=True)
        wanted = asdict(self.training)
        differing = [name for name in wanted if state["training"].get(name) != wanted[name]]
        for name, part in (("pruner", self.pruner), ("schedule", self.schedule)):
            if (state.get(name) is None) != (part is None):
                differing.append(name)
        if differing or len(state["draws"]) != self.accelerator.num_processes:
            what = ", ".join(differing) or f"{len(state['draws'])} processes"
            raise ValueError(
                f"{self.folder} has the checkpoint of another training (it differs in: {what}); "
                "choose another folder, or delete it"
            )
        set_state_dict(
            self.lesson,
            self.optimizer,
            model_state_dict=state["lesson"],
            optim_state_dict=state["optimizer"],
            options=processes.whole_from_first(),
        )
        if self.average is not None:
            lesson = {name: p.detach().clone() for name, p in self.student.named_parameters()}
            processes.set_full_state(self.student, state["average"])
            self.average = {name: p.detach().clone() for name, p in self.student.named_parameters()}
            self._set_parameters(lesson)
        if state["scaler"] is not None:
            self.scaler.load_state_dict(state["scaler"])
        if state["transform"]:
            self.transform.load_state_dict(state["transform"])
        if self.pruner is not None:
            self.pruner.load_state_dict(state["pruner"])
        if self.schedule is not None:
            self.schedule.load_state_dict(state["schedule"])
        if state["teacher"] is not None:
            self.teacher.model.load_state_dict(state["teacher"])
        self.best, self.position = state["best"], state["position"]
        self.draws.state = state["draws"][self.rank]
        self.history.restore(self.position["step"])

    def finish(self) -> None:
        """Leave the student with the weights that it is to have, also as a file."""
        if self.best is not None:
            processes.set_full_state(self.student, self.best)
        elif self.average is not None:
            self._set_parameters(self.average)
        self.lesson.eval()
        if self.folder is not None:
            weights = processes.full_state(self.student)
            if self.accelerator.is_main_process:
                from safetensors.torch import save_file

                partial = self.folder / f"{_STUDENT}.part"
                save_file({name: w.contiguous() for name, w in weights.items()}, partial)
                partial.replace(self.folder / _STUDENT)
            self.accelerator.wait_for_everyone()

"""Pruning inside of any loop."""

import copy
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import replace
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from trine._bits import clear, put
from trine.prune.criteria.base import Criterion
from trine.prune.granularity import Granularity, Weight
from trine.prune.layers import check_finite, prunable_layers, wide
from trine.prune.report import PruningReport, pruning_report
from trine.prune.schedule import Event, OneShot, Schedule
from trine.prune.scope import Scope, Threshold

__all__ = ["Pruner"]


class Pruner:
    """Prunes a model while it is trained.

        pruner = Pruner(model, Magnitude(), scope=Global(0.9), schedule=Cubic(0, 1000, 50),
                        optimizer=optimizer)
        for batch in loader:
            loss(model, batch).backward()
            optimizer.step()
            pruner.step()
            optimizer.zero_grad()
        model = pruner.finish()

    Criterion, granularity, scope and schedule go together in every combination that has a meaning.
    What is pruned is 0 in the weights themselves; its gradients and the optimiser's state are 0,
    too, so that training does not revive it. What the schedule has for the beginning happens here:
    `Pruner(model, Magnitude(), scope=PerLayer(0.5)).finish()` prunes without any training.

    With several processes (DDP) each makes its own Pruner, of the bare model; all get the first
    one's masks.

    To go on with a training, make the Pruner as at first, then load both the model's state and
    this one's.

    Args:
        model: pruned in place.
        criterion: what a weight is worth.
        granularity: what is removed as one.
        scope: among what, and how much.
        schedule: when.
        layers, skip: patterns of layer names, as for `prunable_layers`.
        optimizer: as for `attach`.

    Raises:
        ValueError: before anything is changed: layers that cannot be pruned, weights or scores that
            are not finite, a ratio that cannot be reached, gradients that never arrived, parts that
            make no sense together.
    """

    def __init__(
        self,
        model: nn.Module,
        criterion: Criterion,
        granularity: Granularity | None = None,
        scope: Scope | None = None,
        schedule: Schedule | None = None,
        *,
        layers: str | Iterable[str] = "*",
        skip: str | Iterable[str] = (),
        optimizer: torch.optim.Optimizer | None = None,
    ) -> None:
        if scope is None:
            raise ValueError("Pruner: say how much to prune, e.g. scope=PerLayer(0.5)")
        self.model, self.criterion, self.scope = model, criterion, scope
        self.granularity, self.schedule = granularity or Weight(), schedule or OneShot()
        self.layers = prunable_layers(model, layers, skip)
        self.position = 0
        for name, layer in self.layers.items():
            check_finite(name, layer)
        empty = self._pool(
            {n: m.weight.new_zeros(()).expand_as(m.weight) for n, m in self.layers.items()}
        )
        scope.check({key: group.numel() for key, group in empty.items()}, self.granularity)
        if isinstance(scope, Threshold) and self.schedule.regrows:
            raise ValueError("RigL keeps a ratio and Threshold has none; use PerLayer or Global")
        self._kept = {k: torch.ones_like(group, dtype=torch.bool) for k, group in empty.items()}
        self._off: dict[tuple[str, str], Tensor] = {}  # what is pruned, by layer and parameter
        self._growth: dict[str, Tensor] | None = None
        self._earlier: dict[str, Any] | None = None
        self._collected = self._finished = False
        self.optimizer: torch.optim.Optimizer | None = None
        self._hook = None
        criterion.start(self.layers)
        first = self.schedule.at(0)
        kept = None if first is None else self._decide(first)
        if optimizer is not None:
            self.attach(optimizer)
        if self.schedule.rewind == 0:
            self._earlier = self._snapshot()
        if kept is not None:
            with torch.no_grad():
                self._set(kept)

    @property
    def done(self) -> bool:
        """Whether the schedule has come to its end."""
        return self.position >= self.schedule.last

    def attach(self, optimizer: torch.optim.Optimizer) -> None:
        """Keep the state of this optimiser in step, and call `collect` before each of its steps.

        Raises ValueError where it trains none of the layers, or the model was moved or sharded
        since the Pruner was made.
        """
        optimizer = getattr(optimizer, "optimizer", optimizer)  # accelerate's holds the real one
        held = {id(p) for group in optimizer.param_groups for p in group["params"]}
        if not any(id(layer.weight) in held for layer in self.layers.values()):
            raise ValueError("Pruner: the optimiser has none of the weights that are pruned")
        devices = {group.device for group in self._kept.values()}
        if {layer.weight.device for layer in self.layers.values()} != devices:
            raise ValueError("Pruner: the model was moved; make the Pruner where it is trained")
        if any(type(layer.weight) is not nn.Parameter for layer in self.layers.values()):
            raise ValueError(
                "Pruner: weights have become shards (FSDP) or are computed; copies of the model in "
                "each process (DDP) can be pruned"
            )
        if self._hook is not None:
            self._hook.remove()
        self.optimizer = optimizer
        self._hook = optimizer.register_step_pre_hook(lambda *_: self.collect())
        self._clear_state()
        if self._earlier is not None and self.schedule.rewind == self.position:
            self._earlier = self._snapshot()

    @torch.no_grad()
    def collect(self) -> None:
        """Take what the criterion and the schedule need of the gradients; those of pruned weights
        then become 0.

        An attached optimiser calls it. Where gradients are clipped, call it before: otherwise those
        of pruned weights count.
        """
        if self._collected or self._finished:
            return
        self.criterion.collect(self.layers)
        due = self.schedule.at(self.position + 1)
        if due is not None and due.regrow:
            self._growth = self._pool(self._gradients())
        for parameter, off in self._pruned():
            if parameter.grad is not None:
                clear(off, parameter.grad)
        self._collected = True

    @torch.no_grad()
    def step(self) -> None:
        """Call after each step of the optimiser: what is pruned stays so, and what the schedule has
        for now is done.

        Where an attached optimiser has taken no step since (a gradient scaler or accelerate's
        accumulation left it out), that was no update and the schedule does not go on.

        Raises ValueError as the constructor does; the masks then stay as they were.
        """
        if self._finished:
            raise ValueError("Pruner: it has finished; make another one to prune further")
        is_update = self.optimizer is None or self._collected
        self._collected = False
        self._apply()
        if not is_update:
            return
        self.position += 1
        if self.schedule.rewind == self.position:
            self._earlier = self._snapshot()
        event = self.schedule.at(self.position)
        if event is None:
            return
        kept = self._decide(event)
        if event.rewind:
            self._rewind()
        else:
            self._revive(kept)
        self._set(kept)

    def finish(self) -> nn.Module:
        """The plain model, with zeros where it was pruned; `report()` says what that saves."""
        if not self._finished:
            with torch.no_grad():
                self._apply()
            if self._hook is not None:
                self._hook.remove()
            self._finished, self._earlier = True, None
        return self.model

    def report(self) -> PruningReport:
        """What is pruned, and what it saves as it is: prints as a table."""
        report = pruning_report(self.layers, self.removed())
        return replace(report, position=self.position, last=self.schedule.last)

    def masks(self) -> dict[str, Tensor]:
        """By the names of the parameters that are pruned: which of them are kept, bool."""
        return {f"{name}.{which}".lstrip("."): ~off for (name, which), off in self._off.items()}

    def removed(self) -> dict[str, list[int]]:
        """The outputs of each layer that are off, by number, for `trine.prune.remove`; empty for
        granularities other than whole outputs."""
        return self.granularity.off(self.layers, self._kept)

    def dropped(self) -> list[str]:
        """The layers or blocks that are off as a whole, for `trine.prune.drop_layers`; empty for
        granularities other than `Layer`."""
        return self.granularity.dropped(self._kept)

    def state_dict(self) -> dict[str, Any]:
        """Masks, criterion, position: tensors and plain data."""
        return {
            "position": self.position,
            "kept": self._kept,
            "criterion": self.criterion.state_dict(),
            "earlier": self._earlier,
        }

    @torch.no_grad()
    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """What `state_dict` returned. Raises ValueError for the state of another pruning."""
        shapes = {key: kept.shape for key, kept in self._kept.items()}
        if {key: kept.shape for key, kept in state["kept"].items()} != shapes:
            raise ValueError("Pruner: the state is that of another model or granularity")
        self.position, self._earlier = state["position"], state["earlier"]
        # Loading an optimiser's state may have taken a step of it, with gradients of 0.
        self._collected, self._growth = False, None
        self.criterion.load_state_dict(state["criterion"])
        self._set({k: state["kept"][k].to(kept.device) for k, kept in self._kept.items()})

    # Which groups are kept

    def _decide(self, event: Event) -> dict[str, Tensor]:
        """The groups to keep from now on, the same in all processes; nothing is changed."""
        groups = self._pool(self._scores())
        if event.regrow or not self.criterion.revives:  # what is off is not to be looked at
            groups = {k: g.masked_fill(~self._kept[k], -torch.inf) for k, g in groups.items()}
        if event.regrow:
            give_up = event.regrow
            stay = self.scope.keep(groups, lambda aim: event.ratio(aim) + give_up * (1 - aim))
            groups = {k: g.masked_fill(stay[k], torch.inf) for k, g in self._grown().items()}
        kept = self.scope.keep(self.granularity.protect(groups), event.ratio)
        kept = {key: mask.contiguous() for key, mask in kept.items()}
        if dist.is_initialized():
            for mask in kept.values():
                dist.broadcast(mask, src=0)
        return kept

    def _scores(self) -> dict[str, Tensor]:
        scores = self.criterion.scores(self.model, self.layers)
        who = type(self.criterion).__name__
        for name, layer in self.layers.items():
            if name not in scores or scores[name].shape != layer.weight.shape:
                raise ValueError(f"{who} gave no score for each weight of layer '{name}'")
            # The sum first, in a tenth of the time; but that of finite scores may overflow.
            if not scores[name].sum().isfinite() and not scores[name].isfinite().all():
                raise ValueError(
                    f"{who}: scores of layer '{name}' are NaN or infinite; its weights, its "
                    "gradients or the calibration data are"
                )
        return {name: wide(scores[name]) for name in self.layers}

    def _pool(self, scores: Mapping[str, Tensor]) -> dict[str, Tensor]:
        return self.granularity.pool(self.layers, scores)

    def _gradients(self) -> dict[str, Tensor]:
        for name, layer in self.layers.items():
            if layer.weight.grad is None:
                raise ValueError(f"RigL: no gradient has reached layer '{name}'")
        return {name: layer.weight.grad.abs() for name, layer in self.layers.items()}

    def _grown(self) -> dict[str, Tensor]:
        if self._growth is None:
            raise ValueError(
                "RigL: no gradients were collected; attach the optimiser, or call collect() after "
                "the backward pass"
            )
        growth, self._growth = self._growth, None
        return growth

    # What that does to the model

    def _revive(self, kept: dict[str, Tensor]) -> None:
        """Give what comes back the values that the criterion has for it."""
        back = {key: kept[key] & ~before for key, before in self._kept.items()}
        for name, comes_back in self.granularity.spread(self.layers, back).items():
            values = self.criterion.values(name)
            if values is not None:
                weight = self.layers[name].weight
                put(comes_back, weight, values)

    def _set(self, kept: dict[str, Tensor]) -> None:
        self._kept = kept
        masks = self.granularity.masks(self.layers, kept)
        self._off = {of: (~mask).contiguous() for of, mask in masks.items() if not mask.all()}
        self._apply()
        self._clear_state()

    def _pruned(self) -> Iterator[tuple[nn.Parameter, Tensor]]:
        """The parameters that are pruned, with what of them is."""
        for (name, which), off in self._off.items():
            yield getattr(self.layers[name], which), off

    def _apply(self) -> None:
        for parameter, off in self._pruned():
            clear(off, parameter)

    def _clear_state(self) -> None:
        """Once for each mask: afterwards gradients of 0 keep it so."""
        if self.optimizer is None:
            return
        for parameter, off in self._pruned():
            state = self.optimizer.state.get(parameter, {}).values()
            clear(off, *(v for v in state if isinstance(v, Tensor) and v.shape == off.shape))

    def _snapshot(self) -> dict[str, Any]:
        optimizer = None if self.optimizer is None else self.optimizer.state_dict()
        return copy.deepcopy({"model": self.model.state_dict(), "optimizer": optimizer})

    def _rewind(self) -> None:
        self.model.load_state_dict(self._earlier["model"])
        if self._earlier["optimizer"] is not None:
            rates = [group["lr"] for group in self.optimizer.param_groups]
            self.optimizer.load_state_dict(copy.deepcopy(self._earlier["optimizer"]))
            for group, rate in zip(self.optimizer.param_groups, rates, strict=True):
                group["lr"] = rate

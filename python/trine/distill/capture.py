"""What modules inside a model compute, by name, without a change of the model."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

__all__ = ["Capture", "unwrapped"]

_WRAPPERS = ("module", "_orig_mod")  # of DistributedDataParallel and of torch.compile


class Capture:
    """Calls a model and returns its output with a view: the tensors that objectives look at.

        student = Capture(model, {"h2": "encoder.layer.2", "pooled": "classifier:input"})
        output, view = student(**batch)
        view["h2"], view["pooled"], view["logits"]

    A path names a module as `model.get_submodule` does; of a module that returns several tensors
    the first is taken, ":1" behind the path takes the second, and ":input" what goes in first. What
    the call returns is in the view, too: a tensor as "logits", and of an output of Hugging Face its
    `logits`, and "hidden_states.0", "attentions.0", ... where the model was asked for them.

    The model may be wrapped by DistributedDataParallel or torch.compile: paths start inside, and
    the wrapper is what is called. Give torch.compile the model before or after; in both cases the
    hooks stand before the first call. Activation checkpointing that is not reentrant works as it
    is; the reentrant kind computes without a graph, and is refused where a tensor is captured.

    Raises ValueError for a path that the model does not have; when called, for a module that did
    not run or returns no tensor.
    """

    def __init__(self, model: nn.Module, paths: Mapping[str, str] | None = None) -> None:
        self.model = model
        self._handles = []
        self._captured: dict[str, Tensor] | None = None  # None: nobody asked for what runs now
        self._with_graph = False
        self._paths = dict(paths or {})
        inner = unwrapped(model)
        for name, path in self._paths.items():
            if name == "logits" or name.startswith(("hidden_states.", "attentions.")):
                raise ValueError(f"Capture: the name '{name}' is taken by what the model returns")
            module_path, _, which = path.partition(":")
            try:
                module = inner.get_submodule(module_path)
            except AttributeError:
                raise ValueError(
                    f"Capture: the model has no module '{module_path}'; it has, among others, "
                    + ", ".join(f"'{n}'" for n, _ in list(inner.named_modules())[1:9])
                ) from None
            self._handles.append(self._watch(module, name, which))

    def _watch(self, module: nn.Module, name: str, which: str):
        if which == "input":

            def before(_module, args, kwargs):
                self._keep(name, args or tuple(kwargs.values()), 0)

            return module.register_forward_pre_hook(before, with_kwargs=True)
        try:
            index = int(which or 0)
        except ValueError:
            raise ValueError(
                f"Capture: ':{which}' of '{name}' must be ':input' or the number of an output"
            ) from None

        def after(_module, _args, output):
            self._keep(name, output, index)

        return module.register_forward_hook(after)

    def _keep(self, name: str, value: Any, index: int) -> None:
        if self._captured is None:  # a checkpoint that computes again, or a call by somebody else
            return
        if not isinstance(value, Tensor):
            items = list(value.values()) if isinstance(value, Mapping) else list(value)
            tensors = [item for item in items if isinstance(item, Tensor)]
            if index >= len(tensors):
                raise ValueError(
                    f"Capture: '{self._paths[name]}' has {len(tensors)} tensors; there is no "
                    f"number {index}"
                )
            value = tensors[index]
        if self._with_graph and not torch.is_grad_enabled():
            raise ValueError(
                f"Capture: '{self._paths[name]}' runs without a graph inside a call that has one, "
                "so its loss would train nothing; use checkpointing with use_reentrant=False"
            )
        self._captured[name] = value

    def __call__(self, *args: Any, **kwargs: Any) -> tuple[Any, dict[str, Tensor]]:
        """The model's output, and the view."""
        with self._capturing() as view:
            output = self.model(*args, **kwargs)
        missing = [path for name, path in self._paths.items() if name not in view]
        if missing:
            raise ValueError(
                f"Capture: '{missing[0]}' did not run when the model was called; capture a module "
                "that takes part in it"
            )
        view.update(_of_output(output))
        return output, view

    @contextmanager
    def _capturing(self) -> Iterator[dict[str, Tensor]]:
        view: dict[str, Tensor] = {}
        self._captured, self._with_graph = view, torch.is_grad_enabled()
        try:
            yield view
        finally:
            self._captured = None

    def close(self) -> None:
        """Take the hooks off the model."""
        for handle in self._handles:
            handle.remove()
        self._handles.clear()


def unwrapped(model: nn.Module) -> nn.Module:
    """The model inside of DistributedDataParallel and torch.compile."""
    while True:
        for name in _WRAPPERS:
            inner = model._modules.get(name)
            if inner is not None and len(model._modules) == 1:
                model = inner
                break
        else:
            return model


def _of_output(output: Any) -> dict[str, Tensor]:
    if isinstance(output, Tensor):
        return {"logits": output}

    def part(name: str) -> Any:
        if isinstance(output, Mapping):
            return output.get(name)
        return getattr(output, name, None)

    view = {}
    if isinstance(part("logits"), Tensor):
        view["logits"] = part("logits")
    for name in ("hidden_states", "attentions"):
        for i, tensor in enumerate(part(name) or ()):
            view[f"{name}.{i}"] = tensor
    return view

"""Random numbers in streams, so that a resumed run draws what an uninterrupted one does."""

import random
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy
import torch

__all__ = ["Stream"]


class Stream:
    """The states of all global generators, as they are for one purpose.

    Within `with stream.drawing():` they are the global ones. The order of examples and whatever a
    data set draws has one stream, training (dropout, masks) another: so the loader can be run
    through again up to where a job was killed, without the training in between.
    """

    def __init__(self, *seed: int) -> None:
        before = _states()
        number = 0
        for part in seed:  # different for (0, 1) and (1, 0)
            number = (number * 1_000_003 + part) % 2**32
        torch.manual_seed(number)
        random.seed(number)
        numpy.random.seed(number)
        self.state = _states()
        _set_states(before)

    @contextmanager
    def drawing(self) -> Iterator[None]:
        before = _states()
        _set_states(self.state)
        try:
            yield
        finally:
            self.state = _states()
            _set_states(before)


def _states() -> dict[str, Any]:
    """Of tensors, numbers and tuples only: torch.load trusts those."""
    name, keys, *rest = numpy.random.get_state()
    return {
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state_all() if torch.cuda.is_initialized() else [],
        "python": random.getstate(),
        "numpy": (name, keys.tolist(), *rest),
    }


def _set_states(states: dict[str, Any]) -> None:
    torch.set_rng_state(states["torch"])
    if states["cuda"]:
        torch.cuda.set_rng_state_all(states["cuda"])
    random.setstate(states["python"])
    name, keys, *rest = states["numpy"]
    numpy.random.set_state((name, numpy.array(keys, numpy.uint32), *rest))

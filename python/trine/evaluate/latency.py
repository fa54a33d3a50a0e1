"""How long calls take, measured so that a comparison between them is fair."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from statistics import median

import torch

Call = Callable[[], object]


def alternate(
    calls: Mapping[str, Call], *, rounds: int = 11, sample_seconds: float = 100e-6
) -> dict[str, float]:
    """Median seconds per call of each of `calls`, measured in turns.

    A busy or warming machine slows every call alike only if the calls take turns, so each round
    takes one sample of every call, and every second round goes through them backwards. A sample
    repeats its call until it lasts about `sample_seconds` (the clock's own cost, ~0.1 us, and a
    timer tick are then small beside it). Every call runs at least once before it is timed. All of
    it happens in inference mode; work queued on a CUDA device is waited for.

    Args:
        calls: what to call, by name.
        rounds: samples per call; the median is taken over them.
        sample_seconds: the least duration of a sample, in seconds.

    Returns:
        Seconds per call by name, in the order of `calls`.

    Raises:
        ValueError: no calls, or rounds below 1.
    """
    if not calls or rounds < 1:
        raise ValueError(
            f"alternate needs at least one call and one round; got {len(calls)} calls and "
            f"{rounds} rounds"
        )
    with torch.inference_mode():
        repeats = {name: _repeats(call, sample_seconds) for name, call in calls.items()}
        samples: dict[str, list[float]] = {name: [] for name in calls}
        order = list(calls)
        for _ in range(rounds):
            for name in order:
                samples[name].append(_sample(calls[name], repeats[name]) / repeats[name])
            order.reverse()
    return {name: median(seconds) for name, seconds in samples.items()}


def _repeats(call: Call, sample_seconds: float) -> int:
    """How often `call` must run to last `sample_seconds`; running it to find out warms it up."""
    _sample(call, 1)
    repeats = 1
    # Doubling: the last, deciding sample is measured warm, and at most half of its length is waste.
    while _sample(call, repeats) < sample_seconds:
        repeats *= 2
    return repeats


def _sample(call: Call, repeats: int) -> float:
    """Seconds that `repeats` calls in a row take."""
    _finish_queued_work()
    start = time.perf_counter()
    for _ in range(repeats):
        call()
    _finish_queued_work()
    return time.perf_counter() - start


def _finish_queued_work() -> None:
    if torch.cuda.is_initialized():
        torch.cuda.synchronize()

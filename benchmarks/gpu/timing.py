"""Calls timed on the GPU: many in one graph, so that launches cost nothing, and graphs in turns.

Calls that wait for the device, or last so long that launches do not count, need no graph.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from statistics import median

import torch
from torch import Tensor

from benchmarks.measure import Call, Timing

SAMPLE_SECONDS = 2e-3  # many times an event's resolution of a microsecond
MOST_CALLS = 2000  # in a graph: instantiating one takes some 10 us a call


@dataclass(frozen=True)
class Recorded:
    """What stands in a graph, or does without."""

    replay: Callable[[], None]
    calls: int
    transient_bytes: int | None = None  # see below; None: not measured


def record(calls: Sequence[Call]) -> Recorded:
    """All of `calls`, which do the same on other memory, as often as it takes SAMPLE_SECONDS.

    Raises where one of them cannot be captured: it waits for the device, say.
    """
    for call in calls:  # kernels are loaded, compiled and chosen
        call()
    recorded = Recorded(capture(calls), len(calls))
    seconds(recorded.replay)  # the first replay uploads the graph
    repeats = math.ceil(SAMPLE_SECONDS / seconds(recorded.replay))
    repeats = min(repeats, MOST_CALLS // len(calls))
    if repeats <= 1:
        return recorded
    return Recorded(capture(list(calls) * repeats), len(calls) * repeats)


def launched(calls: Sequence[Call]) -> Recorded:
    """Each of `calls` once, without a graph."""
    for call in calls:
        call()

    def replay() -> None:
        for call in calls:
            call()

    return Recorded(replay, len(calls), transient_bytes(calls[0]))


def transient_bytes(call: Callable[[], Sequence[Tensor]]) -> int:
    """The most device memory that a warm call holds beside its arguments and results."""
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    results = call()
    torch.cuda.synchronize()
    size = sum(t.numel() * t.element_size() for t in results)
    return torch.cuda.max_memory_allocated() - before - size


def in_turns(recorded: Mapping[str, Recorded], rounds: int) -> dict[str, Timing]:
    """Medians by name: a sample of each in a round, every second round backwards.

    The round before the first one is not counted: it brings the clocks up.
    """
    samples: dict[str, list[float]] = {name: [] for name in recorded}
    order = list(recorded)
    for _ in range(rounds + 1):
        for name in order:
            samples[name].append(seconds(recorded[name].replay) / recorded[name].calls)
        order.reverse()
    return {name: Timing(median(all_[1:]), rounds, 0) for name, all_ in samples.items()}


def capture(calls: Sequence[Call]) -> Callable[[], None]:
    """The replay of a graph. Outputs share memory: each is dead before the next one is written."""
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for call in calls:
            call()
    return graph.replay


def seconds(run: Callable[[], object]) -> float:
    """What the device takes for it."""
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start.record()
    run()
    end.record()
    end.synchronize()
    return start.elapsed_time(end) / 1e3

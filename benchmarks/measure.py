"""Calls timed in turns, without the samples that other processes disturbed."""

import time
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from statistics import median

import torch

Call = Callable[[], object]

SAMPLE_SECONDS = 1e-3  # many times the clock's cost; one timer tick of the system is seen in it
LONG_SECONDS = 50e-3  # a call that lasts this long the first time is no short one later
LEAST_ROUNDS = 3
# Samples of so long altogether are enough, be it one: PyTorch takes a minute for products in bf16
# where the processor has no instructions for them.
ENOUGH_SECONDS = 20.0
# A sample counts as disturbed where the threads of this process stood ready to run, but waited for
# a processor, for more than this share of it. A wake-up takes a few microseconds: not counted.
DISTURBED_SHARE = 0.02
WAKE_UP_SECONDS = 20e-6
# Idle threads of another library's pool spin for about this long before they sleep.
SETTLE_SECONDS = 1e-3


@dataclass(frozen=True)
class Timed:
    """What is called, and what is done before each sample without being timed."""

    call: Call
    before: Call
    repeatable: bool = True  # False: `before` must come before every single call


@dataclass(frozen=True)
class Timing:
    seconds: float  # median over the undisturbed samples; over all where none is undisturbed
    samples: int
    disturbed: int


def in_turns(
    calls: Mapping[str, Timed],
    rounds: int,
    budget: float,
    mode: Callable[[], AbstractContextManager] = torch.inference_mode,
) -> dict[str, Timing]:
    """Time each of `calls` by name, one sample of each in a round, every second round backwards.

    A call is through after `rounds` undisturbed samples, or twice as many in all; or, but not
    before LEAST_ROUNDS or ENOUGH_SECONDS, when its samples have taken `budget` seconds. `mode`:
    what PyTorch runs them in.
    """
    with mode():
        repeats = {name: _repeats(timed) for name, timed in calls.items()}
        clean: dict[str, list[float]] = {name: [] for name in calls}
        disturbed: dict[str, list[float]] = {name: [] for name in calls}
        spent = dict.fromkeys(calls, 0.0)
        order = list(calls)
        for done in range(2 * rounds):
            for name in order:
                of_time = budget if done >= LEAST_ROUNDS else ENOUGH_SECONDS
                if len(clean[name]) == rounds or spent[name] > of_time:
                    continue
                seconds, waited = _sample(calls[name], repeats[name])
                spent[name] += seconds
                kept = disturbed if is_disturbed(seconds, waited) else clean
                kept[name].append(seconds / repeats[name])
            order.reverse()
    return {
        name: Timing(
            median(clean[name] or disturbed[name]),
            len(clean[name]) + len(disturbed[name]),
            len(disturbed[name]),
        )
        for name in calls
    }


def is_disturbed(seconds: float, waited: float) -> bool:
    return waited > max(DISTURBED_SHARE * seconds, WAKE_UP_SECONDS)


def _repeats(timed: Timed) -> int:
    """How often the call must run to last SAMPLE_SECONDS; running it to find out warms it up."""
    first, _ = _sample(timed, 1)
    repeats = 1
    if first < LONG_SECONDS and timed.repeatable:
        while _sample(timed, repeats)[0] < SAMPLE_SECONDS:
            repeats *= 2
    return repeats


def _sample(timed: Timed, repeats: int) -> tuple[float, float]:
    """Seconds that `repeats` calls in a row take, and how long others kept us from a processor."""
    time.sleep(SETTLE_SECONDS)
    timed.before()
    call = timed.call
    waited = seconds_waited()
    start = time.perf_counter()
    for _ in range(repeats):
        call()
    seconds = time.perf_counter() - start
    return seconds, seconds_waited() - waited


def seconds_waited() -> float:
    """How long this process's threads have waited for a processor, and the machine for its host.

    Linux accounts for the first exactly (schedstat: nanoseconds on a processor, nanoseconds waiting
    for one), for the second ("steal") in ticks. Elsewhere nothing is known and nothing is left out.
    """
    nanoseconds = ticks = 0
    for thread in Path("/proc/self/task").glob("*/schedstat"):
        try:
            nanoseconds += int(thread.read_text().split()[1])
        except OSError:  # the thread has ended
            continue
    try:
        with open("/proc/stat") as stat:
            ticks = int(stat.readline().split()[8])
    except OSError:
        pass
    return nanoseconds / 1e9 + ticks / 100

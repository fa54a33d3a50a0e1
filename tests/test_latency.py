"""The timer that takes its samples in turns, under a clock that only the calls advance."""

import pytest
import torch
from trine.evaluate import alternate
from trine.evaluate import latency as latency_module


@pytest.fixture
def clock(monkeypatch):
    """A clock that stands still; `clock.log` holds the calls made, `clock.call` makes one."""

    class Clock:
        now = 0.0

        def __init__(self):
            self.log = []

        def call(self, name, *seconds):
            """A call that takes `seconds`, one after the other, the last one for good."""
            left = list(seconds)

            def run():
                assert torch.is_inference_mode_enabled()
                self.log.append(name)
                self.now += left.pop(0) if len(left) > 1 else left[0]

            return run

    clock = Clock()
    monkeypatch.setattr(latency_module.time, "perf_counter", lambda: clock.now)
    return clock


def test_the_median_of_each_call_by_name(clock):
    # warm-up 9, trial 1, then the samples 1 2 100 3 2
    a = clock.call("a", 9.0, 1.0, 1.0, 2.0, 100.0, 3.0, 2.0)
    seconds = alternate({"a": a, "b": clock.call("b", 5.0)}, rounds=5)
    assert seconds == {"a": 2.0, "b": 5.0}
    assert list(seconds) == ["a", "b"]


def test_calls_take_turns_and_every_second_round_goes_backwards(clock):
    names = ("a", "b", "c")
    alternate({name: clock.call(name, 1.0) for name in names}, rounds=4)
    warm_up = ["a", "a", "b", "b", "c", "c"]
    assert clock.log == warm_up + list("abc") + list("cba") + list("abc") + list("cba")


def test_a_short_call_is_repeated_until_the_sample_is_long_enough(clock):
    seconds = alternate({"short": clock.call("short", 2.0**-20)}, rounds=3, sample_seconds=2.0**-13)
    assert seconds == {"short": 2.0**-20}
    assert len(clock.log) == 1 + (2**8 - 1) + 3 * 2**7


def test_the_real_clock_gives_positive_times():
    assert alternate({"sum": lambda: torch.ones(8).sum()}, rounds=1)["sum"] > 0


@pytest.mark.parametrize(("calls", "rounds"), [({}, 1), ({"a": print}, 0)])
def test_nothing_to_measure_is_refused(calls, rounds):
    with pytest.raises(ValueError, match="at least one call and one round"):
        alternate(calls, rounds=rounds)


def test_an_error_of_a_call_comes_through():
    with pytest.raises(ZeroDivisionError):
        alternate({"a": lambda: 1 / 0})

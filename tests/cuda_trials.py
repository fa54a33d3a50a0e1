"""Runs of CUDA kernels on the CPU against the reference, as they are or with a planted bug."""

import subprocess
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Protocol

import cuda_kernels
import pytest
from cuda_kernels import Mutant
from linear_inputs import assert_same_bits
from torch import Tensor


class Case(Protocol):
    """Inputs of one call, in the form that the op's program in cuda_on_cpu reads.

    check(actual, expected), where there is one, stands in for the comparison of bits.
    """

    def encode(self) -> bytes: ...
    def decode(self, answer: bytes) -> Sequence[Tensor]: ...
    @property
    def expected(self) -> Sequence[Tensor]: ...


@dataclass(frozen=True)
class Trial:
    op: str
    mutant: Mutant | None = None
    capability: int = 80
    seeds: tuple[int, ...] = (1,)  # of schedules

    def __str__(self) -> str:
        what = "right" if self.mutant is None else self.mutant.bug.replace(" ", "-")
        return f"{self.op}-{what}-sm{self.capability}"

    def run(self, cases: Sequence[Case]) -> None:
        """Fails at the first wrong result, or where a report is awaited, at the first report."""
        program = cuda_kernels.build(self.op, self.mutant)
        awaits_report = self.mutant is not None and bool(self.mutant.report)
        for seed in self.seeds:
            for number, case in enumerate(cases):
                where = f"case {number}, schedule of seed {seed}"
                try:
                    answer = cuda_kernels.run(program, seed, case.encode(), self.capability)
                except subprocess.CalledProcessError as error:
                    raise AssertionError(f"{where}: {error.stderr.decode()}") from error
                if not awaits_report:
                    for actual, expected in zip(case.decode(answer), case.expected, strict=True):
                        try:
                            getattr(case, "check", assert_same_bits)(actual, expected)
                        except AssertionError as error:
                            raise AssertionError(f"{where}: {error}") from error


Outcome = Callable[[Trial], None]


def outcomes(
    request: pytest.FixtureRequest, cases: Callable[[Trial], Sequence[Case]]
) -> Iterator[Outcome]:
    """For a fixture of a module whose tests take a `trial`: what came of one, raised if it failed.

    Those that this test run will ask for run on all cores meanwhile.
    """
    asked = [item for item in request.session.items if item.module is request.module]
    trials: list[Trial] = [item.callspec.params["trial"] for item in asked]
    for op in {trial.op for trial in trials}:
        cuda_kernels.build(op)
    pool = ThreadPoolExecutor(cuda_kernels.CORES)
    futures: dict[Trial, Future[None]] = {
        trial: pool.submit(trial.run, cases(trial)) for trial in trials
    }
    yield lambda trial: futures[trial].result()
    pool.shutdown(cancel_futures=True)


def assert_caught(trial: Trial, outcome: Outcome) -> None:
    assert trial.mutant is not None
    with pytest.raises(AssertionError) as caught:
        outcome(trial)
    report = trial.mutant.report
    caught.match("Tensor-likes are not" if report is None else report)

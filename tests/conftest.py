"""What tests share: a fixed seed, poisoned memory, each instruction set and device in turn."""

import pytest
import torch
from devices import DEVICE, devices_to_test, on_device
from hypothesis import settings
from instruction_sets import isas_to_test
from trine import _C, backends

# A busy machine is no failure: hypothesis would fail an example that takes 200 ms.
settings.register_profile("trine", deadline=None)
settings.load_profile("trine")


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


@pytest.fixture(autouse=True)
def _poisoned_memory():
    """Fill every torch.empty with NaN and every scratch block with 0xa5.

    A kernel that leaves an output unwritten, or reads what it did not write, then shows.
    """
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    _C.poison_scratch(True)
    yield
    _C.poison_scratch(False)
    torch.use_deterministic_algorithms(False)


@pytest.fixture
def isa(request, monkeypatch) -> str:
    """Each instruction set of this machine, forced; for an op's tests, each it has kernels for.

    Where a GPU is visible it is one more: the op that the test calls then runs there.
    """
    if request.param == DEVICE:
        op = _op_of(request.module)
        monkeypatch.setattr(request.module, op, on_device(getattr(request.module, op)))
        yield request.param
    else:
        with backends.cpu_isa(request.param):
            yield request.param


def _op_of(module) -> str:
    return module.__name__.removeprefix("test_")


def pytest_generate_tests(metafunc) -> None:
    if "isa" in metafunc.fixturenames:
        op = _op_of(metafunc.module)
        metafunc.parametrize("isa", isas_to_test(op) + devices_to_test(op), indirect=True)


@pytest.fixture
def threads():
    """A function that sets the number of threads; the old number comes back after the test."""
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)

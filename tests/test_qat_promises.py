"""What holds of every scheme, layer and dtype in training under quantisation."""

import copy
from pathlib import Path

import pytest
import run_qat
import torch
import trine
from launch import launch
from linear_inputs import DTYPES, assert_same_bits
from qat_cases import CASES, inputs, loss_of, prepared
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from trine.quantize import QatSchedule

ROUNDING = {torch.float32: 1e-5, torch.bfloat16: 2**-8, torch.float16: 2**-11}
HALVES = (torch.bfloat16, torch.float16)


def relative_error(actual: Tensor, expected: Tensor) -> float:
    return ((actual.double() - expected.double()).norm() / expected.double().norm()).item()


def gradient(model: nn.Module) -> Tensor:
    return torch.cat([p.grad.flatten() for p in model.parameters()])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("case", CASES)
def test_converted_has_the_bits_of_eval_and_training_is_close(case, dtype):
    qat, x = prepared(case, dtype=dtype), inputs(dtype=dtype)
    in_training = qat(*x)[case]
    in_eval = qat.eval()(*x)[case]
    assert in_training.dtype == in_eval.dtype == dtype
    assert_same_bits(trine.convert(qat)(*x)[case], in_eval.detach())
    assert relative_error(in_training, in_eval) <= ROUNDING[dtype]


@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize("case", CASES)
def test_autocast_with_a_scaler(case, dtype):
    qat, x = prepared(case), inputs()
    loss_of(qat(*x)).backward()
    expected = gradient(qat)
    optimizer = torch.optim.SGD(qat.parameters(), 1e-3)
    before = copy.deepcopy(qat.state_dict())
    for first_scale, is_taken in ((2.0**8, True), (2.0**100, False)):
        qat.load_state_dict(before)
        optimizer.zero_grad()
        scaler = torch.amp.GradScaler("cpu", init_scale=first_scale)
        with torch.autocast("cpu", dtype):
            loss = loss_of(qat(*x))
        (scaler.scale(loss) * (1 if is_taken else 2.0**100)).backward()  # infinite
        scaler.unscale_(optimizer)
        scaler.step(optimizer)
        scaler.update()
        assert (scaler.get_scale() == first_scale) is is_taken
        for name, p in qat.named_parameters():
            assert torch.equal(p, before[name]) is not is_taken, name
        assert not is_taken or relative_error(gradient(qat), expected) < 0.05
    with torch.autocast("cpu", dtype):
        in_training = qat(*x)[case]
        in_eval = qat.eval()(*x)[case]
        assert in_training.dtype == in_eval.dtype == dtype
        assert_same_bits(trine.convert(qat)(*x)[case], in_eval.detach())
        assert relative_error(in_training, in_eval) <= ROUNDING[dtype]


def test_checkpointing_gives_the_same_gradients_and_moves_nothing_twice():
    plain, x = prepared(*CASES, frozen=False), inputs()
    again = copy.deepcopy(plain)
    loss_of(plain(*x)).backward()
    loss_of(checkpoint(again, *x, use_reentrant=False)).backward()
    for a, b in zip(again.parameters(), plain.parameters(), strict=True):
        assert_same_bits(a.grad, b.grad)
    for model in (plain, again):
        QatSchedule(model).step()
    for (name, a), b in zip(again.named_buffers(), plain.buffers(), strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=0, msg=name)


def test_compiled_as_one_graph():
    # Each scheme, and with a batch norm each kind of layer.
    some = [c for c in CASES if "+norm" not in c or c.endswith(" int8")]
    qat, x = prepared(*some, frozen=False), inputs()
    again = copy.deepcopy(qat)
    torch._dynamo.reset()
    compiled = torch.compile(again, fullgraph=True, backend="aot_eager")
    expected, found = qat(*x), compiled(*x)
    for case in some:
        torch.testing.assert_close(found[case], expected[case], msg=case)
    loss_of(expected).backward()
    loss_of(found).backward()
    for (name, a), b in zip(again.named_parameters(), qat.parameters(), strict=True):
        torch.testing.assert_close(a.grad, b.grad, msg=name)
    for model in (qat, again):
        QatSchedule(model).step()
    torch.testing.assert_close(dict(again.named_buffers()), dict(qat.named_buffers()))


@pytest.fixture(scope="module")
def spread(tmp_path_factory) -> dict[str, list[dict]]:
    """What each of two processes ended with, as copies and as shards of one model."""
    folder = tmp_path_factory.mktemp("spread")
    done = launch(run_qat.__file__, str(folder), processes=2)
    assert done.returncode == 0, done.stderr[-3000:]
    return {
        mode: [torch.load(Path(folder) / f"{mode}-{rank}.pt") for rank in (0, 1)]
        for mode in ("ddp", "fsdp")
    }


@pytest.mark.parametrize("mode", ["ddp", "fsdp"])
class TestTwoProcesses:
    def test_what_is_followed_is_the_same_everywhere(self, mode, spread):
        first, second = (result["buffers"] for result in spread[mode])
        assert first.keys() == second.keys()
        assert any(name.endswith("norm.running_var") for name in first)
        for name, value in first.items():
            assert torch.equal(value, second[name]), name
        # Ranges are those that one process finds in all of the data.
        alone = run_qat.made()
        run_qat.trained(alone, alone, 0, 1)
        for name, value in alone.named_buffers():
            if "input_range" in name:
                assert torch.equal(first[name], value), name

    def test_shards_are_not_converted(self, mode, spread):
        for result in spread[mode]:
            assert ("its weight is spread over processes" in result["error"]) is (mode == "fsdp")

    def test_weights_are_the_same_in_both_ways_and_served_with_their_bits(self, mode, spread):
        for result in spread[mode]:
            assert set(result["same bits"]) == set(CASES)
        for name, value in spread["ddp"][0]["parameters"].items():
            for result in spread[mode]:
                torch.testing.assert_close(result["parameters"][name], value, msg=name)

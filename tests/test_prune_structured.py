"""Structured pruning: what is left computes what the whole computes with zeros in its place."""

import copy

import pytest
import torch
import trine
from structured_models import CASES, Case, call, case
from torch import Tensor, nn
from trine.prune import macs, prune_structured, trace

ALL = sorted(CASES)


@pytest.fixture(autouse=True)
def _one_thread(threads):
    threads(1)  # these models are too small for more


def masked(found: Case, removed: dict[str, tuple[int, ...]]) -> Tensor:
    """The whole model's output, with zeros where its layers read what was removed: by hand."""
    handles = []
    for group, units in removed.items():
        for layer, width in found.readers[group]:
            module = found.model.get_submodule(layer)
            dim = 1 if isinstance(module, nn.Conv2d) else -1
            places = torch.tensor([u * width + i for u in units for i in range(width)])

            def zero(_, args, places=places, dim=dim):
                return (args[0].index_fill(dim, places, 0),)

            if len(units):
                handles.append(module.register_forward_pre_hook(zero))
    out = call(found.model, found.inputs)
    for handle in handles:
        handle.remove()
    return out


@pytest.mark.parametrize("name", ALL)
def test_removing_is_zeroing(name):
    found = case(name)
    small = prune_structured(found.model, found.inputs, 0.4, multiple_of=1)
    report = small.removal_report
    assert {group.name for group in report.groups if group.kind != "hidden"} == set(found.readers)
    removed = {g.name: g.removed for g in report.groups if g.kind != "hidden"}
    assert all(
        len(units) == int(0.4 * g.before)
        for g, units in zip(
            [g for g in report.groups if g.kind != "hidden"], removed.values(), strict=True
        )
    )
    expected = masked(found, removed)
    assert not torch.allclose(expected, call(found.model, found.inputs), rtol=1e-3)
    torch.testing.assert_close(call(small, found.inputs), expected, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("name", ALL)
def test_nothing_removed_is_nothing_changed(name):
    found = case(name, torch.float32)
    small = prune_structured(found.model, found.inputs, 0.0)
    assert torch.equal(call(small, found.inputs), call(found.model, found.inputs))
    before, after = found.model.state_dict(), small.state_dict()
    assert before.keys() == after.keys()
    assert all(torch.equal(before[key], after[key]) for key in before)


@pytest.mark.parametrize("name", ALL)
def test_smaller_saved_trained_and_compressed(name, tmp_path):
    found = case(name, torch.float32)
    before = copy.deepcopy(found.model.state_dict())
    small = prune_structured(found.model, found.inputs, 0.5, multiple_of=2)
    report = small.removal_report
    assert all(torch.equal(before[key], v) for key, v in found.model.state_dict().items())

    counted = sum(p.numel() for p in small.parameters())
    assert counted == report.parameters_after < report.parameters_before
    gone = {g.name: len(g.removed) for g in report.groups}
    groups = trace(found.model, found.inputs)
    # Units of one layer share no weight; where two groups meet in a matrix, its corner goes once.
    assert report.parameters_before - counted <= sum(
        groups[name].weights * count for name, count in gone.items()
    )
    assert report.macs_after == macs(small, found.inputs) < 0.75 * report.macs_before

    trine.save(small, tmp_path / "small.trine")
    transformers = hasattr(found.model, "config")
    like = None if transformers or name == "mobilenet" else lambda: case(name, torch.float32).model
    again = trine.load(tmp_path / "small.trine", like=like)
    assert torch.equal(call(again, found.inputs), call(small, found.inputs))

    twin = copy.deepcopy(small)
    twin.load_state_dict(small.state_dict())
    out = twin(found.inputs) if isinstance(found.inputs, Tensor) else twin(**found.inputs)
    (out if isinstance(out, Tensor) else out["logits"]).square().mean().backward()
    optimizer = torch.optim.SGD(twin.parameters(), 0.1)
    optimizer.step()
    assert all(p.grad is None or p.grad.shape == p.shape for p in twin.parameters())
    assert not torch.equal(call(twin, found.inputs), call(small, found.inputs))

    packed = trine.compress(small, trine.Recipe("int8", prefer="size"), found.inputs)
    assert any(row.swapped for row in packed.report.layers)
    full = call(small, found.inputs)
    assert (call(packed, found.inputs) - full).norm() < 0.1 * full.norm()


@pytest.mark.parametrize("name", ["gpt2", "llama", "t5"])
def test_generates_with_a_cache(name):
    found = case(name)
    small = prune_structured(found.model, found.inputs, 0.5, kinds="head", multiple_of=1)
    ids = found.inputs["input_ids"]
    settings = {"max_new_tokens": 5, "do_sample": False, "pad_token_id": 0}
    cached = small.generate(ids, **settings, use_cache=True)
    assert torch.equal(cached, small.generate(ids, **settings, use_cache=False))
    assert cached.shape[1] >= 5

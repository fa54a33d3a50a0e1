"""Gradients by differences, of objectives that `gradcheck` cannot be given as they are.

What runs on `softmax_kl`, or in float32, takes no float64; some draw at random.
"""

import pytest
import torch
from torch import Tensor, nn
from trine.distill import objectives as o

NAMES = {letter: letter for letter in "qkv"}


def differences(loss, tensor: Tensor, step: float) -> Tensor:
    """Of every element: central, of two widths, so that their squares cancel."""

    def central(width: float) -> Tensor:
        slopes = []
        for i in range(tensor.numel()):
            moved = [tensor.detach().clone() for _ in range(2)]
            for values, sign in zip(moved, (1, -1), strict=True):
                values.view(-1)[i] += sign * width
            slopes.append((loss(moved[0]).double() - loss(moved[1]).double()) / (2 * width))
        return torch.stack(slopes).reshape(tensor.shape)

    return (4 * central(step / 2) - central(step)) / 3


def check_differences(objective, names, shape, teacher, batch) -> None:
    """Of each of the student's float32 tensors, the others held."""
    student = {name: torch.randn(shape) for name in names}
    for name in names:

        def loss(values, name=name):
            (term,) = objective({**student, name: values}, teacher, batch).values()
            return term

        tensor = student[name].clone().requires_grad_()
        (actual,) = torch.autograd.grad(loss(tensor), tensor)
        with torch.no_grad():
            expected = differences(loss, tensor, 0.1)
        assert expected.norm() > 1e-3
        assert (actual.double() - expected).norm() <= 1e-3 * expected.norm()


@pytest.mark.parametrize(
    "divergence",
    [
        "forward_kl",
        "reverse_kl",
        "jsd",
        "skewed_forward_kl",
        "skewed_reverse_kl",
        "total_variation",
    ],
)
def test_soft_targets(divergence):
    objective = o.SoftTargets(2.0, divergence=divergence, beta=0.3, labels="labels", shift=True)
    labels = torch.tensor([[1, 2, -100, 3], [0, 0, 4, -100]])
    teacher = {"logits": torch.randn(2, 4, 5)}
    check_differences(objective, ["logits"], (2, 4, 5), teacher, {"labels": labels})


def test_top_k_targets():
    kept = torch.randn(4, 9).log_softmax(1).topk(3)
    teacher = {"top_log_probabilities": kept.values, "top_indices": kept.indices}
    check_differences(o.SoftTargets(2.0, top_k=True), ["logits"], (4, 9), teacher, {})


def test_labels():
    batch = {"labels": torch.tensor([3, -100, 0, 4])}
    check_differences(o.Labels(label_smoothing=0.1), ["logits"], (4, 5), {}, batch)


def test_decoupled_targets():
    batch, teacher = {"labels": torch.tensor([3, -100, 0, 4])}, {"logits": torch.randn(4, 5)}
    check_differences(o.DecoupledTargets(2.0), ["logits"], (4, 5), teacher, batch)


def test_self_relations():
    teacher = {letter: torch.randn(2, 3, 8) for letter in NAMES}
    objective = o.SelfRelations(NAMES, NAMES, 2, ("qk", "vv"))
    batch = {"attention_mask": torch.tensor([[1, 1, 1], [1, 1, 0]])}
    check_differences(objective, list(NAMES), (2, 3, 4), teacher, batch)


@pytest.mark.parametrize(
    ("make", "shape", "batch"),
    [
        (lambda: o.MaskedGeneration("f", "f", 3, nn.Conv2d(2, 3, 1)), (2, 2, 4, 4), {}),
        (
            lambda: o.ContrastiveRepresentation("f", "f", 5, 5, 9, negatives=6, width=4),
            (3, 5),
            {"index": torch.tensor([4, 0, 8])},
        ),
    ],
    ids=["masked generation", "contrastive"],
)
def test_what_draws_at_random(make, shape, batch):
    """gradcheck with the same draws in each call; the normalisers of CRD are known by then."""
    objective = make().double().eval()
    student = torch.randn(shape, dtype=torch.float64, requires_grad=True)
    teacher = {"f": torch.randn(shape, dtype=torch.float64)}
    if student.dim() == 4:
        teacher["f"] = torch.randn(2, 3, 4, 4, dtype=torch.float64)

    def loss(features):
        torch.manual_seed(0)
        (term,) = objective({"f": features}, teacher, batch).values()
        return term

    loss(student)
    assert torch.autograd.gradcheck(loss, [student])

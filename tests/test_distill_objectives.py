"""Every objective of trine.distill against its formula in float64, written out with loops here."""

import math

import pytest
import torch
from torch import nn
from trine.distill import objectives as o

INF = math.inf


def views(*shapes, dtype=torch.float32, **names):
    """A student's view that needs gradients and a teacher's, of the same or of two shapes."""
    student_shape, teacher_shape = shapes if len(shapes) == 2 else shapes * 2
    student = {k: torch.randn(student_shape, dtype=dtype).requires_grad_() for k in names or "f"}
    teacher = {k: torch.randn(teacher_shape, dtype=dtype).requires_grad_() for k in names or "f"}
    return student, teacher


def only(terms):
    (value,) = terms.values()
    return value


def check(objective, student, teacher, batch, by_hand) -> None:
    """Value, gradient by the student's tensors, and that the teacher gets none."""
    objective = objective.eval()
    term = only(objective(student, teacher, batch))
    assert term.dim() == 0
    doubles = [
        {k: v.detach().double().requires_grad_() for k, v in view.items()}
        for view in (student, teacher)
    ]
    truth = by_hand(*doubles)
    torch.testing.assert_close(term.double(), truth, rtol=2e-5, atol=1e-7)
    assert truth.item() != 0
    names = [k for k in student if student[k].requires_grad]
    actual = torch.autograd.grad(
        term, [student[k] for k in names], allow_unused=True, retain_graph=True
    )
    expected = torch.autograd.grad(truth, [doubles[0][k] for k in names], allow_unused=True)
    for a, e in zip(actual, expected, strict=True):
        assert (a is None) == (e is None)
        if a is not None:
            assert (a.double() - e).norm() <= 1e-4 * e.norm()
    floats = [t for t in teacher.values() if t.requires_grad]
    assert all(g is None for g in torch.autograd.grad(term, floats, allow_unused=True))


def check_gradient(objective, student, teacher, batch=None) -> None:
    """Of a float64 student, numerically."""
    names = list(student)

    def loss(*tensors):
        return only(objective(dict(zip(names, tensors, strict=True)), teacher, batch or {}))

    assert torch.autograd.gradcheck(loss, [student[k] for k in names])


def by_rows(view, key="logits"):
    return view[key].reshape(-1, view[key].shape[-1])


def probabilities(row):
    exponentials = row.exp()
    return exponentials / exponentials.sum()


def kl(p, q):
    return sum(a * (a / b).log() for a, b in zip(p, q, strict=True))


def huber(x):
    return torch.where(x.abs() < 1, x**2 / 2, x.abs() - 0.5)


def cosine(a, b):
    return (a * b).sum() / (a.norm() * b.norm())


def unit(x):
    return x / x.norm()


def pooled(maps, size):
    """Average pooling of [B, C, H, W] whose sides are multiples of `size`."""
    b, c, h, w = maps.shape
    return maps.reshape(b, c, size, h // size, size, w // size).mean((3, 5))


# Output of models


def labels_by_hand(student, labels, smoothing=0.0):
    losses = []
    for row, label in zip(by_rows(student), labels.flatten().tolist(), strict=True):
        if label == -100:
            continue
        log_p = probabilities(row).log()
        losses.append(-(1 - smoothing) * log_p[label] - smoothing * log_p.mean())
    return sum(losses) / len(losses)


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_labels(smoothing):
    student, teacher = views((3, 4, 7), logits=0)
    labels = torch.randint(7, (3, 4))
    labels[0, 2] = -100
    check(
        o.Labels(label_smoothing=smoothing),
        student,
        teacher,
        {"labels": labels},
        lambda s, t: labels_by_hand(s, labels, smoothing),
    )


def test_labels_of_the_next_token():
    student, teacher = views((2, 5, 7), logits=0)
    labels = torch.randint(7, (2, 5))
    expected = {"logits": student["logits"][:, :-1].double()}
    actual = only(o.Labels(shift=True)(student, teacher, {"labels": labels}))
    torch.testing.assert_close(actual.double(), labels_by_hand(expected, labels[:, 1:]))


@pytest.mark.parametrize(("temperature", "of_teacher"), [(1.0, None), (3.0, None), (3.0, 1.5)])
def test_soft_targets(temperature, of_teacher):
    student, teacher = views((3, 4, 7), logits=0)

    def by_hand(s, t):
        return (
            temperature**2
            * sum(
                kl(probabilities(b / (of_teacher or temperature)), probabilities(a / temperature))
                for a, b in zip(by_rows(s), by_rows(t), strict=True)
            )
            / 12
        )

    objective = o.SoftTargets(temperature, teacher_temperature=of_teacher)
    check(objective, student, teacher, {}, by_hand)


def test_soft_targets_leave_out_ignored_tokens():
    student, teacher = views((2, 5, 7), logits=0)
    labels = torch.randint(7, (2, 5))
    labels[0, :3] = -100  # so the logits of 0 to 1 of row 0 do not count, and the last of each row

    def by_hand(s, t):
        losses = [
            kl(probabilities(t["logits"][b, i] / 2), probabilities(s["logits"][b, i] / 2))
            for b in range(2)
            for i in range(4)
            if labels[b, i + 1] != -100
        ]
        return 4 * sum(losses) / len(losses)

    objective = o.SoftTargets(2.0, labels="labels", shift=True)
    check(objective, student, teacher, {"labels": labels}, by_hand)


@pytest.mark.parametrize("divergence", ["forward_kl", "reverse_kl"])
def test_top_k_targets(divergence):
    """What the teacher's three classes leave of 1 is one more class, for the student as well."""
    student = {"logits": torch.randn(4, 9).requires_grad_()}
    kept = (torch.randn(4, 9) * 2).log_softmax(1).topk(3)
    teacher = {"top_log_probabilities": kept.values, "top_indices": kept.indices}

    def by_hand(s, t):
        total = 0
        for row in range(4):
            q = t["top_log_probabilities"][row].exp()
            p = probabilities(s["logits"][row] / 2)
            at = kept.indices[row]
            others = [i for i in range(9) if i not in at.tolist()]
            q = torch.cat([q, 1 - q.sum(0, keepdim=True)])
            p = torch.cat([p[at], p[others].sum(0, keepdim=True)])
            total = total + (kl(q, p) if divergence == "forward_kl" else kl(p, q))
        return 4 * total / 4

    doubles = {"logits": student["logits"].detach().double().requires_grad_()}
    objective = o.SoftTargets(2.0, divergence=divergence, top_k=True)
    term, truth = (
        only(objective(student, teacher, {})),
        by_hand(doubles, {"top_log_probabilities": kept.values.double()}),
    )
    torch.testing.assert_close(term.double(), truth, rtol=1e-5, atol=1e-7)
    term.backward()
    truth.backward()
    torch.testing.assert_close(
        student["logits"].grad.double(), doubles["logits"].grad, rtol=1e-4, atol=1e-6
    )


def test_unlabelled_rows_carry_the_soft_term():
    student, teacher = views((4, 7), logits=0)
    batch = {"labels": torch.tensor([3, -100, -100, 0])}
    terms = o.Together(o.SoftTargets(1.0), o.Labels())(student, teacher, batch)
    p, q = (view["logits"].double() for view in (student, teacher))
    soft = sum(kl(probabilities(b), probabilities(a)) for a, b in zip(p, q, strict=True)) / 4
    hard = -(probabilities(p[0]).log()[3] + probabilities(p[3]).log()[0]) / 2
    torch.testing.assert_close(terms["soft"].double(), soft, rtol=1e-5, atol=1e-7)
    torch.testing.assert_close(terms["hard"].double(), hard, rtol=1e-5, atol=1e-7)


def test_a_batch_without_any_label_has_nothing_to_teach():
    logits = torch.randn(3, 7, requires_grad=True)
    term = o.Labels()({"logits": logits}, {}, {"labels": torch.full((3,), -100)})["hard"]
    term.backward()
    assert term == 0
    assert not logits.grad.any()


def test_soft_targets_are_zero_only_for_equal_logits_up_to_a_constant():
    logits = torch.randn(4, 9).mul(8).round() / 8  # so that shifting them rounds nothing
    objective = o.SoftTargets(3.0)
    shifted = logits + torch.randint(-4, 4, (4, 1))
    assert only(objective({"logits": shifted}, {"logits": logits}, {})) == 0
    changed = logits.clone()
    changed[2, 3] += 0.1
    assert only(objective({"logits": changed}, {"logits": logits}, {})) > 1e-6


def test_soft_targets_rank_the_wrong_classes():
    """Of two students equally sure of the label, the one that orders the others as the teacher."""
    teacher = {"logits": torch.tensor([[5.0, 3.0, 1.0, -1.0]])}
    same_order = {"logits": torch.tensor([[5.0, 2.5, 1.0, 0.0]])}
    reversed_order = {"logits": torch.tensor([[5.0, 0.0, 1.0, 2.5]])}
    for objective in (o.SoftTargets(2.0), o.SoftTargets(2.0, divergence="jsd")):
        losses = [only(objective(s, teacher, {})) for s in (same_order, reversed_order)]
        assert losses[0] < losses[1]


def test_temperature_may_follow_the_step():
    student, teacher = views((4, 9), logits=0)
    objective = o.SoftTargets(lambda step: 1.0 + step)
    for step in (0, 3):
        expected = o.SoftTargets(1.0 + step)(student, teacher, {})
        assert only(objective(student, teacher, {"step": step})) == only(expected)


@pytest.mark.parametrize("centred", [False, True])
def test_logit_distance(centred):
    student, teacher = views((3, 7), logits=0)
    labels = torch.tensor([1, -100, 2])

    def by_hand(s, t):
        total = 0
        for row in (0, 2):
            difference = s["logits"][row] - t["logits"][row]
            if centred:
                difference = difference - difference.mean()
            total = total + (difference**2).sum() / 7
        return total / 2

    objective = o.LogitDistance(centred=centred, labels="labels")
    check(objective, student, teacher, {"labels": labels}, by_hand)
    doubles = views((3, 7), dtype=torch.float64, logits=0)
    check_gradient(o.LogitDistance(centred=centred), *doubles)


def test_decoupled_targets():
    student, teacher = views((4, 7), logits=0)
    labels = torch.tensor([1, -100, 0, 6])

    def by_hand(s, t):
        total = 0
        for row in (0, 2, 3):
            y = labels[row].item()
            p, q = (probabilities(view["logits"][row] / 3) for view in (s, t))
            p_others, q_others = (torch.cat([z[:y], z[y + 1 :]]) / (1 - z[y]) for z in (p, q))
            binary = [torch.stack([z[y], 1 - z[y]]) for z in (q, p)]
            total = total + 9 * (0.5 * kl(*binary) + 4 * kl(q_others, p_others))
        return total / 3

    objective = o.DecoupledTargets(3.0, alpha=0.5, beta=4)
    check(objective, student, teacher, {"labels": labels}, by_hand)


# Features


@pytest.mark.parametrize("norm", [1, 2])
def test_hint(norm):
    student, teacher = views((3, 5), (3, 7))
    adapter = nn.Linear(5, 7)

    def by_hand(s, t):
        weight, bias = adapter.weight.double(), adapter.bias.double()
        total = 0
        for a, b in zip(s["f"], t["f"], strict=True):
            total = total + ((weight @ a + bias - b).abs() ** norm).sum()
        return total / 21

    check(o.Hint("f", "f", adapter, norm=norm), student, teacher, {}, by_hand)
    check_gradient(o.Hint("f", "f", norm=norm), *views((3, 5), dtype=torch.float64))


def test_hint_pools_larger_maps():
    student, teacher = views((2, 3, 8, 4), (2, 3, 4, 4))

    def by_hand(s, t):
        small = s["f"].reshape(2, 3, 4, 2, 4).mean(3)
        return ((small - t["f"]) ** 2).sum() / t["f"].numel()

    check(o.Hint("f", "f"), student, teacher, {}, by_hand)


@pytest.mark.parametrize("loss", ["mse", "cosine"])
def test_hidden_states(loss):
    student, teacher = views((2, 4, 5), (2, 4, 6), a=0, b=0)
    projection = nn.Linear(5, 6, bias=False)
    mask = torch.tensor([[1, 1, 1, 0], [1, 1, 0, 0]])

    def by_hand(s, t):
        total = 0
        for key in "ab":
            for i, j in mask.nonzero().tolist():
                x, y = projection.weight.double() @ s[key][i, j], t[key][i, j]
                total = total + (((x - y) ** 2).mean() if loss == "mse" else 1 - cosine(x, y))
        return total / 5 / 2

    objective = o.HiddenStates([("a", "a"), ("b", "b")], projection, loss=loss)
    check(objective, student, teacher, {"attention_mask": mask}, by_hand)
    doubles = views((2, 4, 5), dtype=torch.float64)
    check_gradient(o.HiddenStates([("f", "f")], loss=loss, mask=None), *doubles)


@pytest.mark.parametrize("temperature", [None, 0.5])
def test_multi_scale(temperature):
    student, teacher = views((2, 3, 4, 4), (2, 3, 8, 8))

    def by_hand(s, t):
        total = 0
        for scale in (1, 2, 4):
            a, b = pooled(s["f"], scale), pooled(t["f"], scale)
            squares = ((a - b) ** 2).mean(1)
            for example in range(2):
                weights = torch.full((scale, scale), 1 / scale**2, dtype=torch.float64)
                if temperature is not None:
                    looks = b[example].detach().abs().mean(0) / temperature
                    weights = looks.exp() / looks.exp().sum()
                total = total + (weights * squares[example]).sum() / 2
        return total / 3

    check(o.MultiScale("f", "f", temperature=temperature), student, teacher, {}, by_hand)
    doubles = views((2, 3, 4, 4), dtype=torch.float64)
    check_gradient(o.MultiScale("f", "f", temperature=temperature), *doubles)


def test_masked_generation():
    student, teacher = views((2, 3, 4, 4))
    objective = o.MaskedGeneration("f", "f", 3, dropped=0.5)
    torch.manual_seed(3)
    kept = (torch.rand(2, 1, 4, 4) >= 0.5).double()

    def by_hand(s, t):
        def convolved(x, layer):
            padded = nn.functional.pad(x, (1, 1, 1, 1))
            weight, bias = layer.weight.double(), layer.bias.double()
            return sum(
                torch.einsum("bchw,oc->bohw", padded[..., i : i + 4, j : j + 4], weight[..., i, j])
                for i in range(3)
                for j in range(3)
            ) + bias.reshape(1, -1, 1, 1)

        first, _, second = objective.generate
        made = convolved(convolved(s["f"] * kept, first).clamp(min=0), second)
        return ((made - t["f"]) ** 2).mean()

    torch.manual_seed(3)
    check(objective, student, teacher, {}, by_hand)


# Attention


def test_attention_transfer():
    student, teacher = views((3, 5, 4, 4), (3, 2, 8, 8), a=0, b=0)

    def by_hand(s, t):
        total = 0
        for key in "ab":
            for x, y in zip(s[key], pooled(t[key], 4), strict=True):
                maps = [unit((m**2).sum(0).flatten()) for m in (x, y)]
                total = total + (maps[0] - maps[1]).norm() / 3
        return total

    objective = o.AttentionTransfer([("a", "a"), ("b", "b")])
    check(objective, student, teacher, {}, by_hand)
    doubles = views((2, 3, 4, 4), dtype=torch.float64)
    check_gradient(o.AttentionTransfer([("f", "f")]), *doubles)


def test_attention_transfer_does_not_see_the_order_of_channels():
    student, teacher = views((3, 5, 4, 4))
    objective = o.AttentionTransfer([("f", "f")])
    shuffled = {"f": student["f"][:, torch.randperm(5)]}
    torch.testing.assert_close(
        only(objective(shuffled, teacher, {})), only(objective(student, teacher, {}))
    )


@pytest.mark.parametrize("loss", ["mse", "kl"])
def test_attention_maps(loss):
    """The student's two heads answer for two of the teacher's four each."""
    student, teacher = (
        {"f": torch.randn(2, heads, 4, 4).softmax(-1).requires_grad_()} for heads in (2, 4)
    )
    mask = torch.tensor([[1, 1, 1, 0], [1, 1, 0, 0]])

    def by_hand(s, t):
        values = []
        for b in range(2):
            real = int(mask[b].sum())
            for head in range(2):
                target = (t["f"][b, 2 * head] + t["f"][b, 2 * head + 1]) / 2
                for i in range(real):
                    if loss == "mse":
                        values += list(((s["f"][b, head, i] - target[i]) ** 2)[:real])
                    else:
                        values.append(kl(target[i], s["f"][b, head, i]))
        return sum(values) / len(values)

    objective = o.AttentionMaps([("f", "f")], loss=loss)
    check(objective, student, teacher, {"attention_mask": mask}, by_hand)
    maps = [{"f": torch.randn(2, 2, 3, 3).double().softmax(-1).requires_grad_()} for _ in "ab"]
    check_gradient(o.AttentionMaps([("f", "f")], loss=loss, mask=None), *maps)


@pytest.mark.parametrize("relations", [("qk", "vv"), ("qq", "kk", "vv")])
def test_self_relations(relations):
    student, teacher = views((2, 4, 6), (2, 4, 8), q=0, k=0, v=0)
    mask = torch.tensor([[1, 1, 1, 0], [1, 1, 0, 0]])

    def by_hand(s, t):
        total = 0
        for first, second in relations:
            for b in range(2):
                real = int(mask[b].sum())
                for head in range(2):
                    rows = []
                    for view, width in ((t, 4), (s, 3)):
                        columns = slice(head * width, (head + 1) * width)
                        x, y = (view[z][b, :real, columns] for z in (first, second))
                        rows.append([probabilities(r) for r in x @ y.T / math.sqrt(width)])
                    for of_teacher, of_student in zip(*rows, strict=True):
                        total = total + kl(of_teacher, of_student)
        return total / (2 * int(mask.sum()))

    names = {z: z for z in "qkv"}
    objective = o.SelfRelations(names, names, 2, relations)
    check(objective, student, teacher, {"attention_mask": mask}, by_hand)


# Relations between examples


def distances_by_hand(s, t):
    pairs = [(i, j) for i in range(5) for j in range(5) if i != j]
    relative = []
    for view in (s, t):
        lengths = torch.stack([(view["f"][i] - view["f"][j]).norm() for i, j in pairs])
        relative.append(lengths / lengths.mean())
    return huber(relative[0] - relative[1]).mean()


def angles_by_hand(s, t):
    losses = []
    for i in range(5):
        for j in range(5):
            for k in range(5):
                if len({i, j, k}) == 3:
                    cosines = [
                        cosine(view["f"][i] - view["f"][j], view["f"][k] - view["f"][j])
                        for view in (s, t)
                    ]
                    losses.append(huber(cosines[0] - cosines[1]))
    return sum(losses) / len(losses)


def similarity_by_hand(s, t):
    grams = []
    for view in (s, t):
        gram = [[(a * b).sum() for b in view["f"]] for a in view["f"]]
        grams.append(torch.stack([unit(torch.stack(row)) for row in gram]))
    return ((grams[0] - grams[1]) ** 2).sum() / 25


def correlation_by_hand(kernel):
    def by_hand(s, t):
        total = 0
        for i in range(5):
            for j in range(5):
                values = []
                for view in (s, t):
                    a, b = unit(view["f"][i]), unit(view["f"][j])
                    square = ((a - b) ** 2).sum()
                    dot = (a * b).sum()
                    values.append(
                        {
                            "bilinear": dot,
                            "gaussian": torch.exp(-0.4 * square),
                            "taylor": math.exp(-0.8) * (1 + 0.8 * dot + 0.32 * dot**2),
                        }[kernel]
                    )
                total = total + (values[0] - values[1]) ** 2
        return total / 25

    return by_hand


RELATIONS = [
    pytest.param(o.DistanceRelations("f", "f"), distances_by_hand, id="distance"),
    pytest.param(o.AngleRelations("f", "f"), angles_by_hand, id="angle"),
    pytest.param(o.SimilarityPreserving("f", "f"), similarity_by_hand, id="similarity"),
    *(
        pytest.param(
            o.CorrelationCongruence("f", "f", kernel=kernel),
            correlation_by_hand(kernel),
            id=f"correlation-{kernel}",
        )
        for kernel in ("bilinear", "gaussian", "taylor")
    ),
]


@pytest.mark.parametrize(("objective", "by_hand"), RELATIONS)
def test_relations_of_examples(objective, by_hand):
    check(objective, *views((5, 4), (5, 7)), {}, by_hand)
    check_gradient(objective, *views((5, 4), (5, 7), dtype=torch.float64))


@pytest.mark.parametrize("objective", [o.DistanceRelations("f", "f"), o.AngleRelations("f", "f")])
def test_relational_knowledge_does_not_see_rotation_scale_and_place(objective):
    student, teacher = views((6, 4), dtype=torch.float64)
    rotation = torch.linalg.qr(torch.randn(4, 4).double())[0]
    moved = {"f": 3.5 * student["f"] @ rotation + torch.randn(4)}
    loss = only(objective(student, teacher, {}))
    torch.testing.assert_close(only(objective(moved, teacher, {})), loss)
    assert only(objective(moved, student, {})) < 1e-12


def test_angles_of_examples_that_coincide_have_finite_gradients():
    features = torch.randn(5, 4)
    features[3] = features[1]
    student = {"f": features.requires_grad_()}
    for objective in (o.AngleRelations("f", "f"), o.DistanceRelations("f", "f")):
        only(objective(student, {"f": torch.randn(5, 4)}, {})).backward()
        assert features.grad.isfinite().all()


def test_solution_flow():
    names = dict(a=0, b=0)
    student, teacher = views((2, 3, 4, 4), **names)
    for view in (student, teacher):
        view["b"] = torch.randn(2, 5, 2, 2).requires_grad_()

    def by_hand(s, t):
        total = 0
        for example in range(2):
            flows = []
            for view in (s, t):
                first = view["a"][example].reshape(3, 2, 2, 2, 2).amax((2, 4))
                second = view["b"][example]
                flows.append(
                    sum(
                        torch.outer(first[:, i, j], second[:, i, j])
                        for i in range(2)
                        for j in range(2)
                    )
                    / 4
                )
            total = total + ((flows[0] - flows[1]) ** 2).sum()
        return total / 2

    objective = o.SolutionFlow(("a", "b"), ("a", "b"))
    check(objective, student, teacher, {}, by_hand)
    doubles = views((2, 3, 4, 4), dtype=torch.float64, **names)
    check_gradient(objective, *doubles)


# Contrast


def contrastive(**options):
    torch.manual_seed(1)
    return o.ContrastiveRepresentation("f", "f", 5, 6, 20, negatives=7, width=4, **options)


def test_contrastive_representation():
    student, teacher = views((3, 5), (3, 6))
    index = torch.tensor([4, 0, 19])
    objective = contrastive()
    torch.manual_seed(7)
    drawn = torch.randint(19, (3, 7))

    def by_hand(s, t):
        def linear(layer, x):
            return unit(layer.weight.double() @ x + layer.bias.double())

        vectors = [
            [linear(objective.project_student, x) for x in s["f"]],
            [linear(objective.project_teacher, x.detach()) for x in t["f"]],
        ]
        banks = objective.teacher_bank.double(), objective.student_bank.double()
        total = 0
        for own, bank in zip(vectors, banks, strict=True):
            exponentials = []
            for row in range(3):
                i = index[row].item()
                others = [k for k in range(20) if k != i]
                rows = [i] + [others[d] for d in drawn[row]]
                exponentials.append([torch.exp((own[row] * bank[r]).sum() / 0.07) for r in rows])
            z = 20 * torch.stack([torch.stack(e) for e in exponentials]).mean().detach()
            for e in exponentials:
                h = [u / z / (u / z + 7 / 20) for u in e]
                total = total - (h[0].log() + sum((1 - x).log() for x in h[1:])) / 3
        return total

    torch.manual_seed(7)
    check(objective, student, teacher, {"index": index}, by_hand)


def test_contrast_is_lower_for_the_true_pair():
    objective = contrastive().eval()
    index = torch.arange(20)
    features = torch.randn(20, 6)
    with torch.no_grad():
        objective.teacher_bank.copy_(
            nn.functional.normalize(objective.project_teacher(features), dim=1)
        )
        objective.student_bank.copy_(objective.teacher_bank)
        objective.project_student = objective.project_teacher
    losses = []
    for order in (index, index.roll(1)):
        torch.manual_seed(5)
        view = {"f": features[order]}
        losses.append(only(objective(view, view, {"index": index})))
    assert losses[0] < losses[1]


def test_contrast_remembers_what_it_saw():
    objective = contrastive()
    before = objective.student_bank.clone()
    student, teacher = views((3, 5), (3, 6))
    index = torch.tensor([4, 0, 19])
    objective(student, teacher, {"index": index})
    new = nn.functional.normalize(objective.project_student(student["f"]), dim=1)
    expected = nn.functional.normalize(0.5 * before[index] + 0.5 * new, dim=1)
    torch.testing.assert_close(objective.student_bank[index], expected)
    untouched = torch.ones(20, dtype=torch.bool)
    untouched[index] = False
    assert torch.equal(objective.student_bank[untouched], before[untouched])


# All of them


def test_together_has_all_terms():
    student, teacher = views((4, 9), logits=0)
    both = o.Together(o.SoftTargets(), o.LogitDistance())
    assert set(both(student, teacher, {})) == {"soft", "logits"}
    twice = o.Together(o.SoftTargets(), o.SoftTargets(1.0))
    with pytest.raises(ValueError, match="two objectives call a term 'soft'"):
        twice(student, teacher, {})


@pytest.mark.parametrize(
    ("objective", "shape"),
    [
        (o.SoftTargets(), (3, 9)),
        (o.LogitDistance(), (3, 9)),
        (o.Hint("logits", "logits"), (3, 9)),
        (o.HiddenStates([("logits", "logits")], mask=None), (3, 4, 9)),
        (o.AttentionTransfer([("logits", "logits")]), (3, 4, 5, 5)),
        (o.AttentionMaps([("logits", "logits")], mask=None), (3, 2, 5, 5)),
        (o.DistanceRelations("logits", "logits"), (3, 9)),
        (o.AngleRelations("logits", "logits"), (3, 9)),
        (o.SimilarityPreserving("logits", "logits"), (3, 9)),
        (o.CorrelationCongruence("logits", "logits"), (3, 9)),
        (o.MultiScale("logits", "logits"), (3, 4, 5, 5)),
    ],
)
def test_sixteen_bits_are_widened(objective, shape):
    student, teacher = views(shape, dtype=torch.bfloat16, logits=0)
    term = only(objective(student, teacher, {}))
    wide = [{k: v.float() for k, v in view.items()} for view in (student, teacher)]
    assert term.dtype == torch.float32
    torch.testing.assert_close(term, only(objective(*wide, {})))


def test_layer_maps():
    assert o.uniform_layers(4, 12) == [2, 5, 8, 11]
    assert o.uniform_layers(3, 6) == [1, 3, 5]
    assert o.last_layers(2, 6) == [4, 5]
    assert o.every_layer("encoder.layer.{}", [1, 3]) == {
        "h0": "encoder.layer.1",
        "h1": "encoder.layer.3",
    }
    with pytest.raises(ValueError, match="student of 4 layers"):
        o.uniform_layers(4, 3)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda s, t: o.Hint("x", "f")(s, t, {}), "student's view has no 'x'"),
        (lambda s, t: o.Hint("f", "x")(s, t, {}), "teacher's view has no 'x'"),
        (lambda s, t: o.Hint("f", "w")(s, t, {}), "give adapter="),
        (lambda s, t: o.HiddenStates([("h", "h")])(s, t, {}), "no 'attention_mask'"),
        (lambda s, t: o.Labels()(s, t, {}), "no 'labels'"),
        (lambda s, t: o.Labels()(s, t, {"labels": torch.zeros(3).long()}), "for each row"),
        (lambda s, t: o.AngleRelations("two", "two")(s, t, {}), "3 or more examples"),
        (lambda s, t: o.AttentionMaps([("h3", "h2")], mask=None)(s, t, {}), "do not divide"),
        (lambda s, t: o.SelfRelations({"q": "h"}, {"q": "h"}, 2, ["qk"]), "the letters that both"),
        (
            lambda s, t: o.MultiScale("h3", "h3", scales=(9,))(s, t, {}),
            "too small for a scale of 9",
        ),
        (lambda s, t: o.MaskedGeneration("f", "f", 4, dropped=1), "dropped must lie"),
        (lambda s, t: contrastive()({"f": s["f"]}, {"f": t["w"]}, {}), "no 'index'"),
        (lambda s, t: o.SoftTargets(shift=True), "name them with labels="),
    ],
)
def test_bad_input(call, message):
    student, teacher = (
        {
            "f": torch.randn(4, 5),
            "w": torch.randn(4, 6),
            "h": torch.randn(4, 3, 6),
            "two": torch.randn(2, 5),
            "h2": torch.randn(4, 2, 3, 3),
            "h3": torch.randn(4, 3, 3, 3),
            "logits": torch.randn(4, 9),
        }
        for _ in "st"
    )
    with pytest.raises(ValueError, match=message):
        call(student, teacher)

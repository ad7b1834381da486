"""LRC-BERT against its equations: golden numbers, a naive loop, and what must hold for any input."""

import json
import math
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from stillroom.data.batching import Batch, Inputs
from stillroom.encoder import Needs, Outputs, pool
from stillroom.errors import WrongInput
from stillroom.methods import lrc_bert
from stillroom.methods.base import Context, Perturbation, Plan, Stage, Term
from stillroom.methods.lrc_bert import CosNCE, LRCBertSettings, build
from stillroom.ops.cos_nce import (
    angular_distance,
    cos_nce,
    cos_nce_of_cosines,
    pooled_cos_nce,
    token_cosines,
)
from stillroom.ops.layer_map import resolve_layer_map
from stillroom.ops.prediction import hard_label_loss, soft_label_loss
from stillroom.recipe import TrainingSettings
from stillroom.training.distiller import Distiller
from stillroom.training.perturbation import perturbation
from stillroom.training.schedule import Schedule
from tiny import make_batch_of, make_encoder, make_rows, make_task

GOLDEN = {
    example["name"]: example
    for example in json.loads(
        (Path(__file__).parents[1] / "golden" / "lrc_bert.json").read_text(encoding="utf-8")
    )["examples"]
}


def golden(name: str) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Return an example's inputs as float64 tensors, and what is expected of them."""
    example = GOLDEN[name]
    inputs = {key: torch.tensor(value, dtype=torch.float64) for key, value in example["inputs"].items()}
    return inputs, example["expected"]


def agrees(got: Any, want: Any, tolerance: float = 1e-9) -> bool:
    """Apply the golden file's own rule: ``|got - want| <= tolerance * (1 + |want|)``."""
    got, want = torch.as_tensor(got, dtype=torch.float64), torch.as_tensor(want, dtype=torch.float64)
    assert got.shape == want.shape
    return bool(((got - want).abs() <= tolerance * (1 + want.abs())).all())


def random(*shape: int, seed: int = 0) -> Tensor:
    """Return standard normal numbers in float64."""
    return torch.from_numpy(np.random.default_rng([seed, *shape]).standard_normal(shape))


def batch_of(mask: Tensor, labels: Tensor | None = None, row_ids: Tensor | None = None) -> Batch:
    """Return a batch whose tokens do not matter."""
    count = len(mask)
    inputs = Inputs(torch.zeros_like(mask), mask, None)
    labels = torch.arange(count) % 2 if labels is None else labels
    return Batch(inputs, inputs, labels, torch.arange(count) if row_ids is None else row_ids)


def outputs_of(states: Tensor, mask: Tensor) -> Outputs:
    """Return outputs whose hidden states 1, 2, ... are ``states[0], states[1], ...``, and pooled."""
    hidden = {i + 1: state for i, state in enumerate(states)}
    poolings: tuple[Any, ...] = ("cls", "mean")
    pooled = {(how, i): pool(state, mask, how) for how in poolings for i, state in hidden.items()}
    return Outputs(torch.empty(0), hidden, pooled_states=pooled)


def make_term(student: Tensor, teacher: Tensor, *, rows: int = 64, **options: Any) -> CosNCE:
    """Return the term for states of these shapes (L, B, S, D), in float64, layer i to layer i."""
    layers = len(student)
    context = Context("classification", 2, rows, layers, student.shape[-1], layers, teacher.shape[-1])
    return CosNCE(LRCBertSettings(**options), context, tuple(range(1, layers + 1))).double()


def value(
    term: CosNCE, student: Tensor, teacher: Tensor, mask: Tensor, labels: Tensor | None = None
) -> Tensor:
    return term(outputs_of(student, mask), outputs_of(teacher, mask), batch_of(mask, labels))


def random_mask(rows: int, width: int, *, seed: int = 0) -> Tensor:
    """Return a mask of rows of 1 to `width` tokens, padded on the right, one of full width."""
    lengths = np.random.default_rng(seed).integers(1, width + 1, size=rows)
    lengths[0] = width
    return torch.from_numpy((np.arange(width) < lengths[:, None]).astype(np.int64))


# Golden examples


@pytest.mark.parametrize("name", [name for name in GOLDEN if name.startswith("L1")])
def test_golden_formula_1(name: str) -> None:
    given, expected = golden(name)
    found = cos_nce(given["student"][None], given["teacher"][None], given["negatives"][None])
    assert agrees(found, [expected["loss"]])


def test_golden_three_negatives_with_gradient_and_minimiser() -> None:
    given, expected = golden("L2_three_negatives")
    student = given["student"].requires_grad_()
    assert agrees(angular_distance(given["teacher"], student), expected["g_positive"])
    assert agrees(angular_distance(given["negatives"], student), expected["g_negative"])
    loss = cos_nce(student[None], given["teacher"][None], given["negatives"][None])
    assert agrees(loss, [expected["loss"]])
    loss.sum().backward()
    assert agrees(student.grad, expected["grad_student"])
    best = torch.tensor(expected["best_direction"], dtype=torch.float64)
    at_best = cos_nce(best[None], given["teacher"][None], given["negatives"][None])
    assert agrees(at_best, [expected["loss_at_best"]])


def test_golden_projection_with_in_batch_negatives() -> None:
    given, expected = golden("L3_projection")
    student, teacher = given["student"][None, :, None], given["teacher"][None, :, None]
    projected = student @ given["W"]
    cosine = token_cosines(projected, teacher, torch.ones(3, 1))
    assert agrees(cosine[0], expected["cosine"])
    others = 1 - torch.eye(3)
    assert agrees(cos_nce_of_cosines(cosine, others)[0], expected["per_sample"])
    assert agrees(pooled_cos_nce(projected[:, :, 0], teacher[:, :, 0])[0], expected["per_sample"])
    for vector in ("token", "cls", "mean"):
        term = make_term(student, teacher, vector=vector)
        with torch.no_grad():
            term.projection.copy_(given["W"])
        assert agrees(value(term, student, teacher, torch.ones(3, 1, dtype=torch.int64)), expected["loss"])


@pytest.mark.parametrize("name", ["L4_pooling", "L9_pooling_masked"])
@pytest.mark.parametrize("vector", ["token", "cls", "mean"])
def test_golden_pooling(name: str, vector: Any) -> None:
    given, expected = golden(name)
    mask = torch.tensor(GOLDEN[name]["parameters"]["mask"])
    student, teacher = given["student"], given["teacher"]
    if vector == "token":
        each = cos_nce_of_cosines(token_cosines(student, teacher, mask), 1 - torch.eye(2))
    else:
        each = pooled_cos_nce(pool(student, mask, vector), pool(teacher, mask, vector))
    assert agrees(each.mean(1), expected[vector]["per_layer"])
    # Equal widths: the projection starts as the identity.
    assert agrees(
        value(make_term(student, teacher, vector=vector), student, teacher, mask),
        expected[vector]["loss"],
    )


def test_golden_perturbation() -> None:
    given, expected = golden("L5_perturbation")
    E, G = given["E"][None], given["G"][None]
    per_token = E + perturbation(G, epsilon=1.0, norm="token")
    assert agrees(per_token[0], expected["per_token"])
    whole = E + perturbation(G, epsilon=1.0, norm="tensor")
    assert agrees(whole[0], expected["whole_tensor"])
    assert agrees(G.norm(), expected["whole_tensor_norm"])


def test_golden_two_pass_step_in_float64() -> None:
    given, expected = golden("L6_two_pass_step")
    e, W = given["e"][None, None].requires_grad_(), given["W"].requires_grad_()

    def loss_at(embeddings: Tensor) -> Tensor:
        return cos_nce(embeddings[0] @ W, given["teacher"][None], given["negatives"][None]).sum()

    loss_1 = loss_at(e)
    (G,) = torch.autograd.grad(loss_1, e)
    moved = e + perturbation(G, epsilon=1.0, norm="token")
    loss_2 = loss_at(moved)
    loss_2.backward()
    assert agrees(loss_1, expected["loss_1"])
    assert agrees(G[0, 0], expected["G"])
    assert agrees(G.norm(), expected["norm_G"])
    assert agrees(moved[0, 0], expected["e_moved"])
    assert agrees(loss_2, expected["loss_2"])
    assert agrees(W.grad, expected["grad_W"])
    assert not agrees(W.grad, expected["grad_W_clean_not_used"])
    with torch.no_grad():
        assert agrees(loss_at(2 * e - moved), expected["loss_2_opposite_sign"])


class _ToyStudent(nn.Module):
    """A student of one parameter matrix: embeddings E, one hidden state ``(weights @ E) @ W``."""

    def __init__(self, E: Tensor, weights: Tensor):
        super().__init__()
        self.E, self.weights = nn.Parameter(E[None].float()), weights.float()
        self.W = nn.Parameter(torch.eye(2))
        self.passes = 0

    def forward(self, inputs: Inputs, needs: Needs, offset: Tensor | None = None) -> Outputs:
        self.passes += 1
        # Times one: the embeddings that are differentiated are no leaf, as in an encoder.
        embeddings = self.E * 1.0 if offset is None else self.E + offset
        state = (self.weights @ embeddings) @ self.W
        return Outputs(torch.zeros(1, 2), {1: state}, embeddings if needs.embeddings else None)


class _ToyTerm(Term):
    student_needs = Needs(hidden_states=frozenset({1}))

    def __init__(self, positive: Tensor, negatives: Tensor):
        super().__init__()
        self.positive, self.negatives = positive[None].float(), negatives[None].float()
        self.values: list[float] = []

    def forward(self, student: Outputs, teacher: Outputs, batch: Batch) -> Tensor:
        loss = cos_nce(student.hidden_states[1], self.positive, self.negatives).mean()
        self.values.append(loss.item())
        return loss


def toy_distiller(E: Tensor, weights: Tensor, given: dict[str, Tensor], norm: Any) -> Distiller:
    term = _ToyTerm(given["teacher"], given["negatives"])
    plan = Plan({"cos_nce": term}, (Stage(0.0, {"cos_nce": 1.0}, perturb=True),), Perturbation(1.0, norm))
    return Distiller(_ToyStudent(E, weights), plan, bf16=False)  # type: ignore[arg-type]


def toy_loss(distiller: Distiller) -> Tensor:
    stage = distiller._plan.stages[0]
    return distiller(batch_of(torch.ones(1, 1)), Outputs(torch.empty(0)), stage).total


def test_golden_two_pass_step_through_the_distiller() -> None:
    """The weights move by the gradient at the perturbed embeddings, and the clean one is not added."""
    given, expected = golden("L6_two_pass_step")
    distiller = toy_distiller(given["e"][None], torch.ones(1), given, "token")
    loss = toy_loss(distiller)
    loss.backward()
    term, student = distiller.terms["cos_nce"], distiller.student
    assert agrees(term.values, [expected["loss_1"], expected["loss_2"]], 1e-5)
    assert agrees(student.W.grad, expected["grad_W"], 1e-5)
    assert student.passes == 2


@pytest.mark.parametrize(
    ("norm", "key"), [("token", "loss_2_per_token"), ("tensor", "loss_2_whole_tensor")]
)
def test_golden_norm_scope(norm: Any, key: str) -> None:
    given, expected = golden("L7_norm_scope")
    E, weights = given["E"][None].requires_grad_(), given["weights"]

    def loss_at(embeddings: Tensor) -> Tensor:
        return cos_nce(weights @ embeddings, given["teacher"][None], given["negatives"][None]).sum()

    loss_1 = loss_at(E)
    (G,) = torch.autograd.grad(loss_1, E)
    assert agrees(loss_1, expected["loss_1"])
    assert agrees(G[0], expected["G"])
    assert agrees(loss_at(E + perturbation(G, epsilon=1.0, norm=norm)), expected[key])
    distiller = toy_distiller(given["E"], weights, given, norm)
    assert agrees(toy_loss(distiller).detach(), expected[key], 1e-5)


class _Constant(Term):
    def __init__(self, constant: float):
        super().__init__()
        self.constant = constant

    def forward(self, student: Outputs, teacher: Outputs, batch: Batch) -> Tensor:
        return torch.tensor(self.constant)


class _Logits(nn.Module):
    """A student that always computes the given logits."""

    def __init__(self, logits: Tensor):
        super().__init__()
        self.logits = nn.Parameter(logits)

    def forward(self, inputs: Inputs, needs: Needs, offset: Tensor | None = None) -> Outputs:
        return Outputs(self.logits)


def test_golden_total_of_both_stages() -> None:
    given, expected = golden("L8_total")
    y, t = torch.tensor([0, 1]), GOLDEN["L8_total"]["parameters"]["t"]
    soft = soft_label_loss(given["student_logits"], given["teacher_logits"], temperature=t)
    assert agrees(soft, expected["kl_times_t2"])
    assert agrees(soft / t**2, expected["kl"])
    at_one = soft_label_loss(given["student_logits"], given["teacher_logits"], temperature=1)
    assert agrees(at_one, expected["kl_t1"])
    hard = hard_label_loss(given["student_logits"], y, kind="classification")
    assert agrees(hard, expected["hard_ce"])

    # The method's own default weights and temperature, with the contrastive term held at 1.2.
    plan = build(LRCBertSettings(perturbation="off"), Context("classification", 2, 2, 2, 4, 2, 4))
    terms = {**plan.terms, "cos_nce": _Constant(GOLDEN["L8_total"]["inputs"]["cos_nce"])}
    plan = Plan(terms, plan.stages)
    distiller = Distiller(_Logits(given["student_logits"].float()), plan, bf16=False)  # type: ignore[arg-type]
    batch, teacher = batch_of(torch.ones(2, 1), y), Outputs(given["teacher_logits"].float())
    first, second = (distiller(batch, teacher, stage).total.item() for stage in plan.stages)
    assert agrees(first, expected["stage_1"], 1e-5)
    assert agrees(second, expected["stage_2"], 1e-5)


# A naive loop


def _cosine(x: list[float], y: list[float]) -> float:
    dot = sum(a * b for a, b in zip(x, y, strict=True))
    return dot / (math.sqrt(sum(a * a for a in x)) * math.sqrt(sum(b * b for b in y)))


def _pooled(states: list[list[float]], mask: list[int], vector: str) -> list[float]:
    if vector == "cls":
        return states[0]
    real = [state for state, here in zip(states, mask, strict=True) if here]
    return [sum(column) / len(real) for column in zip(*real, strict=True)]


def naive_cos_nce(
    student: Tensor,
    projection: Tensor,
    teacher: Tensor,
    mask: Tensor,
    vector: str,
    labels: list[int] | None = None,
) -> float:
    """Sum over layers of the batch mean of formula (1), one cosine at a time, in Python floats."""
    total = 0.0
    m = mask.tolist()
    B, S = len(m), len(m[0])
    for layer in range(len(student)):
        W = projection[layer if len(projection) > 1 else 0].tolist()
        s = [
            [[sum(x * W[d][e] for d, x in enumerate(state)) for e in range(len(W[0]))] for state in row]
            for row in student[layer].tolist()
        ]
        t = teacher[layer].tolist()
        for a in range(B):
            distance = []
            for b in range(B):
                if vector == "token":
                    both = [p for p in range(S) if m[a][p] and m[b][p]]
                    cosine = sum(_cosine(s[a][p], t[b][p]) for p in both) / len(both)
                else:
                    cosine = _cosine(_pooled(s[a], m[a], vector), _pooled(t[b], m[b], vector))
                distance.append(1 - cosine)
            negatives = [b for b in range(B) if (b != a if labels is None else labels[b] != labels[a])]
            K = len(negatives)
            loss = sum(2 - (distance[b] - distance[a]) for b in negatives) / (2 * K) + distance[a]
            total += loss / B
    return total


SHAPES = [(1, 2, 1, 3, 3), (2, 5, 4, 3, 5), (3, 4, 7, 6, 4)]


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("seed", [0, 1])
@pytest.mark.parametrize("vector", ["token", "cls", "mean"])
@pytest.mark.parametrize("label_aware", [False, True])
@pytest.mark.parametrize("sharing", ["per_layer", "shared"])
def test_equals_a_naive_loop(
    shape: tuple[int, ...], seed: int, vector: str, label_aware: bool, sharing: str
) -> None:
    L, B, S, D, E = shape
    student, teacher = random(L, B, S, D, seed=seed), random(L, B, S, E, seed=seed + 100)
    mask, labels = random_mask(B, S, seed=seed), torch.arange(B) % 2
    term = make_term(student, teacher, vector=vector, label_aware=label_aware, projection=sharing)
    with torch.no_grad():
        term.projection.copy_(random(*term.projection.shape, seed=seed + 200))
    want = naive_cos_nce(
        student, term.projection, teacher, mask, vector, labels.tolist() if label_aware else None
    )
    found = value(term, student, teacher, mask, labels)
    assert found.item() == pytest.approx(want, rel=1e-12)


# What must hold

CHOICES = [
    (v, n) for v in ("token", "cls", "mean") for n in ("in_batch", "bank") if (v, n) != ("token", "bank")
]


def all_negatives(teacher: Tensor) -> Tensor:
    """Return for each row of (B, E) the other rows, (B, B - 1, E)."""
    rows = range(len(teacher))
    return torch.stack([teacher[[b for b in rows if b != a]] for a in rows])


@pytest.mark.parametrize("seed", range(3))
def test_closed_forms_equal_formula_1(seed: int) -> None:
    student, teacher = random(2, 6, 5, seed=seed), random(2, 6, 5, seed=seed + 9)
    want = torch.stack([cos_nce(s, t, all_negatives(t)) for s, t in zip(student, teacher, strict=True)])
    torch.testing.assert_close(pooled_cos_nce(student, teacher), want, rtol=1e-12, atol=1e-12)
    cosines = token_cosines(student[:, :, None], teacher[:, :, None], torch.ones(6, 1))
    found = cos_nce_of_cosines(cosines, 1 - torch.eye(6))
    torch.testing.assert_close(found, want, rtol=1e-12, atol=1e-12)


def test_value_lies_between_0_and_4_and_reaches_both() -> None:
    student, teacher = random(4000, 3), random(4000, 3, seed=1)
    found = cos_nce(student, teacher, random(4000, 2, 3, seed=2))
    assert found.min() >= 0 and found.max() <= 4
    ends = cos_nce(teacher, teacher, -teacher[:, None]), cos_nce(-teacher, teacher, teacher[:, None])
    torch.testing.assert_close(ends[0], torch.zeros(4000).double())
    # Anchor against the positive, and the negative is where the anchor is: cos = -1 and 1 in turn.
    torch.testing.assert_close(
        cos_nce(-teacher, teacher, -teacher[:, None]), torch.full((4000,), 4.0).double()
    )
    torch.testing.assert_close(ends[1], torch.full((4000,), 3.0).double())


def test_gradients_are_right() -> None:
    student, teacher = random(2, 4, 3).requires_grad_(), random(2, 4, 3, seed=1)
    assert torch.autograd.gradcheck(lambda s: pooled_cos_nce(s, teacher), student)
    assert torch.autograd.gradcheck(lambda s: cos_nce(s, teacher[0], all_negatives(teacher[0])), student[0])
    tokens, goals = random(1, 3, 4, 2).requires_grad_(), random(1, 3, 4, 2, seed=1)
    mask = random_mask(3, 4)
    assert torch.autograd.gradcheck(lambda s: token_cosines(s, goals, mask), tokens)


@pytest.mark.parametrize("vector", ["token", "cls", "mean"])
def test_gradient_of_the_projection_is_right(vector: str) -> None:
    student, teacher, mask = random(2, 3, 2, 2), random(2, 3, 2, 3, seed=1), random_mask(3, 2)
    term = make_term(student, teacher, vector=vector)

    def loss_of(projection: Tensor) -> Tensor:
        given = (outputs_of(student, mask), outputs_of(teacher, mask), batch_of(mask))
        return torch.func.functional_call(term, {"projection": projection}, given)

    assert torch.autograd.gradcheck(loss_of, term.projection.detach().clone().requires_grad_())


@pytest.mark.parametrize("vector", ["token", "cls"])
def test_rescaling_any_vector_changes_nothing(vector: str) -> None:
    student, teacher, mask = random(2, 4, 3, 5), random(2, 4, 3, 5, seed=1), random_mask(4, 3)
    term = make_term(student, teacher, vector=vector)
    scale = torch.rand(2, 2, 4, 3, 1, dtype=torch.float64) * 100 + 0.01
    found = value(term, student * scale[0], teacher * scale[1], mask)
    torch.testing.assert_close(found, value(term, student, teacher, mask), rtol=1e-12, atol=0)


@pytest.mark.parametrize("label_aware", [False, True])
@pytest.mark.parametrize("vector", ["token", "cls", "mean"])
def test_permuting_the_rows_changes_nothing(vector: str, label_aware: bool) -> None:
    student, teacher, mask = random(2, 5, 3, 4), random(2, 5, 3, 4, seed=1), random_mask(5, 3)
    term = make_term(student, teacher, vector=vector, label_aware=label_aware)
    labels, order = torch.tensor([0, 1, 1, 0, 2]), torch.tensor([3, 0, 4, 2, 1])
    found = value(term, student[:, order], teacher[:, order], mask[order], labels[order])
    want = value(term, student, teacher, mask, labels)
    torch.testing.assert_close(found, want, rtol=1e-12, atol=0)


@pytest.mark.parametrize("vector", ["token", "cls", "mean"])
def test_content_of_padding_changes_neither_value_nor_gradient(vector: str) -> None:
    student, teacher, mask = random(2, 4, 5, 3), random(2, 4, 5, 3, seed=1), random_mask(4, 5, seed=3)
    assert (mask == 0).any()
    term = make_term(student, teacher, vector=vector)
    found = []
    for noise in (0.0, 1e6):
        s, t = student.clone(), teacher.clone()
        s[:, mask == 0], t[:, mask == 0] = noise, -noise
        loss = value(term, s.requires_grad_(), t, mask)
        (gradient,) = torch.autograd.grad(loss, s)
        assert (gradient[:, mask == 0] == 0).all()
        found.append((loss.item(), gradient[:, mask == 1]))
    assert found[0][0] == pytest.approx(found[1][0], rel=1e-14)
    torch.testing.assert_close(found[0][1], found[1][1], rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("label_aware", [False, True])
@pytest.mark.parametrize(("vector", "negatives"), CHOICES)
def test_gradients_reach_student_and_every_projection_and_not_the_teacher(
    vector: str, negatives: str, label_aware: bool
) -> None:
    student, teacher = random(3, 4, 2, 5).requires_grad_(), random(3, 4, 2, 4, seed=1).requires_grad_()
    term = make_term(student, teacher, vector=vector, negatives=negatives, label_aware=label_aware)
    value(term, student, teacher, torch.ones(4, 2, dtype=torch.int64)).backward()
    assert teacher.grad is None
    assert (term.projection.grad.flatten(1).norm(dim=1) > 1e-6).all()
    assert (student.grad.flatten(1).norm(dim=1) > 1e-6).all()


def test_tokens_without_padding_equal_the_expression_of_glmkd() -> None:
    """``layers * mean_b [1 - (mean_neg G - G_bb) / 2 + G_bb]``, G the mean distance over layers too."""
    L, B = 3, 5
    student, teacher = random(L, B, 4, 6), random(L, B, 4, 6, seed=1)
    cosine = torch.nn.functional.cosine_similarity(student[:, :, None], teacher[:, None], dim=-1)
    G = 1 - cosine.mean((0, 3))
    own = G.diagonal()
    others = (G.sum(1) - own) / (B - 1)
    want = L * (1 - (others - own) / 2 + own).mean()
    found = value(make_term(student, teacher), student, teacher, torch.ones(B, 4, dtype=torch.int64))
    assert found.item() == pytest.approx(want.item(), rel=1e-12)


class _LargestTensor(TorchDispatchMode):
    """Notes the number of elements of the largest tensor that any operation makes."""

    def __init__(self) -> None:
        super().__init__()
        self.elements = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        made = func(*args, **(kwargs or {}))
        for tensor in made if isinstance(made, tuple | list) else [made]:
            if isinstance(tensor, Tensor):
                self.elements = max(self.elements, tensor.numel())
        return made


@contextmanager
def largest_tensor() -> Iterator[_LargestTensor]:
    with _LargestTensor() as mode:
        yield mode


def test_tokens_never_go_through_a_tensor_of_rows_by_rows_by_positions() -> None:
    L, B, S, E = 2, 16, 8, 4
    student, teacher = random(L, B, S, E).requires_grad_(), random(L, B, S, E, seed=1)
    term, mask = make_term(student, teacher), random_mask(B, S)
    with largest_tensor() as largest:
        value(term, student, teacher, mask).backward()
    assert L * B * S * E <= largest.elements < B * B * S


def test_pooled_vectors_never_go_through_a_tensor_of_rows_by_rows() -> None:
    L, B, E = 2, 64, 4
    student, teacher = random(L, B, E).requires_grad_(), random(L, B, E, seed=1)
    with largest_tensor() as largest:
        pooled_cos_nce(student, teacher).sum().backward()
    assert L * B * E <= largest.elements < B * B


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize(("vector", "negatives"), CHOICES)
def test_zero_vectors_give_finite_values_and_gradients(
    vector: str, negatives: str, dtype: torch.dtype
) -> None:
    """Without the clamp a single dead unit vector turns the whole batch into NaN."""
    student, teacher = random(1, 4, 2, 3).to(dtype), random(1, 4, 2, 3, seed=1).to(dtype)
    student[:, 0], teacher[:, 1] = 0, 0
    term = make_term(student, teacher, vector=vector, negatives=negatives).to(dtype)
    student.requires_grad_()
    loss = value(term, student, teacher, torch.ones(4, 2, dtype=torch.int64))
    loss.backward()
    assert torch.isfinite(loss)
    assert torch.isfinite(student.grad).all() and torch.isfinite(term.projection.grad).all()


def test_float32_agrees_with_float64() -> None:
    student, teacher, mask = random(4, 8, 16, 32), random(4, 8, 16, 48, seed=1), random_mask(8, 16)
    term = make_term(student, teacher)
    want = value(term, student, teacher, mask).item()
    found = value(term.float(), student.float(), teacher.float(), mask)
    assert found.item() == pytest.approx(want, rel=1e-5)


@pytest.mark.parametrize("options", [{}, {"vector": "cls"}, {"vector": "mean", "negatives": "bank"}])
def test_a_single_row_raises(options: dict[str, str]) -> None:
    """K = 0 would divide by zero, or count nothing as a negative without a word."""
    student = random(2, 1, 3, 4)
    with pytest.raises(ValueError, match="at least two rows"):
        value(make_term(student, student, **options), student, student, torch.ones(1, 3))


def test_no_negatives_raise() -> None:
    with pytest.raises(ValueError, match="at least one negative"):
        cos_nce(torch.ones(2, 3), torch.ones(2, 3), torch.ones(2, 0, 3))


def test_an_anchor_without_another_label_keeps_its_positive_part() -> None:
    """All rows of one class: ``2 - 1.5 cos``, and no division by zero."""
    student, teacher = random(1, 3, 1, 4), random(1, 3, 1, 4, seed=1)
    mask, labels = torch.ones(3, 1, dtype=torch.int64), torch.zeros(3, dtype=torch.int64)
    for vector in ("token", "cls"):
        term = make_term(student, teacher, vector=vector, label_aware=True)
        cosine = torch.nn.functional.cosine_similarity(student[0, :, 0], teacher[0, :, 0], dim=-1)
        found = value(term, student, teacher, mask, labels)
        assert found.item() == pytest.approx((2 - 1.5 * cosine).mean().item(), rel=1e-12)


def test_pooled_vectors_by_hand() -> None:
    states = torch.tensor([[[[2.0, 0.0], [4.0, 6.0], [9.0, 9.0]], [[1.0, 3.0], [7.0, 7.0], [8.0, 8.0]]]])
    mask = torch.tensor([[1, 1, 0], [1, 0, 0]])
    assert pool(states, mask, "mean").tolist() == [[[3.0, 3.0], [1.0, 3.0]]]
    assert pool(states, mask, "cls").tolist() == [[[2.0, 0.0], [1.0, 3.0]]]


# The projection


def test_projection_is_one_matrix_per_layer_or_one_for_all() -> None:
    student, teacher = random(3, 2, 1, 4), random(3, 2, 1, 6)
    assert make_term(student, teacher).projection.shape == (3, 4, 6)
    shared = make_term(student, teacher, projection="shared")
    assert shared.projection.shape == (1, 4, 6)
    mask = torch.ones(2, 1, dtype=torch.int64)
    per_layer = make_term(student, teacher)
    with torch.no_grad():
        per_layer.projection.copy_(shared.projection.expand(3, -1, -1))
    found = value(shared, student, teacher, mask)
    torch.testing.assert_close(found, value(per_layer, student, teacher, mask), rtol=1e-13, atol=0)


def test_projection_starts_as_an_isometry() -> None:
    """Angles between student states are the same before and after it, so no layer starts distorted."""
    for D, E in ((4, 4), (4, 7)):
        W = make_term(random(2, 2, 1, D), random(2, 2, 1, E)).projection.detach()
        torch.testing.assert_close(W @ W.mT, torch.eye(D).double().expand(2, -1, -1), atol=1e-5, rtol=0)
    same = make_term(random(2, 2, 1, 4), random(2, 2, 1, 4)).projection
    torch.testing.assert_close(same.detach(), torch.eye(4).double().expand(2, -1, -1))


# The bank

BANK_ROWS = 6


def bank_draws(
    monkeypatch: pytest.MonkeyPatch, batches: list[tuple[list[int], list[int]]], **options: Any
) -> tuple[CosNCE, list[list[list[int]]]]:
    """Run a bank term over (rows, labels) batches; return for each batch the rows drawn per anchor.

    The teacher's vector of row r is the r-th unit vector, so that a negative tells its row.
    """
    drawn: list[list[list[int]]] = []
    plain = lrc_bert.cos_nce

    def spy(student: Tensor, teacher: Tensor, negatives: Tensor) -> Tensor:
        assert (negatives.norm(dim=-1) == 1).all(), "a row that was never seen was drawn"
        drawn.append(negatives.argmax(-1).tolist())
        return plain(student, teacher, negatives)

    monkeypatch.setattr(lrc_bert, "cos_nce", spy)
    units = torch.eye(BANK_ROWS).double()
    one = units[None, :1, None]
    term = make_term(one, one, rows=BANK_ROWS, vector="cls", negatives="bank", **options)
    for rows, labels in batches:
        states = units[rows][None, :, None]
        batch = batch_of(torch.ones(len(rows), 1), torch.tensor(labels), torch.tensor(rows))
        given = outputs_of(states, torch.ones(len(rows), 1))
        term(given, given, batch)
    return term, drawn


def test_bank_draws_rows_seen_and_never_the_anchor(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    batches = [([0, 3], [0, 1]), ([5, 0], [1, 0]), ([2, 3], [1, 1])]
    _, drawn = bank_draws(monkeypatch, batches, bank_negatives=200)
    seen: set[int] = set()
    for (rows, _), per_anchor in zip(batches, drawn, strict=True):
        seen |= set(rows)
        for row, found in zip(rows, per_anchor, strict=True):
            assert len(found) == 200
            # 200 draws out of at most four rows miss one with probability under 1e-24.
            assert set(found) == seen - {row}


def test_bank_draws_another_label_where_one_was_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    batches = [([0, 1], [0, 0]), ([2, 3], [1, 0]), ([4, 0], [1, 0])]
    _, drawn = bank_draws(monkeypatch, batches, bank_negatives=100, label_aware=True)
    # At first every row seen is of class 0: any other row serves.
    assert [set(found) for found in drawn[0]] == [{1}, {0}]
    assert [set(found) for found in drawn[1]] == [{0, 1, 3}, {2}]
    assert [set(found) for found in drawn[2]] == [{0, 1, 3}, {2, 4}]


def test_bank_loss_is_formula_1_over_the_drawn_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    given: list[Tensor] = []
    plain = lrc_bert.cos_nce
    monkeypatch.setattr(lrc_bert, "cos_nce", lambda *args: given.append(plain(*args)) or given[-1])
    student, teacher = random(3, 4, 2, 5), random(3, 4, 2, 5, seed=1)
    mask = torch.ones(4, 2, dtype=torch.int64)
    term = make_term(student, teacher, vector="mean", negatives="bank", bank_negatives=7)
    found = value(term, student, teacher, mask)
    assert [len(each) for each in given] == [4, 4, 4]
    assert found.item() == pytest.approx(sum(each.mean().item() for each in given), rel=1e-12)


def test_bank_expectation_is_the_in_batch_loss() -> None:
    """K changes the variance of the estimate and not what it estimates."""
    torch.manual_seed(0)
    student, teacher = random(1, 4, 1, 5), random(1, 4, 1, 5, seed=1)
    mask = torch.ones(4, 1, dtype=torch.int64)
    exact = value(make_term(student, teacher, vector="cls"), student, teacher, mask)
    bank = make_term(student, teacher, rows=4, vector="cls", negatives="bank", bank_negatives=200_000)
    assert value(bank, student, teacher, mask).item() == pytest.approx(exact.item(), abs=5e-3)


def test_bank_keeps_the_newest_state_of_each_row_in_its_state_dict(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    torch.manual_seed(0)
    term, _ = bank_draws(monkeypatch, [([0, 3], [0, 1])])
    state = term.state_dict()
    assert set(state) == {"projection", "bank", "bank_labels"}
    assert state["bank_labels"].tolist() == [0, -1, -1, 1, -1, -1]
    assert state["bank"][:, 0].norm(dim=-1).tolist() == [1, 0, 0, 1, 0, 0]
    states = torch.full((1, 2, 1, BANK_ROWS), 2.0).double()
    monkeypatch.undo()
    given = outputs_of(states, torch.ones(2, 1))
    term(given, given, batch_of(torch.ones(2, 1), row_ids=torch.tensor([3, 4])))
    assert term.bank[:, 0].sum(-1).tolist() == [1, 0, 0, 12, 12, 0]
    assert set(make_term(states, states).state_dict()) == {"projection"}


# Settings and stages

CONTEXT = Context("classification", 2, 32, 2, 8, 4, 16)


@pytest.mark.parametrize(
    ("options", "kind", "match"),
    [
        ({"label_aware": True}, "regression", "method.label_aware"),
        ({"label_aware": True}, "multi-label", "method.label_aware"),
        ({"negatives": "bank"}, "classification", "method.vector"),
        ({"alpha": 0, "beta": 0, "gamma": 0}, "classification", "all 0"),
        ({"beta": 0, "gamma": 0}, "classification", "head would never be trained"),
        ({"beta": 0, "gamma": 0, "switch": 0}, "classification", "head would never be trained"),
        ({"layer_map": (2,)}, "classification", r"should hold 2 teacher layers.*\[2\]"),
        ({"layer_map": (2, 5)}, "classification", "from 1 to 4"),
        ({"layer_map": (0, 4)}, "classification", "from 1 to 4"),
    ],
)
def test_options_that_do_not_go_together_are_refused(
    options: dict[str, Any], kind: Any, match: str
) -> None:
    context = Context(kind, 2, 32, 2, 8, 4, 16)
    with pytest.raises(WrongInput, match=match):
        build(LRCBertSettings(**options), context)


def test_layer_map() -> None:
    assert resolve_layer_map("uniform", 4, 12) == (3, 6, 9, 12)
    assert resolve_layer_map("uniform", 6, 6) == (1, 2, 3, 4, 5, 6)
    assert resolve_layer_map((1, 4), 2, 4) == (1, 4)
    assert resolve_layer_map("uniform", 4, 6) == (2, 3, 5, 6)  # 1.5, 3, 4.5, 6
    assert resolve_layer_map("uniform", 5, 12) == (3, 5, 8, 10, 12)  # 2.4, 4.8, 7.2, 9.6, 12
    with pytest.raises(WrongInput, match="each of 12 student layers, the teacher has 6.*at most 6 layers"):
        resolve_layer_map("uniform", 12, 6)


@pytest.mark.parametrize("teacher", range(1, 25))
def test_a_uniform_map_rises_to_the_last_layer(teacher: int) -> None:
    for depth in range(1, teacher + 1):
        found = resolve_layer_map("uniform", depth, teacher)
        assert list(found) == sorted(set(found)) and found[-1] == teacher and len(found) == depth


def test_needs_are_the_mapped_layers_and_nothing_else() -> None:
    plan = build(LRCBertSettings(), CONTEXT)
    first, second = plan.stages
    assert plan.student_needs(first) == Needs(hidden_states=frozenset({1, 2}))
    assert plan.teacher_needs(first) == Needs(hidden_states=frozenset({2, 4}))
    assert plan.student_needs(second) == Needs(True, frozenset({1, 2}))
    assert plan.teacher_needs(second) == Needs(True, frozenset({2, 4}))
    pooled = build(LRCBertSettings(vector="mean"), CONTEXT)
    assert pooled.student_needs(first) == Needs(pooled_states=frozenset({("mean", 1), ("mean", 2)}))
    assert pooled.teacher_needs(first) == Needs(pooled_states=frozenset({("mean", 2), ("mean", 4)}))


def test_stages_hold_the_terms_and_weights_of_the_method() -> None:
    first, second = build(LRCBertSettings(), CONTEXT).stages
    assert (first.start, dict(first.weights)) == (0.0, {"cos_nce": 1.0})
    assert (second.start, dict(second.weights)) == (0.8, {"cos_nce": 1.0, "soft": 1.0, "hard": 3.0})


@pytest.mark.parametrize(
    ("options", "stages"),
    [
        ({}, [(0.0, {"cos_nce"}, True), (0.8, {"cos_nce", "soft", "hard"}, True)]),
        (
            {"perturbation": "second"},
            [(0.0, {"cos_nce"}, False), (0.8, {"cos_nce", "soft", "hard"}, True)],
        ),
        ({"perturbation": "off"}, [(0.0, {"cos_nce"}, False), (0.8, {"cos_nce", "soft", "hard"}, False)]),
        ({"switch": 0, "perturbation": "second"}, [(0.0, {"cos_nce", "soft", "hard"}, True)]),
        ({"switch": 1}, [(0.0, {"cos_nce"}, True)]),
        ({"alpha": 0}, [(0.0, {"soft", "hard"}, True)]),
        ({"beta": 0}, [(0.0, {"cos_nce"}, True), (0.8, {"cos_nce", "hard"}, True)]),
        ({"gamma": 0}, [(0.0, {"cos_nce"}, True), (0.8, {"cos_nce", "soft"}, True)]),
    ],
)
def test_stages_of_every_ablation(options: dict[str, Any], stages: list[Any]) -> None:
    plan = build(LRCBertSettings(**options), CONTEXT)
    assert [(s.start, set(s.weights), s.perturb) for s in plan.stages] == stages


@pytest.mark.parametrize("switch", [0.25, 0.5, 0.8])
def test_stage_switches_once_at_the_configured_step(switch: float) -> None:
    plan = build(LRCBertSettings(switch=switch), CONTEXT)
    settings = TrainingSettings(epochs=10, batch_size=4)
    schedule = Schedule(np.full(40, 5), plan, settings)
    assert schedule.steps == 100
    numbers = [schedule.stage(step)[0] for step in range(100)]
    assert numbers == [1] * round(100 * switch) + [2] * (100 - round(100 * switch))


@pytest.mark.parametrize("perturb", ["off", "both"])
def test_first_stage_gives_the_classification_head_no_gradient(perturb: str) -> None:
    task = make_task()
    student, teacher = make_encoder(task=task), make_encoder(task=task, layers=4, seed=1)
    plan = build(LRCBertSettings(perturbation=perturb), Context("classification", 2, 6, 2, 16, 4, 16))
    distiller, batch = Distiller(student, plan, bf16=False), make_batch_of(make_rows(task, 6), student)
    for stage, in_second in zip(plan.stages, (False, True), strict=True):
        with torch.no_grad():
            goals = teacher(batch.teacher, plan.teacher_needs(stage))
        distiller.zero_grad()
        distiller(batch, goals, stage).total.backward()
        for name, parameter in student.model.named_parameters():
            if name.startswith("classifier") or ".pooler." in name:
                assert (parameter.grad is not None and bool(parameter.grad.any())) == in_second, name
        assert student.model.base_model.embeddings.word_embeddings.weight.grad.any()
        assert (distiller.terms["cos_nce"].projection.grad.flatten(1).norm(dim=1) > 0).all()


# The protocol


@pytest.mark.parametrize(
    ("stages", "match"),
    [
        ((), "start at 0"),
        ((Stage(0.1, {"one": 1.0}),), "start at 0"),
        ((Stage(0.0, {"one": 1.0}), Stage(0.0, {"one": 1.0})), "rise"),
        ((Stage(0.0, {"one": 1.0}), Stage(0.6, {"one": 1.0}), Stage(0.5, {"one": 1.0})), "rise"),
        ((Stage(0.0, {"two": 1.0}),), "two"),
        ((Stage(0.0, {}),), "needs terms"),
    ],
)
def test_a_plan_with_impossible_stages_is_refused(stages: tuple[Stage, ...], match: str) -> None:
    with pytest.raises(ValueError, match=match):
        Plan({"one": _Constant(1.0)}, stages)

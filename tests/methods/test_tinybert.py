"""TinyBERT against its equations: golden numbers, naive loops, and what must hold for any input."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from stillroom.data.batching import Batch, Inputs
from stillroom.encoder import Needs, Outputs
from stillroom.errors import WrongInput
from stillroom.methods.base import Context, Plan
from stillroom.methods.tinybert import TinyBERTSettings, build, layer_squares
from stillroom.ops.attention import visible
from stillroom.ops.prediction import hard_label_loss
from stillroom.recipe import TrainingSettings
from stillroom.training.schedule import Schedule

GOLDEN = {
    example["name"]: example
    for example in json.loads(
        (Path(__file__).parents[1] / "golden" / "bert_emd.json").read_text(encoding="utf-8")
    )["examples"]
}
MASK = torch.tensor([[1, 1, 1], [1, 1, 0]])


def agrees(got: Any, want: Any, tolerance: float = 1e-9) -> bool:
    """Apply the golden file's own rule: ``|got - want| <= tolerance * (1 + |want|)``."""
    got, want = torch.as_tensor(got, dtype=torch.float64), torch.as_tensor(want, dtype=torch.float64)
    assert got.shape == want.shape
    return bool(((got - want).abs() <= tolerance * (1 + want.abs())).all())


def random(*shape: int, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator, dtype=torch.float64)


def batch_of(labels: Tensor) -> Batch:
    inputs = Inputs(MASK, MASK, None)
    return Batch(inputs, inputs, labels, torch.arange(2))


def side(depth: int, width: int, seed: int) -> Outputs:
    """Return random states and scores, with -1e4 on padded keys as transformers has it."""
    masked = -1e4 * (1 - MASK)[:, None, None]
    return Outputs(
        random(2, 2, seed=seed),
        {i: random(2, 3, width, seed=seed + i) for i in range(depth + 1)},
        attention_scores={i: random(2, 2, 3, 3, seed=seed + 50 + i) + masked for i in range(1, depth + 1)},
    )


def make_plan(*, kind: Any = "classification", width: int = 3, **options: Any) -> Plan:
    torch.manual_seed(0)
    plan = build(TinyBERTSettings(**options), Context(kind, 2, 8, 2, width, 4, 5))
    for term in plan.terms.values():
        term.double()
    return plan


# Golden numbers


@pytest.mark.parametrize("name", ["T6_prediction_T_1", "T6_prediction_T_3"])
def test_golden_prediction_loss(name: str) -> None:
    example = GOLDEN[name]
    z_S, z_T = (
        torch.tensor(example["inputs"][f"{who}_logits"], dtype=torch.float64)
        for who in ("student", "teacher")
    )
    plan = make_plan(temperature=example["parameters"]["temperature"])
    found = plan.terms["soft"](Outputs(z_S), Outputs(z_T), batch_of(torch.zeros(2)))
    assert agrees(found, example["expected"]["tinybert"])


def test_golden_clamp_of_scores() -> None:
    """The diagonal of the example's costs is the loss of each layer matched with its own."""
    example = GOLDEN["T4_clamp_and_gradient"]
    s, t = (
        visible(torch.tensor(example["inputs"][f"{who}_scores"], dtype=torch.float64))
        for who in ("student", "teacher")
    )
    D = np.array(example["expected"]["D"])
    for i in range(2):
        for j in range(2):
            assert agrees(layer_squares(s[[i]], t[[j]]), D[i, j])
    assert agrees(layer_squares(s, t), D[0, 0] + D[1, 1])


# Against loops


def naive_attention(student: Outputs, teacher: Outputs, layers: tuple[int, ...], masked: bool) -> float:
    total = 0.0
    for m, g in enumerate(layers, start=1):
        found = []
        for row in range(2):
            for head in range(2):
                for query in range(3):
                    for key in range(3):
                        if masked and not (MASK[row, query] and MASK[row, key]):
                            continue
                        s = student.attention_scores[m][row, head, query, key].item()
                        t = teacher.attention_scores[g][row, head, query, key].item()
                        found.append(((0 if s <= -100 else s) - (0 if t <= -100 else t)) ** 2)
        total += sum(found) / len(found)
    return total


def naive_states(
    student: Outputs, teacher: Outputs, layers: tuple[int, ...], masked: bool, W: Any, b: Any
) -> float:
    total = 0.0
    for m, g in enumerate((0, *layers)):
        found = []
        for row in range(2):
            for p in range(3):
                if masked and not MASK[row, p]:
                    continue
                h, t = student.hidden_states[m][row, p].tolist(), teacher.hidden_states[g][row, p].tolist()
                for line, c, goal in zip(W, b, t, strict=True):
                    found.append((sum(w * x for w, x in zip(line, h, strict=True)) + c - goal) ** 2)
        total += sum(found) / len(found)
    return total


@pytest.mark.parametrize("padding", ["all", "masked"])
@pytest.mark.parametrize(("layer_map", "layers"), [("uniform", (2, 4)), ((1, 3), (1, 3))])
def test_terms_equal_loops(layer_map: Any, layers: tuple[int, ...], padding: str) -> None:
    plan = make_plan(layer_map=layer_map, padding=padding)
    student, teacher = side(2, 3, 0), side(4, 5, 100)
    batch, masked = batch_of(torch.zeros(2)), padding == "masked"
    with torch.no_grad():
        plan.terms["hidden_states"].projection.bias += random(5, seed=3)
    found = plan.terms["attention"](student, teacher, batch)
    assert found.item() == pytest.approx(naive_attention(student, teacher, layers, masked), rel=1e-12)
    W, b = (p.tolist() for p in plan.terms["hidden_states"].projection.parameters())
    want = naive_states(student, teacher, layers, masked, W, b)
    found = plan.terms["hidden_states"](student, teacher, batch)
    assert found.item() == pytest.approx(want, rel=1e-12)


def test_gradient_is_right_and_the_teacher_gets_none() -> None:
    s, t = random(2, 3, 2).requires_grad_(), random(2, 3, 2, seed=1).requires_grad_()
    for counted in (None, torch.tensor([[1.0], [0.0], [1.0]]).double()):
        assert torch.autograd.gradcheck(lambda x, c=counted: layer_squares(x, t, c), s)
    layer_squares(s, t).backward()
    assert s.grad is not None and s.grad.abs().max() > 1e-3
    assert t.grad is None


def test_shapes_that_would_broadcast_are_refused() -> None:
    """One head of the teacher would be compared with every head of the student."""
    with pytest.raises(ValueError, match="expected one shape"):
        layer_squares(random(2, 3, 2), random(2, 1, 2))


# What must hold


@pytest.mark.parametrize("padding", ["all", "masked"])
def test_identical_models_give_zero(padding: str) -> None:
    plan = build(TinyBERTSettings(padding=padding), Context("classification", 2, 8, 2, 5, 2, 5))
    both = side(2, 5, 0)
    for name in ("attention", "hidden_states"):
        assert plan.terms[name].double()(both, both, batch_of(torch.zeros(2))).item() == 0


@pytest.mark.parametrize("padding", ["all", "masked"])
def test_values_at_masked_keys_do_not_matter(padding: str) -> None:
    term = make_plan(padding=padding).terms["attention"]
    student, teacher, batch = side(2, 3, 0), side(4, 5, 100), batch_of(torch.zeros(2))
    want = term(student, teacher, batch).item()
    keys = (MASK == 0)[:, None, None]
    for value in (-1e4, -3e8, torch.finfo(torch.float32).min):
        for outputs in (student, teacher):
            for scores in outputs.attention_scores.values():
                scores.masked_fill_(keys, value)
        assert term(student, teacher, batch).item() == want


def test_masked_padding_counts_for_nothing() -> None:
    for name in ("attention", "hidden_states"):
        for padding in ("masked", "all"):
            term = make_plan(padding=padding).terms[name]
            student, teacher, batch = side(2, 3, 0), side(4, 5, 100), batch_of(torch.zeros(2))
            want = term(student, teacher, batch).item()
            for scores in student.attention_scores.values():
                scores.transpose(1, 2)[MASK == 0] += 3.0 * torch.arange(3)
            for states in student.hidden_states.values():
                states[MASK == 0] = 7.0
            assert (term(student, teacher, batch).item() == want) == (padding == "masked")


def test_map_starts_without_turning_or_moving_anything() -> None:
    projection = make_plan().terms["hidden_states"].projection
    W = projection.weight.detach()
    torch.testing.assert_close(W.T @ W, torch.eye(3, dtype=torch.float64), rtol=0, atol=1e-6)
    assert not projection.bias.any()


# The plan


def test_stages_are_those_of_task_distillation() -> None:
    plan = make_plan()
    first, second = plan.stages
    assert (first.start, dict(first.weights)) == (0.0, {"attention": 1.0, "hidden_states": 1.0})
    assert (second.start, dict(second.weights)) == (10 / 13, {"soft": 1.0})
    schedule = Schedule(np.full(40, 5), plan, TrainingSettings(epochs=13, batch_size=4))
    assert [schedule.stage(step)[0] for step in range(130)] == [1] * 100 + [2] * 30


def test_needs_are_the_mapped_layers_and_nothing_else() -> None:
    plan = make_plan(padding="masked")
    first, second = plan.stages
    student = Needs(hidden_states=frozenset({0, 1, 2}), attention_scores=frozenset({1, 2}))
    teacher = Needs(hidden_states=frozenset({0, 2, 4}), attention_scores=frozenset({2, 4}))
    assert (plan.student_needs(first), plan.teacher_needs(first)) == (student, teacher)
    assert plan.student_needs(second) == plan.teacher_needs(second) == Needs(logits=True)
    # A student that leaves its padding out has other states there than its teacher.
    plan = make_plan()
    for name in ("attention", "hidden_states"):
        assert plan.terms[name].student_needs.padding and plan.terms[name].teacher_needs.padding
    assert plan.teacher_needs(plan.stages[0]) == teacher | Needs(padding=True)
    plan = make_plan(padding="masked")
    assert all(plan.terms[name].same_tokens for name in ("attention", "hidden_states"))
    assert plan.terms["attention"].same_heads


@pytest.mark.parametrize(("switch", "terms"), [(0, {"soft"}), (1, {"attention", "hidden_states"})])
def test_one_stage_alone(switch: float, terms: set[str]) -> None:
    plan = make_plan(switch=switch)
    assert len(plan.stages) == 1 and set(plan.terms) == terms == set(plan.stages[0].weights)


@pytest.mark.parametrize(("target", "follows"), [("label", "labels"), ("teacher", "teacher")])
def test_regression_follows_what_is_set(target: Any, follows: str) -> None:
    plan = make_plan(kind="regression", regression_target=target, temperature=3.0)
    (name,) = plan.stages[1].weights
    z_S, z_T, y = random(2, 1), random(2, 1, seed=1), random(2, seed=2)
    goal = y if follows == "labels" else z_T[:, 0]
    want = hard_label_loss(z_S, goal, kind="regression").item()
    assert plan.terms[name](Outputs(z_S), Outputs(z_T), batch_of(y)).item() == pytest.approx(
        want, rel=1e-12
    )


def test_a_student_deeper_than_its_teacher_is_refused() -> None:
    with pytest.raises(WrongInput, match="each of 5 student layers"):
        build(TinyBERTSettings(), Context("classification", 2, 8, 5, 4, 4, 4))

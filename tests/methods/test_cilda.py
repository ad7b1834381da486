"""CILDA and MATE-KD against their equations: golden numbers, naive loops, and what must hold."""

import itertools
import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from stillroom.data.batching import Batch, Inputs
from stillroom.encoder import Outputs
from stillroom.errors import WrongInput
from stillroom.methods import cilda, mate_kd
from stillroom.methods.augmentation import Divergence
from stillroom.methods.base import Context, Plan, Term
from stillroom.methods.cilda import CILDASettings, IntermediateContrast, in_batch_contrast
from stillroom.methods.mate_kd import MateKDSettings
from stillroom.ops.prediction import output_divergence

GOLDEN = {
    example["name"]: example
    for example in json.loads((Path(__file__).parents[1] / "golden/cilda.json").read_text())["examples"]
}
D1, D3, D4 = (GOLDEN[name] for name in ("D1_crd_in_batch", "D3_kl_or_cross_entropy", "D4_objectives"))
CONTEXT = Context("classification", 2, 3, 2, 4, 3, 5)
"""Two classes; a student of 2 layers of width 4, a teacher of 3 layers of width 5."""


def tensor(values: Any) -> Tensor:
    return torch.tensor(values, dtype=torch.float64)


def near(value: Any, tolerance: float = 1e-9) -> Any:
    return pytest.approx(value, rel=tolerance, abs=tolerance)


# The contrastive loss


def contrast_naively(
    z_T: list[list[float]], z_S: list[list[float]], tau2: float, anchor: str
) -> list[float]:
    """Return L_CRD of each row by loops over floats."""

    def cosine(x: list[float], y: list[float]) -> float:
        dot = sum(a * b for a, b in zip(x, y, strict=True))
        return dot / math.sqrt(sum(a * a for a in x)) / math.sqrt(sum(b * b for b in y))

    found = []
    for i in range(len(z_T)):
        own = cosine(z_T[i], z_S[i]) / tau2
        students = [math.exp(cosine(z_T[i], z) / tau2) for z in z_S]
        teachers = [math.exp(cosine(z, z_S[i]) / tau2) for z in z_T]
        sides = {"teacher": [students], "student": [teachers], "symmetric": [students, teachers]}[anchor]
        found.append(sum(math.log(sum(side)) - own for side in sides) / len(sides))
    return found


@pytest.mark.parametrize("anchor", ["teacher", "student"])
@pytest.mark.parametrize("tau2", [2.0, 0.07])
def test_golden_contrast(tau2: float, anchor: Any) -> None:
    z_T, z_S = tensor(D1["inputs"]["z_T"]), tensor(D1["inputs"]["z_S"])
    name = f"tau2_{tau2:g}"
    found = in_batch_contrast(z_T, z_S, tau2=tau2, anchor=anchor)
    assert found.tolist() == near(D1["expected"]["per_sample"][name][f"{anchor}_anchor"])
    assert found.mean().item() == near(D1["expected"]["mean"][name][f"{anchor}_anchor"])


@pytest.mark.parametrize("anchor", ["teacher", "student", "symmetric"])
@pytest.mark.parametrize("seed", range(3))
def test_contrast_is_the_naive_loop(seed: int, anchor: Any) -> None:
    torch.manual_seed(seed)
    rows, tau2 = 2 + seed, (2.0, 0.5, 0.07)[seed]
    z_T, z_S = torch.randn(2, rows, 4, dtype=torch.float64)
    found = in_batch_contrast(z_T, z_S, tau2=tau2, anchor=anchor)
    assert found.tolist() == near(contrast_naively(z_T.tolist(), z_S.tolist(), tau2, anchor), 1e-12)


def test_contrast_has_its_known_range() -> None:
    """B = 32, tau2 = 2: ln(1 + 31/e) at best, ln(1 + 31e) at worst, ln 32 where all rows look alike."""
    same = torch.ones(32, 3, dtype=torch.float64)
    assert in_batch_contrast(same, same, tau2=2.0).tolist() == near([math.log(32)] * 32)
    # Own cosine 1, all others -1: two rows reach it.
    z = tensor([[1.0, 0.0], [-1.0, 0.0]])
    assert in_batch_contrast(z, z, tau2=2.0).tolist() == near([math.log(1 + 1 / math.e)] * 2)
    assert in_batch_contrast(z, -z, tau2=2.0).tolist() == near([math.log(1 + math.e)] * 2)


def test_contrast_gradients() -> None:
    torch.manual_seed(0)
    z_T, z_S = torch.randn(2, 3, 4, dtype=torch.float64, requires_grad=True)
    for anchor in ("teacher", "student", "symmetric"):
        assert torch.autograd.gradcheck(
            lambda t, s, anchor=anchor: in_batch_contrast(t, s, tau2=2.0, anchor=anchor), (z_T, z_S)
        )


def test_contrast_ignores_lengths_and_follows_rows() -> None:
    torch.manual_seed(0)
    z_T, z_S = torch.randn(2, 5, 4, dtype=torch.float64)
    want = in_batch_contrast(z_T, z_S, tau2=2.0)
    torch.testing.assert_close(in_batch_contrast(7 * z_T, 0.1 * z_S, tau2=2.0), want)
    order = torch.tensor([3, 0, 4, 1, 2])
    torch.testing.assert_close(in_batch_contrast(z_T[order], z_S[order], tau2=2.0), want[order])


def test_contrast_refuses_what_would_train_on_nonsense() -> None:
    """One row has loss 0 whatever it holds; a shape that broadcasts would match the wrong rows."""
    with pytest.raises(ValueError, match="two rows"):
        in_batch_contrast(torch.ones(1, 3), torch.ones(1, 3), tau2=2.0)
    with pytest.raises(ValueError, match="expected shapes"):
        in_batch_contrast(torch.ones(2, 3), torch.ones(1, 3), tau2=2.0)


# The divergence of the outputs


def test_golden_divergence_and_its_opposite_gradients() -> None:
    expected, student = D3["expected"], tensor(D3["inputs"]["student_logits"])
    for form in ("kl", "ce"):
        teacher = tensor(D3["inputs"]["teacher_logits"]).requires_grad_()
        found = output_divergence(student, teacher, form=form)
        assert found.item() == near(expected[f"{form}_mean"])
        (gradient,) = torch.autograd.grad(found, teacher)
        assert gradient.tolist() == [near(row) for row in expected[f"grad_{form}_mean"]]
        each = [
            output_divergence(s[None], t[None], form=form) for s, t in zip(student, teacher, strict=True)
        ]
        assert [value.item() for value in each] == near(expected[form])


@pytest.mark.parametrize("form", ["kl", "ce"])
@pytest.mark.parametrize("kind", ["classification", "multi-label", "regression"])
def test_divergence_is_the_naive_loop_with_gradients_to_both(kind: Any, form: Any) -> None:
    torch.manual_seed(0)
    width = 1 if kind == "regression" else 3
    student, teacher = 2 * torch.randn(2, 4, width, dtype=torch.float64)
    total = 0.0
    for s, t in zip(student.tolist(), teacher.tolist(), strict=True):
        if kind == "regression":
            total += (s[0] - t[0]) ** 2
            continue
        pairs = (
            [(s, t)]
            if kind == "classification"
            else [([a, 0.0], [b, 0.0]) for a, b in zip(s, t, strict=True)]
        )
        for a, b in pairs:
            q = [math.exp(x) / sum(map(math.exp, a)) for x in a]
            p = [math.exp(x) / sum(map(math.exp, b)) for x in b]
            total += sum(
                x * ((math.log(x) if form == "kl" else 0.0) - math.log(y))
                for x, y in zip(p, q, strict=True)
            )
    assert output_divergence(student, teacher, form=form, kind=kind).item() == near(total / 4, 1e-12)
    both = (student.requires_grad_(), teacher.requires_grad_())
    assert torch.autograd.gradcheck(lambda s, t: output_divergence(s, t, form=form, kind=kind), both)


def test_divergence_refuses_shapes_that_broadcast() -> None:
    with pytest.raises(ValueError, match="expected shapes"):
        output_divergence(torch.zeros(3, 2), torch.zeros(1, 2), form="kl")


# The objectives


class Fixed(Term):
    """A term that gives the value it is told."""

    def __init__(self, value: float):
        super().__init__()
        self.value = value

    def forward(self, student: Outputs, teacher: Outputs, batch: Batch) -> Tensor:
        return tensor(self.value)


def plan_of(method: str, **options: Any) -> Plan:
    if method == "mate-kd":
        return mate_kd.build(MateKDSettings(generator="g", **options), CONTEXT)
    return cilda.build(CILDASettings(generator="g", **options), CONTEXT)


def weigh(plan: Plan, weights: Any, student: Any, teacher: Any, crd: float) -> float:
    inputs = D4["inputs"]
    batch = Batch(None, None, torch.tensor(inputs["labels"]), torch.arange(2))
    terms = {**plan.terms, "contrast": Fixed(crd)}
    s, t = Outputs(tensor(student)), Outputs(tensor(teacher))
    return float(sum(weight * terms[name](s, t, batch) for name, weight in weights.items()))


def student_loss(plan: Plan) -> float:
    """Return the student's objective on golden D4."""
    inputs, stage = D4["inputs"], plan.stages[0]
    return weigh(
        plan, stage.weights, inputs["student_logits"], inputs["teacher_logits"], inputs["crd"]
    ) + weigh(
        plan, stage.augmented, inputs["aug_student_logits"], inputs["aug_teacher_logits"], inputs["crd_aug"]
    )


@pytest.mark.parametrize(("objective", "name"), [("M3", "M3"), ("M4", "M4"), ("minILD", "M6")])
def test_golden_student_objectives(objective: str, name: str) -> None:
    assert student_loss(plan_of("cilda", objective=objective)) == near(D4["expected"][name])


def test_golden_mate_kd() -> None:
    assert student_loss(plan_of("mate-kd")) == near(D4["expected"]["M3"])
    assert student_loss(plan_of("mate-kd", adv_div="ce")) == near(D4["expected"]["mate_kd_code"])


def test_cilda_without_contrast_is_mate_kd() -> None:
    """With a2 = 0, adv_div = ce and M3, every loss equals that of MATE-KD's code."""
    ours, theirs = plan_of("cilda", a1=1.0, a2=0.0, adv_div="ce"), plan_of("mate-kd", adv_div="ce")
    assert ours.stages == theirs.stages
    assert ours.augmentation is not None and theirs.augmentation is not None
    assert replace(ours.augmentation, projections="frozen") == theirs.augmentation
    assert student_loss(ours) == student_loss(theirs) == near(D4["expected"]["mate_kd_code"])
    assert set(ours.terms) == set(theirs.terms) == {"hard", "soft"}


def test_golden_generator_objective() -> None:
    inputs, expected = D4["inputs"], D4["expected"]
    plan = plan_of("cilda")
    assert plan.augmentation is not None
    logits = (inputs["aug_student_logits"], inputs["aug_teacher_logits"])
    found = weigh(plan, plan.augmentation.weights, *logits, inputs["crd_aug"])
    assert found == near(expected["max_step"])


# The term on a model's outputs


def outputs_of(depth: int, width: int, rows: int = 3, pooling: Any = "cls") -> Outputs:
    pooled = {(pooling, i): torch.randn(rows, width) for i in range(1, depth + 1)}
    return Outputs(torch.randn(rows, 2), pooled_states=pooled)


def batch_of(rows: int = 3) -> Batch:
    inputs = Inputs(torch.zeros(rows, 4), torch.ones(rows, 4), None)
    return Batch(inputs, inputs, torch.zeros(rows, dtype=torch.long), torch.arange(rows))


@pytest.mark.parametrize("anchor", ["teacher", "student", "symmetric"])
@pytest.mark.parametrize("pooling", ["cls", "mean"])
def test_term_is_the_formula_over_pooled_layers(pooling: Any, anchor: Any) -> None:
    """By loops: join each row's layers in their order, project, compare."""
    torch.manual_seed(0)
    settings = CILDASettings(pooling=pooling, anchor=anchor, projection_size=6)
    term = IntermediateContrast(settings, CONTEXT)
    student, teacher = outputs_of(2, 4, pooling=pooling), outputs_of(3, 5, pooling=pooling)

    def projected(outputs: Outputs, side: Any, row: int) -> list[float]:
        features: list[float] = []
        for _, i in sorted(outputs.pooled_states):
            features += outputs.pooled_states[pooling, i][row].tolist()
        rows = zip(side.weight.tolist(), side.bias.tolist(), strict=True)
        return [b + sum(w * x for w, x in zip(ws, features, strict=True)) for ws, b in rows]

    z_T = [projected(teacher, term.teacher, row) for row in range(3)]
    z_S = [projected(student, term.student, row) for row in range(3)]
    want = sum(contrast_naively(z_T, z_S, 2.0, anchor)) / 3
    assert term(student, teacher, batch_of()).item() == near(want, 1e-5)


def test_alpha2_divides_by_the_logarithm_of_the_batch() -> None:
    student, teacher = outputs_of(2, 4), outputs_of(3, 5)
    found = []
    for alpha2 in (False, True):
        torch.manual_seed(0)
        term = IntermediateContrast(CILDASettings(alpha2=alpha2), CONTEXT)
        found.append(term(student, teacher, batch_of()).item())
    assert found[1] == near(found[0] / math.log(3), 1e-6)


def test_random_teacher_layers_are_distinct_sorted_and_reproducible() -> None:
    settings = CILDASettings(teacher_layers="random", projection_size=3)
    context = replace(CONTEXT, teacher_depth=6, teacher_width=1)
    term = IntermediateContrast(settings, context)
    # Each layer's state is its number; a projection that shows its input shows which were drawn.
    layers = {("cls", i): torch.full((2, 1), float(i)) for i in range(1, 7)}
    numbers = Outputs(torch.zeros(2, 2), pooled_states=layers)
    seen: list[tuple[float, ...]] = []
    term.teacher.forward = lambda f: seen.append(tuple(f[0].tolist())) or torch.ones(2, 3)
    for seed in itertools.chain(range(40), [0]):
        torch.manual_seed(seed)
        term(outputs_of(2, 4, rows=2), numbers, batch_of(2))
    assert all(a < b and {a, b} <= {1.0, 2.0, 3.0, 4.0, 5.0, 6.0} for a, b in seen)
    assert len(set(seen)) > 8 and {layer for pair in seen for layer in pair} == set(map(float, range(1, 7)))
    torch.manual_seed(0)
    outputs_of(2, 4, rows=2)
    assert seen[0] == seen[-1]


def test_frozen_projections_are_no_parameters_but_are_kept() -> None:
    """A parameter would be decayed and clipped with the student; one that is not kept would resume anew."""
    frozen = IntermediateContrast(CILDASettings(projections="frozen"), CONTEXT)
    trained = IntermediateContrast(CILDASettings(projections="min"), CONTEXT)
    assert not list(frozen.parameters())
    assert len(list(trained.parameters())) == 4
    assert frozen.state_dict().keys() == trained.state_dict().keys()


def test_needs_are_every_layer_of_both_and_no_embeddings() -> None:
    term = IntermediateContrast(CILDASettings(pooling="mean"), CONTEXT)
    assert term.student_needs.pooled_states == {("mean", 1), ("mean", 2)}
    assert term.teacher_needs.pooled_states == {("mean", 1), ("mean", 2), ("mean", 3)}


# What does not go together


@pytest.mark.parametrize("method", ["cilda", "mate-kd"])
def test_no_generator_names_the_remedy(method: str) -> None:
    settings = {"cilda": (cilda, CILDASettings), "mate-kd": (mate_kd, MateKDSettings)}
    module, made = settings[method]
    with pytest.raises(WrongInput, match=rf"{method} needs .* stillroom generator --model minilm-l6"):
        module.build(made(), CONTEXT)


def test_nothing_to_raise_is_refused() -> None:
    with pytest.raises(WrongInput, match="nothing to raise"):
        plan_of("cilda", a1=0.0, a2=0.0)


def test_random_layers_of_a_shallow_teacher_are_refused() -> None:
    settings = CILDASettings(generator="g", teacher_layers="random")
    with pytest.raises(WrongInput, match="set it to all"):
        cilda.build(settings, replace(CONTEXT, teacher_depth=1))


def test_a_term_nobody_weighs_is_not_made() -> None:
    """Projections of a term that is left out would sit in every checkpoint."""
    assert "contrast" not in plan_of("cilda", a2=0.0).terms
    assert "contrast" in plan_of("cilda", a2=0.0, objective="minILD").terms
    assert isinstance(plan_of("cilda").terms["soft"], Divergence)

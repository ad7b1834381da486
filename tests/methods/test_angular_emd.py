"""Angular EMD against loops, and against LRC-BERT where the two must agree."""

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from stillroom.data.batching import Batch, Inputs
from stillroom.encoder import Needs, Outputs
from stillroom.errors import WrongInput
from stillroom.methods.angular_emd import AngularEMDSettings, AngularTransport, build, cos_nce_costs
from stillroom.methods.base import Context
from stillroom.ops.cos_nce import cos_nce
from stillroom.ops.transport import exact_flow

CONTEXT = Context("classification", 2, 8, 2, 3, 4, 5)
LENGTHS = (4, 2, 3)


def make_sides(L: int = 2, M: int = 4) -> tuple[Outputs, Outputs, Batch]:
    generator = torch.Generator().manual_seed(0)
    mask = (torch.arange(4) < torch.tensor(LENGTHS)[:, None]).long()

    def side(depth: int, width: int) -> Outputs:
        states = {
            i: torch.randn(3, 4, width, generator=generator, dtype=torch.float64).requires_grad_()
            for i in range(1, depth + 1)
        }
        return Outputs(torch.zeros(3, 2), states)

    inputs = Inputs(mask, mask, None)
    return side(L, 3), side(M, 5), Batch(inputs, inputs, torch.zeros(3).long(), torch.arange(3))


def make_term(**options: Any) -> AngularTransport:
    torch.manual_seed(0)
    return AngularTransport(AngularEMDSettings(**options), CONTEXT).double()


def naive_cost(s: Tensor, t: Tensor, mask: Tensor) -> float:
    """Return the mean of formula (1) over anchors, from cosines of tokens one by one."""
    total = 0.0
    for a in range(len(s)):
        means = []
        for b in range(len(s)):
            shared = [p for p in range(s.shape[1]) if mask[a, p] and mask[b, p]]
            cosines = [torch.cosine_similarity(s[a, p], t[b, p], dim=0).item() for p in shared]
            means.append(sum(cosines) / len(cosines))
        others = [means[b] for b in range(len(s)) if b != a]
        g = 1 - means[a]
        total += sum(2 - ((1 - c) - g) for c in others) / (2 * len(others)) + g
    return total / len(s)


def test_costs_and_term_equal_loops() -> None:
    term = make_term()
    student, teacher, batch = make_sides()
    mask = batch.student.attention_mask
    states = [h @ W for h, W in zip(student.hidden_states.values(), term.projection, strict=True)]
    goals = list(teacher.hidden_states.values())
    want = np.array([[naive_cost(s, t, mask) for t in goals] for s in states])
    found = cos_nce_costs(torch.stack(states), torch.stack(goals), mask)
    np.testing.assert_allclose(found.detach().numpy(), want, rtol=1e-10)
    flow = exact_flow(want, np.ones(2), np.ones(4))
    assert term(student, teacher, batch).item() == pytest.approx(2 * (flow * want).sum(), rel=1e-9)


def test_one_token_rows_are_the_formula_of_vectors() -> None:
    generator = torch.Generator().manual_seed(0)
    s, t = (torch.randn(1, 4, 1, 5, generator=generator, dtype=torch.float64) for _ in range(2))
    negatives = torch.stack([t[0, [b for b in range(4) if b != a], 0] for a in range(4)])
    want = cos_nce(s[0, :, 0], t[0, :, 0], negatives).mean()
    found = cos_nce_costs(s, t, torch.ones(4, 1).long())
    assert found.item() == pytest.approx(want.item(), rel=1e-12)


def test_gradient_reaches_states_and_projection_and_not_the_teacher() -> None:
    term = make_term()
    student, teacher, batch = make_sides()
    term(student, teacher, batch).backward()
    assert all(h.grad is not None and bool(h.grad.any()) for h in student.hidden_states.values())
    assert term.projection.grad is not None and bool((term.projection.grad != 0).any((1, 2)).all())
    assert all(h.grad is None for h in teacher.hidden_states.values())


def test_padding_counts_for_nothing() -> None:
    student, teacher, batch = make_sides()
    want = make_term()(student, teacher, batch).item()
    with torch.no_grad():
        for side in (student, teacher):
            for state in side.hidden_states.values():
                state[batch.student.attention_mask == 0] = 7.0
    assert make_term()(student, teacher, batch).item() == want


def test_masses_move_after_a_step_only() -> None:
    term = make_term()
    term(*make_sides())
    assert torch.unique(term.masses.teacher).numel() == 1
    term.after_step()
    assert torch.unique(term.masses.teacher).numel() > 1
    assert set(term.record()) == {"hidden_states"}
    still = make_term(update_masses=False)
    still(*make_sides())
    still.after_step()
    assert torch.unique(still.masses.teacher).numel() == 1


@pytest.mark.parametrize("temperature", [1.0, 5.0])
def test_masses_follow_the_temperature_that_is_set(temperature: float) -> None:
    """By rule A1: ``softmax(r / T_emd)`` with ``r_k = sum_l u_l / u_k``."""
    term = make_term(mass_rule="A1", mass_temperature=temperature)
    term(*make_sides())
    term.after_step()
    solved = term.record()["hidden_states"]
    moved = np.array(solved["flow"]) * np.array(solved["cost"])
    for axis, side, found in ((1, "student", term.masses.student), (0, "teacher", term.masses.teacher)):
        u = moved.sum(axis) / np.array(solved[f"{side}_masses"])
        want = np.exp(u.sum() / u / temperature)
        # The record has six digits.
        np.testing.assert_allclose(found[0].numpy(), want / want.sum(), rtol=1e-4)


def test_one_row_has_no_negatives() -> None:
    """Divided by nothing, the loss would be its positive part alone."""
    student, teacher, batch = make_sides()
    inputs = Inputs(batch.student.input_ids[:1], batch.student.attention_mask[:1], None)
    with pytest.raises(ValueError, match="at least two rows"):
        make_term()(student, teacher, Batch(inputs, inputs, batch.labels[:1], batch.row_ids[:1]))


def test_plan_is_lrc_bert_s() -> None:
    plan = build(AngularEMDSettings(), CONTEXT)
    first, second = plan.stages
    assert dict(first.weights) == {"layers": 1.0} and first.perturb
    assert dict(second.weights) == {"layers": 1.0, "soft": 1.0, "hard": 3.0} and second.start == 0.8
    assert plan.teacher_needs(first) == Needs(hidden_states=frozenset({1, 2, 3, 4}))
    (only,) = build(AngularEMDSettings(switch=0.0, perturbation="off"), CONTEXT).stages
    assert only.start == 0 and not only.perturb


@pytest.mark.parametrize("options", [{"switch": 1.0}, {"beta": 0.0, "gamma": 0.0}])
def test_a_head_that_nothing_trains_is_refused(options: dict[str, Any]) -> None:
    with pytest.raises(WrongInput, match="head would never be trained"):
        build(AngularEMDSettings(**options), CONTEXT)

"""BERT-EMD against its equations: golden numbers, naive loops, and what must hold for any input."""

import copy
import itertools
import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from rich.console import Console
from torch import Tensor

from stillroom.data.batching import Batch, Inputs
from stillroom.encoder import Needs, Outputs
from stillroom.methods.base import Context
from stillroom.methods.bert_emd import BertEMDSettings, LayerTransport, build
from stillroom.ops.attention import visible
from stillroom.ops.prediction import soft_cross_entropy
from stillroom.ops.transport import (
    LayerMasses,
    MassUpdate,
    exact_flow,
    raise_to_floor,
    squared_distances,
    transport_cost,
    unit_costs,
)
from stillroom.training.loop import train
from tiny import make_job

GOLDEN = {
    example["name"]: example
    for example in json.loads(
        (Path(__file__).parents[1] / "golden" / "bert_emd.json").read_text(encoding="utf-8")
    )["examples"]
}


def agrees(got: Any, want: Any, tolerance: float = 1e-9) -> bool:
    """Apply the golden file's own rule: ``|got - want| <= tolerance * (1 + |want|)``."""
    got, want = torch.as_tensor(got, dtype=torch.float64), torch.as_tensor(want, dtype=torch.float64)
    assert got.shape == want.shape
    return bool(((got - want).abs() <= tolerance * (1 + want.abs())).all())


def masses_for(shape: tuple[int, ...], *, coupled: bool = False, **given: Any) -> LayerMasses:
    P, L, M = shape
    update = MassUpdate(
        given.get("rule", "B"), given.get("temperature", 1.0), given.get("floor", 1e-12), coupled
    )
    return LayerMasses([str(p) for p in range(P)], L, M, update).double()


# Golden numbers


def test_golden_two_by_three() -> None:
    example = GOLDEN["T1_two_by_three"]
    D, want = np.array(example["inputs"]["D"]), example["expected"]
    flow = exact_flow(D, np.ones(2), np.ones(3))
    assert agrees(flow, want["flow"]) and agrees((flow * D).sum(), want["emd"])
    u_S = unit_costs(flow, D, np.full(2, 1 / 2), axis=1)
    u_T = unit_costs(flow, D, np.full(3, 1 / 3), axis=0)
    assert agrees(u_S, want["u_S"]) and agrees(u_T, want["u_T"])
    assert agrees(u_S.sum() / u_S, want["r_S"]) and agrees(u_T.sum() / u_T, want["r_T"])
    rules: list[tuple[dict[str, Any], str, str]] = [({"rule": "B"}, "w_S_next", "w_T_next")]
    for temperature, rule in itertools.product((1, 5), ("A1", "A2")):
        want |= {f"{temperature}{key}": value for key, value in want[f"T_emd_{temperature}"].items()}
        names = f"{temperature}{rule}_w_S", f"{temperature}{rule}_w_T"
        rules.append(({"rule": rule, "temperature": temperature}, *names))
    for given, student, teacher in rules:
        masses = masses_for((1, 2, 3), **given)
        masses.flows(torch.from_numpy(D[None]))
        masses.advance()
        assert agrees(masses.student[0], want[student]), given
        assert agrees(masses.teacher[0], want[teacher]), given


def test_golden_four_by_twelve_over_three_steps() -> None:
    example = GOLDEN["T2_four_by_twelve"]
    D, want = torch.tensor(example["inputs"]["D"], dtype=torch.float64), example["expected"]
    masses = masses_for((1, 4, 12))
    for step in (1, 2, 3):
        expected = want[f"step_{step}"]
        # They start in float32, and sum to 1 only to its rounding.
        student, teacher = ((x[0] / x[0].sum()).numpy() for x in (masses.student, masses.teacher))
        flow = masses.flows(D[None])[0]
        assert agrees(flow, expected["flow"]) and int((flow > 1e-12).sum()) == expected["nonzeros"]
        assert agrees((flow * D).sum(), expected["emd"])
        assert agrees(unit_costs(flow.numpy(), D.numpy(), student, axis=1), expected["u_S"])
        assert agrees(unit_costs(flow.numpy(), D.numpy(), teacher, axis=0), expected["u_T"])
        masses.advance()
        assert agrees(masses.student[0], expected["w_S_next"])
        assert agrees(masses.teacher[0], expected["w_T_next"])
    for rule in ("A1", "A2"):
        masses = masses_for((1, 4, 12), rule=rule)
        masses.flows(D[None])
        masses.advance()
        assert agrees(masses.student[0], want["after_step_1"][f"{rule}_w_S"])
        assert agrees(masses.teacher[0], want["after_step_1"][f"{rule}_w_T"])


@pytest.mark.parametrize("name", ["T3_coupled", "T3_separate"])
def test_golden_two_problems_over_two_steps(name: str) -> None:
    example = GOLDEN[name]
    masses = masses_for((2, 2, 3), coupled=example["parameters"]["coupled"])
    steps = zip(example["inputs"]["D_att"], example["inputs"]["D_hid"], strict=True)
    for number, costs in enumerate(steps, start=1):
        D = torch.tensor(costs, dtype=torch.float64)
        loss = (masses.flows(D) * D).sum((1, 2))
        masses.advance()
        for p, problem in enumerate(("att", "hid")):
            want = example["expected"][f"step_{number}"][problem]
            assert agrees(loss[p], want["loss"])
            assert agrees(masses.student[p], want["w_S_next"])
            assert agrees(masses.teacher[p], want["w_T_next"])


def test_golden_masked_scores_and_their_gradient() -> None:
    example = GOLDEN["T4_clamp_and_gradient"]
    want = example["expected"]
    student = torch.tensor(example["inputs"]["student_scores"], dtype=torch.float64, requires_grad=True)
    teacher = torch.tensor(example["inputs"]["teacher_scores"], dtype=torch.float64)
    # Squares of 1e4 leave the product less than the file's tolerance.
    assert agrees(squared_distances(student, teacher) / 4, want["D_without_clamp"], tolerance=1e-7)
    s, t = visible(student), visible(teacher)
    squares = squared_distances(s, t)
    assert agrees(squares / 4, want["D"])
    flow = torch.from_numpy(exact_flow(squares.numpy() / 4, np.ones(2), np.ones(2)))
    assert agrees(flow, want["flow"])
    loss = transport_cost(s, t, flow, squares) / 4
    loss.backward()
    assert agrees(loss.detach(), want["loss"])
    assert agrees(student.grad, want["grad_student_scores"])


def test_golden_layer_that_costs_nothing_keeps_its_mass() -> None:
    example = GOLDEN["T5_perfect_layer"]
    D, want = np.array(example["inputs"]["D"]), example["expected"]
    flow = exact_flow(D, np.ones(2), np.ones(2))
    assert agrees(flow, want["flow"]) and agrees((flow * D).sum(), want["emd"])
    assert agrees(unit_costs(flow, D, np.full(2, 0.5), axis=1), want["u_S"])
    # The example's floor is absolute, ours relative to the largest unit cost, 0.5.
    floor = example["parameters"]["floor"] / 0.5
    assert raise_to_floor(np.array(want["u_S"]), floor)[1]
    masses = masses_for((1, 2, 2), floor=floor)
    masses.flows(torch.from_numpy(D[None]))
    masses.advance()
    assert agrees(masses.student[0], want["B_with_floor"])


@pytest.mark.parametrize("name", ["T6_prediction_T_1", "T6_prediction_T_3"])
def test_golden_soft_labels(name: str) -> None:
    example = GOLDEN[name]
    T, want = example["parameters"]["temperature"], example["expected"]
    z_S, z_T = (
        torch.tensor(example["inputs"][f"{who}_logits"], dtype=torch.float64)
        for who in ("student", "teacher")
    )
    official = soft_cross_entropy(z_S, z_T, temperature=T, mean_over_classes=True)
    assert agrees(official, want["official"])
    assert agrees(official / T**2, want["tinybert"])
    assert agrees(soft_cross_entropy(z_S, z_T, temperature=T), want["per_sample_ce"])


# The term against loops


def make_sides(
    L: int = 2, M: int = 4, D: int = 3, E: int = 5, lengths: tuple[int, ...] = (4, 2), seed: int = 0
) -> tuple[Outputs, Outputs, Batch]:
    """Return random float64 states and scores, with -1e4 on padded keys as transformers has it."""
    generator = torch.Generator().manual_seed(seed)
    B, S, H = len(lengths), max(lengths), 2
    mask = (torch.arange(S) < torch.tensor(lengths)[:, None]).long()

    def side(depth: int, width: int) -> Outputs:
        def draw(*shape: int) -> Tensor:
            return torch.randn(*shape, generator=generator, dtype=torch.float64).requires_grad_()

        masked = -1e4 * (1 - mask)[:, None, None]
        return Outputs(
            draw(B, 2),
            {i: draw(B, S, width) for i in range(depth + 1)},
            attention_scores={i: draw(B, H, S, S) + masked for i in range(1, depth + 1)},
        )

    inputs = Inputs(mask, mask, None)
    batch = Batch(inputs, inputs, torch.zeros(B, dtype=torch.int64), torch.arange(B))
    return side(L, D), side(M, E), batch


def make_term(**options: Any) -> LayerTransport:
    context = Context("classification", 2, 8, 2, 3, 4, 5)
    torch.manual_seed(0)
    return LayerTransport(BertEMDSettings(**options), context).double()


def naive(
    term: LayerTransport, student: Outputs, teacher: Outputs, mask: Tensor, *, masked: bool, theta: float
) -> float:
    """Return the loss from loops over pairs of layers, rows, heads and positions."""
    W, b = term.projection.weight.tolist(), term.projection.bias.tolist()
    rows = [(r, p) for r in range(len(mask)) for p in range(mask.shape[1]) if mask[r, p] or not masked]

    def projected(h: list[float]) -> list[float]:
        return [sum(w * x for w, x in zip(row, h, strict=True)) + c for row, c in zip(W, b, strict=True)]

    def state_cost(s: Tensor, t: Tensor) -> float:
        total = 0.0
        for r, p in rows:
            pair = zip(projected(s[r, p].tolist()), t[r, p].tolist(), strict=True)
            total += sum((x - y) ** 2 for x, y in pair)
        return total / (len(rows) * len(b))

    def score_cost(s: Tensor, t: Tensor) -> float:
        total, count = 0.0, 0
        for r, q in rows:
            for head in range(s.shape[1]):
                for k in range(mask.shape[1]):
                    if masked and not mask[r, k]:
                        continue
                    x, y = s[r, head, q, k].item(), t[r, head, q, k].item()
                    total += ((0 if x <= -100 else x) - (0 if y <= -100 else y)) ** 2
                    count += 1
        return total / count

    def emd(cost: list[list[float]]) -> float:
        D = np.array(cost)
        return float((exact_flow(D, np.ones(len(D)), np.ones(len(D[0]))) * D).sum())

    S_H, T_H = student.hidden_states, teacher.hidden_states
    S_A, T_A = student.attention_scores, teacher.attention_scores
    hidden = emd([[state_cost(S_H[i], T_H[j]) for j in (1, 2, 3, 4)] for i in (1, 2)])
    attention = emd([[score_cost(S_A[i], T_A[j]) for j in (1, 2, 3, 4)] for i in (1, 2)])
    return theta * (attention + hidden) + state_cost(S_H[0], T_H[0])


@pytest.mark.parametrize("padding", ["all", "masked"])
@pytest.mark.parametrize("theta", [1.0, 0.25])
def test_term_equals_loops_over_everything(padding: str, theta: float) -> None:
    term = make_term(padding=padding, theta=theta)
    student, teacher, batch = make_sides()
    mask = batch.student.attention_mask
    want = naive(term, student, teacher, mask, masked=padding == "masked", theta=theta)
    assert term(student, teacher, batch).item() == pytest.approx(want, rel=1e-9)


@pytest.mark.parametrize("padding", ["all", "masked"])
def test_gradient_of_the_term_is_the_change_of_the_loss(padding: str) -> None:
    """Flows are solved again at the moved states: what is left out of the graph does not matter."""
    term = make_term(padding=padding)
    student, teacher, batch = make_sides()
    moved = [*term.parameters(), *student.hidden_states.values()]
    gradients = torch.autograd.grad(term(student, teacher, batch), moved)
    generator = torch.Generator().manual_seed(1)
    steps = [1e-6 * torch.randn(x.shape, generator=generator, dtype=torch.float64) for x in moved]
    values = []
    with torch.no_grad():
        for sign in (1, -2):
            for x, step in zip(moved, steps, strict=True):
                x += sign * step
            values.append(term(student, teacher, batch).item())
    slope = sum((g * s).sum().item() for g, s in zip(gradients, steps, strict=True))
    assert (values[0] - values[1]) / 2 == pytest.approx(slope, rel=1e-6)


def test_gradient_reaches_the_map_and_every_student_layer_and_nothing_else() -> None:
    term = make_term()
    student, teacher, batch = make_sides()
    leaves = [*student.hidden_states.values(), *term.parameters()]
    gradients = torch.autograd.grad(
        term(student, teacher, batch), [*leaves, *student.attention_scores.values()], retain_graph=True
    )
    assert all(g.abs().max() > 1e-6 for g in gradients)
    theirs = [*teacher.hidden_states.values(), *teacher.attention_scores.values()]
    found = torch.autograd.grad(term(student, teacher, batch), theirs, allow_unused=True)
    assert [g is not None and bool(g.any()) for g in found] == [False] * len(theirs)
    assert not any(buffer.requires_grad for buffer in term.buffers())
    assert {name for name, _ in term.named_buffers()} == {"masses.student", "masses.teacher"}


def test_masked_padding_counts_for_nothing() -> None:
    student, teacher, batch = make_sides()
    pads = batch.student.attention_mask == 0
    want = [make_term(padding=padding)(student, teacher, batch).item() for padding in ("masked", "all")]
    with torch.no_grad():
        for side in (student, teacher):
            for state in side.hidden_states.values():
                state[pads] = 7.0
            for scores in side.attention_scores.values():
                scores.transpose(1, 2)[pads] += 3.0 * torch.arange(4)
    found = [make_term(padding=padding)(student, teacher, batch).item() for padding in ("masked", "all")]
    assert found[0] == want[0] and found[1] != want[1]


def test_any_way_of_masking_keys_gives_the_same_loss() -> None:
    student, teacher, batch = make_sides()
    want = make_term()(student, teacher, batch).item()
    least = torch.finfo(torch.float32).min
    sides = [
        Outputs(
            side.logits,
            side.hidden_states,
            attention_scores={
                i: scores.masked_fill(scores < -100, least) for i, scores in side.attention_scores.items()
            },
        )
        for side in (student, teacher)
    ]
    assert make_term()(*sides, batch).item() == want


def test_map_starts_without_turning_anything() -> None:
    alike = LayerTransport(BertEMDSettings(), Context("classification", 2, 8, 2, 5, 4, 5)).projection
    assert torch.equal(alike.weight, torch.eye(5)) and not alike.bias.any()
    W = make_term().projection.weight
    torch.testing.assert_close(W.T @ W, torch.eye(3, dtype=torch.float64), rtol=0, atol=1e-6)


# Masses as state


def test_masses_move_after_a_step_and_survive_saving(tmp_path: Path) -> None:
    term, other = make_term(), make_term()
    sides = make_sides()
    before = {name: value.clone() for name, value in term.state_dict().items()}
    term(*sides)
    assert all(torch.equal(value, before[name]) for name, value in term.state_dict().items())
    term.after_step()
    moved = {name for name, value in term.state_dict().items() if not torch.equal(value, before[name])}
    assert moved == {"masses.student", "masses.teacher"}
    # Two runs in one process share nothing.
    assert all(torch.equal(value, before[name]) for name, value in other.state_dict().items())
    other.load_state_dict(copy.deepcopy(term.state_dict()))
    assert other(*sides).item() == term(*sides).item()


def test_evaluation_leaves_the_masses_alone() -> None:
    term = make_term().eval()
    before = term.masses.student.clone()
    term(*make_sides())
    term.after_step()
    assert torch.equal(term.masses.student, before)


@pytest.mark.parametrize(
    ("options", "moves", "alike"),
    [({}, True, True), ({"coupling": "separate"}, True, False), ({"update_masses": False}, False, True)],
)
def test_masses_move_as_told(options: dict[str, Any], moves: bool, alike: bool) -> None:
    term = make_term(**options)
    term(*make_sides())
    term.after_step()
    student = term.masses.student
    assert (not torch.allclose(student, torch.full_like(student, 0.5))) == moves
    assert torch.equal(student[0], student[1]) == alike


def masses_by_hand(problem: dict[str, Any], temperature: float) -> tuple[list[float], list[float]]:
    """Return what rule A1 makes of one problem's record: ``softmax(r / T_emd)`` of both sides."""
    F, D = problem["flow"], problem["cost"]
    L, M = len(D), len(D[0])
    w_S, w_T = problem["student_masses"], problem["teacher_masses"]
    u_S = [sum(F[i][j] * D[i][j] for j in range(M)) / w_S[i] for i in range(L)]
    u_T = [sum(F[i][j] * D[i][j] for i in range(L)) / w_T[j] for j in range(M)]
    r_S, r_T = ([sum(u) / x for x in u] for u in (u_S, u_T))
    return softmax([x / temperature for x in r_S]), softmax([x / temperature for x in r_T])


def softmax(values: list[float]) -> list[float]:
    total = sum(map(math.exp, values))
    return [math.exp(value) / total for value in values]


@pytest.mark.parametrize("coupling", ["coupled", "separate"])
@pytest.mark.parametrize("rule", ["A1", "A2"])
@pytest.mark.parametrize("temperature", [1.0, 5.0])
def test_masses_follow_the_rule_and_temperature_that_are_set(
    temperature: float, rule: str, coupling: str
) -> None:
    """A2's second softmax is of the mean, where both problems share one."""
    term = make_term(mass_rule=rule, mass_temperature=temperature, coupling=coupling)
    term(*make_sides())
    term.after_step()
    record = term.record()
    problems = [masses_by_hand(record[name], temperature) for name in ("attention", "hidden_states")]
    for side, found in enumerate((term.masses.student, term.masses.teacher)):
        want = [problem[side] for problem in problems]
        if coupling == "coupled":
            want = [[sum(pair) / 2 for pair in zip(*want, strict=True)]] * 2
        if rule == "A2":
            want = [softmax(masses) for masses in want]
        for p in (0, 1):
            # The record has six digits.
            assert found[p].tolist() == pytest.approx(want[p], rel=1e-4)


def test_the_log_holds_flows_and_masses(tmp_path: Path) -> None:
    job = make_job(tmp_path, method="bert-emd", count=16, epochs=1)
    train(job, Console(quiet=True))
    lines = [json.loads(line) for line in (tmp_path / "log.jsonl").read_text().splitlines()]
    steps = [line for line in lines if "loss" in line]
    assert len(steps) == 2
    for line in steps:
        assert set(line["record"]) == {"layers"}
        found = line["record"]["layers"]
        assert set(found) == {"attention", "hidden_states"}
        for problem in found.values():
            flow = np.array(problem["flow"])
            assert flow.shape == (2, 4)
            np.testing.assert_allclose(flow.sum(1), problem["student_masses"], atol=1e-5)
            np.testing.assert_allclose(flow.sum(0), problem["teacher_masses"], atol=1e-5)
        emds = sum(problem["emd"] for problem in found.values())
        # What is left is the embedding loss.
        assert line["layers"] > emds > 0
    first, second = (line["record"]["layers"]["attention"] for line in steps)
    assert first["student_masses"] == [0.5, 0.5] != second["student_masses"]


# The plan


def test_needs_are_every_layer_and_the_embeddings() -> None:
    term = make_term()
    blocks = frozenset({1, 2})
    assert term.student_needs == Needs(hidden_states=blocks | {0}, attention_scores=blocks, padding=True)
    blocks = frozenset({1, 2, 3, 4})
    whole = Needs(hidden_states=blocks | {0}, attention_scores=blocks)
    # What padding counts in cannot be recorded row by row.
    assert term.teacher_needs == whole | Needs(padding=True)
    assert make_term(padding="masked").teacher_needs == whole
    assert term.same_tokens and term.same_heads


@pytest.mark.parametrize(
    ("options", "weights"),
    [
        ({}, {"soft": 1.0, "layers": 0.01}),
        ({"alpha": 0.0, "beta": 0.5}, {"hard": 1.0, "layers": 0.5}),
        ({"alpha": 0.25}, {"soft": 0.25, "hard": 0.75, "layers": 0.01}),
    ],
)
def test_weights_are_those_of_the_equation(options: dict[str, Any], weights: dict[str, float]) -> None:
    plan = build(BertEMDSettings(**options), Context("classification", 2, 8, 2, 3, 4, 5))
    (stage,) = plan.stages
    assert dict(stage.weights) == weights and set(plan.terms) == set(weights)
    # The losses on the logits come first: they are under way when the transport waits.
    assert list(stage.weights)[-1] == "layers"


@pytest.mark.parametrize("kind", ["classification", "regression", "multi-label"])
@pytest.mark.parametrize("reduction", ["official", "per_sample"])
def test_soft_loss_is_the_one_that_is_set(kind: Any, reduction: str) -> None:
    C = 1 if kind == "regression" else 3
    plan = build(BertEMDSettings(reduction=reduction, temperature=2.0), Context(kind, C, 8, 2, 3, 4, 5))
    z = torch.randn(2, 4, C, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    _, _, batch = make_sides()
    found = plan.terms["soft"](Outputs(z[0]), Outputs(z[1]), batch)
    whole = soft_cross_entropy(z[0], z[1], temperature=2.0, kind=kind)
    share = C if reduction == "official" and kind != "regression" else 1
    assert found.item() == pytest.approx(whole.item() / share, rel=1e-12)

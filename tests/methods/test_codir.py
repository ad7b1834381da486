"""CoDIR against its equations: golden numbers, naive loops, draws, and what moves the banks when."""

import copy
import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from rich.console import Console
from torch import Tensor

from stillroom import encoder
from stillroom.data.batching import Batch, Inputs
from stillroom.encoder import Needs, Outputs, pool
from stillroom.errors import WrongInput
from stillroom.methods.base import Context, Perturbation, Plan, Stage
from stillroom.methods.codir import (
    CoDIRSettings,
    PooledContrast,
    build,
    draw_outside,
    draws_needed,
    excluded_blocks,
    nce_official,
)
from stillroom.ops.info_nce import info_nce
from stillroom.ops.prediction import hard_label_loss, soft_label_loss
from stillroom.training.distiller import Distiller
from stillroom.training.loop import train
from stillroom.training.schedule import Schedule
from tiny import make_batch_of, make_job

GOLDEN = {
    example["name"]: example
    for example in json.loads(
        (Path(__file__).parents[1] / "golden" / "codir.json").read_text(encoding="utf-8")
    )["examples"]
}
QUIET = Console(quiet=True)
LABELS = np.array([0, 1, 0, 1, 1, 2, 0, 2])


def golden(name: str) -> tuple[dict[str, Tensor], dict[str, Any], dict[str, Any]]:
    """Return an example's inputs as float64 tensors, what is expected, and its parameters."""
    example = GOLDEN[name]
    inputs = {key: torch.tensor(value, dtype=torch.float64) for key, value in example["inputs"].items()}
    return inputs, example["expected"], example["parameters"]


def agrees(got: Any, want: Any, tolerance: float = 1e-9) -> bool:
    """Apply the golden file's own rule: ``|got - want| <= tolerance * (1 + |want|)``."""
    got, want = torch.as_tensor(got, dtype=torch.float64), torch.as_tensor(want, dtype=torch.float64)
    assert got.shape == want.shape
    return bool(((got - want).abs() <= tolerance * (1 + want.abs())).all())


def random(*shape: int, seed: int = 0) -> Tensor:
    """Return standard normal numbers in float64."""
    return torch.from_numpy(np.random.default_rng([seed, *shape]).standard_normal(shape))


def units(*shape: int, seed: int = 0) -> Tensor:
    return torch.nn.functional.normalize(random(*shape, seed=seed), dim=-1)


def batch_of(row_ids: list[int], mask: Tensor | None = None) -> Batch:
    """Return a batch whose tokens do not matter."""
    mask = torch.ones(len(row_ids), 1, dtype=torch.int64) if mask is None else mask
    inputs = Inputs(torch.zeros_like(mask), mask, None)
    labels = torch.from_numpy(LABELS)[row_ids] if max(row_ids) < len(LABELS) else torch.tensor(row_ids)
    return Batch(inputs, inputs, labels, torch.tensor(row_ids))


def outputs_of(states: Tensor, mask: Tensor | None = None, how: Any = "mean") -> Outputs:
    """Return the pooled states of layers 1, 2, ... of ``states[0], states[1], ...``."""
    mask = torch.ones(states.shape[1:3]) if mask is None else mask
    return Outputs(
        torch.empty(0), pooled_states={(how, i + 1): pool(s, mask, how) for i, s in enumerate(states)}
    )


def context_of(kind: Any = "classification", labels: np.ndarray = LABELS, **sizes: int) -> Context:
    given = {"student_depth": 2, "student_width": 3, "teacher_depth": 4, "teacher_width": 5, **sizes}
    return Context(kind, 3, len(labels), labels=labels, **given)


def make_term(context: Context | None = None, **options: Any) -> PooledContrast:
    """Return the term of a plan in float64, in training mode."""
    options = {"bank_negatives": 2, "dimension": 4, **options}
    torch.manual_seed(0)
    term = build(CoDIRSettings(**options), context or context_of()).terms["contrast"].double()
    assert isinstance(term, PooledContrast)
    return term


def banks(term: PooledContrast) -> dict[str, Tensor]:
    return {name: value.clone() for name, value in term.state_dict().items() if "bank" in name}


STATES = random(2, 3, 2, 3)
GOALS = random(4, 3, 2, 5, seed=1)


# Golden examples


def test_golden_pooling_and_projection() -> None:
    given, expected, _ = golden("G1_pooling")
    hidden, mask = given["hidden"], given["mask"]
    for how, key in (("mean", "masked_mean"), ("unmasked_mean", "unmasked_mean"), ("cls", "cls")):
        joined = torch.cat(list(pool(hidden, mask, how)), dim=-1)  # type: ignore[arg-type]
        assert agrees(joined, expected[key])
    term = make_term(context_of(student_width=2), dimension=2)
    with torch.no_grad():
        term.student_projection.weight.copy_(given["W"])
        term.student_projection.bias.copy_(given["b"])
    found = term._vector(outputs_of(hidden, mask), (1, 2), term.student_projection)
    assert agrees(found.detach(), expected["normalised"])


def test_golden_info_nce() -> None:
    given, expected, _ = golden("G2_infonce")
    one = given["student"][None], given["positive"][None], given["negatives"][None]
    for tau, want in expected["loss_by_tau"].items():
        assert agrees(info_nce(*one, temperature=float(tau)), [want])
        found = info_nce(*(x.float() for x in one), temperature=float(tau))
        assert agrees(found, [want], 1e-5)
    same = given["student"].expand(1, 3, 2)
    found = info_nce(one[0], one[0], same, temperature=0.07)
    assert agrees(found, [expected["loss_all_scores_equal"]])


@pytest.mark.parametrize("tau", ["0.07", "0.5"])
def test_golden_official_nce(tau: str, monkeypatch: pytest.MonkeyPatch) -> None:
    given, expected, parameters = golden(f"G3_nce_official_tau_{tau}")
    labels = np.array([0, 1, 2, 2, 2, 2])
    options = {"tau": parameters["tau"], "momentum": parameters["momentum"], "dimension": 2}
    term = make_term(context_of(labels=labels), loss="nce_official", bank_negatives=1, **options)
    term.student_bank.copy_(given["bank_S"])
    term.teacher_bank.copy_(given["bank_T"])
    index, z = given["index"].long(), {"S": given["z_S"], "T": given["z_T"]}
    monkeypatch.setattr(term, "draw", lambda rows: index[:, 1:])
    monkeypatch.setattr(
        term, "_vector", lambda outputs, layers, p: z["S" if p is term.student_projection else "T"]
    )
    empty, batch = Outputs(torch.empty(0)), batch_of([0, 1])
    assert agrees(term(empty, empty, batch), expected["loss"])
    assert agrees(term.normalisers, [expected["Z_S"], expected["Z_T"]])
    term.after_step()
    assert agrees(term.student_bank[:2], expected["bank_S_rows_0_1"])
    assert agrees(term.teacher_bank[:2], expected["bank_T_rows_0_1"])
    assert agrees(term(empty, empty, batch), expected["second_loss"])
    # Set once, and no more.
    assert agrees(term.normalisers, [expected["Z_S"], expected["Z_T"]])


@pytest.mark.parametrize("tau", ["0.07", "0.5"])
def test_golden_official_nce_of_each_direction(tau: str) -> None:
    given, expected, parameters = golden(f"G3_nce_official_tau_{tau}")
    index = given["index"].long()
    for side, other in (("S", "T"), ("T", "S")):
        cosines = torch.einsum("bd,bkd->bk", given[f"z_{side}"], given[f"bank_{other}"][index])
        Z = torch.as_tensor(expected[f"Z_{side}"], dtype=torch.float64)
        found = nce_official((cosines / parameters["tau"]).exp(), Z, 6).mean()
        assert agrees(found, expected[f"loss_{side}"])


def test_golden_total() -> None:
    given, expected, parameters = golden("G4_total")
    labels, T, beta = given["labels"].long(), parameters["temperature"], parameters["beta"]
    logits = given["student_logits"], given["teacher_logits"]
    hard = hard_label_loss(logits[0], labels, kind="classification")
    soft = soft_label_loss(*logits, temperature=T)
    assert agrees(hard, np.mean(expected["ce"])) and agrees(soft, expected["kd_mean"])
    # The plan's own weights, in the paper's form and in that of the official code.
    w, B = parameters["crd_weight"], len(labels)
    forms = {
        "paper_form": (parameters["alpha1"], parameters["alpha2"], 1.0),
        "official_over_B": (beta / (1 - beta), w / (B * (1 - beta)), 1 - beta),
    }
    for name, (alpha1, alpha2, scale) in forms.items():
        settings = CoDIRSettings(alpha1=alpha1, alpha2=alpha2, bank_negatives=2)
        weights = build(settings, context_of()).stages[0].weights
        total = weights["hard"] * hard + weights["soft"] * soft + weights["contrast"] * given["crd"]
        assert agrees(scale * total, expected[name])


def test_golden_regression_does_not_broadcast() -> None:
    given, expected, _ = golden("G5_regression_broadcast")
    found = soft_label_loss(
        given["student"][:, None], given["teacher"][:, None], temperature=2.0, kind="regression"
    )
    assert agrees(found * 3, expected["correct"])


# Naive loops


@pytest.mark.parametrize("tau", [0.07, 0.7])
def test_info_nce_equals_the_loop(tau: float) -> None:
    a, p, n = units(3, 4), units(3, 4, seed=1), units(3, 5, 4, seed=2)
    for b in range(3):
        up = math.exp(sum(x * y for x, y in zip(a[b].tolist(), p[b].tolist(), strict=True)) / tau)
        down = sum(
            math.exp(sum(x * y for x, y in zip(a[b].tolist(), row, strict=True)) / tau)
            for row in n[b].tolist()
        )
        found = info_nce(a, p, n, temperature=tau)[b].item()
        assert found == pytest.approx(-math.log(up / (up + down)), rel=1e-12)


def naive_vector(states: Tensor, linear: torch.nn.Linear, mask: Tensor, row: int) -> list[float]:
    """Return a row's unit vector, from masked means of its tokens, in Python floats."""
    joined: list[float] = []
    for layer in states.tolist():
        real = [token for token, here in zip(layer[row], mask[row].tolist(), strict=True) if here]
        joined += [sum(column) / len(real) for column in zip(*real, strict=True)]
    z = [
        sum(w * x for w, x in zip(weights, joined, strict=True)) + b
        for weights, b in zip(linear.weight.tolist(), linear.bias.tolist(), strict=True)
    ]
    length = math.sqrt(sum(x * x for x in z))
    return [x / length for x in z]


@pytest.mark.parametrize("direction", ["student_anchor", "teacher_anchor", "symmetric"])
def test_term_equals_the_loop(direction: str) -> None:
    term = make_term(direction=direction, tau=0.3)
    mask, rows = torch.tensor([[1, 1], [1, 0], [1, 1]]), [0, 3, 7]
    torch.manual_seed(1)
    drawn = term.draw(torch.tensor(rows)).tolist()
    torch.manual_seed(1)
    found = term(outputs_of(STATES, mask), outputs_of(GOALS, mask), batch_of(rows, mask)).item()
    losses = []
    for b in range(3):
        s = naive_vector(STATES, term.student_projection, mask, b)
        t = naive_vector(GOALS, term.teacher_projection, mask, b)
        pairs = {"student_anchor": [(s, t, "teacher_bank")], "teacher_anchor": [(t, s, "student_bank")]}
        chosen = pairs.get(direction) or [pair for each in pairs.values() for pair in each]
        for anchor, positive, bank in chosen:
            candidates = [positive, *(getattr(term, bank)[k].tolist() for k in drawn[b])]
            scores = [
                math.exp(sum(x * y for x, y in zip(anchor, c, strict=True)) / 0.3) for c in candidates
            ]
            losses.append(-math.log(scores[0] / sum(scores)))
    assert found == pytest.approx(sum(losses) / len(losses), rel=1e-12)


def test_official_replaces_a_positive_of_zero() -> None:
    scores = torch.tensor([[0.0, 1.0]], dtype=torch.float64)
    # K/N = 0.5: log(1e-7 / (1e-7 + 0.5 + 1e-7)) + log(0.5 / (1 + 0.5 + 1e-7))
    want = -(math.log(1e-7 / (0.5 + 2e-7)) + math.log(0.5 / (1.5 + 1e-7)))
    assert nce_official(scores, torch.tensor(1.0), 2).item() == pytest.approx(want, rel=1e-12)


# Gradients


def test_gradcheck_of_info_nce() -> None:
    n = units(2, 3, 4, seed=2)
    given = random(2, 4).requires_grad_(), random(2, 4, seed=1).requires_grad_()
    assert torch.autograd.gradcheck(lambda a, p: info_nce(a, p, n, temperature=0.5), given)


@pytest.mark.parametrize("options", [{}, {"direction": "symmetric"}, {"loss": "nce_official"}])
def test_gradcheck_of_the_term_and_who_gets_gradient(options: dict[str, Any]) -> None:
    term = make_term(tau=0.5, **options).eval()
    goals, rows = outputs_of(GOALS), [0, 3, 7]

    def loss(states: Tensor) -> Tensor:
        torch.manual_seed(0)
        if options.get("loss"):
            term.normalisers.fill_(3.0)
        return term(outputs_of(states), goals, batch_of(rows))

    assert torch.autograd.gradcheck(loss, STATES.clone().requires_grad_())
    loss(STATES).backward()
    for p in term.parameters():
        assert p.grad is not None and bool(p.grad.any())


# Draws


def test_draws_have_another_label_and_are_different() -> None:
    for delta, keys in ((0.0, LABELS), (0.5, np.array([0.1, 0.4, 2.0, 1.2, 1.0, 0.0, 3.0]))):
        order, start, length = (torch.from_numpy(x) for x in excluded_blocks(keys, delta))
        rows = torch.arange(len(keys)).repeat(200)
        drawn = order[draw_outside(start[rows], length[rows], len(keys), 2, 100)]
        for row in range(len(keys)):
            found = drawn[rows == row]
            far = {j for j in range(len(keys)) if abs(float(keys[j] - keys[row])) > delta}
            assert set(found.flatten().tolist()) == far
            assert (found[:, 0] != found[:, 1]).all()


def test_draws_are_uniform_over_pairs() -> None:
    """4 rows to draw from: each of the 12 ordered pairs has the same chance."""
    torch.manual_seed(0)
    n = 60_000
    start, length = torch.full((n,), 1), torch.full((n,), 2)
    drawn = draw_outside(start, length, 6, 2, draws_needed(2, 4))
    counts = torch.bincount(drawn[:, 0] * 6 + drawn[:, 1], minlength=36)
    assert set(counts.nonzero().flatten().tolist()) == {
        a * 6 + b for a in (0, 3, 4, 5) for b in (0, 3, 4, 5) if a != b
    }
    # 5000 expected, standard deviation 68.
    assert (counts[counts > 0] - 5000).abs().max() < 5 * 68


@pytest.mark.parametrize(("count", "pool_size"), [(1, 2), (5, 6), (100, 101), (100, 400), (100, 60_000)])
def test_enough_draws_are_made(count: int, pool_size: int) -> None:
    torch.manual_seed(0)
    zero = torch.zeros(500, dtype=torch.int64)
    drawn = draw_outside(zero, zero, pool_size, count, draws_needed(count, pool_size))
    assert all(len(set(row)) == count for row in drawn.tolist())
    assert int(drawn.min()) >= 0 and int(drawn.max()) < pool_size


def test_any_draws_every_other_row_and_never_the_anchor() -> None:
    term = make_term(negatives="any", bank_negatives=6)
    drawn = term.draw(torch.arange(8).repeat(50)).view(50, 8, 6)
    for row in range(8):
        assert set(drawn[:, row].flatten().tolist()) == set(range(8)) - {row}


# The banks


def step(term: PooledContrast, rows: list[int], *, seed: int = 0) -> None:
    count = len(rows)
    student, teacher = random(2, count, 2, 3, seed=seed), random(4, count, 2, 5, seed=seed + 1)
    term(outputs_of(student), outputs_of(teacher), batch_of(rows))


def test_banks_start_uniform_with_an_expected_norm_of_one() -> None:
    labels = np.arange(4000) % 2
    bank = make_term(context_of(labels=labels), dimension=12).teacher_bank
    assert bank.abs().max() <= 0.5 and bank.abs().max() > 0.499
    assert bank.square().sum(1).mean().item() == pytest.approx(1, abs=0.02)
    assert not hasattr(make_term(), "student_bank")


def test_rows_move_by_the_momentum_and_become_unit_vectors() -> None:
    term = make_term(direction="symmetric", momentum=0.25)
    old = banks(term)
    s = term._vector(outputs_of(STATES), term.student_layers, term.student_projection).detach()
    t = term._vector(outputs_of(GOALS), term.teacher_layers, term.teacher_projection).detach()
    term(outputs_of(STATES), outputs_of(GOALS), batch_of([5, 0, 2]))
    assert all(torch.equal(value, old[name]) for name, value in banks(term).items())
    term.after_step()
    for name, z in (("student_bank", s), ("teacher_bank", t)):
        new = banks(term)[name]
        for b, row in enumerate([5, 0, 2]):
            mixed = 0.25 * old[name][row] + 0.75 * z[b]
            torch.testing.assert_close(new[row], mixed / mixed.norm(), rtol=1e-12, atol=0)
        rest = [1, 3, 4, 6, 7]
        assert torch.equal(new[rest], old[name][rest])
    new = banks(term)
    term.after_step()
    assert all(torch.equal(value, new[name]) for name, value in banks(term).items())


def test_all_batches_of_an_accumulated_step_move_their_rows() -> None:
    apart, together = make_term(), make_term()
    for rows in ([0, 3], [5, 1]):
        step(apart, rows)
        apart.after_step()
        step(together, rows)
    together.after_step()
    assert torch.equal(apart.teacher_bank, together.teacher_bank)
    assert (together.teacher_bank[[0, 3, 5, 1]].norm(dim=1) - 1).abs().max() < 1e-12


def test_evaluation_moves_nothing() -> None:
    term = make_term(loss="nce_official").eval()
    old = copy.deepcopy(term.state_dict())
    step(term, [0, 1])
    term.after_step()
    assert all(torch.equal(value, old[name]) for name, value in term.state_dict().items())


def test_a_perturbed_step_moves_a_row_once(tmp_path: Path) -> None:
    job = make_job(tmp_path, method="codir", options={"bank_negatives": 3, "dimension": 8})
    plan = replace(
        job.plan,
        stages=(Stage(0.0, job.plan.stages[0].weights, perturb=True),),
        perturbation=Perturbation(1.0, "token"),
    )
    distiller = Distiller(job.student, plan, bf16=False)
    batch, term = make_batch_of(job.rows, job.student), plan.terms["contrast"]
    assert job.teacher is not None and isinstance(term, PooledContrast)
    seen: list[Tensor] = []
    term.student_projection.register_forward_hook(lambda module, given, out: seen.append(out.detach()))
    distiller(batch, job.teacher(batch, plan.teacher_needs(plan.stages[0])), plan.stages[0])
    # Of the two passes the one that counts is kept, on the perturbed rows.
    assert len(term._pending) == 1 and len(seen) == 2
    kept = term._pending[0][1]
    gap = [(kept - F.normalize(each, dim=-1)).abs().max() for each in seen]
    assert gap[1] < 1e-6 < gap[0]


def test_a_run_moves_each_row_once_an_epoch_and_evaluation_none(tmp_path: Path) -> None:
    options = {"bank_negatives": 3, "dimension": 8}
    job = make_job(tmp_path, method="codir", options=options, count=20, epochs=1, accumulation=2)
    term = job.plan.terms["contrast"]
    assert isinstance(term, PooledContrast)
    start, moved = term.teacher_bank.clone(), []
    plain = PooledContrast.after_step

    def spy() -> None:
        moved.extend(int(row) for batch, _, _ in term._pending for row in batch.row_ids)
        plain(term)

    term.after_step = spy  # type: ignore[method-assign]
    train(job, QUIET)
    assert sorted(moved) == list(range(20))
    assert (term.teacher_bank.norm(dim=1) - 1).abs().max() < 1e-6
    assert not torch.equal(term.teacher_bank, start)
    assert Schedule(job.student_tokens.lengths, job.plan, job.settings).steps == 2


def test_checkpoints_hold_the_banks_and_not_what_the_data_tells() -> None:
    projections = {
        f"{who}_projection.{what}" for who in ("student", "teacher") for what in ("weight", "bias")
    }
    assert set(make_term().state_dict()) == {"teacher_bank", *projections}
    official = set(make_term(loss="nce_official").state_dict())
    assert official == {"teacher_bank", "student_bank", "normalisers", *projections}


# What must hold


def test_content_of_padding_does_not_matter_under_the_masked_mean() -> None:
    term, mask = make_term().eval(), torch.tensor([[1, 0], [1, 1], [1, 0]])
    values = []
    for noise in (0.0, 100.0):
        states, goals = STATES.clone(), GOALS.clone()
        states[:, [0, 2], 1] += noise
        goals[:, [0, 2], 1] -= noise
        torch.manual_seed(0)
        values.append(term(outputs_of(states, mask), outputs_of(goals, mask), batch_of([0, 1, 2], mask)))
    assert torch.equal(*values)


def test_equal_scores_give_ln_of_the_candidates() -> None:
    term = make_term(bank_negatives=4)
    for linear in (term.student_projection, term.teacher_projection):
        torch.nn.init.zeros_(linear.weight)
        torch.nn.init.ones_(linear.bias)
    term.teacher_bank.copy_(torch.full((8, 4), 0.5))
    found = term(outputs_of(STATES), outputs_of(GOALS), batch_of([0, 1, 2]))
    assert found.item() == pytest.approx(math.log(5), rel=1e-12)


def test_dead_vectors_give_finite_values_and_gradients() -> None:
    term = make_term()
    for p in term.parameters():
        torch.nn.init.zeros_(p)
    loss = term(outputs_of(STATES), outputs_of(GOALS), batch_of([0, 1, 2]))
    loss.backward()
    assert torch.isfinite(loss) and all(torch.isfinite(p.grad).all() for p in term.parameters())


# Settings


def test_needs_are_pooled_states_of_all_or_of_every_other_layer() -> None:
    term = make_term()
    assert term.student_needs == Needs(pooled_states=frozenset({("mean", 1), ("mean", 2)}))
    assert term.teacher_needs == Needs(pooled_states=frozenset(("mean", i) for i in (1, 2, 3, 4)))
    official = make_term(teacher_layers="every_other", pooling="cls")
    assert official.teacher_needs == Needs(pooled_states=frozenset({("cls", 1), ("cls", 3)}))
    assert make_term(context_of(teacher_depth=12), teacher_layers="every_other").teacher_layers == (
        1,
        3,
        5,
        7,
        9,
        11,
    )


def test_weights_are_the_papers_and_zero_leaves_a_term_out() -> None:
    def weights(
        kind: Any = "classification", labels: np.ndarray = LABELS, **options: Any
    ) -> dict[str, float]:
        plan: Plan = build(CoDIRSettings(bank_negatives=2, **options), context_of(kind, labels))
        assert set(plan.terms) == set(plan.stages[0].weights)
        return dict(plan.stages[0].weights)

    assert weights() == {"hard": 1.0, "soft": 1.0, "contrast": 0.1}
    assert weights(alpha1=0, alpha2=0.003) == {"hard": 1.0, "contrast": 0.003}
    assert weights(alpha2=0) == {"hard": 1.0, "soft": 1.0}
    scores = np.linspace(0, 5, 8, dtype=np.float32)
    assert weights("regression", scores) == {"hard": 1.0, "soft": 1.0}
    assert weights("regression", scores, regression=1.0) == {"hard": 1.0, "soft": 1.0, "contrast": 0.1}


@pytest.mark.parametrize(
    ("kind", "labels", "options", "message"),
    [
        ("classification", LABELS, {"bank_negatives": 5}, "label 0 has only 5 of 8.*negatives=any"),
        ("classification", np.zeros(8), {"bank_negatives": 1}, "only 0 of 8"),
        ("classification", LABELS, {"bank_negatives": 7, "negatives": "any"}, "each row has only 7 of 8"),
        ("multi-label", np.ones((8, 3)), {}, "method.negatives.*multi-label"),
        ("regression", np.arange(8.0), {"regression": 9.0}, "only 0 of 8.*method.regression"),
    ],
)
def test_what_leaves_no_negatives_is_refused(
    kind: Any, labels: np.ndarray, options: dict[str, Any], message: str
) -> None:
    with pytest.raises(WrongInput, match=message):
        build(CoDIRSettings(**{"bank_negatives": 2, **options}), context_of(kind, labels))


def test_wrong_shapes_of_info_nce_raise() -> None:
    a = torch.ones(2, 3)
    for p, n, tau in (
        (torch.ones(3), torch.ones(2, 4, 3), 1.0),
        (a, torch.ones(4, 3), 1.0),
        (a, torch.ones(2, 0, 3), 1.0),
        (a, torch.ones(2, 4, 3), 0.0),
    ):
        with pytest.raises(ValueError):
            info_nce(a, p, n, temperature=tau)


def test_pooling_is_the_encoders() -> None:
    assert CoDIRSettings.model_fields["pooling"].annotation is encoder.Pooling

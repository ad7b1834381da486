"""RAIL-KD against its equations: loops over floats, a hand-computed value, and its draws of layers."""

import json
import math
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console
from torch import Tensor

from stillroom.data.batching import Batch, Inputs
from stillroom.encoder import Needs, Outputs
from stillroom.errors import WrongInput
from stillroom.methods.base import Context
from stillroom.methods.rail_kd import RAILKDSettings, RandomLayers, build, draw_layers, rail_loss
from stillroom.training.loop import CHECKPOINTS, train
from tiny import make_job

ROWS = 6


def random(*shape: int, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator, dtype=torch.float64)


def naive(student: Tensor, teacher: Tensor, squared: bool, reduction: str) -> float:
    """Return L_RAIL from loops over rows and numbers."""
    total = 0.0
    for s, t in zip(student.tolist(), teacher.tolist(), strict=True):
        a, b = (math.sqrt(sum(x * x for x in v)) for v in (s, t))
        square = sum((x / a - y / b) ** 2 for x, y in zip(s, t, strict=True))
        total += square if squared else math.sqrt(square)
    return total / (len(student) if reduction == "mean" else 1)


@pytest.mark.parametrize("reduction", ["mean", "sum"])
@pytest.mark.parametrize("squared", [True, False])
@pytest.mark.parametrize("seed", [0, 1])
def test_loss_equals_loops(seed: int, squared: bool, reduction: Any) -> None:
    s, t = random(3, 5, seed=seed), random(3, 5, seed=seed + 10)
    found = rail_loss(s, t, squared=squared, reduction=reduction)
    assert found.item() == pytest.approx(naive(s, t, squared, reduction), rel=1e-12)


def test_loss_by_hand() -> None:
    # (0.6, 0.8) - (0, 1) = (0.6, -0.2): square 0.4. (1, 0) - (-1, 0): square 4.
    s, t = torch.tensor([[3.0, 4.0], [2.0, 0.0]]).double(), torch.tensor([[0.0, 2.0], [-1.0, 0.0]]).double()
    assert rail_loss(s, t).item() == pytest.approx(2.2, rel=1e-12)
    assert rail_loss(s, t, reduction="sum").item() == pytest.approx(4.4, rel=1e-12)
    assert rail_loss(s, t, squared=False).item() == pytest.approx((math.sqrt(0.4) + 2) / 2, rel=1e-12)


@pytest.mark.parametrize("squared", [True, False])
def test_gradient_is_right_and_finite_where_both_agree(squared: bool) -> None:
    s, t = random(3, 4).requires_grad_(), random(3, 4, seed=1).requires_grad_()
    assert torch.autograd.gradcheck(lambda x, y: rail_loss(x, y, squared=squared), (s, t))
    rail_loss(s, s.detach(), squared=squared).backward()
    assert s.grad is not None and s.grad.isfinite().all()


def test_rescaling_changes_nothing_and_shapes_that_would_broadcast_are_refused() -> None:
    s, t = random(3, 4), random(3, 4, seed=1)
    assert rail_loss(2 * s, t / 3).item() == pytest.approx(rail_loss(s, t).item(), rel=1e-12)
    with pytest.raises(ValueError, match="expected shapes"):
        rail_loss(s, t[:1])


# Draws


def test_draws_are_sorted_different_and_in_range_and_reach_every_layer() -> None:
    draws = [draw_layers(7, number, count=3, among=11) for number in range(60)]
    for drawn in draws:
        assert list(drawn) == sorted(set(drawn)) and len(drawn) == 3
        assert 1 <= drawn[0] and drawn[-1] <= 11
    assert {layer for drawn in draws for layer in drawn} == set(range(1, 12))
    assert draws == [draw_layers(7, number, count=3, among=11) for number in range(60)]
    assert draws != [draw_layers(8, number, count=3, among=11) for number in range(60)]


def make_term(N: int = 3, M: int = 12, *, seed: int = 0, **options: Any) -> RandomLayers:
    torch.manual_seed(seed)
    plan = build(RAILKDSettings(**options), Context("classification", 2, ROWS, N, 3, M, 5))
    term = plan.terms["layers"]
    assert isinstance(term, RandomLayers)
    return term.double()


def sides(N: int = 3, M: int = 12, pooling: Any = "mean", rows: int = 2) -> tuple[Outputs, Outputs, Batch]:
    """Return random pooled states, index 0 the embedding output, and a batch of two rows."""
    student, teacher = random(N + 1, rows, 3), random(M + 1, rows, 5, seed=1)
    mask = torch.ones(rows, 2)
    inputs = Inputs(mask, mask, None)
    batch = Batch(inputs, inputs, torch.zeros(rows), torch.arange(rows))
    return (
        Outputs(torch.empty(0), pooled_states={(pooling, i): x for i, x in enumerate(student)}),
        Outputs(torch.empty(0), pooled_states={(pooling, i): x for i, x in enumerate(teacher)}),
        batch,
    )


def layers_over(term: RandomLayers, batches: int) -> list[tuple[int, ...]]:
    """Return the teacher layers of each of so many batches of two rows."""
    found = []
    for _ in range(batches):
        found.append(term.teacher_layers())
        term(*sides())
    return found


def test_layers_stay_for_an_epoch_and_change_after_it() -> None:
    # Six rows are three batches of two.
    found = layers_over(make_term(), 30)
    epochs = [found[i : i + 3] for i in range(0, 30, 3)]
    assert all(len(set(epoch)) == 1 for epoch in epochs)
    assert len({epoch[0] for epoch in epochs}) > 5
    assert layers_over(make_term(), 30) == found != layers_over(make_term(seed=1), 30)


def test_layers_change_after_so_many_batches() -> None:
    found = layers_over(make_term(redraw=2), 20)
    assert found[0::2] == found[1::2] and len(set(found)) > 5


def test_the_log_tells_the_layers_that_were_compared() -> None:
    term = make_term(redraw=1)
    used, told = [], []
    for _ in range(10):
        used += layers_over(term, 1)
        term.after_step()
        told.append(tuple(term.record()["teacher_layers"]))
    assert told == used and len(set(used)) > 3


def test_evaluation_does_not_move_the_draw() -> None:
    assert len(set(layers_over(make_term().eval(), 12))) == 1


def test_the_draw_goes_on_from_a_checkpoint() -> None:
    whole = make_term()
    found = layers_over(whole, 20)
    part, rest = make_term(), make_term(seed=1)
    layers_over(part, 7)
    rest.load_state_dict(part.state_dict())
    assert layers_over(rest, 13) == found[7:]
    # A step must not wait for a device to tell the layers.
    assert part.state_dict()["_extra_state"].device.type == "cpu"


def test_a_resumed_run_draws_what_the_uninterrupted_one_draws(tmp_path: Path) -> None:
    given: dict[str, Any] = {"method": "rail-kd", "count": 16, "epochs": 6, "checkpoint_every": 1}

    def logged(folder: Path) -> list[Any]:
        lines = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
        return [line["record"]["layers"]["teacher_layers"] for line in lines if "loss" in line]

    train(make_job(tmp_path / "whole", **given, keep_checkpoints=20), Console(quiet=True))
    whole = logged(tmp_path / "whole")
    assert len(whole) == 12 and len({tuple(layers) for layers in whole}) > 1
    for path in sorted((tmp_path / "whole" / CHECKPOINTS).glob("step-*"))[5:]:
        shutil.rmtree(path)
    train(make_job(tmp_path / "whole", **given), Console(quiet=True))
    assert logged(tmp_path / "whole") == whole


# The term


@pytest.mark.parametrize(
    ("options", "student_layers", "teacher_layers"),
    [
        ({"layer_map": "uniform"}, (1, 2), (4, 8)),
        ({"layer_map": "uniform", "embedding": True, "final": True}, (0, 1, 2, 3), (0, 4, 8, 12)),
        ({"layer_map": (2, 5, 9), "pooling": "cls"}, (1, 2), (2, 5)),
        ({"layer_map": "uniform", "form": "tkc002", "pooling": "unmasked_mean"}, (1, 2, 3), (4, 8, 12)),
    ],
)
@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_term_equals_loops_on_the_layers_end_to_end(
    options: dict[str, Any],
    student_layers: tuple[int, ...],
    teacher_layers: tuple[int, ...],
    reduction: Any,
) -> None:
    term = make_term(**options, reduction=reduction, projection_size=4)
    assert term.teacher_layers() == teacher_layers
    pooling = options.get("pooling", "mean")
    student, teacher, batch = sides(pooling=pooling)
    z = []
    for outputs, layers, projection in (
        (student, student_layers, term.student_projection),
        (teacher, teacher_layers, term.teacher_projection),
    ):
        rows = [
            [x for layer in layers for x in outputs.pooled_states[pooling, layer][row].tolist()]
            for row in range(2)
        ]
        W, b = projection.weight.tolist(), projection.bias.tolist()
        projected = [
            [sum(w * x for w, x in zip(line, row, strict=True)) + c for line, c in zip(W, b, strict=True)]
            for row in rows
        ]
        z.append(torch.tensor(projected, dtype=torch.float64))
    want = naive(z[0], z[1], options.get("form") != "tkc002", reduction)
    assert term(student, teacher, batch).item() == pytest.approx(want, rel=1e-12)


def test_needs_are_the_layers_that_may_be_drawn_and_nothing_else() -> None:
    def pooled(layers: set[int], how: Any = "mean", **given: Any) -> Needs:
        return Needs(pooled_states=frozenset((how, layer) for layer in layers), **given)

    term = make_term(3, 6)
    assert (term.student_needs, term.teacher_needs) == (pooled({1, 2}), pooled({1, 2, 3, 4, 5}))
    term = make_term(3, 6, form="tkc002")
    assert (term.student_needs, term.teacher_needs) == (pooled({1, 2, 3}), pooled({1, 2, 3, 4, 5, 6}))
    term = make_term(3, 6, embedding=True, final=True)
    assert (term.student_needs, term.teacher_needs) == (pooled({0, 1, 2, 3}), pooled(set(range(7))))
    term = make_term(3, 6, layer_map="uniform", pooling="unmasked_mean")
    assert term.teacher_needs == pooled({2, 4}, "unmasked_mean", padding=True)


def test_weights_are_those_of_the_equation() -> None:
    context = Context("classification", 2, ROWS, 3, 3, 6, 5)
    (stage,) = build(RAILKDSettings(), context).stages
    assert dict(stage.weights) == {"hard": 1 / 3, "soft": 1 / 3, "layers": 1 / 3}
    plan = build(RAILKDSettings(hard_weight=0), context)
    assert set(plan.terms) == {"soft", "layers"}


@pytest.mark.parametrize(
    ("options", "depths", "match"),
    [
        ({}, (1, 4), "all student layers but the last"),
        ({}, (4, 2), "the teacher 2"),
        ({"layer_map": "uniform"}, (5, 4), "the teacher 4"),
        ({"form": "tkc002", "final": True}, (3, 6), "method.final=false"),
        ({"hard_weight": 0, "soft_weight": 0}, (3, 6), "never be trained"),
    ],
)
def test_what_does_not_fit_is_refused(options: dict[str, Any], depths: tuple[int, int], match: str) -> None:
    N, M = depths
    with pytest.raises(WrongInput, match=match):
        build(RAILKDSettings(**options), Context("classification", 2, ROWS, N, 3, M, 5))

"""The perturbation of embeddings, alone and inside a step."""

import sys
from typing import Any

import pytest
import torch
from torch import Tensor

from stillroom import methods
from stillroom.data.batching import Batch
from stillroom.encoder import Encoder, Needs, Outputs
from stillroom.methods.base import Context, Perturbation, Plan, Stage
from stillroom.recipe import MethodSettings
from stillroom.teacher.live import LiveTeacher
from stillroom.training import distiller as distiller_module
from stillroom.training.distiller import Distiller
from stillroom.training.perturbation import perturbation
from tiny import make_batch_of, make_encoder, make_rows, make_task

G = torch.tensor([[[3.0, 4.0], [0.0, 0.0]], [[0.0, -2.0], [6.0, 8.0]]])


def test_norm_scopes() -> None:
    per_token = perturbation(G, epsilon=0.5, norm="token")
    want = torch.tensor([[[0.3, 0.4], [0.0, 0.0]], [[0.0, -0.5], [0.3, 0.4]]])
    torch.testing.assert_close(per_token, want)
    # 25 + 4 + 100 = 129
    torch.testing.assert_close(perturbation(G, epsilon=0.5, norm="tensor"), 0.5 * G / 129**0.5)


def test_tokens_without_gradient_do_not_move() -> None:
    assert (perturbation(G, epsilon=3.0, norm="token")[0, 1] == 0).all()
    assert (perturbation(torch.zeros(2, 3, 4), epsilon=1.0, norm="tensor") == 0).all()


@pytest.mark.parametrize("norm", ["token", "tensor"])
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_nothing_moves_if_one_number_is_not_finite(norm: Any, bad: float) -> None:
    """Inf / inf would be NaN, and one such token would end the run."""
    broken = G.clone()
    broken[1, 0, 0] = bad
    assert (perturbation(broken, epsilon=1.0, norm=norm) == 0).all()


@pytest.mark.parametrize("norm", ["token", "tensor"])
@pytest.mark.parametrize("factor", [1e-6, 1e6])
def test_scale_of_the_loss_cancels(norm: Any, factor: float) -> None:
    found = perturbation(G * factor, epsilon=1.0, norm=norm)
    torch.testing.assert_close(found, perturbation(G, epsilon=1.0, norm=norm))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("scale", [1e-4, 1.0, 6000.0])
def test_halves_are_normalised_in_float32(dtype: torch.dtype, scale: float) -> None:
    """Squares of these leave float16's range on both sides: lengths of zero or infinity."""
    given = (G * scale).to(dtype)
    found = perturbation(given, epsilon=1.0, norm="token")
    assert found.dtype == dtype
    want = perturbation(given.double(), epsilon=1.0, norm="token")
    torch.testing.assert_close(found.double(), want, rtol=1e-2, atol=1e-6)


def test_it_is_a_constant() -> None:
    gradient = G.clone().requires_grad_()
    assert not perturbation(gradient, epsilon=1.0, norm="token").requires_grad


# Inside a step


def lrc_bert(epsilon: float = 1.0, **options: Any) -> tuple[Distiller, LiveTeacher, Batch, Plan]:
    """Return a tiny distillation: student and teacher in evaluation mode, six rows."""
    task = make_task()
    student, teacher = make_encoder(task=task), make_encoder(task=task, layers=4, width=24, seed=1)
    context = Context("classification", 2, 6, 2, 16, 4, 24)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        plan = methods.build(MethodSettings(name="lrc-bert", epsilon=epsilon, **options), context)
    live = LiveTeacher(teacher, device=torch.device("cpu"), bf16=False)
    return Distiller(student, plan, bf16=False), live, make_batch_of(make_rows(task, 6), student), plan


def clean_and_perturbed(epsilon: float, stage_number: int, **options: Any) -> tuple[float, float]:
    distiller, teacher, batch, plan = lrc_bert(epsilon, **options)
    stage = plan.stages[stage_number]
    goals = teacher(batch, plan.teacher_needs(stage))
    clean = distiller(batch, goals, Stage(stage.start, stage.weights, perturb=False)).total.item()
    return clean, distiller(batch, goals, stage).total.item()


@pytest.mark.parametrize("norm", ["token", "tensor"])
@pytest.mark.parametrize("stage", [0, 1])
def test_loss_rises_for_a_small_epsilon(stage: int, norm: str) -> None:
    """The plus sign: the student trains on embeddings that are a little worse, not better."""
    clean, perturbed = clean_and_perturbed(1e-2, stage, perturbation_norm=norm)
    assert perturbed > clean + 1e-5


def test_loss_rises_by_epsilon_times_the_length_of_the_gradient() -> None:
    """First order, whole tensor: ``loss_2 - loss_1 = epsilon ||G||``."""
    distiller, teacher, batch, plan = lrc_bert(1e-2, perturbation_norm="tensor")
    stage = plan.stages[0]
    goals = teacher(batch, plan.teacher_needs(stage))
    seen = distiller.student(batch.student, Needs(hidden_states=frozenset({1, 2}), embeddings=True))
    loss = distiller.terms["cos_nce"](seen, goals, batch)
    (gradient,) = torch.autograd.grad(loss, seen.embeddings)
    rise = distiller(batch, goals, stage).total.item() - loss.item()
    assert rise == pytest.approx(1e-2 * gradient.norm().item(), rel=0.05)


@pytest.mark.parametrize("norm", ["token", "tensor"])
def test_gradient_of_the_weights_is_that_of_the_second_pass_alone(norm: Any) -> None:
    distiller, teacher, batch, plan = lrc_bert(perturbation_norm=norm)
    stage = plan.stages[1]
    goals = teacher(batch, plan.teacher_needs(stage))
    distiller(batch, goals, stage).total.backward()
    found = {name: p.grad.clone() for name, p in distiller.named_parameters() if p.grad is not None}

    # The same by hand: the offset first, then one plain pass that takes it.
    distiller.zero_grad()
    needs = plan.student_needs(stage)

    def loss_at(offset: Tensor | None) -> tuple[Tensor, Outputs]:
        seen = distiller.student(batch.student, needs | Needs(embeddings=True), offset)
        terms = {name: distiller.terms[name](seen, goals, batch) for name in stage.weights}
        return sum(stage.weights[name] * value for name, value in terms.items()), seen

    loss, seen = loss_at(None)
    (gradient,) = torch.autograd.grad(loss, seen.embeddings)
    clean = torch.autograd.grad(loss_at(None)[0], distiller.terms["cos_nce"].projection)[0]
    second, _ = loss_at(perturbation(gradient, epsilon=1.0, norm=norm))
    second.backward()
    want = {name: p.grad for name, p in distiller.named_parameters() if p.grad is not None}
    assert found.keys() == want.keys()
    for name in want:
        torch.testing.assert_close(found[name], want[name], rtol=1e-4, atol=1e-6, msg=name)
    assert (clean - found["terms.cos_nce.projection"]).abs().max() > 1e-4


def test_first_pass_computes_no_gradient_of_any_weight() -> None:
    distiller, teacher, batch, plan = lrc_bert()
    stage = plan.stages[1]
    goals = teacher(batch, plan.teacher_needs(stage))
    fired: list[str] = []
    for name, parameter in distiller.named_parameters():
        parameter.register_hook(lambda grad, name=name: fired.append(name))
    loss = distiller(batch, goals, stage).total
    assert fired == []
    assert all(p.grad is None for p in distiller.parameters())
    # The hooks do fire where weights are differentiated.
    loss.backward()
    assert len(fired) > 10


def test_teacher_is_called_once_and_student_twice() -> None:
    distiller, teacher, batch, plan = lrc_bert()
    calls = {"teacher": 0, "student": 0}

    def count(name: str) -> Any:
        def hook(*_: Any) -> None:
            calls[name] += 1

        return hook

    teacher.encoder.register_forward_hook(count("teacher"))
    distiller.student.register_forward_hook(count("student"))
    stage = plan.stages[0]
    distiller(batch, teacher(batch, plan.teacher_needs(stage)), stage).total.backward()
    assert calls == {"teacher": 1, "student": 2}
    distiller(batch, teacher(batch, plan.teacher_needs(stage)), Stage(0.0, stage.weights))
    assert calls == {"teacher": 2, "student": 3}


def test_second_pass_draws_its_own_dropout() -> None:
    """One mask for both passes would perturb against the very units that stay."""
    distiller, teacher, batch, plan = lrc_bert()
    masks: list[Tensor] = []
    distiller.student.embedding_dropout().register_forward_hook(
        lambda module, given, made: masks.append(made == 0)
    )
    distiller.train()
    distiller(batch, teacher(batch, plan.teacher_needs(plan.stages[0])), plan.stages[0])
    first, second = masks
    assert first.any() and second.any() and not torch.equal(first, second)


def test_nothing_of_the_perturbation_stays_with_the_student() -> None:
    """Evaluation is the same with the perturbation on and off."""
    distiller, teacher, batch, plan = lrc_bert()
    with torch.no_grad():
        before = distiller.student(batch.student, Needs(logits=True)).logits
    distiller(batch, teacher(batch, plan.teacher_needs(plan.stages[0])), plan.stages[0])
    with torch.no_grad():
        after = distiller.student(batch.student, Needs(logits=True)).logits
    assert torch.equal(before, after)


def gradient_of_embeddings(
    encoder: Encoder, plan: Plan, batch: Batch, goals: Outputs, bf16: bool
) -> Tensor:
    """Return the gradient that a perturbed step feeds to the perturbation."""
    seen: list[Tensor] = []
    plain = distiller_module.perturbation
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            distiller_module, "perturbation", lambda g, **rule: seen.append(g) or plain(g, **rule)
        )
        Distiller(encoder, plan, bf16=bf16)(batch, goals, plan.stages[0])
    return seen[0]


def test_terms_are_differentiated_in_float32_under_autocast(monkeypatch: pytest.MonkeyPatch) -> None:
    """Autograd inside autocast runs the terms' float32 products in bf16, at a thousandth's precision.

    The encoder here is an embedding table, which autocast leaves alone: only the term can differ. Its
    projection, which is multiplied in bf16 on purpose, is kept in float32.
    """

    class Table(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.table = torch.nn.Embedding(50, 8)

        def forward(self, inputs: Any, needs: Needs, offset: Tensor | None = None) -> Outputs:
            embeddings = self.table(inputs.input_ids)
            state = embeddings if offset is None else embeddings + offset
            return Outputs(torch.empty(0), {1: state}, embeddings)

    monkeypatch.setattr(
        sys.modules["stillroom.methods.lrc_bert"], "project", lambda states, matrix, bf16: states @ matrix
    )
    torch.manual_seed(0)
    table = Table()
    context = Context("classification", 2, 6, 1, 8, 1, 24)
    plan = methods.build(MethodSettings(name="lrc-bert"), context)
    batch = make_batch_of(make_rows(make_task(), 6), make_encoder())
    goals = Outputs(torch.empty(0), {1: torch.randn(*batch.student.input_ids.shape, 24)})
    assert plan.perturbation == Perturbation(1.0, "tensor")
    want = gradient_of_embeddings(table, plan, batch, goals, bf16=False)  # type: ignore[arg-type]
    found = gradient_of_embeddings(table, plan, batch, goals, bf16=True)  # type: ignore[arg-type]
    assert want.abs().max() > 1e-3
    torch.testing.assert_close(found, want, rtol=1e-5, atol=1e-7)

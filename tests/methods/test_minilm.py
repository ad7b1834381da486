"""MiniLM: its two relations from states and scores, what is read, and its stages."""

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from stillroom.data.batching import Batch, Inputs
from stillroom.encoder import Needs, Outputs
from stillroom.methods.base import Context
from stillroom.methods.minilm import MiniLMSettings, build
from tiny import make_batch_of, make_encoder, make_rows, make_task

MASK = torch.tensor([[1, 1, 1], [1, 1, 0]])
CONTEXT = Context("classification", 2, 8, 2, 4, 4, 6)


def random(*shape: int, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator, dtype=torch.float64)


def batch_of() -> Batch:
    inputs = Inputs(MASK, MASK, None)
    return Batch(inputs, inputs, torch.zeros(2), torch.arange(2))


def naive(student: Any, teacher: Any) -> float:
    """Return the mean KL from loops; `student(row, head, query, key)` gives a score."""
    total, count = 0.0, 0
    for row in range(2):
        real = [p for p in range(3) if MASK[row, p]]
        for head in range(2):
            for query in real:
                s, t = ([f(row, head, query, key) for key in real] for f in (student, teacher))
                q = [math.exp(x) / sum(map(math.exp, s)) for x in s]
                p = [math.exp(x) / sum(map(math.exp, t)) for x in t]
                total += sum(a * math.log(a / b) for a, b in zip(p, q, strict=True))
                count += 1
    return total / count


def test_terms_equal_loops_on_the_last_layers() -> None:
    """Scores go through one softmax: a second one would flatten both distributions."""
    plan = build(MiniLMSettings(), CONTEXT)
    scores, goals = random(2, 2, 3, 3), random(2, 2, 3, 3, seed=1)
    V_S, V_T = random(2, 2, 3, 2), random(2, 2, 3, 3, seed=1)
    student = Outputs(torch.empty(0), attention_scores={2: scores}, values={2: V_S})
    teacher = Outputs(torch.empty(0), attention_scores={4: goals}, values={4: V_T})

    def of(x: Tensor) -> Any:
        return lambda row, head, query, key: x[row, head, query, key].item()

    def relation(V: Tensor) -> Any:
        return lambda row, head, query, key: (
            sum(
                a * b for a, b in zip(V[row, head, query].tolist(), V[row, head, key].tolist(), strict=True)
            )
            / math.sqrt(V.shape[-1])
        )

    found = plan.terms["attention"](student, teacher, batch_of())
    assert found.item() == pytest.approx(naive(of(scores), of(goals)), rel=1e-12)
    found = plan.terms["value_relation"](student, teacher, batch_of())
    assert found.item() == pytest.approx(naive(relation(V_S), relation(V_T)), rel=1e-12)


def test_equal_models_give_zero_and_others_do_not() -> None:
    task = make_task()
    models = [make_encoder(task=task, seed=seed) for seed in (0, 0, 1)]
    plan = build(MiniLMSettings(), Context("classification", 2, 8, 2, 16, 2, 16))
    batch = make_batch_of(make_rows(task, 6), models[0])
    needs = plan.student_needs(plan.stages[0])
    with torch.no_grad():
        first, same, other = (model(batch.student, needs) for model in models)
    for name in ("attention", "value_relation"):
        assert plan.terms[name](first, same, batch).item() == 0
        assert plan.terms[name](first, other, batch).item() > 0


@pytest.mark.parametrize(
    ("options", "labels"),
    [
        ({}, {"hard": 1.0}),
        ({"soft_weight": 0.25}, {"hard": 0.75, "soft": 0.25}),
        ({"soft_weight": 1}, {"soft": 1.0}),
    ],
)
def test_stages_are_the_relations_and_then_the_labels(
    options: dict[str, Any], labels: dict[str, float]
) -> None:
    plan = build(MiniLMSettings(switch=0.7, **options), CONTEXT)
    first, second = plan.stages
    assert (first.start, dict(first.weights)) == (0.0, {"attention": 1.0, "value_relation": 1.0})
    assert (second.start, dict(second.weights)) == (0.7, labels)
    assert set(plan.terms) == {"attention", "value_relation", *labels}


def test_needs_are_the_last_layers_and_nothing_else() -> None:
    plan = build(MiniLMSettings(), CONTEXT)
    for layer, needs in ((2, plan.student_needs), (4, plan.teacher_needs)):
        last = frozenset({layer})
        assert needs(plan.stages[0]) == Needs(attention_scores=last, values=last)
    assert all(plan.terms[name].same_heads for name in ("attention", "value_relation"))

"""MiniLMv2: its relations under any number of heads, what is read, and what is refused."""

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from stillroom.data.batching import Batch, Inputs
from stillroom.encoder import Needs, Outputs
from stillroom.errors import WrongInput
from stillroom.methods.base import Context
from stillroom.methods.minilmv2 import MiniLMv2Settings, Relation, build

MASK = torch.tensor([[1, 1, 1], [1, 1, 0]])
CONTEXT = Context("classification", 2, 8, 2, 6, 4, 12)


def random(*shape: int, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator, dtype=torch.float64)


def batch_of() -> Batch:
    inputs = Inputs(MASK, MASK, None)
    return Batch(inputs, inputs, torch.zeros(2), torch.arange(2))


def naive(student_BSD: Tensor, teacher_BSE: Tensor, heads: int) -> float:
    """Return the mean KL of relations from loops over rows, relation heads, queries and keys."""

    def row_of(x: Tensor, row: int, head: int, query: int, real: list[int]) -> list[float]:
        d = x.shape[-1] // heads
        cut = [x[row, p, head * d : head * d + d].tolist() for p in real]
        scores = [
            sum(a * b for a, b in zip(cut[query], other, strict=True)) / math.sqrt(d) for other in cut
        ]
        return [math.exp(score) / sum(map(math.exp, scores)) for score in scores]

    found = []
    for row in range(2):
        real = [p for p in range(3) if MASK[row, p]]
        for head in range(heads):
            for query in range(len(real)):
                q, p = (row_of(x, row, head, query, real) for x in (student_BSD, teacher_BSE))
                found.append(sum(a * math.log(a / b) for a, b in zip(p, q, strict=True)))
    return sum(found) / len(found)


def cut(x_BSD: Tensor, heads: int) -> Tensor:
    """Return token vectors as a model of so many heads has them, ``(B, H, S, D/H)``."""
    return x_BSD.unflatten(-1, (heads, -1)).transpose(1, 2)


@pytest.mark.parametrize("heads", [1, 2, 3, 6])
@pytest.mark.parametrize(
    ("name", "vectors"),
    [("query_relation", "queries"), ("key_relation", "keys"), ("value_relation", "values")],
)
def test_term_equals_loops_for_models_of_other_heads(name: str, vectors: str, heads: int) -> None:
    plan = build(MiniLMv2Settings(relation_heads=heads, teacher_layer=3), CONTEXT)
    s, t = random(2, 3, 6), random(2, 3, 12, seed=1)
    given: dict[str, Any] = {vectors: {2: cut(s, 2)}}
    goals: dict[str, Any] = {vectors: {3: cut(t, 4)}}
    found = plan.terms[name](Outputs(torch.empty(0), **given), Outputs(torch.empty(0), **goals), batch_of())
    assert found.item() == pytest.approx(naive(s, t, heads), rel=1e-12)


def test_equal_vectors_give_zero_with_other_heads_too() -> None:
    plan = build(MiniLMv2Settings(relation_heads=3), Context("classification", 2, 8, 2, 12, 2, 12))
    x = random(2, 3, 12)
    student = Outputs(torch.empty(0), keys={2: cut(x, 2)})
    for heads in (2, 3, 4, 6):
        teacher = Outputs(torch.empty(0), keys={2: cut(x, heads)})
        assert plan.terms["key_relation"](student, teacher, batch_of()).item() == pytest.approx(
            0, abs=1e-15
        )


def test_needs_and_stages() -> None:
    plan = build(MiniLMv2Settings(relation_heads=6, switch=0.7, soft_weight=0.25), CONTEXT)
    first, second = plan.stages
    assert (first.start, dict(first.weights)) == (
        0.0,
        dict.fromkeys(("query_relation", "key_relation", "value_relation"), 1.0),
    )
    assert (second.start, dict(second.weights)) == (0.7, {"hard": 0.75, "soft": 0.25})
    for layer, needs in ((2, plan.student_needs), (4, plan.teacher_needs)):
        last = frozenset({layer})
        assert needs(first) == Needs(queries=last, keys=last, values=last)
    assert not any(term.same_heads for term in plan.terms.values())
    third = build(MiniLMv2Settings(relation_heads=6, teacher_layer=3), CONTEXT)
    assert third.teacher_needs(first).keys == {3}


@pytest.mark.parametrize(
    ("widths", "heads"),
    [((768, 768), 48), ((384, 768), 48), ((312, 384), 24), ((312, 768), 24), ((6, 12), 6), ((7, 12), 1)],
)
def test_auto_cuts_into_the_most_heads_up_to_48(widths: tuple[int, int], heads: int) -> None:
    student, teacher = widths
    plan = build(MiniLMv2Settings(), Context("classification", 2, 8, 2, student, 4, teacher))
    assert {term.heads for term in plan.terms.values() if isinstance(term, Relation)} == {heads}


@pytest.mark.parametrize(
    ("options", "match"),
    [
        (
            {"relation_heads": 4},
            "divide the student's width, 6, and the teacher's, 12, found 4: set it to one of 1, 2, 3, 6",
        ),
        ({"relation_heads": 6, "teacher_layer": 5}, "from 1 to 4, found 5"),
    ],
)
def test_what_does_not_fit_is_refused(options: dict[str, Any], match: str) -> None:
    with pytest.raises(WrongInput, match=match):
        build(MiniLMv2Settings(**options), CONTEXT)

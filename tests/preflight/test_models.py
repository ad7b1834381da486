"""Student, teacher and generator go together, and with the method."""

import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from transformers import AutoModelForSequenceClassification

from checking import check, make_augmented, make_run, problem, with_texts
from stillroom import preflight
from stillroom.data.batching import Batch
from stillroom.data.tasks import Kind
from stillroom.encoder import Encoder, Needs, Outputs, weights_hash
from stillroom.errors import WrongInput
from stillroom.methods.base import Plan, Stage, Term
from tiny import (
    make_dataset,
    make_encoder,
    make_generator,
    make_task,
    make_teacher,
    make_tokenizer,
    make_tokens,
)


def named(*names: str, order: tuple[int, ...] | None = None) -> Encoder:
    """Return a teacher whose configuration has these label names."""
    teacher = make_teacher(order=order)
    teacher.config.id2label = dict(enumerate(names))
    return teacher


@pytest.mark.parametrize("names", [("Negative", "POSITIVE"), (" negative", "positive ")])
def test_label_names_are_compared_without_case_and_space(names: tuple[str, ...], tmp_path: Path) -> None:
    assert check(make_run(tmp_path, teacher=named(*names)))["warnings"] == []


@pytest.mark.parametrize("spelling", ["not_equal", "not-equal", "Not Equal"])
def test_dashes_and_underscores_in_names_are_spaces(spelling: str, tmp_path: Path) -> None:
    dataset = make_dataset()
    dataset = replace(dataset, task=replace(dataset.task, labels=("not_equal", "equal")))
    assert check(make_run(tmp_path, dataset=dataset, teacher=named(spelling, "equal")))["warnings"] == []


def test_the_same_names_in_another_order_are_refused(tmp_path: Path) -> None:
    text = problem(make_run(tmp_path, teacher=named("positive", "negative")))
    assert "the data's labels are [negative, positive], the teacher's [positive, negative]" in text
    assert "dataset.labels" in text and "id2label" in text


@pytest.mark.parametrize(
    ("names", "expected"),
    [(("LABEL_0", "LABEL_1"), "have no names"), (("bad", "good"), "Names of labels differ")],
)
def test_other_names_are_a_warning(names: tuple[str, ...], expected: str, tmp_path: Path) -> None:
    (warning,) = check(make_run(tmp_path, teacher=named(*names)))["warnings"]
    assert expected in warning and f"[{', '.join(names)}]" in warning


@pytest.mark.parametrize(
    ("data", "teacher", "expected"),
    [
        ("classification", "multi-label", r"has 2 label\(s\) \[negative, positive\], the teacher has 3"),
        ("classification", "regression", "are for classification, and the teacher is for regression"),
        ("regression", "classification", "are for regression, and the teacher is for classification"),
        ("multi-label", "regression", "are for multi-label, and the teacher is for regression"),
    ],
)
def test_another_head_is_refused(data: Kind, teacher: Kind, expected: str) -> None:
    with pytest.raises(WrongInput, match=expected):
        preflight.require_same_head(make_task(data), make_encoder(task=make_task(teacher)))


@pytest.mark.parametrize("kind", ["classification", "regression", "multi-label"])
@pytest.mark.parametrize("stated", [True, False])
def test_the_same_head_passes(kind: Kind, stated: bool) -> None:
    teacher = make_encoder(task=make_task(kind))
    if not stated:
        teacher.config.problem_type = None
    preflight.require_same_head(make_task(kind), teacher)


def test_many_labels_at_once_are_not_one_of_many() -> None:
    """As many outputs, but a sigmoid on each: soft labels would be another distribution."""
    teacher = make_encoder(task=make_task("classification"))
    teacher.config.problem_type = "multi_label_classification"
    with pytest.raises(WrongInput, match="problem_type=multi_label_classification"):
        preflight.require_same_head(make_task("classification"), teacher)


def student_that_knows(words: Sequence[str], kind: str) -> Encoder:
    """Return a student with a tokenizer of that vocabulary, `WordLevel` or `WordPiece`."""
    student, tokenizer = make_encoder(), make_tokenizer()
    backend = tokenizer.backend_tokenizer
    state = json.loads(backend.to_str())
    state["model"] = {
        "type": kind,
        "unk_token": "[UNK]",
        "vocab": {word: i for i, word in enumerate(words)},
    }
    if kind == "WordPiece":
        state["model"] |= {"continuing_subword_prefix": "##", "max_input_chars_per_word": 100}
    special = {f"{name}_token": f"[{name.upper()}]" for name in ("pad", "unk", "cls", "sep", "mask")}
    made = type(backend).from_str(json.dumps(state))
    student.tokenizer = type(tokenizer)(tokenizer_object=made, **special)
    return student


def known_words() -> list[str]:
    tokenizer = make_tokenizer()
    words: list[str] = tokenizer.convert_ids_to_tokens(range(len(tokenizer)))
    return words


def split_student() -> Encoder:
    """Return a student whose tokenizer does not know the word `film`, but its two halves."""
    words = [word for word in known_words() if word not in ("film", "there")]
    return student_that_knows([*words, "f", "##ilm"], "WordPiece")


def test_two_tokenizers_are_refused_where_states_are_aligned(tmp_path: Path) -> None:
    dataset = with_texts("train", ["the dog", "Film was good"])
    run = make_run(tmp_path, dataset=dataset, student=split_student())
    text = problem(run)
    assert text.startswith("cos_nce compares states token by token, so student and teacher must")
    assert "'Film was good' is" in text
    assert "[[CLS], film, was, good, [SEP]] to the teacher" in text
    assert "[[CLS], f, ##ilm, was, good, [SEP]] to the student" in text
    assert "method=kd" in text


@pytest.mark.parametrize(
    ("method", "options"),
    [("kd", {}), ("lrc-bert", {"vector": "cls"}), ("lrc-bert", {"vector": "mean", "negatives": "bank"})],
)
def test_two_tokenizers_are_welcome_where_only_logits_or_whole_texts_meet(
    tmp_path: Path, method: str, options: dict[str, Any]
) -> None:
    run = make_run(tmp_path, student=split_student(), method=method, options=options)
    assert not run.tokens.alike
    assert check(run)["warnings"] == []
    assert set(check(run)["truncated"]) == {"student", "teacher"}


def test_tokenizers_that_differ_in_no_row_are_welcome(tmp_path: Path) -> None:
    """DistilBERT reads BERT's tokens without the types: another tokenizer file, the same tokens."""
    run = make_run(tmp_path, student=make_encoder("distilbert"))
    ours = {name: make_tokens(rows, run.student) for name, rows in run.splits()}
    assert check(replace(run, tokens=replace(run.tokens, student=ours)))["warnings"] == []


def test_the_same_tokens_may_have_other_numbers(tmp_path: Path) -> None:
    """A trimmed vocabulary: other ids, the same tokens at the same places."""
    words = known_words()
    run = make_run(tmp_path, student=student_that_knows([*words[:5], *words[:4:-1]], "WordLevel"))
    assert not np.array_equal(run.tokens.student["train"].ids, run.tokens.teacher["train"].ids)
    assert check(run)["warnings"] == []


def test_a_student_with_fewer_positions_is_refused_where_states_are_aligned(tmp_path: Path) -> None:
    student = make_encoder()
    student.config.max_position_embeddings = 9
    text = problem(make_run(tmp_path, student=student, max_length=16))
    assert text.startswith("cos_nce compares states token by token, but row")
    assert "cut to 9 tokens for the student" in text and "Set dataset.max_length=9" in text


@pytest.mark.parametrize("who", ["student", "teacher"])
def test_a_token_beyond_the_vocabulary_is_refused(who: str, tmp_path: Path) -> None:
    """It would be an index error in the first step, or worse in a later one."""
    run = make_run(tmp_path)
    model: Any = run.student.model if who == "student" else run.teacher and run.teacher.model
    # The word with the highest number is missing; some validation row has it.
    known = max(int(tokens.ids.max()) for tokens in run.tokens.student.values())
    model.resize_token_embeddings(known)
    text = problem(run)
    assert f"The {who} has a vocabulary of {known} tokens, its tokenizer gave the id {known}" in text


def test_a_token_type_beyond_the_model_is_refused(tmp_path: Path) -> None:
    student = make_encoder(task=make_task(pair=True))
    student.config.type_vocab_size = 1
    text = problem(make_run(tmp_path, pair=True, student=student))
    assert "The student knows 1 token type(s), its tokenizer gave the type 1" in text


class Deep(Term):
    """Compares layer 3 of a student that has 2."""

    student_needs = Needs(hidden_states=frozenset({1, 3}))

    def forward(self, student: Outputs, teacher: Outputs, batch: Batch) -> Tensor:
        return student.hidden_states[3].mean()


def test_a_layer_that_is_not_there_is_refused(tmp_path: Path) -> None:
    run = replace(make_run(tmp_path), plan=Plan({"deep": Deep()}, (Stage(0.0, {"deep": 1.0}),)))
    assert "deep reads the layers [3] of the student, which has layers 1 to 2" in problem(run)


class Scores(Term):
    """A term that reads the attention scores of both."""

    student_needs = teacher_needs = Needs(attention_scores=frozenset({2}))
    same_heads = True

    def forward(self, student: Outputs, teacher: Outputs, batch: Batch) -> Tensor:
        return (student.attention_scores[2] - teacher.attention_scores[2]).clamp(min=-9).square().mean()


def reading_scores(run: preflight.Run) -> preflight.Run:
    return replace(run, plan=Plan({"scores": Scores()}, (Stage(0.0, {"scores": 1.0}),)))


def test_attention_that_is_read_is_found(tmp_path: Path) -> None:
    found = check(reading_scores(make_run(tmp_path)))
    assert found["layers"] == {"scores": {"student": [2], "teacher": [2]}}


def test_a_block_without_attention_scores_is_refused(tmp_path: Path) -> None:
    run = reading_scores(make_run(tmp_path, student=make_encoder(layers=1)))
    assert "scores reads the layers [2] of the student, which has layers 1 to 1" in problem(run)


def test_a_student_that_does_not_show_its_attention_is_refused(tmp_path: Path) -> None:
    run = reading_scores(make_run(tmp_path, student=make_encoder("mpnet"), method="kd"))
    text = problem(run)
    assert text.startswith("scores reads the attention of the student. MPNet")
    assert "a method that does not read them, such as kd" in text


def test_another_number_of_heads_is_refused_where_heads_are_compared(tmp_path: Path) -> None:
    """Averaged over heads or broadcast, it would train on nonsense."""
    config = make_encoder().config
    config.num_attention_heads = 4
    student = Encoder(AutoModelForSequenceClassification.from_config(config).eval(), make_tokenizer())
    text = problem(reading_scores(make_run(tmp_path, student=student)))
    assert "the student has 4 heads and the teacher 2. Give a student with 2 heads" in text
    assert check(make_run(tmp_path, student=student))["warnings"] == []


def test_embeddings_that_cannot_be_perturbed_are_refused(tmp_path: Path) -> None:
    student = make_encoder()
    model: Any = student.model
    model.bert.embeddings.dropout = nn.Identity()
    run = make_run(tmp_path, student=student, batch_size=1)
    with pytest.raises(WrongInput, match="2 problems(?s:.)*method.perturbation=off"):
        check(run)
    run = make_run(tmp_path, student=student, options={"perturbation": "off"})
    assert check(run)["warnings"] == []
    assert check(make_run(tmp_path, student=student, method="kd"))["warnings"] == []


@pytest.mark.parametrize(
    ("options", "warned"),
    [
        ({"perturbation_norm": "token"}, True),
        ({"perturbation_norm": "token", "epsilon": 0.1}, False),
        ({"perturbation_norm": "token", "perturbation": "off"}, False),
        ({"perturbation_norm": "tensor"}, False),
        # The default.
        ({}, False),
    ],
)
def test_a_perturbation_that_stalls_short_trainings_is_a_warning(
    tmp_path: Path, options: dict[str, Any], warned: bool
) -> None:
    warnings = check(make_run(tmp_path, options=options))["warnings"]
    assert [("perturbation_norm=tensor" in text) for text in warnings] == [True] * warned


class Broken(Term):
    """A term that overflows."""

    student_needs = Needs(logits=True)

    def forward(self, student: Outputs, teacher: Outputs, batch: Batch) -> Tensor:
        return student.logits.sum() / 0


def test_a_later_stage_that_cannot_work_is_refused(tmp_path: Path) -> None:
    """It would stop the run when most of its time is spent."""
    run = make_run(tmp_path)
    plan = Plan({**run.plan.terms, "broken": Broken()}, (*run.plan.stages, Stage(0.9, {"broken": 1.0})))
    assert "In stage 3, before any training, broken = " in problem(replace(run, plan=plan))


class Unable(nn.Module):
    """A head that cannot compute."""

    def __init__(self, error: Exception):
        super().__init__()
        self.error = error

    def forward(self, hidden: Tensor) -> Tensor:
        raise self.error


@pytest.mark.parametrize("who", ["teacher", "student"])
@pytest.mark.parametrize("bf16", [False, True])
def test_a_model_that_cannot_compute_is_named(who: str, bf16: bool, tmp_path: Path) -> None:
    """What torch says of it, as of DeBERTa in bf16, does not say which model, or what to do."""
    text = "value cannot be converted to type c10::BFloat16 without overflow"
    model = make_teacher() if who == "teacher" else make_encoder()
    inner: Any = model.model
    inner.classifier = Unable(RuntimeError(text))
    run = replace(make_run(tmp_path), bf16=bf16)
    found = problem(replace(run, **{who: model}))
    assert found.startswith(
        f"The {who}, a BertForSequenceClassification, cannot compute: RuntimeError: {text}"
    )
    assert ("training.precision=float32" in found) == bf16
    inner.classifier = Unable(ValueError("no language"))
    assert problem(replace(run, **{who: model})).endswith("no language. Give a model of another family.")


# The generator


def test_a_sound_generator_passes_and_is_not_moved(tmp_path: Path) -> None:
    run = make_augmented(tmp_path)
    models = (run.student.model, run.teacher.model, run.generator.model, run.plan.terms["contrast"])
    before = [weights_hash(model) for model in models]
    state = torch.get_rng_state()
    assert check(run)["warnings"] == []
    assert [weights_hash(model) for model in models] == before
    assert torch.equal(torch.get_rng_state(), state)
    assert all(p.grad is None for model in models for p in model.parameters())


@pytest.mark.parametrize("who", ["generator", "teacher"])
def test_another_vocabulary_is_refused(who: str, tmp_path: Path) -> None:
    """The generator's word 7 would be another word to the student: it would learn from noise."""
    other = make_generator() if who == "generator" else make_teacher()
    other.tokenizer = make_tokenizer(types=True, extra_words=("zebra",))
    other.model.resize_token_embeddings(len(other.tokenizer))
    text = problem(make_augmented(tmp_path, **{who: other}))
    assert "one vocabulary" in text and f"the {who}'s" in text
    assert "'zebra'" in text and "stillroom generator" in text


def test_rows_beyond_the_generators_positions_are_refused(tmp_path: Path) -> None:
    generator = make_generator()
    generator.model.config.max_position_embeddings = 8
    text = problem(make_augmented(tmp_path, generator=generator))
    assert "reads 8 tokens" in text and "dataset.max_length=8" in text


def test_a_family_that_takes_no_words_is_refused_with_the_reason(tmp_path: Path) -> None:
    """One that computed something else from given words would be driven by a gradient of that."""
    for broken, reason in ((_shifts, "its logits change by up to"), (_refuses, "it raises TypeError: no")):
        run = make_augmented(tmp_path)
        run.student.model.register_forward_pre_hook(broken, with_kwargs=True)
        text = problem(run)
        assert reason in text and "the student, a BertForSequenceClassification" in text


def _shifts(model: nn.Module, args: Any, given: dict[str, Any]) -> Any:
    if "inputs_embeds" in given:
        given["inputs_embeds"] = given["inputs_embeds"] + torch.linspace(-3, 3, 16)
    return args, given


def _refuses(model: nn.Module, args: Any, given: dict[str, Any]) -> None:
    if "inputs_embeds" in given:
        raise TypeError("no")

"""The checks before the first step: each finds what it is for, and sound input passes in silence."""

import io
import itertools
import json
import shutil
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from rich.console import Console
from torch import Tensor, nn
from transformers import AutoModelForSequenceClassification

from stillroom import preflight
from stillroom.data import sources
from stillroom.data.batching import Batch
from stillroom.data.tasks import Dataset, Kind
from stillroom.data.tokens import Tokens, fingerprint
from stillroom.encoder import Encoder, Needs, Outputs, weights_hash
from stillroom.errors import WrongInput
from stillroom.generator import Generator
from stillroom.methods.base import Plan, Stage, Term
from stillroom.preflight import folder as folder_checks
from stillroom.preflight import teacher as teacher_checks
from stillroom.preflight.teacher import better_order
from stillroom.recipe import DatasetSettings, TeacherSettings, TrainingSettings
from tiny import (
    make_dataset,
    make_encoder,
    make_generator,
    make_plan,
    make_rows,
    make_task,
    make_teacher,
    make_tokenizer,
    make_tokens,
)

QUIET = Console(quiet=True)
SETTINGS = {"epochs": 2, "batch_size": 8}


def make_run(
    folder: Path,
    *,
    kind: Kind = "classification",
    pair: bool = False,
    dataset: Dataset | None = None,
    teacher: Encoder | None = None,
    student: Encoder | None = None,
    method: str = "lrc-bert",
    max_length: int = 32,
    control: bool = False,
    options: dict[str, Any] | None = None,
    generator: Generator | None = None,
    **settings: Any,
) -> preflight.Run:
    """Return a distillation of the toy task by a teacher that solves it; nothing is wrong with it."""
    dataset = dataset or make_dataset(kind, pair=pair)
    teacher = teacher or make_teacher(dataset.task.kind, pair=pair)
    student = student or make_encoder(task=dataset.task)
    options = options or {}
    plan = make_plan(student, teacher, dataset.task, len(dataset.splits["train"]), method=method, **options)

    def tokens_of(model: Encoder) -> dict[str, Any]:
        most = min(max_length, model.positions)
        return {name: make_tokens(rows, model, max_length=most) for name, rows in dataset.splits.items()}

    ours, theirs = tokens_of(student), tokens_of(teacher)
    alike = fingerprint(student.tokenizer) == fingerprint(teacher.tokenizer)
    same = alike and student.positions == teacher.positions
    return preflight.Run(
        dataset,
        max_length,
        TrainingSettings(**{**SETTINGS, **settings}),
        student,
        teacher,
        plan,
        Tokens(ours, ours if same else theirs),
        folder,
        False,
        control,
        generator,
    )


def check(run: preflight.Run) -> dict[str, Any]:
    return preflight.check(run, QUIET)


def problem(run: preflight.Run) -> str:
    """Return the one problem that the checks find."""
    with pytest.raises(WrongInput) as caught:
        check(run)
    text = str(caught.value)
    assert "problems before the first step" not in text, text
    return text


def with_rows(dataset: Dataset, split: str, **changes: Any) -> Dataset:
    rows = replace(dataset.splits[split], **changes)
    return replace(dataset, splits={**dataset.splits, split: rows})


def with_labels(split: str, labels: Sequence[Any], kind: Kind = "classification") -> Dataset:
    """Return the toy data with the first labels of a split replaced."""
    dataset = make_dataset(kind)
    changed = dataset.splits[split].labels.copy()
    changed[: len(labels)] = labels
    return with_rows(dataset, split, labels=changed)


def with_texts(split: str, texts: Sequence[str]) -> Dataset:
    """Return the toy data with the first texts of a split replaced."""
    dataset = make_dataset()
    old = dataset.splits[split].texts[0]
    return with_rows(dataset, split, texts=([*texts, *old[len(texts) :]],))


# Sound input


@pytest.mark.parametrize(
    ("kind", "pair"),
    # Toy texts with three labels contradict each other, pairs of them do not.
    [*itertools.product(["classification", "regression"], [False, True]), ("multi-label", True)],
)
def test_a_sound_run_passes_without_a_warning(kind: Kind, pair: bool, tmp_path: Path) -> None:
    run = make_run(tmp_path, kind=kind, pair=pair)
    found = check(run)
    assert found["warnings"] == []
    assert found["rows"] == {"train": 48, "validation": 24}
    assert found["teacher"]["rows"] == 24
    assert next(iter(found["teacher"]["metrics"].values())) > 0.8
    json.dumps(found, allow_nan=False)


def test_what_was_found_is_what_the_run_will_do(tmp_path: Path) -> None:
    run = make_run(tmp_path, options={"switch": 0.5})
    found = check(run)
    # 48 rows in batches of 8, twice; the second stage starts half-way.
    assert found["steps"] == 12
    assert found["stage_starts"] == {"1": 0, "2": 6}
    # Two student layers, four teacher layers: every second one.
    assert found["layers"] == {"cos_nce": {"student": [1, 2], "teacher": [2, 4]}}
    assert found["labels"]["train"] == {"negative": 24, "positive": 24}
    assert found["truncated"] == {"student": {"train": 0.0, "validation": 0.0}}
    assert found["student"]["parameters"] == sum(p.numel() for p in run.student.parameters())
    assert 0 <= found["padding"] < 0.3


def test_the_checks_change_nothing(tmp_path: Path) -> None:
    """A random state, a memory bank or weights that the checks moved would change the student."""
    run = make_run(tmp_path, options={"negatives": "bank", "vector": "cls"}, method="lrc-bert")
    models = [run.student, run.teacher, *run.plan.terms.values()]
    before = [weights_hash(model) for model in models if model is not None]
    state = torch.get_rng_state()
    check(run)
    assert [weights_hash(model) for model in models if model is not None] == before
    assert torch.equal(torch.get_rng_state(), state)
    assert all(p.grad is None for model in models if model is not None for p in model.parameters())
    assert list(tmp_path.glob("*.*")) == []


def test_a_fine_tuning_is_checked_without_a_teacher(tmp_path: Path) -> None:
    run = make_run(tmp_path, method="none")
    found = check(replace(run, teacher=None))
    assert found["warnings"] == []
    assert "teacher" not in found


def test_small_flaws_of_real_data_only_warn(tmp_path: Path) -> None:
    dataset = with_texts("train", ["  ", "the film was good"])
    train, validation = dataset.splits["train"], dataset.splits["validation"]
    train.texts[0][3] = train.texts[0][2]
    validation.texts[0][5] = f"  {train.texts[0][9].upper()} "
    console = Console(file=io.StringIO(), width=40)
    found = preflight.check(make_run(tmp_path, dataset=dataset), console)
    blank, conflict, repeated = found["warnings"]
    assert "1 of the 48 rows of train (toy rows) have an empty text (row 1)" in blank
    assert "1 text(s) of train occur with different labels" in conflict
    assert "(row 3)" in conflict
    assert "1 of the 24 validation rows (4.2%) are also in train" in repeated
    assert "(row 6)" in repeated
    # Every warning is on the console, whole.
    printed = console.file.getvalue()  # type: ignore[attr-defined]
    assert all(f"Warning: {text}\n" in printed for text in found["warnings"])


def test_all_problems_come_at_once(tmp_path: Path) -> None:
    run = make_run(tmp_path, dataset=with_texts("train", [""] * 6), batch_size=1, method="lrc-bert")
    with pytest.raises(WrongInput, match="^2 problems before the first step:\n1. cos_nce needs") as caught:
        check(run)
    assert "\n2. 6 of the 48 rows of train" in str(caught.value)


# Labels


@pytest.mark.parametrize("split", ["train", "validation"])
@pytest.mark.parametrize(
    ("kind", "labels", "found"),
    [
        ("classification", [0, 2], "from 0 to 1, for [negative, positive], found 2 (row 2; 1 in all)"),
        ("classification", [-1] * 7, "found -1 (rows 1, 2, 3, 4, 5 and 2 more; 7 in all)"),
        ("regression", [np.nan], "a number for every row, found nan (row 1; 1 in all)"),
        ("regression", [0.5, np.inf], "a number for every row, found inf (row 2; 1 in all)"),
        ("multi-label", [[0, 1, 0.5]], "0 or 1 for each of [x, y, z], found 0.5 (row 1; 1 in all)"),
        ("multi-label", [[np.nan] * 3], "a number for every row, found nan (row 1; 1 in all)"),
    ],
)
def test_invalid_labels_are_refused(
    kind: Kind, labels: list[Any], found: str, split: str, tmp_path: Path
) -> None:
    text = problem(make_run(tmp_path, dataset=with_labels(split, labels, kind)))
    assert f"Labels of {split} (toy rows): expected" in text
    assert found in text


@pytest.mark.parametrize("split", ["train", "validation"])
@pytest.mark.parametrize(
    ("kind", "label", "shown"),
    [
        ("classification", 1, "positive"),
        ("regression", 0.5, "0.5"),
        ("multi-label", [1, 0, 0], "[1, 0, 0]"),
    ],
)
def test_labels_that_are_all_the_same_are_refused(
    kind: Kind, label: Any, shown: str, split: str, tmp_path: Path
) -> None:
    text = problem(
        make_run(tmp_path, dataset=with_labels(split, [label] * (48 if split == "train" else 24), kind))
    )
    assert f"labels of {split} (toy rows) are the same ({shown})" in text


def test_held_out_rows_that_are_all_the_same_say_how_they_were_chosen(tmp_path: Path) -> None:
    """A file whose labels alternate gives every tenth row the same one, though its column is right."""
    path = tmp_path / "rows.csv"
    path.write_text("label,text\n" + "".join(f"{i % 2},a film {i}\n" for i in range(300)))
    text = problem(make_run(tmp_path, dataset=sources.load(DatasetSettings(name=str(path)))))
    assert f"All 30 labels of validation ({path} (every tenth row, held out)) are the same (1)" in text
    assert "shuffle the file" in text and "--set dataset.validation=dev.csv" in text


@pytest.mark.parametrize("split", ["train", "validation"])
def test_a_single_row_is_refused(split: str, tmp_path: Path) -> None:
    dataset = make_dataset()
    splits = {**dataset.splits, split: dataset.splits[split].take(np.array([0]))}
    run = make_run(tmp_path, dataset=replace(dataset, splits=splits), method="kd")
    assert f"{split} (toy rows) has 1 row(s), expected at least 2" in problem(run)


def three_classes(train: Sequence[int], validation: Sequence[int]) -> Dataset:
    dataset = make_dataset()
    task = replace(dataset.task, labels=("negative", "positive", "mixed"))
    dataset = with_rows(dataset, "train", labels=np.resize(train, 48))
    return replace(with_rows(dataset, "validation", labels=np.resize(validation, 24)), task=task)


def test_a_class_without_training_rows_is_refused(tmp_path: Path) -> None:
    dataset = three_classes([0, 1], [0, 1, 0, 1, 2])
    teacher = make_encoder(task=dataset.task)
    assert "classes [mixed] are in validation but not in train" in problem(
        make_run(tmp_path, dataset=dataset, teacher=teacher, method="none")
    )


@pytest.mark.parametrize(
    ("train", "text"), [([0, 1], "No row has the classes [mixed]"), ([0, 1, 2], "no row of [mixed]")]
)
def test_a_class_without_validation_rows_is_a_warning(train: list[int], text: str, tmp_path: Path) -> None:
    dataset = three_classes(train, [0, 1])
    teacher = make_encoder(task=dataset.task)
    found = check(make_run(tmp_path, dataset=dataset, teacher=teacher, method="none"))
    assert any(text in warning for warning in found["warnings"])


def test_a_label_that_never_changes_is_a_warning(tmp_path: Path) -> None:
    dataset = make_dataset("multi-label")
    dataset.splits["train"].labels[:, 2] = 0
    assert (
        "In train, [z] are the same for every row."
        in check(make_run(tmp_path, dataset=dataset))["warnings"]
    )


# Texts


def test_many_empty_texts_are_refused(tmp_path: Path) -> None:
    text = problem(make_run(tmp_path, dataset=with_texts("validation", ["", "\n", " \t"]), method="none"))
    assert "3 of the 24 rows of validation (toy rows) have an empty text (rows 1, 2, 3)" in text
    assert "'text'" in text and "dataset.text" in text


def test_an_empty_second_text_counts(tmp_path: Path) -> None:
    dataset = make_dataset(pair=True)
    dataset.splits["train"].texts[1][4] = " "
    (warning,) = check(make_run(tmp_path, dataset=dataset, pair=True))["warnings"]
    assert "1 of the 48 rows of train (toy rows) have an empty text (row 5)" in warning


def test_validation_rows_from_train_are_refused(tmp_path: Path) -> None:
    dataset = make_dataset()
    dataset.splits["validation"].texts[0][:3] = dataset.splits["train"].texts[0][2:5]
    dataset.splits["validation"].labels[:3] = dataset.splits["train"].labels[2:5]
    text = problem(make_run(tmp_path, dataset=dataset))
    assert "3 of the 24 validation rows (12.5%) are also in train" in text


def test_half_of_a_pair_is_no_repeat(tmp_path: Path) -> None:
    dataset = make_dataset(pair=True)
    train, validation = dataset.splits["train"], dataset.splits["validation"]
    validation.texts[0][:3] = train.texts[0][:3]
    found = check(make_run(tmp_path, dataset=dataset, pair=True))
    assert found["validation_rows_in_train"] == 0


def test_two_scores_for_one_text_are_no_conflict(tmp_path: Path) -> None:
    dataset = make_dataset("regression")
    texts = dataset.splits["train"].texts[0]
    texts[2] = texts[0]
    assert check(make_run(tmp_path, dataset=dataset))["warnings"] == []


# Lengths and batches


@pytest.mark.parametrize(
    ("max_length", "start"), [(13, ""), (12, "More than 20% of the rows do not fit: ")]
)
def test_truncated_rows_are_a_warning(max_length: int, start: str, tmp_path: Path) -> None:
    run = make_run(tmp_path, max_length=max_length)
    # Rows have 2 to 12 words, [CLS] and [SEP].
    longer = [np.mean([len(t.split()) + 2 > max_length for t in rows.texts[0]]) for _, rows in run.splits()]
    (warning,) = check(run)["warnings"]
    assert warning.startswith(
        f"{start}{longer[0]:.1%} of train, {longer[1]:.1%} of validation are longer than"
    )
    assert "dataset.max_length" in warning and "up to 66 tokens" in warning


def test_rows_that_are_longer_than_the_model_reads_are_a_warning(tmp_path: Path) -> None:
    long = " ".join(["film"] * 70)
    # A single long row: below the share from which truncation itself is worth a word.
    dataset = make_dataset(pair=True, count=200)
    dataset.splits["train"].texts[0][7] = long
    (warning,) = check(make_run(tmp_path, dataset=dataset, pair=True, max_length=128))["warnings"]
    assert "0.5% of train" in warning and "reads at most 66 tokens" in warning


def test_a_batch_of_one_row_is_refused_where_two_are_needed(tmp_path: Path) -> None:
    text = problem(make_run(tmp_path, batch_size=1))
    assert "cos_nce needs at least 2 rows in every batch, found 1" in text
    assert "training.batch_size=1" in text
    assert check(make_run(tmp_path, batch_size=1, method="kd"))["warnings"] == []


def test_an_odd_row_left_over_is_refused(tmp_path: Path) -> None:
    dataset = make_dataset(count=49)
    assert "training.batch_size=2 leaves such batches of the 49 rows: set it to 3" in problem(
        make_run(tmp_path, dataset=dataset, batch_size=2)
    )


def test_rows_too_long_to_be_two_in_a_batch_are_refused(tmp_path: Path) -> None:
    dataset = with_texts("train", [" ".join(["film"] * 18)])
    text = problem(make_run(tmp_path, dataset=dataset, max_tokens=39))
    assert "(row 1 of train). 2 rows of 20 tokens do not fit training.max_tokens=39: raise it to 40" in text
    assert check(make_run(tmp_path, dataset=dataset, max_tokens=40))["warnings"] == []


def test_a_stage_without_a_step_is_a_warning(tmp_path: Path) -> None:
    (warning,) = check(make_run(tmp_path, epochs=0.2, options={"switch": 0.8}))["warnings"]
    assert "Stage 2 of 2 gets none of the 1 step(s)" in warning


# Student and teacher


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


# Does the teacher solve the task


class Rescaled(nn.Module):
    """A head whose logits are those of another, times a factor and with an offset."""

    def __init__(self, head: nn.Module, factor: float, offset: float | Tensor):
        super().__init__()
        self.head, self.factor, self.offset = head, factor, offset

    def forward(self, hidden: Tensor) -> Tensor:
        logits: Tensor = self.factor * self.head(hidden) + self.offset
        return logits


def rescaled(factor: float, offset: float | Tensor = 0.0, kind: Kind = "regression") -> Encoder:
    """Return the teacher with its logits rescaled."""
    teacher = make_teacher(kind)
    model: Any = teacher.model
    model.classifier = Rescaled(model.classifier, factor, offset)
    return teacher


def untrained(kind: Kind, seed: int = 0) -> Encoder:
    """Return a random encoder that solves nothing."""
    return make_encoder(task=make_task(kind), layers=4, width=24, seed=seed)


@pytest.mark.parametrize("kind", ["classification", "regression", "multi-label"])
def test_a_teacher_that_does_not_solve_the_task_is_refused(kind: Kind, tmp_path: Path) -> None:
    run = make_run(tmp_path, kind=kind, teacher=untrained(kind))
    assert "The teacher does not solve this task: expected it to be better than chance" in problem(run)


def test_without_a_teacher_in_the_loss_its_faults_are_warnings(tmp_path: Path) -> None:
    run = make_run(tmp_path, teacher=untrained("classification"), method="none")
    (warning,) = check(run)["warnings"]
    assert "does not solve this task" in warning


def test_a_teacher_with_turned_labels_is_refused_and_the_order_named(tmp_path: Path) -> None:
    text = problem(make_run(tmp_path, teacher=make_teacher(order=(1, 0))))
    assert "0% are right as given, [negative, positive]" in text
    assert (
        "100% if its labels are read as [positive, negative] (accuracy 0.000 on 24 validation rows)" in text
    )
    assert "number the data's labels in the order [positive, negative]" in text
    assert """--set 'dataset.labels=["positive","negative"]'""" in text


def test_multi_label_names_can_be_turned_too(tmp_path: Path) -> None:
    dataset = make_dataset("multi-label")
    for rows in dataset.splits.values():
        rows.labels[:] = rows.labels[:, [1, 0, 2]]
    text = problem(make_run(tmp_path, dataset=dataset))
    assert "if its labels are read as [y, x, z]" in text


def test_a_constant_teacher_is_no_better_than_chance(tmp_path: Path) -> None:
    """Always naming the larger class is right for most rows, and knows nothing."""
    dataset = make_dataset()
    for rows in dataset.splits.values():
        rows.labels[:] = np.arange(len(rows)) % 8 != 0
    teacher = rescaled(0.0, torch.tensor([0.0, 1.0]), kind="classification")
    text = problem(make_run(tmp_path, dataset=dataset, teacher=teacher))
    assert "accuracy 0.875" in text and "88% of its predictions are right, 88% would be by chance" in text


def test_logits_that_are_not_finite_are_refused(tmp_path: Path) -> None:
    text = problem(make_run(tmp_path, teacher=rescaled(float("inf"), kind="classification")))
    assert "logits are not finite for 24 of 24 validation rows (first: row 1)" in text


def test_values_that_fall_where_labels_rise_are_refused(tmp_path: Path) -> None:
    text = problem(make_run(tmp_path, kind="regression", teacher=rescaled(-1.0)))
    assert "fall where the labels rise: pearson -0.9" in text


@pytest.mark.parametrize(("factor", "offset"), [(5.0, 0.0), (0.1, 0.0), (1.0, 2.0)])
def test_values_on_another_scale_are_refused(factor: float, offset: float, tmp_path: Path) -> None:
    text = problem(make_run(tmp_path, kind="regression", teacher=rescaled(factor, offset)))
    assert "values are on another scale than the labels" in text


def test_a_constant_value_is_refused(tmp_path: Path) -> None:
    text = problem(make_run(tmp_path, kind="regression", teacher=rescaled(0.0, 0.5)))
    assert "It gives 0.5 for every row" in text


@pytest.mark.parametrize("kind", ["classification", "regression"])
def test_a_teacher_that_knows_little_is_a_warning(
    kind: Kind, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Right in 58 of 100 rows where 50 are chance, or correlated by 0.15: surely more than luck."""
    dataset = make_dataset(kind, pair=True)
    rows = make_rows(dataset.task, 500, seed=1)
    run = make_run(
        tmp_path, dataset=replace(dataset, splits={**dataset.splits, "validation": rows}), pair=True
    )
    if kind == "classification":
        right = np.arange(500) // 2 % 50 < 29
        logits = one_hot(np.where(right, rows.labels, 1 - rows.labels), 2).astype(np.float32)
    else:
        z = (rows.labels - rows.labels.mean()) / rows.labels.std()
        noise = np.random.default_rng(0).standard_normal(500)
        noise -= noise.mean() + z * (noise @ z) / 500
        values = 0.15 * z + (1 - 0.15**2) ** 0.5 * noise / noise.std()
        logits = (rows.labels.mean() + rows.labels.std() * values)[:, None]
    monkeypatch.setattr(teacher_checks, "predict", lambda *_, **__: logits)
    warnings = [text for text in check(run)["warnings"] if "also in train" not in text]
    assert len(warnings) == 1
    assert "The teacher is little better than chance" in warnings[0]


def test_three_validation_rows_cannot_tell(tmp_path: Path) -> None:
    dataset = make_dataset()
    splits = {**dataset.splits, "validation": dataset.splits["validation"].take(np.arange(3))}
    (warning,) = check(make_run(tmp_path, dataset=replace(dataset, splits=splits)))["warnings"]
    assert "Too few or too equal validation rows" in warning


def test_the_sample_is_spread_over_the_split(tmp_path: Path) -> None:
    """A split that is sorted by label must not be judged by its first class."""
    rows = make_rows(make_task(), 1200, seed=1)
    rows = rows.take(np.argsort(rows.labels, kind="stable"))
    dataset = make_dataset()
    dataset = replace(dataset, splits={**dataset.splits, "validation": rows})
    found = check(make_run(tmp_path, dataset=dataset))
    assert found["teacher"] == {"rows": 512, "metrics": {"accuracy": 1.0}}
    assert not any("too equal" in warning for warning in found["warnings"])


def one_hot(classes: np.ndarray, count: int) -> np.ndarray:
    return np.eye(count, dtype=np.int64)[classes]


@pytest.mark.parametrize("order", list(itertools.permutations(range(3))))
def test_every_order_of_three_classes_is_found(order: tuple[int, ...]) -> None:
    """The teacher is right in nine of ten rows, and calls class `order[i]` by the number i."""
    chance = np.random.default_rng(0)
    meant = chance.integers(0, 3, size=200)
    true = np.where(chance.random(200) < 0.9, meant, chance.integers(0, 3, size=200))
    predicted = np.argsort(order)[meant]
    found = better_order(one_hot(predicted, 3), one_hot(true, 3))
    assert found == (None if order == (0, 1, 2) else list(order))


def test_guesses_have_no_better_order() -> None:
    """With 24 orders to choose from, some order of pure guesses always looks better than the given."""
    found = 0
    for seed in range(200):
        chance = np.random.default_rng(seed)
        guesses, true = chance.integers(0, 4, size=(2, 100))
        found += better_order(one_hot(guesses, 4), one_hot(true, 4)) is not None
    assert found <= 2


def test_a_constant_guess_of_the_rare_class_has_no_better_order() -> None:
    """Read the other way round it is right more often, and still knows nothing."""
    true = one_hot((np.arange(100) % 5 == 0).astype(int), 2)
    assert better_order(one_hot(np.ones(100, dtype=int), 2), true) is None


# Place and processes


def test_a_disk_that_is_too_small_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = make_run(tmp_path / "not" / "there", method="none", keep_checkpoints=2)
    weights = sum(4 * p.numel() for p in run.student.parameters())
    # Two checkpoints and one written aside, each with weights, two moments and the best student;
    # then the student itself.
    need = (3 * 4 + 1) * weights
    free = SimpleNamespace(free=need)
    asked = []

    def usage(place: Path) -> SimpleNamespace:
        asked.append(place)
        return free

    monkeypatch.setattr(shutil, "disk_usage", usage)
    assert check(run)["disk"] == {"need_mb": round(need / 1e6, 1), "free_mb": round(need / 1e6, 1)}
    assert asked == [tmp_path]
    free.free = need - 1
    text = problem(run)
    assert f"found {free.free / 1e6:,.0f} MB free at {tmp_path}" in text
    assert "training.keep_checkpoints (now 2)" in text


def test_what_a_run_needs_of_the_disk(tmp_path: Path) -> None:
    def need(**changes: Any) -> float:
        need_mb: float = check(make_run(tmp_path, student=make_encoder(width=64), **changes))["disk"][
            "need_mb"
        ]
        return need_mb

    plain = need(method="none")
    assert need(method="none", keep_checkpoints=4) == pytest.approx(plain * 21 / 13, rel=0.05)
    assert need(method="none", select="last") == pytest.approx(plain * 10 / 13, rel=0.05)
    assert need(method="none", control=True) == pytest.approx(plain * 2, rel=0.05)
    assert need(method="lrc-bert") > plain


def recording(run: preflight.Run, **settings: Any) -> preflight.Run:
    teacher = TeacherSettings(name="t", max_bytes=10**9, **settings)
    return replace(run, recording=teacher, repeated=True)


def bytes_of_logits(run: preflight.Run) -> int:
    """Two float32 for each row, where rows of equal tokens count once."""
    tokens = run.tokens.teacher["train"]
    spans = zip(tokens.offsets, tokens.lengths, strict=True)
    return 4 * 2 * len({tuple(tokens.ids[start : start + n]) for start, n in spans})


def test_what_is_recorded_counts_on_the_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("STILLROOM_CACHE", str(tmp_path / "kept"))
    run = recording(make_run(tmp_path / "run", method="kd"))
    need = 13 * sum(4 * p.numel() for p in run.student.parameters()) + bytes_of_logits(run)
    free = SimpleNamespace(free=need)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: free)
    found = check(run)["recorded_teacher"]
    assert found["recorded"] == ["logits"] and found["live"] == []
    assert Path(found["folder"]).parent == tmp_path / "kept/teacher"
    assert not (tmp_path / "kept/teacher").exists(), "checks write nothing"
    free.free = need - 1
    text = problem(run)
    assert "checkpoints, recorded teacher and student" in text and "teacher.max_bytes" in text
    for alone in (replace(run, repeated=False), recording(make_run(tmp_path / "run", method="none"))):
        assert "recorded_teacher" not in check(alone)


def test_a_cache_on_another_disk_is_checked_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    other = Path("/dev/shm")
    if not other.is_dir() or other.stat().st_dev == tmp_path.stat().st_dev:
        pytest.skip("needs two file systems")
    run = recording(make_run(tmp_path, method="kd"), cache=f"{other}/stillroom-not-there/cache")
    more = bytes_of_logits(run)
    free = {other: more, tmp_path: 10**9}
    monkeypatch.setattr(shutil, "disk_usage", lambda place: SimpleNamespace(free=free[place]))
    assert check(run)["recorded_teacher"]["live"] == []
    free[other] = more - 1
    assert f"at {other}" in problem(run) and "teacher.cache" in problem(run)


def test_what_is_there_already_is_not_needed_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A run that filled most of the disk with its own checkpoints can still be resumed."""
    run = make_run(tmp_path, method="none")
    need = 13 * sum(4 * p.numel() for p in run.student.parameters())
    monkeypatch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(free=need - 1000))
    assert "Free some space" in problem(run)
    saved = tmp_path / "checkpoints" / "step-00000001"
    saved.mkdir(parents=True)
    (saved / "student.safetensors").write_bytes(bytes(1000))
    assert check(run)["warnings"] == []


@pytest.mark.parametrize(("accelerate", "torchrun"), [(2, "1"), (1, "2")])
def test_several_processes_are_refused(
    accelerate: int, torchrun: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    preflight.require_one_process()
    monkeypatch.setattr(folder_checks, "Accelerator", lambda: SimpleNamespace(num_processes=accelerate))
    monkeypatch.setenv("WORLD_SIZE", torchrun)
    with pytest.raises(WrongInput, match="Expected one process, found 2"):
        preflight.require_one_process()


@pytest.mark.parametrize("name", ["nope", "wandb"])
def test_a_tracker_that_is_not_there_is_an_error(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Accelerate would leave it out without a word, and the curves of a day would be nowhere."""
    monkeypatch.setattr("stillroom.preflight.folder.get_available_trackers", list)
    with pytest.raises(WrongInput, match=f"{name} is not installed or not known"):
        check(make_run(tmp_path, log_with=(name,)))


# Augmented rows


def make_augmented(folder: Path, **given: Any) -> preflight.Run:
    given = {"method": "cilda", "options": {"generator": "tiny"}, "generator": make_generator(), **given}
    return make_run(folder, **given)


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


def test_the_generator_counts_on_the_disk(tmp_path: Path) -> None:
    generator = make_generator()
    own = sum(value.numel() * value.element_size() for value in generator.model.state_dict().values())
    run = make_augmented(tmp_path, generator=generator)
    difference = folder_checks._need(run) - folder_checks._need(replace(run, generator=None))
    # Weights and two moments, in each checkpoint and in the one that is written aside.
    assert difference == (run.training.keep_checkpoints + 1) * 3 * own

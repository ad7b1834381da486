"""Checks of student and teacher: heads, names of labels, tokens, layers, and a trial of each stage."""

import copy
import re
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator

from stillroom.data.batching import Inputs, make_batch, pad
from stillroom.data.soft_labels import logits_of
from stillroom.data.tasks import Task, plain
from stillroom.data.tokens import TokenisedRows, fingerprint
from stillroom.encoder import Encoder, Needs, Outputs, kind_of
from stillroom.errors import WrongInput
from stillroom.evaluation import cost
from stillroom.generator import REMEDY
from stillroom.preflight.base import SPLITS, Report, Run, listed, named, shortened
from stillroom.recipe import setting
from stillroom.teacher import Teacher
from stillroom.teacher.given import GivenTeacher
from stillroom.teacher.live import LiveTeacher
from stillroom.training.augmentation import Augmenter
from stillroom.training.distiller import Distiller

_TRIAL_ROWS = 4
_SHOWN_TOKENS = 12


def require_same_head(task: Task, teacher: Encoder) -> None:
    """Raise `WrongInput` unless the teacher's head is one for this kind of labels and their count.

    Made before the student is built, which may copy the head.
    """
    found = teacher.config.num_labels
    stated = kind_of(teacher.config)
    kind = stated or ("regression" if found == 1 else None)
    if kind is not None and kind != task.kind and "regression" in (kind, task.kind):
        raise WrongInput(
            f"The labels of {task.name} are for {task.kind}, and the teacher is for {kind} "
            f"({found} output(s)). Give a teacher that was fine-tuned on such labels, or say what the "
            f"labels of a file of your own mean with dataset.kind={kind}."
        )
    if found != task.outputs:
        raise WrongInput(
            f"{task.name} has {task.outputs} label(s) {listed(task.labels)}, the teacher has {found} "
            f"{listed(teacher.labels)}. Give a teacher that was fine-tuned on these labels, or check "
            "dataset.label and dataset.labels."
        )
    if stated is not None and stated != task.kind:
        raise WrongInput(
            f"The labels of {task.name} are for {task.kind}, and the teacher's config.json says "
            f"problem_type={teacher.config.problem_type}. Give another teacher, or set "
            f"dataset.kind={stated}."
        )


def label_names(run: Run, report: Report) -> None:
    """The teacher's label names are the data's, in the same order."""
    task, teacher = run.dataset.task, run.teacher
    if teacher is None or task.kind == "regression":
        return
    ours, theirs = [plain(name) for name in task.labels], [plain(name) for name in teacher.labels]
    if ours == theirs:
        return
    orders = f"the data's labels are {listed(task.labels)}, the teacher's {listed(teacher.labels)}"
    if sorted(ours) == sorted(theirs):
        report.error(
            f"Expected the same labels in the same order: {orders}. If the teacher's weights have its "
            f"order, {reorder(teacher.labels)}; if they have the data's, correct id2label in "
            "the teacher's config.json."
        )
    elif all(re.fullmatch(r"label \d+", name) for name in theirs):
        report.warn(
            f"The teacher's labels have no names ({listed(teacher.labels)}); they are read in the "
            f"data's order {listed(task.labels)}."
        )
    else:
        report.warn(f"Names of labels differ: {orders}. They are taken to mean the same, in this order.")


def reorder(order: tuple[str, ...]) -> str:
    """Return the remedy for a teacher whose logits stand in another order than the data's labels."""
    return (
        f"number the data's labels in the order {listed(order)} (for a file of your own: "
        f"{setting('dataset.labels', [str(name) for name in order])})"
    )


def vocabulary(run: Run, report: Report) -> None:
    """Every token id is in the model's vocabulary."""
    for who, model in run.models():
        splits = run.tokens.teacher if who == "teacher" else run.tokens.student
        size = len(model.words)
        largest = max(_largest(splits[name].ids, splits[name].pad_id) for name in SPLITS)
        if largest >= size:
            report.error(
                f"The {who} has a vocabulary of {size} tokens, its tokenizer gave the id {largest}: the "
                "tokenizer belongs to another model. Copy model and tokenizer from the same place."
            )
        types = getattr(model.config, "type_vocab_size", None)
        given = max(_largest(splits[name].types, 0) for name in SPLITS)
        if types and given >= types:
            report.error(
                f"The {who} knows {types} token type(s), its tokenizer gave the type {given}: the "
                "tokenizer belongs to another model. Copy model and tokenizer from the same place."
            )


def _largest(values: np.ndarray | None, least: int) -> int:
    return least if values is None else int(values.max(initial=least))


def same_tokens(run: Run, report: Report) -> None:
    """Student and teacher read the same tokens wherever their states are compared one by one."""
    names = [name for name, term in run.terms().items() if term.same_tokens]
    if run.teacher is None or not names or run.tokens.alike:
        return
    ours, theirs = run.tokens.student["train"], run.tokens.teacher["train"]
    known = run.teacher.tokenizer.get_vocab()
    vocabulary = run.student.tokenizer.convert_ids_to_tokens(range(len(run.student.tokenizer)))
    # The same token may have another number, as in a vocabulary that was trimmed.
    number = np.array([known.get(token, -1) for token in vocabulary])
    rows = range(len(ours))
    row = next((i for i in rows if not np.array_equal(number[_ids(ours, i)], _ids(theirs, i))), None)
    if row is None:
        return
    needs = f"{', '.join(names)} compares states token by token"
    if fingerprint(run.student.tokenizer) == fingerprint(run.teacher.tokenizer):
        least = min(run.student.positions, run.teacher.positions)
        report.error(
            f"{needs}, but row {row + 1} of train is cut to {ours.lengths[row]} tokens for the student "
            f"and {theirs.lengths[row]} for the teacher. Set dataset.max_length={least}."
        )
        return
    text = " | ".join(shortened(column[row]) for column in run.dataset.splits["train"].texts)
    report.error(
        f"{needs}, so student and teacher must tokenise alike, but {text} is\n"
        f"   {_tokens(run.student, ours, row)} to the student and\n"
        f"   {_tokens(run.teacher, theirs, row)} to the teacher.\n"
        "   Use a student with the teacher's tokenizer (a size such as 4x312, or layers:2,4,6), or "
        "method=kd, which works with two tokenizers."
    )


def _ids(tokens: TokenisedRows, row: int) -> np.ndarray:
    return tokens.ids[tokens.offsets[row] : tokens.offsets[row] + tokens.lengths[row]]


def _tokens(model: Encoder, tokens: TokenisedRows, row: int) -> str:
    ids = _ids(tokens, row)
    shown = model.tokenizer.convert_ids_to_tokens(ids[:_SHOWN_TOKENS].tolist())
    return listed([*shown, "..."] if len(ids) > _SHOWN_TOKENS else shown)


def layers(run: Run, report: Report) -> None:
    """The layers that are compared are there."""
    total, outside = cost.parameters(run.student)
    report.found["student"] = {"parameters": total, "non_embedding_parameters": outside}
    report.found["layers"] = {}
    for name, term in run.terms().items():
        read = {"student": _layers_of(term.student_needs)}
        if run.teacher is not None:
            read["teacher"] = _layers_of(term.teacher_needs)
        if any(read.values()):
            report.found["layers"][name] = read
        for who, model in run.models():
            beyond = [layer for layer in read.get(who, []) if not 0 <= layer <= model.depth]
            if beyond:
                report.error(
                    f"{name} reads the layers {listed(beyond)} of the {who}, which has layers 1 to "
                    f"{model.depth}. Correct method.layer_map."
                )


def _layers_of(needs: Needs) -> list[int]:
    return sorted(needs.states | needs.attention)


def attention(run: Run, report: Report) -> None:
    """Attention can be read where it is, and has as many heads where it is compared by head."""
    terms = run.terms()
    for who, model in run.models():
        names = [
            name
            for name, term in terms.items()
            if (term.teacher_needs if who == "teacher" else term.student_needs).attention
        ]
        if not names:
            continue
        # Any token will do: what is tried is whether the model calls at all.
        ids = torch.zeros(1, 2, dtype=torch.int64, device=next(model.parameters()).device)
        try:
            with torch.no_grad():
                model(Inputs(ids, torch.ones_like(ids), None), Needs(values=frozenset({1})))
        except WrongInput as error:
            report.error(f"{', '.join(names)} reads the attention of the {who}. {error}")
    if run.teacher is None or run.student.heads == run.teacher.heads:
        return
    names = [name for name, term in terms.items() if term.same_heads]
    if names:
        report.error(
            f"{', '.join(names)} compares attention head by head, but the student has "
            f"{run.student.heads} heads and the teacher {run.teacher.heads}. Give a student with "
            f"{run.teacher.heads} heads: layers:2,4,6, or a size that says so, LAYERSxWIDTHxHEADS."
        )


def perturbation(run: Run, report: Report) -> None:
    """The student's embeddings can be perturbed where the method does so, and learn all the same."""
    found = run.plan.perturbation
    if found is None or not any(stage.perturb for stage in run.plan.stages):
        return
    if run.student.embedding_dropout() is None:
        report.error(
            f"The method perturbs the student's embeddings, and those of "
            f"{type(run.student.model).__name__} cannot be: expected one dropout at their end. Set "
            "method.perturbation=off, or use a student of another family."
        )
    elif found.norm == "token" and found.epsilon >= 1:
        report.warn(
            f"The embeddings of every token are perturbed by {found.epsilon:g}. In trainings of a few "
            "epochs that kept students from learning, and method.perturbation_norm=tensor did not."
        )


def augmentation(run: Run, report: Report) -> None:
    """Generator, teacher and student have one vocabulary, read the same tokens, and take embeddings."""
    if run.plan.augmentation is None or run.generator is None:
        return
    name, ours = run.plan.augmentation.generator, run.student.tokenizer.get_vocab()
    beside: list[tuple[str, Any]] = [("generator", run.generator)]
    readers, remedy = "the student, so both", "a generator that was trained with the student's tokenizer"
    if run.teacher is not None:
        beside.append(("teacher", run.teacher))
        readers = "teacher and student, so all three"
        remedy = "a student with the teacher's tokenizer and a generator that was trained with it"
    for who, other in beside:
        theirs = other.tokenizer.get_vocab()
        differ = sorted(word for word in ours.keys() | theirs.keys() if ours.get(word) != theirs.get(word))
        if differ:
            report.error(
                f"The words that the generator {name} writes are read by {readers} need one vocabulary: "
                f"the student's has {len(ours)} tokens, the {who}'s {len(theirs)}, and {len(differ)} "
                f"differ, such as {differ[0]!r}. Use {remedy}: {REMEDY.format(model='ENCODER')}."
            )
            return
    tokens, others = run.tokens.student["train"], run.tokens.teacher["train"]
    alike = np.array_equal(tokens.lengths, others.lengths) and np.array_equal(tokens.ids, others.ids)
    if run.teacher is not None and not alike:
        report.error(
            "Student and teacher have one vocabulary, but cut the texts of train differently. Set "
            f"dataset.max_length={min(run.student.positions, run.teacher.positions)}, or use a student "
            "with the teacher's tokenizer."
        )
    longest = int(tokens.lengths.max())
    if longest > run.generator.positions:
        report.error(
            f"The generator {name} reads {run.generator.positions} tokens, and a row of train has "
            f"{longest}. Set dataset.max_length={run.generator.positions}, or give another generator."
        )
        return
    generator: Any = run.generator.model
    models = [(who, model.words) for who, model in run.models()]
    for who, table in [*models, ("generator", generator.get_output_embeddings().weight)]:
        if len(table) < len(ours):
            report.error(
                f"The tokenizer has {len(ours)} tokens, the {who} only {len(table)}. Copy model and "
                "tokenizer from the same place."
            )
    for who, model in run.models():
        _takes_words(who, model, run, report)


def _takes_words(who: str, model: Encoder, run: Run, report: Report) -> None:
    """The model computes the same from word embeddings as from the ids that they belong to."""
    inputs = pad(run.tokens.student["train"], np.arange(min(_TRIAL_ROWS, len(run.tokens.student["train"]))))
    inputs = inputs.to(model.words.device)
    try:
        with torch.no_grad():
            want = model.eval()(inputs, Needs(logits=True)).logits
            found = model(inputs, Needs(logits=True), words=model.words[inputs.input_ids]).logits
        change = float((found - want).abs().max())
        if change <= 1e-3 * (1 + float(want.abs().max())):
            return
        reason = f"its logits change by up to {change:.3g}"
    except (TypeError, ValueError, RuntimeError, NotImplementedError) as error:
        reason = f"it raises {type(error).__name__}: {error}"
    report.error(
        f"Augmented rows reach a model as word embeddings, and the {who}, a {type(model.model).__name__}, "
        f"cannot be given them in place of token ids: {reason}. Use a model of another family, or a "
        "method without augmentation."
    )


def trial(run: Run, report: Report) -> None:
    """The loss of every stage can be computed, and is finite, on a few rows.

    A second stage that fails would otherwise show only when most of the training is done.
    """
    device = Accelerator().device
    least = max(term.least_rows for term in run.terms().values())
    rows = run.dataset.splits["train"]
    index = np.arange(min(len(rows), max(least, _TRIAL_ROWS)))
    made = make_batch(index, rows, run.tokens.student["train"], run.tokens.teacher["train"])
    if run.hide is not None:
        made = run.hide(made, 0)
    batch = made.to(device)
    with torch.random.fork_rng():
        # A copy: terms keep state of the rows they see.
        plan = copy.deepcopy(run.plan)
        distiller = Distiller(run.student, plan, bf16=run.bf16).to(device)
        augmenter = teacher = None
        if run.teacher is not None:
            teacher = LiveTeacher(run.teacher, device=device, bf16=run.bf16)
        taught: Teacher | None = teacher
        if rows.soft_labels is not None:
            taught = GivenTeacher(logits_of(rows.soft_labels, run.dataset.task.kind), teacher)
        if run.generator is not None and teacher is not None:
            augmenter = Augmenter(plan, run.generator, teacher, distiller, seed=0, bf16=run.bf16)
        for who, model in run.models():
            inputs = batch.teacher if who == "teacher" else batch.student
            with named(who, model, bf16=run.bf16), torch.no_grad():
                with torch.autocast(device.type, torch.bfloat16, enabled=run.bf16):
                    model(inputs, Needs(logits=True))
        for number, stage in enumerate(run.plan.stages, start=1):
            outputs = taught(batch, plan.teacher_needs(stage)) if taught else Outputs(torch.empty(0))
            augmented = augmenter and augmenter.augment(batch, augmenter.draw(made, 0), stage)
            found = distiller(batch, outputs, stage, augmented).terms
            if augmenter is not None:
                found |= augmenter.objective(batch, augmenter.draw(made, 0)).terms
            wrong = [f"{name} = {value.item()}" for name, value in found.items() if not value.isfinite()]
            if wrong:
                report.error(
                    f"In stage {number}, before any training, {', '.join(wrong)} on the first rows of "
                    "train, expected finite numbers: weights are damaged or overflow. Set "
                    "training.precision=float32, or give other models."
                )

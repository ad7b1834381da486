"""Task-agnostic distillation: text in, a start out; killed, resumed, and given what it cannot use."""

import json
import math
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from rich.console import Console
from transformers import AutoModel, AutoModelForMaskedLM, AutoModelForSequenceClassification
from typer.testing import CliRunner

from stillroom import PretrainRecipe, WrongInput, encoder, methods, pretrain, student
from stillroom.cli import app
from stillroom.data.batching import Batch, Inputs
from stillroom.encoder import Outputs, weights_hash
from stillroom.evaluation.held_out import linear_cka
from stillroom.methods.base import Context
from stillroom.methods.codir import CoDIRSettings, InBatchContrast
from stillroom.ops.info_nce import info_nce
from stillroom.processes import Share
from stillroom.recipe import MethodSettings
from stillroom.run.pretrain import _Parts, resolve
from stillroom.training.masked_lm import Hiding
from tiny import WORDS, make_encoder, make_generator, make_task, make_tokenizer

QUIET = Console(quiet=True)
STUDENT = "student/model.safetensors"
PRETRAINERS = [method.name for method in methods.METHODS.values() if method.pretrain is not None]
OPTIONS = {"minilmv2": {"relation_heads": 4}}


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with text, a headless teacher `body`, and a masked language model `lm`."""
    folder = tmp_path_factory.mktemp("pretrain")
    chance = np.random.default_rng(0)
    texts = [" ".join(chance.choice(WORDS, size=20)) for _ in range(120)]
    (folder / "text.txt").write_text("\n\n".join(texts), encoding="utf-8")
    body = make_encoder(layers=4, width=24)
    body.model.bert.save_pretrained(folder / "body")
    body.tokenizer.save_pretrained(folder / "body")
    like = make_encoder(layers=2, width=24)
    with torch.random.fork_rng():
        torch.manual_seed(3)
        AutoModelForMaskedLM.from_config(like.config).save_pretrained(folder / "lm")
    like.tokenizer.save_pretrained(folder / "lm")
    return folder


def recipe(place: Path, method: str = "minilm", *overrides: str, **more: Any) -> PretrainRecipe:
    teacher = "lm" if methods.METHODS[method].masked_lm else "body"
    given = {
        "teacher": str(place / teacher),
        "text": {"files": [str(place / "text.txt")], "sequence_length": 16, "held_out": 8},
        "student": "2x16x2x32",
        "method": {"name": method, **OPTIONS.get(method, {})},
    }
    fixed = ["batch_size=8", "max_steps=6", "log_every=1", "checkpoint_every=2", "precision=float32"]
    return PretrainRecipe.load(None, [*(f"training.{t}" for t in fixed), *overrides], **{**given, **more})


def log_of(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]


@pytest.mark.parametrize("method", PRETRAINERS)
def test_each_method_makes_a_start_that_hugging_face_and_distill_load(
    method: str, place: Path, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    metrics = pretrain(recipe(place, method, "training.learning_rate=3e-3"), run, console=QUIET)
    before, after = metrics["held_out"]["before"], metrics["held_out"]["after"]
    assert after["loss"] < before["loss"]
    assert {"match_0", "match_1", "match_2"} < after.keys()
    assert 6 * 7 * 16 <= metrics["train"]["tokens"] <= 6 * 8 * 16
    masked_lm = methods.METHODS[method].masked_lm
    if masked_lm:
        assert after["perplexity"] == pytest.approx(np.exp(after["hard"]))
    lines = [line["validation"] for line in log_of(run) if "validation" in line]
    assert len(lines) == 6 and lines[-1] == pytest.approx(after)
    auto = AutoModelForMaskedLM if masked_lm else AutoModel
    _, report = auto.from_pretrained(run / "student", output_loading_info=True)
    assert not report["missing_keys"] and not report["unexpected_keys"]
    model = AutoModelForSequenceClassification.from_pretrained(run / "student", num_labels=3)
    stored = encoder.load_body(str(run), head="masked-lm" if masked_lm else "none")
    want = stored.words
    assert torch.equal(model.get_input_embeddings().weight, want)
    assert not torch.equal(want, make_encoder(layers=2, width=16).words)


def test_a_task_starts_from_it(place: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    pretrain(recipe(place), run, console=QUIET)
    task, teacher = make_task(), make_encoder(layers=4, width=24)
    found = student.build("2x16x2x32", teacher, task, seed=0, init=str(run))
    want = {f"bert.{name}": value for name, value in encoder.load_body(str(run)).model.state_dict().items()}
    assert all(torch.equal(found.model.state_dict()[name], value) for name, value in want.items())
    assert found.labels == task.labels
    itself = student.build(str(run), teacher, task, seed=0)
    assert weights_hash(itself.model) == weights_hash(found.model)


@pytest.mark.parametrize("method", PRETRAINERS)
def test_resumed_it_gives_the_same_student(method: str, place: Path, tmp_path: Path) -> None:
    """The newest checkpoint is lost, as after a kill: the rest is done again, to the same bytes."""
    run = tmp_path / "run"
    pretrain(recipe(place, method, init="pca"), run, console=QUIET)
    want, log = (run / STUDENT).read_bytes(), log_of(run)
    max((run / "checkpoints").iterdir()).rename(tmp_path / "gone")
    (run / STUDENT).unlink()
    pretrain(None, run, resume=True, console=QUIET)
    assert (run / STUDENT).read_bytes() == want
    times = {"examples_per_second", "tokens_per_second"}
    assert [{k: v for k, v in line.items() if k not in times} for line in log_of(run)] == [
        {k: v for k, v in line.items() if k not in times} for line in log
    ]
    again = PretrainRecipe.load(run / "recipe.yaml")
    pretrain(again, tmp_path / "again", console=QUIET)
    assert (tmp_path / "again" / STUDENT).read_bytes() == want


@pytest.mark.slow
def test_killed_it_goes_on_to_the_same_bytes(place: Path, tmp_path: Path) -> None:
    more = ["training.max_steps=40", "training.checkpoint_every=3"]
    given = recipe(place, "distilbert", *more)
    given.save(tmp_path / "recipe.yaml")
    command = [sys.executable, "-m", "stillroom.cli", "pretrain"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    whole = [*command, str(tmp_path / "recipe.yaml"), "-o", str(tmp_path / "whole")]
    subprocess.run(whole, env=environment, check=True, capture_output=True)
    run = tmp_path / "run"
    arguments = [str(tmp_path / "recipe.yaml"), "-o", str(run)]
    process = subprocess.Popen([*command, *arguments], env=environment, stderr=subprocess.DEVNULL)
    while process.poll() is None and not list((run / "checkpoints").glob("step-*")):
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL
    subprocess.run([*command, "--resume", str(run)], env=environment, check=True, capture_output=True)
    assert (run / STUDENT).read_bytes() == (tmp_path / "whole" / STUDENT).read_bytes()


def test_changed_text_is_not_gone_on_with(place: Path, tmp_path: Path) -> None:
    text = tmp_path / "text.txt"
    text.write_bytes((place / "text.txt").read_bytes())
    given = recipe(place, text={"files": [str(text)], "sequence_length": 16})
    pretrain(given, tmp_path / "run", console=QUIET)
    text.write_text(text.read_text() + "\n\na film")
    with pytest.raises(WrongInput, match="The text changed since this run started"):
        pretrain(None, tmp_path / "run", resume=True, console=QUIET)


@pytest.mark.parametrize("dropout", [False, True])
def test_dropout_is_off_only_meanwhile(dropout: bool, place: Path, tmp_path: Path) -> None:
    given = recipe(place, "minilm", "training.max_steps=1", f"dropout={str(dropout).lower()}")
    made = _Parts.of(resolve(given), QUIET).student
    rates = {module.p for module in made.modules() if isinstance(module, torch.nn.Dropout)}
    assert rates == ({0.1} if dropout else {0.0})
    pretrain(given, tmp_path / "run", console=QUIET)
    assert encoder.load_body(str(tmp_path / "run")).config.hidden_dropout_prob == 0.1
    assert PretrainRecipe.load(tmp_path / "run" / "recipe.yaml").dropout is dropout


def test_seeds_and_steps(place: Path, tmp_path: Path) -> None:
    hashes = []
    for i, seed in enumerate((0, 0, 1)):
        run = tmp_path / str(i)
        pretrain(
            recipe(place, "minilm", f"training.seed={seed}", "training.max_steps=2"), run, console=QUIET
        )
        assert [line["step"] for line in log_of(run) if "loss" in line] == [1, 2]
        hashes.append(weights_hash(encoder.load_body(str(run)).model))
    assert hashes[0] == hashes[1] != hashes[2]


@pytest.mark.parametrize(
    ("method", "overrides", "more", "match"),
    [
        ("distilbert", (), {"teacher": "body"}, "no masked-LM head.*stillroom generator --model .*minilm"),
        ("kd", (), {"teacher": "body"}, "kd has no task-agnostic distillation. There are: .*minilm"),
        ("minilm", ("text.sequence_length=512",), {}, "should be at most 66.*found 512"),
        ("minilm", (), {"student": "2x16x4x32"}, "head by head.*4 heads and the teacher 2"),
        ("minilmv2", ("method.relation_heads=7",), {}, "relation_heads should divide"),
        ("tinybert", (), {"student": "5x16x2x32"}, "each of 5 student layers, the teacher has 4"),
        ("lrc-bert", ("method.label_aware=true",), {}, "has no labels"),
        ("lrc-bert", ("method.negatives=bank", "method.vector=cls"), {}, "negatives=in_batch"),
        ("codir", ("method.loss=nce_official",), {}, "loss=infonce"),
        ("minilm", ("training.select=best",), {}, "training.select"),
        ("minilm", ("text.sequence=16",), {}, "Unknown key text.sequence.*sequence_length"),
        ("minilm", (), {"teacher": "nothing"}, "nothing"),
    ],
)
def test_what_cannot_be_is_refused_before_the_first_step(
    method: str, overrides: tuple[str, ...], more: dict[str, Any], match: str, place: Path, tmp_path: Path
) -> None:
    if "teacher" in more:
        more = {**more, "teacher": str(place / more["teacher"])}
    with pytest.raises(WrongInput, match=match):
        pretrain(recipe(place, method, *overrides, **more), tmp_path / "run", console=QUIET)
    assert not (tmp_path / "run" / "recipe.yaml").exists()


def test_command_line(place: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    command = [
        "pretrain",
        "--teacher",
        str(place / "body"),
        "--text",
        str(place / "text.txt"),
        "-o",
        str(run),
    ]
    more = ["--student", "2x16x2x32", "--set", "text.sequence_length=16", "--set", "training.max_steps=2"]
    nowhere = CliRunner().invoke(app, [*command[:-2], *more, "--dry-run", "--json"])
    dry = CliRunner().invoke(app, [*command, *more, "--dry-run", "--json"])
    assert dry.exit_code == 0, dry.stderr
    found = json.loads(dry.stdout)
    assert json.loads(nowhere.stdout)["text"] == found["text"]
    assert found["text"]["documents"] == 120 and found["text"]["sequence_length"] == 16
    assert found["disk"]["need_mb"] > 0 and not run.exists()
    done = CliRunner().invoke(app, [*command, *more])
    assert done.exit_code == 0 and "tokens/s" in done.stdout and f"--student {run}" in done.stdout
    page = run / "report.html"
    assert f"Report: {page}" in done.stdout and "In 2 steps the loss" in page.read_text(encoding="utf-8")
    assert json.loads((run / "metrics.json").read_text())["text"] == found["text"]
    recipe(place).save(tmp_path / "recipe.yaml")
    beside = ["pretrain", str(tmp_path / "recipe.yaml"), "--text", str(place / "text.txt"), "--dry-run"]
    kept = CliRunner().invoke(app, [*beside, "-o", str(tmp_path / "d"), "--json"])
    assert json.loads(kept.stdout)["text"]["sequence_length"] == 16, "--text dropped the recipe's length"
    for wrong, match in (
        (command, "new or empty"),
        (["pretrain", "--resume", str(tmp_path / "none")], "no run to resume"),
        (["pretrain", "--resume", str(run), "--seed", "1"], "expected --resume alone"),
        (command[:3], "-o RUN"),
        ([*command[:3], "-o", str(tmp_path / "c")], "Missing key text"),
    ):
        failed = CliRunner().invoke(app, [*wrong, "--json"])
        assert failed.exit_code == 2 and match in json.loads(failed.stdout)["error"]


# Hidden words, and the match of layers


def test_hidden_words_are_a_function_of_seed_and_step() -> None:
    tokenizer = make_tokenizer()
    ids = torch.from_numpy(np.random.default_rng(0).integers(5, len(tokenizer), size=(40, 30)))
    ids[:, 0], ids[:, -1] = 2, 3
    inputs = Inputs(ids, torch.ones_like(ids), None)
    batch = Batch(inputs, inputs, torch.zeros(40, dtype=torch.int64), torch.arange(40))
    hide = Hiding(tokenizer, seed=0)
    first, again, later = hide(batch, 3), Hiding(tokenizer, seed=0)(batch, 3), hide(batch, 4)
    positions = first.student.positions
    assert positions is not None and torch.equal(first.student.input_ids, again.student.input_ids)
    assert not torch.equal(first.student.input_ids, later.student.input_ids)
    assert first.teacher is first.student, "student and teacher are asked about the same words"
    assert torch.equal(first.labels, ids.flatten()[positions])
    changed = (first.student.input_ids != ids).flatten().nonzero().flatten()
    assert set(changed.tolist()) <= set(positions.tolist())
    assert not ({0, 29} & {int(p) % 30 for p in positions})
    assert 0.1 < len(positions) / (40 * 28) < 0.2
    masked = (first.student.input_ids.flatten()[positions] == tokenizer.mask_token_id).float().mean()
    assert 0.7 < masked < 0.9
    # A batch without a word to guess still has a loss.
    empty = Inputs(ids[:, :1], torch.ones(40, 1, dtype=torch.int64), None)
    assert len(hide(Batch(empty, empty, batch.labels, batch.row_ids), 0).labels) == 1


def test_masked_lm_logits_are_those_of_the_whole_head() -> None:
    made = make_generator()
    ids = torch.randint(5, 20, (3, 7), generator=torch.Generator().manual_seed(0))
    positions = torch.tensor([2, 9, 20])
    with torch.no_grad():
        whole = made.model(input_ids=ids).logits.flatten(0, 1)
        inputs = Inputs(ids, torch.ones_like(ids), None, positions)
        found = made(inputs, encoder.Needs(logits=True, hidden_states=frozenset({1})))
    assert torch.allclose(found.logits, whole[positions], atol=1e-6)
    assert found.hidden_states[1].shape == (3, 7, 16)


def test_linear_cka() -> None:
    chance = torch.Generator().manual_seed(0)
    x, y = torch.randn(200, 5, generator=chance), torch.randn(200, 3, generator=chance)
    turn = torch.linalg.qr(torch.randn(5, 5, generator=chance))[0]
    assert linear_cka(x, 3 * x @ turn + 1) == pytest.approx(1, abs=1e-6)
    # The definition by Gram matrices, HSIC(K, L) / sqrt(HSIC(K, K) HSIC(L, L)).
    centring = torch.eye(200).double() - 1 / 200
    K, L = (centring @ (m.double() @ m.double().T) @ centring for m in (x, y))
    want = (K * L).sum() / ((K * K).sum() * (L * L).sum()).sqrt()
    assert linear_cka(x, y) == pytest.approx(want.item(), rel=1e-9)
    assert linear_cka(x, torch.ones(200, 2)) == 0


# The plans


CONTEXT = Context("classification", 30, 100, 2, 16, 4, 24)


@pytest.mark.parametrize(
    ("method", "weights"),
    [
        ("minilm", {"attention": 1.0, "value_relation": 1.0}),
        ("minilmv2", {"query_relation": 1.0, "key_relation": 1.0, "value_relation": 1.0}),
        ("tinybert", {"attention": 1.0, "hidden_states": 1.0}),
        ("lrc-bert", {"cos_nce": 1.0}),
        ("distilbert", {"soft": 5.0, "hard": 2.0, "cosine": 1.0}),
        ("codir", {"hard": 1.0, "soft": 1.0, "contrast": 0.1}),
    ],
)
def test_plans_are_one_stage_without_labels(method: str, weights: dict[str, float]) -> None:
    settings = MethodSettings(name=method, **OPTIONS.get(method, {}))
    plan = methods.build_pretraining(settings, CONTEXT)
    assert [dict(stage.weights) for stage in plan.stages] == [weights]
    assert plan.terms.keys() == weights.keys()
    assert plan.stages[0].perturb == (method == "lrc-bert")
    logits = any(term.student_needs.logits for term in plan.terms.values())
    assert logits == methods.METHODS[method].masked_lm


def contrast(direction: str) -> InBatchContrast:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        settings = CoDIRSettings(direction=direction, dimension=3, tau=0.5)
        return InBatchContrast(settings, CONTEXT).double()


def pooled(depth: int, width: int, seed: int) -> Outputs:
    states = torch.randn(
        depth, 4, width, generator=torch.Generator().manual_seed(seed), dtype=torch.float64
    )
    given = {("mean", layer + 1): states[layer].requires_grad_() for layer in range(depth)}
    return Outputs(torch.empty(0), pooled_states=given)


@pytest.mark.parametrize("direction", ["student_anchor", "teacher_anchor", "symmetric"])
def test_in_batch_contrast_is_infonce_over_the_other_rows(direction: str) -> None:
    term, student_out, teacher_out = contrast(direction), pooled(2, 16, 1), pooled(4, 24, 2)
    batch: Any = SimpleNamespace(share=Share())
    found = term(student_out, teacher_out, batch)

    def vectors(outputs: Outputs, projection: Any) -> list[list[float]]:
        rows = []
        for row in torch.cat(list(outputs.pooled_states.values()), dim=1):
            z = (projection.weight @ row + projection.bias).tolist()
            norm = math.sqrt(sum(x * x for x in z))
            rows.append([x / norm for x in z])
        return rows

    s, t = vectors(student_out, term.student_projection), vectors(teacher_out, term.teacher_projection)

    def naive(anchors: list[list[float]], others: list[list[float]]) -> float:
        total = 0.0
        for b, anchor in enumerate(anchors):
            scores = [sum(x * y for x, y in zip(anchor, other, strict=True)) / 0.5 for other in others]
            total -= math.log(math.exp(scores[b]) / sum(math.exp(score) for score in scores))
        return total / len(anchors)

    ways = {"student_anchor": [(s, t)], "teacher_anchor": [(t, s)], "symmetric": [(s, t), (t, s)]}
    want = sum(naive(*way) for way in ways[direction]) / len(ways[direction])
    assert found.item() == pytest.approx(want, rel=1e-12)
    found.backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in term.parameters())


def test_in_batch_negatives_get_no_gradient() -> None:
    """Only the positive pulls the other side: else a model could win by pushing its negatives away."""
    term = contrast("student_anchor")
    s, t = pooled(2, 16, 1), pooled(4, 24, 2)
    unit = torch.nn.functional.normalize
    joined = [torch.cat(list(o.pooled_states.values()), dim=1) for o in (s, t)]
    z_s, z_t = unit(term.student_projection(joined[0])), unit(term.teacher_projection(joined[1]))
    negatives = torch.stack([z_t[[j for j in range(4) if j != b]] for b in range(4)])
    want = info_nce(z_s, z_t, negatives, temperature=0.5).mean()
    found = term(s, t, SimpleNamespace(share=Share()))
    assert torch.allclose(found, want)
    for state in t.pooled_states.values():
        grads = [torch.autograd.grad(loss, state, retain_graph=True)[0] for loss in (found, want)]
        assert torch.allclose(*grads, atol=1e-12)

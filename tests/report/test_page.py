"""The page without a browser: what it says, leaves out, escapes and refuses."""

import json
import re
from html import unescape
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import numpy as np
import pytest
from huggingface_hub import ModelCard
from made_run import HOSTILE, make_comparison, make_pretraining, make_run

from stillroom import WrongInput
from stillroom.data.tasks import Kind
from stillroom.methods import METHODS, build
from stillroom.methods.base import Context
from stillroom.recipe import MethodSettings, PretrainRecipe, Recipe
from stillroom.report import answers, comparison, facts, flow, pictures, pretraining
from stillroom.report.page import write
from stillroom.report.sources import read_comparison, read_pretraining, read_run

SECTIONS = {
    "costs",
    "training",
    "flow",
    "disagreements",
    "classes",
    "calibration",
    "robustness",
    "repeat",
}


def sections(page: str) -> set[str]:
    return set(re.findall(r'<section id="(\w+)"', page))


@pytest.mark.parametrize(
    ("kind", "without"),
    [
        ("classification", set()),
        ("multi-label", {"calibration"}),
        ("regression", {"calibration", "classes"}),
    ],
)
@pytest.mark.parametrize("whole", [True, False])
def test_what_a_run_has_no_part_of_has_no_section(
    tmp_path: Path, kind: Kind, without: set[str], whole: bool
) -> None:
    page = write(make_run(tmp_path / "run", kind=kind, whole=whole, pair=not whole)).read_text()
    missing = without if whole else without | {"flow", "robustness"}
    assert sections(page) == SECTIONS - missing
    assert set(re.findall(r'<a href="#(\w+)"', page)) == SECTIONS - missing
    assert ('<tr class="control">' in page) == whole
    assert len(page) < 1_000_000
    assert (r"Confusion of the" in page) == (kind == "classification")


def test_an_older_run_without_predictions_has_a_page(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run", whole=False)
    (run / "predictions.parquet").unlink()
    (run / "log.jsonl").unlink()
    assert sections(write(run).read_text()) == {"costs", "repeat"}


def test_nothing_of_the_data_becomes_markup(tmp_path: Path) -> None:
    """One script, the page's own, whose hash is the only one that the policy lets run."""
    page = write(make_run(tmp_path / "a <script>window.hacked = 5<" / "script>")).read_text()
    assert page.count("<script") == 1 and "<img" not in page and "hacked = 1</script>" not in page
    assert HOSTILE in unescape(page)
    assert "default-src &#39;none&#39;" in page or "default-src 'none'" in page
    assert not re.search(r'(src|href|action)="(?!#)', page)
    assert "@import" not in page and not re.search(r"url\((?!#)", page)


def test_the_same_run_gives_the_same_page(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run")
    assert write(run).read_bytes() == write(run, tmp_path / "other.html").read_bytes()


def test_the_headline_is_what_the_metrics_say(tmp_path: Path) -> None:
    run = read_run(make_run(tmp_path / "run", whole=False))
    accuracy = run.metrics["teacher"]["metrics"]["accuracy"]
    run.metrics["student"]["metrics"]["accuracy"] = 0.96 * accuracy
    assert facts.headline(run) == (
        "The student keeps 96.0 % of the teacher’s accuracy at 2.0 times its speed."
    )
    run.metrics["control"] = {"metrics": {"accuracy": 0.94 * accuracy}}
    assert facts.headline(run).endswith("speed; without a teacher it would have kept 94.0 %.")
    run.metrics["teacher"]["metrics"]["accuracy"] = 0.0
    assert "nothing to keep" in facts.headline(run)


def test_the_headline_names_the_fastest_export(tmp_path: Path) -> None:
    """Its time was not taken in turns with the teacher's, and the page says so beside the times."""
    folder = make_run(tmp_path / "run")
    run = read_run(folder)
    assert run.export is not None
    run.export["forms"]["onnx"] = {**run.export["forms"]["onnx-int8"], "ms_per_row": 4.0}
    assert " at 2.0 times its speed; exported (onnx-int8) 5.0 times; without" in facts.headline(run)
    run.metrics["teacher"]["metrics"]["accuracy"] = 0.0
    assert facts.headline(run).endswith("at 2.0 times the speed; exported (onnx-int8) 5.0 times.")
    said = "in turns with each other but not with the teacher"
    assert said in write(folder).read_text()
    assert said not in write(make_run(tmp_path / "other", whole=False)).read_text()


def test_what_is_kept_and_what_it_costs_stand_first(tmp_path: Path) -> None:
    """A phone shows the first columns of a table, and the others after a scroll."""
    run = read_run(make_run(tmp_path / "run"))
    table, _ = facts.costs(run)
    assert [name for name, _ in table.columns] == (
        "model|accuracy kept|speed|MB on disk|accuracy %|ms per text|mcc|parameters".split("|")
    )
    rows = {row[0].text: [cell.text for cell in row[1:]] for row in table.rows}
    assert list(rows) == ["teacher", "control", "student", "student, onnx-int8"]
    said = rows["teacher"]
    assert said[:3] == ["100.0 %", "1.0 ×", "80.0"] and said[4] == "10.00" and said[6] == "20.0 M"
    assert rows["student, onnx-int8"][1:3] == ["5.0 ×", "10.0"]
    assert rows["student, onnx-int8"][-1] == "–"
    assert all(len(row) == len(table.columns) for row in table.rows)
    # Without a teacher nothing is kept, and the speed is the first model's.
    del run.metrics["teacher"]
    table, _ = facts.costs(run)
    assert [name for name, _ in table.columns][:3] == ["model", "speed", "MB on disk"]
    assert all(len(row) == len(table.columns) for row in table.rows)


def test_the_page_says_how_to_use_the_student(tmp_path: Path) -> None:
    folder = make_run(tmp_path / "a run")
    typed = [command for _, command in facts.commands(read_run(folder))]
    assert [command.split()[1] for command in typed] == (
        ["export", "predict", "serve", "distill", "distill", "report"]
    )
    assert typed[1] == f"stillroom predict '{folder}' FILE.csv -o OUT.csv"
    page = unescape(write(folder).read_text())
    assert all(command in page for command in typed)


def test_perturbed_texts_are_explained(tmp_path: Path) -> None:
    page = " ".join(write(make_run(tmp_path / "run")).read_text().split())
    assert (
        "with words swapped with a neighbour, or all in one case. A swap may change what is true." in page
    )


def test_differences_have_their_intervals_and_chance_is_named(tmp_path: Path) -> None:
    run = read_run(make_run(tmp_path / "run", rows=300))
    found = {(test.a, test.b): test for test in facts.tests(run) if test.first}
    assert set(found) == {("control", "student"), ("teacher", "student"), ("teacher", "control")}
    for (a, b), test in found.items():
        values = [100 * run.metrics[name]["metrics"]["accuracy"] for name in (a, b)]
        assert test.value == pytest.approx(values[1] - values[0])
        assert test.low < test.value < test.high
        assert test.p is not None
    text = facts.caution(run, list(found.values()))
    test = found["control", "student"]
    assert ("can explain" in text) == (test.low <= 0 <= test.high)
    assert "One seed (0) on 300 validation rows" in text and "selected on these same rows" in text


def test_disagreements_are_the_most_certain_and_no_more_than_fit(tmp_path: Path) -> None:
    kept = read_run(make_run(tmp_path / "run", rows=1500)).kept
    assert kept is not None
    found = answers.agreement(kept)
    assert found is not None
    summary, table, note = found
    assert table is not None
    differ = kept.logits["teacher"].argmax(1) != kept.logits["student"].argmax(1)
    assert differ.sum() > answers.DISAGREEMENTS == len(table.rows)
    assert f"disagree on {differ.sum():,} of 1,500 rows" in note and "the 200 on which both" in note
    assert sum(int(str(row[1].value)) for row in summary.rows) == 1500
    names = [name for name, _ in table.columns]
    a, b = names.index("P teacher"), names.index("P student")
    certain = [float(str(row[a].value)) * float(str(row[b].value)) for row in table.rows]
    assert certain == sorted(certain, reverse=True)
    assert all(differ[int(row[0].text)] for row in table.rows)


def test_teachers_of_the_same_opinion_have_no_table(tmp_path: Path) -> None:
    kept = read_run(make_run(tmp_path / "run")).kept
    assert kept is not None
    kept.logits["student"] = kept.logits["teacher"]
    found = answers.agreement(kept)
    assert found is not None and found[1] is None and "every row the same" in found[2]


def test_long_texts_are_cut_and_say_so(tmp_path: Path) -> None:
    kept = read_run(make_run(tmp_path / "run")).kept
    assert kept is not None
    kept.rows.texts[0][:] = ["x" * 100_000] * len(kept.rows)
    found = answers.agreement(kept)
    assert found is not None and found[1] is not None
    text = found[1].rows[0][1].text
    assert text.endswith("… (100,000 characters)") and len(text) < 700


def test_confusion_counts_labels_by_row(tmp_path: Path) -> None:
    kept = read_run(make_run(tmp_path / "run")).kept
    assert kept is not None
    wrong = np.zeros_like(kept.logits["student"])
    wrong[:, 2] = 1
    kept.logits["student"] = wrong
    found = {c.model: c.counts for c in answers.confusions(kept)}
    assert found["student"] == [[0, 0, 20], [0, 0, 20], [0, 0, 20]]


def test_pictures_have_the_pages_colours_only(tmp_path: Path) -> None:
    point = pictures.Point("teacher <b> $x$", "teacher", 2.0, 90.0)
    picture = pictures.quality([point], "accuracy", " %")
    assert "var(--teacher)" in picture.svg and "#0102" not in picture.svg
    assert "&lt;b&gt;" in picture.svg and "<b>" not in picture.svg and "$x$" in picture.svg
    assert 'role="img"' in picture.svg and "90.0 % at 2.00 ms" in picture.svg
    assert "<metadata" not in picture.svg and "font-family" not in picture.svg


def test_bins_of_few_rows_are_hollow_and_no_line_leads_to_them(monkeypatch: pytest.MonkeyPatch) -> None:
    drawn: list[Any] = []
    plain = pictures._picture

    def spy(figure: Any, *rest: Any) -> Any:
        drawn.append(figure.axes[0])
        return plain(figure, *rest)

    monkeypatch.setattr(pictures, "_picture", spy)
    rows = (4, 5, 1, 90)
    shares = (0.0, 0.6, 0.0, 0.98)
    picture = pictures.reliability("student", (0.55, 0.65, 0.75, 0.99), shares, rows, 0.02, lowest=0.0)
    (axes,) = drawn
    diagonal, line = axes.lines
    assert list(diagonal.get_xdata()) == [0, 1]
    assert line.get_xydata().tolist() == [[0.65, 0.6], [0.99, 0.98]]
    full, hollow = axes.collections
    assert full.get_offsets().tolist() == [[0.65, 0.6], [0.99, 0.98]] and len(full.get_facecolors()) == 1
    assert hollow.get_offsets().tolist() == [[0.55, 0.0], [0.75, 0.0]] and len(hollow.get_facecolors()) == 0
    assert (
        axes.get_xlim() == axes.get_ylim() == (-0.05, 1.05)
        and "confidence 0.55: 0.00 right, 4 rows" in picture.svg
    )
    pictures.reliability("student", (0.9,), (1.0,), (3,), 0.1, lowest=0.5)
    assert len(drawn[1].lines[1].get_xdata()) == 0


def test_pictures_of_calibration_share_their_axes(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    lowest = []
    plain = pictures.reliability

    def spy(*given: Any, **named: Any) -> Any:
        lowest.append((named["lowest"], min(*given[1], *given[2])))
        return plain(*given, **named)

    monkeypatch.setattr(pictures, "reliability", spy)
    kept = read_run(make_run(tmp_path / "run")).kept
    assert kept is not None and answers.calibrations(kept) is not None
    assert [start for start, _ in lowest] == [min(0.5, *(own for _, own in lowest))] * 3


def test_the_page_explains_hollow_bins_and_the_error(tmp_path: Path) -> None:
    page = " ".join(write(make_run(tmp_path / "run")).read_text().split())
    assert "a hollow one for fewer than 5, whose share says little: no line leads there. ECE, the" in page
    assert "p is how often chance alone would" in page


def log_of_flows(folder: Path, *flows: list[list[float]]) -> Path:
    """Write the log of a training that recorded these flows, one after the other."""
    folder.mkdir()
    lines = [
        {"step": i, "record": {"layers": {"hidden_states": {"emd": float(i), "flow": each}}}}
        for i, each in enumerate(flows, start=1)
    ]
    (folder / "log.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return folder


def test_a_flow_is_the_mean_of_the_logged_steps(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run")
    lines = [json.loads(line) for line in (run / "log.jsonl").read_text().splitlines()]
    for line in lines[:10]:
        # The other half of the steps sends what the first half keeps.
        if "record" in line:
            line["record"]["layers"]["hidden_states"]["flow"] = [[0.1, 0.3, 0.0], [0.2, 0.0, 0.4]]
    (run / "log.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    ((picture, table),) = facts.flows(read_run(run))
    assert "term layers" in picture.caption and "mean flow of 20 logged steps" in table.caption
    assert "EMD 0.5 at the first, 0.025 at the last" in table.caption
    rows = [[cell.text for cell in row] for row in table.rows]
    assert rows == [
        ["1", "0.200", "0.200", "0.000", "0.400"],
        ["2", "0.100", "0.100", "0.400", "0.600"],
        ["mass", "0.300", "0.300", "0.400", ""],
    ]
    assert "student layer 2 most from teacher layer 3 (67 %)" in unescape(picture.svg)


def test_a_flow_is_a_picture_file_of_its_own(tmp_path: Path) -> None:
    """Of two seeds each counts the same, however many steps it logged."""
    one = log_of_flows(tmp_path / "one", [[1.0, 0.0], [0.0, 0.0]])
    other = log_of_flows(tmp_path / "other", *[[[0.0, 0.0], [0.0, 1.0]]] * 3)
    path = flow.write([one, other], tmp_path / "flow.svg", title="a <b>")
    root = ElementTree.fromstring(path.read_text())
    said = ["".join(each.itertext()) for each in root.iter("{http://www.w3.org/2000/svg}text")]
    assert said.count("50") == 6 and "a <b>" in said and "hidden states" in said
    assert "var(" not in path.read_text() and root.get("role") == "img"
    wide = log_of_flows(tmp_path / "wide", [[0.5, 0.25, 0.25]])
    with pytest.raises(WrongInput, match=r"hidden states 1 x 3, hidden states 2 x 2"):
        flow.write([one, wide], tmp_path / "no.svg")
    (wide / "log.jsonl").write_text("")
    for wrong, message in (([wide], "found no flow"), ([], "at least one run")):
        with pytest.raises(WrongInput, match=message):
            flow.write(wrong, tmp_path / "no.svg")
    assert not (tmp_path / "no.svg").exists()


def test_long_curves_are_thinned_to_means(tmp_path: Path) -> None:
    points = [(float(i), float(i % 2)) for i in range(10_000)]
    found = facts.thin(points)
    assert len(found) == facts.POINTS
    assert all(value == pytest.approx(0.5) for _, value in found)


GENERATOR = {"generator": "tiny"}
NEEDED: dict[str, dict[str, Any]] = {
    "cilda": GENERATOR,
    "mate-kd": GENERATOR,
    "codir": {"bank_negatives": 3},
}
"""Options without which there is no plan."""


@pytest.mark.parametrize("name", sorted(set(METHODS) - {"mixture"}))
@pytest.mark.parametrize("kind", ["classification", "regression"])
def test_every_term_that_a_method_may_log_is_explained(name: str, kind: Kind) -> None:
    labels = np.arange(8) % 2
    context = Context(kind, 1 if kind == "regression" else 2, 8, 2, 8, 4, 8, labels=labels)
    plan = build(MethodSettings(name=name, **NEEDED.get(name, {})), context)
    logged = [*plan.terms, *(f"augmented_{term}" for stage in plan.stages for term in stage.augmented)]
    found = dict(facts.terms(name, logged))
    assert list(found) == logged
    # One line, without a stop, that ends a sentence "soft brings ...".
    assert all(20 < len(what) < 110 and what[0].islower() and what[-1] != "." for what in found.values())
    mixed = [f"augmented_{name}:{term}" for term in plan.terms]
    assert dict(facts.terms("mixture", mixed)) == {
        key: f"{METHODS[name].terms[key.partition(':')[2]]}, on augmented rows" for key in mixed
    }


def test_a_term_that_nobody_knows_has_no_line() -> None:
    """An older run's method may be gone, and its control still learns from hard labels."""
    assert [name for name, _ in facts.terms("gone", ["cos_nce", "hard"])] == ["hard"]


def test_curves_share_their_epochs_and_the_gradient_norm_is_among_the_numbers(tmp_path: Path) -> None:
    folder = make_run(tmp_path / "run")
    found = facts.curves(read_run(folder))
    assert found is not None and found.norm is not None
    assert [picture.caption for picture in found.pictures] == ["validation accuracy %", "soft"]
    assert found.norm.caption == "gradient norm"
    ticks = [re.findall(r">(\d\.\d+)</text>", each.svg)[:5] for each in (*found.pictures, found.norm)]
    assert ticks == [["0.0", "0.5", "1.0", "1.5", "2.0"]] * 3
    assert [row[0].text for row in found.table.rows] == ["soft"] * 4 + ["gradient norm"] * 4
    page = write(folder).read_text()
    numbers = page[page.index("<summary>The numbers") :]
    assert "gradient norm over the epochs" in numbers[: numbers.index("</details>")]
    assert page.count("gradient norm over the epochs") == 1
    assert "<dt>soft</dt><dd>brings the student’s answers" in page


def _without(path: Path) -> None:
    path.unlink()


def _broken(path: Path) -> None:
    path.write_text("{")


@pytest.mark.parametrize(
    ("name", "change", "message"),
    [
        ("metrics.json", _without, "distill --resume"),
        ("metrics.json", _broken, "cannot be read"),
        ("metrics.json", lambda path: path.write_text("[]"), "JSON object"),
        ("metrics.json", lambda path: path.write_text('{"model": {}}'), "stillroom finetune"),
        ("recipe.yaml", _broken, "YAML"),
        ("log.jsonl", _broken, "curves"),
        ("deploy/manifest.json", _broken, "cannot be read"),
        ("predictions.parquet", _broken, "--resume"),
    ],
)
def test_damaged_runs_are_refused_with_a_remedy(
    tmp_path: Path, name: str, change: Any, message: str
) -> None:
    run = make_run(tmp_path / "run")
    change(run / name)
    with pytest.raises(WrongInput, match=message):
        write(run)


def test_a_folder_that_is_no_run_is_refused(tmp_path: Path) -> None:
    with pytest.raises(WrongInput, match="finished run"):
        write(tmp_path)


@pytest.mark.parametrize("kind", ["classification", "multi-label", "regression"])
def test_the_card_has_metadata_that_the_hub_reads(tmp_path: Path, kind: Kind) -> None:
    run = make_run(tmp_path / "run", kind=kind)
    write(run)
    card = ModelCard.load(run / "student" / "README.md")
    assert card.data.pipeline_tag == "text-classification"
    assert card.data.library_name == "transformers"
    metrics = json.loads((run / "metrics.json").read_text())["student"]["metrics"]
    results = card.data.eval_results
    assert results is not None
    assert [result.metric_name for result in results] == list(metrics)
    for result in results:
        assert result.metric_value == pytest.approx(metrics[result.metric_name], abs=1e-4)
    assert card.data.license is None and card.data.base_model is None
    assert "the teacher states none" in card.text and "<script" not in card.text


def test_the_card_takes_licence_and_base_from_the_teacher(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    run = make_run(tmp_path / "run")
    Recipe.load(run / "recipe.yaml", ["teacher.name=teacher"]).save(run / "recipe.yaml")
    (tmp_path / "teacher").mkdir()
    (tmp_path / "teacher" / "README.md").write_text("---\nlicense: mit\nbase_model: a/b\n---\n")
    write(run)
    card = ModelCard.load(run / "student" / "README.md")
    assert (card.data.license, card.data.base_model) == ("mit", "a/b")
    # A card that cannot be read states nothing.
    (tmp_path / "teacher" / "README.md").write_text("---\nlicense: [\n---\n")
    (tmp_path / "teacher" / "recipe.yaml").write_text("model: minilm-l6\n")
    write(run)
    card = ModelCard.load(run / "student" / "README.md")
    assert (card.data.license, card.data.base_model) == (None, "sentence-transformers/all-MiniLM-L6-v2")


@pytest.mark.parametrize("whole", [True, False])
def test_a_comparison_has_a_page(tmp_path: Path, whole: bool) -> None:
    folder = make_comparison(tmp_path / "compared", whole=whole)
    page = write(folder).read_text()
    assert page.count("<script") == 1 and "<img" not in page
    assert (
        "kd with student" in page and "87.0\u00a0%, teacher 90.0\u00a0%" in page and "−1.0 to +5.0" in page
    )
    assert sections(page) == ({"results", "training", "flow", "repeat"} if whole else {"results", "repeat"})
    assert ("stillroom compare" in page) == whole and "2 runs" not in page and "4 runs, 40 s" in page
    assert ("a machine &lt;i&gt;" in page) == whole
    other = comparison.out_of_domain(read_comparison(folder).found)
    assert (other is not None) == whole == ("sets of other sources" in page)
    if other is not None:
        assert [[cell.text for cell in row] for row in other.rows] == [
            ["teacher", "", "70.0"],
            [HOSTILE, "none", "55.0"],
            [HOSTILE, "kd", "61.0"],
        ]
    (folder / "compare.json").write_text("{}")
    with pytest.raises(WrongInput, match="stillroom compare"):
        write(folder)


def test_gains_over_the_control_are_drawn_with_their_intervals(tmp_path: Path) -> None:
    found = read_comparison(make_comparison(tmp_path / "compared")).found
    picture = comparison.differences(found)
    # The control has no gain over itself.
    assert picture is not None and 'intervals. kd: +2.0, -1.0 to +5.0."' in picture.svg
    for result in found["students"][HOSTILE]["methods"].values():
        result.pop("against_control", None)
    assert comparison.differences(found) is None


def test_curves_and_flows_of_a_comparison_are_means_over_its_seeds(tmp_path: Path) -> None:
    compared = read_comparison(make_comparison(tmp_path / "compared"))
    said = [unescape(picture.svg) for picture in comparison.curves(compared)]
    titles = [picture.caption for picture in comparison.curves(compared)]
    assert titles == ["none: accuracy %", "none: loss", "kd: accuracy %", "kd: loss"]
    assert "student: from 10 to 40" in said[0] and "control:" not in said[0]
    # Seed 1 logs two more than seed 0.
    assert "student: from 2 to 5" in said[1]
    assert "control: from 10 to 40; student: from 10 to 40" in said[2]
    (picture,) = comparison.flows(compared)
    assert "student layer 1 most from teacher layer 1 (75 %)" in picture.svg


@pytest.mark.parametrize("masked_lm", [True, False])
def test_a_pretraining_has_a_page(tmp_path: Path, masked_lm: bool) -> None:
    folder = make_pretraining(tmp_path / "a <script>window.hacked = 5<", masked_lm=masked_lm)
    page = write(folder).read_text()
    assert page.count("<script") == 1 and "<img" not in page and HOSTILE in unescape(page)
    assert not re.search(r'(src|href|action)="(?!#)', page)
    assert sections(page) == {"follows", "training", "text", "repeat"}
    assert set(re.findall(r'<a href="#(\w+)"', page)) == sections(page)
    assert "In 40 steps the loss on unseen text went from 2 to 0.0488" in page
    assert "last layer with the teacher’s from 0.40 to 0.80." in page
    assert "<dt>cosine</dt><dd>turns" not in page and "<dt>hard</dt><dd>brings" in page
    assert "24,000 tokens, 0.5 passes" in page and "2,000 tokens per second" in page
    assert ("Perplexity is" in page) == masked_lm
    assert f"stillroom distill --teacher T --dataset D --student '{folder}' -o RUN" in unescape(page)
    assert write(folder).read_text() == page


def test_a_pretraining_is_drawn_by_step_from_before_the_first(tmp_path: Path) -> None:
    run = read_pretraining(make_pretraining(tmp_path / "run"))
    drawn = {picture.caption: unescape(picture.svg) for picture in pretraining.curves(run)}
    assert list(drawn) == ["loss", "hard", "perplexity", "gradient norm", "match of layers (linear CKA)"]
    assert "training: from 3 to 0.075; held out: from 2 to 0.04878" in drawn["loss"]
    assert 'steps. held out: from 100 to 60."' in drawn["perplexity"]
    assert 'steps. training: from 0.5 to 0.5."' in drawn["gradient norm"]
    said = "embeddings: from 0.5 to 0.9; layer 1: from 0.45 to 0.85; layer 2: from 0.4 to 0.8"
    assert said in drawn["match of layers (linear CKA)"]
    rows = [[cell.text for cell in row] for row in pretraining.held_out(run).rows]
    assert rows[2] == ["perplexity", "100", "60"] and rows[-1] == ["match of layer 2", "0.4", "0.8"]


@pytest.mark.parametrize(
    ("name", "change", "message"),
    [
        ("metrics.json", lambda path: path.unlink(), "pretrain --resume"),
        ("metrics.json", lambda path: path.write_text('{"text": {}}'), "metrics.json, found text"),
        ("log.jsonl", lambda path: path.write_text("{"), "curves"),
    ],
)
def test_a_damaged_pretraining_is_refused(tmp_path: Path, name: str, change: Any, message: str) -> None:
    folder = make_pretraining(tmp_path / "run")
    change(folder / name)
    with pytest.raises(WrongInput, match=message):
        write(folder)


@pytest.mark.parametrize("masked_lm", [True, False])
def test_the_card_of_a_start_says_how_to_load_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, masked_lm: bool
) -> None:
    monkeypatch.chdir(tmp_path)
    run = make_pretraining(tmp_path / "run", masked_lm=masked_lm)
    write(run)
    card = ModelCard.load(run / "student" / "README.md")
    assert card.data.pipeline_tag == ("fill-mask" if masked_lm else "feature-extraction")
    assert card.data.license is None and card.data.base_model is None and "<script" not in card.text
    assert "| match 2 | 0.4 | 0.8 |" in card.text
    assert ("import AutoModelForMaskedLM," in card.text) == masked_lm
    overrides = ["teacher=minilm-l6"]
    PretrainRecipe.load(run / "recipe.yaml", overrides).save(run / "recipe.yaml")
    write(run)
    card = ModelCard.load(run / "student" / "README.md")
    assert card.data.base_model == "sentence-transformers/all-MiniLM-L6-v2"


def test_names_in_the_picture_of_quality_do_not_meet(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Control and student take the same time and are often nearly as good."""
    boxes: list[Any] = []
    plain = pictures._picture

    def spy(figure: Any, *rest: Any) -> Any:
        boxes.extend((text.get_text(), text.get_window_extent()) for text in figure.axes[0].texts)
        return plain(figure, *rest)

    monkeypatch.setattr(pictures, "_picture", spy)
    named = {"teacher": (4.3, 93.9), "control": (2.15, 90.8), "student": (2.14, 91.2)}
    points = [pictures.Point(name, name, *place) for name, place in named.items()]
    points.append(pictures.Point("student, onnx-int8", "export", 1.0, 91.0))
    pictures.quality(points, "accuracy", " %")
    assert {name for name, _ in boxes} == {point.name for point in points} and len(boxes) == 4
    for i, (name, box) in enumerate(boxes):
        assert not [other for other, theirs in boxes[:i] if box.overlaps(theirs)], name

"""Recipes: what is refused and how it is said, `a.b=c`, and YAML there and back."""

import re
import shlex
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from pydantic import BaseModel, ValidationError

from stillroom import methods
from stillroom.errors import WrongInput
from stillroom.methods.base import Context
from stillroom.recipe import (
    Comparison,
    DatasetSettings,
    FinetuneRecipe,
    MethodSettings,
    Recipe,
    Settings,
    TeacherSettings,
    TrainingSettings,
    nearest,
    read_tries,
    read_yaml,
    set_value,
    setting,
    validate,
)


def recipe(*overrides: str, **given: Any) -> Recipe:
    return Recipe.load(None, overrides, **{"teacher": "t", "dataset": "glue/cola", **given})


def message(*overrides: str, **given: Any) -> str:
    with pytest.raises(WrongInput) as caught:
        methods.resolve(recipe(*overrides, **given))
    return str(caught.value)


# Keys and values that are wrong


@pytest.mark.parametrize(
    ("override", "key", "near"),
    [
        ("training.epoch=3", "training.epoch", "epochs"),
        ("training.learningrate=1", "training.learningrate", "learning_rate"),
        ("training.batchsize=1", "training.batchsize", "batch_size"),
        ("dataset.max_len=64", "dataset.max_len", "max_length"),
        ("dataset.labels_column=a", "dataset.labels_column", "label"),
        ("studnet=4x312", "studnet", "student"),
        ("trainning.epochs=3", "trainning", "training"),
        ("method.temprature=2", "method.temprature", "temperature"),
        ("method.layermap=[1]", "method.layermap", "layer_map"),
    ],
)
def test_a_misspelt_key_names_the_nearest(override: str, key: str, near: str) -> None:
    found = message(override)
    assert f"Unknown key {key}." in found
    assert f"Did you mean {near}" in found


def test_a_key_like_no_other_names_them_all() -> None:
    found = message("training.xyzzy=1")
    assert "Did you mean" not in found
    assert all(name in found for name in TrainingSettings.model_fields)


def test_a_misspelt_method_names_the_nearest() -> None:
    assert "Unknown method 'lrc_bert'. Did you mean lrc-bert?" in message(method="lrc_bert")
    assert "Valid: none, kd, lrc-bert" in message(method="quite-another")


def test_an_option_of_another_method_is_refused() -> None:
    assert "Unknown key method.epsilon." in message("method.epsilon=1", method="kd")
    assert "Unknown key method.temperature." in message("method.temperature=1", method="none")


@pytest.mark.parametrize(
    ("override", "expected"),
    [
        ("training.epochs=many", "training.epochs: expected a number, found 'many'"),
        ("training.epochs=0", "training.epochs: .*greater than 0.*found 0"),
        ("training.epochs=.inf", "training.epochs: .*finite"),
        ("training.learning_rate=.nan", "training.learning_rate: .*(finite|greater)"),
        ("training.batch_size=2.5", "training.batch_size: expected a whole number, found 2.5"),
        ("training.batch_size=0", "training.batch_size: .*greater than or equal to 1"),
        ("training.warmup=1.5", "training.warmup: .*less than or equal to 1"),
        ("training.seed=-1", "training.seed"),
        ("training.precision=fp16", "training.precision: .*'auto', 'float32' or 'bf16'|bf16"),
        ("training.select=first", "training.select: .*'best' or 'last'"),
        ("training.accumulation=", "training.accumulation: .*found None"),
        ("training=3", "training: expected `key: value` lines, found 3"),
        ("control=maybe", "control: expected true or false, found 'maybe'"),
        ("dataset.max_length=4", "dataset.max_length: .*greater than or equal to 8"),
        ("dataset.kind=ranking", "dataset.kind"),
        ("teacher.max_bytes=-1", "teacher.max_bytes: .*greater than or equal to 0"),
        ("teacher.cache=true", "teacher.cache: expected text, found True"),
        ("method.switch=2", "method.switch: .*less than or equal to 1.*found 2"),
        ("method.vector=every", "method.vector: .*'token', 'cls' or 'mean'.*found 'every'"),
        ("method.layer_map=[a]", "method.layer_map.0: expected a whole number, found 'a'"),
        ("method.layer_map=all", "method.layer_map: expected 'uniform' or a list in brackets, found 'all'"),
        ("dataset.text=a,b", "dataset.text: expected a list in brackets, found 'a,b'"),
        ("dataset.soft_labels=''", "dataset.soft_labels: expected text that is not empty, found ''"),
        ("dataset.augmented=3", "dataset.augmented: expected a path, found 3"),
        ("training.batch_size=010", "training.batch_size: expected a whole number, found '010'"),
        ("training.batch_size=0x10", "training.batch_size: expected a whole number, found '0x10'"),
        ("training.batch_size=1_000", "training.batch_size: expected a whole number, found '1_000'"),
        ("training.batch_size='16'", "training.batch_size: expected a whole number, found '16'"),
        ("training.batch_size=1:30", "training.batch_size: expected a whole number, found '1:30'"),
        ("training.learning_rate=01.5", "training.learning_rate: expected a number, found '01.5'"),
        ("training.learning_rate=1_0.5", "training.learning_rate: expected a number, found '1_0.5'"),
        ("training.epochs=true", "training.epochs: expected a number, found True"),
        ("training.batch_size=true", "training.batch_size: expected a whole number, found True"),
        ("training.patience=true", "training.patience: expected a whole number, found True"),
        ("method.layer_map=[true]", "method.layer_map: expected a whole number, found .True."),
        ("training.epochs=1e12", "training.epochs: .*less than or equal to 100000, found 1"),
        ("dataset.labels=[true,false]", 'dataset.labels.0: expected text in quotes.*"true","false"'),
        ("dataset.labels=[0.5]", "dataset.labels.0: expected text, found 0.5"),
        ("method.epsilon=.inf", "method.epsilon: .*finite"),
        ("method.temperature=0", "method.temperature: .*greater than 0"),
    ],
)
def test_a_wrong_value_is_named_with_what_was_expected_and_found(override: str, expected: str) -> None:
    assert re.search(expected, message(override)), message(override)


def every_settings(model: type[BaseModel]) -> Iterator[type[BaseModel]]:
    yield model
    for inner in model.__subclasses__():
        yield from every_settings(inner)


WRONG = yaml.safe_load(
    "[{}, [], -1, 0, 1.5, true, '', x, null, [null], [[]], [1.5], {a: 1}, {a: {}}, .inf]"
)


@pytest.mark.parametrize("model", [MethodSettings, *every_settings(Settings)])
def test_pydantics_words_never_reach_the_user(model: type[BaseModel]) -> None:
    """A kind of problem that is not translated, or a new kind of union, would show here."""
    for key in model.model_fields:
        for value in WRONG:
            try:
                validate(model, {key: value})
            except WrongInput as error:
                for line in str(error).splitlines():
                    assert re.match(r"((Missing|Unknown) key )?[\w.]+[:.] ", line), line
                    assert not re.search(r"Input|a valid|should have|tuple|dictionary|constrained", line), (
                        line
                    )


def test_whole_numbers_may_be_written_with_a_point() -> None:
    assert recipe("teacher.max_bytes=2e10").teacher == TeacherSettings(name="t", max_bytes=20_000_000_000)


def test_labels_may_be_whole_numbers() -> None:
    assert recipe("dataset.labels=[1,0,x]").dataset.labels == ("1", "0", "x")


@pytest.mark.parametrize("names", [["1", "0"], ["it's", 'a "b"', "c, d"], ["true", "\u00e9", "$x"]])
def test_a_setting_in_a_message_can_be_typed(names: list[str]) -> None:
    option, override = shlex.split(setting("dataset.labels", names))
    assert option == "--set"
    assert recipe(override).dataset.labels == tuple(names)


def test_every_wrong_key_has_a_line() -> None:
    found = message("training.epoch=1", "training.batch_size=0", "dataset.colour=red").splitlines()
    assert len(found) == 3
    assert any("training.epoch." in line for line in found)
    assert any("training.batch_size" in line for line in found)
    assert any("dataset.colour" in line for line in found)


def test_a_missing_key_is_named() -> None:
    with pytest.raises(WrongInput, match="Missing key teacher"):
        Recipe.load(dataset="glue/cola")
    with pytest.raises(WrongInput, match="Missing key dataset"):
        FinetuneRecipe.load()
    with pytest.raises(WrongInput, match=r"Missing key dataset.name"):
        Recipe.load(teacher="t", dataset={"max_length": 9})
    with pytest.raises(WrongInput, match=r"Missing key teacher.name"):
        Recipe.load(teacher={"cache": "off"}, dataset="glue/cola")


def test_patience_needs_selection_of_the_best() -> None:
    assert recipe("training.patience=2").training.patience == 2
    assert "select: best" in message("training.patience=2", "training.select=last")


def test_a_recipe_is_frozen() -> None:
    with pytest.raises(ValidationError):
        recipe().training.epochs = 5  # type: ignore[misc]


# a.b=c


@pytest.mark.parametrize(
    ("override", "want"),
    [
        ("a=1", {"a": 1}),
        ("a=+12", {"a": 12}),
        ("a=0", {"a": 0}),
        ("a=010", {"a": "010"}),
        ("a=0x10", {"a": "0x10"}),
        ("a=1_000", {"a": "1_000"}),
        ("a=12:30", {"a": "12:30"}),
        ("a=1e-4", {"a": 1e-4}),
        ("a=5E3", {"a": 5000.0}),
        ("a=-2.5", {"a": -2.5}),
        ("a=true", {"a": True}),
        ("a=null", {"a": None}),
        ("a=", {"a": None}),
        ("a=text", {"a": "text"}),
        ("a='12'", {"a": "12"}),
        ("a=[1, 2]", {"a": [1, 2]}),
        ("a={b: 1}", {"a": {"b": 1}}),
        ("a=b=c", {"a": "b=c"}),
        ("a=glue/cola", {"a": "glue/cola"}),
        ("a=layers:2,4,6", {"a": "layers:2,4,6"}),
        ("a.b.c=1", {"a": {"b": {"c": 1}}}),
        (" a.b =1", {"a": {"b": 1}}),
    ],
)
def test_set_reads_the_value_as_yaml(override: str, want: dict[str, Any]) -> None:
    values: dict[str, Any] = {}
    set_value(values, override)
    assert values == want
    assert type(values["a"]) is type(want["a"])


def test_set_keeps_what_stands_beside() -> None:
    values: dict[str, Any] = {"training": {"epochs": 3, "seed": 1}, "method": "kd"}
    set_value(values, "training.epochs=5")
    set_value(values, "method.temperature=4")
    assert values == {
        "training": {"epochs": 5, "seed": 1},
        "method": {"name": "kd", "temperature": 4},
    }


@pytest.mark.parametrize("override", ["", "a", "=3", "  =3", "training.epochs"])
def test_set_without_key_or_value_is_refused(override: str) -> None:
    with pytest.raises(WrongInput, match="Expected `--set key=value`"):
        set_value({}, override)


def test_set_below_a_single_value_is_refused() -> None:
    with pytest.raises(WrongInput, match="epochs is a single value, it has no more"):
        set_value({"training": {"epochs": 3}}, "training.epochs.more=1")


def test_set_of_what_is_no_yaml_is_refused() -> None:
    with pytest.raises(WrongInput, match="the value is not YAML"):
        set_value({}, "a=[1, 2")


def test_later_overrides_win() -> None:
    assert recipe("training.epochs=1", "training.epochs=2").training.epochs == 2


@pytest.mark.parametrize("text", ["1e-4", "5e-05", "1E-4", "0.0001"])
def test_a_learning_rate_is_a_number_on_the_line_and_in_the_file(tmp_path: Path, text: str) -> None:
    """YAML 1.1 reads 1e-4 as text."""
    (tmp_path / "r.yaml").write_text(f"teacher: t\ndataset: glue/cola\ntraining: {{learning_rate: {text}}}")
    want = float(text)
    assert recipe(f"training.learning_rate={text}").training.learning_rate == want
    assert Recipe.load(tmp_path / "r.yaml").training.learning_rate == want


# Files


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (
            "teacher: a\ndataset: d\n\nteacher: b\n",
            "the key 'teacher' stands in line 1 and again in line 4",
        ),
        (
            "training:\n  epochs: 1\n  'epochs': 3\nteacher: t\ndataset: d\n",
            "the key 'epochs' stands in line 2 and again in line 3",
        ),
        ("methods: [{a: 1,\n a: 1}]", "the key 'a' stands in line 1 and again in line 2"),
    ],
)
def test_a_key_that_stands_twice_is_refused_with_its_lines(
    tmp_path: Path, text: str, expected: str
) -> None:
    """The last one would count, and the other be forgotten without a word."""
    (tmp_path / "r.yaml").write_text(text)
    with pytest.raises(WrongInput, match=rf"r\.yaml cannot be read as YAML: {expected}\. Remove one"):
        read_yaml(tmp_path / "r.yaml")


def test_equal_keys_of_different_sections_and_those_of_an_anchor_are_no_duplicates(tmp_path: Path) -> None:
    text = "a: &a {epochs: 1, seed: 2}\nb: {<<: *a, epochs: 3}\nc: {<<: *a, seed: 4}\n1: x\n'1': y\n"
    (tmp_path / "r.yaml").write_text(text)
    assert read_yaml(tmp_path / "r.yaml") == {
        "a": {"epochs": 1, "seed": 2},
        "b": {"epochs": 3, "seed": 2},
        "c": {"epochs": 1, "seed": 4},
        1: "x",
        "1": "y",
    }


def test_a_key_that_stands_twice_in_an_override_is_refused() -> None:
    with pytest.raises(WrongInput, match=r"--set method=\{a: 1, a: 2\}: .*the key 'a'"):
        set_value({}, "method={a: 1, a: 2}")


FULL = """
teacher: teachers/cola
dataset: {name: data/mine, text: [a, b], label: y, labels: ["no", "yes"], max_length: 64,
          data_dir: /data, validation: held.csv, train_rows: 100}
student: layers:2,4
method: {name: lrc-bert, layer_map: [3, 6], vector: mean, negatives: bank, epsilon: 1e-1}
training: {epochs: 2.5, learning_rate: 3e-4, patience: 3, log_with: [tensorboard], precision: bf16}
control: true
"""


@pytest.mark.parametrize(
    "given",
    [
        FULL,
        "teacher: t\ndataset: glue/cola\n",
        "teacher: {name: t, cache: off, max_bytes: 1000}\ndataset: glue/cola\n",
        "teacher: t\ndataset: glue/cola\nmethod: none\n",
        "teacher: t\ndataset: glue/cola\nmethod: {name: kd, temperature: 3.3333333333333335}\n",
    ],
)
@pytest.mark.parametrize("resolved", [False, True])
def test_yaml_there_and_back_gives_an_equal_recipe(tmp_path: Path, given: str, resolved: bool) -> None:
    (tmp_path / "given.yaml").write_text(given)
    first = Recipe.load(tmp_path / "given.yaml")
    if resolved:
        first = methods.resolve(first)
    first.save(tmp_path / "saved.yaml")
    again = Recipe.load(tmp_path / "saved.yaml")
    assert again == first
    if resolved:
        assert methods.resolve(again) == first
    again.save(tmp_path / "again.yaml")
    assert (tmp_path / "again.yaml").read_text() == (tmp_path / "saved.yaml").read_text()


def test_a_saved_recipe_spells_every_setting_out(tmp_path: Path) -> None:
    methods.resolve(recipe()).save(tmp_path / "r.yaml")
    found = yaml.safe_load((tmp_path / "r.yaml").read_text())
    assert found["training"].keys() == TrainingSettings.model_fields.keys()
    assert found["teacher"].keys() == TeacherSettings.model_fields.keys()
    assert found["dataset"].keys() == DatasetSettings.model_fields.keys()
    assert found["method"].keys() == {"name", *methods.find("lrc-bert").settings.model_fields}


def test_a_method_sets_training_defaults_where_the_recipe_does_not() -> None:
    """LRC-BERT trains 18 epochs at batch 16; what the user says goes before that."""
    assert methods.resolve(recipe()).training.epochs == 18
    assert methods.resolve(recipe()).training.batch_size == 16
    found = methods.resolve(recipe("training.epochs=3", "training.batch_size=32"))
    assert (found.training.epochs, found.training.batch_size) == (3, 32)
    assert methods.resolve(recipe(method="kd")).training.epochs == TrainingSettings().epochs
    # Resolved once, it stays what it is.
    again = methods.resolve(methods.resolve(recipe("training.epochs=3")))
    assert again.training.epochs == 3


def test_what_is_given_beside_a_file_takes_precedence(tmp_path: Path) -> None:
    (tmp_path / "r.yaml").write_text(FULL)
    found = Recipe.load(
        tmp_path / "r.yaml", ["training.epochs=1"], teacher="other", dataset="glue/rte", method="kd"
    )
    assert (found.teacher.name, found.student, found.training.epochs) == ("other", "layers:2,4", 1)
    assert found.training.learning_rate == 3e-4
    # Another data set keeps the settings beside its name; another method drops the old one's options.
    assert found.dataset.name == "glue/rte" and found.dataset.max_length == 64
    assert found.method == MethodSettings(name="kd")
    assert Recipe.load(tmp_path / "r.yaml", teacher=None).teacher.name == "teachers/cola"
    # Another teacher is recorded where the first was to be.
    (tmp_path / "s.yaml").write_text("teacher: {name: t, cache: off}\ndataset: glue/cola\n")
    assert Recipe.load(tmp_path / "s.yaml", teacher="u").teacher == TeacherSettings(name="u", cache="off")


def test_a_name_stands_for_a_section() -> None:
    found = recipe(method="kd")
    assert found.dataset == DatasetSettings(name="glue/cola")
    assert found.teacher == TeacherSettings(name="t", cache="auto", max_bytes=None)
    assert recipe("teacher.max_bytes=1").teacher == TeacherSettings(name="t", max_bytes=1)
    assert found.method.name == "kd" and found.method.options == {}
    assert recipe("method=none").method.name == "none"


@pytest.mark.parametrize(
    ("text", "match"),
    [
        (b"a: [1", "cannot be read as YAML.*line 1|cannot be read as YAML"),
        (b"- a\n- b\n", "should hold `key: value` lines, found list"),
        (b"", "should hold `key: value` lines, found NoneType"),
        (b"a: \xff\xfe", "cannot be read as YAML"),
        (b"a: !!python/object/apply:os.getcwd []", "cannot be read as YAML"),
    ],
)
def test_a_file_that_is_no_recipe_is_refused_by_name(tmp_path: Path, text: bytes, match: str) -> None:
    path = tmp_path / "r.yaml"
    path.write_bytes(text)
    with pytest.raises(WrongInput, match=f"(?s)r.yaml {match}"):
        read_yaml(path)


def test_a_file_that_is_not_there_is_refused_by_name(tmp_path: Path) -> None:
    with pytest.raises(WrongInput, match="found nothing at .*none.yaml"):
        Recipe.load(tmp_path / "none.yaml")
    with pytest.raises(WrongInput, match="cannot be read"):
        Recipe.load(tmp_path)


def test_nearest() -> None:
    assert nearest("epoch", ["epochs", "seed"]) == " Did you mean epochs? Valid: epochs, seed."
    assert nearest("qqq", ["epochs", "seed"]) == " Valid: epochs, seed."


def test_options_reach_the_plan_as_the_method_reads_them() -> None:
    given = methods.resolve(recipe("method.layer_map=[2,4]", "method.alpha=0.5")).method
    plan = methods.build(given, Context("classification", 2, 8, 2, 4, 4, 4))
    assert plan.stages[0].weights == {"cos_nce": 0.5}
    assert plan.terms["cos_nce"].teacher_layers == (2, 4)


@pytest.mark.parametrize("text", ["off", "on", "yes", "no", "truely", "3e", "1.2.3"])
def test_words_stay_words(text: str) -> None:
    """YAML 1.1 reads `off` as false, so that `method.perturbation=off` would be no valid value."""
    recipe = Recipe.load(teacher="t", dataset="glue/cola", overrides=[f"student={text}"])
    assert recipe.student == text


@pytest.mark.parametrize("text", ["1e-4", "1.0e-4", ".0001", "0.0001"])
def test_numbers_in_files_are_numbers(text: str, tmp_path: Path) -> None:
    path = tmp_path / "recipe.yaml"
    path.write_text(f"teacher: t\ndataset: glue/cola\nmethod: {{name: kd, temperature: {text}}}\n")
    assert Recipe.load(path).method.options == {"temperature": 1e-4}


COMPARED = {"teacher": "t", "dataset": "d", "methods": ["kd"]}


@pytest.mark.parametrize(
    ("load", "match"),
    [
        (
            lambda: Comparison.load(**COMPARED, overrides=["out_of_domain.x.datset=3"]),
            "x.datset. Did you mean dataset",
        ),
        (
            lambda: Comparison.load(**{**COMPARED, "methods": {"a": {"metod": "kd"}}}),
            "a.metod. Did you mean method",
        ),
        (
            lambda: Comparison.load(
                **{**COMPARED, "methods": {"a": {"method": "kd", "training": {"seed": 5}}}}
            ),
            "expected no training.seed of a",
        ),
        (
            lambda: Comparison.load(
                **{**COMPARED, "methods": {"a": {"method": "kd", "training": {"precision": "bf16"}}}}
            ),
            "expected training.precision of the comparison, which holds for all its methods, and found",
        ),
        (
            lambda: Comparison.load(**{**COMPARED, "methods": ["kd", "none", "kd"]}),
            r"methods should differ, found \['kd', 'none', 'kd'\]",
        ),
        (lambda: validate(Recipe, [1]), "should hold `key: value` lines"),  # type: ignore[arg-type]
        (lambda: read_tries("[1,2"), "the values are not YAML"),
    ],
)
def test_mistakes_below_names_are_told(load: Any, match: str) -> None:
    with pytest.raises(WrongInput, match=match):
        load()


def test_a_date_is_text() -> None:
    assert Recipe.load(None, ["student=2026-13-45"], teacher="t", dataset="d").student == "2026-13-45"

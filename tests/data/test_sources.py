"""Each kind of source is read as meant, and whatever is wrong with it is named, file and row."""

import csv
import json
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from stillroom.data import columns, sources
from stillroom.data.tasks import GLUE, Dataset
from stillroom.errors import WrongInput
from stillroom.recipe import DatasetSettings


def load(name: object, splits: tuple[str, ...] = ("train", "validation"), **settings: Any) -> Dataset:
    return sources.load(DatasetSettings(name=str(name), **settings), splits)


def refused(name: object, *said: str, splits: tuple[str, ...] = ("train",), **settings: Any) -> None:
    """Assert that loading is refused with a message that holds every one of `said`."""
    with pytest.raises(WrongInput) as caught:
        load(name, splits, **settings)
    for part in said:
        assert part in str(caught.value)


def write(path: Path, content: str | bytes) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    return path


def write_parquet(path: Path, **columns: Any) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.table(columns), path)
    return path


def write_jsonl(path: Path, rows: list[dict[str, Any]]) -> Path:
    return write(path, "".join(json.dumps(row) + "\n" for row in rows))


def both(folder: Path, train: str, validation: str, ending: str = "csv") -> Path:
    write(folder / f"train.{ending}", train)
    write(folder / f"validation.{ending}", validation)
    return folder


def first_row(dataset: Dataset) -> tuple[list[str], Any]:
    rows = dataset.split("train")
    return [column[0] for column in rows.texts], rows.labels[0].tolist()


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("train.csv", 'text,label\n"Good, very ""good""",yes\nbad,no\n'),
        ("train.tsv", 'text\tlabel\nGood, very "good"\tyes\nbad\tno\n'),
        (
            "train.jsonl",
            '{"text": "Good, very \\"good\\"", "label": "yes"}\n{"text": "b", "label": "no"}\n',
        ),
        ("train.ndjson", '{"text": "Good, very \\"good\\"", "label": "yes"}\n{"text": "b", "label": "no"}'),
        ("train.json", '[{"text": "Good, very \\"good\\"", "label": "yes"}, {"text": "b", "label": "no"}]'),
    ],
)
def test_formats_hold_the_same_rows(tmp_path: Path, name: str, content: str) -> None:
    write(tmp_path / name, content)
    assert first_row(load(tmp_path, ("train",))) == (['Good, very "good"'], 1)


def test_parquet_holds_the_same_rows(tmp_path: Path) -> None:
    path = write_parquet(tmp_path / "train.parquet", text=['Good, very "good"', "b"], label=["yes", "no"])
    assert first_row(load(path.parent, ("train",))) == (['Good, very "good"'], 1)


def test_byte_order_mark_is_no_part_of_a_column_name(tmp_path: Path) -> None:
    write(tmp_path / "train.csv", b"\xef\xbb\xbftext,label\na,x\nb,y\n")
    assert load(tmp_path, ("train",)).task.text == ("text",)


def test_tsv_keeps_quotes_that_never_close(tmp_path: Path) -> None:
    """GLUE's files have them; with quoting, lines would be glued together in silence."""
    write(tmp_path / "train.tsv", 'sentence\tlabel\n"he said\t0\n5" long\t1\n')
    rows = load(tmp_path, ("train",)).split("train")
    assert rows.texts == (['"he said', '5" long'],)
    assert rows.labels.tolist() == [0, 1]


def test_json_lines_may_hold_other_line_separators(tmp_path: Path) -> None:
    write(tmp_path / "train.jsonl", '{"text": "a\u2028b", "label": 0}\n{"text": "c", "label": 1}\n')
    assert load(tmp_path, ("train",)).split("train").texts == (["a\u2028b", "c"],)


@pytest.mark.parametrize(
    ("header", "text"),
    [
        ("idx,Sentence,label", ("Sentence",)),
        ("premise,hypothesis,label", ("premise", "hypothesis")),
        ("question,sentence,label", ("question", "sentence")),
        ("sentence1,sentence2,label", ("sentence1", "sentence2")),
    ],
)
def test_usual_columns_are_found(tmp_path: Path, header: str, text: tuple[str, ...]) -> None:
    columns = header.count(",")
    write(tmp_path / "train.csv", f"{header}\n{'a,' * columns}0\n{'b,' * columns}1\n")
    assert load(tmp_path, ("train",)).task.text == text


def test_columns_can_be_named(tmp_path: Path) -> None:
    write(tmp_path / "train.csv", "text,subject,answer,grade\na,b,c,x\nd,e,f,y\n")
    found = load(tmp_path, ("train",), text=("answer", "subject"), label="grade")
    assert found.split("train").texts == (["c", "f"], ["b", "e"])
    assert found.task.label == "grade"


def test_columns_that_are_not_found_are_listed(tmp_path: Path) -> None:
    path = write(tmp_path / "train.csv", "words,verdict\na,x\nb,y\n")
    refused(tmp_path, str(path), "words, verdict", "dataset.text=[")
    refused(tmp_path, str(path), "words, verdict", "dataset.label=", text=("words",))
    refused(tmp_path, "no column 'word'", "Did you mean words?", text=("word",))
    refused(tmp_path, "both text and label", text=("words",), label="words")
    refused(tmp_path, "one or two columns", text=())


@pytest.mark.parametrize(
    ("values", "kind", "labels", "found"),
    [
        (["pos", "neg", "pos"], "classification", ("neg", "pos"), [1, 0, 1]),
        ([2, 0, 10], "classification", ("0", "2", "10"), [1, 0, 2]),
        ([1.0, 0.0, 1.0], "classification", ("0", "1"), [1, 0, 1]),
        (["1", "0", "1.0"], "classification", ("0", "1"), [1, 0, 1]),
        ([True, False, True], "classification", ("false", "true"), [1, 0, 1]),
        ([0.5, 2.0, -1.0], "regression", (), [0.5, 2.0, -1.0]),
        (["0.5", "2", "1e-1"], "regression", (), [0.5, 2.0, np.float32(0.1)]),
        ([["b", "a"], [], ["b"]], "multi-label", ("a", "b"), [[1, 1], [0, 0], [0, 1]]),
        ([[2, 10], [2], []], "multi-label", ("2", "10"), [[1, 1], [1, 0], [0, 0]]),
    ],
)
def test_kind_is_read_off_the_labels(
    tmp_path: Path, values: list[Any], kind: str, labels: tuple[str, ...], found: list[Any]
) -> None:
    write_jsonl(tmp_path / "train.jsonl", [{"text": "t", "label": value} for value in values])
    dataset = load(tmp_path, ("train",))
    assert (dataset.task.kind, dataset.task.labels) == (kind, labels)
    rows = dataset.split("train")
    assert rows.labels.tolist() == found
    assert rows.labels.dtype == (np.int64 if kind == "classification" else np.float32)


def test_given_kind_wins(tmp_path: Path) -> None:
    write(tmp_path / "train.csv", "text,label\na,1\nb,2\nc,x|y\nd,\n")
    refused(tmp_path, "row 4", "missing")
    write(tmp_path / "train.csv", "text,label\na,1\nb,5\n")
    assert load(tmp_path, ("train",), kind="regression").split("train").labels.tolist() == [1.0, 5.0]
    assert load(tmp_path, ("train",), kind="regression").task.metrics == ("pearson", "spearman")
    assert load(tmp_path, ("train",)).task.metrics == ("accuracy", "f1")


@pytest.mark.parametrize("cells", [["x|y z", "", "y z"], ['"x, y z"', "", "y z"]])
def test_separated_labels_are_several_only_when_said(tmp_path: Path, cells: list[str]) -> None:
    write(tmp_path / "train.csv", "label,text\n" + "".join(f"{cell},t\n" for cell in cells))
    dataset = load(tmp_path, ("train",), kind="multi-label")
    assert dataset.task.labels == ("x", "y z")
    assert dataset.task.metrics == ("f1", "accuracy")
    assert dataset.split("train").labels.tolist() == [[1, 1], [0, 0], [0, 1]]
    write(tmp_path / "train.csv", "label,text\nx|y,t\nx,t\n")
    assert load(tmp_path, ("train",)).task.labels == ("x", "x|y")


@pytest.mark.parametrize("kind", ["auto", "multi-label"])
@pytest.mark.parametrize("write_list", [json.dumps, repr, lambda names: str(names).replace("', ", "',")])
def test_a_list_as_text_is_the_list(tmp_path: Path, kind: str, write_list: Callable[[Any], str]) -> None:
    """Taken apart at its commas, it gave labels such as '["x"', and "no label" was one of them."""
    lists = [["x", "y, z"], ["y, z"], [], ["x"], ["it's", "x"]]
    with (tmp_path / "train.csv").open("w", newline="") as stream:
        csv.writer(stream).writerows(
            [("text", "label"), *(("t", f" {write_list(names)}") for names in lists)]
        )
    dataset = load(tmp_path, ("train",), kind=kind)
    assert (dataset.task.kind, dataset.task.labels) == ("multi-label", ("it's", "x", "y, z"))
    found = dataset.split("train").labels.tolist()
    assert found == [[0, 1, 1], [0, 0, 1], [0, 0, 0], [0, 1, 0], [1, 1, 0]]


@pytest.mark.parametrize("cell", ["['x' 'y']", '["x", "y]', "[x, y]", "[1 2]", "['x'] + ['y']"])
def test_brackets_that_hold_no_list_are_refused(tmp_path: Path, cell: str) -> None:
    """The first is how NumPy writes two labels: to Python it is one, xy."""
    rows = [{"text": "t", "label": label} for label in ("x|y", "[x]|[y]", cell)]
    write_jsonl(tmp_path / "train.jsonl", rows)
    refused(tmp_path, "row 3 (line 3)", "a list of labels", cell, 'JSON (["a", "b"])', kind="multi-label")
    write_jsonl(tmp_path / "train.jsonl", rows[:2])
    dataset = load(tmp_path, ("train",), kind="multi-label")
    assert dataset.task.labels == ("[x]", "[y]", "x", "y")


def test_classes_in_brackets_stay_classes(tmp_path: Path) -> None:
    labelled(tmp_path / "train.csv", "[A]", "[B]")
    assert load(tmp_path, ("train",)).task.labels == ("[A]", "[B]")
    labelled(tmp_path / "train.csv", "[1]", "[2]")
    assert load(tmp_path, ("train",), kind="classification").task.labels == ("[1]", "[2]")


@pytest.mark.parametrize("labels", [None, ("x", "y")])
@pytest.mark.parametrize("listed", [["x", ""], [" "], '["y", ""]'])
def test_a_name_in_a_list_is_not_empty(tmp_path: Path, listed: Any, labels: tuple[str, ...] | None) -> None:
    rows = [{"text": "t", "label": label} for label in (["x", "y"], listed)]
    write_jsonl(tmp_path / "train.jsonl", rows)
    refused(tmp_path, "row 2 (line 2)", "Remove it from the list", labels=labels)


def test_given_labels_name_the_numbers(tmp_path: Path) -> None:
    write(tmp_path / "train.csv", "text,label\na,0\nb,1\nc,good\n")
    dataset = load(tmp_path, ("train",), labels=("bad", "good", "other"))
    assert dataset.task.labels == ("bad", "good", "other")
    assert dataset.split("train").labels.tolist() == [0, 1, 1]


def test_given_labels_that_are_numbers_are_names(tmp_path: Path) -> None:
    """Read as positions, 1 would mean the second star, and 3 no star at all."""
    write(tmp_path / "train.csv", "text,label\na,1\nb,3\n")
    stars = ("1", "2", "3")
    assert load(tmp_path, ("train",), labels=stars).split("train").labels.tolist() == [0, 2]
    write(tmp_path / "train.csv", "text,label\na,1\nb,0\n")
    refused(tmp_path, "row 2", "one of the labels 1, 2, 3", labels=stars)


@pytest.mark.parametrize("value", [2, -1, 0.5, "other"])
def test_labels_beyond_the_given_ones_are_refused(tmp_path: Path, value: object) -> None:
    write_jsonl(tmp_path / "train.jsonl", [{"text": "a", "label": 0}, {"text": "b", "label": value}])
    refused(tmp_path, "train.jsonl, row 2 (line 2)", kind="classification", labels=("bad", "good"))


def test_splits_number_their_labels_alike(tmp_path: Path) -> None:
    """Validation alone would number y as 0, and the score would be that of other classes."""
    both(tmp_path, "text,label\na,x\nb,y\nc,z\n", "text,label\nd,z\ne,y\n")
    for splits in (("train", "validation"), ("validation",)):
        dataset = load(tmp_path, splits)
        assert tuple(dataset.splits) == splits
        assert dataset.task.labels == ("x", "y", "z")
        assert dataset.split("validation").labels.tolist() == [2, 1]


def test_a_label_that_train_lacks_is_named(tmp_path: Path) -> None:
    both(tmp_path, "text,label\na,x\nb,y\n", "text,label\nc,x\nd,w\n")
    refused(tmp_path, "validation.csv, row 2 (line 3)", "'w'", "x, y", splits=("validation",))


def test_folder_files_by_other_names(tmp_path: Path) -> None:
    write(tmp_path / "train.csv", "text,label\na,x\nb,y\n")
    write(tmp_path / "dev.tsv", "text\tlabel\nc\ty\n")
    write(tmp_path / "test.jsonl", '{"text": "d", "label": "x"}')
    write(tmp_path / "README.md", "no data")
    dataset = load(tmp_path, ("train", "validation", "test"))
    assert [rows.texts[0][0] for rows in dataset.splits.values()] == ["a", "c", "d"]
    write(tmp_path / "valid.csv", "text,label\nc,x\n")
    refused(tmp_path, "dev.tsv, valid.csv", splits=("validation",))


def test_missing_split_names_what_is_there(tmp_path: Path) -> None:
    write(tmp_path / "train.csv", "text,label\na,x\nb,y\n")
    refused(tmp_path, "validation.* or valid.*", "found train.csv", splits=("train", "validation"))
    refused(tmp_path, "dataset.validation", validation=tmp_path / "train.csv")
    refused(tmp_path / "train.csv", "no split 'test'", splits=("test",))


def test_every_tenth_row_is_held_out(tmp_path: Path) -> None:
    path = write(tmp_path / "all.csv", "text,label\n" + "".join(f"t{i},{i % 2}\n" for i in range(25)))
    dataset = load(path)
    assert dataset.split("validation").texts == (["t9", "t19"],)
    assert dataset.split("train").texts == ([f"t{i}" for i in range(25) if i not in (9, 19)],)
    assert "every tenth row" in dataset.split("validation").source
    assert load(path, ("validation",)).split("validation").texts == (["t9", "t19"],)
    write(path, "text,label\na,0\nb,1\n")
    refused(path, "2 rows", "dataset.validation")


def test_validation_file_beside_a_single_file(tmp_path: Path) -> None:
    train = write(tmp_path / "mine.csv", "text,label\na,x\nb,y\n")
    other = write(tmp_path / "other.jsonl", '{"text": "c", "label": "y"}')
    dataset = load(train, validation=other)
    assert len(dataset.split("train")) == 2
    assert dataset.split("validation").labels.tolist() == [1]
    assert tuple(load(train, ("validation",), validation=other).splits) == ("validation",)


def test_train_rows_are_drawn_once_and_for_all(tmp_path: Path) -> None:
    path = write(tmp_path / "all.csv", "text,label\n" + "".join(f"{i},{i % 2}\n" for i in range(100)))
    rows = load(path, train_rows=30).split("train")
    drawn = [int(text) for text in rows.texts[0]]
    assert len(set(drawn)) == 30
    assert drawn == sorted(drawn) != list(range(30))
    assert rows.labels.tolist() == [i % 2 for i in drawn]
    assert load(path, train_rows=30).split("train").texts == rows.texts
    assert len(load(path, train_rows=30).split("validation")) == 10
    everything = load(path, train_rows=1000).split("train")
    assert (everything.texts, everything.source) == (
        load(path).split("train").texts,
        load(path).split("train").source,
    )


def labelled(path: Path, *labels: str) -> Path:
    """Write a CSV file with one row for each label."""
    return write(path, "label,text\n" + "".join(f"{label},t{i}\n" for i, label in enumerate(labels)))


@pytest.mark.parametrize(
    ("first", "second"),
    [
        ("negative", "Negative"),
        ("True", "true"),
        ("1", "+1"),
        ("1", "01"),
        ("yes", "+Yes"),
        ("caf\u00e9", "cafe\u0301"),
        ("not_equal", "not equal"),
    ],
)
def test_two_spellings_of_a_class_are_refused(tmp_path: Path, first: str, second: str) -> None:
    """Each would be a class of its own, and the model would learn to tell spellings apart."""
    labelled(tmp_path / "train.csv", "0", first, second)
    refused(tmp_path, "row 3 (line 4)", repr(second), f"{first!r} in row 2", "Write them alike")
    named = load(tmp_path, ("train",), labels=("0", first, second))
    assert named.split("train").labels.tolist() == [0, 1, 2]


def test_true_is_another_spelling_in_json_too(tmp_path: Path) -> None:
    write_jsonl(
        tmp_path / "train.jsonl", [{"text": "t", "label": label} for label in (True, False, "True")]
    )
    refused(tmp_path, "row 3 (line 3)", "'True'", "'true' in row 1")


@pytest.mark.parametrize(("labels", "found"), [((True, 1, 0), "'1'"), ((0, True, False), "'false'")])
def test_true_and_1_are_one_class(tmp_path: Path, labels: tuple[Any, ...], found: str) -> None:
    """Two exports put together made three classes of two."""
    path = tmp_path / "train.jsonl"
    write_jsonl(path, [{"text": "t", "label": label} for label in labels])
    refused(tmp_path, f"is {found}", "expected one spelling of a class")
    given = load(tmp_path, ("train",), labels=("0", "1", "true", "false")).split("train").labels
    assert len(set(given.tolist())) == 3


@pytest.mark.parametrize("word", columns.MISSING)
@pytest.mark.parametrize("kind", ["auto", "classification", "regression", "multi-label"])
def test_a_word_for_missing_is_no_class_unless_it_is_named(tmp_path: Path, word: str, kind: str) -> None:
    labelled(tmp_path / "train.csv", "1", "0", f" {word} ")
    refused(tmp_path, "row 3 (line 4)", f"is {word}, which is taken for a missing one", kind=kind)
    if kind != "regression":
        named = load(tmp_path, ("train",), kind=kind, labels=("0", "1", word)).split("train")
        assert named.labels[2].tolist() == ([0, 0, 1] if kind == "multi-label" else 2)


def test_a_word_for_missing_is_refused_in_validation_and_beside_soft_labels(tmp_path: Path) -> None:
    both(tmp_path, "text,label\na,x\nb,y\n", "text,label\nc,x\nd,NA\n")
    refused(tmp_path, "validation.csv, row 2 (line 3)", "NA", splits=("validation",))
    write(tmp_path / "train.csv", "text,label,p_x,p_y\na,x,1,0\nb,None,0,1\n")
    refused(tmp_path, "train.csv, row 2 (line 3)", "leave the cell empty", soft_labels="p_")


def test_none_in_lower_case_is_a_class(tmp_path: Path) -> None:
    labelled(tmp_path / "train.csv", "none", "some", "na")
    assert load(tmp_path, ("train",)).task.labels == ("na", "none", "some")


def test_many_whole_numbers_are_classes_or_scores_only_when_said(tmp_path: Path) -> None:
    """Ratings from 0 to 100 would become a hundred classes that know nothing of each other."""
    labelled(tmp_path / "train.csv", *(str(i % 77) for i in range(500)))
    refused(tmp_path, "77 different whole numbers", "--set dataset.kind=classification", "regression")
    assert len(load(tmp_path, ("train",), kind="classification").task.labels) == 77
    assert load(tmp_path, ("train",), kind="regression").split("train").labels[76] == 76
    labels = tuple(f"intent {i}" for i in range(77))
    assert load(tmp_path, ("train",), labels=labels).task.labels == labels
    labelled(tmp_path / "train.csv", *(str(i % 20) for i in range(50)))
    assert len(load(tmp_path, ("train",)).task.labels) == 20
    labelled(tmp_path / "train.csv", *(f"intent {i % 77}" for i in range(500)))
    assert len(load(tmp_path, ("train",)).task.labels) == 77


@pytest.mark.parametrize("labels", [None, ("bad", "good")])
def test_a_flag_for_each_of_two_labels_is_refused(tmp_path: Path, labels: tuple[str, ...] | None) -> None:
    """Read as names, 0 and 1 would both be labels of every row."""
    path = tmp_path / "train.jsonl"
    write_jsonl(path, [{"text": "t", "label": flags} for flags in ([0, 1], [1, 0], [0, 1])])
    refused(tmp_path, str(path), "not a 0 or 1 for each", labels=labels, kind="multi-label")
    write_jsonl(path, [{"text": "t", "label": names} for names in ([0, 1], [1], [0, 1])])
    assert load(tmp_path, ("train",), labels=labels, kind="multi-label").split("train").labels.tolist() == [
        [1, 1],
        [0, 1],
        [1, 1],
    ]


def test_byte_order_marks_of_several_programs_are_no_part_of_a_name(tmp_path: Path) -> None:
    write(tmp_path / "train.csv", "\ufeff\ufefftext,label\na,x\nb,y\n")
    assert load(tmp_path, ("train",)).task.text == ("text",)
    write(tmp_path / "train.jsonl", '\ufeff\ufeff{"text": "a", "label": 0}\n{"text": "b", "label": 1}\n')
    assert load(tmp_path / "train.jsonl", ("all",)).split("all").texts == (["a", "b"],)


@pytest.mark.parametrize(("mark", "separator"), [("sep=,", ","), ("\ufeffsep=;\r", ";"), ('"sep=,"', ",")])
def test_the_line_that_tells_excel_its_separator_is_followed(
    tmp_path: Path, mark: str, separator: str
) -> None:
    rows = "text,label\na,x\n,y\nb,\n".replace(",", separator)
    path = write(tmp_path / "train.csv", f"{mark}\n{rows}")
    refused(tmp_path, "row 3 (line 5)", "missing")
    path.write_text(path.read_text().replace(f"b{separator}", f"b{separator}x"))
    assert load(tmp_path, ("train",)).split("train").labels.tolist() == [0, 1, 0]


ROWS = '{"text": "a", "label": 0}\n{"text": "b", "label": 1}\n'


@pytest.mark.parametrize(
    ("name", "content", "said"),
    [
        ("train.csv", b"text,label\na,x\n\xe9t\xe9,y\n", ("line 3", "UTF-8", "0xe9")),
        ("train.jsonl", "text".encode("utf-16"), ("line 1", "UTF-8")),
        ("train.csv", "text,label\na,x\n\nb,y,z\n", ("row 2 (line 4)", "expected 2 columns", "found 3")),
        ("train.csv", "text,label\na,x\nb\n", ("row 2 (line 3)", "found 1")),
        ("train.tsv", "text\tlabel\na\tb\tx\n", ("row 1 (line 2)", "found 3")),
        ("train.csv", 'text,label\n"a\nb",x\n"open,y\n', ("row 2 (line 4)", "quotes")),
        ("train.csv", 'text,label\n"a"b,x\n', ("row 1 (line 2)", "quotes")),
        ("train.csv", "text,label,text\na,x,b\n", ("'text' occurs twice",)),
        ("train.jsonl", ROWS + "{broken\n", ("row 3 (line 3)", "expected JSON")),
        ("train.jsonl", ROWS + "[1, 2]\n", ("row 3 (line 3)", "expected an object")),
        ("train.jsonl", ROWS + "[" * 100_000, ("row 3 (line 3)", "expected JSON")),
        ("train.jsonl", ROWS + "1" * 5000, ("row 3 (line 3)", "expected JSON")),
        ("train.jsonl", ROWS + '{"text": "a", "text": "b"}', ("row 3", "'text' occurs twice")),
        ("train.json", "[1]", ("row 1", "expected an object")),
        ("train.csv", "", ("is empty",)),
        ("train.jsonl", " \n\n", ("is empty",)),
        ("train.csv", "text,label\n", ("has no rows",)),
        ("train.json", "[]", ("has no rows",)),
        ("train.parquet", b"PAR1 and so on", ("truncated or damaged",)),
        ("train.csv", "text,label\na,x\nb,\n", ("row 2 (line 3)", "missing")),
        ("train.csv", 'text,label\n"a\nb",x\n"c\nd",\n', ("row 2 (line 4)", "missing")),
        ("train.csv", "text,label\na,0.5\nb,nan\n", ("row 2 (line 3)", "missing")),
        ("train.csv", "text,label\na,0.5\nb,inf\n", ("row 2 (line 3)", "finite", "inf")),
        ("train.csv", "text,label\na,0.5\nb,1e39\n", ("row 2 (line 3)", "finite", "1e39")),
        ("train.jsonl", ROWS + '{"text": "c"}', ("row 3 (line 3)", "missing")),
        ("train.jsonl", ROWS + '{"text": "c", "label": NaN}', ("row 3 (line 3)", "missing")),
        ("train.jsonl", ROWS + '{"text": null, "label": 0}', ("row 3 (line 3)", "found nothing")),
        ("train.jsonl", ROWS + '{"text": 7, "label": 0}', ("row 3 (line 3)", "expected text", "int 7")),
        ("train.jsonl", ROWS + '{"text": "\\ud800", "label": 0}', ("row 3 (line 3)", "Unicode")),
        ("train.jsonl", ROWS + '{"text": "c", "label": {"a": 1}}', ("row 3 (line 3)", "found dict")),
        ("train.jsonl", ROWS + '{"text": "c", "label": -1}', ("row 3 (line 3)", "found -1")),
        ("train.csv", "text,label\na,x\nb,0.5\n", ("row 2 (line 3)", "found 0.5")),
        ("train.jsonl", '{"text": "c", "label": [0, 1, 0]}', ("row 1", "given twice")),
        ("train.csv", "text,label\na,x\nb,x\n", ("at least two classes", "only x")),
        ("train.csv", "text,label\n" + "".join(f"a,n{i}\n" for i in range(30)), ("too many",)),
    ],
)
def test_what_is_wrong_with_a_file_is_named(
    tmp_path: Path, name: str, content: str | bytes, said: tuple[str, ...]
) -> None:
    path = write(tmp_path / name, content)
    refused(tmp_path, str(path), *said)


@pytest.mark.parametrize("damage", ["cut", "flip"])
def test_damaged_parquet_is_named(tmp_path: Path, damage: str) -> None:
    texts = [f"some text, number {i}" for i in range(1000)]
    path = write_parquet(tmp_path / "train.parquet", text=texts, label=[i % 2 for i in range(1000)])
    data = bytearray(path.read_bytes())
    path.write_bytes(data[: len(data) // 2] if damage == "cut" else data[:40] + bytes(200) + data[240:])
    refused(tmp_path, str(path), "truncated or damaged")


def test_parquet_text_that_is_not_utf8_is_named(tmp_path: Path) -> None:
    offsets = pa.array([0, 1, 2], pa.int32()).buffers()[1]
    text = pa.Array.from_buffers(pa.string(), 2, [None, offsets, pa.py_buffer(b"a\xff")])
    path = write_parquet(tmp_path / "train.parquet", text=text, label=[0, 1])
    refused(tmp_path, f"{path}, row 2", "UTF-8")


@pytest.mark.parametrize("column", ["text", "label"])
def test_parquet_null_is_named(tmp_path: Path, column: str) -> None:
    columns: dict[str, list[Any]] = {"text": ["a", "b", "c"], "label": [0, 1, 0]}
    columns[column][1] = None
    path = write_parquet(tmp_path / "train.parquet", **columns)
    refused(tmp_path, f"{path}, row 2:")


def test_names_that_lead_nowhere(tmp_path: Path) -> None:
    refused("glue/sst", "Did you mean glue/sst2?")
    refused("builtin/verdict", "Did you mean builtin/verdicts?")
    refused("cola", "found nothing at 'cola'", "Did you mean glue/cola?")
    refused("x" * 5000, "cannot be read")
    refused(write(tmp_path / "train.txt", "text"), "Cannot tell the format", ".csv")
    refused("builtin/verdicts", "no split 'test'", splits=("test",))


@pytest.mark.parametrize(
    "settings", [{"text": ("a",)}, {"label": "a"}, {"labels": ("a", "b")}, {"kind": "regression"}]
)
def test_settings_that_would_be_ignored_are_refused(settings: dict[str, Any]) -> None:
    refused("builtin/verdicts", f"remove dataset.{next(iter(settings))}", **settings)


def write_glue(root: Path, name: str, **splits: list[Any]) -> Path:
    """Write a GLUE task's splits from their labels; texts say column, split and row."""
    task = GLUE[name]
    for split, labels in splits.items():
        texts = {c: [f"{c} {split} {i}" for i in range(len(labels))] for c in task.text}
        write_parquet(root / name / f"{split}.parquet", **texts, label=labels, idx=list(range(len(labels))))
    return root


def test_glue_from_a_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_glue(tmp_path, "glue/qnli", train=[0, 1, 1], validation=[1])
    dataset = load("glue/qnli", data_dir=tmp_path)
    assert dataset.task is GLUE["glue/qnli"]
    assert dataset.split("train").texts[1] == [f"sentence train {i}" for i in range(3)]
    assert dataset.split("train").labels.tolist() == [0, 1, 1]
    monkeypatch.setenv("STILLROOM_DATA", str(tmp_path))
    assert load("glue/qnli").split("validation").labels.tolist() == [1]
    refused("glue/qnli", "test.parquet, found train.parquet, validation.parquet", splits=("test",))
    refused("glue/rte", f"there is no folder {tmp_path / 'glue' / 'rte'}", "$STILLROOM_DATA")


def test_mnli_has_two_validation_splits(tmp_path: Path) -> None:
    write_glue(tmp_path, "glue/mnli", train=[0, 1, 2], validation_matched=[2])
    write_glue(tmp_path, "glue/mnli", validation_mismatched_partial=[0])
    dataset = load("glue/mnli", ("validation", "validation_matched"), data_dir=tmp_path)
    assert [rows.labels.tolist() for rows in dataset.splits.values()] == [[2], [2]]
    refused(
        "glue/mnli", "validation_mismatched.parquet", splits=("validation_mismatched",), data_dir=tmp_path
    )
    write_glue(tmp_path, "glue/mnli", validation_mismatched=[1])
    splits = ("validation_mismatched",)
    assert load("glue/mnli", splits, data_dir=tmp_path).split(*splits).labels.tolist() == [1]


@pytest.mark.parametrize(("label", "said"), [(-1, "has no label (-1)"), (2, "from 0 to 1"), (0.5, "0.5")])
def test_glue_labels_are_checked(tmp_path: Path, label: float, said: str) -> None:
    write_glue(tmp_path, "glue/rte", train=[0, label, 1])
    refused("glue/rte", "train.parquet, row 2", said, data_dir=tmp_path)


def test_glue_columns_are_checked(tmp_path: Path) -> None:
    write_parquet(tmp_path / "glue/cola/train.parquet", sentense=["a"], label=[0])
    refused("glue/cola", "no column 'sentence'", "Did you mean sentense?", data_dir=tmp_path)


def test_glue_from_the_hub(monkeypatch: pytest.MonkeyPatch) -> None:
    from datasets import Dataset as ArrowDataset

    asked = []

    def load_dataset(*names: str, split: str) -> ArrowDataset:
        asked.append((*names, split))
        return ArrowDataset.from_dict({"premise": ["p"], "hypothesis": ["h"], "label": [2]})

    monkeypatch.setattr(sources, "load_dataset", load_dataset)
    rows = load("glue/mnli", ("validation",)).split("validation")
    assert asked == [("nyu-mll/glue", "mnli", "validation_matched")]
    assert (rows.texts, rows.labels.tolist()) == ((["p"], ["h"]), [2])


def test_hub_out_of_reach_names_the_remedy() -> None:
    refused("glue/cola", "nyu-mll/glue", "--data-dir", "$STILLROOM_DATA")


def test_describe_knows_what_is_here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def no_network(*_: object, **__: object) -> None:
        raise AssertionError("describe asked the hub")

    monkeypatch.setattr(sources, "load_dataset", no_network)
    write_glue(tmp_path, "glue/mnli", train=[0], validation_matched=[0])
    write_glue(tmp_path, "glue/cola", train=[0])
    known = {entry.name: entry for entry in sources.describe(tmp_path)}
    assert set(known) == {*GLUE, "builtin/verdicts"}
    assert [name for name, entry in known.items() if entry.here] == ["glue/mnli", "builtin/verdicts"]
    assert known["glue/mnli"].columns == ("premise", "hypothesis", "label")
    assert not any(entry.here for entry in sources.describe() if entry.name in GLUE)


def test_builtin_comes_with_both_splits() -> None:
    dataset = load("builtin/verdicts", train_rows=100)
    assert {name: len(rows) for name, rows in dataset.splits.items()} == {"train": 100, "validation": 900}
    assert Counter(dataset.split("validation").labels.tolist()) == {0: 450, 1: 450}

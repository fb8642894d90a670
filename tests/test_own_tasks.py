"""Tasks of a user's own: what is found in their files, what is refused, and how rows are split."""

import csv
import json
import logging
import re
from pathlib import Path

import pytest
from conftest import REPO

from transformer.data_layout import known_columns
from transformer.features import encode_examples
from transformer.file_utils import UserError
from transformer.own_tasks import find_task, save_task, stored_task
from transformer.table_files import format_of, row_line
from transformer.tasks import label_order, load_examples, task_rows
from transformer.tokenization import BertTokenizer

ROWS = [("好吃, 真的", "好评"), ('He said "no"', "差评"), ("two  spaces", "好评"),
        ("a\u2028b", "差评")]
GOLDEN = json.loads((REPO / "tests/golden/chinese_fork_data.json").read_text(encoding="utf-8"))
HUB = REPO / "tests/golden/datasets"


def put(folder: Path, name: str, text: str) -> Path:
    """Write one file of a folder; returns the folder."""
    (folder / name).parent.mkdir(parents=True, exist_ok=True)
    (folder / name).write_bytes(text.encode())
    return folder


def lines(*rows: str) -> str:
    return "".join(row + "\n" for row in rows)


def texts_and_labels(folder: Path, split: str = "train", **settings: object) -> list[tuple]:
    rows = load_examples(find_task(None, folder, **settings), folder, split)
    return [(row.text_a, row.label) for row in rows]


# ------------------------------------------------------------------ formats


def write_rows(folder: Path, form: str, rows: list[tuple[str, str]]) -> Path:
    """Write rows of a text and a label as train in one of the formats."""
    folder.mkdir(exist_ok=True)
    if form == "headerless.tsv":
        return put(folder, "train.tsv", lines(*map("\t".join, rows)))
    if form == "tsv":
        return put(folder, "train.tsv", lines("text\tlabel", *map("\t".join, rows)))
    if form == "csv":
        with (folder / "train.csv").open("w", encoding="utf-8-sig", newline="") as file:
            csv.writer(file).writerows([("text", "label"), *rows])
    objects = [{"text": text, "label": label} for text, label in rows]
    if form == "jsonl":
        put(folder, "train.jsonl", lines(*map(json.dumps, objects)))
    if form == "json":
        put(folder, "train.json", json.dumps(objects, indent=1, ensure_ascii=False))
    if form == "parquet":
        parquet = pytest.importorskip("pyarrow.parquet")
        table = pytest.importorskip("pyarrow").Table.from_pylist(objects)
        for number, begin in enumerate(range(0, len(rows), 3)):
            parquet.write_table(table.slice(begin, 3), folder / f"train-0000{number}-of-2.parquet")
    if form == "texts":
        for number, (text, label) in enumerate(rows):
            put(folder, f"train/{label}/{number:02}.txt", text)
    return folder


@pytest.mark.parametrize("form", ["headerless.tsv", "tsv", "csv", "jsonl", "json", "parquet"])
def test_the_same_rows_are_read_from_every_format(tmp_path, form):
    folder = write_rows(tmp_path / "mine", form, ROWS)
    assert texts_and_labels(folder) == ROWS
    assert find_task(None, folder).labels == ("好评", "差评")


def test_a_folder_of_text_files_is_a_row_each_with_its_folder_as_label(tmp_path):
    folder = write_rows(tmp_path / "mine", "texts", ROWS)
    put(folder, "train/好评/99.txt", "Line one.<br /><br />Line\ntwo.\n")
    found = texts_and_labels(folder)
    assert ("Line one. Line two.", "好评") in found and len(found) == 5


@pytest.mark.parametrize("cells", [["a", "b"], ["a,b", 'c"d'], ["x\ny", "z"], ["ß ", "ü"]])
def test_a_row_that_is_written_as_csv_or_json_is_read_back_unchanged(tmp_path, cells):
    for form, name in (("CSV", "train.csv"), ("JSON lines", "train.jsonl")):
        names = ["text", "label"]
        header = row_line(names, names, form, name, 1) if form == "CSV" else ""
        rows = [cells, ["other", "one"]]
        put(tmp_path, name, header + "".join(row_line(row, names, form, name, 1) for row in rows))
        task = find_task(None, put(tmp_path, "task.json", json.dumps(
            {"name": "t", "files": {"train": name}, "text_a": "label", "label": "text"})))
        assert task_rows(task, tmp_path).rows == rows
        assert format_of(name) == form


@pytest.mark.parametrize("form", ["save_to_disk", "to_csv", "to_parquet", "to_json"])
@pytest.mark.parametrize(("name", "labels"), [
    ("rte", ["entailment", "not_entailment"] * 3),
    ("mnli", ["entailment", "neutral", "contradiction"] * 2),
    ("mrpc", ["0", "1"] * 3), ("cola", ["0", "1"] * 3), ("stsb", [0, 0.9, 1.8, 2.7, 3.6, 4.5])])
def test_glue_as_hugging_faces_datasets_writes_it_is_read_with_its_own_label_numbers(
        name, labels, form):
    if form in ("save_to_disk", "to_parquet"):
        pytest.importorskip("pyarrow")
    folder = HUB / form / name
    task = find_task(name, folder)
    assert task == find_task(None, folder) and task.is_glue
    train = load_examples(task, folder, "train")
    found = [float(row.label) if task.is_regression else row.label for row in train]
    assert found == pytest.approx(labels) if task.is_regression else found == labels
    assert train[0].text_a.startswith('He said "no", and left.')
    assert (train[0].text_b is None) == (name == "cola")
    assert all(len(load_examples(task, folder, split)) == 3 for split in task.dev_files)
    assert len(task.dev_files) == (2 if name == "mnli" else 1) and "test" not in task.files


# ------------------------------------------------------------------ columns


@pytest.mark.parametrize(("names", "found"), [
    ("text label", ("text", None, "label")), ("label review", ("review", None, "label")),
    ("ID Sentence1 Sentence2 Label", ("Sentence1", "Sentence2", "Label")),
    ("premise hypothesis gold_label", ("premise", "hypothesis", "gold_label")),
    ("comment label", ("comment", None, "label")), ("review opinion", ("review", None, "opinion")),
    ("question sentence label", ("question", "sentence", "label")), ("eins zwei", None),
])
def test_columns_are_found_by_their_names_in_any_case(names, found):
    assert known_columns(names.split()) == found


@pytest.mark.parametrize("names", [
    "text review label", "text label class", "text title stars other class", "label a b",
    "text_a text_b text label", "premise label"])
def test_columns_that_are_not_certain_are_refused(names):
    if names == "premise label":  # of two, the one beside the label is the text
        assert known_columns(names.split()).text_a == "premise"
        return
    with pytest.raises(UserError, match="is not certain"):
        known_columns(names.split())


def test_texts_without_a_label_column_are_known_too():
    assert known_columns(["id", "Text"], has_label=False) == ("Text", None, None)
    assert known_columns(["sentence1", "sentence2"], has_label=False)[:2] == (
        "sentence1", "sentence2")


def test_what_was_understood_stands_in_one_line_of_the_log(tmp_path, caplog):
    caplog.set_level(logging.INFO)
    folder = write_rows(tmp_path / "mine", "tsv", ROWS)
    put(folder, "valid.tsv", lines("text\tlabel", "gut\t好评"))
    find_task(None, folder)
    assert caplog.messages == [f"{folder}: task mine: texts 'text'; 2 labels of 'label': 好评 (2),"
                               " 差评 (2); rows: 4 train, 1 dev"]


def test_the_files_of_lisennlp_tinybert_give_its_examples_and_features(tmp_path, caplog):
    put(tmp_path, "train.txt", lines(*GOLDEN["train_lines"]))
    put(tmp_path, "eval.txt", "鱼\t0\n")
    task = find_task(None, tmp_path)
    rows = load_examples(task, tmp_path, "train")
    assert [(row.text_a, row.text_b, int(row.label)) for row in rows] == [
        tuple(row[1:]) for row in GOLDEN["examples"]]
    assert "2 lines that do not end in a class number, the first is line 4" in caplog.text
    vocab = {piece: index for index, piece in enumerate(GOLDEN["vocab"])}
    tokenizer = BertTokenizer(vocab, do_lower_case=GOLDEN["do_lower_case"])
    for length, expected in GOLDEN["features"].items():
        features = encode_examples(rows, tokenizer, int(length), task.labels)
        for index, row in enumerate(expected):
            batch = features.collate([index])
            assert batch["input_ids"][0].tolist() == row["ids"]
            assert batch["token_type_ids"][0].tolist() == row["segments"]
            assert task.labels[int(batch["labels"])] == str(row["label"])


# ------------------------------------------------------------------ labels


@pytest.mark.parametrize(("labels", "order"), [
    (["10", "9", "10", "2"], ("2", "9", "10")), (["b", "a", "b", "a"], ("a", "b")),
    (["-1", "1", "0", "1"], ("-1", "0", "1")), (["2.0", "1.0", "2.0", "1.0"], ("1.0", "2.0"))])
def test_labels_are_those_of_train_numbers_by_value(tmp_path, labels, order):
    rows = [(f"text {number}", label) for number, label in enumerate(labels)]
    assert find_task(None, write_rows(tmp_path / "mine", "tsv", rows)).labels == order


def test_a_task_json_gives_labels_aliases_and_a_range(tmp_path):
    put(tmp_path, "train.csv", lines("text,label", "gut,pos", "schlecht,neg", "toll,positive"))
    settings = {"name": "mine", "labels": ["pos", "neg"], "aliases": {"positive": "pos"},
                "metrics": ["f1", "acc"], "positive": "neg", "max_seq_length": 32,
                "intermediate_epochs": 3, "augmentation_n": 5}
    task = find_task(None, put(tmp_path, "task.json", json.dumps(settings)))
    assert (task.labels, task.metrics, task.positive) == (("pos", "neg"), ("f1", "acc"), "neg")
    assert (task.max_seq_length, task.intermediate_epochs, task.augmentation_n) == (32, 3, 5)
    assert [row.label for row in load_examples(task, tmp_path, "train")] == ["pos", "neg", "pos"]

    put(tmp_path, "train.csv", lines("text,label", "gut,0.5", "mehr,9.75"))
    settings = {"name": "grades", "labels": [], "range": [0, 10]}
    task = find_task(None, put(tmp_path, "task.json", json.dumps(settings)))
    assert task.is_regression and task.range == (0, 10) and task.metrics == ("pearson", "spearmanr")
    put(tmp_path, "train.csv", lines("text,label", "gut,0.5", "mehr,10.75"))
    with pytest.raises(UserError, match=r"line 3: label '10.75'; expected a score from 0 to 10"):
        load_examples(task, tmp_path, "train")


@pytest.mark.parametrize("form", ["tsv", "csv", "jsonl", "parquet"])
def test_white_space_around_labels_does_not_count_in_any_format_or_split(tmp_path, form):
    rows = [("gut", " pos"), ("schlecht", "neg"), ("toll", "pos "), ("nie", "neg")]
    folder = write_rows(tmp_path / "mine", form, rows)
    put(folder, "dev.tsv", lines("text\tlabel", "fein\tpos  "))
    put(folder, "test.csv", lines("text,label", "fein, neg"))
    task = find_task(None, folder)
    assert task.labels == ("neg", "pos")
    assert sorted(texts_and_labels(folder)) == sorted((text, label.strip()) for text, label in rows)
    assert [texts_and_labels(folder, split)[0][1] for split in ("dev", "test")] == ["pos", "neg"]
    settings = {"labels": ["neg ", " 1"], "aliases": {"pos ": "1"}, "positive": "1 "}
    task = find_task(None, put(folder, "task.json", json.dumps(settings)))
    assert (task.labels, task.positive) == (("neg", "1"), "1")
    assert {row.label for row in load_examples(task, folder, "train")} == {"neg", "1"}


@pytest.mark.parametrize(("id2label", "order"), [
    ({0: "差评", 1: "好评"}, ("差评", "好评")), ({0: "好评", 1: "差评"}, ("好评", "差评")),
    ({0: "bad", 1: "GOOD"}, ("差评", "好评")), ({0: "LABEL_0", 1: "LABEL_1"}, ("好评", "差评"))])
def test_own_labels_are_matched_by_name_or_else_by_position_with_a_warning(
        tmp_path, caplog, id2label, order):
    folder = write_rows(tmp_path / "mine", "tsv", ROWS)
    aliases = {"good": "好评", "bad": "差评"}
    task = find_task(None, put(folder, "task.json", json.dumps({"name": "m", "aliases": aliases})))
    assert label_order(task, id2label) == order
    assert ("does not name its labels" in caplog.text) == (id2label[0] == "LABEL_0")


def test_a_teacher_of_other_labels_or_of_more_is_refused(tmp_path):
    task = find_task(None, write_rows(tmp_path / "mine", "tsv", ROWS))
    for names in (("NEGATIVE", "POSITIVE"), ("LABEL_0", "LABEL_1", "LABEL_2")):
        with pytest.raises(UserError, match=r"do not fit task mine; expected \['好评', '差评'\]"):
            label_order(task, dict(enumerate(names)))


def test_the_task_beside_a_model_is_the_one_it_was_trained_on(tmp_path):
    folder = write_rows(tmp_path / "mine", "tsv", many_rows(200))
    for count in (20, 30, 40):
        put(folder, "task.json", json.dumps({"augmentation_n": count}))
        for settings in ({}, {"dev_share": 0.2, "test_share": 0.1, "train_split": "transfer"}):
            task = find_task(None, folder, **settings)
            save_task(task, tmp_path)
            assert stored_task(tmp_path) == task and task.augmentation_n == count
    put(tmp_path, "config.json", json.dumps({"finetuning_task": "sst2"}))
    (tmp_path / "task.json").unlink()
    assert stored_task(tmp_path).name == "sst-2"
    save_task(stored_task(tmp_path), tmp_path)
    assert not (tmp_path / "task.json").exists()  # what GLUE is, every reader knows


# ------------------------------------------------------------------ splits by the texts' hash


def many_rows(count: int) -> list[tuple[str, str]]:
    return [(f"Satz {number}", "ab"[number % 2]) for number in range(count)]


def test_shares_of_train_are_disjoint_complete_and_stay_when_rows_are_appended(tmp_path):
    shares = {"dev_share": 0.1, "test_share": 0.2}
    folder = write_rows(tmp_path / "mine", "tsv", many_rows(2000))
    before = {split: texts_and_labels(folder, split, **shares)
              for split in ("train", "dev", "test")}
    assert sorted(sum(before.values(), [])) == sorted(many_rows(2000))
    assert 150 < len(before["dev"]) < 250 and 340 < len(before["test"]) < 460
    write_rows(folder, "tsv", many_rows(3000))
    assert all({*rows} <= {*texts_and_labels(folder, split, **shares)}
               for split, rows in before.items())


def test_teacher_and_student_can_learn_from_different_halves(tmp_path):
    folder = write_rows(tmp_path / "mine", "tsv", many_rows(2000))
    put(folder, "dev.tsv", lines("text\tlabel", "anders\ta"))
    halves = {half: texts_and_labels(folder, "train", dev_share=0.1, train_split=half)
              for half in ("train", "transfer")}
    dev = texts_and_labels(folder, "dev", dev_share=0.1, train_split="train")
    assert sorted(sum(halves.values(), dev)) == sorted(many_rows(2000))
    assert all(800 < len(rows) < 1000 for rows in halves.values())
    # As in Vooblin/distillation the dev file is the test set then.
    assert texts_and_labels(folder, "test", dev_share=0.1, train_split="train") == [("anders", "a")]


def test_augmented_rows_that_hold_rows_of_dev_are_refused(tmp_path):
    folder = write_rows(tmp_path / "mine", "tsv", many_rows(200))
    put(folder, "train_aug.tsv", (folder / "train.tsv").read_text())
    assert len(texts_and_labels(folder, "aug")) == 200
    with pytest.raises(UserError, match="a row of dev; expected rows that data_augmentation.py"):
        texts_and_labels(folder, "aug", dev_share=0.1)
    train = texts_and_labels(folder, "train", dev_share=0.1)
    put(folder, "train_aug.tsv", lines("text\tlabel", *map("\t".join, train)))
    assert texts_and_labels(folder, "aug", dev_share=0.1) == train


# ------------------------------------------------------------------ what is refused


TSV = "text\tlabel\n"
GOOD_JSON = '{"text": "a", "label": "x"}\n{"text": "b", "label": "y"}\n'
GOOD = TSV + "a\tx\nb\ty\n"
REFUSED = [
    ({"train.tsv": ""}, "an empty file; expected rows of a text and a label"),
    ({"train.tsv": TSV}, "no rows after the header"),
    ({"train.tsv": TSV + "a\tx\nb\tx\n"}, "all rows have the label 'x'; expected two or more"),
    ({"train.tsv": GOOD, "dev.tsv": TSV + "c\tz\n"},
     r"the label 'z' is in dev \(1 rows\) but not among the labels .x., .y."),
    ({"train.tsv": TSV + "".join(f"a\tlabel {n}\n" for n in range(9))},
     "9 different labels in 9 rows, such as .*Say it in .*task.json: {"),
    ({"train.tsv": TSV + "a\t1.5\nb\t2.0\n"}, r'are they scores\? Say it .*"range": \[1.5, 2.0\]'),
    ({"train.tsv": TSV + "a\tx\nb\tX\n"}, "'X', 'x' differ in case, spaces or zeros only"),
    ({"train.tsv": TSV + "a\t1\nb\t0\nc\t1.0\nd\t01\n" * 2}, """'1', '1.0', '01' differ .*\
"labels": \\["0", "1"\\], "aliases": {"1.0": "1", "01": "1"}"""),
    ({"train.tsv": TSV + "a\t1\nb\tinf\n", "task.json": '{"labels": []}'},
     "line 3: label 'inf'; expected a score that is finite"),
    ({"train.tsv": TSV + "a\t1\nb\t1\n", "task.json": '{"labels": []}'},
     "all rows have the score 1; expected several"),
    ({"train.csv": "1,a title,a text\n2,b title,c text\n"}, '"columns" names them'),
    ({"train.tsv": TSV + "a\tx\nb\ty\nc\tz\n"}, "3 different labels in 3 rows"),
    ({"train.csv": "Comment,Polarity\n" + "a,x\nb,y\n" * 9}, r"'Polarity' is of this row alone"),
    ({"train.csv": GOOD.replace("\t", ","), "task.json": '{"columns": ["text", "label"]}'},
     "line 1: names the columns"),
    ({"train.csv": "text,label\na,x\nb,\n"}, "train.csv, line 3: the label is empty"),
    ({"train.tsv": GOOD, "test.tsv": TSV + "a\tX\nb\tY\n"}, "'X' is in test"),
    ({"train.tsv": GOOD, "task.json": '{"text_a": "text", "label": "text"}'}, "different columns"),
    ({"train.tsv": GOOD, "task.json": '{"labels": ["x"]}'}, "'y' is in train .* not among"),
    ({"train.tsv": GOOD, "task.json": '{"labels": ["x", "y", "y"]}'}, "'y' stands twice"),
    ({"train.tsv": GOOD, "task.json": '{"max_seq_length": 64.0}'}, "a number above 2"),
    ({"train.tsv": TSV + "a\t0\nb\t7\n", "task.json": '{"range": [0, 1]}'},
     "line 3: label '7'; expected a score from 0 to 1"),
    ({"train/neg/1.txt": "a", "train/pos/1.txt": "b", "train/unsup/1.txt": "c",
      "train/unsup/2.txt": "d", "test/neg/1.txt": "e", "test/pos/1.txt": "f"},
     "the folder 'unsup' of train has no counterpart in test"),
    ({"train.tsv": TSV + "a\tx\n \ty\n"}, "train.tsv, line 3: 'text' is empty"),
    ({"train.tsv": TSV + "a\tx\nb\n"}, "train.tsv, line 3: 1 columns in 'b'; expected 2"),
    ({"train.tsv": TSV + "a\tx\nb\ty\tz\n"}, "train.tsv, line 3: 3 columns .*; expected 2"),
    ({"train.tsv": "text\treview\tlabel\na\tb\t1\n"}, r"is not certain. Say it in .*task.json: {"),
    ({"train.tsv": "a\tb\tc\td\n"}, "4 columns .*expected a header with known names"),
    ({"train.csv": "id,body,grade\n1,a,5\n2,b,1\n3,c,5\n"}, "is it a header"),
    ({"train.csv": "text;label\na;1\n"}, "separated by semicolons; expected commas"),
    ({"train.csv": "text\tlabel\na\t1\n"}, "separated by tabs"),
    ({"train.csv": '"text";"label"\n"a, b";1\n'}, "separated by semicolons"),
    ({"train.csv": "sep=;\ntext;label\na;1\n"}, "line 1: 'sep=;' is for Excel alone"),
    ({"train.csv": "text,label\ra,x\rb,y\r"}, "line 1: a carriage return inside a line"),
    ({"train.tsv": TSV.replace("\n", "\ra\tx\r")}, "line 1: a carriage return inside a line"),
    ({"train.csv": "\n" + GOOD}, "train.csv, line 1: is empty"),
    ({"train.csv": "PK\x03\x04\0\0"}, "train.csv, line 1: a NUL byte, .*; expected lines of text"),
    ({"train.csv/part.csv": GOOD}, "no train file; .* the folder holds train.csv/"),
    ({"train.csv": "text,Text,label\na,b,x\nc,d,y\n"}, r"the texts \(text, Text\)"),
    ({"train.csv": "text,label,label\na,x,x\nc,y,y\n"}, r"the label \(label, label\)"),
    ({"train.csv": "a,a,b\nx,y,z\n", "task.json": '{"text_a": "a", "label": "b"}'},
     "line 1: two columns are called 'a'"),
    ({"train.tsv": TSV + 'a\t"x"\nb\t"y"\n'}, 'the label "x" stands in quotes'),
    ({"train.csv": "text,label\na,1\nb,nan\n"}, "the label nan, which stands for a missing one"),
    ({"train.tsv": GOOD, "task.json": '{"files": {"train": "train.tsv", "dev": "train.tsv"}}'},
     "'train.tsv' is the file of train and of dev; expected another, or .*--dev_share 0.1"),
    ({"train.csv": 'text,label\n"a,1\n'}, "train.csv, line 2: unexpected end of data"),
    ({"train.csv": "text,label\na,1\n", "train.tsv": TSV}, "both train.tsv and train.csv"),
    ({"train.jsonl": '{"text": "a", "label": 1}\n{"text": "a"\n'}, "line 2: not valid JSON"),
    ({"train.jsonl": '{"text": "a", "label": 1}\n{"txt": "a", "label": 1}\n'},
     "line 2: the key 'txt', which line 1 lacks"),
    *(({"train.jsonl": GOOD_JSON + f'{{"text": {value}, "label": "x"}}\n'},
       f"train.jsonl, line 3: 'text' is {re.escape(said)}; expected a text")
      for value, said in (("5", "5"), ('["a", "b"]', '["a", "b"]'), ("true", "true"),
                          ('{"a": 1}', '{"a": 1}'), ("null", "empty"))),
    ({"train.jsonl": "[1, 2]"}, "row 1: '1'; expected a JSON object"),
    ({"train.jsonl": '{"text": "a", "label": ["x", "y"]}\n{"text": "b", "label": ["x"]}\n'
      '{"text": "c", "label": ["x"]}\n'}, "is a list; expected one label a row"),
    ({"notes.md": "x"}, "no train file; expected train.tsv, .*the folder holds notes.md"),
    ({"a.csv": "text,label\n", "b.csv": "text,label\n"}, "no train file; .*holds a.csv, b.csv"),
    ({"train.parquet": "PAR"}, "train.parquet: cannot be read|need the package pyarrow"),
    ({"train.tsv": GOOD, "task.json": '{"labls": ["x"]}'}, "unknown key 'labls'"),
    ({"train.tsv": GOOD, "task.json": '{"labels": "x"}'},
     "task.json: 'labels' is \"x\"; expected a list of texts"),
    ({"train.tsv": GOOD, "task.json": '{"labels": ["x", "y", "z"]}'},
     "no row of train has the label 'z'"),
    ({"train.tsv": GOOD, "task.json": '{"labels": ["x", "z"]}'}, "'z'|'y'"),
    ({"train.tsv": GOOD, "task.json": '{"metrics": ["bleu"]}'}, "metric 'bleu'"),
    ({"train.tsv": GOOD, "task.json": '{"metrics": ["f1"]}'}, "the label 'positive'"),
    ({"train.tsv": GOOD, "task.json": '{"text_a": "txt", "label": "label"}'},
     "the header has no column 'txt'"),
    ({"train.tsv": GOOD, "task.json": '{"files": {"train": "tr.tsv"}}'},
     "tr.tsv: no such file; the folder holds task.json, train.tsv"),
    ({"train.tsv": GOOD, "task.json": '{"files": {"eval": "train.tsv"}}'},
     "'files' is .*; expected a file each of train, dev and test"),
    ({"train.tsv": GOOD, "task.json": '{"name": "RTE"}'}, "that of a task of GLUE"),
    ({"train.tsv": GOOD, "task.json": '{"range": [5, 0]}'}, "the smaller one first"),
    ({"train.tsv": GOOD, "task.json": '{"dev_share": 1}'}, "a share below 1"),
    ({"train.tsv": GOOD, "task.json": "[]"}, "list as JSON"),
]


@pytest.mark.parametrize(("files", "message"), REFUSED)
def test_what_is_not_certain_is_refused_in_one_line(tmp_path, files, message):
    for name, text in files.items():
        put(tmp_path / "mine", name, text)
    with pytest.raises(UserError, match=message) as error:
        find_task(None, tmp_path / "mine")
    assert "\n" not in str(error.value)


def test_a_ready_task_json_of_a_refusal_is_accepted(tmp_path):
    folder = put(tmp_path / "mine", "train.tsv", "text\ttitle\ttopic\na\tA\tx\nb\tB\ty\nc\tC\tx\n")
    with pytest.raises(UserError, match="not certain") as error:
        find_task(None, folder)
    ready = json.loads(str(error.value).partition("task.json: ")[2])
    assert ready["text_a"] in ("text", "title")
    put(folder, "task.json", json.dumps({**ready, "label": "topic"}))
    assert find_task(None, folder).labels == ("x", "y")


def test_text_that_is_not_utf8_is_refused_before_anything_else(tmp_path):
    (tmp_path / "train.csv").write_bytes("text,label\n很好吃的外卖,好评\n".encode("gb18030"))
    with pytest.raises(UserError, match=r"train.csv, line 2: .*GB18030"):
        find_task(None, tmp_path)


def test_a_guess_at_the_columns_is_the_one_with_the_longest_cells(tmp_path):
    put(tmp_path, "train.csv", "id,Comment,Polarity\n" + "".join(
        f"{n},a longer text {n},{'xy'[n % 2]}\n" for n in range(9)))
    with pytest.raises(UserError, match='"text_a": "Comment", "label": "Polarity"'):
        find_task(None, tmp_path)


def test_a_folder_called_as_a_task_of_glue_with_other_labels_is_refused(tmp_path):
    folder = write_rows(tmp_path / "sst-2", "csv", ROWS)
    with pytest.raises(UserError, match="is called as SST-2 of GLUE, but has the label '好评'"):
        find_task(None, folder)
    put(folder, "task.json", '{"name": "mine"}')
    assert find_task(None, folder).labels == ("好评", "差评")


@pytest.mark.parametrize(("name", "message"), [
    ("foo", "unknown task 'foo'; expected one of cola"), (None, "no such folder")])
def test_a_folder_that_is_not_there_is_named(tmp_path, name, message):
    with pytest.raises(UserError, match=message):
        find_task(name, tmp_path / "nowhere")


def test_a_description_in_the_place_of_data_is_told_from_rows(tmp_path):
    for name in ("imdb", "snli", "waimai", "yelp"):
        path = REPO / f"profiles/tasks/{name}.json"
        with pytest.raises(UserError, match=f"{name}.json: describes a task; expected the folder"):
            find_task(None, path)
    assert find_task(None, put(tmp_path, "rows.json", GOOD_JSON) / "rows.json").num_labels == 2


def test_a_file_beside_the_description_of_other_files_is_refused(tmp_path):
    put(tmp_path, "train.tsv", GOOD)
    put(tmp_path, "other.tsv", GOOD)
    put(tmp_path, "task.json", '{"name": "mine", "files": {"train": "train.tsv"}}')
    assert find_task(None, tmp_path / "train.tsv") == find_task(None, tmp_path)
    with pytest.raises(UserError, match=r"other.tsv: .*task.json describes other files, train.tsv"):
        find_task(None, tmp_path / "other.tsv")


def test_a_name_that_is_none_is_refused_for_a_folder_of_glue(tmp_path):
    with pytest.raises(UserError, match="unknown task 'RTEE'"):
        find_task("RTEE", put(tmp_path / "RTE", "train.tsv", "index\tsentence1\n"))


def test_a_test_file_without_labels_is_left_out_with_a_note(tmp_path, caplog):
    caplog.set_level(logging.INFO)
    folder = write_rows(tmp_path / "mine", "tsv", ROWS)
    put(folder, "test.tsv", lines("id\ttext", "1\tneu"))
    assert "test" not in find_task(None, folder).files and "has no labels" in caplog.text
    put(folder, "test.tsv", lines("text\tlabel", "neu\t-1", "alt\t-1"))
    assert "test" not in find_task(None, folder).files
    put(folder, "test.tsv", lines("text\tlabel", "neu\t好评"))
    assert texts_and_labels(folder, "test") == [("neu", "好评")]


# ------------------------------------------------------------------ data sets that are described


def test_imdbs_folders_are_read_as_published(tmp_path):
    for split in ("train", "test"):
        for label in ("neg", "pos"):
            for number in range(20):
                put(tmp_path, f"{split}/{label}/{number}_1.txt", f"{label} <br />{split} {number}")
    put(tmp_path, "train/unsup/1_0.txt", "unlabelled")
    put(tmp_path, "train/urls_pos.txt", "http")
    task = find_task(str(REPO / "profiles/tasks/imdb.json"), tmp_path)
    rows = {split: load_examples(task, tmp_path, split) for split in ("train", "dev", "test")}
    assert len(rows["train"]) + len(rows["dev"]) == len(rows["test"]) == 40
    assert {row.text_a: row.label for row in rows["test"]}["neg test 3"] == "neg"
    assert task.files["aug"] == "train_aug.jsonl"


def test_snlis_rows_without_a_gold_label_are_counted_and_passed_over(tmp_path, caplog):
    caplog.set_level(logging.INFO)
    header = ("gold_label\tsentence1_binary_parse\tsentence2_binary_parse\tsentence1_parse\t"
              "sentence2_parse\tsentence1\tsentence2\tcaptionID\tpairID\tlabel1")
    labels = ("neutral", "contradiction", "-", "entailment")
    for split in ("train", "dev", "test"):
        put(tmp_path, f"snli_1.0_{split}.txt", lines(header, *(
            f"{label}\t(\t)\t(\t)\tA man.\tA {label} man.\t1\t2\t{label}" for label in labels)))
    task = find_task(str(REPO / "profiles/tasks/snli.json"), tmp_path)
    rows = load_examples(task, tmp_path, "test")
    assert [(row.text_a, row.text_b, row.label) for row in rows] == [
        ("A man.", f"A {label} man.", label) for label in labels if label != "-"]
    assert "passed over 1 rows with the label '-'" in caplog.text


def test_yelps_reviews_are_classified_by_stars(tmp_path):
    reviews = [{"review_id": str(number), "stars": float(number % 5 + 1), "useful": 0,
                "text": f"review {number}"} for number in range(200)]
    put(tmp_path, "yelp_academic_dataset_review.json", lines(*map(json.dumps, reviews)))
    task = find_task(str(REPO / "profiles/tasks/yelp.json"), tmp_path)
    rows = {split: load_examples(task, tmp_path, split) for split in ("train", "dev", "test")}
    assert sum(map(len, rows.values())) == 200 and all(rows.values())
    assert all(int(row.text_a.split()[1]) % 5 + 1 == int(row.label) for row in rows["test"])

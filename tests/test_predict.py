"""predict.py: the scores of evaluation, every format, and input as it comes."""

import csv
import io
import json
import os
import subprocess
import sys
import threading
from dataclasses import replace

import pytest
import torch
from helpers import REPO, error_line, make_glue, make_model, read_json, run

import predict
import quantize
from transformer.evaluation import predict_logits
from transformer.features import load_features
from transformer.file_utils import write_json
from transformer.inference import load_classifier
from transformer.modeling import TinyBertForPreTraining
from transformer.own_tasks import save_task
from transformer.tables import display_width
from transformer.tasks import Task, get_task, load_examples
from transformer.tokenization import BertTokenizer


@pytest.fixture
def model(tmp_path):
    make_model(tmp_path / "model", labels=("negative", "positive"))
    return tmp_path / "model"


@pytest.fixture
def ask(monkeypatch, capsys):
    """Return what gives bytes to predict.py and returns the lines that it prints."""

    def call(text: bytes, *arguments) -> list[str]:
        monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(text)))
        capsys.readouterr()
        run(predict, "--precision", "fp32", *arguments)
        return capsys.readouterr().out.split("\n")[:-1]  # a text may hold other line ends

    return call


def as_json(lines):
    return [json.loads(line) for line in lines]


@pytest.mark.parametrize("name", ["SST-2", "RTE"])
@pytest.mark.parametrize("made", ["model", "bf16 torch", "fp32 onnx", "int8-dynamic onnx"])
def test_the_scores_are_those_of_evaluation(tmp_path, ask, model, name, made):
    task, glue = get_task(name), make_glue(tmp_path / "glue", name)
    folder = model
    if made != "model":
        method, form = made.split()
        folder = tmp_path / "made"
        run(quantize, "--model", model, "--output_dir", folder, "--method", method, "--format",
            form, "--task_name", "SST-2", "--data_dir", make_glue(tmp_path / "calibration"))
    classifier = load_classifier(folder)
    rows = load_features(task, glue, "dev", BertTokenizer.from_pretrained(folder), 128,
                         task.labels)
    expected = predict_logits(classifier, rows, "cpu").softmax(dim=1)
    text = "".join("\t".join(filter(None, row[1:3])) + "\n"
                   for row in load_examples(task, glue, "dev"))
    lines = as_json(ask(text.encode(), "--model", folder, "--format", "jsonl"))
    found = torch.tensor([list(line["probabilities"].values()) for line in lines])
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=0)
    assert [line["label"] for line in lines] == [
        ("negative", "positive")[place] for place in expected.argmax(dim=1)]


# ------------------------------------------------------------------ Hugging Face's pipeline

LONG = "good film , very bad story "
TEXTS = [
    {"text": "a good film"}, {"text": "we saw it ."}, {"text": LONG * 60}, {"text": "bad"},
    {"text": "Caf\u00e9 \U0001f600 \u4e2d a\u0301 \u200b\u2028x\u00a0film \u0130"}, {"text": ""},
    {"text": "a good film", "text_pair": "bad"}, {"text": "bad", "text_pair": "a good film"},
    {"text": "film " * 99, "text_pair": "bad " * 99}, {"text": LONG * 60, "text_pair": "a book"},
    {"text": "film " * 64, "text_pair": "bad " * 63}, {"text": "a " * 62, "text_pair": LONG * 60},
]
KINDS = {
    "two labels": {"labels": ("negative", "positive")},
    "three labels": {"labels": ("contradiction", "entailment", "neutral")},
    "regression": {"labels": ("score",), "problem_type": "regression",
                   "max_position_embeddings": 64},
    "several scores": {"labels": ("x", "y"), "problem_type": "regression"},
    "multi-label": {"labels": ("joy", "anger", "love"),
                    "problem_type": "multi_label_classification"},
}


def pipeline_answers(folder):
    """The number of each label that Hugging Face gives for each of `TEXTS`."""
    pipeline = pytest.importorskip("transformers").pipeline
    classify = pipeline("text-classification", model=str(folder), device="cpu", top_k=None)
    return [{answer["label"]: answer["score"]
             for answer in classify(dict(text), truncation=True)} for text in TEXTS]


def numbers_of(line, names):
    return line.get("probabilities") or line.get("scores") or {names[0]: line["score"]}


@pytest.mark.parametrize("kind", KINDS)
def test_the_answers_are_those_of_the_pipeline(tmp_path, ask, kind):
    names = KINDS[kind]["labels"]
    make_model(tmp_path / "model", **KINDS[kind])
    run(quantize, "--model", tmp_path / "model", "--output_dir", tmp_path / "onnx", "--method",
        "fp32", "--format", "onnx")
    for folder in (tmp_path / "model", tmp_path / "onnx"):
        path = folder / "tokenizer_config.json"  # the tokenizer may cut shorter than the model
        longest = 50 if kind == "three labels" else read_json(folder / "config.json")[
            "max_position_embeddings"]
        write_json(path, {**read_json(path), "model_max_length": longest})
    expected = pipeline_answers(tmp_path / "model")
    text = "\n".join(map(json.dumps, TEXTS)).encode()
    for folder, batch_size in (("model", 1), ("model", 2), ("model", 32), ("onnx", 32)):
        lines = as_json(ask(text, "--model", tmp_path / folder, "--batch_size", batch_size,
                            "--format", "jsonl"))
        for line, answer in zip(lines, expected, strict=True):
            found = numbers_of(line, names)
            assert found == pytest.approx(answer, abs=1e-5)
            assert list(found) == list(names)
            if kind == "multi-label":
                assert line["labels"] == [name for name in names if answer[name] > 0.5]
            elif kind.endswith("labels"):
                assert line["label"] == max(answer, key=answer.get)


@pytest.mark.parametrize(("kind", "columns", "first"), [
    ("three labels", "label contradiction entailment neutral", "label"),
    ("multi-label", "labels joy anger love", "labels"),
    ("regression", "score", "score"),
    ("several scores", "x y", "scores"),
])
def test_every_format_says_the_same(tmp_path, ask, kind, columns, first):
    make_model(tmp_path / "model", **KINDS[kind])
    question = (b"a good\tbad film\nsad", "--model", tmp_path / "model", "--format")
    lines, (header, *rows) = as_json(ask(*question, "jsonl")), ask(*question, "tsv")
    assert header.split("\t") == ["line", *columns.split(), "sentence", "sentence2"]
    for line, row, text, texts in zip(lines, rows, ask(*question, "text"),
                                      (["a good", "bad film"], ["sad", ""]), strict=True):
        label = line.get("label", ", ".join(line.get("labels", [])))
        numbers = numbers_of(line, ["score"]).values()
        assert row.split("\t") == [str(line["line"]), *([label] if "label" in first else []),
                                   *(f"{number:.6f}" for number in numbers), *texts]
        assert text.startswith(label) and text.endswith("  " + " | ".join(filter(None, texts)))
        assert all(f" {number:.4f}" in text for number in numbers)
        assert first in line


def test_labels_that_are_numbers_are_names(ask, model):
    config = read_json(model / "config.json")
    write_json(model / "config.json", {**config, "id2label": {"1": 0, "0": 5}, "label2id": {}})
    header, row = ask(b"a film", "--model", model, "--format", "tsv")
    assert header.split("\t")[1:4] == ["label", "5", "0"] and row.split("\t")[1] in ("5", "0")


# ------------------------------------------------------------------ tasks of a user's own

REVIEWS = Task("waimai", "waimai", ("差评", "好评"), "评论", None, "标签", ("acc",),
               aliases=(("neg", "差评"),))
PAIRS = replace(REVIEWS, text_b="问题")
SCORES = replace(REVIEWS, labels=(), metrics=("pearson",), aliases=())


def own_model(folder, task):
    make_model(folder, labels=task.labels or ("LABEL_0",))
    save_task(task, folder)
    return folder


OWN_INPUTS = {
    "a key": (REVIEWS, '{"评论": "很好吃", "标签": "好评"}', ["很好吃"]),
    "a usual key": (REVIEWS, '{"review": "很好吃"}', ["很好吃"]),
    "its header": (REVIEWS, "标签\t评论\n好评\t很好吃", ["很好吃"]),
    "its header, unlabelled": (REVIEWS, "评论\n很好吃", ["很好吃"]),
    "its header beside usual names": (REVIEWS, "text\t评论\nx\t很好吃", ["很好吃"]),
    "no header": (replace(REVIEWS, columns=("评论", "标签")), "很好吃\t好评", ["很好吃"]),
    "no header, another spelling": (
        replace(REVIEWS, columns=("标签", "评论")), "neg\t很好吃", ["很好吃"]),
    "no header, a text alone": (replace(REVIEWS, columns=("评论", "标签")), "很好吃", ["很好吃"]),
    "rows that end in a class number": (replace(REVIEWS, ragged=True), "很好吃\t1", ["很好吃"]),
    "pairs that end in a class number": (
        replace(PAIRS, ragged=True), "很好吃\t吗\t1", ["很好吃", "吗"]),
    "a pair": (PAIRS, "评论\t标签\t问题\n很好吃\t好评\t吗", ["很好吃", "吗"]),
    "a pair without a header": (PAIRS, "很好吃\t吗", ["很好吃", "吗"]),
    "a score": (replace(SCORES, columns=("评论", "标签")), "很好吃\t3.5", ["很好吃"]),
}


@pytest.mark.parametrize("name", OWN_INPUTS)
def test_the_columns_of_the_models_own_task_are_read(tmp_path, ask, name):
    task, text, expected = OWN_INPUTS[name]
    model = own_model(tmp_path / "model", task)
    lines = as_json(ask(f"{text}\n".encode(), "--model", model, "--format", "jsonl"))
    assert [[line[key] for key in line if key.startswith("sentence")] for line in lines] == [
        expected]
    assert "score" in lines[0] if task.is_regression else lines[0]["label"] in task.labels


@pytest.mark.parametrize("text", [
    "很好吃\t好评", "很好吃\tneg", "评价\t类别\n很好吃\t差评", "很好吃\t不错",
    "sentence1\tsentence2\na\tb", '{"text": "很好吃", "text_pair": "好评"}'])
def test_a_second_column_is_never_a_second_text_for_a_model_of_single_texts(
    tmp_path, capsys, monkeypatch, text
):
    model = own_model(tmp_path / "model", REVIEWS)
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(text.encode())))
    message = error_line(capsys, predict, "--model", model)
    assert "--columns" in message and ("a label or a name" in message or "two texts; the model "
                                       "takes one, it was trained on waimai" in message)


@pytest.mark.parametrize("suffix", [".csv", ".jsonl", ".json", ".parquet"])
def test_files_of_the_tasks_own_format_are_read(tmp_path, ask, suffix):
    model, path = own_model(tmp_path / "model", REVIEWS), tmp_path / f"new{suffix}"
    texts = ["很好吃，\n下次再来", 'a "good" film, bad']
    if suffix == ".csv":
        with path.open("w", encoding="utf-8-sig", newline="") as file:
            csv.writer(file).writerows([["标签", "评论"], *(["好评", text] for text in texts)])
    elif suffix == ".jsonl":
        path.write_text("".join(json.dumps({"评论": text}) + "\n" for text in texts))
    elif suffix == ".json":
        path.write_text(json.dumps([{"标签": "好评", "评论": text} for text in texts], indent=1))
    else:
        pyarrow = pytest.importorskip("pyarrow")
        parquet = pytest.importorskip("pyarrow.parquet")
        parquet.write_table(pyarrow.table({"标签": [1, 0], "评论": texts}), path)
    lines = as_json(ask(b"", "--model", model, "--input_file", path, "--format", "jsonl"))
    assert [line["sentence"] for line in lines] == texts


@pytest.mark.parametrize("value", [5, ["a", "b"], True])
def test_a_value_that_is_no_text_is_refused_in_every_format_of_rows(tmp_path, capsys, value):
    model = own_model(tmp_path / "model", REVIEWS)
    content = json.dumps({"评论": value}, ensure_ascii=False)
    for name, text in (("a.jsonl", content), ("a.json", f"[{content}]")):
        (tmp_path / name).write_text(text, encoding="utf-8")
        message = error_line(capsys, predict, "--model", model, "--input_file", tmp_path / name)
        assert f"{name}, line 1: " in message and "expected a JSON object with one text" in message


def test_a_model_without_names_of_labels_answers_with_its_tasks(tmp_path, ask):
    make_model(tmp_path / "model", labels=("LABEL_0", "LABEL_1"))
    save_task(REVIEWS, tmp_path / "model")
    header, _ = ask(b"a film", "--model", tmp_path / "model", "--format", "tsv")
    assert header.split("\t")[2:4] == ["差评", "好评"]


def test_the_task_of_a_model_from_an_address_comes_with_it(tmp_path, ask, server):
    for path in own_model(tmp_path / "model", REVIEWS).iterdir():
        server.files[f"/shop/{path.name}"] = path.read_bytes()
    (line,) = as_json(ask('{"评论": "很好吃"}'.encode(), "--model", f"{server.url}/shop",
                          "--cache_dir", tmp_path / "cache", "--format", "jsonl"))
    assert line["sentence"] == "很好吃"


def test_a_table_to_read_is_aligned_by_width_and_shows_the_most_probable_labels(tmp_path, ask):
    labels = ("好", "很好", "一般般", "bad", "a_label_of_20_letters", "不知道", "算了")
    make_model(tmp_path / "model", labels=labels)
    question = (b"a good film\nbad\nfilm\nsad story\nlovely\n", "--model", tmp_path / "model")
    probabilities = [line["probabilities"] for line in as_json(ask(*question, "--format", "jsonl"))]
    rows = ask(*question)
    assert len({row.split()[0] for row in rows}) > 1
    for row, numbers in zip(rows, probabilities, strict=True):
        best = sorted(numbers, key=numbers.get, reverse=True)[:5]
        shown = "  ".join(f"{name} {numbers[name]:.4f}" for name in best)
        label, _, rest = row.partition(" ")
        assert label == best[0] and rest.lstrip().startswith(shown)
        assert display_width(row[: row.index(shown)]) == 23


def test_chinese_that_is_not_utf_8_is_an_error_with_the_way_out(model, capsys, monkeypatch):
    text = "味道很好，下次还来\n送餐太慢了，都凉了\n".encode("gb18030")
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(text)))
    message = error_line(capsys, predict, "--model", model)
    assert "standard input, line 1" in message and "iconv -f gb18030 -t utf-8" in message


# ------------------------------------------------------------------ reading


ONE, TWO = ["a film"], ["a film", "bad"]
READ = {
    "one text a line": (b"a film", ONE),
    "two with a tab": (b"a film\tbad", TWO),
    "a mark at the start, carriage returns": (b"\xef\xbb\xbfa film\tbad\r\r\n", TWO),
    "SST-2's file": (b"sentence\tlabel\na film\t1\n", ONE),
    "RTE's file": (b"index\tsentence1\tsentence2\tlabel\n0\ta film\tbad\tentailment", TWO),
    "MRPC's file": (b"Quality\t#1 String\t#2 String\n1\ta film\tbad", TWO),
    "QNLI's file": (b"index\tquestion\tsentence\tlabel\n0\ta film\tbad\tentailment", TWO),
    "a header of one column": (b"\xef\xbb\xbftext\na film\n", ONE),
    "a column by number": (b"gj04\t1\t\ta film", ONE, "--columns", "4"),
    "a number below a known header": (b"label\tsentence\n1\ta film", ONE, "--columns", "2"),
    "columns by name": (b"b\tlabel\ta\nbad\t1\ta film", TWO, "--columns", "a", "b"),
    "text": (b'{"text": "a film", "label": 1}', ONE),
    "text and text_pair": (b'\n{"text": "a film", "text_pair": "bad"}', TWO),
    "no second text": (b'{"text": "a film", "text_pair": null}', ONE),
    "sentence": (b'\xef\xbb\xbf {"sentence": "a film"}', ONE),
    "sentence1 and sentence2": (b'{"sentence2": "bad", "sentence1": "a film"}', TWO),
    "question and sentence": (b'{"question": "a film", "sentence": "bad"}', TWO),
    "question1 and question2": (b'{"question1": "a film", "question2": "bad"}', TWO),
    "premise and hypothesis": (b'{"premise": "a film", "hypothesis": "bad", "idx": 3}', TWO),
    "keys by name": (b'{"text": "x", "a": "a film", "b": "bad"}', TWO, "--columns", "a", "b"),
    "two files, one after the other": (b"sentence\nsentence\na film\n", ONE),
    "names in any case": (b"Review\tLabel\na film\tgood", ONE),
    "names of several labels": (b"text\tlabel\tscore\na film\tgood\t0.9", ONE),
    "comma-separated": (b'id,Text,label\r\n7,"a film",good\r\n', ONE, "--input_format", "csv"),
    "commas, quotes, lines in a cell": (
        b'\n"a ""film"",\r\nbad"\n', ['a "film",\nbad'], "--input_format", "csv"),
    "an object as a text": (b'{"text": 1}', ['{"text": 1}'], "--input_format", "tsv"),
    "nothing": (b"", None),
    "a header alone": (b"sentence\tlabel\n", None),
}


@pytest.mark.parametrize("name", READ)
def test_inputs_are_read_by_what_they_are(ask, model, name):
    text, expected, *flags = READ[name]
    lines = as_json(ask(text, "--model", model, "--format", "jsonl", *flags))
    texts = [[line[key] for key in line if key.startswith("sentence")] for line in lines]
    assert texts == ([] if expected is None else [expected])


REFUSED = {
    "three columns": (b"a\tb\tc", "line 1: 3 columns; expected a text, or two"),
    "labels without a header": (b"a film\t1\nbad\t0", "line 1: a column holds '1'"),
    "labels below another header": (b"x\ty\na film\tpositive", "line 2: a column holds 'positive'"),
    "a column of labels by its name": (b"opinion\tlabel\na film\tneg", "line 1: a column holds"),
    "a row that is too short": (b"sentence1\tsentence2\na\tb\na", "line 3: 1 columns"),
    "an unknown name": (b"sentence\tlabel", "no column 'body' in 'sentence", "--columns", "body"),
    "comma-separated": (b'"sentence","label"\n"a, b",1', "is comma-separated; expected tab"),
    "UTF-16": ("a film".encode("utf-16"), "line 1: b'\\xff\\xfea\\x00 "),
    "semicolons": (b"sentence;label\na film;1", "is comma-separated"),
    "an array": (b"[1]", "list as JSON; expected a JSON object", "--input_format", "jsonl"),
    "a string": (b'"a film"', "str as JSON; expected a JSON obj", "--input_format", "jsonl"),
    "an array of objects": (b'[{"text": "a"}]', "expected a JSON object with"),
    "an object over several lines": (b'{\n"text": "a"}', "line 1: not valid JSON (Exp"),
    "Python's way of writing": (b"{'text': 'a'}", "not valid JSON"),
    "a tab at the end": (b"a film\t", "line 1: a column holds ''"),
    "a question without an answer": (b"question\ttext\na\tb", "a column holds 'question'"),
    "a number": (b'{"sentence": 1}', "line 1: '{\"sentence\": 1}'; expected a JSON object"),
    "half a pair": (b'{"sentence1": "a"}', "sentence1 and sentence2"),
    "two texts too many": (b'{"text": "a", "sentence": "b"}', "(--columns names others)"),
    "a missing key": (b'{"text": "a"}', "one text or two under body", "--columns", "body"),
    "three names": (b"a", "--columns 1 2 3; expected one or two", "--columns", "1", "2", "3"),
    "two columns of one name": (b"sentence\tsentence\na\tb", "two columns are called 'sentence'",
                                "--columns", "sentence"),
    "column 0": (b"a", "--columns 0; expected one or two, from 1", "--columns", "0"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_is_not_clear_is_refused(model, capsys, monkeypatch, name):
    text, expected, *flags = REFUSED[name]
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(text)))
    assert expected in error_line(capsys, predict, "--model", model, *flags)


@pytest.mark.parametrize("known", [{"finetuning_task": "sst2"}, {"type_vocab_size": 1}])
def test_a_model_of_single_texts_is_given_no_pairs(tmp_path, capsys, monkeypatch, known):
    make_model(tmp_path / "model", **known)
    for text in (b"a film\tbad", b'{"text": "a film", "text_pair": "bad"}'):
        monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(text)))
        assert "line 1: two texts; the model takes one" in error_line(
            capsys, predict, "--model", tmp_path / "model")


def test_files_and_pipes_are_read(tmp_path, ask, capsys, model):
    (tmp_path / "in.jsonl").write_text('{"text": "a film"}\n')
    (tmp_path / "in.tsv").write_text("a film\n")
    os.mkfifo(tmp_path / "pipe")
    threading.Thread(target=(tmp_path / "pipe").write_text, args=["a film\n"], daemon=True).start()
    (tmp_path / "in.csv").write_text('"a film"\n')
    answers = [ask(b"", "--model", model, "--input_file", tmp_path / name)
               for name in ("in.jsonl", "in.tsv", "pipe", "in.csv")]
    assert len({*map(tuple, answers)}) == 1 and len(answers[0]) == 1
    (tmp_path / "in.csv").write_text("text;label\na film;1\n")
    assert "in.csv, line 1: separated by semicolons; expected commas" in error_line(
        capsys, predict, "--model", model, "--input_file", tmp_path / "in.csv")


@pytest.mark.parametrize("stream", ["stdin", "stdout"])
def test_a_closed_stream_is_one_line(model, capsys, monkeypatch, stream):
    monkeypatch.setattr(sys, stream, None)
    assert f"standard {stream[3:]}put is closed" in error_line(capsys, predict, "--model", model)


def test_lines_keep_their_order_and_odd_ones_are_noted(ask, model, caplog):
    sentences = ["good " * (1 + number % 7) + str(number) for number in range(300)]
    odd = b"\n\n  \n\xff bad\n" + b"film " * 200
    lines = as_json(ask("\n".join(sentences).encode() + odd, "--model", model, "--format",
                        "jsonl"))
    assert [line["sentence"] for line in lines[:300]] == sentences
    assert [line["line"] for line in lines[300:]] == [303, 304]
    for note in ("line 301: empty", "line 302: empty", "line 303: is not UTF-8",
                 "line 304: 202 word pieces, cut to 128"):
        assert note in caplog.text
    assert ask(b"", "--model", model) == []


def start(model, *flags):
    return subprocess.Popen(
        [sys.executable, str(REPO / "predict.py"), "--model", str(model), *flags],
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"})


def test_a_line_is_classified_before_the_next_one_comes(model):
    with start(model) as process:
        for word in ("good", "bad"):
            process.stdin.write(f"a {word} film\n")
            process.stdin.flush()
            assert process.stdout.readline().endswith(f"a {word} film\n")
        process.stdin.close()
        assert process.wait(timeout=60) == 0


def test_a_csv_row_is_classified_when_its_last_line_has_come(model):
    with start(model, "--input_format", "csv", "--format", "jsonl") as process:
        for line, text in (('id,text\n1,"a good\nfilm"\n', "a good\nfilm"), ("2,bad\n", "bad")):
            process.stdin.write(line)
            process.stdin.flush()
            assert json.loads(process.stdout.readline())["sentence"] == text
        process.stdin.close()
        assert process.wait(timeout=60) == 0


def test_a_reader_that_leaves_ends_it_quietly(model):
    with start(model) as process:
        process.stdout.close()
        process.stdin.write("a film\n" * 2000)
        process.stdin.close()
        errors = process.stderr.read()
        assert process.wait(timeout=60) == 0
    assert "Traceback" not in errors and "BrokenPipe" not in errors


def test_mistakes_are_one_line(tmp_path, model, capsys, monkeypatch):
    make_model(tmp_path / "general", TinyBertForPreTraining)
    for arguments, expected in (
        (["--model", tmp_path / "general"], "holds no trained classifier"),
        (["--model", model, "--max_seq_length", "1000"], "128 positions"),
        (["--model", model, "--batch_size", "0"], "--batch_size 0"),
        (["--model", model, "--input_file", tmp_path / "none"], "none: no such file"),
        (["--model", model, "--input_file", tmp_path], "a folder; expected a file"),
    ):
        monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(b"a")))
        assert expected in error_line(capsys, predict, *arguments)

"""predict.py: the scores of evaluation, every format, and input as it comes."""

import io
import json
import os
import subprocess
import sys

import pytest
import torch
from helpers import REPO, error_line, make_glue, make_model, run

import predict
import quantize
from transformer.evaluation import predict_logits
from transformer.features import load_features
from transformer.inference import load_classifier
from transformer.modeling import TinyBertForPreTraining
from transformer.tasks import get_task, load_examples
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
        return capsys.readouterr().out.splitlines()

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


def test_every_output_format_says_the_same(ask, model):
    text = b"a good film\nbad\tsad"
    lines = as_json(ask(text, "--model", model, "--format", "jsonl"))
    assert lines[1]["sentence1"] == "bad" and lines[1]["sentence2"] == "sad"
    header, *rows = (line.split("\t") for line in ask(text, "--model", model, "--format", "tsv"))
    assert header == ["line", "label", "negative", "positive", "sentence", "sentence2"]
    for line, row in zip(lines, rows, strict=True):
        assert row[:2] == [str(line["line"]), line["label"]]
        assert float(row[2]) == pytest.approx(line["probabilities"]["negative"], abs=1e-6)
        assert len(row) == len(header)
    table = ask(text, "--model", model)
    assert table[0].startswith(lines[0]["label"]) and table[0].endswith("a good film")


def test_files_are_read_by_their_suffix(tmp_path, ask, model):
    (tmp_path / "in.jsonl").write_text(
        '{"sentence": "a film"}\n{"sentence1": "a", "sentence2": "film"}\n')
    (tmp_path / "in.tsv").write_text("\ufeffa film\r\na\tfilm\n", encoding="utf-8")
    first, second = (ask(b"", "--model", model, "--input_file", tmp_path / name, "--format",
                         "jsonl") for name in ("in.jsonl", "in.tsv"))
    assert first == second and len(first) == 2
    assert ask((tmp_path / "in.jsonl").read_bytes(), "--model", model, "--input_format", "jsonl",
               "--format", "jsonl") == first


def test_regression_prints_the_score(tmp_path, ask):
    model = make_model(tmp_path / "sts", num_labels=1)
    tokenizer = BertTokenizer.from_pretrained(tmp_path / "sts")
    ids = torch.tensor([[tokenizer.cls_id, *tokenizer.encode_batch(["good"])[0],
                         tokenizer.sep_id]])
    (prediction,) = as_json(ask(b"good", "--model", tmp_path / "sts", "--format", "jsonl"))
    assert prediction["score"] == pytest.approx(float(model(ids)[0].detach()), abs=1e-5)
    assert "label" not in prediction


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


def start(model):
    return subprocess.Popen(
        [sys.executable, str(REPO / "predict.py"), "--model", str(model)],
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
    for text, arguments, expected in (
        (b"a\tb\tc", ["--model", model], "standard input, line 1: 3 columns"),
        (b"a", ["--model", tmp_path / "general"], "holds no trained classifier"),
        (b"a", ["--model", tmp_path / "none"], "none/config.json: no such file"),
        (b"a", ["--model", model, "--max_seq_length", "1000"], "128 positions"),
        (b"a", ["--model", model, "--batch_size", "0"], "--batch_size 0"),
        (b"a", ["--model", model, "--input_file", tmp_path / "none"], "no such file"),
        (b"[1]", ["--model", model, "--input_format", "jsonl"], 'expected {"sentence"'),
        (b'{"sentence": 1}', ["--model", model, "--input_format", "jsonl"], "line 1"),
    ):
        monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(text)))
        assert expected in error_line(capsys, predict, *arguments)

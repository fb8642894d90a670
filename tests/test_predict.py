"""predict.py: the scores of evaluation, every format, and input as it comes."""

import io
import json
import os
import subprocess
import sys

import pytest
import torch
from helpers import REPO, error_line, make_glue, make_model, run, run_process

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
    """Return what gives bytes to predict.py and returns its lines."""

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
    answers = as_json(ask(text.encode(), "--model", folder, "--format", "jsonl"))
    found = torch.tensor([list(answer["probabilities"].values()) for answer in answers])
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=0)
    assert [answer["label"] for answer in answers] == [
        ("negative", "positive")[place] for place in expected.argmax(dim=1)]


def test_every_output_format_says_the_same(ask, model):
    text = b"a good film\nbad\tsad"
    answers = as_json(ask(text, "--model", model, "--format", "jsonl"))
    assert answers[1]["sentence1"] == "bad" and answers[1]["sentence2"] == "sad"
    header, *rows = (line.split("\t") for line in ask(text, "--model", model, "--format", "tsv"))
    assert header == ["line", "label", "negative", "positive", "sentence", "sentence2"]
    for answer, row in zip(answers, rows, strict=True):
        assert row[:2] == [str(answer["line"]), answer["label"]]
        assert float(row[2]) == pytest.approx(answer["probabilities"]["negative"], abs=1e-6)
        assert len(row) == len(header)
    table = ask(text, "--model", model)
    assert table[0].startswith(answers[0]["label"]) and table[0].endswith("a good film")


def test_files_are_read_by_their_suffix(tmp_path, ask, model):
    (tmp_path / "in.jsonl").write_text(
        '{"sentence": "a film"}\n{"sentence1": "a", "sentence2": "film"}\n')
    (tmp_path / "in.tsv").write_text("\ufeffa film\r\na\tfilm\n", encoding="utf-8")
    first, second = (ask(b"", "--model", model, "--input_file", tmp_path / name, "--format",
                         "jsonl") for name in ("in.jsonl", "in.tsv"))
    assert first == second and len(first) == 2
    alone = ask(b'{"sentence": "a film"}', "--model", model, "--input_format", "jsonl",
                "--format", "jsonl")
    expected, found = as_json(first)[0], as_json(alone)[0]
    assert found.pop("probabilities") == pytest.approx(expected.pop("probabilities"), abs=1e-6)
    assert found == expected


def test_regression_prints_the_score(tmp_path, ask):
    model = make_model(tmp_path / "sts", num_labels=1)
    tokenizer = BertTokenizer.from_pretrained(tmp_path / "sts")
    ids = torch.tensor([[tokenizer.cls_id, *tokenizer.encode_batch(["good"])[0],
                         tokenizer.sep_id]])
    (answer,) = as_json(ask(b"good", "--model", tmp_path / "sts", "--format", "jsonl"))
    assert answer["score"] == pytest.approx(float(model(ids)[0].detach()), abs=1e-5)
    assert "label" not in answer


def test_odd_lines_are_noted_and_the_others_answered(ask, model, caplog):
    text = b"good\n\n  \n\xff bad\n" + b"film " * 200 + b"\nsad"
    answers = as_json(ask(text, "--model", model, "--format", "jsonl"))
    assert [answer["line"] for answer in answers] == [1, 4, 5, 6]
    notes = caplog.text
    assert "line 2: empty" in notes and "line 3: empty" in notes
    assert "line 4: is not UTF-8" in notes
    assert "line 5: 202 word pieces, cut to 128" in notes
    assert ask(b"", "--model", model) == []


def test_many_lines_keep_their_order(ask, model):
    sentences = ["good " * (1 + number % 7) + str(number) for number in range(300)]
    answers = as_json(ask("\n".join(sentences).encode(), "--model", model, "--format", "jsonl"))
    assert [answer["sentence"] for answer in answers] == sentences


def start(model, *arguments):
    return subprocess.Popen(
        [sys.executable, str(REPO / "predict.py"), "--model", str(model), *arguments],
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"})


def test_a_line_is_answered_before_the_next_one_comes(model):
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
        (b"a", ["--model", tmp_path / "none"], "no such model directory"),
        (b"a", ["--model", model, "--max_seq_length", "1000"], "128 positions"),
        (b"a", ["--model", model, "--batch_size", "0"], "--batch_size 0"),
        (b"a", ["--model", model, "--input_file", tmp_path / "none"], "no such file"),
        (b"[1]", ["--model", model, "--input_format", "jsonl"], 'expected {"sentence"'),
        (b'{"sentence": 1}', ["--model", model, "--input_format", "jsonl"], "line 1"),
    ):
        monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(text)))
        assert expected in error_line(capsys, predict, *arguments)


def test_the_command_of_the_readme_works(model):
    assert run_process("predict.py", "--model", model).returncode == 0  # nothing to read

"""Each family from its teacher to the exported student, by the scripts alone."""

from pathlib import Path

import numpy as np
import onnxruntime
import pytest
import torch
import transformers
from helpers import (
    PIECES,
    config_folder,
    make_glue,
    make_model,
    predicted,
    read_json,
    run,
    same_weights,
    weights,
)
from relatives import INPUTS, TOKENIZERS, published
from test_own_data import write_csv
from test_reproduction import dry_run, given
from test_teachers import library_model
from tiny_tokenizers import LINES

import export_model
import finetune_teacher
import general_distill
import task_distill
from transformer.modeling import BertForMaskedLM
from transformer.tokenization import load_tokenizer

COMMON = ("--train_batch_size", 8, "--num_train_epochs", 1, "--precision", "fp32", "--no_cuda",
          "--max_seq_length", 48)
PAIRS = [("The film was good.", "we saw an awful book"), ("it was a POOR one", "a lovely story"),
         ("a happy film: great!", "the ugly film was sad, it was")]


def stage(script, root: Path, output: str, *arguments) -> Path:
    run(script, *arguments, "--output_dir", root / output, *COMMON)
    return root / output


def general_student(root: Path, teacher: Path) -> Path:
    """Distil sentences into a BERT of two narrow layers."""
    config_folder(root / "shape", num_hidden_layers=2, hidden_size=12)
    (root / "sentences.txt").write_text("\n".join(LINES), encoding="utf-8")
    return stage(general_distill, root, "general", "--train_corpus", root / "sentences.txt",
                 "--teacher_model", teacher, "--student_model", root / "shape")


def check_export(folder: Path) -> None:
    """Pipeline, ONNX graph and predict.py agree on every pair; int8 is near."""
    expected = predicted(folder, PAIRS)
    labels = [*read_json(folder / "config.json")["id2label"].values()]
    values = [[row[label] for label in labels] for row in expected]
    assert np.ptp(values, axis=0).min() > 1e-4  # rows differ
    classify = transformers.pipeline("text-classification", str(folder), top_k=None, device="cpu")
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    for (first, second), row in zip(PAIRS, expected, strict=True):
        found = classify({"text": first, "text_pair": second})
        assert {each["label"]: each["score"] for each in found} == pytest.approx(row, abs=1e-5)
        encoded = tokenizer(first, second)
        inputs = {name: np.array([encoded.get(name, np.zeros_like(encoded["input_ids"]))])
                  for name in INPUTS}
        for graph, tolerance in (("model", 1e-5), ("model_quantized", 0.05)):
            session = onnxruntime.InferenceSession(folder / "onnx" / f"{graph}.onnx")
            logits = torch.from_numpy(session.run(["logits"], inputs)[0][0])
            probabilities = dict(zip(labels, logits.softmax(dim=-1).tolist(), strict=True))
            assert probabilities == pytest.approx(row, abs=tolerance)


@pytest.mark.parametrize("name", ["roberta", "electra", "albert", "distilbert"])
def test_a_relative_teaches_and_its_student_is_a_bert_with_its_vocabulary(tmp_path, name):
    base, data = tmp_path / "base", make_glue(tmp_path / "data", "RTE")
    published(base, name, "")
    task = ("--task_name", "RTE", "--data_dir", data)
    teacher = stage(finetune_teacher, tmp_path, "teacher", *task, "--bert_model", base,
                    "--new_classifier", "--learning_rate", 1e-2)
    student = general_student(tmp_path, base)
    for output, flags in (("first", ()), ("second", ("--pred_distill", "--learning_rate", 1e-2))):
        student = stage(task_distill, tmp_path, output, *task, "--teacher_model", teacher,
                        "--student_model", student, *flags)
    run(export_model, "--model", student, "--output_dir", tmp_path / "out", "--onnx", "--int8")
    config = read_json(tmp_path / "out" / "config.json")
    assert config["architectures"] == ["BertForSequenceClassification"]
    assert config["vocab_size"] == len(load_tokenizer(base))
    file = "tokenizer.json" if name in TOKENIZERS else "vocab.txt"
    assert (tmp_path / "out" / file).read_bytes() == (base / file).read_bytes()
    check_export(tmp_path / "out")


def test_a_mobilebert_teaches_by_its_logits_and_the_student_stays_as_it_was(tmp_path):
    make_model(tmp_path / "bert", BertForMaskedLM)
    task = ("--task_name", "RTE", "--data_dir", make_glue(tmp_path / "data", "RTE"))
    library_model(tmp_path / "teacher", ("entailment", "not_entailment"), "mobilebert")
    student = stage(task_distill, tmp_path, "student", *task, "--teacher_model",
                    tmp_path / "teacher", "--student_model",
                    general_student(tmp_path, tmp_path / "bert"), "--pred_distill",
                    "--learning_rate", 1e-2)
    assert not same_weights(weights(student), weights(tmp_path / "general"))
    run(export_model, "--model", student, "--output_dir", tmp_path / "out", "--onnx", "--int8")
    assert read_json(tmp_path / "out" / "config.json")["vocab_size"] == len(PIECES)
    assert (tmp_path / "out" / "vocab.txt").read_bytes() == (
        tmp_path / "bert" / "vocab.txt").read_bytes()
    check_export(tmp_path / "out")


def test_the_profile_of_roberta_plans_its_own_layers_or_a_small_bert_as_the_student(tmp_path):
    for split, first in (("train", 0), ("dev", 40)):
        write_csv(tmp_path / "mine" / f"{split}.csv", 40, first)
    published(tmp_path / "roberta", "roberta", "")
    config_folder(tmp_path / "shape", num_hidden_layers=2)
    settings = {"MAX_SEQ_LENGTH": "48", "MODELS_DIR": "m", "RESULTS_DIR": "r", "WORK_DIR": "w"}
    call = ("--profile", "roberta", "--task", str(tmp_path / "mine"), "--teacher",
            str(tmp_path / "roberta"))
    for student, script in (((), "tinybert_6_from_bert.py"),
                            (("--student", str(tmp_path / "shape")), "general_distill.py")):
        commands = dry_run(*call, *student, **settings)
        (teacher,) = (given(c) for c in commands if c[1] == "finetune_teacher.py")
        assert teacher["learning_rate"] == 2e-5 and teacher["new_classifier"]
        assert script in [command[1] for command in commands]
        assert not any("--do_lower_case" in command for command in commands)

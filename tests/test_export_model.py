"""export_model.py: what other programs read in its folders, and that they answer as we do."""

import base64
import json
import os
import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import onnxruntime
import pytest
import torch
from helpers import (
    REPO,
    error_line,
    make_glue,
    make_model,
    predicted,
    random_batch,
    read_json,
    run,
)
from huggingface_hub import ModelCard, constants
from safetensors.torch import load_file
from tokenizers import Tokenizer

import export_model
import quantize
from transformer.checkpoint import save_pretrained
from transformer.file_utils import write_json
from transformer.modeling import (
    BertForMaskedLM,
    BertForQuestionAnswering,
    TinyBertForPreTraining,
    TinyBertForSequenceClassification,
)
from transformer.own_tasks import save_task, stored_task
from transformer.tasks import Task, get_task
from transformer.tokenization import BertTokenizer

transformers = pytest.importorskip("transformers", reason="transformers is one of the readers")

PRUNED = {"heads_per_layer": [2, 0, 1, 0], "neurons_per_layer": [24, 5, 0, 0]}
TEXTS = ["a good film .", "the story was AWFUL, sad and ugly", "we saw it", "books " * 90]
SECONDS = ["we saw it", "very fine", "a lovely story and a film", "good"]
ONNX_INPUTS = ("input_ids", "token_type_ids", "attention_mask")


def export(tmp_path: Path, *flags, model="model", output="out") -> Path:
    run(export_model, "--model", tmp_path / model, "--output_dir", tmp_path / output, *flags)
    return tmp_path / output


def rows_of(task_name: str) -> list[tuple[str, ...]]:
    pairs = get_task(task_name).text_b is not None
    return [*zip(TEXTS, SECONDS, strict=True)] if pairs else [(text,) for text in TEXTS]


def close(found: list[dict[str, float]], expected: list[dict[str, float]], tolerance: float):
    assert [sorted(row) for row in found] == [sorted(row) for row in expected]
    for row, wanted in zip(found, expected, strict=True):
        assert row == pytest.approx(wanted, abs=tolerance)


# ------------------------------------------------------------------ the readers


@pytest.mark.parametrize("task", ["SST-2", "RTE", "MNLI", "STS-B"])
def test_transformers_and_onnxruntime_answer_as_predict_py(tmp_path, task):
    labels = get_task(task).labels or ("LABEL_0",)
    make_model(tmp_path / "model", labels=labels)
    out = export(tmp_path, "--onnx", "--int8")
    rows = rows_of(task)
    expected = predicted(tmp_path / "model", rows)
    close(predicted(out, rows), expected, 1e-6)

    classify = transformers.pipeline("text-classification", model=str(out), device="cpu")
    inputs = [dict(zip(("text", "text_pair"), row, strict=False)) for row in rows]
    found = [classify(row, top_k=None, truncation=True) for row in inputs]
    close([{each["label"]: each["score"] for each in row} for row in found], expected, 1e-5)

    run(quantize, "--model", tmp_path / "model", "--method", "int8-dynamic", "--reduce_range",
        "--output_dir", tmp_path / "int8")
    tokenizer = Tokenizer.from_file(str(out / "tokenizer.json"))
    tokenizer.enable_truncation(128)
    for file, wanted in (("model.onnx", expected),
                         ("model_quantized.onnx", predicted(tmp_path / "int8", rows))):
        session = onnxruntime.InferenceSession(out / "onnx" / file)
        found = []
        for row in rows:
            coded = tokenizer.encode(*row)
            values = (coded.ids, coded.type_ids, coded.attention_mask)
            (logits,) = session.run(["logits"], {
                name: np.array([value]) for name, value in zip(ONNX_INPUTS, values, strict=True)})
            numbers = torch.from_numpy(logits[0])
            numbers = numbers if len(labels) == 1 else numbers.softmax(0)
            found.append(dict(zip(labels, numbers.tolist(), strict=True)))
        close(found, wanted, 1e-5)


def test_other_tokenizers_give_the_ids_of_ours(tmp_path):
    make_model(tmp_path / "model")
    out = export(tmp_path)
    ours = BertTokenizer.from_pretrained(tmp_path / "model")
    for other in (transformers.AutoTokenizer.from_pretrained(out),
                  Tokenizer.from_file(str(out / "tokenizer.json"))):
        for text, ids in zip(TEXTS, ours.encode_batch(TEXTS), strict=True):
            coded = other.encode(text, add_special_tokens=False)
            assert getattr(coded, "ids", coded) == ids
    assert transformers.AutoTokenizer.from_pretrained(out).model_max_length == 128
    assert {path.name for path in out.iterdir()} == {
        "README.md", "config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json",
        "vocab.txt"}


@pytest.mark.parametrize(("model_class", "kind", "example"), [
    (TinyBertForPreTraining, "feature-extraction", "a good film"),
    (BertForMaskedLM, "fill-mask", "a [MASK] film"),
    (BertForQuestionAnswering, "question-answering", None)])
def test_models_without_a_classifier_are_exported_for_what_they_are(
    tmp_path, capsys, model_class, kind, example
):
    model = make_model(tmp_path / "model", model_class)
    out = export(tmp_path)
    assert ModelCard.load(out / "README.md").data.pipeline_tag == kind
    auto = {"feature-extraction": "AutoModel", "fill-mask": "AutoModelForMaskedLM",
            "question-answering": "AutoModelForQuestionAnswering"}[kind]
    theirs, report = getattr(transformers, auto).from_pretrained(out, output_loading_info=True)
    assert not report["missing_keys"]
    assert not [key for key in report["unexpected_keys"] if "pooler" not in key]
    ids, segments, mask = random_batch()
    with torch.inference_mode():
        expected = model(ids, segments, mask)
        found = theirs(input_ids=ids, token_type_ids=segments, attention_mask=mask)
    pairs = {"feature-extraction": lambda: (found[0], expected.hidden_states[-1]),
             "fill-mask": lambda: (found.logits, expected.logits),
             "question-answering": lambda: (found.start_logits, expected.logits[..., 0])}[kind]()
    assert torch.allclose(*pairs, atol=1e-5)
    if example:
        assert transformers.pipeline(kind, model=str(out))(example)
    message = error_line(capsys, export_model, "--model", tmp_path / "model", "--output_dir",
                         tmp_path / "more", "--onnx")
    assert f"take classifiers; this model is for {kind}" in message
    assert not (tmp_path / "more").exists()


def test_a_padded_model_gives_the_same_logits_everywhere_and_its_graphs_stay_small(
    tmp_path, caplog
):
    model = make_model(tmp_path / "model", **PRUNED)
    inputs = random_batch(8, 20)
    logits = model(*inputs).logits
    small, full = export(tmp_path, output="small"), export(tmp_path, "--padded", "--onnx")
    assert "only this package reads the weights" in caplog.text
    with pytest.raises(Exception, match="pruned_bert|does not recognize"):
        transformers.AutoModelForSequenceClassification.from_pretrained(small)
    theirs = transformers.AutoModelForSequenceClassification.from_pretrained(full)
    found = theirs(input_ids=inputs[0], token_type_ids=inputs[1], attention_mask=inputs[2]).logits
    assert torch.allclose(found, logits, atol=1e-6)
    again = TinyBertForSequenceClassification.from_pretrained(full).eval()
    assert torch.allclose(again(*inputs).logits, logits, atol=1e-6)
    assert theirs.config.model_type == "bert" and theirs.config.intermediate_size == 24
    graph = onnxruntime.InferenceSession(full / "onnx" / "model.onnx")
    (from_graph,) = graph.run(["logits"], {
        name: value.numpy() for name, value in zip(ONNX_INPUTS, inputs, strict=True)})
    assert np.allclose(from_graph, logits.detach(), atol=1e-5)
    assert (full / "onnx" / "model.onnx").stat().st_size < sum(
        tensor.numel() * 4 for tensor in load_file(full / "model.safetensors").values())


def test_half_precision_stays_half(tmp_path):
    save_pretrained(make_model(tmp_path / "model").half(), tmp_path / "model")
    out = export(tmp_path, "--onnx")
    assert {t.dtype for t in load_file(out / "model.safetensors").values()} == {torch.float16}
    loaded = transformers.AutoModelForSequenceClassification.from_pretrained(out, dtype="auto")
    assert loaded.dtype == torch.float16


def test_graphs_that_quantize_py_made_are_taken_with_the_weights_they_were_made_from(
    tmp_path, capsys
):
    glue = make_glue(tmp_path / "glue", "SST-2")
    make_model(tmp_path / "model")
    run(quantize, "--model", tmp_path / "model", "--method", "int8-static", "--output_dir",
        tmp_path / "static", "--task_name", "SST-2", "--data_dir", glue, "--do_eval")
    out = export(tmp_path, "--onnx", "--int8", model="static")
    graph = (tmp_path / "static" / "model.onnx").read_bytes()
    assert (out / "onnx" / "model_quantized.onnx").read_bytes() == graph
    assert (out / "onnx" / "model.onnx").is_file() and (out / "model.safetensors").is_file()
    assert re.search(r"Quantized by `quantize.py` \(int8-static\) from model; .*then dev acc 0",
                     (out / "README.md").read_text())
    export(tmp_path, "--overwrite_output_dir")
    assert not (out / "onnx").exists()
    make_model(tmp_path / "model", seed=1)
    assert "have changed since" in error_line(
        capsys, export_model, "--model", tmp_path / "static", "--output_dir", tmp_path / "again")


@pytest.mark.parametrize(("changes", "flags", "message"), [
    ({"classifier_relu": True}, [], "relu_head_bert is a kind"),
    ({"classifier_relu": True, **PRUNED}, ["--padded"], "relu_head_bert is a kind"),
    ({"pooler_act": "relu"}, [], "other_pooler_bert is a kind"),
    ({"embedding_size": 8}, [], "projected_bert is a kind"),
    ({}, ["--output_dir", "a", "b"], "2 folders for 1 models"),
    ({}, ["--output_dir", "model", "--overwrite_output_dir"], "and would write over it"),
])
def test_what_no_other_program_would_compute_alike_is_refused(
    tmp_path, monkeypatch, capsys, changes, flags, message
):
    monkeypatch.chdir(tmp_path)
    make_model(tmp_path / "model", **changes)
    assert message in error_line(
        capsys, export_model, "--model", "model", "--output_dir", "out", *flags)
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


def test_a_file_that_answers_otherwise_than_the_source_is_an_error(tmp_path, monkeypatch, capsys):
    make_model(tmp_path / "model")
    write = export_model.save
    monkeypatch.setattr(export_model, "save", lambda state, **more: write(
        {**state, "classifier.bias": state["classifier.bias"] + 0.1}, **more))
    message = error_line(capsys, export_model, "--model", tmp_path / "model", "--output_dir",
                         tmp_path / "out")
    assert re.search(r"model.safetensors: its answers differ .* by 0\.1; do not use it", message)


# ------------------------------------------------------------------ the card


def write_records(root: Path, task: str, metrics: dict, **arguments) -> None:
    """What task_distill.py leaves beside the second of two students."""
    write_json(root / "args.json", {
        "commit": "abc123", "precision": "bfloat16", "student": str(root.parent / "start"),
        "arguments": {
            "pred_distill": True, "teacher_model": str(root.parent / "final_teacher"), "seed": 7,
            "output_dir": ["elsewhere", str(root)], "learning_rate": [1e-4, 2e-4],
            "data_dir": str(root.parent / "data"), **arguments}})
    write_json(root / "eval_results.json", {
        "task": task, "split": "dev", "rows": 12, "all_metrics": metrics,
        "selection": "best of 3 dev evaluations by acc"})


def code_blocks(card: str) -> list[str]:
    return re.findall(r"^```python\n(.*?)^```", card, re.S | re.M)


@pytest.mark.parametrize(("task", "metrics", "named"), [
    ("sst-2", {"dev": {"acc": 0.75}}, [("accuracy", 0.75, "sst2", "validation")]),
    ("mnli", {"dev": {"acc": 0.5}, "dev_mm": {"acc": 0.25}},
     [("accuracy", 0.5, "mnli", "validation_matched"),
      ("accuracy", 0.25, "mnli", "validation_mismatched")]),
    ("sts-b", {"dev": {"corr": 0.3, "pearson": 0.4, "spearmanr": 0.2}},
     [("pearsonr", 0.4, "stsb", "validation"), ("spearmanr", 0.2, "stsb", "validation")]),
])
def test_the_card_says_what_the_records_say_and_its_code_runs_as_printed(
    tmp_path, monkeypatch, capsys, task, metrics, named
):
    make_model(tmp_path / "model", labels=get_task(task).labels or ("LABEL_0",))
    write_records(tmp_path / "model", task, metrics)
    out = export(tmp_path, "--int8", "--license", "apache-2.0", "--language", "en", "--dataset",
                 "nyu-mll/glue", "--base_model", "google-bert/bert-base-uncased")
    card = ModelCard.load(out / "README.md")
    data = card.data
    assert (data.license, data.language, data.datasets, data.base_model, data.library_name) == (
        "apache-2.0", "en", ["nyu-mll/glue"], "google-bert/bert-base-uncased", "transformers")
    assert [(r.metric_type, r.metric_value, r.dataset_config, r.dataset_split)
            for r in data.eval_results] == named
    assert {(r.dataset_type, r.task_type) for r in data.eval_results} == {
        ("nyu-mll/glue", "text-classification")}
    for text in ("best of 3 dev evaluations by acc", "commit abc123", "Distilled from final_teacher"
                 " (its logits), starting from start", "learning_rate 0.0002, seed 7"):
        assert text in card.text
    assert str(tmp_path) not in card.content
    monkeypatch.chdir(out)
    first, second = code_blocks(card.text)
    for code in (first, second):
        exec(compile(code, "README.md", "exec"), {})
    printed = capsys.readouterr().out
    assert all(name in printed for name in get_task(task).labels) and "array([[" in printed


def test_what_no_file_and_no_flag_tells_stands_in_no_card(tmp_path):
    make_model(tmp_path / "model")
    out = export(tmp_path)
    data = ModelCard.load(out / "README.md").data.to_dict()
    assert sorted(data) == ["library_name", "pipeline_tag", "tags"]
    assert len(code_blocks((out / "README.md").read_text())) == 1


def test_of_a_sweep_the_card_names_the_setting_that_was_chosen(tmp_path):
    make_model(tmp_path / "model")
    write_records(tmp_path / "model", "sst-2", {"dev": {"acc": 0.75}}, sweep=True)
    results = read_json(tmp_path / "model" / "eval_results.json")
    write_json(tmp_path / "model" / "eval_results.json", {
        **results, "chosen": "lr1e-04_batch16", "sweep": [{}, {}]})
    card = (export(tmp_path) / "README.md").read_text()
    assert "learning_rate 0.0001,0.0002" in card
    assert "by acc; of 2 settings lr1e-04_batch16, the best on dev." in card


def test_a_pruned_models_card_has_its_own_scores_and_its_sources_history(tmp_path):
    make_model(tmp_path / "model")
    write_records(tmp_path / "model", "sst-2", {"dev": {"acc": 0.75}})
    make_model(tmp_path / "pruned", **PRUNED)
    write_json(tmp_path / "pruned" / "kprune.json", {
        "task": "sst2", "model": "moved/since/model", "constraint": 0.3, "flops_removed": 0.31,
        "after": {"all_metrics": {"dev": {"acc": 0.5}}}})
    card = ModelCard.load(export(tmp_path, "--padded", model="pruned") / "README.md")
    assert [result.metric_value for result in card.data.eval_results] == [0.5]
    assert card.data.tags == ["bert", "tinybert", "knowledge-distillation", "pruning"]
    assert "Pruned by K-prune from model: 31.0 %" in card.text
    assert "Distilled from final_teacher" in card.text


REVIEWS = Task("waimai", "waimai", ("差评", "好评"), "评论", None, "标签", ("acc", "macro_f1"),
               splits={"train": "train.csv", "test": "test.csv"}, dev_share=0.1)


def own_model(folder: Path, task: Task, **counts: int) -> None:
    """A model of an own task, as a training run leaves it, `counts` rows of each class on dev."""
    make_model(folder, labels=task.labels)
    write_records(folder, task.name, {"dev": {"acc": 0.75, "macro_f1": 0.5}})
    save_task(task, folder)
    classes = {label: {"rows": rows, "predicted": 3, "correct": 2}
               for label, rows in counts.items()}
    write_json(folder / "eval_results.json", {
        **read_json(folder / "eval_results.json"), "per_class": {"dev": classes}})


def test_an_own_task_with_chinese_labels_goes_with_its_model(tmp_path, monkeypatch, capsys):
    own_model(tmp_path / "model", REVIEWS, 差评=4, 好评=2)
    write_json(tmp_path / "eval" / "eval_results.json", {
        "task": "waimai", "model": "elsewhere/model", "split": "test",
        "all_metrics": {"test": {"acc": 0.7, "macro_f1": 0.6}}})
    out = export(tmp_path, "--onnx", "--language", "zh", "--results", tmp_path / "eval")
    assert stored_task(out) == stored_task(tmp_path / "model") is not None
    expected = predicted(tmp_path / "model", rows_of("SST-2"))
    close(predicted(out, rows_of("SST-2")), expected, 1e-6)
    classify = transformers.pipeline("text-classification", model=str(out), device="cpu")
    found = [classify(text, top_k=None, truncation=True) for text in TEXTS]
    close([{each["label"]: each["score"] for each in row} for row in found], expected, 1e-5)

    card = ModelCard.load(out / "README.md")
    assert card.data.language == "zh" and card.data.metrics == ["accuracy", "f1"]
    assert [(r.metric_name, r.metric_value, r.dataset_name, r.dataset_config, r.dataset_split)
            for r in card.data.eval_results] == [
        (name, value, "waimai", None, split) for split, name, value in (
            ("validation", "acc", 0.75), ("validation", "macro_f1", 0.5),
            ("test", "acc", 0.7), ("test", "macro_f1", 0.6))]
    assert card.data.eval_results[1].metric_args == {"average": "macro"}
    for text in ("A BERT for waimai", "Labels: `差评`, `好评`.", "| test | macro_f1 | 0.6000 |",
                 "| class | dev rows | predicted | correct | F1 |",
                 "| `好评` | 2 | 3 | 2 | 0.8000 |",
                 "Shares of the training file, by texts: dev 0.1."):
        assert text in card.text
    monkeypatch.chdir(out)
    for code in code_blocks(card.text):
        assert '"在这里写一句话"' in code
        exec(compile(code, "README.md", "exec"), {})
    assert "好评" in capsys.readouterr().out


def test_the_sample_of_an_own_pair_task_asks_for_a_pair(tmp_path, monkeypatch, capsys):
    own_model(tmp_path / "model", replace(REVIEWS, text_b="问题"))
    out = export(tmp_path)
    (code,) = code_blocks((out / "README.md").read_text(encoding="utf-8"))
    assert '{"text": "a text of yours", "text_pair": "and a second one"}' in code
    monkeypatch.chdir(out)
    exec(compile(code, "README.md", "exec"), {})


def test_of_many_classes_a_card_has_the_number_alone(tmp_path):
    labels = tuple(f"intent_{number}" for number in range(21))
    own_model(tmp_path / "model", replace(REVIEWS, labels=labels), **dict.fromkeys(labels, 3))
    card = (export(tmp_path) / "README.md").read_text(encoding="utf-8")
    assert "Labels: 21, in `config.json`." in card and "| class |" not in card


def test_results_that_are_not_of_the_model_are_left_out_and_a_folder_without_is_an_error(
    tmp_path, caplog, capsys
):
    own_model(tmp_path / "model", REVIEWS)
    write_json(tmp_path / "eval" / "eval_results.json", {
        "model": "other", "split": "test", "all_metrics": {"test": {"acc": 0.7}}})
    out = export(tmp_path, "--results", tmp_path / "eval")
    assert "--results are not of this model" in caplog.text
    assert "0.7000" not in (out / "README.md").read_text(encoding="utf-8")
    for folder in (tmp_path / "nowhere", tmp_path / "model"):
        message = error_line(capsys, export_model, "--model", tmp_path / "model", "--output_dir",
                             tmp_path / "again", "--results", folder)
        assert f"{folder}/eval_results.json: expected the evaluation of a model" in message
    assert not (tmp_path / "again").exists()


# ------------------------------------------------------------------ the hub


@pytest.fixture
def hub(server, monkeypatch):
    """A stand-in of the hub that takes uploads to me/tiny."""
    monkeypatch.setattr(constants, "ENDPOINT", server.url)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setenv("HF_TOKEN", "hf_secret")
    names = ["README.md", "config.json", "model.safetensors", "tokenizer.json",
             "tokenizer_config.json", "vocab.txt"]
    modes = [{"path": name, "uploadMode": "regular", "shouldIgnore": False} for name in names]
    address = f"{server.url}/me/tiny"
    for path, answer in (("repos/create", {"url": address}), ("validate-yaml", {}),
                         ("models/me/tiny/preupload/main", {"files": modes}),
                         ("models/me/tiny/commit/main",
                          {"commitUrl": f"{address}/commit/0", "commitOid": "0"})):
        server.files[f"/api/{path}"] = json.dumps(answer).encode()
    return server


def test_the_folder_is_uploaded_as_it_is(tmp_path, hub):
    make_model(tmp_path / "model")
    out = export(tmp_path, "--push_to_hub", "me/tiny")
    ((_, create), *_, (path, commit)) = hub.posts
    assert json.loads(create) == {"name": "tiny", "organization": "me"}
    assert path == "/api/models/me/tiny/commit/main"
    lines = [json.loads(line) for line in commit.splitlines()]
    sent = {line["value"]["path"]: base64.b64decode(line["value"]["content"])
            for line in lines if line["key"] == "file"}
    assert sent == {path.name: path.read_bytes() for path in out.iterdir()}
    assert 'model="me/tiny"' in (out / "README.md").read_text()


@pytest.mark.parametrize(("trouble", "message"), [
    ({"status": 401}, "401"), ({"status": 403}, "403"), ("unreachable", "refused"),
    ("offline", "offline mode is enabled")])
def test_a_failed_upload_leaves_the_folder_and_says_how_to_go_on(
    tmp_path, hub, monkeypatch, capsys, trouble, message
):
    make_model(tmp_path / "model")
    if trouble == "unreachable":
        monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")
    elif trouble == "offline":
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    else:
        hub.troubles["/api/repos/create"] = [trouble]
    out = tmp_path / "out"
    line = error_line(capsys, export_model, "--model", tmp_path / "model", "--output_dir", out,
                      "--push_to_hub", "me/tiny")
    assert message in line
    assert f"the folder is complete, to upload it later: hf upload me/tiny {out}" in line
    assert (out / "README.md").is_file()


# ------------------------------------------------------------------ programs of their own

OPTIMUM = """
import importlib.metadata, json, sys
from optimum.onnxruntime import ORTModelForSequenceClassification
from transformers import AutoTokenizer, pipeline

folder, texts = json.load(sys.stdin)
answers = {}
for file in ("model.onnx", "model_quantized.onnx"):
    model = ORTModelForSequenceClassification.from_pretrained(folder, subfolder="onnx",
                                                              file_name=file)
    classify = pipeline("text-classification", model=model,
                        tokenizer=AutoTokenizer.from_pretrained(folder))
    answers[file] = classify(texts, top_k=None, truncation=True)
versions = {name: importlib.metadata.version(name)
            for name in ("optimum", "optimum-onnx", "transformers", "onnxruntime")}
print(json.dumps([answers, versions]))
"""
TRANSFORMERS_JS = """
import { readFileSync } from "node:fs";
import { dirname, basename } from "node:path";
import { env, pipeline } from "@huggingface/transformers";

const [folder, texts] = JSON.parse(readFileSync(0, "utf8"));
env.allowRemoteModels = false;
env.localModelPath = dirname(folder);
const answers = {};
for (const [file, dtype] of [["model.onnx", "fp32"], ["model_quantized.onnx", "q8"]]) {
  const classify = await pipeline("text-classification", basename(folder), { dtype });
  answers[file] = [];
  for (const text of texts) answers[file].push(await classify(text, { top_k: null }));
}
console.log(JSON.stringify([answers, { "transformers.js": env.version, node: process.version }]));
"""


def install(folder: Path, *commands: list[str]) -> None:
    """Run commands that install a program into a folder, once; skips where one fails."""
    if (folder / "installed").exists():
        return
    folder.mkdir(parents=True, exist_ok=True)
    for command in commands:
        try:
            result = subprocess.run(command, cwd=folder, capture_output=True, text=True,
                                    timeout=600, check=False)
        except (OSError, subprocess.TimeoutExpired) as error:
            pytest.skip(f"{command[0]}: {error}")
        if result.returncode:
            pytest.skip(f"{' '.join(command)}: {(result.stderr or result.stdout)[-300:]}")
    (folder / "installed").touch()


def optimum(folder: Path) -> list[str]:
    """Install optimum, with the transformers that it wants, over the packages of these tests."""
    packages = f"{folder}/lib/python{sys.version_info.major}.{sys.version_info.minor}/site-packages"
    parent = f"open('{packages}/parent.pth', 'w').write({torch.__path__[0][:-6]!r})"
    install(folder, [sys.executable, "-m", "venv", "."], [sys.executable, "-c", parent],
            ["bin/python", "-m", "pip", "install", "--quiet", "optimum[onnxruntime]"])
    return [f"{folder}/bin/python", "-c", OPTIMUM]


def transformers_js(folder: Path) -> list[str]:
    """Install transformers.js under Node."""
    install(folder, ["node", "--version"],
            ["npm", "install", "--ignore-scripts", "--no-audit", "@huggingface/transformers"])
    (folder / "ask.mjs").write_text(TRANSFORMERS_JS)
    return ["node", f"{folder}/ask.mjs"]


@pytest.mark.slow
@pytest.mark.parametrize("client", [optimum, transformers_js])
def test_programs_in_folders_of_their_own_answer_as_we_do(tmp_path, client):
    """They are installed into $TINYBERT_CLIENTS and kept, or into the test's own folder."""
    command = client(Path(os.environ.get("TINYBERT_CLIENTS", tmp_path)) / client.__name__)
    make_model(tmp_path / "model", labels=("negative", "positive"), **PRUNED)
    out = export(tmp_path, "--onnx", "--int8", "--padded")
    run(quantize, "--model", tmp_path / "model", "--method", "int8-dynamic", "--reduce_range",
        "--output_dir", tmp_path / "int8")
    texts = TEXTS if client is optimum else TEXTS[:3]  # of long ones transformers.js cuts [SEP] off
    result = subprocess.run(
        command, input=json.dumps([str(out), texts]), cwd=REPO, text=True, capture_output=True,
        timeout=300, check=False)
    assert result.returncode == 0, result.stderr
    answers, versions = json.loads(result.stdout.splitlines()[-1])
    print(versions)
    for file, folder, tolerance in (  # another version of onnxruntime may round another value up
            ("model.onnx", tmp_path / "model", 1e-5),
            ("model_quantized.onnx", tmp_path / "int8", 1e-2)):
        found = [{each["label"]: each["score"] for each in row} for row in answers[file]]
        close(found, predicted(folder, rows_of("SST-2")[: len(texts)]), tolerance)

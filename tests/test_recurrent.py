"""Small students: a bilstm and a bigru learn, predict and export as any student does."""

import json
import logging
import shutil
import subprocess
import sys
import time

import kill
import numpy as np
import pytest
import torch
from helpers import (
    PIECES,
    REPO,
    TaskSetup,
    error_line,
    make_glue,
    make_model,
    predicted,
    random_batch,
    read_json,
    read_log,
    run,
    same_weights,
    weights,
    write_vocab,
)

import export_model
import finetune_teacher
import general_distill
import quantize
import task_distill
from transformer.checkpoint import save_pretrained
from transformer.file_utils import UserError
from transformer.inference import load_classifier
from transformer.modeling import freeze
from transformer.recurrent import (
    RecurrentClassifier,
    RecurrentConfig,
    principal_components,
    read_config,
)

SHAPES = [("bilstm", 1), ("bilstm", 2), ("bigru", 1), ("bigru", 2)]
every_shape = pytest.mark.parametrize(("cell", "layers"), SHAPES)
both_cells = pytest.mark.parametrize("cell", ["bilstm", "bigru"])


def make_recurrent(folder, cell="bilstm", layers=1, seed=0, **changes):
    """Save a random recurrent classifier with vocabulary in `folder`; returns it, in eval mode."""
    torch.manual_seed(seed)
    config = RecurrentConfig.from_dict({
        "cell": cell, "num_hidden_layers": layers, "vocab_size": len(PIECES), "hidden_size": 8,
        "embedding_size": 6, "max_position_embeddings": 64, "initializer_range": 1.0, **changes})
    model = RecurrentClassifier(config)
    save_pretrained(model, folder, write_vocab(folder))
    return model.eval()


def write_config(folder, cell="bilstm", **changes):
    """Write only a config.json, as profiles/bilstm_1l_config has it."""
    folder.mkdir(parents=True, exist_ok=True)
    values = {"model_type": cell, "hidden_size": 8, "embedding_size": 6, "vocab_size": 30522,
              "max_position_embeddings": 128, "hidden_dropout_prob": 0.0,
              "initializer_range": 0.5, **changes}
    (folder / "config.json").write_text(json.dumps(values), encoding="utf-8")
    return folder


def logits_of(model, inputs):
    with torch.inference_mode():
        return model(*inputs, score_layers=()).logits


class RecurrentSetup(TaskSetup):
    """A BERT as teacher; the student is the config of a bilstm and nothing else."""

    def __init__(self, root, cell="bilstm", **glue):
        super().__init__(root, **glue)
        make_model(self.teacher, labels=self.task.labels, initializer_range=1.0)  # sure of itself
        self.student = self.trained = write_config(root / "fresh", cell)

    def arguments(self, output, *more):
        return super().arguments(output, "--pred_distill", "--learning_rate", "1e-2", *more)


# ------------------------------------------------------------------ the model


@every_shape
def test_padding_and_the_rest_of_the_batch_never_change_a_row(tmp_path, cell, layers):
    model = make_recurrent(tmp_path, cell, layers)
    ids, segments, mask = random_batch(6, 11)
    expected = logits_of(model, (ids, segments, mask))
    wider = [torch.nn.functional.pad(x, (0, 9)) for x in (ids, segments, mask)]
    wider[0][wider[2] == 0] = 7  # whatever stands there
    torch.testing.assert_close(logits_of(model, wider), expected, atol=1e-6, rtol=0)
    for row, length in enumerate(mask.sum(dim=1).tolist()):
        alone = logits_of(model, (ids[row : row + 1, :length],))
        torch.testing.assert_close(alone, expected[row : row + 1], atol=1e-6, rtol=0)
    assert expected.std(dim=0).min() > 1e-2  # rows are told apart


@both_cells
def test_both_ends_of_a_row_reach_the_logits(tmp_path, cell):
    model = make_recurrent(tmp_path, cell)
    ids = torch.full((3, 9), 7)
    ids[1, 0], ids[2, 8] = 9, 9
    logits = logits_of(model, (ids,))
    assert (logits[1:] - logits[0]).abs().amax(dim=1).min() > 1e-3


def test_padding_before_a_token_is_refused(tmp_path):
    model = make_recurrent(tmp_path)
    ids, mask = torch.full((1, 4), 7), torch.tensor([[0, 1, 1, 1]])
    with pytest.raises(UserError, match="padding at the end"):
        model(ids, attention_mask=mask)
    with pytest.raises(UserError, match="a row without tokens"):
        model(ids, attention_mask=torch.zeros_like(ids))


@every_shape
def test_a_saved_model_and_its_config_come_back_as_they_were(tmp_path, cell, layers):
    model = make_recurrent(tmp_path, cell, layers, id2label={0: "no", 1: "yes", 2: "maybe"})
    values = read_json(tmp_path / "config.json")
    assert values["model_type"] == cell and "num_attention_heads" not in values
    assert read_config(tmp_path / "config.json").to_dict() == model.config.to_dict()
    again = load_classifier(tmp_path, num_labels=3)
    assert type(again) is RecurrentClassifier
    inputs = random_batch()
    assert torch.equal(logits_of(again.eval(), inputs), logits_of(model, inputs))


@both_cells
def test_in_bfloat16_only_the_word_embeddings_are_rounded(tmp_path, cell):
    model, inputs = make_recurrent(tmp_path, cell), random_batch(6, 40)
    rounded = freeze(load_classifier(tmp_path), torch.bfloat16, torch.device("cpu"))
    assert rounded.word_embeddings.weight.dtype == torch.bfloat16
    assert {p.dtype for p in rounded.recurrent.parameters()} == {torch.float32}
    with torch.autocast("cpu", torch.bfloat16):
        found = logits_of(rounded, inputs)
    assert found.dtype == torch.float32
    torch.testing.assert_close(found, logits_of(model, inputs), atol=0.02, rtol=0)


@pytest.mark.parametrize(("changes", "contains"), [
    ({"model_type": "rnn"}, "model_type is 'rnn'"),
    ({"num_attention_heads": 12}, "num_attention_heads: a bilstm has none"),
    ({"embedding_size": 0}, "embedding_size is 0"),
    ({"hidden_size": "wide"}, "hidden_size is 'wide'"),
])
def test_a_config_that_is_none_names_the_file_and_the_field(tmp_path, changes, contains):
    path = write_config(tmp_path, **changes) / "config.json"
    with pytest.raises(UserError) as error:
        read_config(path)
    assert contains in str(error.value) and str(path) in str(error.value)


def test_the_example_configs_are_read():
    for cell in ("bilstm", "bigru"):
        config = read_config(REPO / "profiles" / f"{cell}_1l_config" / "config.json")
        assert (config.model_type, config.hidden_size, config.num_hidden_layers) == (cell, 128, 1)


# ------------------------------------------------------------------ training


@both_cells
def test_a_student_that_is_only_a_config_learns_from_the_teacher(tmp_path, cell):
    setup = RecurrentSetup(tmp_path, cell, rows=64, dev_rows=32)
    output = setup.run("out", "--num_train_epochs", 12, "--eval_step", 16)
    config = read_json(output / "config.json")
    assert (config["model_type"], config["vocab_size"]) == (cell, len(PIECES))
    assert config["finetuning_task"] == "sst-2" and (output / "vocab.txt").is_file()
    losses = [line["cls_loss"] for line in read_log(output) if "cls_loss" in line]
    assert losses[-1] < 0.9 * losses[0]
    run(task_distill, "--do_eval", "--student_model", output, "--data_dir", setup.data,
        "--task_name", "SST-2", "--output_dir", tmp_path / "eval", "--precision", "fp32",
        "--no_cuda")
    best = read_json(output / "eval_results.json")["metrics"]
    assert read_json(tmp_path / "eval" / "eval_results.json")["metrics"] == pytest.approx(best)


def test_a_trained_recurrent_student_goes_on_and_a_fresh_one_is_not_needed(tmp_path):
    setup = RecurrentSetup(tmp_path)
    setup.student = setup.run("first", "--num_train_epochs", 1)
    before = weights(setup.student)
    output = setup.run("second", "--num_train_epochs", 1, "--learning_rate", "1e-9")
    for name, tensor in weights(output).items():
        torch.testing.assert_close(tensor, before[name], atol=1e-4, rtol=0)


def test_it_learns_beside_a_bert_as_it_does_alone(tmp_path):
    setup = RecurrentSetup(tmp_path)
    alone = setup.run("alone", "--num_train_epochs", 1)
    bert = tmp_path / "student"
    run(task_distill, *setup.arguments(
        "x", "--num_train_epochs", 1, "--student_model", bert, setup.student,
        "--output_dir", tmp_path / "bert", tmp_path / "beside"))
    assert same_weights(weights(alone), weights(tmp_path / "beside"))
    assert read_json(tmp_path / "bert" / "config.json")["model_type"] == "bert"


def test_a_run_that_was_killed_goes_on_to_the_same_bytes(tmp_path):
    setup = RecurrentSetup(tmp_path, rows=120)
    write_config(setup.student, num_hidden_layers=2, hidden_dropout_prob=0.2)
    flags = ("--num_train_epochs", 4, "--save_steps", 3, "--copy_embeddings")
    began = time.monotonic()
    whole = weights(setup.run("whole", *flags))
    seconds = time.monotonic() - began

    def check() -> None:
        assert same_weights(whole, weights(tmp_path / "killed"))

    kill.survive(
        kill.script("task_distill.py", *map(str, setup.arguments("killed", *flags))), 1, 1,
        check, lambda: shutil.rmtree(tmp_path / "killed", ignore_errors=True), seconds=seconds)


@both_cells
def test_it_learns_the_labels_alone(tmp_path, cell):
    glue = make_glue(tmp_path / "SST-2", rows=96, dev_rows=32)
    write_vocab(tmp_path / "vocabulary")
    run(finetune_teacher, "--task_name", "SST-2", "--data_dir", glue, "--from_scratch",
        "--bert_model", write_config(tmp_path / "fresh", cell), "--vocab_dir",
        tmp_path / "vocabulary", "--output_dir", tmp_path / "out", "--num_train_epochs", 8,
        "--train_batch_size", 8, "--learning_rate", "1e-2", "--precision", "fp32", "--no_cuda")
    assert read_json(tmp_path / "out" / "eval_results.json")["metrics"]["acc"] > 0.9
    assert read_json(tmp_path / "out" / "config.json")["model_type"] == cell


# ------------------------------------------------------------------ the teacher's word embeddings


@pytest.mark.parametrize("width", [16, 6])
def test_copied_word_embeddings_are_the_teachers_or_their_principal_components(tmp_path, width):
    setup = RecurrentSetup(tmp_path)
    write_config(setup.student, embedding_size=width)
    output = setup.run("out", "--copy_embeddings", "--num_train_epochs", 1,
                       "--learning_rate", "1e-12", "--weight_decay", 0)
    teacher = weights(setup.teacher)["bert.embeddings.word_embeddings.weight"]
    found = weights(output)["word_embeddings.weight"]
    assert found.shape == (len(PIECES), width)
    torch.testing.assert_close(found, principal_components(teacher, width), atol=1e-6, rtol=0)
    if width == 16:
        torch.testing.assert_close(found, teacher, atol=1e-6, rtol=0)


def test_principal_components_keep_what_differs_most():
    generator = torch.Generator().manual_seed(0)
    inner = torch.randn(50, 3, generator=generator, dtype=torch.double) * torch.tensor([3, 2, 1])
    turn = torch.linalg.qr(torch.randn(7, 7, generator=generator, dtype=torch.double)).Q[:3]
    found = principal_components(inner @ turn + 5, 3).double()
    torch.testing.assert_close(torch.cdist(found, found), torch.cdist(inner, inner),
                               atol=1e-5, rtol=0)  # nothing is lost where three directions are all
    expected = torch.linalg.svdvals(inner - inner.mean(dim=0))
    torch.testing.assert_close(found.norm(dim=0), expected, atol=1e-5, rtol=0)


# ------------------------------------------------------------------ what is refused


def test_the_intermediate_stage_refuses_it_before_a_model_is_loaded(tmp_path, capsys):
    setup = RecurrentSetup(tmp_path)
    (setup.teacher / "pytorch_model.bin").unlink()  # nobody has got to it
    message = error_line(capsys, task_distill, *TaskSetup.arguments(setup, "out"))
    assert "a bilstm has no attention scores" in message and "--pred_distill" in message


def test_embeddings_wider_than_the_teachers_are_refused(tmp_path, capsys):
    setup = RecurrentSetup(tmp_path)
    write_config(setup.student, embedding_size=20)
    setup.expect_error(capsys, "--copy_embeddings", contains=["16 wide", "embedding_size is 20"])


def test_it_does_not_teach(tmp_path, capsys):
    setup = RecurrentSetup(tmp_path)
    setup.expect_error(capsys, "--teacher_model", setup.student, contains=["a bilstm is a student"])


def test_embeddings_that_nobody_takes_are_refused(tmp_path, capsys):
    TaskSetup(tmp_path).expect_error(capsys, "--pred_distill", "--copy_embeddings",
                                     contains=["no student is a bilstm or bigru without weights"])


def test_general_distillation_refuses_it(tmp_path, capsys):
    make_recurrent(tmp_path / "model")
    make_model(tmp_path / "bert")
    (tmp_path / "text.txt").write_text("the film .\n", encoding="utf-8")
    assert "model_type is 'bilstm'; expected 'bert' or a relative" in error_line(
        capsys, general_distill, "--train_corpus", tmp_path / "text.txt", "--teacher_model",
        tmp_path / "bert", "--student_model", tmp_path / "model", "--output_dir", tmp_path / "out")


# ------------------------------------------------------------------ ONNX, quantized, exported


@every_shape
@pytest.mark.parametrize(("method", "tolerance"), [
    ("fp32", 1e-5), ("fp16", 5e-3), ("int8-dynamic", 5e-2)])
def test_the_onnx_file_computes_the_same_for_any_batch_and_length(
        tmp_path, cell, layers, method, tolerance):
    model = make_recurrent(tmp_path / "model", cell, layers, classifier_relu=layers == 2)
    run(quantize, "--model", tmp_path / "model", "--method", method, "--output_dir",
        tmp_path / "out")
    made = load_classifier(tmp_path / "out")
    assert made.config.model_type == cell
    assert made.parameter_total == sum(p.numel() for p in model.parameters())
    for seed, (rows, length) in enumerate([(1, 3), (5, 9), (16, 30)]):
        inputs = random_batch(rows, length, seed=seed)
        found, expected = made(*inputs).logits, logits_of(model, inputs)
        torch.testing.assert_close(found, expected, atol=tolerance, rtol=0)
    alone = made(*(x[:1] for x in inputs)).logits
    torch.testing.assert_close(alone, made(*inputs).logits[:1], atol=1e-6, rtol=0)


def test_int8_makes_it_less_than_a_third_and_static_ranges_are_refused(tmp_path, capsys):
    glue = make_glue(tmp_path / "glue")
    make_recurrent(tmp_path / "model", vocab_size=len(PIECES) + 100, embedding_size=512,
                   hidden_size=1)
    run(quantize, "--model", tmp_path / "model", "--method", "int8-dynamic", "--output_dir",
        tmp_path / "out", "--do_eval", "--task_name", "SST-2", "--data_dir", glue)
    record = read_json(tmp_path / "out" / "quantization.json")
    assert record["bytes_after"] < record["bytes_before"] / 3
    message = error_line(capsys, quantize, "--model", tmp_path / "model", "--method",
                         "int8-static", "--output_dir", tmp_path / "x", "--task_name", "SST-2",
                         "--data_dir", glue)
    assert "int8-static" in message and "expected int8-dynamic" in message


def test_predict_answers_alike_from_pytorch_and_onnx(tmp_path):
    make_recurrent(tmp_path / "model", id2label={0: "no", 1: "yes"})
    run(quantize, "--model", tmp_path / "model", "--method", "fp32", "--output_dir",
        tmp_path / "onnx")
    rows = [("a lovely film .",), ("bad and sad",)]
    for first, second in zip(*(predicted(tmp_path / name, rows) for name in ("model", "onnx")),
                             strict=True):
        assert first == pytest.approx(second, abs=1e-6)


@both_cells
def test_an_exported_folder_runs_by_the_code_on_its_card(tmp_path, cell, caplog):
    model = make_recurrent(tmp_path / "model", cell, id2label={0: "no", 1: "yes"})
    with caplog.at_level(logging.WARNING):
        run(export_model, "--model", tmp_path / "model", "--onnx", "--output_dir", tmp_path / "out")
    assert f"{cell}: only this package reads the weights" in caplog.text
    card = (tmp_path / "out" / "README.md").read_text(encoding="utf-8")
    assert "LSTM" in card or "GRU" in card
    assert "pipeline(" not in card
    code = card.split("```python\n")[1].split("```")[0]
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False,
                         cwd=tmp_path / "out", timeout=120)
    assert ran.returncode == 0, ran.stderr
    numbers = np.array(json.loads(ran.stdout.split("[array(")[1].split(", dtype")[0]))
    assert numbers.shape == (1, 2)
    assert torch.equal(logits_of(load_classifier(tmp_path / "out").eval(), random_batch()),
                       logits_of(model, random_batch()))


def test_other_tools_refuse_the_weights(tmp_path):
    from transformers import AutoConfig

    make_recurrent(tmp_path)
    with pytest.raises(ValueError, match="bilstm"):
        AutoConfig.from_pretrained(tmp_path)

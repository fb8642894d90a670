"""quantize.py, int8 and ONNX models: what they compute, what they weigh, what they refuse."""

import sys
from collections import Counter

import numpy as np
import onnx
import pytest
import torch
from helpers import error_line, make_glue, make_model, random_batch, read_json, run

import predict
import quantize
from transformer.evaluation import evaluate
from transformer.features import load_features
from transformer.file_utils import UserError
from transformer.inference import load_classifier
from transformer.modeling import TinyBertForPreTraining, freeze
from transformer.onnx_model import OnnxClassifier, build, fuse
from transformer.tasks import get_task, label_order
from transformer.tokenization import BertTokenizer

MADE = [(method, form) for method, forms in quantize.METHODS.items() for form in forms]
# Of the logits' spread; random weights of width 16 are the hardest there are.
TOLERANCE = {"fp32": 1e-5, "fp16": 0.01, "bf16": 0.05, "int8-dynamic": 0.2, "int8-static": 0.2}
PRUNED = {"heads_per_layer": [2, 0, 1, 0], "neurons_per_layer": [24, 5, 0, 0]}


@pytest.fixture
def glue(tmp_path):
    return make_glue(tmp_path / "glue", "SST-2")


def make(tmp_path, method, form, *more, model="model", output="out"):
    run(quantize, "--model", tmp_path / model, "--output_dir", tmp_path / output, "--method",
        method, "--format", form, *more)
    return tmp_path / output


def task_flags(glue, name="SST-2"):
    return ["--task_name", name, "--data_dir", glue]


def difference(model, made, seed=0, rows=16) -> float:
    """The largest difference of logits, as a share of their spread."""
    inputs = random_batch(rows, 11, seed=seed)
    with torch.inference_mode():
        expected = model(*inputs)[0]
        return float((made(*inputs)[0] - expected).abs().max() / expected.std())


@pytest.mark.parametrize(("method", "form"), MADE)
@pytest.mark.parametrize("shape", [{}, PRUNED], ids=["whole", "pruned"])
def test_every_method_gives_the_logits_of_the_model_before(tmp_path, glue, method, form, shape):
    model = make_model(tmp_path / "model", **shape)
    folder = make(tmp_path, method, form, *task_flags(glue))
    made = load_classifier(folder)
    assert difference(model, made) < TOLERANCE[method]
    assert difference(model, made, seed=1, rows=1) < TOLERANCE[method]
    record = read_json(folder / "quantization.json")
    assert (record["method"], record["format"]) == (method, form)
    assert record["bytes_after"] == max(
        file.stat().st_size for file in folder.iterdir() if file.suffix in (".bin", ".onnx"))
    assert ("calibration" in record) == (method == "int8-static")
    config = read_json(folder / "config.json")
    # Other programs read a graph of any shape, but not weights of a pruned one.
    assert config["model_type"] == ("pruned_bert" if shape and form == "torch" else "bert")
    assert config.get("dtype") == {"fp16": "float16", "bf16": "bfloat16"}.get(method) or \
        form == "onnx" and "dtype" not in config
    assert BertTokenizer.from_pretrained(folder).vocab


@pytest.mark.parametrize("activation", ["gelu", "gelu_new", "relu", "silu", "tanh"])
def test_the_onnx_graph_computes_every_activation(tmp_path, activation):
    model = make_model(tmp_path / "model", hidden_act=activation, classifier_relu=True)
    assert difference(model, load_classifier(make(tmp_path, "fp32", "onnx"))) < 1e-5


def test_onnx_runtime_fuses_every_layer(tmp_path):
    def fused_kinds(**shape):
        model = make_model(tmp_path / "model", **shape)
        return Counter(node.op_type for node in fuse(build(model)).model.graph.node)

    found = fused_kinds()
    assert (found["Attention"], found["BiasGelu"], found["SkipLayerNormalization"]) == (4, 4, 9)
    assert fused_kinds(**PRUNED)["Attention"] == 2


@pytest.mark.parametrize("method", ["int8-dynamic", "int8-static"])
def test_int8_weights_are_bytes_and_logits_do_not_depend_on_the_rest_of_the_batch(
        tmp_path, glue, method):
    make_model(tmp_path / "model", hidden_size=256, intermediate_size=1024)
    folder = make(tmp_path, method, "onnx", *task_flags(glue))
    weights = [w for w in onnx.load(folder / "model.onnx").graph.initializer
               if np.prod(w.dims) >= 31 * 256 and not w.name.startswith(("positions", "pooler"))]
    assert len(weights) == 1 + 4 * 6  # the embeddings, and six matrices a layer
    assert {w.data_type for w in weights} <= {onnx.TensorProto.INT8, onnx.TensorProto.UINT8}
    record = read_json(folder / "quantization.json")
    assert record["bytes_after"] <= 0.3 * record["bytes_before"]
    made, inputs = load_classifier(folder), random_batch(16, 11)
    alone = made(*(x[:1] for x in inputs)).logits
    torch.testing.assert_close(alone, made(*inputs).logits[:1], atol=1e-5, rtol=0)


@pytest.mark.parametrize(("name", "labels"), [("STS-B", 1), ("MNLI", 3)])
def test_do_eval_measures_before_and_after_on_the_same_rows(tmp_path, capsys, name, labels):
    make_model(tmp_path / "model", num_labels=labels)
    glue = make_glue(tmp_path / "glue", name)
    folder = make(tmp_path, "int8-static", "onnx", "--do_eval", *task_flags(glue, name))
    result = read_json(folder / "eval_results.json")
    task = get_task(name)
    assert set(result["before"]) == set(result["all_metrics"]) == set(task.dev_files)
    tokenizer = BertTokenizer.from_pretrained(folder)
    model = freeze(load_classifier(folder, labels), torch.bfloat16, torch.device("cpu"))
    rows = load_features(task, glue, "dev", tokenizer, 128,
                         label_order(task, model.config.id2label))
    found = evaluate(model, rows, task, "cpu")["metrics"]
    assert found == pytest.approx(result["metrics"])
    assert result["rows"] == len(rows)
    assert f"{task.name} dev (12 rows)  before" in capsys.readouterr().out


def test_a_model_that_came_to_predict_one_class_is_an_error(tmp_path, glue, capsys):
    model = make_model(tmp_path / "model", num_labels=2)
    tokenizer = BertTokenizer.from_pretrained(tmp_path / "model")
    rows = load_features("SST-2", glue, "dev", tokenizer, 128, ("0", "1"))
    with torch.no_grad():
        margin = torch.from_numpy(evaluate(model, rows, "SST-2", "cpu")["logits"]).diff(dim=1)
        half = (margin.median() + 1e-3) / 2  # so that it predicts both classes
        model.classifier.bias += torch.tensor([half, -half]) + 30008  # float16 has steps of 16
    quantize.save_pretrained(model, tmp_path / "model")
    flags = ["--model", tmp_path / "model", "--do_eval", *task_flags(glue)]
    run(quantize, *flags, "--method", "fp32", "--output_dir", tmp_path / "good")
    flags += ["--method", "fp16", "--format", "torch", "--output_dir", tmp_path / "bad"]
    message = error_line(capsys, quantize, *flags)
    assert f"{tmp_path / 'bad'}: the same prediction for all rows of dev" in message


def test_weights_beyond_what_float16_holds_are_an_error_before_anything_is_written(
        tmp_path, capsys):
    model = make_model(tmp_path / "model")
    model.classifier.weight.data[1, 2] = 7e4
    quantize.save_pretrained(model, tmp_path / "model")
    for form in ("onnx", "torch"):
        flags = ["--model", tmp_path / "model", "--method", "fp16", "--format", form]
        message = error_line(capsys, quantize, *flags, "--output_dir", tmp_path / "out")
        assert "as fp16: classifier.weight holds values that are not finite" in message
        assert not (tmp_path / "out").exists()
    make(tmp_path, "bf16", "torch")


def test_an_onnx_model_keeps_its_precision_wherever_it_is_moved(tmp_path):
    model = make_model(tmp_path / "model")
    made = load_classifier(make(tmp_path, "int8-dynamic", "onnx"))
    before = difference(model, made)
    assert isinstance(made, OnnxClassifier)
    assert difference(model, freeze(made, torch.bfloat16, torch.device("cpu"))) == before
    assert made.parameter_total == sum(p.numel() for n, p in model.named_parameters()
                                       if "fit_dense" not in n)


def test_overwriting_leaves_nothing_of_the_model_before_and_never_the_source(tmp_path, capsys):
    make_model(tmp_path / "model")
    for form, name in (("onnx", "model.onnx"), ("torch", "pytorch_model.bin")):
        folder = make(tmp_path, "fp16", form, "--overwrite_output_dir")
        assert [file.name for file in folder.iterdir()
                if file.suffix in (".bin", ".onnx") or "eval" in file.name] == [name]
        (folder / "eval_results.json").write_text("{}")
    message = error_line(capsys, quantize, "--model", tmp_path / "model", "--output_dir",
                         tmp_path / "model", "--method", "fp16", "--overwrite_output_dir")
    assert "this call reads" in message and (tmp_path / "model" / "pytorch_model.bin").is_file()


@pytest.mark.parametrize(("method", "dtype"), [("fp16", torch.float16), ("bf16", torch.bfloat16)])
@torch.no_grad()
def test_hugging_face_reads_half_precision_as_what_it_is(tmp_path, method, dtype):
    make_model(tmp_path / "model", labels=("no", "yes"))
    folder = make(tmp_path, method, "torch")
    theirs = pytest.importorskip("transformers").AutoModelForSequenceClassification
    model = theirs.from_pretrained(folder).eval()
    assert {p.dtype for p in model.parameters()} == {dtype}
    ids, segments, mask = random_batch()
    torch.testing.assert_close(
        model.float()(ids, token_type_ids=segments, attention_mask=mask).logits,
        load_classifier(folder).eval()(ids, segments, mask).logits, atol=1e-5, rtol=0)
    assert model.config.id2label == {0: "no", 1: "yes"}


def test_weights_win_over_a_graph_beside_them_and_that_is_said(exported, tmp_path, caplog):
    make_model(exported, seed=5)
    model = make_model(tmp_path / "other", seed=5)
    assert difference(model, load_classifier(exported).eval()) == 0
    assert f"{exported / 'model.onnx'}: not read" in caplog.text


# ------------------------------------------------------------------ mistakes


@pytest.mark.parametrize("package", ["onnx", "onnxruntime"])
def test_a_missing_package_is_one_line_before_anything_is_written(
        exported, tmp_path, capsys, monkeypatch, package):
    monkeypatch.delitem(sys.modules, "transformer.onnx_model")
    monkeypatch.setitem(sys.modules, package, None)
    flags = ["--model", tmp_path / "model", "--method", "fp32", "--output_dir", tmp_path / "new"]
    expected = f"there is no package {package}; expected it, by pip install {package}"
    assert expected in error_line(capsys, quantize, *flags)
    assert not (tmp_path / "new").exists()
    (tmp_path / "rows").write_text("a film\n")
    assert expected in error_line(
        capsys, predict, "--model", exported, "--input_file", tmp_path / "rows")


def test_what_cannot_be_made_is_said_in_one_line(tmp_path, glue, capsys):
    make_model(tmp_path / "model")
    make_model(tmp_path / "general", TinyBertForPreTraining)
    made = make(tmp_path, "int8-dynamic", "onnx", output="made")
    for more, expected in (
        (["--method", "bf16", "--format", "onnx"], "bfloat16"),
        (["--method", "fp32", "--format", "torch"], "--format onnx"),
        (["--method", "int8-dynamic", "--format", "torch"], "int8 as ONNX is as small and faster"),
        (["--method", "int8-static"], "--data_dir is missing"),
        (["--method", "fp16", "--do_eval", "--task_name", "RTE"], "--data_dir is missing"),
        (["--method", "int8-static", "--calibration_rows", "0", *task_flags(glue)],
         "--calibration_rows 0"),
        (["--method", "fp16", *task_flags(glue, "MNLI")], "expected 3"),
        (["--method", "fp16", "--model", tmp_path / "general"], "no trained classifier"),
        (["--method", "fp16", "--dev_share", "0.1"], "--data_dir, which is missing"),
        (["--method", "fp16", "--model", made], "expected the PyTorch model"),
        (["--method", "fp16", "--model", tmp_path / "none"], "no such"),
    ):
        flags = ["--model", tmp_path / "model", "--output_dir", tmp_path / "out", *more]
        assert expected in error_line(capsys, quantize, *flags)
        assert not (tmp_path / "out").exists()


@pytest.fixture
def exported(tmp_path):
    make_model(tmp_path / "model")
    return make(tmp_path, "fp32", "onnx")


@pytest.mark.parametrize("size", [0, 100, 5000])
def test_a_truncated_onnx_file_is_refused(exported, size):
    path = exported / "model.onnx"
    path.write_bytes(path.read_bytes()[:size])
    with pytest.raises(UserError, match=r"model\.onnx: damaged, or not an ONNX model"):
        load_classifier(exported)


@pytest.mark.parametrize(("change", "message"), [
    ({"id2label": {"0": "a", "1": "b", "2": "c"}},
     "its labels is 2; its config.json has 3"),
    ({"vocab_size": 99}, "its vocab_size is 31; its config.json has 99"),
    *(({name: value}, "expected the pair that quantize.py wrote") for name, value in (
        ("hidden_size", 32), ("num_hidden_layers", 3), ("num_attention_heads", 4),
        ("intermediate_size", 25), ("max_position_embeddings", 1024), ("type_vocab_size", 3))),
])
def test_an_onnx_file_that_does_not_fit_its_config_is_refused(exported, change, message):
    values = read_json(exported / "config.json") | change
    quantize.write_json(exported / "config.json", values)
    with pytest.raises(UserError, match=message):
        load_classifier(exported)


def test_an_onnx_model_of_others_for_another_task_or_longer_rows_is_refused(exported):
    with pytest.raises(UserError, match="has 2 labels; expected 3"):
        load_classifier(exported, 3)
    with pytest.raises(UserError, match="129; the model has 128 positions"):
        load_classifier(exported)(torch.ones(1, 129, dtype=torch.long))
    proto = onnx.load(exported / "model.onnx")
    del proto.metadata_props[:]
    onnx.save(proto, exported / "model.onnx")
    with pytest.raises(UserError, match="not told; its config.json has 31; expected the pair"):
        load_classifier(exported)
    (exported / "model.onnx").unlink()
    with pytest.raises(UserError, match="no weights; expected"):
        load_classifier(exported)

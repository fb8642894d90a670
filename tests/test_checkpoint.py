"""Reading and writing model folders: strict, atomic, in every dialect."""

import io
import json
import pickle
from pathlib import Path

import pytest
import torch
from helpers import config_folder, error_line, make_model, same_weights, tiny_config, weights
from safetensors.torch import save_file

import fix_teacher_layers
import tinybert_6_from_bert
from transformer import checkpoint
from transformer.checkpoint import (
    load_state,
    load_training_state,
    save_pretrained,
    save_training_state,
)
from transformer.file_utils import UserError
from transformer.modeling import (
    BertForMaskedLM,
    BertModel,
    TinyBertForPreTraining,
    TinyBertForSequenceClassification,
)
from transformer.run_folder import remove_training_states

ALL_CLASSES = [BertModel, BertForMaskedLM, TinyBertForPreTraining,
               TinyBertForSequenceClassification]


def rewrite(folder, change) -> None:
    """Apply `change` to the state in a model folder."""
    state = weights(folder)
    torch.save(change(state), folder / "pytorch_model.bin")


def rewrite_config(folder, **changes) -> None:
    """Change fields of a model folder's config.json; None removes one."""
    config = json.loads((folder / "config.json").read_text()) | changes
    config = {key: value for key, value in config.items() if value is not None}
    (folder / "config.json").write_text(json.dumps(config))


def without(*parts):
    return lambda state: {k: v for k, v in state.items() if not any(p in k for p in parts)}


# ------------------------------------------------------------------ dialects


@pytest.mark.parametrize("model_class", ALL_CLASSES)
def test_what_was_saved_is_loaded_bit_for_bit(tmp_path, model_class):
    saved = make_model(tmp_path / "m", model_class)
    loaded = model_class.from_pretrained(tmp_path / "m")
    assert same_weights(saved.state_dict(), loaded.state_dict())
    assert loaded.config.to_dict() == saved.config.to_dict()


@pytest.mark.parametrize("rename", [
    lambda key: key.removeprefix("bert."),
    lambda key: f"module.{key}",
    lambda key: key.replace("LayerNorm.weight", "LayerNorm.gamma").replace(
        "LayerNorm.bias", "LayerNorm.beta"),
    lambda key: key.removeprefix("bert.").replace("LayerNorm.bias", "LayerNorm.beta"),
], ids=["no prefix", "DataParallel", "gamma and beta", "no prefix, beta"])
def test_a_checkpoint_in_another_dialect_gives_the_same_model(tmp_path, rename):
    saved = make_model(tmp_path / "m")
    rewrite(tmp_path / "m", lambda state: {rename(k): v for k, v in state.items()})
    loaded = TinyBertForSequenceClassification.from_pretrained(tmp_path / "m")
    assert same_weights(saved.state_dict(), loaded.state_dict())


def test_a_body_without_prefix_loads_into_the_bare_encoder(tmp_path):
    saved = make_model(tmp_path / "m", BertModel)
    assert "embeddings.word_embeddings.weight" in weights(tmp_path / "m")
    classifier = make_model(tmp_path / "c")
    assert same_weights(saved.state_dict(),
                        BertModel.from_pretrained(tmp_path / "m").state_dict())
    assert same_weights(classifier.bert.state_dict(),
                        BertModel.from_pretrained(tmp_path / "c").state_dict())


def test_half_precision_weights_are_read_as_float32(tmp_path):
    make_model(tmp_path / "m")
    rewrite(tmp_path / "m", lambda state: {k: v.half() for k, v in state.items()})
    loaded = TinyBertForSequenceClassification.from_pretrained(tmp_path / "m")
    assert {p.dtype for p in loaded.parameters()} == {torch.float32}


def test_one_fit_dense_per_layer_is_loaded_and_used(tmp_path):
    saved = make_model(tmp_path / "m", model_arguments={"fit_size": 20, "per_layer_fit": True})
    assert "fit_denses.4.weight" in weights(tmp_path / "m")
    loaded = TinyBertForSequenceClassification.from_pretrained(tmp_path / "m").eval()
    ids = torch.randint(5, 20, (2, 6))
    for ours, theirs in zip(loaded(ids, is_student=True)[2], saved(ids, is_student=True)[2],
                            strict=True):
        assert ours.shape == (2, 6, 20)
        assert torch.equal(ours, theirs)


def test_the_tied_decoder_may_be_absent(tmp_path):
    saved = make_model(tmp_path / "m", BertForMaskedLM)
    rewrite(tmp_path / "m", without("decoder.weight"))
    loaded = BertForMaskedLM.from_pretrained(tmp_path / "m")
    assert same_weights(saved.state_dict(), loaded.state_dict())
    assert loaded.cls.predictions.decoder.weight is loaded.bert.embeddings.word_embeddings.weight


def test_an_untied_decoder_is_refused(tmp_path):
    make_model(tmp_path / "m", BertForMaskedLM)
    rewrite(tmp_path / "m", lambda state: {
        k: v + 1 if "decoder.weight" in k else v for k, v in state.items()})
    with pytest.raises(UserError, match=r"decoder\.weight differs"):
        BertForMaskedLM.from_pretrained(tmp_path / "m")


@pytest.mark.parametrize("same", [
    lambda state: {k.replace("LayerNorm.weight", "LayerNorm.gamma"): v for k, v in state.items()},
    lambda state: state | {"cls.predictions.decoder.bias": state["cls.predictions.bias"].clone()},
    lambda state: state | {"bert.embeddings.position_ids": torch.arange(128)},
    without("decoder.weight"),
])
def test_a_file_and_shards_of_the_same_weights_may_lie_in_one_folder(tmp_path, same):
    saved = make_model(tmp_path, BertForMaskedLM)
    state = weights(tmp_path)
    save_file(same({k: v.clone() for k, v in state.items()}), tmp_path / "model.safetensors")
    for suffix in SHARD_FILES:
        write_shards(tmp_path, suffix, state)
    assert same_weights(saved.state_dict(), BertForMaskedLM.from_pretrained(tmp_path).state_dict())


@pytest.mark.parametrize("other", [
    {"bert.pooler.dense.bias": torch.ones(16)}, {"classifier.weight": torch.ones(3, 16)},
    {"bert.encoder.layer.4.output.dense.bias": torch.zeros(16)},
])
@pytest.mark.parametrize("form", ["model.safetensors", "model.safetensors.index.json",
                                  "pytorch_model.bin.index.json"])
def test_two_forms_of_different_weights_are_an_error_that_names_both(tmp_path, form, other):
    make_model(tmp_path)
    state = weights(tmp_path) | other
    if form == "model.safetensors":
        save_file(state, tmp_path / form)
    else:
        write_shards(tmp_path, Path(form.removesuffix(".index.json")).suffix, state)
    with pytest.raises(UserError, match=rf"pytorch_model\.bin and {form} .*{next(iter(other))}"):
        load_state(tmp_path)


# ------------------------------------------------------------------ shards

SHARD_FILES = {".bin": "pytorch_model", ".safetensors": "model"}


def write_shards(folder, suffix, state, count=3):
    """Write weights as Hugging Face's large models have them; returns the index."""
    names = [f"{SHARD_FILES[suffix]}-{n:05}-of-{count:05}{suffix}" for n in range(1, count + 1)]
    files = {key: names[number % count] for number, key in enumerate(state)}
    for name in names:
        part = {key: state[key].clone() for key in state if files[key] == name}
        save_file(part, folder / name) if suffix != ".bin" else torch.save(part, folder / name)
    index = folder / f"{SHARD_FILES[suffix]}{suffix}.index.json"
    index.write_text(json.dumps({"metadata": {"total_size": 1}, "weight_map": files}))
    return index


@pytest.fixture(params=SHARD_FILES)
def index(request, tmp_path):
    make_model(tmp_path)
    path = write_shards(tmp_path, request.param, weights(tmp_path))
    (tmp_path / "pytorch_model.bin").rename(tmp_path / "whole")
    return path


def test_shards_are_the_whole_model(tmp_path, index):
    loaded = TinyBertForSequenceClassification.from_pretrained(tmp_path)
    whole = torch.load(tmp_path / "whole", weights_only=True)
    assert all(torch.equal(loaded.state_dict()[key], whole[key]) for key in whole)
    record = checkpoint.weights_record(tmp_path)
    shards = list(tmp_path.glob(f"*-of-*{index.name.split('.')[1]}"))
    assert record["bytes_before"] == sum(shard.stat().st_size for shard in shards)
    shards[0].write_bytes(b"")
    assert checkpoint.weights_record(tmp_path) != record


def test_a_shard_that_is_missing_damaged_or_anothers_is_an_error_that_names_it(tmp_path, index):
    shard, other = (next(tmp_path.glob(f"*-0000{number}-of*")) for number in (2, 1))
    content = shard.read_bytes()
    for damage, message in ((shard.unlink, "is not there"),
                            (lambda: shard.write_bytes(content[:-9]), "damaged"),
                            (lambda: shard.write_bytes(other.read_bytes()), "holds other tensors")):
        damage()
        with pytest.raises(UserError, match=message) as error:
            load_state(tmp_path)
        assert shard.name in str(error.value)


@pytest.mark.parametrize("weight_map", [
    {"a": "../model.safetensors"}, {"a": "/etc/passwd"}, {"a": 3}, {}, [], None, {"a": ""},
    {"a": "model.safetensors.index.json"}, {"a": "sub/model.safetensors"},
])
def test_an_index_of_anything_but_this_folders_files_is_an_error_that_names_it(
        tmp_path, index, weight_map):
    index.write_text(json.dumps({"weight_map": weight_map}))
    with pytest.raises(UserError, match=rf"{index.name}: expected a weight_map"):
        load_state(tmp_path)


# ------------------------------------------------------------------ strictness


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16, torch.float64])
def test_weights_that_are_not_finite_are_an_error_that_names_the_tensor(
        tmp_path, capsys, dtype, value):
    make_model(tmp_path / "m", BertForMaskedLM)
    key = "bert.encoder.layer.1.output.dense.weight"

    def change(state):
        state = {k: v.to(dtype) for k, v in state.items()}
        state[key][3, 2] = value
        return state

    rewrite(tmp_path / "m", change)
    for module, *flags in ((fix_teacher_layers, "--models", tmp_path / "m"),
                           (tinybert_6_from_bert, "--bert_model", tmp_path / "m", "--output_dir",
                            tmp_path / "out", "--num_layers", 2)):
        assert f"{key} holds values that are not finite" in error_line(capsys, module, *flags)
    assert not (tmp_path / "out").exists()


def test_large_weights_whose_sum_overflows_are_read(tmp_path):
    make_model(tmp_path / "m", BertModel)
    rewrite(tmp_path / "m", lambda state: {k: torch.full_like(v, 3e38) for k, v in state.items()})
    assert load_state(tmp_path / "m")["bert.pooler.dense.bias"][0] == torch.tensor(3e38)
    rewrite(tmp_path / "m", lambda state: {k: v.double() * 10 for k, v in state.items()})
    with pytest.raises(UserError, match="not finite"):  # in float32, which models have
        load_state(tmp_path / "m")


def test_weights_of_whole_numbers_are_an_error_that_names_the_tensor(tmp_path):
    make_model(tmp_path / "m")
    rewrite(tmp_path / "m", lambda state: {
        k: v.to(torch.int8) if "layer.0.output.dense.weight" in k else v for k, v in state.items()})
    with pytest.raises(UserError, match=r"layer\.0\.output\.dense\.weight is int8; expected float"):
        TinyBertForSequenceClassification.from_pretrained(tmp_path / "m")


def test_one_tensor_under_two_names_must_have_one_value(tmp_path):
    make_model(tmp_path / "m", BertForMaskedLM)
    for name, twin in (("bert.embeddings.LayerNorm.weight", "embeddings.LayerNorm.gamma"),
                       ("cls.predictions.bias", "cls.predictions.decoder.bias")):
        rewrite(tmp_path / "m", lambda state, a=name, b=twin: {**state, b: state[a].clone()})
        BertForMaskedLM.from_pretrained(tmp_path / "m")
        rewrite(tmp_path / "m", lambda state, b=twin: {**state, b: state[b] + 1})
        with pytest.raises(UserError, match=rf"holds {name} twice"):
            load_state(tmp_path / "m")
        rewrite(tmp_path / "m", without(twin))


def test_a_decoder_that_is_said_to_be_its_own_must_be_there_and_equal(tmp_path):
    make_model(tmp_path / "m", BertForMaskedLM, tie_word_embeddings=False)
    rewrite_config(tmp_path / "m", tie_word_embeddings=False)
    model = BertForMaskedLM.from_pretrained(tmp_path / "m")
    assert "tie_word_embeddings" not in model.config.to_dict()  # what we write is tied
    rewrite(tmp_path / "m", without("decoder.weight"))
    with pytest.raises(UserError, match=r"Missing from it: \[cls\.predictions\.decoder\.weight"):
        BertForMaskedLM.from_pretrained(tmp_path / "m")


@pytest.mark.parametrize("part", [
    "encoder.layer.2.", "encoder.layer.3.output.dense.bias", "embeddings.LayerNorm",
    "pooler.", "classifier.", "classifier.bias", "word_embeddings",
])
def test_a_missing_part_is_an_error_that_names_it(tmp_path, part):
    make_model(tmp_path / "m")
    rewrite(tmp_path / "m", without(part))
    with pytest.raises(UserError, match=r"Missing from it: \[.*" + part.replace(".", r"\.")):
        TinyBertForSequenceClassification.from_pretrained(tmp_path / "m")


@pytest.mark.parametrize(("stored", "described", "message"), [
    (3, 2, r"not in the model: \[bert\.encoder\.layer\.2\."),
    (2, 3, r"Missing from it: \[bert\.encoder\.layer\.2\."),
])
def test_more_or_fewer_layers_than_the_config_has_are_an_error_that_names_them(
    tmp_path, stored, described, message
):
    make_model(tmp_path / "m", num_hidden_layers=stored)
    rewrite_config(tmp_path / "m", num_hidden_layers=described)
    with pytest.raises(UserError, match=message):
        TinyBertForSequenceClassification.from_pretrained(tmp_path / "m")


def test_the_masked_lm_head_must_be_there(tmp_path):
    make_model(tmp_path / "m")  # what the original saved: a body without MLM head
    with pytest.raises(UserError, match=r"Missing from it: \[cls\."):
        BertForMaskedLM.from_pretrained(tmp_path / "m")


def test_a_new_masked_lm_head_can_be_asked_for(tmp_path):
    body = make_model(tmp_path / "m")
    model = BertForMaskedLM.from_pretrained(tmp_path / "m", new_head=True)
    assert same_weights(model.bert.state_dict(), body.bert.state_dict())
    assert model.cls.predictions.decoder.weight is model.bert.embeddings.word_embeddings.weight
    assert model(torch.tensor([[5, 6]])).logits.isfinite().all()


def test_a_new_head_does_not_excuse_a_missing_layer(tmp_path):
    make_model(tmp_path / "m", BertModel)
    rewrite(tmp_path / "m", without("encoder.layer.1."))
    for model_class in (BertForMaskedLM, TinyBertForSequenceClassification):
        with pytest.raises(UserError, match=r"encoder\.layer\.1\."):
            model_class.from_pretrained(tmp_path / "m", new_head=True)


@pytest.mark.parametrize("part", ["classifier.bias", "fit_dense.weight"])
def test_half_a_head_is_an_error_even_where_the_whole_may_be_missing(tmp_path, part):
    make_model(tmp_path / "m", model_arguments={"fit_size": 20})
    rewrite(tmp_path / "m", without(part))
    with pytest.raises(UserError, match=part.replace(".", r"\.")):
        TinyBertForSequenceClassification.from_pretrained(tmp_path / "m", new_head=True)


def test_a_new_classifier_can_be_asked_for_and_only_then(tmp_path):
    make_model(tmp_path / "m", BertModel)
    with pytest.raises(UserError, match=r"classifier"):
        TinyBertForSequenceClassification.from_pretrained(tmp_path / "m")
    model = TinyBertForSequenceClassification.from_pretrained(
        tmp_path / "m", new_head=True, num_labels=3)
    assert model.classifier.weight.shape == (3, 16)


@pytest.mark.parametrize(("wanted", "message"), [
    ({"num_labels": 3, "new_head": True}, "2 labels; expected 3"),
    ({"fit_size": 24}, r"fit_dense.weight is \[20, 16\] in the checkpoint, \[24, 16\]"),
])
def test_a_stored_head_of_another_size_is_an_error_that_names_both(tmp_path, wanted, message):
    make_model(tmp_path / "m", model_arguments={"fit_size": 20})
    with pytest.raises(UserError, match=message):
        TinyBertForSequenceClassification.from_pretrained(tmp_path / "m", **wanted)


def test_the_size_of_the_stored_classifier_wins_over_the_config(tmp_path):
    make_model(tmp_path / "m", labels=("a", "b", "c"))
    rewrite_config(tmp_path / "m", num_labels=None, id2label=None, label2id=None)
    model = TinyBertForSequenceClassification.from_pretrained(tmp_path / "m")
    assert model.config.num_labels == 3


@pytest.mark.parametrize(("field", "value"), [
    ("hidden_size", 32), ("intermediate_size", 32), ("vocab_size", 99),
    ("max_position_embeddings", 64), ("type_vocab_size", 3),
])
def test_a_tensor_of_another_shape_is_an_error_that_names_both_shapes(tmp_path, field, value):
    make_model(tmp_path / "m")
    rewrite_config(tmp_path / "m", **{field: value})
    with pytest.raises(UserError, match=r"is \[.*\] in the checkpoint,\s*\[.*\] in the model"):
        BertModel.from_pretrained(tmp_path / "m")


def test_a_failed_load_leaves_no_half_filled_model(tmp_path):
    make_model(tmp_path / "m", hidden_size=16)
    model = BertModel(tiny_config(intermediate_size=40))
    before = {k: v.clone() for k, v in model.state_dict().items()}
    with pytest.raises(UserError):
        checkpoint.load_weights(model, load_state(tmp_path / "m"), "m")
    assert same_weights(before, model.state_dict())


# ------------------------------------------------------------------ damaged files


def legacy_bytes(state) -> bytes:
    """The format of the published BERT files: a pickle without zip around it."""
    buffer = io.BytesIO()
    torch.save(state, buffer, _use_new_zipfile_serialization=False)
    return buffer.getvalue()


@pytest.mark.parametrize("kind", ["zip", "pickle", "safetensors"])
def test_a_file_truncated_anywhere_is_an_error_that_names_it(tmp_path, kind):
    make_model(tmp_path, num_hidden_layers=1)
    path = tmp_path / "pytorch_model.bin"
    if kind == "pickle":
        path.write_bytes(legacy_bytes(weights(tmp_path)))
    if kind == "safetensors":
        save_file(weights(tmp_path), tmp_path / "model.safetensors")
        path.unlink()
        path = tmp_path / "model.safetensors"
    TinyBertForSequenceClassification.from_pretrained(tmp_path)
    content = path.read_bytes()
    lengths = [*range(0, 300, 13), *range(300, len(content), len(content) // 25),
               len(content) - 1]
    for length in lengths:
        path.write_bytes(content[:length])
        with pytest.raises(UserError, match=rf"{path.name}: damaged"):
            load_state(tmp_path)


@pytest.mark.parametrize("content", [
    b"<html>404 Not Found</html>", b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n",
    b"PK\x03\x04", pickle.dumps({"a": 1}, protocol=2), b"\x80\x02.", b"\x00" * 100,
])
def test_a_file_that_is_no_checkpoint_is_an_error_that_names_it(tmp_path, content):
    (tmp_path / "pytorch_model.bin").write_bytes(content)
    with pytest.raises(UserError, match=r"pytorch_model\.bin"):
        load_state(tmp_path)


@pytest.mark.parametrize(("value", "message"), [
    ([torch.ones(2)], "dictionary of tensors"),
    ({1: torch.ones(2)}, "dictionary of tensors"),
    ({"a": 3}, "dictionary of tensors"),
    (torch.ones(2), "dictionary of tensors"),
    ({"model": {"bert.x": torch.ones(1)}}, "dictionary of tensors"),
    (torch.nn.Linear(2, 2), "damaged, or not a file of weights"),  # code, which is not run
], ids=["list", "numbered", "number", "tensor", "nested", "code"])
def test_a_file_of_something_else_is_an_error_that_names_it(tmp_path, value, message):
    torch.save(value, tmp_path / "pytorch_model.bin")
    with pytest.raises(UserError, match=rf"pytorch_model\.bin: .*{message}"):
        load_state(tmp_path)


def test_missing_folder_and_missing_weights_are_told_apart(tmp_path):
    with pytest.raises(UserError, match=r"nowhere: no such model directory"):
        load_state(tmp_path / "nowhere")
    with pytest.raises(UserError, match=r"no weights; expected pytorch_model\.bin"):
        load_state(tmp_path)


# ------------------------------------------------------------------ saving


def test_a_saved_folder_has_what_hugging_face_expects(tmp_path):
    make_model(tmp_path / "m", labels=("no", "yes"))
    assert sorted(p.name for p in (tmp_path / "m").iterdir()) == [
        "config.json", "pytorch_model.bin", "tokenizer.json", "tokenizer_config.json", "vocab.txt"]
    config = json.loads((tmp_path / "m" / "config.json").read_text())
    assert config["model_type"] == "bert"
    assert config["architectures"] == ["BertForSequenceClassification"]
    assert config["id2label"] == {"0": "no", "1": "yes"}
    assert config["label2id"] == {"no": 0, "yes": 1}


def test_a_save_that_fails_leaves_the_old_file_and_nothing_else(tmp_path, monkeypatch):
    make_model(tmp_path / "m")
    before = {p.name: p.read_bytes() for p in (tmp_path / "m").iterdir()}
    really_save = torch.save

    def half_way(value, path):
        really_save(value, path)
        raise OSError("No space left on device")

    monkeypatch.setattr(torch, "save", half_way)
    with pytest.raises(OSError, match="No space"):
        checkpoint.save_weights(BertModel(tiny_config()), tmp_path / "m" / "pytorch_model.bin")
    assert {p.name: p.read_bytes() for p in (tmp_path / "m").iterdir()} == before


def test_equal_models_are_saved_as_equal_bytes(tmp_path):
    save_pretrained(make_model(tmp_path / "a"), tmp_path / "b")
    make_model(tmp_path / "c")
    first, *others = ((tmp_path / n / "pytorch_model.bin").read_bytes() for n in "abc")
    assert [first, first] == others


@pytest.mark.parametrize("per_layer", [False, True])
def test_a_finished_classifier_is_saved_without_the_map_to_the_teachers_width(
        tmp_path, per_layer, caplog):
    caplog.set_level("INFO")
    arguments = {"fit_size": 20, "per_layer_fit": per_layer}
    student = make_model(tmp_path / "m", model_arguments=arguments)
    assert any("fit_dense" in key for key in weights(tmp_path / "m"))
    save_pretrained(student, tmp_path / "m")
    expected = {k: v for k, v in student.state_dict().items() if "fit_dense" not in k}
    assert same_weights(weights(tmp_path / "m"), expected)
    again = TinyBertForSequenceClassification.from_pretrained(tmp_path / "m")
    assert again.fit_dense.weight.shape == (16, 16) and "fit_dense" not in caplog.text
    again = TinyBertForSequenceClassification.from_pretrained(tmp_path / "m", fit_size=20)
    assert again.fit_dense.weight.shape == (20, 16)
    assert "newly initialised: fit_dense.bias, fit_dense.weight" in caplog.text


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
def test_the_config_says_what_the_weights_are_and_not_what_another_programs_were(tmp_path, dtype):
    model = make_model(tmp_path / "m", dtype="float64", torch_dtype="float16", _name_or_path="/a/b",
                       attn_implementation="flash_attention_2", finetuning_task="rte")
    save_pretrained(model.to(getattr(torch, dtype)), tmp_path / "m")
    config = json.loads((tmp_path / "m" / "config.json").read_text())
    assert config["dtype"] == dtype and config["finetuning_task"] == "rte"
    assert not {"torch_dtype", "_name_or_path", "attn_implementation"} & config.keys()
    tinybert_6_from_bert.make_student(tmp_path / "m", tmp_path / "s", 2, None, False)
    assert json.loads((tmp_path / "s" / "config.json").read_text())["dtype"] == dtype
    assert {v.dtype for v in weights(tmp_path / "s").values()} == {getattr(torch, dtype)}


# ------------------------------------------------------------------ config.json


ILLEGAL = {
    **dict.fromkeys(["hidden_size", "num_hidden_layers", "vocab_size", "type_vocab_size"],
                    [None, "768", 0, -1, 1.5, True, [12], float("nan")]),
    **dict.fromkeys(["hidden_dropout_prob", "attention_probs_dropout_prob", "layer_norm_eps",
                     "initializer_range"], [None, "0.1", -0.1, 1.5, True, float("nan"), {}]),
    "hidden_act": [None, "mish", 3, ["gelu"], True], "pooler_act": [None, "no_such", []],
    "classifier_relu": [None, "false", 0, 1], "pad_token_id": ["0", 31, True, 0.5],
    "problem_type": ["other", 3, [], False], "num_labels": ["2", -1, 2.0, True],
}


@pytest.mark.parametrize(("field", "value"), [
    (field, value) for field, values in ILLEGAL.items() for value in values])
def test_an_illegal_value_is_an_error_that_names_the_file_and_the_field(tmp_path, field, value):
    make_model(tmp_path)
    values = json.loads((tmp_path / "config.json").read_text()) | {field: value}
    (tmp_path / "config.json").write_text(json.dumps(values))
    with pytest.raises(UserError, match=rf"config\.json: {field} is .*; expected"):
        BertModel.from_pretrained(tmp_path)


@pytest.mark.parametrize(("field", "value", "neutral"), [
    ("is_decoder", True, False), ("add_cross_attention", True, False),
    ("position_embedding_type", "relative_key_query", "absolute"),
    ("pruned_heads", {"0": [1]}, {}), ("quantization_config", {"load_in_8bit": True}, None),
    ("per_layer_config", {"0": {"hidden_act": "relu"}}, {}),
    ("auto_map", {"AutoModel": "modeling_x.XModel"}, None),
])
def test_a_field_that_changes_the_computation_is_refused_by_name(tmp_path, field, value, neutral):
    for legal in (neutral, None):
        config_folder(tmp_path, **{field: legal})
        BertModel.from_scratch(tmp_path)
    config_folder(tmp_path)
    rewrite_config(tmp_path, **{field: value})
    with pytest.raises(UserError, match=rf"config\.json: {field} is .* changes what a BERT"):
        BertModel.from_scratch(tmp_path)


@pytest.mark.parametrize(("tables", "names"), [
    ({"id2label": {"0": "no", "1": "yes"}}, ["no", "yes"]),
    ({"id2label": {"1": "yes", "0": "no"}, "label2id": None}, ["no", "yes"]),
    ({"id2label": {"0": 0, "1": 1}, "label2id": {"0": 0, "1": 1}}, ["0", "1"]),
    ({"id2label": {"0": 1.5, "1": "x"}}, ["1.5", "x"]),
    ({"id2label": {"0": "no", "1": "yes"}, "label2id": {"LABEL_0": 0, "LABEL_1": 1}},
     ["no", "yes"]),
    ({"label2id": {"yes": 1, "no": "0"}}, ["no", "yes"]),
    ({"id2label": {"0": "LABEL_0", "1": "LABEL_1"}, "label2id": {"yes": 1, "no": 0}},
     ["no", "yes"]),
    ({"num_labels": 3}, ["LABEL_0", "LABEL_1", "LABEL_2"]), ({"id2label": None}, ["LABEL_0",
                                                                                 "LABEL_1"]),
    ({"id2label": {"0": "a"}, "num_labels": 2}, ["a"]),
])
def test_legal_label_tables_are_obeyed(tables, names):
    config = tiny_config(**tables)
    assert config.id2label == dict(enumerate(names)) and config.num_labels == len(names)
    assert config.label2id == {name: number for number, name in enumerate(names)}
    assert tiny_config(**config.to_dict()) == config


@pytest.mark.parametrize("tables", [
    {"id2label": {"1": "negative", "2": "positive"}}, {"id2label": {"0": "a", "2": "b"}},
    {"id2label": ["a", "b"]}, {"id2label": {"a": "0", "b": "1"}}, {"id2label": "a"},
    {"id2label": {"0": "a", "1": "a"}}, {"id2label": {"0": "1", "1": 1}}, {"id2label": 5},
    {"id2label": {"0": None, "1": "a"}}, {"id2label": {"0": True, "1": False}},
    {"id2label": {"0": ["a"], "1": "b"}}, {"id2label": {"0": "a", "00": "b"}},
    {"id2label": {"0": "a", "1": "b"}, "label2id": {"b": 0, "a": 1}},
    {"id2label": {"0": "a", "1": "b"}, "label2id": {"a": 0, "b": 1, "c": 2}},
    {"label2id": {"a": 1, "b": 2}}, {"label2id": {"a": 0, "b": 0}}, {"label2id": {"a": None}},
    {"label2id": ["a"]}, {"label2id": {"a": "x"}},
])
def test_illegal_label_tables_are_an_error_that_names_the_file_and_the_table(tmp_path, tables):
    config_folder(tmp_path)
    rewrite_config(tmp_path, id2label=None, label2id=None, num_labels=None)
    rewrite_config(tmp_path, **tables)
    with pytest.raises(UserError, match=r"config\.json: (id2label|label2id) is .*; expected"):
        BertModel.from_scratch(tmp_path)


@pytest.mark.parametrize(("labels", "problem_type"), [
    (3, "multi_label_classification"), (2, "regression"), (1, "multi_label_classification")])
def test_a_classifier_of_another_kind_is_refused_where_rows_have_one_label(
        tmp_path, labels, problem_type):
    make_model(tmp_path, num_labels=labels, problem_type=problem_type)
    model = TinyBertForSequenceClassification.from_pretrained(tmp_path)
    assert model.config.to_dict()["problem_type"] == problem_type
    with pytest.raises(UserError, match=rf"problem_type is '{problem_type}' with {labels} labels"):
        TinyBertForSequenceClassification.from_pretrained(tmp_path, num_labels=labels)
    model.renew_classifier(labels)
    assert model.config.problem_type == ("regression" if labels == 1 else None)


def test_one_label_is_a_regression_and_cannot_be_a_choice():
    assert tiny_config(num_labels=1).to_dict()["problem_type"] == "regression"
    assert "problem_type" not in tiny_config(num_labels=2).to_dict()
    with pytest.raises(UserError, match="one label; expected 'regression'"):
        tiny_config(num_labels=1, problem_type="single_label_classification")


def test_named_labels_must_be_as_many_as_the_stored_classifier_has(tmp_path):
    make_model(tmp_path)
    rewrite_config(tmp_path, id2label={"0": "a", "1": "b", "2": "c"}, label2id=None)
    with pytest.raises(UserError, match=r"has 2 labels; its config\.json names 3"):
        TinyBertForSequenceClassification.from_pretrained(tmp_path)
    assert BertModel.from_pretrained(tmp_path)  # which has no classifier


@pytest.mark.parametrize("text", [
    "{", "[]", "5", '{"num_attention_heads": 0}', '{"hidden_size": "wide"}', '{"vocab_size": -1}',
    '{"id2label": [1]}', '{"hidden_size": 10, "num_attention_heads": 3}',
    '{"hidden_act": "no_such"}', '{"model_type": "deberta"}',
    '{"architectures": ["BertForMultipleChoice"]}',
])
def test_a_config_that_is_no_bert_is_an_error_that_names_the_file(tmp_path, text):
    with pytest.raises(UserError, match=r"config\.json: no such file"):
        BertModel.from_scratch(tmp_path)
    (tmp_path / "config.json").write_text(text)
    with pytest.raises(UserError, match=r"config\.json"):
        BertModel.from_scratch(tmp_path)


def test_fields_of_others_survive_loading_and_saving(tmp_path):
    make_model(tmp_path / "a", BertModel, classifier_dropout=0.3, transformers_version="4.0")
    save_pretrained(BertModel.from_pretrained(tmp_path / "a"), tmp_path / "b")
    config = json.loads((tmp_path / "b" / "config.json").read_text())
    assert config["classifier_dropout"] == 0.3


# ------------------------------------------------------------------ states of a run


def test_the_newest_two_states_are_kept_and_the_newest_is_read(tmp_path):
    assert load_training_state(tmp_path) is None
    for step in (3, 20, 100):
        save_training_state(tmp_path, step, {"step": step, "weight": torch.full((2,), step)})
    names = sorted(path.name for path in (tmp_path / "training_state").iterdir())
    assert names == ["step_0000000020.pt", "step_0000000100.pt"]
    state = load_training_state(tmp_path)
    assert state["step"] == 100 and state["weight"].tolist() == [100, 100]
    remove_training_states(tmp_path)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("where", ["tensor", "archive's directory"])
def test_a_damaged_state_gives_way_to_the_one_before_it(tmp_path, caplog, where):
    for step in (1, 2):
        save_training_state(tmp_path, step, {"step": step, "weight": torch.ones(100)})
    newest = tmp_path / "training_state" / "step_0000000002.pt"
    content = bytearray(newest.read_bytes())
    # Neither would torch.load itself see: within the tensor, or one part called a folder.
    place = (content.index(b"\x00\x00\x80\x3f" * 20) + 40 if where == "tensor"
             else content.index(b"PK\x01\x02") + 38)
    content[place] ^= 16
    newest.write_bytes(content)
    assert load_training_state(tmp_path)["step"] == 1
    assert "step_0000000002.pt: damaged" in caplog.text
    # It is no longer the newest: those that follow are kept, although their steps may be fewer.
    save_training_state(tmp_path, 1, {"step": 1})
    assert load_training_state(tmp_path)["step"] == 1
    remove_training_states(tmp_path)
    assert not list(tmp_path.iterdir())

"""Reading and writing model folders: strict, atomic, in every dialect."""

import io
import json
import pickle

import pytest
import torch
from helpers import make_model, same_weights, tiny_config, weights
from safetensors.torch import save_file

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


# ------------------------------------------------------------------ strictness


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
    make_model(tmp_path / "m")
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
        "config.json", "pytorch_model.bin", "tokenizer_config.json", "vocab.txt"]
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


# ------------------------------------------------------------------ config.json


@pytest.mark.parametrize("text", [
    "{", "[]", "5", '{"num_attention_heads": 0}', '{"hidden_size": "wide"}', '{"vocab_size": -1}',
    '{"id2label": [1]}', '{"hidden_size": 10, "num_attention_heads": 3}',
    '{"hidden_act": "no_such"}', '{"model_type": "roberta"}',
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

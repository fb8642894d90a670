"""Relatives of BERT are computed as Hugging Face does, and written back as what they are."""

import json
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
import transformers
from helpers import error_line, random_batch, read_json, run, tiny_config, write_vocab
from hypothesis import given, settings
from hypothesis import strategies as st
from relatives import SHAPES, batch_of, change_config, their_config, their_inputs, their_model
from safetensors.torch import load_file, save_file
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.masking_utils import sdpa_mask

import fix_teacher_layers
from transformer.checkpoint import save_pretrained
from transformer.config import BertConfig, is_supported
from transformer.families import FAMILIES, our_key, their_key
from transformer.file_utils import UserError
from transformer.modeling import (
    BertForMaskedLM,
    BertForQuestionAnswering,
    BertModel,
    TinyBertForPreTraining,
    TinyBertForSequenceClassification,
)

each_family = pytest.mark.parametrize("shape", SHAPES)


class Recorder(NamedTuple):
    """What goes through a Hugging Face model as a keyword and collects its raw scores."""

    scores: list


def attend(module, query, key, value, attention_mask=None, dropout=0.0, scaling=None,
           recorder=None, **kwargs):
    """Attention of a Hugging Face model that also records the scores before the softmax."""
    scores = query @ key.transpose(2, 3) * scaling
    hidden = torch.zeros_like(scores[:, :1], dtype=torch.bool) if attention_mask is None else (
        ~attention_mask)
    recorder.scores.append(scores - 10000.0 * hidden)
    probabilities = scores.masked_fill(hidden, torch.finfo(scores.dtype).min).softmax(-1)
    return (probabilities @ value).transpose(1, 2).contiguous(), probabilities


AttentionInterface.register("recorded_scores", attend)
AttentionMaskInterface.register("recorded_scores", sdpa_mask)


def close(found, expected, tolerance=1e-5):
    torch.testing.assert_close(found, expected, atol=tolerance, rtol=0)


# ------------------------------------------------------------------ the same numbers


@each_family
@torch.no_grad()
def test_logits_hidden_states_and_scores_are_hugging_faces(tmp_path, shape):
    eager = their_model(tmp_path, shape, num_labels=3)
    inputs = batch_of(eager.config)
    ids, segments, mask = inputs
    recorder = Recorder([])
    recorded = transformers.AutoModelForSequenceClassification.from_pretrained(
        tmp_path, attn_implementation="recorded_scores").eval()
    given = their_inputs(eager.config, *inputs)
    expected = recorded(**given, output_hidden_states=True, recorder=recorder)
    ours = TinyBertForSequenceClassification.from_pretrained(tmp_path).eval()
    found = ours(*inputs)
    real = mask.bool()
    close(found.logits, expected.logits)
    assert len(found.hidden_states) == len(expected.hidden_states) == 5
    for mine, theirs in zip(found.hidden_states, expected.hidden_states, strict=True):
        close(mine[real], theirs[real])
    eager = transformers.AutoModelForSequenceClassification.from_pretrained(
        tmp_path, attn_implementation="eager").eval()
    attentions = eager(**given, output_attentions=True).attentions
    for mine, theirs, probabilities in zip(
            found.attention_scores, recorder.scores, attentions, strict=True):
        queries = real[:, None].expand(-1, 2, -1)
        # A mask added to a float32 score of about 10 leaves it 3 digits after the point.
        close((mine * mask[:, None, None])[queries], (theirs * mask[:, None, None])[queries])
        assert (mine[queries][~real[:, None, None].expand(-1, 2, 11, -1)[queries]] < -9000).all()
        close(mine.softmax(-1)[queries], probabilities[queries])


@each_family
@torch.no_grad()
def test_a_span_head_and_a_bare_encoder_are_hugging_faces(tmp_path, shape):
    theirs = their_model(tmp_path / "spans", shape, "QuestionAnswering")
    inputs = batch_of(theirs.config)
    real, given = inputs[2].bool(), their_inputs(theirs.config, *inputs)
    expected = theirs(**given)
    found = BertForQuestionAnswering.from_pretrained(tmp_path / "spans").eval()(*inputs).logits
    close(found[real], torch.stack([expected.start_logits, expected.end_logits], dim=-1)[real])
    theirs = their_model(tmp_path / "bare", shape, "")
    expected = theirs(**given)
    found = BertModel.from_pretrained(tmp_path / "bare").eval()(*inputs)
    close(found.hidden_states[-1][real], expected.last_hidden_state[real])
    pooled = expected.get("pooler_output")
    assert (pooled is None) == (found.pooled_output is None)
    if pooled is not None:
        close(found.pooled_output, pooled)


@each_family
@torch.no_grad()
def test_padding_in_the_batch_does_not_change_real_rows(tmp_path, shape):
    theirs = their_model(tmp_path, shape)
    model = TinyBertForSequenceClassification.from_pretrained(tmp_path).eval()
    ids, segments, mask = batch_of(theirs.config, rows=1, length=9)
    longer = (torch.nn.functional.pad(ids, (0, 7), value=theirs.config.pad_token_id),
              torch.nn.functional.pad(segments, (0, 7)), torch.nn.functional.pad(mask, (0, 7)))
    close(model(*longer).logits, model(ids, segments, mask).logits)
    close(model(*longer).logits, theirs(**their_inputs(theirs.config, *longer)).logits)


@pytest.mark.parametrize("shape", ["roberta", "distilbert"])
@torch.no_grad()
def test_a_model_of_one_type_of_segments_reads_none(tmp_path, shape):
    their_model(tmp_path, shape)
    model = TinyBertForSequenceClassification.from_pretrained(tmp_path).eval()
    ids, segments, mask = random_batch()
    assert segments.any()
    assert torch.equal(model(ids, segments, mask).logits,
                       model(ids, torch.zeros_like(ids), mask).logits)


@torch.no_grad()
def test_the_last_position_of_a_roberta_is_hugging_faces_and_one_more_is_refused(tmp_path):
    theirs = their_model(tmp_path, "roberta", max_position_embeddings=514, num_hidden_layers=1)
    model = TinyBertForSequenceClassification.from_pretrained(tmp_path).eval()
    ids, segments, mask = batch_of(theirs.config, rows=2, length=512)
    close(model(ids, segments, mask).logits,
          theirs(input_ids=ids, attention_mask=mask).logits)
    with pytest.raises(UserError, match="--max_seq_length 513; the model has 512 positions"):
        model(*batch_of(theirs.config, rows=1, length=513))
    with pytest.raises(UserError, match="--max_seq_length 513; roberta has 512 positions"):
        model.config.check_length(513, "roberta")


# ------------------------------------------------------------------ written back


def load_theirs(folder: Path):
    """Load a folder as Hugging Face does; every parameter must come from it and be used."""
    model, info = transformers.AutoModelForSequenceClassification.from_pretrained(
        folder, output_loading_info=True)
    assert not any(info.values()), info
    return model.eval()


@each_family
def test_a_trained_model_is_written_back_as_what_it_is(tmp_path, shape):
    theirs = their_model(tmp_path / "a", shape, id2label={0: "no", 1: "yes", 2: "maybe"},
                         label2id={"no": 0, "yes": 1, "maybe": 2})
    ours = TinyBertForSequenceClassification.from_pretrained(tmp_path / "a").train()
    inputs = batch_of(theirs.config)
    optimizer = torch.optim.SGD(ours.parameters(), lr=0.1)
    torch.nn.functional.cross_entropy(
        ours(*inputs).logits, torch.tensor([0, 1, 2, 1])).backward()
    optimizer.step()
    save_pretrained(ours.eval(), tmp_path / "b")
    again = load_theirs(tmp_path / "b")
    assert type(again) is type(theirs)
    logits = ours(*inputs).logits
    close(again(**their_inputs(theirs.config, *inputs)).logits, logits, 2e-6)
    assert (logits - theirs(**their_inputs(theirs.config, *inputs)).logits).abs().max() > 1e-3
    reloaded = TinyBertForSequenceClassification.from_pretrained(tmp_path / "b").eval()
    close(reloaded(*inputs).logits, logits, 2e-6)
    before, after = (transformers.AutoConfig.from_pretrained(tmp_path / name).to_dict()
                     for name in "ab")
    different = {key for key in before if before[key] != after.get(key)}
    assert different <= {"_name_or_path", "transformers_version", "dtype"}, different
    assert read_json(tmp_path / "b" / "config.json")["architectures"] == [type(theirs).__name__]


@each_family
def test_untrained_weights_are_written_back_bit_for_bit(tmp_path, shape):
    their_model(tmp_path / "a", shape)
    save_pretrained(TinyBertForSequenceClassification.from_pretrained(tmp_path / "a"),
                    tmp_path / "b")
    before, after = (transformers.AutoModelForSequenceClassification.from_pretrained(
        tmp_path / name).state_dict() for name in "ab")
    assert before.keys() == after.keys()
    padded = FAMILIES[SHAPES[shape][0]].padded_positions
    for key, tensor in before.items():
        if padded and "position_embeddings" in key:  # rows that no token reads
            rows = their_config(shape).pad_token_id + 1
            tensor, after[key] = tensor[rows:], after[key][rows:]
        assert torch.equal(tensor, after[key]), key


@given(family=st.sampled_from(sorted(FAMILIES)), heads=st.integers(1, 4), width=st.integers(1, 6),
       layers=st.integers(1, 7), vocab=st.integers(10, 40), pad=st.integers(0, 9),
       positions=st.integers(11, 60), embedding=st.integers(1, 30), groups=st.integers(1, 7),
       labels=st.integers(1, 5))
@settings(max_examples=60, deadline=None)
def test_every_shape_of_config_comes_and_goes(
        family, heads, width, layers, vocab, pad, positions, embedding, groups, labels):
    values = {"hidden_size": heads * width, "num_attention_heads": heads, "vocab_size": vocab,
              "num_hidden_layers": layers, "max_position_embeddings": positions,
              "pad_token_id": pad, "num_labels": labels}
    if family in ("electra", "albert"):
        values["embedding_size"] = embedding
    if family == "albert":
        values["num_hidden_groups"] = min(groups, layers)
    theirs = transformers.CONFIG_MAPPING[family](**values).to_dict()
    ours = BertConfig.from_dict(theirs)
    assert ours.model_type == ours.family == family
    written = ours.to_dict()
    assert BertConfig.from_dict(written).to_dict() == written
    again = transformers.CONFIG_MAPPING[family](**written).to_dict()
    skipped = {"transformers_version", "architectures", "dtype", "problem_type"}
    assert {key: value for key, value in again.items() if key not in skipped} == {
        key: value for key, value in theirs.items() if key not in skipped}


@pytest.mark.parametrize("name", FAMILIES)
def test_a_config_without_its_fields_has_hugging_faces_defaults(name):
    """Files of early versions lack fields that came later."""
    theirs = BertConfig.from_dict(transformers.CONFIG_MAPPING[name]().to_dict())
    ours = BertConfig.from_dict({"model_type": name})
    ours.other = theirs.other
    assert ours == theirs


@each_family
def test_names_of_weights_map_one_to_one(tmp_path, shape):
    name = SHAPES[shape][0]
    their_model(tmp_path, shape)
    model = TinyBertForSequenceClassification.from_pretrained(tmp_path)
    for has_classifier in (True, False):
        for key in model.state_dict():
            if has_classifier or not key.startswith("classifier."):
                assert our_key(name, their_key(name, key, has_classifier)) == key
    names = [their_key(name, key) for key in model.state_dict()]
    assert len({*names}) == len(names)


@pytest.mark.parametrize("shape", ["roberta", "electra, narrow embeddings", "albert", "distilbert"])
@torch.no_grad()
def test_a_general_student_of_a_family_comes_back_with_its_map(tmp_path, shape):
    their_model(tmp_path / "a", shape)
    config = BertConfig.from_json_file(tmp_path / "a" / "config.json")
    student = TinyBertForPreTraining(config, fit_size=20).eval()
    save_pretrained(student, tmp_path / "b", finished=False)
    again = TinyBertForPreTraining.from_pretrained(tmp_path / "b").eval()
    inputs = random_batch()
    for found, expected in zip(
            again(*inputs).hidden_states, student(*inputs).hidden_states, strict=True):
        close(found, expected)
    classifier = TinyBertForSequenceClassification.from_pretrained(
        tmp_path / "b", new_head=True, num_labels=5)
    save_pretrained(classifier, tmp_path / "c")
    assert load_theirs(tmp_path / "c").config.num_labels == 5


# ------------------------------------------------------------------ read or refused


def change_weights(folder: Path, change) -> None:
    """Apply `change` to the weights in a folder that Hugging Face wrote."""
    save_file(change(load_file(folder / "model.safetensors")), folder / "model.safetensors",
              metadata={"format": "pt"})


def without(part: str):
    return lambda state: {key: value for key, value in state.items() if part not in key}


def refusal(folder: Path, **arguments) -> str:
    """Return the one line with which a classifier is refused."""
    with pytest.raises(UserError) as error:
        TinyBertForSequenceClassification.from_pretrained(folder, **arguments)
    assert "\n" not in str(error.value) and str(folder) in str(error.value)
    return str(error.value)


@pytest.mark.parametrize(("shape", "part", "told"), [
    ("roberta", "encoder.layer.2.", "bert.encoder.layer.2."),
    ("electra", "encoder.layer.3.output.dense.bias", "bert.encoder.layer.3.output.dense.bias"),
    ("electra, narrow embeddings", "embeddings_project", "bert.embeddings.project.weight"),
    ("albert, two groups", "layer_groups.1.", "bert.encoder.layer.1."),
    ("albert", "albert.pooler", "bert.pooler.dense."),
    ("distilbert", "q_lin", "attention.self.query"),
    ("distilbert", "pre_classifier", "bert.pooler.dense."),
    ("roberta", "classifier.dense", "bert.pooler.dense."),
    ("roberta", "classifier.out_proj", "classifier.weight"),
    *((shape, "classifier", "classifier.weight") for shape in ("roberta", "electra", "albert")),
])
def test_what_is_missing_is_named(tmp_path, shape, part, told):
    their_model(tmp_path, shape)
    change_weights(tmp_path, without(part))
    message = refusal(tmp_path)
    assert "Missing from it" in message and told in message


@pytest.mark.parametrize(("shape", "fields", "told"), [
    ("albert", {"inner_group_num": 2}, "inner_group_num is 2, which changes"),
    ("albert", {"num_hidden_groups": 5}, "num_hidden_groups is 5; expected at most"),
    ("albert", {"num_hidden_groups": 0}, "num_hidden_groups is 0; expected a whole number"),
    ("roberta", {"model_type": "deberta"}, "model_type is 'deberta'; expected 'bert' or a rel"),
    ("roberta", {"position_embedding_type": "relative_key"}, "position_embedding_type is"),
    ("electra", {"position_embedding_type": "relative_key_query"}, "position_embedding_type is"),
    ("roberta", {"is_decoder": True}, "is_decoder is"),
    ("roberta", {"pad_token_id": None}, "pad_token_id is None; expected"),
    ("roberta", {"pad_token_id": -1}, "pad_token_id is -1; expected"),
    ("roberta", {"max_position_embeddings": 2}, "max_position_embeddings is 2; expected more"),
    ("roberta", {"max_position_embeddings": "2"}, "max_position_embeddings is '2'; expected"),
    ("electra", {"embedding_size": 0}, "embedding_size is 0; expected a whole number from 1"),
    ("distilbert", {"activation": "softplus"}, "hidden_act is 'softplus'; expected one of"),
    ("electra", {"embedding_size": 5}, "Missing from it: [bert.embeddings.project."),
    ("roberta", {"max_position_embeddings": 50}, "position_embeddings.weight is [38, 16]"),
    ("distilbert", {"architectures": ["DistilBertForMultipleChoice"]}, "architectures is"),
])
def test_a_model_that_computes_something_else_is_refused_in_one_line(
        tmp_path, shape, fields, told):
    their_model(tmp_path, shape)
    change_config(tmp_path, **fields)
    assert told in refusal(tmp_path)


@pytest.mark.parametrize("fields", [
    {"embedding_size": 7, "num_hidden_groups": 2}, {"classifier_dropout": 0.4},
    {"summary_type": "mean", "summary_use_proj": False}, {"gap_size": 3, "net_structure_type": 1},
    {"position_embedding_type": "absolute"}, {"use_cache": False}, {"bos_token_id": 7},
    {"tie_word_embeddings": False}], ids=lambda fields: next(iter(fields)))
@torch.no_grad()
def test_fields_that_change_nothing_are_read_and_kept(tmp_path, fields):
    theirs = their_model(tmp_path / "a", "roberta")
    change_config(tmp_path / "a", **fields)
    ours = TinyBertForSequenceClassification.from_pretrained(tmp_path / "a").eval()
    inputs = batch_of(theirs.config)
    close(ours(*inputs).logits, theirs(**their_inputs(theirs.config, *inputs)).logits)
    save_pretrained(ours, tmp_path / "b")
    written = read_json(tmp_path / "b" / "config.json")
    assert fields.get("bos_token_id", 0) == written["bos_token_id"]
    close(load_theirs(tmp_path / "b")(**their_inputs(theirs.config, *inputs)).logits,
          ours(*inputs).logits)


@pytest.mark.parametrize(("shape", "kind", "told"), [
    ("roberta", "TokenClassification", "expected classifier.out_proj."),
    ("electra", "TokenClassification", "expected classifier.out_proj."),
    ("albert", "TokenClassification", "bert.pooler.dense."),
    ("distilbert", "TokenClassification", "bert.pooler.dense."),
    ("roberta", "MultipleChoice", "architectures is ['RobertaForMultipleChoice']"),
    ("albert", "MultipleChoice", "architectures is ['AlbertForMultipleChoice']")])
def test_classifiers_of_other_things_than_rows_are_refused(tmp_path, shape, kind, told):
    their_model(tmp_path, shape, kind)
    for arguments in ({}, {"new_head": True, "num_labels": 2}):
        assert told in refusal(tmp_path, **arguments)


@pytest.mark.parametrize("shape", ["roberta", "electra, narrow embeddings", "albert",
                                   "distilbert"])
@torch.no_grad()
def test_old_names_and_a_wrapper_are_read(tmp_path, shape):
    theirs = their_model(tmp_path, shape)
    change_weights(tmp_path, lambda state: {
        "module." + key.replace("LayerNorm.weight", "LayerNorm.gamma").replace(
            "layer_norm.bias", "layer_norm.beta"): value for key, value in state.items()})
    ours = TinyBertForSequenceClassification.from_pretrained(tmp_path).eval()
    inputs = batch_of(theirs.config)
    close(ours(*inputs).logits, theirs(**their_inputs(theirs.config, *inputs)).logits)


@pytest.mark.parametrize(("shape", "kind"), [
    *((shape, kind) for shape in ("roberta", "albert", "distilbert", "electra, narrow embeddings")
      for kind in ("MaskedLM", "")),
    ("electra", "PreTraining"), ("albert", "PreTraining")])
@torch.no_grad()
def test_the_encoder_of_a_pre_trained_model_is_read_without_its_heads(tmp_path, shape, kind):
    theirs = their_model(tmp_path, shape, kind)
    inputs = batch_of(theirs.config)
    found = BertModel.from_pretrained(tmp_path).eval()(*inputs).hidden_states
    expected = theirs(**their_inputs(theirs.config, *inputs),
                      output_hidden_states=True).hidden_states
    for mine, other in zip(found, expected, strict=True):
        close(mine[inputs[2].bool()], other[inputs[2].bool()])


@pytest.mark.parametrize(("shape", "decoder"), [
    ("roberta", "lm_head.decoder."), ("distilbert", "vocab_projector."),
    ("albert", "predictions.decoder."), ("electra", "generator_lm_head."),
])
def test_two_forms_of_weights_may_hold_different_parts_of_a_head_that_is_not_read(
        tmp_path, shape, decoder):
    """As published: one file with the decoder, which is the word embeddings, the other without."""
    their_model(tmp_path, shape, "MaskedLM")
    state = load_file(tmp_path / "model.safetensors")
    words = next(tensor for key, tensor in state.items() if "word_embeddings" in key)
    torch.save({**state, f"{decoder}weight": words, f"{decoder}bias": words[:, 0]},
               tmp_path / "pytorch_model.bin")
    BertModel.from_pretrained(tmp_path)
    state = {key: 2 * tensor if "word_embeddings" in key else tensor
             for key, tensor in state.items()}
    torch.save(state, tmp_path / "pytorch_model.bin")
    with pytest.raises(UserError, match=r"hold different weights \(such as .*word_embeddings"):
        BertModel.from_pretrained(tmp_path)


@pytest.mark.parametrize("shape", ["roberta", "electra", "distilbert"])
@pytest.mark.parametrize("kind", ["MaskedLM", ""])
def test_a_new_classifier_brings_a_new_pooler_where_the_family_has_it_there(
        tmp_path, shape, kind, caplog):
    their_model(tmp_path, shape, kind)
    with caplog.at_level("INFO"):
        model = TinyBertForSequenceClassification.from_pretrained(
            tmp_path, new_head=True, num_labels=3)
    assert "newly initialised: bert.pooler.dense.bias" in caplog.text.replace("weight", "bias")
    assert not model.bert.pooler.dense.bias.any()  # RobertaModel's own has other ones
    assert kind == "" or "not needed and not read" in caplog.text
    assert "classifier" in refusal(tmp_path)  # where nobody asked for a new one


def test_no_masked_lm_head_of_a_relative_is_taken_for_berts(tmp_path):
    their_model(tmp_path, "roberta", "MaskedLM")
    with pytest.raises(UserError, match=r"model_type is 'roberta', whose masked-LM head"):
        BertForMaskedLM.from_pretrained(tmp_path)
    with pytest.raises(UserError, match=r"config\.json: model_type is 'roberta'"):
        BertForMaskedLM.from_scratch(tmp_path)


@pytest.mark.parametrize("kind", ["MaskedLM", "", "SequenceClassification"])
def test_repairing_names_checks_a_relative_and_leaves_it_as_it_is(tmp_path, capsys, kind):
    their_model(tmp_path, "roberta", kind)
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    run(fix_teacher_layers, "--models", tmp_path)
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before
    change_weights(tmp_path, without("encoder.layer.2."))
    assert "bert.encoder.layer.2." in error_line(capsys, fix_teacher_layers, "--models", tmp_path)


def test_a_weight_under_two_names_is_refused(tmp_path):
    their_model(tmp_path, "electra")
    key = "embeddings.LayerNorm.weight"
    change_weights(tmp_path, lambda state: {**state, key: state[f"electra.{key}"] + 1})
    assert "embeddings.LayerNorm.weight twice" in refusal(tmp_path)


@each_family
@torch.no_grad()
def test_the_originals_relu_head_makes_a_model_that_only_we_read(tmp_path, shape):
    their_model(tmp_path / "a", shape)
    model = TinyBertForSequenceClassification.from_pretrained(tmp_path / "a").eval()
    model.config.classifier_relu = True
    save_pretrained(model, tmp_path / "b")
    with pytest.raises(ValueError, match="_bert"):
        transformers.AutoConfig.from_pretrained(tmp_path / "b")
    again = TinyBertForSequenceClassification.from_pretrained(tmp_path / "b").eval()
    assert again.config.to_dict() == model.config.to_dict()
    assert torch.equal(again(*random_batch()).logits, model(*random_batch()).logits)


def test_which_folders_our_bert_computes(tmp_path):
    for values, expected in (
            ({}, True), ({"model_type": "bert"}, True), ({"model_type": "pruned_bert"}, True),
            ({"model_type": "albert"}, True), ({"model_type": "camembert"}, True),
            ({"model_type": "albert", "inner_group_num": 2}, False),
            ({"model_type": "mobilebert"}, False), ({"model_type": "deberta-v2"}, False)):
        (tmp_path / "config.json").write_text(json.dumps(values))
        assert is_supported(tmp_path) is expected


@pytest.mark.parametrize("changes", [
    {"family": "electra"}, {"family": "albert"}, {"family": "roberta", "embedding_size": 8},
    {"family": "roberta", "num_hidden_groups": 1}, {"family": "distilbert", "pooler_act": "relu"},
    {"family": "mobilebert"}, {"num_hidden_groups": 2, "heads_per_layer": [1] * 4}])
def test_a_config_that_its_family_cannot_hold_is_refused(changes):
    with pytest.raises(UserError):
        tiny_config(**changes)


@torch.no_grad()
def test_a_bert_of_shared_layers_comes_back_and_no_other_program_takes_it_for_one(tmp_path):
    """`num_hidden_groups` in the config.json of an ordinary student."""
    model = TinyBertForSequenceClassification(tiny_config(num_hidden_groups=2)).eval()
    assert len(model.bert.encoder.layer) == 2
    save_pretrained(model, tmp_path, write_vocab(tmp_path))
    again = TinyBertForSequenceClassification.from_pretrained(tmp_path).eval()
    output, inputs = model(*random_batch()), random_batch()
    assert len(output.attention_scores) == 4 and torch.equal(again(*inputs).logits, output.logits)
    with pytest.raises(ValueError, match="shared_layer_bert"):
        transformers.AutoConfig.from_pretrained(tmp_path)

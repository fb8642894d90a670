"""Relatives of BERT are computed as Hugging Face does, and written back as what they are."""

import json
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
import transformers
from helpers import random_batch, read_json, tiny_config, write_vocab
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.masking_utils import sdpa_mask

from transformer.checkpoint import save_pretrained
from transformer.config import BertConfig
from transformer.families import FAMILIES, our_key, their_key
from transformer.file_utils import UserError
from transformer.modeling import (
    BertForQuestionAnswering,
    BertModel,
    TinyBertForPreTraining,
    TinyBertForSequenceClassification,
)

WIDE = {"hidden_size": 16, "num_hidden_layers": 4, "num_attention_heads": 2,
        "intermediate_size": 24, "vocab_size": tiny_config().vocab_size,
        "max_position_embeddings": 40, "initializer_range": 0.3}
# What each family's tiny models are made of, besides.
SHAPES = {
    "roberta": ("roberta", {"type_vocab_size": 1, "layer_norm_eps": 1e-5}),
    "roberta, two segments, padding 3": ("roberta", {"pad_token_id": 3}),
    "xlm-roberta": ("xlm-roberta", {"type_vocab_size": 1, "hidden_act": "relu"}),
    "camembert": ("camembert", {"type_vocab_size": 1}),
    "electra": ("electra", {"embedding_size": 16}),
    "electra, narrow embeddings": ("electra", {"embedding_size": 6}),
    "albert": ("albert", {"embedding_size": 6}),
    "albert, two groups": ("albert", {"embedding_size": 16, "num_hidden_groups": 2}),
    "distilbert": ("distilbert", {}),
    "distilbert, waves": ("distilbert", {"sinusoidal_pos_embds": True, "activation": "relu"}),
}
each_family = pytest.mark.parametrize("shape", SHAPES)
NEW_HEADS = [name for name, family in FAMILIES.items() if family.head_pooler]


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


def their_config(shape: str, **changes):
    """Return a tiny Hugging Face config of a family."""
    name, own = SHAPES[shape]
    values = {**WIDE, **own, **changes}
    names = {"intermediate_size": "hidden_dim"} if name == "distilbert" else {}
    return transformers.CONFIG_MAPPING[name](
        **{names.get(key, key): value for key, value in values.items()})


def their_model(folder: Path, shape: str, kind: str = "SequenceClassification", **changes):
    """Save a random tiny Hugging Face model, biases and norms included, with our vocabulary."""
    torch.manual_seed(0)
    auto = transformers.AutoModel if not kind else getattr(transformers, f"AutoModelFor{kind}")
    model = auto.from_config(their_config(shape, **changes))
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 1:
                parameter.add_(0.1 * torch.randn_like(parameter))
    write_vocab(folder)
    model.save_pretrained(folder)
    return model.eval()


def batch_of(config, rows: int = 4, length: int = 11):
    """Return ids, segments and mask; the padding is the model's, and segments are its own."""
    ids, segments, mask = random_batch(rows, length)
    ids = torch.where(mask.bool(), ids, config.pad_token_id)
    return ids, segments * (BertConfig.from_dict(config.to_dict()).type_vocab_size > 1), mask


def their_inputs(config, ids, segments, mask):
    """Return the batch as a Hugging Face model takes it: a DistilBERT has no segments."""
    given = {"input_ids": ids, "attention_mask": mask}
    return given if config.model_type == "distilbert" else {**given, "token_type_ids": segments}


def close(found, expected, tolerance=1e-5):
    torch.testing.assert_close(found, expected, atol=tolerance, rtol=0)


def change_config(folder: Path, **changes) -> None:
    values = {**read_json(folder / "config.json"), **changes}
    (folder / "config.json").write_text(json.dumps(values))


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

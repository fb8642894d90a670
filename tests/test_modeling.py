"""Our models against Hugging Face's on tiny random configurations, both ways."""

import dataclasses
import json

import pytest
import torch
import transformers
from helpers import REPO, make_model, random_batch, read_json, tiny_config, write_vocab
from transformers import (
    AutoModelForMaskedLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
)
from transformers import BertConfig as TheirConfig

from transformer.checkpoint import save_pretrained
from transformer.config import DERIVED, FOREIGN, NEUTRAL
from transformer.file_utils import UserError, write_json
from transformer.modeling import (
    MASKED_SCORE,
    BertConfig,
    BertForMaskedLM,
    BertForQuestionAnswering,
    BertModel,
    Dropout,
    TinyBertForPreTraining,
    TinyBertForSequenceClassification,
    fused_attention,
    softmax,
)
from transformer.tokenization import BertTokenizer

transformers.logging.set_verbosity_error()

SHAPES = {
    "plain": {},
    "one layer, one head": {"num_hidden_layers": 1, "num_attention_heads": 1},
    "other eps": {"layer_norm_eps": 1e-2},
    "relu": {"hidden_act": "relu"},
    "gelu_new": {"hidden_act": "gelu_new"},
    "silu": {"hidden_act": "silu"},
    "wide FFN, three segments": {"intermediate_size": 70, "type_vocab_size": 3},
    "odd head width": {"hidden_size": 15, "num_attention_heads": 5},
}


def theirs(folder, model_class, seed=0, safe=True, dtype=torch.float32, shard="5GB", **shape):
    """Save a random Hugging Face model in `folder`; returns it in eval mode, in float32."""
    torch.manual_seed(seed)
    config = TheirConfig(**{
        "vocab_size": 40, "hidden_size": 16, "num_hidden_layers": 3, "num_attention_heads": 4,
        "intermediate_size": 28, "max_position_embeddings": 20, "initializer_range": 0.3,
        "attn_implementation": "eager", **shape,
    })
    model = model_class(config)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 1:
                parameter.add_(0.1 * torch.randn_like(parameter))
    model.to(dtype).save_pretrained(folder, max_shard_size=shard)
    model.float()
    if not safe:
        torch.save(model.state_dict(), folder / "pytorch_model.bin")
        (folder / "model.safetensors").unlink()
    return model.eval()


def close(ours, others, tolerance=1e-5):
    torch.testing.assert_close(ours, others, rtol=0, atol=tolerance)


@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
@torch.no_grad()
def test_encoder_agrees_with_hugging_face(tmp_path, shape):
    their_model = theirs(tmp_path, transformers.BertModel, **shape)
    ids, segments, mask = random_batch(vocab=40)
    expected = their_model(ids, token_type_ids=segments, attention_mask=mask,
                           output_hidden_states=True, output_attentions=True)
    found = BertModel.from_pretrained(tmp_path).eval()(ids, segments, mask)
    assert len(found.hidden_states) == len(expected.hidden_states)
    real = mask.bool()
    for ours, other in zip(found.hidden_states, expected.hidden_states, strict=True):
        close(ours[real], other[real])
    for scores, probabilities in zip(found.attention_scores, expected.attentions, strict=True):
        close(scores.softmax(-1).transpose(1, 2)[real], probabilities.transpose(1, 2)[real])
    close(found.pooled_output, expected.pooler_output)


@pytest.mark.parametrize("safe", [True, False], ids=["safetensors", "bin"])
@pytest.mark.parametrize(("kind", "model_class"), [
    ("BertForSequenceClassification", TinyBertForSequenceClassification),
    ("BertForMaskedLM", BertForMaskedLM), ("BertForPreTraining", BertForMaskedLM)])
@torch.no_grad()
def test_heads_of_hugging_face_give_the_same_logits_here(tmp_path, safe, kind, model_class):
    names = {0: "no", 1: "perhaps", 2: "yes"}
    their_model = theirs(tmp_path, getattr(transformers, kind), safe=safe, id2label=names)
    ids, segments, mask = random_batch(vocab=40)
    expected = their_model(ids, token_type_ids=segments, attention_mask=mask)[0]
    model = model_class.from_pretrained(tmp_path).eval()
    logits = model(ids, segments, mask).logits
    real = mask.bool() if logits.dim() == 3 else ...
    close(logits[real], expected[real])
    assert model.config.id2label == names
    assert not model.config.classifier_relu


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize(("kind", "model_class"), [
    ("BertModel", BertModel), ("BertForMaskedLM", BertForMaskedLM),
    ("BertForSequenceClassification", TinyBertForSequenceClassification),
    ("BertForQuestionAnswering", BertForQuestionAnswering)])
@torch.no_grad()
def test_shards_of_any_precision_and_every_head_give_the_same_here(
        tmp_path, kind, model_class, dtype):
    their_model = theirs(tmp_path, getattr(transformers, kind), dtype=dtype, shard="2KB")
    assert len([*tmp_path.glob("model-*-of-*.safetensors")]) > 2
    ids, segments, mask = random_batch(vocab=40)
    expected = their_model(ids, token_type_ids=segments, attention_mask=mask)
    model = model_class.from_pretrained(tmp_path).eval()
    output, real = model(ids, segments, mask), mask.bool()
    if kind == "BertModel":
        close(output.hidden_states[-1][real], expected.last_hidden_state[real])
        close(output.pooled_output, expected.pooler_output)
    elif kind == "BertForQuestionAnswering":
        close(output.logits[real], torch.stack(expected[:2], dim=-1)[real])
    else:
        close(output.logits[real if "Masked" in kind else ...],
              expected.logits[real if "Masked" in kind else ...])
    assert {p.dtype for p in model.parameters()} == {torch.float32}
    save_pretrained(model, tmp_path / "again")
    assert read_json(tmp_path / "again" / "config.json")["dtype"] == "float32"


@pytest.mark.parametrize("fields", [
    {"chunk_size_feed_forward": 3}, {"is_encoder_decoder": True}, {"use_cache": False},
    {"cross_attention_hidden_size": 8}, {"gradient_checkpointing": True}, {"torchscript": True},
    {"output_attentions": True, "output_hidden_states": True}, {"classifier_dropout": 0.7},
    {"pad_token_id": None}, {"pad_token_id": 3}, {"pad_token_id": -1}, {"embedding_size": 8},
    {"function_to_apply": "none"}, {"tie_word_embeddings": False}, {"bos_token_id": 7},
    {"task_specific_params": {"x": {"hidden_act": "relu"}}}, {"finetuning_task": "rte"},
    {"tokenizer_class": "BertTokenizer", "pooler_type": "first_token_transform"},
    {"layer_norm_eps": 0.1}, {"attention_probs_dropout_prob": 0.4, "hidden_dropout_prob": 0},
], ids=lambda fields: next(iter(fields)))
@torch.no_grad()
def test_fields_that_are_not_refused_mean_the_same_here(tmp_path, fields):
    their_model = theirs(tmp_path, transformers.BertForSequenceClassification, **fields)
    ids, segments, mask = random_batch(vocab=40)
    expected = their_model(ids, token_type_ids=segments, attention_mask=mask).logits
    ours = TinyBertForSequenceClassification.from_pretrained(tmp_path).eval()
    close(ours(ids, segments, mask).logits, expected)
    save_pretrained(ours, tmp_path / "again")
    again = AutoModelForSequenceClassification.from_pretrained(tmp_path / "again").eval()
    close(again(ids, token_type_ids=segments, attention_mask=mask)[0], expected)


def test_every_field_of_hugging_faces_bert_is_known(tmp_path):
    """A new one must be looked at: does it change what is computed?"""
    inert = {"use_cache", "classifier_dropout", "bos_token_id", "eos_token_id", "architectures",
             "chunk_size_feed_forward", "is_encoder_decoder", "output_hidden_states", "return_dict"}
    known = {*vars(BertConfig()), *DERIVED, *NEUTRAL, *FOREIGN, *inert}
    assert {field.name for field in dataclasses.fields(TheirConfig)} <= known


@torch.no_grad()
def test_our_classifier_gives_the_same_logits_in_hugging_face(tmp_path):
    ours = make_model(tmp_path, labels=("entailment", "not_entailment"), layer_norm_eps=1e-5,
                      hidden_act="gelu_new", model_arguments={"fit_size": 20})
    their_model = AutoModelForSequenceClassification.from_pretrained(tmp_path).eval()
    ids, segments, mask = random_batch()
    close(their_model(ids, token_type_ids=segments, attention_mask=mask).logits,
          ours(ids, segments, mask)[0])
    assert their_model.config.id2label == {0: "entailment", 1: "not_entailment"}


@pytest.mark.parametrize(("labels", "problem_type", "written"), [
    (1, None, "regression"), (1, "multi_label_classification", "multi_label_classification"),
    (2, None, None), (2, "regression", "regression"),
    (3, "single_label_classification", "single_label_classification"),
    (3, "multi_label_classification", "multi_label_classification")])
@torch.no_grad()
def test_the_kind_of_problem_comes_and_goes(tmp_path, labels, problem_type, written):
    names = {number: f"name {number}" for number in range(labels)}
    their_model = theirs(tmp_path / "a", transformers.BertForSequenceClassification,
                         problem_type=problem_type, id2label=names)
    ours = TinyBertForSequenceClassification.from_pretrained(tmp_path / "a").eval()
    assert ours.config.is_multi_label == (problem_type == "multi_label_classification")
    save_pretrained(ours, tmp_path / "b", write_vocab(tmp_path / "b"))
    again = AutoModelForSequenceClassification.from_pretrained(tmp_path / "b").eval()
    assert (again.config.problem_type, again.config.id2label) == (written, names)
    ids, segments, mask = random_batch()
    close(again(ids, token_type_ids=segments, attention_mask=mask).logits,
          their_model(ids, token_type_ids=segments, attention_mask=mask).logits)


def test_a_score_leaves_hugging_faces_pipeline_as_it_is(tmp_path):
    model = make_model(tmp_path, labels=("score",))
    model.classifier.bias.data += 3  # beyond what a sigmoid gives
    save_pretrained(model, tmp_path)
    pipeline = transformers.pipeline("text-classification", model=str(tmp_path), device="cpu")
    ids = torch.tensor([[2, *BertTokenizer.from_pretrained(tmp_path).encode_batch(
        ["a good film"])[0], 3]])
    assert pipeline("a good film")[0]["score"] == pytest.approx(model(ids)[0].item(), abs=1e-5)


@pytest.mark.parametrize(("changes", "model_type"), [
    ({"classifier_relu": True}, "relu_head_bert"), ({"pooler_act": "relu"}, "other_pooler_bert"),
    ({"heads_per_layer": [2, 1, 2, 2]}, "pruned_bert"),
    ({"neurons_per_layer": [24, 24, 24, 24], "classifier_relu": True}, "pruned_bert")])
@torch.no_grad()
def test_what_hugging_face_would_compute_otherwise_it_refuses(tmp_path, changes, model_type):
    model = make_model(tmp_path, **changes)
    assert read_json(tmp_path / "config.json")["model_type"] == model_type
    for load in (transformers.AutoConfig.from_pretrained,
                 AutoModelForSequenceClassification.from_pretrained,
                 lambda folder: transformers.pipeline("text-classification", model=str(folder))):
        with pytest.raises(ValueError, match=model_type):
            load(tmp_path)
    for name in (model_type, "bert", "pruned_bert"):  # of older folders, and of graphs
        write_json(tmp_path / "config.json",
                   read_json(tmp_path / "config.json") | {"model_type": name})
        again = TinyBertForSequenceClassification.from_pretrained(tmp_path).eval()
        assert torch.equal(again(*random_batch()).logits, model(*random_batch()).logits)


@torch.no_grad()
def test_our_masked_lm_gives_the_same_logits_in_hugging_face(tmp_path):
    ours = make_model(tmp_path, BertForMaskedLM)
    their_model = AutoModelForMaskedLM.from_pretrained(tmp_path).eval()
    ids, segments, mask = random_batch()
    expected = their_model(ids, token_type_ids=segments, attention_mask=mask).logits
    close(ours(ids, segments, mask).logits[mask.bool()], expected[mask.bool()])


def test_the_saved_vocabulary_gives_the_same_ids_in_hugging_face(tmp_path):
    make_model(tmp_path)
    text = "The films was very lovely, and Ugly."
    tokenizer = BertTokenizer.from_pretrained(tmp_path)
    expected = AutoTokenizer.from_pretrained(tmp_path)(text, add_special_tokens=False)["input_ids"]
    assert tokenizer.encode_batch([text])[0] == list(expected)


@torch.no_grad()
def test_a_model_saved_by_hugging_face_after_us_loads_here_again(tmp_path):
    ours = make_model(tmp_path / "a")
    AutoModelForSequenceClassification.from_pretrained(tmp_path / "a").save_pretrained(
        tmp_path / "b")
    again = TinyBertForSequenceClassification.from_pretrained(tmp_path / "b").eval()
    ids, segments, mask = random_batch()
    close(again(ids, segments, mask)[0], ours(ids, segments, mask)[0])


# ------------------------------------------------------------------ what the models promise


def test_masked_keys_carry_minus_10000_and_change_no_real_token():
    torch.manual_seed(0)
    model = BertModel(tiny_config()).eval()
    ids, segments, mask = random_batch()
    output = model(ids, segments, mask)
    for scores in output.attention_scores:
        assert (scores.transpose(1, 3)[mask == 0] < -9000).all()
        assert (scores.transpose(1, 3)[mask == 1] > -9000).all()
    row = 1
    length = int(mask[row].sum())
    alone = model(ids[row : row + 1, :length], segments[row : row + 1, :length])
    close(output.hidden_states[-1][row, :length], alone.hidden_states[-1][0], 1e-4)


def test_position_embeddings_bound_the_length_with_both_numbers_in_the_error():
    model = BertModel(tiny_config(max_position_embeddings=8))
    model(torch.ones(1, 8, dtype=torch.long))
    with pytest.raises(UserError, match=r"9; the model has 8 positions"):
        model(torch.ones(1, 9, dtype=torch.long))


@pytest.mark.parametrize("keys", [8, 17, 31, 32, 120])
def test_attention_sums_to_one_and_is_rounded_once(keys):
    scores = 3 * torch.randn(2, 3, 5, keys, generator=torch.Generator().manual_seed(0))
    assert torch.equal(softmax(scores), scores.softmax(dim=-1))
    half = scores.bfloat16()
    assert softmax(half).dtype == torch.bfloat16
    torch.testing.assert_close(
        softmax(half).float(), half.float().softmax(dim=-1), rtol=2**-8, atol=0)


def test_masked_positions_and_labels_agree_with_the_full_logits():
    torch.manual_seed(0)
    model = BertForMaskedLM(tiny_config()).eval()
    ids, segments, mask = random_batch()
    logits = model(ids, segments, mask).logits
    positions = (ids % 3 == 0) & mask.bool()
    for chosen in (positions, positions.nonzero(as_tuple=True)):
        close(model(ids, segments, mask, masked_positions=chosen).logits, logits[positions])
    labels = torch.where(positions, (ids + 1) % len(logits[0, 0]), -100)
    close(model(ids, segments, mask, labels=labels).loss,
          torch.nn.functional.cross_entropy(logits.flatten(0, 1), labels.flatten(),
                                            ignore_index=-100))


def test_classifier_relu_is_the_originals_head_and_off_by_default(tmp_path):
    model = make_model(tmp_path)
    ids, segments, mask = random_batch()
    pooled = model.bert(ids, segments, mask).pooled_output
    close(model(ids, segments, mask)[0], model.classifier(pooled))
    model.config.classifier_relu = True
    close(model(ids, segments, mask)[0], model.classifier(pooled.relu()))
    assert BertConfig().classifier_relu is False


@pytest.mark.parametrize("model_class", [TinyBertForPreTraining,
                                         TinyBertForSequenceClassification])
def test_equal_widths_start_from_the_identity_and_others_from_noise(model_class):
    for fit_size in (None, 16):
        model = model_class(tiny_config(), fit_size=fit_size)
        assert torch.equal(model.fit_dense.weight, torch.eye(16))
        assert not model.fit_dense.bias.any()
    model = model_class(tiny_config(), fit_size=20)
    assert model.fit_dense.weight.shape == (20, 16)
    assert model.fit_dense.weight.std() > 0.1


def test_only_the_student_pass_maps_the_hidden_states():
    model = TinyBertForSequenceClassification(tiny_config(), fit_size=20).eval()
    ids, segments, mask = random_batch()
    logits, scores, hidden = model(ids, segments, mask)
    student_logits, student_scores, fitted = model(ids, segments, mask, is_student=True)
    assert [h.shape[-1] for h in hidden] == [16] * 5
    assert [h.shape[-1] for h in fitted] == [20] * 5
    assert torch.equal(logits, student_logits)
    assert all(torch.equal(a, b) for a, b in zip(scores, student_scores, strict=True))
    close(fitted[2], model.fit_dense(hidden[2]))


def test_general_student_returns_scores_and_hidden_states_of_the_teachers_width():
    scores, hidden = TinyBertForPreTraining(tiny_config(), fit_size=20)(torch.ones(
        2, 7, dtype=torch.long))
    assert [s.shape for s in scores] == [(2, 2, 7, 7)] * 4
    assert [h.shape for h in hidden] == [(2, 7, 20)] * 5


def test_random_weights_have_the_configured_spread_and_follow_the_seed():
    torch.manual_seed(3)
    first = BertModel(tiny_config(initializer_range=0.02))
    torch.manual_seed(3)
    second = BertModel(tiny_config(initializer_range=0.02))
    weight = first.encoder.layer[0].intermediate.dense.weight
    assert torch.equal(weight, second.encoder.layer[0].intermediate.dense.weight)
    assert 0.015 < weight.std() < 0.025
    assert not first.encoder.layer[0].intermediate.dense.bias.any()


@pytest.mark.parametrize(("name", "layers", "hidden", "intermediate", "vocabulary", "parameters"), [
    ("tinybert_4l_config", 4, 312, 1200, 30522, 14.5),
    ("tinybert_6l_config", 6, 768, 3072, 30522, 67.0),
    ("tinybert_4l_zh_config", 4, 312, 1200, 21128, 11.5),  # bert-base-chinese's word pieces
])
def test_student_configs_have_the_papers_sizes(
    name, layers, hidden, intermediate, vocabulary, parameters
):
    config = BertConfig.from_json_file(REPO / name / "config.json")
    assert (config.num_hidden_layers, config.hidden_size, config.intermediate_size) == (
        layers, hidden, intermediate)
    assert (config.num_attention_heads, config.vocab_size) == (12, vocabulary)
    with torch.device("meta"):
        model = BertModel(config)
    count = sum(p.numel() for p in model.parameters()) / 1e6
    assert abs(count - parameters) < 0.5


@pytest.mark.parametrize(("model_size", "fits"), [(50, True), (177, True), (178, False),
                                                  (49, False)])
def test_a_vocabulary_must_fit_the_embedding(model_size, fits):
    config = tiny_config(vocab_size=model_size)
    if fits:
        config.check_vocabulary(50, "dir")
        return
    with pytest.raises(UserError, match=rf"dir.*50 word pieces.*{model_size}"):
        config.check_vocabulary(50, "dir")


# ------------------------------------------------------------------ attention and dropout


@pytest.mark.parametrize("width", [5, 8, 26, 64])
def test_fused_attention_gives_the_same_context_at_every_head_width(width):
    torch.manual_seed(0)
    query, key, value = torch.randn(3, 2, 4, 7, width)
    mask = torch.zeros(2, 1, 1, 7)
    mask[1, ..., 5:] = MASKED_SCORE
    scores = query @ key.transpose(-1, -2) / width**0.5 + mask
    context = fused_attention(query, key, value, mask, dropout=0.0)
    torch.testing.assert_close(context, scores.softmax(dim=-1) @ value)


def test_scores_are_returned_for_the_layers_asked_for_and_nothing_else_changes():
    torch.manual_seed(0)
    model = BertModel(tiny_config()).eval()
    everything = model(*random_batch())
    some = model(*random_batch(), score_layers=(1, 3))
    assert [scores is None for scores in some.attention_scores] == [True, False, True, False]
    assert torch.equal(some.attention_scores[3], everything.attention_scores[3])
    for ours, theirs_ in zip(some.hidden_states, everything.hidden_states, strict=True):
        assert torch.equal(ours, theirs_)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_dropout_drops_the_share_it_was_given_and_scales_the_rest(dtype):
    torch.manual_seed(0)
    dropout = Dropout(0.1)
    x = torch.ones(1000, 1001, dtype=dtype, requires_grad=True)
    out = dropout(x)
    assert out.dtype == dtype
    assert set(out.unique().tolist()) == {0.0, float(torch.tensor(1 / 0.9).to(dtype))}
    out.float().sum().backward()
    assert torch.equal(x.grad == 0, out == 0)
    kept = (out != 0).flatten()
    for lane in range(4):  # the quarters of the 64 random bits
        assert float(kept[lane::4].float().mean()) == pytest.approx(0.9, abs=0.003)
    neighbours = (kept[1:] & kept[:-1]).float().mean()
    assert float(neighbours) == pytest.approx(0.81, abs=0.003)


def test_dropout_follows_the_seed_and_is_off_in_eval_mode():
    model, ids = BertModel(tiny_config(hidden_dropout_prob=0.5)), torch.tensor([[5, 6, 7]])
    assert not torch.equal(model(ids).pooled_output, model(ids).pooled_output)
    model.eval()
    assert torch.equal(model(ids).pooled_output, model(ids).pooled_output)
    x = torch.ones(50)
    dropout = Dropout(0.5)

    def draw(seed):
        torch.manual_seed(seed)
        return dropout(x)

    assert torch.equal(draw(1), draw(1)) and not torch.equal(draw(1), draw(2))
    assert dropout.eval()(x) is x
    assert Dropout(0.0)(x) is x
    assert torch.equal(Dropout(1.0)(x), torch.zeros(50))


# ------------------------------------------------------------------ pruned shapes

PRUNED = {"heads_per_layer": [2, 0, 1, 2], "neurons_per_layer": [24, 5, 0, 0]}


def test_ordinary_configs_have_no_fields_of_pruned_ones():
    values = tiny_config().to_dict()
    assert values["model_type"] == "bert"
    assert not {"heads_per_layer", "neurons_per_layer", "pooler_act"} & set(values)
    assert BertConfig.from_dict(values).to_dict() == values


def test_a_pruned_config_survives_the_file_and_names_its_kind(tmp_path):
    config = tiny_config(**PRUNED)
    make_model(tmp_path, **PRUNED)
    again = BertConfig.from_json_file(tmp_path / "config.json")
    assert again.to_dict() == config.to_dict()
    assert (again.heads, again.neurons) == tuple(PRUNED.values())
    assert read_json(tmp_path / "config.json")["model_type"] == "pruned_bert"
    assert again.head_width == 8
    with pytest.raises(ValueError, match="pruned_bert"):
        AutoModelForSequenceClassification.from_pretrained(tmp_path)


@pytest.mark.parametrize("wrong", [
    {"heads_per_layer": [2, 2, 2]}, {"heads_per_layer": [3, 2, 2, 2]},
    {"neurons_per_layer": [24, 24, -1, 24]}, {"neurons_per_layer": [24, 24, 1.5, 24]},
    {"neurons_per_layer": 24}, {"heads_per_layer": [2, 2, True, 2]}, {"heads_per_layer": []},
])
def test_a_wrong_number_of_heads_or_neurons_is_refused_by_name(tmp_path, wrong):
    text = json.dumps({**tiny_config().to_dict(), **wrong})
    (tmp_path / "config.json").write_text(text, encoding="utf-8")
    with pytest.raises(UserError, match=rf"config\.json: {next(iter(wrong))} is .*; expected 4"):
        BertConfig.from_json_file(tmp_path / "config.json")


@torch.no_grad()
def test_layers_without_heads_or_neurons_are_bias_residual_and_norm(tmp_path):
    model = make_model(tmp_path, **PRUNED)
    again = TinyBertForSequenceClassification.from_pretrained(tmp_path).eval()
    logits, scores, hidden = again(*random_batch())
    assert torch.equal(logits, model(*random_batch())[0])
    assert [s.shape[1] for s in scores] == PRUNED["heads_per_layer"]
    layer = again.bert.encoder.layer[2]
    attended, _ = layer.attention(hidden[2], torch.zeros(3, 1, 1, 9), False)
    close(hidden[3][0], layer.output.LayerNorm(layer.output.dense.bias + attended)[0])
    attended, scores = again.bert.encoder.layer[1].attention(
        hidden[1], torch.zeros(3, 1, 1, 9), True)
    output = again.bert.encoder.layer[1].attention.output
    close(attended, output.LayerNorm(output.dense.bias + hidden[1]))
    assert scores.shape == (3, 0, 9, 9)


def test_kept_layers_keep_their_shapes():
    config = tiny_config(**PRUNED)
    config.keep_layers([1, 3])
    assert (config.num_hidden_layers, config.heads, config.neurons) == (2, [0, 2], [5, 0])
    config = tiny_config()
    config.keep_layers([1, 3])
    assert config.to_dict() == tiny_config(num_hidden_layers=2).to_dict()

"""Models that only compute: frozen, low precision, packed weights."""

import copy

import pytest
import torch
from helpers import make_model, random_batch, tiny_config
from torch import nn

from transformer import modeling
from transformer.modeling import (
    BertForQuestionAnswering,
    BertModel,
    PackedLinear,
    TinyBertForSequenceClassification,
    can_pack,
    freeze,
    inference_copy,
)

CPU = torch.device("cpu")
packs = pytest.mark.skipif(not can_pack(), reason="this build of torch has no oneDNN")


def test_freezing_keeps_outputs_and_stops_gradients_and_dropout():
    torch.manual_seed(0)
    model = BertModel(tiny_config(hidden_dropout_prob=0.5))
    expected = model.eval()(*random_batch()).hidden_states[-1]
    frozen = freeze(model.train())
    assert frozen is model and not model.training
    assert not any(p.requires_grad for p in model.parameters())
    assert torch.equal(model(*random_batch()).hidden_states[-1], expected)


@packs
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("shape", [(3, 16), (2, 5, 16), (1, 16)])
def test_a_packed_layer_gives_the_bits_of_the_layer_it_replaces(shape, bias):
    torch.manual_seed(0)
    linear = nn.Linear(16, 24, bias=bias).bfloat16()
    x = torch.randn(shape).bfloat16()
    assert torch.equal(PackedLinear(linear)(x), linear(x))


@packs
def test_a_packed_model_gives_the_bits_of_the_plain_one(tmp_path):
    make_model(tmp_path, labels=("0", "1"))
    plain, packed = (TinyBertForSequenceClassification.from_pretrained(tmp_path)
                     for _ in range(2))
    freeze(plain, torch.bfloat16)
    freeze(packed, torch.bfloat16, CPU)
    assert isinstance(packed.bert.encoder.layer[0].output.dense, PackedLinear)
    assert type(packed.classifier) is nn.Linear
    for ours, theirs in zip(packed(*random_batch()), plain(*random_batch()), strict=True):
        if isinstance(ours, torch.Tensor):
            ours, theirs = [ours], [theirs]
        assert all(torch.equal(a, b) for a, b in zip(ours, theirs, strict=True))


def test_float32_and_a_torch_without_onednn_keep_plain_layers(monkeypatch):
    model = freeze(BertModel(tiny_config()), None, CPU)
    assert not any(isinstance(m, PackedLinear) for m in model.modules())
    monkeypatch.setattr(modeling, "can_pack", lambda: False)
    model = freeze(BertModel(tiny_config()), torch.bfloat16, CPU)
    assert not any(isinstance(m, PackedLinear) for m in model.modules())
    assert model(*random_batch()).hidden_states[-1].dtype == torch.bfloat16


def test_a_model_in_training_is_copied_and_a_frozen_one_is_not():
    model = BertModel(tiny_config())
    copied = inference_copy(model, torch.bfloat16, CPU)
    assert copied is not model and not copied.training
    assert model.training and all(p.requires_grad for p in model.parameters())
    assert all(p.dtype == torch.float32 for p in model.parameters())
    frozen = freeze(model)
    assert inference_copy(frozen, torch.bfloat16, CPU) is frozen


@packs
def test_a_packed_model_refuses_to_be_saved_or_moved(tmp_path):
    model = freeze(BertModel(tiny_config()), torch.bfloat16, CPU)
    with pytest.raises(RuntimeError, match="cannot be saved"):
        model.state_dict()
    with pytest.raises(RuntimeError, match="cannot be moved"):
        model.float()


@pytest.mark.parametrize("device", [None, CPU])
def test_scores_of_a_bf16_model_are_not_rounded_to_bf16(device):
    torch.manual_seed(0)
    model = TinyBertForSequenceClassification(tiny_config(num_labels=1))
    with torch.no_grad():
        model.classifier.bias.fill_(3.0)
    scores = freeze(model, torch.bfloat16, device)(*random_batch(8))[0]
    assert scores.dtype == torch.float32
    assert not torch.equal(scores.bfloat16().float(), scores)


@packs
def test_a_pruned_model_is_packed_but_for_the_layers_that_have_nothing_left():
    torch.manual_seed(0)
    shape = {"heads_per_layer": [2, 0, 1, 2], "neurons_per_layer": [24, 5, 0, 0]}
    plain = TinyBertForSequenceClassification(tiny_config(**shape))
    packed = freeze(copy.deepcopy(plain), torch.bfloat16, CPU)
    freeze(plain, torch.bfloat16)
    assert torch.equal(packed(*random_batch())[0], plain(*random_batch())[0])
    layer = packed.bert.encoder.layer[2]
    assert isinstance(layer.attention.output.dense, PackedLinear)
    assert isinstance(layer.output.dense, nn.Linear)


def test_logits_of_a_bf16_question_answerer_are_not_rounded():
    torch.manual_seed(0)
    model = freeze(BertForQuestionAnswering(tiny_config()), torch.bfloat16)
    logits = model(*random_batch()).logits
    assert logits.dtype == torch.float32
    assert not torch.equal(logits.bfloat16().float(), logits)

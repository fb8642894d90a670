"""Models that only compute: frozen, low precision, packed weights."""

import copy

import pytest
import torch
from helpers import random_batch, tiny_config
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
@pytest.mark.parametrize("shape", [
    {}, {"heads_per_layer": [2, 0, 1, 2], "neurons_per_layer": [24, 5, 0, 0]}])
def test_a_packed_model_gives_the_bits_of_the_plain_one(shape):
    torch.manual_seed(0)
    plain = TinyBertForSequenceClassification(tiny_config(**shape))
    packed = freeze(copy.deepcopy(plain), torch.bfloat16, CPU)
    freeze(plain, torch.bfloat16)
    found, expected = packed(*random_batch()), plain(*random_batch())
    assert torch.equal(found.logits, expected.logits)
    assert all(map(torch.equal, found.hidden_states, expected.hidden_states))
    assert all(map(torch.equal, found.attention_scores, expected.attention_scores))
    layer = packed.bert.encoder.layer[2]
    assert isinstance(layer.attention.output.dense, PackedLinear)
    assert isinstance(layer.output.dense, nn.Linear if shape else PackedLinear)
    assert type(packed.classifier) is nn.Linear


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


@pytest.mark.parametrize("device", [None, CPU])
@pytest.mark.parametrize("model_class", [TinyBertForSequenceClassification,
                                         BertForQuestionAnswering])
def test_logits_of_a_bf16_model_are_not_rounded_to_bf16(model_class, device):
    torch.manual_seed(0)
    logits = freeze(model_class(tiny_config()), torch.bfloat16, device)(*random_batch(8)).logits
    assert logits.dtype == torch.float32
    assert not torch.equal(logits.bfloat16().float(), logits)

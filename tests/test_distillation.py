"""The losses, against the original's numbers and against their own definitions."""

import json

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from helpers import GOLDEN, random_batch, tiny_config

from transformer.checkpoint import load_weights
from transformer.distillation import (
    IntermediateLoss,
    IntermediateTeacher,
    PredictionLoss,
    attention_loss,
    check_layer_heads,
    hidden_loss,
    intermediate_losses,
    map_layers,
    prediction_loss,
    soft_cross_entropy,
)
from transformer.file_utils import UserError
from transformer.modeling import BertConfig, TinyBertForSequenceClassification, freeze

CPU = torch.device("cpu")

# ------------------------------------------------------------------ the original's numbers


class Golden:
    """One golden file: both models with its weights, its batch, its numbers."""

    def __init__(self, number: int) -> None:
        self.data = np.load(GOLDEN / f"distill_losses_{number}.npz")
        self.hyper = json.loads(str(self.data["hyper"][0]))
        width = self.hyper["teacher"]["hidden_size"]
        self.teacher = self.load("teacher", None)
        self.student = self.load("student", width)
        self.inputs = [torch.from_numpy(self.data[name]) for name in
                       ("input_ids", "token_type_ids", "attention_mask")]

    def load(self, which: str, fit_size: int | None) -> TinyBertForSequenceClassification:
        config = BertConfig(
            **self.hyper[which], classifier_relu=True, num_labels=self.hyper["num_labels"],
            max_position_embeddings=self.hyper["max_position_embeddings"])
        model = TinyBertForSequenceClassification(config, fit_size=fit_size)
        state = {name.removeprefix(f"{which}/"): torch.from_numpy(self.data[name])
                 for name in self.data.files if name.startswith(f"{which}/")}
        missing = load_weights(model, state, which, model.optional)
        assert not missing or which == "teacher"
        return model.eval()


@pytest.fixture(scope="module", params=[0, 1])
def golden(request) -> Golden:
    return Golden(request.param)


def check_gradients(golden: Golden, stage: str) -> None:
    prefix = f"grad_{stage}/"
    names = [n.removeprefix(prefix) for n in golden.data.files if n.startswith(prefix)]
    assert len(names) == 3
    parameters = dict(golden.student.named_parameters())
    for name in names:
        wanted = torch.from_numpy(golden.data[prefix + name])
        assert (parameters[name].grad - wanted).abs().max() < 1e-5, name


def test_golden_logits_scores_and_fitted_states_match_to_1e_5(golden):
    teacher_logits = golden.teacher(*golden.inputs)[0]
    logits, scores, hidden = golden.student(*golden.inputs, is_student=True)

    def check(found, name):
        wanted = torch.from_numpy(golden.data[name])
        # Masked keys carry about -10000, where a float32 step is 1e-3.
        tolerance = torch.where(wanted.abs() > 1e3, 2e-3, 1e-5)
        assert ((found - wanted).abs() < tolerance).all(), name

    check(teacher_logits, "teacher_logits")
    check(logits, "student_logits")
    for layer, found in enumerate(scores):
        check(found, f"student_scores_{layer}")
    for layer, found in enumerate(hidden):
        check(found, f"student_fitted_hidden_{layer}")


def test_golden_intermediate_losses_and_gradients_match_to_1e_5(golden):
    _, teacher_scores, teacher_hidden = freeze(golden.teacher)(*golden.inputs)
    golden.student.zero_grad()
    _, scores, hidden = golden.student(*golden.inputs, is_student=True)
    losses = intermediate_losses(scores, hidden, teacher_scores, teacher_hidden,
                                 golden.inputs[2], match_original=True)
    for name, value in losses.items():
        assert abs(value.item() - float(golden.data[name])) < 1e-5, name
    sum(losses.values()).backward()
    check_gradients(golden, "intermediate")


def test_golden_prediction_loss_and_gradients_match_to_1e_5(golden):
    golden.student.zero_grad()
    loss = soft_cross_entropy(golden.student(*golden.inputs)[0],
                              freeze(golden.teacher)(*golden.inputs)[0], match_original=True)
    assert abs(loss.item() - float(golden.data["cls_loss"])) < 1e-5
    loss.backward()
    check_gradients(golden, "prediction")


# ------------------------------------------------------------------ layers


def test_layers_are_mapped_as_in_the_paper():
    assert map_layers(12, 4) == ([2, 5, 8, 11], [0, 3, 6, 9, 12])
    assert map_layers(12, 6) == ([1, 3, 5, 7, 9, 11], [0, 2, 4, 6, 8, 10, 12])
    assert map_layers(6, 3) == ([1, 3, 5], [0, 2, 4, 6])
    assert map_layers(4, 4) == ([0, 1, 2, 3], [0, 1, 2, 3, 4])
    assert map_layers(5, 1) == ([4], [0, 5])


@pytest.mark.parametrize(("teacher", "student"), [(12, 5), (4, 6), (6, 4), (12, 0), (12, -1)])
def test_depths_that_do_not_divide_are_an_error_that_names_both(teacher, student):
    with pytest.raises(UserError, match=rf"{teacher} layers.*student {student}"):
        map_layers(teacher, student)


# ------------------------------------------------------------------ intermediate losses


def random_layers(rows=4, length=7, layers=(2, 4), heads=2, width=6, seed=0):
    """Random scores and hidden states of a student and a teacher, and a mask."""
    generator = torch.Generator().manual_seed(seed)
    lengths = torch.randint(2, length + 1, (rows,), generator=generator)
    lengths[0] = length
    mask = (torch.arange(length) < lengths[:, None]).long()
    models = []
    for count in layers:
        scores = [torch.randn(rows, heads, length, length, generator=generator)
                  - 10000.0 * (1 - mask[:, None, None, :]) for _ in range(count)]
        hidden = [torch.randn(rows, length, width, generator=generator) for _ in range(count + 1)]
        models += [scores, hidden]
    return (*models, mask)


def padded(layers, extra: int):
    """The same with `extra` columns of padding, which hold other numbers."""
    *models, mask = layers
    result = []
    for tensors in models:
        new = []
        for tensor in tensors:
            if tensor.dim() == 4:
                tensor = F.pad(F.pad(tensor, (0, extra), value=-10003.0), (0, 0, 0, extra), value=7)
            else:
                tensor = F.pad(tensor, (0, 0, 0, extra), value=5.0)
            new.append(tensor)
        result.append(new)
    return (*result, F.pad(mask, (0, extra)))


def test_losses_are_the_mean_over_the_real_tokens_of_each_sentence():
    layers = random_layers()
    found = intermediate_losses(*layers)
    student_scores, student_hidden, teacher_scores, teacher_hidden, mask = layers
    attention = hidden = 0.0
    for row, length in enumerate(mask.sum(1).tolist()):
        for ours, other in enumerate([1, 3]):
            attention += F.mse_loss(student_scores[ours][row, :, :length, :length],
                                    teacher_scores[other][row, :, :length, :length]) / len(mask)
        for ours, other in enumerate([0, 2, 4]):
            hidden += F.mse_loss(student_hidden[ours][row, :length],
                                 teacher_hidden[other][row, :length]) / len(mask)
    torch.testing.assert_close(found["att_loss"], attention)
    torch.testing.assert_close(found["rep_loss"], hidden)


@pytest.mark.parametrize("extra", [1, 30])
def test_padding_further_does_not_change_the_losses(extra):
    layers = random_layers()
    found = intermediate_losses(*padded(layers, extra))
    for name, value in intermediate_losses(*layers).items():
        torch.testing.assert_close(found[name], value)


def test_the_originals_losses_do_depend_on_padding():
    layers = random_layers()
    near = intermediate_losses(*layers, match_original=True)
    far = intermediate_losses(*padded(layers, 30), match_original=True)
    assert abs(float(near["rep_loss"]) - float(far["rep_loss"])) > 0.1


def test_padding_receives_no_gradient():
    layers = random_layers()
    student_scores = [s.requires_grad_() for s in layers[0]]
    student_hidden = [h.requires_grad_() for h in layers[1]]
    mask = layers[4].bool()
    sum(intermediate_losses(*layers).values()).backward()
    for tensor in student_hidden:
        assert not tensor.grad[~mask].any()
        assert tensor.grad[mask].any()
    for tensor in student_scores:
        assert not tensor.grad.transpose(1, 3)[~mask].any()
        assert not tensor.grad.transpose(1, 2)[~mask].any()


def test_the_order_of_the_rows_does_not_matter():
    layers = random_layers()
    order = torch.tensor([2, 0, 3, 1])
    *models, mask = layers
    shuffled = (*([t[order] for t in tensors] for tensors in models), mask[order])
    for name, value in intermediate_losses(*layers).items():
        torch.testing.assert_close(intermediate_losses(*shuffled)[name], value)


def test_the_loss_of_a_batch_is_the_mean_of_its_rows():
    *models, mask = random_layers()
    rows = [intermediate_losses(*([t[i : i + 1] for t in m] for m in models), mask[i : i + 1])
            for i in range(len(mask))]
    for name, value in intermediate_losses(*models, mask).items():
        torch.testing.assert_close(sum(row[name] for row in rows) / len(rows), value)


def test_equal_models_have_no_loss():
    student_scores, student_hidden, _, _, mask = random_layers()
    found = intermediate_losses(student_scores, student_hidden, student_scores, student_hidden,
                                mask)
    assert float(found["att_loss"]) == float(found["rep_loss"]) == 0.0


def test_losses_of_half_precision_models_are_summed_in_float32():
    *models, mask = random_layers()
    half = [[t.bfloat16() for t in tensors] for tensors in models]
    for value in intermediate_losses(*half, mask).values():
        assert value.dtype == torch.float32
    assert attention_loss(half[0][0], half[2][0], mask, True).dtype == torch.float32
    assert hidden_loss(half[1][0], half[3][0], mask, True).dtype == torch.float32
    assert soft_cross_entropy(half[1][0][:, 0], half[3][0][:, 0]).dtype == torch.float32


def test_numbers_of_heads_that_differ_are_an_error_that_names_both():
    student = random_layers(heads=2)
    teacher = random_layers(heads=3)
    with pytest.raises(UserError, match=r"3 attention heads.*student 2"):
        intermediate_losses(*student[:2], *teacher[2:])


def test_widths_that_differ_are_an_error_that_names_both():
    student = random_layers(width=5)
    teacher = random_layers(width=6)
    with pytest.raises(UserError, match=r"width 5.*6 wide"):
        intermediate_losses(*student[:2], *teacher[2:])


# ------------------------------------------------------------------ prediction loss


@pytest.mark.parametrize("temperature", [1.0, 3.0])
def test_soft_cross_entropy_is_divergence_plus_entropy(temperature):
    student, teacher = torch.randn(5, 3, dtype=torch.float64), torch.randn(5, 3)
    probabilities = F.softmax(teacher.double() / temperature, -1)
    entropy = -(probabilities * probabilities.log()).sum(-1).mean()
    divergence = F.kl_div(F.log_softmax(student / temperature, -1), probabilities,
                          reduction="batchmean")
    found = soft_cross_entropy(student, teacher, temperature)
    assert abs(float(found) - float(divergence + entropy)) < 1e-5
    original = soft_cross_entropy(student, teacher, temperature, match_original=True)
    assert abs(float(original) * 3 - float(found)) < 1e-5


def test_soft_cross_entropy_is_least_at_the_teachers_logits():
    teacher = torch.randn(5, 3)
    student = teacher.clone().requires_grad_()
    soft_cross_entropy(student, teacher).backward()
    assert student.grad.abs().max() < 1e-6


def test_regression_learns_the_teachers_scores():
    student, teacher = torch.tensor([[1.0], [4.0]]), torch.tensor([[2.0], [2.0]])
    assert float(prediction_loss(student, teacher)) == pytest.approx((1 + 4) / 2)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_the_losses_are_computed_in_float32_under_autocast(dtype):
    torch.manual_seed(0)
    student, teacher = 700 * torch.randn(2, 4, 128, 128), 700 * torch.randn(2, 4, 128, 128)
    mask = torch.ones(2, 128, dtype=torch.int64)
    expected = attention_loss(student, teacher, mask)
    with torch.autocast("cpu", dtype):
        loss = attention_loss(student, teacher, mask)
        hidden = hidden_loss(student[:, 0], teacher[:, 0], mask)
    assert loss.dtype == hidden.dtype == torch.float32
    assert torch.equal(loss, expected)


# ------------------------------------------------------------------ compiling


@pytest.mark.parametrize("prediction", [False, True])
def test_teacher_and_losses_compile_as_whole_graphs(prediction):
    torch.manual_seed(0)
    dropout = {"hidden_dropout_prob": 0.1, "attention_probs_dropout_prob": 0.1}
    teacher = freeze(TinyBertForSequenceClassification(tiny_config(num_labels=3)))
    student = TinyBertForSequenceClassification(
        tiny_config(num_hidden_layers=2, hidden_size=12, num_labels=3, **dropout), fit_size=16)
    names = ("input_ids", "token_type_ids", "attention_mask")
    batch = dict(zip(names, random_batch(), strict=True))
    batch["teacher_logits"] = torch.randn(3, 3)
    teach = IntermediateTeacher(teacher.bert, [2])
    loss = PredictionLoss(student) if prediction else IntermediateLoss(student, is_student=True)
    expected = loss.eval()(batch, teach(batch))
    loss.compile(backend="eager", fullgraph=True, dynamic=False)
    teach.compile(backend="eager", fullgraph=True, dynamic=False)
    found = loss(batch, teach(batch))
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value)
    loss.train()(batch, teach(batch))  # with dropout
    torch._dynamo.reset()


# ------------------------------------------------------------------ pruned models


def test_a_student_with_fewer_heads_in_any_layer_is_refused_with_both_numbers():
    teacher = tiny_config(heads_per_layer=[2, 2, 1, 2])
    check_layer_heads(teacher, tiny_config(num_hidden_layers=2))
    check_layer_heads(teacher, tiny_config(heads_per_layer=[2, 2, 1, 2]))
    for heads in ([1, 2], [2, 0]):
        student = tiny_config(num_hidden_layers=2, heads_per_layer=heads)
        with pytest.raises(UserError, match=rf"teacher has 2 .* student {min(heads)}"):
            check_layer_heads(teacher, student)
    with pytest.raises(UserError, match=r"teacher has 0 .* student 0"):
        check_layer_heads(tiny_config(heads_per_layer=[0] * 4),
                          tiny_config(heads_per_layer=[0] * 4))


def test_the_loss_refuses_pruned_heads_of_a_layer_that_is_not_the_last():
    teacher = TinyBertForSequenceClassification(tiny_config())
    student = TinyBertForSequenceClassification(tiny_config(heads_per_layer=[2, 1, 2, 2]))
    batch = random_batch()
    with pytest.raises(UserError, match=r"teacher has 2 attention heads and the student 1"):
        intermediate_losses(*student(*batch)[1:], *teacher(*batch)[1:], batch[2])


def test_a_student_with_fewer_neurons_learns_the_layers():
    teacher = TinyBertForSequenceClassification(tiny_config())
    student = TinyBertForSequenceClassification(tiny_config(neurons_per_layer=[24, 0, 3, 7]))
    batch = random_batch()
    losses = intermediate_losses(*student(*batch)[1:], *teacher(*batch)[1:], batch[2])
    sum(losses.values()).backward()
    assert student.bert.encoder.layer[2].intermediate.dense.weight.grad.abs().sum() > 0

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
    check_layers,
    hidden_loss,
    hinton_loss,
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


# ------------------------------------------------------------------ Vooblin/distillation's numbers

HINTON = json.loads((GOLDEN / "vooblin_hinton_kd.json").read_text(encoding="utf-8"))
SINGLE_STAGE = json.loads((GOLDEN / "vooblin_losses.json").read_text(encoding="utf-8"))


def hinton_inputs() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """The golden file's student logits, teacher logits and labels."""
    student, teacher = (torch.tensor(HINTON[f"{name}_logits"]) for name in ("student", "teacher"))
    return student.requires_grad_(), teacher, torch.tensor(HINTON["labels"])


@pytest.mark.parametrize("case", HINTON["cases"], ids=lambda case: f"T{case['temp']:g}")
def test_golden_hinton_losses_and_gradients_match_to_1e_5(case):
    student, teacher, labels = hinton_inputs()
    temperature, a, b = case["temp"], case["a"], case["b"]
    found = hinton_loss(student, teacher, labels, temperature, a, b)
    assert found["hard_loss"].item() == pytest.approx(a * case["hard"], abs=1e-5)
    assert found["soft_loss"].item() == pytest.approx(b * case["soft"], abs=1e-5)
    total = sum(found.values())
    total.backward()
    assert total.item() == pytest.approx(case["total"], abs=1e-5)
    assert (student.grad - torch.tensor(case["gradient"])).abs().max() < 1e-5
    squared = hinton_loss(student, teacher, labels, temperature, a, b, temperature_squared=True)
    assert sum(squared.values()).item() == pytest.approx(
        case["total_with_T2"], rel=1e-6, abs=1e-5)


@pytest.mark.parametrize("case", SINGLE_STAGE["cases"], ids=lambda case: "{}_to_{}".format(
    case["teacher_layers"], case["student_layers"]))
def test_golden_layer_maps_are_those_of_vooblin_distillation(case):
    layers = case["layer_map_from_0"]
    assert map_layers(case["teacher_layers"], case["student_layers"]) == (
        layers, [0, *(layer + 1 for layer in layers)])


@pytest.mark.parametrize("case", [case for case in SINGLE_STAGE["cases"] if "teacher" in case],
                         ids=lambda case: f"{case['teacher_layers']}_layers")
def test_golden_losses_of_the_single_stage_match_to_1e_4(case):
    (teacher, student), logits = [
        ([torch.tensor(case[who]["att"]).unbind(),
          [torch.tensor(case[who]["emb"]), *torch.tensor(case[who]["hid"])]]) for who in
        ("teacher", "student")], [torch.tensor(case[who]["logits"])
                                  for who in ("student", "teacher")]
    rows = case["batch"]
    mask = torch.ones(rows, case["length"])
    parts = [intermediate_losses(*student, *teacher, mask, match_original)
             for match_original in (False, True)]
    for found in parts:  # without padding both are the same
        attention, hidden = float(found["att_loss"]), float(found["rep_loss"])
        assert attention == pytest.approx(sum(case["attention_losses"]), abs=1e-4)
        assert hidden == pytest.approx(
            case["embedding_loss"] + sum(case["hidden_losses"]), abs=1e-4)
    prediction = rows * float(soft_cross_entropy(*logits))  # there a sum over the rows
    assert prediction == pytest.approx(case["prediction_loss"], abs=1e-4)
    assert attention + hidden == pytest.approx(case["original"]["run_pretraining.py"], abs=1e-4)
    assert attention + hidden + prediction == pytest.approx(
        case["original"]["run_finetuning.py"], abs=1e-4)


# ------------------------------------------------------------------ layers


def test_layers_are_mapped_as_in_the_paper():
    assert map_layers(12, 4) == ([2, 5, 8, 11], [0, 3, 6, 9, 12])
    assert map_layers(12, 6) == ([1, 3, 5, 7, 9, 11], [0, 2, 4, 6, 8, 10, 12])
    assert map_layers(6, 3) == ([1, 3, 5], [0, 2, 4, 6])
    assert map_layers(4, 4) == ([0, 1, 2, 3], [0, 1, 2, 3, 4])
    assert map_layers(5, 1) == ([4], [0, 5])


@pytest.mark.parametrize("teacher", range(1, 26))
def test_depths_that_do_not_divide_are_spread_as_evenly_as_can_be(teacher):
    for student in range(1, teacher + 1):
        attention, hidden = map_layers(teacher, student)
        steps = np.diff(hidden)
        assert hidden[0] == 0 and hidden[-1] == teacher and len(attention) == student
        assert steps.min() >= 1 and steps.max() - steps.min() <= 1
        assert attention == [layer - 1 for layer in hidden[1:]]
        if teacher % student == 0:
            assert hidden == list(range(0, teacher + 1, teacher // student))


def test_chosen_layers_take_the_place_of_the_rules():
    assert map_layers(12, 3, [1, 2, 12]) == ([0, 1, 11], [0, 1, 2, 12])


@pytest.mark.parametrize("chosen", [[2, 4], [1, 2, 3, 4], [0, 1, 2], [4, 5, 7], [1, 3, 3],
                                    [3, 2, 1]])
def test_chosen_layers_that_cannot_be_are_one_line_with_what_was_expected(chosen):
    with pytest.raises(UserError, match=rf"--layer_map {' '.join(map(str, chosen))}: expected 3 "
                                        "ascending numbers from 1 to 6"):
        map_layers(6, 3, chosen)


@pytest.mark.parametrize(("teacher", "student"), [(4, 6), (12, 0), (12, -1)])
def test_a_student_without_layers_or_deeper_than_its_teacher_is_an_error(teacher, student):
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


def test_without_the_attention_loss_heads_may_differ():
    student, teacher = random_layers(heads=2), random_layers(heads=3)
    found = intermediate_losses(*student[:2], *teacher[2:], attention=False)
    assert set(found) == {"rep_loss"}
    alike = intermediate_losses(*student[:2], teacher[2], teacher[3], student[4], attention=False)
    assert torch.equal(found["rep_loss"], alike["rep_loss"])


def test_chosen_layers_are_those_that_are_compared():
    student_scores, student_hidden, teacher_scores, teacher_hidden, mask = random_layers()
    chosen = map_layers(4, 2, [1, 4])
    found = intermediate_losses(student_scores, student_hidden, teacher_scores, teacher_hidden,
                                mask, layer_map=chosen)
    picked = intermediate_losses(
        student_scores, student_hidden, [teacher_scores[layer] for layer in (0, 3)],
        [teacher_hidden[layer] for layer in (0, 1, 4)], mask)
    assert all(torch.equal(found[name], picked[name]) for name in found)


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


def test_hinton_regression_is_squared_errors_of_label_and_teacher_without_temperature():
    student, teacher = torch.tensor([[1.0], [4.0]]), torch.tensor([[2.0], [2.0]])
    found = hinton_loss(student, teacher, torch.tensor([0.0, 1.0]), 5.0, 0.5, 2.0,
                        temperature_squared=True)
    assert float(found["hard_loss"]) == pytest.approx(0.5 * (1 + 9) / 2)
    assert float(found["soft_loss"]) == pytest.approx(2 * (1 + 4) / 2)


def test_a_row_whose_label_does_not_count_has_the_soft_term_alone():
    student, teacher, labels = hinton_inputs()
    mask = torch.tensor([True, False, False, True, False, False])
    found = hinton_loss(student, teacher, labels, 2.0, 1.0, 1.0, label_mask=mask)
    alone = hinton_loss(student[mask], teacher[mask], labels[mask], 2.0, 1.0, 1.0)
    assert found["hard_loss"].item() == pytest.approx(alone["hard_loss"].item() * 2 / 6)
    full = hinton_loss(student, teacher, labels, 2.0, 1.0, 1.0)
    assert torch.equal(found["soft_loss"], full["soft_loss"])


def test_the_default_weights_leave_the_papers_loss_as_it_is():
    student, teacher, labels = hinton_inputs()
    batch = {"labels": labels}
    assert PredictionLoss(torch.nn.Identity(), 3.0).losses(batch, student, teacher) == {
        "cls_loss": soft_cross_entropy(student, teacher, 3.0)}
    for settings in ({"hard_weight": 0.1}, {"soft_weight": 0.5}, {"temperature_squared": True}):
        loss = PredictionLoss(torch.nn.Identity(), 3.0, **settings)
        assert loss.losses(batch, student, teacher).keys() == {"hard_loss", "soft_loss"}


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


@pytest.mark.parametrize("stage", ["intermediate", "prediction", "joint"])
def test_teacher_and_losses_compile_as_whole_graphs(stage):
    torch.manual_seed(0)
    dropout = {"hidden_dropout_prob": 0.1, "attention_probs_dropout_prob": 0.1}
    teacher = freeze(TinyBertForSequenceClassification(tiny_config(num_labels=3)))
    student = TinyBertForSequenceClassification(
        tiny_config(num_hidden_layers=2, hidden_size=12, num_labels=3, **dropout), fit_size=16)
    names = ("input_ids", "token_type_ids", "attention_mask")
    batch = dict(zip(names, random_batch(), strict=True))
    batch |= {"teacher_logits": torch.randn(3, 3), "labels": torch.tensor([0, 2, 1])}
    teach = IntermediateTeacher(teacher if stage == "joint" else teacher.bert, [1, 3])
    loss = PredictionLoss(student, hard_weight=0.5 if stage == "joint" else 0.0)
    if stage != "prediction":
        loss = IntermediateLoss(student, map_layers(4, 2), is_student=True,
                                prediction=loss if stage == "joint" else None)
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
    check_layers(teacher, tiny_config(num_hidden_layers=2))
    check_layers(teacher, tiny_config(heads_per_layer=[2, 2, 1, 2]))
    for heads in ([1, 2], [2, 0]):
        student = tiny_config(num_hidden_layers=2, heads_per_layer=heads)
        with pytest.raises(UserError, match=rf"teacher has 2 .* student {min(heads)}"):
            check_layers(teacher, student)
    with pytest.raises(UserError, match=r"teacher has 0 .* student 0"):
        check_layers(tiny_config(heads_per_layer=[0] * 4), tiny_config(heads_per_layer=[0] * 4))


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

"""Optimizer steps: micro-batches, batches made in advance, several students on one teacher."""

import threading
import time

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from helpers import random_batch, tiny_config
from torch import nn

from transformer.batching import micro_batches, padded_collate, prefetch
from transformer.distillation import (
    IntermediateLoss,
    IntermediateTeacher,
    PredictionLoss,
    map_layers,
    no_teacher,
)
from transformer.modeling import TinyBertForSequenceClassification, freeze
from transformer.optimization import BertAdam
from transformer.training import RandomState, StudentTrainer, autocast, train

CPU = torch.device("cpu")


def make_teacher() -> TinyBertForSequenceClassification:
    torch.manual_seed(0)
    return TinyBertForSequenceClassification(
        tiny_config(hidden_dropout_prob=0.3, attention_probs_dropout_prob=0.3, num_labels=3))


def distil(accumulation: int, prediction: bool, rows: int = 7, pad_to: int = 0, steps: int = 1):
    """Train a tiny student; returns its weights and losses, and the teacher."""
    teacher = make_teacher()
    student = TinyBertForSequenceClassification(
        tiny_config(num_hidden_layers=2, hidden_size=12, num_labels=3), fit_size=16)
    loss = (PredictionLoss(student, 1.0, False) if prediction
            else IntermediateLoss(student, map_layers(4, 2), is_student=True))
    optimizer = BertAdam(student.parameters(), lr=1e-2, schedule="none")
    ids, segments, mask = random_batch(rows, 11)
    lengths = mask.sum(1)
    with torch.no_grad():
        teacher_logits = freeze(teacher)(ids, segments, mask)[0]

    def collate(part):
        width = max(pad_to, int(lengths[list(part)].max()))
        cut = [F.pad(t[list(part)], (0, max(0, width - 11)))[:, :width]
               for t in (ids, segments, mask)]
        batch = dict(zip(("input_ids", "token_type_ids", "attention_mask"), cut, strict=True))
        return batch | {"teacher_logits": teacher_logits[list(part)]}

    teach = no_teacher if prediction else IntermediateTeacher(teacher.bert, [1, 3])
    size = -(-rows // accumulation)
    passes = [(collate, [micro_batches(list(range(rows)), size)])] * steps
    history = [{k: float(v) for k, v in step.losses[0].items()}
               for step in train([StudentTrainer(student, loss, optimizer, CPU)], teach, passes,
                                 steps, CPU)]
    return student.state_dict(), history, teacher


@pytest.mark.parametrize("prediction", [False, True])
def test_a_step_does_not_depend_on_the_width_that_the_batch_is_padded_to(prediction):
    narrow, losses, _ = distil(1, prediction)
    wide, wide_losses, _ = distil(1, prediction, pad_to=40)
    for name, value in losses[0].items():
        assert wide_losses[0][name] == pytest.approx(value, abs=1e-5)
    for name, tensor in narrow.items():
        if "key.bias" not in name:
            torch.testing.assert_close(wide[name], tensor, rtol=0, atol=2e-4, msg=name)


def test_the_teacher_stays_as_it_was_without_dropout_and_without_gradients():
    _, history, teacher = distil(2, False, steps=3)
    assert not any(module.training for module in teacher.modules())
    assert all(p.grad is None and not p.requires_grad for p in teacher.parameters())
    ids = torch.tensor([[5, 6, 7]])
    assert torch.equal(teacher(ids)[0], teacher(ids)[0])
    assert len(history) == 3


def sum_of_squares(model: nn.Linear, seen: list | None = None):
    def loss(batch, teacher_outputs):
        if seen is not None:
            seen.append(model.weight.grad is None)
        return {"loss": model(batch["x"]).square().mean()}

    return loss


def ones(rows):
    return {"x": torch.ones(len(rows), 1)}


def test_no_gradient_is_carried_into_the_next_step():
    model, seen = nn.Linear(1, 1, bias=False), []
    trainer = StudentTrainer(model, sum_of_squares(model, seen),
                      torch.optim.SGD(model.parameters(), lr=0.1), CPU)
    steps = list(train([trainer], no_teacher, [(ones, [[[0, 1]], [[2]]])] * 2, 4, CPU))
    assert seen == [True] * 4
    assert [step.epoch_ends for step in steps] == [False, True, False, True]
    assert [step.rows for step in steps] == [2, 1, 2, 1]


def test_micro_batches_hold_every_row_once():
    for rows in range(1, 9):
        for size in range(1, 10):
            split = micro_batches(list(range(rows)), size)
            assert sum(split, []) == list(range(rows))
            assert all(len(part) == size for part in split[:-1]) and split[-1]


# ------------------------------------------------------------------ several students


def test_a_student_may_accumulate_several_of_the_shared_steps():
    torch.manual_seed(0)
    model = nn.Linear(1, 1, bias=False)
    start = model.weight.detach().clone()

    def loss(batch, teacher_outputs):
        return {"loss": (model.weight * batch["x"]).mean()}

    def collate(rows):
        return {"x": torch.tensor([float(row) for row in rows])}

    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    trainer = StudentTrainer(model, loss, optimizer, CPU, accumulation=2)
    steps = list(train([trainer], no_teacher, [(collate, [[[1, 2]], [[3], [4]], [[8]]])], 3, CPU))
    assert [step.losses[0] is None for step in steps] == [True, False, False]
    # Means over all rows of a step, the second step cut short by the end of the epoch.
    assert float((start - model.weight).detach()) == pytest.approx((1 + 2 + 3 + 4) / 4 + 8)
    assert float(steps[1].losses[0]["loss"]) == pytest.approx(float(start) * 2.5)


def test_the_teacher_gives_the_scores_that_students_learn_from_and_no_others():
    teacher = make_teacher()
    teacher_outputs = IntermediateTeacher(freeze(teacher).bert, [3, 1, 3])(
        dict(zip(("input_ids", "token_type_ids", "attention_mask"), random_batch(), strict=True)))
    needed = [scores is not None for scores in teacher_outputs.attention_scores]
    assert needed == [False, True, False, True]
    assert len(teacher_outputs.hidden_states) == 5


def test_random_numbers_inside_a_state_do_not_depend_on_those_outside():
    torch.manual_seed(3)
    expected = torch.rand(4)
    torch.manual_seed(3)
    state = RandomState(CPU)
    drawn = []
    for _ in range(2):
        torch.rand(7)
        with state.active():
            drawn.append(torch.rand(2))
    assert torch.equal(torch.cat(drawn), expected)


# ------------------------------------------------------------------ batches in advance


def test_items_are_made_in_advance_and_come_in_order():
    made, four = [], threading.Event()

    def items():
        for number in range(20):
            made.append(number)
            if len(made) == 4:
                four.set()
            yield number

    reader = prefetch(items(), ahead=3)
    assert next(reader) == 0
    assert four.wait(60), "three are made before they are asked for"
    for number in range(1, 20):
        assert len(made) <= number + 4  # one was read, three are ready, one waits for its place
        assert next(reader) == number


def test_an_error_in_the_thread_is_raised_where_the_items_are_read():
    def items():
        yield 1
        raise ValueError("row 7 is damaged")

    reader = prefetch(items())
    assert next(reader) == 1
    with pytest.raises(ValueError, match="row 7"):
        next(reader)


def test_leaving_early_ends_the_thread():
    def endless():
        while True:
            yield 0

    before = threading.active_count()
    reader = prefetch(endless(), ahead=2)
    next(reader)
    assert threading.active_count() == before + 1
    reader.close()
    assert threading.active_count() == before


def test_waiting_for_batches_is_reported():
    def slowly(rows):
        time.sleep(0.01)
        return ones(rows)

    model = nn.Linear(1, 1)
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    trainer = StudentTrainer(model, sum_of_squares(model), optimizer, CPU)
    [step] = train([trainer], no_teacher, [(slowly, [[[0]]])], 1, CPU)
    assert step.waited > 0


class Rows:
    """Rows of given lengths, each piece the row's number."""

    def __init__(self, lengths):
        self.lengths = np.asarray(lengths)

    def collate(self, rows, pad_to=None):
        return {"input_ids": torch.zeros(len(rows), pad_to or int(self.lengths[rows].max()))}


def test_batches_come_in_at_most_8_lengths_that_hold_their_rows():
    lengths = np.random.default_rng(0).integers(5, 120, 500)
    for multiple in (1, 8):
        collate = padded_collate(Rows(lengths), multiple)
        widths = [(collate([row, (row * 7) % 500])["input_ids"].shape[1],
                   max(lengths[row], lengths[(row * 7) % 500])) for row in range(500)]
        assert all(width >= longest for width, longest in widths)
        assert len({width for width, _ in widths}) <= 8
        assert all(width % multiple == 0 for width, _ in widths)
    assert padded_collate(Rows(lengths), 8, pad_to=128)([3])["input_ids"].shape == (1, 128)


def test_autocast_computes_in_the_named_type():
    matrix = torch.ones(2, 2)
    with autocast(CPU, torch.bfloat16):
        assert (matrix @ matrix).dtype == torch.bfloat16
    with autocast(CPU, None):
        assert (matrix @ matrix).dtype == torch.float32

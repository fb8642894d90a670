"""BertAdam and its schedules."""

import json

import numpy as np
import pytest
import torch
from helpers import GOLDEN, make_model
from torch import nn

from transformer.optimization import SCHEDULES, BertAdam, param_groups


@pytest.mark.parametrize("number", [0, 1])
def test_golden_trajectories_are_followed_to_1e_6(number):
    golden = np.load(GOLDEN / f"bertadam_{number}.npz")
    hyper = json.loads(str(golden["hyper"][0]))
    names = [key.removeprefix("init/") for key in golden.files if key.startswith("init/")]
    parameters = {n: nn.Parameter(torch.from_numpy(golden[f"init/{n}"].copy())) for n in names}
    free = [n for n in names if "bias" in n or "LayerNorm" in n]
    groups = [
        {"params": [parameters[n] for n in names if n not in free], "weight_decay": 0.01},
        {"params": [parameters[n] for n in free], "weight_decay": 0.0},
    ]
    optimizer = BertAdam(groups, lr=hyper["lr"], warmup=hyper["warmup"],
                         t_total=hyper["t_total"], schedule=hyper["schedule"])
    for step in range(hyper["steps"]):
        for name, parameter in parameters.items():
            parameter.grad = torch.from_numpy(golden[f"grad/{name}"][step].copy())
        optimizer.step()
        for name, parameter in parameters.items():
            wanted = torch.from_numpy(golden[f"traj/{name}"][step])
            assert (parameter - wanted).abs().max() < 1e-6, (name, step)


def plain_step(parameter, gradient, first, second, lr, decay):
    """The update written out for one tensor, in float64."""
    gradient = gradient * min(1.0, 1.0 / (float(gradient.norm()) + 1e-6))
    first = 0.9 * first + 0.1 * gradient
    second = 0.999 * second + 0.001 * gradient**2
    return parameter - lr * (first / (second.sqrt() + 1e-6) + decay * parameter), first, second


# The last ones are larger than any block in which an implementation may go through a tensor.
@pytest.mark.parametrize("shape", [(), (1,), (7,), (33, 65), (300, 1000), (1 << 20) + 13])
def test_tensors_of_every_size_follow_the_written_out_update(shape):
    torch.manual_seed(0)
    parameter = nn.Parameter(torch.randn(shape) if not isinstance(shape, int)
                             else torch.randn(shape))
    expected = parameter.detach().double()
    first = second = torch.zeros_like(expected)
    optimizer = BertAdam([parameter], lr=0.01, schedule="none")
    for _ in range(3):
        gradient = 3 * torch.randn_like(parameter)
        parameter.grad = gradient.clone()
        optimizer.step()
        expected, first, second = plain_step(
            expected, gradient.double(), first, second, 0.01, 0.01)
        torch.testing.assert_close(parameter.detach().double(), expected, rtol=0, atol=1e-6)


def test_many_tensors_together_move_as_each_alone():
    torch.manual_seed(1)
    shapes = [(50, 40), (40,), (700, 90), (3, 5, 7), (1,)]
    values = [torch.randn(shape) for shape in shapes]
    gradients = [torch.randn(shape) for shape in shapes]
    together = [nn.Parameter(value.clone()) for value in values]
    alone = [nn.Parameter(value.clone()) for value in values]
    optimizers = [BertAdam(together, lr=0.1), *(BertAdam([p], lr=0.1) for p in alone)]
    for _ in range(2):
        for parameters in (together, alone):
            for parameter, gradient in zip(parameters, gradients, strict=True):
                parameter.grad = gradient.clone()
        for optimizer in optimizers:
            optimizer.step()
    for first, second in zip(together, alone, strict=True):
        torch.testing.assert_close(first, second, rtol=0, atol=1e-7)


def test_a_gradient_that_autograd_makes_transposed_is_used_in_place():
    torch.manual_seed(2)
    values, inputs = torch.randn(6, 5), torch.randn(6, 3)
    first, second = nn.Parameter(values.clone()), nn.Parameter(values.clone())
    (first.t() @ inputs).square().sum().backward()  # the product's gradient is a transpose
    second.grad = (2 * inputs @ (inputs.t() @ values)).contiguous()
    torch.testing.assert_close(first.grad, second.grad)
    for parameter in (first, second):
        BertAdam([parameter], lr=0.1).step()
    torch.testing.assert_close(first, second)


def test_parameters_without_gradient_do_not_move_and_do_not_decay():
    used, unused = nn.Parameter(torch.ones(3)), nn.Parameter(torch.ones(3))
    optimizer = BertAdam([used, unused], lr=0.1)
    used.grad = torch.ones(3)
    optimizer.step()
    assert torch.equal(unused, torch.ones(3))
    assert not torch.equal(used, torch.ones(3))


def test_weight_decay_leaves_biases_and_layer_norms_alone(tmp_path):
    model = make_model(tmp_path / "model")
    decayed, free = param_groups(model, 0.5)
    assert (decayed["weight_decay"], free["weight_decay"]) == (0.5, 0.0)
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    free_names = {names[id(p)] for p in free["params"]}
    decayed_names = {names[id(p)] for p in decayed["params"]}
    assert "bert.embeddings.LayerNorm.weight" in free_names
    assert "classifier.bias" in free_names
    assert "bert.embeddings.word_embeddings.weight" in decayed_names
    assert len(free_names) + len(decayed_names) == len(names)


def test_frozen_parameters_are_in_no_group(tmp_path):
    model = make_model(tmp_path / "model").requires_grad_(False)
    assert all(not group["params"] for group in param_groups(model, 0.01))


@pytest.mark.parametrize(("name", "factors"), [
    # at 0, half of the warm-up, its end, the middle of the rest, the end
    ("warmup_linear", [0, 0.5, 1, 0.5, 0]),
    ("warmup_constant", [0, 0.5, 1, 1, 1]),
    ("warmup_cosine", [0, 0.5, 0.5 * (1 + np.cos(0.2 * np.pi)), 0.5 * (1 + np.cos(0.6 * np.pi)),
                       0]),
])
def test_schedules_rise_and_fall_as_named(name, factors):
    found = [SCHEDULES[name](progress, 0.2) for progress in (0, 0.1, 0.2, 0.6, 1.0)]
    np.testing.assert_allclose(found, factors, atol=1e-6)


def test_get_lr_is_the_rate_of_the_next_step():
    parameter = nn.Parameter(torch.zeros(1))
    optimizer = BertAdam([parameter], lr=1.0, warmup=0.5, t_total=4)
    rates = []
    for _ in range(5):
        rates += optimizer.get_lr()
        parameter.grad = torch.ones(1)
        optimizer.step()
    np.testing.assert_allclose(rates, [0, 0.5, 1, 0.5, 0])


def test_state_survives_saving_and_loading():
    def fresh():
        parameter = nn.Parameter(torch.ones(3))
        return parameter, BertAdam([parameter], lr=0.1, warmup=0.1, t_total=10)

    def advance(parameter, optimizer, steps):
        for _ in range(steps):
            parameter.grad = parameter.detach() * 0.3
            optimizer.step()

    straight, optimizer = fresh()
    advance(straight, optimizer, 6)
    first, optimizer = fresh()
    advance(first, optimizer, 3)
    second, resumed = fresh()
    second.data.copy_(first.data)
    resumed.load_state_dict(optimizer.state_dict())
    advance(second, resumed, 3)
    assert torch.equal(straight, second)


@pytest.mark.parametrize("wrong", [
    {"lr": -1.0}, {"lr": 1.0, "warmup": 1.0}, {"lr": 1.0, "b1": 1.0}, {"lr": 1.0, "b2": -0.1},
    {"lr": 1.0, "schedule": "no_such"},
])
def test_impossible_settings_are_refused(wrong):
    with pytest.raises(ValueError, match=r"expected"):
        BertAdam([nn.Parameter(torch.zeros(1))], **wrong)

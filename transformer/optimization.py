"""BertAdam, the optimizer of the original BERT: Adam without bias correction, decoupled decay."""

from collections.abc import Callable, Iterable

import torch
from torch import nn
from torch.optim.adamw import adamw

# With this step count Adam's bias corrections, 1 - beta ** step, are 1 in float32.
NO_BIAS_CORRECTION = 1e9

# A schedule maps (progress in [0, 1], warm-up share in [0, 1]) to a factor of the learning rate.
Schedule = Callable[[float, float], float]


def warmup_constant(progress: float, warmup: float) -> float:
    """Linear increase over the warm-up share, then 1."""
    return progress / warmup if progress < warmup else 1.0


def warmup_linear(progress: float, warmup: float) -> float:
    """Linear increase over the warm-up share, then linear decrease to 0 at the end."""
    if progress < warmup:
        return progress / warmup
    return max(0.0, (progress - 1.0) / (warmup - 1.0))


def warmup_cosine(progress: float, warmup: float) -> float:
    """Linear increase over the warm-up share, then half a cosine wave down to 0 at the end."""
    if progress < warmup:
        return progress / warmup
    return 0.5 * (1.0 + float(torch.cos(torch.tensor(torch.pi * progress))))


SCHEDULES: dict[str, Schedule | None] = {
    "none": None,
    "warmup_constant": warmup_constant,
    "warmup_linear": warmup_linear,
    "warmup_cosine": warmup_cosine,
}


def param_groups(model: nn.Module, weight_decay: float) -> list[dict]:
    """Split the trainable parameters of `model` into those that decay and those that do not.

    Biases and LayerNorm parameters do not decay, as in BERT's pre-training.
    """
    decayed, free = [], []
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            (free if "bias" in name or "LayerNorm" in name else decayed).append(parameter)
    return [
        {"params": decayed, "weight_decay": weight_decay},
        {"params": free, "weight_decay": 0.0},
    ]


class BertAdam(torch.optim.Optimizer):
    """Adam as BERT was trained with it (Devlin et al. 2019, appendix A.2).

    It differs from `torch.optim.AdamW` in three ways: no bias correction, the decay is added to
    the update before the learning rate multiplies both, and each tensor's gradient is clipped to
    `max_grad_norm` by itself.

    Args:
        params: parameters or groups; a group may set its own `weight_decay`.
        lr: peak learning rate.
        warmup: share of `t_total` over which the rate rises; -1 means none.
        t_total: number of steps the schedule spans; -1 means a constant rate.
        schedule: a name in `SCHEDULES`, or a function of (progress, warmup).
        b1, b2, e: decay rates of the two moments, and the term that keeps the divisor positive.
        weight_decay: decoupled decay.
        max_grad_norm: largest 2-norm of one tensor's gradient; -1 means no clipping.
    """

    def __init__(
        self,
        params: Iterable,
        lr: float,
        warmup: float = -1,
        t_total: int = -1,
        schedule: str | Schedule | None = "warmup_linear",
        b1: float = 0.9,
        b2: float = 0.999,
        e: float = 1e-6,
        weight_decay: float = 0.01,
        max_grad_norm: float = 1.0,
    ) -> None:
        if lr < 0:
            raise ValueError(f"lr is {lr}; expected a number >= 0")
        if warmup != -1 and not 0 <= warmup < 1:
            raise ValueError(f"warmup is {warmup}; expected a share in [0, 1) or -1")
        for name, beta in (("b1", b1), ("b2", b2)):
            if not 0 <= beta < 1:
                raise ValueError(f"{name} is {beta}; expected a number in [0, 1)")
        if isinstance(schedule, str):
            if schedule not in SCHEDULES:
                raise ValueError(f"schedule is {schedule!r}; expected one of {sorted(SCHEDULES)}")
            schedule = SCHEDULES[schedule]
        self.schedule, self.warmup, self.t_total = schedule, warmup, t_total
        defaults = {
            "lr": lr, "b1": b1, "b2": b2, "e": e,
            "weight_decay": weight_decay, "max_grad_norm": max_grad_norm,
        }
        self._updates: dict[torch.Tensor, torch.Tensor] = {}  # scratch, reused step by step
        self._steps: dict[torch.device, torch.Tensor] = {}
        super().__init__(params, defaults)

    def get_lr(self) -> list[float]:
        """Return the learning rate that each group's next step will use."""
        return [self._scheduled(group) for group in self.param_groups]

    def _scheduled(self, group: dict) -> float:
        if self.schedule is None or self.t_total == -1:
            return group["lr"]
        progress = group.get("step", 0) / self.t_total
        return group["lr"] * self.schedule(progress, max(self.warmup, 0.0))

    @torch.no_grad()
    def step(self, closure: Callable | None = None) -> torch.Tensor | None:
        """Update every parameter that has a gradient, group by group, without host syncs."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            parameters = [p for p in group["params"] if p.grad is not None]
            if parameters:
                self._step_group(group, parameters)
            group["step"] = group.get("step", 0) + 1
        return loss

    def _step_of(self, device: torch.device) -> torch.Tensor:
        """Return the step count that all of Adam's tensors on `device` share."""
        if device not in self._steps:
            self._steps[device] = torch.tensor(NO_BIAS_CORRECTION, device=device)
        return self._steps[device]

    def _step_group(self, group: dict, parameters: list[torch.Tensor]) -> None:
        for p in parameters:
            if not self.state[p]:
                self.state[p]["next_m"] = torch.zeros_like(p)
                self.state[p]["next_v"] = torch.zeros_like(p)
        gradients = [p.grad.contiguous() for p in parameters]  # as the fused kernel expects
        if group["max_grad_norm"] > 0:
            clip_each(gradients, group["max_grad_norm"])
        # Adam's part, by the fused kernel, which reads and writes each tensor once: written out
        # as single operations, the step of a small BERT on a CPU outlasts its forward and
        # backward pass. It goes to tensors of its own, not onto the parameters, because these
        # are to be rounded once a step, as in the original.
        for p in parameters:
            if p not in self._updates:
                self._updates[p] = torch.empty_like(p)
        updates = [self._updates[p] for p in parameters]
        torch._foreach_zero_(updates)
        lr = self._scheduled(group)
        adamw(
            updates, gradients,
            exp_avgs=[self.state[p]["next_m"] for p in parameters],
            exp_avg_sqs=[self.state[p]["next_v"] for p in parameters],
            max_exp_avg_sqs=[],
            state_steps=[self._step_of(p.device)] * len(parameters),
            fused=True, amsgrad=False, maximize=False,
            beta1=group["b1"], beta2=group["b2"], eps=group["e"], lr=lr, weight_decay=0.0,
        )
        if group["weight_decay"] > 0:
            torch._foreach_add_(updates, parameters, alpha=-lr * group["weight_decay"])
        torch._foreach_add_(parameters, updates)


def clip_each(gradients: list[torch.Tensor], max_norm: float) -> None:
    """Scale each gradient with a 2-norm above `max_norm` down to it, in place."""
    # The 1e-6 is that of torch.nn.utils.clip_grad_norm_, which the original calls.
    norms = torch.stack(torch._foreach_norm(gradients))
    factors = (max_norm * (norms + 1e-6).reciprocal()).clamp(max=1.0)
    if factors.device.type == "cpu":  # reading them costs nothing there
        for gradient, factor in zip(gradients, factors.tolist(), strict=True):
            if factor < 1.0:
                gradient.mul_(factor)
    else:
        torch._foreach_mul_(gradients, factors.unbind())

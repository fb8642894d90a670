"""Optimizer steps of several students that share one teacher's forward pass."""

import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, closing, contextmanager, nullcontext
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from transformer import distributed
from transformer.batching import Batch, Pass, prefetch


def to_device(batch: Batch, device: torch.device) -> Batch:
    """Return the batch with every tensor on `device`."""
    return {name: tensor.to(device, non_blocking=True) for name, tensor in batch.items()}


def autocast(device: torch.device, dtype: torch.dtype | None) -> AbstractContextManager:
    """Return a context that computes in `dtype` where that is safe; None computes in float32."""
    return nullcontext() if dtype is None else torch.autocast(device.type, dtype=dtype)


# ------------------------------------------------------------------ one student


class RandomState:
    """The state of torch's random number generators that belongs to one student."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.state = self._read()

    def _read(self) -> list[Tensor]:
        states = [torch.get_rng_state()]
        if self.device.type == "cuda":
            states.append(torch.cuda.get_rng_state(self.device))
        return states

    def _write(self, states: list[Tensor]) -> None:
        torch.set_rng_state(states[0])
        if self.device.type == "cuda":
            torch.cuda.set_rng_state(states[1], self.device)

    @contextmanager
    def active(self) -> Iterator[None]:
        """Draw from this state inside the block, and from the one before it afterwards."""
        outside = self._read()
        self._write(self.state)
        try:
            yield
        finally:
            self.state = self._read()
            self._write(outside)


class StudentTrainer:
    """The training state of one student: model, loss, optimizer, gradient scaler, random state.

    The random state starts from torch's at this moment, so that a student learns the same alone
    and beside others. Under torchrun the processes add up their gradients, and each has a random
    state of its own.

    Args:
        student: trained in place.
        loss: a module around the student, from a batch and the teacher's outputs to named
            losses, each a mean over rows; their sum is minimised.
        optimizer: of the student.
        device: where the student is.
        dtype: autocast precision; None computes in float32. float16 scales the loss.
        accumulation: how many steps of the smallest batch size make one of this student's.
    """

    def __init__(
        self, student: nn.Module, loss: Callable[[Batch, Any], dict[str, Tensor]],
        optimizer: torch.optim.Optimizer, device: torch.device, dtype: torch.dtype | None = None,
        accumulation: int = 1,
    ) -> None:
        self.student, self.loss, self.optimizer = student, loss, optimizer
        self.device, self.dtype, self.accumulation = device, dtype, accumulation
        self.scaler = torch.amp.GradScaler(device.type, enabled=dtype == torch.float16)
        self.processes = distributed.world_size()
        self.parallel_loss = loss
        if self.processes > 1:
            # Each stage leaves some part of a student without gradient, a head or `fit_dense`.
            self.parallel_loss = DistributedDataParallel(loss, find_unused_parameters=True)
            torch.manual_seed(torch.initial_seed() % 2**63 + distributed.rank())
        self.random_state = RandomState(device)
        self.step_losses: dict[str, Tensor] = {}

    def accumulate(
        self, batch: Batch, teacher_outputs: Any, share: float, step_ends: bool = True
    ) -> None:
        """Add the gradient of a micro-batch that holds `share` of the rows of the student's step.

        The processes add up their gradients where the step ends.
        """
        in_sync = self.processes == 1 or step_ends
        with nullcontext() if in_sync else self.parallel_loss.no_sync(), \
                self.random_state.active():
            with autocast(self.device, self.dtype):
                losses = self.parallel_loss(batch, teacher_outputs)
            # DistributedDataParallel averages the processes' gradients; their sum is wanted.
            scaled = sum(losses.values()) * (share * self.processes)
            self.scaler.scale(scaled).backward()
        for name, value in losses.items():
            value = value.detach() * share
            self.step_losses[name] = self.step_losses.get(name, 0.0) + value

    def step(self) -> dict[str, Tensor]:
        """Take the optimizer's step; returns its losses, still on the device."""
        self.scaler.step(self.optimizer)
        self.scaler.update()
        self.optimizer.zero_grad()
        losses, self.step_losses = self.step_losses, {}
        return losses

    def state(self) -> dict[str, Any]:
        """Return what `load_state` takes, without `random_state`."""
        return {"student": self.student.state_dict(), "optimizer": self.optimizer.state_dict(),
                "scaler": self.scaler.state_dict()}

    def load_state(self, state: dict[str, Any], random_state: list[Tensor] | None) -> None:
        """Continue from what `state` returned; None keeps the random state as it is."""
        self.student.load_state_dict(state["student"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.scaler.load_state_dict(state["scaler"])
        if random_state is not None:
            self.random_state.state = random_state


# ------------------------------------------------------------------ the stream of micro-batches


class MicroBatch(NamedTuple):
    """Rows of one forward and backward pass in this process.

    batch: their tensors.
    shares: for each student, which part of its optimizer step's rows they are.
    step_ends: for each student, whether its optimizer step follows.
    last: whether a step of the smallest batch size ends here.
    rows: of that step, over all processes.
    epoch_ends: whether that step is the last of a pass.
    """

    batch: Batch
    shares: list[float]
    step_ends: list[bool]
    last: bool
    rows: int
    epoch_ends: bool


def process_share(parts: list[Sequence[int]], rank: int, processes: int) -> list[Sequence[int]]:
    """Return what one of several processes computes of a step's micro-batches.

    Whole micro-batches where every process gets as many, otherwise some rows of each.
    """
    if len(parts) % processes == 0:
        return parts[rank::processes]
    return [part[rank::processes] for part in parts]


def stream(
    passes: Iterable[Pass], accumulation: Sequence[int], steps: int, device: torch.device,
    done: int = 0,
) -> Iterator[MicroBatch]:
    """Make the micro-batches of `steps` steps, in pinned memory where `device` is a GPU.

    The arguments are those of `train`, and each student's `accumulation`. The end of a pass ends
    every student's step.
    """
    on_gpu = device.type == "cuda"
    if on_gpu:
        torch.cuda.set_device(device)  # this thread's, for the pinned memory
    rank, processes = distributed.rank(), distributed.world_size()
    for collate, step_parts in passes:
        step_parts = step_parts[: done + steps]
        sizes = [sum(map(len, parts)) for parts in step_parts]
        for place in range(done, len(step_parts)):
            epoch_ends = place + 1 == len(step_parts)
            totals = [sum(sizes[place // several * several :][:several])
                      for several in accumulation]
            ends = [epoch_ends or (place + 1) % several == 0 for several in accumulation]
            own = process_share(step_parts[place], rank, processes)
            for number, part in enumerate(own, start=1):
                # Fewer rows than processes: this one computes a row that does not count.
                batch = collate(part if len(part) else step_parts[place][0][:1])
                if on_gpu:
                    batch = {name: tensor.pin_memory() for name, tensor in batch.items()}
                last = number == len(own)
                yield MicroBatch(batch, [len(part) / total for total in totals],
                                 [last and end for end in ends], last, sizes[place], epoch_ends)
        steps -= len(step_parts) - done
        done = 0
        del collate, step_parts  # they hold the epoch's data, and the next one is read now
        if not steps:
            return


# ------------------------------------------------------------------ training steps


class Step(NamedTuple):
    """The result of one step of the smallest batch size.

    losses: of each student, by name, detached and still on the device; this process's part of
        them, where there are several; None for a student that is still accumulating.
    rows: how many rows it trained on.
    epoch_ends: whether it ended a pass over the rows.
    waited: seconds that it waited for its batches.
    """

    losses: list[dict[str, Tensor] | None]
    rows: int
    epoch_ends: bool
    waited: float


def train(
    trainers: Sequence[StudentTrainer],
    teacher: Callable[[Batch], Any],
    passes: Iterable[Pass],
    steps: int,
    device: torch.device,
    done: int = 0,
) -> Iterator[Step]:
    """Train students side by side on one teacher's outputs, one optimizer step at a time.

    Args:
        trainers: the students; each ends as if it had been trained alone (on a GPU up to rounding,
            as a teacher layer whose scores another student needs runs another kernel).
        teacher: from a batch to the teacher's outputs, which every student's loss gets.
        passes: see `batching.Pass`; their steps have the smallest batch size of any student. A
            row counts the same in whichever micro-batch it is, so a step's result does not depend
            on their size. A thread reads the passes in advance.
        steps: how many steps to take; the last one ends every student's step.
        device: where the models are.
        done: how many steps of the first pass have been taken already.
    """
    for trainer in trainers:
        trainer.student.train()
    accumulation = [trainer.accumulation for trainer in trainers]
    waited = 0.0
    with closing(prefetch(stream(passes, accumulation, steps, device, done))) as ready:
        while True:
            began = time.perf_counter()
            micro_batch = next(ready, None)
            if micro_batch is None:
                return
            waited += time.perf_counter() - began
            batch = to_device(micro_batch.batch, device)
            teacher_outputs = teacher(batch)
            for trainer, share, ends in zip(
                    trainers, micro_batch.shares, micro_batch.step_ends, strict=True):
                trainer.accumulate(batch, teacher_outputs, share, ends)
            del teacher_outputs  # before the teacher computes the next
            if micro_batch.last:
                losses = [trainer.step() if ends else None
                          for trainer, ends in zip(trainers, micro_batch.step_ends, strict=True)]
                yield Step(losses, micro_batch.rows, micro_batch.epoch_ends, waited)
                waited = 0.0

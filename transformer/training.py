"""Optimizer steps: batches made in advance, and several students on one teacher's answers."""

import queue
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, closing, contextmanager, nullcontext
from itertools import count
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from transformer import distributed
from transformer.batching import batches
from transformer.distillation import Batch

Collate = Callable[[Sequence[int]], Batch]


# ------------------------------------------------------------------ batches, ahead of their use


class StepBatches(NamedTuple):
    """The micro-batches of one step of the student with the smallest batches.

    parts: of each micro-batch that this process computes, the number of rows and the batch.
    rows: of all parts of all processes together.
    spans: for each number of such steps that a student's own step spans, how many rows that step
        has in all, and whether this is the end of it.
    """

    parts: list[tuple[int, Batch]]
    rows: int
    spans: dict[int, tuple[int, bool]]
    epoch_ends: bool


def micro_batches(rows: Sequence[int], size: int) -> list[Sequence[int]]:
    """Split the rows of one step into pieces of `size` rows; the last may be smaller."""
    return [rows[start : start + size] for start in range(0, len(rows), size)]


def own_share(parts: list[Sequence[int]], rank: int, processes: int) -> list[Sequence[int]]:
    """Return what one of several processes computes of a step's micro-batches.

    Whole micro-batches where every process gets as many, otherwise some rows of each.
    """
    if len(parts) % processes == 0:
        return parts[rank::processes]
    return [part[rank::processes] for part in parts]


def step_batches(
    epochs: Iterable[tuple[Collate, Sequence[Sequence[int]]]], steps: int, accumulation: int,
    spans: Iterable[int], device: torch.device, done: int = 0,
) -> Iterator[StepBatches]:
    """Make the batches of `steps` steps; for a GPU where it copies them from at once.

    The first `done` steps of the first pass have been taken already.
    """
    on_gpu = device.type == "cuda"
    if on_gpu:
        torch.cuda.set_device(device)  # this thread's, for the pinned memory
    rank, processes = distributed.rank(), distributed.world_size()
    for collate, epoch_rows in epochs:
        size = -(-max(map(len, epoch_rows)) // accumulation)
        epoch_rows = epoch_rows[: done + steps]
        for place in range(done, len(epoch_rows)):
            rows = epoch_rows[place]
            parts = []
            for part in own_share(micro_batches(rows, size), rank, processes):
                # Fewer rows than processes: this one computes a row that does not count.
                batch = collate(part if len(part) else rows[:1])
                if on_gpu:
                    batch = {name: tensor.pin_memory() for name, tensor in batch.items()}
                parts.append((len(part), batch))
            epoch_ends = place + 1 == len(epoch_rows)
            whole = {}
            for span in spans:
                begin = place // span * span
                count = sum(len(rows) for rows in epoch_rows[begin : begin + span])
                whole[span] = (count, epoch_ends or (place + 1) % span == 0)
            yield StepBatches(parts, len(rows), whole, epoch_ends)
        steps -= len(epoch_rows) - done
        done = 0
        del collate, epoch_rows  # they hold the epoch's data, and the next one is read now
        if not steps:
            return


def pass_generator(seed: int, number: int) -> torch.Generator:
    """Return the generator that shuffles pass `number`; each pass has one of its own."""
    words = np.random.SeedSequence((seed % 2**63, number)).generate_state(1, np.uint64)
    return torch.Generator().manual_seed(int(words[0]))


def shuffled_passes(
    collate: Collate, lengths: np.ndarray, batch_size: int, seed: int, multiple: int, first: int
) -> Iterator[tuple[Collate, list[np.ndarray]]]:
    """Yield the passes over the same rows from pass `first` on, as `train` takes them."""
    for number in count(first):
        yield collate, batches(lengths, batch_size, pass_generator(seed, number), multiple)


def prefetch(items: Iterator, ahead: int = 8) -> Iterator:
    """Yield the items of an iterator that a thread runs up to `ahead` items in advance.

    An error in the iterator is raised here; leaving early ends the thread.
    """
    ready: queue.Queue = queue.Queue(ahead)
    stopped = threading.Event()

    def put(kind: str, value: Any) -> bool:
        while not stopped.is_set():
            try:
                ready.put((kind, value), timeout=0.1)
                return True
            except queue.Full:
                continue
        return False

    def work() -> None:
        try:
            for item in items:
                if not put("item", item):
                    return
            put("end", None)
        except BaseException as error:  # handed to the reader, which raises it
            put("error", error)

    thread = threading.Thread(target=work, name="prefetch", daemon=True)
    thread.start()
    try:
        while True:
            kind, value = ready.get()
            if kind == "end":
                return
            if kind == "error":
                raise value
            yield value
    finally:
        stopped.set()
        thread.join(timeout=1)  # longer only where it is reading an epoch; it ends by itself then


def to_device(batch: Batch, device: torch.device) -> Batch:
    """Return the batch with every tensor on `device`."""
    return {name: tensor.to(device, non_blocking=True) for name, tensor in batch.items()}


def autocast(device: torch.device, dtype: torch.dtype | None) -> AbstractContextManager:
    """Return a context that computes in `dtype` where that is safe; None computes in float32."""
    return nullcontext() if dtype is None else torch.autocast(device.type, dtype=dtype)


# ------------------------------------------------------------------ training steps


class RandomState:
    """torch's random numbers as one student draws them, whatever else draws in between."""

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
    def drawn_from(self) -> Iterator[None]:
        """Draw from this state inside the block, and from the one before it afterwards."""
        outside = self._read()
        self._write(self.state)
        try:
            yield
        finally:
            self.state = self._read()
            self._write(outside)


class Learner:
    """A student in training with what is its own: loss, optimizer, random numbers.

    Its random numbers start from torch's state at this moment, so that a student learns the same
    alone and beside others. Under torchrun the processes add up their gradients, and each draws
    random numbers of its own.

    Args:
        student: trained in place.
        loss: a module around the student, from a batch and what the teacher showed to named
            losses, each a mean over rows; their sum is minimised.
        optimizer: of the student.
        device: where the student is.
        dtype: autocast precision; None computes in float32. float16 scales the loss.
        span: how many of the shared batches make one step of this student.
    """

    def __init__(
        self, student: nn.Module, loss: Callable[[Batch, Any], dict[str, Tensor]],
        optimizer: torch.optim.Optimizer, device: torch.device, dtype: torch.dtype | None = None,
        span: int = 1,
    ) -> None:
        self.student, self.loss, self.optimizer = student, loss, optimizer
        self.device, self.dtype, self.span = device, dtype, span
        self.scaler = torch.amp.GradScaler(device.type, enabled=dtype == torch.float16)
        self.processes = distributed.world_size()
        self.parallel_loss = loss
        if self.processes > 1:
            # Each stage leaves some part of a student without gradient, a head or `fit_dense`.
            self.parallel_loss = DistributedDataParallel(loss, find_unused_parameters=True)
            torch.manual_seed(torch.initial_seed() % 2**63 + distributed.rank())
        self.random_state = RandomState(device)
        self.step_losses: dict[str, Tensor] = {}

    def accumulate(self, batch: Batch, shown: Any, share: float, last: bool = True) -> None:
        """Add the gradient of a batch that holds `share` of the step's rows.

        `last` says that the step follows: then the processes add up what they have.
        """
        alone = self.processes == 1 or last
        with nullcontext() if alone else self.parallel_loss.no_sync(), \
                self.random_state.drawn_from():
            with autocast(self.device, self.dtype):
                losses = self.parallel_loss(batch, shown)
            # The processes' gradients are averaged, and it is their sum that counts.
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
        """Return what a later process needs to go on after a step, but for `random_state`."""
        return {"student": self.student.state_dict(), "optimizer": self.optimizer.state_dict(),
                "scaler": self.scaler.state_dict()}

    def load_state(self, state: dict[str, Any], random_state: list[Tensor] | None) -> None:
        """Go on from what `state` returned; None keeps the random numbers as they are."""
        self.student.load_state_dict(state["student"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.scaler.load_state_dict(state["scaler"])
        if random_state is not None:
            self.random_state.state = random_state


class Step(NamedTuple):
    """What one optimizer step gave.

    losses: of each learner, by name, detached and still on the device; this process's part of
        them, where there are several; None for a learner whose step spans further batches.
    rows: how many rows it trained on.
    epoch_ends: whether it ended a pass over the rows.
    waited: seconds that it waited for its batches.
    """

    losses: list[dict[str, Tensor] | None]
    rows: int
    epoch_ends: bool
    waited: float


def train(
    learners: Sequence[Learner],
    teach: Callable[[Batch], Any],
    epochs: Iterable[tuple[Collate, Sequence[Sequence[int]]]],
    steps: int,
    accumulation: int,
    device: torch.device,
    done: int = 0,
) -> Iterator[Step]:
    """Train students side by side on what one teacher shows, one optimizer step at a time.

    Args:
        learners: the students; each ends as if it had been trained alone (on a GPU up to rounding,
            as a teacher layer whose scores another student needs runs another kernel).
        teach: from a batch to what every student's loss is told: one pass for all of them.
        epochs: for each pass, what turns row numbers into a batch, and the rows of each step of
            the smallest batch size. A thread reads them in advance.
        steps: how many of those steps to take; the last one ends every student's step.
        accumulation: micro-batches a step. A row counts the same in whichever micro-batch it
            stands, so the step's result does not depend on this number.
        device: where the models are.
        done: how many steps of the first pass have been taken already.
    """
    for learner in learners:
        learner.student.train()
    spans = {learner.span for learner in learners}
    ready = prefetch(step_batches(epochs, steps, accumulation, spans, device, done))
    with closing(ready):
        while True:
            began = time.perf_counter()
            step = next(ready, None)
            if step is None:
                return
            waited = time.perf_counter() - began
            for place, (rows, batch) in enumerate(step.parts, start=1):
                batch = to_device(batch, device)
                shown = teach(batch)
                for learner in learners:
                    step_rows, step_ends = step.spans[learner.span]
                    last = step_ends and place == len(step.parts)
                    learner.accumulate(batch, shown, rows / step_rows, last)
                del shown  # before the teacher makes the next
            losses = [learner.step() if step.spans[learner.span][1] else None
                      for learner in learners]
            yield Step(losses, step.rows, step.epoch_ends, waited)

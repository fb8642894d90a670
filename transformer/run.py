"""A training run from its start, or from a saved state, to its end.

It knows, besides the models, how far the run is, what it has logged and which dev score was the
best; saves all of it from time to time, and continues from there.
"""

import logging
import signal
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from tqdm import tqdm

from transformer import distributed
from transformer.batching import Batch, Pass
from transformer.checkpoint import (
    load_training_state,
    save_pretrained,
    save_training_state,
    save_weights,
)
from transformer.evaluation import Selection, by_split, warn_of_chance, write_results
from transformer.file_utils import UserError
from transformer.own_tasks import save_task
from transformer.run_folder import STATE_FOLDER, JsonLog, RunningMean, remove_training_states
from transformer.runtime import Stopped, check_disk, format_values
from transformer.tasks import Task
from transformer.tokenization import AnyTokenizer
from transformer.training import Step, StudentTrainer, train

logger = logging.getLogger(__name__)

# What a process requests after a step; the largest request of all processes is granted.
CONTINUE, SAVE, STOP = 0, 1, 2


@dataclass
class StudentOutput:
    """One student's folder: its checkpoints, log and results; the first process writes them."""

    trainer: StudentTrainer
    folder: Path
    tokenizer: AnyTokenizer
    selection: Selection | None = None  # where dev scores choose the student
    task: Task | None = None
    means: RunningMean = field(default_factory=RunningMean)
    losses: dict[str, float] = field(default_factory=dict)  # the last that were logged
    tensorboard: bool = False

    def __post_init__(self) -> None:
        self.log = JsonLog(self.folder / "log.jsonl", keep=True, tensorboard=self.tensorboard)

    def report(
        self, progress: dict[str, Any], results: dict[str, dict[str, Any]] | None, eta: str
    ) -> None:
        """Log progress, mean losses and dev metrics, if any; save the best student so far."""
        steps, self.losses = self.means.count, self.means.read()
        record = {**progress, "steps": steps, "lr": self.trainer.optimizer.get_lr()[0],
                  **self.losses}
        if results is not None:
            metrics = by_split(results, "metrics")
            record |= {"metrics": metrics["dev"], "all_metrics": metrics}
            if self.selection.update(results):
                self.save()
        self.log.write(record)
        record.pop("all_metrics", None)
        logger.info("%s: %s  eta %s", self.folder.name, format_values(record), eta)

    def save(self, subfolder: str = "") -> None:
        """Write the student as a model directory, with its own task's description."""
        if self.task is not None and distributed.is_main():
            save_task(self.task, self.folder / subfolder)
        save_pretrained(self.trainer.student, self.folder / subfolder, self.tokenizer,
                        finished=self.selection is not None)

    def save_weights(self, name: str) -> None:
        """Write the student's weights alone."""
        save_weights(self.trainer.student, self.folder / name)

    def finish(self, summary: dict[str, Any]) -> None:
        """Write the results: they say that the run has finished."""
        result = {**summary, "losses": self.losses}
        if self.selection is not None:
            result |= self.selection.results()
            scores = {"first": self.selection.first["dev"], "best": result["best"],
                      "last": result["last"]}
            logger.info("%s on dev: %s", self.folder.name, format_values(scores))
            warn_of_chance(self.task, self.selection.best, self.selection.per_class)
        write_results(self.folder, result)

    def state(self) -> dict[str, Any]:
        """Return what `load_state` takes; all processes call it together."""
        return {
            "trainer": self.trainer.state(), "means": self.means.state(), "losses": self.losses,
            "selection": self.selection and dict(vars(self.selection)), "log_bytes": self.log.size,
        }

    def load_state(self, state: dict[str, Any], random_state: list[Tensor] | None) -> None:
        """Continue from what `state` returned."""
        self.trainer.load_state(state["trainer"], random_state)
        self.means.load_state(state["means"], self.trainer.device)
        self.losses = state["losses"]
        if self.selection is not None:
            vars(self.selection).update(state["selection"])
        self.log.cut(state["log_bytes"])


def check_training_disk(
    trainers: Sequence[StudentTrainer], folders: Sequence[Path], models_written: int
) -> None:
    """Raise a `UserError` where less disk is free than the run will write.

    Args:
        trainers: the students.
        folders: their output folders, made or not.
        models_written: models that each student's folder will hold at once.
    """
    parameters = sum(parameter.numel() for trainer in trainers
                     for parameter in trainer.student.parameters())
    # Weights and Adam's two moments, in two states that are kept and one that is written.
    needed = parameters * 4 * (3 * 3 + models_written)
    # What a resumed run finds of its own is part of that.
    needed -= sum(file.stat().st_size for folder in folders
                  for file in [*folder.rglob("*.bin"), *folder.glob(f"{STATE_FOLDER}/*")])
    check_disk("training", folders[0], max(0, needed))


@torch.no_grad()
def weights_are_finite(model: nn.Module) -> bool:
    """Say whether all parameters are finite."""
    return bool(torch.stack([p.isfinite().all() for p in model.parameters()]).all())


class TrainingRun:
    """The steps of a run, from the beginning or, with `resume`, from the newest saved state.

    States lie in the first student's folder. All processes of a run do the same, and stop at the
    same step.

    Args:
        outputs: the students.
        passes: from the number of a pass over the data to it and those after it.
        steps_in_pass: from the number of a pass to its steps.
        total_steps: where the run ends.
        report_every: steps between reports.
        save_steps, save_minutes: how often a state is saved; 0 for not by this measure.
        resume: continue from a saved state if there is one.
    """

    def __init__(
        self, outputs: Sequence[StudentOutput],
        passes: Callable[[int], Iterable[Pass]],
        steps_in_pass: Callable[[int], int], total_steps: int, *, report_every: int,
        save_steps: int, save_minutes: float, resume: bool,
    ) -> None:
        self.outputs, self.passes, self.steps_in_pass = outputs, passes, steps_in_pass
        self.total_steps, self.report_every = total_steps, report_every
        self.save_steps, self.save_minutes = save_steps, save_minutes
        self.device = outputs[0].trainer.device
        self.step = 0
        self.rows, self.waited, self.report_began = 0, 0.0, time.perf_counter()
        self.signal: int | None = None
        # The first step whose loss was not finite, of each student; 0 while all are.
        self.first_bad = [torch.zeros((), device=self.device) for _ in outputs]
        self.saved_step = 0
        if not (resume and self._load()):
            for output in outputs:
                output.log.cut(0)
        self.began, self.first_step = time.monotonic(), self.step

    def position(self, step: int) -> tuple[int, int]:
        """Return the pass that follows `step` steps, and how many of its steps are among them."""
        number = 0
        while step >= (size := self.steps_in_pass(number)):
            step, number = step - size, number + 1
        return number, step

    def epoch(self) -> float:
        """Return how many passes over the data are done."""
        number, step = self.position(self.step)
        return round(number + step / self.steps_in_pass(number), 3)

    def eta(self) -> str:
        """Return the remaining time, as hours, minutes and seconds."""
        done = self.step - self.first_step
        if not done:
            return "?"
        seconds = (time.monotonic() - self.began) / done * (self.total_steps - self.step)
        return tqdm.format_interval(seconds)

    def reports(self) -> bool:
        """Say whether this step is one to report on."""
        return self.step % self.report_every == 0 or self.step == self.total_steps

    def report(
        self, evaluate: Callable[[nn.Module], dict[str, dict[str, Any]]] | None = None
    ) -> None:
        """Log every student's losses and, with `evaluate`, its dev metrics by split.

        `evaluate` returns what `evaluate_splits` does.
        """
        seconds = max(time.perf_counter() - self.report_began, 1e-9)
        progress = {"step": self.step, "epoch": self.epoch(),
                    "rows_per_second": round(self.rows / seconds, 1),
                    "waiting": round(self.waited / seconds, 4)}
        for output in self.outputs:
            results = evaluate and evaluate(output.trainer.student)
            output.report(progress, results, self.eta())
        # From here on, as the time that the report took does not count.
        self.rows, self.waited, self.report_began = 0, 0.0, time.perf_counter()

    def steps(self, teacher: Callable[[Batch], Any], description: str) -> Iterator[Step]:
        """Take the steps that are left; yields after each, with `step` counted.

        What the caller does with a step belongs to it: a state is saved afterwards.

        Raises:
            UserError: a loss is not finite; nothing is saved from then on.
            Stopped: Ctrl-C or SIGTERM; a state has been saved.
        """
        if self.step == self.total_steps:
            return
        first, done = self.position(self.step)
        steps = train([output.trainer for output in self.outputs], teacher, self.passes(first),
                      self.total_steps - self.step, self.device, done)
        saved_at = time.monotonic()
        progress = tqdm(steps, desc=description, initial=self.step, total=self.total_steps,
                        unit="step", disable=None if distributed.is_main() else True)
        self.report_began = time.perf_counter()
        with self._signals_noted():
            for step in progress:
                self._count(step)
                if self.reports() or step.epoch_ends:
                    self.check_finite()  # before anything is written
                yield step
                if None in step.losses:
                    continue  # a student is still accumulating: a state holds no gradients
                request = distributed.largest(self._request(saved_at))
                if request != CONTINUE:
                    self.check_finite()
                    self.save()
                    saved_at = time.monotonic()
                if request == STOP:
                    raise Stopped(self.signal or signal.SIGTERM)

    def _count(self, step: Step) -> None:
        self.step += 1
        self.rows, self.waited = self.rows + step.rows, self.waited + step.waited
        for number, (output, losses) in enumerate(zip(self.outputs, step.losses, strict=True)):
            if losses is None:
                continue
            output.means.add(losses)
            bad = ~torch.isfinite(sum(losses.values())) & (self.first_bad[number] == 0)
            self.first_bad[number] = torch.where(bad, float(self.step), self.first_bad[number])

    def check_finite(self) -> None:
        """Raise a `UserError` if a loss or a weight is not finite, with the step and the batch."""
        for output, first_bad in zip(self.outputs, self.first_bad, strict=True):
            step = distributed.largest(int(first_bad))
            if step or not weights_are_finite(output.trainer.student):
                number, place = self.position((step or self.step) - 1)
                kept = f"The state of step {self.saved_step}" if self.saved_step else "No state"
                raise UserError(
                    f"{output.folder}: {'the loss is' if step else 'a weight became'} not finite at"
                    f" step {step or self.step}, batch {place + 1} of pass {number + 1}; expected"
                    f" a number. {kept} is kept. A smaller --learning_rate or --precision fp32"
                    " may help"
                )

    def _request(self, saved_at: float) -> int:
        if self.signal is not None:
            return STOP
        by_steps = self.save_steps and self.step - self.saved_step >= self.save_steps
        minutes = (time.monotonic() - saved_at) / 60
        by_time = self.save_minutes and minutes >= self.save_minutes and distributed.is_main()
        return SAVE if by_steps or by_time else CONTINUE

    @contextmanager
    def _signals_noted(self) -> Iterator[None]:
        """Note the first Ctrl-C or SIGTERM, to stop after the step; the second stops at once."""
        if threading.current_thread() is not threading.main_thread():
            yield
            return
        earlier = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}

        def note(number: int, frame: Any) -> None:
            self.signal = number
            signal.signal(number, earlier[number])
            logger.info("%s: saving a state, then leaving", signal.Signals(number).name)

        for number in earlier:
            signal.signal(number, note)
        try:
            yield
        finally:
            for number, handler in earlier.items():
                signal.signal(number, handler)

    def save(self) -> None:
        """Save the run's state; the processes do it together."""
        random_states = distributed.gather(
            [output.trainer.random_state.state for output in self.outputs])
        for output in self.outputs:
            output.log.sync()  # a state says how long it is
        state = {"step": self.step, "total_steps": self.total_steps,
                 "outputs": [output.state() for output in self.outputs],
                 "random_states": random_states}
        if distributed.is_main():
            path = save_training_state(self.outputs[0].folder, self.step, state)
            logger.info("step %d: state saved as %s", self.step, path)
        self.saved_step = self.step
        distributed.barrier()

    def _load(self) -> bool:
        """Continue from the newest saved state; False if there is none."""
        folder = self.outputs[0].folder
        state = distributed.from_main(
            load_training_state(folder) if distributed.is_main() else None)
        if state is None:
            logger.info("%s: no saved state; starting from the beginning", folder)
            return False
        if state["total_steps"] != self.total_steps:
            raise UserError(
                f"--resume: {self.total_steps} steps in all; {folder} was begun with"
                f" {state['total_steps']}; expected the same data"
            )
        self.step = self.saved_step = state["step"]
        own = (state["random_states"] + [None] * distributed.world_size())[distributed.rank()]
        for number, output in enumerate(self.outputs):
            output.load_state(state["outputs"][number], own and own[number])
        return True

    def finish(self) -> None:
        """Delete the saved states: the results are written."""
        if distributed.is_main():
            remove_training_states(self.outputs[0].folder)

"""Runs of a script that are killed with SIGKILL at random moments and started again with --resume.

The moments are spread over the work of a run: an uninterrupted run is measured first, and the time
until a process has started to work (importing torch takes seconds) does not count.
"""

import contextlib
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TextIO

REPO = Path(__file__).resolve().parent.parent
LONGEST_RUN = 300  # seconds

Command = Sequence[str | Path | int | float]


def says_commit(log: str) -> bool:
    """Say whether a training script has logged how it starts, the last line before it works."""
    return "commit " in log


@dataclass
class KillReport:
    """What became of a run.

    kills: processes that were killed while they worked, each followed by one that went on.
    moments: seconds that each had worked.
    seconds: of work in all, of the last, unkilled process too.
    output: what the last process printed.
    """

    kills: int = 0
    moments: list[float] = field(default_factory=list)
    seconds: float = 0.0
    output: str = ""


def environment(changes: dict[str, str] | None = None) -> dict[str, str]:
    """Return what the scripts run with: one thread, so that bytes do not depend on the load."""
    return {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1",
            "PYTHONUNBUFFERED": "1", **(changes or {})}


def script(name: str, *arguments: str | Path | int | float) -> list[str]:
    """Return the command that runs a script of this repository."""
    return [sys.executable, str(REPO / name), *map(str, arguments)]


def torchrun(processes: int, name: str, *arguments, restarts: int = 0) -> list[str]:
    """Return the command that runs a script in several processes of this machine."""
    return [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node",
            str(processes), "--max-restarts", str(restarts), str(REPO / name),
            *map(str, arguments)]


class Process:
    """A script in a process group of its own, its output in a file."""

    def __init__(self, command: Command, env: dict[str, str] | None = None) -> None:
        self.log: TextIO = tempfile.TemporaryFile("w+", encoding="utf-8")  # noqa: SIM115
        self.popen = subprocess.Popen(
            list(map(str, command)), stdin=subprocess.DEVNULL, stdout=self.log, stderr=self.log,
            env=environment(env), cwd=REPO, start_new_session=True)
        self.began = time.monotonic()

    def output(self) -> str:
        """Return what it has printed so far, on stdout and stderr."""
        return os.pread(self.log.fileno(), os.fstat(self.log.fileno()).st_size, 0).decode(
            "utf-8", "replace")

    def wait_until(self, condition: Callable[[str], bool], seconds: float = LONGEST_RUN) -> bool:
        """Wait until its output fulfils `condition`; False if it ended without."""
        while not condition(self.output()):
            if self.popen.poll() is not None:
                return condition(self.output())
            if time.monotonic() - self.began > seconds:
                self.kill()
                raise TimeoutError(f"not within {seconds} s:\n{self.output()}")
            time.sleep(0.005)
        return True

    def send(self, number: int) -> None:
        """Send the process itself a signal."""
        self.popen.send_signal(number)

    def kill(self) -> None:
        """End the whole group with SIGKILL."""
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.popen.pid, signal.SIGKILL)
        self.popen.wait()

    def end(self, seconds: float = LONGEST_RUN) -> int:
        """Wait for its end; returns its exit code."""
        try:
            return self.popen.wait(seconds)
        except subprocess.TimeoutExpired:
            self.kill()
            raise


def run_whole(
    command: Command, ready: Callable[[str], bool] = says_commit,
    env: dict[str, str] | None = None,
) -> KillReport:
    """Run a script without interruption; it must succeed. `seconds` are those of its work."""
    process = Process(command, env)
    process.wait_until(ready)
    began = time.monotonic()
    code = process.end()
    assert code == 0, process.output()
    return KillReport(seconds=time.monotonic() - began, output=process.output())


def run_with_kills(
    command: Command, kills: int, seed: int, ready: Callable[[str], bool] = says_commit,
    env: dict[str, str] | None = None, seconds: float | None = None,
) -> KillReport:
    """Run a script that is killed again and again, and goes on with --resume, to its end.

    Args:
        command: makes the output from nothing; `--resume` is added from the second start on.
        kills: how many to survive. A run that ends before has survived fewer.
        seed: of the moments.
        ready: whether a process with this output has started to work.
        seconds: of work of an uninterrupted run, as `run_whole` measures it.
    """
    rng = random.Random(seed)
    if seconds is None:
        raise ValueError("seconds: measure an uninterrupted run first, with run_whole")
    report = KillReport()
    while True:
        process = Process([*command, *(["--resume"] if report.moments else [])], env)
        process.wait_until(ready)
        began = time.monotonic()
        # So that all kills together fall into the time that the work takes.
        delay = rng.uniform(0, 2 * seconds / (kills + 1))
        if report.kills < kills:
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.popen.wait(delay)
        else:
            process.end()
        worked = time.monotonic() - began
        report.seconds += worked
        if process.popen.poll() is not None:
            assert process.popen.returncode == 0, process.output()
            report.output = process.output()
            return report
        process.kill()
        report.kills += 1
        report.moments.append(worked)


def survive(
    command: Command, kills: int, seed: int, check: Callable[[], None],
    remove: Callable[[], None], ready: Callable[[str], bool] = says_commit,
    env: dict[str, str] | None = None, seconds: float | None = None,
) -> int:
    """Kill runs of a script until `kills` were survived; returns how many runs that took.

    Args:
        check: called with each finished output, which must be as it is without kills.
        remove: deletes the output, before the next run.
    """
    left, runs = kills, 0
    while left > 0:
        remove()
        report = run_with_kills(command, left, seed + runs, ready, env, seconds)
        check()
        runs, left = runs + 1, left - report.kills
        assert runs <= kills + 3, "the work is over before it can be killed"
    return runs

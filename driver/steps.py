"""Carries out the plan of `reproduction.sh`: each step once, logged, resumed where it was stopped.

The plan comes on standard input as words that end with NUL; a word of one newline ends an entry:

    stage NAME TITLE
    step NAME [--update] OUTPUT... [--reads PATH...] [--content HASH] -- COMMAND...

What is known of a step stands in `.state/NAME.json` beside its outputs: {key, command, outputs,
started, finished, seconds}. The key is a hash of the command and of the keys of all recorded
outputs that the command names (or that lie in a folder after --reads), so it changes with the
settings of every step before, and with --content, a hash of what the user brings to it. --update:
the command itself deals with what is there.
"""

import argparse
import ctypes
import fcntl
import hashlib
import json
import os
import re
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import time
from contextlib import suppress
from datetime import datetime
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NamedTuple

DISTRIBUTED = {"general_distill.py", "task_distill.py", "finetune_teacher.py",
               "data_augmentation.py"}
RESUMABLE = {*DISTRIBUTED, "prepare_data.py"}
# Results do not depend on them; on what lies at --source they do, by --content.
FREE_FLAGS = {"--num_workers", "--save_minutes", "--save_steps", "--source"}
PLAN_FLAGS = ("--update", "--reads", "--content")
LAUNCHER = "-m torch.distributed.run --standalone --max-restarts 3 --nproc_per_node"
LOG_LINE = re.compile(r"\d\d:\d\d:\d\d [A-Z] ")
PR_SET_PDEATHSIG = 1
LIBC = ctypes.CDLL(None) if sys.platform == "linux" else None


class RefusalError(Exception):
    """A reason to do nothing, for the user in one line."""


class Step(NamedTuple):
    """One command of a stage."""

    stage: str
    name: str
    update: bool
    outputs: tuple[str, ...]
    reads: tuple[str, ...]
    content: tuple[str, ...]
    command: tuple[str, ...]

    @property
    def record_path(self) -> Path:
        return state_folder(self.outputs[0]) / f"{self.name}.json"

    @property
    def record(self) -> dict[str, Any]:
        return read_record(self.record_path) if self.record_path.is_file() else {}

    @property
    def script(self) -> str:
        return "" if "--do_eval" in self.command else self.command[1]

    def depends_on(self, output: str) -> bool:
        """Whether the command names the output, or something in it, or --reads a folder of it."""
        return output in named_places(self) or not {*self.reads}.isdisjoint(with_parents(output))


def read_plan(text: str) -> tuple[dict[str, str], list[Step]]:
    """Return the stages with their titles, and all steps in order."""
    stages: dict[str, str] = {}
    steps = []
    for entry in text.split("\0\n\0")[:-1]:
        kind, name, *words = entry.split("\0")
        if kind == "stage":
            stages[name] = words[0]
            continue
        flag, given = "", {flag: [] for flag in ("", *PLAN_FLAGS)}
        for word in words[: words.index("--")]:
            flag = word if word in PLAN_FLAGS else flag
            given[flag] += [word]
        update = bool(given["--update"])
        outputs = given["--update"][1:] if update else given[""]
        steps.append(Step(
            [*stages][-1], name, update, tuple(map(tidy, outputs)),
            tuple(map(tidy, given["--reads"][1:])), tuple(given["--content"][1:]),
            tuple(words[words.index("--") + 1 :])))
    return stages, steps


# ------------------------------------------------------------------ keys and records


@cache
def with_parents(path: str) -> list[str]:
    """Return a path and the folders that it lies in."""
    return [str(place) for place in (Path(path), *Path(path).parents) if place.name]


def tidy(path: str) -> str:
    return str(Path(path))  # data/ and ./data are data, to tell whether an output is named


def without_free_flags(command: tuple[str, ...]) -> list[str]:
    """Return a command without the flags (each with one value) that results do not depend on."""
    return [tidy(word) for before, word in zip(["", *command], command, strict=False)
            if word not in FREE_FLAGS and before not in FREE_FLAGS]


@cache
def named_places(step: Step) -> set[str]:
    """Return what the words of a command may name: paths, also of NAME=PATH, and their folders."""
    words = [word for word in (*step.command, *step.reads) if not word.startswith("-")]
    words += [word.partition("=")[2] for word in words if "=" in word]
    return {place for word in words for place in with_parents(word)}


def state_folder(output: str) -> Path:
    return Path(output).parent / ".state"


def read_record(path: Path) -> dict[str, Any]:
    """Return a step's record; a `RefusalError` where it is damaged."""
    try:
        record = json.loads(path.read_text())
        [Path(output) for output in record["outputs"]]
    except (ValueError, KeyError, TypeError) as error:
        raise RefusalError(f"{path}: damaged ({error!r}); delete it and what its step made, to"
                           " make that again") from error
    return record


def write_record(path: Path, record: dict[str, Any]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_suffix(".tmp")
    temporary.write_text(json.dumps(record, indent=1) + "\n")
    temporary.replace(path)


def makers(output: str) -> dict[Path, dict[str, Any]]:
    """Return the records of the steps that have begun to make an output, by file."""
    records = {path: read_record(path) for path in state_folder(output).glob("*.json")}
    return {path: record for path, record in records.items()
            if Path(output).name in (Path(other).name for other in record["outputs"])}


def finished_key(record: dict[str, Any]) -> str:
    return record["key"] if "finished" in record else ""


def find_keys(steps: list[Step], chosen: list[str], folders: list[str]) -> dict[str, str]:
    """Return each step's key, by its name; `folders`, which hold their own records, may move.

    In a stage that is not `chosen`, what is on the disk counts, not what the settings would make;
    so it does for what no step of this plan makes any more.
    """
    keys: dict[str, str] = {}
    made: dict[str, str] = {}
    planned = {output for step in steps for output in step.outputs}
    for step in steps:
        found = {key for output, key in made.items() if step.depends_on(output)}
        for place in named_places(step) - planned:
            found |= {finished_key(record) for record in makers(place).values()}
        text = json.dumps([without_free_flags(step.command), sorted(found - {""}), *step.content])
        for place, folder in enumerate(map(tidy, folders)):
            text = text.replace(f"{folder}/", f"{place}/")
        keys[step.name] = hashlib.sha256(text.encode()).hexdigest()
        key = keys[step.name] if step.stage in chosen else finished_key(step.record)
        made |= dict.fromkeys(step.outputs, key)
    return keys


def is_finished(step: Step, key: str) -> bool:
    return finished_key(step.record) == key and all(map(os.path.exists, step.outputs))


def can_resume(step: Step, key: str) -> bool:
    """Whether a call was stopped in this very step, and its script can go on."""
    record = step.record
    return step.script in RESUMABLE and record.get("key") == key and "finished" not in record


def full_command(step: Step, key: str, gpus: int) -> list[str]:
    """Return the command as it is run now, on all GPUs and with --resume where that serves."""
    command = [*step.command]
    if can_resume(step, key):
        command.append("--resume")
    if step.script == "get_bert_models.py" and step.record.get("key", key) != key:
        command.append("--overwrite_output_dir")  # it keeps a folder that is complete otherwise
    if gpus > 1 and step.script in DISTRIBUTED:
        command[1:1] = [*LAUNCHER.split(), str(gpus)]
    return command


def make_room(step: Step) -> None:
    """Move away what an earlier step made of the outputs; a finished one stays as NAME.old."""
    there = {Path(output): makers(output) for output in step.outputs if Path(output).exists()}
    for path in (path for path, records in there.items() if not records):
        raise RefusalError(f"stage {step.stage}: {path} exists, but this script did not make it;"
                           " move it away")
    for path, records in there.items():
        # A finished one may have taken days; an unfinished one must not take its place.
        finished, old = any(map(finished_key, records.values())), Path(f"{path}.old")
        gone = old if finished else path
        shutil.rmtree(gone) if gone.is_dir() else gone.unlink(missing_ok=True)
        if finished:
            path.rename(old)
        for maker in {*records} - {step.record_path}:  # another group of students, unfinished now
            others = read_record(maker)["outputs"]
            write_record(maker, {"outputs": [o for o in others if Path(o).name != path.name]})


# ------------------------------------------------------------------ one driver a folder


def take_lock(folder: str, steps: list[Step]) -> int:
    """Keep other drivers from a folder until this one and the scripts that it started have ended.

    Returns the open file, which scripts with a state inherit: a killed driver's script gets SIGTERM
    and writes it, and the next driver waits for that. The file holds the processes' numbers.
    """
    path = Path(folder, ".state", "lock")
    if any(folder in step.outputs for step in steps):  # which want it empty
        path = state_folder(folder) / f"{Path(folder).name}.lock"
    path.parent.mkdir(parents=True, exist_ok=True)
    lock = os.open(path, os.O_RDWR | os.O_CREAT | os.O_APPEND, 0o644)
    holder, *scripts = path.read_text().splitlines() or [""]
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        pid, host, since = (holder.split(maxsplit=2) + ["?"] * 3)[:3]
        if host != socket.gethostname() or is_alive(pid):
            raise RefusalError(f"{folder}: another reproduction.sh works on this folder: process"
                               f" {pid} on {host}, since {since}; wait for it or stop it") from None
        print("The last driver was killed; what it left running writes its state and ends ...",
              flush=True)
        fcntl.flock(lock, fcntl.LOCK_EX)
    for script in scripts:
        if not is_alive(script):
            end_group(int(script))
    os.truncate(lock, 0)
    os.write(lock, f"{os.getpid()} {socket.gethostname()} {datetime.now():%F %T}\n".encode())
    return lock


def is_alive(pid: str) -> bool:
    return LIBC is None or Path("/proc", pid).exists()


def end_group(group: int) -> None:
    """Kill what a script that has ended has left behind."""
    with suppress(ProcessLookupError, PermissionError):
        os.killpg(group, signal.SIGKILL)


def end_with_driver(driver: int) -> None:
    """In a new process: have the system send SIGTERM when the driver dies, also by kill -9."""
    if LIBC:
        LIBC.prctl(PR_SET_PDEATHSIG, signal.SIGTERM)
        if os.getppid() != driver:
            os._exit(1)


# ------------------------------------------------------------------ the run


class Job(NamedTuple):
    """A step that runs."""

    step: Step
    record: dict[str, Any]
    process: subprocess.Popen
    log: Path
    began: float

    def end(self) -> int:
        """Wait until it has ended with all that it started; returns the exit code."""
        code = self.process.wait()
        end_group(self.process.pid)
        return code


class Driver:
    """Runs steps, up to `args.jobs` at once where none needs what the other makes."""

    def __init__(self, args: argparse.Namespace, keys: dict[str, str], locks: list[int]) -> None:
        self.args, self.keys, self.locks = args, keys, locks
        self.jobs: list[Job] = []
        self.signal = 0
        self.failed = False
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, self.interrupt)

    def interrupt(self, number: int, _: object) -> None:
        if self.signal:  # a second Ctrl-C does not wait
            os._exit(128 + number)
        self.signal = number

    def run_stage(self, steps: list[Step]) -> None:
        """Run the unfinished steps of one stage."""
        waiting = [step for step in steps if not is_finished(step, self.keys[step.name])]
        while (waiting and not self.failed) or self.jobs:
            unfinished = {*waiting, *(job.step for job in self.jobs)}
            ready = [step for step in waiting if unfinished.isdisjoint(needs(step, steps))]
            if ready and len(self.jobs) < self.args.jobs and not (self.failed or self.signal):
                waiting.remove(ready[0])
                self.start(ready[0], steps)
                continue
            time.sleep(0.05)
            if self.signal:
                self.stop(steps[0].stage)
            for job in [job for job in self.jobs if job.process.poll() is not None]:
                self.jobs.remove(job)
                self.finish(job)
        if self.failed:
            sys.exit(1)

    def start(self, step: Step, steps: list[Step]) -> None:
        key, resumes = self.keys[step.name], can_resume(step, self.keys[step.name])
        command = full_command(step, key, self.args.gpus)
        record = {"key": key, "command": shlex.join(step.command), "outputs": step.outputs,
                  "started": step.record["started"] if resumes else now()}
        for path in step.outputs:
            Path(path).parent.mkdir(parents=True, exist_ok=True)
        if not step.update:
            if not resumes:
                make_room(step)
            write_record(step.record_path, record)
        variables = dict(os.environ)
        # Not by what is finished already: threads may change the last digits.
        if any(step not in needs(other, steps) and other not in needs(step, steps)
               for other in steps if other != step):
            threads = max(1, self.args.cores // self.args.jobs)
            variables.setdefault("OMP_NUM_THREADS", str(threads))
        print(f"  {step.name:58} " * (self.args.jobs == 1), end="", flush=True)
        log, driver = Path(self.args.log_dir, f"{step.name}.log"), os.getpid()
        with log.open("a" if resumes else "w") as file:
            print(shlex.join(command) + "\n", file=file, flush=True)
            command[0] = sys.executable if command[0] == "python" else command[0]
            process = subprocess.Popen(
                command, env=variables, stdin=subprocess.DEVNULL, stdout=file, stderr=file,
                pass_fds=self.locks if step.script in RESUMABLE else (), start_new_session=True,
                preexec_fn=lambda: end_with_driver(driver))
        for lock in self.locks:
            os.write(lock, f"{process.pid}\n".encode())
        self.jobs.append(Job(step, record, process, log, time.monotonic()))

    def finish(self, job: Job) -> None:
        """Record a step that has ended, or say why it failed and how to go on."""
        step, code = job.step, job.end()
        missing = [path for path in step.outputs if not Path(path).exists()]
        if code or missing:
            self.failed = True
            reason = code or f"0, but there is no {missing[0]}"
            text = job.log.read_text(errors="replace").replace("\r", "\n")
            print("failed" * (self.args.jobs == 1), flush=True)
            print(f"Stage {step.stage} stopped: step {step.name}, exit code {reason}.",
                  f"The end of its log, {job.log}:",
                  *(f"  | {line[:200]}" for line in text.splitlines()[-5:]),
                  "Mend the cause; then this continues where it stopped:",
                  f"  {self.args.call} --from {step.stage}", sep="\n", file=sys.stderr)
            return
        seconds = round(time.monotonic() - job.began)
        write_record(step.record_path, {**job.record, "finished": now(), "seconds": seconds})
        print(f"  {step.name:58} " * (self.args.jobs > 1) + clock(seconds), flush=True)

    def stop(self, stage: str) -> None:
        """Have what runs write its state and end, as Ctrl-C or SIGTERM asks."""
        print("\nStopping; what runs writes its state first ...", file=sys.stderr, flush=True)
        for job in self.jobs:
            job.process.terminate()
        for job in self.jobs:
            job.end()
        print(f"Interrupted in stage {stage}; this continues: {self.args.call} --from {stage}",
              file=sys.stderr)
        sys.exit(128 + self.signal)


def needs(step: Step, steps: list[Step]) -> list[Step]:
    """Return the earlier steps whose outputs a step depends on."""
    return [other for other in steps[: steps.index(step)]
            if any(step.depends_on(output) for output in other.outputs)]


def made_by(stage: str, steps: list[Step]) -> list[str]:
    """Return the outputs of a stage."""
    return [output for step in steps if step.stage == stage for output in step.outputs]


def now() -> str:
    return f"{datetime.now():%F %T}"


def clock(seconds: int) -> str:
    return f"{seconds // 3600}:{seconds // 60 % 60:02}:{seconds % 60:02}"


def check(steps: list[Step]) -> None:
    """Have every command parsed by its script's own parser, in a process of its own."""
    result = subprocess.run(
        [sys.executable, Path(__file__).with_name("checks.py")], text=True, start_new_session=True,
        input=json.dumps([s.command for s in steps]), stderr=subprocess.PIPE, check=False)
    if result.returncode:
        raise RefusalError(result.stderr.strip())


def main(args: argparse.Namespace) -> None:
    """Run, print or list the steps of the plan on standard input, as the mode says."""
    began, sign = time.monotonic(), "# " * (args.mode == "dry-run")
    stages, steps = read_plan(sys.stdin.read())
    for stage in {args.only, args.start} - {"", *stages}:
        raise RefusalError(f"this profile has no stage {stage}")
    names = list(stages)
    chosen = [args.only] if args.only else names[names.index(args.start or names[0]) :]
    keys = find_keys(steps, chosen, args.folders[1:])
    finished = {step for step in steps if is_finished(step, keys[step.name])}
    driver = Driver(args, keys, [])
    waiting = any(step.stage in chosen for step in {*steps} - finished)
    if waiting and args.mode == "dry-run" and find_spec("torch") is None:
        print("# The values of settings are not checked: this Python has no PyTorch (PYTHON=...)")
    elif waiting and args.mode != "list":
        check(steps)
    if args.mode == "run" and waiting:
        folders = {os.path.realpath(folder): tidy(folder) for folder in args.folders}
        driver.locks += [take_lock(folder, steps) for folder in folders.values()]
        for folder in (args.log_dir, os.environ["TMPDIR"]):
            Path(folder).mkdir(parents=True, exist_ok=True)
    for number, stage in enumerate(stages, start=1):
        own = [step for step in steps if step.stage == stage]
        count = len(finished.intersection(own))
        state = "finished" if count == len(own) else f"{count} of {len(own)}"
        if args.mode == "list":
            print(f"{stage:15} {stages[stage]:53} {state if own else ''}".rstrip())
            continue
        if stage not in chosen:
            continue
        print(f"{sign}[{number:2}/{len(stages)}] {stage:15} {stages[stage]}", flush=True)
        if args.mode == "run":
            driver.run_stage(own)
        else:
            for step in (step for step in own if step not in finished):
                print(shlex.join(full_command(step, keys[step.name], args.gpus)))
        print(f"{sign}  {count} finished earlier\n" * (count > 0), end="", flush=True)
    if args.mode == "run":
        log = Path(args.log_dir, "report.log")
        if "report" in chosen and log.is_file():
            lines = log.read_text().splitlines()[2:]
            print(*(line for line in lines if not LOG_LINE.match(line)), sep="\n")
            print(f"Results: {log.parents[1] / 'results.md'}, pictures beside it.")
            exported = {Path(output).parent for output in made_by("export", steps)}
            print(*(f"Exported: {folder}\n" for folder in exported), sep="", end="")
        print(f"Done in {clock(round(time.monotonic() - began))}.")


def get_args_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--mode", choices=["run", "dry-run", "list"], default="run")
    for flag in ("only", "start"):
        parser.add_argument(f"--{flag}", default="", help="a stage")
    for flag in ("jobs", "gpus", "cores"):
        parser.add_argument(f"--{flag}", type=int, default=1)
    parser.add_argument("--log_dir", required=True, help="folder of the steps' logs")
    parser.add_argument("--folders", nargs="+", required=True,
                        help="locked while steps run: of the data, and of what is made of them")
    parser.add_argument("--call", required=True, help="the command of this run, without stages")
    return parser


if __name__ == "__main__":
    signal.signal(signal.SIGPIPE, signal.SIG_DFL)
    try:
        main(get_args_parser().parse_args())
    except (RefusalError, OSError) as refusal:  # OSError: a folder or disk that takes no file
        sys.stderr.write(f"reproduction.sh: error: {refusal}\n")
        sys.exit(2)

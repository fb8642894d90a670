"""Carries out the plan of `reproduction.sh`: each step once, logged, resumed where it was stopped.

The plan comes on standard input as words that end with NUL; a word of one newline ends an entry:

    stage NAME TITLE
    step NAME [--update] OUTPUT... [--reads PATH...] -- COMMAND...

What is known of a step stands in `.state/NAME.json` beside its outputs: {key, command, outputs,
started, finished, seconds}. The key is a hash of the command and of the keys of all recorded
outputs that the command names (or that lie in a folder after --reads), so it changes with the
settings of every step before. --update: the command itself deals with what is there.
"""

import argparse
import ctypes
import fcntl
import hashlib
import json
import os
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections import Counter
from contextlib import suppress
from datetime import datetime
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

DISTRIBUTED = {"general_distill.py", "task_distill.py", "finetune_teacher.py",
               "data_augmentation.py"}  # fmt: skip
RESUMABLE = {*DISTRIBUTED, "prepare_data.py"}
FREE_FLAGS = {"--num_workers", "--save_minutes", "--save_steps"}  # results do not depend on them
LAUNCHER = "-m torch.distributed.run --standalone --max-restarts 3 --nproc_per_node"
SECONDS_TO_END = 300  # that a killed driver's script gets to write its state
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
    command: tuple[str, ...]

    @property
    def record_path(self) -> Path:
        return state_folder(self.outputs[0]) / f"{self.name}.json"

    @property
    def record(self) -> dict[str, Any]:
        return read_record(self.record_path)

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
        paths, command = words[: words.index("--")], words[words.index("--") + 1 :]
        update = paths[:1] == ["--update"]
        split = paths.index("--reads") if "--reads" in paths else len(paths)
        steps.append(Step([*stages][-1], name, update, tuple(paths[update:split]),
                          tuple(paths[split + 1 :]), tuple(command)))  # fmt: skip
    return stages, steps


# ------------------------------------------------------------------ keys and records


@cache
def with_parents(path: str) -> list[str]:
    """Return a path and the folders that it lies in."""
    places = [Path(path), *Path(path).parents]
    return [str(place) for place in places if str(place) not in (".", "/")]


def without_free_flags(command: tuple[str, ...]) -> list[str]:
    """Return a command without the flags (each with one value) that results do not depend on."""
    return [word for before, word in zip(["", *command], command, strict=False)
            if word not in FREE_FLAGS and before not in FREE_FLAGS]  # fmt: skip


@cache
def named_places(step: Step) -> set[str]:
    """Return what the words of a command may name: paths, also of NAME=PATH, and their folders."""
    words = [word for word in (*step.command, *step.reads) if not word.startswith("-")]
    words += [word.partition("=")[2] for word in words if "=" in word]
    return {place for word in words for place in with_parents(word)}


def state_folder(output: str) -> Path:
    return Path(output).parent / ".state"


def read_record(path: Path) -> dict[str, Any]:
    """Return a step's record; empty where there is none."""
    with suppress(OSError, ValueError):
        return json.loads(path.read_text(encoding="utf-8"))
    return {}


def write_record(path: Path, record: dict[str, Any]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_suffix(".tmp")
    temporary.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    temporary.replace(path)


def makers(output: str) -> dict[Path, dict[str, Any]]:
    """Return the records of the steps that have begun to make an output, by file."""
    records = {path: read_record(path) for path in state_folder(output).glob("*.json")}
    return {path: record for path, record in records.items()
            if Path(output).name in (Path(other).name for other in record["outputs"])}  # fmt: skip


def finished_key(record: dict[str, Any]) -> str:
    return record["key"] if "finished" in record else ""


def find_keys(steps: list[Step], chosen: list[str]) -> dict[str, str]:
    """Return each step's key, by its name.

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
        text = json.dumps([without_free_flags(step.command), sorted(found - {""})])
        keys[step.name] = hashlib.sha256(text.encode()).hexdigest()
        key = keys[step.name] if step.stage in chosen else finished_key(step.record)
        made |= dict.fromkeys(step.outputs, key)
    return keys


def is_finished(step: Step, key: str) -> bool:
    return finished_key(step.record) == key and all(Path(path).exists() for path in step.outputs)


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
    for output in step.outputs:
        if Path(output).exists() and not makers(output):
            raise RefusalError(f"stage {step.stage}: {output} exists, but this script did not make"
                               " it; move it away")
    for output in step.outputs:
        records = makers(output)
        if Path(output).exists():
            # A finished one may have taken days; an unfinished one must not take its place.
            old = f"{output}.old" if any(map(finished_key, records.values())) else f"{output}.gone"
            remove(Path(old))
            Path(output).rename(old)
            remove(Path(f"{output}.gone"))
        for path in {*records} - {step.record_path}:  # another group of students is unfinished now
            others = [other for other in read_record(path)["outputs"] if other != output]
            write_record(path, {"outputs": others})


def remove(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


# ------------------------------------------------------------------ one driver a folder


def take_lock(folder: str, steps: list[Step]) -> int:
    """Keep other drivers from a folder until this one and all that it started have ended.

    Returns the open file, which the scripts inherit: a killed driver's script gets SIGTERM and
    writes its state, and the next driver waits for that.
    """
    path = Path(folder, ".state", "lock")
    if any(folder in step.outputs for step in steps):  # which want it empty
        path = state_folder(folder) / f"{Path(folder).name}.lock"
    path.parent.mkdir(parents=True, exist_ok=True)
    lock = os.open(path, os.O_RDWR | os.O_CREAT | os.O_APPEND, 0o644)
    if not has_locked(lock):
        wait_for_orphans(lock, path.read_text().split("\n"), folder)
    os.truncate(lock, 0)
    os.write(lock, f"{os.getpid()} {socket.gethostname()} {datetime.now():%F %T}".encode())
    return lock


def has_locked(lock: int) -> bool:
    with suppress(BlockingIOError):
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        return True
    return False


def wait_for_orphans(lock: int, lines: list[str], folder: str) -> None:
    """Wait for what a killed driver has left; refuse where the driver lives.

    Args:
        lines: of the lock's file: the driver, then the processes that it started.
    """
    pid, host, since = (lines[0].split(maxsplit=2) + ["?", "?", "?"])[:3]
    if host != socket.gethostname() or is_alive(pid):
        raise RefusalError(f"{folder}: another reproduction.sh works on this folder: process {pid}"
                           f" on {host}, since {since}; wait for it or stop it")
    print("The last driver was killed; what it left running writes its state and ends ...")
    deadline = time.monotonic() + SECONDS_TO_END
    while not has_locked(lock):
        for group in lines[1:]:
            if not is_alive(group):  # the script has ended, but not all that it started
                end_group(int(group))
        if time.monotonic() > deadline:
            raise RefusalError(f"{folder}: what a killed driver started does not end; end it"
                               f" yourself: kill -9 {' '.join(lines[1:])}")
        time.sleep(0.2)


def is_alive(pid: str) -> bool:
    if LIBC is None:
        return True  # unknown
    with suppress(OSError):
        return Path("/proc", pid, "stat").read_text().rpartition(")")[2].split()[0] != "Z"
    return False


def end_group(group: int) -> None:
    """Kill what is left of a script's processes."""
    with suppress(ProcessLookupError, PermissionError):
        os.killpg(group, signal.SIGKILL)


def end_with_driver(driver: int) -> None:
    """In a new process: have the system send SIGTERM when the driver dies, also by kill -9."""
    if LIBC is not None:
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
        needs, width = side_by_side(steps)
        waiting = [step for step in steps if not is_finished(step, self.keys[step.name])]
        while (waiting and not self.failed) or self.jobs:
            unfinished = {step.name for step in (*waiting, *(job.step for job in self.jobs))}
            ready = [step for step in waiting if not needs[step.name] & unfinished]
            if ready and len(self.jobs) < self.args.jobs and not self.failed:
                waiting.remove(ready[0])
                self.start(ready[0], min(self.args.jobs, width[ready[0].name]))
                continue
            time.sleep(0.05)
            for job in [job for job in self.jobs if job.process.poll() is not None]:
                if not self.signal:
                    self.jobs.remove(job)
                    self.finish(job)
            if self.signal:
                self.stop(steps[0].stage)
        if self.failed:
            sys.exit(1)

    def start(self, step: Step, width: int) -> None:
        """Start a step, one of `width` that share the cores."""
        key, resumes = self.keys[step.name], can_resume(step, self.keys[step.name])
        command = full_command(step, key, self.args.gpus)
        started = step.record["started"] if resumes else f"{datetime.now():%F %T}"
        record = {"key": key, "command": shlex.join(step.command), "outputs": step.outputs,
                  "started": started}  # fmt: skip
        for path in step.outputs:
            Path(path).parent.mkdir(parents=True, exist_ok=True)
        if not step.update:
            if not resumes:
                make_room(step)
            write_record(step.record_path, record)
        environment = dict(os.environ)
        if width > 1:
            environment.setdefault("OMP_NUM_THREADS", str(max(1, self.args.cores // width)))
        if self.args.jobs == 1:  # else its line is printed when it ends
            print(f"  {step.name:58} ", end="", flush=True)
        log, driver = Path(self.args.log_dir, f"{step.name}.log"), os.getpid()
        with log.open("a" if resumes else "w", encoding="utf-8") as file:
            print(shlex.join(command) + "\n", file=file, flush=True)
            process = subprocess.Popen(
                [sys.executable if command[0] == "python" else command[0], *command[1:]],
                env=environment, stdin=subprocess.DEVNULL, stdout=file, stderr=file,
                pass_fds=self.locks, start_new_session=True,
                preexec_fn=lambda: end_with_driver(driver))  # fmt: skip
        for lock in self.locks:
            os.write(lock, f"\n{process.pid}".encode())
        self.jobs.append(Job(step, record, process, log, time.monotonic()))

    def finish(self, job: Job) -> None:
        """Record a step that has ended, or say why it failed."""
        step, code = job.step, job.process.returncode
        end_group(job.process.pid)
        missing = "".join(f", but there is no {output}" for output in step.outputs
                          if code == 0 and not Path(output).exists())  # fmt: skip
        if code or missing:
            self.failed = True
            print("failed" * (self.args.jobs == 1), flush=True)
            print(self.explain(job, f"{code}{missing}"), file=sys.stderr)
            return
        seconds = round(time.monotonic() - job.began)
        job.record.update(finished=f"{datetime.now():%F %T}", seconds=seconds)
        write_record(step.record_path, job.record)
        print(f"  {step.name:58} " * (self.args.jobs > 1) + clock(seconds), flush=True)

    def explain(self, job: Job, code: str) -> str:
        """Return what failed, the end of its log and the command that continues."""
        text = job.log.read_text(encoding="utf-8", errors="replace").replace("\r", "\n")
        tail = [f"  | {line[:200]}" for line in text.splitlines()[-5:]]
        return "\n".join([
            f"Stage {job.step.stage} stopped: step {job.step.name}, exit code {code}.",
            f"The end of its log, {job.log}:", *tail,
            "Mend the cause; then this continues where it stopped:",
            f"  {self.args.call} --from {job.step.stage}"])  # fmt: skip

    def stop(self, stage: str) -> None:
        """Have what runs write its state and end, as Ctrl-C or SIGTERM asks."""
        print("\nStopping; what runs writes its state first ...", file=sys.stderr, flush=True)
        for job in self.jobs:
            job.process.terminate()
        for job in self.jobs:
            job.process.wait()
            end_group(job.process.pid)
        print(f"Interrupted in stage {stage}; this continues: {self.args.call} --from {stage}",
              file=sys.stderr)  # fmt: skip
        sys.exit(128 + self.signal)


def side_by_side(steps: list[Step]) -> tuple[dict[str, set[str]], dict[str, int]]:
    """Return, for each step of a stage, the steps that it waits for and how many run beside it.

    The second number does not depend on what is finished: threads may change the last digits.
    """
    needs: dict[str, set[str]] = {}
    depth: dict[str, int] = {}
    for number, step in enumerate(steps):
        needs[step.name] = {other.name for other in steps[:number]
                            if any(step.depends_on(output) for output in other.outputs)}
        depth[step.name] = 1 + max((depth[name] for name in needs[step.name]), default=0)
    width = Counter(depth.values())
    return needs, {name: width[level] for name, level in depth.items()}


def clock(seconds: int) -> str:
    return f"{seconds // 3600}:{seconds // 60 % 60:02}:{seconds % 60:02}"


def list_stages(stages: dict[str, str], steps: list[Step], keys: dict[str, str]) -> None:
    """Print each stage and what of it is finished."""
    for stage, title in stages.items():
        finished = [is_finished(step, keys[step.name]) for step in steps if step.stage == stage]
        state = "finished" if all(finished) else f"{sum(finished)} of {len(finished)}"
        print(f"{stage:15} {title:53} {state if finished else ''}".rstrip())


def check(steps: list[Step]) -> None:
    """Have every command parsed by its script's own parser, in a process of its own."""
    commands = json.dumps([step.command for step in steps])
    checks = [sys.executable, Path(__file__).with_name("checks.py")]
    result = subprocess.run(checks, input=commands, text=True, stderr=subprocess.PIPE, check=False)
    if result.returncode:
        raise RefusalError(result.stderr.strip())


def run(stages: dict[str, str], steps: list[Step], chosen: list[str], args: argparse.Namespace
        ) -> None:  # fmt: skip
    """Run, or print, the unfinished steps of the chosen stages."""
    dry, keys = args.mode == "dry-run", find_keys(steps, chosen)
    driver = Driver(args, keys, [])
    if not dry and any(not is_finished(s, keys[s.name]) for s in steps if s.stage in chosen):
        check(steps)
        driver.locks += [take_lock(folder, steps) for folder in dict.fromkeys(args.folders)]
        for folder in (args.log_dir, os.environ["TMPDIR"]):
            Path(folder).mkdir(parents=True, exist_ok=True)
    for number, (stage, title) in enumerate(stages.items(), start=1):
        if stage not in chosen:
            continue
        print(f"{'# ' * dry}[{number:2}/{len(stages)}] {stage:15} {title}", flush=True)
        ours = [step for step in steps if step.stage == stage]
        unfinished = [step for step in ours if not is_finished(step, keys[step.name])]
        if dry:
            for step in unfinished:
                print(shlex.join(full_command(step, keys[step.name], args.gpus)))
        else:
            driver.run_stage(ours)
        if len(ours) > len(unfinished):
            print(f"{'# ' * dry}  {len(ours) - len(unfinished)} finished earlier", flush=True)


def main(args: argparse.Namespace) -> None:
    """Do what the mode says with the plan on standard input."""
    began = time.monotonic()
    stages, steps = read_plan(sys.stdin.read())
    names = list(stages)
    for stage in {args.only, args.start} - {"", *stages}:
        raise RefusalError(f"this profile has no stage {stage}")
    if args.mode == "list":
        list_stages(stages, steps, find_keys(steps, names))
        return
    chosen = [args.only] if args.only else names[names.index(args.start or names[0]) :]
    run(stages, steps, chosen, args)
    if args.mode == "run":
        log = Path(args.log_dir, "report.log")
        if "report" in chosen and log.is_file():
            print(*log.read_text(encoding="utf-8").splitlines()[2:], sep="\n")
        print(f"Done in {clock(round(time.monotonic() - began))}.")


def get_args_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    add = parser.add_argument
    add("--mode", choices=["run", "dry-run", "list"], default="run")
    add("--only", default="", help="the one stage to run")
    add("--from", dest="start", default="", help="the stage to start at")
    add("--jobs", type=int, default=1, help="steps that run side by side")
    add("--gpus", type=int, default=1, help="GPUs that a training script uses")
    add("--cores", type=int, default=os.cpu_count(), help="cores that the steps share")
    add("--log_dir", required=True, help="folder of the steps' logs")
    add("--folders", nargs="+", required=True, help="folders that one driver at a time works on")
    add("--call", required=True, help="the command of this run, without its stages")
    return parser


if __name__ == "__main__":
    signal.signal(signal.SIGPIPE, signal.SIG_DFL)
    try:
        main(get_args_parser().parse_args())
    except RefusalError as refusal:
        print(f"reproduction.sh: error: {refusal}", file=sys.stderr)
        sys.exit(2)

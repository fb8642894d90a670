"""Work in parts that survives a kill: finished parts wait as files until the output is whole.

An output that takes hours is made in a folder beside it, part by part. A part is one file or
several and, written last, a mark with their lengths and check sums; what a killed process was
writing has no mark, and is made again. What a part holds depends on its place in the work alone,
so the output is the same whoever makes the parts, in whatever order and number of calls.
"""

import argparse
import hashlib
import json
import logging
import multiprocessing
import os
import shutil
import signal
import threading
import zlib
from collections import Counter, deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import ExitStack, contextmanager, suppress
from multiprocessing.connection import wait
from pathlib import Path
from typing import Any, TypeVar

from transformer import distributed
from transformer.file_utils import UserError, atomic_path, file_sha256, read_json, write_json
from transformer.run_folder import (
    ARGUMENTS_NAME,
    UNFINISHED,
    check_same_arguments,
    should_resume,
)
from transformer.runtime import argument_values

logger = logging.getLogger(__name__)

Task = TypeVar("Task")

PLAN_NAME = "publish.json"
FILE_SUFFIX, MARK_SUFFIX = ".part", ".mark.json"  # after the name of a part, which has no dot
COPIED_BYTES = 1 << 20  # at once
HASHED_BYTES = 1 << 28  # of inputs, which takes a second or less


class LostWorker(UserError):
    """A process of --num_workers was killed; the finished parts are as good as ever."""


# ------------------------------------------------------------------ files of a part


class PartFile:
    """A file being written, which knows its length and its CRC-32 so far."""

    def __init__(self, path: Path) -> None:
        self._file = path.open("wb")
        self.length = self.checksum = 0

    def write(self, content: bytes | memoryview) -> None:
        """Append bytes."""
        self._file.write(content)
        self.length += memoryview(content).nbytes
        self.checksum = zlib.crc32(content, self.checksum)

    def close(self) -> None:
        """Close the file."""
        self._file.close()


class NewPart:
    """A part being written: its files, in the order of their suffixes, and what to note of it."""

    def __init__(self, files: list[PartFile]) -> None:
        self.files = files
        self.facts: dict[str, int] = {}


def measure(path: Path) -> list[int]:
    """Return the length of a file and its CRC-32."""
    length = checksum = 0
    with path.open("rb") as file:
        while content := file.read(COPIED_BYTES):
            length += len(content)
            checksum = zlib.crc32(content, checksum)
    return [length, checksum]


def fingerprint(paths: Sequence[Path]) -> str:
    """Return what changes when one of these files does: a digest of them all.

    It is one of their contents or, where they are large, of their lengths and times. A file that
    is missing is a `UserError`.
    """
    for path in paths:
        if not path.is_file():
            raise UserError(f"{path}: no such file")
    small = sum(path.stat().st_size for path in paths) <= HASHED_BYTES
    digest = hashlib.sha256()
    for path in paths:
        content = file_sha256(path) if small else path.stat().st_mtime_ns
        digest.update(os.fsencode(f"{path} {path.stat().st_size} {content}\n"))
    return digest.hexdigest()


# ------------------------------------------------------------------ the folder


class WorkFolder:
    """The folder of an unfinished output; every process of the run has one, of the same path.

    Use it as a context manager around the work: a user's mistake that shows in it, such as text
    that is not UTF-8, removes the folder again.

    path: the folder, on the file system of the output
    record: the file beside the finished output that says what it was made with
    """

    def __init__(self, path: Path, record: Path) -> None:
        self.path = path
        self.record = record
        self.going_on = False  # with what an earlier call has made

    @classmethod
    def of_file(cls, output: Path) -> "WorkFolder":
        """Return the folder of an output that is one file."""
        return cls(output.with_name(f"{UNFINISHED}-{output.name}"),
                   output.with_name(f"{output.name}.{ARGUMENTS_NAME}"))

    @classmethod
    def of_folder(cls, output: Path) -> "WorkFolder":
        """Return the folder of an output that is several files of one folder."""
        return cls(output / UNFINISHED, output / ARGUMENTS_NAME)

    def __enter__(self) -> "WorkFolder":
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: Any) -> None:
        mistake = isinstance(error, UserError) and not isinstance(error, LostWorker)
        if mistake and not self.going_on and distributed.world_size() == 1:
            shutil.rmtree(self.path, ignore_errors=True)

    # -------------------------------------------------------------- beginning

    def begin(
        self, args: argparse.Namespace, inputs: Mapping[str, str], taken: str | None
    ) -> bool:
        """Make the folder or, with --resume, go on with it; False if the output is whole already.

        Args:
            args: the command line, with `resume`.
            inputs: for each flag, what changes when the files do that it names.
            taken: what to complain of if the work starts anew; None where nothing is in its way.

        Raises:
            UserError: --resume with other arguments, or other inputs.
        """
        args.resume = self.resumes(args)
        state = self._begin(args, inputs, taken) if distributed.is_main() else None
        self.going_on, whole = distributed.from_main(state)
        return not whole

    def resumes(self, args: argparse.Namespace) -> bool:
        """Say whether to go on with what is there; the processes ask together."""
        return should_resume(args, self.path / ARGUMENTS_NAME, self.record)

    def _begin(
        self, args: argparse.Namespace, inputs: Mapping[str, str], taken: str | None
    ) -> tuple[bool, bool]:
        """Return whether there is something to go on with, and whether it is the whole output."""
        arguments = self.path / ARGUMENTS_NAME
        if args.resume and arguments.is_file():
            self._check_same(arguments, args, inputs)
            if (self.path / PLAN_NAME).is_file():
                self._publish()
                return True, True
            for temporary in self.path.glob(".*.tmp"):
                temporary.unlink()
            logger.info("going on with %s", self.path)
            return True, False
        if args.resume and self.record.is_file() and self._outputs_are_there():
            self._check_same(self.record, args, inputs)
            self._remove()  # what a kill has left of it
            return True, True
        if taken:
            raise UserError(taken)
        if arguments.is_file():
            logger.warning("%s: the unfinished work of an earlier call is discarded; --resume"
                           " would have gone on with it", self.path)
        self._remove()
        self.path.mkdir(parents=True)
        write_json(arguments, {"arguments": argument_values(args), "inputs": dict(inputs),
                               "launch": distributed.launch()})
        return False, False

    def _check_same(
        self, path: Path, args: argparse.Namespace, inputs: Mapping[str, str]
    ) -> None:
        check_same_arguments(path, args)
        saved = read_json(path).get("inputs", {})
        changed = [name for name in sorted({*saved, *inputs})
                   if saved.get(name) != inputs.get(name)]
        if changed:
            raise UserError(
                f"--resume: {', '.join(changed)}: no longer what {path} was written for; expected"
                " the same, or a call without --resume to start again"
            )

    def _outputs_are_there(self) -> bool:
        files = read_json(self.record).get("outputs", {})
        paths = {self.record.parent / name: length for name, length in files.items()}
        return bool(paths) and all(
            path.is_file() and path.stat().st_size == length for path, length in paths.items())

    def used(self) -> int:
        """Return the bytes that the folder has taken."""
        total = 0
        for path in self.path.iterdir():
            with suppress(FileNotFoundError):  # another process of the run works already
                total += path.stat().st_size
        return total

    # -------------------------------------------------------------- parts

    def _mark(self, name: str) -> Path:
        return self.path / f"{name}{MARK_SUFFIX}"

    def stem(self, name: str) -> Path:
        """Return what the names of a part's files begin with, before their suffixes."""
        return self.path / f"{name}{FILE_SUFFIX}"

    def file(self, name: str, suffix: str) -> Path:
        """Return a file of a part."""
        return self.path / f"{name}{FILE_SUFFIX}{suffix}"

    def facts(self, name: str) -> dict[str, int] | None:
        """Return what was noted of a finished part; None if there is none, or a damaged one."""
        mark = self._mark(name)
        if not mark.is_file():
            return None
        try:
            note = _read_mark(mark)
            for suffix, expected in note["files"].items():
                if measure(self.file(name, suffix)) != expected:
                    raise ValueError(f"its file {name}{suffix} is not as it was written")
        except (OSError, ValueError) as error:
            logger.warning("%s: damaged (%s); the part is made again", mark, error)
            mark.unlink()
            return None
        return note["facts"]

    def noted(self, name: str) -> dict[str, int]:
        """Return what was noted of a part that is there."""
        return _read_mark(self._mark(name))["facts"]

    @contextmanager
    def writing(self, name: str, *suffixes: str, lasting: bool = False) -> Iterator[NewPart]:
        """Yield a part to write; it is there when the block has ended without an error.

        A lasting one, such as one that others are removed for, also survives a power cut. Of the
        others its check sum tells; to wait for the disk at each would take longer than some do.
        """
        with ExitStack() as stack:
            files = []
            for suffix in suffixes:
                path = stack.enter_context(atomic_path(self.file(name, suffix), lasting))
                files.append(PartFile(path))
                stack.callback(files[-1].close)
            part = NewPart(files)
            yield part
        written = {suffix: [file.length, file.checksum]
                   for suffix, file in zip(suffixes, files, strict=True)}
        note = {"files": written, "facts": part.facts}
        with atomic_path(self._mark(name), lasting) as temporary:
            temporary.write_text(json.dumps({**note, "crc32": _note_checksum(note)}),
                                 encoding="utf-8")

    def joined(
        self, name: str, suffixes: Sequence[str], parts: Sequence[str],
        make: Callable[[], None], separator: bytes = b"",
    ) -> dict[str, int]:
        """Return the facts of parts that are joined, as the part `name`: sums of theirs.

        Where it is not there yet every process of the run calls `make`, which makes its share of
        the parts, and the first one joins them: their files of each suffix end to end, with the
        `separator` between those that are not empty.
        """

        def join() -> None:
            with self.writing(name, *suffixes, lasting=True) as whole:
                facts: Counter[str] = Counter()
                for part in parts:
                    for file, suffix in zip(whole.files, suffixes, strict=True):
                        _append(self.file(part, suffix), file, separator)
                    facts.update(self.noted(part))
                whole.facts.update(facts)

        return self.whole(name, parts, make, join)

    def whole(
        self, name: str, parts: Sequence[str], make: Callable[[], None], join: Callable[[], None]
    ) -> dict[str, int]:
        """Return the facts of the part `name`; where it is missing, `make` parts and `join` them.

        Every process of the run makes, the first one joins. The parts are removed afterwards.
        """
        if distributed.from_main(distributed.is_main() and self.facts(name) is None):
            make()
            distributed.barrier()
            if distributed.is_main():
                join()
        if distributed.is_main():
            self.remove(parts)
        facts = self.noted(name) if distributed.is_main() else None
        return distributed.from_main(facts)

    def remove(self, parts: Iterable[str]) -> None:
        """Remove parts, and what is left of them."""
        names = set(parts)
        for path in self.path.iterdir():
            if path.name.split(".")[0] in names:
                path.unlink()

    # -------------------------------------------------------------- the end

    def publish(self, files: Mapping[Path, str], obsolete: Iterable[Path] = ()) -> list[Path]:
        """Move finished files to their names beside the record, and remove the folder.

        The obsolete files go first; then the others come, in their order, the record last. A
        call with --resume finishes what a kill has cut short. Only the first process may call it.
        """
        write_json(self.path / PLAN_NAME, {
            "files": {path.name: name for path, name in files.items()},
            "outputs": {name: path.stat().st_size for path, name in files.items()},
            "obsolete": [path.name for path in obsolete],
        })
        self._publish()
        return [self.record.with_name(name) for name in files.values()]

    def _publish(self) -> None:
        plan = read_json(self.path / PLAN_NAME)
        sources = {self.path / source: name for source, name in plan["files"].items()}
        missing = {source: name for source, name in sources.items() if source.exists()}
        there = set(sources.values()) - set(missing.values())
        for name in (self.record.name, *plan["obsolete"]):
            if name not in there:
                self.record.with_name(name).unlink(missing_ok=True)
        for source, name in missing.items():
            source.replace(self.record.with_name(name))
        arguments = read_json(self.path / ARGUMENTS_NAME)
        record = self.path / f"{ARGUMENTS_NAME}.finished"
        write_json(record, {**arguments, "outputs": plan["outputs"]})
        record.replace(self.record)
        self._remove()

    def _remove(self) -> None:
        """Remove the folder; what is left of it when that is cut short counts for nothing."""
        (self.path / ARGUMENTS_NAME).unlink(missing_ok=True)
        if self.path.exists():
            shutil.rmtree(self.path)


def _note_checksum(note: Mapping[str, Any]) -> int:
    return zlib.crc32(json.dumps([note["files"], note["facts"]], sort_keys=True).encode())


def _read_mark(path: Path) -> dict[str, Any]:
    """Read the mark of a part; a damaged one is a ValueError."""
    try:
        note = json.loads(path.read_text(encoding="utf-8"))
        if note["crc32"] != _note_checksum(note):
            raise ValueError("its check sum does not agree")
    except (KeyError, TypeError) as error:
        raise ValueError("it is no mark of a part") from error
    return note


def _append(source: Path, target: PartFile, separator: bytes) -> None:
    """Copy a file to the end of another."""
    with source.open("rb") as file:
        content = file.read(COPIED_BYTES)
        if content and target.length:
            target.write(separator)
        while content:
            target.write(content)
            content = file.read(COPIED_BYTES)


def share(tasks: Sequence[Task]) -> Sequence[Task]:
    """Return the tasks of this process of the run: every so-many-th, so that shares are alike."""
    return tasks[distributed.rank() :: distributed.world_size()]


# ------------------------------------------------------------------ processes of one machine

# Runs a method of the worker on each of some tasks; yields the results in the order of the tasks.
Run = Callable[[str, Iterable[Any]], Iterator[Any]]

_worker: Any  # of a process that works for another


def _start(worker: Any) -> None:
    """Set a process up that works for another: it ends with the other, and only then."""
    global _worker
    _worker = worker
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # this process is one of several
    # They may reach every process of a group; the one that it works for then ends it.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    threading.Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent() -> None:
    wait([multiprocessing.parent_process().sentinel])
    os.kill(os.getpid(), signal.SIGKILL)


def _call(method: str, task: Any) -> Any:
    return getattr(_worker, method)(task)


@contextmanager
def processes(worker: Any, count: int) -> Iterator[Run]:
    """Yield what runs methods of `worker`, in `count` processes or, for one, in this process.

    Few results wait at a time, so that memory does not grow with the tasks. An error or a signal
    ends the processes at once.

    Raises:
        LostWorker: a process was killed from outside.
    """
    if count == 1:
        yield lambda method, tasks: map(getattr(worker, method), tasks)
        return
    pool = ProcessPoolExecutor(count, initializer=_start, initargs=(worker,))
    try:
        pool.submit(int)  # starts the processes now, as a progress bar adds a thread to this one

        def run(method: str, tasks: Iterable[Any]) -> Iterator[Any]:
            waiting: deque = deque()
            for task in tasks:
                waiting.append(pool.submit(_call, method, task))
                if len(waiting) > 2 * count:
                    yield waiting.popleft().result()
            while waiting:
                yield waiting.popleft().result()

        yield run
    except BaseException as error:
        for process in multiprocessing.active_children():
            process.kill()
        if isinstance(error, BrokenProcessPool):
            raise LostWorker(
                f"one of the {count} processes of --num_workers was killed, perhaps for want of"
                " memory; fewer need less, and --resume keeps what is finished"
            ) from error
        raise
    finally:
        pool.shutdown(cancel_futures=True)

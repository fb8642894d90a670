"""Work in shards that survives a kill: finished shards wait as files until they are merged.

A file that takes long to make is made shard by shard, in a folder beside it. A shard gets its name
when the disk holds all of it, so one that exists is finished, and what a killed process was writing
is made again. What a shard holds depends on its place in the work alone: the merged file is the
same whoever makes the shards, in whatever order and number of calls.
"""

import argparse
import hashlib
import logging
import multiprocessing
import os
import shutil
import signal
import threading
from collections import Counter, deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from multiprocessing.connection import wait
from pathlib import Path
from typing import Any, BinaryIO, TypeVar

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

HASHED_BYTES = 1 << 28  # of inputs, which takes a second or less
COPIED_BYTES = 1 << 20  # at once


class LostWorker(UserError):
    """A worker process was killed; the finished shards stay valid."""


def fingerprint(paths: Sequence[Path]) -> str:
    """Return a digest of files, which changes when one of them does.

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


def share(tasks: Sequence[Task]) -> Sequence[Task]:
    """Return the tasks of this process of the run: every n-th, so that shares are alike."""
    return tasks[distributed.rank() :: distributed.world_size()]


# ------------------------------------------------------------------ the file and its shards


class ShardedFile:
    """A file that is merged from shards; every process of the run has one, of the same path.

    Use it as a context manager around the work: a `UserError` in it, such as a malformed input,
    removes the shards of a new run.

    output: the file
    folder: holds the shards, and the manifest: the arguments and inputs they are made with
    metadata: beside the finished output, what it was made with
    state: "new", "resume" or "finished", from `begin` on
    """

    def __init__(self, output: Path) -> None:
        self.output = output
        self.folder = output.with_name(f"{UNFINISHED}-{output.name}")
        self.manifest = self.folder / ARGUMENTS_NAME
        self.metadata = output.with_name(f"{output.name}.{ARGUMENTS_NAME}")
        self.state = "new"

    def __enter__(self) -> "ShardedFile":
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: Any) -> None:
        useless = isinstance(error, UserError) and not isinstance(error, LostWorker)
        if useless and self.state == "new" and distributed.world_size() == 1:
            self._remove_folder()

    def begin(self, args: argparse.Namespace, inputs: Mapping[str, str]) -> str:
        """Make the folder or, with --resume, continue with it; return the state.

        Args:
            args: the command line, with `resume` and `overwrite`.
            inputs: for each flag that names files, their fingerprint.

        Raises:
            UserError: an output that exists without --overwrite, or --resume with other arguments
                or inputs.
        """
        args.resume = should_resume(args, self.manifest, self.metadata)
        state = self._begin(args, inputs) if distributed.is_main() else None
        self.state = distributed.from_main(state)
        return self.state

    def _begin(self, args: argparse.Namespace, inputs: Mapping[str, str]) -> str:
        if args.resume and self.manifest.is_file():
            _check_same(self.manifest, args, inputs)
            for temporary in self.folder.glob(".*.tmp"):
                temporary.unlink()
            logger.info("resuming %s", self.folder)
            return "resume"
        if args.resume and self._is_merged():
            _check_same(self.metadata, args, inputs)
            self._remove_folder()  # what a kill has left of it
            return "finished"
        if self.output.exists() and not args.overwrite:
            raise UserError(f"{self.output}: exists; --overwrite replaces it")
        if self.manifest.is_file():
            logger.warning("%s: the unfinished work of an earlier call is discarded; --resume"
                           " would have continued it", self.folder)
        self._remove_folder()
        self.folder.mkdir(parents=True)
        write_json(self.manifest, {"arguments": argument_values(args), "inputs": dict(inputs),
                                   "launch": distributed.launch()})
        return "new"

    def _is_merged(self) -> bool:
        if not (self.output.is_file() and self.metadata.is_file()):
            return False
        return self.output.stat().st_size == read_json(self.metadata).get("bytes")

    def _remove_folder(self) -> None:
        """Remove the folder; what is left of it when that is cut short counts for nothing."""
        self.manifest.unlink(missing_ok=True)
        if self.folder.exists():
            shutil.rmtree(self.folder)

    def shard(self, name: str) -> Path:
        """Return the file of a shard."""
        return self.folder / f"{name}.shard"

    def is_finished(self, name: str) -> bool:
        """Say whether a shard is there."""
        return self.shard(name).is_file()

    @contextmanager
    def write_shard(self, name: str) -> Iterator[tuple[BinaryIO, Counter[str]]]:
        """Yield a shard's file and its counts, to fill; it is there when the block has ended."""
        counts: Counter[str] = Counter()
        with atomic_path(self.shard(name)) as temporary:
            with temporary.open("wb") as file:
                yield file, counts
            write_json(self._counts(name), counts)

    def _counts(self, name: str) -> Path:
        return self.folder / f"{name}.json"

    def total_counts(self, names: Iterable[str]) -> Counter[str]:
        """Return the counts of finished shards together; the processes of the run ask together."""
        distributed.barrier()
        total: Counter[str] = Counter()
        if distributed.is_main():
            for name in names:
                total.update(read_json(self._counts(name)))
        return distributed.from_main(total)

    def merge(self, names: Iterable[str], separator: bytes = b"") -> None:
        """Make the output of finished shards, in this order, and remove the folder.

        The `separator` stands between shards that are not empty. Only the first process may call
        it. A call with --resume merges again what a kill has cut short.
        """
        with atomic_path(self.output) as temporary, temporary.open("wb") as merged:
            for name in names:
                with self.shard(name).open("rb") as file:
                    if merged.tell() and os.fstat(file.fileno()).st_size:
                        merged.write(separator)
                    shutil.copyfileobj(file, merged, COPIED_BYTES)
        size = self.output.stat().st_size
        write_json(self.metadata, {**read_json(self.manifest), "bytes": size})
        self._remove_folder()


def _check_same(path: Path, args: argparse.Namespace, inputs: Mapping[str, str]) -> None:
    """Raise a `UserError` unless a manifest or metadata file holds these arguments and inputs."""
    check_same_arguments(path, args)
    saved = read_json(path).get("inputs", {})
    changed = [name for name in sorted({*saved, *inputs}) if saved.get(name) != inputs.get(name)]
    if changed:
        raise UserError(
            f"--resume: {', '.join(changed)}: no longer what {path} was written for; expected"
            " the same, or a call without --resume to start again"
        )


# ------------------------------------------------------------------ worker processes

_function: Callable[[Any], Any]  # of a worker process


def _start_worker(function: Callable[[Any], Any]) -> None:
    """Set a worker process up: it ends with the one that it works for, and only then."""
    global _function
    _function = function
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # this process is one of several
    # They may reach every process of a group; the one that it works for then ends it.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    threading.Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent() -> None:
    wait([multiprocessing.parent_process().sentinel])
    os.kill(os.getpid(), signal.SIGKILL)


def _call(task: Any) -> Any:
    return _function(task)


@contextmanager
def worker_pool(
    function: Callable[[Any], Any], count: int
) -> Iterator[Callable[[Iterable[Any]], Iterator[Any]]]:
    """Yield what maps `function` over tasks in order, in `count` processes; for 1 in this one.

    Few results wait at a time, so that memory does not grow with the tasks. An error or a signal
    ends the processes at once.

    Raises:
        LostWorker: a process was killed from outside.
    """
    if count == 1:
        yield lambda tasks: map(function, tasks)
        return
    pool = ProcessPoolExecutor(count, initializer=_start_worker, initargs=(function,))
    try:
        pool.submit(int)  # starts the processes now, as a progress bar adds a thread to this one

        def run(tasks: Iterable[Any]) -> Iterator[Any]:
            waiting: deque = deque()
            for task in tasks:
                waiting.append(pool.submit(_call, task))
                if len(waiting) > 2 * count:
                    yield waiting.popleft().result()
            while waiting:
                yield waiting.popleft().result()

        yield run
    except BaseException as error:
        for process in multiprocessing.active_children():
            process.kill()
        if isinstance(error, BrokenProcessPool):
            raise LostWorker(f"one of the {count} processes of --num_workers was killed, perhaps"
                             " for want of memory; fewer need less") from error
        raise
    finally:
        pool.shutdown(cancel_futures=True)

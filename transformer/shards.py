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
from functools import partial
from multiprocessing.connection import wait
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

from tqdm import tqdm

from transformer import distributed
from transformer.file_utils import (
    UserError,
    atomic_path,
    check_output_file,
    file_sha256,
    read_json,
    write_json,
)
from transformer.run_folder import (
    ARGUMENTS_NAME,
    UNFINISHED,
    check_same_arguments,
    lock_folder,
    should_resume,
)
from transformer.runtime import argument_values, check_disk

logger = logging.getLogger(__name__)

HASHED_BYTES = 1 << 28  # of inputs, which takes a second or less
COPIED_BYTES = 1 << 20  # at once


def fingerprint(paths: Sequence[Path]) -> str:
    """Return a digest of files: of their contents or, where they are large, lengths and times.

    A path that is no file, such as a pipe, is a `UserError`.
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


# ------------------------------------------------------------------ the file and its shards


class Shard(NamedTuple):
    """What becomes of the inputs [begin, end), such as rows or files."""

    begin: int
    end: int


def cut(count: int, size: int) -> list[Shard]:
    """Cut `count` inputs into shards of `size`."""
    return [Shard(begin, min(begin + size, count)) for begin in range(0, count, size)]


class ShardedFile:
    """A file that is merged from shards; every process of the run has one, of the same path.

    output: the file
    folder: holds the shards, and the manifest: the arguments and inputs they are made with
    metadata: beside the finished output, what it was made with
    """

    def __init__(self, output: Path) -> None:
        check_output_file(output)
        self.output = output
        self.folder = output.with_name(f"{UNFINISHED}-{output.name}")
        self.manifest = self.folder / ARGUMENTS_NAME
        self.metadata = output.with_name(f"{output.name}.{ARGUMENTS_NAME}")

    def begin(self, args: argparse.Namespace, inputs: Mapping[str, str], size: int) -> bool:
        """Make the folder or, with --resume, keep its shards; False if the output is finished.

        The folder is locked: of two runs with the same output the second is refused.

        Args:
            args: the command line, with `resume` and `overwrite`.
            inputs: for each flag that names files, their fingerprint.
            size: bytes of the output, about.

        Raises:
            UserError: an output that exists without --overwrite, --resume with other arguments or
                inputs, or a disk that does not hold the output twice: in shards, and merged.
        """
        args.resume = should_resume(args, self.manifest, self.metadata)
        finished = distributed.is_main() and self._begin(args, inputs, size)
        return not distributed.from_main(finished)

    def _begin(self, args: argparse.Namespace, inputs: Mapping[str, str], size: int) -> bool:
        if self.folder.is_dir():
            lock_folder(self.folder)
        if args.resume and self.manifest.is_file():
            _check_same(self.manifest, args, inputs)
            logger.info("resuming %s", self.folder)
            return False
        if args.resume and self.output.is_file() and self.metadata.is_file() \
                and self.output.stat().st_size == read_json(self.metadata).get("bytes"):
            _check_same(self.metadata, args, inputs)
            logger.info("%s: finished already, by an earlier call with these arguments",
                        self.output)
            self.remove_folder()  # what a kill has left of it
            return True
        if self.output.exists() and not args.overwrite:
            raise UserError(f"{self.output}: exists; --overwrite replaces it")
        check_disk(str(self.output), self.folder, 2 * size)
        if any(self.folder.glob("*.shard")):
            logger.warning("%s: the unfinished work of an earlier call is discarded; --resume"
                           " would have continued it", self.folder)
        self.remove_folder()
        self.folder.mkdir(parents=True, exist_ok=True)
        lock_folder(self.folder)
        write_json(self.manifest, {"arguments": argument_values(args), "inputs": dict(inputs),
                                   "launch": distributed.launch()})
        return False

    def remove_folder(self) -> None:
        """Remove the folder; what is left of it when that is cut short counts for nothing."""
        self.manifest.unlink(missing_ok=True)
        if self.folder.exists():
            shutil.rmtree(self.folder)

    def _paths(self, shard: Shard) -> tuple[Path, Path]:
        """Return the files of a shard and of its counts, which is written first."""
        return self.folder / f"{shard.begin}.shard", self.folder / f"{shard.begin}.json"

    def make(
        self, shards: Sequence[Shard], write: Callable[[Shard, BinaryIO, Counter[str]], None],
        unit: str, workers: int = 1,
    ) -> Counter[str]:
        """Make the missing shards, each process of the run its share; return the counts of all.

        Args:
            write: writes a shard to a file, and what to count of it; a picklable function.
            unit: what the inputs of a shard are.
            workers: processes to call it in.
        """
        mine = shards[distributed.rank() :: distributed.world_size()]
        sizes = [shard.end - shard.begin for shard in mine]
        with worker_pool(partial(self._write, write), min(workers, len(mine)) or 1) as run:
            for _ in progress(run(mine), sizes, unit, self.output.name):
                pass
        distributed.barrier()
        counts: Counter[str] = Counter()
        for shard in shards if distributed.is_main() else ():
            counts.update(read_json(self._paths(shard)[1]))
        return distributed.from_main(counts)

    def _write(self, write: Callable, shard: Shard) -> None:
        path, counts_path = self._paths(shard)
        if not path.is_file():
            counts: Counter[str] = Counter()
            with atomic_path(path) as temporary:
                with temporary.open("wb") as file:
                    write(shard, file, counts)
                write_json(counts_path, counts)

    def merge(self, shards: Iterable[Shard], separator: bytes = b"") -> None:
        """Make the output of finished shards, in this order, and remove the folder.

        The `separator` stands between shards that are not empty. Only the first process may call
        it. A call with --resume merges again what a kill has cut short.
        """
        with atomic_path(self.output) as temporary, temporary.open("wb") as merged:
            for shard in shards:
                with self._paths(shard)[0].open("rb") as file:
                    if merged.tell() and os.fstat(file.fileno()).st_size:
                        merged.write(separator)
                    shutil.copyfileobj(file, merged, COPIED_BYTES)
        size = self.output.stat().st_size
        write_json(self.metadata, {**read_json(self.manifest), "bytes": size})
        self.remove_folder()


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


def progress(results: Iterable[Any], sizes: Sequence[int], unit: str, what: str) -> Iterator[Any]:
    """Yield results, with a bar that counts the sizes of what each was made of."""
    with tqdm(total=sum(sizes), unit=unit, unit_scale=True, desc=what,
              disable=not distributed.is_main()) as bar:
        for result, size in zip(results, sizes, strict=True):
            yield result
            bar.update(size)


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
        UserError: a process was killed from outside.
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
            raise UserError(f"one of the {count} processes of --num_workers was killed, perhaps"
                            " for want of memory; fewer need less") from error
        raise
    finally:
        pool.shutdown(cancel_futures=True)

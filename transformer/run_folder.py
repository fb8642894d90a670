"""The output folders of a run: whether it may write, continues or is finished; its logs.

An output folder that holds files belongs to an earlier call. Its `args.json` says what that call
was begun with; `eval_results.json` is written last and says that it has finished.
"""

import argparse
import fcntl
import json
import logging
import os
import shutil
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from transformer import distributed
from transformer.file_utils import (
    CONFIG_NAME,
    OTHER_VOCABULARIES,
    TOKENIZER_FILES,
    UserError,
    read_json,
    s3_address,
    upload_folder,
    write_json,
)
from transformer.runtime import argument_values, as_list

if TYPE_CHECKING:
    import torch

logger = logging.getLogger(__name__)

ARGUMENTS_NAME = "args.json"  # what a run was begun with
RESULTS_NAME = "eval_results.json"  # of a run that has finished
STATE_FOLDER = "training_state"  # below the first student's folder
EVENTS_FOLDER = "tensorboard"  # below a student's folder
UNFINISHED = ".unfinished"  # the folder, or how it begins, of shards of an unfinished output

# Weights of any origin, whole or in shards, and what is put beside them or in their place.
WEIGHTS_PATTERNS = ("*.safetensors", "*.safetensors.index.json", "*pytorch_model*.bin",
                    "pytorch_model.bin.index.json", "tf_model.h5", "flax_model.msgpack",
                    "rust_model.ot", "adapter_config.json", "adapter_model.*", "model*.onnx",
                    "model*.onnx_data", "onnx", "openvino")
# What a reader would take for a part of a model, or of the run that made it.
MODEL_PATTERNS = (
    *WEIGHTS_PATTERNS, CONFIG_NAME, *TOKENIZER_FILES, *OTHER_VOCABULARIES, "quantization.json",
    "kprune.json", "task.json",
    ARGUMENTS_NAME, RESULTS_NAME, "eval_results.txt", "log.jsonl", EVENTS_FOLDER, STATE_FOLDER,
    "last", "lr*_batch*", "generation_config.json", "training_args.bin", "trainer_state.json",
    "modules.json", "sentence_bert_config.json", "chat_template.jinja")
# Flags that name what a training script reads.
INPUT_ARGUMENTS = ("teacher_model", "student_model", "bert_model", "vocab_dir", "data_dir",
                   "pregenerated_data", "train_corpus")

# Arguments that may change from one call to the one that resumes it: they do not change results.
FREE_ARGUMENTS = {
    "given", "resume", "overwrite_output_dir", "overwrite", "output_dir", "output_file",
    "save_steps", "save_minutes", "num_workers", "local_rank", "data_url", "cache_dir",
    "reduce_memory", "tensorboard",
}


# ------------------------------------------------------------------ one folder


def check_not_input(output: Path | str, inputs: Iterable[Path | str]) -> None:
    """Raise a `UserError` where the output is, or contains, a file or folder that is read."""
    output = Path(output)
    for path in map(Path, inputs):
        if output.exists() and path.exists() and any(
                place.samefile(output) for place in (path, *path.resolve().parents)):
            raise UserError(f"{output}: this call reads {path} there, and would write over it;"
                            " expected another place for the output")


def check_output_dir(
    path: Path | str, overwrite: bool = False, inputs: Iterable[Path | str] = ()
) -> None:
    """Raise a `UserError` for a file, an input, or a folder that holds files unless `overwrite`.

    Temporary files of a killed process do not count. Of several processes only the first checks:
    it may have written something already.
    """
    path = Path(path)
    if not distributed.is_main():
        return
    if path.exists() and not path.is_dir():
        raise UserError(f"{path}: is a file; expected a folder")
    check_not_input(path, inputs)
    if overwrite or not path.is_dir():
        return
    if any(not file.name.endswith(".tmp") and not file.name.startswith(UNFINISHED)
           for file in path.iterdir()):
        resume = "--resume or " if (path / ARGUMENTS_NAME).is_file() else ""
        raise UserError(f"{path}: exists and is not empty; choose another folder or pass {resume}"
                        "--overwrite_output_dir")


def prepare_output_dir(
    path: Path | str, overwrite: bool = False, inputs: Iterable[Path | str] = (),
    keep: bool = False,
) -> Path:
    """Make and lock the output folder of one model; with `overwrite` one that is there goes.

    Args:
        path, overwrite, inputs: see `check_output_dir`.
        keep: remove temporary files of a killed process alone; to write over a model is an error.
    """
    path = Path(path)
    if distributed.is_main():
        inputs = list(inputs)
        check_output_dir(path, True, inputs)
        path.mkdir(parents=True, exist_ok=True)
        lock_folder(path)  # before anything of it is removed
        check_output_dir(path, overwrite, inputs)
        if keep and (old := _matching(path, WEIGHTS_PATTERNS)):
            raise UserError(f"{path}: holds a model ({old[0].name}); expected another folder for"
                            " what is no model")
        if not keep:
            clear_model(path)
        remove_temporary(path)
    return path


def _matching(folder: Path, patterns: Sequence[str]) -> list[Path]:
    return [path for pattern in patterns for path in sorted(folder.glob(pattern))]


def clear_model(folder: Path) -> None:
    """Remove the model of a folder, whoever wrote it, and the records of the run that made it."""
    for path in _matching(folder, MODEL_PATTERNS):
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        else:
            path.unlink(missing_ok=True)
    card = folder / "README.md"
    if card.is_file() and b"export_model.py" in card.read_bytes():
        card.unlink()  # ours; the user's own stays


def remove_temporary(folder: Path) -> None:
    """Remove the temporary files that a killed process has left."""
    for temporary in folder.rglob(".*.tmp"):
        temporary.unlink(missing_ok=True)


def remove_training_states(path: Path) -> None:
    """Delete the saved states of a run that has ended, or is to start again."""
    shutil.rmtree(path / STATE_FOLDER, ignore_errors=True)


def save_arguments(output_dir: Path, start: Mapping[str, Any]) -> None:
    """Write what `runtime.log_start` returned to `args.json`."""
    if distributed.is_main():
        write_json(output_dir / ARGUMENTS_NAME, {**start, "launch": distributed.launch()})


def check_same_arguments(path: Path | str, args: argparse.Namespace) -> bool:
    """Return whether an earlier call's `args.json` exists; it must hold these arguments.

    Raises:
        UserError: arguments that results depend on differ; the message names them all.
    """
    if not Path(path).is_file():
        return False
    saved, values = read_json(path).get("arguments", {}), argument_values(args)
    # A flag that is newer than the saved ones is passed over.
    differing = [f"--{name} {values.get(name)} (was {saved[name]})"
                 for name in sorted({*saved} - FREE_ARGUMENTS)
                 if values.get(name) != saved[name]]
    if differing:
        raise UserError(
            f"--resume: other arguments than in {path}: {', '.join(differing)}; expected the same;"
            " to start again, overwrite what is there in place of --resume"
        )
    return True


def should_resume(args: argparse.Namespace, *records: Path) -> bool:
    """Say whether to continue an earlier call: with --resume, or when torchrun restarts this one.

    The second only where one of `records`, each an `args.json`, was written by this very call of
    torchrun: what an earlier one has left is not touched without --resume. All processes call
    this together.
    """
    if distributed.agree(args.resume):
        return True
    if not distributed.agree(distributed.is_restart()):
        return False
    own = distributed.is_main() and any(
        path.is_file() and read_json(path).get("launch") == distributed.launch()
        for path in records)
    return distributed.from_main(own)


_locks: dict[Path, int] = {}  # descriptors of the folders that this process has locked


def _forget_locks() -> None:
    """Close a new process's copies: it must not hold the locks longer than its parent."""
    while _locks:
        os.close(_locks.popitem()[1])


os.register_at_fork(after_in_child=_forget_locks)


def lock_folder(path: Path) -> None:
    """Lock an existing folder for this process, until it ends, however it ends.

    Raises:
        UserError: another process has locked it.
    """
    if not distributed.is_main():
        return
    path = path.resolve()
    if path in _locks:
        os.close(_locks.pop(path))
    descriptor = os.open(path, os.O_RDONLY)
    _locks[path] = descriptor
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise UserError(f"{path}: another run is writing to this folder; wait until it has ended,"
                        " or choose another folder") from None
    except OSError as error:  # a file system without locks
        logger.warning("%s: cannot be locked against a second run (%s)", path, error)


# ------------------------------------------------------------------ the folders of a training run


class RunFolder:
    """The output folders of a training run, one for each student; locked by this process.

    state: "new"; "resume" if an earlier call with the same arguments was stopped; "finished" if
        it has finished.
    """

    def __init__(self, paths: Sequence[Path], sources: Sequence[str], overwrite: bool,
                 state: str, data_url: str, trains: bool) -> None:
        self.paths, self.sources, self.overwrite, self.state = paths, sources, overwrite, state
        self.address, self.trains = s3_address(data_url), trains

    @classmethod
    def open(cls, args: argparse.Namespace, sources: Sequence[str]) -> "RunFolder":
        """Check and lock the folders of --output_dir; nothing is written before `start`.

        Args:
            args: the command line of a training script.
            sources: the model that each student starts from.

        Raises:
            UserError: not one folder a student; a folder that another run writes to, that this
                one reads, or that holds other files; with --resume, other arguments than the
                earlier call's.
        """
        paths = [Path(folder) for folder in as_list(args.output_dir)]
        if len(paths) != len(sources):
            raise UserError(
                f"--output_dir: {len(paths)} folders for {len(sources)} students of"
                " --student_model; expected one each"
            )
        if len({path.resolve() for path in paths}) < len(paths):
            raise UserError(
                f"--output_dir {' '.join(map(str, paths))}: expected a folder of its own for each")
        inputs = [*sources, *(value for name in INPUT_ARGUMENTS
                              for value in as_list(getattr(args, name, None)) if value)]
        resume = should_resume(args, *(path / ARGUMENTS_NAME for path in paths))
        for path in paths:
            begun = resume and (path / ARGUMENTS_NAME).is_file()
            check_output_dir(path, args.overwrite_output_dir or begun, inputs)
            if path.is_dir():
                lock_folder(path)
        found = _earlier_state(args, paths, sources) if resume and distributed.is_main() else "new"
        state = distributed.from_main(found)
        return cls(paths, sources, args.overwrite_output_dir, state, getattr(args, "data_url", ""),
                   not getattr(args, "do_eval", False))

    def start(self, record: Mapping[str, Any]) -> list[Path]:
        """Make the folders with their `args.json`: `record` and the student's source."""
        for path, source in zip(self.paths, self.sources, strict=True):
            if distributed.is_main():
                if self.state == "new":
                    prepare_output_dir(path, self.overwrite, keep=not self.trains)
                else:
                    path.mkdir(parents=True, exist_ok=True)
                    lock_folder(path)
                    remove_temporary(path)
                (path / RESULTS_NAME).unlink(missing_ok=True)
            save_arguments(path, {**record, "student": source})
        self.upload(strict=True)  # a wrong address is an error now, not after days
        return self.paths

    def upload(self, strict: bool = False) -> None:
        """Copy what is new to --data_url, if given; a failure is a warning or, `strict`, an error.

        Below the address several folders are kept apart by their own paths.
        """
        if self.address is None or not distributed.is_main():
            return
        bucket, prefix = self.address
        for path in self.paths:
            inner = path.as_posix().lstrip("/") if len(self.paths) > 1 else ""
            key = "/".join(part for part in (prefix, inner) if part)
            try:
                upload_folder(path, (bucket, key), skip=(STATE_FOLDER,))
            except UserError as error:
                if strict:
                    raise
                logger.warning("%s; tried again with the next checkpoint", error)


def _earlier_state(
    args: argparse.Namespace, paths: Sequence[Path], sources: Sequence[str]
) -> str:
    """Return what an earlier call with these arguments and students has left."""
    begun = False
    for path, source in zip(paths, sources, strict=True):
        if check_same_arguments(path / ARGUMENTS_NAME, args):
            begun = True
            was = read_json(path / ARGUMENTS_NAME).get("student")
            if was != source:
                raise UserError(f"--resume: {path} is the folder of student {was}; expected that"
                                f" of {source}")
    if not begun:
        return "new"
    if not all((path / RESULTS_NAME).is_file() for path in paths):
        return "resume"
    remove_training_states(paths[0])
    logger.info("%s: finished by an earlier call; nothing to resume", " ".join(map(str, paths)))
    return "finished"


# ------------------------------------------------------------------ logs


class JsonLog:
    """A log file with one JSON object a line, written by a run's first process.

    With `tensorboard` its numbers are also TensorBoard's, in event files of a folder beside it.
    """

    def __init__(self, path: Path | str, keep: bool = False, tensorboard: bool = False) -> None:
        self.path, self.tensorboard = Path(path), tensorboard
        self.events: Any = None  # torch.utils.tensorboard's SummaryWriter
        if not keep:
            self.cut(0)

    @property
    def size(self) -> int:
        """Its bytes so far."""
        return self.path.stat().st_size if self.path.is_file() else 0

    def cut(self, size: int) -> None:
        """Keep the first `size` bytes: what followed is written again."""
        if distributed.is_main():
            if size > self.size:
                logger.warning("%s: %d bytes; expected at least %d", self.path, self.size, size)
            with self.path.open("ab") as file:
                file.truncate(min(size, self.size))
            self._renew_events()

    def sync(self) -> None:
        """Wait until the disk holds what was written."""
        if distributed.is_main():
            with self.path.open("ab") as file:
                os.fsync(file.fileno())

    def write(self, record: Mapping[str, Any]) -> None:
        """Add a line."""
        if distributed.is_main():
            with self.path.open("a", encoding="utf-8") as file:
                file.write(json.dumps(record) + "\n")
            self._add_events(record)

    def _renew_events(self) -> None:
        """Replace the event files by one of the lines that were kept."""
        if self.events is not None:
            self.events.close()
        shutil.rmtree(self.path.parent / EVENTS_FOLDER, ignore_errors=True)
        if not self.tensorboard:
            return
        from torch.utils.tensorboard import SummaryWriter

        # The purging is for a TensorBoard that shows what was removed.
        self.events = SummaryWriter(self.path.parent / EVENTS_FOLDER, purge_step=0)
        for line in self.path.read_text(encoding="utf-8").splitlines():
            self._add_events(json.loads(line))

    def _add_events(self, record: Mapping[str, Any]) -> None:
        if self.events is not None:
            for name, value in flat_numbers(record):
                self.events.add_scalar(name, value, record["step"])
            self.events.flush()


def flat_numbers(record: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, float]]:
    """Yield the numbers of a record, nested ones by names such as `metrics/acc`."""
    for name, value in record.items():
        if isinstance(value, Mapping):
            yield from flat_numbers(value, f"{prefix}{name}/")
        elif isinstance(value, (int, float)):
            yield prefix + name, value


class RunningMean:
    """Means of named scalars, which stay on their device until they are read.

    Under torchrun a scalar is the sum of what the processes add.
    """

    def __init__(self) -> None:
        self.totals: dict[str, torch.Tensor] = {}
        self.count = 0

    def add(self, values: Mapping[str, "torch.Tensor"]) -> None:
        """Count one more observation of each scalar."""
        for name, value in values.items():
            value = value.detach().float()
            self.totals[name] = self.totals[name] + value if name in self.totals else value
        self.count += 1

    def state(self) -> dict[str, Any]:
        """Return the sums over all processes; they call it together."""
        import torch

        names = list(self.totals)
        sums = torch.stack([self.totals[name] for name in names]) if names else torch.empty(0)
        sums = distributed.sum_over_ranks(sums.double().cpu()).tolist()
        return {"totals": dict(zip(names, sums, strict=True)), "count": self.count}

    def read(self) -> dict[str, float]:
        """Return the means since the last reading and start again."""
        totals, count = self.state().values()
        self.totals, self.count = {}, 0
        return {name: total / count for name, total in totals.items()}

    def load_state(self, state: Mapping[str, Any], device: "torch.device") -> None:
        """Continue from what `state` returned; the first process holds the sums so far."""
        import torch

        share = 1.0 if distributed.is_main() else 0.0
        self.totals = {name: torch.tensor(total * share, dtype=torch.float32, device=device)
                       for name, total in state["totals"].items()}
        self.count = state["count"]

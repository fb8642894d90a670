"""What every script needs around its work: errors, seeds, device, precision, output folders."""

import argparse
import copy
import ctypes
import errno
import importlib.util
import json
import logging
import math
import os
import random
import shlex
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import torch

from transformer import distributed
from transformer.checkpoint import remove_training_states
from transformer.file_utils import UserError, read_json, write_json

logger = logging.getLogger(__name__)

PRECISIONS = {"fp32": None, "bf16": torch.bfloat16, "fp16": torch.float16}
COMPILED_SHAPES = 64  # 8 padded lengths, each with the few numbers of rows that occur

# glibc's names for mallopt: what it keeps of freed memory, and what it asks the system for anew.
M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3
KEPT_BYTES, LARGEST_KEPT_BYTES = 2**31 - 1, 2**28


# ------------------------------------------------------------------ starting a script


def given_flags(parser: argparse.ArgumentParser, argv: Sequence[str] | None = None) -> set[str]:
    """Return the names (`dest`) of the flags that stand on the command line."""
    silent = copy.deepcopy(parser)
    for action in silent._actions:
        action.default = argparse.SUPPRESS
        action.required = False
    return set(vars(silent.parse_args(argv)))


class Stopped(KeyboardInterrupt):
    """Ctrl-C or SIGTERM has ended the work; `signal_number` says which."""

    def __init__(self, signal_number: int = signal.SIGINT) -> None:
        super().__init__()
        self.signal_number = signal_number


def _raise_stopped(number: int, frame: Any) -> None:
    raise Stopped(number)


def run_script(
    main: Callable[[argparse.Namespace], None],
    parser: argparse.ArgumentParser,
    argv: Sequence[str] | None = None,
) -> None:
    """Parse the command line, set up logging and run `main(args)`.

    `args.given` holds the names of the flags that were given. A user's mistake, a full disk and a
    lost process of the same run become one line on stderr and exit code 2; Ctrl-C and SIGTERM
    leave with 130 and 143, and where the script can go on later, with the command that does.
    """
    args = parser.parse_args(argv)
    args.given = given_flags(parser, argv)
    setup_logging()
    if threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGTERM, _raise_stopped)
    try:
        main(args)
        if distributed.is_connected():
            # At once, when all have got here: while Python takes a group's modules and threads
            # apart one by one, PyTorch's C++ threads are now and then ended in the wrong order,
            # and a finished run would count as crashed.
            distributed.barrier()
            logging.shutdown()
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(0)
    except KeyboardInterrupt as stop:
        number = getattr(stop, "signal_number", signal.SIGINT)
        _complain(parser.prog, f"stopped by {signal.Signals(number).name}{how_to_continue(args)}")
        sys.exit(128 + number)
    except (UserError, FileNotFoundError, IsADirectoryError, NotADirectoryError,
            PermissionError) as error:
        _complain(parser.prog, f"error: {error}")
        sys.exit(2)
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT):
            raise
        _complain(parser.prog, f"error: the disk is full ({error}); what was finished is kept"
                  + how_to_continue(args))
        sys.exit(2)
    except RuntimeError as error:
        if not distributed.is_lost_peer(error):
            raise
        reason = str(error).strip().splitlines()[0]
        _complain(parser.prog, "error: another process of this run has ended, so this one ends"
                  f" too; the first message of the others says why ({reason})"
                  + how_to_continue(args))
        sys.exit(2)


def _complain(program: str, message: str) -> None:
    """Print one line on stderr; of several processes each but the first says which it is."""
    process = "" if distributed.is_main() else f" (process {distributed.rank()})"
    print(f"{program}{process}: {message}", file=sys.stderr, flush=True)


def how_to_continue(args: argparse.Namespace) -> str:
    """Return the end of a sentence with the command that goes on; nothing where none does."""
    if not hasattr(args, "resume") or getattr(args, "do_eval", False):
        return ""
    words = [word for word in sys.argv if not word.startswith(("--resume", "--overwrite"))]
    launcher = "torchrun ..." if distributed.world_size() > 1 else "python"
    return f"; this continues: {launcher} {shlex.join([*words, '--resume'])}"


def setup_logging() -> None:
    """Log to stderr, one short line a message; of several processes the first speaks for all."""
    logging.basicConfig(
        level=logging.INFO if distributed.is_main() else logging.ERROR,
        format="%(asctime)s %(levelname).1s %(message)s", datefmt="%H:%M:%S",
    )
    for noisy in ("urllib3", "botocore", "boto3", "matplotlib", "httpx"):
        logging.getLogger(noisy).setLevel(logging.WARNING)


def add_precision_argument(parser: argparse.ArgumentParser) -> None:
    """Add --precision, which every script that runs a model has."""
    parser.add_argument("--precision", choices=["auto", *PRECISIONS], default="auto",
                        help="precision to compute in; auto: bf16 where the device has it; fp16"
                             " (training scales the loss): on a GPU")


def add_training_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the flags that every training script has beyond the original's."""
    add_precision_argument(parser)
    parser.add_argument("--compile", action=argparse.BooleanOptionalAction, default=None,
                        help="compile the models with torch.compile; not given: on a GPU, where"
                             " it can")
    parser.add_argument("--overwrite_output_dir", action="store_true",
                        help="write into an output folder that is not empty")
    add_resume_argument(parser)
    parser.add_argument("--save_steps", type=int, default=0,
                        help="steps between saved states, which --resume goes on from; 0: by time")
    parser.add_argument("--save_minutes", type=float, default=15.0,
                        help="minutes between saved states; 0: by --save_steps alone")


def add_resume_argument(parser: argparse.ArgumentParser) -> None:
    """Add --resume, which every script has whose work takes long."""
    parser.add_argument("--resume", action="store_true",
                        help="go on where an earlier call with the same arguments was stopped")


def add_common_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the flags of `add_training_arguments`, and --seed and --no_cuda."""
    add_training_arguments(parser)
    parser.add_argument("--seed", type=int, default=42, help="seed of every random choice")
    parser.add_argument("--no_cuda", action="store_true", help="compute on the CPU")


# The smallest value of each number that a training script is given.
LEAST = {
    "train_batch_size": 1, "eval_batch_size": 1, "gradient_accumulation_steps": 1, "eval_step": 1,
    "max_seq_length": 3, "max_train_rows": 0, "num_train_epochs": 0, "learning_rate": 0,
    "weight_decay": 0, "warmup_proportion": 0, "temperature": 1e-6, "save_steps": 0,
    "save_minutes": 0,
}


def check_numbers(args: argparse.Namespace) -> None:
    """Raise a `UserError` for a number that makes no sense, before anything is read."""
    for name, least in LEAST.items():
        values = getattr(args, name, least)
        for value in values if isinstance(values, list) else [values]:
            if not least <= value < math.inf:  # nan is not either
                raise UserError(f"--{name} {value}; expected a finite number, at least {least}")
    warmup = getattr(args, "warmup_proportion", 0.0)
    if warmup >= 1:
        raise UserError(f"--warmup_proportion {warmup}; expected a share below 1")


def set_seed(seed: int) -> None:
    """Seed Python, numpy and torch."""
    random.seed(seed)
    np.random.seed(seed % 2**32)
    torch.manual_seed(seed)


# ------------------------------------------------------------------ device and precision


def get_device(no_cuda: bool = False, local_rank: int = -1) -> torch.device:
    """Return the GPU of this process, or the CPU, which is then set up for training steps.

    Under torchrun each process of a machine takes a GPU of its own, and joins the others here.
    """
    use_gpu = not no_cuda and torch.cuda.is_available()
    if use_gpu:
        several = distributed.world_size() > 1
        index = distributed.local_rank() if several else max(local_rank, 0)
        if index >= torch.cuda.device_count():
            what = f"process {index} of this machine" if several else f"--local_rank {local_rank}"
            raise UserError(
                f"{what}: there are {torch.cuda.device_count()} GPUs; expected one each")
        torch.cuda.set_device(index)
    else:
        keep_freed_memory()
    distributed.connect(use_gpu)
    return torch.device("cuda", index) if use_gpu else torch.device("cpu")


def keep_freed_memory() -> None:
    """Have the C library keep freed memory for the next step, where it is glibc.

    It returns large blocks to the system and gets them back page by page, filled with zeros:
    with activations of tens of megabytes that is a quarter of a step on a CPU.
    """
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (OSError, AttributeError, TypeError):
        return
    mallopt(M_MMAP_THRESHOLD, LARGEST_KEPT_BYTES)
    mallopt(M_TRIM_THRESHOLD, KEPT_BYTES)


def cpu_has_bf16() -> bool:
    """Say whether this CPU multiplies bf16 matrices in hardware (avx512_bf16 or AMX)."""
    cpuinfo = Path("/proc/cpuinfo")
    if not cpuinfo.is_file():
        return False
    flags = cpuinfo.read_text(encoding="utf-8", errors="replace")
    return "avx512_bf16" in flags or "amx_bf16" in flags


def resolve_precision(
    name: str, device: torch.device, fp16: bool = False
) -> torch.dtype | None:
    """Return the dtype to compute in, or None for float32.

    Args:
        name: auto, fp32, bf16 or fp16. auto takes bf16 where the device computes in it.
        device: where the model runs.
        fp16: the flag --fp16, the same as fp16; it wins over auto.

    Raises:
        UserError: float16 on a CPU, or --fp16 together with another --precision.
    """
    if fp16 or name == "fp16":
        if device.type != "cuda":
            flag = "--fp16" if fp16 else "--precision fp16"
            raise UserError(f"{flag} needs a GPU; on a CPU use --precision bf16 or fp32")
        if name not in ("auto", "fp16"):
            raise UserError(f"--fp16 and --precision {name} contradict each other")
        return torch.float16
    if name == "auto":
        able = (torch.cuda.is_bf16_supported(including_emulation=False)
                if device.type == "cuda" else cpu_has_bf16())
        name = "bf16" if able else "fp32"
    return PRECISIONS[name]


def missing_for_compile(device: torch.device) -> str | None:
    """Say what torch.compile lacks on this machine, or None; compiles a line to find out."""
    if device.type == "cuda" and not importlib.util.find_spec("triton"):
        return "the package triton is not installed"
    if device.type == "cpu" and not shutil.which(compiler := os.environ.get("CXX") or "g++"):
        return f"there is no C++ compiler ({compiler})"
    try:
        torch.compile(lambda x: x + 1)(torch.ones(8, device=device))
    except Exception as error:  # whatever a compiler, a driver or a cache folder complains of
        return (str(error).strip().splitlines() or [type(error).__name__])[0][:160]
    return None


def compile_models(
    wanted: bool | None, device: torch.device, *modules: torch.nn.Module
) -> bool:
    """Have torch.compile take over the modules, in place; returns whether it did.

    Args:
        wanted: the flag --compile; None means on a GPU, where it can.

    Raises:
        UserError: asked for by the flag, and it cannot be done here.
    """
    if wanted is False or (wanted is None and device.type != "cuda"):
        return False
    missing = missing_for_compile(device)
    if missing and wanted:
        raise UserError(f"--compile: {missing}; leave the flag out to run without")
    if missing:
        logger.info("compile off: %s", missing)
        return False
    torch._dynamo.config.recompile_limit = COMPILED_SHAPES
    for module in modules:
        module.compile(dynamic=False)
    return True


def training_steps(epochs: float, steps_per_epoch: int) -> int:
    """Return the number of optimizer steps of `epochs` passes; a part of a pass is allowed."""
    if epochs <= 0:
        raise UserError(f"--num_train_epochs {epochs}; expected more than 0")
    return max(1, round(epochs * steps_per_epoch))


# ------------------------------------------------------------------ output and logs


ARGUMENTS_NAME = "args.json"  # what a run was begun with, in its output folder
UNFINISHED = ".unfinished"  # the folder, or how it begins, of parts of an unfinished output


def check_output_dir(path: Path | str, overwrite: bool = False, resume: bool = False) -> None:
    """Raise a `UserError` for a file, or a folder that holds files unless `overwrite`.

    With `resume` it may hold those of an earlier run, by its `args.json`, but no others.

    Of several processes the first looks: it may have written something already.
    """
    path = Path(path)
    if not distributed.is_main():
        return
    if path.exists() and not path.is_dir():
        raise UserError(f"{path}: is a file; expected a folder")
    if not path.is_dir() or overwrite:
        return
    if resume and ((path / ARGUMENTS_NAME).is_file() or (path / UNFINISHED).exists()):
        return
    files = [file for file in path.iterdir() if not (resume and file.name.endswith(".tmp"))]
    if files and resume:
        raise UserError(
            f"{path}: --resume finds files, but no {ARGUMENTS_NAME} of a run that was stopped;"
            " choose another folder or pass --overwrite_output_dir"
        )
    if files:
        raise UserError(
            f"{path}: exists and is not empty; choose another folder"
            " or pass --resume or --overwrite_output_dir"
        )


def prepare_output_dir(
    path: Path | str, overwrite: bool = False, resume: bool = False
) -> Path:
    """Make the output folder; one that holds files is an error unless `overwrite` or `resume`.

    What a killed process was writing goes, and unless the run resumes, so do its states.
    """
    path = Path(path)
    if distributed.is_main():
        check_output_dir(path, overwrite, resume)
        path.mkdir(parents=True, exist_ok=True)
        for unfinished in path.rglob(".*.tmp"):
            if unfinished.is_file():
                unfinished.unlink(missing_ok=True)
        if not resume:
            remove_training_states(path)
    return path


# Arguments that may change from one call to the one that resumes it: they do not change results.
FREE_ARGUMENTS = {
    "given", "resume", "overwrite_output_dir", "overwrite", "output_dir", "output_file",
    "save_steps", "save_minutes", "num_workers", "local_rank", "data_url", "cache_dir",
    "reduce_memory",
}


def argument_values(args: argparse.Namespace) -> dict[str, Any]:
    """Return the arguments as JSON would give them back."""
    values = {name: value for name, value in sorted(vars(args).items()) if name != "given"}
    return json.loads(json.dumps(values, default=str))


def resumes(args: argparse.Namespace, *records: Path) -> bool:
    """Say whether a run goes on: as --resume says, or as torchrun has started it again.

    The second only where one of `records`, each an `args.json`, was written by this very call of
    torchrun: what an earlier one has left is not touched without --resume. The processes ask
    together.
    """
    if distributed.agree(args.resume):
        return True
    if not distributed.agree(distributed.is_restart()):
        return False
    own = distributed.is_main() and any(
        path.is_file() and read_json(path).get("launch") == distributed.launch()
        for path in records)
    return distributed.from_main(own)


def check_same_arguments(path: Path | str, args: argparse.Namespace) -> bool:
    """Say whether `args.json`, which an earlier call wrote, is there; it must hold these arguments.

    Raises:
        UserError: arguments that results depend on are others; the message names them all.
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


# ------------------------------------------------------------------ room


def free_disk(folder: Path | str) -> int:
    """Return the bytes that are free where `folder` is or would be made."""
    folder = Path(folder).absolute()
    while not folder.exists():
        folder = folder.parent
    return shutil.disk_usage(folder).free


def free_memory() -> int | None:
    """Return the bytes of memory that this process may still take; None where it is not told."""
    limits = []
    meminfo = Path("/proc/meminfo")
    if meminfo.is_file():
        for line in meminfo.read_text(encoding="utf-8").splitlines():
            if line.startswith("MemAvailable:"):
                limits.append(int(line.split()[1]) * 1024)
    group = Path("/sys/fs/cgroup")
    with suppress(OSError, ValueError, KeyError):  # of a container, if this is one with a limit
        figures = dict(line.split() for line in (group / "memory.stat").read_text().splitlines())
        cached = int(figures["inactive_file"]) + int(figures["active_file"])  # given up on demand
        limits.append(int((group / "memory.max").read_text())
                      - int((group / "memory.current").read_text()) + cached)
    return min(limits) if limits else None


def check_room(what: str, folder: Path | str, disk: int, memory: int = 0) -> None:
    """Say what a stage will need, and raise a `UserError` where there is less.

    Args:
        what: the stage, as a message would call it.
        folder: where it writes.
        disk, memory: bytes.
    """
    if not distributed.is_main():
        return
    disk_left, memory_left = free_disk(folder), free_memory()
    known = "unknown" if memory_left is None else size_text(memory_left)
    logger.info("%s needs about %s of disk (%s free) and %s of memory (%s free)", what,
                size_text(disk), size_text(disk_left), size_text(memory), known)
    if disk > disk_left:
        raise UserError(
            f"{folder}: {size_text(disk_left)} free; {what} needs about {size_text(disk)}")
    if memory_left is not None and memory > memory_left:
        raise UserError(
            f"{size_text(memory_left)} of memory free; {what} needs about {size_text(memory)}")


def size_text(size: float) -> str:
    """Return a number of bytes as a person would say it, such as `1.3 GB`."""
    for unit in ("bytes", "kB", "MB"):
        if size < 1000:
            return f"{size:.0f} {unit}"
        size /= 1000
    return f"{size:.1f} GB"


def one_each(flag: str, values: float | list[float], students: int) -> list[float]:
    """Return one value of a flag for each student; a single one serves all."""
    values = values if isinstance(values, list) else [values]
    if len(values) not in (1, students):
        raise UserError(
            f"--{flag}: {len(values)} values for {students} students; expected one each, or one"
            " for all"
        )
    return values if len(values) == students else values * students


def check_output_dirs(
    paths: list[str], students: int, overwrite: bool = False, resume: bool = False
) -> None:
    """Raise a `UserError` unless there is an output folder of its own for each student."""
    if len(paths) != students:
        raise UserError(
            f"--output_dir: {len(paths)} folders for {students} students of --student_model;"
            " expected one each"
        )
    if len({Path(path).resolve() for path in paths}) < len(paths):
        raise UserError(f"--output_dir {' '.join(paths)}: expected a folder of its own for each")
    for path in paths:
        check_output_dir(path, overwrite, resume)


class RunningMean:
    """Means of named scalars; they stay on their device until they are read.

    Under torchrun a scalar is the sum of what the processes add.
    """

    def __init__(self) -> None:
        self.totals: dict[str, torch.Tensor] = {}
        self.count = 0

    def add(self, values: dict[str, torch.Tensor]) -> None:
        """Count one more observation of each scalar."""
        for name, value in values.items():
            value = value.detach().float()
            self.totals[name] = self.totals[name] + value if name in self.totals else value
        self.count += 1

    def _totals(self) -> dict[str, float]:
        names = list(self.totals)
        totals = torch.stack([self.totals[name] for name in names]) if names else torch.empty(0)
        totals = distributed.sum_over_ranks(totals.double().cpu()).tolist()
        return dict(zip(names, totals, strict=True))

    def read(self) -> dict[str, float]:
        """Return the means since the last reading and start again."""
        means = {name: total / self.count for name, total in self._totals().items()}
        self.totals, self.count = {}, 0
        return means

    def state(self) -> dict[str, Any]:
        """Return what `load_state` takes; the processes ask for it together."""
        return {"totals": self._totals(), "count": self.count}

    def load_state(self, state: dict[str, Any], device: torch.device) -> None:
        """Go on from what `state` returned; the first process counts for all so far."""
        share = 1.0 if distributed.is_main() else 0.0
        self.totals = {name: torch.tensor(total * share, dtype=torch.float32, device=device)
                       for name, total in state["totals"].items()}
        self.count = state["count"]


def in_words(values: Mapping[str, Any]) -> str:
    """Return values for a reader: floats with four digits that matter, nested ones in brackets."""
    def word(value: Any) -> Any:
        if isinstance(value, Mapping):
            return f"({in_words(value)})"
        return f"{value:.4g}" if isinstance(value, float) else value

    return "  ".join(f"{name} {word(value)}" for name, value in values.items())


class Pace:
    """How fast a run is between two readings."""

    def __init__(self) -> None:
        self.restart()

    def restart(self) -> None:
        """Count from now on."""
        self.rows, self.waited, self.began = 0, 0.0, time.perf_counter()

    def add(self, rows: int, waited: float) -> None:
        """Count the rows of a step, and the seconds that it waited for them."""
        self.rows += rows
        self.waited += waited

    def read(self) -> dict[str, float]:
        """Return rows per second and the share of time spent waiting; start again."""
        seconds = max(time.perf_counter() - self.began, 1e-9)
        figures = {"rows_per_second": round(self.rows / seconds, 1),
                   "waiting": round(self.waited / seconds, 4)}
        self.restart()
        return figures


class JsonLog:
    """A log file with one JSON object a line, written by a run's first process."""

    def __init__(self, path: Path | str, keep: bool = False) -> None:
        self.path = Path(path)
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

    def sync(self) -> None:
        """Have the disk hold what was written."""
        if distributed.is_main():
            with self.path.open("ab") as file:
                os.fsync(file.fileno())

    def write(self, record: dict[str, Any]) -> None:
        """Add a line."""
        if distributed.is_main():
            with self.path.open("a", encoding="utf-8") as file:
                file.write(json.dumps(record) + "\n")


def commit_id() -> str:
    """Return the git commit of this code, with `+` when files differ; "unknown" outside git."""
    root = Path(__file__).parent
    command = ["git", "-C", str(root), "describe", "--always", "--dirty=+", "--abbrev=10"]
    try:
        result = subprocess.run(command, capture_output=True, text=True, timeout=10, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return "unknown"
    return result.stdout.strip() or "unknown"


def parameter_count(model: torch.nn.Module) -> str:
    """Return the number of parameters in millions, such as `14.5M`; a quantised model's, too."""
    total = getattr(model, "parameter_total", None)
    total = sum(p.numel() for p in model.parameters()) if total is None else total
    return f"{total / 1e6:.1f}M"


def log_start(
    args: argparse.Namespace, device: torch.device, dtype: torch.dtype | None, **facts: Any
) -> dict[str, Any]:
    """Print how this run starts (commit, device, precision, facts, arguments) and return it."""
    arguments = argument_values(args)
    start = {
        "commit": commit_id(),
        "torch": torch.__version__,
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu",
        "threads": torch.get_num_threads(),
        "processes": distributed.world_size(),
        "precision": "fp32" if dtype is None else str(dtype).removeprefix("torch."),
        **facts,
        "arguments": arguments,
    }
    logger.info("%s", "  ".join(f"{k} {v}" for k, v in start.items() if k != "arguments"))
    logger.info("%s", "  ".join(f"{k}={v}" for k, v in arguments.items()))
    return start


def save_arguments(output_dir: Path, start: dict[str, Any]) -> None:
    """Write what `log_start` returned to `args.json`."""
    if distributed.is_main():
        write_json(output_dir / ARGUMENTS_NAME, {**start, "launch": distributed.launch()})

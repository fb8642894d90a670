"""What every script needs around its work: errors, seeds, device, precision, output folders."""

import argparse
import copy
import ctypes
import importlib.util
import json
import logging
import os
import random
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from transformer.file_utils import UserError, upload_folder, write_json

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


def run_script(
    main: Callable[[argparse.Namespace], None],
    parser: argparse.ArgumentParser,
    argv: Sequence[str] | None = None,
) -> None:
    """Parse the command line, set up logging and run `main(args)`.

    `args.given` holds the names of the flags that were given. A user's mistake becomes one
    line on stderr and exit code 2; Ctrl-C leaves with 130.
    """
    args = parser.parse_args(argv)
    args.given = given_flags(parser, argv)
    setup_logging()
    try:
        main(args)
    except KeyboardInterrupt:
        sys.exit(130)
    except (UserError, FileNotFoundError, IsADirectoryError, NotADirectoryError,
            PermissionError) as error:
        print(f"{parser.prog}: error: {error}", file=sys.stderr)
        sys.exit(2)


def setup_logging() -> None:
    """Log to stderr, one short line a message."""
    logging.basicConfig(
        level=logging.INFO, format="%(asctime)s %(levelname).1s %(message)s", datefmt="%H:%M:%S"
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


def add_common_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the flags of `add_training_arguments`, and --seed and --no_cuda."""
    add_training_arguments(parser)
    parser.add_argument("--seed", type=int, default=42, help="seed of every random choice")
    parser.add_argument("--no_cuda", action="store_true", help="compute on the CPU")


# The smallest value of each number that a training script is given.
LEAST = {
    "train_batch_size": 1, "eval_batch_size": 1, "gradient_accumulation_steps": 1, "eval_step": 1,
    "max_seq_length": 3, "max_train_rows": 0, "num_train_epochs": 0, "learning_rate": 0,
    "weight_decay": 0, "warmup_proportion": 0, "temperature": 1e-6,
}


def check_numbers(args: argparse.Namespace) -> None:
    """Raise a `UserError` for a number that makes no sense, before anything is read."""
    for name, least in LEAST.items():
        values = getattr(args, name, least)
        for value in values if isinstance(values, list) else [values]:
            if not value >= least:  # also nan
                raise UserError(f"--{name} {value}; expected at least {least}")
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

    Raises:
        UserError: started as one of several processes; the training scripts run as one.
    """
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise UserError(
            f"started as one of {os.environ['WORLD_SIZE']} processes; expected a single process"
        )
    if no_cuda or not torch.cuda.is_available():
        keep_freed_memory()
        return torch.device("cpu")
    index = max(local_rank, 0)
    if index >= torch.cuda.device_count():
        raise UserError(f"--local_rank {local_rank}: there are {torch.cuda.device_count()} GPUs")
    torch.cuda.set_device(index)
    return torch.device("cuda", index)


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


def check_output_dir(path: Path | str, overwrite: bool = False) -> None:
    """Raise a `UserError` for a file, or a folder that holds files unless `overwrite`."""
    path = Path(path)
    if path.exists() and not path.is_dir():
        raise UserError(f"{path}: is a file; expected a folder")
    if path.is_dir() and any(path.iterdir()) and not overwrite:
        raise UserError(
            f"{path}: exists and is not empty; choose another folder"
            " or pass --overwrite_output_dir"
        )


def prepare_output_dir(path: Path | str, overwrite: bool = False) -> Path:
    """Make the output folder; one that holds files already is an error unless `overwrite`."""
    check_output_dir(path, overwrite)
    path = Path(path)
    path.mkdir(parents=True, exist_ok=True)
    return path


def one_each(flag: str, values: float | list[float], students: int) -> list[float]:
    """Return one value of a flag for each student; a single one serves all."""
    values = values if isinstance(values, list) else [values]
    if len(values) not in (1, students):
        raise UserError(
            f"--{flag}: {len(values)} values for {students} students; expected one each, or one"
            " for all"
        )
    return values if len(values) == students else values * students


def check_output_dirs(paths: list[str], students: int, overwrite: bool = False) -> None:
    """Raise a `UserError` unless there is an output folder of its own for each student."""
    if len(paths) != students:
        raise UserError(
            f"--output_dir: {len(paths)} folders for {students} students of --student_model;"
            " expected one each"
        )
    if len({Path(path).resolve() for path in paths}) < len(paths):
        raise UserError(f"--output_dir {' '.join(paths)}: expected a folder of its own for each")
    for path in paths:
        check_output_dir(path, overwrite)


def upload_outputs(address: tuple[str, str] | None, folders: list[Path]) -> None:
    """Copy output folders to an S3 address if there is one, several below their own paths."""
    if address is None:
        return
    bucket, prefix = address
    for folder in folders:
        below = prefix if len(folders) == 1 else f"{prefix}/{folder.as_posix().lstrip('/')}"
        upload_folder(folder, bucket, below)


class RunningMean:
    """Means of named scalars; they stay on their device until they are read."""

    def __init__(self) -> None:
        self.totals: dict[str, torch.Tensor] = {}
        self.count = 0

    def add(self, values: dict[str, torch.Tensor]) -> None:
        """Count one more observation of each scalar."""
        for name, value in values.items():
            value = value.detach().float()
            self.totals[name] = self.totals[name] + value if name in self.totals else value
        self.count += 1

    def read(self) -> dict[str, float]:
        """Return the means since the last reading and start again."""
        means = {name: float(total) / self.count for name, total in self.totals.items()}
        self.totals, self.count = {}, 0
        return means


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
    """A log file with one JSON object a line, flushed line by line."""

    def __init__(self, path: Path | str) -> None:
        self.path = Path(path)
        self.path.write_text("", encoding="utf-8")

    def write(self, record: dict[str, Any]) -> None:
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
    """Return the number of parameters in millions, such as `14.5M`."""
    return f"{sum(p.numel() for p in model.parameters()) / 1e6:.1f}M"


def log_start(
    args: argparse.Namespace, device: torch.device, dtype: torch.dtype | None, **facts: Any
) -> dict[str, Any]:
    """Print how this run starts (commit, device, precision, facts, arguments) and return it."""
    arguments = {k: str(v) if isinstance(v, Path) else v for k, v in sorted(vars(args).items())
                 if k != "given"}
    start = {
        "commit": commit_id(),
        "torch": torch.__version__,
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu",
        "threads": torch.get_num_threads(),
        "precision": "fp32" if dtype is None else str(dtype).removeprefix("torch."),
        **facts,
        "arguments": arguments,
    }
    logger.info("%s", "  ".join(f"{k} {v}" for k, v in start.items() if k != "arguments"))
    logger.info("%s", "  ".join(f"{k}={v}" for k, v in arguments.items()))
    return start


def save_arguments(output_dir: Path, start: dict[str, Any]) -> None:
    """Write what `log_start` returned to `args.json`."""
    write_json(output_dir / "args.json", start)

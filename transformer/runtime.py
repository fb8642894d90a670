"""The frame of a script: command line, errors, seed, device, precision, the record of its start.

torch takes seconds to import; scripts that compute nothing use this module without it.
"""

import argparse
import copy
import ctypes
import errno
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
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tqdm.contrib.logging import logging_redirect_tqdm

from transformer import distributed
from transformer.file_utils import UserError

if TYPE_CHECKING:
    import torch

logger = logging.getLogger(__name__)

COMPILED_SHAPES = 64  # 8 padded lengths, each with the few numbers of rows that occur

# glibc's parameters of mallopt: how much freed memory it keeps, and from which size on it maps.
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

    `args.given` holds the names of the flags that were given. A user's mistake, a full disk, too
    little memory and a lost process of the same run become one line on stderr and exit code 2;
    Ctrl-C and SIGTERM exit with 130 and 143 and, for a script with --resume, print the command
    that continues. In a terminal log lines appear above a progress bar, not in it.
    """
    if sys.stderr is None:  # closed: a progress bar would fail
        sys.stderr = os.fdopen(os.open(os.devnull, os.O_WRONLY), "w")
    try:
        Path.home()
    except RuntimeError:  # no HOME and no account: what Docker sets then, for all libraries
        os.environ["HOME"] = "/"
    args = parser.parse_args(argv)
    args.given = given_flags(parser, argv)
    setup_logging()
    if threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGTERM, _raise_stopped)
    try:
        check_numbers(args)
        with logging_redirect_tqdm() if sys.stderr.isatty() else nullcontext():
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
    except Exception as error:
        message = explain(error, args)
        if message is None:
            raise
        _complain(parser.prog, f"error: {message}")
        sys.exit(2)


def explain(error: Exception, args: argparse.Namespace) -> str | None:
    """Return one line on a user's mistake or on what the machine lacks; None for a bug."""
    reason = first_line(error)
    if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
        return f"the disk is full ({reason}); what was finished is kept{how_to_continue(args)}"
    if isinstance(error, UserError):
        return str(error)
    if isinstance(error, FileExistsError) and error.filename is not None:  # where a folder is made
        return f"{error.filename}: is a file; expected a folder"
    if isinstance(error, OSError):
        return (str(error) or reason).splitlines()[0]
    # Libraries in C++ raise the second about a path that is no UTF-8.
    if isinstance(error, (UnicodeEncodeError, TypeError)) \
            and sys.getfilesystemencoding() != "utf-8":
        return f"a name or text outside this locale's ASCII; PYTHONUTF8=1 allows it ({reason})"
    if (isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError"
            or "can't allocate memory" in reason):
        return ("out of memory; a smaller --train_batch_size or --eval_batch_size, or more"
                f" --gradient_accumulation_steps, needs less ({reason})")
    if isinstance(error, ModuleNotFoundError) and not error.name.startswith("transformer."):
        package = error.name.partition(".")[0]
        return f"there is no package {package}; expected it, by pip install {package}"
    if isinstance(error, RuntimeError) and distributed.is_lost_peer(error):
        return ("another process of this run has ended, so this one ends too; the first message of"
                f" the others says why ({reason}){how_to_continue(args)}")
    return None


def first_line(error: BaseException) -> str:
    """Return the first line of an error's message, or its class where there is none."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:160]


def _complain(program: str, message: str) -> None:
    """Print one line on stderr; of several processes each but the first says which it is."""
    process = "" if distributed.is_main() else f" (process {distributed.rank()})"
    print(f"{program}{process}: {message}", file=sys.stderr, flush=True)


def how_to_continue(args: argparse.Namespace) -> str:
    """Return the end of a sentence with the command that continues, or "" without --resume."""
    if not hasattr(args, "resume") or getattr(args, "do_eval", False):
        return ""
    words = [word for word in sys.argv if not word.startswith(("--resume", "--overwrite"))]
    launcher = "torchrun ..." if distributed.world_size() > 1 else "python"
    return f"; this continues: {launcher} {shlex.join([*words, '--resume'])}"


def setup_logging() -> None:
    """Log to stderr, one short line a message; of several processes only the first one's."""
    logging.basicConfig(
        level=logging.INFO if distributed.is_main() else logging.ERROR,
        format="%(asctime)s %(levelname).1s %(message)s", datefmt="%H:%M:%S",
    )
    for noisy in ("urllib3", "botocore", "boto3", "matplotlib", "httpx", "httpx2"):
        logging.getLogger(noisy).setLevel(logging.WARNING)


def add_precision_argument(parser: argparse.ArgumentParser) -> None:
    """Add --precision, which every script that runs a model has."""
    parser.add_argument("--precision", choices=["auto", "fp32", "bf16", "fp16"], default="auto",
                        help="precision to compute in; auto: bf16 where the device has it; fp16"
                             " (training scales the loss): on a GPU")


def add_training_arguments(
    parser: argparse.ArgumentParser, eval_batch_size: int = 32, weight_decay: float = 1e-4
) -> None:
    """Add the flags that every training script has; their defaults are the arguments."""
    add_precision_argument(parser)
    add = parser.add_argument
    add("--compile", action=argparse.BooleanOptionalAction, default=None,
        help="compile the models with torch.compile; not given: on a GPU, where it can")
    add("--do_lower_case", action="store_true",
        help="lower-case the text; without it the model's own setting holds")
    add("--eval_batch_size", type=int, default=eval_batch_size, help="rows a batch in evaluation")
    add("--weight_decay", "--wd", type=float, default=weight_decay,
        help="decoupled weight decay, per unit of learning rate")
    add("--warmup_proportion", type=float, default=0.1,
        help="share of the steps over which the learning rate rises")
    add("--overwrite_output_dir", action="store_true",
        help="write into an output folder that is not empty")
    add("--tensorboard", action="store_true",
        help="write what log.jsonl holds for TensorBoard, too, below the output folder; needs"
             " pip install tensorboard")
    add_resume_argument(parser)
    add("--save_steps", type=int, default=0,
        help="steps between saved states, which --resume continues from; 0: by --save_minutes")
    add("--save_minutes", type=float, default=15.0,
        help="minutes between saved states; 0: by --save_steps alone")
    add("--seed", type=int, default=42, help="seed of every random choice")
    add("--no_cuda", action="store_true", help="compute on the CPU")


def add_distillation_arguments(parser: argparse.ArgumentParser, eval_batch_size: int) -> None:
    """Add the flags that both distillations have."""
    add_training_arguments(parser, eval_batch_size)
    add = parser.add_argument
    add("--gradient_accumulation_steps", type=int, default=1,
        help="micro-batches a step (of the smallest batch size); the step's result does not depend"
             " on it")
    add("--data_url", type=str, default="",
        help="s3://bucket/prefix to copy checkpoints, logs and results to, as they come")
    add("--match_original", action="store_true",
        help="the original's losses: padding counts, batches padded to max_seq_length; in the"
             " prediction stage soft cross-entropy divided by the number of labels, ReLU before the"
             " classifier")
    add("--layer_map", type=int, nargs="+", action="append", default=None, metavar="LAYER",
        help="layers of the teacher, from 1, that the student's learn from, one for each of them,"
             " such as 3 6 9 12; once for all students, or once for each; not given: evenly spread")
    add("--no_attention_loss", action="store_true",
        help="learn hidden states alone, as from a teacher with another number of attention heads")


def add_eval_split_argument(parser: argparse.ArgumentParser) -> None:
    """Add --eval_split, which the scripts that measure a finished model have."""
    parser.add_argument("--eval_split", nargs="+", default=None, metavar="SPLIT",
                        help="with --do_eval: what to measure on, such as dev, or test where the"
                             " task has a labelled one; not given: the task's dev sets")


def add_resume_argument(parser: argparse.ArgumentParser) -> None:
    """Add --resume, which every script with long work has."""
    parser.add_argument("--resume", action="store_true",
                        help="continue an earlier call with the same arguments that was stopped")


# The smallest value that the scripts accept for each of their numbers.
SMALLEST_VALUES = {
    "train_batch_size": 1, "eval_batch_size": 1, "gradient_accumulation_steps": 1, "eval_step": 1,
    "max_seq_length": 3, "max_train_rows": 0, "num_train_epochs": 0, "learning_rate": 0,
    "weight_decay": 0, "warmup_proportion": 0, "temperature": 1e-6, "save_steps": 0,
    "save_minutes": 0, "batch_size": 1, "calibration_rows": 1, "num_workers": 1, "num_layers": 1,
    "steps": 1, "epochs_to_generate": 1, "max_predictions_per_seq": 0, "M": 1, "N": 0,
    "max_varied_rows": 0, "batch_tokens": 0, "lam_pred": 0, "lam_rep": 0, "mu": 0, "num_tokens": 1,
    "gpu": 0, "batches": 1, "threads": 1, "repeats": 1, "rows": 1,
    "attempts": 1, "retry_delay": 0, "timeout": 0.001, "seed": -(2**63), "hard_label_weight": 0,
    "soft_label_weight": 0, "attention_loss_weight": 0, "hidden_loss_weight": 0,
    "teacher_weights": 0,
}
# What no machine can do, or no clock.
LARGEST_VALUES = {"num_workers": 256, "retry_delay": 1e6, "timeout": 1e6, "seed": 2**63 - 1}


def check_numbers(args: argparse.Namespace, *positive: str) -> None:
    """Raise a `UserError` for a number out of range or a missing package, before anything is read.

    Args:
        args: a script's command line; None stands for a number that was not given.
        positive: names of numbers that may not be 0 either.
    """
    for name, smallest in SMALLEST_VALUES.items():
        for value in as_list(getattr(args, name, smallest)):
            if value is not None and not smallest <= value < math.inf:  # nan is not either
                raise UserError(
                    f"--{name} {value}; expected a finite number, at least {smallest}")
            if value is not None and value > (largest := LARGEST_VALUES.get(name, math.inf)):
                raise UserError(f"--{name} {value}; expected at most {largest:g}")
            if name in positive and value == 0:
                raise UserError(f"--{name} {value}; expected more than 0")
    warmup = getattr(args, "warmup_proportion", 0.0)
    if warmup >= 1:
        raise UserError(f"--warmup_proportion {warmup}; expected a share below 1")
    if getattr(args, "tensorboard", False) and find_spec("tensorboard") is None:
        raise UserError("--tensorboard: there is no package tensorboard; expected it, by"
                        " pip install tensorboard")


def as_list(values: Any) -> list[Any]:
    """Return several values of a flag as they are, a single one as a list of it."""
    return values if isinstance(values, list) else [values]


def per_student(flag: str, values: float | list[float], students: int) -> list[float]:
    """Return one value of a flag for each student; a single one serves all."""
    values = as_list(values)
    if len(values) not in (1, students):
        raise UserError(
            f"--{flag}: {len(values)} values for {students} students; expected one each, or one"
            " for all"
        )
    return values if len(values) == students else values * students


def set_seed(seed: int) -> None:
    """Seed Python, numpy and torch."""
    import numpy as np
    import torch

    random.seed(seed)
    np.random.seed(seed % 2**32)
    torch.manual_seed(seed)


# ------------------------------------------------------------------ device and precision


def get_device(no_cuda: bool = False, local_rank: int = -1) -> "torch.device":
    """Return the GPU of this process, or the CPU, which is then set up for training steps.

    Under torchrun each process of a machine takes a GPU of its own, and joins the others here.
    """
    import torch

    use_gpu = not no_cuda and torch.cuda.is_available()
    if use_gpu:
        several = distributed.world_size() > 1
        index = distributed.local_rank() if several else max(local_rank, 0)
        if index >= torch.cuda.device_count():
            raise UserError(f"GPU {index} of this machine: there are {torch.cuda.device_count()},"
                            " numbered from 0; each process needs one of its own")
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
    name: str, device: "torch.device", fp16: bool = False
) -> "torch.dtype | None":
    """Return the dtype to compute in, or None for float32.

    Args:
        name: auto, fp32, bf16 or fp16. auto takes bf16 where the device computes in it.
        device: where the model runs.
        fp16: the flag --fp16, the same as fp16; it wins over auto.

    Raises:
        UserError: float16 on a CPU, or --fp16 together with another --precision.
    """
    import torch

    if fp16 or name == "fp16":
        if device.type != "cuda":
            raise UserError("float16 needs a GPU; on a CPU use --precision bf16 or fp32")
        if name not in ("auto", "fp16"):
            raise UserError(f"--fp16 and --precision {name} contradict each other")
        return torch.float16
    if name == "auto":
        able = (torch.cuda.is_bf16_supported(including_emulation=False)
                if device.type == "cuda" else cpu_has_bf16())
        name = "bf16" if able else "fp32"
    return torch.bfloat16 if name == "bf16" else None


def compile_models(
    wanted: bool | None, device: "torch.device", *modules: "torch.nn.Module"
) -> bool:
    """Have torch.compile take over the modules, in place; returns whether it did.

    Args:
        wanted: the flag --compile; None means on a GPU, where it can.

    Raises:
        UserError: asked for by the flag, and it cannot be done here.
    """
    import torch

    if wanted is False or (wanted is None and device.type != "cuda"):
        return False
    try:
        torch.compile(lambda x: x + 1)(torch.ones(8, device=device))
    except Exception as error:  # whatever a compiler, a driver or a cache folder complains of
        if wanted:
            raise UserError(
                f"--compile: {first_line(error)}; leave the flag out to run without") from error
        logger.info("compile off: %s", first_line(error))
        return False
    torch._dynamo.config.recompile_limit = COMPILED_SHAPES
    for module in modules:
        module.compile(dynamic=False)
    return True


def training_steps(epochs: float, steps_per_epoch: int) -> int:
    """Return the number of optimizer steps of `epochs` passes, at least 1; parts count."""
    return max(1, round(epochs * steps_per_epoch))


# ------------------------------------------------------------------ disk


def check_disk(stage: str, folder: Path | str, needed: float) -> None:
    """Log the bytes of disk that a stage needs; raise a `UserError` where fewer are free.

    Args:
        stage: what a message calls it.
        folder: where it writes; need not exist yet.
        needed: bytes.
    """
    if not distributed.is_main():
        return
    existing = Path(folder).absolute()
    while not existing.exists():
        existing = existing.parent
    free = shutil.disk_usage(existing).free
    message = f"{stage} needs about {needed / 1e9:.3g} GB of disk ({free / 1e9:.3g} GB free)"
    logger.info("%s", message)
    if needed > free:
        raise UserError(f"{folder}: {message}")


# ------------------------------------------------------------------ the record of a start


def argument_values(args: argparse.Namespace) -> dict[str, Any]:
    """Return the arguments as JSON would give them back."""
    values = {name: value for name, value in sorted(vars(args).items()) if name != "given"}
    return json.loads(json.dumps(values, default=str))


def format_values(values: Mapping[str, Any]) -> str:
    """Return values for a log line: floats with four significant digits, nested in brackets."""
    def text(value: Any) -> Any:
        if isinstance(value, Mapping):
            return f"({format_values(value)})"
        return f"{value:.4g}" if isinstance(value, float) else value

    return "  ".join(f"{name} {text(value)}" for name, value in values.items())


def commit_id() -> str:
    """Return the git commit of this code, with `+` when files differ; "unknown" outside git."""
    root = Path(__file__).parent
    command = ["git", "-C", str(root), "describe", "--always", "--dirty=+", "--abbrev=10"]
    try:
        result = subprocess.run(command, capture_output=True, text=True, timeout=10, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return "unknown"
    return result.stdout.strip() or "unknown"


def parameter_count(model: "torch.nn.Module") -> str:
    """Return the number of parameters in millions, such as `14.5M`; a quantised model's, too."""
    total = getattr(model, "parameter_total", None)
    total = sum(p.numel() for p in model.parameters()) if total is None else total
    return f"{total / 1e6:.1f}M"


def log_start(
    args: argparse.Namespace, device: "torch.device", dtype: "torch.dtype | None",
    **metadata: Any
) -> dict[str, Any]:
    """Log how this run starts (commit, device, precision, metadata, arguments) and return it."""
    import torch

    arguments = argument_values(args)
    start = {
        "commit": commit_id(),
        "torch": torch.__version__,
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu",
        "threads": torch.get_num_threads(),
        "processes": distributed.world_size(),
        "precision": "fp32" if dtype is None else str(dtype).removeprefix("torch."),
        **metadata,
        "arguments": arguments,
    }
    logger.info("%s", "  ".join(f"{k} {v}" for k, v in start.items() if k != "arguments"))
    logger.info("%s", "  ".join(f"{k}={v}" for k, v in arguments.items()))
    return start

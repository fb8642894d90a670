"""What the benchmarks share: where they run, a stopwatch, peak memory and numbers as text."""

import os
import platform
import re
import resource
import sys
import time
from collections.abc import Callable
from datetime import datetime, timezone
from pathlib import Path

import torch

from transformer.runtime import commit_id

ROOT = Path(__file__).resolve().parent.parent


def machine(device: torch.device) -> dict[str, str]:
    """Describe hardware, versions, commit and time of a measurement."""
    cpu = platform.processor() or platform.machine()
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.is_file():
        facts = dict(re.findall(r"^(.*?)\s*: (.*)$", cpuinfo.read_text(), re.MULTILINE))
        # A virtual machine's "AMD EPYC" may be of any generation: these two tell which.
        generation = [f"{name} {facts[name]}" for name in ("cpu family", "model") if name in facts]
        cpu = ", ".join([facts.get("model name", cpu), *generation])
    gpu = torch.cuda.get_device_name(device) if device.type == "cuda" else None
    return {
        "device": gpu or f"CPU, {torch.get_num_threads()} threads",
        "CPU": f"{cpu}, {os.cpu_count()} cores", "torch": torch.__version__,
        "Python": platform.python_version(), "commit": commit_id(),
        "date": datetime.now(timezone.utc).strftime("%Y-%m-%d %H:%M UTC"),
    }


def seconds_of(work: Callable[[], object], device: torch.device) -> float:
    """Return the seconds that `work` takes, the device's queued operations included."""
    def now() -> float:
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        return time.perf_counter()

    began = now()
    work()
    return now() - began


def peak_memory(device: torch.device) -> int:
    """Return the most bytes that this process has held: on its GPU if it has used one."""
    if device.type == "cuda" and (held := torch.cuda.max_memory_allocated(device)):
        return held
    status = Path("/proc/self/status")
    if status.is_file():
        # Linux starts ru_maxrss at the size of the process that started this one.
        return 1024 * int(re.search(r"VmHWM:\s*(\d+)", status.read_text())[1])
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def matrix_peak(device: torch.device, dtype: torch.dtype, size: int, repeats: int = 10) -> float:
    """Return the operations a second of the best of several square matrix products."""
    first, second = (torch.randn(size, size, device=device).to(dtype) for _ in range(2))
    with torch.inference_mode():
        best = min(seconds_of(lambda: first @ second, device) for _ in range(repeats))
    return 2 * size**3 / best


def three_digits(value: float) -> str:
    """Format a number with three significant digits."""
    return f"{value:,.0f}" if value >= 100 else f"{value:#.3g}"

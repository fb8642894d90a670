"""What the benchmarks share: where they run, a stopwatch, peak memory and numbers as text."""

import os
import platform
import re
import resource
import sys
import time
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


class Stopwatch:
    """Seconds inside a `with` block, the device's queued work included."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.seconds = 0.0

    def _now(self) -> float:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        return time.perf_counter()

    def __enter__(self) -> "Stopwatch":
        self._began = self._now()
        return self

    def __exit__(self, *error: object) -> None:
        self.seconds += self._now() - self._began


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
    best = float("inf")
    for _ in range(repeats):
        watch = Stopwatch(device)
        with watch, torch.inference_mode():
            first @ second
        best = min(best, watch.seconds)
    return 2 * size**3 / best


def three_digits(value: float) -> str:
    """Format a number with three significant digits."""
    return f"{value:,.0f}" if value >= 100 else f"{value:#.3g}"

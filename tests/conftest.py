"""What every test runs with: this repository's modules, one thread, no network, shared data."""

import os
import signal
import sys
from collections.abc import Iterator
from pathlib import Path

REPO = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(REPO))

# Before torch and the hub's client are imported.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("MPLBACKEND", "Agg")

# A shell that starts the tests in the background has them ignore Ctrl-C, and what they start, too.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)

import pytest  # noqa: E402
from server import FileServer  # noqa: E402

SHARED = Path(os.environ.get("TINYBERT_SHARED", REPO.parent / "shared"))


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Start with the files that hold a slow test, so that no process waits for it at the end."""
    slow_files = {item.path for item in items if item.get_closest_marker("slow")}
    items.sort(key=lambda item: item.path not in slow_files)


@pytest.fixture(scope="session", autouse=True)
def own_cache(tmp_path_factory: pytest.TempPathFactory) -> None:
    """Keep what the scripts cache apart from the user's."""
    os.environ["TINYBERT_CACHE"] = str(tmp_path_factory.mktemp("cache"))


@pytest.fixture(scope="session")
def shared() -> Path:
    """The project's shared folder (real GLUE data, golden files, specification)."""
    if not SHARED.is_dir():
        pytest.skip(f"needs the project's shared data, not at {SHARED}; set TINYBERT_SHARED")
    return SHARED


@pytest.fixture
def server() -> Iterator[FileServer]:
    """An HTTP server of this test alone, which misbehaves where it is told to."""
    with FileServer() as running:
        yield running
        running.shutdown()

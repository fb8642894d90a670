"""A disk that fills up, and models that were damaged: a clear line, and nothing good is lost."""

import errno
import os
import random
import re
import shutil
import subprocess
from pathlib import Path

import kill
import pytest
import torch
from helpers import error_line, make_model
from test_resume_training import DROPOUT, Case, damaged, states, task

import finetune_teacher
from transformer import checkpoint
from transformer.checkpoint import load_state, load_training_state, read_state
from transformer.file_utils import UserError

# ------------------------------------------------------------------ the disk is full


@pytest.fixture(scope="module")
def case(tmp_path_factory) -> Case:
    """Task distillation: the folder `whole`, and `stopped` with two states, killed."""
    case = task(tmp_path_factory.mktemp("disk"), DROPOUT, more=("--pred_distill",), rows=160)
    case.run("whole")
    process = kill.Process(case.command("stopped"))
    assert process.wait_until(lambda log: log.count("state saved") > 6), process.output()
    process.kill()
    return case


def blocks(path: Path) -> int:
    """Return the bytes that a file takes of a tmpfs."""
    return -(-path.stat().st_size // 4096) * 4096


@pytest.fixture
def small_disk(case):
    """A filesystem that holds the student, its files and two states, but no third; resizable."""
    folder = case.root / "small"
    folder.mkdir()
    [stopped] = case.folders("stopped")
    files = sum(blocks(path) for path in stopped.iterdir() if path.is_file())
    size = files + blocks(stopped / "pytorch_model.bin") + blocks(states(case)[-1]) * 5 // 2

    def mount(*options: str) -> subprocess.CompletedProcess:
        return subprocess.run(["mount", "-t", "tmpfs", *options, "tmpfs", str(folder)],
                              capture_output=True, text=True, check=False)

    result = mount("-o", f"size={size}")
    if result.returncode:
        pytest.skip(f"cannot mount here ({result.stderr.strip()}); the quota below stands for it")
    yield folder, lambda: mount("-o", "remount,size=16m")
    subprocess.run(["umount", str(folder)], check=True)


@pytest.mark.skipif(os.name != "posix" or shutil.which("mount") is None, reason="needs mount")
def test_a_filesystem_that_fills_up_keeps_the_last_state_and_room_lets_the_run_end(
        case, small_disk):
    folder, make_room = small_disk
    process = kill.Process(case.command("small/out"))
    assert process.end() == 2, process.output()
    lines = process.output().strip().splitlines()
    assert lines[-1].startswith("task_distill.py: error: the disk is full (")
    assert lines[-1].endswith("--resume")
    assert "Traceback" not in process.output()
    saved = process.output().count("state saved")
    assert saved >= 2
    assert read_state(states(case, "small/out")[-1])["step"] == 3 * saved
    # With the disk still full, the same line again.
    again = kill.Process(case.command("small/out", "--resume"))
    assert again.end() == 2
    assert "the disk is full" in again.output()
    assert load_training_state(folder / "out")["step"] == 3 * saved
    assert make_room().returncode == 0
    process = kill.Process(case.command("small/out", "--resume"))
    assert process.end() == 0, process.output()
    case.expect_same("small/out")


@pytest.mark.parametrize("writes", [0, 1, 2, 6, 25])
def test_a_quota_met_in_any_write_of_tensors_costs_nothing(case, capsys, monkeypatch, writes):
    """Whichever state or model it is: it is written half, then the disk is full."""
    written = 0

    def write_tensors(value, path: Path, write=checkpoint.write_tensors) -> None:
        nonlocal written
        write(value, path)
        if written == writes:
            os.truncate(path, path.stat().st_size // 2)
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path))
        written += 1

    case.remove("quota")
    monkeypatch.setattr(checkpoint, "write_tensors", write_tensors)
    message = error_line(capsys, case.module, *case.arguments("quota"))
    assert written == writes
    assert "the disk is full" in message
    assert "--resume" in message
    monkeypatch.undo()
    [folder] = case.folders("quota")
    for state in states(case, "quota"):
        read_state(state)
    if (folder / "pytorch_model.bin").exists():
        load_state(folder)
    case.run("quota", "--resume")
    case.expect_same("quota")


def test_a_full_disk_is_no_excuse_for_another_error(case, capsys, monkeypatch):
    def write_tensors(value, path: Path) -> None:
        raise OSError(errno.EIO, os.strerror(errno.EIO), str(path))

    case.remove("broken")
    monkeypatch.setattr(checkpoint, "write_tensors", write_tensors)
    with pytest.raises(OSError, match=re.escape(os.strerror(errno.EIO))):
        case.run("broken")


# ------------------------------------------------------------------ damaged models


def test_a_damaged_model_is_refused_with_a_clear_line_or_read_as_it_was(tmp_path):
    make_model(tmp_path, labels=("0", "1"))
    path = tmp_path / "pytorch_model.bin"
    data, whole = path.read_bytes(), load_state(tmp_path)
    refused = 0
    for seed in range(5):
        for version in damaged(data, random.Random(seed)):
            path.write_bytes(version)
            try:
                state = load_state(tmp_path)
            except UserError as error:
                assert f"{path}: damaged, or not a file of weights" in str(error)
                assert "\n" not in str(error)
                refused += 1
                continue
            assert len(version) == len(data)  # cut files are always refused
            assert state.keys() == whole.keys()
            assert all(torch.equal(state[key], tensor) for key, tensor in whole.items())
    assert refused > 250


def test_a_script_given_a_damaged_model_says_so_and_writes_nothing(case, capsys, tmp_path):
    shutil.copytree(case.root / "teacher", tmp_path / "model")
    path = tmp_path / "model" / "pytorch_model.bin"
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)
    message = error_line(capsys, finetune_teacher, "--bert_model", tmp_path / "model",
                         "--data_dir", case.root / "SST-2", "--output_dir", tmp_path / "out")
    assert f"{path}: damaged" in message
    assert not (tmp_path / "out").exists()

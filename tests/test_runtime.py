"""What every script shares: errors, flags, device, precision, output folders, logs."""

import argparse
import errno
import json
import logging
import os
import pty
import random
import re
import shutil
import subprocess
import sys
import termios
from contextlib import suppress
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers import REPO, locked
from tqdm import tqdm

from transformer import runtime
from transformer.file_utils import UserError, cache_root, write_text
from transformer.run_folder import (
    JsonLog,
    RunFolder,
    RunningMean,
    prepare_output_dir,
    save_arguments,
    should_resume,
)
from transformer.runtime import (
    SMALLEST_VALUES,
    argument_values,
    check_disk,
    check_numbers,
    compile_models,
    format_values,
    given_flags,
    per_student,
    resolve_precision,
    run_script,
    set_seed,
    training_steps,
)

CPU = torch.device("cpu")


def parser() -> argparse.ArgumentParser:
    result = argparse.ArgumentParser("X.py")
    result.add_argument("--number", type=int, default=3, help="a number")
    result.add_argument("--name", required=True, help="a name")
    result.add_argument("--switch", action="store_true", help="a switch")
    return result


def message_on(error: BaseException, capsys, code: int = 2) -> str:
    """Run a script that raises `error`; returns its one line on stderr."""
    def main(args):
        raise error

    with pytest.raises(SystemExit) as exit_info:
        run_script(main, parser(), ["--name", "x"])
    message = capsys.readouterr().err
    assert exit_info.value.code == code and message.count("\n") == 1
    return message


# ------------------------------------------------------------------ starting a script


def test_only_the_flags_on_the_command_line_count_as_given():
    assert given_flags(parser(), ["--name", "x"]) == {"name"}
    # Given, although it is the default's value.
    assert given_flags(parser(), ["--name", "x", "--number", "3"]) == {"name", "number"}
    assert given_flags(parser(), ["--name=x", "--switch"]) == {"name", "switch"}


@pytest.mark.parametrize("error", [
    UserError("file.tsv, line 3: wrong"), FileNotFoundError("file.tsv"),
    IsADirectoryError("file.tsv"), NotADirectoryError("file.tsv"), PermissionError("file.tsv"),
    OSError(errno.EIO, "Input/output error on file.tsv"),
    OSError(errno.ENAMETOOLONG, "File name too long", "file.tsv"),
    OSError(errno.ENOSPC, "the disk is full", "file.tsv"),
    OSError(errno.ENAMETOOLONG, "File name too long", "file.tsv"),
    OSError(errno.EFBIG, "the disk takes no more of file.tsv"), FileExistsError(17, "", "file.tsv"),
])
def test_a_users_mistake_or_a_full_disk_is_one_line_and_exit_code_2(capsys, error):
    message = message_on(error, capsys)
    assert message.startswith("X.py: error: ") and "file.tsv" in message


TERMINAL = """
import argparse, logging, sys
from tqdm import tqdm
from transformer.runtime import run_script
def main(args):
    for step in tqdm(range(5), mininterval=0):
        logging.getLogger("x").info("step %d", step)
run_script(main, argparse.ArgumentParser("x.py"))
"""


def test_in_a_terminal_a_log_line_has_a_row_without_a_progress_bar():
    screen, end = pty.openpty()
    termios.tcsetwinsize(screen, (24, 80))
    process = subprocess.Popen([sys.executable, "-c", TERMINAL], cwd=REPO, stdout=end, stderr=end)
    os.close(end)
    shown = ""
    with suppress(OSError):  # the terminal was closed
        while part := os.read(screen, 1 << 16).decode():
            shown += part
    assert process.wait() == 0, shown
    assert "5/5" in shown
    rows = [row.rstrip("\r").split("\r") for row in shown.split("\n") if " I step" in row]
    assert len(rows) == 5
    for *before, last in rows:  # what the row shows, and what cleared it
        assert re.fullmatch(r"[\d:]+ I step \d", last) and not "".join(before[-1:]).strip()


def test_a_bug_is_not_hidden_as_a_users_mistake(capsys):
    with pytest.raises(ZeroDivisionError):
        message_on(ZeroDivisionError(), capsys)


def test_a_name_outside_the_locale_is_one_line_that_names_the_remedy(capsys, monkeypatch):
    monkeypatch.setattr("sys.getfilesystemencoding", lambda: "ascii")
    for error in (UnicodeEncodeError("ascii", "日", 0, 1, "no"), TypeError("Invoked with: str")):
        assert "PYTHONUTF8=1" in message_on(error, capsys)


def test_a_user_without_home_or_account_and_a_closed_stderr_are_no_obstacle(monkeypatch):
    """As in a container that runs under a number."""
    monkeypatch.delenv("HOME")
    monkeypatch.delenv("TINYBERT_CACHE")
    monkeypatch.setattr("os.getuid", lambda: 54321)
    monkeypatch.setattr("sys.stderr", None)
    found = []

    def main(args):
        found.extend(tqdm([cache_root()]))

    run_script(main, parser(), ["--name", "x"])
    assert found == [Path("/.cache/tinybert")]


def test_ctrl_c_leaves_with_130(capsys):
    assert "stopped by SIGINT" in message_on(KeyboardInterrupt(), capsys, code=130)


def test_a_lost_process_is_one_line(capsys, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("RANK", "1")
    message = message_on(RuntimeError("[gloo/pair.cc:534] Connection closed by peer"), capsys)
    assert message.startswith("X.py (process 1): error: another process of this run has ended")


@pytest.mark.parametrize("error", [
    MemoryError(), RuntimeError("DefaultCPUAllocator: can't allocate memory: 9 bytes"),
    torch.OutOfMemoryError("CUDA out of memory")])
def test_too_little_memory_is_one_line_that_names_what_needs_less(capsys, error):
    message = message_on(error, capsys)
    assert "out of memory" in message and "--gradient_accumulation_steps" in message


@pytest.mark.parametrize(("name", "value"), [
    *((name, smallest - 1) for name, smallest in SMALLEST_VALUES.items()),
    ("num_workers", 10**6), ("seed", 2**63), ("timeout", 1e7), ("retry_delay", float("nan")),
    ("num_train_epochs", float("nan")), ("num_train_epochs", float("inf")),
    ("learning_rate", float("inf")), ("warmup_proportion", 1.0), ("temperature", 0.0),
])
def test_a_number_that_makes_no_sense_is_an_error_that_names_flag_and_value(name, value):
    with pytest.raises(UserError, match=rf"--{name} {value}; expected"):
        check_numbers(argparse.Namespace(**{name: value}))


# ------------------------------------------------------------------ device and precision


def test_precision_names_become_types():
    assert resolve_precision("fp32", CPU) is None
    assert resolve_precision("bf16", CPU) is torch.bfloat16


@pytest.mark.parametrize("able", [True, False])
def test_auto_takes_bf16_only_where_the_cpu_has_it(monkeypatch, able):
    monkeypatch.setattr(runtime, "cpu_has_bf16", lambda: able)
    assert resolve_precision("auto", CPU) is (torch.bfloat16 if able else None)


def test_fp16_needs_a_gpu_and_no_other_precision():
    with pytest.raises(UserError, match=r"float16 needs a GPU"):
        resolve_precision("auto", CPU, fp16=True)
    with pytest.raises(UserError, match=r"contradict"):
        resolve_precision("bf16", torch.device("cuda"), fp16=True)
    assert resolve_precision("auto", torch.device("cuda"), fp16=True) is torch.float16
    with pytest.raises(UserError, match=r"float16 needs a GPU"):
        resolve_precision("fp16", CPU)
    assert resolve_precision("fp16", torch.device("cuda")) is torch.float16


# ------------------------------------------------------------------ compiling


def test_compile_is_off_on_a_cpu_unless_asked_for():
    module = torch.nn.Linear(2, 2)
    assert compile_models(None, CPU, module) is False
    assert compile_models(False, torch.device("cuda"), module) is False


def test_what_cannot_be_compiled_runs_uncompiled_unless_compiling_was_asked_for(
        monkeypatch, caplog):
    def fail(function):
        raise RuntimeError("no compiler\nmore")

    monkeypatch.setattr(torch, "compile", fail)
    with caplog.at_level(logging.INFO):
        assert compile_models(None, torch.device("cuda"), torch.nn.Linear(2, 2)) is False
    assert "compile off: no compiler" in caplog.text
    with pytest.raises(UserError, match="^--compile: no compiler; leave the flag out"):
        compile_models(True, CPU, torch.nn.Linear(2, 2))


@pytest.mark.skipif(not shutil.which("g++"), reason="needs a C++ compiler")
def test_a_compiled_module_computes_the_same():
    torch.manual_seed(0)
    module = torch.nn.Sequential(torch.nn.Linear(4, 4), torch.nn.GELU())
    x = torch.randn(3, 4)
    expected = module(x)
    assert compile_models(True, CPU, module) is True
    torch.testing.assert_close(module(x), expected)


# ------------------------------------------------------------------ one value a student


def test_a_flag_has_one_value_for_each_student_or_one_for_all():
    assert per_student("learning_rate", 0.1, 3) == [0.1] * 3
    assert per_student("learning_rate", [0.1], 2) == [0.1] * 2
    assert per_student("learning_rate", [0.1, 0.2], 2) == [0.1, 0.2]
    with pytest.raises(UserError, match=r"--learning_rate: 2 values for 3 students"):
        per_student("learning_rate", [0.1, 0.2], 3)


def test_a_log_line_shows_four_digits_of_each_number():
    record = {"step": 123456, "lr": 2.2222222222222227e-05, "loss": 3.0236825561523437,
              "metrics": {"acc": 0.7647058823529411, "f1": 1.0}, "compiled": False}
    assert format_values(record) == (
        "step 123456  lr 2.222e-05  loss 3.024  metrics (acc 0.7647  f1 1)  compiled False")


def test_a_seed_sets_python_numpy_and_torch():
    def draw():
        return random.random(), np.random.rand(), torch.rand(1).item()

    set_seed(5)
    first = draw()
    set_seed(5)
    assert draw() == first
    set_seed(6)
    assert draw() != first


def test_a_part_of_an_epoch_is_a_part_of_its_steps():
    assert training_steps(2, 10) == 20
    assert training_steps(0.5, 10) == 5
    assert training_steps(0.01, 10) == 1


# ------------------------------------------------------------------ output folders and logs


def test_an_output_folder_is_new_or_empty_unless_overwriting_was_asked_for(tmp_path):
    assert prepare_output_dir(tmp_path / "a" / "b").is_dir()
    assert prepare_output_dir(tmp_path / "a" / "b").is_dir()  # empty: fine
    with pytest.raises(UserError, match=r"not empty.*--overwrite_output_dir"):
        prepare_output_dir(tmp_path)
    assert prepare_output_dir(tmp_path, overwrite=True) == tmp_path
    (tmp_path / "file").write_text("x")
    with pytest.raises(UserError, match=r"is a file"):
        prepare_output_dir(tmp_path / "file", overwrite=True)


OTHERS = ["model.safetensors", "model-00001-of-00002.safetensors", "model.safetensors.index.json",
          "pytorch_model-00001-of-00002.bin", "pytorch_model.bin.index.json", "tokenizer.json",
          "added_tokens.json", "special_tokens_map.json", "model.onnx", "onnx/model_quantized.onnx",
          "quantization.json", "kprune.json", "step_5_pytorch_model.bin", "last/pytorch_model.bin",
          "lr1e-05_batch16/pytorch_model.bin", "tensorboard/events.out.tfevents.1", "tf_model.h5",
          "adapter_config.json", "training_args.bin", "modules.json",
          "training_state/step_0000000003.pt"]


def test_overwriting_leaves_nothing_that_a_reader_takes_for_ours_and_the_users_own(tmp_path):
    for name in (*OTHERS, "notes.txt", "README.md"):
        write_text(tmp_path / name, "{}")
    with pytest.raises(UserError, match="holds a model .*expected another folder for what is no"):
        prepare_output_dir(tmp_path, overwrite=True, keep=True)
    assert all((tmp_path / name).is_file() for name in OTHERS)
    prepare_output_dir(tmp_path, overwrite=True)
    assert {path.name for path in tmp_path.iterdir()} == {"notes.txt", "README.md"}
    write_text(tmp_path / "README.md", "Exported by `export_model.py`")
    prepare_output_dir(tmp_path, overwrite=True)
    assert [path.name for path in tmp_path.iterdir()] == ["notes.txt"]


def test_an_output_folder_is_never_an_input_by_whatever_name(tmp_path):
    model = tmp_path / "out" / "model"
    write_text(model / "config.json", "{}")
    (tmp_path / "link").symlink_to(model)
    for output, source in ((model, model / ".." / "model"), (tmp_path / "link", model),
                           (model, tmp_path / "link"), (tmp_path / "out", model)):
        with pytest.raises(UserError, match="this call reads .* and would write over it"):
            prepare_output_dir(output, overwrite=True, inputs=["org/id", source])
    assert (model / "config.json").is_file()


def test_of_two_runs_that_write_a_folder_the_second_is_refused_and_removes_nothing(tmp_path):
    write_text(tmp_path / "model.safetensors", "")
    with locked(tmp_path), pytest.raises(UserError, match="another run is writing to this folder"):
        prepare_output_dir(tmp_path, overwrite=True)
    assert (tmp_path / "model.safetensors").is_file()
    prepare_output_dir(tmp_path, overwrite=True)


def test_running_means_start_again_after_reading_and_go_on_from_a_saved_state():
    means = RunningMean()
    for value in (1.0, 3.0):
        means.add({"loss": torch.tensor(value)})
    assert means.read() == {"loss": 2.0}
    later = RunningMean()
    means.add({"loss": torch.tensor(1.0)})
    later.load_state(json.loads(json.dumps(means.state())), CPU)
    later.add({"loss": torch.tensor(4.0)})
    assert later.read() == {"loss": 2.5}


def test_a_log_that_is_cut_goes_on_at_that_place(tmp_path):
    log = JsonLog(tmp_path / "log.jsonl")
    log.write({"step": 1})
    size = log.size
    log.write({"step": 2})
    later = JsonLog(tmp_path / "other.jsonl")
    later.path = log.path
    later.cut(size)
    later.write({"step": 2, "again": True})
    lines = (tmp_path / "log.jsonl").read_text().splitlines()
    assert [json.loads(line) for line in lines] == [{"step": 1}, {"step": 2, "again": True}]


def test_a_log_that_lost_its_end_is_not_filled_with_nothing(tmp_path, caplog):
    log = JsonLog(tmp_path / "log.jsonl")
    log.write({"step": 1})
    size = log.size
    log.cut(size + 100)
    assert log.size == size and "expected at least" in caplog.text


# ------------------------------------------------------------------ stopping and going on


def resumable(name: str = "x", **values) -> argparse.Namespace:
    return argparse.Namespace(**{"name": name, "rate": 0.1, "resume": True, "save_steps": 5,
                                 "given": {"name"}, **values})


def test_torchruns_second_try_goes_on_with_what_its_first_began_and_nothing_else(
        tmp_path, monkeypatch):
    record, args = tmp_path / "args.json", resumable(resume=False)
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "7f3")
    save_arguments(tmp_path, {"arguments": {}})
    assert not should_resume(args, record), "the first try"
    monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", "1")
    assert should_resume(args, tmp_path / "none.json", record)
    assert not should_resume(args, tmp_path / "none.json")
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "another launch")
    assert not should_resume(args, record) and should_resume(resumable(), record)


def test_a_resumed_run_keeps_its_states_and_clears_what_was_being_written(tmp_path):
    state = tmp_path / "training_state" / "step_0000000003.pt"

    def start(**flags) -> str:
        folder = RunFolder.open(resumable(output_dir=str(tmp_path), **flags), ["student"])
        folder.start({"arguments": argument_values(resumable())})
        return folder.state

    assert start(overwrite_output_dir=False) == "new"
    state.parent.mkdir()
    state.write_text("x")
    (state.parent / ".step_0000000006.pt.99.tmp").write_text("half")
    assert start(overwrite_output_dir=False) == "resume"
    assert {path.name for path in tmp_path.rglob("*") if path.is_file()} == {
        "args.json", state.name}
    assert start(overwrite_output_dir=True, resume=False) == "new"
    assert [path.name for path in tmp_path.iterdir()] == ["args.json"]


def test_too_little_disk_is_an_error_before_work_starts(tmp_path, caplog):
    with caplog.at_level(logging.INFO):
        check_disk("training", tmp_path / "not" / "there", 1000)
    assert "training needs about 1e-06 GB of disk" in caplog.text
    with pytest.raises(UserError, match=r"training needs about 1e\+09 GB of disk"):
        check_disk("training", tmp_path, 10**18)

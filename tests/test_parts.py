"""Work in parts survives kills, full disks and damage, and its bytes stay the same."""

import contextlib
import itertools
import json
import logging
import multiprocessing
import os
import random
import shutil
import signal
import subprocess
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType

import pytest
from helpers import GOOD, NEUTRAL, SPECIAL, error_line, make_glue, make_model, run, write_vocab
from kill import Process, run_whole, script, survive, torchrun

import data_augmentation
import pregenerate_training_data
import prepare_data
from transformer import parts
from transformer.file_utils import UserError
from transformer.modeling import BertForMaskedLM
from transformer.parts import LostWorker, WorkFolder, fingerprint, processes

WORDS = [f"w{number}" for number in range(60)]


# ------------------------------------------------------------------ the three scripts


@dataclass
class Setup:
    """A script and what it reads."""

    module: ModuleType
    flags: list[str]
    output_flag: str
    overwrite: str
    seconds: float = 0.0  # that it works

    @property
    def name(self) -> str:
        return f"{self.module.__name__}.py"

    def arguments(self, output: Path, *more: object) -> list[str]:
        """Its command line, with the place of its output."""
        place = output if self.output_flag == "--output_dir" else output / "result"
        return [*self.flags, self.output_flag, str(place), *map(str, more)]

    def run(self, output: Path, *more: object) -> dict[str, bytes]:
        """Run it in this process; returns what it wrote."""
        run(self.module, *self.arguments(output, *more))
        return written(output)


def written(output: Path) -> dict[str, bytes]:
    """The files of a finished output, without what it was made with."""
    assert not [path.name for path in output.iterdir() if path.name.startswith(".")]
    return {path.name: path.read_bytes() for path in output.iterdir()
            if not path.name.endswith("args.json")}


def finished_parts(output: Path) -> set[str]:
    """The names of the parts that an interrupted run has left."""
    return {path.name.removesuffix(parts.MARK_SUFFIX)
            for path in output.glob(f".unfinished*/*{parts.MARK_SUFFIX}")}


def sentence(rng: random.Random) -> str:
    return " ".join(rng.choices(WORDS, k=rng.randint(3, 12))) + "."


@pytest.fixture(scope="module")
def setups(tmp_path_factory) -> dict[str, Setup]:
    """The scripts, with work of some seconds in many parts each."""
    root, rng = tmp_path_factory.mktemp("inputs"), random.Random(0)
    documents = [[sentence(rng) for _ in range(100)] for _ in range(400)]
    (root / "corpus.txt").write_text("\n\n".join(map("\n".join, documents)) + "\n")
    write_vocab(root / "vocabulary", [*SPECIAL, *WORDS, "."])
    for number, start in enumerate(range(0, 50, 2)):
        path = root / "extracted" / "AA" / f"wiki_{number:02d}"
        path.parent.mkdir(parents=True, exist_ok=True)
        articles = [" ".join(document) for document in documents[start : start + 2]]
        path.write_text("".join(json.dumps({"text": text}) + "\n" for text in ["", *articles]))
    make_model(root / "model", BertForMaskedLM)
    make_glue(root / "glue" / "SST-2", rows=3000)
    lines = [f"{word} {rng.random():.3f} {rng.random():.3f}" for word in [*GOOD, *NEUTRAL]]
    (root / "vectors.txt").write_text("\n".join(lines) + "\n")
    return {
        "augment": Setup(data_augmentation, [
            "--pretrained_bert_model", f"{root}/model", "--glove_embs", f"{root}/vectors.txt",
            "--glue_dir", f"{root}/glue", "--task_name", "SST-2", "--N", "3", "--no_cuda",
            "--max_varied_rows", "2900",
        ], "--output_file", "--overwrite"),
        "pregenerate": Setup(pregenerate_training_data, [
            "--train_corpus", f"{root}/corpus.txt", "--bert_model", f"{root}/vocabulary",
            "--epochs_to_generate", "2", "--masked_lm_prob", "0.15", "--num_workers", "2",
        ], "--output_dir", "--overwrite_output_dir"),
        "prepare": Setup(prepare_data, [
            "--input_dir", f"{root}/extracted", "--punkt", "train", "--num_workers", "2",
        ], "--output_file", "--overwrite"),
    }


NAMES = ["augment", "pregenerate", "prepare"]
ALONE = {"augment": [], "pregenerate": ["--num_workers", "1"], "prepare": ["--num_workers", "1"]}


@pytest.fixture(scope="module")
def expected(setups, tmp_path_factory) -> dict[str, dict[str, bytes]]:
    """What each script writes in one go."""
    root, found = tmp_path_factory.mktemp("expected"), {}
    for name, setup in setups.items():
        began = time.monotonic()
        found[name] = setup.run(root / name)
        setup.seconds = time.monotonic() - began
    return found


@pytest.fixture
def interrupted(setups, tmp_path):
    """Run a script that is stopped, as by Ctrl-C, before its fourth part; returns its folder."""

    def interrupt(name: str) -> Path:
        number, original = itertools.count(), WorkFolder.facts

        def facts(folder: WorkFolder, part: str):
            if "_" in part and next(number) == 3:
                raise KeyboardInterrupt
            return original(folder, part)

        with pytest.MonkeyPatch.context() as patch, pytest.raises(SystemExit) as exit_info:
            patch.setattr(WorkFolder, "facts", facts)
            setups[name].run(tmp_path / name, *ALONE[name])
        assert exit_info.value.code == 130
        assert len(finished_parts(tmp_path / name) - {"splitter"}) == 3
        return tmp_path / name

    return interrupt


# ------------------------------------------------------------------ killed and continued


def survives(setup: Setup, output: Path, kills: int, expected: dict[str, bytes]) -> None:
    def ready(log: str) -> bool:
        return "needs about" in log

    def remove() -> None:
        shutil.rmtree(output, ignore_errors=True)

    def check() -> None:
        assert written(output) == expected

    command = script(setup.name, *setup.arguments(output))
    survive(command, kills, 5, check, remove, ready, seconds=setup.seconds)


@pytest.mark.parametrize("name", NAMES)
def test_a_run_that_is_killed_three_times_ends_with_the_same_bytes(
    setups, expected, tmp_path, name
):
    survives(setups[name], tmp_path / "out", 3, expected[name])


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES)
def test_a_run_that_is_killed_twenty_times_ends_with_the_same_bytes(
    setups, expected, tmp_path, name
):
    survives(setups[name], tmp_path / "out", 20, expected[name])


@pytest.mark.parametrize("name", NAMES)
def test_a_resumed_run_keeps_the_parts_that_are_there(
    setups, expected, interrupted, monkeypatch, name
):
    output = interrupted(name)
    kept, made = finished_parts(output), []
    original = WorkFolder.writing

    def writing(folder: WorkFolder, part: str, *suffixes: str, **options):
        made.append(part)
        return original(folder, part, *suffixes, **options)

    monkeypatch.setattr(WorkFolder, "writing", writing)
    assert setups[name].run(output, "--resume", *ALONE[name]) == expected[name]
    assert made and not kept & set(made)


@pytest.mark.parametrize(("name", "damage"), [
    ("augment", "flipped"), ("augment", "short"), ("pregenerate", "mark"),
    ("pregenerate", "missing"), ("prepare", "flipped")])
def test_a_damaged_part_is_made_again(setups, expected, interrupted, caplog, name, damage):
    output = interrupted(name)
    (folder,) = output.glob(".unfinished*")
    part = sorted(finished_parts(output) - {"splitter"})[1]
    mark = folder / f"{part}{parts.MARK_SUFFIX}"
    file = next(path for path in sorted(folder.glob(f"{part}.*"))
                if path != mark and path.stat().st_size)
    content = bytearray((mark if damage == "mark" else file).read_bytes())
    content[len(content) // 2] ^= 1
    if damage == "flipped":
        file.write_bytes(content)
    elif damage == "mark":
        mark.write_bytes(content)
    elif damage == "short":
        file.write_bytes(content[: len(content) // 2])
    else:
        file.unlink()
    with caplog.at_level(logging.WARNING):
        assert setups[name].run(output, "--resume", *ALONE[name]) == expected[name]
    assert f"{mark}: damaged" in caplog.text and "made again" in caplog.text


@pytest.mark.parametrize("name", NAMES)
def test_resume_with_other_arguments_or_inputs_says_which_and_keeps_the_parts(
    setups, interrupted, capsys, monkeypatch, name
):
    output, setup = interrupted(name), setups[name]
    before = finished_parts(output)
    flag, value = {"augment": ("--seed", "7"), "pregenerate": ("--seed", "7"),
                   "prepare": ("--punkt", "auto")}[name]
    message = error_line(
        capsys, setup.module, *setup.arguments(output, "--resume", flag, value))
    assert f"{flag} {value} (was " in message
    place = {"augment": "--glove_embs", "pregenerate": "--train_corpus",
             "prepare": "--input_dir"}[name]
    changed = Path(setup.flags[setup.flags.index(place) + 1])
    changed = next(changed.rglob("wiki_03")) if changed.is_dir() else changed
    content = changed.read_bytes()
    changed.write_bytes(content.replace(b"1", b"2", 1))
    try:
        message = error_line(capsys, setup.module, *setup.arguments(output, "--resume"))
    finally:
        changed.write_bytes(content)
    assert place in message and "no longer" in message
    assert finished_parts(output) == before


@pytest.mark.parametrize("name", NAMES)
def test_resume_of_a_finished_run_says_so_and_writes_nothing(
    setups, expected, tmp_path, capsys, caplog, name
):
    setup, output = setups[name], tmp_path / "out"
    assert setup.run(output) == expected[name]
    times = {path: path.stat().st_mtime_ns for path in output.iterdir()}
    left = WorkFolder.of_file(output / "result").path
    if setup.output_flag == "--output_dir":
        left = WorkFolder.of_folder(output).path
    left.mkdir()  # by a kill while the folder was removed
    (left / "text_0.ids").write_bytes(b"")
    with caplog.at_level(logging.INFO):
        setup.run(output, "--resume")
    assert "whole already" in capsys.readouterr().out + caplog.text
    assert {path: path.stat().st_mtime_ns for path in output.iterdir()} == times
    # What a user has changed since is not taken for finished, nor overwritten.
    changed = next(path for path in times if not path.name.endswith("args.json"))
    changed.write_bytes(b"mine")
    assert setup.overwrite in error_line(
        capsys, setup.module, *setup.arguments(output, "--resume"))
    assert changed.read_bytes() == b"mine"


@pytest.mark.parametrize("name", NAMES)
def test_resume_of_nothing_begins_and_no_resume_begins_anew(
    setups, expected, interrupted, tmp_path, caplog, name
):
    assert setups[name].run(tmp_path / "new", "--resume") == expected[name]
    output = interrupted(name)
    (folder,) = output.glob(".unfinished*")
    (folder / f"foreign{parts.MARK_SUFFIX}").write_text("{}")
    with caplog.at_level(logging.WARNING):
        assert setups[name].run(output, setups[name].overwrite) == expected[name]
    assert "discarded" in caplog.text


# ------------------------------------------------------------------ several processes


@pytest.mark.parametrize("name", [
    "augment", "pregenerate", pytest.param("prepare", marks=pytest.mark.slow)])
def test_two_processes_under_torchrun_write_what_one_does(setups, expected, tmp_path, name):
    output = tmp_path / "out"
    run_whole(torchrun(2, setups[name].name, *setups[name].arguments(output, *ALONE[name])))
    assert written(output) == expected[name]


def children(pid: int) -> list[int]:
    """The processes below a process."""
    found = subprocess.run(["ps", "-o", "pid=", "--ppid", str(pid)], capture_output=True,
                           text=True, check=False).stdout.split()
    return [int(child) for child in found]


def test_torchrun_restarts_a_run_whose_process_was_killed(setups, expected, tmp_path):
    setup, output = setups["augment"], tmp_path / "out"
    process = Process(torchrun(2, setup.name, *setup.arguments(output), restarts=1))
    process.wait_until(lambda log: len(finished_parts(output)) >= 1)
    os.kill(children(process.popen.pid)[1], signal.SIGKILL)
    assert process.end(120) == 0, process.output()
    assert "going on with" in process.output()
    assert written(output) == expected["augment"]


def test_a_mistake_that_one_process_finds_ends_both(setups, tmp_path):
    setup = setups["prepare"]
    shutil.copytree(setup.flags[1], tmp_path / "extracted")
    broken = tmp_path / "extracted" / "AA" / "wiki_03"
    broken.write_text(broken.read_text() + "{not json\n")
    process = Process(torchrun(2, setup.name, *setup.arguments(
        tmp_path / "out", "--num_workers", "1", "--input_dir", tmp_path / "extracted")))
    assert process.end(60) != 0
    assert "prepare_data.py (process 1): error: " in process.output()
    assert "wiki_03, line 4: not JSON" in process.output()


# ------------------------------------------------------------------ signals


@pytest.mark.parametrize(("number", "code", "group"), [
    (signal.SIGTERM, 143, False), (signal.SIGINT, 130, True)])
def test_a_signal_ends_a_run_and_its_workers_promptly(
    setups, expected, tmp_path, number, code, group
):
    setup, output = setups["pregenerate"], tmp_path / "out"
    process = Process(script(setup.name, *setup.arguments(output)))
    process.wait_until(lambda log: len(finished_parts(output)) >= 2)
    workers = children(process.popen.pid)
    if group:  # as a terminal does
        os.killpg(process.popen.pid, number)
    else:
        process.send(number)
    assert process.end(10) == code
    assert len(workers) == 2
    assert not [pid for pid in workers if Path(f"/proc/{pid}").exists()]
    assert "Traceback" not in process.output()
    assert f"stopped by {number.name}" in process.output() and "--resume" in process.output()
    assert setup.run(output, "--resume") == expected["pregenerate"]


# ------------------------------------------------------------------ disk and memory


@pytest.fixture
def small_disk(tmp_path) -> Iterator[Path]:
    """A file system of its own, of 400 kB; `grow` gives it more."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=400k", "tmpfs", str(folder)]
    if os.geteuid() != 0 or subprocess.run(mount, capture_output=True, check=False).returncode:
        pytest.skip("needs the right to mount a tmpfs")
    yield folder
    subprocess.run(["umount", str(folder)], check=True)


def grow(folder: Path) -> None:
    subprocess.run(["mount", "-o", "remount,size=200m", str(folder)], check=True)


def test_too_small_a_disk_is_an_error_before_the_work(setups, small_disk, capsys):
    for name, setup in setups.items():
        run_to = setup.arguments(small_disk / name)
        message = error_line(capsys, setup.module, *run_to)
        assert " free; " in message and "needs about" in message
        assert not [path for path in small_disk.rglob("*") if path.is_file()]


@pytest.mark.parametrize("name", NAMES)
def test_a_disk_that_fills_later_keeps_what_is_finished(
    setups, expected, small_disk, capsys, monkeypatch, name
):
    setup, output = setups[name], small_disk / "out"
    with monkeypatch.context() as patch:
        patch.setattr(setup.module, "check_room", lambda *needs: None)
        with pytest.raises(SystemExit) as exit_info:
            setup.run(output)
    assert exit_info.value.code == 2
    printed = capsys.readouterr().err
    message = printed.splitlines()[-1]  # progress bars are before it
    assert "Traceback" not in printed
    assert "the disk is full" in message
    assert finished_parts(output)
    grow(small_disk)
    assert setup.run(output, "--resume") == expected[name]


def test_a_resumed_run_counts_the_disk_that_it_has_taken_already(
    setups, interrupted, monkeypatch
):
    needs = []
    output = interrupted("augment")
    used = WorkFolder.of_file(output / "result").used()
    monkeypatch.setattr(data_augmentation, "check_room",
                        lambda what, folder, disk, memory: needs.append(disk))
    setups["augment"].run(output, "--resume")
    setups["augment"].run(output, "--overwrite")
    assert 0 < used == pytest.approx(needs[1] - needs[0], abs=3000)


def bytes_in(folder: Path) -> int:
    """Return the size of the files in a folder, while other processes rename some of them."""
    total = 0
    for path in folder.rglob("*"):
        with contextlib.suppress(FileNotFoundError):
            total += path.stat().st_size if path.is_file() else 0
    return total


def test_a_run_needs_no_more_disk_than_it_says(setups, tmp_path, monkeypatch):
    for name, setup in setups.items():
        needs, most = [], [0]

        def check(what, folder, disk, memory, needs=needs):
            needs.append(disk)

        def replace(path, target, original=Path.replace, most=most):
            most[0] = max(most[0], bytes_in(tmp_path))
            return original(path, target)

        with monkeypatch.context() as patch:
            patch.setattr(setup.module, "check_room", check)
            patch.setattr(Path, "replace", replace)
            setup.run(tmp_path / name)
        shutil.rmtree(tmp_path / name)
        assert most[0] <= needs[0] < 3 * most[0] + 3e6, name


# ------------------------------------------------------------------ the folder itself


@pytest.fixture
def folder(tmp_path) -> WorkFolder:
    folder = WorkFolder.of_file(tmp_path / "result")
    folder.path.mkdir()
    return folder


def test_a_part_is_there_when_it_is_whole_and_not_before(folder):
    with pytest.raises(ZeroDivisionError), folder.writing("part", ".a", ".b") as new:
        new.files[0].write(b"half")
        raise ZeroDivisionError
    assert list(folder.path.iterdir()) == []
    with folder.writing("part", ".a", ".b") as new:
        new.files[0].write(b"whole")
        new.facts["rows"] = 3
        assert folder.facts("part") is None
    assert folder.facts("part") == folder.noted("part") == {"rows": 3}
    assert folder.file("part", ".a").read_bytes() == b"whole"
    assert folder.file("part", ".b").read_bytes() == b""


def test_no_cut_or_flipped_bit_of_a_part_passes_for_a_whole_one(folder):
    with folder.writing("part", ".a") as new:
        new.files[0].write(bytes(range(100)))
        new.facts["rows"] = 3
    mark = folder.path / f"part{parts.MARK_SUFFIX}"
    for path in (folder.file("part", ".a"), mark):
        good, note = path.read_bytes(), mark.read_bytes()
        damaged = [good[: len(good) * tenth // 10] for tenth in range(10)]
        for place in range(0, len(good), 3):
            damaged.append(good[:place] + bytes([good[place] ^ 1]) + good[place + 1 :])
        for content in damaged:
            mark.write_bytes(note)
            path.write_bytes(content)
            if json_of(mark) == json.loads(note) and path == mark:
                continue  # a bit that means nothing
            assert folder.facts("part") is None
        path.write_bytes(good)
        mark.write_bytes(note)
        assert folder.facts("part") == {"rows": 3}


def json_of(path: Path) -> object:
    with contextlib.suppress(ValueError):
        return json.loads(path.read_bytes())


def test_parts_are_joined_in_their_order_with_separators_and_removed(folder):
    contents = {"b": b"one", "a": b"", "c": b"two" * 10**6}
    for name, content in contents.items():
        with folder.writing(name, ".x", "_other.y") as new:
            new.files[0].write(content)
            new.facts["bytes"] = len(content)
    made = []
    facts = folder.joined("all", [".x"], list(contents), lambda: made.append(1), separator=b"|")
    assert folder.file("all", ".x").read_bytes() == b"one|" + contents["c"]
    assert facts == {"bytes": 3 + 3 * 10**6}
    assert {path.name for path in folder.path.iterdir()} == {
        "all.part.x", f"all{parts.MARK_SUFFIX}"}
    assert folder.joined("all", [".x"], list(contents), lambda: made.append(1)) == facts
    assert made == [1]


def test_a_fingerprint_changes_with_content_name_and_number(tmp_path, monkeypatch):
    first, second = tmp_path / "a", tmp_path / "b"
    first.write_text("x"), second.write_text("x")
    prints = {fingerprint([first]), fingerprint([second]), fingerprint([first, second])}
    os.utime(first, (1, 1))
    assert fingerprint([first]) in prints
    first.write_text("y")
    assert len(prints | {fingerprint([first])}) == 4
    monkeypatch.setattr(parts, "HASHED_BYTES", 0)
    before = fingerprint([first])
    os.utime(first, (1, 1))
    assert fingerprint([first]) != before
    with pytest.raises(UserError, match="no such file"):
        fingerprint([tmp_path / "missing"])


# ------------------------------------------------------------------ processes of one machine


class Worker:
    """Tasks for other processes."""

    def double(self, number: int) -> int:
        return 2 * number

    def fail(self, number: int) -> None:
        raise UserError(f"task {number}")

    def die(self, number: int) -> None:
        os.kill(os.getpid(), signal.SIGKILL)

    def sleep(self, seconds: int) -> None:
        time.sleep(seconds)


def test_results_come_in_the_order_of_the_tasks():
    for count in (1, 3):
        with processes(Worker(), count) as run_tasks:
            assert list(run_tasks("double", range(50))) == list(range(0, 100, 2))


def test_an_error_in_one_process_ends_all_at_once():
    began = time.monotonic()
    with pytest.raises(UserError, match="task 0"), processes(Worker(), 2) as run_tasks:
        sleeping = run_tasks("sleep", [60] * 5)
        failing = run_tasks("fail", [0])
        list(zip(failing, sleeping, strict=False))
    assert time.monotonic() - began < 30
    assert multiprocessing.active_children() == []


def test_a_worker_that_is_killed_is_said_to_be():
    with pytest.raises(LostWorker, match="2 processes of --num_workers was killed"), \
            processes(Worker(), 2) as run_tasks:
        list(run_tasks("die", range(4)))


def test_workers_end_when_the_process_that_they_work_for_is_killed(setups, tmp_path):
    setup = setups["pregenerate"]
    process = Process(script(setup.name, *setup.arguments(tmp_path / "out")))
    process.wait_until(lambda log: len(finished_parts(tmp_path / "out")) >= 1)
    workers = children(process.popen.pid)
    process.send(signal.SIGKILL)
    assert len(workers) == 2
    deadline = time.monotonic() + 10
    while [pid for pid in workers if Path(f"/proc/{pid}").exists()]:
        assert time.monotonic() < deadline, "workers live on"
        time.sleep(0.05)

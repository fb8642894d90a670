"""Work in shards survives kills and full disks, and its bytes stay the same."""

import errno
import itertools
import json
import logging
import multiprocessing
import os
import random
import shutil
import signal
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType, SimpleNamespace

import pytest
from helpers import GOOD, NEUTRAL, error_line, locked, make_glue, make_model, run
from kill import Process, script, survive, torchrun

import data_augmentation
import prepare_data
from transformer import shards
from transformer.file_utils import UserError
from transformer.modeling import BertForMaskedLM
from transformer.shards import ShardedFile, cut, fingerprint, worker_pool

NAMES = ["augment", "prepare"]


@dataclass
class Setup:
    """A script that writes OUTPUT/result, and what it reads."""

    module: ModuleType
    flags: list[str]
    changed: tuple[str, str]  # a flag with another value
    source: tuple[str, Path]  # a flag of files, and one of them
    begins: tuple[str, ...]  # one of these is logged when it begins to work
    seconds: float = 0.0  # that it works

    def arguments(self, output: Path, *more: object) -> list[str]:
        return [*self.flags, "--output_file", str(output / "result"), *map(str, more)]

    def command(self, output: Path, *more: object) -> list[str]:
        return script(f"{self.module.__name__}.py", *self.arguments(output, *more))

    def run(self, output: Path, *more: object) -> bytes:
        """Run it in this process; return what it wrote."""
        run(self.module, *self.arguments(output, *more))
        return written(output)


def written(output: Path) -> bytes:
    """The finished output, beside which only its metadata is left."""
    assert {path.name for path in output.iterdir()} == {"result", "result.args.json"}
    return (output / "result").read_bytes()


def finished_shards(output: Path) -> set[str]:
    return {path.stem for path in output.glob(".unfinished-result/*.shard")}


@pytest.fixture(scope="module")
def setups(tmp_path_factory) -> dict[str, Setup]:
    """The scripts, with work of some seconds in many shards each."""
    root, rng = tmp_path_factory.mktemp("inputs"), random.Random(0)
    (root / "extracted" / "AA").mkdir(parents=True)
    words = [f"w{number}" for number in range(60)]
    for number in range(25):
        texts = [" ".join(" ".join(rng.choices(words, k=rng.randint(3, 12))) + "."
                          for _ in range(100)) for _ in range(2)]
        path = root / "extracted" / "AA" / f"wiki_{number:02d}"
        path.write_text("".join(json.dumps({"text": text}) + "\n" for text in ["", *texts]))
    make_model(root / "model", BertForMaskedLM)
    make_glue(root / "glue" / "SST-2", rows=3000)
    lines = [f"{word} {rng.random():.3f} {rng.random():.3f}" for word in [*GOOD, *NEUTRAL]]
    (root / "vectors.txt").write_text("\n".join(lines) + "\n")
    return {
        "augment": Setup(data_augmentation, [
            "--pretrained_bert_model", f"{root}/model", "--glove_embs", f"{root}/vectors.txt",
            "--glue_dir", f"{root}/glue", "--task_name", "SST-2", "--N", "3", "--no_cuda",
            "--max_varied_rows", "2900",
        ], ("--seed", "7"), ("--glove_embs", root / "vectors.txt"), ("commit ",)),
        "prepare": Setup(prepare_data, [
            "--input_dir", f"{root}/extracted", "--punkt", "train", "--num_workers", "1",
        ], ("--punkt", "auto"), ("--input_dir", root / "extracted" / "AA" / "wiki_03"),
            ("needs about", "resuming")),
    }


@pytest.fixture(scope="module")
def expected(setups, tmp_path_factory) -> dict[str, bytes]:
    """What each script writes in one go."""
    root, found = tmp_path_factory.mktemp("expected"), {}
    for name, setup in setups.items():
        began = time.monotonic()
        found[name] = setup.run(root / name)
        setup.seconds = time.monotonic() - began
    return found


@contextmanager
def called_before_each_shard(function: Callable[[], None]) -> Iterator[None]:
    """Have the scripts call a function before they write a shard."""
    original = shards.atomic_path

    def atomic_path(target: Path):
        if target.suffix == ".shard":
            function()
        return original(target)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(shards, "atomic_path", atomic_path)
        yield


@pytest.fixture
def interrupted(setups, tmp_path):
    """Run a script that is stopped, as by Ctrl-C, before its fourth shard; return its folder."""

    def interrupt(name: str) -> Path:
        number = itertools.count()

        def stop() -> None:
            if next(number) == 3:
                raise KeyboardInterrupt

        with called_before_each_shard(stop), pytest.raises(SystemExit) as exit_info:
            setups[name].run(tmp_path / name)
        assert exit_info.value.code == 130
        assert len(finished_shards(tmp_path / name)) == 3
        return tmp_path / name

    return interrupt


@pytest.mark.parametrize("flag", ["--resume", "--overwrite"])
@pytest.mark.parametrize("name", NAMES)
def test_of_two_runs_that_write_a_file_the_second_is_refused(setups, tmp_path, capsys, name, flag):
    with locked(tmp_path / ".unfinished-result"):
        (tmp_path / ".unfinished-result" / "0.shard").write_text("the other's")
        message = error_line(capsys, setups[name].module, *setups[name].arguments(tmp_path, flag))
    assert "another run is writing to this folder" in message
    assert finished_shards(tmp_path) == {"0"}


# ------------------------------------------------------------------ killed and resumed


@pytest.mark.parametrize("kills", [3, pytest.param(20, marks=pytest.mark.slow)])
@pytest.mark.parametrize("name", NAMES)
def test_a_run_that_is_killed_many_times_ends_with_the_same_bytes(
    setups, expected, tmp_path, name, kills
):
    output, setup = tmp_path / "out", setups[name]

    def check() -> None:
        assert written(output) == expected[name]

    survive(setup.command(output, *(["--num_workers", 2] if name == "prepare" else [])), kills, 5,
            check, lambda: shutil.rmtree(output, ignore_errors=True),
            lambda log: any(text in log for text in setup.begins), seconds=setup.seconds)


@pytest.mark.parametrize("name", NAMES)
def test_a_resumed_run_keeps_the_shards_that_are_there(setups, expected, interrupted, name):
    made, output = [], interrupted(name)
    with called_before_each_shard(lambda: made.append(1)):
        assert setups[name].run(output, "--resume") == expected[name]
    assert len(made) == {"augment": 6, "prepare": 25}[name] - 3


@pytest.mark.parametrize("name", NAMES)
def test_resume_with_other_arguments_or_inputs_says_which_and_keeps_the_shards(
    setups, interrupted, capsys, name
):
    output, setup = interrupted(name), setups[name]
    before = finished_shards(output)
    message = error_line(capsys, setup.module, *setup.arguments(output, "--resume", *setup.changed))
    assert f"{' '.join(setup.changed)} (was " in message
    flag, path = setup.source
    content = path.read_bytes()
    path.write_bytes(content.replace(b"1", b"2", 1))
    try:
        message = error_line(capsys, setup.module, *setup.arguments(output, "--resume"))
    finally:
        path.write_bytes(content)
    assert flag in message and "no longer" in message
    assert finished_shards(output) == before


@pytest.mark.parametrize("name", NAMES)
def test_resume_of_a_finished_run_says_so_and_writes_nothing(
    setups, tmp_path, capsys, caplog, name
):
    setup, output = setups[name], tmp_path
    setup.run(output)
    times = {path: path.stat().st_mtime_ns for path in output.iterdir()}
    (output / ".unfinished-result").mkdir()  # a kill while the folder was removed
    with caplog.at_level(logging.INFO):
        setup.run(output, "--resume")
    assert "finished already" in caplog.text
    assert {path: path.stat().st_mtime_ns for path in output.iterdir()} == times
    (output / "result").write_bytes(b"mine")  # is not taken for finished, nor overwritten
    assert "--overwrite" in error_line(capsys, setup.module, *setup.arguments(output, "--resume"))
    assert (output / "result").read_bytes() == b"mine"


@pytest.mark.parametrize("name", NAMES)
def test_resume_of_nothing_begins_and_no_resume_begins_anew(
    setups, expected, interrupted, tmp_path, caplog, name
):
    assert setups[name].run(tmp_path / "new", "--resume") == expected[name]
    output = interrupted(name)
    (output / ".unfinished-result" / "0.shard").write_bytes(b"foreign")
    assert setups[name].run(output) == expected[name]
    assert "discarded" in caplog.text


def test_a_full_disk_keeps_what_is_finished(setups, expected, tmp_path, capsys, monkeypatch):
    number, sync = itertools.count(), os.fsync

    def fsync(descriptor: int) -> None:
        if next(number) == 9:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        sync(descriptor)

    with monkeypatch.context() as patch, pytest.raises(SystemExit) as exit_info:
        patch.setattr(os, "fsync", fsync)
        setups["augment"].run(tmp_path)
    assert exit_info.value.code == 2 and "the disk is full" in capsys.readouterr().err
    assert len(finished_shards(tmp_path)) >= 3
    assert setups["augment"].run(tmp_path, "--resume") == expected["augment"]


@pytest.mark.parametrize(("name", "end"), [
    ("augment", ("glue", "SST-2", "train.tsv")), ("augment", ("vectors.txt",)),
    ("prepare", ("extracted", "AA", "wiki_03")), ("prepare", ("extracted", "AA", "wiki_99")),
])
def test_an_output_that_is_an_input_is_refused_and_stays(setups, capsys, name, end):
    place = setups["augment"].source[1].parent.joinpath(*end)
    before = place.read_bytes() if place.exists() else None
    arguments = setups[name].arguments(place.parent, "--output_file", place, "--overwrite")
    assert str(place) in error_line(capsys, setups[name].module, *arguments)
    assert (place.read_bytes() if place.exists() else None) == before


def test_too_small_a_disk_is_an_error_before_the_work(setups, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(shutil, "disk_usage", lambda folder: SimpleNamespace(free=100_000))
    message = error_line(capsys, prepare_data, *setups["prepare"].arguments(tmp_path))
    assert "(0.0001 GB free)" in message and list(tmp_path.iterdir()) == []


# ------------------------------------------------------------------ several processes


def children(pid: int) -> list[int]:
    return list(map(int, Path(f"/proc/{pid}/task/{pid}/children").read_text().split()))


def test_torchrun_restarts_a_killed_run_and_writes_what_one_does(setups, expected, tmp_path):
    process = Process(torchrun(2, "data_augmentation.py", *setups["augment"].arguments(tmp_path),
                               restarts=1))
    process.wait_until(lambda log: len(finished_shards(tmp_path)) >= 1)
    os.kill(children(process.popen.pid)[1], signal.SIGKILL)
    assert process.end() == 0, process.output()
    assert "resuming" in process.output()
    assert written(tmp_path) == expected["augment"]


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGKILL])
def test_workers_end_with_the_process_that_they_work_for(setups, expected, tmp_path, number):
    process = Process(setups["prepare"].command(tmp_path, "--num_workers", 2))
    process.wait_until(lambda log: len(finished_shards(tmp_path)) >= 2)
    workers = children(process.popen.pid)
    if number == signal.SIGINT:  # a terminal sends it to the whole group
        os.killpg(process.popen.pid, number)
    else:
        process.send(number)
    code = process.end()
    while [pid for pid in workers if Path(f"/proc/{pid}").exists()]:
        time.sleep(0.05)
    assert len(workers) == 2 and "Traceback" not in process.output()
    if number != signal.SIGKILL:
        assert code == 128 + number
        assert f"stopped by {number.name}" in process.output() and "--resume" in process.output()
    assert setups["prepare"].run(tmp_path, "--resume") == expected["prepare"]


# ------------------------------------------------------------------ the file itself


@pytest.fixture
def output(tmp_path) -> ShardedFile:
    output = ShardedFile(tmp_path / "result")
    output.folder.mkdir()
    output.manifest.write_text("{}")
    return output


def test_shards_are_merged_in_order_with_separators_and_removed(output):
    contents = [b"one", b"", b"two" * 10**6]

    def write(shard, file, counts) -> None:
        for content in contents[shard.begin : shard.end]:
            file.write(content)
            counts["bytes"] += len(content)

    assert cut(3, 2) == [(0, 2), (2, 3)]
    assert output.make(cut(3, 1), write, "row", workers=2) == {"bytes": 3 + 3 * 10**6}
    output.merge(cut(3, 1), separator=b"|")
    assert output.output.read_bytes() == b"one|" + contents[2]
    assert not output.folder.exists()


def test_a_fingerprint_changes_with_content_name_and_count(tmp_path, monkeypatch):
    first, second = tmp_path / "a", tmp_path / "b"
    first.write_text("x"), second.write_text("x")
    prints = {fingerprint([first]), fingerprint([second]), fingerprint([first, second])}
    os.utime(first, (1, 1))
    assert fingerprint([first]) in prints
    first.write_text("y")
    assert len(prints | {fingerprint([first])}) == 4
    monkeypatch.setattr(shards, "HASHED_BYTES", 0)  # as of large files
    before = fingerprint([first])
    os.utime(first, (1, 1))
    assert fingerprint([first]) != before


# ------------------------------------------------------------------ worker processes


def fail_at_0(number: int) -> None:
    if number == 0:
        raise UserError("task 0")
    time.sleep(600)


def die(number: int) -> None:
    os.kill(os.getpid(), signal.SIGKILL)


@pytest.mark.parametrize("count", [1, 3])
def test_results_come_in_the_order_of_the_tasks(count):
    with worker_pool(str, count) as run_tasks:
        assert list(run_tasks(range(50))) == list(map(str, range(50)))


def test_an_error_in_one_worker_ends_all_at_once():
    with pytest.raises(UserError, match="task 0"), worker_pool(fail_at_0, 2) as run_tasks:
        list(run_tasks(range(6)))
    assert multiprocessing.active_children() == []


def test_a_worker_that_is_killed_is_a_clear_error():
    with pytest.raises(UserError, match="2 processes of --num_workers was killed"), \
            worker_pool(die, 2) as run_tasks:
        list(run_tasks(range(4)))

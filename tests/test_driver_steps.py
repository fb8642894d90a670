"""The step runner: each step once, in order, resumed where it was stopped, one driver a folder."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

REPO = Path(__file__).resolve().parent.parent
# Stands for a training script: writes a line a step, and its state when it is told to end.
SCRIPT = """
import argparse, os, signal, sys, time
from pathlib import Path

def get_args_parser():
    parser = argparse.ArgumentParser()
    parser.add_argument("--output_dir", type=Path, nargs="+", required=True)
    parser.add_argument("--input", default="")
    parser.add_argument("--source", default="")
    parser.add_argument("--steps", type=int, default=1)
    parser.add_argument("--num_workers", type=int)
    parser.add_argument("--end", choices=["well", "badly", "slowly", "empty"], default="well")
    for flag in ("--resume", "--overwrite_output_dir", "--do_eval"):
        parser.add_argument(flag, action="store_true")
    return parser

def stop(number, frame):
    if args.end == "slowly":
        time.sleep(1)
    for folder in args.output_dir:
        (folder / "state").touch()
    print("stopped by SIGTERM", flush=True)
    os._exit(143)

if __name__ == "__main__":
    args = get_args_parser().parse_args()
    signal.signal(signal.SIGTERM, stop)
    if args.end == "badly":
        sys.exit("Traceback\\nwhat went wrong")
    for folder in () if args.end == "empty" else args.output_dir:
        folder.mkdir(parents=True, exist_ok=args.resume)
        (folder / "threads").write_text(os.environ.get("OMP_NUM_THREADS", ""))
    print("resumed" if args.resume else "begun", flush=True)
    while args.steps > 1 and not (args.output_dir[0] / "go").exists():
        with (args.output_dir[0] / "steps").open("a") as file:
            print(time.time(), file=file)
        time.sleep(0.02)
"""


class Run:
    """A folder with a plan and the scripts that it calls; they end when `go` is in their output."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        for name in ("general_distill.py", "get_bert_models.py", "report.py"):
            (folder / name).write_text(SCRIPT)
        self.entries: list[list[str]] = []

    def stage(self, name: str) -> None:
        self.entries.append(["stage", name, f"Title of {name}"])

    def step(self, name: str, *outputs: str, flags: str = "", script: str = "general_distill.py",
             words: tuple[str, ...] = ()) -> None:
        command = ["python", script, "--output_dir", *outputs, *flags.split()]
        self.entries.append(["step", name, *words[:1], *outputs, *words[1:], "--", *command])

    def start(self, *arguments: object, **environment: str) -> subprocess.Popen:
        command = [sys.executable, str(REPO / "driver" / "steps.py"), "--log_dir", "logs",
                   "--folders", "m", "--call", "A=b bash reproduction.sh", *map(str, arguments)]
        variables = {**os.environ, "TMPDIR": str(self.folder / "tmp"), **environment}
        process = subprocess.Popen(
            command, cwd=self.folder, env=variables, text=True, start_new_session=True,
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
        words = [word for entry in self.entries for word in (*entry, "\n")]
        process.stdin.write("".join(f"{word}\0" for word in words))
        process.stdin.close()
        process.stdin = None
        return process

    def run(self, *arguments: object, code: int = 0, **environment: str) -> str:
        """Carry out the plan; returns what it printed."""
        process = self.start(*arguments, **environment)
        output, errors = process.communicate(timeout=60)
        assert process.returncode == code, errors + output
        return output + errors

    def commands(self, *arguments: object) -> list[str]:
        """Return the commands of a dry run."""
        lines = self.run("--mode", "dry-run", *arguments).splitlines()
        return [line for line in lines if not line.startswith("#")]

    def record(self, step: str) -> dict:
        return json.loads((self.folder / "m" / ".state" / f"{step}.json").read_text())

    def log(self, step: str) -> str:
        path = self.folder / "logs" / f"{step}.log"
        return path.read_text() if path.is_file() else ""

    def go(self, *outputs: str) -> None:
        for output in outputs:
            (self.folder / output).mkdir(parents=True, exist_ok=True)
            (self.folder / output / "go").touch()


@pytest.fixture
def plan(tmp_path) -> Run:
    """A plan of one stage with nothing in it."""
    run = Run(tmp_path)
    run.stage("first")
    return run


def wait_until(condition: Callable[[], bool], seconds: float = 60) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "waited in vain"
        time.sleep(0.02)


# ------------------------------------------------------------------ once


def test_a_finished_step_is_skipped_and_its_record_says_what_ran(plan):
    plan.step("one", "m/a")
    assert "finished earlier" not in plan.run()
    record = plan.record("one")
    assert set(record) == {"key", "command", "outputs", "started", "finished", "seconds"}
    assert record["command"] == "python general_distill.py --output_dir m/a"
    assert record["outputs"] == ["m/a"]
    assert "1 finished earlier" in plan.run()
    assert plan.log("one").count("begun") == 1
    assert plan.commands() == []


def test_with_other_settings_a_finished_step_keeps_its_output_as_old(plan):
    plan.step("one", "m/a")
    plan.run()
    (plan.folder / "m" / "a" / "mark").touch()
    plan.entries[-1].append("--steps=1")
    plan.run()
    assert (plan.folder / "m" / "a.old" / "mark").is_file()
    assert not (plan.folder / "m" / "a" / "mark").exists()


def test_what_depends_on_a_changed_step_is_run_again_and_nothing_else(plan):
    plan.step("one", "m/a")
    plan.step("two", "m/b", flags="--input m/a/part")
    plan.step("three", "m/c", flags="--input x=m/b")
    plan.step("four", "m/d")
    plan.step("five", "m/e", words=("--update", "--reads", "m"), script="report.py")
    plan.run()
    plan.entries[1].append("--steps=1")
    assert [c.split()[3] for c in plan.commands()] == ["m/a", "m/b", "m/c", "m/e"]


def test_a_step_and_what_depends_on_it_is_run_again_when_the_content_changes(plan):
    def commands(place: str, content: str) -> list[str]:
        plan.entries[1:] = []
        plan.step("one", "m/a", flags=f"--source {place}")
        plan.step("two", "m/b", flags="--input m/a/part")
        plan.entries[1][3:3] = ["--content", content]
        return plan.commands()

    assert len(commands("here/mine.csv", "1a2b")) == 2
    plan.run()
    assert commands("elsewhere/mine.csv", "1a2b") == []
    assert len(commands("here/mine.csv", "3c4d")) == 2


def test_the_key_holds_nothing_that_only_one_machine_knows(plan):
    plan.step("one", "m/a", flags="--num_workers 2")
    plan.run()
    plan.entries[-1][-1] = "64"
    for arguments, variables in (((), {"OMP_NUM_THREADS": "1"}), (("--gpus", 4), {}),
                                 (("--jobs", 2, "--cores", 9), {"TMPDIR": "elsewhere"})):
        assert "1 finished earlier" in plan.run(*arguments, **variables)


def test_a_folder_is_the_same_however_it_is_written(plan):
    for folder in ("m/", "./m", "m"):
        plan.entries[1:] = []
        plan.step("one", f"{folder}/a")
        plan.step("two", f"{folder}/b", flags=f"--input {folder}/a/part")
        assert ("2 finished earlier" in plan.run("--folders", folder, "m/.")) == (folder != "m/")


def test_what_the_driver_did_not_make_is_never_touched(plan):
    plan.step("one", "m/a")
    plan.step("two", "m/new", "m/b")
    mine = plan.folder / "m" / "b" / "mine"
    mine.parent.mkdir(parents=True)
    mine.write_text("mine")
    output = plan.run(code=2)
    assert "stage first: m/b exists, but this script did not make it; move it away" in output
    assert mine.read_text() == "mine"
    assert not mine.parent.with_name("b.old").exists()


def test_a_damaged_record_and_a_file_in_a_folders_place_are_one_line(plan):
    plan.step("one", "m/a")
    plan.run()
    (plan.folder / "m" / ".state" / "one.json").write_text("[")
    assert plan.run(code=2).startswith("reproduction.sh: error: m/.state/one.json: damaged")
    shutil.rmtree(plan.folder / "m")
    (plan.folder / "m").touch()
    assert plan.run(code=2).startswith("reproduction.sh: error: [Errno")


def test_a_command_that_deals_with_what_is_there_gets_it(plan):
    (plan.folder / "m" / "a").mkdir(parents=True)
    plan.step("one", "m/a", words=("--update",), script="get_bert_models.py", flags="--resume")
    plan.run()
    assert plan.commands() == []
    plan.entries[-1].append("--steps=1")  # a model of other inputs has to replace it
    (command,) = plan.commands()
    assert command.endswith("--steps=1 --overwrite_output_dir")


def test_another_group_of_students_makes_its_outputs_anew(plan):
    plan.step("general_a_b", "m/a", "m/b")
    plan.run()
    group = plan.entries.pop()
    plan.step("general_a", "m/a")
    plan.run()
    assert (plan.folder / "m" / "a.old").is_dir()
    assert plan.commands() == []
    plan.entries[-1] = group
    assert len(plan.commands()) == 1
    plan.run()
    assert plan.record("general_a_b")["finished"]


def test_of_stages_that_are_left_out_what_is_on_the_disk_counts(plan):
    plan.step("one", "m/a")
    plan.stage("second")
    plan.step("two", "m/b", flags="--input m/a")
    plan.run()
    plan.entries[1].append("--steps=1")
    assert plan.commands("--only", "second") == []
    assert len(plan.commands("--start", "first")) == 2
    del plan.entries[1]  # no step of the plan makes it any more
    assert plan.commands() == []
    assert "this profile has no stage third" in plan.run("--only", "third", code=2)


def test_the_list_says_what_is_finished(plan):
    plan.step("one", "m/a")
    plan.step("two", "m/b")
    plan.stage("second")
    assert plan.run("--mode", "list").splitlines() == [
        f"{'first':15} {'Title of first':53} 0 of 2", f"{'second':15} Title of second"]
    plan.go("m/b")
    plan.entries[2].append("--steps=2")
    plan.run(code=2)  # m/b is not the driver's
    assert "1 of 2" in plan.run("--mode", "list")
    del plan.entries[2]
    assert "finished" in plan.run("--mode", "list")


# ------------------------------------------------------------------ mistakes and failures


def test_a_command_that_its_script_refuses_stops_before_the_first_step(plan):
    plan.step("one", "m/a")
    plan.stage("second")
    plan.step("two", "m/b", flags="--steps many")
    plan.step("three", "m/c", flags="--end soon")
    output = plan.run("--only", "first", code=2)
    assert "general_distill.py: argument --steps: invalid int value: 'many'" in output
    assert "argument --end: invalid choice: 'soon'" in output
    assert not (plan.folder / "m").exists()


@pytest.mark.parametrize(("end", "reason"), [
    ("badly", "exit code 1."), ("empty", "exit code 0, but there is no m/b.")])
def test_a_failure_names_stage_step_log_and_the_command_that_continues(plan, end, reason):
    plan.step("one", "m/a", flags="--steps 2")
    plan.step("two", "m/b", flags=f"--end {end}")
    plan.step("three", "m/c", flags="--input m/b")
    driver = plan.start("--jobs", 2)
    wait_until(lambda: "begun" in plan.log("one") and plan.log("two") != "")
    plan.go("m/a")  # what runs beside it is finished first
    output, errors = driver.communicate(timeout=60)
    assert driver.returncode == 1
    lines = errors.splitlines()
    assert lines[0] == f"Stage first stopped: step two, {reason}"
    assert lines[1] == "The end of its log, logs/two.log:"
    assert ("  | what went wrong" in lines) == (end == "badly")
    assert lines[-1] == "  A=b bash reproduction.sh --from first"
    assert "one" in output
    assert "finished" in plan.record("one")
    assert plan.log("three") == ""


def test_a_folder_of_models_that_has_moved_is_finished_there_too(plan):
    plan.step("one", "m/a")
    plan.step("two", "m/b", flags="--input m/a")
    plan.run("--folders", "data", "m")
    (plan.folder / "m").rename(plan.folder / "n")
    place = str(plan.folder / "n")
    plan.entries = [[word.replace("m/", f"{place}/") for word in entry] for entry in plan.entries]
    assert "2 finished earlier" in plan.run("--folders", "data", place)


# ------------------------------------------------------------------ stopped and continued


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_driver_that_is_told_to_end_lets_its_scripts_write_states_and_the_next_goes_on(
    plan, number
):
    plan.step("one", "m/a", flags="--steps 2 --end slowly")
    plan.step("two", "m/b", flags="--steps 2")
    plan.step("three", "m/c", flags="--steps 2 --do_eval")
    driver = plan.start("--jobs", 3)
    wait_until(lambda: all("begun" in plan.log(name) for name in ("one", "two", "three")))
    os.killpg(driver.pid, number)  # as a terminal does
    _, errors = driver.communicate(timeout=60)
    assert driver.returncode == 128 + number
    assert "Interrupted in stage first; this continues: A=b bash reproduction.sh --from first" \
        in errors
    for name, folder in (("one", "a"), ("two", "b"), ("three", "c")):
        assert plan.log(name).count("stopped by SIGTERM") == 1
        assert (plan.folder / "m" / folder / "state").is_file()
    first, second, evaluation = plan.commands("--gpus", 4)
    assert first.endswith("--end slowly --resume")
    assert second.endswith("--steps 2 --resume")
    assert second.startswith("python -m torch.distributed.run --standalone ")
    assert evaluation == "python general_distill.py --output_dir m/c --steps 2 --do_eval"
    plan.go("m/a", "m/b")
    plan.entries.pop()
    plan.run()
    assert "resumed" in plan.log("one")


def test_a_step_begun_with_other_settings_is_begun_anew(plan):
    plan.step("one", "m/a")
    plan.run()
    plan.entries[-1].append("--steps=2")
    driver = plan.start()
    wait_until(lambda: plan.log("one").count("begun") and not (plan.record("one").get("finished")))
    driver.terminate()
    driver.communicate(timeout=60)
    plan.entries[-1].append("--end=well")
    plan.go("m/a")
    assert "--resume" not in plan.commands()[0]
    plan.entries[-1][-2] = "--steps=1"
    plan.run()
    assert not (plan.folder / "m" / "a" / "go").exists()
    assert not (plan.folder / "m" / "a.old" / "go").exists()  # what was finished once is there yet


def test_a_second_driver_says_who_works_on_the_folder_and_leaves(plan):
    plan.step("one", "m/a", flags="--steps 2")
    driver = plan.start()
    wait_until(lambda: "begun" in plan.log("one"))
    (line,) = [line for line in plan.run(code=2).splitlines()]
    assert f"m: another reproduction.sh works on this folder: process {driver.pid} on " in line
    assert plan.commands()  # to look needs no lock
    driver.terminate()
    driver.communicate(timeout=60)


@pytest.mark.skipif(sys.platform != "linux", reason="the system tells a dead driver's script")
def test_a_killed_driver_leaves_no_orphan_and_the_next_goes_on(plan):
    plan.step("one", "m/a", flags="--steps 2 --end slowly")
    driver = plan.start()
    wait_until(lambda: "begun" in plan.log("one"))
    driver.kill()
    driver.communicate()
    plan.go("m/b")
    (plan.folder / "m" / "a" / "later").mkdir()
    output = plan.start()
    wait_until(lambda: "resumed" in plan.log("one"))
    assert plan.log("one").index("stopped by SIGTERM") < plan.log("one").index("resumed")
    plan.go("m/a")
    text, errors = output.communicate(timeout=60)
    assert output.returncode == 0, errors
    assert "The last driver was killed; what it left running writes its state" in text
    assert (plan.folder / "m" / "a" / "later").is_dir()


# ------------------------------------------------------------------ side by side


def test_steps_that_do_not_need_each_other_run_side_by_side_and_share_the_cores(
    plan, monkeypatch
):
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    plan.step("one", "m/a", flags="--steps 2")
    plan.step("two", "m/b", flags="--steps 2")
    plan.step("three", "m/c", flags="--input m/a --steps 2")
    plan.stage("second")
    plan.step("alone", "m/d")
    driver = plan.start("--jobs", 2, "--cores", 6)
    wait_until(lambda: "begun" in plan.log("one") and "begun" in plan.log("two"))
    assert plan.log("three") == ""
    plan.go("m/a")
    wait_until(lambda: "begun" in plan.log("three"))
    plan.go("m/b", "m/c")
    driver.communicate(timeout=60)
    assert driver.returncode == 0
    threads = [(plan.folder / "m" / name / "threads").read_text() for name in "abcd"]
    assert threads == ["3", "3", "3", ""]

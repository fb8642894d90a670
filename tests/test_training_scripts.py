"""What the training scripts promise alike: folders, seeds, several students, kills and resume."""

import errno
import io
import logging
import os
import random
import shlex
import shutil
import signal
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import kill
import pytest
import torch
from helpers import (
    FinetuneSetup,
    GeneralSetup,
    TaskSetup,
    config_folder,
    error_line,
    locked,
    make_glue,
    make_model,
    make_pregenerated,
    read_json,
    read_log,
    run,
    same_weights,
    weights,
)

import finetune_teacher
import general_distill
import task_distill
from transformer import checkpoint
from transformer.checkpoint import load_state, load_training_state, read_tensors
from transformer.file_utils import UserError, write_json
from transformer.modeling import BertForMaskedLM, BertModel, TinyBertForPreTraining
from transformer.run_folder import JsonLog, flat_numbers
from transformer.table_files import write_tsv

MAY_DIFFER = ("args.json", "log.jsonl")  # from run to run
DROPOUT = {"hidden_dropout_prob": 0.1, "attention_probs_dropout_prob": 0.1}
TIMES = ("rows_per_second", "waiting")  # of a log's line, they differ from run to run


# ------------------------------------------------------------------ claims of every script

JOINT = ("--pred_distill", "--joint", "--aug_train", "--hard_label_weight", 0.5,
         "--hard_labels", "original")
SETUPS = {
    "general": (GeneralSetup, ()),
    "intermediate": (TaskSetup, ()),
    "prediction": (TaskSetup, ("--pred_distill",)),
    "joint": (partial(TaskSetup, augmented=24), JOINT),
    "finetune": (FinetuneSetup, ("--new_classifier",)),
}
DISTILLATION = ["general", "intermediate", "prediction", "joint"]


@pytest.fixture(params=SETUPS)
def setup(request, tmp_path):
    """A script's inputs; `flags` choose the stage."""
    make, flags = SETUPS[request.param]
    made = make(tmp_path)
    made.flags = flags
    return made


def add_dropout(folder: Path, probability: float) -> None:
    """Change the dropout in a model folder's configuration."""
    path = folder / "config.json"
    write_json(path, read_json(path) | dict.fromkeys(DROPOUT, probability))


def test_a_folder_that_is_not_empty_is_refused_and_untouched(setup, capsys):
    (setup.root / "full").mkdir()
    (setup.root / "full" / "pytorch_model.bin").write_text("mine")
    message = error_line(capsys, setup.script, *setup.arguments("full", *setup.flags))
    assert "full: exists and is not empty" in message
    message = error_line(capsys, setup.script, *setup.arguments("full", *setup.flags, "--resume"))
    assert "--resume or" not in message
    assert [p.name for p in (setup.root / "full").iterdir()] == ["pytorch_model.bin"]
    for name in ("model.safetensors", "tokenizer.json", "step_9_pytorch_model.bin"):
        (setup.root / "full" / name).write_text("another model's")
    full, new = (setup.run(name, *setup.flags, "--overwrite_output_dir", "--num_train_epochs", 1)
                 for name in ("full", "new"))
    assert {p.name for p in full.iterdir()} == {p.name for p in new.iterdir()}
    assert same_weights(weights(full), weights(new))


def test_the_output_is_never_what_is_read(setup, capsys):
    (setup.root / "link").symlink_to(setup.trained)
    files = {path: path.read_bytes() for path in setup.trained.iterdir()}
    for output in ("link", "."):
        message = error_line(capsys, setup.script, *setup.arguments(
            output, *setup.flags, "--overwrite_output_dir"))
        assert "this call reads" in message
    assert {path: path.read_bytes() for path in setup.trained.iterdir()} == files


def test_a_second_run_on_the_same_folder_is_one_line(setup, capsys):
    arguments = setup.arguments("out", *setup.flags, "--overwrite_output_dir",
                                "--num_train_epochs", 1)
    with locked(setup.root / "out"):
        message = error_line(capsys, setup.script, *arguments)
    assert "another run is writing to this folder" in message
    assert not any((setup.root / "out").iterdir())
    run(setup.script, *arguments)


def test_equal_seeds_give_equal_bytes_and_others_do_not(setup):
    add_dropout(setup.trained, 0.1)
    outputs = [setup.run(f"out{place}", "--seed", seed, "--num_train_epochs", 2, *setup.flags)
               for place, seed in enumerate((7, 7, 8))]
    first, second, other = ((p / "pytorch_model.bin").read_bytes() for p in outputs)
    assert first == second != other


def test_part_of_an_epoch_trains_part_of_its_steps_and_the_last_batch_is_kept(setup):
    output = setup.run("part", "--num_train_epochs", 1.5, "--train_batch_size", 7, *setup.flags)
    rows = 10 if setup.script is general_distill else 24
    assert read_log(output)[-1]["step"] == round(1.5 * -(-rows // 7))


def test_records_cover_every_step_once(setup):
    output = setup.run("out", *setup.flags, "--num_train_epochs", 1, "--train_batch_size", 3,
                       *(() if setup.script is finetune_teacher else ("--eval_step", 3)))
    log = read_log(output)
    assert sum(record["steps"] for record in log) == log[-1]["step"]
    assert setup.script is finetune_teacher or log[0]["steps"] == 3 > log[-1]["steps"]


def test_the_log_says_what_runs_and_how_long_it_will_take(setup, caplog):
    with caplog.at_level(logging.INFO):
        setup.run("out", *setup.flags, "--num_train_epochs", 2, "--train_batch_size", 4)
    for word in ("commit", "device cpu", "precision fp32", "train_batch_size=", "eta 00:00"):
        assert word in caplog.text
    start = read_json(setup.root / "out" / "args.json")
    assert start["arguments"]["train_batch_size"] in (4, [4]) and start["commit"]


def test_the_first_model_is_read_strictly_and_fits_the_rows(setup, capsys):
    setup.expect_error(capsys, *setup.flags, "--max_seq_length", 200,
                       contains=["200", "128 positions"])
    setup.expect_error(capsys, *setup.flags, "--train_batch_size", 0,
                       contains=["--train_batch_size 0"])
    folder = setup.teacher if setup.script is general_distill else setup.trained
    path = folder / "pytorch_model.bin"
    path.write_bytes(path.read_bytes()[:5000])
    setup.expect_error(capsys, *setup.flags, contains=[str(path), "damaged"])


@pytest.mark.parametrize("setup", DISTILLATION, indirect=True)
def test_the_teachers_dropout_is_off_and_its_folder_untouched(setup):
    plain = setup.run("plain", *setup.flags, "--num_train_epochs", 1)
    add_dropout(setup.teacher, 0.5)
    files = {p.name: p.read_bytes() for p in setup.teacher.iterdir()}
    noisy = setup.run("noisy", *setup.flags, "--num_train_epochs", 1)
    assert same_weights(weights(plain), weights(noisy))
    assert {p.name: p.read_bytes() for p in setup.teacher.iterdir()} == files


@pytest.mark.parametrize("match", [(), ("--match_original",)])
@pytest.mark.parametrize("setup", DISTILLATION, indirect=True)
def test_gradient_accumulation_does_not_change_the_student(setup, match):
    more = (*setup.flags, *match, "--num_train_epochs", 1, "--learning_rate", 1e-3,
            "--max_seq_length", 32)
    whole, *split = [
        weights(setup.run(f"out{number}", *more, "--gradient_accumulation_steps", number))
        for number in (1, 2, 3)]
    for found in split:
        for name, tensor in whole.items():
            if "key.bias" not in name:  # its gradient is rounding noise only
                torch.testing.assert_close(found[name], tensor, rtol=0, atol=2e-4, msg=name)


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("setup", DISTILLATION, indirect=True)
def test_several_students_end_as_if_each_had_been_trained_alone(setup, precision):
    for name, shape in (("a", {"num_hidden_layers": 2, "hidden_size": 12}),
                        ("b", {"num_hidden_layers": 4})):
        make_model(setup.root / name, TinyBertForPreTraining, seed=2, **shape, **DROPOUT,
                   model_arguments={"fit_size": 16})
    more = ("--num_train_epochs", 2, "--precision", precision, "--eval_step", 2,
            "--gradient_accumulation_steps", 2, *setup.flags)
    alone = [setup.run(f"alone_{name}", *more, "--student_model", setup.root / name,
                       "--learning_rate", rate) for name, rate in (("a", 1e-3), ("b", 2e-3))]
    together = [setup.root / "together_a", setup.root / "together_b"]
    setup.run("together_a", *more, "--student_model", setup.root / "a", setup.root / "b",
              "--output_dir", *together, "--learning_rate", 1e-3, 2e-3)
    for expected, found in zip(alone, together, strict=True):
        assert same_weights(weights(expected), weights(found))
        assert without_times(expected) == without_times(found)
        assert {p.name for p in expected.iterdir()} == {p.name for p in found.iterdir()}
        assert (read_json(expected / "eval_results.json")
                == read_json(found / "eval_results.json"))


@pytest.mark.parametrize("setup", ["general", "intermediate"], indirect=True)
def test_equal_widths_start_from_the_identity(setup):
    make_model(setup.trained, BertModel, num_hidden_layers=2)
    output = setup.run("out", "--learning_rate", 0, "--num_train_epochs", 1)
    assert torch.equal(weights(output)["fit_dense.weight"], torch.eye(16))


@pytest.mark.parametrize("setup", ["general", "intermediate", "joint"], indirect=True)
@pytest.mark.parametrize(("changes", "contains"), [
    ({"num_hidden_layers": 5}, ["4 layers", "student 5"]),
    ({"num_attention_heads": 4}, ["2 attention heads", "student 4", "--no_attention_loss"]),
    ({"vocab_size": 400}, ["student/config.json: vocab_size is 400", "word pieces"]),
])
def test_sizes_that_disagree_are_named_with_both_numbers(setup, capsys, changes, contains):
    make_model(setup.trained, BertModel, **{"num_hidden_layers": 2, **changes})
    (setup.teacher / "pytorch_model.bin").write_bytes(b"not read before that")
    setup.expect_error(capsys, *setup.flags, contains=contains)


@pytest.mark.parametrize("setup", ["general", "intermediate", "joint"], indirect=True)
def test_the_layers_that_students_learn_from_are_logged_and_can_be_chosen(setup, capsys, caplog):
    make_model(setup.root / "deep", TinyBertForPreTraining, num_hidden_layers=3, hidden_size=12,
               model_arguments={"fit_size": 16})
    outputs, more = [setup.root / "a", setup.root / "b"], ("--num_train_epochs", 1, *setup.flags)
    students = ("--student_model", setup.trained, setup.root / "deep", "--output_dir", *outputs)
    setup.expect_error(capsys, *more, *students, "--layer_map", 1, 4,
                       contains=["--layer_map 1 4: expected 3 ascending numbers from 1 to 4"])
    with caplog.at_level(logging.INFO):
        setup.run("a", *more, *students)
        assert "layer_map 2 4, 2 3 4" in caplog.text
    chosen = ("--layer_map", 1, 4, "--layer_map", 1, 2, 3)
    setup.run("a", *more, *students, *chosen, "--overwrite_output_dir")
    assert read_json(outputs[0] / "args.json")["layer_map"] == "1 4, 1 2 3"
    alone = setup.run("alone", *more, "--layer_map", 1, 4)
    same = setup.run("same", *more, "--layer_map", 2, 4)
    plain = setup.run("plain", *more)
    assert same_weights(weights(outputs[0]), weights(alone))
    assert same_weights(weights(plain), weights(same))
    assert not same_weights(weights(plain), weights(alone))


@pytest.mark.parametrize("setup", ["general", "intermediate", "joint"], indirect=True)
def test_heads_that_differ_do_not_matter_without_the_attention_loss(setup):
    make_model(setup.trained, BertModel, num_hidden_layers=2, num_attention_heads=4)
    output = setup.run("out", "--no_attention_loss", "--num_train_epochs", 1, *setup.flags)
    losses = read_json(output / "eval_results.json")["losses"]
    assert "rep_loss" in losses and "att_loss" not in losses


@pytest.mark.parametrize(("setup", "flag"), [
    ("general", "--resume"), *(("intermediate", flag) for flag in (
        "--aug_train", "--pred_distill", "--compile", "--resume", "--sweep", "--tensorboard")),
], indirect=["setup"])
def test_flags_of_training_are_refused_with_do_eval(setup, capsys, flag):
    setup.expect_error(capsys, "--do_eval", flag, contains=[flag, "leave it out"])


# ------------------------------------------------------------------ TensorBoard


def expect_events_of_the_log(folder: Path) -> None:
    """Fail unless TensorBoard's own reader finds exactly the numbers of log.jsonl."""
    reader = pytest.importorskip(
        "tensorboard.backend.event_processing.event_accumulator", reason="needs tensorboard")
    events = reader.EventAccumulator(str(folder / "tensorboard")).Reload()
    shown = {(name, event.step): event.value for name in events.Tags()["scalars"]
             for event in events.Scalars(name)}
    logged = {(name, line["step"]): value for line in read_log(folder)
              for name, value in flat_numbers(line)}
    assert shown == pytest.approx(logged, rel=1e-6)  # TensorBoard's are float32


def test_tensorboard_shows_the_numbers_of_the_log_and_a_run_without_it_leaves_no_old_ones(setup):
    flags = [*setup.flags, "--num_train_epochs", 1]
    if setup.script is not finetune_teacher:
        flags += ["--eval_step", 2]
    output = setup.run("out", *flags, "--tensorboard")
    expect_events_of_the_log(output)
    names = {name for line in read_log(output) for name, _ in flat_numbers(line)}
    assert {"step", "epoch", "lr"} <= names
    assert ("all_metrics/dev/acc" in names) == (setup.script is finetune_teacher or
                                                "--pred_distill" in flags)
    setup.run("out", *flags, "--overwrite_output_dir")
    assert not (output / "tensorboard").exists()


def test_a_run_that_was_killed_and_resumed_shows_every_step_once(tmp_path, stopped):
    pytest.importorskip("tensorboard")
    log = JsonLog(tmp_path / "log.jsonl", tensorboard=True)
    log.write({"step": 1, "loss": 0.5})
    size = log.size
    log.write({"step": 2, "loss": 0.25})  # what a kill leaves beyond the state
    later = JsonLog(tmp_path / "log.jsonl", keep=True, tensorboard=True)
    later.cut(size)
    later.write({"step": 2, "loss": 0.125, "metrics": {"acc": 1}, "none": None})
    expect_events_of_the_log(tmp_path)
    stopped.copy("stopped", "tracked")
    expect_events_of_the_log(*stopped.run("tracked", "--resume", "--tensorboard"))


def test_without_the_package_tensorboard_a_line_names_it(setup, capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "tensorboard", None)
    setup.expect_error(capsys, *setup.flags, "--tensorboard",
                       contains=["--tensorboard", "pip install tensorboard"])


# ------------------------------------------------------------------ rows


@pytest.mark.parametrize("setup", ["intermediate", "finetune"], indirect=True)
def test_rows_of_a_task_can_be_bounded_and_augmented(setup, capsys):
    setup.expect_error(capsys, *setup.flags, "--aug_train",
                       contains=["train_aug.tsv", "data_augmentation.py"])
    make_glue(setup.data, augmented=14)
    for name, rows, more in (("few", 4, ("--max_train_rows", 4)), ("more", 14, ("--aug_train",))):
        output = setup.run(name, *setup.flags, *more, "--num_train_epochs", 1)
        assert read_json(output / "eval_results.json")["train_rows"] == rows


@pytest.mark.parametrize("setup", ["intermediate", "finetune"], indirect=True)
def test_a_bad_row_of_a_task_is_named_with_file_line_and_value(setup, capsys):
    header = ["id", "sentence", "label"]
    write_tsv(setup.data / "dev.tsv", [header, ["1", "a film"]])
    setup.expect_error(capsys, *setup.flags, contains=["dev.tsv, line 2"])
    write_tsv(setup.data / "train.tsv", [header, ["1", "a film", "7"]])
    setup.expect_error(capsys, *setup.flags, contains=["train.tsv, line 2", "'7'"])


# ------------------------------------------------------------------ runs to be killed


@dataclass
class Case:
    """A training script, its inputs below `root`, and what a run without interruption makes.

    outputs: how many folders a run writes: NAME, or NAME_0, NAME_1 ...
    flags: the command line without --output_dir.
    seconds: of work of a run.
    """

    module: object
    root: Path
    flags: list
    outputs: int = 1
    seconds: float = 0.0

    def folders(self, name: str) -> list[Path]:
        if self.outputs == 1:
            return [self.root / name]
        return [self.root / f"{name}_{number}" for number in range(self.outputs)]

    def arguments(self, name: str, *more) -> list[str]:
        return [str(a) for a in (*self.flags, "--output_dir", *self.folders(name), *more)]

    def command(self, name: str, *more) -> list[str]:
        return kill.script(f"{self.module.__name__}.py", *self.arguments(name, *more))

    def torchrun(self, name: str, *more, restarts: int = 0) -> list[str]:
        return kill.torchrun(2, f"{self.module.__name__}.py", *self.arguments(name, *more),
                             restarts=restarts)

    def run(self, name: str, *more) -> list[Path]:
        """Run the script in this process."""
        run(self.module, *self.arguments(name, *more))
        return self.folders(name)

    def remove(self, name: str) -> None:
        for folder in self.folders(name):
            shutil.rmtree(folder, ignore_errors=True)

    def copy(self, old: str, new: str) -> None:
        self.remove(new)
        for source, target in zip(self.folders(old), self.folders(new), strict=True):
            shutil.copytree(source, target)

    def expect_same(self, name: str, whole: str = "whole") -> None:
        """Fail unless a run's folders are those of the uninterrupted run, byte by byte."""
        for expected, found in zip(self.folders(whole), self.folders(name), strict=True):
            names = sorted(str(p.relative_to(expected)) for p in expected.rglob("*"))
            assert sorted(str(p.relative_to(found)) for p in found.rglob("*")) == names
            for name in names:
                if (expected / name).is_file() and Path(name).name not in MAY_DIFFER:
                    assert (found / name).read_bytes() == (expected / name).read_bytes(), name
            for log in expected.rglob("log.jsonl"):
                assert without_times(found / log.parent.relative_to(expected)) == without_times(
                    log.parent)


def without_times(folder: Path) -> list[dict]:
    """Return the lines of a run's log; steps must come in order, each once."""
    lines = read_log(folder)
    steps = [line["step"] for line in lines]
    assert steps == sorted(set(steps))
    return [{k: v for k, v in line.items() if k not in TIMES} for line in lines]


COMMON = ["--precision", "fp32", "--no_cuda", "--save_steps", 3]


def general(root: Path, dropout: dict, students: int = 2, rows: int = 1500) -> Case:
    """Students with batches of 64 and 128 beside each other."""
    make_model(root / "teacher", BertForMaskedLM)
    make_pregenerated(root / "corpus", rows=rows, epochs=2)
    config_folder(root / "student", num_hidden_layers=2, hidden_size=12, **dropout)
    return Case(general_distill, root, [
        "--pregenerated_data", root / "corpus", "--teacher_model", root / "teacher",
        "--student_model", *[root / "student"] * students, "--max_seq_length", 16,
        "--train_batch_size", *[64, 128][:students], "--learning_rate", *[1e-3, 5e-4][:students],
        "--num_train_epochs", 3, "--eval_step", 7, *COMMON], outputs=students)


def task(root: Path, dropout: dict, more: tuple = (), rows: int = 400,
         augmented: int = 0) -> Case:
    make_glue(root / "SST-2", rows=rows, dev_rows=24, augmented=augmented)
    make_model(root / "teacher", labels=("0", "1"))
    make_model(root / "student", TinyBertForPreTraining, seed=1, num_hidden_layers=2,
               hidden_size=12, model_arguments={"fit_size": 16}, **dropout)
    return Case(task_distill, root, [
        "--teacher_model", root / "teacher", "--student_model", root / "student", "--data_dir",
        root / "SST-2", "--task_name", "SST-2", "--train_batch_size", 8, "--num_train_epochs", 4,
        "--learning_rate", 1e-3, "--eval_step", 15, *COMMON, *more])


def prediction(root: Path, dropout: dict, rows: int = 400) -> Case:
    """The teacher knows the task, so that the student's score rises and its best one changes."""
    case = task(root, dropout, ("--pred_distill", "--eval_batch_size", 8), rows)
    run(finetune_teacher, "--bert_model", root / "teacher", "--data_dir", root / "SST-2",
        "--output_dir", root / "trained", "--learning_rate", 1e-3, "--num_train_epochs", 4,
        "--train_batch_size", 8, "--precision", "fp32", "--no_cuda")
    case.flags[case.flags.index(root / "teacher")] = root / "trained"
    case.flags[case.flags.index("--learning_rate") + 1] = 1e-2
    return case


def sweep(root: Path, dropout: dict) -> Case:
    return task(root, dropout, (*JOINT, "--sweep", "--learning_rate", 1e-3, 1e-2,
                                "--train_batch_size", 8, 16), rows=160, augmented=160)


def finetune(root: Path, dropout: dict, rows: int = 400) -> Case:
    make_glue(root / "SST-2", rows=rows, dev_rows=24)
    make_model(root / "model", labels=("0", "1"), **dropout)
    return Case(finetune_teacher, root, [
        "--bert_model", root / "model", "--data_dir", root / "SST-2", "--learning_rate", 1e-3,
        "--train_batch_size", 8, "--num_train_epochs", 6, *COMMON])


CASES: dict[str, Callable[[Path, dict], Case]] = {
    "general": general,
    "intermediate": task,
    "prediction": prediction,
    "sweep": sweep,
    "finetune": finetune,
}


@pytest.fixture(scope="module")
def cases(tmp_path_factory) -> Callable[[str], Case]:
    """Each case is made, and run once in this process, when a test first asks for it."""
    made: dict[str, Case] = {}

    def get(name: str) -> Case:
        if name not in made:
            root = tmp_path_factory.mktemp(f"a {name} run")  # a space, as commands quote it
            made[name] = case = CASES[name](root, DROPOUT)
            began = time.monotonic()
            case.run("whole")
            case.seconds = time.monotonic() - began
        return made[name]

    return get


@pytest.fixture(scope="module")
def stopped(cases) -> Case:
    """Task distillation with the folder `stopped`: killed after its second state or later."""
    case = cases("intermediate")
    process = kill.Process(case.command("stopped"))
    assert process.wait_until(lambda log: log.count("state saved") > 5), process.output()
    process.kill()
    assert len(states(case)) in (2, 3)  # three: killed before the oldest was removed
    for folder in case.folders("stopped"):
        assert not (folder / "eval_results.json").exists()
    return case


def states(case: Case, name: str = "stopped") -> list[Path]:
    """Return the saved states, the oldest first."""
    return sorted(case.folders(name)[0].glob("training_state/step_*.pt"))


# ------------------------------------------------------------------ kill -9


def survives(case: Case, kills: int, seed: int) -> None:
    kill.survive(case.command("killed"), kills, seed, lambda: case.expect_same("killed"),
                 lambda: case.remove("killed"), seconds=case.seconds)


@pytest.mark.parametrize("name", CASES)
def test_a_run_killed_at_random_moments_ends_with_the_same_bytes(cases, name):
    survives(cases(name), kills=3, seed=1)


@pytest.mark.slow
@pytest.mark.parametrize("name", CASES)
def test_twenty_kills_change_no_byte(cases, name):
    survives(cases(name), kills=20, seed=100)


def test_resume_with_nothing_there_starts_from_the_beginning(cases):
    case = cases("intermediate")
    case.run("fresh", "--resume")
    case.expect_same("fresh")


# ------------------------------------------------------------------ signals


@pytest.mark.parametrize(("name", "number", "code"), [
    ("intermediate", signal.SIGTERM, 143), ("general", signal.SIGINT, 130),
])
def test_a_signal_writes_a_state_and_prints_the_command_that_continues(cases, name, number, code):
    case = cases(name)
    case.remove("signalled")
    # No state but the signal's; how often they are saved may change from call to call.
    process = kill.Process(case.command(
        "signalled", "--save_steps", 0, "--save_minutes", 0, "--overwrite_output_dir"))
    assert process.wait_until(lambda log: "step 14 " in log or "step 15 " in log)
    os.killpg(process.popen.pid, number)  # as a terminal does: every process of the group
    assert process.end() == code, process.output()
    lines = process.output().strip().splitlines()
    assert lines[-1].startswith(f"{case.module.__name__}.py: stopped by {number.name}; ")
    assert "Traceback" not in process.output()
    assert len(states(case, "signalled")) == 1
    words = shlex.split(lines[-1].partition("this continues: ")[2])
    assert words[0] == "python" and words[-1] == "--resume"
    assert "--overwrite_output_dir" not in words
    resumed = kill.Process([*case.command("signalled")[:1], *words[1:]])
    assert resumed.end() == 0, resumed.output()
    assert "going on from" in resumed.output()
    case.expect_same("signalled")


# ------------------------------------------------------------------ other arguments


@pytest.mark.parametrize("begun", ["stopped", "whole"])
def test_resume_with_other_arguments_names_those_that_differ_and_changes_nothing(
        stopped, capsys, begun):
    stopped.copy(begun, "other")
    [folder] = stopped.folders("other")
    before = {p: p.read_bytes() for p in folder.rglob("*") if p.is_file()}
    message = error_line(capsys, stopped.module, *stopped.arguments(
        "other", "--resume", "--learning_rate", "0.5", "--seed", "7", "--layer_map", "1", "4",
        "--hidden_loss_weight", "2"))
    assert ("--hidden_loss_weight 2.0 (was 1.0), --layer_map [[1, 4]] (was [None]), --learning_rate"
            " [0.5] (was [0.001]), --seed 7 (was 42)") in message
    assert "train_batch_size" not in message
    assert {p: p.read_bytes() for p in folder.rglob("*") if p.is_file()} == before


def test_how_often_states_are_saved_may_change(stopped):
    stopped.copy("stopped", "sparse")
    stopped.run("sparse", "--resume", "--save_steps", 50)
    stopped.expect_same("sparse")


# ------------------------------------------------------------------ damaged states and models


def saved_bytes(state: dict) -> bytes:
    """Return a state as it is saved: equal bytes are equal states."""
    file = io.BytesIO()
    torch.save(state, file)
    return file.getvalue()


def damaged(data: bytes, rng: random.Random) -> list[bytes]:
    """Return a file's bytes cut at every 10 % of their length, and with bytes changed."""
    versions = [data[: len(data) * tenth // 10] for tenth in range(10)]
    for _ in range(60):
        changed = bytearray(data)
        for _ in range(rng.choice((1, 1, 1, 8))):
            changed[rng.randrange(len(data))] ^= rng.randrange(1, 256)
        versions.append(bytes(changed))
    return versions


def test_a_damaged_state_is_never_used(stopped, caplog):
    stopped.copy("stopped", "damaged")
    *_, older, newest = states(stopped, "damaged")
    data, step = newest.read_bytes(), read_tensors(older)["step"]
    previous, last = saved_bytes(read_tensors(older)), saved_bytes(read_tensors(newest))
    taken = []
    for version in damaged(data, random.Random(0)):
        newest.write_bytes(version)
        caplog.clear()
        state = load_training_state(stopped.folders("damaged")[0])
        if saved_bytes(state) == last:
            assert version != data[: len(version)]  # a change that no byte of the content has
        else:
            assert saved_bytes(state) == previous
            assert f"{newest}: damaged" in caplog.text
        taken.append(state["step"])
    assert taken[:10] == [step] * 10
    assert taken.count(step) > 50


def test_after_a_damaged_state_the_run_ends_with_the_same_bytes(stopped, caplog):
    stopped.copy("stopped", "cut")
    *_, older, newest = states(stopped, "cut")
    newest.write_bytes(newest.read_bytes()[:-200])
    with caplog.at_level(logging.INFO):
        stopped.run("cut", "--resume")
    assert f"{newest}: damaged" in caplog.text
    assert f"going on from {older}" in caplog.text
    stopped.expect_same("cut")


def test_with_every_state_damaged_the_run_starts_again(stopped, caplog):
    stopped.copy("stopped", "lost")
    for state in states(stopped, "lost"):
        state.write_bytes(b"no state")
    stopped.run("lost", "--resume")
    assert caplog.text.count("damaged") == len(states(stopped))
    stopped.expect_same("lost")


# ------------------------------------------------------------------ losses that are not finite


def test_a_loss_that_is_not_finite_names_its_batch_and_keeps_the_last_good_state(tmp_path, capsys):
    case = task(tmp_path, DROPOUT, rows=120)
    teacher = tmp_path / "teacher" / "pytorch_model.bin"
    good = teacher.read_bytes()
    # One word is poison, whose layer normalisation overflows, and one sentence has it.
    train = tmp_path / "SST-2" / "train.tsv"
    lines = train.read_text().splitlines()
    state = torch.load(teacher, weights_only=True)
    vocabulary = (tmp_path / "teacher" / "vocab.txt").read_text().split("\n")
    state["bert.embeddings.word_embeddings.weight"][vocabulary.index("##ly")] = torch.tensor(
        [3e38, -3e38] * 8)
    row = lines[30].split("\t")
    lines[30] = "\t".join(["lovelyly film ." if " " in cell else cell for cell in row])
    train.write_text("\n".join(lines) + "\n")
    case.run("whole")
    torch.save(state, teacher)
    message = error_line(capsys, case.module, *case.arguments("bad", "--eval_step", 1,
                                                              "--save_steps", 1))
    [folder] = case.folders("bad")
    last = max(int(path.stem.removeprefix("step_")) for path in states(case, "bad"))
    assert f"not finite at step {last + 1}, batch {last % 15 + 1} of pass 1" in message
    assert f"state of step {last} is kept" in message
    assert [line["step"] for line in read_log(folder)] == list(range(1, last + 1))
    # The state is good: with the cause mended the run ends as if nothing had been.
    teacher.write_bytes(good)
    case.run("bad", "--resume", "--eval_step", 1)
    assert (folder / "pytorch_model.bin").read_bytes() == (
        case.folders("whole")[0] / "pytorch_model.bin").read_bytes()


@pytest.mark.parametrize("name", ["general", "prediction", "finetune"])
def test_a_learning_rate_that_is_far_too_large_stops_and_writes_no_broken_model(
        cases, capsys, name):
    case = cases(name)
    rates = [1e30] * case.outputs
    message = error_line(capsys, case.module, *case.arguments(
        "far", "--learning_rate", *map(str, rates), "--warmup_proportion", "0"))
    assert "the loss is not finite at step " in message
    for folder in case.folders("far"):
        assert not (folder / "eval_results.json").exists()
        for file in folder.rglob("*.bin"):
            for tensor in torch.load(file, weights_only=True).values():
                assert torch.isfinite(tensor).all(), file


# ------------------------------------------------------------------ several processes


def close(first, second, tolerance: float) -> bool:
    """Say whether what two JSON files hold is the same but for a difference of its numbers."""
    if isinstance(first, dict):
        return first.keys() == second.keys() and all(
            close(value, second[key], tolerance) for key, value in first.items())
    if isinstance(first, list):
        return len(first) == len(second) and all(
            close(one, other, tolerance) for one, other in zip(first, second, strict=True))
    if isinstance(first, float):
        return abs(first - second) <= tolerance
    return first == second


SMALLER = {
    "general": partial(general, rows=400),
    "one general": partial(general, rows=400, students=1),
    "intermediate": partial(task, rows=60),
    "prediction": partial(task, rows=60, more=("--pred_distill",)),
    "joint": partial(task, rows=60, augmented=60, more=JOINT),
    "accumulating": partial(task, rows=60, more=("--gradient_accumulation_steps", 2)),
    "finetune": partial(finetune, rows=60),
}


@pytest.mark.parametrize("name", [
    pytest.param(name, marks=[pytest.mark.slow] if name != "general" else [])
    for name in SMALLER])
def test_two_processes_end_with_the_student_of_one(tmp_path, name):
    case = SMALLER[name](tmp_path, {})
    case.run("whole")
    process = kill.Process(case.torchrun("two"))
    assert process.end() == 0, process.output()
    for one, two in zip(case.folders("whole"), case.folders("two"), strict=True):
        torch.testing.assert_close(weights(two), weights(one), rtol=0, atol=1e-5)
        assert sorted(p.name for p in one.iterdir()) == sorted(p.name for p in two.iterdir())
        assert close(without_times(one), without_times(two), 1e-4)
        assert read_json(two / "args.json")["processes"] == 2


def kill_worker(process: kill.Process) -> None:
    """Kill the last of the processes that torchrun has started."""
    children = Path(f"/proc/{process.popen.pid}/task/{process.popen.pid}/children")
    os.kill(max(map(int, children.read_text().split())), signal.SIGKILL)


@pytest.fixture(scope="module")
def pair(tmp_path_factory) -> Case:
    """A case long enough to be killed by hand, and its run in two processes."""
    case = task(tmp_path_factory.mktemp("pair"), DROPOUT)
    process = kill.Process(case.torchrun("whole"))
    assert process.end() == 0, process.output()
    return case


def expect_same_student(case: Case, name: str) -> None:
    """Fail unless the student has the same bytes; logged means are sums over the processes."""
    [whole], [found] = case.folders("whole"), case.folders(name)
    assert (found / "pytorch_model.bin").read_bytes() == (whole / "pytorch_model.bin").read_bytes()
    assert close(without_times(whole), without_times(found), 1e-6)
    assert close(read_json(whole / "eval_results.json"), read_json(found / "eval_results.json"),
                 1e-6)


@pytest.mark.parametrize("restarts", [1, pytest.param(0, marks=pytest.mark.slow)])
def test_a_run_that_lost_a_process_ends_and_goes_on_by_torchrun_or_by_resume(pair, restarts):
    pair.remove("killed")
    process = kill.Process(pair.torchrun("killed", restarts=restarts))
    assert process.wait_until(lambda log: log.count("state saved") > 3), process.output()
    kill_worker(process)
    if not restarts:
        assert process.end() != 0
        assert not (pair.folders("killed")[0] / "eval_results.json").exists()
        process = kill.Process(pair.torchrun("killed", "--resume"))
    assert process.end() == 0, process.output()
    assert "going on from" in process.output()
    expect_same_student(pair, "killed")


@pytest.mark.slow
def test_sigterm_to_torchrun_saves_a_state(pair):
    process = kill.Process(pair.torchrun("signalled", "--save_steps", 0))
    assert process.wait_until(lambda log: "step 15 " in log), process.output()
    process.send(signal.SIGTERM)
    assert process.end() != 0
    assert "stopped by SIGTERM; this continues: torchrun" in process.output()
    assert len(states(pair, "signalled")) == 1
    again = kill.Process(pair.torchrun("signalled", "--resume"))
    assert again.end() == 0, again.output()
    expect_same_student(pair, "signalled")


def test_the_best_score_changes_in_the_runs_that_are_killed(cases):
    """Else it would not show whether a resumed run knows it."""
    for name in ("prediction", "finetune"):
        [folder] = cases(name).folders("whole")
        scores = [line["metrics"]["acc"] for line in read_log(folder)]
        assert max(scores[1:]) > scores[0]


# ------------------------------------------------------------------ what a resumed run must not do


def test_a_finished_run_is_not_trained_again_whatever_a_kill_left_of_its_states(tmp_path, caplog):
    case = task(tmp_path, {}, rows=40)
    case.run("out")
    before = {p: p.stat().st_mtime_ns for p in (tmp_path / "out").rglob("*")}
    (tmp_path / "out" / "training_state").mkdir()
    with caplog.at_level(logging.INFO):
        case.run("out", "--resume")
    assert "nothing to resume" in caplog.text
    assert {p: p.stat().st_mtime_ns for p in (tmp_path / "out").rglob("*")} == before


def test_rows_that_came_or_went_since_are_not_resumed_with(stopped, capsys):
    stopped.copy("stopped", "grown")
    train = stopped.root / "SST-2" / "train.tsv"
    rows = train.read_text()
    train.write_text("".join(rows.splitlines(keepends=True)[:200]))
    try:
        message = error_line(capsys, task_distill, *stopped.arguments("grown", "--resume"))
    finally:
        train.write_text(rows)
    assert "100 steps in all" in message and "begun with 200" in message


def test_the_folder_of_another_student_is_not_resumed_into(tmp_path, capsys):
    case = task(tmp_path, {}, rows=40)
    case.run("out")
    args = tmp_path / "out" / "args.json"
    args.write_text(args.read_text().replace('"student": "', '"student": "another/'))
    message = error_line(capsys, task_distill, *case.arguments("out", "--resume"))
    assert "is the folder of student another/" in message


def test_states_come_as_often_as_asked_for_beside_larger_batches(tmp_path, caplog):
    case = general(tmp_path, {}, rows=320)  # 5 steps a pass; every second one ends both students'
    case.flags[case.flags.index("--save_steps") + 1] = 3
    with caplog.at_level(logging.INFO):
        case.run("out")
    saved = [int(r.message.split()[1][:-1]) for r in caplog.records if "state saved" in r.message]
    assert saved == [4, 7, 10, 14]


# ------------------------------------------------------------------ the disk is full


@pytest.mark.parametrize("writes", [0, 1, 6])
def test_a_disk_that_fills_up_in_any_write_of_tensors_costs_nothing(
        tmp_path, capsys, monkeypatch, writes):
    """Whichever state or model it is: it is written half, then the disk is full."""
    case = task(tmp_path, DROPOUT, more=("--pred_distill",), rows=80)
    case.run("whole")
    written = 0

    def write_tensors(value, path: Path, write=checkpoint.write_tensors) -> None:
        nonlocal written
        write(value, path)
        if written == writes:
            os.truncate(path, path.stat().st_size // 2)
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path))
        written += 1

    monkeypatch.setattr(checkpoint, "write_tensors", write_tensors)
    message = error_line(capsys, case.module, *case.arguments("quota"))
    assert written == writes
    assert "the disk is full" in message and "--resume" in message
    monkeypatch.undo()
    [folder] = case.folders("quota")
    for state in states(case, "quota"):
        read_tensors(state)
    if (folder / "pytorch_model.bin").exists():
        load_state(folder)
    case.run("quota", "--resume")
    case.expect_same("quota")


def test_a_damaged_model_is_refused_with_a_clear_line_or_read_as_it_was(tmp_path):
    make_model(tmp_path, labels=("0", "1"))
    path = tmp_path / "pytorch_model.bin"
    data, whole, refused = path.read_bytes(), load_state(tmp_path), 0
    for version in damaged(data, random.Random(0)):
        path.write_bytes(version)
        try:
            state = load_state(tmp_path)
        except UserError as error:
            assert f"{path}: damaged, or not a file of weights" in str(error)
            assert "\n" not in str(error)
            refused += 1
            continue
        assert len(version) == len(data)  # cut files are always refused
        assert same_weights(state, whole)
    assert refused > 50

"""The driver: what it would run parses and connects, and mistakes end it before it starts."""

import json
import os
import re
import shlex
import subprocess
import sys
from collections.abc import Callable
from functools import cache
from pathlib import Path

import pytest

from driver import checks
from driver.steps import Step, read_plan

REPO = Path(__file__).resolve().parent.parent
RUNS = [("--profile", profile, "--recipe", recipe)
        for profile in ("full", "demo", "minilm") for recipe in ("original", "paper")]
STAGES = """environment inputs glove glue wikipedia models pregenerate general augment repair
teachers distill evaluate smart_init smart_direct smart_general smart_distill smart_evaluate
baselines prune quantize latency export report""".split()


def drive(*arguments: str, shell: str = "bash", **settings: str) -> subprocess.CompletedProcess:
    """Run the driver with the test's own interpreter; `settings` go into its environment."""
    return subprocess.run(
        [shell, str(REPO / "reproduction.sh"), *arguments], text=True, capture_output=True,
        env={**os.environ, "PYTHON": sys.executable, **settings}, stdin=subprocess.DEVNULL,
        check=False)


def dry_run(*arguments: str, **settings: str) -> list[list[str]]:
    """Return the commands of a dry run, each as a list of words."""
    result = drive(*arguments, "--dry-run", **settings)
    assert result.returncode == 0, result.stderr
    lines = [line for line in result.stdout.splitlines() if not line.startswith("#")]
    return [shlex.split(line) for line in lines]


@pytest.fixture(scope="module")
def planned(tmp_path_factory) -> Callable[..., list[Step]]:
    """Return the steps of a run in folders below `d`, which has nothing yet."""
    python = tmp_path_factory.mktemp("python") / "cat"
    python.write_text("#!/bin/sh\nexec cat\n")  # in place of driver/steps.py
    python.chmod(0o755)
    folders = {f"{name}_DIR": f"d/{name.lower()}" for name in ("DATA", "WORK", "MODELS", "RESULTS")}

    @cache
    def plan(*arguments: str) -> list[Step]:
        result = drive(*arguments, "--dry-run", **{**folders, "PYTHON": str(python)})
        assert result.returncode == 0, result.stderr
        return read_plan(result.stdout)[1]

    return plan


@pytest.fixture
def folders(tmp_path) -> dict[str, str]:
    """Settings that keep a run inside the test's folder."""
    names = {"DATA_DIR": "data", "MODELS_DIR": "models", "RESULTS_DIR": "results"}
    return {setting: str(tmp_path / name) for setting, name in names.items()}


def is_script(command: list[str]) -> bool:
    return command[0] == "python" and command[1].endswith(".py")


def given(command: list[str]) -> dict:
    """Parse a command and keep only the flags that stand in it."""
    values = vars(checks.parse(command))
    return {word[2:]: values[word[2:]] for word in command if word.startswith("--")}


def each_student(command: list[str]) -> list[dict]:
    """Return what `given` does for each student of a command as if it were the only one."""
    flags = given(command)
    if command[1] not in ("general_distill.py", "task_distill.py"):
        return [flags]

    def own(value: object, number: int) -> object:
        return value[min(number, len(value) - 1)] if isinstance(value, list) else value

    return [{name: own(value, number) for name, value in flags.items()}
            for number in range(len(flags["student_model"]))]


# ------------------------------------------------------------------ commands



def connects(path: str, written: list[str]) -> bool:
    """Whether a path lies in what was written before, or the other way round."""
    return any(f"{path}/".startswith(f"{known}/") or known.startswith(f"{path}/")
               for known in written)


@pytest.mark.parametrize("arguments", RUNS, ids=" ".join)
def test_every_command_parses_and_every_path_in_it_was_written_by_an_earlier_one(
    planned, arguments
):
    steps = planned(*arguments)
    assert sum(is_script(step.command) for step in steps) > 40
    assert not list(checks.problems([step.command for step in steps]))
    assert len({step.name for step in steps}) == len(steps)
    written = ["d/data/enwiki-20251101-pages-articles-multistream.xml.bz2",
               "d/data/enwiki-sample-pages-articles.xml.bz2"]  # the user brings it
    for step in steps:
        written += step.outputs
        for word in step.command + (step.reads if step.stage != "models" else ()):
            path = (word.partition("=")[2] or word).removesuffix("/").removesuffix("-{task}")
            assert not path.startswith("d/") or connects(path, written), f"{path}: {step.name}"
            assert not path.endswith("_config") or path.startswith("d/") or (REPO / path).is_dir()


def test_the_full_run_contains_every_command_of_the_original(shared):
    text = (shared / "seeds" / "000_a2dfa4ecbd575514.txt").read_text(encoding="utf-8")
    planned = [command for command in dry_run(DATA_DIR="data") if is_script(command)]
    corrected = {"json_wiki": "data/json_wiki", "wiki_for_bert.txt": "data/wiki_for_bert.txt"}
    checked = 0
    for line in re.findall(r"^python (\w+\.py .*)$", text, re.M):
        words = ["python", *(corrected.get(word, word) for word in shlex.split(line))]
        if len(words) == 2:  # no flags: which models and tasks is the driver's business
            continue
        (wanted,) = each_student(words)
        wanted.pop("gradient_accumulation_steps", None)  # the step does not depend on it
        if wanted.get("do_eval") or wanted.get("learning_rate") == 1.25e-5:
            wanted.pop("output_dir")  # all of them went to one folder
        wanted = {key: str(value).lower() for key, value in wanted.items()}
        same = [c for c in planned if c[1] == words[1] for flags in each_student(c)
                if wanted.items() <= {k: str(v).lower() for k, v in flags.items()}.items()]
        assert same, f"not in the full run: {shlex.join(words)}"
        checked += 1
    assert checked > 50


def test_the_papers_recipe_leaves_epochs_to_the_task_tries_rates_and_keeps_the_originals_results(
    planned,
):
    steps = planned(*RUNS[1])
    training = [given(s.command) for s in steps
                if s.command[1] == "task_distill.py" and "--do_eval" not in s.command]
    intermediate = [flags for flags in training if "pred_distill" not in flags]
    assert not {"num_train_epochs", "max_seq_length"} & {name for f in intermediate for name in f}
    prediction = [flags for flags in training if "pred_distill" in flags]
    assert {(*f["learning_rate"], *f["train_batch_size"], f["sweep"]) for f in prediction} == {
        (1e-5, 2e-5, 3e-5, 16, 32, True)}
    outputs = {output for step in steps for output in step.outputs
               if step.stage not in ("glue", "models", "repair")}
    originals = {output for step in planned(*RUNS[0]) for output in step.outputs}
    assert outputs & originals == {step.outputs[0] for step in steps if step.stage in (
        "glove", "wikipedia", "pregenerate")}


def test_students_with_the_same_settings_share_the_teachers_pass(planned):
    passes = [[step.outputs for step in planned(*run) if step.stage == "general"]
              for run in RUNS[:2]]
    folder = "d/models/{}distilled_tinybert_"
    assert passes[0] == [tuple(folder.format("") + name for name in ("4l", "4l_low_lr", "6l"))]
    assert passes[1] == [tuple(folder.format("paper/") + name for name in ("4l", "6l"))]
    apart = dry_run("--only", "general", GENERAL_BATCH_SIZE_tinybert_6l="100")
    assert [len(given(c)["student_model"]) for c in apart] == [2, 1]


def test_students_are_made_smaller_measured_and_timed_as_the_settings_say():
    commands = dry_run("--from", "prune", TASKS="RTE SST-2", PRUNE_CONSTRAINTS_rte="0.2")
    students = ["distilled_tinybert_4l_{}", "distilled_tinybert_4l_low_lr_{}",
                "distilled_tinybert_6l_{}", "tinybert_6l_smart_init_direct_{}_tsd",
                "tinybert_6l_smart_init_{}"]
    smaller = [f"models/{student.format(task)}_{kind}" for task, constraints in (
        ("rte", ["0.2"]), ("sst2", ["0.1", "0.3"])) for student in students for kind in (
        *(f"pruned_{constraint}" for constraint in constraints),
        *(f"quantized_{method}" for method in ("fp32", "int8-dynamic", "int8-static")))]
    made = [str(given(c)["output_dir"]) for c in commands if c[1].endswith(("main.py", "ize.py"))]
    evaluations = [given(c) for c in commands if c[1] == "task_distill.py"]
    assert sorted(made) == sorted(smaller)
    assert sorted(m for flags in evaluations for m in flags["student_model"]) == sorted(smaller)
    assert {flags["precision"] for flags in evaluations} == {"fp32"}
    (latency,) = (given(c) for c in commands if c[1] == "benchmarks/inference.py")
    assert {model.partition("=")[2] for model in latency["models"]} == {
        "models/final_sst2_teacher", *(f"models/{student.format('sst2')}" for student in students),
        *(model for model in smaller if "_sst2_" in model)}
    none = dry_run("--from", "prune", PRUNE_STUDENTS="", QUANTIZE_STUDENTS="of_another_run",
                   EXPORT_STUDENTS="")
    assert [c[1] for c in none] == ["report.py"]


def test_a_read_only_glue_folder_is_copied_and_never_written(tmp_path):
    task = tmp_path / "glue_data" / "RTE"
    task.mkdir(parents=True)
    (task / "train.tsv").touch()
    commands = dry_run("--profile", "minilm", "--only", "glue", DATA_DIR=str(tmp_path), TASKS="RTE")
    assert [(*c[:2], c[-3]) for c in commands] == [
        ("find", str(task), "data/minilm/glue_data/RTE/")]


# ------------------------------------------------------------------ options and settings


def test_the_list_names_the_stages_in_order():
    lines = drive("--list").stdout.splitlines()
    assert [line.split()[0] for line in lines] == STAGES
    assert max(map(len, lines)) <= 80


def test_demo_and_seed_are_other_names_of_a_profile_and_a_recipe():
    assert dry_run("--demo") == dry_run("--profile", "demo", "--recipe", "seed")


@pytest.mark.parametrize(("given", "used"), [
    ("/new/", "/new"), ("./new//here/", "new/here"), ("../a b/.", "../a b"), ("/", "/"),
])
def test_a_folder_may_be_written_with_slashes_and_dots_and_need_not_be_there(given, used):
    [command] = dry_run("--demo", "--only", "inputs", DATA_DIR=given)
    assert command[-2:] == ["--output_dir", used]


def test_a_container_without_a_home_or_a_name_for_its_user_is_enough():
    result = drive("--demo", "--dry-run", "--only", "glue", HOME="")
    assert result.returncode == 0 and not result.stderr


def test_the_environment_wins_over_profile_and_recipe():
    settings = {"TASKS": "RTE", "INTERMEDIATE_EPOCHS": "7", "MODELS_DIR": "elsewhere",
                "DATA_DIR": "my data", "PREDICTION_BATCH_SIZES": "",
                "PREDICTION_LEARNING_RATES": "1e-5 2e-5"}
    commands = [given(c) for c in dry_run("--recipe", "paper", "--only", "distill", **settings)]
    assert {flags["task_name"] for flags in commands} == {"RTE"}
    assert commands[0]["num_train_epochs"] == 7.0
    assert commands[1]["learning_rate"] == [1e-5, 2e-5] and commands[1]["sweep"]
    assert commands[0]["data_dir"] == "my data/glue_data_paper/RTE"
    assert all(p.startswith("elsewhere/") for flags in commands for p in flags["output_dir"])


def test_a_setting_for_one_task_wins_and_what_is_harmless_is_forgiven(tmp_path):
    profile = tmp_path / "mine.env"
    profile.write_bytes(b'TASKS=" rte, sst2"\r\nAUGMENTATION_N=" 3"\r\nAUGMENTATION_N_sst2=5\r\n'
                        b"NEEDS_GPU=No\r\n")
    commands = dry_run("--profile", str(profile), "--only", "augment")
    assert {given(c)["task_name"]: given(c)["N"] for c in commands} == {"RTE": 3, "SST-2": 5}


@pytest.mark.parametrize(
    ("arguments", "settings", "message"),
    [
        ("--profile nothing", {}, "no profile nothing; expected a file or one of: chinese.env"),
        ("--only trainig", {}, "no stage trainig; expected one of: environment"),
        ("--demo --recipe mine", {}, "--recipe mine: expected original or paper"),
        ("--fast", {}, "unknown option --fast"),
        ("--from", {}, "--from needs a value"),
        ("--profile minilm --dry-run --only smart_general", {}, "no stage smart_general"),
        ("", {"NEEDS_GPU": "no"}, "Get one from https://meta.wikimedia.org/wiki/Data_dump_torrents"),
        ("", {"GPUS": "many"}, "GPUS=many: expected a number"),
        ("", {"PREDICTION_AUGMENTED_rte": "ja"}, "PREDICTION_AUGMENTED_rte=ja: expected yes or no"),
        ("", {"TASKS": "RTE SST"}, "TASKS: SST; expected some of:"),
        ("", {"STUDENTS": " "}, "TASKS, STUDENTS: expected one at least"),
        ("", {"STUDENTS": "mine"}, "student mine: no STUDENT_CONFIG_mine=FOLDER/config.json"),
        ("", {"BASELINES": "clean:tinybert_4l"}, "expected scratch:, general: or smart:"),
        ("", {"BASELINES": "smart:tinybert_4l"}, "this run makes no such model of tinybert_4l"),
        ("", {"GENERAL_BATCH_SIZE": "0"}, "GENERAL_BATCH_SIZE=0: expected a number"),
        ("", {"TASKS": "RTE,rte"}, "TASKS: RTE stands there twice"),
        ("", {"STUDENTS": "../tinybert_4l"}, "student ../tinybert_4l: expected a name"),
        ("", {"LATENCY_TASK": "SST"}, "LATENCY_TASK=SST: expected one of"),
        ("", {"DATA_DIR": ""}, "DATA_DIR=: expected a folder"),
        ("", {"RESULTS_DIR": "~/results"}, "RESULTS_DIR=~/results: expected a folder"),
        ("", {"BASE_MODEL_NAME": ""}, "BASE_MODEL_NAME=: expected the name of a folder"),
        ("", {"MODEL_SOURCE": "web"}, "MODEL_SOURCE=web: expected hub, demo, minilm or given"),
        ("--profile {typo}", {}, "no setting is called TEACHER_EPOCH;"),
        ("--profile {other}", {}, "TEACHER_EPOCHS_ret: ret is neither a task nor a student"),
    ],
)
def test_a_mistake_is_one_line_and_nothing_runs(tmp_path, folders, arguments, settings, message):
    (tmp_path / "typo").write_text("TEACHER_EPOCH=3\n")
    (tmp_path / "other").write_text("TEACHER_EPOCHS_ret=3\n")
    words = arguments.format(typo=tmp_path / "typo", other=tmp_path / "other").split()
    result = drive(*words, **{**folders, **settings})
    assert result.returncode == 2
    assert message in result.stderr
    assert len(result.stderr.splitlines()) == 1
    assert not result.stdout
    assert {path.name for path in tmp_path.iterdir()} == {"typo", "other"}


@pytest.mark.parametrize("mode", ["--demo", "--dry-run"])
def test_what_a_script_would_refuse_is_named_before_the_first_stage(folders, tmp_path, mode):
    settings = {
        "TEACHER_EPOCHS_rte": "three", "INTERMEDIATE_LEARNING_RATE": "-1", "MASKED_LM_PROB": "3",
        "QUANTIZE_STUDENTS": "all", "QUANTIZE_METHODS": "int8-static", "QUANTIZE_FORMAT": "torch",
        "PRUNE_STUDENTS": "all", "PRUNE_CONSTRAINTS": "7"}
    result = drive("--demo", mode, **folders, **settings)
    assert result.returncode == 2
    for part in ("finetune_teacher.py: argument --num_train_epochs: invalid float value: 'three'",
                 "task_distill.py: --learning_rate -1.0", "--masked_lm_prob 3.0: expected a share",
                 "quantize.py: --method int8-static --format torch", "src/main.py: --constraint 7"):
        assert part in result.stderr
    assert not list(tmp_path.iterdir())


def test_another_shell_is_told_to_be_bash():
    result = drive("--list", shell="sh")
    assert result.returncode == 2 or result.stdout.startswith("environment")
    assert len(result.stderr.splitlines()) == (result.returncode == 2)


def test_python_prints_an_interpreter_with_the_packages_and_nothing_else():
    assert drive("--python").stdout.splitlines() == [sys.executable]


# ------------------------------------------------------------------ running


def test_the_command_that_continues_repeats_profile_and_settings(folders, tmp_path):
    settings = {"AUGMENTATION_N_sst2": "5", "GENERAL_EPOCHS_my_student": "2", "DATA_DIRECTION": "x",
                "WIKI_DUMP_HELP": "two words"}
    result = drive("--recipe", "paper", "--only", "wikipedia", **folders, **settings)
    assert result.returncode == 1
    assert "Stage wikipedia stopped: step extract, exit code" in result.stderr
    assert f"{tmp_path}/results/paper/logs/extract.log" in result.stderr
    words = shlex.split(result.stderr.splitlines()[-1])
    assert words[-6:] == ["bash", "reproduction.sh", "--recipe", "paper", "--from", "wikipedia"]
    assert {f"DATA_DIR={tmp_path}/data", "AUGMENTATION_N_sst2=5", "GENERAL_EPOCHS_my_student=2",
            "WIKI_DUMP_HELP=two words"} <= set(words)
    assert "DATA_DIRECTION" not in result.stderr


SMALL = {
    "TASKS": "CoLA", "STUDENTS": "tinybert_4l", "BASELINES": "", "MLM_STEPS": "10",
    "HUB_TEACHER_EPOCHS": "0.1", "TEACHER_EPOCHS": "0.1", "PREGENERATE_EPOCHS": "1",
    "GENERAL_EPOCHS": "0.02", "GENERAL_EPOCHS_tinybert_6l_smart_init": "0.02",
    "AUGMENTATION_ROWS": "40", "AUGMENTATION_N": "1", "INTERMEDIATE_EPOCHS": "1",
    "PREDICTION_EPOCHS": "2", "MLM_SHALLOW_STEPS": "10",
}


@pytest.mark.slow
def test_a_small_demo_runs_to_the_table_and_a_second_call_skips_everything(folders, tmp_path):
    settings = {**SMALL, **folders}
    assert drive("--demo", "--only", "inputs", **settings).returncode == 0
    result = drive("--demo", **settings)
    assert result.returncode == 0, result.stderr
    assert "1 finished earlier" in result.stdout
    results = tmp_path / "results"
    report = json.loads((results / "results.json").read_text())
    names = {score["name"] for score in report["scores"] if score["task"] == "CoLA"}
    assert {"teacher", "tinybert_4l", "tinybert_6l_smart_init", "tinybert_4l, int8-dynamic ONNX",
            "tinybert_4l, K-prune 30 % removed"} <= names
    assert len(report["speeds"]) == 4
    for picture in ("scores.png", "loss_curves.png", "tradeoff.png"):
        assert (results / picture).read_bytes().startswith(b"\x89PNG")
    exported = tmp_path / "models" / "export"
    for model in ("distilled_tinybert_4l_cola", "distilled_tinybert_4l_cola_pruned_0.3"):
        assert (exported / model / "onnx" / "model_quantized.onnx").is_file()
        assert "matthews_correlation" in (exported / model / "README.md").read_text()

    # The second call has nothing to do, with however many threads, and prints the table again.
    again = drive("--demo", **settings, OMP_NUM_THREADS="2", GOMP_SPINCOUNT="1")
    assert again.returncode == 0
    assert not re.search(r"\d:\d\d:\d\d$", again.stdout.partition("Done in")[0], re.M)
    assert "majority class" in again.stdout
    assert f"Results: {results}/results.md, pictures beside it." in again.stdout

    # Changed settings run again what depends on them, and only that.
    smaller = {"K-prune/src/main.py", "quantize.py", "benchmarks/inference.py", "export_model.py",
               "report.py"}
    for changed, scripts in (
        ({"PREDICTION_EPOCHS": "1"}, {"task_distill.py", *smaller}),
        ({"PRUNE_MU": "32"}, {"task_distill.py", *smaller} - {"quantize.py"}),
        ({"GENERAL_EPOCHS": "0.03"}, {"general_distill.py", "task_distill.py", *smaller}),
    ):
        commands = dry_run("--demo", **{**settings, **changed})
        assert {command[1] for command in commands} == scripts

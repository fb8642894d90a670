"""The driver: what it would run parses and connects, and mistakes end it before it starts."""

import argparse
import json
import os
import re
import shlex
import subprocess
import sys
from functools import cache
from pathlib import Path

import pytest

from driver import checks

REPO = Path(__file__).resolve().parent.parent
RUNS = [("--profile", profile, "--recipe", recipe)
        for profile in ("full", "demo", "minilm") for recipe in ("original", "paper")]  # fmt: skip
STAGES = """environment inputs glove glue wikipedia models pregenerate general augment repair
teachers distill evaluate smart_init smart_direct smart_general smart_distill smart_evaluate
baselines prune quantize latency report""".split()


def drive(*arguments: str, shell: str = "bash", **settings: str) -> subprocess.CompletedProcess:
    """Run the driver with the test's own interpreter; `settings` go into its environment."""
    return subprocess.run(
        [shell, str(REPO / "reproduction.sh"), *arguments], text=True, capture_output=True,
        env={**os.environ, "PYTHON": sys.executable, **settings}, stdin=subprocess.DEVNULL,
        check=False)  # fmt: skip


def dry_run(*arguments: str, **settings: str) -> list[list[str]]:
    """Return the commands of a dry run, each as a list of words."""
    result = drive(*arguments, "--dry-run", **settings)
    assert result.returncode == 0, result.stderr
    lines = [line for line in result.stdout.splitlines() if not line.startswith("#")]
    return [shlex.split(line) for line in lines]


@cache
def whole_run(*arguments: str) -> list[list[str]]:
    """Return the commands of a run that has nothing yet, in folders that are not there."""
    return dry_run(*arguments, DATA_DIR="d/data", MODELS_DIR="models", RESULTS_DIR="results")


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
            for number in range(len(flags["student_model"]))]  # fmt: skip


# ------------------------------------------------------------------ commands

# What each script reads and writes, as functions of its parsed arguments.
READS = {
    "demo/make_inputs.py": lambda a: [],
    "pretrain_bert.py": lambda a: [a.train_corpus, a.config or a.bert_model],
    "download_glue.py": lambda a: [],
    "prepare_data.py": lambda a: [a.input_dir],
    "get_bert_models.py": lambda a: [m for m in hub_sources(a) if Path(m).parts[0] not in (
        "google-bert", "JeremiahZ", "sentence-transformers")],
    "pregenerate_training_data.py": lambda a: [a.train_corpus, a.bert_model],
    "general_distill.py": lambda a: [a.pregenerated_data, a.teacher_model, *a.student_model],
    "data_augmentation.py": lambda a: [a.pretrained_bert_model, *(
        a.compose_vectors or [a.glove_embs, f"{a.glue_dir}/{a.task_name}/train.tsv"])],
    "fix_teacher_layers.py": lambda a: a.models,
    "finetune_teacher.py": lambda a: [a.data_dir, a.bert_model, *filter(None, [a.vocab_dir])],
    "tinybert_6_from_bert.py": lambda a: [a.bert_model],
    "task_distill.py": lambda a: [
        a.data_dir, *a.student_model, *([] if a.do_eval else [a.teacher_model]),
        *([f"{a.data_dir}/train_aug.tsv"] if a.aug_train else [])],
    "K-prune/src/main.py": lambda a: [a.model_name, a.ckpt_dir, a.data_dir],
    "quantize.py": lambda a: [a.model, a.data_dir],
    "benchmarks/inference.py": lambda a: [
        a.glue_dir, a.vocab_dir, *(model.partition("=")[2] for model in a.models)],
    "report.py": lambda a: [a.models_dir, f"{a.results_dir}/eval", a.glue_dir],
}  # fmt: skip
WRITES = {
    "download_glue.py": lambda a: [f"{a.data_dir}/{task}" for task in a.tasks.split(",")],
    "prepare_data.py": lambda a: [a.output_file],
    "get_bert_models.py": lambda a: [f"{a.output_dir}/{a.base_name}", *(
        [] if a.base_only else [f"{a.output_dir}/{a.base_name}-{t}" for t in a.tasks.split(",")])],
    "data_augmentation.py": lambda a: [
        a.glove_embs if a.compose_vectors else f"{a.glue_dir}/{a.task_name}/train_aug.tsv"],
    "fix_teacher_layers.py": lambda a: a.models,
    "general_distill.py": lambda a: a.output_dir,
    "task_distill.py": lambda a: a.output_dir,
    "report.py": lambda a: [a.results_dir],
}  # fmt: skip


def hub_sources(args: argparse.Namespace) -> list[str]:
    teachers = [] if args.base_only else [args.teachers.format(task=args.tasks)]
    return [args.base_model, *teachers]


def reads_and_writes(command: list[str]) -> tuple[list[str], list[str]]:
    """Return the paths that a command reads and those that it writes."""
    if is_script(command):
        arguments = checks.parse(command)
        writes = WRITES.get(command[1], lambda a: [a.output_dir])(arguments)
        return [str(p) for p in READS[command[1]](arguments)], [str(p) for p in writes]
    if command[:3] == ["python", "-m", "wikiextractor.WikiExtractor"]:
        return [command[3]], [command[command.index("-o") + 1]]
    if command[:3] == ["python", "-m", "pip"]:
        return [], [command[command.index("--target") + 1]]
    if command[:2] == ["python", "-c"]:
        return [], [command[2].split("'")[-2]]  # extract_zip(..., 'folder')
    assert command[0] in ("mv", "find"), command
    return [command[1]], [command[-1 if command[0] == "mv" else -2]]


def connects(path: str, written: list[str]) -> bool:
    """Whether a path lies in what was written before, or the other way round."""
    known = [*written, *(str(p.relative_to(REPO)) for p in REPO.glob("*/*_config")),
             "tinybert_4l_config", "tinybert_6l_config"]  # fmt: skip
    path = path.rstrip("/")
    return any(f"{path}/".startswith(f"{k.rstrip('/')}/") or k.startswith(f"{path}/")
               for k in known)  # fmt: skip


@pytest.mark.parametrize("arguments", RUNS, ids=" ".join)
def test_every_command_parses_and_every_path_that_it_reads_was_written_by_an_earlier_one(arguments):
    commands = whole_run(*arguments)
    assert sum(map(is_script, commands)) > 40
    assert not list(checks.problems(commands))
    written = ["d/data/enwiki-20251101-pages-articles-multistream.xml.bz2",
               "data/enwiki-sample-pages-articles.xml.bz2",
               "d/data/enwiki-sample-pages-articles.xml.bz2"]  # fmt: skip
    for command in commands:
        reads, writes = reads_and_writes(command)
        for path in reads:
            assert connects(path, written), f"{path}: nobody wrote it for {shlex.join(command)}"
        written += writes


def test_the_full_run_contains_every_command_of_the_original(shared):
    text = (shared / "seeds" / "000_a2dfa4ecbd575514.txt").read_text(encoding="utf-8")
    ours = [command for command in dry_run(DATA_DIR="data") if is_script(command)]
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
        same = [c for c in ours if c[1] == words[1] for flags in each_student(c)
                if wanted.items() <= {k: str(v).lower() for k, v in flags.items()}.items()]
        assert same, f"not in the full run: {shlex.join(words)}"
        checked += 1
    assert checked > 50


def test_the_papers_recipe_leaves_epochs_to_the_task_tries_rates_and_keeps_the_originals_results():
    commands = [c for c in whole_run(*RUNS[1]) if is_script(c)]
    training = [given(c) for c in commands if c[1] == "task_distill.py" and "--do_eval" not in c]
    intermediate = [flags for flags in training if "pred_distill" not in flags]
    assert not {"num_train_epochs", "max_seq_length"} & {name for f in intermediate for name in f}
    prediction = [flags for flags in training if "pred_distill" in flags]
    assert {(*f["learning_rate"], *f["train_batch_size"], f["sweep"]) for f in prediction} == {
        (1e-5, 2e-5, 3e-5, 16, 32, True)}  # fmt: skip
    assert {given(c)["N"] for c in commands if c[1] == "data_augmentation.py"} == {20}
    general = [f for c in commands if c[1] == "general_distill.py" for f in each_student(c)]
    assert {(flags["train_batch_size"], flags["learning_rate"]) for flags in general} == {
        (256, 1e-4)}  # fmt: skip
    outputs = {p for c in commands if c[1] not in ("get_bert_models.py", "fix_teacher_layers.py")
               for p in reads_and_writes(c)[1] if p.startswith(("models/", "results/"))}
    assert outputs
    assert all(p.split("/")[1] == "paper" for p in outputs)


def test_students_with_the_same_settings_share_the_teachers_pass():
    students = [[given(c)["student_model"] for c in whole_run(*run) if c[1] == "general_distill.py"]
                for run in RUNS[:2]]  # fmt: skip
    smart = ["models{}/tinybert_6l_smart_init_direct_base"]
    assert students[0] == [["tinybert_4l_config", "tinybert_4l_config", "tinybert_6l_config"],
                           [smart[0].format("")]]  # fmt: skip
    assert students[1] == [["tinybert_4l_config", "tinybert_6l_config"],
                           [smart[0].format("/paper")]]  # fmt: skip
    apart = dry_run("--only", "general", GENERAL_BATCH_SIZE_tinybert_6l="100")
    assert [len(given(c)["student_model"]) for c in apart] == [2, 1]


def test_students_are_made_smaller_measured_and_timed_as_the_settings_say():
    commands = dry_run("--from", "prune", TASKS="RTE SST-2", PRUNE_CONSTRAINTS_rte="0.2")
    pruned = [given(c) for c in commands if c[1].startswith("K-prune")]
    students = ["distilled_tinybert_4l", "distilled_tinybert_4l_low_lr", "distilled_tinybert_6l",
                "tinybert_6l_smart_init_direct", "tinybert_6l_smart_init"]
    finals = {task: [f"models/{name}_{task}{'_tsd' * name.endswith('direct')}" for name in students]
              for task in ("rte", "sst2")}
    assert [(f["ckpt_dir"], f["constraint"]) for f in pruned] == [
        *((folder, 0.2) for folder in finals["rte"]),
        *((folder, share) for folder in finals["sst2"] for share in (0.1, 0.3))]
    made = [given(c) for c in commands if c[1] == "quantize.py"]
    assert [(f["model"], f["method"]) for f in made] == [
        (folder, method) for task in finals for folder in finals[task]
        for method in ("fp32", "int8-dynamic", "int8-static")]
    outputs = [str(flags["output_dir"]) for flags in pruned + made]
    assert len(set(outputs)) == len(outputs)
    evaluations = [given(c) for c in commands if c[1] == "task_distill.py"]
    assert {flags["precision"] for flags in evaluations} == {"fp32"}
    assert sorted(m for flags in evaluations for m in flags["student_model"]) == sorted(outputs)
    (latency,) = (given(c) for c in commands if c[1] == "benchmarks/inference.py")
    timed = [model.partition("=")[2] for model in latency["models"]]
    assert latency["lengths"] == ["SST-2"]
    assert sorted(timed) == sorted(["models/final_sst2_teacher", *finals["sst2"],
                                    *(path for path in outputs if "_sst2_" in path)])
    none = dry_run("--from", "prune", PRUNE_STUDENTS="", QUANTIZE_STUDENTS="of_another_run")
    assert [c[1] for c in none] == ["report.py"]


def test_a_read_only_glue_folder_is_copied_and_never_written(tmp_path):
    task = tmp_path / "glue_data" / "RTE"
    task.mkdir(parents=True)
    (task / "train.tsv").write_text("index\tsentence1\tsentence2\tlabel\n")
    commands = dry_run("--profile", "minilm", DATA_DIR=str(tmp_path), TASKS="RTE")
    copies = [command for command in commands if command[0] == "find"]
    assert [command[-2] for command in copies] == ["data/minilm/glue_data/RTE/"]
    written = [path for command in commands for path in reads_and_writes(command)[1]]
    assert not [path for path in written if path.startswith(str(tmp_path))]


def test_with_several_gpus_training_runs_under_torchrun():
    launcher = "-m torch.distributed.run --standalone --max-restarts 3 --nproc_per_node 4".split()
    one, four = dry_run("--demo"), dry_run("--demo", GPUS="4")
    shared = {"general_distill.py", "task_distill.py", "finetune_teacher.py",
              "data_augmentation.py"}
    for alone, spread in zip(one, four, strict=True):
        if alone[1] in shared and "--do_eval" not in alone:
            assert spread == ["python", *launcher, *alone[1:]]
        else:
            assert spread == alone
    assert {command[8] for command in four if launcher[1] in command} == shared


# ------------------------------------------------------------------ options and settings


def test_the_list_names_the_stages_in_order():
    lines = drive("--list").stdout.splitlines()
    assert [line.split()[0] for line in lines] == STAGES
    assert max(map(len, lines)) <= 80


def test_only_and_from_select_stages():
    assert [c[1] for c in dry_run("--only", "pregenerate")] == ["pregenerate_training_data.py"]
    scripts = [c[1] for c in dry_run("--from", "smart_evaluate")]
    assert scripts[-1] == "report.py"
    assert set(scripts[:-1]) == {
        "task_distill.py", "K-prune/src/main.py", "quantize.py", "benchmarks/inference.py"}


def test_demo_and_seed_are_other_names_of_a_profile_and_a_recipe():
    assert dry_run("--demo") == dry_run("--profile", "demo", "--recipe", "seed")


def test_the_environment_wins_over_profile_and_recipe():
    settings = {"TASKS": "RTE", "INTERMEDIATE_EPOCHS": "7", "MODELS_DIR": "elsewhere",
                "DATA_DIR": "my data"}
    commands = [given(c) for c in dry_run("--recipe", "paper", "--only", "distill", **settings)]
    assert {flags["task_name"] for flags in commands} == {"RTE"}
    assert commands[0]["num_train_epochs"] == 7.0
    assert commands[0]["data_dir"] == "my data/glue_data_paper/RTE"
    assert all(p.startswith("elsewhere/") for flags in commands for p in flags["output_dir"])


def test_a_setting_for_one_task_wins_and_what_is_harmless_is_forgiven(tmp_path):
    profile = tmp_path / "mine.env"
    profile.write_bytes(b'TASKS=" rte, sst2"\r\nAUGMENTATION_N=" 3"\r\nAUGMENTATION_N_sst2=5\r\n'
                        b"NEEDS_GPU=No\r\n")  # fmt: skip
    commands = dry_run("--profile", str(profile), "--only", "augment")
    assert {given(c)["task_name"]: given(c)["N"] for c in commands} == {"RTE": 3, "SST-2": 5}


@pytest.mark.parametrize(
    ("arguments", "settings", "message"),
    [
        ("--profile nothing", {}, "no profile nothing; expected a file or one of: demo.env"),
        ("--only trainig", {}, "no stage trainig; expected one of: environment"),
        ("--demo --recipe mine", {}, "--recipe mine: expected original or paper"),
        ("--fast", {}, "unknown option --fast"),
        ("--from", {}, "--from needs a value"),
        ("--profile minilm --dry-run --only smart_general", {}, "no stage smart_general"),
        ("", {"GPUS": "many"}, "GPUS=many: expected a number"),
        ("", {"PREDICTION_AUGMENTED_rte": "ja"}, "PREDICTION_AUGMENTED_rte=ja: expected yes or no"),
        ("", {"TASKS": "RTE SST"}, "TASKS: SST; expected some of:"),
        ("", {"STUDENTS": "mine"}, "student mine: no STUDENT_CONFIG_mine=FOLDER/config.json"),
        ("", {"BASELINES": "clean:tinybert_4l"}, "expected scratch:, general: or smart:"),
        ("", {"MODEL_SOURCE": "web"}, "MODEL_SOURCE=web: expected hub, demo or minilm"),
        ("--profile {typo}", {}, "no setting is called TEACHER_EPOCH;"),
        ("--profile {other}", {}, "TEACHER_EPOCHS_ret: ret is neither a task nor a student"),
    ],
)
def test_a_mistake_is_one_line_and_nothing_runs(tmp_path, folders, arguments, settings, message):
    (tmp_path / "typo").write_text("TEACHER_EPOCH=3\n")
    (tmp_path / "other").write_text("TEACHER_EPOCHS_ret=3\n")
    words = arguments.format(typo=tmp_path / "typo", other=tmp_path / "other").split()
    result = drive(*words, **folders, **settings)
    assert result.returncode == 2
    assert message in result.stderr
    assert len(result.stderr.splitlines()) == 1
    assert not result.stdout
    assert {path.name for path in tmp_path.iterdir()} == {"typo", "other"}


def test_what_a_script_would_refuse_is_named_before_the_first_stage(folders, tmp_path):
    settings = {"TEACHER_EPOCHS_rte": "three", "INTERMEDIATE_LEARNING_RATE": "-1",
                "QUANTIZE_METHODS": "int4", "PRUNE_CONSTRAINTS": "0.3"}  # fmt: skip
    result = drive("--demo", **folders, **settings)
    assert result.returncode == 2
    for part in ("finetune_teacher.py: argument --num_train_epochs: invalid float value: 'three'",
                 "task_distill.py: --learning_rate -1.0", "quantize.py: argument --method"):
        assert part in result.stderr
    assert not list(tmp_path.iterdir())


def test_another_shell_is_told_to_be_bash():
    result = drive("--list", shell="sh")
    assert result.returncode == 2 or result.stdout.startswith("environment")
    assert len(result.stderr.splitlines()) == (result.returncode == 2)


def test_python_prints_an_interpreter_with_the_packages_and_nothing_else():
    assert drive("--python").stdout.splitlines() == [sys.executable]


# ------------------------------------------------------------------ running


def test_without_a_wikipedia_dump_nothing_starts_and_the_source_is_named(folders, tmp_path):
    result = drive(**folders)
    assert result.returncode == 2
    assert "dumps.wikimedia.org" in result.stderr
    assert "Data_dump_torrents" in result.stderr
    assert not list(tmp_path.iterdir())


def test_the_command_that_continues_repeats_profile_and_settings(folders, tmp_path):
    settings = {"AUGMENTATION_N_sst2": "5", "GENERAL_EPOCHS_my_student": "2", "DATA_DIRECTION": "x",
                "WIKI_DUMP_HELP": "two words"}  # fmt: skip
    result = drive("--recipe", "paper", "--only", "wikipedia", **folders, **settings)
    assert result.returncode == 1
    assert "Stage wikipedia stopped: step extract, exit code" in result.stderr
    assert f"{tmp_path}/results/paper/logs/extract.log" in result.stderr
    words = shlex.split(result.stderr.splitlines()[-1])
    assert words[-6:] == ["bash", "reproduction.sh", "--recipe", "paper", "--from", "wikipedia"]
    assert {f"DATA_DIR={tmp_path}/data", "AUGMENTATION_N_sst2=5", "GENERAL_EPOCHS_my_student=2",
            "WIKI_DUMP_HELP=two words"} <= set(words)  # fmt: skip
    assert "DATA_DIRECTION" not in result.stderr


SMALL = {
    "TASKS": "CoLA", "STUDENTS": "tinybert_4l", "BASELINES": "", "MLM_STEPS": "10",
    "HUB_TEACHER_EPOCHS": "0.1", "TEACHER_EPOCHS": "0.1", "PREGENERATE_EPOCHS": "1",
    "GENERAL_EPOCHS": "0.02", "GENERAL_EPOCHS_tinybert_6l_smart_init": "0.02",
    "AUGMENTATION_ROWS": "40", "AUGMENTATION_N": "1", "INTERMEDIATE_EPOCHS": "1",
    "PREDICTION_EPOCHS": "2", "MLM_SHALLOW_STEPS": "10",
}  # fmt: skip


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
            "tinybert_4l, K-prune 30 % removed"} <= names  # fmt: skip
    assert len(report["speeds"]) == 4
    for picture in ("scores.png", "loss_curves.png", "tradeoff.png"):
        assert (results / picture).read_bytes().startswith(b"\x89PNG")

    # The second call has nothing to do, with however many threads, and prints the table again.
    again = drive("--demo", **settings, OMP_NUM_THREADS="2", GOMP_SPINCOUNT="1")
    assert again.returncode == 0
    assert not re.search(r"\d:\d\d:\d\d$", again.stdout.partition("Done in")[0], re.M)
    assert "majority class" in again.stdout

    # Changed settings run again what depends on them, and only that.
    smaller = {"K-prune/src/main.py", "quantize.py", "benchmarks/inference.py", "report.py"}
    for changed, scripts in (
        ({"PREDICTION_EPOCHS": "1"}, {"task_distill.py", *smaller}),
        ({"PRUNE_MU": "32"}, {"task_distill.py", *smaller} - {"quantize.py"}),
        ({"GENERAL_EPOCHS": "0.03"}, {"general_distill.py", "task_distill.py", *smaller}),
    ):
        commands = dry_run("--demo", **{**settings, **changed})
        assert {command[1] for command in commands} == scripts

"""The driver: what it would run parses and connects, and it resumes, refuses and explains."""

import argparse
import importlib.util
import json
import os
import re
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from functools import cache
from pathlib import Path

import pytest
from helpers import config_folder, make_model, make_pregenerated

from transformer.modeling import BertForMaskedLM

REPO = Path(__file__).resolve().parent.parent
RUNS = [
    ("--profile", "full"),
    ("--profile", "full", "--recipe", "paper"),
    ("--profile", "demo"),
    ("--profile", "demo", "--recipe", "paper"),
    ("--profile", "minilm"),
    ("--profile", "minilm", "--recipe", "paper"),
]
STAGES = [
    "environment", "inputs", "glove", "glue", "wikipedia", "models", "pregenerate", "general",
    "augment", "repair", "teachers", "distill", "evaluate", "smart_init", "smart_direct",
    "smart_general", "smart_distill", "smart_evaluate", "baselines",
    "prune", "quantize", "latency", "report",
]  # fmt: skip


def drive(*arguments: str, **settings: str) -> subprocess.CompletedProcess:
    """Run the driver with the test's own interpreter; `settings` go into its environment."""
    environment = {**os.environ, "PYTHON": sys.executable, **settings}
    return subprocess.run(
        ["bash", str(REPO / "reproduction.sh"), *arguments], env=environment, text=True,
        capture_output=True, stdin=subprocess.DEVNULL, check=False)  # fmt: skip


def dry_run(*arguments: str, **settings: str) -> list[list[str]]:
    """Return the commands of a dry run, each as a list of words."""
    result = drive(*arguments, "--dry-run", **settings)
    assert result.returncode == 0, result.stderr
    lines = [line for line in result.stdout.splitlines() if not line.startswith("#")]
    return [shlex.split(line) for line in lines]


@pytest.fixture
def folders(tmp_path) -> dict[str, str]:
    """Settings that keep a run inside the test's folder."""
    names = {"DATA_DIR": "data", "MODELS_DIR": "models", "RESULTS_DIR": "results"}
    return {setting: str(tmp_path / name) for setting, name in names.items()}


# ------------------------------------------------------------------ commands parse


@cache
def parser_of(script: str) -> argparse.ArgumentParser:
    # Under a name of its own: other tests have imported the script, and pickle looks it up.
    name = f"parser_of_{Path(script).stem}"
    spec = importlib.util.spec_from_file_location(name, REPO / script)
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    spec.loader.exec_module(module)
    return module.get_args_parser()


def is_script(command: list[str]) -> bool:
    return command[0] == "python" and command[1].endswith(".py")


def parse(command: list[str]) -> dict:
    """Parse a command with its script's own parser; fails where that would refuse it."""
    try:
        return vars(parser_of(command[1]).parse_args(command[2:]))
    except SystemExit:
        pytest.fail(f"does not parse: {shlex.join(command)}")


def given(command: list[str]) -> dict:
    """Parse a command and keep only the flags that stand in it."""
    flags = {word for word in command if word.startswith("-")}
    actions = {a.dest for a in parser_of(command[1])._actions if flags & set(a.option_strings)}
    return {name: value for name, value in parse(command).items() if name in actions}


def each_student(command: list[str]) -> list[dict]:
    """Return what `given` does for each student of a command as if it were the only one."""
    flags = given(command)
    if command[1] not in ("general_distill.py", "task_distill.py"):
        return [flags]
    own = [name for name in ("student_model", "output_dir", "learning_rate", "train_batch_size")
           if isinstance(flags.get(name), list)]
    return [{**flags, **{name: flags[name][number] for name in own}}
            for number in range(len(flags["student_model"]))]


@pytest.mark.parametrize("arguments", RUNS, ids=" ".join)
def test_every_command_of_the_driver_parses_with_its_scripts_own_parser(arguments):
    commands = [command for command in dry_run(*arguments) if is_script(command)]
    assert len(commands) > 40
    for command in commands:
        parse(command)


def test_every_command_of_the_readme_parses():
    readme = REPO / "README.md"
    if not readme.is_file():
        pytest.skip("there is no README.md yet")
    blocks = re.findall(r"```(?:bash|sh)\n(.*?)```", readme.read_text(encoding="utf-8"), re.S)
    lines = "\n".join(blocks).replace("\\\n", " ").splitlines()
    commands = [shlex.split(line, comments=True) for line in lines if line.startswith("python ")]
    for command in commands:
        if is_script(command) and (REPO / command[1]).name != "main.py":
            assert (REPO / command[1]).is_file(), command
            if "--help" not in command:
                parse(command)


# ------------------------------------------------------------------ paths connect

# What each script reads and writes, as functions of its parsed arguments.
READS = {
    "demo/make_inputs.py": lambda a: [],
    "pretrain_bert.py": lambda a: [a.train_corpus, a.config or a.bert_model],
    "download_glue.py": lambda a: [],
    "prepare_data.py": lambda a: [a.input_dir],
    "get_bert_models.py": lambda a: [m for m in hub_sources(a) if Path(m).parts[0] != "google-bert"
                                     and not m.startswith(("JeremiahZ/", "sentence-"))],
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
    "report.py": lambda a: [a.glue_dir],
}  # fmt: skip
WRITES = {
    "download_glue.py": lambda a: [f"{a.data_dir}/{task}" for task in a.tasks.split(",")],
    "prepare_data.py": lambda a: [a.output_file],
    "get_bert_models.py": lambda a: [
        f"{a.output_dir}/{a.base_name}",
        *([] if a.base_only else [f"{a.output_dir}/{a.base_name}-{t}" for t in a.tasks.split(",")]),
    ],
    "data_augmentation.py": lambda a: [
        a.glove_embs if a.compose_vectors else f"{a.glue_dir}/{a.task_name}/train_aug.tsv"],
    "fix_teacher_layers.py": lambda a: a.models,
    "general_distill.py": lambda a: a.output_dir,
    "task_distill.py": lambda a: a.output_dir,
    "report.py": lambda a: [a.results_dir],
}


def hub_sources(arguments: argparse.Namespace) -> list[str]:
    pattern = arguments.teachers.rpartition("=")[2]  # the driver asks for one task at a time
    teachers = [] if arguments.base_only else [
        pattern.format(task=task) for task in arguments.tasks.split(",")]
    return [arguments.base_model, *teachers]  # fmt: skip


def reads_and_writes(command: list[str]) -> tuple[list[str], list[str]]:
    """Return the paths that a command reads and those that it writes."""
    if is_script(command):
        arguments = argparse.Namespace(**parse(command))
        writes = WRITES.get(command[1], lambda a: [a.output_dir])(arguments)
        return [str(p) for p in READS[command[1]](arguments)], [str(p) for p in writes]
    if command[:3] == ["python", "-m", "wikiextractor.WikiExtractor"]:
        return [command[3]], [command[command.index("-o") + 1]]
    if command[:3] == ["python", "-m", "pip"]:
        return [], [command[command.index("--target") + 1]]
    if command[:2] == ["python", "-c"]:
        return [], [command[2].split("'")[-2]]  # extract_zip(..., 'folder')
    assert command[0] in ("mv", "cp"), command
    return [word for word in command[1:-1] if word != "-f"], [command[-1]]


def connects(path: str, written: list[str]) -> bool:
    """Whether a path lies in what was written before, or the other way round."""
    known = [*written, *(str(p.relative_to(REPO)) for p in REPO.glob("*/*_config")),
             "tinybert_4l_config", "tinybert_6l_config"]  # fmt: skip
    path = path.rstrip("/")
    return any(f"{path}/".startswith(f"{k.rstrip('/')}/") or k.startswith(f"{path}/")
               for k in known)  # fmt: skip


@pytest.mark.parametrize("arguments", RUNS, ids=" ".join)
def test_every_path_that_a_stage_reads_was_written_by_an_earlier_one(arguments, tmp_path):
    folders = {"DATA_DIR": "d/data", "MODELS_DIR": "m"}
    written = ["d/data/enwiki-20251101-pages-articles-multistream.xml.bz2",
               "d/data/enwiki-sample-pages-articles.xml.bz2"]  # the user brings it
    for command in dry_run(*arguments, **folders):
        reads, writes = reads_and_writes(command)
        for path in reads:
            assert connects(path, written), f"{path}: nobody wrote it for {shlex.join(command)}"
        written += writes


def test_the_full_run_contains_every_command_of_the_seed(shared):
    text = (shared / "seeds" / "000_a2dfa4ecbd575514.txt").read_text(encoding="utf-8")
    ours = [command for command in dry_run() if is_script(command)]
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


def test_the_paper_recipe_leaves_epochs_and_lengths_to_the_task_and_keeps_the_seeds_results():
    commands = [c for c in dry_run("--recipe", "paper") if is_script(c)]
    intermediate = [given(c) for c in commands if c[1] == "task_distill.py"
                    and not {"--pred_distill", "--do_eval"} & set(c)]  # fmt: skip
    assert all("num_train_epochs" not in flags for flags in intermediate)
    assert all("max_seq_length" not in flags for flags in intermediate)
    augmentation = [given(c) for c in commands if c[1] == "data_augmentation.py"]
    assert {flags["N"] for flags in augmentation} == {20}
    general = [f for c in commands if c[1] == "general_distill.py" for f in each_student(c)]
    assert {flags["train_batch_size"] for flags in general} == {256}
    assert {flags["learning_rate"] for flags in general} == {1e-4}
    prediction = [flags for c in commands if "--pred_distill" in c for flags in each_student(c)]
    rates = {(flags["learning_rate"], flags["train_batch_size"]) for flags in prediction}
    assert rates == {(rate, size) for rate in (1e-5, 2e-5, 3e-5) for size in (16, 32)}
    outputs = {p for c in commands if c[1] not in ("get_bert_models.py", "fix_teacher_layers.py")
               for p in reads_and_writes(c)[1] if p.startswith("models/")}
    assert outputs
    assert all(p.startswith("models/paper/") for p in outputs)


# ------------------------------------------------------------------ options and settings


def test_list_names_the_stages_in_order():
    lines = drive("--list").stdout.splitlines()
    assert [line.split()[0] for line in lines] == STAGES
    assert max(map(len, lines)) <= 80


def test_demo_is_the_demo_profile():
    assert dry_run("--demo") == dry_run("--profile", "demo")


def test_only_and_from_select_stages():
    assert [c[1] for c in dry_run("--only", "pregenerate")] == ["pregenerate_training_data.py"]
    scripts = [c[1] for c in dry_run("--from", "smart_evaluate")]
    assert scripts[-1] == "report.py"
    assert set(scripts[:-1]) == {
        "task_distill.py", "K-prune/src/main.py", "quantize.py", "benchmarks/inference.py"}
    assert {c[1] for c in dry_run("--only", "smart_evaluate")} == {"task_distill.py"}


def test_the_environment_wins_over_profile_and_recipe():
    settings = {"TASKS": "RTE", "INTERMEDIATE_EPOCHS": "7", "MODELS_DIR": "elsewhere"}
    commands = dry_run("--recipe", "paper", "--only", "distill", **settings)
    assert {given(c)["task_name"] for c in commands} == {"RTE"}
    stages = [given(c) for c in commands if "--pred_distill" not in c]
    assert {flags["num_train_epochs"] for flags in stages} == {7.0}
    assert all(p.startswith("elsewhere/") for flags in stages for p in flags["output_dir"])


def test_students_with_the_same_settings_share_the_teachers_pass():
    full, paper = ([given(c)["student_model"] for c in dry_run(*more, "--only", "general")]
                   for more in ((), ("--recipe", "paper")))
    assert full == [["tinybert_4l_config", "tinybert_4l_config", "tinybert_6l_config"]]
    assert paper == [["tinybert_4l_config", "tinybert_6l_config"]]
    stages = [given(c) for c in dry_run("--only", "distill", TASKS="RTE")]
    assert [len(flags["student_model"]) for flags in stages] == [3, 3]


def test_a_setting_for_one_task_wins_over_the_plain_one(tmp_path):
    profile = tmp_path / "mine.env"
    profile.write_text('TASKS="RTE SST-2"\nAUGMENTATION_N=3\nAUGMENTATION_N_sst2=5\n')
    commands = dry_run("--profile", str(profile), "--only", "augment")
    assert {given(c)["task_name"]: given(c)["N"] for c in commands} == {"RTE": 3, "SST-2": 5}


def test_a_setting_for_one_task_stands_in_the_command_that_continues(folders):
    settings = {"AUGMENTATION_N_sst2": "5", "GENERAL_EPOCHS_my_student": "2", "DATA_DIRECTION": "x"}
    result = drive("--only", "wikipedia", **folders, **settings)
    command = result.stderr.splitlines()[-1].strip()
    assert "AUGMENTATION_N_sst2=5 " in command
    assert "GENERAL_EPOCHS_my_student=2 " in command
    assert "DATA_DIRECTION" not in command


def test_with_several_gpus_training_runs_under_torchrun():
    launcher = ["python", "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "4",
                "--max-restarts", "3"]
    one, four = dry_run("--demo"), dry_run("--demo", GPUS="4")
    shared = {"general_distill.py", "task_distill.py", "finetune_teacher.py",
              "data_augmentation.py"}
    for alone, spread in zip(one, four, strict=True):
        if alone[1] in shared and "--do_eval" not in alone:
            assert spread == [*launcher, *alone[1:]]
        else:
            assert spread == alone
    assert {command[8] for command in four if command[1] == "-m" and len(command) > 8} >= shared
    assert "GPUS=many: expected a number of GPUs" in drive("--dry-run", GPUS="many").stderr


def test_students_are_made_smaller_and_measured_as_the_settings_say():
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
    evaluations = [c for c in commands if c[1] == "task_distill.py"]
    assert {given(c)["precision"] for c in evaluations} == {"fp32"}
    assert sorted(m for c in evaluations for m in given(c)["student_model"]) == sorted(outputs)
    (latency,) = (given(c) for c in commands if c[1] == "benchmarks/inference.py")
    timed = [model.partition("=")[2] for model in latency["models"]]
    assert latency["lengths"] == ["SST-2"]
    assert sorted(timed) == sorted(["models/final_sst2_teacher", *finals["sst2"],
                                    *(path for path in outputs if "_sst2_" in path)])


def test_without_students_to_make_smaller_nothing_is_pruned_quantized_or_timed():
    commands = dry_run("--from", "prune", PRUNE_STUDENTS="", QUANTIZE_STUDENTS="of_another_run")
    assert [c[1] for c in commands] == ["report.py"]


def test_folder_names_with_spaces_reach_the_scripts_whole():
    (command,) = dry_run("--only", "pregenerate", DATA_DIR="my data")
    assert given(command)["train_corpus"] == Path("my data/wiki_for_bert.txt")


def test_a_read_only_glue_folder_is_copied_and_never_written(tmp_path):
    task = tmp_path / "glue_data" / "RTE"
    task.mkdir(parents=True)
    for name in ("train.tsv", "dev.tsv"):
        (task / name).write_text("index\tsentence1\tsentence2\tlabel\n")
    commands = dry_run("--profile", "minilm", DATA_DIR=str(tmp_path), TASKS="RTE")
    copies = [command for command in commands if command[0] == "cp"]
    assert [command[-1] for command in copies] == ["data/minilm/glue_data/RTE/"]
    written = [path for command in commands for path in reads_and_writes(command)[1]]
    assert not [path for path in written if path.startswith(str(tmp_path))]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--profile", "nothing"], "no profile nothing; expected a file or one of: demo.env"),
        (["--only", "trainig"], "no stage trainig; expected one of: environment"),
        (["--recipe", "mine"], "--recipe mine: expected seed or paper"),
        (["--fast"], "unknown option --fast"),
        (["--from"], "--from needs a value"),
    ],
)
def test_a_wrong_option_is_one_line_and_runs_nothing(arguments, message):
    result = drive(*arguments)
    assert result.returncode == 2
    assert message in result.stderr
    assert len(result.stderr.splitlines()) == 1
    assert not result.stdout


def test_python_prints_an_interpreter_with_the_packages_and_nothing_else():
    result = drive("--python")
    assert result.stdout.splitlines() == [sys.executable]


# ------------------------------------------------------------------ running


def test_without_a_wikipedia_dump_nothing_starts_and_the_source_is_named(folders, tmp_path):
    result = drive(**folders)
    assert result.returncode == 2
    assert "dumps.wikimedia.org" in result.stderr
    assert "Data_dump_torrents" in result.stderr
    assert not list(tmp_path.iterdir())


def test_a_failure_names_stage_log_and_how_to_continue(folders, tmp_path):
    result = drive("--only", "wikipedia", **folders)
    assert result.returncode == 1
    assert "Stage wikipedia stopped: step extract" in result.stderr
    assert str(tmp_path / "results" / "logs" / "extract.log") in result.stderr
    command = result.stderr.splitlines()[-1].strip()
    assert command.endswith("bash reproduction.sh --from wikipedia")
    assert f"DATA_DIR={tmp_path}/data" in command


def test_what_the_driver_did_not_make_is_never_overwritten(folders, tmp_path):
    mine = tmp_path / "data" / "wiki_for_bert.txt"
    mine.parent.mkdir()
    mine.write_text("mine\n")
    dump = tmp_path / "data" / "enwiki-1-pages-articles.xml.bz2"
    dump.write_bytes(b"")
    (tmp_path / "data" / "extracted_wiki").mkdir()
    result = drive("--only", "wikipedia", **folders)
    assert result.returncode == 2
    assert "extracted_wiki exists, but this script did not make it" in result.stderr
    assert mine.read_text() == "mine\n"


# ------------------------------------------------------------------ stopped and continued


def start_driver(*arguments: str, **settings: str) -> subprocess.Popen:
    """Start the driver in a process group of its own."""
    return subprocess.Popen(
        ["bash", str(REPO / "reproduction.sh"), *arguments], text=True,
        env={**os.environ, "PYTHON": sys.executable, "OMP_NUM_THREADS": "1", **settings},
        stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
        start_new_session=True)  # fmt: skip


def wait_until(condition: Callable[[], bool], seconds: float = 60) -> bool:
    """Wait for a condition, but not longer than that; returns whether it holds."""
    for _ in range(int(seconds / 0.02)):
        if condition():
            return True
        time.sleep(0.02)
    return False


def wait_for_log(log: Path, *texts: str) -> None:
    """Wait until a step's log has one of the texts."""
    def text() -> str:
        return log.read_text() if log.is_file() else "not there"

    assert wait_until(lambda: any(part in text() for part in texts)), f"{log}: {text()}"


def running_in(folder: Path) -> list[str]:
    """Return the processes whose command names the folder."""
    listing = subprocess.run(["ps", "-ww", "-eo", "args"], capture_output=True, text=True,
                             check=True)
    return [line for line in listing.stdout.splitlines() if str(folder) in line]


@pytest.fixture
def general(tmp_path) -> dict[str, str]:
    """Settings and inputs of a run whose general distillation takes some seconds."""
    make_model(tmp_path / "models" / "bert-base-uncased", BertForMaskedLM)
    make_pregenerated(tmp_path / "data" / "json_wiki", rows=2000)
    config_folder(tmp_path / "student", num_hidden_layers=2, hidden_size=12)
    return {
        "DATA_DIR": str(tmp_path / "data"), "MODELS_DIR": str(tmp_path / "models"),
        "RESULTS_DIR": str(tmp_path / "results"), "STUDENTS": "small", "INPUTS": "given",
        "STUDENT_CONFIG_small": str(tmp_path / "student"), "NEEDS_GPU": "no", "PRECISION": "fp32",
        "GENERAL_BATCH_SIZE": "8", "GENERAL_EPOCHS": "3", "GENERAL_EVAL_STEP": "50",
        "GENERAL_MAX_SEQ_LENGTH": "16",
    }  # fmt: skip


ONLY = ("--only", "general")


def step_log(settings: dict[str, str]) -> Path:
    return Path(settings["RESULTS_DIR"]) / "logs" / "general_small.log"


def student(settings: dict[str, str]) -> Path:
    return Path(settings["MODELS_DIR"]) / "distilled_small"


def test_a_driver_that_is_told_to_end_lets_the_script_save_and_the_next_goes_on(general, tmp_path):
    [command] = dry_run(*ONLY, **general)
    assert "--resume" not in command
    driver = start_driver(*ONLY, **general)
    wait_for_log(step_log(general), "step 100 ")
    driver.send_signal(signal.SIGTERM)
    _, error = driver.communicate(timeout=60)
    assert driver.returncode == 143
    assert "Interrupted in stage general; this continues: " in error
    assert "GENERAL_BATCH_SIZE=8" in error
    assert f"STUDENT_CONFIG_small={tmp_path}/student" in error
    assert not running_in(tmp_path)
    log = step_log(general).read_text()
    assert "stopped by SIGTERM" in log
    assert list((student(general) / "training_state").iterdir())
    # The same call goes on inside the step; one with other settings begins it anew.
    assert dry_run(*ONLY, **general) == [[*command, "--resume"]]
    assert "--resume" not in dry_run(*ONLY, **{**general, "GENERAL_EPOCHS": "2"})[0]
    result = drive(*ONLY, **general)
    assert result.returncode == 0, result.stderr
    assert "going on from" in step_log(general).read_text()
    steps = [json.loads(line)["step"] for line in (student(general) / "log.jsonl").open()]
    assert steps == list(range(50, 751, 50))
    assert dry_run(*ONLY, **general) == []


def test_a_step_begun_with_other_settings_is_begun_anew(general):
    driver = start_driver(*ONLY, **general)
    wait_for_log(step_log(general), "step 100 ")
    driver.send_signal(signal.SIGTERM)
    driver.communicate(timeout=60)
    (student(general) / "leftover").touch()
    result = drive(*ONLY, **{**general, "GENERAL_EPOCHS": "1"})
    assert result.returncode == 0, result.stderr
    assert not (student(general) / "leftover").exists()
    assert "going on from" not in step_log(general).read_text()
    assert not student(general).with_name("distilled_small.old").exists()


def test_a_second_driver_says_who_works_on_the_folder_and_leaves(general):
    driver = start_driver(*ONLY, **general)
    wait_for_log(step_log(general), "general_distill.py")
    for settings in (general, {**general, "RESULTS_DIR": general["RESULTS_DIR"] + "_other"}):
        second = drive(*ONLY, **settings)
        assert second.returncode == 2
        [line] = second.stderr.splitlines()
        assert f"another reproduction.sh works on this folder: process {driver.pid} on " in line
    # Looking needs no lock.
    assert dry_run(*ONLY, **general)
    assert drive("--list", **general).returncode == 0
    driver.send_signal(signal.SIGTERM)
    driver.communicate(timeout=60)
    assert driver.returncode == 143


@pytest.mark.skipif(not Path("/proc/self").exists(), reason="needs /proc")
@pytest.mark.parametrize("group", [True, False], ids=["with its script", "alone"])
def test_a_killed_driver_blocks_nobody_and_its_script_does_not_write_on(general, tmp_path, group):
    driver = start_driver(*ONLY, **general)
    wait_for_log(step_log(general), "step 100 ")
    (os.killpg if group else os.kill)(driver.pid, signal.SIGKILL)
    driver.wait()
    if group:  # a killed process may take a moment to be gone
        assert wait_until(lambda: not running_in(tmp_path))
    else:
        assert running_in(tmp_path)
    result = drive(*ONLY, **general)
    assert result.returncode == 0, result.stderr
    assert ("what it left running writes its state" in result.stdout) != group
    steps = [json.loads(line)["step"] for line in (student(general) / "log.jsonl").open()]
    assert steps == list(range(50, 751, 50))
    assert not running_in(tmp_path)


def test_steps_side_by_side_are_all_told_to_end(general, tmp_path):
    # Batches of 8 and 12 cannot share the teacher's pass.
    settings = {**general, "JOBS": "2", "STUDENTS": "small other", "GENERAL_BATCH_SIZE_other": "12",
                "STUDENT_CONFIG_other": general["STUDENT_CONFIG_small"]}
    driver = start_driver(*ONLY, **settings)
    logs = [step_log(general).with_name(f"general_{name}.log") for name in ("small", "other")]
    for log in logs:
        wait_for_log(log, "step 100 ")
    driver.send_signal(signal.SIGTERM)
    driver.communicate(timeout=60)
    assert driver.returncode == 143
    assert not running_in(tmp_path)
    assert all("stopped by SIGTERM" in log.read_text() for log in logs)
    assert all("--resume" in command for command in dry_run(*ONLY, **settings))


def test_ctrl_c_ends_the_running_script_and_says_how_to_continue(folders, tmp_path):
    driver = start_driver("--demo", "--only", "inputs", **folders)
    wait_for_log(tmp_path / "results" / "logs" / "inputs.log", "make_inputs.py")
    os.killpg(driver.pid, signal.SIGINT)
    _, error = driver.communicate(timeout=30)
    assert driver.returncode == 130
    assert "Interrupted in stage inputs; this continues: DATA_DIR=" in error
    assert error.strip().endswith("--profile demo --from inputs")
    assert not running_in(tmp_path)
    assert not (tmp_path / "data" / ".state" / "inputs").exists()


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
    # The first call, in two parts: the second part goes on where the first one stopped.
    for stage in ("inputs", "wikipedia"):
        assert drive("--demo", "--only", stage, **settings).returncode == 0
    result = drive("--demo", **settings)
    assert result.returncode == 0, result.stderr
    assert "2 finished earlier" in result.stdout
    lines = [line for line in result.stdout.splitlines() if str(tmp_path) not in line]
    assert max(map(len, lines)) <= 80
    results = tmp_path / "results"
    report = json.loads((results / "results.json").read_text())
    names = {(score["name"], score["task"]) for score in report["scores"]}
    assert {("teacher", "CoLA"), ("tinybert_4l", "CoLA"),
            ("tinybert_6l_smart_init", "CoLA")} <= names  # fmt: skip
    assert "tinybert_4l" in (results / "results.md").read_text()
    assert {("tinybert_4l, K-prune 30 % removed", "CoLA"),
            ("tinybert_4l, int8-dynamic ONNX", "CoLA")} <= names  # fmt: skip
    assert len(report["speeds"]) == 4
    for picture in ("scores.png", "loss_curves.png", "tradeoff.png"):
        assert (results / picture).read_bytes().startswith(b"\x89PNG")

    # A second call has nothing to do, and prints the table again.
    assert dry_run("--demo", **settings) == []
    again = drive("--demo", **settings)
    assert again.returncode == 0
    assert not re.search(r"\d:\d\d:\d\d$", again.stdout.partition("Done in")[0], re.M)
    assert "majority class" in again.stdout

    # Changed settings run again what depends on them, and only that.
    smaller = {"K-prune/src/main.py", "quantize.py", "benchmarks/inference.py"}
    changed = dry_run("--demo", **{**settings, "PREDICTION_EPOCHS": "1"})
    assert {c[1] for c in changed} == {"task_distill.py", "report.py", *smaller}
    assert all({"--pred_distill", "--do_eval"} & set(c) for c in changed
               if c[1] == "task_distill.py")
    changed = {c[1] for c in dry_run("--demo", **{**settings, "PRUNE_MU": "32"})}
    assert changed == {"K-prune/src/main.py", "task_distill.py", "benchmarks/inference.py",
                       "report.py"}
    changed = {c[1] for c in dry_run("--demo", **{**settings, "GENERAL_EPOCHS": "0.03"})}
    assert changed == {"general_distill.py", "task_distill.py", "report.py", *smaller}
    changed = {c[1] for c in dry_run("--demo", **{**settings, "HUB_TEACHER_EPOCHS": "0.2"})}
    assert {"finetune_teacher.py", "get_bert_models.py", "fix_teacher_layers.py",
            "task_distill.py"} <= changed
    assert not {"pretrain_bert.py", "general_distill.py"} & changed

    # A step whose mark of having finished was taken away is run again, its leftovers are gone.
    (tmp_path / "models" / ".state" / "prediction_cola").unlink()
    leftover = tmp_path / "models" / "distilled_tinybert_4l_cola" / "leftover"
    leftover.touch()
    (command,) = dry_run("--demo", "--only", "distill", **settings)
    assert "--pred_distill" in command
    assert drive("--demo", "--only", "distill", **settings).returncode == 0
    assert not leftover.exists()
    assert dry_run("--demo", "--only", "distill", **settings) == []

    # With one student more, the students of a run are trained again, side by side.
    settings["STUDENTS"] = "tinybert_4l tinybert_6l"
    result = drive("--demo", "--only", "general", **settings)
    assert result.returncode == 0, result.stderr
    for name in ("tinybert_4l", "tinybert_4l.old", "tinybert_6l"):
        assert (tmp_path / "models" / f"distilled_{name}" / "pytorch_model.bin").is_file()
    assert dry_run("--demo", "--only", "general", **settings) == []
    settings["STUDENTS"] = "tinybert_4l"
    assert len(dry_run("--demo", "--only", "general", **settings)) == 1

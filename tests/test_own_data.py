"""Own data in the driver: what it finds out before it plans, and the run of one command."""

import json
import shlex
from pathlib import Path

import pytest
from helpers import BAD, GOOD, config_folder, error_line, make_model, run
from relatives import their_model
from test_reproduction import drive, dry_run, given, is_script

from driver import checks, copy_task, own_data
from transformer.modeling import BertForMaskedLM
from transformer.own_tasks import find_task
from transformer.tasks import load_examples

LABELS = ("negative", "positive")


def write_csv(path: Path, rows: int, first: int = 0) -> Path:
    """Write rows of `review,sentiment` whose words tell the label; no text is there twice."""
    path.parent.mkdir(parents=True, exist_ok=True)
    lines = ["review,sentiment"]
    for number in range(first, first + rows):
        words = (BAD, GOOD)[number % 2]
        place = number // 2
        text = " ".join((words[place % 5], words[place // 5 % 5], "film", "a " * (place // 25)))
        lines.append(f"{text.strip()},{LABELS[number % 2]}")
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return path


@pytest.fixture
def mine(tmp_path) -> Path:
    """A folder of own data: train, dev and test."""
    for split, rows, first in (("train", 40, 0), ("dev", 12, 40), ("test", 12, 52)):
        write_csv(tmp_path / "mine" / f"{split}.csv", rows, first)
    return tmp_path / "mine"


@pytest.fixture
def base(tmp_path) -> Path:
    """A BERT of four layers with its masked-LM head and without a classifier."""
    make_model(tmp_path / "base", BertForMaskedLM)
    return tmp_path / "base"


def described(capsys, *arguments) -> dict[str, str]:
    """Return the assignments for bash, by variable."""
    capsys.readouterr()
    run(own_data, *arguments)
    lines = capsys.readouterr().out.splitlines()
    pairs = [line.partition("=")[::2] for line in lines]
    return {name: value if name == "OWN+" else " ".join(shlex.split(value))
            for name, value in pairs}


# ------------------------------------------------------------------ data


def test_a_folder_with_all_splits_is_measured_on_dev_and_test(mine, capsys):
    found = described(capsys, "--tasks", mine, "--dev_share", 0.1)
    assert found["OWN+"] == "(mine)" and found["SLUG[mine]"] == "mine"
    assert found["EVAL_SPLITS[mine]"] == "dev test" and found["SHARES[mine]"] == ""
    assert found["AUG_FILE[mine]"] == "train_aug.csv"


def test_splits_without_a_file_get_a_share_of_the_training_rows(mine, capsys):
    arguments = ("--dev_share", 0.2, "--test_share", 0.1)
    found = described(capsys, "--tasks", mine / "train.csv", *arguments)
    assert found["SHARES[train]"] == "--dev_share 0.2 --test_share 0.1"
    (mine / "test.csv").unlink()
    assert described(capsys, "--tasks", mine, *arguments)["SHARES[mine]"] == "--test_share 0.1"
    (mine / "task.json").write_text('{"test_share": 0.3}')
    assert described(capsys, "--tasks", mine, *arguments)["SHARES[mine]"] == ""


@pytest.mark.parametrize(("name", "slug"), [
    ("My-Reviews.v2.csv", "my_reviews_v2"), ("2024.csv", "task_2024"), ("评论.csv", "task_6849b8")])
def test_a_tasks_name_serves_in_settings_and_folders(tmp_path, capsys, name, slug):
    write_csv(tmp_path / name, 40)
    assert f"SLUG[{slug}]" in described(capsys, "--tasks", tmp_path / name, "--dev_share", 0.2)


def test_the_content_changes_with_the_tasks_files_alone(mine, capsys):
    def content() -> str:
        return described(capsys, "--tasks", mine)["CONTENT[mine]"]

    before = content()
    (mine / "train_aug.csv").write_text("review,sentiment\n")
    (mine / "README.md").write_text("Reviews of films")
    assert content() == before
    write_csv(mine / "test.csv", 14, 52)
    assert content() != before


def test_a_copy_has_the_same_rows_and_the_original_stays(mine, tmp_path):
    before = sorted(mine.iterdir())
    run(copy_task, "--source", mine / "train.csv", "--name", "copied", "--dev_share", 0.2,
        "--output_dir", tmp_path / "copy")
    assert sorted(mine.iterdir()) == before
    original = find_task(None, mine / "train.csv", 0.2)
    copied = find_task("copied", tmp_path / "copy")
    for split in ("train", "dev"):
        assert load_examples(copied, tmp_path / "copy", split) == load_examples(
            original, mine / "train.csv", split)


# ------------------------------------------------------------------ models


def test_a_bert_without_classifier_is_fine_tuned_and_half_its_layers_are_the_student(
    mine, base, capsys
):
    found = described(capsys, "--tasks", mine, "--teacher", base)
    assert found["NEW_CLASSIFIER"] == "yes" and "TEACHER_EPOCHS" not in found
    assert (found["STUDENT_START"], found["STUDENT_LAYERS"]) == ("copied", "2")


@pytest.mark.parametrize(("labels", "new", "epochs"), [
    (("Positive", "negative"), "no", "0"), (("LABEL_0", "LABEL_1"), "no", "0"),
    (LABELS, "yes", None)])
def test_a_classifier_for_these_labels_is_taken_as_it_is(
    mine, tmp_path, capsys, labels, new, epochs
):
    make_model(tmp_path / "teacher", labels=labels)
    found = described(capsys, "--tasks", mine, "--teacher", tmp_path / "teacher",
                      "--new_classifier", new)
    assert (found["NEW_CLASSIFIER"], found.get("TEACHER_EPOCHS")) == (new, epochs)


@pytest.mark.parametrize(("depth", "layers"), [(12, 6), (6, 3), (5, 1), (1, 1)])
def test_half_of_the_layers_is_the_largest_number_that_divides_them(
    mine, tmp_path, capsys, depth, layers
):
    make_model(tmp_path / "teacher", num_hidden_layers=depth, labels=LABELS)
    found = described(capsys, "--tasks", mine, "--teacher", tmp_path / "teacher")
    assert found["STUDENT_LAYERS"] == str(layers)


def test_a_student_with_weights_is_where_training_starts_and_a_config_is_random(
    mine, base, tmp_path, capsys
):
    make_model(tmp_path / "weights", num_hidden_layers=2)
    config_folder(tmp_path / "shape", num_hidden_layers=2)
    contents = set()
    for name, start in (("weights", "given"), ("shape", "random")):
        found = described(capsys, "--tasks", mine, "--teacher", base, "--student", tmp_path / name)
        assert found["STUDENT_START"] == start
        contents.add(found["STUDENT_CONTENT"])
    assert len(contents) == 2


def test_the_content_of_a_model_changes_with_its_weights(mine, base, capsys):
    def content() -> str:
        return described(capsys, "--tasks", mine, "--teacher", base)["TEACHER_CONTENT"]

    before = content()
    assert content() == before
    make_model(base, BertForMaskedLM, seed=1)
    assert content() != before


@pytest.mark.parametrize(("arguments", "message"), [
    ("--tasks {root}/none", "none: no such folder or file; expected texts and labels"),
    ("--tasks {mine} {root}/other/mine --dev_share 0.2", "is called mine, as is"),
    ("--tasks {mine}/train.csv", "no dev file; expected one, or a share of train: DEV_SHARE=0.1"),
    ("--tasks {root}/one.csv", "all rows have the label 'positive'"),
    ("--tasks {mine} --teacher {root}/none", "--teacher: "),
    ("--tasks {mine} --teacher me/none", "--teacher: me/none (no folder here, so an id on"),
    ("--tasks {mine} --teacher {root}/shape", "no weights there; expected a trained BERT"),
    ("--tasks {mine} --teacher {root}/stars", "(NEW_CLASSIFIER=yes trains a new classifier)"),
    ("--tasks {mine} --teacher {base} --max_seq_length 256", "has 128 positions, for rows of 256"),
    ("--tasks {mine} --teacher {base} --num_layers 5", "STUDENT_LAYERS=5: expected a number from"),
    ("--tasks {mine} --teacher {base} --student {root}/shape", "and the student 4; the attention"),
    ("--tasks {mine} --teacher {root}/ready --masked_lm yes", "has no masked-LM head"),
    ("--tasks {mine} --teacher {root}/electra --masked_lm yes", "has no masked-LM head"),
    ("--tasks {mine} --teacher {root}/albert", "layers share their weights; expected --student"),
    ("--tasks {mine} --teacher {base} --student {root}/albert --own_layers yes",
     "expected PRUNE_STUDENTS= QUANTIZE_STUDENTS= EXPORT_STUDENTS=, all empty"),
])
def test_a_mistake_is_one_line(mine, base, tmp_path, capsys, arguments, message):
    write_csv(tmp_path / "other" / "mine" / "train.csv", 40)
    (tmp_path / "one.csv").write_text("text,label\na film,positive\na book,positive\n")
    config_folder(tmp_path / "shape", num_hidden_layers=2, num_attention_heads=4)
    make_model(tmp_path / "stars", labels=("1", "2", "3"))
    make_model(tmp_path / "ready", labels=LABELS)
    for family in ("albert", "electra"):
        their_model(tmp_path / family, family, "MaskedLM", max_position_embeddings=140)
    words = arguments.format(root=tmp_path, mine=mine, base=base).split()
    assert message in error_line(capsys, own_data, *words)


# ------------------------------------------------------------------ the driver


@pytest.mark.parametrize(("arguments", "message"), [
    ("--task data/mine", "--teacher is missing; expected a BERT: folder, URL or hub id"),
    ("--teacher models/base", "--teacher goes with --task, which is missing"),
    ("--task", "--task needs a value"),
    ("--task --teacher models/base", "--task needs a value"),
    ("--task a.csv --teacher b --profile demo", "--task and --profile demo: expected no profile"),
    ("--profile task", "profile task: expected --task and a folder or file"),
    ("--task {csv} --teacher {csv}", "data.csv: is a file; expected a model's folder, URL or"),
    ("--task RTE --teacher models/base", "RTE: no such folder or file; expected texts and labels"),
    ("--task no/where --teacher models/base", "no/where: no such folder or file"),
    ("--task profiles/tasks/imdb.json --teacher b", "imdb.json: describes a task; expected the"),
    ("--task a.csv --teacher b --vectors no.txt", "--vectors no.txt: no such file; expected one"),
    ("STUDENT_LAYERS=x --task a.csv --teacher b", "STUDENT_LAYERS=x: expected a number"),
    ("DEV_SHARE=2 --task a.csv --teacher b", "DEV_SHARE=2: expected a share below 1"),
    ("NEW_CLASSIFIER=maybe --task a.csv --teacher b", "NEW_CLASSIFIER=maybe: expected yes or no"),
])
def test_what_cannot_be_run_is_one_line(tmp_path, arguments, message):
    words = arguments.format(csv=write_csv(tmp_path / "data.csv", 40)).split()
    settings = dict(word.split("=") for word in words if "=" in word)
    result = drive(*(word for word in words if "=" not in word), "--dry-run", **settings)
    assert result.returncode == 2 and not result.stdout
    assert message in result.stderr and len(result.stderr.splitlines()) == 1


def test_a_students_config_is_distilled_in_general_on_the_training_texts_first(
    mine, base, tmp_path
):
    config_folder(tmp_path / "shape", num_hidden_layers=2)
    commands = dry_run("--task", str(mine), "--teacher", str(base), "--student",
                       str(tmp_path / "shape"), TRAIN_CORPUS="own", BASELINES="start:student",
                       MODELS_DIR="m", RESULTS_DIR="r")
    assert not list(checks.problems(commands))
    corpus, general = (given(c) for c in commands if c[1] in ("prepare_data.py",
                                                              "general_distill.py"))
    assert corpus["data_dir"] == "m/data/mine"
    assert general["train_corpus"] == [corpus["output_file"]]
    starts = [given(c).get("student_model") for c in commands if c[1] == "task_distill.py"]
    assert starts[0] == general["output_dir"]
    assert ["m/baseline_general_student_mine"] in starts


def test_no_model_is_written_into_the_folder_of_the_teacher(mine, base):
    result = drive("--task", str(mine), "--teacher", str(base), "--dry-run", MODELS_DIR=str(base))
    assert result.returncode == 2
    assert f"{base}: this run's models would go there" in result.stderr.splitlines()[-1]


def test_own_data_stand_beside_tasks_of_glue_with_settings_by_their_name(mine):
    commands = dry_run("--profile", "minilm", TASKS=f"RTE {mine}", TEACHER_EPOCHS_mine="9",
                       AUGMENTATION_N_mine="3")
    own = [command for command in commands if is_script(command) and "mine" in " ".join(command)]
    assert not list(checks.problems(commands))
    downloads = [c for c in commands if c[1] == "download_glue.py"]
    assert [c[-1] for c in downloads] == ["RTE"]
    (copy,) = (c for c in commands if c[1] == "driver/copy_task.py")
    assert given(copy)["output_dir"] == Path("data/minilm/glue_data/mine")
    (teacher,) = (given(c) for c in own if "models/minilm/final_mine_teacher" in c
                  and c[1] == "finetune_teacher.py")
    assert teacher["new_classifier"] and teacher["num_train_epochs"] == 9
    (augmentation,) = (given(c) for c in own if c[1] == "data_augmentation.py" and "--N" in c)
    assert augmentation["N"] == 3 and augmentation["data_dir"] == "data/minilm/glue_data/mine"
    (export,) = (c for c in own if c[1] == "export_model.py")
    assert "nyu-mll/glue" not in export


TINY = {"TEACHER_EPOCHS": "2", "TEACHER_LEARNING_RATE": "1e-3", "INTERMEDIATE_EPOCHS": "2",
        "PREDICTION_EPOCHS": "2", "PREDICTION_LEARNING_RATES": "1e-4", "TEST_SHARE": "0.2",
        "DEV_SHARE": "0.2", "AUGMENTATION_N": "1"}


@pytest.mark.slow
def test_one_command_goes_from_a_file_and_a_bert_to_an_exported_int8_student(base, tmp_path):
    write_csv(tmp_path / "My reviews.csv", 100)
    settings = {**TINY, "MODELS_DIR": str(tmp_path / "models"),
                "RESULTS_DIR": str(tmp_path / "results")}
    call = ("--task", str(tmp_path / "My reviews.csv"), "--vectors", "composed", "--teacher",
            str(base))
    result = drive(*call, **settings)
    assert result.returncode == 0, result.stderr
    assert f"Exported: {tmp_path}/models/export" in result.stdout
    assert "wikipedia" not in result.stdout
    report = json.loads((tmp_path / "results" / "results.json").read_text())
    names = [score["name"] for score in report["scores"]]
    assert sorted(names) == ["student", "student, int8-dynamic ONNX", "teacher"]
    assert all({"dev", "test"} <= {*score["best"]} for score in report["scores"])
    page = (tmp_path / "results" / "results.md").read_text()
    assert "test" in page and "int8-dynamic ONNX" in page
    exported = tmp_path / "models" / "export" / "distilled_student_my_reviews"
    assert (exported / "onnx" / "model_quantized.onnx").is_file()
    assert "positive" in (exported / "config.json").read_text()

    # Again: nothing to do. A row more: all of it anew. A ready teacher: not trained.
    assert dry_run(*call, **settings) == []
    write_csv(tmp_path / "My reviews.csv", 102)
    scripts = [command[1] for command in dry_run(*call, **settings)]
    assert scripts[:2] == ["driver/copy_task.py", "data_augmentation.py"] and len(scripts) > 10
    ready = tmp_path / "models" / "final_my_reviews_teacher"
    commands = dry_run(*call[:2], "--teacher", str(ready), **settings)
    (teacher,) = (given(c) for c in commands if c[1] == "finetune_teacher.py")
    assert teacher["num_train_epochs"] == 0 and "new_classifier" not in teacher

"""Tasks of a user's own through the scripts that train, prune, quantize and measure."""

import csv
import json
import random

import pytest
import torch
from helpers import (
    BAD,
    GOOD,
    NEUTRAL,
    error_line,
    kprune_script,
    make_glue,
    make_model,
    read_json,
    read_log,
    run,
    same_weights,
    sentence,
    weights,
)

import finetune_teacher
import quantize
import task_distill
from transformer.modeling import BertForMaskedLM, TinyBertForPreTraining
from transformer.own_tasks import find_task

kprune_main = kprune_script()

MOODS = ("中性", "正面", "负面")
INTENTS = tuple(f"意图{number}" for number in range(119))
FAST = ("--num_train_epochs", 1, "--train_batch_size", 16, "--precision", "fp32", "--no_cuda")


def make_rows(labels, count, seed):
    """Texts whose words tell their label, and the label; without labels, a score from 1 to 10."""
    rng = random.Random(seed)
    for place in range(count):
        if labels:
            number = place % len(labels)
            yield sentence(rng, (GOOD, NEUTRAL, BAD)[number % 3]), labels[number]
        else:
            score = rng.uniform(1, 10)
            yield sentence(rng, GOOD if score > 5.5 else BAD), f"{score:.1f}"


def write_csv(folder, labels=MOODS, rows=24, splits=("train", "dev", "test")):
    """Write the CSV files of a task of single texts."""
    folder.mkdir(parents=True, exist_ok=True)
    for seed, split in enumerate(splits):
        with (folder / f"{split}.csv").open("w", encoding="utf-8", newline="") as file:
            csv.writer(file).writerows([("text", "label"), *make_rows(labels, rows, seed)])
    return folder


def write_pairs(folder):
    """Write the JSON lines of a task of pairs; its validation set has a name of its own."""
    folder.mkdir(parents=True)
    for seed, split in enumerate(("train", "validation", "test")):
        lines = [json.dumps({"premise": text, "hypothesis": "it was , good", "label": label})
                 for text, label in make_rows(("yes", "no"), 20, seed)]
        (folder / f"{split}.jsonl").write_text("\n".join(lines), encoding="utf-8")
    return folder


def write_scores(folder):
    write_csv(folder, labels=())
    (folder / "task.json").write_text(json.dumps({
        "name": "scores", "labels": [], "range": [1, 10], "metrics": ["spearmanr", "pearson"],
        "max_seq_length": 20}), encoding="utf-8")
    return folder


KINDS = {
    "three": (write_csv, MOODS),
    "pairs": (write_pairs, ("no", "yes")),
    "scores": (write_scores, ()),
    "many": (lambda folder: write_csv(folder, INTENTS, rows=238), tuple(sorted(INTENTS))),
}


class Chain:
    """A task's data, and the models that the scripts make of a base model, one after the other."""

    def __init__(self, root, data):
        self.root, self.data = root, data
        make_model(root / "base", BertForMaskedLM)
        make_model(root / "general", TinyBertForPreTraining, num_hidden_layers=2, hidden_size=12,
                   model_arguments={"fit_size": 16})

    def finetune(self, output="teacher", *more):
        return self._run(finetune_teacher, output, "--bert_model", self.root / "base",
                         "--new_classifier", "--data_dir", self.data, *FAST, *more)

    def distil(self, output, student, *more):
        return self._run(task_distill, output, "--teacher_model", self.root / "teacher",
                         "--student_model", self.root / student, "--data_dir", self.data, *FAST,
                         *more)

    def evaluate(self, model, *more):
        output = self._run(task_distill, f"eval_{model}", "--do_eval", "--student_model",
                           self.root / model, "--data_dir", self.data, "--precision", "fp32",
                           "--overwrite_output_dir", "--no_cuda", *more)
        return read_json(output / "eval_results.json")

    def prune(self, output, model):
        return self._run(kprune_main, output, "--model_name", self.root / model, "--ckpt_dir",
                         self.root / model, "--data_dir", self.data, "--constraint", 0.3,
                         "--num_tokens", 150, "--no_cuda")

    def quantize(self, output, model, *more):
        return self._run(quantize, output, "--model", self.root / model, *more)

    def _run(self, script, output, *arguments):
        run(script, *arguments, "--output_dir", self.root / output)
        return self.root / output


@pytest.mark.parametrize("kind", KINDS)
def test_an_own_task_goes_through_every_script(tmp_path, kind):
    write, labels = KINDS[kind]
    chain = Chain(tmp_path, write(tmp_path / "my_data"))
    task = find_task(None, chain.data)
    folders = [chain.finetune(), chain.distil("first", "general"),
               chain.distil("second", "first", "--pred_distill"), chain.prune("pruned", "second"),
               chain.quantize("int8", "second", "--method", "int8-static", "--data_dir",
                              chain.data, "--do_eval", "--eval_split", "test", "dev")]
    for folder in [*folders, tmp_path / "second" / "last"]:
        described = read_json(folder / "task.json")
        assert described["name"] == task.name and tuple(described["labels"]) == labels
        config = read_json(folder / "config.json")
        assert config["finetuning_task"] == task.name
        assert tuple(config["id2label"].values()) == (labels or ("LABEL_0",))

    results = [read_json(folders[0] / "eval_results.json"), chain.evaluate("second"),
               chain.evaluate("pruned", "--eval_split", "test"),
               read_json(folders[-1] / "eval_results.json")]
    assert [(result["split"], [*result["all_metrics"]]) for result in results] == [
        ("dev", ["dev"]), ("dev", ["dev"]), ("test", ["test"]), ("test", ["test", "dev"])]
    for result in results:
        assert result["task"] == task.name and result["rows"] in (20, 24, 238)
        assert set(result["metrics"]) == set(task.metrics)
        assert result["metrics"] == result["all_metrics"][result["split"]]
        assert ("per_class" in result) == bool(labels)
        for split, counts in result.get("per_class", {}).items():
            assert set(counts) == set(labels) and split in result["all_metrics"]
            assert sum(count["predicted"] for count in counts.values()) == result["rows"]
    assert read_json(folders[3] / "kprune.json")["task"] == task.name


def test_a_regression_with_a_range_is_learned_from_the_labels_and_from_the_teacher(tmp_path):
    chain = Chain(tmp_path, write_scores(tmp_path / "my_data"))
    long = ("--num_train_epochs", 60, "--learning_rate", 5e-3)
    chain.finetune("teacher", *long)
    chain.distil("student", "general", "--pred_distill", *long, "--eval_step", 20)
    for folder, name in (("teacher", "loss"), ("student", "cls_loss")):
        log = [line[name] for line in read_log(tmp_path / folder) if name in line]
        assert log[-1] < 0.5 * log[0]


# ------------------------------------------------------------------ labels by name


def permuted(model, folder, labels, order):
    """Save a classifier with its outputs in another order."""
    other = make_model(folder, labels=tuple(labels[place] for place in order))
    other.load_state_dict(model.state_dict())
    for name in ("weight", "bias"):
        getattr(other.classifier, name).data = getattr(model.classifier, name).data[order]
    torch.save(other.state_dict(), folder / "pytorch_model.bin")


def test_a_teachers_labels_are_matched_by_name_whatever_their_order(tmp_path):
    chain, labels = Chain(tmp_path, write_csv(tmp_path / "my_data")), MOODS
    permuted(make_model(tmp_path / "teacher", labels=labels), tmp_path / "other", labels, [2, 0, 1])
    assert chain.evaluate("teacher")["metrics"] == chain.evaluate("other")["metrics"]
    chain.distil("student", "general", "--pred_distill", "--teacher_model", tmp_path / "other")
    order = [labels[place] for place in (2, 0, 1)]
    assert [*read_json(tmp_path / "student" / "config.json")["id2label"].values()] == order


def test_a_nameless_teacher_is_matched_by_position_with_a_warning_and_gets_names(tmp_path, caplog):
    chain = Chain(tmp_path, write_csv(tmp_path / "my_data"))
    make_model(tmp_path / "base", num_labels=3)
    run(finetune_teacher, "--bert_model", tmp_path / "base", "--data_dir", chain.data,
        "--output_dir", tmp_path / "teacher", "--num_train_epochs", 0, "--no_cuda")
    assert caplog.text.count("does not name its labels; taking the order") == 1
    config = read_json(tmp_path / "teacher" / "config.json")
    assert tuple(config["id2label"].values()) == MOODS
    assert same_weights(weights(tmp_path / "base"), weights(tmp_path / "teacher"))


def teacher_of(script, root):
    """The flags of a script that reads a trained classifier in the folder `teacher`."""
    data = ("--data_dir", root / "my_data", "--output_dir", root / "out")
    if script is kprune_main:
        return ("--ckpt_dir", root / "teacher", "--model_name", root / "teacher", "--constraint",
                0.3, *data)
    if script is quantize:
        return ("--model", root / "teacher", "--method", "int8-dynamic", "--do_eval", *data)
    if script is finetune_teacher:
        return ("--bert_model", root / "teacher", *data)
    return ("--teacher_model", root / "teacher", "--student_model", root / "general", *data)


SCRIPTS = {"finetune": finetune_teacher, "distil": task_distill, "quantize": quantize,
           "kprune": kprune_main}


@pytest.mark.parametrize("script", SCRIPTS.values(), ids=SCRIPTS)
@pytest.mark.parametrize(("labels", "said"), [
    (("好评", "差评", "一般"), ["好评", *MOODS]),
    (("正面", "负面"), ["2 labels; expected 3", *MOODS]),
    (tuple(f"LABEL_{number}" for number in range(5)), ["5 labels; expected 3", *MOODS]),
])
def test_other_labels_than_the_tasks_are_listed_before_the_weights_are_read(
        tmp_path, capsys, script, labels, said):
    Chain(tmp_path, write_csv(tmp_path / "my_data"))
    make_model(tmp_path / "teacher", labels=labels)
    (tmp_path / "teacher" / "pytorch_model.bin").write_bytes(b"not read")
    message = error_line(capsys, script, *teacher_of(script, tmp_path))
    for text in (*said, str(tmp_path / "teacher" / "config.json")):
        assert text in message
    assert not (tmp_path / "out").exists()


def test_of_many_labels_those_that_differ_are_listed(tmp_path, capsys):
    Chain(tmp_path, write_csv(tmp_path / "my_data", INTENTS, rows=238))
    make_model(tmp_path / "teacher", labels=(*INTENTS[:40], "别的", *INTENTS[41:]))
    message = error_line(capsys, task_distill, *teacher_of(task_distill, tmp_path))
    assert "['别的'] are not the task's" in message and "lacks ['意图40']" in message
    assert len(message) < 500


@pytest.mark.parametrize("script", SCRIPTS.values(), ids=SCRIPTS)
def test_faults_of_rows_are_named_before_the_weights_are_read(tmp_path, capsys, script):
    Chain(tmp_path, write_csv(tmp_path / "my_data"))
    make_model(tmp_path / "teacher", labels=MOODS)
    (tmp_path / "teacher" / "pytorch_model.bin").write_bytes(b"not read")
    with (tmp_path / "my_data" / "dev.csv").open("a", encoding="utf-8") as file:
        file.write("it was good,极好\n")
    message = error_line(capsys, script, *teacher_of(script, tmp_path))
    assert "极好" in message and "dev" in message
    glue = make_glue(tmp_path / "SST-2")
    with (glue / "dev.tsv").open("a", encoding="utf-8") as file:
        file.write("x\tit was good\t2\n")
    make_model(tmp_path / "teacher", labels=("0", "1"))
    (tmp_path / "teacher" / "pytorch_model.bin").write_bytes(b"not read")
    message = error_line(capsys, script, *teacher_of(script, tmp_path), "--data_dir", glue)
    assert "dev.tsv, line 14: label '2'; expected one of 0, 1" in message


@pytest.mark.parametrize("script", SCRIPTS.values(), ids=SCRIPTS)
def test_a_missing_dev_file_is_named_before_the_training_rows_are_encoded(tmp_path, capsys, script):
    Chain(tmp_path, write_csv(tmp_path / "my_data"))
    make_model(tmp_path / "teacher", labels=("0", "1"))
    glue = make_glue(tmp_path / "SST-2")
    (glue / "dev.tsv").unlink()
    with (glue / "train.tsv").open("a", encoding="utf-8") as file:
        file.write("x\tit was good\t2\n")
    message = error_line(capsys, script, *teacher_of(script, tmp_path), "--data_dir", glue)
    assert "dev.tsv: no such file" in message


def test_a_student_with_other_label_names_is_refused_before_the_weights_are_read(tmp_path, capsys):
    Chain(tmp_path, write_csv(tmp_path / "my_data"))
    make_model(tmp_path / "teacher", labels=MOODS)
    make_model(tmp_path / "general", labels=("a", "b", "c"))
    (tmp_path / "teacher" / "pytorch_model.bin").write_bytes(b"not read")
    message = error_line(capsys, task_distill, *teacher_of(task_distill, tmp_path))
    assert "general" in message and "['a', 'b', 'c']" in message


# ------------------------------------------------------------------ parts of the rows


def test_a_share_of_train_serves_as_dev_and_is_never_trained_on(tmp_path):
    chain = Chain(tmp_path, write_csv(tmp_path / "my_data", rows=60, splits=("train",)))
    parts = ("--dev_share", 0.2, "--test_share", 0.2)
    result = read_json(chain.finetune("teacher", *parts) / "eval_results.json")
    test = chain.evaluate("teacher", *parts, "--eval_split", "test")
    assert test["split"] == "test"
    assert result["train_rows"] + result["rows"] + test["rows"] == 60
    stored = chain.evaluate("teacher", "--task_name", tmp_path / "teacher" / "task.json")
    assert stored["metrics"] == result["metrics"] and stored["rows"] == result["rows"]


def test_measuring_on_rows_that_a_model_was_trained_on_is_said_loudly(tmp_path, caplog):
    chain = Chain(tmp_path, write_csv(tmp_path / "my_data", rows=60, splits=("train",)))
    chain.finetune("teacher", "--dev_share", 0.2)
    chain.evaluate("teacher", "--dev_share", 0.2)
    assert "trained on are too good" not in caplog.text
    chain.evaluate("teacher", "--dev_share", 0.3)
    assert "trained with --dev_share 0.2 --test_share 0, here they are 0.3 and 0" in caplog.text


def test_teacher_and_student_may_learn_from_different_halves(tmp_path):
    chain = Chain(tmp_path, write_csv(tmp_path / "my_data", rows=60))
    chain.finetune("teacher", "--train_split", "train")
    chain.distil("student", "general", "--pred_distill", "--train_split", "transfer")
    rows = [read_json(tmp_path / folder / "eval_results.json")["train_rows"]
            for folder in ("teacher", "student")]
    assert sum(rows) == 60 and min(rows) > 15


@pytest.mark.parametrize("more", [(), ("--pred_distill",)])
def test_training_without_a_dev_set_is_one_line_that_names_the_way_out(tmp_path, capsys, more):
    Chain(tmp_path, write_csv(tmp_path / "my_data", splits=("train", "test")))
    make_model(tmp_path / "teacher", labels=MOODS)
    message = error_line(capsys, task_distill, *teacher_of(task_distill, tmp_path), *more)
    assert "no labelled split 'dev'" in message and "--dev_share 0.1" in message


# ------------------------------------------------------------------ --eval_split


@pytest.mark.parametrize(("flags", "said"), [
    (("--do_eval", "--eval_split", "test"), "no labelled split 'test'; expected one of train, dev"),
    (("--do_eval", "--eval_split", "dev", "tset"), "no labelled split 'tset'"),
    (("--eval_split", "dev"), "--eval_split"),
])
@pytest.mark.parametrize("script", [task_distill, quantize], ids=["distil", "quantize"])
def test_a_split_that_the_task_lacks_is_one_line(tmp_path, capsys, script, flags, said):
    Chain(tmp_path, write_csv(tmp_path / "my_data", splits=("train", "dev")))
    make_model(tmp_path / "teacher", labels=MOODS)
    arguments = [value for value in teacher_of(script, tmp_path) if value != "--do_eval"]
    message = error_line(capsys, script, *arguments, *flags)
    assert said in message and not (tmp_path / "out").exists()


def test_a_test_file_without_labels_is_no_split_to_measure_on(tmp_path, capsys):
    chain = Chain(tmp_path, write_csv(tmp_path / "my_data"))
    make_model(tmp_path / "teacher", labels=MOODS)
    (chain.data / "test.csv").write_text("text\nit was good\n", encoding="utf-8")
    message = error_line(capsys, task_distill, *teacher_of(task_distill, tmp_path), "--do_eval",
                         "--eval_split", "test")
    assert "no labelled split 'test'" in message


def test_nothing_of_a_training_run_is_measured_on_test(tmp_path):
    chain = Chain(tmp_path, write_csv(tmp_path / "my_data"))
    chain.finetune()
    assert {split for line in read_log(tmp_path / "teacher") for split in line["all_metrics"]} == {
        "dev"}
    (chain.data / "test.csv").unlink()
    assert (chain.finetune("again") / "pytorch_model.bin").read_bytes() == (
        tmp_path / "teacher" / "pytorch_model.bin").read_bytes()


# ------------------------------------------------------------------ copies of the description


def test_a_model_that_is_quantized_without_data_keeps_its_task(tmp_path):
    chain = Chain(tmp_path, write_csv(tmp_path / "my_data"))
    chain.finetune()
    folder = chain.quantize("half", "teacher", "--method", "fp16", "--format", "torch")
    assert read_json(folder / "task.json") == read_json(tmp_path / "teacher" / "task.json")


def test_the_description_of_an_overwritten_model_goes_with_it(tmp_path):
    chain = Chain(tmp_path, write_csv(tmp_path / "my_data"))
    chain.finetune()
    make_model(tmp_path / "plain", labels=("0", "1"))
    folder = chain.quantize("teacher", "plain", "--method", "fp16", "--format", "torch",
                            "--overwrite_output_dir")
    assert not (folder / "task.json").exists()

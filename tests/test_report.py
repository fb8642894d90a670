"""The report: every score with its split and rule, published numbers only where they compare."""

import json
from pathlib import Path

import matplotlib.image
import pytest

import report
from transformer.evaluation import write_results
from transformer.file_utils import write_json
from transformer.runtime import run_script
from transformer.tasks import write_tsv


class Run:
    """A run's folders, written as the scripts write them."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.lines: list[str] = []
        sentences = [["g", label, "", f"sentence {i}"] for i, label in enumerate("1110")]
        write_tsv(root / "glue" / "CoLA" / "dev.tsv", sentences)
        header = ["Quality", "#1 ID", "#2 ID", "#1 String", "#2 String"]
        write_tsv(root / "glue" / "MRPC" / "dev.tsv",
                  [header, *([label, "1", "2", "a b", "c d"] for label in "1101")])  # fmt: skip

    def add(self, kind: str, model: str, task: str, best: dict, last: dict | None = None,
            log: list[dict] | None = None, name: str = "") -> None:
        """Add a model with an evaluation folder and a training folder."""
        folder = self.root / f"{name or model}_{kind}_{task}"
        training = self.root / f"{name or model}_{kind}_{task}_training"
        metrics = {"metrics": best, "all_metrics": {"dev": best}, "rows": 4, "task": task}
        write_results(folder, {**metrics, "selection": "none: this checkpoint as it is"})
        if last is not None:
            rule = "best of 3 dev evaluations"
            write_results(training, {**metrics, "last": last, "best": best, "selection": rule})
        if log is not None:
            training.mkdir(exist_ok=True)
            lines = [json.dumps(record) for record in log]
            (training / "log.jsonl").write_text("\n".join(lines) + '\n{"cut')
        self.lines.append("\t".join([kind, model, task, str(folder), str(training)]))

    def report(self, *flags: str) -> dict:
        """Run report.py and return results.json."""
        manifest = self.root / "manifest.tsv"
        manifest.write_text("\n".join(self.lines) + "\n")
        run_script(report.main, report.get_args_parser(), [
            "--manifest", str(manifest), "--results_dir", str(self.root / "out"),
            "--glue_dir", str(self.root / "glue"), *flags])  # fmt: skip
        return json.loads((self.root / "out" / "results.json").read_text())

    @property
    def page(self) -> str:
        return (self.root / "out" / "results.md").read_text()


@pytest.fixture
def run(tmp_path) -> Run:
    made = Run(tmp_path)
    made.add("teacher", "teacher", "CoLA", {"mcc": 0.5}, last={"mcc": 0.48})
    made.add("student", "tinybert_4l", "CoLA", {"mcc": 0.401}, last={"mcc": 0.39})
    return made


def test_best_and_last_stand_side_by_side_in_percent(run, capsys):
    run.report()
    assert "| tinybert_4l | 40.1 / 39.0 |" in run.page
    assert "best of 3 dev evaluations" in run.page
    assert "tinybert_4l       40.1 / 39.0" in capsys.readouterr().out


def test_the_majority_class_is_computed_from_the_dev_set(run):
    run.add("teacher", "teacher", "MRPC", {"acc": 0.8, "f1": 0.9, "acc_and_f1": 0.85})
    result = run.report()
    assert result["majority_class"]["CoLA"]["dev"] == {"mcc": 0.0}
    assert result["majority_class"]["MRPC"]["dev"]["acc"] == 0.75
    assert "| majority class | 0.0 | 85.7 |" in run.page
    assert "MRPC f1" in run.page


def test_published_numbers_appear_only_where_they_compare(run):
    result = run.report()
    assert result["published"] is None
    assert "not comparable" in run.page
    result = run.report("--published_numbers")
    assert "| BERT-base (paper, test) | 52.8 |" in run.page
    assert "| TinyBERT4 (paper, dev) | 50.8 |" in run.page
    assert "| TinyBERT4, lr 1.25e-5 (seed, dev) | 37.2 |" in run.page
    assert {row["split"] for row in result["published"]} == {"dev", "test"}


def test_of_several_settings_the_best_counts_and_that_is_said(run):
    for name, score in (("a", 0.2), ("b", 0.6), ("c", 0.3)):
        run.add("student", "tinybert_6l", "CoLA", {"mcc": score}, last={"mcc": score}, name=name)
    scores = [s for s in run.report()["scores"] if s["name"] == "tinybert_6l"]
    assert [s["best"]["dev"]["mcc"] for s in scores] == [0.6]
    assert scores[0]["selection"].startswith("best of 3 settings by mcc on dev")


def test_mnli_has_a_column_for_each_dev_set(run):
    run.add("teacher", "teacher", "MNLI", {"acc": 0.84})
    folder = run.root / "teacher_teacher_MNLI"
    both = {"dev": {"acc": 0.84}, "dev_mm": {"acc": 0.83}}
    write_results(folder, {"metrics": both["dev"], "all_metrics": both, "rows": 4})
    run.report()
    assert "| CoLA mcc | MNLI acc | MNLI-mm acc |" in run.page
    assert "| 84.0 | 83.0 |" in run.page


def test_baselines_are_named_for_what_they_lack(run):
    run.add("baseline_scratch", "tinybert_4l", "CoLA", {"mcc": 0.1})
    run.add("untrained", "tinybert_6l_smart_init_direct", "CoLA", {"mcc": 0.05})
    run.report()
    assert "| tinybert_4l, labels only, random start | 10.0 |" in run.page
    assert "| tinybert_6l_smart_init_direct, no task distillation | 5.0 |" in run.page


@pytest.fixture
def smaller(run) -> Run:
    """A run with smaller students, and latencies of some of its models."""
    run.add("student", "tinybert_6l", "CoLA", {"mcc": 0.45})
    for kind, name, score, fact in (
        ("pruned", "a", 0.39, {"constraint": 0.1}), ("pruned", "b", 0.35, {"constraint": 0.3}),
        ("quantized", "c", 0.4, {"method": "int8-dynamic", "format": "onnx"}),
    ):  # fmt: skip
        run.add(kind, "tinybert_4l", "CoLA", {"mcc": score}, name=name)
        write_json(run.root / f"{name}_{kind}_CoLA_training" / report.SMALLER[kind], fact)
    times = {"teacher_teacher_CoLA": 40, "tinybert_4l_student_CoLA": 8, "a_pruned_CoLA": 7,
             "c_quantized_CoLA": 2}
    engines = {"c_quantized_CoLA": "onnx int8-dynamic"}
    write_json(run.root / "latency" / "inference.json", {"rows": [
        {"model": name, "engine": engines.get(name, "torch fp32"), "median": float(time),
         "p95": 1.5 * time, "megabytes": 50.0, "parameters": 14_500_000}
        for name, time in times.items()]})
    run.lines.append(f"latency\t-\tCoLA\t{run.root / 'latency'}\t{run.root / 'latency'}")
    return run


def test_smaller_students_stand_below_the_student_they_were_made_from(smaller):
    smaller.report()
    table = [line for line in smaller.page.partition("## ")[0].splitlines() if "|" in line]
    assert table[3:] == [
        "| teacher | 50.0 / 48.0 |", "| tinybert_4l | 40.1 / 39.0 |",
        "| tinybert_4l, K-prune 10 % removed | 39.0 |",
        "| tinybert_4l, K-prune 30 % removed | 35.0 |",
        "| tinybert_4l, int8-dynamic ONNX | 40.0 |", "| tinybert_6l | 45.0 |",
    ]  # fmt: skip


def test_latencies_stand_beside_the_scores_of_the_same_models_and_in_a_picture(smaller):
    result = smaller.report()
    assert [(speed["name"], speed["median"], speed["accuracy"]) for speed in result["speeds"]] == [
        ("teacher", 40, 0.5), ("tinybert_4l", 8, 0.401),
        ("tinybert_4l, K-prune 10 % removed", 7, 0.39),
        ("tinybert_4l, int8-dynamic ONNX", 2, 0.4)]  # fmt: skip
    row = ("| tinybert_4l, int8-dynamic ONNX | onnx int8-dynamic | 50.0 | 14.5M | 2.00 | 3.00 |"
           " 20.0 | 40.0 |")
    assert row in smaller.page
    assert "tradeoff.png" in smaller.page
    assert matplotlib.image.imread(smaller.root / "out" / "tradeoff.png").std() > 0.05


def test_without_latencies_there_is_no_section_on_them(run):
    run.lines.append("latency\t-\tCoLA\tnowhere\tnowhere")
    assert run.report()["speeds"] == []
    assert "Size and latency" not in run.page
    assert not (run.root / "out" / "tradeoff.png").exists()


def test_a_run_that_is_not_finished_yet_is_reported_as_far_as_it_went(run, caplog):
    run.lines.append("student\ttinybert_6l\tCoLA\tnowhere\tnowhere")
    result = run.report()
    assert {score["name"] for score in result["scores"]} == {"teacher", "tinybert_4l"}
    assert "nowhere" in caplog.text


def test_pictures_show_bars_and_curves_and_an_unfinished_log_line_does_no_harm(run):
    losses = [{"step": i, "epoch": i / 4, "att_loss": 9.0 / i, "rep_loss": 2.0 / i}
              for i in range(1, 9)]  # fmt: skip
    run.add("general", "tinybert_4l", "-", {}, log=losses)
    run.add("intermediate", "tinybert_4l", "CoLA", {}, log=losses)
    run.add("prediction", "tinybert_4l", "CoLA", {}, log=[
        {"step": 5, "epoch": 1.0, "cls_loss": 0.6, "metrics": {"mcc": 0.4}}])  # fmt: skip
    result = run.report()
    ends = {Path(folder).name: ends for folder, ends in result["losses"].items()}
    assert ends["tinybert_4l_general_-_training"]["first"]["att_loss"] == 9.0
    assert ends["tinybert_4l_general_-_training"]["last"]["att_loss"] == 9.0 / 8
    for name in ("scores.png", "loss_curves.png"):
        picture = matplotlib.image.imread(run.root / "out" / name)
        assert picture.std() > 0.05, f"{name} is blank"


def test_a_manifest_line_with_missing_fields_is_named(run, capsys):
    run.lines.append("student\ttinybert_6l")
    with pytest.raises(SystemExit) as stopped:
        run.report()
    assert stopped.value.code == 2
    assert "manifest.tsv, line 3: 2 fields; expected 5" in capsys.readouterr().err


def test_a_run_without_any_result_is_an_error_and_writes_nothing(tmp_path, capsys):
    empty = Run(tmp_path)
    empty.lines.append("student\ttinybert_6l\tCoLA\tnowhere\tnowhere")
    with pytest.raises(SystemExit):
        empty.report()
    assert "none of its folders has eval_results.json" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()

"""The report: what it finds in a run's folders, and how tables and pictures tell it."""

import json
import re
from collections.abc import Iterator
from pathlib import Path

import helpers
import matplotlib.pyplot as plt
import pytest
from helpers import make_rows, read_json

import report
from transformer import pictures, run_records
from transformer.evaluation import write_results
from transformer.file_utils import write_json
from transformer.own_tasks import find_task, save_task
from transformer.table_files import write_tsv
from transformer.tables import display_width
from transformer.tasks import Task, get_task


class Run:
    """A run's folders, written as the scripts write them."""

    def __init__(self, root: Path) -> None:
        self.models, self.results, self.glue = root / "models", root / "results", root / "glue"
        sentences = [["g", label, "", f"sentence {i}"] for i, label in enumerate("1110")]
        write_tsv(self.glue / "CoLA" / "dev.tsv", sentences)

    def trained(self, name: str, source: str, task: str = "", best: dict | None = None,
                last: dict | None = None, log: list[dict] | None = None, layers: int = 4,
                results: dict | None = None, **arguments) -> None:
        """Add the folder of a finished training run; with `best`, of one that was scored."""
        folder = self.models / name
        write_json(folder / "config.json", {"num_hidden_layers": layers})
        write_json(folder / "args.json", {
            **({"task": task} if task else {}), "arguments": {"do_eval": False, **arguments},
            "student": f"elsewhere/{source}"})
        scores = {} if best is None else {
            "task": task, "metrics": best, "all_metrics": {"dev": best}, "last": last or best,
            "rows": 4, "selection": "best of 3 dev evaluations"}
        write_results(folder, {"losses": {}, **scores, **(results or {})})
        if log is not None:
            lines = [json.dumps(record) for record in log]
            (folder / "log.jsonl").write_text("\n".join(lines), encoding="utf-8")

    def teacher(self, task: str, best: dict, **more) -> None:
        self.trained(f"final_{task}_teacher", "bert-base-uncased", task, best, layers=12,
                     from_scratch=False, **more)

    def student(self, name: str, task: str, best: dict, last: dict | None = None, **more) -> None:
        """Add a student's two stages of task distillation."""
        teacher = f"elsewhere/final_{task}_teacher/"
        self.trained(f"tmp_{name}", f"distilled_{name}", task, pred_distill=False,
                     teacher_model=teacher)
        self.trained(name, f"tmp_{name}", task, best, last, pred_distill=True,
                     teacher_model=teacher, **more)

    def evaluated(self, name: str, task: str, metrics: dict) -> None:
        """Add an evaluation of a model by task_distill.py --do_eval."""
        write_results(self.results / "eval" / name, {
            "task": task, "model": f"elsewhere/{name}", "metrics": metrics["dev"],
            "all_metrics": metrics, "rows": 4, "selection": "none: this checkpoint as it is"})

    def smaller(self, name: str, mcc: float, source: str, **record) -> None:
        """Add what main.py of K-prune, or quantize.py, made of a student."""
        source = f"../models/{source}"
        if "constraint" in record:
            write_json(self.models / name / "kprune.json", {"model": source, **record})
        else:
            write_json(self.models / name / "quantization.json", {"source": source, **record})
        self.evaluated(name, "cola", {"dev": {"mcc": mcc}})

    def report(self, *flags: str) -> dict:
        """Run report.py and return results.json."""
        helpers.run(report, "--models_dir", self.models, "--results_dir", self.results,
                    "--glue_dir", self.glue, *flags)
        return read_json(self.results / "results.json")

    def names(self) -> list[str]:
        return list(dict.fromkeys(score["name"] for score in self.report()["scores"]))

    @property
    def page(self) -> str:
        return (self.results / "results.md").read_text(encoding="utf-8")


@pytest.fixture
def run(tmp_path) -> Run:
    made = Run(tmp_path)
    made.teacher("cola", {"mcc": 0.5}, last={"mcc": 0.48})
    made.student("distilled_tinybert_4l_cola", "cola", {"mcc": 0.401}, {"mcc": 0.39})
    return made


@pytest.fixture
def smaller(run) -> Run:
    """A run with smaller students, and latencies of some of its models."""
    source = "distilled_tinybert_4l_cola"
    run.student("distilled_tinybert_6l_cola", "cola", {"mcc": 0.45})
    run.smaller("a", 0.39, source, constraint=0.1)
    run.smaller("b", 0.35, source, constraint=0.3)
    run.smaller("c", 0.4, source, method="int8-dynamic", format="onnx")
    run.smaller("d", 0.34, "b", method="fp16", format="onnx")
    rows = [("final_cola_teacher", 40, 1), (source, 8, 1), (source, 1, 2), ("a", 7, 1), ("c", 2, 1)]
    write_json(run.results / "latency" / "inference.json", {"rows": [
        {"model": name, "engine": "torch fp32", "median": float(time), "p95": 1.5 * time,
         "megabytes": 50.0, "parameters": 14_500_000, "threads": threads, "batch": 1,
         "length": "CoLA"} for name, time, threads in rows]})
    return run


@pytest.fixture(autouse=True)
def figures(monkeypatch) -> Iterator[dict[str, plt.Figure]]:
    """The pictures by their names, not saved: that takes most of a report's time."""
    kept: dict[str, plt.Figure] = {}
    monkeypatch.setattr(
        pictures, "save_figure", lambda figure, path: kept.update({path.name: figure}))
    yield kept
    plt.close("all")


# ------------------------------------------------------------------ what is found


def test_the_evaluation_if_any_and_the_last_score_stand_side_by_side_in_percent(run, capsys):
    run.report()
    assert "| tinybert_4l | 40.1 / 39.0 |" in run.page
    assert "best of 3 dev evaluations" in run.page
    assert "tinybert_4l       40.1/39.0" in capsys.readouterr().out
    run.evaluated("distilled_tinybert_4l_cola", "cola", {"dev": {"mcc": 0.402}})
    run.report()
    assert "| tinybert_4l | 40.2 / 39.0 |" in run.page


def test_baselines_are_told_from_teachers_by_where_they_come_from_and_how_deep_they_are(run):
    run.trained("distilled_tinybert_4l", "tinybert_4l_config", pregenerated_data="json")
    for kind, source, scratch in (("scratch", "tinybert_4l_config", True),
                                  ("general", "distilled_tinybert_4l", False),
                                  ("smart", "copied_layers", False)):
        run.trained(f"baseline_{kind}_tinybert_4l_cola", source, "cola", {"mcc": 0.1},
                    from_scratch=scratch)
    run.trained("refined_teacher", "final_cola_teacher", "cola", {"mcc": 0.51}, layers=12,
                from_scratch=False)
    (run.models / "tinybert_4l_smart_cola").mkdir()
    run.evaluated("tinybert_4l_smart_cola", "cola", {"dev": {"mcc": 0.05}})
    assert run.names() == [
        "teacher", "refined_teacher", "tinybert_4l",
        "tinybert_4l, labels only, after general d.", "tinybert_4l, labels only, copied layers",
        "tinybert_4l, labels only, random start", "tinybert_4l_smart, no task distillation"]


def test_what_was_moved_away_or_is_not_finished_or_lies_deeper_does_not_count(run, caplog):
    for name in ("distilled_tinybert_6l_cola.old", "demo/distilled_tinybert_6l_cola"):
        run.student(name, "cola", {"mcc": 0.9})
    run.student("distilled_tinybert_9l_cola", "cola", {"mcc": 0.9})
    (run.models / "distilled_tinybert_9l_cola" / "eval_results.json").unlink()
    run.evaluated("distilled_tinybert_9l_cola", "cola", {"dev": {"mcc": 0.9}})
    assert run.names() == ["teacher", "tinybert_4l"]
    assert "distilled_tinybert_9l_cola: not finished" in caplog.text


def test_smaller_students_stand_below_the_one_that_they_were_made_from(smaller):
    smaller.report()
    table = [line for line in smaller.page.partition("## ")[0].splitlines() if "|" in line]
    assert table[3:] == [
        "| teacher | 50.0 / 48.0 |", "| tinybert_4l | 40.1 / 39.0 |",
        "| tinybert_4l, K-prune 10 % removed | 39.0 |",
        "| tinybert_4l, K-prune 30 % removed | 35.0 |",
        "| tinybert_4l, K-prune 30 % removed, fp16 ONNX | 34.0 |",
        "| tinybert_4l, int8-dynamic ONNX | 40.0 |", "| tinybert_6l | 45.0 / 45.0 |"]


def test_of_a_sweep_all_settings_are_told_and_the_best_by_name(run):
    tried = [{"folder": f"lr{rate}_batch16", "learning_rate": float(rate), "train_batch_size": 16,
              "metrics": {"mcc": mcc}, "last": {"mcc": mcc}}
             for rate, mcc in (("1e-05", 0.3), ("2e-05", 0.6))]
    run.student("distilled_tinybert_6l_cola", "cola", {"mcc": 0.6},
                results={"sweep": tried, "chosen": "lr2e-05_batch16"})
    log = run.models / "distilled_tinybert_6l_cola" / "lr2e-05_batch16" / "log.jsonl"
    log.parent.mkdir()
    log.write_text('{"step": 5, "epoch": 1.0, "cls_loss": 0.6}', encoding="utf-8")
    result = run.report()
    assert ("| lr2e-05_batch16, the best on dev of lr1e-05_batch16 mcc 30.0, lr2e-05_batch16 mcc"
            " 60.0; best of 3 dev evaluations |") in run.page
    assert [ends["last"]["cls_loss"] for ends in result["losses"].values()] == [0.6]


def test_mnli_has_a_column_for_each_dev_set(run):
    run.teacher("mnli", {"acc": 0.84})
    run.evaluated("final_mnli_teacher", "mnli", {"dev": {"acc": 0.84}, "dev_mm": {"acc": 0.83}})
    for split in ("matched", "mismatched"):
        write_tsv(run.glue / "MNLI" / f"dev_{split}.tsv", make_rows(get_task("mnli"), 6, 0))
    run.report()
    assert "| CoLA mcc | MNLI acc | MNLI-mm acc |" in run.page
    assert "| 84.0 / 84.0 | 83.0 |" in run.page


def test_the_majority_class_is_computed_from_the_dev_set(run):
    run.teacher("mrpc", {"acc": 0.8, "f1": 0.9, "acc_and_f1": 0.85})
    header = ["Quality", "#1 ID", "#2 ID", "#1 String", "#2 String"]
    write_tsv(run.glue / "MRPC" / "dev.tsv",
              [header, *([label, "1", "2", "a b", "c d"] for label in "1101")])
    assert run.report()["majority_class"]["MRPC"]["dev"]["acc"] == 0.75
    assert "| dev, best / last | CoLA mcc | MRPC f1 |" in run.page
    assert "| majority class | 0.0 | 85.7 |" in run.page


def test_published_numbers_appear_only_where_they_compare(run):
    assert run.report()["published"] is None
    assert "not comparable" in run.page
    assert run.report("--published_numbers")["published"][0]["percent"]["CoLA"] == 52.8
    assert "| BERT-base (paper, test) | 52.8 |" in run.page
    assert "| TinyBERT4, lr 1.25e-5 (original, dev) | 37.2 |" in run.page


def test_latencies_if_any_stand_beside_the_scores_of_the_same_models(smaller):
    result = smaller.report()
    assert [(speed["name"], speed["median"], speed["accuracy"]) for speed in result["speeds"]] == [
        ("teacher", 40, 0.5), ("tinybert_4l", 8, 0.401),
        ("tinybert_4l, K-prune 10 % removed", 7, 0.39),
        ("tinybert_4l, int8-dynamic ONNX", 2, 0.4)]
    row = ("| tinybert_4l, int8-dynamic ONNX | torch fp32 | 50.0 | 14.5M | 2.00 | 3.00 |"
           " 20.0 | 40.0 |")
    assert row in smaller.page
    (smaller.results / "latency" / "inference.json").unlink()
    assert smaller.report()["speeds"] == [] and "Size and latency" not in smaller.page


@pytest.mark.parametrize(("file", "content", "message"), [
    ("log.jsonl", '{"step": 1}\n{"st', "log.jsonl, line 2: not valid JSON"),
    ("log.jsonl", '{"step": 1}', "log.jsonl: not as the scripts record it.*epoch"),
    ("args.json", '{"arguments": 3}', "distilled_tinybert_4l_cola: not as the scripts record it"),
    ("eval_results.json", '{"all_metrics": 3}', "distilled_tinybert_4l_cola: not as the scripts"),
])
def test_a_record_that_no_script_wrote_is_named(run, capsys, file, content, message):
    (run.models / "distilled_tinybert_4l_cola" / file).write_text(content)
    folders = ["--models_dir", run.models, "--results_dir", run.results]
    assert re.search(message, helpers.error_line(capsys, report, *folders))


def test_a_run_without_any_result_is_an_error_and_writes_nothing(tmp_path, capsys):
    folders = ["--models_dir", tmp_path, "--results_dir", tmp_path / "results"]
    assert "no finished model with a score" in helpers.error_line(capsys, report, *folders)
    assert not (tmp_path / "results").exists()


# ------------------------------------------------------------------ tasks of a user's own


def own_run(run: Run, task: Task, test: bool = True) -> None:
    """Add a teacher, a student, one of labels only and an int8 student of an own task."""
    best = dict(zip(task.metrics, (0.912, 0.873), strict=True))
    folders = {f"final_{task.name}_teacher": best}
    run.trained(f"final_{task.name}_teacher", "bert", task.name, best, layers=12,
                from_scratch=False)
    run.student(f"distilled_student_{task.name}", task.name, best)
    run.trained(f"baseline_general_student_{task.name}", "given", task.name, best,
                from_scratch=False)
    write_json(run.models / "int8" / "quantization.json", {
        "source": f"distilled_student_{task.name}", "method": "int8-dynamic", "format": "onnx"})
    run.evaluated("int8", task.name, {"dev": {name: 0.9 for name in task.metrics}})
    folders |= dict.fromkeys((f"distilled_student_{task.name}", "int8",
                              f"baseline_general_student_{task.name}"))
    for number, folder in enumerate(folders):
        save_task(task, run.models / folder)
        name = "model.onnx" if folder == "int8" else "pytorch_model.bin"
        (run.models / folder / name).write_bytes(bytes(2_000_000 * (number + 1)))
        if test:
            write_results(run.results / "eval" / f"{folder}_test", {
                "task": task.name, "model": f"elsewhere/{folder}", "split": "test",
                "all_metrics": {"test": dict.fromkeys(task.metrics, 0.8)}, "rows": 9,
                "per_class": {"test": {"x": {"rows": 9}}}, "selection": "none"})
    write_json(run.results / "latency" / "inference.json", {"rows": [
        {"model": folder, "engine": "torch fp32", "median": 4.25, "p95": 5.0, "megabytes": 2.0,
         "parameters": 500, "threads": 1, "batch": 1, "length": task.name} for folder in folders]})


@pytest.fixture
def intents(tmp_path) -> Task:
    """An own task of three classes, in a folder of CSV files."""
    for split in ("train", "dev", "test"):
        rows = [f"play it {split} {number},{'abacab'[number % 6]}" for number in range(12)]
        (tmp_path / "intents").mkdir(exist_ok=True)
        (tmp_path / "intents" / f"{split}.csv").write_text("\n".join(["text,label", *rows]))
    return find_task(None, tmp_path / "intents")


def test_a_run_of_an_own_task_is_one_table_of_dev_test_size_and_time(tmp_path, intents, capsys):
    run = Run(tmp_path)
    own_run(run, intents)
    result = run.report("--data_dirs", tmp_path / "intents")
    assert [line for line in run.page.partition("![")[0].splitlines() if line] == [
        "# Results", "## intents",
        "3 classes, 4 rows of dev, 9 rows of test. Percent, of the checkpoint that was best on dev,"
        " so dev flatters it; nothing was chosen on test. MB: weights on disk. ms: median for one"
        " row on one thread of this CPU.",
        "| model | dev acc | dev macro_f1 | test acc | test macro_f1 | MB | ms |",
        "| --- | ---: | ---: | ---: | ---: | ---: | ---: |",
        "| majority class | 50.0 | 22.2 | 50.0 | 22.2 |  |  |",
        "| teacher | 91.2 | 87.3 | 80.0 | 80.0 | 2.0 | 4.25 |",
        "| student | 91.2 | 87.3 | 80.0 | 80.0 | 4.0 | 4.25 |",
        "| student, int8-dynamic ONNX | 90.0 | 90.0 | 80.0 | 80.0 | 6.0 | 4.25 |",
        "| student, labels only, after general d. | 91.2 | 87.3 | 80.0 | 80.0 | 8.0 | 4.25 |"]
    printed = capsys.readouterr().out
    assert max(map(display_width, printed.splitlines())) <= 80
    assert printed.count("teacher") == 1  # all columns in one table
    assert not re.search("GLUE|[Pp]ublished|comparable", run.page + printed)
    assert result["majority_class"]["intents"]["test"]["acc"] == 0.5
    assert result["scores"][0]["best"]["test"] == {"acc": 0.8, "macro_f1": 0.8}


def test_own_tasks_stand_below_glues_and_no_published_number_beside_them(run, intents, figures):
    own_run(run, intents, test=False)
    run.report("--published_numbers")
    assert "| BERT-base (paper, test) | 52.8 |" in run.page
    assert "| model | dev acc | dev macro_f1 | MB | ms |" in run.page
    assert "best on dev, which flatters it. MB" in run.page
    assert [axes.get_title() for axes in figures["scores.png"].axes] == ["CoLA mcc", "intents acc"]


def test_the_metrics_of_an_own_task_keep_its_order_and_chinese_names_are_aligned(tmp_path, capsys):
    run = Run(tmp_path)
    own_run(run, Task("外卖", "外卖", ("差评", "好评"), "评论", None, "标签", ("macro_f1", "acc")))
    run.report()
    assert "| model | dev macro_f1 | dev acc | test macro_f1 | test acc | MB | ms |" in run.page
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith("外卖 ") and len({display_width(line) for line in lines if "80.0" in
                                               line or "外卖" in line}) == 1


def test_data_of_a_task_that_the_run_lacks_is_named(run, intents, tmp_path, capsys):
    folder = tmp_path / "intents"
    message = helpers.error_line(capsys, report, "--models_dir", run.models, "--results_dir",
                                 run.results, "--data_dirs", folder)
    assert f"--data_dirs {folder}: the task 'intents'; expected a task of this run" in message


# ------------------------------------------------------------------ pictures and the terminal


def test_a_short_last_interval_is_left_out_of_the_curve():
    log = [{"step": step, "epoch": step / 10, "loss": loss}
           for step, loss in ((4, 3.0), (8, 2.0), (9, 7.0))]
    assert run_records.loss_curve(log, ["loss"]) == ([0.4, 0.8], [3.0, 2.0])
    for record, steps in zip(log, (2, 2, 2), strict=True):  # as the log itself has it
        record["steps"] = steps
    assert run_records.loss_curve(log, ["loss"]) == ([0.4, 0.8, 0.9], [3.0, 2.0, 7.0])


def test_loss_curves_are_logarithmic_from_a_decade_on_and_have_the_legend_outside(run, figures):
    log = [{"step": i, "epoch": i / 4, "att_loss": 16.0 / i, "rep_loss": 9.0 / i, "cls_loss": 1 / i}
           for i in range(1, 11)]
    run.trained("distilled_tinybert_4l", "config", log=log, pregenerated_data="json")
    run.trained("distilled_tinybert_6l", "config", log=log[:5], pregenerated_data="json")
    run.student("distilled_tinybert_6l_cola", "cola", {"mcc": 0.4}, log=log[:9])
    ends = run.report()["losses"][str(run.models / "distilled_tinybert_4l")]
    assert (ends["first"]["att_loss"], ends["last"]["att_loss"]) == (16.0, 1.6)
    panels = {axes.get_title(): axes for axes in figures["loss_curves.png"].axes
              if axes.get_visible()}
    assert {title: axes.get_yscale() for title, axes in panels.items()} == {
        "General, attention": "log", "General, hidden states": "log", "CoLA, logits": "linear"}
    assert [len(line.get_xdata()) for line in panels["General, attention"].lines] == [10, 5]
    assert panels["CoLA, logits"].lines[0].get_ydata().tolist() == [1 / i for i in range(1, 10)]
    [legend] = figures["loss_curves.png"].legends
    assert {text.get_text() for text in legend.get_texts()} == {"tinybert_4l", "tinybert_6l"}
    assert not any(axes.get_legend() or overlap(legend, axes) for axes in panels.values())


def test_the_curve_of_hintons_loss_is_that_of_its_terms_sum(run, figures):
    log = [{"step": i, "epoch": i / 4, "hard_loss": 1.0 / i, "soft_loss": 2.0 / i,
            "att_loss": 5.0} for i in (1, 2, 4)]
    run.student("distilled_tinybert_6l_cola", "cola", {"mcc": 0.4}, log=log)
    run.report()
    panels = {axes.get_title(): axes for axes in figures["loss_curves.png"].axes}
    assert panels["CoLA, logits"].lines[0].get_ydata().tolist() == [3.0, 1.5, 0.75]


def overlap(legend, axes) -> bool:
    legend.figure.draw_without_rendering()
    return legend.get_window_extent().overlaps(axes.get_tightbbox())


def test_bars_carry_their_values_and_smaller_students_are_among_them(smaller, figures):
    smaller.report()
    [axes] = figures["scores.png"].axes
    names = [label.get_text() for label in axes.get_yticklabels()]
    values = dict(zip(names, (text.get_text() for text in axes.texts), strict=True))
    assert values["tinybert_4l"] == "40.1"
    assert values["tinybert_4l, K-prune 30 % removed"] == "35.0"
    assert values["tinybert_4l, int8-dynamic ONNX"] == "40.0"
    assert [bar.get_width() for bar in axes.patches] == [float(value) for value in values.values()]
    assert [line.get_xdata()[0] for line in axes.lines] == [0.0]  # the majority class


def test_the_tradeoff_has_a_title_and_numbers_at_its_points_that_do_not_overlap(smaller, figures):
    smaller.report()
    figure = figures["tradeoff.png"]
    [axes], [legend] = figure.axes, figure.legends
    assert axes.get_title().startswith("CoLA: score against latency")
    assert axes.get_xscale() == "log"
    assert {text.get_text() for text in axes.texts} == {
        "50.0, 40 ms", "40.1, 8 ms", "39.0, 7 ms", "40.0, 2 ms"}
    boxes = [text.get_window_extent() for text in axes.texts]
    assert all(box.count_overlaps(boxes) == 1 for box in boxes)
    assert not overlap(legend, axes)
    assert [text.get_text() for text in legend.get_texts()][:2] == ["teacher", "tinybert_4l"]


def test_pictures_are_written(smaller, monkeypatch):
    monkeypatch.undo()
    smaller.report()
    assert all((smaller.results / name).read_bytes()[:4] == b"\x89PNG"
               for name in ("scores.png", "loss_curves.png", "tradeoff.png"))

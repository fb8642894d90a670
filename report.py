"""Gather the scores, loss curves and latencies of a run into tables, a JSON file and pictures.

It finds them by itself. The folders directly below --models_dir are the models: how each was made,
and from which other one, stands in its args.json, kprune.json or quantization.json. Their scores
are those of the evaluations in --results_dir/eval, else their own. Writes results.json, results.md,
loss_curves.png, scores.png and, where latencies were measured, tradeoff.png to --results_dir and
prints the tables: one of GLUE's tasks, one of each other task.

Examples:
    python report.py --models_dir models --results_dir results --glue_dir data/glue_data \
        --published_numbers
    python report.py --models_dir models --results_dir results --data_dirs data/mine
"""

import argparse
import logging
import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Any, NamedTuple

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
from matplotlib.axis import Axis
from matplotlib.colors import to_rgba
from matplotlib.font_manager import fontManager
from matplotlib.lines import Line2D
from matplotlib.ticker import LogLocator, NullFormatter, StrMethodFormatter
from matplotlib.transforms import Bbox

from transformer.checkpoint import WEIGHT_FORMS
from transformer.evaluation import majority_baseline
from transformer.file_utils import (
    ONNX_NAME,
    UserError,
    atomic_path,
    parse_json,
    read_json,
    write_json,
    write_text,
)
from transformer.own_tasks import find_task, stored_task
from transformer.run_folder import ARGUMENTS_NAME, RESULTS_NAME
from transformer.runtime import commit_id, run_script
from transformer.tables import markdown_table, text_table
from transformer.tasks import GLUE_TASKS, Task, get_task, load_examples

logger = logging.getLogger(__name__)

SUFFIX = {
    "untrained": ", no task distillation",
    "baseline_scratch": ", labels only, random start",
    "baseline_general": ", labels only, after general d.",
    "baseline_smart": ", labels only, copied layers",
}
# How a smaller student was made: the file that says it, and its key for the model before.
SMALLER = {"pruned": ("kprune.json", "model"), "quantized": ("quantization.json", "source")}
ENGINE_NAME = {"torch": "PyTorch", "onnx": "ONNX"}

# The metric of each task's column, as in the paper's tables; accuracy elsewhere.
SHOWN_METRIC = {"cola": "mcc", "mrpc": "f1", "qqp": "f1", "sts-b": "spearmanr"}
# The panels of loss_curves.png, of general and of task distillation: kind of the runs, losses that
# are added up, title.
CURVES = (
    [("general", ["att_loss"], "attention"), ("general", ["rep_loss"], "hidden states")],
    [("intermediate", ["att_loss", "rep_loss"], "attention + hidden states"),
     ("student", ["cls_loss"], "logits")],
)

# Numbers as published, in percent: model, source and split, scores. MRPC and QQP are F1.
PUBLISHED_COLUMNS = "MNLI MNLI-mm QQP QNLI SST-2 CoLA STS-B MRPC RTE".split()
PUBLISHED = [
    {"model": model, "source": source, "split": split,
     "percent": {column: float(score) for column, score in zip(
         PUBLISHED_COLUMNS, scores.split(), strict=True) if score != "-"}}
    for model, source, split, scores in (
        ("BERT-base", "paper", "test", "83.9 83.4 71.1 90.9 93.4 52.8 85.2 87.5 67.0"),
        ("TinyBERT4", "paper", "test", "82.5 81.8 71.3 87.7 92.6 44.1 80.4 86.4 66.6"),
        ("TinyBERT6", "paper", "test", "84.6 83.2 71.6 90.4 93.1 51.1 83.7 87.3 70.0"),
        ("TinyBERT4", "paper", "dev", "82.8 82.9 - - - 50.8 - 85.8 -"),
        ("TinyBERT4, no general d.", "paper", "dev", "82.5 82.6 - - - 40.8 - 84.1 -"),
        ("TinyBERT4, no task d.", "paper", "dev", "80.6 81.2 - - - 28.5 - 83.8 -"),
        ("TinyBERT4, no augmentation", "paper", "dev", "80.5 81.0 - - - 29.8 - 82.4 -"),
        ("TinyBERT6", "paper", "dev", "84.5 84.5 88.0 91.1 93.0 54.0 89.6 90.6 73.4"),
        ("TinyBERT4, lr 5e-5", "original", "dev", "- - - - 92.3 31.7 - 82.1 53.06"),
        ("TinyBERT4, lr 1.25e-5", "original", "dev", "- - - - 91.8 37.2 - 85.7 58.6"),
        ("TinyBERT6", "original", "dev", "- - - - 92.3 54.3 - 88.8 69.0"),
        ("TinyBERT6 smart direct, no task d.", "original", "dev", "- - - - 83.1 28.2 - 17.7 47.3"),
        ("TinyBERT6 smart direct", "original", "dev", "- - - - 92.0 55.7 - 88.0 67.5"),
        ("TinyBERT6 smart", "original", "dev", "- - - - 93.3 56.2 - 88.5 69.3"),
    )]
# For names of tasks that the first one lacks the characters of.
FONTS = ["DejaVu Sans", "Noto Sans CJK SC", "Noto Sans CJK JP", "PingFang SC", "Microsoft YaHei",
         "SimHei", "WenQuanYi Zen Hei"]
NOT_COMPARABLE = (
    "Published numbers are for BERT-base and its students: not comparable with\n"
    "the small models of this profile."
)


def get_args_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="report.py", description=__doc__.split("\n")[0],
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    add = parser.add_argument
    add("--models_dir", type=Path, required=True, help="folder of the run's model folders")
    add("--results_dir", type=Path, required=True,
        help="folder of the run's evaluations (eval/) and latencies, and to write to")
    add("--glue_dir", type=Path, default=None,
        help="folder of the tasks' folders, for the score of the majority class")
    add("--data_dirs", type=Path, nargs="*", default=[], metavar="FOLDER",
        help="folders of your own tasks, for the same")
    add("--published_numbers", action="store_true",
        help="set the numbers of the paper and of the original repository beside ours")
    return parser


@dataclass
class Model:
    """A model of the run: how it was made (`record`), its scores as fractions of 1 (`results`)."""

    folder: Path
    kind: str
    source: str  # the name of the folder that it was made from
    record: dict[str, Any]
    results: dict[str, Any]
    name: str = ""  # of its row: the student, then what was done to it
    task: Task | None = None  # None for general distillation

    @property
    def student(self) -> str:
        """The student that it is or was made from."""
        return self.name.partition(", ")[0]

    @property
    def scores(self) -> dict[str, dict[str, float]]:
        """Its metrics by split."""
        return self.results["all_metrics"]


class Column(NamedTuple):
    """One column of a table: a split of a task and the metric shown."""

    task: Task
    split: str
    title: str
    metric: str


# ------------------------------------------------------------------ finding the models


def folders_below(path: Path) -> list[Path]:
    """Return the folders directly below `path`, save those that the driver has moved away."""
    return [folder for folder in sorted(path.glob("*"))
            if folder.is_dir() and folder.suffix != ".old"]


def read_if_there(path: Path) -> dict[str, Any]:
    """Read a JSON file; an empty result where there is none."""
    return read_json(path) if path.is_file() else {}


@contextmanager
def naming(place: Path) -> Iterator[None]:
    """Name the folder or file whose records are not as our scripts write them."""
    try:
        yield
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise UserError(f"{place}: not as the scripts record it ({error!r})") from error


def kind_of_run(arguments: dict[str, Any]) -> str | None:
    """Tell from its arguments which script trained a model, and how; None for other scripts."""
    if arguments.get("do_eval"):
        return None
    if "pregenerated_data" in arguments:
        return "general"
    if "pred_distill" in arguments:
        return "student" if arguments["pred_distill"] else "intermediate"
    if "from_scratch" in arguments:
        return "baseline_scratch" if arguments["from_scratch"] else "teacher"
    return None


def read_model(folder: Path) -> Model | None:
    """Read how the model in a folder was made; None where no script has finished one."""
    results = read_if_there(folder / RESULTS_NAME)
    with naming(folder):
        for scores in results.get("all_metrics", {}).values():
            dict(scores)
        for kind, (name, source) in SMALLER.items():
            if record := read_if_there(folder / name):
                return Model(folder, kind, Path(record[source]).name, record, results)
        record = read_if_there(folder / ARGUMENTS_NAME)
        kind = kind_of_run(record.get("arguments", {}))
        if kind and results:
            return Model(folder, kind, Path(record["student"]).name, record, results)
    if kind:
        logger.warning("%s: not finished, left out", folder)
    return None


def layers(folder: Path) -> int:
    """Return the number of layers of the model in a folder, 0 where there is none."""
    return read_if_there(folder / "config.json").get("num_hidden_layers", 0)


def read_models(models_dir: Path, evaluation_dir: Path) -> dict[str, Model]:
    """Return the finished models by the names of their folders.

    Paths are compared by their last part alone: a run may have been moved since.
    """
    models = {folder.name: model for folder in folders_below(models_dir)
              if (model := read_model(folder))}
    depth = max((layers(models_dir / Path(model.record["arguments"]["teacher_model"]).name)
                 for model in models.values() if model.kind in ("intermediate", "student")),
                default=0)
    for model in models.values():
        if model.kind == "teacher" and layers(model.folder) < depth:
            general = model.source in models and models[model.source].kind == "general"
            general |= model.folder.name.startswith("baseline_general_")  # of another run's student
            model.kind = "baseline_general" if general else "baseline_smart"
    for folder in folders_below(evaluation_dir):
        result = read_if_there(folder / RESULTS_NAME)
        path = models_dir / Path(result.get("model", "")).name
        if model := models.get(path.name):
            add_evaluation(model, result)
        elif result and path.is_dir() and not (path / ARGUMENTS_NAME).is_file():
            models[path.name] = Model(path, "untrained", "", {}, result)
    own = {task.name: task for model in models.values() if (task := stored_task(model.folder))}
    for model in models.values():
        name = model.results.get("task") or model.record.get("task")
        model.task = own.get(name) or (get_task(name) if name else None)
    for model in models.values():
        model.name = row_name(model, models)
    return models


def add_evaluation(model: Model, result: dict[str, Any]) -> None:
    """Have the scores of an evaluation take the place of a model's own on the same splits."""
    with naming(model.folder):
        merged = {key: {**model.results.get(key, {}), **result.get(key, {})}
                  for key in ("all_metrics", "per_class")}
        rule = model.results.get("selection", result["selection"])
        on_dev = result if "dev" in result["all_metrics"] or not model.results else {
            "task": result["task"]}
        model.results = {**model.results, **on_dev, **merged, "selection": rule}


def row_name(model: Model, models: dict[str, Model]) -> str:
    """Return the name of a model's row, which begins with that of the model before."""
    if model.kind in SMALLER:
        before = models.get(model.source)
        made = (f"K-prune {100 * model.record['constraint']:g} % removed" if model.kind == "pruned"
                else f"{model.record['method']} {ENGINE_NAME[model.record['format']]}")
        return f"{row_name(before, models) if before else model.source}, {made}"
    task = model.task.name if model.task else ""
    if not task or model.task.is_glue:
        task = task.replace("-", "")
    if model.folder.name == f"final_{task}_teacher":
        return "teacher"
    name = re.sub("^(tmp_)?(distilled_|baseline_(scratch|general|smart)_)?", "", model.folder.name)
    return name.removesuffix("_tsd").removesuffix(f"_{task}") + SUFFIX.get(model.kind, "")


def make_columns(models: list[Model]) -> list[Column]:
    """Return a column for each dev set of GLUE's tasks that were scored."""
    scored = {model.task.folder for model in models if model.task.is_glue}
    return [Column(task, split, task.folder if split == "dev" else f"{task.folder}-mm",
                   SHOWN_METRIC.get(task.name, "acc"))
            for task in GLUE_TASKS.values() if task.folder in scored for split in task.dev_files]


def own_columns(task: Task, models: list[Model]) -> list[Column]:
    """Return a column for each metric of an own task, on dev and where it was scored on test."""
    scored = {split for model in models if model.task == task for split in model.scores}
    return [Column(task, split, split, metric)
            for split in (*task.dev_files, "test") if split in scored for metric in task.metrics]


def majority_scores(
    columns: list[Column], glue_dir: Path | None, data_dirs: list[Path]
) -> dict[str, dict[str, dict]]:
    """Score the most common class of each split: {task: {split: metrics}}."""
    folders = {column.task.folder: glue_dir / column.task.folder
               for column in columns if column.task.is_glue and glue_dir}
    tasks = {column.task.name: column.task for column in columns if not column.task.is_glue}
    for folder in data_dirs:
        name = find_task(None, folder).name
        if name not in tasks:
            raise UserError(f"--data_dirs {folder}: the task {name!r}; expected a task of this run:"
                            f" {', '.join(tasks) or 'it has none but those of GLUE'}")
        folders[tasks[name].folder] = folder
    best: dict[str, dict[str, dict]] = {}
    for task, split in dict.fromkeys((column.task, column.split) for column in columns):
        if task.folder in folders:
            labels = [row.label for row in load_examples(task, folders[task.folder], split)]
            best.setdefault(task.folder, {})[split] = majority_baseline(task, labels)
    return best


def read_speeds(results_dir: Path, models: list[Model], column: Column) -> list[dict[str, Any]]:
    """Join the latencies of single rows of a task, on one thread, with the models' scores."""
    rows = {row["model"]: row for folder in folders_below(results_dir)
            for row in read_if_there(folder / "inference.json").get("rows", [])
            if row["threads"] == row["batch"] == 1 and not row["length"].isdigit()}
    return [{**rows[model.folder.name], "name": model.name, "model": model.student,
             "accuracy": model.scores[column.split][column.metric]}
            for model in models if model.task == column.task and model.folder.name in rows
            and column.split in model.scores]


# ------------------------------------------------------------------ the table


def percent(metrics: dict[str, dict[str, float]], column: Column) -> str:
    """Format a score in percent; empty where there is none."""
    value = metrics.get(column.split, {}).get(column.metric)
    return "" if value is None else f"{100 * value:.1f}"


def table_rows(
    models: list[Model], columns: list[Column], majority: dict[str, Any]
) -> list[list[str]]:
    """Return the table's body: a row a model, `best / last` in each cell."""
    rows: dict[str, list[str]] = {}
    if majority:
        rows["majority class"] = [percent(majority.get(c.task.folder, {}), c) for c in columns]
    for model in models:
        cells = rows.setdefault(model.name, [""] * len(columns))
        for place, column in enumerate(columns):
            if column.task == model.task:
                last = percent({"dev": model.results.get("last", {})}, column)
                best = percent(model.scores, column)
                cells[place] = f"{best} / {last}" if last else best
    return [[name, *cells] for name, cells in rows.items()]


def own_table(
    columns: list[Column], models: list[Model], majority: dict[str, Any],
    speeds: list[dict[str, Any]],
) -> tuple[list[str], list[list[str]]]:
    """Return header and body of an own task's table: scores of the best checkpoint, size, time."""
    task = columns[0].task
    times = {speed["name"]: f"{speed['median']:.2f}" for speed in speeds}
    header = [task.folder, *(f"{column.split} {column.metric}" for column in columns), "MB"]
    rows = [["majority class", *(percent(majority[task.folder], column) for column in columns), ""]
            ] if task.folder in majority else []
    rows += [[model.name, *(percent(model.scores, column) for column in columns),
              megabytes(model.folder)] for model in models if model.task == task]
    if times:
        header.append("ms")
        rows = [[*row, times.get(row[0], "")] for row in rows]
    return header, rows


def megabytes(folder: Path) -> str:
    """Return the size of a model's weights on disk; "" where the folder is gone."""
    sizes = [(folder / name).stat().st_size for name in (*WEIGHT_FORMS, ONNX_NAME)
             if (folder / name).is_file()]
    return f"{sizes[0] / 1e6:.1f}" if sizes else ""


def in_80_columns(rows: list[list[str]]) -> list[list[str]]:
    """Return the table's rows for a terminal: what was made from a student indented below it."""
    names = [row[0] for row in rows]
    short = {name: "  " + name.removeprefix(f"{student}, ") for name in names
             if (student := name.partition(", ")[0]) in names and student != name}
    return [[short.get(name, name), *(cell.replace(" / ", "/") for cell in cells)]
            for name, *cells in rows]


def published_rows(columns: list[Column]) -> list[list[str]]:
    """Return the published numbers of these columns, source and split named."""
    rows = []
    for line in PUBLISHED:
        cells = [line["percent"].get(column.title, "") for column in columns]
        if any(cells):
            rows.append(["{model} ({source}, {split})".format(**line), *map(str, cells)])
    return rows


def speed_section(speeds: list[dict[str, Any]], column: Column) -> str:
    """Return the part of results.md on size and latency; own tasks have both in their tables."""
    picture = "![Accuracy against latency](tradeoff.png)\n\n"
    if not column.task.is_glue:
        return picture
    first = speeds[0]
    header = ["model", "engine", "MB", "parameters", "median ms", "p95 ms",
              f"speed-up over {first['name']}", f"{column.title} {column.metric}"]
    rows = [[speed["name"], speed["engine"], f"{speed['megabytes']:.1f}",
             f"{speed['parameters'] / 1e6:.1f}M", f"{speed['median']:.2f}", f"{speed['p95']:.2f}",
             f"{first['median'] / speed['median']:.1f}", f"{100 * speed['accuracy']:.1f}"]
            for speed in speeds]
    return (f"## Size and latency\n\nMilliseconds for one row of the {column.title} dev set at a"
            " time, on one thread of this machine's CPU, all in one run. Smaller students are"
            " scored in fp32 or what they were quantized to, the others in the run's precision.\n\n"
            + markdown_table(header, rows) + f"\n{picture}")


def selection(model: Model) -> str:
    """Say how the checkpoint was selected; after a sweep, among which settings."""
    rule, metric = model.results["selection"], model.task.metrics[0]
    tried = ", ".join(f"{setting['folder']} {metric} {100 * setting['metrics'][metric]:.1f}"
                      for setting in model.results.get("sweep", []))
    return f"{model.results['chosen']}, the best on dev of {tried}; {rule}" if tried else rule


def glue_part(
    header: list[str], rows: list[list[str]], published: list[list[str]]
) -> list[str]:
    """Return the lines of results.md on GLUE's tasks: the table and the published numbers."""
    return [
        "Scores on the GLUE **dev** sets in percent, `best / last`: the checkpoint that was best "
        "on dev, and the last one. The best of many dev evaluations flatters a model, the more so "
        "the smaller the dev set; the last one does not.", "",
        markdown_table(header, rows),
        "## Published numbers", "",
        markdown_table(header, published) if published else NOT_COMPARABLE + "\n"]


def own_part(columns: list[Column], models: list[Model], header: list[str],
             rows: list[list[str]]) -> list[str]:
    """Return the lines of results.md on an own task."""
    task = columns[0].task
    model = next(model for model in models if model.task == task)
    counts = "".join(f", {row_count(model, split)} rows of {split}" for split in dict.fromkeys(
        column.split for column in columns) if row_count(model, split))
    what = "a score" if task.is_regression else f"{task.num_labels} classes"
    chosen = (", so dev flatters it; nothing was chosen on test" if "test" in model.scores
              else ", which flatters it")
    ms = " ms: median for one row on one thread of this CPU." if "ms" in header else ""
    return [f"## {task.folder}", "", f"{what[0].upper()}{what[1:]}{counts}. Percent, of the"
            f" checkpoint that was best on dev{chosen}. MB: weights on disk.{ms}", "",
            markdown_table(["model", *header[1:]], rows)]


def results_page(parts: list[str], models: list[Model], speeds: str) -> str:
    """Return results.md: the tables of `parts`, the pictures, `speeds`, every score in full."""

    def in_percent(metrics: dict[str, float]) -> str:
        return ", ".join(f"{name} {100 * value:.1f}" for name, value in metrics.items())

    details = [
        [model.name, model.task.folder, split, row_count(model, split), in_percent(metrics),
         in_percent(model.results.get("last", {}) if split == "dev" else {}), selection(model)]
        for model in models for split, metrics in model.scores.items()]
    names = ["model", "task", "split", "rows", "best", "last", "selection"]
    return "\n".join([
        "# Results", "", *parts, "![Scores](scores.png)", "", "![Loss curves](loss_curves.png)", "",
        speeds + "## Every score", "", markdown_table(names, details, "---")])


def row_count(model: Model, split: str) -> str:
    """Return how many rows a split has; "" where no record says it."""
    if split == "dev":
        return str(model.results["rows"])
    classes = model.results.get("per_class", {}).get(split, {})
    return str(sum(counts["rows"] for counts in classes.values()) or "")


# ------------------------------------------------------------------ pictures


def read_log(model: Model) -> list[dict[str, Any]]:
    """Read a run's log.jsonl, of a sweep that of the setting chosen."""
    path = model.folder / model.results.get("chosen", "") / "log.jsonl"
    lines = path.read_bytes().splitlines() if path.is_file() else []
    log = [parse_json(line, f"{path}, line {i}") for i, line in enumerate(lines, start=1)]
    shown = [loss for row in CURVES for kind, losses, _ in row if kind == model.kind
             for loss in losses]
    with naming(path):
        for record in log:
            sum(float(record[name]) for name in ("step", "epoch", *shown))
    return log


def loss_curve(log: list[dict[str, Any]], losses: list[str]) -> tuple[list[float], list[float]]:
    """Return the epochs of a log and the sums of the mean losses since the record before.

    A last interval that is shorter is left out: the mean of a few batches would look like a jump.
    """
    steps = [record.get("steps", record["step"] - before["step"])
             for before, record in zip([{"step": 0}, *log[:-1]], log, strict=True)]
    whole = log[:-1] if len(log) > 1 and steps[-1] < steps[0] else log
    return ([record["epoch"] for record in whole],
            [sum(record[loss] for loss in losses) for record in whole])


def draw_losses(runs: list[tuple[Model, list[dict[str, Any]]]], path: Path) -> None:
    """Draw a row of panels for each task, a curve a student, from models and their logs.

    Curves that span a decade or more have a logarithmic axis.
    """
    found = [model.task for model, _ in runs]
    order = dict.fromkeys((None, *GLUE_TASKS.values(), *found))
    tasks = [task for task in order if task in found] or [None]
    colours = colours_of([model for model, _ in runs])
    figure, panels = plt.subplots(
        len(tasks), 2, figsize=(11, 3.1 * len(tasks)), squeeze=False, layout="constrained")
    for task, row in zip(tasks, panels, strict=True):
        for axes, (kind, losses, name) in zip(row, CURVES[task is not None], strict=True):
            lines = [(model.student, *loss_curve(log, losses)) for model, log in runs
                     if model.kind == kind and model.task == task]
            for student, epochs, values in lines:
                axes.plot(epochs, values, marker="." if len(epochs) < 20 else "", label=student,
                          color=colours[student])
            axes.set(title=f"{task.folder if task else 'General'}, {name}", xlabel="epoch",
                     ylabel="loss")
            axes.grid(alpha=0.3, which="both")
            axes.set_visible(bool(lines))
            seen = [value for *_, values in lines for value in values]
            if seen and max(seen) >= 10 * min(seen) > 0:
                axes.set_yscale("log")
                number_decades(axes.yaxis)
    figure.legend(handles=colour_keys(colours), loc="outside lower center", ncols=3, fontsize=8)
    save_figure(figure, path)


def colours_of(models: list[Model]) -> dict[str, str]:
    """Return a colour for each student, in the order in which they come first."""
    students = dict.fromkeys(model.student for model in models)
    return {student: f"C{i % 10}" for i, student in enumerate(students)}


def number_decades(axis: Axis) -> None:
    """Number a logarithmic axis at 1, 2, 5, 10, ...: decades alone would be a number or two."""
    axis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axis.set_major_formatter(StrMethodFormatter("{x:g}"))
    axis.set_minor_formatter(NullFormatter())


def colour_keys(colours: dict[str, str]) -> list[Line2D]:
    """Return what a legend says of the colours."""
    return [Line2D([], [], color=colour, linewidth=4, label=name)
            for name, colour in colours.items()]


def draw_scores(
    models: list[Model], columns: list[Column], majority: dict[str, Any], path: Path
) -> None:
    """Draw a panel for each column, a bar a model, a dashed line at the majority class.

    What was made from a student has its colour, paler.
    """
    names = list(dict.fromkeys(model.name for model in models))
    colours = colours_of(models)
    figure, [panels] = plt.subplots(
        1, len(columns), sharey=True, squeeze=False, layout="constrained",
        figsize=(4 + 2 * len(columns), 1.3 + 0.2 * len(names)))
    for axes, column in zip(panels, columns, strict=True):
        shown = [model for model in models if model.task == column.task]
        bars = axes.barh(
            [names.index(model.name) for model in shown],
            [float(percent(model.scores, column) or "nan") for model in shown],
            color=[to_rgba(colours[model.student], 0.5 if model.kind in SMALLER else 1)
                   for model in shown])
        axes.bar_label(bars, fmt="%.1f", padding=2, fontsize=7,
                       bbox={"color": "white", "alpha": 0.7, "pad": 0.3})
        if column.task.folder in majority:
            level = float(percent(majority[column.task.folder], column))
            axes.axvline(level, color="black", linestyle="dashed", linewidth=1)
        axes.set(title=f"{column.title} {column.metric}", xlabel="dev, %")
        axes.margins(x=0.2, y=0.01)
        axes.grid(axis="x", alpha=0.3)
    panels[0].set_yticks(range(len(names)), names, fontsize=8)
    panels[0].invert_yaxis()
    figure.suptitle("The checkpoint that is best on dev; dashed: majority class")
    save_figure(figure, path)


def draw_tradeoff(
    speeds: list[dict[str, Any]], colours: dict[str, str], column: Column, path: Path
) -> None:
    """Draw accuracy against latency: a colour for each student, a shape for each way to run it."""
    ways = [speed["name"].removeprefix(speed["model"]).strip(", ") or speed["engine"]
            for speed in speeds]
    shapes = {way: "osD^vP*X<>hp"[i % 12] for i, way in enumerate(dict.fromkeys(ways))}
    points = [(speed["median"], 100 * speed["accuracy"]) for speed in speeds]
    figure, axes = plt.subplots(figsize=(10, 6), layout="constrained")
    for point, speed, way in zip(points, speeds, ways, strict=True):
        axes.plot(*point, linestyle="", marker=shapes[way], markersize=8, alpha=0.75,
                  color=colours[speed["model"]])
    axes.set(title=f"{column.title}: score against latency, one row at a time on one thread",
             xscale="log", xlabel="median latency in milliseconds (smaller is better)",
             ylabel=f"dev {column.metric} in percent (larger is better)")
    number_decades(axes.xaxis)
    axes.margins(x=0.2, y=0.1)
    axes.grid(alpha=0.3)
    keys = [Line2D([], [], linestyle="", marker=shape, markersize=8, color="black",
                   fillstyle="none", label=way) for way, shape in shapes.items()]
    shown = {speed["model"]: colours[speed["model"]] for speed in speeds}
    figure.legend(handles=colour_keys(shown) + keys, loc="outside right upper", fontsize=8)
    number_points(axes, points)
    save_figure(figure, path)


def number_points(axes: plt.Axes, points: list[tuple[float, float]]) -> None:
    """Write both numbers of each point beside it, higher where something else stands."""
    axes.figure.draw_without_rendering()  # settles where on the picture the points are
    taken = [Bbox.from_extents(x - 7, y - 7, x + 7, y + 7)
             for x, y in axes.transData.transform(points)]
    for x, y in sorted(points, key=lambda point: point[1]):
        label = axes.annotate(f"{y:.1f}, {x:.3g} ms", (x, y), xytext=(7, -3), fontsize=7,
                              textcoords="offset points")
        while label.get_window_extent().count_overlaps(taken):
            label.set_position((7, label.get_position()[1] + 1))
        taken.append(label.get_window_extent())


def save_figure(figure: plt.Figure, path: Path) -> None:
    """Write a picture, whole or not at all."""
    with atomic_path(path) as temporary:
        figure.savefig(temporary, dpi=120, format="png")
    plt.close(figure)


# ------------------------------------------------------------------ the report


def main(args: argparse.Namespace) -> None:
    # What the run left behind
    found = read_models(args.models_dir, args.results_dir / "eval").values()
    models = sorted((model for model in found if "all_metrics" in model.results),
                    key=lambda model: (model.student != "teacher", model.name))
    if not models:
        raise UserError(f"{args.models_dir}: no finished model with a score; expected those of a"
                        f" run, or evaluations of them in {args.results_dir / 'eval'}")
    columns = make_columns(models)
    own = [own_columns(task, models)
           for task in dict.fromkeys(model.task for model in models) if not task.is_glue]
    majority = majority_scores([*columns, *chain.from_iterable(own)], args.glue_dir, args.data_dirs)
    drawn = [*columns, *(each[0]._replace(title=each[0].task.folder) for each in own)]
    speeds, column = next(
        ((speeds, column) for column in drawn
         if (speeds := read_speeds(args.results_dir, models, column))), ([], drawn[0]))
    runs = [(model, log) for model in found
            if model.kind in ("general", "intermediate", "student") and (log := read_log(model))]

    # Tables
    header = ["dev, best / last", *(f"{c.title} {c.metric}" for c in columns)]
    rows = table_rows(models, columns, majority)
    published = published_rows(columns) if args.published_numbers else []
    tables = [own_table(each, models, majority, read_speeds(args.results_dir, models, each[0]))
              for each in own]
    parts = glue_part(header, rows, published) if columns else []
    for each, table in zip(own, tables, strict=True):
        parts += own_part(each, models, *table)
    write_text(args.results_dir / "results.md", results_page(
        parts, models, speed_section(speeds, column) if speeds else ""))

    # Pictures
    plt.rcParams["font.family"] = [
        name for name in FONTS if name in fontManager.get_font_names()]
    draw_losses(runs, args.results_dir / "loss_curves.png")
    draw_scores(models, drawn, majority, args.results_dir / "scores.png")
    if speeds:
        draw_tradeoff(speeds, colours_of(models), column, args.results_dir / "tradeoff.png")

    # Last, because the driver takes this file for the sign that the report is finished
    write_json(args.results_dir / "results.json", {
        "commit": commit_id(), "split": "dev",
        "scores": [{"name": model.name, "model": model.student, "kind": model.kind,
                    "task": model.task.folder, "best": model.scores,
                    "last": model.results.get("last"), "selection": selection(model),
                    "rows": model.results["rows"], "folder": str(model.folder)}
                   for model in models],
        "majority_class": majority,
        "losses": {str(model.folder): {"first": log[0], "last": log[-1]} for model, log in runs},
        "speeds": speeds,
        "published": PUBLISHED if args.published_numbers else None,
    })
    if columns:
        print(text_table(header, in_80_columns(rows) + published))
        if not published:
            print(NOT_COMPARABLE)
    for header, rows in tables:
        print(text_table(header, in_80_columns(rows), first_column=18))


if __name__ == "__main__":
    run_script(main, get_args_parser())

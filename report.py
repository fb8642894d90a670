"""Gather the scores, loss curves and latencies of a run into tables, a JSON file and pictures.

It finds them by itself. The folders directly below --models_dir are the models: how each was made,
and from which other one, stands in its args.json, kprune.json or quantization.json. Their scores
are those of the evaluations in --results_dir/eval, else their own. Writes results.json, results.md,
loss_curves.png, scores.png and, where latencies were measured, tradeoff.png to --results_dir and
prints the table.

Example:
    python report.py --models_dir models --results_dir results --glue_dir data/glue_data \
        --published_numbers
"""

import argparse
import logging
from pathlib import Path
from typing import Any, NamedTuple

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
from matplotlib.axes import Axes
from matplotlib.axis import Axis
from matplotlib.colors import to_rgba
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import LogLocator, NullFormatter, StrMethodFormatter
from matplotlib.transforms import Bbox

from transformer.evaluation import majority_baseline
from transformer.file_utils import UserError, atomic_path, write_json, write_text
from transformer.results import (
    SMALLER,
    Model,
    Score,
    folders_below,
    read_evaluations,
    read_if_there,
    read_log,
    read_models,
    read_scores,
    student_name,
    task_of,
)
from transformer.runtime import commit_id, run_script
from transformer.tables import markdown_table, text_table
from transformer.tasks import GLUE_TASKS, GlueTask, load_examples

logger = logging.getLogger(__name__)

# The metric of each task's column, as in the paper's tables; accuracy elsewhere.
SHOWN_METRIC = {"cola": "mcc", "mrpc": "f1", "qqp": "f1", "sts-b": "spearmanr"}
# The panels of loss_curves.png, of general and of task distillation: kind of the runs, losses that
# are added up, title.
CURVES = (
    [("general", ["att_loss"], "attention"), ("general", ["rep_loss"], "hidden states")],
    [("intermediate", ["att_loss", "rep_loss"], "attention + hidden states"),
     ("student", ["cls_loss"], "logits")],
)
# Where the numbers of a point may stand, in typographic points from it: the nearest place first.
PLACES = [(x * far, y * far) for far in (1, 1.4, 1.8) for x, y in (
    (38, 0), (-38, 0), (0, 11), (0, -11), (32, 9), (32, -9), (-32, 9), (-32, -9))]

# Numbers as published, in percent: model, source, split, scores. MRPC and QQP are F1.
PUBLISHED_COLUMNS = "MNLI MNLI-mm QQP QNLI SST-2 CoLA STS-B MRPC RTE".split()
PAPER, ORIGINAL = "paper", "original"
PUBLISHED = [
    ("BERT-base", PAPER, "test", "83.9 83.4 71.1 90.9 93.4 52.8 85.2 87.5 67.0"),
    ("TinyBERT4", PAPER, "test", "82.5 81.8 71.3 87.7 92.6 44.1 80.4 86.4 66.6"),
    ("TinyBERT6", PAPER, "test", "84.6 83.2 71.6 90.4 93.1 51.1 83.7 87.3 70.0"),
    ("TinyBERT4", PAPER, "dev", "82.8 82.9 - - - 50.8 - 85.8 -"),
    ("TinyBERT4, no general d.", PAPER, "dev", "82.5 82.6 - - - 40.8 - 84.1 -"),
    ("TinyBERT4, no task d.", PAPER, "dev", "80.6 81.2 - - - 28.5 - 83.8 -"),
    ("TinyBERT4, no augmentation", PAPER, "dev", "80.5 81.0 - - - 29.8 - 82.4 -"),
    ("TinyBERT6", PAPER, "dev", "84.5 84.5 88.0 91.1 93.0 54.0 89.6 90.6 73.4"),
    ("TinyBERT4, lr 5e-5", ORIGINAL, "dev", "- - - - 92.3 31.7 - 82.1 53.06"),
    ("TinyBERT4, lr 1.25e-5", ORIGINAL, "dev", "- - - - 91.8 37.2 - 85.7 58.6"),
    ("TinyBERT6", ORIGINAL, "dev", "- - - - 92.3 54.3 - 88.8 69.0"),
    ("TinyBERT6 smart direct, no task d.", ORIGINAL, "dev", "- - - - 83.1 28.2 - 17.7 47.3"),
    ("TinyBERT6 smart direct", ORIGINAL, "dev", "- - - - 92.0 55.7 - 88.0 67.5"),
    ("TinyBERT6 smart", ORIGINAL, "dev", "- - - - 93.3 56.2 - 88.5 69.3"),
]
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
    add("--published_numbers", action="store_true",
        help="set the numbers of the paper and of the original repository beside ours")
    return parser


class Column(NamedTuple):
    """One column of the table: a task's dev set and the metric shown."""

    task: GlueTask
    split: str
    title: str
    metric: str


def make_columns(scores: list[Score]) -> list[Column]:
    """Return a column for each dev set of the tasks that were scored."""
    scored = {score.task for score in scores}
    return [Column(task, split, task.folder if split == "dev" else f"{task.folder}-mm",
                   SHOWN_METRIC.get(task.name, "acc"))
            for task in GLUE_TASKS.values() if task.folder in scored for split in task.dev_files]


def majority_scores(columns: list[Column], glue_dir: Path | None) -> dict[str, dict[str, dict]]:
    """Score the most common class of each dev set: {task: {split: metrics}}."""
    best: dict[str, dict[str, dict]] = {}
    for task, split, *_ in columns if glue_dir else []:
        try:
            labels = [row.label for row in load_examples(task, glue_dir / task.folder, split)]
        except UserError as error:
            logger.warning("no majority class: %s", error)
            continue
        best.setdefault(task.folder, {})[split] = majority_baseline(task, labels)
    return best


def read_speeds(results_dir: Path, scores: list[Score], column: Column) -> list[dict[str, Any]]:
    """Join the latencies of single rows of a task, on one thread, with the models' scores."""
    rows = {}
    for folder in folders_below(results_dir):
        for row in read_if_there(folder / "inference.json").get("rows", []):
            if row["threads"] == row["batch"] == 1 and not row["length"].isdigit():
                rows[row["model"]] = row
    return [{**rows[Path(score.folder).name], "name": score.name, "model": score.model,
             "accuracy": score.best[column.split][column.metric]}
            for score in scores
            if score.task == column.task.folder and Path(score.folder).name in rows]


# ------------------------------------------------------------------ the table


def percent(metrics: dict[str, dict[str, float]] | None, column: Column) -> str:
    """Format a score in percent; empty where there is none."""
    value = ((metrics or {}).get(column.split) or {}).get(column.metric)
    return "" if value is None else f"{100 * value:.1f}"


def table_rows(
    scores: list[Score], columns: list[Column], majority: dict[str, Any]
) -> list[list[str]]:
    """Return the table's body: a row a model, `best / last` in each cell."""
    cells = [percent(majority.get(column.task.folder), column) for column in columns]
    rows = [["majority class", *cells]] if majority else []
    by_name = {(score.name, score.task): score for score in scores}
    for name in dict.fromkeys(score.name for score in scores):
        cells = []
        for column in columns:
            score = by_name.get((name, column.task.folder))
            best = percent(score.best, column) if score else ""
            last = percent(score.last, column) if score else ""
            cells.append(f"{best} / {last}" if last else best)
        rows.append([name, *cells])
    return rows


def published_scores(scores: str) -> dict[str, float]:
    pairs = zip(PUBLISHED_COLUMNS, scores.split(), strict=True)
    return {column: float(score) for column, score in pairs if score != "-"}


def published_rows(columns: list[Column]) -> list[list[str]]:
    """Return the published numbers of these columns, source and split named."""
    rows = []
    for model, source, split, scores in PUBLISHED:
        known = published_scores(scores)
        cells = [f"{known[c.title]:.1f}" if c.title in known else "" for c in columns]
        if any(cells):
            rows.append([f"{model} ({source}, {split})", *cells])
    return rows


def speed_section(speeds: list[dict[str, Any]], column: Column) -> str:
    """Return the part of results.md on size and latency."""
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
            + markdown_table(header, rows) + "\n![Accuracy against latency](tradeoff.png)\n\n")


def detail_rows(score: Score) -> list[list[str]]:
    """Return the rows of one model in the table of every score, a sweep's settings below it."""

    def in_percent(metrics: dict[str, float]) -> str:
        return ", ".join(f"{name} {100 * value:.1f}" for name, value in metrics.items())

    rows = [[score.name, score.task, split, str(score.rows or "") if split == "dev" else "",
             in_percent(metrics), in_percent((score.last or {}).get(split, {})), score.selection]
            for split, metrics in score.best.items()]
    return rows + [[f"{score.name}, {tried['folder']}", score.task, "dev", "",
                    in_percent(tried["metrics"]), in_percent(tried["last"]), "setting tried"]
                   for tried in score.sweep]


def results_page(
    header: list[str], rows: list[list[str]], scores: list[Score], published: list[list[str]],
    speeds: str,
) -> str:
    """Return results.md: the table, published numbers, `speeds`, and every score in full."""
    page = [
        "# Results", "",
        "Scores on the GLUE **dev** sets in percent, `best / last`: the checkpoint that was best "
        "on dev, and the last one. The best of many dev evaluations flatters a model, the more so "
        "the smaller the dev set; the last one does not.", "",
        markdown_table(header, rows),
        "## Published numbers", "",
        markdown_table(header, published) if published else NOT_COMPARABLE + "\n",
        "![Scores](scores.png)", "", "![Loss curves](loss_curves.png)", "",
        speeds + "## Every score", "", "",
    ]  # fmt: skip
    names = ["model", "task", "split", "rows", "best", "last", "selection"]
    details = [row for score in scores for row in detail_rows(score)]
    return "\n".join(page) + markdown_table(names, details, "---")


# ------------------------------------------------------------------ pictures


def loss_curve(
    log: list[dict[str, Any]], losses: list[str]
) -> tuple[list[float], list[float]]:
    """Return the epochs of a log and the sums of the mean losses of the intervals that end there.

    A last interval that is shorter than the others is joined with the one before it: the mean of a
    few batches would look like a jump.
    """
    epochs, values, steps, done = [], [], [], 0
    for record in log:
        if all(loss in record for loss in losses):
            epochs.append(record["epoch"])
            values.append(sum(record[loss] for loss in losses))
            steps.append(record.get("steps", record["step"] - done))
            done = record["step"]
    if len(steps) > 1 and steps[-1] < steps[0]:
        mean = (values[-2] * steps[-2] + values[-1] * steps[-1]) / (steps[-2] + steps[-1])
        epochs[-2:], values[-2:] = epochs[-1:], [mean]
    return epochs, values


def draw_losses(runs: list[tuple[Model, list[dict[str, Any]]]], path: Path) -> None:
    """Draw a row of panels for each task, a curve a student, from models and their logs."""
    found = [task_of(model.record) for model, _ in runs]
    tasks = [task for task in (None, *GLUE_TASKS.values()) if task in found] or [None]
    colours = colours_of([student_name(model, task_of(model.record)) for model, _ in runs])
    figure, panels = plt.subplots(
        len(tasks), 2, figsize=(11, 3.1 * len(tasks)), squeeze=False, layout="constrained")
    for task, row in zip(tasks, panels, strict=True):
        for axes, (kind, losses, name) in zip(row, CURVES[task is not None], strict=True):
            lines = {student_name(model, task): loss_curve(log, losses) for model, log in runs
                     if model.kind == kind and task_of(model.record) == task}
            draw_curves(axes, lines, colours)
            axes.set(title=f"{task.folder if task else 'General'}, {name}")
            axes.set_visible(bool(lines))
    figure.legend(handles=colour_keys(colours), loc="outside lower center", ncols=3, fontsize=8)
    save_figure(figure, path)


def draw_curves(
    axes: Axes, lines: dict[str, tuple[list[float], list[float]]], colours: dict[str, str]
) -> None:
    """Draw loss curves, on a logarithmic axis where they span a decade or more."""
    for student, (epochs, losses) in lines.items():
        axes.plot(epochs, losses, marker="." if len(epochs) < 20 else "", label=student,
                  color=colours[student])
    axes.set(xlabel="epoch", ylabel="loss")
    axes.grid(alpha=0.3, which="both")
    seen = [loss for _, losses in lines.values() for loss in losses]
    if seen and max(seen) >= 10 * min(seen) > 0:
        axes.set_yscale("log")
        number_decades(axes.yaxis)


def colours_of(names: list[str]) -> dict[str, str]:
    """Return a colour for each name, in the order in which they come first."""
    return {name: f"C{i % 10}" for i, name in enumerate(dict.fromkeys(names))}


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
    scores: list[Score], columns: list[Column], majority: dict[str, Any], path: Path
) -> None:
    """Draw a panel for each column, a bar a model, a dashed line at the majority class.

    What was made from a student has its colour, paler.
    """
    names = list(dict.fromkeys(score.name for score in scores))
    colours = colours_of([score.model for score in scores])
    figure, [panels] = plt.subplots(
        1, len(columns), sharey=True, squeeze=False, layout="constrained",
        figsize=(4 + 2 * len(columns), 1.3 + 0.2 * len(names)))
    for axes, column in zip(panels, columns, strict=True):
        shown = [score for score in scores if score.task == column.task.folder]
        bars = axes.barh(
            [names.index(score.name) for score in shown],
            [float(percent(score.best, column) or "nan") for score in shown],
            color=[to_rgba(colours[score.model], 0.5 if score.kind in SMALLER else 1)
                   for score in shown])
        axes.bar_label(bars, fmt="%.1f", padding=2, fontsize=7,
                        bbox={"color": "white", "alpha": 0.7, "pad": 0.3})
        level = percent(majority.get(column.task.folder), column)
        if level:
            axes.axvline(float(level), color="black", linestyle="dashed", linewidth=1)
        axes.set(title=f"{column.title} {column.metric}", xlabel="dev, %")
        axes.margins(x=0.2, y=0.01)
        axes.grid(axis="x", alpha=0.3)
    panels[0].set_yticks(range(len(names)), names, fontsize=8)
    panels[0].invert_yaxis()
    figure.suptitle("The checkpoint that is best on dev; dashed: majority class")
    save_figure(figure, path)


def draw_tradeoff(speeds: list[dict[str, Any]], column: Column, path: Path) -> None:
    """Draw accuracy against latency: a colour for each student, a shape for each way to run it."""
    ways = [speed["name"].removeprefix(speed["model"]).strip(", ") or speed["engine"]
            for speed in speeds]
    shapes = {way: "osD^vP*X<>hp"[i % 12] for i, way in enumerate(dict.fromkeys(ways))}
    colours = colours_of([speed["model"] for speed in speeds])
    points = [(speed["median"], 100 * speed["accuracy"]) for speed in speeds]
    figure, axes = plt.subplots(figsize=(10, 6), layout="constrained")
    for point, speed, way in zip(points, speeds, ways, strict=True):
        axes.plot(*point, linestyle="", marker=shapes[way], markersize=8, alpha=0.75,
                  color=colours[speed["model"]])
    axes.set(title=f"{column.title}: score against latency, one row at a time on one thread",
             xscale="log", xlabel="median latency in milliseconds (smaller is better)",
             ylabel=f"dev {column.metric} in percent (larger is better)")
    number_decades(axes.xaxis)
    axes.margins(0.1)
    axes.grid(alpha=0.3)
    keys = [Line2D([], [], linestyle="", marker=shape, markersize=8, color="black",
                   fillstyle="none", label=way) for way, shape in shapes.items()]
    figure.legend(handles=colour_keys(colours) + keys, loc="outside right upper", fontsize=8)
    number_points(axes, points)
    save_figure(figure, path)


def number_points(axes: Axes, points: list[tuple[float, float]]) -> None:
    """Write both numbers of each point beside it, where nothing else stands."""
    axes.figure.draw_without_rendering()  # settles where on the picture the points are
    taken = [Bbox.from_extents(x - 7, y - 7, x + 7, y + 7)
             for x, y in axes.transData.transform(points)]
    for x, y in points:
        label = axes.annotate(
            f"{y:.1f}, {x:.3g} ms", (x, y), xytext=PLACES[0], textcoords="offset points",
            fontsize=7, ha="center", va="center")
        for place in PLACES:
            label.set_position(place)
            box = label.get_window_extent()
            if axes.bbox.count_contains(box.corners()) == 4 and not box.count_overlaps(taken):
                break
        taken.append(box)


def save_figure(figure: Figure, path: Path) -> None:
    with atomic_path(path) as temporary:
        figure.savefig(temporary, dpi=120, format="png")
    plt.close(figure)


# ------------------------------------------------------------------ the report


def main(args: argparse.Namespace) -> None:
    # What the run left behind
    evaluations = read_evaluations(args.results_dir / "eval")
    models = read_models(args.models_dir, evaluations)
    scores = read_scores(models, evaluations)
    if not scores:
        raise UserError(f"{args.models_dir}: no finished model with a score; expected those of a"
                        f" run, or evaluations of them in {args.results_dir / 'eval'}")
    columns = make_columns(scores)
    majority = majority_scores(columns, args.glue_dir)
    speeds, column = next(
        ((speeds, column) for column in columns
         if (speeds := read_speeds(args.results_dir, scores, column))), ([], columns[0]))
    runs = [(model, log) for model in models.values()
            if model.kind in ("general", "intermediate", "student") and (log := read_log(model))]

    # Table
    header = ["dev, best / last", *(f"{c.title} {c.metric}" for c in columns)]
    rows = table_rows(scores, columns, majority)
    published = published_rows(columns) if args.published_numbers else []
    write_text(args.results_dir / "results.md", results_page(
        header, rows, scores, published, speed_section(speeds, column) if speeds else ""))

    # Pictures
    draw_losses(runs, args.results_dir / "loss_curves.png")
    draw_scores(scores, columns, majority, args.results_dir / "scores.png")
    if speeds:
        draw_tradeoff(speeds, column, args.results_dir / "tradeoff.png")

    # Last, because the driver takes this file for the sign that the report is finished
    write_json(args.results_dir / "results.json", {
        "commit": commit_id(), "split": "dev", "scores": [score._asdict() for score in scores],
        "majority_class": majority,
        "losses": {str(model.folder): {"first": log[0], "last": log[-1]} for model, log in runs},
        "speeds": speeds,
        "published": [
            {"model": model, "source": source, "split": split, "percent": published_scores(numbers)}
            for model, source, split, numbers in PUBLISHED] if args.published_numbers else None,
    })  # fmt: skip
    smaller = {score.name for score in scores if score.kind in SMALLER}
    print(text_table(header, [
        ["  " + name.rpartition(", ")[2] if name in smaller else name,
         *(cell.replace(" / ", "/") for cell in cells)] for name, *cells in rows + published]))
    if not published:
        print(NOT_COMPARABLE)


if __name__ == "__main__":
    run_script(main, get_args_parser())

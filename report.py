"""Gathers every score, loss curve and latency of a run into tables, a JSON file and pictures.

`reproduction.sh` lists the run's model folders in a manifest, one line each, separated by tabs:
kind, model, task, folder with eval_results.json (kind latency: with inference.json), folder with
log.jsonl (smaller students: with kprune.json or quantization.json). Writes results.json,
results.md, loss_curves.png, scores.png and, where latencies were measured, tradeoff.png to
--results_dir and prints the table.

Example:
    python report.py --manifest results/manifest.tsv --glue_dir data/glue_data \
        --results_dir results --published_numbers
"""

import argparse
import json
import logging
from pathlib import Path
from typing import Any, NamedTuple

import matplotlib
import numpy as np
import torch

matplotlib.use("Agg")
import matplotlib.pyplot as plt
from matplotlib.lines import Line2D
from matplotlib.ticker import LogLocator, NullFormatter, StrMethodFormatter

from transformer.evaluation import majority_baseline
from transformer.features import Features
from transformer.file_utils import UserError, atomic_path, read_json, write_json, write_text
from transformer.runtime import commit_id, run_script
from transformer.tables import markdown_table, text_table
from transformer.tasks import GlueTask, get_task, load_examples

logger = logging.getLogger(__name__)

# The metric of each task's column, as in the paper's tables; accuracy elsewhere.
SHOWN_METRIC = {"cola": "mcc", "mrpc": "f1", "qqp": "f1", "sts-b": "spearmanr"}
SUFFIX = {
    "untrained": ", no task distillation",
    "baseline_scratch": ", labels only, random start",
    "baseline_general": ", labels only, after general d.",
    "baseline_smart": ", labels only, copied layers",
}
# kind in the manifest: (title of the panel, losses that are added up in it)
CURVES = {
    "general": [("attention", ["att_loss"]), ("hidden states", ["rep_loss"])],
    "intermediate": [("intermediate: attention + hidden", ["att_loss", "rep_loss"])],
    "prediction": [("prediction: logits", ["cls_loss"])],
}

# What the smaller students of a kind have beside their weights.
SMALLER = {"pruned": "kprune.json", "quantized": "quantization.json"}
ENGINE_NAME = {"torch": "PyTorch", "onnx": "ONNX"}

PAPER, SEED = "paper", "seed"
# Numbers as published, in percent: model, source, split, column: score. MRPC and QQP are F1.
PUBLISHED = [
    ("BERT-base", PAPER, "test", {
        "MNLI": 83.9, "MNLI-mm": 83.4, "QQP": 71.1, "QNLI": 90.9, "SST-2": 93.4, "CoLA": 52.8,
        "STS-B": 85.2, "MRPC": 87.5, "RTE": 67.0}),
    ("TinyBERT4", PAPER, "test", {
        "MNLI": 82.5, "MNLI-mm": 81.8, "QQP": 71.3, "QNLI": 87.7, "SST-2": 92.6, "CoLA": 44.1,
        "STS-B": 80.4, "MRPC": 86.4, "RTE": 66.6}),
    ("TinyBERT6", PAPER, "test", {
        "MNLI": 84.6, "MNLI-mm": 83.2, "QQP": 71.6, "QNLI": 90.4, "SST-2": 93.1, "CoLA": 51.1,
        "STS-B": 83.7, "MRPC": 87.3, "RTE": 70.0}),
    ("TinyBERT4", PAPER, "dev", {"MNLI": 82.8, "MNLI-mm": 82.9, "MRPC": 85.8, "CoLA": 50.8}),
    ("TinyBERT4, no general d.", PAPER, "dev", {
        "MNLI": 82.5, "MNLI-mm": 82.6, "MRPC": 84.1, "CoLA": 40.8}),
    ("TinyBERT4, no task d.", PAPER, "dev", {
        "MNLI": 80.6, "MNLI-mm": 81.2, "MRPC": 83.8, "CoLA": 28.5}),
    ("TinyBERT4, no augmentation", PAPER, "dev", {
        "MNLI": 80.5, "MNLI-mm": 81.0, "MRPC": 82.4, "CoLA": 29.8}),
    ("TinyBERT6", PAPER, "dev", {
        "CoLA": 54.0, "MNLI": 84.5, "MNLI-mm": 84.5, "MRPC": 90.6, "QNLI": 91.1, "QQP": 88.0,
        "RTE": 73.4, "SST-2": 93.0, "STS-B": 89.6}),
    ("TinyBERT4, lr 5e-5", SEED, "dev", {
        "RTE": 53.06, "SST-2": 92.3, "CoLA": 31.7, "MRPC": 82.1}),
    ("TinyBERT4, lr 1.25e-5", SEED, "dev", {
        "RTE": 58.6, "SST-2": 91.8, "CoLA": 37.2, "MRPC": 85.7}),
    ("TinyBERT6", SEED, "dev", {"RTE": 69.0, "SST-2": 92.3, "CoLA": 54.3, "MRPC": 88.8}),
    ("TinyBERT6 smart direct, no task d.", SEED, "dev", {
        "RTE": 47.3, "SST-2": 83.1, "CoLA": 28.2, "MRPC": 17.7}),
    ("TinyBERT6 smart direct", SEED, "dev", {
        "RTE": 67.5, "SST-2": 92.0, "CoLA": 55.7, "MRPC": 88.0}),
    ("TinyBERT6 smart", SEED, "dev", {
        "RTE": 69.3, "SST-2": 93.3, "CoLA": 56.2, "MRPC": 88.5}),
]  # fmt: skip
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
    add("--manifest", type=Path, required=True, help="file that lists the run's model folders")
    add("--results_dir", type=Path, required=True, help="folder to write to")
    add("--glue_dir", type=Path, required=True,
        help="folder of the tasks' folders, for the score of the majority class")
    add("--published_numbers", action="store_true",
        help="set the paper's and the seed's numbers beside ours")
    return parser


class Entry(NamedTuple):
    """One line of the manifest."""

    kind: str
    model: str
    task: str
    folder: Path
    training_folder: Path


class Score(NamedTuple):
    """The dev scores of one model on one task, as fractions of 1, by split and metric."""

    name: str
    model: str
    kind: str
    task: str
    best: dict[str, dict[str, float]]
    last: dict[str, dict[str, float]] | None
    selection: str
    rows: int
    folder: str


class Column(NamedTuple):
    """One column of the table: a task's dev set and the metric shown."""

    task: GlueTask
    split: str
    title: str
    metric: str


# ------------------------------------------------------------------ reading the run


def read_manifest(path: Path) -> list[Entry]:
    """Read the manifest; a line without five fields is a `UserError`."""
    entries = []
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), start=1):
        fields = line.split("\t")
        if len(fields) != len(Entry._fields):
            raise UserError(f"{path}, line {number}: {len(fields)} fields; expected "
                            f"{len(Entry._fields)}: {', '.join(Entry._fields)}")
        entries.append(Entry(*fields[:3], Path(fields[3]), Path(fields[4])))
    return entries


def read_score(entry: Entry) -> Score | None:
    """Read an entry's eval_results.json; None, and a warning, where there is none yet."""
    path = entry.folder / "eval_results.json"
    if not path.is_file():
        logger.warning("%s: not there yet, left out of the table", path)
        return None
    result = read_json(path)
    trained = entry.training_folder / "eval_results.json"
    training = read_json(trained) if trained.is_file() else {}
    last = training.get("last")
    if last and not isinstance(next(iter(last.values())), dict):
        last = {"dev": last}
    return Score(
        full_name(entry), entry.model, entry.kind, get_task(entry.task).folder,
        result.get("all_metrics") or {"dev": result["metrics"]}, last,
        training.get("selection", result.get("selection", "")), result["rows"], str(entry.folder))


def full_name(entry: Entry) -> str:
    """Return the name of an entry's row in the table."""
    if entry.kind not in SMALLER:
        return entry.model + SUFFIX.get(entry.kind, "")
    made = read_json(entry.training_folder / SMALLER[entry.kind])
    if entry.kind == "pruned":
        return f"{entry.model}, K-prune {100 * made['constraint']:g} % removed"
    return f"{entry.model}, {made['method']} {ENGINE_NAME[made['format']]}"


def under_their_students(scores: list[Score]) -> list[Score]:
    """Put the smaller students below the ones that they were made from."""
    ordered = [score for score in scores if score.kind not in SMALLER]
    for score in (score for score in scores if score.kind in SMALLER):
        places = [i for i, other in enumerate(ordered)
                  if other.model == score.model and other.kind in ("student", *SMALLER)]
        ordered.insert(places[-1] + 1 if places else len(ordered), score)
    return ordered


def best_of_settings(scores: list[Score]) -> list[Score]:
    """Keep one score a model and task: of several settings the best on dev, and say so."""
    groups: dict[tuple[str, str], list[Score]] = {}
    for score in scores:
        groups.setdefault((score.name, score.task), []).append(score)
    kept = []
    for (_, task), group in groups.items():
        metric = get_task(task).metrics[0]
        best = max(group, key=lambda score: score.best["dev"][metric])  # noqa: B023
        if len(group) > 1:
            rule = f"best of {len(group)} settings by {metric} on dev; {best.selection}"
            best = best._replace(selection=rule)
        kept.append(best)
    return kept


def read_curve(entry: Entry) -> list[dict[str, Any]]:
    """Read the lines of an entry's log.jsonl; an unfinished last line is dropped."""
    path = entry.training_folder / "log.jsonl"
    if not path.is_file():
        return []
    records = []
    for line in path.read_text(encoding="utf-8").splitlines():
        try:
            records.append(json.loads(line))
        except json.JSONDecodeError:
            logger.warning("%s: a line is not JSON, left out", path)
    return records


def majority_scores(columns: list[Column], glue_dir: Path) -> dict[str, dict[str, dict]]:
    """Score the most common class of each dev set: {task: {split: metrics}}."""
    best: dict[str, dict[str, dict]] = {}
    for column in columns:
        task = column.task
        try:
            examples = load_examples(task, glue_dir / task.folder, column.split)
        except (UserError, FileNotFoundError) as error:
            logger.warning("no majority class for %s: %s", column.title, error)
            continue
        if task.is_regression:
            labels = torch.tensor([float(example.label) for example in examples])
        else:
            labels = torch.tensor([task.labels.index(example.label) for example in examples])
        nothing = np.zeros(len(examples) + 1, dtype=np.int64)
        rows = Features(nothing[:0], nothing, nothing[1:], labels, task.labels, 0)
        best.setdefault(task.folder, {})[column.split] = majority_baseline(task, rows)
    return best


def make_columns(tasks: list[str]) -> list[Column]:
    """Return a column for each dev set of the tasks."""
    columns = []
    for name in tasks:
        task = get_task(name)
        metric = SHOWN_METRIC.get(task.name, "acc")
        for split in task.dev_files:
            title = task.folder if split == "dev" else f"{task.folder}-mm"
            columns.append(Column(task, split, title, metric))
    return columns


# ------------------------------------------------------------------ the table


def percent(metrics: dict[str, dict[str, float]] | None, column: Column) -> str:
    """Format a score in percent; empty where there is none."""
    value = ((metrics or {}).get(column.split) or {}).get(column.metric)
    return "" if value is None else f"{100 * value:.1f}"


def table_rows(
    scores: list[Score], columns: list[Column], majority: dict[str, Any]
) -> list[list[str]]:
    """Return the table's body: a row a model, `best / last` in each cell."""
    rows = [["majority class", *(percent(majority.get(c.task.folder), c) for c in columns)]]
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


def published_rows(columns: list[Column]) -> list[list[str]]:
    """Return the published numbers of these columns, source and split named."""
    rows = []
    for model, source, split, numbers in PUBLISHED:
        cells = [f"{numbers[c.title]:.1f}" if c.title in numbers else "" for c in columns]
        if any(cells):
            rows.append([f"{model} ({source}, {split})", *cells])
    return rows


class Speed(NamedTuple):
    """What one model of the latency run takes; `accuracy` is its score, a fraction of 1."""

    name: str
    model: str
    engine: str
    megabytes: float
    parameters: int
    median: float  # milliseconds a row, as p95
    p95: float
    accuracy: float


def read_speeds(entry: Entry, scores: list[Score], column: Column) -> list[Speed]:
    """Join the latencies of an entry with the scores of the same models, in their order."""
    path = entry.folder / "inference.json"
    if not path.is_file():
        logger.warning("%s: not there yet, no latencies", path)
        return []
    rows = {row["model"]: row for row in read_json(path)["rows"]}
    speeds = []
    for score in scores:
        row = rows.get(Path(score.folder).name)
        if row is not None and score.task == column.task.folder:
            speeds.append(Speed(
                score.name, score.model, row["engine"], row["megabytes"], row["parameters"],
                row["median"], row["p95"], score.best[column.split][column.metric]))
    return speeds


def speed_section(speeds: list[Speed], column: Column) -> str:
    """Return the part of results.md on size and latency."""
    first = speeds[0]
    header = ["model", "engine", "MB", "parameters", "median ms", "p95 ms",
              f"speed-up over {first.name}", f"{column.title} {column.metric}"]
    rows = [[speed.name, speed.engine, f"{speed.megabytes:.1f}", f"{speed.parameters / 1e6:.1f}M",
             f"{speed.median:.2f}", f"{speed.p95:.2f}", f"{first.median / speed.median:.1f}",
             f"{100 * speed.accuracy:.1f}"] for speed in speeds]
    return (f"## Size and latency\n\nMilliseconds for one row of the {column.title} dev set at a"
            " time, on one thread of this machine's CPU, all in one run. Smaller students are"
            " scored in fp32 or what they were quantized to, the others in the run's precision.\n\n"
            + markdown_table(header, rows) + "\n![Accuracy against latency](tradeoff.png)\n\n")


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
    details = []
    for score in scores:
        for split, metrics in score.best.items():
            last = (score.last or {}).get(split, {})
            details.append([
                score.name, score.task, split, str(score.rows) if split == "dev" else "",
                ", ".join(f"{key} {100 * value:.1f}" for key, value in metrics.items()),
                ", ".join(f"{key} {100 * value:.1f}" for key, value in last.items()),
                score.selection,
            ])
    names = ["model", "task", "split", "rows", "best", "last", "selection"]
    return "\n".join(page) + markdown_table(names, details, "---")


# ------------------------------------------------------------------ pictures


def draw_losses(entries: list[Entry], path: Path) -> dict[str, Any]:
    """Draw one panel for each distillation; return the first and last record of each."""
    panels: dict[str, list[tuple[str, list[float], list[float]]]] = {}
    ends = {}
    for entry in entries:
        records = read_curve(entry) if entry.kind in CURVES else []
        if not records:
            continue
        ends[str(entry.training_folder)] = {"first": records[0], "last": records[-1]}
        for panel, losses in CURVES[entry.kind]:
            known = [r for r in records if all(loss in r for loss in losses)]
            prefix = "General" if entry.kind == "general" else entry.task
            line = ([r["epoch"] for r in known], [sum(r[x] for x in losses) for r in known])
            panels.setdefault(f"{prefix}, {panel}", []).append((entry.model, *line))
    columns = 2
    rows = max(1, -(-len(panels) // columns))
    figure, axes = plt.subplots(
        rows, columns, figsize=(11, 3.1 * rows), squeeze=False, layout="constrained")
    for axis, (title, lines) in zip(axes.flat, panels.items(), strict=False):
        for name, epochs, losses in lines:
            axis.plot(epochs, losses, marker="." if len(epochs) < 20 else "", label=name)
        axis.set(title=title, xlabel="epoch", ylabel="loss", yscale="log")
        axis.grid(alpha=0.3, which="both")
        axis.legend(fontsize=7)
    for axis in list(axes.flat)[len(panels):]:
        axis.set_visible(False)
    save_figure(figure, path)
    return ends


def draw_scores(
    scores: list[Score], columns: list[Column], majority: dict[str, Any], path: Path
) -> None:
    """Draw a group of bars for each column, a bar a model, a dashed line at the majority class.

    Smaller students have a picture of their own.
    """
    scores = [score for score in scores if score.kind not in SMALLER]
    names = list(dict.fromkeys(score.name for score in scores))
    by_name = {(score.name, score.task): score for score in scores}
    figure, axis = plt.subplots(figsize=(12, 6), layout="constrained")
    width = 0.85 / max(1, len(names))
    colours = plt.get_cmap("tab20").colors
    for i, name in enumerate(names):
        heights = [
            float(percent(score.best, c) or "nan") if score else float("nan")
            for c in columns for score in [by_name.get((name, c.task.folder))]
        ]
        places = [x + (i - (len(names) - 1) / 2) * width for x in range(len(columns))]
        axis.bar(places, heights, width, label=name, color=colours[i % len(colours)])
    for x, column in enumerate(columns):
        level = percent(majority.get(column.task.folder), column)
        if level:
            axis.hlines(float(level), x - 0.45, x + 0.45, colors="black", linestyles="dashed",
                        label="majority class" if x == 0 else None)
    axis.set_xticks(range(len(columns)), [f"{c.title} ({c.metric})" for c in columns])
    axis.set(ylabel="dev score, %", title="Best checkpoint on dev")
    axis.grid(axis="y", alpha=0.3)
    figure.legend(loc="outside lower center", ncols=3, fontsize=8)
    save_figure(figure, path)


def draw_tradeoff(points: list[dict[str, Any]], path: Path | str, metric: str = "accuracy") -> None:
    """Draw accuracy against latency: a colour a group, a shape a name, both in a key at the side.

    Args:
        points: each has `name`, `latency` (milliseconds) and `accuracy` (a fraction of 1), and may
            have `group`; not given: the name.
        path: the picture, a PNG.
        metric: what to call the vertical axis.
    """
    names = list(dict.fromkeys(point["name"] for point in points))
    groups = list(dict.fromkeys(point.get("group", point["name"]) for point in points))
    shapes = {name: "osD^vP*X<>hp"[i % 12] for i, name in enumerate(names)}
    colours = {group: f"C{i % 10}" for i, group in enumerate(groups)}
    figure, axes = plt.subplots(figsize=(8.5, 4.8), layout="constrained")
    for point in points:
        axes.plot(point["latency"], 100 * point["accuracy"], linestyle="", markersize=9, alpha=0.75,
                  marker=shapes[point["name"]], color=colours[point.get("group", point["name"])])
    axes.set(xscale="log", xlabel="median latency in milliseconds (smaller is better)",
             ylabel=f"{metric} in per cent (larger is better)")
    # Whole decades alone would leave most pictures with a single number.
    axes.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axes.xaxis.set_major_formatter(StrMethodFormatter("{x:g}"))
    axes.xaxis.set_minor_formatter(NullFormatter())
    axes.grid(alpha=0.3)
    keys = [Line2D([], [], linestyle="", marker="o", markersize=9, color=colours[group],
                   label=group) for group in groups]
    if groups != names:
        keys += [Line2D([], [], linestyle="", marker=shapes[name], markersize=8, color="black",
                        fillstyle="none", label=name) for name in names]
    figure.legend(handles=keys, loc="outside right upper", fontsize=8)
    figure.savefig(path, dpi=150, format="png")
    plt.close(figure)


def draw_speeds(speeds: list[Speed], column: Column, path: Path) -> None:
    """Draw accuracy against latency: a colour for each student, a shape for each way to run it."""
    points = []
    for speed in speeds:
        way = speed.name.removeprefix(speed.model).strip(", ") or speed.engine
        points.append({"group": speed.model, "name": way, "latency": speed.median,
                       "accuracy": speed.accuracy})
    with atomic_path(path) as temporary:
        draw_tradeoff(points, temporary, f"{column.title} dev {column.metric}")


def save_figure(figure: plt.Figure, path: Path) -> None:
    with atomic_path(path) as temporary:
        figure.savefig(temporary, dpi=120, format="png")
    plt.close(figure)


# ------------------------------------------------------------------ the report


def main(args: argparse.Namespace) -> None:
    # What the run left behind
    entries = read_manifest(args.manifest)
    scored = [e for e in entries if e.kind in ("teacher", "student", *SUFFIX, *SMALLER)]
    found = [score for score in map(read_score, scored) if score is not None]
    scores = best_of_settings(under_their_students(found))
    if not scores:
        raise UserError(f"{args.manifest}: none of its folders has eval_results.json yet")
    columns = make_columns(list(dict.fromkeys(entry.task for entry in scored)))
    majority = majority_scores(columns, args.glue_dir)

    # Table
    header = ["dev, best / last", *(f"{c.title} {c.metric}" for c in columns)]
    rows = table_rows(scores, columns, majority)
    published = published_rows(columns) if args.published_numbers else []
    timed = next((entry for entry in entries if entry.kind == "latency"), None)
    speeds: list[Speed] = []
    if timed is not None:
        column = make_columns([timed.task])[0]
        speeds = read_speeds(timed, scores, column)
    page = results_page(header, rows, scores, published,
                        speed_section(speeds, column) if speeds else "")
    write_text(args.results_dir / "results.md", page)

    # Pictures
    curves = draw_losses(entries, args.results_dir / "loss_curves.png")
    draw_scores(scores, columns, majority, args.results_dir / "scores.png")
    if speeds:
        draw_speeds(speeds, column, args.results_dir / "tradeoff.png")

    # Last, because the driver takes this file for the sign that the report is finished
    write_json(args.results_dir / "results.json", {
        "commit": commit_id(), "split": "dev", "scores": [score._asdict() for score in scores],
        "majority_class": majority, "losses": curves,
        "speeds": [speed._asdict() for speed in speeds],
        "published": [dict(zip(("model", "source", "split", "percent"), row, strict=True))
                      for row in PUBLISHED] if args.published_numbers else None,
    })  # fmt: skip
    print(text_table(header, rows + published))
    if not published:
        print(NOT_COMPARABLE)


if __name__ == "__main__":
    run_script(main, get_args_parser())

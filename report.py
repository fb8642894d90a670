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
from itertools import chain
from pathlib import Path
from typing import Any

from transformer.file_utils import UserError, write_json, write_text
from transformer.pictures import colours_of, draw_losses, draw_scores, draw_tradeoff, set_fonts
from transformer.run_records import (
    Column,
    Model,
    majority_scores,
    make_columns,
    megabytes,
    own_columns,
    percent,
    read_log,
    read_models,
    read_speeds,
    row_count,
    selection,
)
from transformer.runtime import commit_id, run_script
from transformer.tables import markdown_table, text_table

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


# ------------------------------------------------------------------ the tables


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
    set_fonts()
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

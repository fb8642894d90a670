"""The pictures of a report: loss curves, scores, and scores against latency."""

from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
from matplotlib.axis import Axis
from matplotlib.colors import to_rgba
from matplotlib.font_manager import fontManager
from matplotlib.lines import Line2D
from matplotlib.ticker import LogLocator, NullFormatter, StrMethodFormatter
from matplotlib.transforms import Bbox

from transformer.file_utils import atomic_path
from transformer.run_records import CURVES, SMALLER, Column, Model, loss_curve, percent
from transformer.tasks import GLUE_TASKS

# For names of tasks that the first one lacks the characters of.
FONTS = ["DejaVu Sans", "Noto Sans CJK SC", "Noto Sans CJK JP", "PingFang SC", "Microsoft YaHei",
         "SimHei", "WenQuanYi Zen Hei"]


def set_fonts() -> None:
    """Take what fonts there are for names of tasks in any language."""
    plt.rcParams["font.family"] = [name for name in FONTS if name in fontManager.get_font_names()]


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

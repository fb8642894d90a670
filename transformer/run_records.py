"""The records of a run's folders: its models, how each was made, their scores, times and losses."""

import logging
import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from transformer.checkpoint import WEIGHT_FORMS
from transformer.evaluation import majority_baseline
from transformer.file_utils import ONNX_NAME, UserError, parse_json, read_json
from transformer.own_tasks import find_task, stored_task
from transformer.run_folder import ARGUMENTS_NAME, RESULTS_NAME
from transformer.runtime import as_list
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
# are added up where a run has them, title.
CURVES = (
    [("general", ["att_loss"], "attention"), ("general", ["rep_loss"], "hidden states")],
    [("intermediate", ["att_loss", "rep_loss"], "attention + hidden states"),
     ("student", ["cls_loss", "hard_loss", "soft_loss"], "logits")],
)


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
    config = read_if_there(folder / "config.json")
    return config.get("num_hidden_layers", config.get("n_layers", 0))  # a DistilBERT's name


def read_models(models_dir: Path, evaluation_dir: Path) -> dict[str, Model]:
    """Return the finished models by the names of their folders.

    Paths are compared by their last part alone: a run may have been moved since.
    """
    models = {folder.name: model for folder in folders_below(models_dir)
              if (model := read_model(folder))}
    depth = max((layers(models_dir / Path(teacher).name)
                 for model in models.values() if model.kind in ("intermediate", "student")
                 for teacher in as_list(model.record["arguments"]["teacher_model"])), default=0)
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


# ------------------------------------------------------------------ scores, times, losses


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


def percent(metrics: dict[str, dict[str, float]], column: Column) -> str:
    """Format a score in percent; empty where there is none."""
    value = metrics.get(column.split, {}).get(column.metric)
    return "" if value is None else f"{100 * value:.1f}"


def row_count(model: Model, split: str) -> str:
    """Return how many rows a split has; "" where no record says it."""
    if split == "dev":
        return str(model.results["rows"])
    classes = model.results.get("per_class", {}).get(split, {})
    return str(sum(counts["rows"] for counts in classes.values()) or "")


def selection(model: Model) -> str:
    """Say how the checkpoint was selected; after a sweep, among which settings."""
    rule, metric = model.results["selection"], model.task.metrics[0]
    tried = ", ".join(f"{setting['folder']} {metric} {100 * setting['metrics'][metric]:.1f}"
                      for setting in model.results.get("sweep", []))
    return f"{model.results['chosen']}, the best on dev of {tried}; {rule}" if tried else rule


def megabytes(folder: Path) -> str:
    """Return the size of a model's weights on disk; "" where the folder is gone."""
    sizes = [(folder / name).stat().st_size for name in (*WEIGHT_FORMS, ONNX_NAME)
             if (folder / name).is_file()]
    return f"{sizes[0] / 1e6:.1f}" if sizes else ""


def read_log(model: Model) -> list[dict[str, Any]]:
    """Read a run's log.jsonl, of a sweep that of the setting chosen."""
    path = model.folder / model.results.get("chosen", "") / "log.jsonl"
    lines = path.read_bytes().splitlines() if path.is_file() else []
    log = [parse_json(line, f"{path}, line {i}") for i, line in enumerate(lines, start=1)]
    panels = [losses for row in CURVES for kind, losses, _ in row if kind == model.kind]
    with naming(path):
        for record in log:
            float(record["step"]) + float(record["epoch"])
            for losses in panels:
                total_loss(record, losses)
    return log


def total_loss(record: dict[str, Any], losses: list[str]) -> float:
    """Add up those of the losses that a log's record has; one at least."""
    found = [float(record[loss]) for loss in losses if loss in record]
    if not found:
        raise KeyError(losses[0])
    return sum(found)


def loss_curve(log: list[dict[str, Any]], losses: list[str]) -> tuple[list[float], list[float]]:
    """Return the epochs of a log and the sums of the mean losses since the record before.

    A last interval that is shorter is left out: the mean of a few batches would look like a jump.
    """
    steps = [record.get("steps", record["step"] - before["step"])
             for before, record in zip([{"step": 0}, *log[:-1]], log, strict=True)]
    whole = log[:-1] if len(log) > 1 and steps[-1] < steps[0] else log
    return ([record["epoch"] for record in whole],
            [total_loss(record, losses) for record in whole])

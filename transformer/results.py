"""What the folders of a run hold: its finished models, how each was made, and how it scores.

Nothing but the folders is read: `args.json`, `kprune.json` or `quantization.json` says how a model
was made and from which other one, `eval_results.json` how it scores.
"""

import json
import logging
import re
from pathlib import Path
from typing import Any, NamedTuple

from transformer.file_utils import UserError, read_json
from transformer.run_folder import ARGUMENTS_NAME, RESULTS_NAME
from transformer.tasks import GlueTask, get_task

logger = logging.getLogger(__name__)

# What is scored, in the order of the table, and what the names of some kinds end with.
KINDS = ("teacher", "student", "untrained", "baseline_scratch", "baseline_general",
         "baseline_smart", "pruned", "quantized")
SUFFIX = {
    "untrained": ", no task distillation",
    "baseline_scratch": ", labels only, random start",
    "baseline_general": ", labels only, after general d.",
    "baseline_smart": ", labels only, copied layers",
}
# How a smaller student was made: the file that says it, and its key for the model before.
SMALLER = {"pruned": ("kprune.json", "model"), "quantized": ("quantization.json", "source")}
ENGINE_NAME = {"torch": "PyTorch", "onnx": "ONNX"}


class Model(NamedTuple):
    """A finished model folder: how it was made, the name of the folder before, its results."""

    folder: Path
    kind: str
    source: str
    record: dict[str, Any]
    results: dict[str, Any]


class Score(NamedTuple):
    """The dev scores of one model on one task, as fractions of 1, by split and metric."""

    name: str
    model: str  # the student that it is, or was made from
    kind: str
    task: str
    best: dict[str, dict[str, float]]
    last: dict[str, dict[str, float]] | None
    selection: str
    rows: int | None
    folder: str
    sweep: list[dict[str, Any]]  # the settings tried, where there were several


def folders_below(path: Path) -> list[Path]:
    """Return the folders directly below `path`, save those that the driver has moved away."""
    return [folder for folder in sorted(path.glob("*"))
            if folder.is_dir() and folder.suffix not in (".old", ".gone")]


def read_if_there(path: Path) -> dict[str, Any]:
    """Read a JSON file; an empty result where there is none."""
    return read_json(path) if path.is_file() else {}


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
    for kind, (name, source) in SMALLER.items():
        record = read_if_there(folder / name)
        if record:
            return Model(folder, kind, Path(record[source]).name, record, results)
    record = read_if_there(folder / ARGUMENTS_NAME)
    kind = kind_of_run(record.get("arguments", {}))
    if kind is None:
        return None
    if not results:
        logger.warning("%s: not finished, left out", folder)
        return None
    return Model(folder, kind, Path(record["student"]).name, record, results)


def read_models(models_dir: Path, evaluations: dict[str, dict[str, Any]]) -> dict[str, Model]:
    """Return the finished models by the name of their folder.

    Paths are compared by their last part alone: a run may have been moved since.
    """
    found = [model for folder in folders_below(models_dir) if (model := read_model(folder))]
    models = {model.folder.name: model for model in found}
    teachers = {Path(model.record["arguments"]["teacher_model"]).name
                for model in found if model.kind in ("intermediate", "student")}
    depth = max((layers(models_dir / name) for name in teachers), default=0)
    for name, model in models.items():
        if model.kind == "teacher" and model.source in models:
            made = {"general": "baseline_general", "teacher": "teacher"}
            models[name] = model._replace(kind=made.get(models[model.source].kind, "student"))
        elif model.kind == "teacher" and layers(model.folder) < depth:  # copied from a teacher
            models[name] = model._replace(kind="baseline_smart")
    for name, evaluation in evaluations.items():
        folder = models_dir / name
        if name not in models and folder.is_dir() and not (folder / ARGUMENTS_NAME).is_file():
            kind = "teacher" if name in teachers else "untrained"
            models[name] = Model(folder, kind, "", evaluation, {})
    return models


def read_evaluations(folder: Path) -> dict[str, dict[str, Any]]:
    """Return the results in the folders below `folder` by the name of the model's own folder."""
    results = [read_if_there(path / RESULTS_NAME) for path in folders_below(folder)]
    return {Path(result["model"]).name: result for result in results if "model" in result}


def layers(folder: Path) -> int:
    """Return the number of layers of the model in a folder, 0 where there is none."""
    return read_if_there(folder / "config.json").get("num_hidden_layers", 0)


# ------------------------------------------------------------------ names and scores


def task_of(record: dict[str, Any]) -> GlueTask | None:
    """Return the GLUE task that a record names, None for another task or none."""
    try:
        return get_task(record["task"])
    except (KeyError, UserError):
        return None


def student_name(model: Model, task: GlueTask | None) -> str:
    """Return what a student is called: the name of its folder without stage and task."""
    if model.kind == "teacher":
        return "teacher"
    name = re.sub("^(tmp_)?(distilled_|baseline_(scratch|general|smart)_)?", "", model.folder.name)
    slug = task.name.replace("-", "") if task else ""
    return name.removesuffix("_tsd").removesuffix(f"_{slug}")


def title(model: Model, task: GlueTask) -> str:
    """Return the name of a model's row; of a smaller student, what is added to the one before."""
    if model.kind == "pruned":
        return f"K-prune {100 * model.record['constraint']:g} % removed"
    if model.kind == "quantized":
        return f"{model.record['method']} {ENGINE_NAME[model.record['format']]}"
    return student_name(model, task) + SUFFIX.get(model.kind, "")


def ancestry(model: Model, models: dict[str, Model]) -> list[Model]:
    """Return the models that a smaller student was made from, the largest first, and itself."""
    steps = [model]
    while steps[0].kind in SMALLER:
        before = models.get(steps[0].source)
        if before is None or before in steps:
            before = Model(Path(steps[0].source), "student", "", {}, {})  # from elsewhere
        steps.insert(0, before)
    return steps


def read_score(model: Model, steps: list[Model], evaluation: dict[str, Any]) -> Score | None:
    """Return the scores of a model, made by `steps`: those of its evaluation, else its own."""
    own = model.results
    result = evaluation or own or model.record.get("after", {})
    task = task_of(result) or task_of(model.record)
    if task is None or "all_metrics" not in result:
        logger.warning("%s: no score on a GLUE task, left out of the table", model.folder)
        return None
    selection, sweep = own.get("selection", result.get("selection", "")), own.get("sweep", [])
    if sweep:
        selection = (f"{own['chosen']}, best of {len(sweep)} settings by {task.metrics[0]} on dev;"
                     f" {selection}")
    return Score(
        ", ".join(title(step, task) for step in steps), student_name(steps[0], task), model.kind,
        task.folder, result["all_metrics"], {"dev": own["last"]} if "last" in own else None,
        selection, result.get("rows"), str(model.folder), sweep)


def read_scores(models: dict[str, Model], evaluations: dict[str, dict[str, Any]]) -> list[Score]:
    """Return the scores in the table's order: smaller students below those they were made from."""
    found = []
    for name, model in models.items():
        steps = ancestry(model, models)
        if model.kind in KINDS and (score := read_score(model, steps, evaluations.get(name, {}))):
            place = [(KINDS.index(step.kind), title(step, get_task(score.task))) for step in steps]
            found.append((place, score))
    scores: dict[tuple[str, str], Score] = {}
    for _, score in sorted(found, key=lambda pair: pair[0]):
        if (score.name, score.task) in scores:  # its folder tells it from the first
            score = score._replace(name=f"{score.name} ({Path(score.folder).name})")
        scores[score.name, score.task] = score
    return list(scores.values())


def read_log(model: Model) -> list[dict[str, Any]]:
    """Read a run's log.jsonl, of a sweep that of the setting chosen; a damaged line is left out."""
    path = model.folder / model.results.get("chosen", "") / "log.jsonl"
    records = []
    for line in path.read_text(encoding="utf-8").splitlines() if path.is_file() else []:
        try:
            records.append(json.loads(line))
        except json.JSONDecodeError:
            logger.warning("%s: a line is not JSON, left out", path)
    return records

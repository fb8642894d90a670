"""Tasks of a user's own: described by a `task.json`, or by what the files of a folder show."""

import argparse
import json
import logging
import math
import re
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

from transformer.data_layout import (
    MNLI_STEMS,
    SPLIT_STEMS,
    TASK_NAME,
    check_labels,
    column_names,
    find_files,
    find_layout,
    has_labels,
    infer_labels,
    known_columns,
    refusal,
)
from transformer.file_utils import CONFIG_NAME, UserError, read_json, write_json
from transformer.tasks import (
    GLUE_TASKS,
    Task,
    count_labels,
    get_task,
    is_glue_name,
    label_of,
    plain_name,
    split_paths,
)

logger = logging.getLogger(__name__)

HUB_NUMBERS = {"mnli": ("entailment", "neutral", "contradiction")}  # others: in GLUE's order

CLASS_DEFAULT, SCORE_DEFAULT = ("acc", "macro_f1"), ("pearson", "spearmanr")
CLASS_METRICS = ("acc", "f1", "acc_and_f1", "macro_f1", "mcc")
SCORE_METRICS = ("pearson", "spearmanr", "corr")

# The keys of a task.json and what their values have to be.
LIST, OBJECT, TEXT, SHARE = "a list of texts", "an object of texts", "a text", "a share below 1"
KEYS = {
    "name": TEXT, "files": "a file each of train, dev and test", "text_a": TEXT,
    "text_b": "a text or null", "label": TEXT, "labels": LIST, "metrics": LIST,
    "columns": LIST, "aliases": OBJECT, "positive": TEXT,
    "range": "two numbers, the smaller one first", "max_seq_length": "a number above 2",
    "intermediate_epochs": "a number above 0", "augmentation_n": "a number above 0",
    "skip_labels": LIST, "dev_share": SHARE, "test_share": SHARE,
    "train_split": "train or transfer", "ragged": "true or false",
}
COUNTS = ("max_seq_length", "intermediate_epochs", "augmentation_n")
DESCRIPTION_BYTES = 1 << 16  # it is shorter
OWN_DEFAULTS = {"augmentation_n": 20}  # where they are not GLUE's


def add_data_arguments(parser: argparse.ArgumentParser, required: bool = True) -> None:
    """Add the flags that say which task's rows a script reads (see `find_task`)."""
    add = parser.add_argument
    add("--data_dir", required=required, default=None,
        help="folder of the task's files, or one file: TSV, CSV, JSON lines, Parquet")
    add("--task_name", default=None,
        help=f"one of {', '.join(GLUE_TASKS)}, in any case; or a task.json; without it, what"
             " data_dir is called, describes or shows")
    add("--dev_share", type=float, default=0.0,
        help="share of the training rows, by a hash of their texts, that serve as the dev set")
    add("--test_share", type=float, default=0.0, help="as --dev_share, for the test set")
    add("--train_split", choices=["train", "transfer"], default=None,
        help="one half of the training rows: for a teacher and a student that learn from different"
             " ones")


def task_of(args: argparse.Namespace) -> Task:
    """Find the task that the flags of `add_data_arguments` name."""
    return find_task(args.task_name, args.data_dir, args.dev_share, args.test_share,
                     args.train_split or "")


def find_task(task_name: str | Task | None, data_dir: Path | str | None = None,
              dev_share: float = 0.0, test_share: float = 0.0, train_split: str = "") -> Task:
    """Find a task of GLUE by its name or its folder's; else one of the user's own.

    That is described by the `task.json` that is named or lies in `data_dir`, and where it says
    nothing by what the files show, in one line of the log.

    Raises:
        UserError: nothing certain is found, or the rows do not fit what is described. All rows of
            an own task are read for that.
    """
    if isinstance(task_name, Task):
        return task_name
    parts = {"dev_share": dev_share, "test_share": test_share, "train_split": train_split}
    given = {name: value for name, value in parts.items() if value}
    task = _glue_task(task_name, data_dir)
    if task is not None:
        return _with_parts(task, **given)
    settings = _read_settings(task_name, data_dir) | given
    return _describe(settings, Path(data_dir))


def save_task(task: Task, folder: Path | str) -> None:
    """Write an own task beside a model that was trained on it; GLUE's need no description."""
    if not task.is_glue:
        write_json(Path(folder, TASK_NAME), task_record(task))


def stored_task(model_dir: Path | str) -> Task | None:
    """Return the task that a model was trained on, where its folder says so."""
    if (path := Path(model_dir, TASK_NAME)).is_file():
        settings = _checked(read_json(path), path)
        missing = {"files", "text_a", "label", "labels"} - {*settings}
        if missing:
            raise UserError(f"{path}: no {sorted(missing)[0]!r}; expected what training wrote")
        return _build(settings)
    path = Path(model_dir, CONFIG_NAME)
    name = read_json(path).get("finetuning_task") if path.is_file() else None
    try:
        return get_task(str(name))
    except UserError:
        return None


def task_record(task: Task) -> dict[str, Any]:
    """Return what a task.json says of a task."""
    record = {key: getattr(task, key) for key in KEYS if key not in ("files", "aliases", "range")}
    record |= {"files": dict(task.splits), "aliases": dict(task.aliases)}
    if task.is_regression and math.isfinite(sum(task.range)):
        record["range"] = list(task.range)
    empty = {item.name: item.default for item in fields(Task)} | {"aliases": {}, **OWN_DEFAULTS}
    return {key: list(record[key]) if isinstance(record[key], tuple) else record[key]
            for key in KEYS if key in record and (
                key in ("labels", "text_b", "metrics") or record[key] != empty.get(key))}


# ------------------------------------------------------------------ GLUE


def _glue_task(task_name: str | None, data_dir: Path | str | None) -> Task | None:
    """Return the task of GLUE that is meant, as its files lie there; None for an own one."""
    folder = None if data_dir is None else Path(data_dir)
    folder_name = None if folder is None else folder.resolve().name
    if task_name is None and folder is not None and not (folder / TASK_NAME).is_file():
        task_name = folder_name
        if not is_glue_name(task_name):
            if not folder.exists():
                raise UserError(f"--data_dir {folder}: no such folder; expected a task's")
            return None
    if task_name is None or not is_glue_name(task_name):
        is_described = task_name is None or task_name.endswith(".json")
        if folder is None or (not is_described and (
                not folder.exists() or is_glue_name(folder_name))):
            get_task(task_name or "")  # raises
        return None
    task = get_task(task_name)
    if folder is None or not folder.is_dir() or (folder / task.splits["train"]).is_file():
        return task
    return _hub_layout(task, folder)


def _hub_layout(task: Task, folder: Path) -> Task:
    """Describe a folder in which Hugging Face's `datasets` has written a task of GLUE.

    Their class numbers follow an order of their own, and -1 stands for no label.
    """
    files = find_files(folder, MNLI_STEMS if task.name == "mnli" else SPLIT_STEMS)
    files.pop("test", None)  # without labels
    if "train" not in files:
        return task  # split_paths says what is missing
    names = column_names(next(iter(split_paths(replace(task, splits=files), folder, "train"))),
                         files["train"])
    columns = {"text_a": task.text_a, "text_b": task.text_b, "label": task.label}
    if not {task.text_a, task.label} <= {*names}:
        found = known_columns(names)
        if found is None:
            raise UserError(f"{folder}: columns {names}; expected those of {task.name}")
        columns = found._asdict()
    if task.text_b and task.text_b in names and task.text_a in names:  # QNLI's: also known alone
        columns |= {"text_a": task.text_a, "text_b": task.text_b}
    numbers = tuple((str(number), label) for number, label in enumerate(
        HUB_NUMBERS.get(task.name, task.labels)))
    task = replace(task, **columns, columns=(), splits=files, skip_labels=("-1",),
                   aliases=(*task.aliases, *numbers))
    found = {} if task.is_regression else count_labels(task, folder, "train")
    if foreign := [label for label in found if label not in task.spellings]:
        raise UserError(f"{folder}: is called as {task.folder} of GLUE, but has the label"
                        f" {foreign[0][:40]!r}; expected {', '.join(task.labels)}, or for a task of"
                        f" your own another name of the folder, or a {TASK_NAME} in it")
    return task


def _with_parts(task: Task, dev_share: float = 0.0, test_share: float = 0.0,
                train_split: str = "") -> Task:
    """Have shares of the training rows serve as the dev and test sets.

    Where they do, a dev file becomes the test set, unless there is one.
    """
    if not (dev_share >= 0 and test_share >= 0 and dev_share + test_share < 1):
        raise UserError(f"task {task.name}: a dev share of {dev_share:g} and a test share of"
                        f" {test_share:g}; expected shares that leave rows to train on")
    splits = dict(task.splits)
    if dev_share:
        others = [splits.pop(split) for split in [*splits] if split.startswith("dev")]
        others = [file for file in others if file != splits["train"]]
        if others and "test" not in splits and not test_share:
            splits["test"] = others[0]
            logger.info("%s: %g of the training rows are the dev set, and %s is the test set",
                        task.name, dev_share, others[0])
        splits["dev"] = splits["train"]
    if test_share:
        splits["test"] = splits["train"]
    return replace(task, splits=splits, dev_share=dev_share, test_share=test_share,
                   train_split=train_split)


# ------------------------------------------------------------------ task.json


def _read_settings(task_name: str | None, data_dir: Path | str) -> dict[str, Any]:
    """Return what a task.json says, and the name."""
    folder = Path(data_dir)
    path = folder.parent / TASK_NAME if folder.is_file() else folder / TASK_NAME
    if task_name is not None and task_name.endswith(".json"):
        path, task_name = Path(task_name), None
        if not path.is_file():
            raise UserError(f"--task_name {path}: no such file; expected a description of a task")
    if folder.is_file() and _is_description(folder):
        expected = (folder.parent if folder.name == TASK_NAME else
                    f"the folder of its data, with this file in it as {TASK_NAME}")
        raise UserError(f"{folder}: describes a task; expected {expected}")
    settings = _checked(read_json(path), path) if path.is_file() else {}
    files = settings.get("files", {})
    if folder.is_file() and files and folder.name not in files.values():
        raise UserError(f"{folder}: {path} describes other files, {', '.join(files.values())};"
                        f" expected the folder {folder.parent}, or this file somewhere else")
    if task_name is not None and plain_name(settings.get("name", task_name)) != plain_name(
            task_name):
        raise UserError(f"--task_name {task_name}: {path} describes {settings['name']!r}")
    stem = folder.resolve().stem if folder.is_file() else folder.resolve().name
    name = settings.setdefault("name", task_name or re.sub(r"[^\w.-]+", "_", stem))
    if is_glue_name(name):
        raise UserError(f"{path}: the name {name!r} is that of a task of GLUE; expected another")
    return settings


def _is_description(path: Path) -> bool:
    """Say whether a file is a task.json, whatever it is called, and not rows of data."""
    if path.suffix != ".json" or path.stat().st_size > DESCRIPTION_BYTES:
        return False
    try:
        return {*read_json(path)} <= {*KEYS}
    except UserError:  # several objects, or a list
        return False


def _checked(settings: Mapping[str, Any], path: Path) -> dict[str, Any]:
    """Return the values of a task.json; a `UserError` for a wrong one, or an unknown key."""
    for key, value in settings.items():
        if key not in KEYS:
            raise UserError(f"{path}: unknown key {key!r}; expected some of {', '.join(KEYS)}")
        if not _is_valid(key, value):
            raise UserError(f"{path}: {key!r} is {json.dumps(value, ensure_ascii=False)[:60]};"
                            f" expected {KEYS[key]}")
    if not re.fullmatch(r"[\w][\w.-]*", settings.get("name", "own")):
        raise UserError(f"{path}: 'name' is {settings['name']!r}; expected letters, digits, _ . -")
    return dict(settings)


def _is_valid(key: str, value: Any) -> bool:
    """Say whether a value is what `KEYS` expects."""
    def is_number(value: Any) -> bool:
        return isinstance(value, int | float) and not isinstance(value, bool)

    def is_cell(value: Any) -> bool:
        return isinstance(value, str) or is_number(value)

    kind = KEYS[key]
    if key == "files":
        return isinstance(value, dict) and "train" in value and all(
            (split in ("train", "test") or split.startswith("dev")) and isinstance(file, str)
            for split, file in value.items())
    if kind == LIST:
        return isinstance(value, list) and all(map(is_cell, value))
    if kind == OBJECT:
        return isinstance(value, dict) and all(map(is_cell, value.values()))
    if key == "range":
        return (isinstance(value, list) and len(value) == 2 and all(map(is_number, value))
                and value[0] < value[1])
    if kind == SHARE:
        return is_number(value) and 0 <= value < 1
    if key == "ragged":
        return isinstance(value, bool)
    if key in COUNTS:
        return (isinstance(value, int) and not isinstance(value, bool)
                and value > (2 if key == "max_seq_length" else 0))
    if key == "train_split":
        return value in ("train", "transfer")
    return isinstance(value, str) or (value is None and key == "text_b")


def _stripped(cells: Iterable[Any]) -> tuple[str, ...]:
    """Return labels of a task.json as those of the files are read: without space around them."""
    return tuple(str(cell).strip() for cell in cells)


def _build(settings: Mapping[str, Any], **more: Any) -> Task:
    """Make the task of a complete description.

    Raises:
        UserError: a metric that is none or does not fit, files of splits that are none, a positive
            label that is not among the labels.
    """
    values = {**settings, **more}
    labels = _stripped(values["labels"])
    if twice := [label for label, count in Counter(labels).items() if count > 1]:
        raise UserError(f"task {values['name']}: the label {twice[0]!r} stands twice in 'labels'")
    columns = [values[key] for key in ("text_a", "text_b", "label") if values.get(key) is not None]
    if len({*columns}) < len(columns):
        raise UserError(f"task {values['name']}: {', '.join(columns)} as texts and label; expected"
                        " different columns")
    metrics = tuple(values.get("metrics") or (CLASS_DEFAULT if labels else SCORE_DEFAULT))
    known = CLASS_METRICS if labels else SCORE_METRICS
    if unknown := [metric for metric in metrics if metric not in known]:
        raise UserError(f"task {values['name']}: the metric {unknown[0]!r}; expected some of"
                        f" {', '.join(known)}")
    positive = values.get("positive", "").strip() or ("1" if "1" in labels else "")
    wanted = {"f1", "acc_and_f1"} & {*metrics}
    if labels and (positive not in ("", *labels) or (wanted and not positive)):
        raise UserError(f"task {values['name']}: F1 is of the label 'positive', which is"
                        f" {positive!r}; expected one of {', '.join(labels[:12])}")
    splits = dict(values["files"])
    if same := [split for split, file in splits.items() if split != "train"
                and file == splits["train"] and not values.get(f"{split}_share")]:
        raise UserError(f"task {values['name']}: {splits['train']!r} is the file of train and of"
                        f" {same[0]}; expected another, or a share of train: --{same[0]}_share 0.1")
    aliases = tuple(map(_stripped, values.get("aliases", {}).items()))
    if foreign := [label for _, label in aliases if label not in labels]:
        raise UserError(f"task {values['name']}: an alias of {foreign[0]!r}; expected one of"
                        f" {', '.join(labels[:12])}")
    counts = {key: values[key] for key in COUNTS if key in values}
    task = Task(
        values["name"], values["name"], labels, values["text_a"], values.get("text_b"),
        values["label"], metrics, tuple(map(str, values.get("columns", ()))), splits, aliases,
        positive, tuple(map(float, values.get("range", (-math.inf, math.inf)))),
        **{**OWN_DEFAULTS, **counts},
        skip_labels=_stripped(values.get("skip_labels", ())),
        ragged=values.get("ragged", False))
    parts = ("dev_share", "test_share", "train_split")
    return _with_parts(task, **{name: values[name] for name in parts if name in values})


def _describe(settings: dict[str, Any], data_dir: Path) -> Task:
    """Complete a description by what the files show; check all rows, and say what was found."""
    if "files" not in settings:
        settings["files"] = find_files(data_dir)
    settings = {**find_layout(settings, data_dir), **settings}
    task = _build({**settings, "metrics": (), "positive": "", "aliases": {}}, labels=())
    splits = [*task.splits]
    if "test" in splits and not (task.test_share or has_labels(task, data_dir)):
        logger.info("%s: the file of test has no labels", data_dir)
        splits.remove("test")
        settings["files"] = {
            split: file for split, file in settings["files"].items() if split != "test"}
    is_scored = settings.get("labels", [] if "range" in settings else None) == []
    counts = {split: count_labels(task, data_dir, split, is_scored) for split in splits}
    if is_scored and len(counts["train"]) == 1:
        raise UserError(f"{data_dir}: all rows have the score {[*counts['train']][0]}; expected"
                        " several")
    _check_first_row(task, data_dir, counts["train"], settings)
    spelled = dict(map(_stripped, settings.get("aliases", {}).items()))
    for counter in counts.values():
        for label in [label for label in counter if label in spelled]:
            counter[spelled[label]] += counter.pop(label)
    if "labels" not in settings:
        settings["labels"] = [] if is_scored else infer_labels(
            counts["train"], settings, data_dir)
    task = _build(settings)
    if not task.is_regression:
        check_labels(task, counts, settings, data_dir)
    if "test" in splits and not {*task.labels} & {*counts["test"]} and not task.is_regression:
        splits.remove("test")
        task = replace(task, splits={
            split: file for split, file in task.splits.items() if split != "test"})
        logger.info("%s: the file of test has no labels of the task", data_dir)
    _log_task(task, data_dir, {split: counts[split] for split in splits})
    return task


def _check_first_row(task: Task, data_dir: Path, labels: Counter[str],
                     settings: Mapping[str, Any]) -> None:
    """Raise a `UserError` where the first row of files without header looks like one."""
    path = split_paths(task, data_dir, "train")[0]
    first = column_names(path, task.splits["train"])
    place = task.columns.index(task.label) if task.label in task.columns else len(first)
    if (place < len(first) and labels[label_of(task, first, place)] == 1
            and "labels" not in settings):
        raise refusal(f"{path}, line 1: the label {first[place][:40]!r} is of this row alone; is it"
                      " a header?", settings | {"columns": []}, data_dir,
                      text_a=first[task.columns.index(task.text_a)], label=first[place])


def _log_task(task: Task, data_dir: Path, counts: Mapping[str, Counter[str]]) -> None:
    """Say in one line how the files were understood."""
    texts = " and ".join(repr(name) for name in (task.text_a, task.text_b) if name is not None)
    rows = ", ".join(f"{counter.total()} {split}" for split, counter in counts.items())
    train = counts["train"]
    kind = f"scores of {task.label!r}" if task.is_regression else (
        f"{task.num_labels} labels of {task.label!r}: " + ", ".join(
            f"{label} ({train[label]})" for label in task.labels[:8])
        + (", ..." if task.num_labels > 8 else ""))
    logger.info("%s: task %s: texts %s; %s; rows: %s", data_dir, task.name, texts, kind, rows)

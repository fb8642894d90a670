"""What the files of a data set show: the splits, the columns, the labels."""

import json
import math
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from decimal import Decimal
from itertools import chain, islice
from pathlib import Path
from typing import Any, NamedTuple

from transformer.file_utils import UserError
from transformer.table_files import (
    CSV,
    FORMATS,
    TEXT_FILE_COLUMNS,
    TEXTS,
    TSV,
    format_of,
    iterate_table,
    names_columns,
)
from transformer.tasks import Task, folder_content, plain_label, split_paths

TASK_NAME = "task.json"
LOOKED_AT = 50  # rows, to tell what the columns are
NO_LABELS = ("", "-1")
SPLIT_STEMS = {"train": ("train", "training"), "dev": ("dev", "valid", "validation", "val", "eval"),
               "test": ("test",)}
MNLI_STEMS = {"train": ("train",), "dev": ("validation_matched", "dev_matched"),
              "dev_mm": ("validation_mismatched", "dev_mismatched")}
FILE_PATTERNS = ("{}-*-of-*.parquet", "{}/*.arrow", "{}/*.parquet", "{}/*/*.txt")

# The columns that are found by name, in any case.
LABEL_COLUMNS = ("label", "labels", "class", "score", "gold_label", "category", "intent",
                 "sentiment", "target", "stars")
TEXT_COLUMNS = ("sentence", "text", "text_a", "content", "review", "query", "question")
PAIR_COLUMNS = (("sentence1", "sentence2"), ("text_a", "text_b"), ("question1", "question2"),
                ("premise", "hypothesis"), ("text", "text_pair"), ("text1", "text2"),
                ("question", "sentence"))

KNOWN_COLUMNS = {*LABEL_COLUMNS, *TEXT_COLUMNS, *(name for pair in PAIR_COLUMNS for name in pair)}


def find_files(folder: Path, stems: Mapping[str, Sequence[str]] = SPLIT_STEMS) -> dict[str, str]:
    """Find the file, or the pattern of files, of each split in a folder; or the file itself.

    Without a file of train, the only table of the folder is it.
    """
    if folder.is_file():
        return {"train": folder.name}
    found: dict[str, str] = {}
    for split, names in stems.items():
        patterns = [*(f"{stem}{suffix}" for stem in names for suffix in FORMATS),
                    *(pattern.format(stem) for stem in names for pattern in FILE_PATTERNS)]
        there = [name for name in patterns if any(path.is_file() for path in folder.glob(name))]
        if len(there) > 1:
            raise UserError(f"{folder}: both {there[0]} and {there[1]} are files of {split};"
                            f' expected one, or a {TASK_NAME} with "files": {{"{split}": ...}}')
        if there:
            found[split] = there[0]
    if "train" not in found and stems is SPLIT_STEMS:
        tables = sorted(path.name for path in folder.iterdir() if path.suffix.lower() in FORMATS
                        and path.is_file() and not _is_other_file(path, found))
        if len(tables) != 1:
            raise UserError(f"{folder}: no train file; expected train.tsv, train.csv,"
                            f" train.jsonl or train.parquet; {folder_content(folder)}")
        found = {"train": tables[0], **found}
    return found


def _is_other_file(path: Path, found: Mapping[str, str]) -> bool:
    """Say whether a file is not the one table of a folder: another split, ours, a note."""
    return (path.name in found.values() or path.stem.endswith("_aug") or path.name.startswith(".")
            or path.name in (TASK_NAME, "dataset_info.json", "dataset_infos.json",
                             "dataset_dict.json", "state.json")
            or path.stem.lower() in ("readme", "license", "requirements", "labels", "classes"))


def column_names(path: Path, pattern: str) -> list[str]:
    """Return the cells of a file's first row, which may be names."""
    return next(iterate_table(path, format_of(pattern)), (0, []))[1]


class Columns(NamedTuple):
    """The names of a file's columns; `label` is None for texts alone."""

    text_a: str
    text_b: str | None
    label: str | None


def known_columns(names: Sequence[str], has_label: bool = True) -> Columns | None:
    """Return which of the columns are the text, the second text and the label, by their names.

    Of a text and a label one that is known tells the other. None where no column is known.

    Args:
        names: of all columns; case does not matter.
        has_label: False for rows that may have no label.

    Raises:
        UserError: several would do, or one is missing.
    """
    by_name: dict[str, list[str]] = {}
    for name in names:
        by_name.setdefault(name.strip().lower(), []).append(name)
    labels = [name for known in LABEL_COLUMNS for name in by_name.get(known, ())]
    pairs = [pair for pair in PAIR_COLUMNS if {*pair} <= {*by_name}]
    paired = {name for pair in pairs for name in pair}
    singles = [name for known in TEXT_COLUMNS if known not in paired
               for name in by_name.get(known, ())]
    if not (labels or pairs or singles):
        return None
    if has_label and len(names) == 2 and len(labels) + len(singles) == 1:
        other = next(name for name in names if name not in labels + singles)
        labels, singles = labels or [other], singles or [other]
    if len(labels) == 1 or not (labels or has_label):
        label = labels[0] if labels else None
        if len(pairs) == 1 and not singles and all(len(by_name[name]) == 1 for name in pairs[0]):
            return Columns(*(by_name[name][0] for name in pairs[0]), label)
        if len(singles) == 1 and not pairs:
            return Columns(singles[0], None, label)
    texts = [*chain.from_iterable(by_name[name] for name in sorted(paired)), *singles]
    raise UserError(f"columns {[name[:40] for name in names[:12]]}: which are the texts"
                    f" ({', '.join(texts) or 'none known'}) and the label"
                    f" ({', '.join(labels) or 'none known'}) is not certain")


def find_layout(settings: Mapping[str, Any], data_dir: Path) -> dict[str, Any]:
    """Return what the first rows of train show of the columns."""
    if {"text_a", "label"} <= {*settings} or settings.get("ragged"):
        ragged = {"text_a": "text_a", "text_b": "text_b", "label": "label"}
        return ragged if settings.get("ragged") else {}
    files = settings["files"]
    probe = Task(settings["name"], settings["name"], (), "", None, "", splits=files)
    path = split_paths(probe, data_dir, "train")[0]
    form = format_of(files["train"])
    rows = [cells for _, cells in islice(iterate_table(path, form), LOOKED_AT)]
    if not rows:
        raise UserError(f"{path}: an empty file; expected rows of a text and a label")
    odd = {"\0": "a NUL byte, as in a spreadsheet's or a packed file",
           "\r": "a carriage return inside a line, which ends with a line feed"}
    if found := [mark for mark in odd for cell in rows[0] if mark in cell]:
        raise UserError(f"{path}, line 1: {odd[found[0]]}; expected lines of text")
    if rows[0] == [""]:
        raise UserError(f"{path}, line 1: is empty; expected the columns, or a row")
    numbered = sum(row[-1].strip().removeprefix("-").isdecimal() for row in rows if len(row) > 1)
    if (files["train"], files.get("dev")) == ("train.txt", "eval.txt") and 2 * numbered > len(rows):
        return {"ragged": True, "text_a": "text_a", "text_b": "text_b", "label": "label"}
    if settings.get("columns"):
        rows = [[*map(str, settings["columns"])]]
    elif form == TEXTS:
        return {"text_a": "text", "label": "folder"}
    try:
        found = known_columns(rows[0])
    except UserError as error:
        raise refusal(f"{path}: {error}.", settings, data_dir, **_guess(rows)) from error
    if found is not None:
        return found._asdict()
    if settings.get("columns") or names_columns(form):
        raise refusal(f"{path}: columns {rows[0][:12]}; which are the texts and the label?",
                       settings, data_dir, **_guess(rows))
    return _without_header(rows, path, settings, data_dir)


def _guess(rows: Sequence[Sequence[str]]) -> dict[str, str]:
    """Return columns for a task.json that a user may change: a known label or the last, a text.

    The text is a known one, else the column with the longest cells.
    """
    names = rows[0]
    sizes = {name: sum(len(row[place]) for row in rows[1:] if place < len(row))
             for place, name in enumerate(names)}
    label = next((name for name in names if name.strip().lower() in LABEL_COLUMNS), names[-1])
    others = [name for name in names if name != label]
    known = [name for name in others if name.strip().lower() in TEXT_COLUMNS]
    text = known[0] if known else max(others, key=sizes.get, default="...")
    return {"text_a": text, "label": label}


def _without_header(rows: Sequence[Sequence[str]], path: Path, settings: Mapping[str, Any],
                    data_dir: Path) -> dict[str, Any]:
    """Return the columns of a file whose first line names none: one text or two, the label last."""
    first = rows[0]
    names = {2: ["text", "label"], 3: ["text_a", "text_b", "label"]}.get(len(first))
    shown = [cell[:40] for cell in first[:12]]
    if names is None:
        raise refusal(f"{path}, line 1: {len(first)} columns {shown}; expected a header with known"
                       " names, or without one a text, perhaps another, and a label (else"
                       ' "columns" names them).', settings, data_dir, **_guess(rows))
    later = {row[-1].strip() for row in rows[1:] if len(row) == len(first)}
    digits = [sum(row[column].strip().isdecimal() for row in rows if len(row) == len(first))
              for column in range(len(first) - 1)]
    if (not first[-1].strip().replace(".", "").isdecimal() and all(
            label.replace(".", "").isdecimal() for label in later) and later) or (
            2 * max(digits) > len(rows)):
        raise refusal(f"{path}, line 1: {shown}; is it a header, and which columns are the texts"
                       ' and the label? (If it is none, "columns" names them.)', settings,
                       data_dir, **_guess(rows))
    return {"columns": names, "text_a": names[0], "text_b": names[1] if len(names) == 3 else None,
            "label": "label"}


def has_labels(task: Task, data_dir: Path) -> bool:
    """Say whether the test file has the column of the labels, and labels in it."""
    path, form = split_paths(task, data_dir, "test")[0], format_of(task.splits["test"])
    rows = [cells for _, cells in islice(iterate_table(path, form), 2)]
    if task.ragged or not rows:
        return True
    has_names = not task.columns or form not in (TSV, CSV)
    names = rows.pop(0) if has_names else task.columns
    if task.label not in names or (rows and len(rows[0]) < len(names)):
        return False
    return not rows or rows[0][list(names).index(task.label)].strip() not in NO_LABELS


def infer_labels(counts: Counter[str], settings: Mapping[str, Any], data_dir: Path) -> list[str]:
    """Return the labels of the training rows: numbers by value, else in the alphabet's order.

    Raises:
        UserError: they look like scores, like texts, or are all the same.
    """
    labels, rows = [*counts], counts.total()
    if lists := [label for label in labels if label.startswith("[") and label.endswith("]")]:
        raise UserError(f"{data_dir}: the label {lists[0][:40]} is a list; expected one label a"
                        " row")
    if quoted := [label for label in labels if label[0] == label[-1] == '"']:
        raise UserError(f"{data_dir}: the label {quoted[0][:40]} stands in quotes, which are part"
                        " of the cells of .tsv files and in .csv files stand right beside the"
                        " commas; expected none around labels")
    if missing := [label for label in labels if label.lower() == "nan"]:
        raise UserError(f"{data_dir}: the label {missing[0]}, which stands for a missing one;"
                        f' expected labels (in a task.json "skip_labels": ["{missing[0]}"] passes'
                        ' such rows over, "labels" takes them)')
    try:
        numbers = {label: float(label) for label in labels}
    except ValueError:
        numbers = {}
    if any(not number.is_integer() for number in numbers.values() if math.isfinite(number)):
        raise refusal(f"{data_dir}: the labels are numbers such as {shown_labels(labels)}; are they"
                       " scores?", settings, data_dir, labels=[],
                       range=[min(numbers.values()), max(numbers.values())])
    if (len(labels) >= 5 and 2 * len(labels) > rows) or len(labels) == rows > 2:
        raise refusal(f"{data_dir}: {len(labels)} different labels in {rows} rows, such as"
                       f" {shown_labels(labels)}; is {settings['label']!r} the label?", settings,
                       data_dir, label="...")
    return sorted(labels, key=numbers.get) if numbers else sorted(labels)


def check_labels(task: Task, counts: Mapping[str, Counter[str]], settings: Mapping[str, Any],
                  data_dir: Path) -> None:
    """Raise a `UserError` for labels that the rows lack, or that only some files have."""
    if [*counts["train"]] == [*task.labels[:1]]:
        raise UserError(f"{data_dir}: all rows have the label {task.labels[0]!r}; expected two or"
                        " more")
    meanings = Counter(map(_meaning, task.labels))
    if alike := [label for label in task.labels if meanings[_meaning(label)] > 1]:
        alike = [label for label in alike if _meaning(label) == _meaning(alike[0])]
        raise refusal(f"{data_dir}: the labels {', '.join(map(repr, alike[:4]))} differ in case,"
                       " spaces or zeros only; expected one spelling, or aliases.", settings,
                       data_dir, labels=[label for label in task.labels if label not in alike[1:]],
                       aliases=dict.fromkeys(alike[1:], alike[0]))
    anywhere = counts["train"] + counts.get("dev", Counter())
    if lacking := [label for label in task.labels if not anywhere[label]]:
        found = shown_labels([*counts["train"]])
        raise UserError(f"{data_dir}: no row of train has the label {lacking[0]!r}; expected rows"
                        f" of each of {shown_labels(task.labels)}; found {found}")
    for split, counter in counts.items():
        new = [label for label in counter if label not in task.labels]
        if split == "test" and len(new) == len(counter) == 1:
            continue  # one that stands for none
        if new:
            raise UserError(f"{data_dir}: the label {new[0]!r} is in {split} ({counter[new[0]]}"
                            f" rows) but not among the labels {shown_labels(task.labels)}")
        missing = [label for label in task.labels if not counter[label]]
        if missing and task.label == TEXT_FILE_COLUMNS[1]:
            raise refusal(f"{data_dir}: the folder {missing[0]!r} of train has no counterpart in"
                          f" {split}; are its texts without labels?", settings, data_dir,
                          labels=[*filter(counter.get, task.labels)], skip_labels=missing)


def _meaning(label: str) -> str | Decimal:
    """Return what is the same of two labels that are spelled differently, such as 1 and 1.0."""
    is_number = re.fullmatch(r"[+-]?\d+(\.\d*)?", label)
    return Decimal(label) if is_number else plain_label(label)


def refusal(message: str, settings: Mapping[str, Any], data_dir: Path, **more: Any) -> UserError:
    """Return an error that ends with the task.json that would answer it."""
    folder = data_dir.parent if data_dir.is_file() else data_dir
    ready = json.dumps({**settings, **more}, ensure_ascii=False)
    return UserError(f"{message} Say it in {folder / TASK_NAME}: {ready}")


def shown_labels(labels: Sequence[str]) -> str:
    """Return some labels for a message."""
    return ", ".join(repr(label[:30]) for label in labels[:8]) + ", ..." * (len(labels) > 8)

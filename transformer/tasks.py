"""GLUE: the table of tasks, TSV reading and writing, rows, and the order of a model's labels."""

import logging
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import NamedTuple

from transformer.file_utils import UserError, atomic_path, text_lines

logger = logging.getLogger(__name__)

BYTE_ORDER_MARK = "\ufeff"


# ------------------------------------------------------------------ the tasks, one row each


@dataclass(frozen=True)
class GlueTask:
    """What one GLUE task's files look like and how its models are judged.

    `labels` stand in the order of the original's classifiers and are empty for regression.
    `columns` names the columns of files without a header and is empty where the file names them.
    `metrics` starts with the one that selects the best model. `max_seq_length` and
    `intermediate_epochs` are the paper's, `augmentation_n` the original code's.
    """

    name: str
    folder: str
    labels: tuple[str, ...]
    text_a: str
    text_b: str | None
    label: str
    metrics: tuple[str, ...] = ("acc",)
    columns: tuple[str, ...] = ()
    dev_files: Mapping[str, str] = field(default_factory=lambda: {"dev": "dev.tsv"})
    aliases: tuple[str, ...] = ()
    max_seq_length: int = 128
    intermediate_epochs: int = 20
    augmentation_n: int = 30
    skip_short_rows: bool = False

    @property
    def has_header(self) -> bool:
        """Whether the first line of the task's files names the columns."""
        return not self.columns

    @property
    def is_regression(self) -> bool:
        """Whether the label is a score (STS-B) and not a class."""
        return not self.labels

    @property
    def num_labels(self) -> int:
        """How many numbers the classifier puts out."""
        return len(self.labels) or 1

    @property
    def files(self) -> dict[str, str]:
        """The file of each split, by the split's name."""
        return {"train": "train.tsv", **self.dev_files, "aug": "train_aug.tsv"}


BINARY = ("0", "1")
ENTAILMENT = ("entailment", "not_entailment")
PAIR_METRICS = ("acc", "f1", "acc_and_f1")

# `aliases` are the names that Hugging Face's checkpoints give to the same labels, same order.
_TASKS = (
    GlueTask(
        "cola", "CoLA", BINARY, "sentence", None, "label", ("mcc",),
        columns=("source", "label", "star", "sentence"),
        aliases=("unacceptable", "acceptable"), max_seq_length=64, intermediate_epochs=50,
    ),
    GlueTask(
        "sst-2", "SST-2", BINARY, "sentence", None, "label",
        aliases=("negative", "positive"), max_seq_length=64, augmentation_n=20,
    ),
    GlueTask(
        "mrpc", "MRPC", BINARY, "#1 String", "#2 String", "Quality", PAIR_METRICS,
        aliases=("not_equivalent", "equivalent"),
    ),
    GlueTask(
        "sts-b", "STS-B", (), "sentence1", "sentence2", "score",
        ("corr", "pearson", "spearmanr"),
    ),
    # Three rows of the published training file are cut in two by a line break in a question;
    # the original skipped them as well.
    GlueTask(
        "qqp", "QQP", BINARY, "question1", "question2", "is_duplicate", PAIR_METRICS,
        aliases=("not_duplicate", "duplicate"), intermediate_epochs=10, augmentation_n=10,
        skip_short_rows=True,
    ),
    GlueTask(
        "mnli", "MNLI", ("contradiction", "entailment", "neutral"),
        "sentence1", "sentence2", "gold_label",
        dev_files={"dev": "dev_matched.tsv", "dev_mm": "dev_mismatched.tsv"},
        intermediate_epochs=10, augmentation_n=10,
    ),
    GlueTask(
        "qnli", "QNLI", ENTAILMENT, "question", "sentence", "label",
        intermediate_epochs=10, augmentation_n=20,
    ),
    GlueTask("rte", "RTE", ENTAILMENT, "sentence1", "sentence2", "label"),
    GlueTask(
        "wnli", "WNLI", BINARY, "sentence1", "sentence2", "label",
        aliases=("not_entailment", "entailment"),
    ),
)
GLUE_TASKS: dict[str, GlueTask] = {task.name: task for task in _TASKS}


def get_task(name: str | GlueTask) -> GlueTask:
    """Find a task by name; case, "-" and "_" do not matter ("SST-2", "sst2", "STS_B").

    An unknown name is a `UserError` that lists the tasks.
    """
    if isinstance(name, GlueTask):
        return name

    def plain(text: str) -> str:
        return text.strip().lower().replace("-", "").replace("_", "")

    for task in _TASKS:
        if plain(task.name) == plain(name):
            return task
    raise UserError(f"unknown task {name!r}; expected one of {', '.join(GLUE_TASKS)}")


# ------------------------------------------------------------------ tab-separated files


def iterate_tsv(path: Path | str) -> Iterator[tuple[int, list[str]]]:
    r"""Yield (line number from 1, cells) of a tab-separated UTF-8 file.

    The dialect is GLUE's: quotes mean nothing, only "\n" ends a line (a sentence may hold any
    other separator of Unicode), "\r"s before it are dropped, so is a byte-order mark at the
    start. A missing file, or bytes that are not UTF-8, is a `UserError`.
    """
    path = Path(path)
    if not path.is_file():
        raise UserError(f"{path}: no such file; expected tab-separated text")
    for number, line in text_lines(path):
        if number == 1:
            line = line.removeprefix(BYTE_ORDER_MARK)
        yield number, line.removesuffix("\n").rstrip("\r").split("\t")


def read_tsv(path: Path | str) -> list[list[str]]:
    """Read a whole tab-separated file in the dialect of `iterate_tsv`: the cells of each line."""
    return [cells for _, cells in iterate_tsv(path)]


def tsv_line(row: Sequence[str], path: Path | str, number: int) -> str:
    """Return the line of a row; one that the dialect cannot express is a `UserError`.

    `path` and `number`, which counts rows from 1, are the file's and the row's in the message.
    """
    line = "\t".join(row)
    expressible = (
        len(row) > 0
        and line.count("\t") == len(row) - 1
        and "\n" not in line
        and not line.endswith("\r")
        and not (number == 1 and line.startswith(BYTE_ORDER_MARK))
    )
    if not expressible:
        raise UserError(
            f"{path}, row {number}: {list(row)!r} cannot be written; "
            "expected cells without tab, line break or byte-order mark"
        )
    return line + "\n"


def write_tsv(path: Path | str, rows: Iterable[Sequence[str]]) -> None:
    """Write rows that `read_tsv` reads back unchanged; the file appears when all are written.

    A row that the dialect cannot express (a tab or line break inside a cell) is a `UserError`.
    """
    with atomic_path(path) as temporary, temporary.open(
            "w", encoding="utf-8", newline="\n") as file:
        file.writelines(tsv_line(row, path, number) for number, row in enumerate(rows, start=1))


# ------------------------------------------------------------------ rows of a task


class Example(NamedTuple):
    """One row of a task: one sentence or two, and the label as it is written in the file."""

    guid: str
    text_a: str
    text_b: str | None
    label: str | None


class TaskRows(NamedTuple):
    """All cells of a training file, for writing it again with other sentences.

    `header` is None where the file has none; `text_a` and `text_b` are column numbers from 0.
    """

    header: list[str] | None
    rows: list[list[str]]
    text_a: int
    text_b: int | None


class _Columns(NamedTuple):
    width: int
    text_a: int
    text_b: int | None
    label: int


def split_path(task: str | GlueTask, data_dir: Path | str, split: str) -> Path:
    """Find the file of a split in the task's own folder.

    Where it is missing, the `UserError` says what the folder holds, and which folder was
    probably meant when `data_dir` is the one above.
    """
    task, data_dir = get_task(task), Path(data_dir)
    if split not in task.files:
        raise UserError(f"unknown split {split!r} of {task.name}; expected {', '.join(task.files)}")
    path = data_dir / task.files[split]
    if path.is_file():
        return path
    if not data_dir.is_dir():
        found = "a file" if data_dir.exists() else "no such folder"
        raise UserError(f"{data_dir}: {found}; expected the folder with {path.name} of {task.name}")
    names = sorted(entry.name for entry in data_dir.iterdir() if not entry.name.startswith("."))
    shown = ", ".join(names[:12]) + (", ..." if len(names) > 12 else "")
    message = f"{path}: no such file; the folder " + (f"holds {shown}" if names else "is empty")
    folder = next((name for name in names if name.lower() == task.folder.lower()), None)
    if folder and (data_dir / folder).is_dir():
        message += f"; did you mean {data_dir / folder}?"
    elif split == "aug":
        message += "; data_augmentation.py writes it"
    raise UserError(message)


def _find_columns(task: GlueTask, path: Path) -> _Columns:
    """Find the task's columns by name, in the file's header where it has one."""
    names = list(task.columns)
    if task.has_header:
        _, names = next(iterate_tsv(path), (0, []))
        if not names:
            raise UserError(f"{path}: an empty file; expected a header and rows of {task.name}")
    wanted = [name for name in (task.text_a, task.text_b, task.label) if name is not None]
    missing = [name for name in wanted if name not in names]
    if missing:
        raise UserError(
            f"{path}, line 1: the header has no column {missing[0]!r}; expected {wanted}, "
            f"found {[name[:40] for name in names[:12]]}"
        )
    text_b = None if task.text_b is None else names.index(task.text_b)
    return _Columns(len(names), names.index(task.text_a), text_b, names.index(task.label))


def _check_label(task: GlueTask, label: str) -> str | None:
    """Say what was expected instead of `label`, or None when it is fine."""
    if not task.is_regression:
        return None if label in task.labels else f"one of {', '.join(task.labels)}"
    try:
        return None if 0.0 <= float(label) <= 5.0 else "a score from 0 to 5"
    except ValueError:
        return "a score, a number from 0 to 5"


def _iterate_rows(task: GlueTask, path: Path, columns: _Columns) -> Iterator[tuple[int, list[str]]]:
    """Yield (line number, cells) of every row after the header, each checked.

    Blank lines are passed over. A row with too few columns is an error, except for QQP, where
    such rows are skipped and counted in a warning.
    """
    read = skipped = wide = 0
    for number, cells in iterate_tsv(path):
        if cells == [""] or (number == 1 and task.has_header):
            continue
        # The first line of a file without header may be a header that somebody added.
        hint = "" if task.has_header or number > 1 else f"; {task.name} files have no header"
        if len(cells) < columns.width:
            if not task.skip_short_rows:
                raise UserError(
                    f"{path}, line {number}: {len(cells)} columns in {_shorten(cells)}; "
                    f"expected {columns.width}{hint}"
                )
            skipped += 1
            continue
        expected = _check_label(task, cells[columns.label])
        if expected:
            raise UserError(
                f"{path}, line {number}: label {cells[columns.label][:40]!r}; "
                f"expected {expected}{hint}"
            )
        wide += len(cells) > columns.width
        read += 1
        yield number, cells
    if skipped:
        logger.warning("%s: skipped %d rows with too few columns", path, skipped)
    if wide:
        logger.warning("%s: %d rows have more than %d columns", path, wide, columns.width)
    if not read:
        what = "no rows after the header" if task.has_header else "an empty file"
        raise UserError(f"{path}: {what}; expected rows of {task.name}")


def _shorten(cells: Sequence[str]) -> str:
    text = "\t".join(cells)
    return repr(text if len(text) <= 60 else text[:57] + "...")


def iterate_examples(
    task: str | GlueTask, data_dir: Path | str, split: str, max_rows: int | None = None
) -> Iterator[Example]:
    """Yield the rows that `load_examples` lists, one at a time."""
    task = get_task(task)
    path = split_path(task, data_dir, split)
    columns = _find_columns(task, path)
    for number, cells in islice(_iterate_rows(task, path, columns), max_rows):
        text_b = None if columns.text_b is None else cells[columns.text_b]
        label = sys.intern(cells[columns.label])
        yield Example(f"{split}-{number}", cells[columns.text_a], text_b, label)


def load_examples(
    task: str | GlueTask, data_dir: Path | str, split: str, max_rows: int | None = None
) -> list[Example]:
    """Read one split ("train", "dev", "aug"; MNLI also "dev_mm") from the task's own folder.

    `max_rows` reads only the first rows. Whatever is wrong with the file is a `UserError` that
    names file, line and value and what was expected there.
    """
    return list(iterate_examples(task, data_dir, split, max_rows))


def task_rows(task: str | GlueTask, data_dir: Path | str, split: str = "train") -> TaskRows:
    """Read all cells of a split, checked as by `load_examples` (see `TaskRows`)."""
    task = get_task(task)
    path = split_path(task, data_dir, split)
    columns = _find_columns(task, path)
    header = next(iterate_tsv(path))[1] if task.has_header else None
    rows = [cells for _, cells in _iterate_rows(task, path, columns)]
    return TaskRows(header, rows, columns.text_a, columns.text_b)


def _plain_label(name: object) -> str:
    return str(name).strip().lower().replace("-", "_").replace(" ", "_")


def label_order(
    task: str | GlueTask, config_id2label: Mapping[int | str, str] | None
) -> tuple[str, ...]:
    """Give the task's labels in the order of a checkpoint's outputs, matched by name.

    `config_id2label` is the configuration's table. None and nameless tables ("LABEL_0", or "0"
    for output 0) mean the task's own order; regression has no labels. Names that are not the
    task's are a `UserError`.
    """
    task = get_task(task)
    if task.is_regression or not config_id2label:
        return task.labels
    places = sorted(config_id2label, key=int)  # JSON turns the numbers into strings
    names = [_plain_label(config_id2label[place]) for place in places]
    meaning = dict(zip(task.aliases, task.labels, strict=False))
    meaning.update({label: label for label in task.labels})
    order = tuple(meaning.get(name, "") for name in names)
    if sorted(order) == sorted(task.labels):
        return order
    if all(name in (f"label_{place}", str(place)) for place, name in enumerate(names)):
        if task.num_labels > 2:
            # Published MNLI models disagree in their order, so a wrong guess is likely enough.
            logger.warning(
                "the checkpoint does not name its labels; taking the order %s", task.labels
            )
        return task.labels
    raise UserError(
        f"the checkpoint's labels {list(config_id2label.values())} do not fit task {task.name}; "
        f"expected {list(task.labels)}" + (f" or {list(task.aliases)}" if task.aliases else "")
    )

"""Classification and regression tasks: what their files look like, their rows, their labels."""

import logging
import math
import sys
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from hashlib import blake2b
from itertools import islice
from pathlib import Path, PurePosixPath
from typing import NamedTuple

from transformer.file_utils import UserError
from transformer.table_files import (
    CSV,
    JSON,
    TSV,
    NoText,
    format_of,
    iterate_table,
    names_columns,
    shown_row,
)

logger = logging.getLogger(__name__)


# ------------------------------------------------------------------ the tasks, one row each


@dataclass(frozen=True)
class Task:
    """What one task's files look like and how its models are judged.

    `labels` stand in the order of the original's classifiers and are empty for regression, whose
    scores lie in `range`. `columns` names the columns of files without a header and is empty where
    the file names them. `splits` names the file of each split, or a pattern of several files.
    `metrics` starts with the one that selects the best model; its F1 is that of the label
    `positive`. `max_seq_length` and `intermediate_epochs` are the paper's, `augmentation_n` the
    original code's. `aliases` are (other spelling, label).

    `dev_share` of the training rows, chosen by a hash of their texts, serve as the dev set, and
    `test_share` as the test set; `train_split` "train" or "transfer" takes half of the others.
    Rows of `skip_labels` are passed over. Rows of a `ragged` file hold a text, perhaps another,
    whatever else, and the label.
    """

    name: str
    folder: str
    labels: tuple[str, ...]
    text_a: str
    text_b: str | None
    label: str
    metrics: tuple[str, ...] = ("acc",)
    columns: tuple[str, ...] = ()
    splits: Mapping[str, str] = field(
        default_factory=lambda: {"train": "train.tsv", "dev": "dev.tsv"}, hash=False)
    aliases: tuple[tuple[str, str], ...] = ()
    positive: str = ""
    range: tuple[float, float] = (0.0, 5.0)
    max_seq_length: int = 128
    intermediate_epochs: int = 20
    augmentation_n: int = 30
    skip_short_rows: bool = False
    skip_labels: tuple[str, ...] = ()
    ragged: bool = False
    dev_share: float = 0.0
    test_share: float = 0.0
    train_split: str = ""
    is_glue: bool = False

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
        """The file of each split, by the split's name, the augmented training rows among them."""
        train = PurePosixPath(self.splits["train"])
        part = f"_{self.train_split}" if self.train_split else ""
        aug = train.with_name(f"{train.stem}{part}_aug{train.suffix}")
        if "*" in str(train) or format_of(train) not in (TSV, CSV, JSON):
            aug = PurePosixPath(f"train{part}_aug.jsonl")
        return {**self.splits, "aug": str(aug)}

    @property
    def dev_files(self) -> dict[str, str]:
        """The files of the splits on which a training run is measured; MNLI has two."""
        return {split: file for split, file in self.splits.items() if split.startswith("dev")}

    @property
    def spellings(self) -> dict[str, str]:
        """The label of every spelling that the files may hold."""
        return {**dict(self.aliases), **{label: label for label in self.labels}}


BINARY = ("0", "1")
ENTAILMENT = ("entailment", "not_entailment")
PAIR_METRICS = ("acc", "f1", "acc_and_f1")


def _glue(name: str, folder: str, labels: tuple[str, ...], *columns: str | None,
          hub_names: tuple[str, ...] = (), **settings: object) -> Task:
    """Describe a task of GLUE; `hub_names` are those that Hugging Face gives to its labels."""
    aliases = tuple(zip(hub_names, labels, strict=bool(hub_names)))
    return Task(name, folder, labels, *columns, aliases=aliases, is_glue=True, **settings)


_TASKS = (
    _glue(
        "cola", "CoLA", BINARY, "sentence", None, "label", metrics=("mcc",),
        columns=("source", "label", "star", "sentence"),
        hub_names=("unacceptable", "acceptable"), max_seq_length=64, intermediate_epochs=50,
    ),
    _glue(
        "sst-2", "SST-2", BINARY, "sentence", None, "label",
        hub_names=("negative", "positive"), max_seq_length=64, augmentation_n=20,
    ),
    _glue(
        "mrpc", "MRPC", BINARY, "#1 String", "#2 String", "Quality", metrics=PAIR_METRICS,
        positive="1", hub_names=("not_equivalent", "equivalent"),
    ),
    _glue(
        "sts-b", "STS-B", (), "sentence1", "sentence2", "score",
        metrics=("corr", "pearson", "spearmanr"),
    ),
    # Three rows of the published training file are cut in two by a line break in a question;
    # the original skipped them as well.
    _glue(
        "qqp", "QQP", BINARY, "question1", "question2", "is_duplicate", metrics=PAIR_METRICS,
        positive="1", hub_names=("not_duplicate", "duplicate"), intermediate_epochs=10,
        augmentation_n=10, skip_short_rows=True,
    ),
    _glue(
        "mnli", "MNLI", ("contradiction", "entailment", "neutral"),
        "sentence1", "sentence2", "gold_label",
        splits={"train": "train.tsv", "dev": "dev_matched.tsv", "dev_mm": "dev_mismatched.tsv"},
        intermediate_epochs=10, augmentation_n=10,
    ),
    _glue(
        "qnli", "QNLI", ENTAILMENT, "question", "sentence", "label",
        intermediate_epochs=10, augmentation_n=20,
    ),
    _glue("rte", "RTE", ENTAILMENT, "sentence1", "sentence2", "label"),
    _glue(
        "wnli", "WNLI", BINARY, "sentence1", "sentence2", "label",
        hub_names=("not_entailment", "entailment"),
    ),
)
GLUE_TASKS: dict[str, Task] = {task.name: task for task in _TASKS}


def plain_name(text: str) -> str:
    """Return a task's name without what does not matter in it: case, "-" and "_"."""
    return text.strip().lower().replace("-", "").replace("_", "")


def is_glue_name(name: str) -> bool:
    """Say whether a name is that of a task of GLUE, in any spelling."""
    return plain_name(name) in map(plain_name, GLUE_TASKS)


def get_task(name: str | Task) -> Task:
    """Find a task of GLUE by name, in any spelling ("SST-2", "sst2", "STS_B").

    An unknown name is a `UserError` that lists the tasks.
    """
    if isinstance(name, Task):
        return name
    for task in _TASKS:
        if plain_name(task.name) == plain_name(name):
            return task
    raise UserError(f"unknown task {name!r}; expected one of {', '.join(GLUE_TASKS)}")


# ------------------------------------------------------------------ rows of a task


class Example(NamedTuple):
    """One row of a task: one sentence or two, and the label as the task names it."""

    guid: str
    text_a: str
    text_b: str | None
    label: str | None


class TaskRows(NamedTuple):
    """All cells of a training file, for writing it again with other sentences.

    `header` names the columns; None where the file has none. `text_a` and `text_b` are column
    numbers from 0.
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


RAGGED_COLUMNS = ("text_a", "text_b", "label")  # to which such a row is brought


def split_paths(task: str | Task, data_dir: Path | str, split: str) -> list[Path]:
    """Find the files of a split in the task's own folder, or beside the one file that it is.

    Where they are missing, the `UserError` says what the folder holds, and which folder was
    probably meant when `data_dir` is the one above.
    """
    task, data_dir = get_task(task), Path(data_dir)
    name = task.files.get(split)
    if name is None:
        hint = " (--dev_share 0.1 sets a tenth of train aside)" if split == "dev" else ""
        raise UserError(f"{data_dir}: unknown split {split!r} of {task.name}; expected"
                        f" {', '.join(task.files)}{hint}")
    folder = data_dir.parent if data_dir.is_file() else data_dir
    if "*" not in name and (folder / name).is_file():
        return [folder / name]
    if "*" in name and (paths := sorted(path for path in folder.glob(name) if path.is_file())):
        return paths
    if not data_dir.is_dir():
        found = "a file" if data_dir.exists() else "no such folder"
        raise UserError(f"{data_dir}: {found}; expected the folder with {name} of {task.name}")
    message = f"{data_dir / name}: no such file; {folder_content(data_dir)}"
    meant = next((entry for entry in data_dir.iterdir()
                  if entry.is_dir() and entry.name.lower() == task.folder.lower()), None)
    if meant:
        message += f"; did you mean {meant}?"
    elif split == "aug":
        message += "; data_augmentation.py writes it"
    raise UserError(message)


def folder_content(folder: Path) -> str:
    """Say for a message what a folder holds."""
    names = sorted(f"{entry.name}{'/' if entry.is_dir() else ''}" for entry in folder.iterdir()
                   if not entry.name.startswith("."))
    shown = ", ".join(names[:12]) + (", ..." if len(names) > 12 else "")
    return "the folder " + (f"holds {shown}" if names else "is empty")


def _has_header(task: Task, path: Path) -> bool:
    """Say whether the first row of a file names its columns."""
    return names_columns(_format(task, path)) or not (task.columns or task.ragged)


def _format(task: Task, path: Path) -> str:
    patterns = [file for file in task.splits.values() if "*" in file and path.match(file)]
    return format_of(patterns[0] if patterns else path)


def find_columns(task: Task, path: Path) -> _Columns:
    """Find the task's columns by name, in the file's header where it has one."""
    names = list(RAGGED_COLUMNS if task.ragged else task.columns)
    if _has_header(task, path):
        _, names = next(iterate_table(path, _format(task, path)), (0, []))
        if not names:
            raise UserError(f"{path}: an empty file; expected a header and rows of {task.name}")
    wanted = [name for name in (task.text_a, task.text_b, task.label) if name is not None]
    missing = [name for name in wanted if name not in names]
    if missing:
        raise UserError(
            f"{path}, line 1: the header has no column {missing[0]!r}; expected {wanted}, "
            f"found {[name[:40] for name in names[:12]]}"
        )
    if twice := [name for name in wanted if names.count(name) > 1]:
        raise UserError(f"{path}, line 1: two columns are called {twice[0]!r}; expected one")
    text_b = None if task.text_b is None else names.index(task.text_b)
    return _Columns(len(names), names.index(task.text_a), text_b, names.index(task.label))


def _check_label(task: Task, label: str) -> str | None:
    """Say what was expected instead of `label`, or None when it is fine."""
    if not task.is_regression:
        return None if label in task.spellings else f"one of {', '.join(task.labels)}"
    low, high = task.range
    bounds = f"from {low:g} to {high:g}" if math.isfinite(high - low) else "that is finite"
    try:
        fits = low <= float(label) <= high and math.isfinite(float(label))
        return None if fits else f"a score {bounds}"
    except ValueError:
        return f"a score, a number {bounds}"


def iterate_cells(
    task: Task, path: Path, columns: _Columns, check_labels: bool = True
) -> Iterator[tuple[int, list[str]]]:
    """Yield (line number, cells) of every row after the header, each checked.

    Blank lines and rows of `skip_labels` are passed over. A row with too few columns is an error,
    except for QQP, where such rows are skipped and counted in a warning. Rows with too many, and
    texts that are empty or no texts, are errors, but in GLUE's own files.
    """
    form, has_header = _format(task, path), _has_header(task, path)
    known = set(task.spellings) if check_labels and not task.is_regression else set()
    read = skipped = wide = unlabelled = 0
    rows = iterate_table(path, form)
    if has_header:
        next(rows)
    for number, cells in _even_rows(rows, path) if task.ragged else rows:
        if cells == [""]:
            continue
        # The first line of a file without header may be a header that somebody added.
        hint = "" if has_header or number > 1 else f"; {task.name} files have no header"
        if len(cells) < columns.width:
            if not task.skip_short_rows:
                raise UserError(
                    f"{path}, line {number}: {len(cells)} columns in {shown_row(cells)}; "
                    f"expected {columns.width}{hint}"
                )
            skipped += 1
            continue
        label = label_of(task, cells, columns.label)
        if label in task.skip_labels:
            unlabelled += 1
            continue
        if check_labels and label not in known and (expected := _check_label(task, label)):
            raise UserError(
                f"{path}, line {number}: label {label[:40]!r}; expected {expected}{hint}")
        wide += len(cells) > columns.width
        if not task.is_glue:
            _check_own_row(task, path, number, cells, columns)
        read += 1
        yield number, cells
    if skipped:
        logger.warning("%s: skipped %d rows with too few columns", path, skipped)
    if unlabelled:
        logger.info("%s: passed over %d rows with the label %s", path, unlabelled,
                    " or ".join(map(repr, task.skip_labels)))
    if wide:
        logger.warning("%s: %d rows have more than %d columns", path, wide, columns.width)
    if not read:
        what = "no rows after the header" if has_header else "an empty file"
        raise UserError(f"{path}: {what}; expected rows of {task.name}")


def _check_own_row(task: Task, path: Path, number: int, cells: Sequence[str],
                   columns: _Columns) -> None:
    """Raise a `UserError` for a row of a user's own file that is probably a mistake."""
    where = f"{path}, line {number}"
    if number == 1 and tuple(cells) == task.columns:
        raise UserError(f"{where}: names the columns; expected rows alone where a task.json has"
                        " 'columns'")
    if not cells[columns.label].strip():
        raise UserError(f"{where}: the label is empty; expected one (in a task.json"
                        ' "skip_labels": [""] passes such rows over)')
    if len(cells) > columns.width:
        raise UserError(f"{where}: {len(cells)} columns in {shown_row(cells)}; expected"
                        f" {columns.width}")
    for column, name in ((columns.text_a, task.text_a), (columns.text_b, task.text_b)):
        if column is not None and not cells[column].strip() and not task.ragged:
            raise UserError(f"{where}: {name!r} is empty; expected a text")
        if column is not None and isinstance(cells[column], NoText):
            raise UserError(f"{where}: {name!r} is {cells[column][:40]}; expected a text, which a"
                            " number or a list is not")


def _even_rows(rows: Iterator[tuple[int, list[str]]],
               path: Path) -> Iterator[tuple[int, list[str]]]:
    """Bring rows of a text, perhaps another, whatever else, and a class number to three cells.

    As in Lisennlp/TinyBert, from where the layout comes, other rows are passed over; here with a
    warning.
    """
    dropped = []
    for number, cells in rows:
        *texts, label = "\t".join(cells).strip().split("\t")
        if texts and label.strip().removeprefix("-").isdecimal():
            yield number, [texts[0], texts[1] if len(texts) > 1 else "", label.strip()]
        elif "".join(cells).strip():
            dropped.append(number)
    if dropped:
        logger.warning("%s: passed over %d lines that do not end in a class number, the first is"
                       " line %d", path, len(dropped), dropped[0])


def label_of(task: Task, cells: Sequence[str], column: int) -> str:
    """Return a row's label; white space around it counts in GLUE's files alone."""
    return cells[column] if task.is_glue else cells[column].strip()


def row_share(text_a: str, text_b: str | None) -> float:
    """Return a number from 0 to 1 that depends on the texts alone, evenly spread."""
    text = f"{text_a}\t{text_b or ''}".encode("utf-8", "surrogatepass")
    return int.from_bytes(blake2b(text, digest_size=8).digest()) / 2**64


def _in_split(task: Task, split: str) -> Callable[[str, str | None], bool] | None:
    """Return the rule by which rows of train belong to a split; None: all of the file's rows.

    With `dev_share` 0.1, "train" and "transfer" are the 45 % and 45 % of Vooblin/distillation,
    where the teacher and the student learn from different rows.
    """
    dev, kept = task.dev_share, task.dev_share + task.test_share
    middle = (1 + kept) / 2
    begin, end = {
        "dev": (0.0, dev), "test": (dev, kept),
        "train": {"": (kept, 1.0), "train": (kept, middle), "transfer": (middle, 1.0)}[
            task.train_split]}.get(split, (0.0, 1.0))
    if begin == end or end - begin == 1:  # a file of its own, or all of train
        return None
    return lambda text_a, text_b: begin <= row_share(text_a, text_b) < end


def _held_back(task: Task, data_dir: Path | str) -> Callable[[str, str | None], bool]:
    """Return a check of augmented rows: none may be a row that serves as the dev or test set."""
    held = {row[1:3]: split for split in ("dev", "test") if task.files.get(split) ==
            task.files["train"] for row in iterate_examples(task, data_dir, split)}

    def check(*texts: str | None) -> bool:
        if texts in held:
            raise UserError(f"{data_dir}: {task.files['aug']} holds {texts[0][:40]!r}, a row of"
                            f" {held[texts]}; expected rows that data_augmentation.py made with the"
                            " same --dev_share and --test_share")
        return True

    return check


def _split_rows(task: Task, data_dir: Path | str, split: str,
                check_labels: bool = True) -> Iterator[tuple[int, list[str], _Columns]]:
    """Yield (line number, cells, columns) of the rows of a split."""
    belongs = _in_split(task, split)
    if split == "aug" and (task.dev_share or task.test_share):
        belongs = _held_back(task, data_dir)
    count = 0
    for path in split_paths(task, data_dir, split):
        columns = find_columns(task, path)
        for number, cells in iterate_cells(task, path, columns, check_labels):
            if belongs is None or belongs(cells[columns.text_a], _text_b(task, cells, columns)):
                count += 1
                yield number, cells, columns
    if not count:
        raise UserError(f"{data_dir}: no row of train falls to {split!r} by its share; expected"
                        " more rows or larger shares")


def _text_b(task: Task, cells: Sequence[str], columns: _Columns) -> str | None:
    if columns.text_b is None:
        return None
    return cells[columns.text_b] or (None if task.ragged else "")


def count_labels(task: Task, data_dir: Path | str, split: str,
                 check_labels: bool = False) -> Counter[str]:
    """Count the labels of a split as its files spell them, checked or whatever they are."""
    rows = _split_rows(task, data_dir, split, check_labels)
    return Counter(label_of(task, cells, columns.label) for _, cells, columns in rows)


def iterate_examples(
    task: str | Task, data_dir: Path | str, split: str, max_rows: int | None = None
) -> Iterator[Example]:
    """Yield the rows that `load_examples` lists, one at a time."""
    task = get_task(task)
    spellings = task.spellings
    for number, cells, columns in islice(_split_rows(task, data_dir, split), max_rows):
        label = label_of(task, cells, columns.label)
        label = sys.intern(str(label)) if task.is_regression else spellings[label]
        text_b = _text_b(task, cells, columns)
        yield Example(f"{split}-{number}", cells[columns.text_a], text_b, label)


def load_examples(
    task: str | Task, data_dir: Path | str, split: str, max_rows: int | None = None
) -> list[Example]:
    """Read one split ("train", "dev", "aug"; MNLI also "dev_mm", own tasks "test").

    `max_rows` reads only the first rows. Whatever is wrong with the file is a `UserError` that
    names file, line and value and what was expected there.
    """
    return list(iterate_examples(task, data_dir, split, max_rows))


def original_rows(
    task: str | Task, data_dir: Path | str, max_rows: int | None = None
) -> list[bool]:
    """Say of each augmented row (the first `max_rows`) whether it is one of train, text and label.

    The others were made of those; one that equals another row of train counts as that.
    """
    originals = {hash(example[1:]) for example in iterate_examples(task, data_dir, "train")}
    found = [hash(example[1:]) in originals
             for example in iterate_examples(task, data_dir, "aug", max_rows or None)]
    path = split_paths(task, data_dir, "aug")[0]
    if not any(found):
        raise UserError(f"{path}: no row of it is one of train; expected the file that"
                        " data_augmentation.py makes, which has them all")
    logger.info("%s: %d of %d rows are train's own", path, sum(found), len(found))
    return found


def task_rows(task: str | Task, data_dir: Path | str, split: str = "train") -> TaskRows:
    """Read all cells of a split, checked as by `load_examples` (see `TaskRows`)."""
    task = get_task(task)
    paths = split_paths(task, data_dir, split)
    columns = find_columns(task, paths[0])
    header = None
    if _has_header(task, paths[0]):
        header = next(iterate_table(paths[0], _format(task, paths[0])))[1]
    rows = []
    for _, cells, own_columns in _split_rows(task, data_dir, split):
        if own_columns != columns:
            raise UserError(f"{data_dir}: the columns of {paths[0].name} and of the other files of"
                            f" {split} differ; expected the same")
        rows.append(cells)
    return TaskRows(header, rows, columns.text_a, columns.text_b)


# ------------------------------------------------------------------ the labels of a checkpoint

LABELS_SHOWN = 12  # of many, in a message


def plain_label(name: object) -> str:
    """Return a label's name without what spellings differ in: case, "-" and spaces."""
    return str(name).strip().lower().replace("-", "_").replace(" ", "_")


def label_order(
    task: str | Task, config_id2label: Mapping[int | str, str] | None
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
    names = [str(config_id2label[place]) for place in places]
    meaning = {plain_label(name): label for name, label in task.spellings.items()}
    order = tuple(task.spellings.get(name) or meaning.get(plain_label(name), "") for name in names)
    if sorted(order) == sorted(task.labels):
        return order
    nameless = all(
        plain_label(name) in (f"label_{place}", str(place)) for place, name in enumerate(names))
    if nameless and (task.is_glue or len(names) == task.num_labels):
        numbered = task.labels == tuple(map(str, range(task.num_labels)))
        if not numbered and (task.num_labels > 2 or not task.is_glue):
            # Published MNLI models disagree in their order, so a wrong guess is likely enough.
            logger.warning(
                "the checkpoint does not name its labels; taking the order %s", task.labels
            )
        return task.labels
    others = [name for name, _ in task.aliases]
    if max(len(names), task.num_labels) > LABELS_SHOWN:
        strange = [name for name, label in zip(names, order, strict=True) if not label]
        lacking = [label for label in task.labels if label not in order]
        raise UserError(
            f"the checkpoint's {len(names)} labels do not fit the {task.num_labels} of task"
            f" {task.name}: {strange[:LABELS_SHOWN]} are not the task's, and the checkpoint lacks"
            f" {lacking[:LABELS_SHOWN]}")
    raise UserError(
        f"the checkpoint's labels {list(config_id2label.values())} do not fit task {task.name}; "
        f"expected {list(task.labels)}" + (f" or {others}" if others else "")
    )

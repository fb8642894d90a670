"""GLUE: the table of tasks, TSV reading and writing, and rows turned into model input."""

import hashlib
import json
import logging
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from functools import cached_property, partial
from itertools import islice
from pathlib import Path
from typing import NamedTuple, Protocol

import numpy as np
import tokenizers
import torch

from transformer import distributed
from transformer.file_utils import UserError, atomic_path, cache_root, file_sha256
from transformer.tokenization import BertTokenizer

logger = logging.getLogger(__name__)

BYTE_ORDER_MARK = "\ufeff"
ENCODING_CHUNK = 8192  # examples read and handed to the tokenizer at once
MOST_BUCKETS = 8  # padded lengths of one set of rows
UNKNOWN_SHARE_LIMIT = 0.10
BATCH_UNIT = 64  # rows that are shuffled together where batches are larger
CACHE_FORMAT = 1  # to be raised when the same rows would be encoded or stored differently
CACHE_SUFFIX = ".features.npz"
CACHE_BYTES = 4 * 2**30  # a million rows of SST-2's kind take 47 MB


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
)  # fmt: skip
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
    other separator of Unicode), a "\r" before it is dropped, so is a byte-order mark at the
    start. A missing file, or bytes that are not UTF-8, is a `UserError`.
    """
    path = Path(path)
    if not path.is_file():
        raise UserError(f"{path}: no such file; expected tab-separated text")
    with path.open("rb") as file:
        for number, raw in enumerate(file, start=1):
            try:
                line = raw.decode("utf-8")
            except UnicodeDecodeError as error:
                raise UserError(
                    f"{path}, line {number}: byte {raw[error.start]:#04x} at position "
                    f"{error.start}; expected text in UTF-8"
                ) from error
            if number == 1:
                line = line.removeprefix(BYTE_ORDER_MARK)
            yield number, line.removesuffix("\n").removesuffix("\r").split("\t")


def read_tsv(path: Path | str) -> list[list[str]]:
    """Read a whole tab-separated file in the dialect of `iterate_tsv`: the cells of each line."""
    return [cells for _, cells in iterate_tsv(path)]


class TsvWriter:
    """Writes rows that `read_tsv` reads back unchanged; the file appears when all are written.

    Use it as a context manager; leaving the block with an error leaves no file. A row that the
    dialect cannot express (a tab or line break inside a cell) is a `UserError`.
    """

    def __init__(self, path: Path | str) -> None:
        self.path = Path(path)
        self.rows_written = 0
        self._stack = ExitStack()

    def __enter__(self) -> "TsvWriter":
        with ExitStack() as stack:
            temporary = stack.enter_context(atomic_path(self.path))
            self._file = stack.enter_context(temporary.open("w", encoding="utf-8", newline="\n"))
            self._stack = stack.pop_all()
        return self

    def __exit__(self, *exception: object) -> None:
        self._stack.__exit__(*exception)

    def write(self, row: Sequence[str]) -> None:
        """Write one row."""
        self._file.write(tsv_line(row, self.path, self.rows_written + 1))
        self.rows_written += 1


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
    """Write `rows` atomically in the dialect that `read_tsv` reads (see `TsvWriter`)."""
    with TsvWriter(path) as writer:
        for row in rows:
            writer.write(row)


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


# ------------------------------------------------------------------ model input


def bucket_lengths(
    lengths: Sequence[int] | np.ndarray, multiple: int = 1, most: int = MOST_BUCKETS
) -> np.ndarray:
    """Choose at most `most` padded lengths, ascending, that pad these rows least in total.

    Each row is padded up to the next of them, so the last holds the longest row. All are
    multiples of `multiple`: 8 suits a GPU's matrix units, 1 a CPU. The choice is the best one,
    found by dynamic programming over the histogram of `lengths`.
    """
    rounded = -(-np.asarray(lengths, dtype=np.int64) // multiple)
    counts = np.bincount(rounded)
    used = np.flatnonzero(counts)  # no other length is ever worth a bucket
    widths = used * multiple  # [w]
    rows = np.concatenate([[0], np.cumsum(counts[used])])  # [w + 1], rows below each place
    # Positions of one bucket that takes the widths from `start` up to and with `end`, [w, w].
    places = np.arange(len(widths))
    cost = widths * (rows[1:] - rows[:-1, None]).astype(np.float64)  # exact up to 2**53
    cost[places[:, None] > places] = np.inf
    # Least positions of the widths before each place in as many buckets as were added, [w + 1].
    least = np.concatenate([[0.0], np.full(len(widths), np.inf)])
    starts = []  # for each bucket added: where it starts if it ends at a place, [w]
    for _ in range(min(most, len(widths))):
        totals = least[:-1, None] + cost  # [w, w]
        starts.append(totals.argmin(axis=0))
        least = np.concatenate([[np.inf], totals.min(axis=0)])
    chosen, end = [], len(widths)
    for start in reversed(starts):
        chosen.append(widths[end - 1])
        end = start[end - 1]
    return np.array(chosen[::-1], dtype=np.int64)


def _span_places(starts: np.ndarray, lengths: np.ndarray) -> np.ndarray:
    """List the places in spans [spans] of a flat array, span after span: [sum of lengths]."""
    shifts = starts - (np.cumsum(lengths) - lengths)  # from a place in the list to its place
    return np.arange(lengths.sum()) + np.repeat(shifts, lengths)


@dataclass
class Features:
    """Encoded rows in flat arrays: a million rows take some 50 MB, not gigabytes.

    ids: word pieces of all rows, one after the other, [CLS] and [SEP] included
    offsets: [rows + 1], where each row starts in `ids`
    first_lengths: [rows], how many positions of a row belong to segment 0
    labels: [rows], int64 class numbers or float32 scores
    label_names: the class names by number, () for regression
    """

    ids: np.ndarray
    offsets: np.ndarray
    first_lengths: np.ndarray
    labels: torch.Tensor
    label_names: tuple[str, ...]
    pad_id: int

    def __len__(self) -> int:
        return len(self.first_lengths)

    @cached_property  # it is asked for with every batch
    def lengths(self) -> np.ndarray:
        """Word pieces of each row, [rows]."""
        return np.diff(self.offsets)

    def collate(self, indices: Sequence[int], pad_to: int | None = None) -> dict[str, torch.Tensor]:
        """Make a batch of the rows `indices`, padded to the longest of them or to `pad_to`.

        input_ids, token_type_ids, attention_mask: [batch, length] int64; labels: [batch].
        """
        indices = np.asarray(indices, dtype=np.int64)
        starts = self.offsets[indices]  # [batch]
        lengths = self.offsets[indices + 1] - starts  # [batch]
        longest = int(lengths.max())
        width = longest if pad_to is None else pad_to
        if width < longest:
            raise ValueError(f"cannot pad a row of {longest} positions to {pad_to}")
        positions = np.arange(width)  # [length]
        mask = positions < lengths[:, None]  # [batch, length]
        input_ids = np.full(mask.shape, self.pad_id, dtype=np.int64)
        input_ids[mask] = self.ids[(starts[:, None] + positions)[mask]]
        segments = mask & (positions >= self.first_lengths[indices][:, None])
        return {
            "input_ids": torch.from_numpy(input_ids),
            "token_type_ids": torch.from_numpy(segments.astype(np.int64)),
            "attention_mask": torch.from_numpy(mask.astype(np.int64)),
            "labels": self.labels[torch.from_numpy(indices)],
        }

    def subset(self, indices: Sequence[int]) -> "Features":
        """Copy the rows `indices`, in that order."""
        indices = np.asarray(indices, dtype=np.int64)
        lengths = self.lengths[indices]
        return Features(
            self.ids[_span_places(self.offsets[indices], lengths)], _offsets(lengths),
            self.first_lengths[indices], self.labels[torch.from_numpy(indices)],
            self.label_names, self.pad_id,
        )  # fmt: skip

    def first(self, count: int) -> "Features":
        """Copy the first `count` rows, or all when there are fewer."""
        return self.subset(range(min(count, len(self))))


def truncate_pair(
    length_a: np.ndarray, length_b: np.ndarray, budget: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """Say how much of two sentences to keep so that both fit into `budget` positions, [rows].

    The same as BERT's loop that drops the last piece of the longer sentence (of the second, if
    they are equal) until they fit.
    """
    keep_a = np.minimum(length_a, np.maximum(budget - budget // 2, budget - length_b))
    return keep_a, np.minimum(length_b, budget - keep_a)


def _label_numbers(
    examples: Sequence[Example], labels: Sequence[str], regression: bool
) -> np.ndarray:
    """Turn label strings into class numbers or scores, [rows]; an unknown one is a `UserError`."""
    number_of = {label: number for number, label in enumerate(labels)}
    numbers = []
    for example in examples:
        try:
            label = example.label
            numbers.append(float(label) if regression else number_of[label])
        except (KeyError, TypeError, ValueError) as error:
            expected = "a number" if regression else f"one of {', '.join(labels)}"
            raise UserError(
                f"example {example.guid}: label {example.label!r}; expected {expected}"
            ) from error
    return np.array(numbers, dtype=np.float32 if regression else np.int64)


def _offsets(lengths: np.ndarray) -> np.ndarray:
    """Where each of consecutive spans starts, and the end: [spans + 1]."""
    return np.concatenate([[0], np.cumsum(lengths)])


def _encode_rows(
    examples: Sequence[Example], tokenizer: BertTokenizer, max_seq_length: int
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Encode rows: framed word pieces of all, and of each row the length and first length."""
    # Each different text is tokenized once: augmented rows repeat the sentence they do not vary.
    texts = dict.fromkeys(text for example in examples for text in example[1:3] if text is not None)
    pieces, text_lengths = tokenizer.encode_flat(texts)
    text_starts = _offsets(text_lengths)
    number_of = {text: number for number, text in enumerate(texts)}
    a = np.array([number_of[example.text_a] for example in examples])  # [rows]
    b = np.array([number_of.get(example.text_b, -1) for example in examples])  # [rows]
    paired = b >= 0
    keep_a, keep_b = truncate_pair(
        text_lengths[a], np.where(paired, text_lengths[b], 0), max_seq_length - 2 - paired)

    lengths = keep_a + 2 + keep_b + paired
    offsets = _offsets(lengths)
    starts = offsets[:-1]
    ids = np.full(
        offsets[-1], tokenizer.sep_id, np.uint16 if len(tokenizer) <= 2**16 else np.int32)
    ids[starts] = tokenizer.cls_id
    ids[_span_places(starts + 1, keep_a)] = pieces[_span_places(text_starts[a], keep_a)]
    ids[_span_places(starts + keep_a + 2, keep_b)] = pieces[_span_places(text_starts[b], keep_b)]
    return ids, lengths, (keep_a + 2).astype(np.int32)


def encode_examples(
    examples: Iterable[Example],
    tokenizer: BertTokenizer,
    max_seq_length: int,
    labels: Sequence[str],
    regression: bool = False,
) -> Features:
    """Encode rows as "[CLS] a [SEP]" or "[CLS] a [SEP] b [SEP]" of at most `max_seq_length`.

    `labels` are the class names in the order of the model's outputs (see `label_order`). Warns
    when more than a tenth of the word pieces are unknown: then text and vocabulary do not fit,
    often because of lower-casing.
    """
    if max_seq_length < 3:
        raise UserError(f"maximum sequence length {max_seq_length}; expected at least 3 positions")
    examples = iter(examples)
    chunks = []
    while part := list(islice(examples, ENCODING_CHUNK)):
        rows = _encode_rows(part, tokenizer, max_seq_length)
        chunks.append((*rows, _label_numbers(part, labels, regression)))
    if not chunks:
        raise UserError("no examples to encode; expected at least one")
    ids, lengths, first_lengths, numbers = map(np.concatenate, zip(*chunks, strict=True))
    features = Features(
        ids, _offsets(lengths), first_lengths, torch.from_numpy(numbers),
        () if regression else tuple(labels), tokenizer.pad_id,
    )  # fmt: skip
    _warn_of_unknown_pieces(features, tokenizer)
    return features


def _warn_of_unknown_pieces(features: Features, tokenizer: BertTokenizer) -> None:
    special = 2 * len(features) + int((features.first_lengths < features.lengths).sum())
    share = int((features.ids == tokenizer.unk_id).sum()) / max(1, len(features.ids) - special)
    if share > UNKNOWN_SHARE_LIMIT:
        logger.warning(
            "%.0f %% of the word pieces are [UNK]: the vocabulary does not fit this text "
            "(do_lower_case is %s; is the model uncased?)",
            100 * share, tokenizer.do_lower_case,
        )  # fmt: skip


# ------------------------------------------------------------------ features on disk


def load_features(
    task: str | GlueTask,
    data_dir: Path | str,
    split: str,
    tokenizer: BertTokenizer,
    max_seq_length: int,
    labels: Sequence[str],
    max_rows: int | None = None,
    cache_dir: Path | str | None = None,
) -> Features:
    """Read and encode one split, or find it in the cache.

    The arguments are those of `load_examples` and `encode_examples`, and so are the errors. The
    file is read in pieces: beyond the features themselves it takes some 100 MB of memory. With
    `cache_dir` they are stored there under a hash of all that they depend on, the file's bytes
    and the vocabulary included, and read from there the next time; a damaged cache or one that
    cannot be written is a warning. Of the stored features the newest 4 GB are kept.
    """
    began = time.monotonic()
    task = get_task(task)
    path = split_path(task, data_dir, split)
    features = cache_file = None
    if cache_dir is not None:
        key = _cache_key(path, task, tokenizer, max_seq_length, labels, max_rows)
        cache_file = Path(cache_dir) / f"{task.name}-{split}-{key}{CACHE_SUFFIX}"
        features = _read_cache(cache_file, key)
    from_cache = features is not None
    if from_cache:
        _warn_of_unknown_pieces(features, tokenizer)
    else:
        examples = iterate_examples(task, data_dir, split, max_rows)
        features = encode_examples(
            examples, tokenizer, max_seq_length, labels, task.is_regression)
        if cache_file is not None:
            _write_cache(cache_file, key, features)
    logger.info(
        "%s: %d rows in %.1f s%s", path, len(features), time.monotonic() - began,
        ", from cache" if from_cache else "",
    )  # fmt: skip
    return features


def cached_features(
    task: GlueTask, data_dir: Path | str, split: str, tokenizer: BertTokenizer,
    max_seq_length: int, labels: Sequence[str], max_rows: int = 0,
) -> Features:
    """Return what `load_features` does, by the user's cache; `max_rows` 0 means all.

    Under torchrun one process of each machine encodes, and the others find what it stored.
    """
    with distributed.main_first():
        return load_features(task, data_dir, split, tokenizer, max_seq_length, labels,
                             max_rows or None, cache_root() / "features")


def _cache_key(
    path: Path, task: GlueTask, tokenizer: BertTokenizer, max_seq_length: int,
    labels: Sequence[str], max_rows: int | None,
) -> str:  # fmt: skip
    """Hash everything that the features of the file at `path` depend on: 64 digits."""
    content = (
        CACHE_FORMAT, tokenizers.__version__, repr(task), file_sha256(path), list(tokenizer.vocab),
        tokenizer.do_lower_case, max_seq_length, list(labels), max_rows,
    )  # fmt: skip
    return hashlib.sha256(json.dumps(content).encode("ascii")).hexdigest()


def _read_cache(path: Path, key: str) -> Features | None:
    """Read what `_write_cache` wrote; None without a file and, with a warning, for any other."""
    try:
        with np.load(path, allow_pickle=False) as stored:  # the zip's check sums find damage
            if str(stored["key"]) != key:
                raise ValueError("made from something else")
            return Features(
                stored["ids"], stored["offsets"], stored["first_lengths"],
                torch.from_numpy(stored["labels"]), tuple(stored["label_names"].tolist()),
                int(stored["pad_id"]),
            )  # fmt: skip
    except (FileNotFoundError, NotADirectoryError):
        return None
    except Exception as error:  # whatever is wrong with it, it can be made again
        logger.warning("%s: not a sound cache (%s); the rows are encoded again", path, error)
        return None


def _write_cache(path: Path, key: str, features: Features) -> None:
    """Store features, and remove the oldest stored beside them beyond the newest 4 GB."""
    try:
        with atomic_path(path) as temporary, temporary.open("wb") as file:
            np.savez(
                file, key=np.array(key), ids=features.ids, offsets=features.offsets,
                first_lengths=features.first_lengths, labels=features.labels.numpy(),
                label_names=np.array(features.label_names, dtype=str), pad_id=features.pad_id,
            )  # fmt: skip
        kept = 0
        files = [(file.stat(), file) for file in path.parent.glob(f"*{CACHE_SUFFIX}")]
        for status, file in sorted(files, key=lambda item: item[0].st_mtime_ns, reverse=True):
            kept += status.st_size
            if kept > CACHE_BYTES and file != path:
                file.unlink(missing_ok=True)
    except OSError as error:
        logger.warning("%s: the features are not cached (%s)", path, error)


# ------------------------------------------------------------------ batches


class Rows(Protocol):
    """Encoded rows: `Features` or `pretraining_data.PregeneratedDataset`."""

    lengths: np.ndarray  # [rows]

    def collate(self, rows: Sequence[int], pad_to: int | None = None) -> dict[str, torch.Tensor]:
        """Return the rows as tensors [rows, length]."""


def padding_multiple(device: torch.device) -> int:
    """Return of what the padded lengths should be multiples: a GPU's matrix units take 8."""
    return 8 if device.type == "cuda" else 1


def padded_collate(
    data: Rows, multiple: int = 1, pad_to: int | None = None, limit: int | None = None
) -> Callable[[Sequence[int]], dict[str, torch.Tensor]]:
    """Return what makes batches of `data`, padded to one of few lengths, or all to `pad_to`.

    The lengths are those of `bucket_lengths`, so a batch is little longer than its longest row
    and there are at most 8 shapes to compile. `limit` is the longest that the model takes, where
    rounding up to `multiple` could pass it.
    """
    if pad_to is not None:
        return partial(data.collate, pad_to=pad_to)
    lengths = data.lengths
    buckets = bucket_lengths(lengths, multiple)
    if limit is not None:
        # A row that is too long stays so, for the model to complain of.
        buckets = np.minimum(buckets, max(limit, lengths.max()))

    def collate(rows: Sequence[int]) -> dict[str, torch.Tensor]:
        longest = lengths[rows].max()
        return data.collate(rows, pad_to=int(buckets[np.searchsorted(buckets, longest)]))

    return collate


def batches(
    lengths: Sequence[int] | np.ndarray,
    batch_size: int,
    generator: torch.Generator | None = None,
    multiple: int = 1,
    in_units: bool = False,
) -> list[np.ndarray]:
    """Split rows into batches of similar length, so that little is padded; each row once.

    Without `generator` the longest rows come first (evaluation: a batch that does not fit into
    memory fails at once). With it rows are shuffled within each of the `bucket_lengths` (in
    multiples of `multiple`) to which batches are padded, and the batches shuffled as well: the
    same generator state gives the same batches, at most 7 of them with rows of several buckets.
    With `in_units`, a batch of a multiple of BATCH_UNIT rows is made of consecutive units of so
    many, each of similar lengths, and the unit that is not full comes last: students with
    different batch sizes can learn from the same units.
    """
    if batch_size < 1:
        raise UserError(f"batch size {batch_size}; expected at least 1 row")
    lengths = np.asarray(lengths, dtype=np.int64)  # signed: the longest first is by -length
    if generator is None:
        order = np.argsort(-lengths, kind="stable")
    else:
        order = torch.randperm(len(lengths), generator=generator).numpy()
        buckets = bucket_lengths(lengths, multiple)
        # Numbers from the longest bucket down; in one byte they are sorted in linear time.
        numbers = (len(buckets) - np.searchsorted(buckets, lengths)).astype(np.uint8)
        order = order[np.argsort(numbers[order], kind="stable")]
    in_units = in_units and batch_size % BATCH_UNIT == 0
    size = BATCH_UNIT if in_units else batch_size
    groups = [order[begin : begin + size] for begin in range(0, len(order), size)]
    if generator is None:
        return groups
    rest = [groups.pop()] if in_units and groups and len(groups[-1]) < size else []
    groups = [groups[place] for place in
              torch.randperm(len(groups), generator=generator).tolist()] + rest
    units = batch_size // size
    return groups if units == 1 else [
        np.concatenate(groups[begin : begin + units]) for begin in range(0, len(groups), units)]

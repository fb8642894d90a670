"""Texts to classify: the rows of a file or stream, in any format, as they arrive."""

import json
import logging
import re
from collections.abc import Collection, Iterable, Iterator
from contextlib import suppress
from functools import cached_property
from itertools import chain
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

from transformer.data_layout import (
    KNOWN_COLUMNS,
    LABEL_COLUMNS,
    PAIR_COLUMNS,
    TEXT_COLUMNS,
    known_columns,
)
from transformer.file_utils import UserError, parse_json
from transformer.table_files import (
    ARROW,
    BYTE_ORDER_MARK,
    CSV,
    FORMATS,
    JSON,
    PARQUET,
    TSV,
    NoText,
    cell_of,
    iterate_csv,
    iterate_table,
    shown_row,
)
from transformer.tasks import GLUE_TASKS, Task, label_of
from transformer.text_encoding import describe_bytes, guess_encoding

logger = logging.getLogger(__name__)

CHUNK_BYTES = 1 << 16
ROWS_AT_ONCE = 4096
TEXT_FORMS = {"tsv": TSV, "csv": CSV, "jsonl": JSON}
JSON_START = re.compile(r"""\s*(\[\s*$|\[?\s*\{\s*(["'}]|$))""")  # of an object, or a list of them
NUMBER = re.compile(r"[+-]?\d+([.,]\d+)?")
# Cells that are not one of two texts; numbers are none either.
NO_TEXTS = {"", *chain.from_iterable(
    (task.label, *task.spellings) for task in GLUE_TASKS.values())}


class Row(NamedTuple):
    """One input: its line number from 1, and one text or two."""

    line: int
    text_a: str
    text_b: str | None


class ArrivingLines:
    """The lines of a stream, each as soon as it is there.

    waiting: whether all lines that have arrived are taken.
    """

    def __init__(self, stream: BinaryIO, name: str) -> None:
        self.stream, self.name, self.waiting = stream, name, False

    def __iter__(self) -> Iterator[str]:
        rest, number, chunk = b"", 0, b"\n"
        while chunk:
            chunk = self.read()
            *lines, rest = (rest + chunk).split(b"\n")
            lines = lines if chunk or not rest else [rest]  # the last one may lack its end
            for left, line in zip(reversed(range(len(lines))), lines, strict=True):
                number, self.waiting = number + 1, left == 0
                yield self.decode(line.rstrip(b"\r"), number)

    def read(self) -> bytes:
        """Return the bytes that are there, or wait for some; none at the end."""
        try:
            return self.stream.read1(CHUNK_BYTES)
        except OSError as error:
            raise UserError(f"{self.name}: cannot be read ({error.strerror})") from error

    def decode(self, raw: bytes, number: int) -> str:
        """Return the text of a line; bytes that are not UTF-8 are replaced, with a note."""
        where = f"{self.name}, line {number}"
        if number == 1 and b"\0" in raw:
            raise UserError(f"{where}: {raw[:20]!r}, not a text (UTF-16, packed?); expected UTF-8")
        text = raw.decode("utf-8", errors="replace")
        if "\ufffd" in text and "\ufffd".encode() not in raw:
            if guess_encoding(raw) == "gb18030":
                place = len(text.partition("\ufffd")[0].encode())
                raise UserError(describe_bytes(self.name, number, raw, place))
            logger.warning("%s: is not UTF-8; what cannot be read is replaced", where)
        return text.removeprefix(BYTE_ORDER_MARK) if number == 1 else text


class TextInputs:
    """The rows of a file or stream, read as its first row and the model's task say.

    Args:
        path: the file; None for standard input.
        form: of `TEXT_FORMS`, or "auto": by the file's suffix, or the first line.
        wanted: names or numbers, from 1, of the columns of the texts; empty: by their names.
        task: the model's, if it is known.
        labels: the model's, which stand beside texts in files of examples.
    """

    def __init__(self, path: Path | None, form: str, wanted: list[str], task: Task | None,
                 labels: Iterable[str]) -> None:
        self.path, self.form, self.wanted, self.task = path, form, wanted, task
        self.name = "standard input" if path is None else str(path)
        self.by_suffix = TSV if path is None else FORMATS.get(path.suffix.lower(), TSV)
        spellings = (*labels, *(task.spellings if task else ()))
        self.labels = {label.casefold() for label in spellings}
        self.columns: list[int] | None = None  # of the texts; empty: all; None: no row was read
        self.header: list[str] = []
        self.unchecked = 2  # rows: a header of other names may stand above the labels

    def rows(self, stream: BinaryIO) -> Iterator[list[Row]]:
        """Yield the rows as they arrive: all that are there, then wait for more."""
        lines, rows = ArrivingLines(stream, self.name), []
        for number, record in self.records(lines):
            if texts := self.texts(f"{self.name}, line {number}", record):
                rows.append(Row(number, *texts, *[None] * (2 - len(texts))))
            if rows and (lines.waiting or len(rows) == ROWS_AT_ONCE):
                yield rows
                rows = []
        if rows:
            yield rows

    def records(self, lines: ArrivingLines) -> Iterator[tuple[int, list[str] | dict[str, Any]]]:
        """Yield (number from 1, cells, or values by name) of each line or row."""
        if self.form == "auto" and self.by_suffix in (PARQUET, ARROW):
            yield from self.table()
            return
        form, rest = "", iter(lines)
        for number, line in enumerate(rest, start=1):
            where = f"{self.name}, line {number}"
            form = form or (self.format_of(where, line) if line.strip() else "")
            if form == CSV:
                texts = (f"{each}\n" for each in chain([line], rest))
                yield from ((number - 1 + place, cells)
                            for place, cells in iterate_csv(texts, self.name))
            elif form == self.by_suffix == JSON and line.lstrip().startswith("["):
                yield from self.table()  # one list of all
                return
            elif form == JSON and line.strip():
                yield number, parse_json(line, where, self.expected_keys)
            else:
                yield number, line.split("\t")

    def table(self) -> Iterator[tuple[int, dict[str, Any]]]:
        """Yield (number from 1, values by name) of the rows of a file that is no text of lines."""
        rows = iterate_table(self.path, self.by_suffix)
        _, names = next(rows, (0, []))
        for number, cells in rows:
            values = (json.loads(cell) if isinstance(cell, NoText) else cell for cell in cells)
            yield number, dict(zip(names, values, strict=True))

    def format_of(self, where: str, first: str) -> str:
        """Return the format of a text by the flag, its suffix, or its first line."""
        form = TEXT_FORMS.get(self.form, self.by_suffix)
        if self.form != "auto" or form != TSV:
            return form
        parts = [part.strip(' "') for part in re.split("[,;]", first)]
        if first.count("\t") + 1 < len(parts) and self.known(parts):
            raise UserError(f"{where}: {first[:60]!r} is comma-separated; expected tabs or JSON"
                            " lines (--input_format csv reads it, tsv takes each line as a text)")
        return JSON if JSON_START.match(first) else TSV

    def known(self, names: Collection[str]) -> list[str]:
        """Return which of these columns or keys hold the texts; [] where that is not certain."""
        for task in filter(None, (self.task, GLUE_TASKS["mrpc"])):  # whose names are its own
            if {*texts_of(task)} <= {*names}:
                return texts_of(task)
        others = [name for name in names if name.strip().lower() not in LABEL_COLUMNS]
        with suppress(UserError):  # several would do
            if found := known_columns(others, has_label=False):
                return [name for name in found if name]
        return []

    def texts(self, where: str, record: list[str] | dict[str, Any]) -> list[str]:
        """Return the one text or two of a row; none of a header and of an empty line."""
        if isinstance(record, dict):
            return self.named_texts(where, record)
        if not any(map(str.strip, record)):
            logger.warning("%s: empty, passed over", where)
            return []
        if self.columns is None:
            self.columns = self.text_columns(where, record)
        # Once more where files follow one another.
        return [] if record == self.header else self.cell_texts(where, record)

    @cached_property
    def expected_keys(self) -> str:
        """What a row with names should hold."""
        own = [texts_of(self.task)] if self.task else []
        names = [self.wanted] if self.wanted else [
            *own, *((name,) for name in TEXT_COLUMNS), *PAIR_COLUMNS]
        listed = "; ".join(dict.fromkeys(map(" and ".join, names)))
        return f"a JSON object with one text or two under {listed} (--columns names others)"

    def named_texts(self, where: str, values: dict[str, Any]) -> list[str]:
        """Return the texts of a JSON object, or of a row whose columns have names."""
        keys = self.wanted or self.known(values)
        texts = [values.get(key) for key in keys]
        if len(texts) == 2 and values.get(keys[1], "") is None:
            texts.pop()
        if not texts or not all(isinstance(each, str) for each in texts):
            shown = json.dumps(values, ensure_ascii=False, default=str)[:60]
            raise UserError(f"{where}: {shown!r}; expected {self.expected_keys}")
        return list(map(cell_of, texts))

    def text_columns(self, where: str, first: list[str]) -> list[int]:
        """Return the places of the texts by the flag, by names in the first row, or by the task."""
        known = self.known(first)
        names = [name for name in self.wanted if not name.isdecimal()]
        if unknown := [name for name in names if name not in first]:
            raise UserError(f"{where}: no column {unknown[0]!r} in {shown_row(first)}; expected"
                            " --columns with names of a header, or numbers from 1")
        if twice := [name for name in names or known if first.count(name) > 1]:
            raise UserError(f"{where}: two columns are called {twice[0]!r}; expected one, or"
                            " --columns with numbers from 1")
        if known or names:
            self.header = first
            logger.info("%s: a header; what is read: %s", where, ", ".join(self.wanted or known))
        if self.wanted:
            return [int(name) - 1 if name.isdecimal() else first.index(name)
                    for name in self.wanted]
        return list(map(first.index, known)) or self.places_in_task(first)

    def places_in_task(self, cells: list[str]) -> list[int]:
        """Return where the texts are in a row of the task's files without header; [] if it is none.

        A row without its label is none.
        """
        task = self.task
        if task and task.ragged and len(cells) > 1 and cells[-1].strip().isdecimal():
            return [0, 1][: len(cells) - 1]
        if not task or len(cells) != len(task.columns):
            return []
        label = label_of(task, cells, task.columns.index(task.label))
        is_label = NUMBER.fullmatch(label) if task.is_regression else label in task.spellings
        return list(map(task.columns.index, texts_of(task))) if is_label else []

    def cell_texts(self, where: str, cells: list[str]) -> list[str]:
        """Return the one text or two of a row of cells."""
        if self.columns and max(self.columns) >= len(cells):
            raise UserError(f"{where}: {len(cells)} columns in {shown_row(cells)}; expected at"
                            f" least {max(self.columns) + 1}")
        if self.header and len(cells) > len(self.header):
            logger.warning("%s: %d columns, more than the header has", where, len(cells))
        if self.columns:
            return [cells[column] for column in self.columns]
        if len(cells) > 2:
            raise UserError(f"{where}: {len(cells)} columns; expected a text, or two with a tab"
                            " between (--columns chooses)")
        if self.unchecked or not (self.task and self.task.text_b):
            self.check_no_label(where, cells)
        self.unchecked = max(0, self.unchecked - 1)
        return cells

    def check_no_label(self, where: str, cells: list[str]) -> None:
        """Raise a `UserError` where one of two columns does not hold texts."""
        names = KNOWN_COLUMNS if self.unchecked else ()  # which a text further down may equal
        for cell in (cell.strip(' "') for cell in cells):
            if len(cells) == 2 and (cell.casefold() in self.labels or cell in NO_TEXTS
                                    or cell in names or NUMBER.fullmatch(cell)):
                is_single = self.task is not None and self.task.text_b is None
                raise UserError(f"{where}: a column holds {cell!r}, a label or a name; expected"
                                f" {'a text' if is_single else 'two texts'} (--columns says in"
                                " which column)")


def texts_of(task: Task) -> list[str]:
    """Return the columns of a task's one text or two."""
    return [name for name in (task.text_a, task.text_b) if name]

"""Rows of data files: tab-separated, CSV, JSON lines, Parquet, Arrow, folders of text files."""

import csv
import io
import json
import re
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from itertools import chain
from pathlib import Path
from typing import Any

from transformer.file_utils import UserError, atomic_path, parse_json, text_lines

BYTE_ORDER_MARK = "\ufeff"

# By suffix. Of the first two, line 1 may name the columns or not; the others always name them.
TSV, CSV, JSON, PARQUET, ARROW, TEXTS = "TSV", "CSV", "JSON lines", "Parquet", "Arrow", "texts"
FORMATS = {".tsv": TSV, ".txt": TSV, ".csv": CSV, ".jsonl": JSON, ".json": JSON, ".ndjson": JSON,
           ".parquet": PARQUET, ".arrow": ARROW}
TEXT_FILE_COLUMNS = ["text", "folder"]  # of a folder of text files, one row each


class NoText(str):
    """A cell whose value is no text in a format that tells: JSON of a number, a list, ..."""


csv.field_size_limit(1 << 30)  # the library's own limit is shorter than some reviews


def format_of(pattern: Path | str) -> str:
    """Return the format of a file, or of all files that a pattern such as `train-*.csv` finds.

    Text files of several folders (`train/*/*.txt`) are one row each.
    """
    pattern = Path(pattern)
    if pattern.suffix == ".txt" and "*" in pattern.name:
        return TEXTS
    if pattern.suffix.lower() not in FORMATS:
        raise UserError(f"{pattern}: a file of unknown format; expected {', '.join(FORMATS)}")
    return FORMATS[pattern.suffix.lower()]


def names_columns(form: str) -> bool:
    """Say whether files of a format always name their columns."""
    return form not in (TSV, CSV)


def iterate_table(path: Path | str, form: str) -> Iterator[tuple[int, list[str]]]:
    """Yield (number from 1, cells) of each row of a file; 0 for names that are not in its lines.

    The number is that of the line, or in binary files of the row. Where the format names the
    columns, they come first. A null is an empty cell; class numbers of Hugging Face's `ClassLabel`
    become their names. Whatever is wrong with a file is a `UserError` that names the place.
    """
    readers = {TSV: iterate_tsv, CSV: _read_csv, JSON: _iterate_json, PARQUET: _iterate_arrow,
               ARROW: _iterate_arrow, TEXTS: _read_text_file}
    return readers[form](Path(path))


# ------------------------------------------------------------------ tab-separated


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


def table_lines(path: Path) -> Iterator[tuple[int, str]]:
    """Yield (number from 1, line) of a file of text, without the mark that it may begin with."""
    for number, line in text_lines(path):
        yield number, line.removeprefix(BYTE_ORDER_MARK) if number == 1 else line


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


# ------------------------------------------------------------------ other text


def iterate_csv(lines: Iterable[str], path: Path | str) -> Iterator[tuple[int, list[str]]]:
    """Yield the rows of comma-separated text with quotes as in RFC 4180; a row's first line.

    `lines` are read when they are needed; `path` is the file's name in messages.
    """
    lines = iter(lines)
    if (first := next(lines, None)) is None:
        return
    check_separator(first, path)
    reader = csv.reader(chain([first], lines), strict=True)
    while True:
        number = reader.line_num + 1
        try:
            cells = next(reader, None)
        except csv.Error as error:
            reason = "a carriage return inside a line" if "new-line" in str(error) else error
            raise UserError(f"{path}, line {number}: {reason}; expected comma-separated cells,"
                            ' those with commas, quotes or line ends in "quotes"') from error
        if cells is None:
            return
        yield number, cells or [""]


def check_separator(line: str, path: Path | str) -> None:
    """Raise a `UserError` for a first line that says or shows another separator than commas."""
    unquoted = re.sub('"[^"]*"', "", line)
    if re.match("sep=.?\\s*$", line):
        raise UserError(f"{path}, line 1: {line.strip()!r} is for Excel alone; expected the"
                        " columns or a row, separated by commas")
    if "," not in unquoted and '"' not in unquoted and any(mark in unquoted for mark in ";\t"):
        mark = "tabs (its name then ends in .tsv)" if "\t" in unquoted else "semicolons"
        raise UserError(f"{path}, line 1: separated by {mark}; expected commas")


def _read_csv(path: Path) -> Iterator[tuple[int, list[str]]]:
    return iterate_csv((line for _, line in table_lines(path)), path)


def _iterate_json(path: Path) -> Iterator[tuple[int, list[str]]]:
    """Yield the keys of the first object, then the values of each under them."""
    names: list[str] = []
    for number, value in _json_objects(path):
        if not names:
            names = list(value)
            yield 0, names
        if new := [name for name in value if name not in names]:
            raise UserError(f"{path}, line {number}: the key {new[0]!r}, which line 1 lacks;"
                            " expected the same keys in every object")
        yield number, [cell_of(value.get(name)) for name in names]


def _json_objects(path: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    """Yield the objects of JSON lines, or of one list of them, with numbers from 1."""
    expected = "one JSON object a line"
    for number, line in table_lines(path):
        if number == 1 and line.lstrip().startswith("["):
            break
        if line.strip():
            yield number, parse_json(line, f"{path}, line {number}", expected)
    else:
        return
    text = "".join(line for _, line in table_lines(path))
    objects = parse_json(f'{{"rows": {text}}}', str(path), expected)["rows"]
    for number, value in enumerate(objects, start=1):
        if not isinstance(value, dict):
            raise UserError(f"{path}, row {number}: {str(value)[:40]!r}; expected a JSON object")
        yield number, value


def cell_of(value: Any) -> str:
    """Return a JSON value as a cell: a text as it is, a null as "", all else as `NoText`."""
    if isinstance(value, str):
        # JSON can spell half a surrogate pair, which UTF-8 can not.
        return value.encode("utf-8", "replace").decode()
    return "" if value is None else NoText(json.dumps(value, ensure_ascii=False, default=str))


def _read_text_file(path: Path) -> Iterator[tuple[int, list[str]]]:
    """Yield the column names and the one row of a text file, its line breaks as spaces."""
    text = "".join(line for _, line in table_lines(path))
    yield 0, TEXT_FILE_COLUMNS
    yield 1, [" ".join(text.replace("<br />", " ").split()), path.parent.name]


# ------------------------------------------------------------------ Parquet and Arrow


def _iterate_arrow(path: Path) -> Iterator[tuple[int, list[str]]]:
    """Yield the column names, then the rows, of a Parquet file or of `datasets.save_to_disk`'s."""
    number = 0
    with open_binary(path, format_of(path)) as file:
        is_parquet = hasattr(file, "schema_arrow")
        schema = file.schema_arrow if is_parquet else file.schema
        classes = _class_names(schema)
        yield 0, list(schema.names)
        for batch in file.iter_batches() if is_parquet else file:
            columns = [
                [_class_name(value, classes.get(name)) for value in column.to_pylist()]
                for name, column in zip(schema.names, batch.columns, strict=True)]
            for cells in zip(*columns, strict=True):
                number += 1
                yield number, list(cells)


@contextmanager
def open_binary(path: Path, form: str) -> Iterator[Any]:
    """Open a Parquet file (a `ParquetFile`), or an Arrow one (a `RecordBatchStreamReader`).

    What pyarrow cannot read inside the block is a `UserError`.
    """
    pyarrow = import_pyarrow(path)
    try:
        if form == PARQUET:
            from pyarrow import parquet

            yield parquet.ParquetFile(path)
        else:
            yield pyarrow.ipc.open_stream(pyarrow.memory_map(str(path)))
    except (pyarrow.ArrowException, OSError) as error:
        reason = str(error).partition("\n")[0]
        raise UserError(
            f"{path}: cannot be read ({reason}); expected a whole {form} file") from error


def import_pyarrow(path: Path | str) -> Any:
    """Return the optional package; its absence is a `UserError`."""
    try:
        import pyarrow
        import pyarrow.ipc
    except ImportError as error:
        raise UserError(f"{path}: Parquet and Arrow files need the package pyarrow: pip install"
                        " pyarrow") from error
    return pyarrow


def _class_names(schema: Any) -> dict[str, list[str]]:
    """Return the class names of the columns that `datasets` notes as `ClassLabel`."""
    noted = (schema.metadata or {}).get(b"huggingface", b"{}")
    features = json.loads(noted).get("info", {}).get("features", {})
    return {name: feature["names"] for name, feature in features.items()
            if isinstance(feature, dict) and feature.get("_type") == "ClassLabel"}


def _class_name(value: Any, names: list[str] | None) -> str:
    """Return a cell; a class number by its name, where it has one (-1, "no label", has none)."""
    return names[value] if names and value is not None and value >= 0 else cell_of(value)


# ------------------------------------------------------------------ rows in messages and files


def shown_row(cells: Sequence[str]) -> str:
    """Return the beginning of a row for a message."""
    text = "\t".join(cells)
    return repr(text if len(text) <= 60 else text[:57] + "...")


def row_line(row: Sequence[str], names: Sequence[str] | None, form: str, path: Path | str,
             number: int) -> str:
    """Return a row as a line of a TSV, CSV or JSON-lines file.

    Args:
        row: its cells.
        names: of the columns, for JSON.
        form: the format.
        path, number: the file and the row from 1, for the message of a row that TSV cannot express.
    """
    if form == TSV:
        return tsv_line(row, path, number)
    if form == CSV:
        line = io.StringIO()
        csv.writer(line, lineterminator="\n").writerow(row)
        return line.getvalue()
    return json.dumps(dict(zip(names, row, strict=True)), ensure_ascii=False) + "\n"

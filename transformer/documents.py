"""Documents of raw text: WikiExtractor's files, JSON lines, Parquet, Arrow and plain text."""

import html
import re
from collections import Counter, deque
from collections.abc import Iterable, Iterator, Sequence
from itertools import groupby
from pathlib import Path
from typing import NamedTuple

from transformer.file_utils import UserError, is_packed, open_text, parse_json, text_lines
from transformer.table_files import BYTE_ORDER_MARK, open_binary
from transformer.tasks import Task, iterate_examples

# Kinds of files, in the order in which a folder's are looked for.
WIKI, PARQUET, ARROW, JSON, TEXT = "WikiExtractor", "Parquet", "Arrow", "JSON lines", "text"
KINDS = {".parquet": PARQUET, ".arrow": ARROW, ".jsonl": JSON, ".ndjson": JSON, ".json": JSON,
         ".txt": TEXT}
ROWS = "rows"  # of a task
WIKI_NAMES = "wiki_*"
READABLE = f"WikiExtractor's --json output ({WIKI_NAMES}), {', '.join(KINDS)}, .gz or .bz2 of them"
# How many times smaller a file is than its text.
COMPRESSION = {".bz2": 4, ".gz": 3, ".parquet": 2}
PIECE_BYTES = 1 << 24  # of a large file that is worked on at once
PARQUET_ROWS = 256  # read at once
TEXT_TYPES = ("string", "large_string", "string_view")

# A tag, not any text in brackets: attributes have values.
TAG = re.compile(r"</?([a-z][a-z0-9]*)(?:\s+[a-z-]+\s*=[^<>]*)?\s*/?>", re.I)
BREAKS = {"br", "div", "hr", "li", "p", "td", "th", "tr"}
PLACEHOLDER = re.compile(r"\b(?:formula|codice)_\d+")

Document = Iterable[str]  # its paragraphs, or a text of several lines


class TextFormat(NamedTuple):
    """How documents stand in files.

    column: of Parquet and Arrow, and the key of JSON lines, that holds the text
    whole_files: whether a plain text is one document, or each between blank lines is
    task: whose training rows are the documents of a folder
    """

    column: str = "text"
    whole_files: bool = False
    task: Task | None = None


# ------------------------------------------------------------------ the files


def kind_of(path: Path) -> str:
    """Return the kind of a file by its name; "" for one that is not read."""
    suffixes = [suffix for suffix in path.suffixes if suffix not in (".gz", ".bz2")]
    by_suffix = KINDS.get(suffixes[-1].lower(), "") if suffixes else ""
    return by_suffix or (WIKI if path.match(WIKI_NAMES) else "")


def folder_files(folder: Path) -> tuple[str, list[Path], Counter[str]]:
    """Return the kind of a folder's files, those files by path, and how many of others there are.

    It is the first kind that the folder has in the order above. Hidden files do not count.
    """
    found: dict[str, list[Path]] = {kind: [] for kind in (WIKI, *KINDS.values(), "")}
    for path in folder.rglob("*"):
        names = path.relative_to(folder).parts
        if path.is_file() and not any(name.startswith(".") for name in names):
            found[kind_of(path)].append(path)
    kind = next((kind for kind, paths in found.items() if kind and paths), "")
    others = Counter({other: len(paths) for other, paths in found.items()
                      if paths and other != kind})
    return kind, sorted(found[kind]) if kind else [], others


def is_json(path: Path) -> bool:
    """Say whether the first line of a .txt file with text is a JSON object."""
    with open_text(path) as lines:
        first = next((line for line in lines if line.strip()), b"")
    return first.lstrip().startswith(b'{"')


class Piece(NamedTuple):
    """Documents of a file: bytes or row groups [begin, end), or all (end 0).

    Of the kind ROWS, `path` is a task's folder.
    """

    path: Path
    kind: str
    begin: int = 0
    end: int = 0


def cut_pieces(
    paths: Sequence[Path], whole_files: bool = False, size: int = PIECE_BYTES
) -> list[Piece]:
    """Cut files into pieces of whole documents, of about `size` bytes each where that is easy."""
    pieces: list[Piece] = []
    for path in paths:
        kind = kind_of(path)
        if kind == TEXT and is_json(path):
            kind = JSON
        if kind == PARQUET:
            pieces += _row_groups(path, size)
        elif path.stat().st_size <= size or kind == ARROW or is_packed(path) or (
                kind == TEXT and whole_files):
            pieces.append(Piece(path, kind))
        else:
            pieces += _line_blocks(path, kind, size)
    return pieces


def _line_blocks(path: Path, kind: str, size: int) -> Iterator[Piece]:
    """Yield blocks of whole lines or, of plain text, of what stands between blank lines."""
    stop, end = path.stat().st_size, 0
    with path.open("rb") as lines:
        while end < stop:
            begin = end
            lines.seek(min(begin + size, stop) - 1)
            line = lines.readline()
            while kind == TEXT and line:
                line = lines.readline()
                if not line.strip():
                    break
            end = lines.tell()
            yield Piece(path, kind, begin, end)


def _row_groups(path: Path, size: int) -> Iterator[Piece]:
    with open_binary(path, PARQUET) as file:
        metadata = file.metadata
    begin = held = 0
    for group in range(metadata.num_row_groups):
        held += metadata.row_group(group).total_byte_size
        if held >= size or group + 1 == metadata.num_row_groups:
            yield Piece(path, PARQUET, begin, group + 1)
            begin, held = group + 1, 0


# ------------------------------------------------------------------ their documents


def read_documents(piece: Piece, text_format: TextFormat) -> Iterator[Document]:
    """Yield the documents of a piece, one after the other; a later one ends the one before.

    What is no text, or not in UTF-8, is a `UserError` with file and line.
    """
    if piece.kind == ROWS:
        for row in iterate_examples(text_format.task, piece.path, "train"):
            yield [row.text_a] if row.text_b is None else [row.text_a, row.text_b]
    elif piece.kind == TEXT:
        yield from _text_documents(piece, text_format.whole_files)
    elif piece.kind in (PARQUET, ARROW):
        for text in _column(piece, text_format.column):
            yield [(text or "").replace("\0", "")]
    else:
        for text in _json_texts(piece, text_format.column):
            yield [text]


def _piece_lines(piece: Piece) -> Iterator[str]:
    """Yield the lines of a piece; bytes that are not UTF-8 are a `UserError` with their line."""
    left = piece.end - piece.begin
    try:
        with open_text(piece.path) as file:
            if piece.begin:
                file.seek(piece.begin)
            for raw in file:
                line = raw.decode("utf-8")
                yield line if piece.begin else line.removeprefix(BYTE_ORDER_MARK)
                left -= len(raw)
                if left == 0:
                    return
    except UnicodeDecodeError:
        deque(text_lines(piece.path), maxlen=0)  # raises the error that names the line
        raise


def _text_documents(piece: Piece, whole_files: bool) -> Iterator[Document]:
    lines = (line.replace("\0", "") for line in _piece_lines(piece))
    if whole_files:
        yield lines
        return
    for is_text, group in groupby(lines, key=lambda line: bool(line.strip())):
        if is_text:
            yield group


def _json_texts(piece: Piece, key: str) -> Iterator[str]:
    expected = f'one JSON object a line with a "{key}" string'
    if piece.kind == WIKI:
        expected += " (WikiExtractor --json)"
    for number, line in enumerate(_piece_lines(piece), start=1):
        if not line.strip():
            continue
        try:
            value = parse_json(line, "", expected)
        except UserError as error:
            raise UserError(f"{_place(piece, number)}{error}") from error
        text = value.get(key, 0)
        if text is None and piece.kind == JSON:
            text = ""
        if not isinstance(text, str):
            raise UserError(f"{_place(piece, number)}: no {key}; expected {expected}")
        # WikiExtractor's files may have been given another name.
        yield clean(text) if piece.kind == WIKI or "revid" in value else text.replace("\0", "")


def _place(piece: Piece, number: int) -> str:
    """Return the name of a line, which is counted from the beginning of the piece."""
    left = piece.begin
    with open_text(piece.path) as file:
        while left > 0:
            chunk = file.read(min(left, PIECE_BYTES))
            number += chunk.count(b"\n")
            left -= len(chunk)
    return f"{piece.path}, line {number}"


def _column(piece: Piece, name: str) -> Iterator[str | None]:
    """Yield the values of a column of texts."""
    with open_binary(piece.path, piece.kind) as file:
        schema, batches = file.schema, file
        if piece.kind == PARQUET:
            schema, groups = file.schema_arrow, range(piece.begin, piece.end)
            batches = file.iter_batches(PARQUET_ROWS, groups, [name])
        if name not in schema.names or str(schema.field(name).type) not in TEXT_TYPES:
            columns = ", ".join(f"{field.name} ({field.type})" for field in schema)
            raise UserError(f"{piece.path}: no column {name!r} of texts; expected one of {columns},"
                            " by --text_column")
        for batch in batches:
            yield from batch.column(name).to_pylist()


def clean(text: str) -> str:
    """Drop the markup that WikiExtractor leaves in a text; entities become what they stand for.

    That is tags such as `&lt;br&gt;`, `formula_1` and `codice_1` in place of formulas and code, and
    NUL characters.
    """
    # Twice: the dump escapes what a page shows, and WikiExtractor escapes that again.
    text = html.unescape(html.unescape(text)).replace("\0", "")
    if "<" in text:
        text = TAG.sub(lambda tag: " " if tag[1].lower() in BREAKS else "", text)
    if "formula_" in text or "codice_" in text:
        text = PLACEHOLDER.sub("", text)
    return text

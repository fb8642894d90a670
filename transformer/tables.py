"""Tables of strings, for the terminal and for Markdown files."""

import textwrap
import unicodedata

FIRST_COLUMN = 34  # cells of the first column of a table that is too wide, at least
SECOND_CELL = "\ue000"  # stands behind each wide character while lines are broken


def display_width(text: str) -> int:
    """Return the cells of a terminal that a text takes: of a Chinese character 2, of a mark 0."""
    return sum(2 if unicodedata.east_asian_width(character) in "WF" else
               unicodedata.category(character) not in ("Mn", "Me", "Cf") for character in text)


def pad(text: str, width: int, right: bool = False) -> str:
    """Fill a text up with spaces to `width` cells of a terminal, to the left of it if `right`."""
    spaces = " " * (width - display_width(text))
    return spaces + text if right else text + spaces


def wrap(text: str, width: int) -> list[str]:
    """Break a text into lines of at most `width` cells, all but the first indented."""
    cells = "".join(character + SECOND_CELL * (display_width(character) - 1) for character in text)
    lines = textwrap.wrap(cells, width, subsequent_indent="  ")
    return [line.replace(SECOND_CELL, "") for line in lines] or [""]


def markdown_table(header: list[str], rows: list[list[str]], align: str = "---:") -> str:
    """Format a Markdown table; `align` holds for all columns but the first."""
    rule = ["---", *[align] * (len(header) - 1)]
    lines = [[cell.replace("|", "\\|") for cell in row] for row in [header, rule, *rows]]
    return "\n".join("| " + " | ".join(row) + " |" for row in lines) + "\n"


def text_table(header: list[str], rows: list[list[str]], width: int = 80,
               first_column: int = FIRST_COLUMN) -> str:
    """Format a table for the terminal: the first column to the left, the others to the right.

    Of a table that is wider than `width`, the first column is broken into lines, of `first_column`
    cells or more, and columns for which there is still no room follow below.
    """
    sizes = [max(map(display_width, column)) for column in zip(header, *rows, strict=True)]
    room = width - sum(sizes[1:]) - 2 * (len(sizes) - 1)
    sizes[0] = min(sizes[0], max(room, first_column))
    shown = 2
    while shown < len(sizes) and sum(sizes[: shown + 1]) + 2 * shown <= width:
        shown += 1
    lines = []
    for name, *cells in [header, *rows]:
        first, *more = wrap(name, sizes[0])
        texts = [pad(cell, size, right=True)
                 for cell, size in zip(cells, sizes[1:shown], strict=False)]
        lines += ["  ".join([pad(first, sizes[0]), *texts]).rstrip(), *more]
    if shown < len(sizes):
        others = [[row[0], *row[shown:]] for row in [header, *rows]]
        lines += ["", text_table(others[0], others[1:], width, first_column)]
    return "\n".join(lines)

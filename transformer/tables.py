"""Tables of strings, for the terminal and for Markdown files."""

import textwrap

FIRST_COLUMN = 34  # characters of the first column of a table that is too wide


def markdown_table(header: list[str], rows: list[list[str]], align: str = "---:") -> str:
    """Format a Markdown table; `align` holds for all columns but the first."""
    rule = ["---", *[align] * (len(header) - 1)]
    return "\n".join("| " + " | ".join(row) + " |" for row in [header, rule, *rows]) + "\n"


def text_table(header: list[str], rows: list[list[str]], width: int = 80) -> str:
    """Format a table for the terminal: the first column to the left, the others to the right.

    Of a table that is wider than `width`, the first column is broken into lines, and columns for
    which there is still no room follow below.
    """
    sizes = [max(map(len, column)) for column in zip(header, *rows, strict=True)]
    if sum(sizes) + 2 * (len(sizes) - 1) > width:
        sizes[0] = min(sizes[0], FIRST_COLUMN)
    shown = 2
    while shown < len(sizes) and sum(sizes[: shown + 1]) + 2 * shown <= width:
        shown += 1
    lines = []
    for name, *cells in [header, *rows]:
        first, *more = textwrap.wrap(name, sizes[0], subsequent_indent="  ") or [""]
        texts = [cell.rjust(size) for cell, size in zip(cells, sizes[1:shown], strict=False)]
        lines += ["  ".join([first.ljust(sizes[0]), *texts]).rstrip(), *more]
    if shown < len(sizes):
        others = [[row[0], *row[shown:]] for row in [header, *rows]]
        lines += ["", text_table(others[0], others[1:], width)]
    return "\n".join(lines)

"""Tables of strings, for the terminal and for Markdown files."""

import textwrap
from itertools import zip_longest

FIRST_COLUMN = 34  # characters that the first column of a table that is too wide keeps at least


def markdown_table(header: list[str], rows: list[list[str]], align: str = "---:") -> str:
    """Format a Markdown table; `align` holds for all columns but the first."""
    rule = ["---", *[align] * (len(header) - 1)]
    return "\n".join("| " + " | ".join(row) + " |" for row in [header, rule, *rows]) + "\n"


def text_table(header: list[str], rows: list[list[str]], width: int = 80) -> str:
    """Format a table for the terminal: the first column to the left, the others to the right.

    Headings and what is in the first column are broken into lines where `width` asks for it;
    columns for which there is still no room follow below, in a table of their own.
    """
    sizes = [max(map(len, column)) for column in zip(header, *rows, strict=True)]
    if sum(sizes) + 2 * len(sizes) - 2 > width:
        words = [max(heading.split(), key=len, default="") for heading in header[1:]]
        sizes = [max(map(len, column)) for column in zip([header[0], *words], *rows, strict=True)]
    first, *widths = sizes
    shown, room = 0, width - min(first, FIRST_COLUMN)
    while shown < len(widths) and (shown == 0 or room >= widths[shown] + 2):
        room -= widths[shown] + 2
        shown += 1
    sizes = [min(first, max(10, room + min(first, FIRST_COLUMN))), *widths[:shown]]
    lines = []
    for row in [header, *rows]:
        columns = [textwrap.wrap(text, size, subsequent_indent="" if i else "  ")
                   for i, (text, size) in enumerate(zip(row, sizes, strict=False))]
        for texts in zip_longest(*columns, fillvalue=""):
            cells = [text.rjust(size) for text, size in zip(texts[1:], sizes[1:], strict=True)]
            lines.append("  ".join([texts[0].ljust(sizes[0]), *cells]).rstrip())
    if shown < len(widths):
        others = [[row[0], *row[shown + 1:]] for row in [header, *rows]]
        lines += ["", text_table(others[0], others[1:], width)]
    return "\n".join(lines)

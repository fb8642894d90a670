"""Tables of strings, for the terminal and for Markdown files."""


def markdown_table(header: list[str], rows: list[list[str]], align: str = "---:") -> str:
    """Format a Markdown table; `align` holds for all columns but the first."""
    rule = ["---", *[align] * (len(header) - 1)]
    return "\n".join("| " + " | ".join(row) + " |" for row in [header, rule, *rows]) + "\n"


def text_table(header: list[str], rows: list[list[str]]) -> str:
    """Format a table for the terminal: the first column to the left, the others to the right."""
    widths = [max(len(row[i]) for row in [header, *rows]) for i in range(len(header))]
    lines = []
    for row in [header, *rows]:
        cells = [cell.rjust(width) for cell, width in zip(row[1:], widths[1:], strict=True)]
        lines.append("  ".join([row[0].ljust(widths[0]), *cells]).rstrip())
    return "\n".join(lines)

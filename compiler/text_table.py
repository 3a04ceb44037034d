"""Tables of plain text, for reports on the terminal, and of Markdown."""

from __future__ import annotations

from collections.abc import Sequence


def format_table(headers: Sequence[str], rows: Sequence[Sequence[str]], *, words: Sequence[str] = ()) -> str:
    """Columns as wide as their widest cell: words to the left, figures to the right.

    Args:
        headers: one for each column.
        rows: of as many cells each.
        words: headers of columns that hold words; the first always does.
    """
    to_left = [index == 0 or header in words for index, header in enumerate(headers)]
    widths = [max(len(row[column]) for row in (headers, *rows)) for column in range(len(headers))]
    lines = [
        _line(headers, widths, to_left),
        "-" * (sum(widths) + 2 * (len(widths) - 1)),
        *(_line(row, widths, to_left) for row in rows),
    ]
    return "\n".join(lines)


def markdown_row(*cells: str) -> str:
    """A line of a Markdown table."""
    return f"| {' | '.join(cells)} |"


def _line(cells: Sequence[str], widths: Sequence[int], to_left: Sequence[bool]) -> str:
    padded = [
        cell.ljust(width) if left else cell.rjust(width)
        for cell, width, left in zip(cells, widths, to_left, strict=True)
    ]
    return "  ".join(padded).rstrip()

"""Parts of an HTML report: cells, tables, tiles, and the page around them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from html import escape
from importlib.metadata import version
from importlib.resources import files
from pathlib import Path
from string import Template

from sdc.compiler.inspect.report import megabytes
from sdc.engines.errors import InputError


@dataclass(frozen=True)
class Cell:
    """A figure in a table.

    Attributes:
        text: what is shown.
        value: the exact figure, by which the column is sorted; None if there is none.
        bar: length of a bar before the text, from 0 to 1; None for no bar.
    """

    text: str
    value: float | int | None = None
    bar: float | None = None


@dataclass(frozen=True)
class Column:
    """The head of a column.

    Attributes:
        title: what is shown.
        side: "first", "second", or "" for a column of neither.
        words: whether it holds words, which stand to the left.
    """

    title: str
    side: str = ""
    words: bool = False


BAR_PX = 80

EMPTY = Cell("")


def table(columns: Sequence[Column], rows: Sequence[Sequence[Cell | str]], *, name: str) -> str:
    """A table that sorts by every column.

    Args:
        columns: the heads.
        rows: of as many cells each; plain strings are words.
        name: identifies the table in the page.
    """
    heads = "".join(
        f'<th scope="col" class="{_classes(column)}"><button type="button">{escape(column.title)}</button></th>'
        for column in columns
    )
    lines = "\n".join(
        f"<tr>{''.join(_cell(cell, column) for cell, column in zip(row, columns, strict=True))}</tr>" for row in rows
    )
    return (
        f'<div class="scroll"><table id="{escape(name)}"><thead><tr>{heads}</tr></thead>\n'
        f"<tbody>\n{lines}\n</tbody></table></div>"
    )


def _cell(cell: Cell | str, column: Column) -> str:
    if isinstance(cell, str):
        return f'<td class="{_classes(column, side=False)}">{escape(cell)}</td>'
    value = "" if cell.value is None else f' data-value="{cell.value!r}"'
    bar = "" if cell.bar is None else f'<span class="bar" style="width:{BAR_PX * cell.bar:.0f}px"></span>'
    return f'<td class="{_classes(column, side=False)}"{value}>{bar}{escape(cell.text)}</td>'


def _classes(column: Column, *, side: bool = True) -> str:
    return " ".join(part for part in (column.side if side else "", "words" if column.words else "") if part)


def tiles(figures: Sequence[tuple[str, str, str]]) -> str:
    """Large figures: (label, figure, detail) each."""
    parts = "\n".join(
        f'<div class="tile"><div class="label">{escape(label)}</div><div class="figure">{escape(figure)}</div>'
        f'<div class="detail">{escape(detail)}</div></div>'
        for label, figure, detail in figures
    )
    return f'<div class="tiles">\n{parts}\n</div>'


def section(title: str, *parts: str) -> str:
    """A titled part of the page; nothing if it would be empty."""
    content = "\n".join(part for part in parts if part)
    return f"<section>\n<h2>{escape(title)}</h2>\n{content}\n</section>" if content else ""


def paragraph(text: str) -> str:
    """Small print."""
    return f'<p class="note">{escape(text)}</p>'


def page(title: str, *parts: str) -> str:
    """A whole HTML page that needs nothing but itself."""
    source = files("sdc.compiler.compare")

    def read(name: str) -> str:
        return source.joinpath(name).read_text(encoding="utf-8").strip()

    return Template(read("page.html")).substitute(
        title=escape(title),
        version=version("sdc"),
        style=read("page.css"),
        script=read("page.js"),
        body="\n".join(part for part in parts if part),
    )


def write_page(path: Path, content: str) -> None:
    """Write a page.

    Raises:
        InputError: the file cannot be written.
    """
    try:
        path.write_text(content, encoding="utf-8")
    except OSError as error:
        raise InputError(f"cannot write {path}: {error.strerror}") from error


def count_cell(value: int | None) -> Cell:
    """A whole number; empty if there is none."""
    return EMPTY if value is None else Cell(f"{value:,}", value)


def bytes_cell(value: int | None) -> Cell:
    """Megabytes; empty if there is none."""
    return EMPTY if value is None else Cell(megabytes(value), value)


def milliseconds_cell(seconds: float) -> Cell:
    """A time in milliseconds; its exact figure is in seconds."""
    return Cell(f"{1000 * seconds:.2f}", seconds)


def scientific_cell(value: float) -> Cell:
    """Three digits and a power of ten."""
    return Cell(f"{value:.2e}", value)

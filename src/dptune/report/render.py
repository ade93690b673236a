"""A table as Markdown, and as CSV, LaTeX and HTML files."""

from __future__ import annotations

import csv
import io
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from dptune.records.files import write_atomically
from dptune.report.tables import Cell, Table
from dptune.report.terminal import plain

if TYPE_CHECKING:
    from great_tables import GT

_LATEX = {
    "↑": r"$\uparrow$",
    "↓": r"$\downarrow$",
    "ε": r"$\varepsilon$",
    "δ": r"$\delta$",
    "σ": r"$\sigma$",
    "±": r"$\pm$",
    "–": "--",
    "−": "$-$",
    "“": "``",
    "”": "''",
}


def markdown(table: Table) -> str:
    """The whole table, however wide, with what must be known to read it below."""
    heads = [column.head for column in table.columns]
    lines = [table.title, "", _line(heads), _line(["---"] * len(heads))]
    lines += [_line([_text(row.get(column.key)) for column in table.columns]) for row in table.rows]
    return "\n".join(plain(line) for line in [*lines, "", *table.notes])


def to_csv(table: Table) -> str:
    """The numbers before rounding: one line a cell, with its interval, number of runs and their ids."""
    stream = io.StringIO()
    writer = csv.writer(stream, lineterminator="\n")
    writer.writerow(["table", "row", "setting", "column", "direction", "text", "value", "low", "high", "n", "run_ids"])
    for at, row in enumerate(table.rows):
        setting = _text(row.get("setting"))
        for column in table.columns:
            cell = row.get(column.key)
            if cell is None or column.key in ("row", "setting"):
                continue
            direction = {"↑": "higher is better", "↓": "lower is better"}.get(column.direction, "")
            numbers = ["" if value is None else value for value in (cell.value, cell.low, cell.high, cell.n)]
            ids = " ".join(cell.run_ids)
            writer.writerow([table.name, at, setting, column.title, direction, cell.text, *numbers, ids])
    return stream.getvalue()


def great(table: Table) -> GT:
    """The table as a great-tables object."""
    import pandas as pd
    from great_tables import GT

    content = pd.DataFrame(
        {column.head: [_text(row.get(column.key)) for row in table.rows] for column in table.columns}, dtype=object
    )
    result = GT(content).tab_header(title=table.title).opt_row_striping()
    for note in table.notes:
        result = result.tab_source_note(note)
    return result


def to_html(table: Table) -> str:
    """A self-contained HTML page fragment."""
    text: str = great(table).as_raw_html(make_page=True)
    return text


def to_latex(table: Table) -> str:
    """A LaTeX table, in ASCII so that any engine sets it."""
    text: str = great(table).as_latex()
    for sign, command in _LATEX.items():
        text = text.replace(sign, command)
    return text


def write(tables: Sequence[Table], folder: Path) -> list[Path]:
    """Each table as CSV, LaTeX and HTML, below `folder`; a `/` in its name is a `-` in those of its files."""
    written = []
    for table in tables:
        name = file_name(table.name)
        for suffix, text in ((".csv", to_csv(table)), (".tex", to_latex(table)), (".html", to_html(table))):
            written.append(write_atomically(folder / f"{name}{suffix}", text))
    return written


def file_name(name: str) -> str:
    """The name of a sweep or a table as that of a file: sweeps in folders have a `/`."""
    return name.replace("/", "-")


def _text(cell: Cell | None) -> str:
    return "–" if cell is None else cell.text


def _line(cells: Sequence[str]) -> str:
    return "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |"

"""The main table for a terminal: the columns that matter, aligned, and no line wider than it may be.

What does not fit goes to the next line of its row: the words of a setting, then what follows a number, then its
interval. Only then does a column stay away; a note names it.
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from dptune.report.tables import ALWAYS, FLAGS, INTERVAL, INTERVALS, NONE, Cell, Column, Parts, Table

WIDEST, NARROWEST = 100, 60
LINE, TAIL_BELOW, INTERVAL_BELOW = range(3)
"""How a number is set: in one line, with what follows it below, or with its interval below."""
WORDS = (16, 12, 8)
"""How wide words make a column of numbers in each of these; longer ones are wrapped."""
HEADS = (2, 2, 3)
"""Into how many lines a head may be wrapped in each of these."""
GAP, LEAST, MOST = "  ", 6, 40
"""Between columns; what the settings have at least; and what they ask for at most, however long their words are."""
_UNSAFE = {"Cc", "Cf", "Cs", "Zl", "Zp"}
_FIXED = "\u00a0"
"""A space at which no line is broken."""


@dataclass(frozen=True)
class _Block:
    """A column as it is set: lines for its head and for each row, none wider than `width`."""

    column: Column
    width: int
    head: list[str]
    cells: list[list[str]]

    def line(self, lines: Sequence[str], at: int) -> str:
        """One line, filled up to the width of the column."""
        text = lines[at] if 0 <= at < len(lines) else ""
        fill = " " * (self.width - width_of(text))
        return fill + text if self.column.right else text + fill


def narrow(table: Table, width: int = WIDEST) -> str:
    """A main table within `width` columns, with what must be known to read it below."""
    counted, marks = _counted(table), _shared_marks(table)
    filled = [column for column in table.columns if any(row.get(column.key, _EMPTY).text != NONE for row in table.rows)]
    content = {
        column: [_said(column.key, row.get(column.key, _EMPTY), counted, marks) for row in table.rows]
        for column in filled
        if column.narrow
    }
    blocks = _fitting({column: _head(column, counted) for column in content}, content, width)
    lines = [*wrapped(plain(table.title), width), "", *_beside(blocks, [block.head for block in blocks], bottom=True)]
    lines.append("─" * (sum(block.width for block in blocks) + len(GAP) * (len(blocks) - 1)))
    for at in range(len(table.rows)):
        lines += _beside(blocks, [block.cells[at] for block in blocks])
    shown = [block.column for block in blocks]
    found = _notes(table, counted, marks, [column for column in filled if column not in shown])
    lines += [""] if found else []
    for note in found:
        first, *others = wrapped(plain(note), width - len(GAP))
        lines += [first, *(GAP + line for line in others)]
    return "\n".join(line.replace(_FIXED, " ").rstrip() for line in lines)


def plain(text: str) -> str:
    """Text without what a terminal would obey: control characters, escapes and signs that turn its direction."""
    if text.isprintable():
        return text
    return "".join("\ufffd" if unicodedata.category(sign) in _UNSAFE else sign for sign in text)


def width_of(text: str) -> int:
    """How many columns of a terminal a text takes."""
    if text.isascii():
        return len(text)
    wide = sum(unicodedata.east_asian_width(sign) in ("W", "F") for sign in text)
    return len(text) + wide - sum(unicodedata.category(sign) in ("Mn", "Me") for sign in text)


def wrapped(text: str, width: int) -> list[str]:
    """Lines of at most `width` columns, broken between words; longer words at their signs, else anywhere."""
    lines = [""]
    for word in text.split(" "):
        for at, part in enumerate(_broken(word, width)):
            joined = f"{lines[-1]} {part}" if lines[-1] and at == 0 else lines[-1] + part
            if width_of(joined) <= width:
                lines[-1] = joined
            else:
                lines.append(part)
    return lines


_EMPTY = Cell(NONE)
_SIGNS = ("(?<=[=/,])", "(?<=[_.:-])")
"""Where a long word is broken, the best places first."""


def _broken(word: str, width: int, signs: Sequence[str] = _SIGNS) -> list[str]:
    if width_of(word) <= width:
        return [word]
    lines = [""]
    for piece in re.split(signs[0], word) if signs else word:
        for part in _broken(piece, width, signs[1:]) if signs else [piece]:
            if width_of(lines[-1] + part) <= width:
                lines[-1] += part
            else:
                lines.append(part)
    return lines


def _head(column: Column, counted: set[str]) -> str:
    title = column.title if column.key in counted else column.title.removesuffix(" (n)")
    return f"{title.replace('[95 %]', f'[95{_FIXED}%]')}{_FIXED}{column.direction}".strip(_FIXED)


def _said(key: str, cell: Cell, counted: set[str], shared: set[str]) -> Parts:
    """What a cell says here: without a number of runs, or marks, that a note has."""
    if cell.parts is None:
        return Parts("", words=plain(cell.text))
    marks = ",".join(mark for mark in cell.parts.marks if mark not in shared)
    n = f"({cell.n})" if key in counted else ""
    return replace(cell.parts, tail=" ".join(filter(None, (n, cell.parts.tail, marks and f"({marks})"))))


def _counted(table: Table) -> set[str]:
    """The columns that show how many runs are behind each number: accuracy if they differ, others by how it differs."""
    rows = [row for row in table.rows if "row" in row]
    found = {"accuracy"} if len(_runs(rows)) > 1 else set()
    for column in table.columns:
        if any(column.key in row and row[column.key].n not in (None, row["accuracy"].n) for row in rows):
            found.add(column.key)
    return found


def _runs(rows: Sequence[Mapping[str, Cell]]) -> set[int]:
    """The numbers of runs behind the accuracies of settings."""
    return {row["accuracy"].n for row in rows if "row" in row and row["accuracy"].n is not None}


def _shared_marks(table: Table) -> set[str]:
    """The marks that every epsilon has."""
    found = [set(cell.parts.marks) for row in table.rows if (cell := row.get("epsilon")) and cell.parts]
    return set.intersection(*found) if found else set()


def _notes(table: Table, counted: set[str], shared: set[str], left_out: Sequence[Column]) -> list[str]:
    """The notes of a table, and where to find the rest of it."""
    everywhere = {f"({mark}) {FLAGS[mark].text}": FLAGS[mark].text for mark in shared}
    runs = " (n): number of runs." if counted else ""
    if len(same := _runs(table.rows)) == 1:
        (n,) = same
        runs += f" Each setting: {n} runs (seeds)." if n > 1 else " Each setting: one run."
    notes = [INTERVAL + runs if note == INTERVALS else everywhere.get(note, note) for note in table.notes]
    if left_out:
        titles = ", ".join(column.title.partition(",")[0] for column in left_out)
        notes.append(f"More with `dptune table --wide`, and in the files of `dptune tables`: {titles}.")
    return notes


def _fitting(heads: Mapping[Column, str], cells: Mapping[Column, Sequence[Parts]], width: int) -> list[_Block]:
    """The columns as they fit: settings in whole words if they can be, then broken at their signs; in few lines."""
    labels = [cell.words for column in cells if column.key == "setting" for cell in cells[column]]
    words = [word for label in labels for word in label.split(" ")]
    pieces = [piece for word in words for piece in re.split(_SIGNS[0], word)]
    whole, broken = (min(max(map(width_of, parts), default=0), MOST) for parts in (words, pieces))
    everything = [_set_all(heads, cells, width, fold) for fold in (LINE, TAIL_BELOW, INTERVAL_BELOW)]
    for goal in (whole, broken):
        if fitting := [blocks for blocks, room in everything if room >= goal]:
            return min(fitting, key=_height)
    for least in sorted({column.narrow for column in heads if column.narrow < ALWAYS}):
        heads = {column: head for column, head in heads.items() if column.narrow > least}
        blocks, room = _set_all(heads, cells, width, INTERVAL_BELOW)
        if room >= broken:
            return blocks
    return _set_all(heads, cells, width, INTERVAL_BELOW)[0]


def _set_all(
    heads: Mapping[Column, str], cells: Mapping[Column, Sequence[Parts]], width: int, fold: int
) -> tuple[list[_Block], int]:
    """All columns, and how much room the numbers leave for the settings."""
    blocks = [_set(column, head, cells[column], fold) for column, head in heads.items() if column.key != "setting"]
    room = width - sum(block.width + len(GAP) for block in blocks)
    at, setting = next((at, column) for at, column in enumerate(heads) if column.key == "setting")
    head, labels = heads[setting], [cell.words for cell in cells[setting]]
    taken = min(max(room, LEAST), max(map(width_of, [head, *labels])))
    blocks.insert(at, _Block(setting, taken, wrapped(head, taken), [wrapped(label, taken) for label in labels]))
    return blocks, room


def _height(blocks: Sequence[_Block]) -> int:
    """How many lines the rows take."""
    return sum(max(map(len, lines)) for lines in zip(*(block.cells for block in blocks), strict=True))


def _set(column: Column, head: str, cells: Sequence[Parts], fold: int) -> _Block:
    """A column of numbers and what is said of them."""
    numbers = _aligned(cells, fold)
    wide = [line for lines in numbers for line in lines]
    wide += [piece for word in head.split(" ") for piece in re.split(_SIGNS[0], word)]
    wide += [word for cell in cells for word in cell.words.split(" ")]
    longest = max((width_of(cell.words) for cell in cells), default=0)
    width = max([min(longest, WORDS[fold]), *map(width_of, wide)])
    width = next(
        wider for wider in range(width, width + width_of(head) + 1) if len(wrapped(head, wider)) <= HEADS[fold]
    )
    lines = [
        [*number, *(wrapped(cell.words, width) if cell.words else ())]
        for number, cell in zip(numbers, cells, strict=True)
    ]
    return _Block(column, width, wrapped(head, width), lines)


def _aligned(cells: Sequence[Parts], fold: int) -> list[list[str]]:
    """The lines of each number, with decimal points below each other."""
    numbers = _points([cell.number for cell in cells])
    ends = [cell.interval.strip("[]").split(", ") if cell.interval else ["", ""] for cell in cells]
    lows, highs = _points([low for low, _ in ends]), _points([high for _, high in ends])
    intervals = [f"[{low}, {high}]" if low.strip() else "" for low, high in zip(lows, highs, strict=True)]
    between = max(map(len, intervals))
    after = max(len(cell.tail) for cell in cells)
    found = []
    for cell, number, interval in zip(cells, numbers, intervals, strict=True):
        below = [cell.tail]
        beside = [number, interval.ljust(between)]
        if fold == LINE:
            beside, below = [*beside, cell.tail.rjust(after)], []
        elif fold == INTERVAL_BELOW and between:
            beside, below = [number, cell.tail.rjust(after)], [interval]
        line = " ".join(filter(None, beside)).rstrip()
        found.append([text for text in (line, *below) if text])
    return found


def _points(texts: Sequence[str]) -> list[str]:
    """Numbers of one width, with their decimal points below each other."""
    parts = [text.partition(".") for text in texts]
    before = max(len(whole) for whole, _, _ in parts)
    after = max(len(point + rest) for _, point, rest in parts)
    return [whole.rjust(before) + (point + rest).ljust(after) for whole, point, rest in parts]


def _beside(blocks: Sequence[_Block], cells: Sequence[Sequence[str]], bottom: bool = False) -> list[str]:
    """The lines of a row, its columns beside each other."""
    height = max(map(len, cells))
    return [
        GAP.join(
            block.line(lines, at - (height - len(lines) if bottom else 0))
            for block, lines in zip(blocks, cells, strict=True)
        )
        for at in range(height)
    ]

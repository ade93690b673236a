"""The table of `sweeps/README.md`, from the headers of the sweep files; `make sweeps-readme` writes it.

A header is the comment at the top of a sweep file, below `# @package _global_`, with three fields in this order:

    # Claim tested: what the sweep may show to be false. Up to the first colon or full stop it is the table's claim.
    # Command:      make sweep SWEEP=name
    # Runs:         how many (of what), how long on two cores
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from itertools import groupby, takewhile
from pathlib import Path

from dptune.config.schema import ConfigError
from dptune.records.files import write_atomically
from dptune.sweeps import jobs
from dptune.sweeps.expand import names

BEGIN = "<!-- From the headers of the sweep files, by `make sweeps-readme`; do not edit by hand. -->"
END = "<!-- End of what is made from the headers. -->"


@dataclass(frozen=True)
class Header:
    """What the head of a sweep file says."""

    claim: str
    """What the sweep tests, in short."""
    command: str
    """How to run it."""
    runs: int
    """How many runs it has."""
    time: str
    """How long they take on two cores."""


def header(name: str) -> Header:
    """The header of the sweep `name`.

    Raises:
        ConfigError: when a field is missing, or is not where it belongs.
    """
    lines = (jobs.ROOT / "sweeps" / f"{name}.yaml").read_text(encoding="utf-8").splitlines()
    comments = takewhile(lambda line: line.startswith("#"), lines[1:])
    text = " ".join(" ".join(line.lstrip("#").split()) for line in comments)
    found = re.fullmatch(
        r"Claim tested: (.+?)[:.] .*?Command: (.+) Runs: (\d+)(?: \(.+?\))?, (.+) on two cores.*", text
    )
    if found is None:
        raise ConfigError(
            f"sweeps/{name}.yaml: its header must say `Claim tested: ...`, `Command: ...` and "
            "`Runs: NUMBER (of what), TIME on two cores`, in this order"
        )
    return Header(found[1], found[2], int(found[3]), found[4])


def table() -> str:
    """Every sweep with its claim, runs and time: one table for each folder."""
    parts = []
    for folder, members in groupby(sorted(names(), key=lambda name: (_folder(name), name)), key=_folder):
        rows = ["| sweep | claim tested | runs | time |", "|---|---|---|---|"]
        for name in members:
            head = header(name)
            rows.append(f"| [{name}]({name}.yaml) | {head.claim} | {head.runs} | {head.time} |")
        parts += [f"## `{folder}/`"] * bool(folder) + ["\n".join(rows)]
    return "\n\n".join(parts)


def page(before: str) -> str:
    """The page with the table of today between its marks.

    Raises:
        ConfigError: when the page lacks the marks.
    """
    head, begin, rest = before.partition(BEGIN)
    _, end, tail = rest.partition(END)
    if not begin or not end:
        raise ConfigError(f"sweeps/README.md: the table stands between two lines:\n{BEGIN}\n{END}")
    return f"{head}{BEGIN}\n\n{table()}\n\n{END}{tail}"


def _folder(name: str) -> str:
    return name.rpartition("/")[0]


def main(path: Path | None = None) -> None:
    """Write the table into `sweeps/README.md`, whose other text stays."""
    place = path or jobs.ROOT / "sweeps" / "README.md"
    write_atomically(place, page(place.read_text(encoding="utf-8")))


if __name__ == "__main__":
    main()

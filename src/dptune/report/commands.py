"""What `dptune table`, `tables`, `figures`, `claims` and `report` do: read records, show them, write files."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from dptune.config.extras import require
from dptune.config.schema import ConfigError
from dptune.report.render import file_name, markdown, write
from dptune.report.results import HOW_TO_MAKE_SOME, Results, filtered, load_results, of_sweep
from dptune.report.tables import Table, comparison_table, cost_table, main_table, run_table, task_table
from dptune.report.terminal import NARROWEST, WIDEST, narrow, plain

SINGLE = "single-runs"
"""Name of what no sweep asked for."""
WIDE = "--wide"
"""Asks for every column, as Markdown."""


@dataclass(frozen=True)
class Request:
    """What the command line asks for."""

    sweep: str | None
    filters: tuple[str, ...]
    root: Path
    to: Path
    wide: bool = False

    @classmethod
    def of(cls, arguments: Sequence[str], options: Sequence[str] = ()) -> Request:
        """`[SWEEP] [key=value ...] [compute.output_root=FOLDER] [to=FOLDER]`, and the options of the command.

        Raises:
            ConfigError: for anything else.
        """
        given = [item for item in arguments if item.startswith("-")]
        for unknown in (item for item in given if item not in options):
            known = f"this view has {' '.join(options)}" if options else "this view has none (dptune table has --wide)"
            raise ConfigError(f"there is no option {unknown}: {known}; give filters as key=value")
        names = [item for item in arguments if "=" not in item and item not in given]
        if len(names) > 1:
            raise ConfigError(f"{' '.join(names)}: give at most one sweep, and filters as key=value")
        values = dict(item.split("=", 1) for item in arguments if "=" in item)
        root, to = values.get("compute.output_root", "outputs"), values.pop("to", "report")
        chosen = tuple(f"{key}={value}" for key, value in values.items())
        if not names:
            chosen = tuple(item for item in chosen if not item.startswith("compute.output_root="))
        return cls(names[0] if names else None, chosen, Path(root), Path(to), WIDE in given)


def table(arguments: Sequence[str]) -> None:
    """Print the main table of each sweep; with a sweep's name, what it asks for and does not have is shown too."""
    request, shown = Request.of(arguments, [WIDE]), False
    for name, results in selected(request):
        print(("\n" if shown else "") + printed(main_table(name, results, titled(name)), request))
        shown = True


def tables(arguments: Sequence[str]) -> None:
    """Print the main tables and write all of them as CSV, LaTeX and HTML."""
    require("report", "dptune tables")
    request = Request.of(arguments, [WIDE])
    for name, results in selected(request):
        made = all_tables(name, results)
        print(printed(made[0], request), end="\n\n")
        write(made, request.to / "tables")
    print(f"CSV, LaTeX and HTML: {request.to / 'tables'}")


def printed(table: Table, request: Request) -> str:
    """A main table as it is asked for: whole, or within the width of the terminal."""
    return markdown(table) if request.wide else narrow(table, terminal_width())


def terminal_width() -> int:
    """How wide a line may be: `WIDEST`, also in a file and a pipe, or what the terminal has if that is less."""
    if not sys.stdout.isatty():
        return WIDEST
    columns = os.get_terminal_size(sys.stdout.fileno()).columns
    return min(max(columns, NARROWEST), WIDEST) if columns else WIDEST  # A terminal of unknown size says 0.


def all_tables(name: str, results: Results) -> list[Table]:
    """Every table of one sweep, the main one first."""
    made = [main_table(name, results, titled(name)), comparison_table(name, results), cost_table(name, results)]
    made += [task_table(name, results), run_table(name, results)]
    return [item for item in made if item is not None]


def selected(request: Request) -> Iterator[tuple[str, Results]]:
    """The runs that are asked for, a sweep at a time; a sweep that is named with all that it asks for.

    A sweep that does nothing but include others is shown as these, one by one.
    """
    if request.sweep is None:
        yield from by_sweep(everything(request))
        return
    from dptune.sweeps.expand import jobs_of_sweep as jobs_of
    from dptune.sweeps.expand import parts

    found = load_results(request.root)
    warn(found)
    for part in parts(request.sweep):
        yield part, of_sweep(part, jobs_of(part, request.filters), found)


def everything(request: Request) -> Results:
    """All runs that pass the filters.

    Raises:
        ConfigError: when there are none, saying how to make some.
    """
    found = load_results(request.root)
    warn(found)
    if not len(found.runs):
        raise ConfigError(HOW_TO_MAKE_SOME.format(root=request.root))
    try:
        results = filtered(found, request.filters)
    except ValueError as error:
        raise ConfigError(str(error)) from None
    if not len(results.runs):
        raise ConfigError(f"no record below {request.root} has {' '.join(request.filters)}")
    return results


def by_sweep(results: Results) -> Iterator[tuple[str, Results]]:
    """The runs of each sweep that is named in the records, and those of none."""
    names = results.runs["sweep"]
    for name in sorted(names.dropna().unique()):
        yield str(name), results.only(results.runs[names == name].reset_index(drop=True))
    if names.isna().any():
        yield SINGLE, results.only(results.runs[names.isna()].reset_index(drop=True))


def titled(name: str) -> str:
    """Title of a sweep's table."""
    return "Single runs" if name == SINGLE else f"Sweep {name}"


def warn(results: Results) -> None:
    """Say loudly what was left out."""
    for reason in results.unreadable:
        print(f"dptune: LEFT OUT {plain(reason)}", file=sys.stderr)


def claims(arguments: Sequence[str]) -> None:
    """Print what the records say of each claim, and write it as CSV, LaTeX and HTML."""
    require("report", "dptune claims")
    from dptune.report.claims import claims as examined
    from dptune.report.claims import claims_table

    request = Request.of(arguments)
    results = everything(request)
    found = examined(results)
    for claim in found:
        print(f"{claim.number}. {claim.text}: {claim.verdict.upper()}\n   {claim.reason}")
        if claim.contrast is not None:
            p = "" if claim.p is None else f", p = {claim.p:.3g} after Holm"
            print(f"   {claim.contrast.effect.n} seeds, {len(claim.contrast.run_ids)} runs{p}")
        if claim.decide:
            print(f"   To decide: {claim.decide}")
    made = claims_table(found)
    print("\n".join(["", *made.notes]))
    write([made], request.to)
    print(f"Effects, intervals and the runs behind them: {request.to / 'claims.csv'}")


def figures(arguments: Sequence[str]) -> None:
    """Write every figure of each sweep as SVG and PNG."""
    require("report", "dptune figures")
    from dptune.report.figures import all_figures
    from dptune.report.figures import write as save

    request = Request.of(arguments)
    for name, results in selected(request):
        folder = request.to / "figures" / file_name(name)
        print(f"{titled(name)}: {len(save(all_figures(results), folder)) // 2} figures in {folder}")


def report(arguments: Sequence[str]) -> None:
    """Write the page, with the figures and tables of each sweep beside it."""
    require("report", "dptune report")
    from dptune.report.page import write as save

    request = Request.of(arguments)
    whole = everything(request)
    sections = [(name, titled(name), results, all_tables(name, results)) for name, results in by_sweep(whole)]
    print(save(sections, whole, request.to / "report.html"))

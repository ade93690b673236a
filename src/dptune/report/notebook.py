"""What the notebooks of `analysis/` call: find records, choose runs, show tables, figures and claims."""

from __future__ import annotations

import os
from collections import Counter
from pathlib import Path
from typing import Any

import altair as alt
from great_tables import GT

from dptune.report.claims import claims, claims_table
from dptune.report.figures import FIGURES
from dptune.report.render import great
from dptune.report.results import HOW_TO_MAKE_SOME, Results, load_results
from dptune.report.settings import SEED, codes
from dptune.report.tables import Table

CONDITIONS = ("hyperparameter", "environment", "data_sensitivity")
"""Groups of the config that sweeps vary as conditions."""

alt.renderers.enable("svg")  # Static: the other renderers load their code from the network.


def results(folder: str | Path | None = None) -> Results:
    """The records to look at: `folder`, else `$DPTUNE_RECORDS`, else `outputs/`, else the sample that comes along.

    Raises:
        FileNotFoundError: saying how to make records, when there are none.
    """
    here = next((path for path in (Path.cwd(), *Path.cwd().parents) if (path / "analysis").is_dir()), Path.cwd())
    named = folder or os.environ.get("DPTUNE_RECORDS")
    for root in [Path(named)] if named else [here / "outputs", here / "analysis" / "sample"]:
        found = load_results(root)
        for reason in found.unreadable:
            print(f"LEFT OUT {reason}")
        if len(found.runs):
            sample = (
                ", the SAMPLE: real but very short runs, too short to conclude anything"
                if root.name == "sample"
                else ""
            )
            print(f"{len(found.done)} finished runs of {len(found.runs)} records in {root.name}/{sample}")
            return found
    raise FileNotFoundError(HOW_TO_MAKE_SOME.format(root=named or here / "outputs"))


def varying(found: Results, group: str | None) -> Results:
    """The runs that are at the usual value of every condition but those of one group of the config.

    Usual is what most runs have. None: at the usual value of every condition.
    """
    keep = [True] * len(found.runs)
    for other in CONDITIONS:
        names = [str(name) for name in found.runs if str(name).startswith(f"config.{other}.") and name != SEED]
        if other == group or not names:
            continue
        keys = list(zip(*codes(found.runs, names).values(), strict=True))
        # Methods may be tuned apart: the usual setting is each method's own.
        methods = list(zip(*codes(found.runs, ["config.adapter.name", "config.privacy.name"]).values(), strict=True))
        usual = {
            method: Counter(key for key, its in zip(keys, methods, strict=True) if its == method).most_common(1)[0][0]
            for method in set(methods)
        }
        keep = [kept and key == usual[its] for kept, key, its in zip(keep, keys, methods, strict=True)]
    return found.only(found.runs[keep].reset_index(drop=True))


def show(table: Table | None) -> GT | str:
    """A table."""
    return "One method only: nothing to compare." if table is None else great(table)


def draw(name: str, found: Results) -> Any:
    """A figure by its name in `figures.FIGURES`."""
    return FIGURES[name](found) or f"These runs do not hold what the figure “{name}” shows."


def verdicts(found: Results, *numbers: int) -> GT:
    """What the records say of some claims; p-values are corrected for all that can be tested."""
    return great(claims_table([claim for claim in claims(found) if claim.number in numbers]))

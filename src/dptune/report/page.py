"""One self-contained HTML page: the answer, the claims, the tables, the figures, every run, and how to make it again.

The page asks the network for nothing, which its content security policy also forbids. Figures are drawn by Vega, whose
code is inlined from vl-convert, when they come into view; a run's section is built when it is opened, so that a page of
a thousand runs opens at once.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping, Sequence
from html import escape
from importlib.resources import files
from pathlib import Path
from typing import Any

from dptune.privacy.guarantee import Guarantee, epsilon_text, rounded_up
from dptune.records.files import write_atomically
from dptune.report.claims import Claim, claims
from dptune.report.composition import compositions
from dptune.report.figures import all_figures, thinned
from dptune.report.results import Results, history
from dptune.report.settings import SEED, Setting, codes, plain, settings_of
from dptune.report.tables import ACCURACY, SECONDS, Cell, Table, estimate, in_words

HISTORY_POINTS = 40
"""Steps of a run's history that are shown."""
MOST_HISTORIES = 1500
"""Above this many runs their histories stay in their folders."""


def write(sections: Sequence[tuple[str, str, Results, Sequence[Table]]], whole: Results, path: Path) -> Path:
    """Write the page.

    Args:
        sections: name, title, runs and tables of each sweep.
        whole: all runs.
        path: file to write.
    """
    return write_atomically(path, page(sections, whole))


def page(sections: Sequence[tuple[str, str, Results, Sequence[Table]]], whole: Results) -> str:
    """The page as text; arguments as for `write`."""
    figures: dict[str, Any] = {}
    body = [answer(whole), left_out(whole), claim_section(claims(whole))]
    for name, title, results, tables in sections:
        charts = all_figures(results)
        for key, chart in charts.items():
            spec = chart.to_dict()
            spec["description"] = _title(spec)
            figures[f"{name}/{key}"] = spec
        body.append(sweep_section(name, title, tables, {key: _title(chart.to_dict()) for key, chart in charts.items()}))
    runs, common = run_details(whole)
    body += [run_section(whole), how_to(whole)]
    content = json.dumps({"figures": figures, "runs": runs, "common": common}, allow_nan=False, separators=(",", ":"))
    links = [("answer", "Answer"), ("claims", "Claims")]
    links += [(f"sweep-{name}", title) for name, title, _, _ in sections] + [("runs", "Runs"), ("how", "Make it again")]
    navigation = "".join(f'<li><a href="#{key}">{escape(text)}</a></li>' for key, text in links)
    own = files("dptune.report")
    style, script = (own.joinpath(name).read_text(encoding="utf-8") for name in ("page.css", "page.js"))
    return f"""<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta http-equiv="Content-Security-Policy" content="{POLICY}">
<title>dptune: results</title>
<link rel="icon" href="data:,">
<style>{style}</style>
</head>
<body>
<header>
<h1>dptune: results</h1>
<p class="note">{escape(counted(whole))}</p>
<nav aria-label="Sections"><ul>{navigation}</ul></nav>
</header>
<main>
<noscript><p class="loud">Sorting, figures and sections of single runs need JavaScript; tables do not.</p></noscript>
{"".join(body)}
</main>
<footer><p class="note">Made from records by <code>dptune report</code>.</p></footer>
<script type="application/json" id="content">{content.replace("<", chr(92) + "u003c")}</script>
<script type="module">{vega().replace("</script", "<" + chr(92) + "/script")}</script>
<script type="module">{script}</script>
</body>
</html>
"""


POLICY = (
    "default-src 'none'; script-src 'unsafe-inline' 'unsafe-eval'; style-src 'unsafe-inline'; img-src data:; "
    "base-uri 'none'; form-action 'none'"
)


def vega() -> str:
    """Vega, Vega-Lite and Vega-Embed as one script."""
    import vl_convert

    script: str = vl_convert.javascript_bundle()
    return script


def answer(results: Results) -> str:
    """What a reader came for: which method, at which epsilon, at what cost."""
    return f'<section id="answer" class="answer"><h2>The answer</h2>{_paragraphs(answers(results))}</section>'


def answers(results: Results) -> list[str]:
    """The answer in sentences, on the data that most runs were made on."""
    settings = [item for item in results.settings if item.done]
    if not settings:
        return ["No run is finished yet."]
    sizes: dict[Any, int] = {}
    for item in settings:
        key = (item.value("provenance.data"), item.value("provenance.backbone"))
        sizes[key] = sizes.get(key, 0) + len(item.done)
    chosen = max(sizes, key=lambda key: sizes[key])
    here = [item for item in settings if (item.value("provenance.data"), item.value("provenance.backbone")) == chosen]
    texts = [claim.text + f": {claim.verdict}. {claim.reason}" for claim in claims(results)[:1]]
    by_target: dict[tuple[float, float, str], list[Setting]] = {}
    for item in here:
        if item.private and item.target is not None:
            by_target.setdefault((item.target, item.value("privacy.delta"), item.value("privacy.unit")), []).append(
                item
            )
    for (target, delta, unit), members in sorted(by_target.items()):
        known = [(found, item) for item in members if (found := _accuracy(results, item)) is not None]
        found, best = max(known, key=lambda pair: pair[0].mean)
        cost = estimate(best, SECONDS) if best.value("privacy.stand_in") else None
        text = (
            f"At ε ≤ {target:g} (δ = {delta:g}, unit {unit}) the highest mean accuracy is {in_words(found, 3).text}, "
            f"by {best.arm} ({best.label})"
        )
        trained = best.value("parameters.trainable")
        text += f", with {trained:,.0f} trained parameters" if trained else ""
        text += f", in {cost.mean:.0f} s a run" if cost else ""
        text += (
            f"; the best of {len(members)} settings on the test split, so a little flattered." if members[1:] else "."
        )
        texts.append(text)
    for item in here:
        # A search, or runs that were begun again: what they spent is not what one of them aimed at.
        if item.private and item.target is None and (item.of_search or item.asked) and item.epsilon is not None:
            found = _accuracy(results, item)
            what = "the best run of a search" if item.of_search else item.arm
            said = "unknown" if found is None else in_words(found, 3).text
            texts.append(f"At ε = {epsilon_text(item.epsilon)} the accuracy of {what} ({item.label}) is {said}.")
    floors = {value for item in here for value in item.values("zero_shot.accuracy") if value is not None}
    ceilings = [found.mean for item in here if not item.private and (found := _accuracy(results, item))]
    if len(floors) == 1:
        ceiling = f", and without privacy {max(ceilings):.3f}" if ceilings else ""
        texts.append(f"Before training the accuracy is {floors.pop():.3f}{ceiling}.")
    if len(sizes) > 1:
        texts.append(
            f"These are accuracies on the data and backbone of most runs; {len(sizes) - 1} more are in the tables."
        )
    return texts + [item.text for item in compositions(results.runs)]


def left_out(results: Results) -> str:
    """Records that could not be read, loudly."""
    if not results.unreadable:
        return ""
    items = "".join(f"<li>{escape(reason)}</li>" for reason in results.unreadable)
    return f'<section class="loud" id="left-out"><h2>Left out</h2><ul>{items}</ul></section>'


def claim_section(found: Sequence[Claim]) -> str:
    """The claims, each with its verdict and the runs behind it."""
    parts = []
    for claim in found:
        kind = claim.verdict.replace(" ", "-")
        lines = [claim.how, claim.reason]
        if claim.contrast is not None:
            corrected = "" if claim.p is None else f", p = {claim.p:.3g} after Holm's correction"
            lines.append(f"{claim.contrast.effect.n} seeds, {len(claim.contrast.run_ids)} runs{corrected}.")
        if claim.decide:
            lines.append(f"To decide it: {claim.decide}.")
        runs = "" if claim.contrast is None else _runs("Runs", claim.contrast.run_ids)
        head = f'{claim.number}. {escape(claim.text)}: <span class="verdict {kind}">{claim.verdict}</span>'
        parts.append(f'<div class="claim"><h3>{head}</h3>{_paragraphs(lines)}{runs}</div>')
    note = (
        "The claims of arXiv:2512.06711 as its abstract states them, tested on these records; the paper's own numbers "
        "are not available and none is shown. An interval is for its claim alone; p-values, and with them verdicts, "
        "are corrected for testing all claims."
    )
    return f'<section id="claims"><h2>Claims</h2><p class="note">{note}</p>{"".join(parts)}</section>'


def sweep_section(name: str, title: str, tables: Sequence[Table], figures: Mapping[str, str]) -> str:
    """Tables and figures of one sweep."""
    first, *others = tables
    parts = [table_html(first)]
    for table in others:
        parts.append(f"<details><summary>{escape(table.title)}</summary>{table_html(table)}</details>")
    if figures:
        plots = "".join(
            f'<figure tabindex="0" aria-label="{escape(text)}" class="{_width(key)}">'
            f'<div class="plot" data-figure="{escape(name)}/{key}"></div>'
            f"<figcaption>{escape(READING[key])}</figcaption></figure>"
            for key, text in figures.items()
        )
        parts.append(f'<h3>Figures</h3><div class="figures">{plots}</div>')
    return f'<section id="sweep-{escape(name)}"><h2>{escape(title)}</h2>{"".join(parts)}</section>'


def table_html(table: Table) -> str:
    """A table that can be sorted and filtered, with its notes."""
    key = escape(f"table-{table.name}")
    head = "".join(
        f'<th scope="col"><button type="button">{escape(column.head)}</button></th>' for column in table.columns
    )
    rows = "".join(
        f"<tr>{''.join(_cell(row.get(column.key), column.key) for column in table.columns)}</tr>" for row in table.rows
    )
    label = (
        f'<label for="{key}-filter">Filter rows</label> <input id="{key}-filter" data-filters="{key}" type="search">'
    )
    count = f'<span id="{key}-count" class="note" role="status">{len(table.rows)} rows</span>'
    notes = "".join(f'<p class="note">{escape(note)}</p>' for note in table.notes)
    return (
        f'<p>{label} {count}</p><div class="wide" tabindex="0" role="region" aria-label="{escape(table.title)}">'
        f'<table class="sortable" id="{key}"><caption>{escape(table.title)}</caption><thead><tr>{head}</tr></thead>'
        f"<tbody>{rows}</tbody></table></div>{notes}"
    )


def run_section(results: Results) -> str:
    """Where a run's own section appears, and what to do about it."""
    text = (
        f"{len(results.runs)} runs. Choose one in a table “every run” above or in a claim: its config, guarantee, "
        "history and provenance appear here."
    )
    place = '<div id="run" role="region" aria-label="Chosen run"></div>'
    return f'<section id="runs"><h2>Runs</h2><p class="note">{text}</p>{place}</section>'


def run_details(results: Results) -> tuple[dict[str, Any], dict[str, Any]]:
    """What is shown of each run, by its id; and the config that all of them share."""
    runs = results.runs
    columns = {str(name): plain(runs[name]) for name in runs.columns}
    names = [name for name in columns if name.startswith("config.") and not name.startswith("config.compute.")]
    coded = codes(runs, names)
    common = {name.removeprefix("config."): columns[name][0] for name in names if len(set(coded[name])) == 1}
    varied = [name for name in names if len(set(coded[name])) > 1]
    found = {}
    for setting in settings_of(runs):
        for row in setting.rows:
            run_id = str(columns["run_id"][row])
            found[run_id] = {
                "setting": f"{setting.arm}: {setting.label}, seed {columns[SEED][row] if SEED in columns else '?'}",
                "state": columns["state"][row] + (f": {columns['error'][row]}" if columns["error"][row] else ""),
                "statement": statement(columns, row),
                "results": _part(columns, row, RESULTS),
                "config": {name.removeprefix("config."): columns[name][row] for name in varied},
                "provenance": _part(columns, row, [n for n in columns if n.startswith("provenance.")]),
                "history": _history(results, columns, row) if len(runs) <= MOST_HISTORIES else [],
            }
    return _finite(found), _finite(common)


SPREADING = ("sensitivity", "tasks", "noise_allocation", "cost")
"""Figures that need the whole width."""
READING = {
    "privacy_utility": "Higher and further left is better. Bars are 95 % intervals; a line joins settings that differ "
    "in ε only.",
    "parameters": "Higher and further left is better. Bars are 95 % intervals.",
    "pareto": "No setting is both more accurate and more private than one on the dashed line.",
    "sensitivity": "A flat curve is an insensitive method. Only the named dimension changes along a curve.",
    "tasks": "One row a setting, one column a task; an even row is an even method.",
    "stability": "One mark a setting; a short bar is a stable method.",
    "noise_allocation": "Rows of one colour get the same noise; what changes along a row is what adaptation does.",
    "training": "Losses are not paid for: shown because the data is public.",
    "cost": "Mean of the runs of a setting, with 95 % intervals.",
}
"""How to read each figure."""
RESULTS = (
    "metrics.accuracy",
    "metrics.worst_task",
    "metrics.worst",
    "metrics.spread_over_tasks",
    "metrics.accuracy_unseen",
    "metrics.response_perplexity",
    "metrics.bleu",
    "metrics.rouge_l",
    "zero_shot.accuracy",
    "parameters.trainable",
    "parameters.total",
)


def statement(columns: Mapping[str, Sequence[Any]], row: int) -> list[str]:
    """What a run guarantees, in plain words."""
    guarantee: Guarantee | None = columns["guarantee"][row] if "guarantee" in columns else None
    if guarantee is None:
        return ["This run was not begun: nothing of it was released."]
    texts = guarantee.sentences()
    if guarantee.private and guarantee.not_covered and guarantee.epsilon is not None:
        texts.append(f"It does not cover: {'; '.join(guarantee.not_covered)}.")
    words = [
        f"{name} {epsilon_text(value)} ({found.get('kind')})"
        for name, found in guarantee.accountants.items()
        if name != guarantee.accountant and isinstance(value := found.get("value"), int | float)
    ]
    if words:
        texts.append("The same by other accountants: " + ", ".join(words) + ". An estimate is no guarantee.")
    judged = columns["metrics.n"][row] if "metrics.n" in columns and not guarantee.stand_in else None
    if judged is not None:
        texts.append(f"There is no guarantee for the {judged:,.0f} records of the test split: its metrics are exact.")
    return texts


def how_to(results: Results) -> str:
    """Commands that make the numbers and this page again."""
    sweeps = sorted(results.runs["sweep"].dropna().unique()) if "sweep" in results.runs else []
    root = results.root.as_posix()
    where, records = ("", "") if root == "outputs" else (f" ARGS=compute.output_root={root}", f" RECORDS={root}")
    lines = [f"make sweep SWEEP={name}{where}" for name in sweeps]
    lines.append(f"make report{records}    # this page, from the records")
    commits = sorted(results.done["provenance.git"].dropna().unique()) if "provenance.git" in results.done else []
    note = f"The code was at {', '.join(str(commit)[:12] for commit in commits)}." if commits else ""
    return (
        '<section id="how"><h2>Make it again</h2><p>Runs that are finished are skipped; a run in reproducible noise '
        "mode gives the same numbers again on the same versions.</p>"
        f'<pre tabindex="0">{escape(chr(10).join(lines))}</pre>'
        f'<p class="note">{escape(note)}</p></section>'
    )


def counted(results: Results) -> str:
    """How many runs there are, in a sentence."""
    states = results.runs["state"].value_counts()
    words = ", ".join(f"{count} {state}" for state, count in states.items())
    return f"{len(results.runs)} records: {words}; {len(results.unreadable)} left out."


def _accuracy(results: Results, setting: Setting) -> Any:
    return estimate(setting, ACCURACY, results.test_items(setting.run_ids))


def _cell(cell: Cell | None, key: str) -> str:
    if cell is None:
        return "<td>–</td>"
    value = "" if cell.value is None else f' data-value="{cell.value:.6g}"'
    if key == "run" and cell.run_ids:
        return f'<td><a href="#run-{escape(cell.run_ids[0])}">{escape(cell.text)}</a></td>'
    title = f' title="runs: {escape(" ".join(cell.run_ids))}"' if cell.run_ids and key == "accuracy" else ""
    return f"<td{value}{title}>{escape(cell.text)}</td>"


def _runs(title: str, run_ids: Sequence[str]) -> str:
    links = " ".join(f'<a href="#run-{escape(run_id)}">{escape(run_id)}</a>' for run_id in run_ids)
    return f"<details><summary>{title}</summary><p>{links}</p></details>"


def _paragraphs(texts: Iterable[str]) -> str:
    return "".join(f"<p>{escape(text)}</p>" for text in texts if text)


def _part(columns: Mapping[str, Sequence[Any]], row: int, names: Iterable[str]) -> dict[str, Any]:
    found = {
        name.removeprefix("metrics.").removeprefix("provenance."): columns[name][row]
        for name in names
        if name in columns
    }
    return {
        key: round(value, 4) if isinstance(value, float) else value for key, value in found.items() if value is not None
    }


def _history(results: Results, columns: Mapping[str, Sequence[Any]], row: int) -> list[dict[str, Any]]:
    """Steps of a run; what is not paid for only where the data is public."""
    public = bool(columns.get("privacy.stand_in", [False] * (row + 1))[row])
    names = {
        "step": "step",
        "learning_rate": "learning_rate",
        "epsilon": "epsilon",
        "noise_multiplier": "noise_multiplier",
    }
    names |= {"NON_PRIVATE/loss": "loss"} if public else {}
    rows = history(results.root / str(columns["run_id"][row]))
    guarantee: Guarantee | None = columns["guarantee"][row]
    spent = [value for step in rows if isinstance(value := step.get("epsilon"), int | float)]
    if guarantee is None or not spent or rounded_up(max(spent)) != guarantee.shown:
        del names["epsilon"]  # It is not the way to what the run guarantees: of a search, of several attempts.
    marked = [at for at, step in enumerate(rows) if step.get("epsilon") is not None]
    kept = thinned(rows, HISTORY_POINTS) if len(rows) > HISTORY_POINTS else rows
    kept = [*kept, *(rows[at] for at in marked if rows[at] not in kept)]
    kept.sort(key=lambda step: int(str(step["step"])))
    return [
        {
            short: rounded_up(value) if name == "epsilon" else float(f"{value:.4g}")
            for name, short in names.items()
            if isinstance(value := step.get(name), int | float)
        }
        for step in kept
    ]


def _width(figure: str) -> str:
    return "spread" if figure in SPREADING else "half"


def _title(spec: Mapping[str, Any]) -> str:
    return str(spec.get("title", "figure"))


def _finite(value: Any) -> Any:
    if isinstance(value, dict):
        return {str(key): _finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value

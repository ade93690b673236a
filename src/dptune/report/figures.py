"""Figures of results: Altair charts, written as SVG and PNG without a browser.

Each figure is a function of results that returns a chart, or None when the runs do not hold what it shows. Accuracies
are drawn from 0 to 1, so that nothing looks larger than it is; methods differ in colour (Okabe and Ito's, which people
with colour blindness can tell apart), in shape and in dash, so that prints in grey can be read too.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeAlias

import altair as alt
import pandas as pd

from dptune.report.intervals import Estimate
from dptune.report.results import Results, history
from dptune.report.settings import TARGET, Setting
from dptune.report.tables import ACCURACY, MEMORY, SECONDS, estimate

COLOURS = ["#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000", "#8C8C00"]
SHAPES = ["circle", "square", "triangle-up", "diamond", "cross", "triangle-down", "triangle-right", "triangle-left"]
DASHES = [[1, 0], [4, 2], [2, 1], [1, 1], [1, 2, 4, 2], [6, 2], [8, 2, 2, 2], [3, 3]]
SHARE = alt.Scale(domain=[0, 1])
WIDTH, HEIGHT = 420, 280
Chart: TypeAlias = Any
"""Some Altair chart: its kinds have no common type that has the methods used here."""


def privacy_utility(results: Results) -> Chart | None:
    """Accuracy by the epsilon spent, one line a method, between the floor and the ceiling."""
    rows = [row for row in points(results) if row["epsilon"]]
    if not rows:
        return None
    data = pd.DataFrame(rows)
    x = alt.X("epsilon:Q", title="ε spent (log scale)", scale=alt.Scale(type="log", nice=False, padding=20))
    layers = [*levels(results), intervals(data, x), dots(results, data, x)]
    settings = [item for item in results.settings if item.done and item.private]
    if family := _alone(results, settings, "config.privacy.target_epsilon"):
        # A line joins settings that differ in epsilon only; different settings are never averaged.
        layers.append(lines(results, pd.DataFrame(family), x))
    return finished(alt.layer(*layers), "Accuracy by privacy budget")


def by_parameters(results: Results) -> Chart | None:
    """Accuracy by the number of trainable parameters."""
    rows = [row for row in points(results) if row["trainable"]]
    if not rows:
        return None
    data = pd.DataFrame(rows)
    x = alt.X(
        "trainable:Q", title="trainable parameters (log scale)", scale=alt.Scale(type="log", nice=False, padding=20)
    )
    return finished(
        alt.layer(*levels(results), intervals(data, x), dots(results, data, x)), "Accuracy by trainable parameters"
    )


def pareto(results: Results) -> Chart | None:
    """Which settings no other beats in both accuracy and epsilon."""
    rows = sorted(
        (row for row in points(results) if row["epsilon"]), key=lambda row: (row["epsilon"], -row["accuracy"])
    )
    if len(rows) < 2:
        return None
    best, front = -1.0, []
    for row in rows:
        row["front"] = "on the front" if row["accuracy"] > best else "beaten"
        if row["accuracy"] > best:
            best = row["accuracy"]
            front.append(row)
    x = alt.X("epsilon:Q", title="ε spent (log scale)", scale=alt.Scale(type="log", nice=False, padding=20))
    y = alt.Y("accuracy:Q", title="accuracy (share of 1)", scale=SHARE)
    step = alt.Chart(pd.DataFrame(front)).mark_line(interpolate="step-after", color="#555555", strokeDash=[4, 3])
    data = pd.DataFrame(rows)
    marks = (
        alt.Chart(data)
        .mark_point(size=80, strokeWidth=2.5)
        .encode(
            x,
            y,
            colour(results, data),
            shape(results, data),
            opacity=alt.Opacity("front:O", title=None, scale=FRONT),
            tooltip=TOOLTIP,
        )
    )
    return finished(alt.layer(step.encode(x, y), marks), "Pareto front of accuracy and ε")


def sensitivity(results: Results) -> Chart | None:
    """Accuracy by each dimension that was varied alone around the same other settings."""
    settings = [item for item in results.settings if item.done and item.private]
    rows = [row for name in _numeric(settings) for row in _alone(results, settings, name)]
    if not rows:
        return None
    data = pd.DataFrame(rows)
    charts = []
    for name in data["dimension"].unique():
        part = data[data["dimension"] == name]
        log = bool((part["value"] > 0).all() and part["value"].max() >= 8 * part["value"].min())
        title = f"{name}{UNITS.get(name, '')}{' (log scale)' if log else ''}"
        scale = alt.Scale(type="log", nice=False, padding=15) if log else alt.Scale(zero=False, padding=15)
        x = alt.X(
            "value:Q", title=title, scale=scale, axis=alt.Axis(values=sorted(part["value"].unique()), format=".6~g")
        )
        layer = alt.layer(intervals(part, x), lines(results, part, x), dots(results, part, x)).properties(
            width=220, height=200
        )
        charts.append(layer.properties(width=220, height=200))
    rowed = [alt.hconcat(*charts[at : at + 3]) for at in range(0, len(charts), 3)]
    return finished(alt.vconcat(*rowed), "Sensitivity of accuracy, one dimension at a time")


def tasks(results: Results) -> Chart | None:
    """Accuracy of each task by setting."""
    settings = [item for item in results.settings if item.done]
    names = [str(name) for name in results.runs.columns if str(name).startswith("metrics.accuracy_by_task.")]
    rows = []
    for at, setting in enumerate(settings[:MOST_ROWS], 1):
        for name in names:
            values = [value for value in setting.values(name) if value is not None]
            if values:
                mean = sum(values) / len(values)
                task = name.rpartition(".")[2]
                rows.append(
                    {"setting": f"{at}. {short(setting.label)}", "task": task, "accuracy": mean, "n": len(values)}
                )
    if not rows:
        return None
    base = alt.Chart(pd.DataFrame(rows)).encode(
        alt.X("task:N", title="task", axis=alt.Axis(labelAngle=-40)),
        alt.Y("setting:N", title=None, sort=None, axis=alt.Axis(labelLimit=320)),
    )
    cells = base.mark_rect().encode(
        alt.Color("accuracy:Q", title="accuracy", scale=alt.Scale(domain=[0, 1], scheme="viridis")),
        tooltip=["setting", "task", alt.Tooltip("accuracy:Q", format=".3f"), "n"],
    )
    dark = alt.condition("datum.accuracy > 0.6", alt.value("black"), alt.value("white"))
    text = base.mark_text(fontSize=11).encode(alt.Text("accuracy:Q", format=".2f"), color=dark)
    sized = alt.layer(cells, text).properties(width=46 * len(names), height=alt.Step(24))
    return finished(sized, f"Accuracy by task{_cut(settings)}")


def stability(results: Results) -> Chart | None:
    """How far accuracy spreads over conditions, by method: one dot a setting, the bar from worst to best."""
    rows = [row for row in points(results) if row["epsilon"]]
    if len({row["setting"] for row in rows}) < 2:
        return None
    data = pd.DataFrame(rows)
    data["strip"] = data["method"] + ", ε ≤ " + data["target"]
    y = alt.Y("strip:N", title=None, axis=alt.Axis(labelLimit=260))
    title = "accuracy (share of 1) of each setting, and its range"
    x = alt.X("accuracy:Q", title=title, scale=SHARE)
    bar = (
        alt.Chart(data)
        .mark_rule(strokeWidth=6, opacity=0.5, color="#BBBBBB")
        .encode(alt.X("min(accuracy):Q", title=title, scale=SHARE), alt.X2("max(accuracy):Q"), y)
    )
    tick = (
        alt.Chart(data)
        .mark_point(size=60, strokeWidth=2.5, opacity=1)
        .encode(x, y, colour(results, data), shape(results, data), tooltip=TOOLTIP)
    )
    return finished(alt.layer(bar, tick).properties(width=WIDTH, height=alt.Step(34)), "Stability over settings")


def noise_allocation(results: Results) -> Chart | None:
    """Which groups of parameters get how much noise in each step, in one run whose noise is not uniform."""
    for run_id, rows in histories(results):
        groups = [key for key in rows[0] if key.startswith("noise_std/")]
        if len(groups) < 2 or not _uneven(rows, groups):
            continue
        names = {key: f"{at:02d} {_group(key)}" for at, key in enumerate(groups)}
        data = [
            {"step": row["step"], "group": names[key], "noise": float(row[key])}  # type: ignore[arg-type]
            for row in thinned(rows, 60)
            for key in groups
            if row.get(key)
        ]
        chart = (
            alt.Chart(pd.DataFrame(data))
            .mark_rect()
            .encode(
                alt.X("step:O", title="step", axis=alt.Axis(labelOverlap=True)),
                alt.Y("group:N", title="group of parameters", axis=alt.Axis(labelLimit=260, labelFontSize=9)),
                alt.Color(
                    "noise:Q",
                    title=["noise, standard deviation", "of the averaged gradient"],
                    scale=alt.Scale(scheme="viridis"),
                ),
                tooltip=["group", "step", alt.Tooltip("noise:Q", format=".3g")],
            )
        )
        sized = chart.properties(width=WIDTH, height=alt.Step(11))
        return finished(sized, f"Noise over groups and steps, run {run_id}")
    return None


def training(results: Results) -> Chart | None:
    """Training loss of each method by step: public data only, because losses are not paid for."""
    rows = []
    for run_id, steps in histories(results):
        run = results.done[results.done["run_id"] == run_id].iloc[0]
        if not bool(run.get("privacy.stand_in")):
            continue
        setting = next(item for item in results.settings if run_id in item.run_ids)
        for step in thinned(steps, 60):
            if (loss := step.get("NON_PRIVATE/loss")) is not None:
                rows.append({"step": step["step"], "loss": loss, "method": _method(setting), "run": run_id})
    if not rows:
        return None
    data = pd.DataFrame(rows)
    chart = (
        alt.Chart(data)
        .mark_line(opacity=0.8)
        .encode(
            alt.X("step:Q", title="step"),
            alt.Y("loss:Q", title="training loss, nats a response (not private)", scale=alt.Scale(zero=True)),
            colour(results, data),
            dash(results, data),
            detail="run:N",
            tooltip=["run", "method", "step", alt.Tooltip("loss:Q", format=".3f")],
        )
    )
    return finished(chart.properties(width=WIDTH, height=HEIGHT), "Training history of public stand-in data")


def cost(results: Results) -> Chart | None:
    """What a run of each setting costs in time and in memory."""
    rows = []
    settings = [item for item in results.settings if item.done]
    for at, setting in enumerate(settings[:MOST_ROWS], 1):
        if setting.private and not setting.value("privacy.stand_in"):
            continue
        for measure, title in ((SECONDS, "time of a run, s"), (MEMORY, "peak memory, MiB")):
            if found := estimate(setting, measure):
                label = f"{at}. {short(setting.label)}"
                rows.append({"setting": label, "what": title, "method": _method(setting), **ends(found, "value")})
    if not rows:
        return None
    data = pd.DataFrame(rows)
    charts: list[Chart] = []
    for title in data["what"].unique():
        part = data[data["what"] == title]
        y = alt.Y("setting:N", title=None, sort=None, axis=alt.Axis(labelLimit=320, labels=not charts))
        bar = (
            alt.Chart(part)
            .mark_bar()
            .encode(alt.X("value:Q", title=title), y, colour(results, data), tooltip=["setting", "value", "n"])
        )
        rule = alt.Chart(part).mark_rule(strokeWidth=1.5).encode(alt.X("low:Q"), alt.X2("high:Q"), y)
        charts.append(alt.layer(bar, rule).properties(width=240, height=alt.Step(20)))
    return finished(alt.hconcat(*charts), f"Cost of a run{_cut(settings)}")


FIGURES: Mapping[str, Callable[[Results], Chart | None]] = {
    "privacy_utility": privacy_utility,
    "parameters": by_parameters,
    "pareto": pareto,
    "sensitivity": sensitivity,
    "tasks": tasks,
    "stability": stability,
    "noise_allocation": noise_allocation,
    "training": training,
    "cost": cost,
}
"""All figures by name."""
UNITS = {
    "sequence_length": ", tokens",
    "steps": ", noisy steps",
    "expected_batch_size": ", examples",
    "target_epsilon": " ε",
}
MOST_ROWS = 40
TOOLTIP = [
    "setting",
    alt.Tooltip("accuracy:Q", format=".3f"),
    alt.Tooltip("low:Q", format=".3f", title="95 % from"),
    alt.Tooltip("high:Q", format=".3f", title="95 % to"),
    alt.Tooltip("n:Q", title="runs"),
    alt.Tooltip("epsilon:Q", format=".3f", title="ε"),
]
FRONT = alt.Scale(domain=["on the front", "beaten"], range=[1.0, 0.35])


def write(charts: Mapping[str, Chart], folder: Path) -> list[Path]:
    """Each chart as SVG and PNG."""
    folder.mkdir(parents=True, exist_ok=True)
    written = []
    for name, chart in charts.items():
        for suffix in (".svg", ".png"):
            path = folder / f"{name}{suffix}"
            chart.save(str(path), ppi=200)
            written.append(path)
    return written


def all_figures(results: Results) -> dict[str, Chart]:
    """Every figure that the results can show."""
    made = {name: figure(results) for name, figure in FIGURES.items()}
    return {name: chart for name, chart in made.items() if chart is not None}


def points(results: Results) -> list[dict[str, Any]]:
    """One point a setting: its method, budget, size and accuracy with interval."""
    rows = []
    for setting in results.settings:
        found = estimate(setting, ACCURACY, results.test_items(setting.run_ids))
        if found is None:
            continue
        rows.append(
            {
                "setting": setting.label,
                "method": _method(setting),
                "epsilon": setting.epsilon,
                "target": _target(setting),
                "trainable": setting.value("parameters.trainable"),
                **ends(found, "accuracy"),
            }
        )
    return rows


def _target(setting: Setting) -> str:
    """What a setting was asked to keep, for people."""
    if setting.of_search:
        return "search"
    return "given σ" if setting.asked is None else f"{setting.asked:g}"


def ends(found: Estimate, name: str) -> dict[str, Any]:
    """An estimate as columns; without an interval both ends are the mean."""
    low, high = (found.mean if end is None else end for end in (found.low, found.high))
    return {name: found.mean, "low": low, "high": high, "n": found.n}


def levels(results: Results) -> Iterator[Chart]:
    """Floor and ceiling as labelled horizontal lines, where there is exactly one of each."""
    done = results.done
    found = {}
    if "zero_shot.accuracy" in done and done["zero_shot.accuracy"].dropna().nunique() == 1:
        found["zero-shot (floor)"] = float(done["zero_shot.accuracy"].dropna().iloc[0])
    ceilings = [item for item in results.settings if not item.private and item.done]
    if len(ceilings) == 1 and (best := estimate(ceilings[0], ACCURACY)):
        found["non-private (ceiling)"] = best.mean
    for label, value in found.items():
        data = pd.DataFrame([{"label": f"{label} {value:.3f}", "level": value}])
        y = alt.Y("level:Q", title="accuracy (share of 1)", scale=SHARE)
        rule = alt.Chart(data).mark_rule(color="#555555", strokeDash=[2, 2]).encode(y)
        above = -7 if "ceiling" in label else 9
        text = alt.Chart(data).mark_text(align="left", dx=4, dy=above, color="#333333", fontSize=11)
        yield alt.layer(rule, text.encode(y, x=alt.value(0), text="label:N"))


def dots(results: Results, data: pd.DataFrame, x: alt.X) -> Chart:
    """One mark a setting."""
    y = alt.Y("accuracy:Q", title="accuracy (share of 1)", scale=SHARE)
    return (
        alt.Chart(data)
        .mark_point(size=70, strokeWidth=2.5, opacity=1)
        .encode(x, y, colour(results, data), shape(results, data), tooltip=TOOLTIP)
    )


def lines(results: Results, data: pd.DataFrame, x: alt.X) -> Chart:
    """A method's settings in the order of what they differ in."""
    y = alt.Y("accuracy:Q", title="accuracy (share of 1)", scale=SHARE)
    return alt.Chart(data).mark_line(color="#999999").encode(x, y, dash(results, data))


def intervals(data: pd.DataFrame, x: alt.X) -> Chart:
    """95 % intervals."""
    y = alt.Y("low:Q", title="accuracy (share of 1)", scale=SHARE)
    return alt.Chart(data).mark_rule(strokeWidth=1.5, color="#777777").encode(x, y, alt.Y2("high:Q"))


def colour(results: Results, data: pd.DataFrame) -> alt.Color:
    """Methods by colour."""
    return alt.Color("method:N", title="method", scale=_looks(results, data, COLOURS), legend=_legend())


def shape(results: Results, data: pd.DataFrame) -> alt.Shape:
    """Methods by shape."""
    return alt.Shape("method:N", title="method", scale=_looks(results, data, SHAPES), legend=_legend())


def dash(results: Results, data: pd.DataFrame) -> alt.StrokeDash:
    """Methods by dash."""
    return alt.StrokeDash("method:N", title="method", scale=_looks(results, data, DASHES), legend=_legend())


def _looks(results: Results, data: pd.DataFrame, looks: Sequence[Any]) -> alt.Scale:
    """A method looks the same in every figure, whichever other methods a figure shows."""
    every = sorted({item.arm for item in results.settings})
    shown = sorted(data["method"].unique())
    return alt.Scale(domain=shown, range=[looks[every.index(name) % len(looks)] for name in shown])


def _legend() -> alt.Legend:
    """One legend for colour, shape and dash: Vega merges those that are equal."""
    return alt.Legend(labelLimit=240)


def finished(chart: Chart, title: str) -> Chart:
    """Title, fonts and size that suit print."""
    if isinstance(chart, alt.LayerChart) and chart.width is alt.Undefined:
        chart = chart.properties(width=WIDTH, height=HEIGHT)
    return (
        chart.properties(title=title, background="white")
        .configure_axis(labelFontSize=12, titleFontSize=13, gridColor="#E5E5E5")
        .configure_legend(labelFontSize=12, titleFontSize=12, symbolSize=90)
        .configure_title(fontSize=14, anchor="start")
        .configure_view(stroke="#999999")
    )


def histories(results: Results) -> Iterator[tuple[str, list[dict[str, object]]]]:
    """Run ids with their histories: one finished run a setting, eight at most, the methods in turn."""
    by_method: dict[str, list[Setting]] = {}
    for item in results.settings:
        if item.done:
            by_method.setdefault(item.arm, []).append(item)
    turns = (item for round in itertools.zip_longest(*by_method.values()) for item in round if item is not None)
    for setting in itertools.islice(turns, 8):
        if rows := history(results.root / setting.run_ids[0]):
            yield setting.run_ids[0], rows


def thinned(rows: Sequence[dict[str, object]], most: int) -> list[dict[str, object]]:
    """At most about that many of the rows, evenly, with the last."""
    every = max(1, math.ceil(len(rows) / most))
    return [row for at, row in enumerate(rows) if at % every == 0 or at == len(rows) - 1]


def short(label: str, most: int = 48) -> str:
    """A label that fits beside a figure."""
    return label if len(label) <= most else label[: most - 1] + "…"


def _method(setting: Setting) -> str:
    return setting.arm


def _numeric(settings: Sequence[Setting]) -> list[str]:
    """Numeric columns of the config with several values."""
    names = [name for name in (settings[0].columns if settings else ()) if name.startswith(_DIMENSIONS)]
    found = []
    for name in names:
        values = {setting.value(name) for setting in settings} - {None}
        if len(values) > 1 and all(isinstance(value, int | float) and not isinstance(value, bool) for value in values):
            found.append(name)
    return found


_DIMENSIONS = (
    "config.hyperparameter.",
    "config.environment.",
    "config.data_sensitivity.",
    "config.privacy.target_epsilon",
)


def _alone(results: Results, settings: Sequence[Setting], name: str) -> list[dict[str, Any]]:
    """Points of the settings that differ in this dimension only: the largest family of each method."""
    others = [key for key in settings[0].columns if key.startswith("config.") and key not in (name, "config.sweep")]
    others = [key for key in others if len({repr(setting.value(key)) for setting in settings}) > 1]
    families: dict[tuple[str, ...], list[Setting]] = {}
    # The target of a trial is none of its search.
    for setting in (item for item in settings if not (item.of_search and name == TARGET)):
        families.setdefault(tuple(repr(setting.value(key)) for key in others), []).append(setting)
    largest: dict[str, list[Setting]] = {}
    for family in families.values():
        if len(family) > max(1, len(largest.get(family[0].arm, ()))):
            largest[family[0].arm] = family
    rows = []
    for family in largest.values():
        for setting in family:
            if found := estimate(setting, ACCURACY, results.test_items(setting.run_ids)):
                row = {
                    "setting": setting.label,
                    "method": _method(setting),
                    "epsilon": setting.epsilon,
                }
                rows.append(
                    {
                        **row,
                        "dimension": name.rpartition(".")[2],
                        "value": setting.value(name),
                        **ends(found, "accuracy"),
                    }
                )
    return rows


def _uneven(rows: Sequence[dict[str, object]], groups: Sequence[str]) -> bool:
    """Whether the groups' noise follows anything but their size: it changes between the steps."""
    first, last = rows[0], rows[-1]
    shares = [[float(row[key] or 0) for key in groups] for row in (first, last)]  # type: ignore[arg-type]
    return any(abs(a / sum(shares[0]) - b / sum(shares[1])) > 1e-6 for a, b in zip(*shares, strict=True))


def _group(key: str) -> str:
    """Name of a group without what all groups have in common."""
    name = key.removeprefix("noise_std/").replace("base_model.model.model.", "").replace(".default.weight", "")
    return name.replace("layers.", "").replace("self_attn.", "").replace("mlp.", "")


def _cut(settings: Sequence[Setting]) -> str:
    return f" (first {MOST_ROWS} of {len(settings)} settings)" if len(settings) > MOST_ROWS else ""

"""A W&B workspace and a report of what `make sync` uploads.

    python analysis/workspace.py ENTITY/PROJECT [--records outputs] [--dry-run]

Saving needs an account; `--dry-run` builds both and lists their panels without one. Every save makes a new view and a
new draft of the report.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import wandb_workspaces.reports.v2 as wr
import wandb_workspaces.workspaces as ws

from dptune.records.frame import collect
from dptune.records.mirror import TASK_TABLE, has_account
from dptune.report.upload import SWEEP_TABLE

METHOD = "JobType"
"""Runs are uploaded with their method as job type; seeds and settings of one method are summed up by it."""


ACCURACY = "metrics/accuracy"


def sections(tasks: Sequence[str] = ()) -> dict[str, list[Any]]:
    """Panels by section, in the order in which they are read.

    Args:
        tasks: names of the tasks, one panel each.
    """
    accuracy = ACCURACY
    return {
        "Privacy and utility": [
            against("privacy/epsilon", accuracy, "Accuracy by ε spent", log_x=True),
            against("privacy/noise_multiplier", accuracy, "Accuracy by noise multiplier", log_x=True),
            by_method(accuracy, "Accuracy"),
            by_method("zero_shot/accuracy", "Accuracy before training (floor)"),
            by_method("metrics/response_perplexity", "Response perplexity (lower is better)"),
        ],
        "Parameters": [
            against("parameters/trainable", accuracy, "Accuracy by trained parameters", log_x=True),
            against("parameters/trainable", "privacy/epsilon", "ε by trained parameters", log_x=True),
            by_method("parameters/fraction", "Share of parameters that is trained (lower is better)"),
        ],
        "Hyperparameters": [
            wr.ParallelCoordinatesPlot(
                title="Settings and accuracy",
                columns=[
                    column("privacy.name", "privacy"),
                    column("privacy.target_epsilon", "target ε"),
                    column("hyperparameter.learning_rate", "learning rate", log=True),
                    column("hyperparameter.max_grad_norm", "clip", log=True),
                    column("hyperparameter.rank", "rank"),
                    column("hyperparameter.steps", "steps"),
                    column("hyperparameter.expected_batch_size", "batch"),
                    wr.ParallelCoordinatesPlotColumn(wr.SummaryMetric(accuracy), display_name="accuracy"),
                ],
            ),
            wr.ParameterImportancePlot(with_respect_to=accuracy),
            by_setting("hyperparameter.learning_rate", accuracy, "Accuracy by learning rate"),
            by_setting("hyperparameter.rank", accuracy, "Accuracy by rank"),
        ],
        "Environment": [
            by_setting("environment.optimizer", accuracy, "Accuracy by optimizer"),
            by_setting("environment.precision", accuracy, "Accuracy by precision of the backbone"),
            by_setting("environment.backbone_quantization", accuracy, "Accuracy by rounding of the backbone's weights"),
            by_setting("environment.seed", accuracy, "Accuracy by seed"),
        ],
        "Data": [
            by_setting("data_sensitivity.name", accuracy, "Accuracy by condition of the data"),
            by_setting("data.train_size", accuracy, "Accuracy by number of training records"),
        ],
        "Tasks": [
            by_method("metrics/spread_over_tasks", "Spread over tasks (lower is better)"),
            *(by_method(f"tasks/{task}", f"Accuracy: {task}") for task in tasks),
            wr.WeavePanelSummaryTable(table_name=TASK_TABLE),
        ],
        "Cost (of public data only: elsewhere times tell which batches were drawn)": [
            by_method("cost/seconds", "Seconds a run (lower is better)"),
            by_method("cost/examples_per_second", "Training examples a second"),
            by_method("cost/peak_memory_mb", "Peak memory, MiB (lower is better)"),
        ],
        "History": [
            over_steps("epsilon", "ε spent"),
            over_steps("noise_multiplier", "Noise multiplier"),
            over_steps("learning_rate", "Learning rate"),
            wr.LinePlot(title="Noise by group of parameters", metric_regex="noise_std/.*", log_y=True),
        ],
        "Sweeps and runs": [wr.WeavePanelSummaryTable(table_name=SWEEP_TABLE), wr.RunComparer(diff_only="split")],
    }


def workspace(entity: str, project: str, tasks: Sequence[str] = ()) -> ws.Workspace:
    """The workspace of a user's or team's project, built without network."""
    return ws.Workspace(
        entity=entity,
        project=project,
        name="dptune",
        sections=[
            ws.Section(name=name, panels=panels, is_open=at < 3)
            for at, (name, panels) in enumerate(sections(tasks).items())
        ],
        settings=ws.WorkspaceSettings(max_runs=100),
        runset_settings=ws.RunsetSettings(
            groupby=[ws.Metric(METHOD)],
            pinned_columns=[f"summary:{name}" for name in (ACCURACY, "privacy/epsilon", "privacy/delta")],
        ),
    )


def report(entity: str, project: str, tasks: Sequence[str] = ()) -> wr.Report:
    """The same panels as a document to pass on, each section under its heading, built without network."""
    runs = wr.Runset(entity=entity, project=project, name="runs", groupby=[METHOD])
    blocks: list[Any] = [wr.P(READING), wr.TableOfContents()]
    for name, panels in sections(tasks).items():
        blocks += [wr.H2(name), wr.PanelGrid(runsets=[runs], panels=panels)]
    return wr.Report(
        entity=entity, project=project, title="dptune: privacy, accuracy and parameters", width="fluid", blocks=blocks
    )


READING = (
    "A bar or point is the mean over the runs of a method, whatever their settings: choose runs before comparing. "
    "Epsilon is an upper bound for one run and excludes the choice among runs; tables of dptune state that of all."
)


def against(x: str, y: str, title: str, log_x: bool = False) -> wr.ScatterPlot:
    """One result by another, a point a run."""
    return wr.ScatterPlot(title=title, x=wr.SummaryMetric(x), y=wr.SummaryMetric(y), log_x=log_x)


def by_method(metric: str, title: str) -> wr.BarPlot:
    """The mean of a result over the runs of each method, with its standard error."""
    return wr.BarPlot(title=title, metrics=[metric], groupby=METHOD, groupby_aggfunc="mean", groupby_rangefunc="stderr")


def by_setting(key: str, metric: str, title: str) -> wr.BarPlot:
    """The mean of a result over the runs of each value of a setting, with its standard error."""
    return wr.BarPlot(
        title=title, metrics=[metric], groupby=wr.Config(key), groupby_aggfunc="mean", groupby_rangefunc="stderr"
    )


def over_steps(key: str, title: str) -> wr.LinePlot:
    """A key of the history, the mean over the runs of each method and their range."""
    return wr.LinePlot(
        title=title, x="Step", y=[key], groupby=METHOD, groupby_aggfunc="mean", groupby_rangefunc="minmax"
    )


def column(key: str, title: str, log: bool = False) -> wr.ParallelCoordinatesPlotColumn:
    """An axis of the parallel coordinates: one setting."""
    return wr.ParallelCoordinatesPlotColumn(wr.Config(key), display_name=title, log=log)


def tasks_of(root: Path) -> list[str]:
    """Names of the tasks in the records below a folder."""
    names = {task for record in collect(root).records if record.metrics for task in record.metrics.accuracy_by_task}
    return sorted(names)


def main() -> None:
    """Build the workspace and save it."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("place", metavar="ENTITY/PROJECT")
    parser.add_argument("--records", type=Path, default=Path("outputs"), help="where the names of the tasks are read")
    parser.add_argument("--dry-run", action="store_true", help="list the panels, save nothing")
    arguments = parser.parse_args()
    entity, _, project = arguments.place.partition("/")
    if not entity or not project or "/" in project:
        parser.error(f"{arguments.place} is not ENTITY/PROJECT")
    tasks = tasks_of(arguments.records)
    made, document = workspace(entity, project, tasks), report(entity, project, tasks)
    if arguments.dry_run:
        for section in made.sections:
            titles = (getattr(panel, "title", None) or type(panel).__name__ for panel in section.panels)
            print(f"{section.name}: {'; '.join(titles)}")
        print(f"and a report of {len(document.blocks)} blocks")
    elif not has_account():
        parser.error("no W&B account is configured: set WANDB_API_KEY or run `wandb login`, or add --dry-run")
    else:
        print(made.save().url)
        print(document.save(draft=True).url)


if __name__ == "__main__":
    main()

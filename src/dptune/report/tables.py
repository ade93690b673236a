"""Tables of results: pure functions of records. No torch here."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from pathlib import Path

from dptune.privacy.accounting import rounded_up
from dptune.privacy.plan import PrivacyPlan
from dptune.privacy.selection import statement
from dptune.records import RunRecord, read
from dptune.sweep import Job

MISSING, STILL_RUNNING, FAILED = "missing", "running or stopped", "failed"


def sweep_table(name: str, jobs: Sequence[Job]) -> str:
    """The results of a sweep in Markdown: one row a setting, seeds together, the floor first and the ceiling last.

    Accuracy is shown with a 95 % interval of its mean and the number of runs behind it: by Student's t over seeds,
    or by Wilson over test examples when there is one run only.
    """
    settings: dict[tuple[str, ...], list[Job]] = {}
    for job in jobs:
        settings.setdefault(setting(job), []).append(job)
    records = {job.run_id: read(Path(job.config.compute.output_root) / job.run_id) for job in jobs}
    done = [record for record in records.values() if record is not None and record.status == "done"]
    head = ["setting", "accuracy ↑ [95 %] (n)", "unseen inputs ↑", "worst task ↑", "ε spent/target", "δ"]
    head += ["trainable (%)", "seconds"]
    lines = [f"Sweep {name}: {len(done)} of {len(jobs)} runs done", "", row(head), row(["---"] * len(head))]
    if done:
        lines.append(row(floor_row(done)))
    private = [item for item in settings.items() if item[1][0].config.privacy.enabled]
    ceiling = [item for item in settings.items() if not item[1][0].config.privacy.enabled]
    for label, members in private + ceiling:
        lines.append(row(setting_row(label, members, records)))
    return "\n".join([*lines, "", *footnotes(done)])


def setting(job: Job) -> tuple[str, ...]:
    """What sets a job apart from the reference, its seed aside."""
    return tuple(item for item in job.varied if not item.startswith("environment.seed="))


def setting_row(label: tuple[str, ...], jobs: Sequence[Job], records: dict[str, RunRecord | None]) -> list[str]:
    """One row: the runs of one setting over its seeds."""
    found = [records[job.run_id] for job in jobs]
    done = [record for record in found if record is not None and record.status == "done"]
    title = ", ".join(item.split(".", 1)[-1] for item in label) or "reference"
    if not jobs[0].config.privacy.enabled:
        title += " (ceiling)"
    states = [state(record) for record in found if record is None or record.status != "done"]
    lacking = ", ".join(f"{states.count(item)} {item}" for item in dict.fromkeys(states))
    if not done:
        return [title, lacking, *["–"] * 6]
    metrics = [record.metrics for record in done if record.metrics is not None]
    accuracy = with_interval([item.accuracy for item in metrics], metrics[0].n) + f" ({len(done)})"
    unseen = [item.accuracy_unseen for item in metrics if item.accuracy_unseen is not None]
    parameters, cost = done[0].parameters, [record.cost.seconds for record in done if record.cost is not None]
    assert parameters is not None
    return [
        title,
        accuracy + (f"; {lacking}" if lacking else ""),
        f"{statistics.fmean(unseen):.3f}" if unseen else "–",
        f"{statistics.fmean(min(item.accuracy_by_task.values()) for item in metrics):.3f}",
        *epsilon_cells(done),
        f"{parameters.trainable:,} ({100 * parameters.fraction:.2f})",
        f"{statistics.fmean(cost):.0f}",
    ]


def epsilon_cells(done: Sequence[RunRecord]) -> tuple[str, str]:
    """Epsilon spent over target, and delta, of the runs of one setting: the largest spent counts."""
    guarantees = [record.privacy for record in done if record.privacy is not None]
    spent = [item.epsilon for item in guarantees if item.epsilon is not None]
    if not spent:
        return "none", "–"
    target = guarantees[0].target_epsilon
    return f"{rounded_up(max(spent)):.3f}/{'–' if target is None else format(target, 'g')}", f"{guarantees[0].delta:g}"


def floor_row(done: Sequence[RunRecord]) -> list[str]:
    """The backbone before training."""
    zero = next(record.zero_shot for record in done if record.zero_shot is not None)
    unseen = "–" if zero.accuracy_unseen is None else f"{zero.accuracy_unseen:.3f}"
    accuracy = with_interval([zero.accuracy], zero.n) + " (1)"
    worst = f"{min(zero.accuracy_by_task.values()):.3f}"
    return ["zero-shot (floor)", accuracy, unseen, worst, "none", "–", "0 (0.00)", "–"]


def with_interval(values: Sequence[float], items: int) -> str:
    """Mean and 95 % interval: Student's t over runs, Wilson over `items` test examples for a single run."""
    mean = statistics.fmean(values)
    if len(values) == 1:
        low, high = wilson(mean, items)
    else:
        from scipy.stats import t

        half = float(t.ppf(0.975, len(values) - 1)) * statistics.stdev(values) / math.sqrt(len(values))
        low, high = max(mean - half, 0.0), min(mean + half, 1.0)
    return f"{mean:.3f} [{low:.3f}, {high:.3f}]"


def wilson(share: float, n: int, z: float = 1.959964) -> tuple[float, float]:
    """Wilson's interval for a share of `n` items (Wilson 1927)."""
    centre = (share + z * z / (2 * n)) / (1 + z * z / n)
    half = z / (1 + z * z / n) * math.sqrt(share * (1 - share) / n + z * z / (4 * n * n))
    return max(centre - half, 0.0), min(centre + half, 1.0)


def state(record: RunRecord | None) -> str:
    """Why a run has no numbers."""
    if record is None:
        return MISSING
    return FAILED if record.status == "failed" else STILL_RUNNING


def footnotes(done: Sequence[RunRecord]) -> list[str]:
    """What a reader must know to read the epsilons."""
    private = [record for record in done if record.privacy is not None and record.privacy.private]
    guarantees = [record.privacy for record in private if record.privacy is not None]
    if not guarantees:
        return []
    units = sorted({str(item.unit) for item in guarantees})
    notes = [
        f"ε: upper bound by the PLD accountant for one run, unit {', '.join(units)}. It excludes the choice among runs."
    ]
    notes += [of_all_runs(private)]
    if len(private) < len(done):
        notes.append(f"The {len(done) - len(private)} non-private runs have no ε at all.")
    if any(item.noise_mode == "reproducible" for item in guarantees):
        notes.append(
            "Noise mode reproducible: ε is accounted, not realised (anyone with the seed can subtract the noise)."
        )
    if any(item.attempts > 1 for item in guarantees):
        notes.append("Some runs were begun more than once; ε is for one transcript of each (their ledgers list all).")
    if any(item.stand_in for item in guarantees):
        notes.append("The data is a public stand-in: ε is stated as if it were private.")
    return notes


def of_all_runs(private: Sequence[RunRecord]) -> str:
    """What the private runs cost together, if they are releases of the same data (SPECIFICATION.md 8)."""
    plans = [PrivacyPlan.from_dict(record.privacy.plan) for record in private if record.privacy is not None]
    fingerprints = {record.provenance.get("data") for record in private}
    if len(fingerprints) > 1 or len({plan.unit for plan in plans}) > 1:
        return "The runs use different data or units: no ε is stated for all of them together."
    return statement(plans, "all").text


def row(cells: Sequence[str]) -> str:
    """One line of a Markdown table."""
    return "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |"

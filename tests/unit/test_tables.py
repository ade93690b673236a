import csv
import dataclasses
import io
import math
from pathlib import Path

import numpy as np
import pytest
from report.planted import PLAN, TASKS

from dptune.privacy.accounting import Event, rounded_up
from dptune.privacy.renyi import optimum, renyi_curve
from dptune.privacy.selection import Repetitions, epsilon_all, score_event
from dptune.records.code import code_version
from dptune.records.record import Cost, Metrics, Parameters, Privacy, RunRecord, guarantee_of, read
from dptune.report.commands import figures, table, tables
from dptune.report.render import great, markdown, to_csv, to_latex, write
from dptune.report.results import Results, load_results, of_sweep
from dptune.report.tables import comparison_table, cost_table, main_table, run_table, task_table
from dptune.sweeps import expand as sweep
from dptune.sweeps.expand import jobs_of_sweep as jobs_of
from dptune.sweeps.jobs import Job


def finish(job: Job, accuracy: float, root: Path, sweep: str = "smoke") -> None:
    private = job.config.privacy.enabled
    metrics = Metrics(accuracy, {"a": accuracy, "b": accuracy - 0.1}, "b", 0.05, accuracy, 1.2, 60, 60, TASKS)
    floor = dataclasses.replace(metrics, accuracy=0.2, accuracy_by_task={"a": 0.2, "b": 0.2})
    privacy = Privacy(private, "example", 8.0, 1e-5, 1.0, noise_mode="reproducible", stand_in=True, plan=PLAN.to_dict())
    record = RunRecord(
        run_id=job.run_id,
        status="done",
        config=dataclasses.asdict(job.config),
        sweep=sweep,
        metrics=metrics,
        zero_shot=floor,
        privacy=privacy if private else Privacy(False),
        parameters=Parameters(1000, 25),
        cost=Cost(3.0, 2.0, 100.0, 300.0, "cpu"),
    )
    guaranteed(record, root, epsilon=7.9 if job.config.privacy.enabled else None)


def guaranteed(record: RunRecord, root: Path, **stated: object) -> None:
    """Write a record with its guarantee, of which some fields are given."""
    record.guarantee = dataclasses.replace(guarantee_of(record, root / record.run_id), **stated)  # type: ignore[arg-type]
    record.write(root / record.run_id)


def smoke(root: Path, *overrides: str) -> list[Job]:
    return jobs_of("smoke", [f"compute.output_root={root}", *overrides])


def shown(root: Path, jobs: list[Job]) -> str:
    return markdown(main_table("smoke", of_sweep("smoke", jobs, load_results(root))))


def test_a_table_shows_means_intervals_floor_and_ceiling(tmp_path: Path) -> None:
    jobs = smoke(tmp_path)
    for job in jobs:
        finish(job, 0.8 + 0.1 * job.config.environment.seed, tmp_path)
    lines = shown(tmp_path, jobs).splitlines()
    assert lines[0] == "smoke: 4 of 4 runs done"
    assert lines[4].startswith("| – | zero-shot (floor) | 0.200 [")
    # Two seeds, 0.8 and 0.9: mean 0.85, Student's t with one degree of freedom reaches past one.
    assert "| 1 | privacy=uniform | 0.850 [0.215, 1.000] (2) |" in lines[5] and "| 7.900/8 (r,p) | 1e-05 |" in lines[5]
    assert "0.750 [0.115, 1.000] (2)" in lines[5] and "| 25 (2.50) | 3 (2) |" in lines[5]
    assert "| 2 | privacy=none (ceiling) | 0.850" in lines[6] and "| none | – |" in lines[6]
    # Two private runs on the same data together, by the accountant over both.
    together = rounded_up(epsilon_all([PLAN.events()] * 2, 1e-5))
    text = "\n".join(lines)
    assert f"releasing all 2 runs together is {together:.3f}" in text and together > PLAN.epsilon()
    assert "The 2 non-private runs have no ε at all." in text
    assert "accounted, not realised" in text and "stand-in" in text
    assert "4 runs are shown without their judged items" in text


def test_begun_transcripts_and_superseded_runs_count_in_the_epsilon_of_all(tmp_path: Path) -> None:
    jobs = [job for job in smoke(tmp_path) if job.config.privacy.enabled]
    for job in jobs:
        finish(job, 0.8, tmp_path)
    record = read(tmp_path / jobs[0].run_id)
    assert record is not None and record.privacy is not None
    record.privacy.attempts = 3
    guaranteed(record, tmp_path)
    together = rounded_up(epsilon_all([PLAN.events()] * 4, 1e-5))
    text = markdown(main_table("smoke", of_sweep("smoke", jobs[:1], load_results(tmp_path))))
    assert f"and 2 transcripts that were begun before, is {together:.3f}" in text
    assert "1 of 1 runs done, 1 superseded" in text and "privacy=uniform (superseded)" not in text.splitlines()[5]


def test_text_metrics_have_columns_where_a_run_has_them(tmp_path: Path) -> None:
    jobs = smoke(tmp_path)
    for job in jobs:
        finish(job, 0.8, tmp_path)
    assert "BLEU" not in shown(tmp_path, jobs) and "ROUGE-L" not in shown(tmp_path, jobs)
    for job in jobs:
        record = read(tmp_path / job.run_id)
        assert record is not None and record.metrics is not None and record.zero_shot is not None
        record.zero_shot.bleu = 12.34
        if job.config.privacy.enabled:
            record.metrics.bleu, record.metrics.rouge_l = 40.0 + job.config.environment.seed, 0.5
        record.write(tmp_path / job.run_id)
    head, _, floor, first, second = shown(tmp_path, jobs).splitlines()[2:7]
    assert "| BLEU ↑ | ROUGE-L ↑ |" in head and "| 12.3 |" in floor
    assert "| 40.5 [" in first and "| 0.500 (2) |" in first and "40.5" not in second


SEARCH = {
    "mean": 10,
    "eta": "inf",
    "score_is_covered": True,
    "candidates": [[vars(event) for event in PLAN.events()], [vars(score_event(1.5))]],
    "delta": 1e-5,
}


def searched(job: Job, root: Path, **changes: object) -> None:
    """Write the record of a run that a search released."""
    finish(job, 0.8, root)
    record = read(root / job.run_id)
    assert record is not None
    record.provenance["repetitions"] = {key: value for key, value in (SEARCH | changes).items() if value is not None}
    guaranteed(record, root)


def cost_of_a_search() -> np.ndarray:
    """Rényi curve of `SEARCH`, from the plan."""
    curve = np.maximum(renyi_curve(PLAN.events()), renyi_curve([Event(1.5, 1.0)]))
    return Repetitions(10.0, math.inf).renyi_curve(curve)


def test_a_run_that_a_search_released_costs_the_search(tmp_path: Path) -> None:
    (job, _) = (job for job in smoke(tmp_path) if job.config.privacy.enabled)
    searched(job, tmp_path)
    text = shown(tmp_path, [job])
    whole = rounded_up(optimum(cost_of_a_search(), 1e-5)[0])
    assert f"releasing the best of a random, secret number of runs (mean 10) is {whole:.3f} (delta = 1e-05" in text
    assert f"| {whole:.3f}; best of K (r,p) |" in text and "“best of K”: ε of the search" in text
    assert "/8" not in text and "7.9" not in text


def test_a_search_counts_as_a_whole_beside_other_runs(tmp_path: Path) -> None:
    jobs = [job for job in smoke(tmp_path) if job.config.privacy.enabled]
    searched(jobs[0], tmp_path)
    finish(jobs[1], 0.8, tmp_path)
    whole = rounded_up(optimum(cost_of_a_search() + renyi_curve(PLAN.events()), 1e-5)[0])
    text = shown(tmp_path, jobs)
    assert "releasing all 2 runs together, where 1 of them count as the whole search, the best of" in text
    assert f"(mean 10), is {whole:.3f} (delta = 1e-05, unit example, RDP)" in text
    assert text.count("; best of K (r,p) |") == 1 and text.count("| 7.900/8 (r,p) |") == 1


@pytest.mark.parametrize(
    ("changes", "message"),
    [({"score_is_covered": False}, "is not paid for"), ({"candidates": None}, "does not tell what its search cost")],
)
def test_a_search_without_its_cost_has_no_epsilon(tmp_path: Path, changes: dict[str, object], message: str) -> None:
    (job, _) = (job for job in smoke(tmp_path) if job.config.privacy.enabled)
    searched(job, tmp_path, **changes)
    text = shown(tmp_path, [job])
    assert "No ε is stated for all 1 runs" in text and message in text


def test_scores_outside_a_search_are_paid_for_on_their_own_records(tmp_path: Path) -> None:
    jobs = [job for job in smoke(tmp_path) if job.config.privacy.enabled]
    for job in jobs:
        finish(job, 0.8, tmp_path)
        record = read(tmp_path / job.run_id)
        assert record is not None and record.privacy is not None
        record.privacy.score, record.privacy.score_noise_multiplier = 7.0, 0.5
        guaranteed(record, tmp_path)
    both = epsilon_all([[Event(0.5, 1.0)]] * 2, 1e-5)
    assert both > epsilon_all([PLAN.events()] * 2, 1e-5)
    assert f"releasing all 2 runs together is {rounded_up(both):.3f}" in shown(tmp_path, jobs)


def test_cells_say_what_is_missing(tmp_path: Path) -> None:
    jobs = smoke(tmp_path)
    finish(jobs[0], 0.8, tmp_path)
    RunRecord(jobs[2].run_id, "failed", dataclasses.asdict(jobs[2].config), error="x").write(tmp_path / jobs[2].run_id)
    RunRecord(jobs[1].run_id, "running", dataclasses.asdict(jobs[1].config)).write(tmp_path / jobs[1].run_id)
    text = shown(tmp_path, jobs)
    assert "1 of 4 runs done" in text
    assert "(1); 1 failed" in text
    assert "1 running or stopped, 1 missing" in text
    assert "1 runs failed or did not end, and do not tell what they let out" in text


def test_a_sweep_without_any_run_is_all_missing(tmp_path: Path) -> None:
    text = shown(tmp_path, smoke(tmp_path))
    assert "0 of 4 runs done" in text and text.count("2 missing") == 2


def test_a_run_that_another_sweep_made_has_the_method_it_was_asked_for_by_here(tmp_path: Path) -> None:
    jobs = smoke(tmp_path, "privacy=uniform,adaptive")
    for job in jobs:
        job.config.method = "dp_lora" if job.config.privacy.name == "uniform" else "dptune"
    for job in jobs:
        finish(job, 0.8 if job.config.method == "dptune" else 0.7, tmp_path)
        record = read(tmp_path / job.run_id)
        assert record is not None
        record.method = None
        record.write(tmp_path / job.run_id)
    text = shown(tmp_path, jobs)
    assert "dp_lora" in text and "dptune" in text and "+0.100" in text


def test_a_method_without_steps_is_not_told_apart_by_how_it_would_be_trained(tmp_path: Path) -> None:
    ways = (("dp_lora", 12, 2), ("dp_lora", 12, 4), ("ffa_lora", 12, 4), ("zero_shot", 0, 16))
    jobs = []
    for method, steps, rank in ways:
        jobs += smoke(
            tmp_path,
            f"method={method}",
            f"hyperparameter.steps={steps}",
            "hyperparameter.warmup_steps=0",
            f"hyperparameter.rank={rank}",
            "privacy=uniform",
        )
    for job in jobs:
        finish(job, 0.5, tmp_path)
    text = shown(tmp_path, jobs)
    assert "| zero_shot, steps=0 | " in text and "| dp_lora, rank=2 | " in text and "rank=16" not in text


def test_the_largest_epsilon_of_a_setting_is_shown(tmp_path: Path) -> None:
    jobs = [job for job in smoke(tmp_path) if job.config.privacy.enabled]
    for job, epsilon in zip(jobs, (7.1, 7.90001), strict=True):
        finish(job, 0.8, tmp_path)
        record = read(tmp_path / job.run_id)
        assert record is not None
        guaranteed(record, tmp_path, epsilon=epsilon)
    assert "| 7.901/8 (r,p) |" in shown(tmp_path, jobs)


def test_values_swept_on_the_command_line_have_rows_of_their_own(tmp_path: Path) -> None:
    """Different settings are never averaged."""
    jobs = smoke(tmp_path, "privacy.target_epsilon=1,2", "privacy=uniform")
    for job in jobs:
        finish(job, 0.4 * float(job.config.privacy.target_epsilon or 0), tmp_path)
    rows = [line for line in shown(tmp_path, jobs).splitlines() if "target_epsilon" in line]
    assert len(rows) == 2
    assert "| target_epsilon=1 | 0.400 (2) |" in rows[0] and "| target_epsilon=2 | 0.800 (2) |" in rows[1]


@pytest.mark.parametrize(
    ("field", "value", "name"),
    [
        ("delta", 1e-6, "delta"),
        ("unit", "user_uls", "privacy unit"),
        ("noise_mode", "secure", "noise mode"),
    ],
)
def test_runs_with_other_guarantees_are_never_averaged(tmp_path: Path, field: str, value: object, name: str) -> None:
    jobs = [job for job in smoke(tmp_path) if job.config.privacy.enabled]
    for job, accuracy in zip(jobs, (0.37, 0.53), strict=True):
        finish(job, accuracy, tmp_path)
    record = read(tmp_path / jobs[1].run_id)
    assert record is not None and record.privacy is not None
    setattr(record.privacy, field, value)
    record.write(tmp_path / jobs[1].run_id)
    text = shown(tmp_path, jobs)
    assert "0.370 [" in text and "0.530 [" in text and "0.450" not in text
    assert f"have different {name}s" in text


def test_runs_on_other_data_are_never_averaged(tmp_path: Path) -> None:
    jobs = [job for job in smoke(tmp_path) if job.config.privacy.enabled]
    for job, accuracy in zip(jobs, (0.37, 0.53), strict=True):
        finish(job, accuracy, tmp_path)
        record = read(tmp_path / job.run_id)
        assert record is not None
        record.provenance["data"] = job.run_id
        record.write(tmp_path / job.run_id)
    text = shown(tmp_path, jobs)
    assert "0.450" not in text and "different data fingerprints" in text
    assert "no ε is stated for all of them together" in text


def everything(root: Path) -> Results:
    for job in smoke(root):
        finish(job, 0.8 + 0.1 * job.config.environment.seed, root)
    return load_results(root)


def test_a_table_of_all_dimensions_names_its_rows_floor_and_ceiling(tmp_path: Path) -> None:
    axes = ["privacy=adaptive", "data_sensitivity=clean,label_noise,unseen_instructions", "environment.seed=0,1"]
    jobs = smoke(tmp_path, *axes) + smoke(tmp_path, "privacy=adaptive", "privacy.target_epsilon=1")
    jobs += smoke(tmp_path, "privacy=none", "environment.seed=0,1")
    for at, job in enumerate(jobs):
        finish(job, 0.7 + 0.001 * at, tmp_path)
        record = read(tmp_path / job.run_id)
        assert record is not None and record.zero_shot is not None
        record.provenance["data"] = condition = job.config.data_sensitivity.name
        if condition == "unseen_instructions":
            record.zero_shot.accuracy = 0.1
        record.write(tmp_path / job.run_id)
    lines = shown(tmp_path, jobs).splitlines()
    assert "| zero-shot (floor of 8 of 10 runs) | 0.200 [" in lines[4]
    names = [line.split(" | ")[1] for line in lines[5:10]]
    assert names[0] == "reference" and names[-1] == "privacy=none (ceiling)"
    assert {"data_sensitivity=label_noise", "data_sensitivity=unseen_instructions", "target_epsilon=1"} <= set(names)
    # Conditions of the data are compared, so that it would be wrong to say that they are not.
    assert "to 1 |" in lines[6] and not any("no difference" in line for line in lines)


def test_a_sweep_of_a_folder_is_shown_and_written(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("great_tables", reason="make setup EXTRAS=report, or make test")
    name, seed = "environment/sequence_length", "environment.seed=0"
    for job in jobs_of(name, [f"compute.output_root={tmp_path}", seed]):
        finish(job, 0.8, tmp_path, name)
    to = tmp_path / "report"
    request = [name, seed, f"compute.output_root={tmp_path}", f"to={to}"]
    tables(request)
    figures(request)
    said = capsys.readouterr().out
    assert "Sweep environment/sequence_length: 8 of 8 runs done" in said
    assert (to / "tables" / "environment-sequence_length-tasks.csv").is_file()
    assert list((to / "figures" / "environment-sequence_length").glob("*.svg"))


def test_a_sweep_that_includes_others_is_shown_part_by_part(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "conf").symlink_to(sweep.ROOT / "conf")
    (tmp_path / "sweeps").mkdir()
    for name, content in {
        "rank": 'axes: [{hyperparameter.rank: "1,2"}]',
        "seed": 'axes: [{environment.seed: "0,1,2"}]',
        "all": "include: [rank, seed]",
    }.items():
        text = f"# @package _global_\nsweep: {name}\nhydra: {{sweeper: {{{content}}}}}\n"
        (tmp_path / "sweeps" / f"{name}.yaml").write_text(text)
    monkeypatch.setattr(sweep, "ROOT", tmp_path)
    for job in jobs_of("all", [f"compute.output_root={tmp_path}"]):
        finish(job, 0.8, tmp_path, "all")
    table(["all", f"compute.output_root={tmp_path}"])
    said = capsys.readouterr().out
    assert said.index("Sweep rank: 2 of 2 runs done") < said.index("Sweep seed: 3 of 3 runs done")


def test_every_number_leads_to_its_runs(tmp_path: Path) -> None:
    results = everything(tmp_path)
    table = main_table("smoke", results)
    rows = list(csv.DictReader(io.StringIO(to_csv(table))))
    (cell,) = [row for row in rows if row["setting"] == "privacy=uniform" and row["column"].startswith("accuracy")]
    ids = cell["run_ids"].split()
    accuracies = [read(tmp_path / run_id).metrics.accuracy for run_id in ids]  # type: ignore[union-attr]
    assert float(cell["value"]) == sum(accuracies) / 2 and cell["n"] == "2" and cell["direction"] == "higher is better"
    assert {row["run"].text for row in run_table("smoke", results).rows} == set(results.runs["run_id"])


def test_tables_are_written_as_csv_latex_and_html(tmp_path: Path) -> None:
    results = everything(tmp_path / "outputs")
    tables = [main_table("smoke", results), cost_table("smoke", results), task_table("smoke", results)]
    comparison = comparison_table("smoke", results)
    assert comparison is not None
    written = write([*tables, comparison], tmp_path / "report")
    assert len(written) == 12 and all(path.stat().st_size > 300 for path in written)
    assert "0.850" in great(tables[0]).as_raw_html()
    assert to_latex(tables[0]).isascii() and r"$\varepsilon$" in to_latex(tables[0])
    assert "1.0000" in markdown(tables[1]) and "300 (2)" in markdown(tables[1])


def test_each_backbone_has_its_floor(tmp_path: Path) -> None:
    jobs = smoke(tmp_path, "model=tiny,nano", "environment.seed=0,1", "privacy=adaptive")
    for job in jobs:
        finish(job, 0.7, tmp_path)
        record = read(tmp_path / job.run_id)
        assert record is not None and record.zero_shot is not None
        record.zero_shot.accuracy = 0.1 if job.config.model.name == "nano" else 0.2
        record.write(tmp_path / job.run_id)
    lines = shown(tmp_path, jobs).splitlines()
    assert "| zero-shot (floor), model=tiny | 0.200 [" in lines[4]
    assert "| zero-shot (floor), model=nano | 0.100 [" in lines[5]


def test_a_setting_without_a_baseline_is_compared_with_the_reference_of_its_method(tmp_path: Path) -> None:
    ways = (["privacy=adaptive"], ["privacy=adaptive", "hyperparameter.rank=8"], ["privacy=uniform"])
    jobs = [job for way in ways for job in smoke(tmp_path, *way, "environment.seed=0,1")]
    jobs += smoke(tmp_path, "privacy=adaptive,uniform", "hyperparameter.max_grad_norm=5", "environment.seed=0,1")
    for at, job in enumerate(jobs):
        finish(job, 0.5 + 0.01 * at, tmp_path)
    rows = [line.split(" | ") for line in shown(tmp_path, jobs).splitlines() if line[:2] == "| " and line[2].isdigit()]
    told = {row[1]: row[3] for row in rows}
    number = {row[1]: row[0].strip("| ") for row in rows}
    assert told["rank=8"].endswith(f" to {number['reference']}")
    assert told["reference"].endswith(f" to {number['privacy=uniform']}") and told["privacy=uniform"] == "reference"


def test_runs_of_other_code_are_told(tmp_path: Path) -> None:
    jobs = smoke(tmp_path)
    codes = [code_version(), "0123456789ab", None]
    for job in jobs:
        finish(job, 0.8, tmp_path)
        record = read(tmp_path / job.run_id)
        assert record is not None
        record.provenance["code"] = code_version()
        record.write(tmp_path / job.run_id)
    assert "Stale" not in shown(tmp_path, jobs)
    for code, job in zip(codes, jobs, strict=False):
        record = read(tmp_path / job.run_id)
        assert record is not None
        record.provenance["code"] = code
        record.write(tmp_path / job.run_id)
    told = f"Stale: 2 of 4 runs were made by other code (0123456789ab) than this ({code_version()})."
    assert told in shown(tmp_path, jobs).splitlines()

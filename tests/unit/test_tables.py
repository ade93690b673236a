import dataclasses
from pathlib import Path

import pytest

from dptune.privacy.plan import PrivacyPlan
from dptune.privacy.selection import epsilon_all
from dptune.records import Cost, Metrics, Parameters, Privacy, RunRecord, read
from dptune.report.tables import sweep_table, wilson, with_interval
from dptune.sweep import Job, load

PLAN = PrivacyPlan(
    num_units=512,
    expected_batch_size=64,
    steps=4,
    delta=1e-5,
    noise_multiplier=1.0,
    max_grad_norm=1.0,
    noise_mode="reproducible",
)


def finish(job: Job, accuracy: float, root: Path) -> None:
    private = job.config.privacy.enabled
    metrics = Metrics(accuracy, {"a": accuracy, "b": accuracy - 0.1}, "b", 0.05, accuracy, 1.2, 64, 60, {"a": 64})
    floor = dataclasses.replace(metrics, accuracy=0.2, accuracy_by_task={"a": 0.2})
    guarantee = Privacy(
        private, "example", 7.9, 8.0, 1e-5, noise_mode="reproducible", stand_in=True, plan=PLAN.to_dict()
    )
    RunRecord(
        run_id=job.run_id,
        status="done",
        config=dataclasses.asdict(job.config),
        metrics=metrics,
        zero_shot=floor,
        privacy=guarantee if private else Privacy(False),
        parameters=Parameters(1000, 25),
        cost=Cost(3.0, 2.0, 100.0, 300.0, "cpu"),
    ).write(root / job.run_id)


def test_a_table_shows_means_intervals_floor_and_ceiling(tmp_path: Path) -> None:
    jobs = load("smoke", [f"compute.output_root={tmp_path}"])
    for job in jobs:
        finish(job, 0.8 + 0.1 * job.config.environment.seed, tmp_path)
    lines = sweep_table("smoke", jobs).splitlines()
    assert lines[0] == "Sweep smoke: 4 of 4 runs done"
    assert lines[4].startswith("| zero-shot (floor) | 0.200 [")
    # Two seeds, 0.8 and 0.9: mean 0.85, Student's t with one degree of freedom reaches past one.
    assert lines[5].startswith(
        "| privacy=uniform | 0.850 [0.215, 1.000] (2) | 0.850 | 0.750 | 7.900/8 | 1e-05 | 25 (2.50) |"
    )
    assert lines[6].startswith("| privacy=none (ceiling) | 0.850 [0.215, 1.000] (2) | 0.850 | 0.750 | none | – |")
    assert "accounted, not realised" in lines[-2] and "stand-in" in lines[-1]
    # Two private runs on the same data together, by the accountant over both.
    together = epsilon_all([PLAN.events()] * 2, 1e-5)
    assert f"releasing all 2 runs together is {together:.3f}" in lines[-4] and together > PLAN.epsilon()
    assert lines[-3] == "The 2 non-private runs have no ε at all."


def test_cells_say_what_is_missing(tmp_path: Path) -> None:
    jobs = load("smoke", [f"compute.output_root={tmp_path}"])
    finish(jobs[0], 0.8, tmp_path)
    RunRecord(jobs[2].run_id, "failed", {}, error="x").write(tmp_path / jobs[2].run_id)
    RunRecord(jobs[1].run_id, "running", {}).write(tmp_path / jobs[1].run_id)
    text = sweep_table("smoke", jobs)
    assert "1 of 4 runs done" in text
    assert "(1); 1 failed" in text
    assert "1 running or stopped, 1 missing" in text


def test_wilson_against_its_published_form() -> None:
    # Brown, Cai, DasGupta (2001): 0 of n has the upper limit z^2 / (n + z^2).
    low, high = wilson(0.0, 20)
    assert low == 0.0 and high == pytest.approx(1.959964**2 / (20 + 1.959964**2))
    assert wilson(0.5, 100) == pytest.approx((0.40383, 0.59617), abs=1e-5)


def test_the_interval_over_runs_is_students() -> None:
    # Three values with standard deviation 0.1: half width 4.302653 * 0.1 / sqrt(3).
    assert with_interval([0.4, 0.5, 0.6], 10) == "0.500 [0.252, 0.748]"


def test_the_largest_epsilon_of_a_setting_is_shown(tmp_path: Path) -> None:
    jobs = [job for job in load("smoke", [f"compute.output_root={tmp_path}"]) if job.config.privacy.enabled]
    for job, epsilon in zip(jobs, (7.1, 7.90001), strict=True):
        finish(job, 0.8, tmp_path)
        record = read(tmp_path / job.run_id)
        assert record is not None and record.privacy is not None
        record.privacy.epsilon = epsilon
        record.write(tmp_path / job.run_id)
    assert "| 7.901/8 |" in sweep_table("smoke", jobs)


def test_values_swept_on_the_command_line_have_rows_of_their_own(tmp_path: Path) -> None:
    """Different settings are never averaged."""
    jobs = load("smoke", [f"compute.output_root={tmp_path}", "privacy.target_epsilon=1,2", "privacy=uniform"])
    for job in jobs:
        finish(job, 0.4 * float(job.config.privacy.target_epsilon or 0), tmp_path)
    rows = [line for line in sweep_table("smoke", jobs).splitlines() if "target_epsilon" in line]
    assert [row.split(" [")[0] for row in rows] == ["| target_epsilon=1 | 0.400", "| target_epsilon=2 | 0.800"]
    assert all("(2)" in row for row in rows)

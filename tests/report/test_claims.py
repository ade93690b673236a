import dataclasses
import shutil
from pathlib import Path

import pytest
from report.planted import compare, config, plant

from dptune.records.record import read
from dptune.report.claims import claims, claims_table
from dptune.report.results import load_results


def verdicts(root: Path) -> dict[int, str]:
    return {claim.number: claim.verdict for claim in claims(load_results(root))}


def test_a_better_method_is_supported(tmp_path: Path) -> None:
    compare(tmp_path, gain=0.1)
    found = {claim.number: claim for claim in claims(load_results(tmp_path))}
    assert found[1].verdict == "supported"
    # The gain is 0.1 on both tasks and 0.025 more on task a for every second seed.
    assert found[1].contrast is not None and found[1].contrast.effect.mean == pytest.approx(0.1 + 0.025 / 4)
    assert len(found[1].contrast.run_ids) == 24 and found[1].contrast.effect.n == 6
    assert found[2].verdict == "supported" and found[3].verdict == "supported"


def test_a_worse_method_fails(tmp_path: Path) -> None:
    compare(tmp_path, gain=-0.1)
    found = {claim.number: claim for claim in claims(load_results(tmp_path))}
    for number in (1, 2, 3):
        assert found[number].verdict == "not supported", found[number].reason
    assert "contradict" in found[1].reason


def test_two_seeds_decide_nothing(tmp_path: Path) -> None:
    compare(tmp_path, gain=0.3, seeds=2)
    assert set(verdicts(tmp_path).values()) == {"undecided"}


def test_without_the_method_or_without_records_nothing_is_decided(tmp_path: Path) -> None:
    assert set(verdicts(tmp_path).values()) == {"undecided"}
    for seed in range(4):
        plant(tmp_path, config("uniform", seed), 0.5, 0.5)
    assert all(claim.verdict == "undecided" and claim.decide for claim in claims(load_results(tmp_path)))


def test_the_strongest_baseline_counts(tmp_path: Path) -> None:
    compare(tmp_path, gain=0.1)
    for seed in range(6):
        for epsilon in (1.0, 8.0):
            plant(tmp_path, config("scheduled", seed, epsilon), 0.9, 0.9)
    (first, *_) = claims(load_results(tmp_path))
    assert first.verdict == "not supported" and first.contrast is not None
    assert first.contrast.baseline == "lora + scheduled" and len(first.contrasts) == 2


@pytest.mark.parametrize("field", ["delta", "unit", "noise_mode"])
def test_runs_with_other_guarantees_are_never_paired(tmp_path: Path, field: str) -> None:
    other = {"delta": 1e-6, "unit": "user_uls", "noise_mode": "secure"}[field]
    for seed in range(5):
        plant(tmp_path, config("uniform", seed), 0.4, 0.4)
        plant(tmp_path, config("adaptive", seed), 0.8, 0.8, **{field: other})
    assert set(verdicts(tmp_path).values()) == {"undecided"}


def test_runs_on_other_data_are_never_paired(tmp_path: Path) -> None:
    for seed in range(5):
        plant(tmp_path, config("uniform", seed), 0.4, 0.4)
        record = plant(tmp_path, config("adaptive", seed), 0.8, 0.8)
        record.provenance["data"] = "d1"
        record.write(tmp_path / record.run_id)
    assert set(verdicts(tmp_path).values()) == {"undecided"}


@pytest.mark.parametrize(
    ("number", "field", "values"),
    [
        (4, "hyperparameter__learning_rate", (0.01, 0.02, 0.04)),
        (5, "environment__sequence_length", (48, 64, 96)),
        (6, "data_sensitivity__label_noise", (0.0, 0.1, 0.2)),
    ],
)
def test_stability_is_judged_over_shared_conditions(tmp_path: Path, number: int, field: str, values: tuple) -> None:
    for seed in range(5):
        for at, value in enumerate(values):
            drop = 0.2 * at
            jitter = 0.05 * (seed % 2)
            plant(tmp_path, config("uniform", seed, **{field: value}), 0.8 - drop - jitter * at, 0.8 - drop)
            plant(tmp_path, config("adaptive", seed, **{field: value}), 0.9 - drop / 4, 0.9 - drop / 4)
    assert verdicts(tmp_path)[number] == "supported"


def test_stable_but_bad_is_not_supported(tmp_path: Path) -> None:
    for seed in range(5):
        for at, rate in enumerate((0.01, 0.02, 0.04)):
            wide = 0.2 * at + 0.05 * (seed % 2) * at
            plant(tmp_path, config("uniform", seed, hyperparameter__learning_rate=rate), 0.9 - wide, 0.9 - wide)
            plant(tmp_path, config("adaptive", seed, hyperparameter__learning_rate=rate), 0.2, 0.2)
    (claim,) = (item for item in claims(load_results(tmp_path)) if item.number == 4)
    assert claim.verdict == "undecided" and "lower" in claim.reason


def test_methods_tuned_apart_are_paired_within_their_sweep(tmp_path: Path) -> None:
    for seed in range(5):
        jitter = 0.025 * (seed % 2)
        plant(tmp_path, config("uniform", seed, hyperparameter__learning_rate=0.01), 0.4 + jitter, 0.4)
        plant(tmp_path, config("adaptive", seed, hyperparameter__learning_rate=0.04), 0.8, 0.8)
    assert verdicts(tmp_path)[1] == "supported"
    # A third setting of another sweep leaves the pairs as they were designed.
    plant(tmp_path, config("adaptive", 0, hyperparameter__learning_rate=0.1), 0.1, 0.1, sweep="other")
    assert verdicts(tmp_path)[1] == "supported"


def test_failed_runs_are_no_evidence(tmp_path: Path) -> None:
    compare(tmp_path, gain=0.1)
    for folder in tmp_path.iterdir():
        record = read(folder)
        assert record is not None
        if record.config["environment"]["seed"] > 1:
            dataclasses.replace(record, status="failed", metrics=None).write(folder)
    assert verdicts(tmp_path)[1] == "undecided"


def test_the_table_of_claims_names_every_run(tmp_path: Path) -> None:
    compare(tmp_path, gain=0.1)
    found = claims(load_results(tmp_path))
    table = claims_table(found)
    assert len(table.rows) == 7
    assert table.rows[0]["runs"].run_ids == found[0].contrast.run_ids  # type: ignore[union-attr]
    shutil.rmtree(tmp_path / found[0].contrast.run_ids[0])  # type: ignore[union-attr]
    assert claims(load_results(tmp_path))[0].contrast != found[0].contrast

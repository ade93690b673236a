"""Records with known numbers: what the views show of them can be computed by hand."""

import dataclasses
import json
from pathlib import Path
from typing import Any

import numpy as np

from dptune.config.schema import Config
from dptune.identity import run_id
from dptune.privacy.plan import PrivacyPlan
from dptune.records.record import Cost, GroupPrivacy, Metrics, Parameters, Privacy, RunRecord, guarantee_of

PLAN = PrivacyPlan(
    num_units=512,
    expected_batch_size=64,
    steps=4,
    delta=1e-5,
    noise_multiplier=1.0,
    max_grad_norm=1.0,
    noise_mode="reproducible",
)
TASKS = {"a": 40, "b": 20}


def config(privacy: str = "uniform", seed: int = 0, epsilon: float | None = 8.0, **fields: Any) -> Config:
    """A config; `fields` are dotted names with `__` for the dot."""
    made = Config()
    made.privacy.name, made.environment.seed = privacy, seed
    made.privacy.enabled = privacy != "none"
    made.privacy.target_epsilon = epsilon if made.privacy.enabled else None
    for name, value in fields.items():
        group, _, leaf = name.partition("__")
        setattr(getattr(made, group), leaf, value)
    return made


def metrics(a: float, b: float) -> Metrics:
    accuracies = {"a": a, "b": b}
    mean = (a + b) / 2
    spread = float(np.std([a, b]))
    return Metrics(mean, accuracies, min(accuracies, key=accuracies.__getitem__), spread, None, 2.0, 60, None, TASKS)


def plant(
    root: Path, made: Config, a: float, b: float, *, sweep: str | None = "planted", items: bool = True, **privacy: Any
) -> RunRecord:
    """Write a finished record with accuracies `a` (of 40 items) and `b` (of 20), and its judged items."""
    epsilon = privacy.pop("epsilon", made.privacy.target_epsilon)
    stated = {
        "unit": "example",
        "target_epsilon": made.privacy.target_epsilon,
        "delta": 1e-5,
        "noise_multiplier": 1.0,
        "noise_mode": "reproducible",
        "stand_in": True,
        "plan": PLAN.to_dict(),
        "groups": {"g": GroupPrivacy(10, 1.0)},
    }
    record = RunRecord(
        run_id=run_id(made),
        status="done",
        config=dataclasses.asdict(made),
        sweep=sweep,
        metrics=metrics(a, b),
        zero_shot=metrics(0.25, 0.25),
        privacy=Privacy(True, **{**stated, **privacy}) if made.privacy.enabled else Privacy(False, stand_in=True),
        parameters=Parameters(1000, 25),
        cost=Cost(3.0, 2.0, 100.0, 300.0, "cpu"),
        provenance={"data": "d0", "backbone": "b0", "git": "0" * 40, "started": "2026-01-01T10:20:30"},
    )
    folder = root / record.run_id
    record.guarantee = guarantee_of(record, folder)
    if record.guarantee.private:
        record.guarantee = dataclasses.replace(record.guarantee, epsilon=epsilon)
    record.write(folder)
    if items:
        right = [("a", at < round(a * 40)) for at in range(40)] + [("b", at < round(b * 20)) for at in range(20)]
        lines = [json.dumps({"task": task, "correct": correct, "loss": 1.0, "unseen": True}) for task, correct in right]
        (folder / "evaluation.jsonl").write_text("\n".join(lines) + "\n")
    history = [
        {"step": step, "learning_rate": 0.1, "epsilon": None, "noise_multiplier": 1.0, "NON_PRIVATE/loss": 3.0 / step}
        | {"noise_std/x": 1.0, "noise_std/y": 1.0 / step}
        for step in range(1, 5)
    ]
    (folder / "history.jsonl").write_text("\n".join(map(json.dumps, history)) + "\n")
    return record


def compare(root: Path, gain: float, seeds: int = 6) -> None:
    """Adaptive against uniform noise at two epsilons: `gain` on task a, with a little noise over seeds."""
    for seed in range(seeds):
        jitter = 0.025 * (seed % 3)
        for epsilon, base in ((1.0, 0.4), (8.0, 0.6)):
            plant(root, config("uniform", seed, epsilon), base + jitter, base)
            plant(root, config("adaptive", seed, epsilon), base + jitter + gain + 0.025 * (seed % 2), base + gain)
        plant(root, config("none", seed), 0.95, 0.95)

"""Sweeps on every launcher, and two of them at once."""

import json
import os
import signal
from collections.abc import Iterator
from pathlib import Path

import pytest
from hydra import compose, initialize_config_dir
from processes import Started, dptune
from test_resume import lines, rows, wait_for

from dptune.records import frame
from dptune.records import record as records
from dptune.records.lock import holder
from dptune.sweeps.jobs import ROOT

STEPS = 30


def sweep(model_folder: Path, root: Path, *more: str) -> list[str]:
    return [
        *("-m", "sweeps=smoke", f"model.path={model_folder}", "model.name=local"),
        *("data.train_size=120", "data.validation_size=10", "data.test_size=20", "hyperparameter.rank=2"),
        *(f"hyperparameter.steps={STEPS}", "hyperparameter.expected_batch_size=12", "compute.checkpoint_every=2"),
        *(f"compute.output_root={root}", f"compute.cache_dir={root}/.cache", *more),
    ]


@pytest.fixture
def processes() -> Iterator[list[Started]]:
    """Processes that are ended with the test."""
    started: list[Started] = []
    yield started
    for process in started:
        if process.poll() is None:
            process.kill()
            process.communicate()


def assert_done_once(root: Path, runs: int) -> None:
    found = [record for record in frame.read_all(root) if record.status == "done"]
    assert len(found) == runs == len(list(root.glob("*/record.json")))
    for record in found:
        folder = root / record.run_id
        log = (folder / "run.log").read_text()
        assert log.count("zero-shot accuracy") == 1 and "going on" not in log
        assert [row["step"] for row in rows(folder / "history.jsonl")] == list(range(1, STEPS + 1))
        if record.privacy is not None and record.privacy.private:
            assert sum("step" in row for row in rows(folder / "ledger.jsonl")) == STEPS
        assert not list(folder.glob(".c*")) and not (folder / "checkpoint").exists()


def test_the_same_sweep_twice_at_once_does_every_run_once(
    model_folder: Path, tmp_path: Path, processes: list[Started]
) -> None:
    command = sweep(model_folder, tmp_path, "environment.seed=0,1")
    processes += [Started(command), Started(command)]
    said = [process.communicate(timeout=400) for process in processes]
    assert [process.returncode for process in processes] == [0, 0], said
    assert_done_once(tmp_path, 4)
    results = [line for out, _ in said for line in out.splitlines() if "accuracy" in line]
    assert len(results) >= 4
    again = dptune(*command)
    assert "4 runs: 4 finished before, 0 to do" in again.stdout


def test_a_sweep_on_submitit_survives_preemption(model_folder: Path, tmp_path: Path, processes: list[Started]) -> None:
    more = ["environment.seed=0", "hydra/launcher=submitit_local", "hydra.launcher.timeout_min=10", "privacy=uniform"]
    processes.append(Started(sweep(model_folder, tmp_path, *more, "hyperparameter.steps=100")))
    wait_for(lambda: any(lines(path) >= 5 for path in tmp_path.glob("*/ledger.jsonl")))
    (folder,) = (path.parent for path in tmp_path.glob("*/ledger.jsonl"))
    running = holder(folder)
    assert running is not None and running.pid != processes[0].pid
    os.kill(running.pid, signal.SIGUSR2)
    out, errors = processes[0].communicate(timeout=400)
    assert processes[0].returncode == 0, out + errors
    record = records.read(folder)
    assert record is not None and record.status == "done"
    log = (folder / "run.log").read_text()
    assert "interrupted; the same command goes on" in log and "going on after step" in log


def test_what_is_left_out_is_said(model_folder: Path, tmp_path: Path) -> None:
    """A run that another machine does is no failure of this sweep, and not done."""
    import dataclasses

    from dptune.records.lock import Holder
    from dptune.sweeps.expand import jobs_of_sweep

    command = sweep(model_folder, tmp_path, "environment.seed=0", "privacy=uniform")
    (job,) = jobs_of_sweep("smoke", [item for item in command if "=" in item and not item.startswith("sweeps=")])
    folder = tmp_path / job.run_id
    folder.mkdir()
    (folder / ".lock.0").write_text(json.dumps(dataclasses.asdict(Holder("node7", 12, "today", "node7 x y", "1"))))
    done = dptune(*command)
    assert done.returncode == 0 and "1 runs are being done by other processes" in done.stdout, done.stderr
    assert f"left out: run {job.run_id} is being done by process 12 on node7 since today" in done.stdout
    assert not (folder / "record.json").exists()


def test_the_slurm_preset_asks_for_an_array_that_is_queued_again(tmp_path: Path) -> None:
    from omegaconf import OmegaConf
    from submitit.slurm.slurm import SlurmExecutor, _make_sbatch_string

    with initialize_config_dir(str(ROOT / "conf"), version_base="1.3"):
        tree = compose("config", ["hydra/launcher=slurm", "hydra.launcher.partition=cpu"], return_hydra_config=True)
    settings = {str(key): value for key, value in OmegaConf.to_container(tree.hydra.launcher).items()}
    for name in ("_target_", "submitit_folder", "max_num_timeout", "name", "tasks_per_node"):
        settings.pop(name)
    executor = SlurmExecutor.__new__(SlurmExecutor)
    names = executor._equivalence_dict()
    settings = {names.get(name, name): value for name, value in settings.items() if value is not None}
    settings["mem"], settings["time"] = f"{settings.pop('mem')}GB", settings.pop("time")
    script = _make_sbatch_string(command="x", folder=tmp_path, map_count=30, **settings)
    for flag in ("--array=0-29%30", "--requeue", "--signal=USR2@60", "--partition=cpu", "--time=240"):
        assert f"#SBATCH {flag}" in script, script
    assert "export OMP_NUM_THREADS=$SLURM_CPUS_PER_TASK" in script
    assert tree.hydra.launcher.max_num_timeout == 20

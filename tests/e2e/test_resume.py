"""A run that is interrupted goes on from its checkpoint and ends as if it had not been."""

import contextlib
import json
import resource
import signal
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from hydra import compose, initialize_config_dir
from processes import Started, dptune

from dptune import identity
from dptune.config.checks import strict
from dptune.config.schema import Config, ConfigError
from dptune.identity import run_id
from dptune.privacy.accounting import epsilon
from dptune.privacy.events import Event
from dptune.privacy.guarantee import epsilon_text
from dptune.records import mirror as tracking
from dptune.records import record as records
from dptune.records.lock import holder
from dptune.runs import run, training
from dptune.runs import setup as preparation
from dptune.sweeps.expand import without_hydra
from dptune.sweeps.jobs import ROOT
from dptune.training import checkpoint

pytestmark = pytest.mark.numerical

STEPS = 6


@pytest.fixture
def config(model_folder: Path, tmp_path: Path) -> Config:
    made = Config()
    made.model.name, made.model.path = "local", str(model_folder)
    made.data.train_size, made.data.validation_size, made.data.test_size = 120, 10, 20
    made.hyperparameter.steps, made.hyperparameter.warmup_steps = STEPS, 1
    made.hyperparameter.expected_batch_size, made.hyperparameter.rank = 12, 2
    made.compute.checkpoint_every = 2
    made.compute.output_root, made.compute.cache_dir = str(tmp_path / "outputs"), str(tmp_path / "cache")
    return made


def folder_of(config: Config) -> Path:
    return Path(config.compute.output_root) / run_id(config)


def weights(folder: Path) -> dict[str, torch.Tensor]:
    from safetensors.torch import load_file

    return load_file(folder / "adapter" / "adapter_model.safetensors")


def rows(path: Path) -> list[dict[str, Any]]:
    """Lines without the time they took."""
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    return [{key: value for key, value in line.items() if key != "NON_PRIVATE/seconds"} for line in lines]


def steps(folder: Path) -> list[dict[str, Any]]:
    """Steps that were begun."""
    return [row for row in rows(folder / "ledger.jsonl") if "step" in row]


def assert_the_same_run(one: Path, two: Path) -> None:
    first, second = weights(one), weights(two)
    assert first.keys() == second.keys()
    for name, value in first.items():
        assert torch.equal(value, second[name]), name
    for name in ("history.jsonl", "evaluation.jsonl", "ledger.jsonl"):
        assert (one / name).exists() == (two / name).exists()
        if (one / name).exists():
            assert rows(one / name) == rows(two / name)
    before, after = records.read(one), records.read(two)
    assert before is not None and after is not None and before.status == after.status == "done"
    assert before.metrics == after.metrics and before.privacy == after.privacy
    assert not (two / "checkpoint").exists()


class Killed(BaseException):
    """Stands for a signal: nothing that handles errors handles it."""


def interrupt(monkeypatch: pytest.MonkeyPatch, after: int, error: BaseException | None = None) -> None:
    """Stop the next run when it has done so many steps, before the last one is in a checkpoint."""
    row = training.history_row

    def history_row(step: Any, epsilon: float | None) -> dict[str, Any]:
        if step.step == after:
            raise error or Killed
        return row(step, epsilon)

    monkeypatch.setattr(training, "history_row", history_row)


def interrupted(config: Config, monkeypatch: pytest.MonkeyPatch, after: int) -> None:
    with monkeypatch.context() as patch:
        interrupt(patch, after)
        with pytest.raises(Killed):
            run.run(config)


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"privacy.enabled": False, "privacy.target_epsilon": None, "environment.optimizer": "sgd"},
        {"environment.optimizer": "adam", "environment.iterate_ema": 0.9},
        {"environment.optimizer": "dp_adam_bc"},
        {"privacy.allocation_weights": "adam", "privacy.quantile": 0.6, "privacy.schedule": "cosine"},
        {"privacy.allocation": "lora_weight_space", "hyperparameter.weight_decay": 0.1},
        {"privacy.projection": "random", "privacy.projection_dimension": 4, "privacy.projection_refresh": 2},
        {"privacy.projection": "history", "privacy.projection_dimension": 4, "privacy.projection_refresh": 1},
        {"privacy.projection": "rgp", "privacy.projection_dimension": 1, "privacy.projection_refresh": 2},
        {"privacy.projection": "public", "privacy.projection_dimension": 4},
        {"privacy.projection": "private", "privacy.projection_noise_multiplier": 3.0},
        {"privacy.projection": "scale", "public.method": "joint", "public.steps": 3},
        {"privacy.unit": "user_uls", "privacy.examples_per_user": 2, "hyperparameter.expected_batch_size": 10},
        {"adapter.name": "adalora"},
        {"adapter.name": "pst", "hyperparameter.learning_rate": 0.1},
    ],
    ids=lambda settings: "-".join(map(str, settings.values())) or "reference",
)
def test_an_interrupted_run_ends_bit_equal(
    config: Config, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, settings: dict[str, Any]
) -> None:
    for name, value in settings.items():
        group, _, leaf = name.partition(".")
        setattr(getattr(config, group), leaf, value)
    whole = run.run(config)
    assert whole.status == "done", whole.error
    one = folder_of(config)
    config.compute.output_root = str(tmp_path / "again")
    two = folder_of(config)
    interrupted(config, monkeypatch, after=3)
    assert [row["step"] for row in rows(two / "history.jsonl")] == [1, 2]
    found = records.read(two)
    assert found is not None and found.status == "running"
    interrupted(config, monkeypatch, after=5)
    assert [row["step"] for row in rows(two / "history.jsonl")] == [1, 2, 3, 4]
    again = run.run(config)
    assert again.status == "done", again.error
    log = (two / "run.log").read_text()
    assert "going on after step 2 of 6" in log and "going on after step 4 of 6" in log
    assert_the_same_run(one, two)


def test_a_run_killed_while_it_is_judged_is_judged_again(
    config: Config, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run.run(config)
    one = folder_of(config)
    config.compute.output_root = str(tmp_path / "again")

    def killed(*_: object) -> None:
        raise Killed

    with monkeypatch.context() as patch, pytest.raises(Killed):
        patch.setattr(run, "save_adapter", killed)
        run.run(config)
    run.run(config)
    assert "going on after step 6 of 6" in (folder_of(config) / "run.log").read_text()
    assert_the_same_run(one, folder_of(config))


def test_nothing_of_a_step_is_seen_before_its_checkpoint(config: Config, monkeypatch: pytest.MonkeyPatch) -> None:
    """What is not in a checkpoint may be drawn again with other noise, so that nobody may have seen it."""
    folder, seen = folder_of(config), []

    class Tracker(tracking.NoTracker):
        def step(self, row: Any) -> None:
            stored = json.loads((folder / "checkpoint" / "checkpoint.json").read_text().splitlines()[0])
            assert row["step"] <= stored["step"] and row in stored["history"]
            seen.append(row["step"])

    monkeypatch.setattr(tracking, "start", lambda *_: Tracker())
    interrupted(config, monkeypatch, after=6)
    assert seen == [1, 2, 3, 4]
    seen.clear()
    assert run.run(config).status == "done"
    assert seen == [1, 2, 3, 4, 5, 6]


def secure(config: Config) -> Config:
    config.privacy.noise_mode = "secure"
    return config


def test_a_secure_run_goes_on_with_fresh_keys_at_the_same_epsilon(
    config: Config, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = folder_of(secure(config))
    interrupted(config, monkeypatch, after=4)
    master = b"".join(path.read_bytes() for path in (folder / "checkpoint").iterdir())
    begun = steps(folder)
    assert [row["step"] for row in begun] == [0, 1, 2, 3] and b"master" not in master
    # The record was written before the first step; what is read of it counts those that were begun since.
    assert json.loads((folder / "record.json").read_text())["guarantee"]["epsilon"] == 0
    left = records.read(folder)
    assert left is not None and left.guarantee is not None
    assert left.guarantee.released == "unfinished" and left.guarantee.epsilon == spent(begun[0], 4)
    record = run.run(config)
    ledger = steps(folder)
    assert [row["step"] for row in ledger] == [0, 1, 2, 3, 2, 3, 4, 5]
    # No noise and no batch is drawn twice, and the steps of the checkpoint are not drawn again.
    for name in ("noise_key", "sampling_key"):
        assert len({row[name] for row in ledger}) == len(ledger)
    assert record.privacy is not None and record.privacy.attempts == 1 and record.privacy.steps == STEPS
    assert record.guarantee is not None and record.guarantee.epsilon == spent(begun[0], STEPS) <= 8


def spent(row: dict[str, Any], steps: int) -> float:
    """Epsilon of so many steps as a row of a ledger has."""
    return epsilon([Event(row["noise_multiplier"], row["sample_rate"], steps)], 1e-5)


def test_a_secure_run_that_failed_by_itself_begins_another_attempt(
    config: Config, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Drawing again because of what was drawn would be choosing."""
    secure(config)
    for error, attempts, kept in ((RuntimeError("NaN"), 1, False), (OSError("the disk is full"), 2, True)):
        with monkeypatch.context() as patch:
            interrupt(patch, 4, error)
            failed = run.run(config)
        ledger = steps(folder_of(config))
        assert failed.status == "failed" and failed.guarantee is not None
        assert failed.guarantee.epsilon == spent(ledger[0], 4 * attempts)
        assert records.read(folder_of(config)) == failed
        assert sum(row["step"] == 0 for row in ledger) == attempts
        assert (folder_of(config) / "checkpoint").exists() is kept
    record = run.run(config)
    assert record.status == "done" and record.privacy is not None and record.privacy.attempts == 2
    # What was seen of the attempt that failed counts, in all that is said of this run.
    assert record.guarantee is not None and record.guarantee.epsilon == spent(ledger[0], 4 + STEPS) > 8
    assert rows(folder_of(config) / "history.jsonl")[-1]["epsilon"] == record.guarantee.shown
    page = (folder_of(config) / "adapter" / "GUARANTEE.md").read_text()
    assert epsilon_text(record.guarantee.epsilon) in page and "of attempt 1" in page
    assert (folder_of(config) / "run.log").read_text().count("Traceback") == 2


@pytest.mark.parametrize("damage", ["code", "file"])
def test_a_checkpoint_that_does_not_fit_is_not_used(
    config: Config, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, damage: str
) -> None:
    run.run(config)
    one = folder_of(config)
    config.compute.output_root = str(tmp_path / "again")
    two = folder_of(config)
    if damage == "code":
        with monkeypatch.context() as patch:
            for module in (training, preparation):
                patch.setattr(module, "code_version", lambda: "older")
            interrupted(config, patch, after=5)
    else:
        interrupted(config, monkeypatch, after=5)
        (two / "checkpoint" / "step-4.safetensors").write_bytes(b"")
    record = run.run(config)
    assert record.status == "done" and record.privacy is not None
    reason = "another code" if damage == "code" else "step-4.safetensors is damaged"
    assert (
        f"the checkpoint cannot be used: {'it was made with ' if damage == 'code' else ''}{reason}"
        in (two / "run.log").read_text()
    )
    # The same code makes the same releases again; of other code nobody knows that.
    assert record.privacy.attempts == (2 if damage == "code" else 1)
    for name, value in weights(one).items():
        assert torch.equal(value, weights(two)[name])


def set_back(folder: Path, step: int = 0) -> None:
    """Six more steps on the same keys: what a checkpoint that is not signed allows."""
    path = folder / "checkpoint" / "checkpoint.json"
    text, *signature = path.read_text().splitlines()
    content = {**json.loads(text), "step": step, "history": []}
    path.write_text("\n".join([json.dumps(content), *signature]) + "\n")


@pytest.mark.parametrize("mode", ["secure", "reproducible"])
def test_a_checkpoint_that_was_set_back_is_refused(config: Config, monkeypatch: pytest.MonkeyPatch, mode: str) -> None:
    config.privacy.noise_mode = mode
    interrupted(config, monkeypatch, after=5)
    folder = folder_of(config)
    before, right = (folder / "ledger.jsonl").read_bytes(), (folder / "checkpoint" / "checkpoint.json").read_bytes()
    set_back(folder)
    with pytest.raises(ConfigError, match="checkpoint.json was changed") as caught:
        run.run(config)
    assert "\n" not in str(caught.value) and "another attempt" in str(caught.value)
    assert (folder / "ledger.jsonl").read_bytes() == before
    found = records.read(folder)
    assert found is not None and found.status == "running"
    (folder / "checkpoint" / "checkpoint.json").write_bytes(right)
    record = run.run(config)
    assert record.status == "done" and record.privacy is not None and record.privacy.attempts == 1


def test_whoever_has_the_key_does_not_get_the_same_noise_for_other_weights(
    config: Config, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The second wall: the ledger knows at which weights a step was taken."""
    interrupted(config, monkeypatch, after=5)
    folder, key = folder_of(config), identity.local_key(Path(config.compute.output_root))
    set_back(folder, step=1)
    path = folder / "checkpoint" / "checkpoint.json"
    text = path.read_text().splitlines()[0]
    path.write_text(f"{text}\n{checkpoint._signature(text, key)}\n")
    before = steps(folder)
    record = run.run(config)
    assert record.status == "failed" and record.error is not None
    assert "the noise of step 1 was used before with another state" in record.error
    assert steps(folder) == before


def test_an_older_checkpoint_of_a_secure_run_is_refused(config: Config, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = folder_of(secure(config))
    interrupted(config, monkeypatch, after=3)
    old = {path.name: path.read_bytes() for path in (folder / "checkpoint").iterdir()}
    interrupted(config, monkeypatch, after=5)
    for path in (folder / "checkpoint").iterdir():
        path.unlink()
    for name, content in old.items():
        (folder / "checkpoint" / name).write_bytes(content)
    with pytest.raises(ConfigError, match="is of step 2, but step 4 was reached"):
        run.run(config)
    checkpoint.remove(folder / "checkpoint")
    record = run.run(config)
    assert record.status == "done" and record.privacy is not None and record.privacy.attempts == 2


def test_a_run_whose_ledger_was_removed_does_not_go_on(config: Config, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = folder_of(secure(config))
    interrupted(config, monkeypatch, after=3)
    (folder / "ledger.jsonl").unlink()
    with pytest.raises(ConfigError, match="ledger.jsonl lacks rows that were there"):
        run.run(config)


def test_a_forced_run_keeps_the_finished_record_until_it_is_done(
    config: Config, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = run.run(config)
    config.compute.force = True
    for error in (Killed(), RuntimeError("no")):
        with monkeypatch.context() as patch:
            interrupt(patch, 3, error)
            if isinstance(error, Killed):
                with pytest.raises(Killed):
                    run.run(config)
            else:
                assert run.run(config).status == "failed"
        assert records.read(folder_of(config)) == first
    assert run.run(config).provenance["started"] >= first.provenance["started"]


def test_a_full_disk_fails_one_run_and_its_checkpoint_stays(
    config: Config, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run.run(config)
    one = folder_of(config)
    config.compute.output_root = str(tmp_path / "again")
    with monkeypatch.context() as patch:
        save = checkpoint.save

        def full(folder: Path, made: Any, stamp: Any, key: bytes) -> None:
            if made.step == 4:
                raise OSError(28, "No space left on device")
            save(folder, made, stamp, key)

        patch.setattr(checkpoint, "save", full)
        record = run.run(config)
    assert record.status == "failed" and record.error is not None and "No space left" in record.error
    assert run.run(config).status == "done"
    assert_the_same_run(one, folder_of(config))


@contextmanager
def largest_file(size: int) -> Iterator[None]:
    """The system refuses longer files, as a full disk does."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


@pytest.mark.parametrize(("size", "what"), [(1000, "record.json"), (12_000, "checkpoint")])
def test_a_disk_that_is_really_full_loses_no_finished_record(config: Config, size: int, what: str) -> None:
    first = run.run(config)
    config.environment.seed = 1
    with largest_file(size):
        if what == "record.json":
            with pytest.raises(OSError, match="File too large"):
                run.run(config)
        else:
            record = run.run(config)
            assert record.status == "failed" and record.error is not None and what in record.error
    config.environment.seed, config.compute.force = 0, True
    with largest_file(size), contextlib.suppress(OSError):
        assert run.run(config).status == "failed"
    assert records.read(folder_of(config)) == first
    config.environment.seed, config.compute.force = 1, False
    assert run.run(config).status == "done"


def test_a_folder_that_cannot_be_written_is_one_line(config: Config, tmp_path: Path) -> None:
    config.compute.output_root = str(tmp_path / "file")
    (tmp_path / "file").touch()
    done = dptune(*arguments(config))
    assert done.returncode == 1 and done.stderr.count("\n") == 1
    assert "File exists" in done.stderr and str(tmp_path / "file") in done.stderr


PROGRAM = """
import signal, sys
signal.signal(signal.SIGINT, signal.default_int_handler)  # Jobs in the background of a shell ignore Ctrl-C.
from dptune.cli import main
main(sys.argv[1:])
"""


def arguments(config: Config, *more: str) -> list[str]:
    own = [
        f"{group}.{name}={'null' if value is None else value}"
        for group, names in {
            "model": ("name", "path"),
            "data": ("train_size", "validation_size", "test_size"),
            "hyperparameter": ("steps", "warmup_steps", "expected_batch_size", "rank"),
            "compute": ("checkpoint_every", "output_root", "cache_dir"),
        }.items()
        for name in names
        for value in [getattr(getattr(config, group), name)]
    ]
    return [*own, *more]


def command(config: Config, *more: str) -> list[str]:
    return [sys.executable, "-c", PROGRAM, *arguments(config, *more)]


def composed(config: Config, *more: str) -> Config:
    """The config that these arguments mean."""
    with initialize_config_dir(str(ROOT / "conf"), version_base="1.3"):
        return strict(without_hydra(compose("config", arguments(config, *more))))


def wait_for(condition: Any, seconds: float = 120) -> None:
    limit = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < limit
        time.sleep(0.005)


def lines(path: Path) -> int:
    return path.read_text().count("\n") if path.exists() else 0


def test_a_process_that_is_killed_or_stopped_is_gone_on_for(config: Config, tmp_path: Path) -> None:
    config.hyperparameter.steps, config.compute.checkpoint_every = 60, 3
    config = composed(config)
    assert run.run(config).status == "done"
    one = folder_of(config)
    config.compute.output_root = str(tmp_path / "killed")
    two = folder_of(config)
    for rows_begun, how in ((10, signal.SIGKILL), (25, signal.SIGINT), (40, signal.SIGTERM)):
        process = Started(arguments(config))
        wait_for(lambda begun=rows_begun: lines(two / "ledger.jsonl") >= begun)
        process.send_signal(how)
        _, said = process.communicate(timeout=60)
        assert process.returncode == (130 if how == signal.SIGINT else -how)
        assert ("interrupted; finished runs are kept" in said) is (how == signal.SIGINT)
        found = records.read(two)
        assert found is not None and found.status == "running" and holder(two) is None
    assert run.run(config).status == "done"
    assert (two / "run.log").read_text().count("going on after step") == 3
    assert_the_same_run(one, two)

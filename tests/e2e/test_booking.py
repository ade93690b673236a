"""Runs and the budget of their data: booked before they begin, once for each transcript, refused when it is spent."""

import dataclasses
import math
import shutil
from pathlib import Path

import pytest
from processes import dptune
from test_search import search_of

from dptune.config.schema import Config, ConfigError
from dptune.privacy.budget import Account
from dptune.records.record import CHECKPOINT_FOLDER
from dptune.runs.booking import transcript
from dptune.runs.budget import TOKEN_FILE, accounts_of, describe
from dptune.runs.run import run
from dptune.runs.setup import set_up

pytestmark = pytest.mark.numerical


@pytest.fixture
def private(config: Config, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Config:
    monkeypatch.setenv("DPTUNE_HOME", str(tmp_path / "home"))
    data = dataclasses.replace(config.data, public=False)
    return dataclasses.replace(config, data=data, privacy=dataclasses.replace(config.privacy, delta=1e-4))


def with_privacy(config: Config, **changes: object) -> Config:
    return dataclasses.replace(config, privacy=dataclasses.replace(config.privacy, **changes))  # type: ignore[arg-type]


def the_account() -> Account:
    (account,) = accounts_of()
    return account


def test_a_run_is_booked_once_and_every_new_transcript_of_it_again(private: Config) -> None:
    record = run(private)
    (booking,) = the_account().bookings
    assert record.privacy is not None
    assert (booking.run, booking.epsilon, booking.delta) == (record.run_id, record.guarantee.epsilon, 1e-4)
    run(private)  # It is finished.
    assert len(the_account().bookings) == 1
    forced = dataclasses.replace(private, compute=dataclasses.replace(private.compute, force=True))
    run(forced)
    assert [item.attempt for item in the_account().bookings] == [1, 2]


def test_going_on_from_a_checkpoint_is_the_same_transcript(private: Config, monkeypatch: pytest.MonkeyPatch) -> None:
    from dptune.runs import run as runs

    def stop(*args: object, **kwargs: object) -> None:
        raise KeyboardInterrupt

    compute = dataclasses.replace(private.compute, checkpoint_every=1)
    private = dataclasses.replace(private, compute=compute)
    with monkeypatch.context() as patch:
        patch.setattr(runs, "save_adapter", stop)
        with pytest.raises(KeyboardInterrupt):
            run(private)
    (booking,) = the_account().bookings
    folder = Path(private.compute.output_root) / booking.run
    setup = set_up(private, booking.run)
    assert transcript(setup, folder) == 1
    (folder / CHECKPOINT_FOLDER).rename(folder / "elsewhere")
    assert transcript(setup, folder) == 2
    (folder / "elsewhere").rename(folder / CHECKPOINT_FOLDER)
    assert run(private).status == "done"
    assert len(the_account().bookings) == 1


def test_a_copy_of_a_run_and_a_run_without_its_ledger_are_booked_again(
    private: Config, monkeypatch: pytest.MonkeyPatch
) -> None:
    from dptune.runs import run as runs

    def stop(*args: object, **kwargs: object) -> None:
        raise KeyboardInterrupt

    compute = dataclasses.replace(private.compute, checkpoint_every=1)
    private = dataclasses.replace(private, compute=compute)
    with monkeypatch.context() as patch:
        patch.setattr(runs, "save_adapter", stop)
        with pytest.raises(KeyboardInterrupt):
            run(private)
    root = Path(private.compute.output_root)
    copy = dataclasses.replace(private, compute=dataclasses.replace(compute, output_root=str(root.parent / "copy")))
    shutil.copytree(root, root.parent / "copy")
    assert run(copy).status == "done"
    assert len(the_account().bookings) == 2
    (folder,) = (path.parent for path in root.glob("*/record.json"))
    for path in folder.iterdir():
        if path.name != TOKEN_FILE:
            shutil.rmtree(path) if path.is_dir() else path.unlink()
    assert run(private).status == "done"
    assert sorted(item.attempt for item in the_account().bookings) == [1, 1, 2]


def test_a_run_that_does_not_fit_writes_nothing(private: Config) -> None:
    run(with_privacy(private, budget=8.5))
    before = sorted(path.name for path in Path(private.compute.output_root).iterdir())
    other = dataclasses.replace(private, environment=dataclasses.replace(private.environment, seed=1))
    with pytest.raises(ConfigError, match=r"is left after 1 runs, at delta 0.0001 and unit example"):
        run(with_privacy(other, budget=8.5))
    assert sorted(path.name for path in Path(private.compute.output_root).iterdir()) == before


def test_a_non_private_run_is_listed_without_a_guarantee(private: Config) -> None:
    run(with_privacy(private, enabled=False, target_epsilon=None))
    assert "1 runs have no guarantee" in describe(accounts_of())


def test_a_search_is_booked_as_a_whole_and_its_trials_are_not(private: Config) -> None:
    search = search_of(private, mean=3.0, eta=math.inf)
    trials = search.trials()
    (booking,) = the_account().bookings
    assert (booking.run, booking.epsilon) == (search.released.run_id, search.epsilon)
    assert (search.secret / TOKEN_FILE).is_file()
    assert (search.secret.parent.stat().st_mode & 0o777) == 0o700
    run(trials[0].config)
    assert len(search.trials()) == len(trials)
    assert the_account().bookings == [booking]
    assert "best of a secret number of runs (mean 3)" in describe(accounts_of())


def test_the_command_shows_the_account_of_a_data_set(private: Config, tmp_path: Path) -> None:
    run(private)
    done = dptune("budget", "data.public=false", cwd=tmp_path)
    assert "supportdesk" in done.stdout
    assert "for 1 runs together, no limit" in done.stdout

"""The account of privacy budgets on disk: across folders and processes, after kills, and data with several names."""

import dataclasses
import json
import subprocess
import sys
from pathlib import Path

import pytest

from dptune.config.checks import with_values
from dptune.config.schema import Config, ConfigError
from dptune.data.sources import load_dataset
from dptune.identity import run_id
from dptune.privacy.budget import Spending
from dptune.privacy.events import Event
from dptune.runs import budget
from dptune.runs.budget import accounts_of, book, describe

DELTA = 1e-4


@pytest.fixture(autouse=True)
def _own_account(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DPTUNE_HOME", str(tmp_path / "home"))


def records(folder: Path, name: str = "people.jsonl", first: int = 0) -> Path:
    path = folder / name
    rows = [{"instruction": "Say it.", "input": f"line {n}", "output": f"word {n}"} for n in range(first, first + 200)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def config_of(path: Path, root: Path, limit: float | None = None, **values: object) -> Config:
    given = {
        "data.name": "files",
        "data.train_size": None,
        "data.path": str(path),
        "compute.output_root": str(root),
        "privacy.delta": DELTA,
        "privacy.budget": limit,
        "hyperparameter.expected_batch_size": 16,
        **{name.replace("__", "."): value for name, value in values.items()},
    }
    return with_values(Config(), given.items())


def spend(config: Config, run: str, sigma: float = 2.0, attempt: int = 1) -> None:
    spending = Spending.of_run([Event(sigma, 0.1, 50)], [], DELTA)
    book(config, load_dataset(config), run, Path(config.compute.output_root) / run, spending, attempt)


def test_runs_in_several_output_folders_share_the_account_of_their_data(tmp_path: Path) -> None:
    path = records(tmp_path)
    spend(config_of(path, tmp_path / "a"), "first")
    spend(config_of(path, tmp_path / "b"), "second")
    (account,) = accounts_of()
    assert [booking.run for booking in account.bookings] == ["first", "second"]
    assert account.spent > account.bookings[0].epsilon
    text = describe([account])
    assert "people.jsonl" in text
    assert "for 2 runs together, no limit" in text


def test_going_on_costs_nothing_and_another_transcript_or_a_deleted_folder_does(tmp_path: Path) -> None:
    config = config_of(records(tmp_path), tmp_path / "out")
    for _ in range(3):
        spend(config, "run")
    assert len(accounts_of()[0].bookings) == 1
    spend(config, "run", attempt=2)
    assert len(accounts_of()[0].bookings) == 2
    (tmp_path / "out" / "run" / budget.TOKEN_FILE).unlink()
    spend(config, "run")
    assert len(accounts_of()[0].bookings) == 3


def test_a_run_that_would_exceed_the_budget_is_refused_in_one_line_before_anything_is_written(tmp_path: Path) -> None:
    config = config_of(records(tmp_path), tmp_path / "out", 4.0)
    spend(config, "first")
    left = accounts_of()[0].left_text(4.0)
    with pytest.raises(ConfigError) as caught:
        spend(config, "second", sigma=0.8)
    assert str(caught.value).startswith("privacy.budget: run second would add epsilon ")
    assert f"{left} of 4 is left after 1 runs, at delta 0.0001 and unit example" in str(caught.value)
    assert "\n" not in str(caught.value)
    assert [path.name for path in (tmp_path / "out").iterdir() if not path.name.startswith(".")] == ["first"]
    assert len(accounts_of()[0].bookings) == 1


def test_subsets_conditions_and_altered_files_are_the_same_data(tmp_path: Path) -> None:
    path = records(tmp_path)
    spend(config_of(path, tmp_path), "all")
    spend(config_of(path, tmp_path, data__train_size=50, data__declared_size=300), "subset")
    spend(config_of(path, tmp_path, data_sensitivity__label_noise=1.0), "noisy")
    spend(config_of(records(tmp_path, "more.jsonl", first=20), tmp_path), "altered")
    (account,) = accounts_of()
    assert len(account.bookings) == 4
    spend(config_of(records(tmp_path, "others.jsonl", first=1000), tmp_path), "others")
    assert len(accounts_of()) == 2


def test_users_and_examples_are_apart_and_it_is_said(tmp_path: Path) -> None:
    path = records(tmp_path)
    config = config_of(path, tmp_path)
    spend(config, "examples")
    data = load_dataset(config)
    users = dataclasses.replace(config, privacy=dataclasses.replace(config.privacy, unit="user_els"))
    spending = Spending.of_run([Event(2.0, 0.1, 50, 4)], [], DELTA)
    book(users, data, "users", tmp_path / "users", spending)
    assert {account.unit for account in accounts_of()} == {"example", "user"}
    assert "Accounts of different units are apart" in describe(accounts_of())


def test_a_run_without_a_guarantee_is_shown_as_one_and_public_data_are_not_booked(tmp_path: Path) -> None:
    config = config_of(records(tmp_path), tmp_path)
    book(config, load_dataset(config), "bare", tmp_path / "bare", None)
    assert "1 runs have no guarantee" in describe(accounts_of())
    assert accounts_of()[0].spent == 0
    public = config_of(records(tmp_path, "open.jsonl", 5000), tmp_path, data__public=True)
    spend(public, "public")
    assert len(accounts_of()) == 1


def test_a_torn_last_line_is_a_run_that_never_began_and_a_torn_other_one_stops_every_run(tmp_path: Path) -> None:
    config = config_of(records(tmp_path), tmp_path)
    spend(config, "first")
    file = budget.home() / budget.ACCOUNT_FILE
    whole = file.read_bytes()
    file.write_bytes(whole + b'{"kind": "run", "account": "')
    assert len(accounts_of()[0].bookings) == 1
    spend(config, "second")
    assert [booking.run for booking in accounts_of()[0].bookings] == ["first", "second"]
    assert file.read_bytes().startswith(whole)
    file.write_bytes(whole[10:])
    with pytest.raises(ConfigError, match="is damaged"):
        spend(config, "third")


def test_an_account_that_cannot_be_written_stops_the_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = config_of(records(tmp_path), tmp_path)
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("DPTUNE_HOME", str(tmp_path / "file" / "below"))
    with pytest.raises(ConfigError, match="set DPTUNE_HOME"):
        spend(config, "first")


BOTH = """
import sys
from pathlib import Path
sys.path.insert(0, {tests!r})
from test_account import config_of, spend
config = config_of(Path({path!r}), Path({root!r}), {limit})
try:
    spend(config, sys.argv[1])
except Exception as error:
    print(type(error).__name__)
"""


def test_of_processes_that_book_at_once_no_more_are_let_through_than_the_budget_allows(tmp_path: Path) -> None:
    path = records(tmp_path)
    one = Spending.of_run([Event(2.0, 0.1, 50)], [], DELTA)
    code = BOTH.format(tests=str(Path(__file__).parent), path=str(path), root=str(tmp_path / "out"), limit=one.epsilon)
    runs = [
        subprocess.Popen([sys.executable, "-c", code, f"run{n}"], stdout=subprocess.PIPE, text=True) for n in range(3)
    ]
    said = sorted(run.communicate(timeout=120)[0].strip() for run in runs)
    assert said == ["", "ConfigError", "ConfigError"]
    assert len(accounts_of()[0].bookings) == 1


def test_the_budget_names_no_run(tmp_path: Path) -> None:
    path = records(tmp_path)
    names = {run_id(config_of(path, tmp_path, limit)) for limit in (None, 4.0, 8.0)}
    assert len(names) == 1


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"privacy.budget": 8.0}, "privacy.budget=8: public data have no budget"),
        (
            {"privacy.budget": 8.0, "data.public": False, "privacy.enabled": False, "privacy.target_epsilon": None},
            "none",
        ),
        ({"privacy.budget": 0.0, "data.public": False}, "privacy.budget=0 must be above 0"),
    ],
)
def test_a_budget_that_could_not_hold_is_refused(values: dict[str, object], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        with_values(Config(), values.items())

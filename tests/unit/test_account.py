"""The account of privacy budgets on disk: across folders and processes, after kills, and data with several names."""

import csv
import dataclasses
import json
import subprocess
import sys
import unicodedata
from collections.abc import Callable
from pathlib import Path

import pytest

from dptune.config.checks import with_values
from dptune.config.schema import Config, ConfigError
from dptune.data.schema import Example
from dptune.data.sketch import SIZE, Sketch
from dptune.data.sources import load_dataset
from dptune.identity import run_id
from dptune.privacy.budget import Spending
from dptune.privacy.events import Event
from dptune.runs import budget
from dptune.runs.budget import accounts_of, book, describe, mark_begun, mark_done

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


def spend(config: Config, run: str, sigma: float = 2.0, *, goes_on: bool = False) -> None:
    spending = Spending.of_run([Event(sigma, 0.1, 50)], [], DELTA)
    book(config, load_dataset(config), run, Path(config.compute.output_root) / run, spending, goes_on=goes_on)


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
    folder = tmp_path / "out" / "run"
    for _ in range(3):
        spend(config, "run")  # It died before it looked at data.
    mark_begun(config, folder)
    spend(config, "run", goes_on=True)
    assert bookings() == [1]
    spend(config, "run")
    spend(config, "run")
    assert bookings() == [1, 2]
    mark_begun(config, folder)
    mark_done(config, folder)
    spend(config, "run", goes_on=True)  # A checkpoint of it that was put back.
    assert bookings() == [1, 2, 3]
    (folder / budget.TOKEN_FILE).unlink()
    spend(config, "run")
    assert bookings() == [1, 2, 3, 1]


def bookings() -> list[int]:
    (account,) = accounts_of()
    return [booking.attempt for booking in account.bookings]


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


PEOPLE = [
    {
        "instruction": "Is the review good or bad?",
        "input": f"I bought the café table number {n} and it was {('fine', 'poor')[n % 2]} in street {n * n}.",
        "output": ("good", "bad")[n % 2],
    }
    for n in range(600)
]


def jsonl(folder: Path, rows: list[dict[str, str]], end: str = "\n") -> dict[str, object]:
    path = folder / "again.jsonl"
    path.write_bytes("".join(json.dumps(row, ensure_ascii=False) + end for row in rows).encode())
    return {"data.path": str(path)}


def as_csv(folder: Path, rows: list[dict[str, str]]) -> dict[str, object]:
    path = folder / "again.csv"
    with path.open("w", newline="", encoding="utf-8") as stream:
        writer = csv.DictWriter(stream, ["OUTPUT", "Text", "Instruction"])
        writer.writeheader()
        writer.writerows(
            {"OUTPUT": row["output"], "Text": row["input"], "Instruction": row["instruction"]} for row in rows
        )
    named = {"output": "OUTPUT", "input": "Text", "instruction": "Instruction"}
    return {"data.path": str(path), **{f"data.columns.{role}": name for role, name in named.items()}}


def changed(text: Callable[[str], str], rows: list[dict[str, str]] = PEOPLE) -> list[dict[str, str]]:
    return [{name: text(value) for name, value in row.items()} for row in rows]


EXPORTS: dict[str, Callable[[Path], dict[str, object]]] = {
    "other order of columns and rows": lambda folder: jsonl(
        folder, [dict(reversed(row.items())) for row in reversed(PEOPLE)]
    ),
    "spaces and line ends": lambda folder: jsonl(
        folder, changed(lambda text: f"  {text.replace(' ', chr(160) + ' ')} "), "\r\n"
    ),
    "case": lambda folder: jsonl(folder, changed(str.upper)),
    "composed otherwise": lambda folder: jsonl(folder, changed(lambda text: unicodedata.normalize("NFD", text))),
    "names of columns in another case": lambda folder: as_csv(folder, PEOPLE),
    "one record more": lambda folder: jsonl(folder, [*PEOPLE, {"instruction": "New?", "input": "", "output": "yes"}]),
    "another split": lambda folder: jsonl(
        folder, [{**row, "split": ("test", "validation", "train")[n % 3]} for n, row in enumerate(PEOPLE)]
    ),
    "a twentieth of it": lambda folder: jsonl(folder, [*PEOPLE[:30], *strangers(570)]),
    "other labels": lambda folder: jsonl(
        folder, [{**row, "output": {"good": "bad", "bad": "good"}[row["output"]]} for row in PEOPLE]
    ),
    "another instruction": lambda folder: {
        **jsonl(folder, [{"input": row["input"], "output": row["output"]} for row in PEOPLE]),
        "data.columns.instruction": "=Say whether it is praise.",
    },
    "everything in one column": lambda folder: jsonl(
        folder,
        [{"instruction": f"{row['instruction']} {row['input']}", "output": row["output"]} for row in PEOPLE],
    ),
    "another condition and subset": lambda folder: {
        **jsonl(folder, list(reversed(PEOPLE))),
        "data_sensitivity.label_noise": 1.0,
        "data_sensitivity.instruction_perturbation": 1.0,
        "data.train_size": 40,
        "data.declared_size": 600,
    },
}


def strangers(count: int) -> list[dict[str, str]]:
    """Other people, who were asked the same and gave the same labels."""
    return [
        {**row, "input": f"My {n}th order never came to {n + 7} Other Road."} for n, row in enumerate(PEOPLE[:count])
    ]


def exported(root: Path, given: dict[str, object]) -> Config:
    return with_values(config_of(Path(str(given["data.path"])), root), given.items())


@pytest.mark.parametrize("export", EXPORTS)
def test_the_same_people_have_one_account_however_they_are_exported(tmp_path: Path, export: str) -> None:
    (tmp_path / "first").mkdir()
    spend(exported(tmp_path / "a", jsonl(tmp_path / "first", PEOPLE)), "first")
    spend(exported(tmp_path / "b", EXPORTS[export](tmp_path)), "second")
    (account,) = accounts_of()
    assert [booking.run for booking in account.bookings] == ["first", "second"]


def test_other_people_who_were_asked_the_same_have_an_account_of_their_own(tmp_path: Path) -> None:
    (tmp_path / "first").mkdir()
    spend(exported(tmp_path / "a", jsonl(tmp_path / "first", PEOPLE)), "first")
    spend(exported(tmp_path / "b", jsonl(tmp_path, strangers(500))), "second")
    assert [[booking.run for booking in account.bookings] for account in accounts_of()] == [["first"], ["second"]]


def test_of_large_sources_a_share_of_two_per_cent_is_seen_in_any_order_and_nothing_is_seen_where_nothing_is() -> None:
    def made(first: int, last: int) -> set[int]:
        sketch = Sketch()
        for n in range(last, first, -1):
            sketch.offer(Example("t", "Say it.", f"a line of the person with number {n}", None, "no", None, "train"))
        return set(sketch.lowest())

    one, two, other = made(0, 12_000), made(11_600, 24_000), made(24_000, 36_000)
    assert len(one) == len(two) == SIZE
    assert one & two
    assert not one & other


def test_what_an_account_keeps_of_records_has_its_key_and_is_nowhere_else(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = config_of(records(tmp_path), tmp_path / "out")
    spend(config, "run")
    data = load_dataset(config)
    kept = accounts_of()[0].records
    assert data.sketch and len(kept) == len(data.sketch)
    assert kept.isdisjoint(budget.keyed_hash(b"", (f"{mark:x}",)) for mark in data.sketch)
    assert str(data.sketch[0]) not in repr(data)
    monkeypatch.setenv("DPTUNE_HOME", str(tmp_path / "other"))
    spend(config, "run")
    assert kept.isdisjoint(accounts_of()[0].records)
    written = [path for path in (tmp_path / "out").rglob("*") if path.is_file()]
    assert not any(mark.encode() in path.read_bytes() for path in written for mark in kept)


def test_a_run_by_user_is_charged_to_the_examples_too(tmp_path: Path) -> None:
    config = config_of(records(tmp_path), tmp_path)
    spend_by_user(config, "users")
    example, user = sorted(accounts_of(), key=lambda account: account.unit)
    assert (example.unit, user.unit) == ("example", "user")
    assert example.spent == user.spent > 0
    spend(config, "examples")
    example, user = sorted(accounts_of(), key=lambda account: account.unit)
    assert [booking.run for booking in example.private] == ["users", "examples"]
    assert example.spent > user.spent
    spend_by_user(with_unit(config, "user_uls"), "means")
    example, user = sorted(accounts_of(), key=lambda account: account.unit)
    before, after = (account.bookings[-1] for account in (user, example))
    assert (before.run, after.run) == ("means", "means") and after.epsilon > before.epsilon
    assert "in the accounts of examples, too" in describe(accounts_of())


def test_a_run_by_user_that_exceeds_the_budget_of_the_examples_is_refused(tmp_path: Path) -> None:
    config = config_of(records(tmp_path), tmp_path)
    spend(config_of(records(tmp_path), tmp_path, 2.5), "examples")
    with pytest.raises(ConfigError, match=r"run users would add .* unit example"):
        spend_by_user(config, "users", sigma=1.0)
    assert not (tmp_path / "users").exists() and len(accounts_of()) == 1


def test_a_run_on_examples_promises_users_nothing_and_is_refused_where_they_have_a_budget(tmp_path: Path) -> None:
    config = config_of(records(tmp_path), tmp_path)
    limited = config_of(records(tmp_path), tmp_path, 9.0)
    spend_by_user(limited, "users")
    with pytest.raises(ConfigError, match=r"bounds nothing for a user of people.jsonl.*take privacy.unit=user_els"):
        spend(config, "examples")
    assert not (tmp_path / "examples").exists()
    book(config, load_dataset(config), "bare", tmp_path / "bare", None)  # Is listed, as it says itself.


def test_no_budget_of_users_holds_on_data_of_earlier_runs_on_examples(tmp_path: Path) -> None:
    config = config_of(records(tmp_path), tmp_path)
    spend(config, "examples")
    book(config, load_dataset(config), "bare", tmp_path / "bare", None)
    with pytest.raises(ConfigError, match="1 runs on people.jsonl protect single examples, and bound nothing for a"):
        spend_by_user(config_of(records(tmp_path), tmp_path, 9.0), "users")
    spend_by_user(config, "users")
    user = next(account for account in accounts_of() if account.unit == "user")
    assert [(booking.run, booking.cost is None) for booking in user.bookings] == [
        ("examples", True),
        ("bare", True),
        ("users", False),
    ]
    assert "2 runs have no guarantee" in describe([user])
    spend(config, "more")
    with pytest.raises(ConfigError, match="2 runs on people.jsonl protect single examples"):
        spend_by_user(config_of(records(tmp_path), tmp_path, 9.0), "limited")


def with_unit(config: Config, unit: str) -> Config:
    return dataclasses.replace(config, privacy=dataclasses.replace(config.privacy, unit=unit))


def spend_by_user(config: Config, run: str, sigma: float = 4.0) -> None:
    given = config if config.privacy.unit != "example" else with_unit(config, "user_els")
    spending = Spending.of_run([Event(sigma, 0.1, 50, 4)], [], DELTA)
    book(given, load_dataset(config), run, Path(config.compute.output_root) / run, spending)


@pytest.mark.parametrize("limits", [(8.0, 4.0, 8.0), (8.0, 4.0, None), (4.0, 8.0, 8.0)])
def test_of_all_limits_that_were_named_the_lowest_counts(tmp_path: Path, limits: tuple[float | None, ...]) -> None:
    path = records(tmp_path)
    for number, limit in enumerate(limits):
        spend(config_of(path, tmp_path, limit), f"small{number}", sigma=12.0)
    (account,) = accounts_of()
    assert account.limit == 4
    assert "limit 4, left" in describe([account])
    one = Spending.of_run([Event(0.8, 0.1, 50)], [], DELTA)
    assert 4 < one.epsilon < 7
    for limit in (8.0, None):
        with pytest.raises(ConfigError, match="of 4 is left after 3 runs"):
            spend(config_of(path, tmp_path, limit), "large", sigma=0.8)


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

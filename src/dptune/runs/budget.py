"""The account of privacy budgets of this machine: every private run on private data is booked before it begins.

One file of JSON lines, only ever appended to, in the user's state folder: `$DPTUNE_HOME`, or `dptune` below
`$XDG_STATE_HOME` (`~/.local/state`). Data are told apart by hashes under a key that lies beside it. A run's folder
keeps the name of its booking, so that going on costs nothing, and doing it again elsewhere does. No torch here.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
import secrets
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from dptune.config.files import data_files
from dptune.config.schema import Config, ConfigError, is_public
from dptune.data.sources import Dataset
from dptune.identity import content_hash, kept_key, keyed_hash, local_key
from dptune.privacy.accounting import epsilon_text
from dptune.privacy.budget import Account, Booking, BudgetError, Spending, order_for, parse
from dptune.records.files import sync, write_atomically, write_once
from dptune.records.lock import locked
from dptune.records.record import RECORD_FILE

ACCOUNT_FILE, TOKEN_FILE = "budget.jsonl", "booking"
SECRET_FOLDER = "NON_PRIVATE_trials"
"""Folder, inside the output folder, of all trials of all searches."""
DRAW_FILE = "search.json"
"""How many trials there are, and which: the secret of a search, in its folder."""
PATIENCE = 60.0
"""Seconds that a run waits for other runs that book."""


def home() -> Path:
    """The folder of the account."""
    if given := os.environ.get("DPTUNE_HOME"):
        return Path(given)
    state = os.environ.get("XDG_STATE_HOME")
    return (Path(state) if state else Path.home() / ".local" / "state") / "dptune"


def book(
    config: Config, data: Dataset, run: str, folder: Path, spending: Spending | None, *, goes_on: bool = False
) -> None:
    """Book a run before anything of it is written; a transcript that is booked, and may go on, costs nothing.

    The account says what has begun and what is done, and not the files of the run: those may be put back.

    Args:
        config: of the run.
        data: its data; public data are not booked.
        run: run id.
        folder: its folder, where the name of the booking is kept.
        spending: what it costs; None for a run without a guarantee.
        goes_on: whether it has a checkpoint to go on from. Otherwise it is another transcript, unless the last one
            that is booked has not begun.

    Raises:
        ConfigError: when the run would exceed the budget, or the account cannot be read or written.
    """
    if is_public(config.data):
        check_public(config)
        return
    unit = "example" if config.privacy.unit == "example" else "user"
    costs = spending.by_unit(config.privacy.unit) if spending else {"example": None, "user": None}
    with _account() as path:
        key, known = _key(path.parent), _read(path)
        named = _token(folder, known)
        token = named or secrets.token_hex(8)
        source, records = source_of(config, key), sketch_of(data, key)
        accounts = [item for item in known if _is_same(item, source, records)]
        mine = [account for account in accounts if account.unit == unit]
        booked = [
            (item.attempt, account.is_over(item, goes_on=goes_on))
            for account in mine
            for item in account.bookings
            if (item.token, item.run) == (token, run)
        ]
        last = max((number for number, _ in booked), default=0)
        over = any(is_over for number, is_over in booked if number == last)
        if booked and (spending is None or not over):
            return
        attempt = last + 1
        rows: list[dict[str, Any]] = []
        for kind, cost in costs.items():
            if (kind != unit and cost is None) or any(account.unit == kind for account in accounts):
                continue
            made = _opened(config, kind, cost, accounts)
            opening = {name: getattr(made, name) for name in ("label", "unit", "delta", "order")}
            rows.append({"kind": "open", "account": made.name, **opening})
            rows += [{"kind": "run", "account": made.name, **dataclasses.asdict(item)} for item in made.bookings]
            accounts.append(made)
        for account in accounts:
            cost = costs[account.unit]
            # A budget is for the unit that was named with it.
            limit = config.privacy.budget if account.unit == unit else None
            if cost is not None:
                account.check(cost, run, limit)
            elif spending is not None:
                account.check_foreign(run)
            if source not in account.sources or not set(records) <= account.records:
                rows.append({"kind": "data", "account": account.name, "source": source, "records": records})
            booking = Booking(
                token,
                attempt,
                run,
                cost.at(account.order) if cost else None,
                cost.epsilon if cost else None,
                config.privacy.delta,
                cost.what if cost else spending.what if spending else "no guarantee",
                limit,
                datetime.now(UTC).isoformat(timespec="seconds"),
                unit if spending else "",
            )
            rows.append({"kind": "run", "account": account.name, **dataclasses.asdict(booking)})
        # The folder first: a booking without it would be paid twice, and it without a booking is booked next time.
        folder.mkdir(parents=True, exist_ok=True)
        if named is None:
            write_atomically(folder / TOKEN_FILE, token)
        place = _place(folder / TOKEN_FILE)
        rows += [{"kind": "place", "account": item.name, "token": token, "place": place} for item in accounts]
        _append(path, rows)


def drawn_once(folder: Path, draw: Callable[[], str] | None = None) -> str:
    """What a search that is booked has drawn, from its file: drawn at the first call, and never again.

    The account keeps a hash of it, so that neither a lost file nor one that was written by hand is a draw.

    Args:
        folder: of the search, where the name of its booking is.
        draw: gives the text of the file, in which something random keeps the hash from telling the rest; None where it
            must have been drawn.

    Raises:
        ConfigError: when the file is not there, or not the same, although it was drawn.
    """
    file = folder / DRAW_FILE
    with _account() as path:
        accounts = _read(path)
        token = _token(folder, accounts)
        booked = [item for item in accounts if any(booking.token == token for booking in item.bookings)]
        known = {account.draws[token] for account in booked if token in account.draws}
        if draw is not None and booked and not known and not file.exists():
            text = draw()
            known = {hashlib.sha256(text.encode()).hexdigest()}
            rows = [{"kind": "draw", "account": item.name, "token": token, "hash": min(known)} for item in booked]
            # The account first: what nobody has seen may be lost, but not be drawn twice.
            _append(path, rows)
            write_once(file, text.encode())
        text = file.read_text(encoding="utf-8") if file.exists() else ""
        if known != {hashlib.sha256(text.encode()).hexdigest()}:
            raise BudgetError(
                f"{file} is {'not what was drawn here' if file.exists() else 'gone, although it was drawn'}: how many "
                "trials there are is drawn once; put it back, set DPTUNE_HOME to the account that it is in, or remove "
                f"{folder} and start another search, which costs as much again"
            )
        return text


def mark_begun(config: Config, folder: Path) -> None:
    """Note that a transcript looks at its data from now on: without a checkpoint it is not the same one again.

    Raises:
        ConfigError: when the account cannot be read or written.
    """
    if is_trial(folder):
        _mark_of_trial(folder).touch()
    elif not is_public(config.data):
        _note("begun", folder)


def check_public(config: Config) -> None:
    """Refuse files that are said to be public and have a budget, which somebody named to protect them.

    Raises:
        ConfigError: naming the way out.
    """
    if config.data.path is None or not (home() / ACCOUNT_FILE).exists():
        return
    for account in accounts_of(config):
        if account.limit is not None:
            raise ConfigError(
                f"data.public=true: {account.label} has a budget of {account.limit:g} in {home() / ACCOUNT_FILE}, and "
                "runs on public data are not booked; leave data.public out"
            )


def mark_done(config: Config, folder: Path) -> None:
    """Note that a run is done: a checkpoint of it that turns up again is not gone on from for nothing."""
    if not is_trial(folder) and not is_public(config.data):
        _note("ended", folder)


def check_trial(config: Config, folder: Path) -> None:
    """Refuse what is no trial, and is not paid for, and a trial that is done again, which would be choosing.

    Raises:
        ConfigError: saying which.
    """
    if not is_public(config.data):
        number, runs = folder.parent.name, json.loads(drawn_once(folder.parent.parent)).get("runs", ())
        if not number.isdecimal() or dict(enumerate(runs)).get(int(number)) != folder.name:
            raise ConfigError(
                f"{folder} is no trial of a search, whose folder {SECRET_FOLDER} it is in: its runs are not booked one "
                "by one; use another compute.output_root"
            )
    if _mark_of_trial(folder).exists() and not (folder / RECORD_FILE).exists():
        raise ConfigError(
            f"{folder} was begun, and its record is gone: a trial of a search is done once, however it ends; put it "
            "back, or start another search, with another environment.seed=..., which costs as much again"
        )


def _mark_of_trial(folder: Path) -> Path:
    return folder.parent.parent / f"begun-{folder.parent.name}"


def _note(what: str, folder: Path) -> None:
    with _account() as path:
        accounts = _read(path)
        token = _token(folder, accounts)
        rows = [
            {"kind": what, "account": account.name, "token": token, "attempt": max(attempts)}
            for account in accounts
            if (attempts := [item.attempt for item in account.bookings if item.token == token])
        ]
        _append(path, rows)


def is_trial(folder: Path) -> bool:
    """Whether a run is a trial of a search, which is booked as a whole: how many trials it has is its secret."""
    return SECRET_FOLDER in folder.parts


def source_of(config: Config, key: bytes) -> str:
    """Names where data come from, whatever subset or condition a run takes: files by content, else by name."""
    data = config.data
    if data.path is not None:
        return keyed_hash(key, sorted(content_hash(file) for file in data_files(data.path)))
    return keyed_hash(key, (data.hub_id or data.name, data.hub_config or ""))


def sketch_of(data: Dataset, key: bytes) -> list[str]:
    """Hashes of some protected records under the account's key: another file with the same people has some of them."""
    return [keyed_hash(key, (f"{mark:x}",)) for mark in data.sketch]


def accounts_of(config: Config | None = None) -> list[Account]:
    """All accounts, or those of the data of a config, which is not read but named by its files.

    Raises:
        ConfigError: when the account cannot be read.
    """
    path = home() / ACCOUNT_FILE
    try:
        found = _read(path)
    except BudgetError as error:
        raise ConfigError(f"privacy.budget: {error}") from None
    if config is None:
        return found
    source = source_of(config, local_key(home()))
    return [account for account in found if source in account.sources]


def describe(accounts: Sequence[Account]) -> str:
    """The accounts for people, epsilon rounded up."""
    if not accounts:
        return f"no run on private data has been booked in {home() / ACCOUNT_FILE}"
    lines: list[str] = []
    for account in accounts:
        private, limit = account.private, account.limit
        lines.append(f"{account.label} ({account.name}), unit {account.unit}, delta {account.delta:g}")
        lines += [
            f"  {item.at}  {item.run}  "
            + ("no guarantee" if item.epsilon is None else f"epsilon {epsilon_text(item.epsilon)}  {item.what}")
            + (f"  (transcript {item.attempt})" if item.attempt > 1 else "")
            for item in account.bookings
        ]
        left = "" if limit is None else f", limit {limit:g}, left {account.left_text(limit)}"
        lines.append(
            f"  spent: epsilon {epsilon_text(account.spent)} for {len(private)} runs together{left or ', no limit'}"
        )
        if (named := [at for at, item in enumerate(account.bookings) if item.limit is not None]) and named[0] > 0:
            lines.append(
                f"  its limit was first named after {named[0]} runs: a guarantee only if it does not depend on them"
            )
        if others := len(account.bookings) - len(private):
            lines.append(f"  {others} runs have no guarantee: nothing above holds for what they tell")
        lines.append("")
    if len({account.unit for account in accounts}) > 1:
        lines.append(
            "Runs by user are in the accounts of examples, too. Runs on examples bound nothing for users with several."
        )
    lines.append(
        "Spent is by a Rényi filter at one order, fixed by the first run (SPECIFICATION.md 8.3): it holds although\n"
        "runs are chosen after others were seen, and is larger than that of the same runs planned in advance."
    )
    return "\n".join(lines)


_ORDER_WITHOUT_RUN = 8.0
"""Order of an account that a run without a guarantee opened."""


def _label(config: Config) -> str:
    data = config.data
    return Path(data.path).name if data.path else data.hub_id or data.name


def _opened(config: Config, unit: str, cost: Spending | None, accounts: Sequence[Account]) -> Account:
    """A new account; one of users has the runs on examples of the same data in it."""
    order = order_for(cost, config.privacy.budget) if cost else _ORDER_WITHOUT_RUN
    made = Account(secrets.token_hex(4), _label(config), unit, config.privacy.delta, order)
    if unit == "user":
        found = {(item.token, item.attempt): item for account in accounts for item in account.carried()}
        made.bookings += found.values()
    return made


def _is_same(account: Account, source: str, records: Sequence[str]) -> bool:
    return source in account.sources or not account.records.isdisjoint(records)


def _token(folder: Path, accounts: Sequence[Account]) -> str | None:
    """Name of a folder's bookings. A copy of a folder has none: what goes on there is another transcript."""
    file = folder / TOKEN_FILE
    if not file.is_file():
        return None
    token = file.read_text(encoding="ascii", errors="replace").strip()
    return token if any(account.places.get(token) == _place(file) for account in accounts) else None


def _place(path: Path) -> str:
    """Of a file in a folder: no copy has the same, nor a second name, nor what was put back where it had been.

    Numbers of files are given again; the time of the last change of a file's state cannot be set.
    """
    state = path.stat()
    return f"{state.st_ino}.{path.parent.stat().st_ino}.{state.st_ctime_ns}"


def _key(folder: Path) -> bytes:
    return kept_key(folder)


@contextmanager
def _account() -> Iterator[Path]:
    """The account's file, for this process alone. Raises ConfigError for all that goes wrong with it."""
    try:
        with _locked_account() as path:
            yield path
    except BudgetError as error:
        raise ConfigError(f"privacy.budget: {error}") from None
    except OSError as error:
        raise ConfigError(
            f"privacy.budget: the account in {home()} cannot be written ({error}); set DPTUNE_HOME to a folder that can"
        ) from None


@contextmanager
def _locked_account() -> Iterator[Path]:
    folder, give_up = home(), time.monotonic() + PATIENCE
    while True:
        with locked(folder) as lock:
            if lock is not None:
                yield folder / ACCOUNT_FILE
                return
        if time.monotonic() > give_up:
            raise BudgetError(f"another process has held {folder} for {PATIENCE:g} s; try again")
        time.sleep(0.02 + 0.08 * secrets.randbelow(1000) / 1000)


def _read(path: Path) -> list[Account]:
    """The accounts of a file. A last line without an end is of a process that died: its run never began."""
    content = path.read_bytes() if path.exists() else b""
    try:
        return parse(content[: content.rfind(b"\n") + 1].decode().splitlines())
    except (BudgetError, UnicodeDecodeError) as error:
        raise BudgetError(
            f"{path} is damaged ({error}): mend it, or move it away and with it what is known of earlier runs"
        ) from None


def _append(path: Path, rows: Sequence[dict[str, Any]]) -> None:
    """Add lines in one write, on the disk before anything else happens; what was torn before them is dropped."""
    path.touch(mode=0o600)
    with path.open("rb+") as stream:
        content = stream.read()
        stream.truncate(content.rfind(b"\n") + 1)
        stream.seek(0, os.SEEK_END)
        stream.write("".join(json.dumps(row) + "\n" for row in rows).encode())
        stream.flush()
        os.fsync(stream.fileno())
    sync(path.parent)

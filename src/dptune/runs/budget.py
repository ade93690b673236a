"""The account of privacy budgets of this machine: every private run on private data is booked before it begins.

One file of JSON lines, only ever appended to, in the user's state folder: `$DPTUNE_HOME`, or `dptune` below
`$XDG_STATE_HOME` (`~/.local/state`). Data are told apart by hashes under a key that lies beside it. A run's folder
keeps the name of its booking, so that going on costs nothing, and doing it again elsewhere does. No torch here.
"""

from __future__ import annotations

import dataclasses
import json
import os
import secrets
import time
from collections.abc import Iterator, Sequence
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
from dptune.records.files import sync
from dptune.records.lock import locked

ACCOUNT_FILE, TOKEN_FILE = "budget.jsonl", "booking"
SECRET_FOLDER = "NON_PRIVATE_trials"
"""Folder, inside the output folder, of all trials of all searches."""
SKETCH = 256
"""Hashes of records that are kept of each source: those of the lowest value, whichever source they are from, so that
two sources with a few per cent of their records in common are found to be the same data."""
PATIENCE = 60.0
"""Seconds that a run waits for other runs that book."""


def home() -> Path:
    """The folder of the account."""
    if given := os.environ.get("DPTUNE_HOME"):
        return Path(given)
    state = os.environ.get("XDG_STATE_HOME")
    return (Path(state) if state else Path.home() / ".local" / "state") / "dptune"


def book(
    config: Config, data: Dataset, run: str, folder: Path, spending: Spending | None, attempt: int | None = 1
) -> None:
    """Book a run before anything of it is written; a transcript that is booked already costs nothing.

    Args:
        config: of the run.
        data: its data; public data are not booked.
        run: run id.
        folder: its folder, where the name of the booking is kept.
        spending: what it costs; None for a run without a guarantee.
        attempt: number of the transcript in this folder, from 1; None for one more than are booked.

    Raises:
        ConfigError: when the run would exceed the budget, or the account cannot be read or written.
    """
    if is_public(config.data):
        return
    token = _token(folder)
    try:
        with _account() as path:
            key = _key(path.parent)
            source, records = source_of(config, key), sketch_of(data, key)
            unit = "example" if config.privacy.unit == "example" else "user"
            accounts = _read(path)
            mine = [item for item in accounts if item.unit == unit and _is_same(item, source, records)]
            if attempt is None:
                booked = [item.attempt for account in mine for item in account.bookings if item.token == token]
                attempt = max(booked, default=0) + 1
            if any((item.token, item.attempt) == (token, attempt) for account in mine for item in account.bookings):
                return
            rows: list[dict[str, Any]] = []
            if not mine:
                order = order_for(spending, config.privacy.budget) if spending else _ORDER_WITHOUT_RUN
                mine = [Account(secrets.token_hex(4), _label(config), unit, config.privacy.delta, order)]
                opening = {name: getattr(mine[0], name) for name in ("label", "unit", "delta", "order")}
                rows.append({"kind": "open", "account": mine[0].name, **opening})
            for account in mine:
                if spending is not None:
                    account.check(spending, run, config.privacy.budget)
                if source not in account.sources or not set(records) <= account.records:
                    rows.append({"kind": "data", "account": account.name, "source": source, "records": records})
                booking = Booking(
                    token,
                    attempt,
                    run,
                    spending.at(account.order) if spending else None,
                    spending.epsilon if spending else None,
                    config.privacy.delta,
                    spending.what if spending else "no guarantee",
                    config.privacy.budget,
                    datetime.now(UTC).isoformat(timespec="seconds"),
                )
                rows.append({"kind": "run", "account": account.name, **dataclasses.asdict(booking)})
            # The folder first: a booking without it would be paid twice, and it without a booking is booked next time.
            folder.mkdir(parents=True, exist_ok=True)
            (folder / TOKEN_FILE).touch()
            (folder / TOKEN_FILE).write_text(f"{token} {_place(folder / TOKEN_FILE)}", encoding="ascii")
            _append(path, rows)
    except BudgetError as error:
        raise ConfigError(f"privacy.budget: {error}") from None
    except OSError as error:
        raise ConfigError(
            f"privacy.budget: the account in {home()} cannot be written ({error}); set DPTUNE_HOME to a folder that can"
        ) from None


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
    """The lowest hashes of protected records: another file with the same people in it has many of them, too."""
    records = {
        keyed_hash(key, (example.input or example.instruction, example.output))
        for example in (*data.train, *data.validation)
    }
    return sorted(records)[:SKETCH]


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
        lines.append("Accounts of different units are apart: the epsilon of one says nothing of the runs of another.")
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


def _is_same(account: Account, source: str, records: Sequence[str]) -> bool:
    return source in account.sources or not account.records.isdisjoint(records)


def _token(folder: Path) -> str:
    """Name of a folder's bookings. A copy of a folder has none: what goes on there is another transcript."""
    try:
        token, place = (folder / TOKEN_FILE).read_text(encoding="ascii").split()
    except (FileNotFoundError, ValueError):
        return secrets.token_hex(8)
    return token if place == _place(folder / TOKEN_FILE) else secrets.token_hex(8)


def _place(path: Path) -> str:
    return str(path.stat().st_ino)


def _key(folder: Path) -> bytes:
    return kept_key(folder)


@contextmanager
def _account() -> Iterator[Path]:
    """The account's file, for this process alone."""
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

"""What a run costs the budget of its data, booked before anything of the run is written."""

from __future__ import annotations

from pathlib import Path

from dptune.config.schema import Config, is_public
from dptune.privacy.budget import Spending
from dptune.privacy.selection import score_event
from dptune.records.record import LEDGER_FILE
from dptune.runs.budget import book, is_trial
from dptune.runs.setup import Setup
from dptune.runs.training import ledger_of, load_checkpoint
from dptune.training.checkpoint import CheckpointError


def book_run(config: Config, setup: Setup, folder: Path) -> None:
    """Book a run. Trials are not booked: their search is, as a whole.

    Args:
        config: of the run.
        setup: its parts.
        folder: its folder, with the write-ahead ledger and the checkpoint of an earlier attempt.

    Raises:
        ConfigError: when the budget does not allow it; nothing is written then.
    """
    plan, score = setup.plan, config.privacy.score_noise_multiplier
    if is_trial(folder) or is_public(config.data):
        return
    events, scores = plan.events(), [] if score is None else [score_event(score)]
    if plan.private and not events and not scores:
        return  # Nothing of the data is released.
    spending = Spending.of_run(events, scores, plan.delta) if plan.private else None
    book(config, setup.data, folder.name, folder, spending, transcript(setup, folder) if plan.private else 1)
    if plan.private:
        # From now on there is a ledger: where a booked run has none, somebody has removed it, and what it knew.
        (folder / LEDGER_FILE).touch()


def transcript(setup: Setup, folder: Path) -> int | None:
    """Number of the transcript that the next attempt makes: the last one begun if it can go on, else another one.

    None for one more than are booked, where no ledger tells.
    """
    if not (folder / LEDGER_FILE).exists():
        return None
    begun = ledger_of(setup, folder).attempts
    try:
        goes_on = load_checkpoint(setup, folder) is not None
    except CheckpointError:
        goes_on = False
    return begun if goes_on else begun + 1

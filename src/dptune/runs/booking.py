"""What a run costs the budget of its data, booked before anything of the run is written."""

from __future__ import annotations

from pathlib import Path

from dptune.config.schema import Config, is_public
from dptune.privacy.budget import Spending
from dptune.privacy.selection import score_event
from dptune.records.record import LEDGER_FILE
from dptune.runs.budget import book, check_public, check_trial, is_trial
from dptune.runs.setup import Setup
from dptune.runs.training import load_checkpoint
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
    if is_trial(folder):
        check_trial(config, folder)
        return
    if is_public(config.data):
        check_public(config)
        return
    events, scores = plan.events(), [] if score is None else [score_event(score)]
    if plan.private and not events and not scores:
        return  # Nothing of the data is released.
    spending = Spending.of_run(events, scores, plan.delta) if plan.private else None
    book(config, setup.data, folder.name, folder, spending, goes_on=goes_on(setup, folder))
    if plan.private:
        # From now on there is a ledger: where a booked run has none, somebody has removed it, and what it knew.
        (folder / LEDGER_FILE).touch()


def goes_on(setup: Setup, folder: Path) -> bool:
    """Whether the next attempt goes on from a checkpoint, with the ledger that it was made with."""
    try:
        return (folder / LEDGER_FILE).exists() and load_checkpoint(setup, folder) is not None
    except CheckpointError:
        return False

"""What a run costs the budget of its data, booked before anything of the run is written."""

from __future__ import annotations

from pathlib import Path

from dptune.config.schema import Config
from dptune.privacy.budget import Spending
from dptune.privacy.ledger import WriteAheadLedger
from dptune.privacy.selection import score_event
from dptune.records.code import code_version
from dptune.runs.budget import book, is_trial
from dptune.runs.setup import Setup
from dptune.training import checkpoint
from dptune.training.checkpoint import CheckpointError


def book_run(config: Config, setup: Setup, ledger: Path, start: Path) -> None:
    """Book a run. Trials are not booked: their search is, as a whole.

    Args:
        config: of the run.
        setup: its parts.
        ledger: its write-ahead ledger, in its folder.
        start: its checkpoint.

    Raises:
        ConfigError: when the budget does not allow it; nothing is written then.
    """
    folder, plan, score = ledger.parent, setup.plan, config.privacy.score_noise_multiplier
    if setup.data.public or is_trial(folder):
        return
    events, scores = plan.events(), [] if score is None else [score_event(score)]
    if plan.private and not events and not scores:
        return  # Nothing of the data is released.
    spending = Spending.of_run(events, scores, plan.delta) if plan.private else None
    book(config, setup.data, folder.name, folder, spending, transcript(setup, ledger, start))


def transcript(setup: Setup, ledger: Path, start: Path) -> int:
    """Number of the transcript that the next attempt makes: the last one begun if it can go on, else another one."""
    if not ledger.exists():
        return 1
    begun = WriteAheadLedger(ledger, setup.plan, setup.keys, setup.keys.run, code_version()).attempts
    try:
        goes_on = checkpoint.load_checkpoint(start, setup.stamp) is not None
    except CheckpointError:
        goes_on = False
    return begun if goes_on else begun + 1

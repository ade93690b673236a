"""What can be known of a run, in the words that every view uses."""

from enum import StrEnum


class State(StrEnum):
    """The state of a run, in the order in which it is shown."""

    DONE = "done"
    STALE = "stale"
    """Done by another version of the code. It counts as done; only `compute.force=true` does it again."""
    SUPERSEDED = "superseded"
    """Made for a sweep that no longer asks for it."""
    RUNNING = "running"
    INTERRUPTED = "interrupted"
    """Killed or stopped; it goes on from its checkpoint."""
    BEGUN = "running or stopped"
    """Running or interrupted, where only records are looked at."""
    FAILED = "failed"
    MISSING = "missing"

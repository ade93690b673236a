"""The record that every data source yields and everything downstream reads."""

from dataclasses import dataclass

Turn = tuple[str, str, bool]
"""Of a conversation: a role, `system`, `user` or `assistant`, a text, and whether it is a reply that is learned."""


@dataclass(frozen=True, slots=True)
class Example:
    """One instruction with its input and the response that is asked for."""

    task: str
    """Name of the task; accuracies are reported by task and averaged over tasks."""

    instruction: str
    """What the model is told to do."""

    input: str
    """What it is told to do it with; empty when the instruction says everything."""

    options: tuple[str, ...] | None
    """The responses to choose from, or None when the response is free form."""

    output: str
    """The right response; one of `options` where there are options."""

    user: str | None
    """Author of the record, the privacy unit of user-level privacy; None when the source does not say."""

    split: str
    """Split that the record belongs to: `public`, `train`, `validation` or `test`."""

    turns: tuple[Turn, ...] = ()
    """The instruction as turns, where it is a conversation: all that was said before the output."""

"""What an artifact guarantees, in one object and in words: the only thing that any view may say of its privacy.

`spent.py` makes it. Nothing heavy is imported here, so that whoever only reads records has it too.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

ADJACENCY = "zero-out: with and without one unit's contribution, which adds nothing to any sum when it is left out"
"""The neighbours that every guarantee speaks of (SPECIFICATION.md 1.1)."""
UNITS_IN_WORDS = {
    "example": "one training example (instruction, input and response)",
    "user_els": "one user, as the training examples under their name",
    "user_uls": "one user, as the training examples under their name",
}
"""What a unit of privacy is."""
GUARANTEE_FILE = "GUARANTEE.md"
"""Lies beside each saved adapter."""


def rounded_up(epsilon: float) -> float:
    """Epsilon with three decimals for people to read; rounded up, so that it stays an upper bound."""
    return math.ceil(epsilon * 1000) / 1000 if math.isfinite(epsilon) else epsilon


def epsilon_text(epsilon: float) -> str:
    """Epsilon for people: `rounded_up`, always with its three decimals."""
    return f"{rounded_up(epsilon):.3f}"


def odds_text(epsilon: float) -> str:
    """The factor exp(epsilon) for people, with three digits; rounded up, as it is an upper bound."""
    exponent = math.floor(epsilon / math.log(10))
    digits = math.ceil(math.exp(epsilon - exponent * math.log(10)) * 100 * (1 - 1e-12))
    if exponent < 6:
        return (
            f"{digits * 10 ** (exponent - 2):,}"
            if exponent >= 2
            else f"{digits / 10 ** (2 - exponent):.{2 - exponent}f}"
        )
    return f"{digits / 100:.2f}e{exponent}"


@dataclass(frozen=True)
class Release:
    """Equal releases as an accountant is told of them: the fields of `events.Event`, without its arithmetic."""

    noise_multiplier: float
    """Noise standard deviation over sensitivity."""
    sample_rate: float
    """Probability that a record takes part."""
    count: int = 1
    """How many."""
    group_size: int = 1
    """Records of one unit, each sampled and clipped on its own."""


WINNER: Literal["winner of a search"] = "winner of a search"
"""What is released of a search."""
Released = Literal["nothing", "unfinished", "adapter", "adapter and score", "winner of a search", "unknown"]


@dataclass(frozen=True)
class Guarantee:
    """What whoever sees an artifact, and all that was published with it, can learn about one unit."""

    released: Released
    """`nothing` of the training data; what a run that is not finished let out; the adapter, with its score; the best
    run of a search, whose guarantee is that of the whole search; or `unknown`, of a record that does not tell."""
    private: bool
    """False: no guarantee at all."""
    epsilon: float | None = None
    """Upper bound; null if none can be stated."""
    delta: float | None = None
    """Its delta."""
    unit: str | None = None
    """What one neighbouring data set lacks: `example`, `user_els` or `user_uls`."""
    protects: str = ""
    """The unit in words."""
    adjacency: str = ""
    """The neighbours in words."""
    group_size: int = 1
    """Sampled rows that one unit may have, each clipped on its own; epsilon is for all of them."""
    accountant: str | None = None
    """How epsilon was computed."""
    realised: bool = True
    """False: the noise can be computed from a seed, so that epsilon is accounted and not realised."""
    stand_in: bool = False
    """The data is public: epsilon is stated as if it were private."""
    attempts: int = 0
    """Transcripts that the ledger says were begun; epsilon is for all of them."""
    steps: int = 0
    """Noisy steps that they began, all together."""
    composed_of: tuple[str, ...] = ()
    """What epsilon is the sum of, in words."""
    not_covered: tuple[str, ...] = ()
    """What it says nothing about, in words."""
    public_data: str = ""
    """Public data that the adapter learned from before training, in words: it protects none of them."""
    training: tuple[Release, ...] = ()
    """What was released of training records."""
    scores: tuple[Release, ...] = ()
    """What was released of validation records, none of which is trained on: the larger epsilon of both holds."""
    accountants: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    """Epsilon of the same by every accountant; those of kind `estimate` are no guarantee."""

    @property
    def of_search(self) -> bool:
        """Whether it is that of a whole search."""
        return self.released == WINNER

    @property
    def shown(self) -> float | None:
        """Epsilon for people and plots: rounded up."""
        return None if self.epsilon is None else rounded_up(self.epsilon)

    @classmethod
    def from_dict(cls, content: Mapping[str, Any]) -> Guarantee:
        """From what JSON holds of it.

        Raises:
            TypeError: for unknown fields.
        """
        parts = dict(content)
        for name in ("training", "scores"):
            parts[name] = tuple(Release(**release) for release in parts.get(name, ()))
        for name in ("composed_of", "not_covered"):
            parts[name] = tuple(parts.get(name, ()))
        return cls(**parts)

    def in_brief(self, target: float | None = None) -> str:
        """Epsilon, rounded up, and its target; for a line of a log or a terminal."""
        if not self.private:
            return "non-private"
        if self.epsilon is None:
            return "epsilon unknown"
        if self.of_search:
            return f"epsilon {epsilon_text(self.epsilon)} (whole search)"
        return f"epsilon {epsilon_text(self.epsilon)}" + (f"/{target:g}" if target else "")

    def summary(self) -> dict[str, Any]:
        """The fields that a mirror or an artifact's metadata shows, with epsilon rounded up."""
        return {
            "released": self.released,
            "private": self.private,
            "epsilon": self.shown,
            "delta": self.delta,
            "unit": self.unit,
            "group_size": self.group_size,
            "adjacency": self.adjacency,
            "realised": self.realised,
            "stand_in": self.stand_in,
            "composed_of": "; ".join(self.composed_of),
            "not_covered": "; ".join(self.not_covered),
            **({"public_data": self.public_data} if self.public_data else {}),
        }

    def sentences(self) -> list[str]:
        """What it says, in plain words."""
        if not self.private:
            return [
                "This run is not private: it was trained without clipping and noise and guarantees nothing.",
                *self._start_in_words(),
            ]
        if self.epsilon is None or self.delta is None:
            return ["No epsilon can be stated: " + "; ".join(self.not_covered) + "."]
        texts = (
            [] if self.released != "unfinished" else ["This run did not finish; what it let out counts all the same."]
        )
        what = "search" if self.of_search else "run"
        texts.append(
            f"Whoever sees everything this {what} published can tell whether {self.protects} was in the training data "
            f"only within ε = {epsilon_text(self.epsilon)} at δ = {self.delta:g}: whatever they conclude is at most "
            f"{odds_text(self.epsilon)} times as likely with it as without, but for a chance of {self.delta:g}."
        )
        if self.composed_of:
            texts.append(f"It is composed of {'; '.join(self.composed_of)}.")
        if self.group_size > 1 and self.unit != "user_els":
            texts.append(f"It holds for a record that is in the training split {self.group_size} times.")
        texts += self._start_in_words()
        texts.append(
            f"Neighbours are {self.adjacency}. The bound is by the {(self.accountant or '').upper()} accountant."
        )
        return texts

    def _start_in_words(self) -> list[str]:
        """What of the adapter is not of the training data."""
        return [f"The adapter started from {self.public_data}: nothing protects these."] if self.public_data else []

    def page(self, run_id: str, recipe: str) -> str:
        """The page that lies beside an adapter, for whoever receives it.

        Args:
            run_id: of the run.
            recipe: Python that computes epsilon again.
        """
        lines = [f"# What the adapter of run {run_id} guarantees", "", *(f"{text}\n" for text in self.sentences())]
        if self.private and self.epsilon is not None:
            rows = {
                "released": self.released,
                "unit": self.protects,
                "neighbours": self.adjacency,
                "ε (rounded up)": epsilon_text(self.epsilon),
                "δ": f"{self.delta:g}",
                "odds factor (its exponential, rounded up)": odds_text(self.epsilon),
            }
            lines += ["| | |", "|---|---|", *(f"| {name} | {value} |" for name, value in rows.items()), ""]
            lines += ["The bound is worst case: it holds whatever else is known. A lower ε is better; at ε = 0 nothing"]
            lines += ["can be told. An ε of 8 allows conclusions that are thousands of times as likely.", ""]
        if self.not_covered:
            lines += ["## What it does not cover", "", *(f"- {text}" for text in self.not_covered), ""]
        if recipe:
            lines += ["## How to check it", "", "With `dptune` installed, this prints ε before rounding:", ""]
            lines += ["```python", recipe, "```", ""]
            lines += ["It takes the releases as they are told. That they were made so is what the run's `record.json`,"]
            lines += ["its `ledger.jsonl` (a row for each step, written before the step) and the code are for.", ""]
        return "\n".join(lines)


def recipe(guarantee: Guarantee, search: Mapping[str, Any] | None = None) -> str:
    """Python that computes the epsilon of a guarantee again, from its releases alone; empty where there are none."""
    if guarantee.epsilon is None or guarantee.delta is None:
        return ""
    head = "from dptune.privacy.events import Event"
    if guarantee.of_search and search is not None:
        return "\n".join(
            (
                head,
                "from dptune.privacy.selection import Repetitions, epsilon_best",
                "",
                f"candidates = {json.dumps(search['candidates'])}",
                f'repetitions = Repetitions({search["mean"]!r}, float("{search["eta"]}"))',
                "events = [[Event(**event) for event in events] for events in candidates]",
                f"print(epsilon_best(events, repetitions, {guarantee.delta!r}))",
            )
        )
    parts: Sequence[tuple[Release, ...]] = [part for part in (guarantee.training, guarantee.scores) if part]
    if not parts:
        return ""
    calls = [
        "epsilon(["
        + ", ".join(repr(release).replace("Release(", "Event(") for release in part)
        + f"], {guarantee.delta!r})"
        for part in parts
    ]
    value = calls[0] if len(calls) == 1 else f"max({', '.join(calls)})"
    return "\n".join((head, "from dptune.privacy.accounting import epsilon", "", f"print({value})"))

"""From plan, ledger and procedure to the guarantee of an artifact: the one function that makes it.

SPECIFICATION.md 8.4.
"""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any, Literal

from dptune.privacy import accounting
from dptune.privacy.accounting import OF_SEARCHES, REFERENCE
from dptune.privacy.events import Event, PlanError
from dptune.privacy.guarantee import ADJACENCY, UNITS_IN_WORDS, WINNER, Guarantee, Release, Released
from dptune.privacy.ledger import LedgerError, begun_steps
from dptune.privacy.plan import PrivacyPlan
from dptune.privacy.selection import Repetitions, epsilon_best, score_event


@dataclass(frozen=True)
class Circumstances:
    """What decides how far a guarantee reaches, beside plan and ledger."""

    status: Literal["running", "done", "failed"]
    """State of the run."""
    stand_in: bool = False
    """The data is public."""
    score_noise_multiplier: float | None = None
    """Standard deviation of the noise on a score."""
    copies: int = 1
    """Times that one record may be in the training split because dptune wrote it there again."""
    conversations: bool = False
    """A record holds what other people wrote before."""
    telemetry_is_shown: bool = False
    """Numbers that nothing was paid for went to a mirror."""
    not_covered: tuple[str, ...] = ()
    """What the run says of itself: which records of private data have no guarantee, and against whom there is none."""
    attempts: int = 1
    """Transcripts that were begun, where the ledger is missing."""
    whole: bool = False
    """Where the ledger is missing: count every step of the plan, as some may have been done."""


@dataclass(frozen=True)
class Transcript:
    """The steps of one attempt that its ledger says were begun; a step that was done again counts once (10.4)."""

    steps: Mapping[int, tuple[float, float]]
    """Noise multiplier and sample rate by step."""


def guarantee_of(
    plan: Mapping[str, Any] | PrivacyPlan | None,
    ledger: Path,
    circumstances: Circumstances,
    repetitions: Mapping[str, Any] | None = None,
    *,
    epsilon: float | None = None,
    accountants: Mapping[str, Any] | None = None,
) -> Guarantee:
    """The guarantee of what a run, or a search, let out.

    Args:
        plan: what the run was trained with, or what its record holds of it.
        ledger: its write-ahead ledger.
        circumstances: of the run.
        repetitions: of a search that released the run: how many trials there may have been, what each may have cost.
        epsilon: what an older record says of one finished transcript; taken where that is all there is.
        accountants: the same by every accountant.
    """
    stand_in = circumstances.stand_in
    try:
        planned = plan if isinstance(plan, PrivacyPlan) else PrivacyPlan.from_dict(plan or {})
    except (ValueError, TypeError) as error:
        return Guarantee("unknown", private=True, stand_in=stand_in, not_covered=(str(error),))
    if not planned.private:
        return Guarantee("adapter", private=False, stand_in=stand_in)
    try:
        transcripts = _transcripts(planned, ledger, circumstances)
        # Of what holds for more than one transcript of single records, older records did not know.
        simple = len(transcripts) <= 1 and circumstances.status == "done" and circumstances.copies == 1
        known = (epsilon, accountants or {}) if simple and repetitions is None and epsilon is not None else None
        made = _of_run(planned, transcripts, circumstances, known)
        return made if repetitions is None else _of_search(made, planned, circumstances, repetitions)
    except (LedgerError, OSError, ValueError, TypeError) as error:
        return Guarantee(
            "unknown",
            private=True,
            delta=planned.delta,
            unit=planned.unit,
            protects=UNITS_IN_WORDS[planned.unit],
            stand_in=stand_in,
            not_covered=(str(error),),
        )


def group_size_of(event: Event, copies: int) -> Event:
    """A release, as one on the training split is to a record that may be there several times."""
    return dataclasses.replace(event, group_size=max(event.group_size, copies))


def events_before(plan: PrivacyPlan, rows: Sequence[Mapping[str, Any]]) -> tuple[Event, ...]:
    """What attempts at a run before its last one released, by the rows of its ledger."""
    return tuple(_events(plan, _by_attempt(rows)[:-1]))


def steps_begun(ledger: Path) -> int:
    """Number of steps of all attempts in a ledger. Raises LedgerError when it cannot be read."""
    return sum(len(attempt.steps) for attempt in _by_attempt(begun_steps(ledger)))


def _by_attempt(rows: Iterable[Mapping[str, Any]]) -> list[Transcript]:
    found: list[dict[int, tuple[float, float]]] = []
    for row in rows:
        if "step" not in row:
            continue
        if row["step"] == 0 or not found:
            found.append({})
        # The same step again, with other keys: nobody saw what it released before. The smaller noise counts.
        before, seen = found[-1].get(row["step"]), (float(row["noise_multiplier"]), float(row["sample_rate"]))
        found[-1][row["step"]] = seen if before is None else (min(before[0], seen[0]), max(before[1], seen[1]))
    return [Transcript(steps) for steps in found]


def _transcripts(plan: PrivacyPlan, ledger: Path, circumstances: Circumstances) -> list[Transcript]:
    """What was begun: by the ledger, and without one by the plan where steps may have been done."""
    if not plan.steps:
        return []
    multipliers = plan.noise_multipliers()
    whole = Transcript({step: (float(multipliers[step]), plan.sample_rate) for step in range(plan.steps)})
    done = circumstances.status == "done"
    if ledger.exists():
        found = _by_attempt(begun_steps(ledger))
        # A run that is done did all of its steps, whatever is left of its ledger.
        lacking = done and not any(whole.steps.keys() <= transcript.steps.keys() for transcript in found)
        return [*found, whole] if lacking else found
    return [whole] * max(1, circumstances.attempts) if done or circumstances.whole else []


def _events(plan: PrivacyPlan, transcripts: Sequence[Transcript], copies: int = 1) -> list[Event]:
    """What an accountant is told of some transcripts."""
    group = max((event.group_size for event in plan.events()), default=1)
    steps = Counter(seen for transcript in transcripts for seen in transcript.steps.values())
    events = [Event(sigma, rate, count, group) for (sigma, rate), count in sorted(steps.items())]
    events += [event for event in plan.one_shot for _ in transcripts]
    return [group_size_of(event, copies if plan.unit == "example" else 1) for event in events]


def _of_run(
    plan: PrivacyPlan,
    transcripts: Sequence[Transcript],
    circumstances: Circumstances,
    known: tuple[float, Mapping[str, Any]] | None,
) -> Guarantee:
    done = circumstances.status == "done"
    training = _events(plan, transcripts, circumstances.copies)
    # Each attempt that ended let its score out; one that did not end has none.
    times = len(transcripts) - (0 if done else 1)
    if done and not transcripts:
        times = 1
    sigma = circumstances.score_noise_multiplier
    scores = [score_event(sigma)] * max(times, 0) if sigma is not None else []
    if known is None:
        parts = [(accounting.epsilon(part, plan.delta), tuple(part)) for part in (training, scores) if part]
        epsilon, dominant = max(parts, default=(0.0, ()))
        accountants = _side_by_side(dominant, plan.delta) if done and dominant else {}
    else:
        epsilon, accountants = known[0], dict(known[1])
    released: Released = "nothing"
    if training or scores:
        released = ("adapter and score" if scores else "adapter") if done else "unfinished"
    return Guarantee(
        released,
        private=True,
        epsilon=epsilon,
        delta=plan.delta,
        unit=plan.unit,
        protects=UNITS_IN_WORDS[plan.unit],
        adjacency=ADJACENCY,
        group_size=max((event.group_size for event in training), default=1),
        accountant=REFERENCE,
        realised=plan.noise_mode == "secure",
        stand_in=circumstances.stand_in,
        attempts=len(transcripts),
        steps=sum(len(transcript.steps) for transcript in transcripts),
        composed_of=tuple(_composed(plan, transcripts, scores, done)),
        not_covered=tuple(_not_covered(plan, circumstances, search=False)),
        training=_releases(training),
        scores=_releases(scores),
        accountants=accountants,
    )


def _of_search(
    run: Guarantee, plan: PrivacyPlan, circumstances: Circumstances, repetitions: Mapping[str, Any]
) -> Guarantee:
    """The guarantee of the best of a secret number of runs: that of the whole search, whichever run it was.

    Raises:
        PlanError: if the score that chose is not paid for, or how trials were drawn is not told.
    """
    if repetitions.get("score_is_covered") is not True:
        raise PlanError("the score that chose the run of the search is not paid for")
    try:
        procedure = Repetitions(float(repetitions["mean"]), float(repetitions["eta"]))
        candidates = tuple(
            tuple(group_size_of(Event(**event), circumstances.copies) for event in events)
            for events in repetitions["candidates"]
        )
        delta = float(repetitions.get("delta", plan.delta))
    except (KeyError, TypeError, ValueError) as error:
        raise PlanError(f"the record does not tell what its search cost ({error})") from None
    epsilon = epsilon_best(candidates, procedure, delta)
    return dataclasses.replace(
        run,
        released=WINNER,
        epsilon=epsilon,
        delta=delta,
        accountant=OF_SEARCHES,
        group_size=max(event.group_size for events in candidates for event in events),
        # How often the trial that won was begun is a secret of the search.
        attempts=1,
        steps=plan.steps,
        composed_of=(
            f"the best of a random, secret number of runs (mean {procedure.mean:g}), each of which may have cost "
            f"any of {len(candidates)} things (trainings of the candidates, and noisy scores)",
        ),
        not_covered=tuple(_not_covered(plan, circumstances, search=True)),
        training=(),
        scores=(),
        accountants={OF_SEARCHES: {"value": epsilon, "kind": "bound", "accountant": "Rényi DP of the best of K"}},
    )


def _composed(
    plan: PrivacyPlan, transcripts: Sequence[Transcript], scores: Sequence[Event], done: bool
) -> Iterable[str]:
    if not transcripts and not scores:
        yield "no release: the training data was not looked at"
    for number, transcript in enumerate(transcripts, 1):
        last = number == len(transcripts)
        count = len(transcript.steps)
        noise = sorted({sigma for sigma, _ in transcript.steps.values()})
        sigma = f"{noise[0]:.4g}" if len(noise) == 1 else f"{noise[0]:.4g} to {noise[-1]:.4g}"
        which = "" if last else f" of attempt {number}, which was begun before this one"
        ended = f" of {plan.steps}, begun when it stopped" if last and not done else ""
        yield f"{count} noisy steps{ended} (noise multiplier {sigma}, sample rate {plan.sample_rate:.4g}){which}"
    if plan.one_shot and transcripts:
        yield f"{len(plan.one_shot) * len(transcripts)} release(s) of a subspace, paid for beside the steps"
    if scores:
        yield (
            f"{len(scores)} noisy score(s) on validation records, none of which is trained on (the larger epsilon of "
            "both holds)"
        )


def _not_covered(plan: PrivacyPlan, circumstances: Circumstances, search: bool) -> Iterable[str]:
    if circumstances.stand_in:
        yield "the data is a public stand-in: the guarantee is stated as if it were private"
    yield from circumstances.not_covered
    if plan.noise_mode == "reproducible" and not circumstances.not_covered:
        yield ("whoever knows the seed can compute the noise and subtract it: the guarantee is accounted, not realised")
    if search:
        yield "how many trials there were, which, and how long they took: it holds as long as they stay secret"
    else:
        yield "the choice of this run among others on the same data, and whatever was published of those"
    if not circumstances.not_covered:
        yield "the test records: metrics on them are exact, and they have no epsilon"
    if circumstances.score_noise_multiplier is None:
        yield "the validation records, where anything was decided or measured on them"
    if plan.unit != "example":
        yield "what records under other users' names say or quote of a user"
    elif circumstances.copies == 1:
        yield "a person with several records, or a record that is in the data several times: their epsilon is larger"
    else:
        yield "a record that the data itself holds several times, or a person with several: their epsilon is larger"
    if circumstances.conversations:
        yield "messages that are the prompt of replies by other people: they are in the examples of those, as often"
    if circumstances.telemetry_is_shown:
        yield "telemetry that nothing was paid for (losses, norms), which tracking.allow_private=true sent to a mirror"
    if not plan.size_declared:
        yield f"the number of {'users' if plan.unit == 'user_uls' else 'training records'}, which counts as public"
    yield "how long steps took, when the run stopped and why, and what the backbone had learned before"


def _releases(events: Sequence[Event]) -> tuple[Release, ...]:
    return tuple(Release(e.noise_multiplier, e.sample_rate, e.count, e.group_size) for e in events)


@lru_cache(maxsize=256)
def _side_by_side(events: tuple[Event, ...], delta: float) -> dict[str, dict[str, Any]]:
    """Epsilon by every accountant; runs that differ in their seed share it."""
    return {name: dataclasses.asdict(value) for name, value in accounting.side_by_side(events, delta).items()}

"""Conditions of the data, as `data_sensitivity` names them. What happens to a record depends on it alone."""

from __future__ import annotations

import dataclasses
import hashlib
from collections import Counter
from collections.abc import Callable, Sequence

from dptune.config.schema import ConfigError, DataSensitivityConfig
from dptune.data.schema import Example
from dptune.data.subsets import content, uniform

HEAVY_USERS = 0.1
"""Share of the users whose records are all kept under `user_tail`."""


def apply_to_training(
    examples: Sequence[Example], condition: DataSensitivityConfig, seed: int, names: Sequence[str] | None = None
) -> list[Example]:
    """The training examples under a condition.

    Args:
        examples: the training split.
        condition: the condition.
        seed: decides which records change.
        names: public names of the tasks; None takes those that the examples have.

    Raises:
        ConfigError: when the condition is about users and a record has none.
    """
    tasks = sorted(names or {example.task for example in examples}, key=lambda task: uniform(seed, "task order", task))
    ranks = {task: rank for rank, task in enumerate(tasks)}
    kept = [
        example
        for example in examples
        if uniform(seed, "kept", *content(example))
        < imbalance(ranks[example.task], len(tasks), condition.task_imbalance)
        * class_share(example, condition.class_imbalance, seed)
        * user_share(example, condition.user_tail, seed)
    ]
    kept = scarce(kept, condition.train_fraction, seed)
    kept = [with_label_noise(example, condition.label_noise, seed) for example in kept]
    kept = [
        dataclasses.replace(example, instruction=perturbed(example.instruction, choice), turns=())
        if (choice := chosen(example, condition.instruction_perturbation, "perturbed", seed)) is not None
        else example
        for example in kept
    ]
    return [copy for example in kept for copy in twice(example, condition.duplicates, seed)]


def apply_to_test(
    examples: Sequence[Example],
    condition: DataSensitivityConfig,
    seed: int,
    reword: Callable[[Example, float], Example] | None = None,
) -> list[Example]:
    """The test examples under a condition.

    Args:
        examples: the test split.
        condition: the condition.
        seed: decides which records change.
        reword: gives an example a wording that no training record has, by a number in [0, 1); `reworded` unless the
            source knows such wordings itself.
    """
    made = []
    for example in examples:
        share = class_share(example, condition.test_class_shift, seed, reverse=True)
        if uniform(seed, "shifted", *content(example)) >= share:
            continue
        before = example
        if (choice := chosen(before, condition.unseen_instructions, "unseen", seed)) is not None:
            example = (reword or reworded)(example, choice)
        if (choice := chosen(before, condition.test_distraction, "distracted", seed)) is not None:
            example = distracted(example, choice)
        made.append(example)
    return made


def chosen(example: Example, share: float, purpose: str, seed: int) -> float | None:
    """None, or with probability `share` a number in [0, 1) to choose by."""
    number = uniform(seed, purpose, *content(example))
    return number / share if number < share else None


def scarce(examples: Sequence[Example], fraction: float, seed: int) -> list[Example]:
    """A share of the examples, on average, in their order: of equal ones the first, the second ... for its own sake."""
    if fraction == 1:
        return list(examples)
    kept, before = list[Example](), Counter[tuple[str, ...]]()
    for example in examples:
        # All that can tell two records apart: were it less, one of two like records would move the other's number.
        whole = (*content(example), repr(example.options), repr(example.user))
        if uniform(seed, "scarce", str(before[whole]), *whole) < fraction:
            kept.append(example)
        before[whole] += 1
    return kept


def twice(example: Example, share: float, seed: int) -> list[Example]:
    """With probability `share` the example and its copy, else the example alone."""
    return [example] * (1 if chosen(example, share, "duplicated", seed) is None else 2)


def with_label_noise(example: Example, share: float, seed: int) -> Example:
    """With probability `share`, the example with one of its other options as the answer."""
    if example.options is None or len(example.options) < 2 or share == 0:
        return example
    digest = hashlib.sha256(f"{seed} {example.instruction}\0{example.input}\0{example.output}".encode()).digest()
    if int.from_bytes(digest[:8]) >= share * 2**64:
        return example
    others = [option for option in example.options if option != example.output]
    return dataclasses.replace(example, output=others[digest[8] % len(others)])


def imbalance(rank: int, count: int, ratio: float) -> float:
    """Share that is kept of the class of this rank: from 1 down to 1 / ratio, exponentially (arXiv:1901.05555)."""
    return float(ratio ** (-rank / max(count - 1, 1)))


def class_share(example: Example, ratio: float, seed: int, *, reverse: bool = False) -> float:
    """Probability to keep an example for its answer: its options are ranked by a public order."""
    if example.options is None or ratio == 1:
        return 1.0
    ranked = sorted(set(example.options), key=lambda option: uniform(seed, "class order", example.task, option))
    rank = ranked.index(example.output)
    return imbalance(len(ranked) - 1 - rank if reverse else rank, len(ranked), ratio)


def user_share(example: Example, exponent: float, seed: int) -> float:
    """Probability to keep an example for its user: a long tail of users with few records each."""
    if exponent == 0:
        return 1.0
    if example.user is None:
        raise ConfigError(
            "data_sensitivity.user_tail needs the author of every training record; map it with data.columns.user"
        )
    return float(min(1.0, HEAVY_USERS / max(uniform(seed, "user order", example.user), 1e-9)) ** exponent)


SYNONYMS = {
    "which": "what",
    "what": "which",
    "classify": "label",
    "name": "state",
    "write": "compose",
    "find": "locate",
    "choose": "pick",
    "copy": "repeat",
    "answer": "respond",
    "reply": "answer",
    "decide": "judge",
    "feel": "seem",
    "sentence": "phrase",
    "statement": "claim",
    "short": "brief",
    "given": "stated",
}
"""Words of instructions and what they become under `instruction_perturbation`."""


def perturbed(instruction: str, choice: float) -> str:
    """The instruction with a typo, other case, other order or a synonym, as `choice` in [0, 1) says; never the same."""
    start = int(choice * len(PERTURBATIONS))
    place = choice * len(PERTURBATIONS) - start
    for turn in range(len(PERTURBATIONS)):
        made = PERTURBATIONS[(start + turn) % len(PERTURBATIONS)](instruction, place)
        if made != instruction:
            return made
    return f"please: {instruction}"


def _swapped(text: str, place: float) -> str:
    """Two letters in the wrong order."""
    at = int(place * max(len(text) - 1, 1))
    return text[:at] + text[at : at + 2][::-1] + text[at + 2 :]


def _dropped(text: str, place: float) -> str:
    """One letter too few, of a text that has several."""
    at = int(place * len(text))
    return text[:at] + text[at + 1 :] if len(text.split()) > 1 else text


def _recased(text: str, place: float) -> str:
    return (text.upper(), text.title(), text.lower())[int(3 * place)]


def _reordered(text: str, place: float) -> str:
    """What stands after some word comes first."""
    words = text.split()
    at = 1 + int(place * max(len(words) - 1, 1))
    return " ".join(words[at:] + words[:at])


def _with_synonyms(text: str, place: float) -> str:
    return " ".join(SYNONYMS.get(word.lower(), word) for word in text.split(" "))


PERTURBATIONS = (_swapped, _dropped, _recased, _reordered, _with_synonyms)
"""Functions of a text and a number in [0, 1) that says where."""

REWORDINGS = (
    "Here is something to do. {0}",
    "{0} Give the response and nothing else.",
    "Your job is this: {0}",
    "Read what follows and respond. {0}",
    "{0} Take your time.",
)
"""Wordings around an instruction that occur in test only."""


def reworded(example: Example, choice: float) -> Example:
    """The example with its instruction in one of the `REWORDINGS`."""
    return dataclasses.replace(
        example, instruction=REWORDINGS[int(choice * len(REWORDINGS))].format(example.instruction), turns=()
    )


DISTRACTIONS = ("hello, i hope you are well.", "thank you for reading this.", "i am writing this on my phone.")
"""Sentences that say nothing about any task."""


def distracted(example: Example, choice: float) -> Example:
    """The example with one to all of the `DISTRACTIONS` before its input; an empty input stays empty."""
    if not example.input:
        return example
    before = DISTRACTIONS[: 1 + int(choice * len(DISTRACTIONS))]
    return dataclasses.replace(example, input=" ".join((*before, example.input)), turns=())

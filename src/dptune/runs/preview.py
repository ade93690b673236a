"""What a config would train on, before any budget is spent: `dptune data`. Writes nothing. No torch here."""

from __future__ import annotations

import dataclasses
import math
import textwrap
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from itertools import pairwise
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING

from dptune.config.extras import check_extras
from dptune.config.schema import Config, ConfigError
from dptune.data.encoding import Encoded, cuts, encode_examples
from dptune.data.readers import DataError
from dptune.data.schema import Example
from dptune.data.sources import Dataset, check_splits, load_dataset
from dptune.data.stability import declared_units, stability_of
from dptune.data.templates import check_template, token_counter
from dptune.models.tokenizers import beginning_of, load_tokenizer
from dptune.runs.privacy import make_plan

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

PRIVATE = (
    "NON_PRIVATE: exact facts about private records, for this terminal alone. Nothing of it is written down; show it\n"
    "to nobody who may not see the records."
)
ROW = "  {:<10} {}"
MOST_TASKS = 20
SHOWN = 1200
"""Characters of an example that are shown."""
GAIN = 0.2
"""A larger batch is sensible as long as doubling it takes at least this share off the noise."""


@dataclasses.dataclass(frozen=True)
class Reader:
    """What turns examples into what the model sees."""

    tokenizer: PreTrainedTokenizerBase
    template: str
    begin: tuple[int, ...]
    """Tokens before each prompt."""

    def encoded(self, examples: Sequence[Example], longest: int) -> list[Encoded]:
        """Rows of at most so many tokens."""
        return encode_examples(examples, self.tokenizer, longest, self.template, self.begin) if examples else []


def describe(config: Config) -> str:
    """What a config would train on, for a person.

    Raises:
        ConfigError: when the data or the tokenizer cannot be used, as a run would say it.
    """
    check_extras(config)
    tokenizer, architecture = load_tokenizer(config.model, Path(config.compute.cache_dir))
    template = config.data.template
    check_template(tokenizer, template)
    begin = beginning_of(tokenizer) if template == "plain" and architecture != "encoder" else ()
    reader = Reader(tokenizer, template, begin)
    tokens: Callable[[Example], int] | None = None
    if config.data.on_long == "error":
        tokens = token_counter(tokenizer, template, len(begin))
    data = load_dataset(config, tokens, may_be_empty=True)
    lines = [f"data={config.data.name}: {'public' if data.public else 'private'}"]
    if not data.public:
        lines = [PRIVATE, *lines]
    facts = [*_of_source(config, data), *_of_records(data)]
    try:
        check_splits(config, data)
        facts += [*_of_lengths(config, data, reader), *_of_plan(config, data)]
    except DataError as error:
        facts.append(("refused", f"a run would be: {error}"))
    lines += [ROW.format(name, _printable(value)) for name, value in facts]
    return "\n".join([*lines, "", *_examples(config, data, reader, private=not data.public)])


def _of_source(config: Config, data: Dataset) -> Iterator[tuple[str, str]]:
    seen, named = data.seen, config.data.layout != "auto"
    if seen.rows:
        how = f"data.layout={config.data.layout}" if named else "detected; data.layout=... overrules it"
        yield "format", f"{seen} ({how})"
    for name, split in seen.parts[:MOST_TASKS]:
        yield "file", f"{name}{f' is {split}' if split else ''}"
    if len(seen.parts) > MOST_TASKS:
        yield "file", f"and {len(seen.parts) - MOST_TASKS} more"
    if data.skipped.count:
        yield "skipped", f"{data.skipped.count} bad records; first: {data.skipped.messages[0]}"


def _of_records(data: Dataset) -> Iterator[tuple[str, str]]:
    """Splits, tasks with their options, and users."""
    yield "splits", f"train {len(data.train)}, validation {len(data.validation)}, test {len(data.test)}"
    tasks = Counter(example.task for example in data.train)
    for task, count in tasks.most_common(MOST_TASKS):
        mine = [example for example in data.train if example.task == task]
        yield "task", f"{task}: {count} training records, {_options(mine)}"
    if len(tasks) > MOST_TASKS:
        yield "task", f"and {len(tasks) - MOST_TASKS} more"
    users = Counter(example.user for example in data.train)
    nobody = users.pop(None, 0)
    if users:
        most = f"{median(users.values()):g} training records each (median), at most {max(users.values())}"
        yield "users", f"{len(users)} with {most}" + (f"; {nobody} records have none" if nobody else "")
    else:
        yield "users", "the records name none; data.columns.user=FIELD does"


def _options(examples: Sequence[Example]) -> str:
    numbers = sorted({len(example.options or ()) for example in examples})
    if numbers == [0]:
        return "free form"
    answers = Counter(example.output for example in examples)
    if len(numbers) == 1 and len({example.options for example in examples}) == 1:
        shares = ", ".join(
            f"{textwrap.shorten(answer, 40)} {count / len(examples):.0%}" for answer, count in answers.most_common(8)
        )
        return f"{numbers[0]} options: {shares}{', ...' if len(answers) > 8 else ''}"
    free = "free form, or " if numbers[0] == 0 else ""
    return f"{free}{numbers[0] or numbers[1]} to {numbers[-1]} options of each record's own"


def _of_lengths(config: Config, data: Dataset, reader: Reader) -> Iterator[tuple[str, str]]:
    """Tokens of the training records, and what of all records is cut off."""
    length = config.environment.sequence_length
    sizes = sorted(len(row.tokens) for row in reader.encoded(data.train, _UNCUT))
    nine = sizes[min(len(sizes) * 9 // 10, len(sizes) - 1)]
    what = f"{median(sizes):g} tokens (median), nine of ten up to {nine}, longest {sizes[-1]}"
    yield "lengths", f"{what}; environment.sequence_length={length}"
    every = [*data.train, *data.validation, *data.test]
    lost = cuts(every, reader.tokenizer, length, reader.template, reader.begin).in_words(length)
    yield "cut off", lost or "nothing"


_UNCUT = 1 << 30


def _of_plan(config: Config, data: Dataset) -> Iterator[tuple[str, str]]:
    """N, and the largest batch and delta that are sensible for it."""
    privacy, stability = config.privacy, stability_of(config, data.seen.layout)
    units = "users" if privacy.unit == "user_uls" else "records"
    declared = declared_units(config)
    counted = len({example.user for example in data.train}) if units == "users" else len(data.train)
    size = counted if declared is None else declared
    known = f"counted, and treated as public; data.declared_{'users' if units == 'users' else 'size'}=... states it"
    yield "N", f"{size} {units} ({known if declared is None else 'declared'}); privacy.unit={privacy.unit}"
    if privacy.unit == "example" and stability.rows > 1:
        yield "rows", f"one record is up to {stability.rows} training rows, which the plan accounts for"
    given = config.hyperparameter.expected_batch_size
    if not privacy.enabled:
        yield "batch", f"hyperparameter.expected_batch_size={given:g}, at most N={size}; privacy=none"
        return
    delta = 0.1 / size
    yield "delta", f"privacy.delta={privacy.delta:g}; largest sensible 1/(10 N) = {_down(delta):g}, never above 1/N"
    try:
        make_plan(config, data)
    except ConfigError as error:
        yield "refused", f"a run would be: {error}"
    noise = _noise(config, data, size, min(privacy.delta, delta))
    if noise:
        best = noise[-1][0]
        for (batch, before), (_, after) in pairwise(noise):
            if after > (1 - GAIN) * before:
                best = batch
                break
        values = ", ".join(f"{batch} {value:.2g}" for batch, value in noise)
        yield "batch", f"hyperparameter.expected_batch_size={given:g}; largest sensible {best}, never above N={size}"
        yield "noise", f"of a mean gradient, in clip norms, at epsilon {privacy.target_epsilon:g} by batch: {values}"
    else:
        yield "batch", f"hyperparameter.expected_batch_size={given:g}, at most N={size}"


def _noise(config: Config, data: Dataset, size: int, delta: float) -> list[tuple[int, float]]:
    """Noise of a mean gradient by batch, each twice the one before up to half of N, where the target can be kept."""
    if config.privacy.target_epsilon is None:
        return []
    found = []
    for halvings in range(min(5, int(math.log2(max(size, 2)))), 0, -1):
        batch = size >> halvings
        hyper = dataclasses.replace(config.hyperparameter, expected_batch_size=batch)
        privacy = dataclasses.replace(config.privacy, delta=delta)
        try:
            plan = make_plan(dataclasses.replace(config, hyperparameter=hyper, privacy=privacy), data)
        except ConfigError:
            continue
        found.append((batch, plan.noise_multiplier / batch))
    return found


def _down(value: float) -> float:
    """Rounded down to one digit."""
    unit = 10.0 ** math.floor(math.log10(value))
    return float(f"{math.floor(value / unit * (1 + 1e-12)) * unit:.0e}")


def _examples(config: Config, data: Dataset, reader: Reader, private: bool) -> Iterator[str]:
    """The shortest, the median and the longest record, of training records if there are any, as the model sees them."""
    examples = data.train or data.validation or data.test
    if not examples:
        return
    rows = reader.encoded(examples, config.environment.sequence_length)
    order = sorted(range(len(rows)), key=lambda at: len(rows[at].tokens))
    chosen = dict.fromkeys((order[0], order[len(order) // 2], order[-1]))
    mark = " (NON_PRIVATE)" if private else ""
    yield f"Records as the model sees them{mark}; what is learned stands between [[ and ]]:"
    for number, at in enumerate(chosen, start=1):
        row = rows[at]
        yield f"--- {number}: {len(row.tokens)} tokens"
        text = _marked(row, reader.tokenizer)
        yield _printable(text if len(text) <= SHOWN else f"{text[: SHOWN // 2]} ... {text[-SHOWN // 2 :]}")


def _marked(row: Encoded, tokenizer: PreTrainedTokenizerBase) -> str:
    """Text of a row, with its learned parts in brackets."""
    text, at = "", 0
    for begin, end in (*row.earlier, (len(row.tokens) - row.response, len(row.tokens))):
        read, learned = (tokenizer.decode(list(part)) for part in (row.tokens[at:begin], row.tokens[begin:end]))
        text += f"{read}[[{learned}]]"
        at = end
    return text


def _printable(text: str) -> str:
    """A text without what would steer the terminal."""
    return "".join(letter if letter.isprintable() or letter == "\n" else repr(letter)[1:-1] for letter in text)

"""How much of the training split one record, or one user, can change: the stability map (SPECIFICATION.md 1.8).

Between a file and the training split stand readers, splits, filters, subsets and conditions. Each has a row in
`STABILITY`: at most so many training rows differ when one record is added to the source or taken away, and at most the
rows of so many users when one user is. The plan multiplies what applies to a config; what has no bound is refused for
private data. `tests/unit/test_stability.py` measures every row on random data. No torch here.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Literal

from dptune.config.checks import check_unit
from dptune.config.schema import EMBEDDED_DATA, Config, ConfigError, DataConfig, is_public
from dptune.data.subsets import mixture


@dataclass(frozen=True)
class Rule:
    """Something that is done to records before training."""

    functions: tuple[str, ...]
    """What does it: functions and classes of `dptune.data`, with their modules."""
    records: float = 1
    """At most so many training rows differ for one record of the source; infinite without a bound."""
    users: float = 1
    """At most the training rows of so many users differ for one user with all records."""
    applies: Callable[[Config], bool] = lambda config: True
    """Whether the config asks for it."""
    way_out: str = ""
    """What to do where there is no bound: the field, the reason and the remedy."""
    held_out: float = 1
    """At most so many rows of the validation and test splits differ for one record."""
    several: bool = False
    """One record may be `data.examples_per_record` rows, wherever they are."""


def _counts_are_public(config: Config) -> bool:
    """Whether the number of training records is known without counting private ones."""
    return _known(config) or declared_records(config.data) is not None


def _task_counts_are_public(config: Config) -> bool:
    return _known(config) or config.data.declared_task_sizes is not None


def _task_names_are_public(config: Config) -> bool:
    return _known(config) or config.data.tasks is not None


def _known(config: Config) -> bool:
    """Whether the records are public, or made in a number and of tasks that are."""
    return is_public(config.data) or config.data.name in EMBEDDED_DATA


STABILITY: Mapping[str, Rule] = {
    "reading": Rule(
        (
            *("readers.DataError", "readers.Fault", "readers.Part", "readers.parts", "readers._files"),
            *("readers._opened", "readers._lines", "readers._jsonl", "readers._json_row", "readers._json"),
            *("readers._end", "readers._csv", "readers._parquet", "readers._hub", "readers._saved"),
            *(
                "readers._datasets",
                "readers._splits",
                "readers._of_dataset",
                "readers._one_line",
                "readers._only_returns",
            ),
            *("readers._continued", "readers._ended_by_returns", "readers._integer", "readers._end_of_brackets"),
            *("readers._json_lines_or_object", "readers.rows_of", "readers.named_fields", "readers._tsv"),
            *("readers._tab_row", "readers._is_whole", "readers._opens_a_quote", "readers._tab_fields"),
            *("readers._unquoted", "readers._wanted", "readers.unpaired", "readers._object", "readers._rows"),
            *("layouts.BadRow", "layouts.Seen", "layouts.laid_out", "layouts._alike", "layouts.layout_of"),
            *("layouts.records", "layouts._count"),
        ),
    ),
    "layout=conversations": Rule(
        (
            *("layouts.conversations", "layouts._prompt", "layouts._said", "layouts._turns", "layouts._role"),
            *("layouts._text", "templates.spoken"),
        ),
        applies=lambda config: config.data.layout == "conversations",
    ),
    "layout=trees, instances": Rule(
        ("layouts.trees", "layouts.instances", "layouts._drawn", "layouts._is_answered"),
        applies=lambda config: config.data.layout in ("trees", "instances"),
        several=True,
    ),
    "layout=articles": Rule(
        ("layouts.articles",),
        records=math.inf,
        applies=lambda config: config.data.layout == "articles",
        way_out="data.layout=articles: one article is in the examples of all of its questions, however many; make the "
        "article the unit with privacy=user_els data.columns.user=title",
    ),
    "layout=messages": Rule(
        ("layouts.messages",),
        records=math.inf,
        applies=lambda config: config.data.layout == "messages",
        way_out="data.layout=messages: one message is in the examples of all of its replies, however many; make the "
        "conversation the unit with privacy=user_els data.columns.user=message_tree_id",
    ),
    "columns, split by a hash": Rule(
        (
            *("mapping.BadRecord", "mapping.user_name", "mapping.ColumnMapping", "mapping._shared", "mapping._value"),
            *("mapping._user", "mapping._text", "mapping._names", "sources._mapped", "mapping.MissingField"),
            *("mapping._field", "mapping._has"),
        ),
    ),
    "bad and long records": Rule(("sources._checked", "sources.Skipped", "templates.token_counter")),
    "making up the support desk": Rule(
        (
            *("supportdesk.generate", "supportdesk.public", "supportdesk._records", "supportdesk._message"),
            *("supportdesk._signed", "supportdesk._user", "supportdesk._personal_data", "supportdesk._conventions"),
            *("supportdesk._dealt", "supportdesk.Task", "supportdesk._Conventions", "supportdesk._User"),
            "sources._supportdesk",
        ),
    ),
    "putting together": Rule(
        (
            *("sources.load_dataset", "sources.check_splits", "sources.Dataset", "sources.Source"),
            *("sources.public_examples", "sources.words_of", "sources._parts", "sources._training_subset"),
            *("subsets.uniform", "subsets.content", "sketch.words", "sketch.Sketch", "sketch.marks_of"),
            "sketch._hash",
            # Of public records alone, with which the protected ones are compared.
            *("sources.start_sources", "sources.StartSource", "sources._refuse_shared", "supportdesk.renamed"),
            *("relabel.Relabelling", "relabel.shared_options", "relabel._renamed"),
            *("conditions.apply_to_training", "conditions.chosen"),
        ),
    ),
    "validation_size, test_size": Rule(("subsets.Smallest",), held_out=2),
    "train_size": Rule(
        ("subsets.Share",),
        applies=lambda config: config.data.train_size is not None and _counts_are_public(config),
    ),
    "train_size, size unknown": Rule(
        ("subsets.Share",),
        records=math.inf,
        users=math.inf,
        applies=lambda config: (
            config.data.train_size is not None and config.data.task_weights is None and not _counts_are_public(config)
        ),
        way_out="data.train_size keeps a share of the private records that depends on how many there are; say how many "
        "training records there are with data.declared_size=..., or keep all with data.train_size=null",
    ),
    "task_weights": Rule(
        ("subsets.Mixture", "subsets.mixture"),
        applies=lambda config: config.data.task_weights is not None and _task_counts_are_public(config),
    ),
    "task_weights, sizes unknown": Rule(
        ("subsets.Mixture", "subsets.mixture"),
        records=math.inf,
        users=math.inf,
        applies=lambda config: config.data.task_weights is not None and not _task_counts_are_public(config),
        way_out="data.task_weights keeps shares of the private records that depend on how many each task has; say how "
        "many training records each of data.tasks has with data.declared_task_sizes=[...], or leave the weights out",
    ),
    "task_imbalance": Rule(
        ("conditions.imbalance",),
        applies=lambda config: config.data_sensitivity.task_imbalance != 1 and _task_names_are_public(config),
    ),
    "task_imbalance, tasks unknown": Rule(
        ("conditions.imbalance",),
        records=math.inf,
        users=math.inf,
        applies=lambda config: config.data_sensitivity.task_imbalance != 1 and not _task_names_are_public(config),
        way_out="data_sensitivity.task_imbalance ranks the tasks that the private records have; name them with "
        "data.tasks=[...]",
    ),
    "class_imbalance": Rule(
        ("conditions.class_share",), applies=lambda config: config.data_sensitivity.class_imbalance != 1
    ),
    "user_tail": Rule(("conditions.user_share",), applies=lambda config: config.data_sensitivity.user_tail != 0),
    "train_fraction": Rule(("conditions.scarce",), applies=lambda config: config.data_sensitivity.train_fraction < 1),
    "label_noise": Rule(
        ("conditions.with_label_noise",), applies=lambda config: config.data_sensitivity.label_noise != 0
    ),
    "instruction_perturbation": Rule(
        (
            *("conditions.perturbed", "conditions._swapped", "conditions._dropped", "conditions._recased"),
            *("conditions._reordered", "conditions._with_synonyms"),
        ),
        applies=lambda config: config.data_sensitivity.instruction_perturbation != 0,
    ),
    "duplicates": Rule(
        ("conditions.twice",), records=2, applies=lambda config: config.data_sensitivity.duplicates != 0
    ),
    "conditions of the test split": Rule(
        (
            *("conditions.apply_to_test", "conditions.reworded", "conditions.distracted"),
            *("supportdesk.is_held_out", "supportdesk.held_out"),
        ),
    ),
    "prompts": Rule(
        (
            *("templates.prompt_of", "templates.plain", "templates.response_of", "templates.check_template"),
            "templates._rendered",
            *("templates.pieces_of", "templates._chat_pieces", "templates._for_strict_templates"),
        ),
    ),
}
"""What is done to records and how stable it is. Of a composition, the stability is at most the product."""


@dataclass(frozen=True)
class Stability:
    """How much of the training split one record or one user of the source can change."""

    records: float
    """Training rows that can differ for one record; infinite where the unit is a row of the training split alone."""
    users: float
    """Users whose training rows can differ for one user."""
    size: Literal["declared", "public"]
    """Whether N was stated without counting, or is the number that was counted, which is treated as public."""

    @property
    def rows(self) -> int:
        """Rows of one record that the plan accounts for; of public stand-ins one row, where there is no bound."""
        return 1 if math.isinf(self.records) else int(self.records)


def stability_of(config: Config, layout: str | None = None) -> Stability:
    """The stability of everything that a config does to its records before training.

    Args:
        config: the config.
        layout: what the rows were seen to be, once they were read.

    Raises:
        ConfigError: when a private run on private data has no bound for its unit.
    """
    if layout is not None:
        config = replace(config, data=replace(config.data, layout=layout))
        check_unit(config.privacy.unit, layout, config.data.columns.user)
    found = [rule for rule in STABILITY.values() if rule.applies(config)]
    per_user = config.privacy.unit != "example"
    if config.privacy.enabled and not is_public(config.data):
        for rule in found:
            if math.isinf(rule.users if per_user else rule.records):
                raise ConfigError(rule.way_out)
    several = config.data.examples_per_record if any(rule.several for rule in found) else 1
    if several > 1 and config.privacy.score_noise_multiplier is not None:
        raise ConfigError(
            f"data.examples_per_record={several}: one record would move the score of privacy.score_noise_multiplier by "
            "as many; set it to 1, or leave the score out"
        )
    return Stability(
        records=several * math.prod(rule.records for rule in found),
        users=math.prod(rule.users for rule in found),
        size="public" if declared_units(config) is None else "declared",
    )


def declared_records(data: DataConfig) -> int | None:
    """Public number of training records of the source, where it is stated."""
    return data.declared_size if data.declared_task_sizes is None else sum(data.declared_task_sizes)


def declared_units(config: Config) -> int | None:
    """N as it follows from what is stated about the source; None where it is counted.

    It is the divisor of the sample rate, L / N. The data may have fewer units, then batches are smaller on average.
    """
    data = config.data
    if config.privacy.unit == "user_uls":
        return data.declared_users
    whole = declared_records(data)
    if whole is None:
        return None
    size = min(whole, data.train_size or whole)
    if data.tasks is not None and data.task_weights is not None and data.declared_task_sizes is not None:
        weights = dict(zip(data.tasks, data.task_weights, strict=True))
        counts = dict(zip(data.tasks, data.declared_task_sizes, strict=True))
        size = round(sum(mixture(weights, data.train_size, counts).values()))
    return max(1, int(size * config.data_sensitivity.train_fraction))

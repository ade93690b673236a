"""The data of a run: read, mapped, checked, sub-sampled, and put under its conditions. No torch here."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Callable, Iterator, Mapping
from dataclasses import astuple, dataclass, field, replace
from pathlib import Path

from dptune.config.schema import (
    EMBEDDED_DATA,
    ON_PUBLIC_GRADIENTS,
    SPLITS,
    Config,
    ConfigError,
    DataConfig,
    has_plain_hashes,
    is_open,
    is_public,
    public_sources,
)
from dptune.data.conditions import apply_to_test, apply_to_training
from dptune.data.layouts import Seen, laid_out
from dptune.data.mapping import BadRecord, ColumnMapping, MissingField
from dptune.data.readers import HEADERLESS, DataError, Fault, parts
from dptune.data.schema import Example
from dptune.data.sketch import Sketch, words
from dptune.data.stability import declared_records, stability_of
from dptune.data.subsets import Mixture, Share, Smallest
from dptune.data.supportdesk import generate, held_out, renamed
from dptune.identity import keyed_hash, local_key

LISTED = 1000
"""Number of bad records that are listed; all are counted."""


@dataclass
class Skipped:
    """Bad records that were left out. Exact numbers of private data: for the terminal, never for a record."""

    count: int = 0
    """How many."""
    messages: list[str] = field(default_factory=list)
    """File, line and field of the first `LISTED` of them."""


@dataclass(frozen=True)
class Dataset:
    """The three splits of one run."""

    train: list[Example]
    validation: list[Example]
    test: list[Example]
    public: bool
    """The records stand in for private ones: epsilon is stated as if they were, and nothing else needs protection."""
    key: bytes = field(default=b"", repr=False)
    """Secret key of the fingerprint of private records."""
    skipped: Skipped = field(default_factory=Skipped, repr=False)
    """Bad records that were left out: NON_PRIVATE."""
    protected: frozenset[bytes] = field(default=frozenset(), repr=False)
    """Fingerprint of each record that was read, kept or not, where public records are to be compared with them."""
    sketch: tuple[int, ...] = field(default=(), repr=False)
    """Hashes by which private records that were read, kept or not, are known again: NON_PRIVATE, and without a key."""
    seen: Seen = field(default_factory=Seen, repr=False)
    """What the files were seen to hold: NON_PRIVATE but for the layout."""

    @property
    def fingerprint(self) -> str:
        """Hash of all records in their order, keyed if they are private."""
        splits = (self.train, self.validation, self.test)
        return keyed_hash(self.key, (json.dumps(_parts(example)) for split in splits for example in split))


def _parts(example: Example) -> tuple[object, ...]:
    """All that an example is; of one that is no conversation, what it was before there were any."""
    return astuple(example) if example.turns else astuple(example)[:-1]


def load_dataset(
    config: Config, tokens: Callable[[Example], int] | None = None, *, may_be_empty: bool = False
) -> Dataset:
    """The data of a run, with its conditions applied.

    Args:
        config: the checked config.
        tokens: length of an example in tokens (`templates.token_counter`); needed for `data.on_long=error` only.
        may_be_empty: leave `check_splits` out, to show what there is.

    Raises:
        DataError: naming file, line and field, or the split that is empty.
        ConfigError: when one private record could change any number of training rows.
    """
    stability_of(config)
    data, skipped, seen = config.data, Skipped(), Seen()
    held_out = {split: Smallest(getattr(data, f"{split}_size"), data.seed) for split in SPLITS if split != "train"}
    training = _training_subset(data)
    tasks, protected, sketch = set[str](), set[bytes](), Sketch()
    private = not is_public(data)
    for example in _checked(config, tokens, skipped, seen):
        tasks.add(example.task)
        if config.privacy.projection in ON_PUBLIC_GRADIENTS or config.public.method != "none":
            protected.add(words_of(example))
        if private:
            sketch.offer(example)
        if data.tasks is None or example.task in data.tasks:
            (training if example.split == "train" else held_out[example.split]).offer(example)
    if unknown := set(data.tasks or ()) - tasks:
        raise DataError(f"data.tasks: no record has the task {', '.join(sorted(unknown))}")

    train, validation, test = training.examples(), held_out["validation"].examples(), held_out["test"].examples()
    train = apply_to_training(train, config.data_sensitivity, data.seed, data.tasks)
    test = apply_to_test(test, config.data_sensitivity, data.seed, SOURCES.get(data.name, FILES).reword)
    key = b"" if has_plain_hashes(data) else local_key(Path(config.compute.output_root))
    stability_of(config, seen.layout)  # What the rows were seen to be may have no bound, or another unit.
    lowest = sketch.lowest()
    found = Dataset(train, validation, test, is_open(data), key, skipped, frozenset(protected), lowest, seen)
    if not may_be_empty:
        check_splits(config, found)
    return found


def check_splits(config: Config, found: Dataset) -> None:
    """Raises DataError when there is nothing to train on, or nothing to judge by."""
    data = config.data
    for split, examples in (("train", found.train), ("test", found.test)):
        if not examples:
            raise DataError(
                f"{data.path or data.hub_id or data.name}: the {split} split is empty; give it records, map the "
                f"source's splits with data.splits, or change data.tasks and data.{split}_size"
            )


def _training_subset(data: DataConfig) -> Share | Mixture:
    """What keeps of the training records those that the config asks for."""
    if data.tasks is None or data.task_weights is None:
        return Share(data.train_size, data.seed, declared_records(data))
    weights = dict(zip(data.tasks, data.task_weights, strict=True))
    declared = data.declared_task_sizes
    counts = None if declared is None else dict(zip(data.tasks, declared, strict=True))
    return Mixture(weights, data.train_size, data.seed, counts)


def public_examples(config: Config, data: Dataset) -> list[Example]:
    """Records of public data of the same kind, which may be looked at for free.

    Raises:
        ConfigError: when one of them is among the protected records, however it is written.
    """
    public = SOURCES[config.data.name].public
    assert public is not None  # the config was checked
    found = load_dataset(dataclasses.replace(config, data=public(config.data)))
    way_out = "take other data or another data.seed, or privacy.projection=history"
    _refuse_shared(
        f"privacy.projection={config.privacy.projection}: its public data shares records with data={config.data.name}",
        found.protected,
        data,
        way_out,
    )
    return found.train


def start_sources(config: Config, data: Dataset) -> dict[str, StartSource]:
    """The public records that a start is made of (`config.public`), by the name of their source.

    Args:
        config: of the run.
        data: its protected data.

    Raises:
        DataError: naming file, line and field, or the source that has no training records.
        ConfigError: when one of the records is among the protected ones, however it is written.
    """
    found: dict[str, StartSource] = {}
    for name, source in public_sources(config.public).items():
        source = replace(source, on_long="truncate")
        reading = Config(data=source, environment=config.environment, compute=config.compute)
        kept = _training_subset(source)
        for example in _checked(reading, None, Skipped(), Seen()):
            if example.split == "train" and (source.tasks is None or example.task in source.tasks):
                kept.offer(example)
        if not (examples := kept.examples()):
            raise DataError(
                f"public.data.{name}: {source.path or source.hub_id or source.name} has no training records; map the "
                f"source's splits with public.data.{name}.splits, or change its tasks"
            )
        _refuse_shared(
            f"public.data.{name} shares records with data={config.data.name}",
            frozenset(map(words_of, examples)),
            data,
            "take other public data, or public=none",
        )
        key = b"" if has_plain_hashes(source) else local_key(Path(config.compute.output_root))
        found[name] = StartSource(source, examples, SOURCES.get(source.name, FILES).rename, key)
    return found


@dataclass(frozen=True)
class StartSource:
    """Public records of one source."""

    data: DataConfig
    """Where they are from."""
    examples: list[Example]
    rename: Callable[[Example, float], Example] | None
    """The same record under another name of who asks, by a number in [0, 1); None where it has no such name."""
    key: bytes = field(default=b"", repr=False)
    """Key of the fingerprint: that a file is public is somebody's word."""

    @property
    def label(self) -> str:
        """Where they are from, for people; of a file its name, not its place."""
        data, variant = self.data, EMBEDDED_DATA.get(self.data.name)
        if variant is not None:
            return f"{data.name} {getattr(data, variant)}"
        return data.hub_id or data.name if data.path is None else Path(data.path).name

    @property
    def fingerprint(self) -> str:
        """Hash of the records in their order."""
        return self.hash_with(self.key)

    def hash_with(self, key: bytes) -> str:
        """The same under another key."""
        return keyed_hash(key, (json.dumps(_parts(example)) for example in self.examples))


def _refuse_shared(what: str, public: frozenset[bytes], data: Dataset, way_out: str) -> None:
    """Raises ConfigError when public records, by their fingerprints, are among the protected ones."""
    if not public or not data.protected:
        raise ValueError("protected data must be loaded with the config that names the public data")
    if public & data.protected:
        raise ConfigError(f"{what}, which are to be protected; {way_out}")


def words_of(example: Example) -> bytes:
    """Fingerprint of what a record says, however it is spelled, spaced or answered."""
    return hashlib.blake2b(" ".join(words(f"{example.instruction} {example.input}")).encode(), digest_size=16).digest()


def _checked(
    config: Config, tokens: Callable[[Example], int] | None, skipped: Skipped, seen: Seen
) -> Iterator[Example]:
    """The good records of the source; a bad one is an error, or is noted in `skipped`."""
    data = config.data
    one_split = config.privacy.unit != "example" or data.split_by == "user"
    if data.on_long == "error" and tokens is None:
        raise ValueError("load needs the argument tokens for data.on_long=error")
    split_of_user: dict[str, str] = {}
    for where, item in SOURCES.get(data.name, FILES).read(data, seen):
        fault = item if isinstance(item, Fault) else None
        if isinstance(item, Example):
            if tokens is not None and data.on_long == "error":
                length, most = tokens(item), config.environment.sequence_length
                if length > most:
                    why = f"{length} tokens are more than environment.sequence_length={most}; raise it or truncate"
                    fault = Fault(why)
            if fault is None and one_split and item.user is not None:
                first = split_of_user.setdefault(item.user, item.split)
                if first != item.split:
                    fault = Fault(
                        f"field {data.columns.user!r}: the same user is in {first} and in {item.split}; repair the "
                        "splits, or leave them to dptune with data.split_by=user",
                        stops=True,
                    )
        if fault is None:
            assert isinstance(item, Example)
            yield item
        elif fault.stops:
            also = (
                "; data.on_bad=skip cannot leave that out, other records depend on it" if data.on_bad == "skip" else ""
            )
            raise DataError(f"{where} {fault.message}{also}")
        elif data.on_bad == "error":
            raise DataError(f"{where} {fault.message} (data.on_bad=skip leaves such records out)")
        else:
            skipped.count += 1
            if len(skipped.messages) < LISTED:
                skipped.messages.append(f"{where} {fault.message}")


def _mapped(data: DataConfig, seen: Seen) -> Iterator[tuple[str, Example | Fault]]:
    """Records of files or of the Hub with their places, split by split as the source has them."""
    mapping = ColumnMapping(data)
    identifiers: set[int] = set()  # hashes, so that long identifiers take no more memory
    for part in parts(data):
        seen.parts.append((part.name, part.split))
        for item in laid_out(part.items, data, seen):
            if isinstance(item, Fault):
                yield f"{part.name}:", item
                continue
            place, row = item
            where = f"{part.name}: {place}:"
            try:
                example = mapping.example(row, part.split)
                identifier = None if example is None else mapping.identifier(row)
            except MissingField as error:
                # The header of a file is that of all its rows.
                yield where, Fault(f"{error}; {HEADERLESS}" if part.header else str(error), stops=part.header)
                continue
            except BadRecord as error:
                yield where, Fault(str(error))
                continue
            if example is None:
                continue
            if identifier is not None:
                if (digest := hash(str(identifier))) in identifiers:
                    what = f"field {data.columns.id!r} has occurred before; identifiers must differ"
                    yield where, Fault(what, stops=True)
                    continue
                identifiers.add(digest)
            yield where, example


def _supportdesk(data: DataConfig, seen: Seen) -> Iterator[tuple[str, Example]]:
    """The customer-support desk."""
    sizes = {
        split: size for split, size in ((split, getattr(data, f"{split}_size")) for split in SPLITS) if size is not None
    }
    for split, examples in generate(data.organisation, data.seed, **sizes).items():
        for number, example in enumerate(examples, start=1):
            yield f"{data.name} {split}: record {number}:", example


@dataclass(frozen=True)
class Source:
    """Where records come from."""

    read: Callable[[DataConfig, Seen], Iterator[tuple[str, Example | Fault]]]
    """Each record, or what is wrong with it, with its place for people."""
    reword: Callable[[Example, float], Example] | None = None
    """The same record with a wording that no training record has, by a number in [0, 1)."""
    public: Callable[[DataConfig], DataConfig] | None = None
    """Config of public records of the same kind, which may be looked at for free."""
    rename: Callable[[Example, float], Example] | None = None
    """The same record under another name of who asks, by a number in [0, 1)."""


FILES = Source(_mapped)

SOURCES: Mapping[str, Source] = {
    "supportdesk": Source(
        _supportdesk,
        reword=held_out,
        public=lambda data: replace(data, organisation="dev", on_long="truncate"),
        rename=renamed,
    ),
}
"""What makes each of `config.schema.EMBEDDED_DATA`; data of any other name is read from files."""

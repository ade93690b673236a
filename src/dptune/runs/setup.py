"""Everything that a run needs before its first step, and everything that can be wrong with it."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from dptune.config.extras import check_extras, require
from dptune.config.schema import Config, ConfigError, has_fixed_batches
from dptune.data.batches import InputFormat, collate, example_losses
from dptune.data.encoding import Encoded, encode_examples
from dptune.data.schema import Example
from dptune.data.sources import Dataset
from dptune.data.sources import load_dataset as load_data
from dptune.data.templates import prompt_of, token_counter
from dptune.evaluation import SHORTEST
from dptune.models import adapters, backbones
from dptune.models.backbones import Backbone
from dptune.models.layers import model_type_of
from dptune.privacy.batch_shape import fixed_shape_engine
from dptune.privacy.engines import checked_engine
from dptune.privacy.gradients import Engine, EngineError
from dptune.privacy.plan import PrivacyPlan
from dptune.privacy.streams import KeyRing, Purpose
from dptune.records.code import code_version
from dptune.runs.privacy import make_plan


@dataclass(frozen=True)
class Setup:
    """Everything that can be wrong with a config, found out before anything is written."""

    data: Dataset
    plan: PrivacyPlan
    backbone: Backbone
    model: torch.nn.Module
    keys: KeyRing
    engine: str
    """Name of the engine of per-example gradients."""

    @property
    def stamp(self) -> dict[str, str]:
        """What a checkpoint must have been made with: config, data, backbone and plan by name of the keys, and code."""
        return {"run": self.keys.run, "mode": self.keys.mode, "plan": self.plan.fingerprint(), "code": code_version()}


def set_up(config: Config, identity: str) -> Setup:
    """Data, plan, backbone with its fresh adapter, and keys. Raises ConfigError; writes nothing but caches."""
    check_extras(config)
    data = data_of(config)
    check_texts(data)
    plan = make_plan(config, data)
    backbone = load_backbone(config)
    check_free_form(backbone, data)
    prompt_of(data.test[0], backbone.tokenizer, config.data.template)
    seed = config.environment.seed
    # Initialisation is public and depends on the seed alone, so that methods start from the same point.
    start = KeyRing.reproducible(seed, "public").stream(Purpose.INIT).seed()
    engine = config.environment.engine
    if engine == "auto":
        architecture = model_type_of(backbone.model)
        engine = adapters.engine_of(config.adapter.name, architecture, embeddings=config.adapter.embeddings)
    hyper = config.hyperparameter
    model = adapters.attach(backbone.model, config.adapter, rank=hyper.rank, steps=hyper.steps, seed=start)
    # The same seed must never draw the same noise for other data, another backbone or another plan.
    name = "/".join((identity, data.fingerprint, backbone.fingerprint, plan.fingerprint()))
    keys = KeyRing.secure(name) if plan.noise_mode == "secure" else KeyRing.reproducible(seed, name)
    setup = Setup(data, plan, backbone, model, keys, engine)
    if plan.steps:
        check_engine(config, setup)
    return setup


def check_engine(config: Config, setup: Setup) -> None:
    """Raises ConfigError when the engine of a run does not give the gradients that it should, for this very adapter."""
    adapters.set_modes(setup.model)
    try:
        # Measuring the backbone comes first: the engine that trains is made after it, and checked again.
        make_engine(config, setup).close()
    except EngineError as error:
        raise ConfigError(f"adapter={config.adapter.name} on model={config.model.name}: {error}") from None


def data_of(config: Config) -> Dataset:
    """The data of a run; the tokenizer is loaded only where records that are too long are bad."""
    tokens: Callable[[Example], int] | None = None
    if config.data.on_long == "error":
        tokens = token_counter(load_backbone(config).tokenizer, config.data.template)
    return load_data(config, tokens)


def load_backbone(config: Config) -> Backbone:
    """A fresh copy of the frozen backbone of a run."""
    return backbones.load_backbone(
        config.model,
        precision=config.environment.precision,
        device=config.compute.device,
        cache_dir=Path(config.compute.cache_dir),
        quantization=config.environment.backbone_quantization,
    )


def check_texts(data: Dataset) -> None:
    """Raises ConfigError when answers are texts that BLEU and ROUGE-L would compare, and the packages are missing."""
    for example in data.test:
        if not example.options and len(example.output.split()) >= SHORTEST:
            require("text", f"task {example.task} (BLEU and ROUGE-L of its answers)")


def check_free_form(backbone: Backbone, data: Dataset) -> None:
    """Raises ConfigError when an encoder, which ranks options only, would have to write."""
    free = sorted({example.task for example in data.test if not example.options})
    if free and backbone.layout.architecture == "encoder":
        raise ConfigError(
            f"an encoder cannot write, and {', '.join(free)} has no options to rank: leave it out with data.tasks=[...]"
            " or choose a decoder"
        )


def training_rows(setup: Setup, sequence_length: int, template: str) -> list[Encoded]:
    """The encoded training split; runs of a process on the same data share it."""
    key = (setup.data.fingerprint, setup.backbone.fingerprint, sequence_length, template)
    if key not in _training_rows:
        _training_rows.clear()
        tokenizer = setup.backbone.tokenizer
        _training_rows[key] = encode_examples(setup.data.train, tokenizer, sequence_length, template)
    return _training_rows[key]


_training_rows: dict[tuple[str, str, int, str], list[Encoded]] = {}


def training_format(config: Config, setup: Setup) -> InputFormat:
    """How training reads an example: in batches of one public shape where that is asked for or needed."""
    length = config.environment.sequence_length if has_fixed_batches(config) else None
    return dataclasses.replace(setup.backbone.layout, length=length)


def make_engine(config: Config, setup: Setup) -> Engine:
    """The engine of per-example gradients, checked on made-up records: the check needs no data."""
    vocabulary, size = len(setup.backbone.tokenizer), config.compute.physical_batch_size
    few = (7, 9, 5)

    def batch(records: Sequence[Encoded], layout: InputFormat) -> dict[str, torch.Tensor]:
        return collate(records, layout, config.compute.device)

    rows = made_up_rows(vocabulary, few)
    changed = [*rows[:-1], made_up_rows(vocabulary, few, shift=101)[-1]]
    alone, plain = [[row] for row in rows], setup.backbone.layout
    engine = checked_engine(
        setup.engine,
        setup.model,
        example_losses,
        [batch(row, plain) for row in alone],
        batch(rows, plain),
        batch(changed, plain),
    )
    layout = training_format(config, setup)
    if layout.length is None:
        return engine
    longest, shortest = layout.length, 5
    # Long rows at odd places, and others between them: replaced by `others`, all are long, or none is.
    lengths = [longest if row % 2 else shortest + 7 * row % (longest - shortest) for row in range(size)]
    others = [shortest if row % 2 else longest for row in range(size)]
    return fixed_shape_engine(
        engine,
        setup.model,
        batch(made_up_rows(vocabulary, lengths), layout),
        batch(made_up_rows(vocabulary, others, shift=101), layout),
    )


def made_up_rows(vocabulary: int, lengths: Sequence[int], shift: int = 0) -> list[Encoded]:
    """Rows of made-up tokens, two or three of them the response; another `shift` makes other tokens."""
    return [
        Encoded(tuple((31 * row + 17 * at + shift) % vocabulary for at in range(length)), 2 + row % 2)
        for row, length in enumerate(lengths)
    ]

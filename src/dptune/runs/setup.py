"""Everything that a run needs before its first step, and everything that can be wrong with it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch

from dptune.config.adapters import ADAPTERS
from dptune.config.extras import check_extras, require
from dptune.config.schema import ON_PUBLIC_GRADIENTS, Config, ConfigError
from dptune.data.encoding import Cuts, Encoded, cuts, encode_examples
from dptune.data.schema import Example
from dptune.data.sources import Dataset, public_examples, start_sources
from dptune.data.sources import load_dataset as load_data
from dptune.data.templates import check_template, prompt_of, token_counter
from dptune.evaluation import SHORTEST
from dptune.models import adapters, backbones
from dptune.models.backbones import Backbone
from dptune.privacy.plan import PrivacyPlan
from dptune.privacy.streams import KeyRing, Purpose
from dptune.records.code import code_version
from dptune.runs.engine import GradientPath, checked_path
from dptune.runs.folder import Report
from dptune.runs.privacy import make_plan
from dptune.runs.public import Start, on_stderr, start_from_public


@dataclass(frozen=True)
class Setup:
    """Everything that can be wrong with a config, found out before anything is written."""

    data: Dataset
    plan: PrivacyPlan
    backbone: Backbone
    model: torch.nn.Module
    keys: KeyRing
    path: GradientPath
    """How per-example gradients are computed."""
    start: Start | None = None
    """What the adapter has learned from public data; None for a fresh one."""

    @property
    def stamp(self) -> dict[str, str]:
        """What a checkpoint must have been made with: code, and by name of the keys all that numbers depend on."""
        return {"run": self.keys.run, "mode": self.keys.mode, "plan": self.plan.fingerprint(), "code": code_version()}


def set_up(config: Config, identity: str, say: Report = on_stderr) -> Setup:
    """Data, plan, backbone with its adapter, fresh or from public data, and keys.

    Args:
        config: the checked config.
        identity: its run id.
        say: told how far the start from public data is, where it must be made.

    Raises:
        ConfigError: when no run can be done so; nothing but caches is written.
    """
    check_extras(config)
    data = data_of(config)
    check_texts(data)
    public = start_sources(config, data)
    if config.privacy.projection in ON_PUBLIC_GRADIENTS and not public:
        public_examples(config, data)  # raises when it is not other data
    plan = make_plan(config, data)
    backbone = load_backbone(config)
    check_free_form(backbone, data)
    check_length(config, backbone)
    check_template(backbone.tokenizer, config.data.template)
    check_conversations(data, backbone, config.data.template)
    seed = config.environment.seed
    # Initialisation is public and depends on the seed alone, so that methods start from the same point.
    coins = KeyRing.reproducible(config.public.seed if public else seed, "public")
    hyper = config.hyperparameter
    model = adapters.attach(
        backbone.model, config.adapter, rank=hyper.rank, steps=hyper.steps, seed=coins.stream(Purpose.INIT).seed()
    )
    path = checked_path(config, backbone, model, plan.private and plan.steps > 0)
    start = start_from_public(config, public, backbone, model, say) if public else None
    # The same seed must never draw the same noise for other data, another backbone, another start or another plan.
    parts = [identity, data.fingerprint, backbone.fingerprint, *([start.digest] if start else []), plan.fingerprint()]
    name = "/".join(parts)
    keys = KeyRing.secure(name) if plan.noise_mode == "secure" else KeyRing.reproducible(seed, name)
    return Setup(data, plan, backbone, model, keys, path, start)


def make_start(config: Config, say: Report) -> Start:
    """The start from public data that runs with this config share, made if no cache holds it.

    Raises:
        ConfigError: when no run with this config can be done, or it asks for no start.
    """
    start = set_up(config, "start", say).start
    if start is None:
        raise ConfigError(f"public.method={config.public.method} makes no start; take public=joint")
    return start


def data_of(config: Config) -> Dataset:
    """The data of a run; the tokenizer is loaded only where records that are too long are bad."""
    tokens: Callable[[Example], int] | None = None
    if config.data.on_long == "error":
        backbone, template = load_backbone(config), config.data.template
        tokens = token_counter(backbone.tokenizer, template, len(backbone.layout.beginning(template)))
    return load_data(config, tokens)


def load_backbone(config: Config) -> Backbone:
    """A fresh copy of the frozen backbone of a run."""
    environment, device = config.environment, config.compute.device
    loaded = backbones.load_backbone(
        config.model,
        precision=environment.precision,
        device=device,
        cache_dir=Path(config.compute.cache_dir),
        quantization=environment.backbone_quantization,
    )
    if device == "cpu" and environment.precision != "float32" and environment.sequence_length <= SHORT:
        backbones.attend_by_products(loaded.model)
    return loaded


SHORT = 256
"""Tokens up to which all weights of attention are small beside the rest of what a step keeps."""


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


def check_conversations(data: Dataset, backbone: Backbone, template: str) -> None:
    """Raises ConfigError when the chat template cannot render one of the conversations."""
    if template != "plain":
        for example in (*data.train, *data.validation, *data.test):
            if example.turns:
                prompt_of(example, backbone.tokenizer, template)


def check_length(config: Config, backbone: Backbone) -> None:
    """Raises ConfigError when a row, with a soft prompt before it, may have more tokens than there are positions."""
    longest, wanted = backbone.layout.longest, config.environment.sequence_length
    virtual = config.adapter.virtual_tokens if ADAPTERS[config.adapter.name].virtual else 0
    if longest is None or wanted + virtual <= longest:
        return
    prompt = f" and adapter.virtual_tokens={virtual}" if virtual else ""
    least = 8  # As the schema has it.
    way_out = f"at most {longest - virtual} fits" if longest - virtual >= least else "choose another backbone"
    raise ConfigError(
        f"environment.sequence_length={wanted}{prompt}: beyond the {backbone.layout.positions} positions of "
        f"model={config.model.name}; {way_out}"
    )


def training_rows(setup: Setup, sequence_length: int, template: str) -> list[Encoded]:
    """The encoded training split; runs of a process on the same data share it."""
    key = (setup.data.fingerprint, setup.backbone.fingerprint, sequence_length, template)
    if key not in _training_rows:
        _training_rows.clear()
        tokenizer, begin = setup.backbone.tokenizer, setup.backbone.layout.beginning(template)
        _training_rows[key] = encode_examples(setup.data.train, tokenizer, sequence_length, template, begin)
    return _training_rows[key]


def said_of_cuts(setup: Setup, config: Config) -> str | None:
    """What `environment.sequence_length` cuts off in all of the data, in one line; runs of a process share it.

    It counts records: of private data it is for their holder's terminal alone.
    """
    data, backbone, template = setup.data, setup.backbone, config.data.template
    length = config.environment.sequence_length
    key = (data.fingerprint, backbone.fingerprint, length, template)
    if key not in _cuts:
        _cuts.clear()
        examples = [*data.train, *data.validation, *data.test]
        _cuts[key] = cuts(examples, backbone.tokenizer, length, template, backbone.layout.beginning(template))
    return _cuts[key].in_words(length)


_cuts: dict[tuple[str, str, int, str], Cuts] = {}
_training_rows: dict[tuple[str, str, int, str], list[Encoded]] = {}

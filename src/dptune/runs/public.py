"""The public stage: what the adapter learns from public data before anything private is touched.

The start that comes of it is a function of public records and public coins alone, so that it costs no privacy
(SPECIFICATION.md 1.9). Each stage is made once, by one of the processes that want it, and kept as safetensors in
`compute.cache_dir` under a hash of all that decides it. What is interrupted goes on from the last stage that ended.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from importlib import metadata
from pathlib import Path
from random import Random

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from dptune.config.schema import Config, ConfigError, PublicConfig
from dptune.data.batches import collate, example_losses
from dptune.data.encoding import Encoded, encode_examples
from dptune.data.relabel import Relabelling, shared_options
from dptune.data.schema import Example
from dptune.data.sources import StartSource
from dptune.models.adapters import trainable_parameters
from dptune.models.backbones import Backbone
from dptune.models.cache import made_once
from dptune.models.peft_adapters import frozen_factors, two_sided_layers
from dptune.records.code import code_version
from dptune.records.files import write_atomically
from dptune.runs.folder import Report
from dptune.runs.pretraining import batches
from dptune.sweeps.progress import in_time
from dptune.training.checkpoint import hash_of

WEIGHTS_FILE, START_FILE = "start.safetensors", "start.json"
SAID_EVERY = 10.0
"""Seconds between two lines about how far it is."""
PACKAGES = ("torch", "transformers", "peft")

Parameters = Mapping[str, torch.nn.Parameter]


@dataclass(frozen=True)
class Start:
    """Where an adapter starts that has learned from public data."""

    method: str
    """A choice of `public.method`."""
    digest: str
    """Hash of its weights."""
    folder: Path
    """Where it is kept."""
    sources: Mapping[str, Mapping[str, str | int]]
    """What was used of each public source: where it is from, the number of records, their fingerprint."""

    @property
    def records(self) -> int:
        """Number of public records."""
        return sum(int(source["records"]) for source in self.sources.values())

    @property
    def in_words(self) -> str:
        """What public data was used, and how."""
        names = ", ".join(dict.fromkeys(str(source["from"]) for source in self.sources.values()))
        return f"{self.records:,} public records ({names}), {METHODS[self.method].in_words}"

    def to_dict(self) -> dict[str, object]:
        """For the record of a run."""
        return {
            "method": self.method,
            "start": self.digest,
            "records": self.records,
            "in_words": self.in_words,
            "sources": dict(self.sources),
        }


@dataclass(frozen=True)
class _Pupil:
    """An adapter that is being taught, and what it is taught with."""

    config: Config
    backbone: Backbone
    model: torch.nn.Module
    sources: Mapping[str, StartSource]
    say: Report

    @property
    def public(self) -> PublicConfig:
        return self.config.public

    @property
    def parameters(self) -> Parameters:
        return trainable_parameters(self.model)

    def taught(self, stage: _Stage) -> Parameters:
        """All that a stage decides."""
        return {**self.parameters, **(frozen_factors(self.model) if stage.factors else {})}

    def rows(self, examples: Sequence[Example]) -> list[Encoded]:
        length, template = self.config.environment.sequence_length, self.config.data.template
        begin = self.backbone.layout.beginning(template)
        return encode_examples(examples, self.backbone.tokenizer, length, template, begin)

    def learn(self, rows: Sequence[Encoded], optimizer: torch.optim.Optimizer) -> torch.Tensor:
        """One step on the mean loss of some rows."""
        optimizer.zero_grad(set_to_none=True)
        batch = collate(rows, self.backbone.layout, device=self.config.compute.device)
        loss = example_losses(self.model, batch).mean()
        loss.backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return loss.detach()


def start_from_public(
    config: Config, sources: Mapping[str, StartSource], backbone: Backbone, model: torch.nn.Module, say: Report
) -> Start:
    """Put a fresh adapter where public data lead it; they are asked only for what no cache holds.

    Args:
        config: of the run, with a `public.method`.
        sources: the public records (`data.sources.start_sources`), already known to be other than the protected ones.
        backbone: the frozen model.
        model: the same with its fresh adapter, whose initial weights are by `public.seed`.
        say: told how far it is, and the time left.

    Raises:
        ConfigError: when training diverges, or a kept start is damaged.
    """
    pupil = _Pupil(config, backbone, model, sources, say)
    key = _key(pupil)
    digest = ""
    for stage in METHODS[config.public.method].stages:
        key = _hash(key, stage.name, {name: getattr(config.public, name) for name in stage.settings})
        folder = made_once(Path(config.compute.cache_dir) / "public", key, partial(_make, stage, pupil))
        digest = _load(pupil.taught(stage), folder)
    described = {name: _described(source) for name, source in sources.items()}
    return Start(config.public.method, digest, folder, described)


def on_stderr(line: str) -> None:
    """A line of progress where nobody else shows it."""
    print(f"dptune: {line}", file=sys.stderr, flush=True)


def _joint(pupil: _Pupil) -> Iterator[torch.Tensor]:
    """AdamW on all records with their own answers, with a rate that falls to zero."""
    public = pupil.public
    rows = pupil.rows([example for source in pupil.sources.values() for example in source.examples])
    optimizer = torch.optim.AdamW(pupil.parameters.values(), lr=public.learning_rate)
    for step, batch in enumerate(batches(rows, public)):
        for group in optimizer.param_groups:
            group["lr"] = public.learning_rate * (1 - step / public.steps)
        yield pupil.learn(batch, optimizer)


def _meta(pupil: _Pupil) -> Iterator[torch.Tensor]:
    """Reptile: each outer step moves towards where a few steps on one source, perhaps with other answers, end."""
    public = pupil.public
    lessons = _lessons(pupil.sources)
    relabelling = Relabelling(source.examples for source in pupil.sources.values())
    for step in range(public.meta_steps):
        coins = Random(f"public {public.seed} {step}")
        lesson = lessons[coins.randrange(len(lessons))]
        examples = _some(lesson.examples, public.inner_steps * public.batch_size, coins)
        if coins.random() < public.relabel:
            examples = relabelling.drawn(examples, coins)
            if lesson.rename is not None:
                choice = coins.random()
                examples = [lesson.rename(example, choice) for example in examples]
        rows = pupil.rows(examples)
        before = {name: value.detach().clone() for name, value in pupil.parameters.items()}
        optimizer = torch.optim.Adam(pupil.parameters.values(), lr=public.inner_learning_rate, betas=(0.0, 0.999))
        for begin in range(0, len(rows), public.batch_size):
            loss = pupil.learn(rows[begin : begin + public.batch_size], optimizer)
        rate = public.meta_rate * (1 - step / public.meta_steps)
        for name, value in pupil.parameters.items():
            value.data.copy_(before[name].lerp(value.data, rate))
        yield loss


def _basis(pupil: _Pupil) -> Iterator[torch.Tensor]:
    """Frozen factors of LoRA-XS: leading directions, on both sides, of what another answer would change.

    For each class of each task with options, the mean gradient of its records with each of the options as their answer,
    less its mean over the options: what no answer tells apart cancels out.
    """
    layers = two_sided_layers(pupil.model)
    sides = [(torch.zeros(()).double(), torch.zeros(()).double()) for _ in layers]
    weights = [layer.weight for layer in layers]
    try:
        for weight in weights:
            weight.requires_grad_(True)
        for examples, options in _classes(pupil):
            found, losses = [], []
            for option in options:
                rows = pupil.rows([dataclasses.replace(example, output=option) for example in examples])
                batch = collate(rows, pupil.backbone.layout, device=pupil.config.compute.device)
                loss = example_losses(pupil.model, batch).mean()
                found.append(torch.autograd.grad(loss, weights))
                losses.append(loss.detach())
            for at, layer in enumerate(layers):
                every = torch.stack([layer.matrix(gradients[at]).double() for gradients in found])
                every -= every.mean(dim=0)
                left, right = sides[at]
                sides[at] = left + (every @ every.mT).sum(dim=0), right + (every.mT @ every).sum(dim=0)
            yield torch.stack(losses).mean()
    finally:
        for weight in weights:
            weight.requires_grad_(False)
    for layer, (left, right) in zip(layers, sides, strict=True):
        layer.set_bases(_leading(left, layer.rank), _leading(right, layer.rank))


def _leading(symmetric: torch.Tensor, size: int) -> torch.Tensor:
    """The eigenvectors of the largest eigenvalues, as columns whose largest entry is positive."""
    vectors: torch.Tensor = torch.linalg.eigh(symmetric.cpu()).eigenvectors.flip(1)[:, :size]
    largest = vectors.abs().argmax(dim=0)
    return vectors * vectors[largest, torch.arange(size)].sign()


def _classes(pupil: _Pupil) -> list[tuple[list[Example], tuple[str, ...]]]:
    """Up to `batch_size` records of each answer of each task with options, and all of these options.

    Raises:
        ConfigError: when no source has such a task.
    """
    found = []
    for source in pupil.sources.values():
        for task, options in shared_options(source.examples).items():
            for answer in options:
                own = [item for item in source.examples if (item.task, item.output) == (task, answer)]
                if own:
                    found.append((own[: pupil.public.batch_size], options))
    if not found:
        raise ConfigError("public=basis needs public tasks with options that its records share; take public=joint")
    return found


def _lessons(sources: Mapping[str, StartSource]) -> list[StartSource]:
    """What Reptile draws from: the sources; of a single one its tasks."""
    if len(sources) > 1:
        return list(sources.values())
    (only,) = sources.values()
    tasks: dict[str, list[Example]] = {}
    for example in only.examples:
        tasks.setdefault(example.task, []).append(example)
    return [dataclasses.replace(only, examples=examples) for _, examples in sorted(tasks.items())]


def _some(examples: Sequence[Example], size: int, coins: Random) -> list[Example]:
    """So many of the examples at random, each once if there are enough."""
    return coins.sample(examples, size) if size <= len(examples) else coins.choices(examples, k=size)


@dataclass(frozen=True)
class _Stage:
    """Something that an adapter is taught."""

    name: str
    teach: Callable[[_Pupil], Iterator[torch.Tensor]]
    """Changes the adapter in place, with the loss after each step."""
    steps: Callable[[_Pupil], int]
    """Number of its steps."""
    settings: tuple[str, ...]
    """Fields of `public` that decide it, beside the seed; the first one is what to lower when it diverges."""
    factors: bool = False
    """Whether it decides the frozen factors, too."""


@dataclass(frozen=True)
class _Method:
    stages: tuple[_Stage, ...]
    in_words: str


JOINT = _Stage("joint", _joint, lambda pupil: pupil.public.steps, ("learning_rate", "steps", "batch_size"))
META = _Stage(
    "meta",
    _meta,
    lambda pupil: pupil.public.meta_steps,
    ("inner_learning_rate", "inner_steps", "meta_rate", "meta_steps", "relabel", "batch_size"),
)
BASIS = _Stage("basis", _basis, lambda pupil: len(_classes(pupil)), ("batch_size",), factors=True)
METHODS: Mapping[str, _Method] = {
    "joint": _Method((JOINT,), "by joint training"),
    "meta": _Method((META,), "by meta-learning (Reptile)"),
    "joint_meta": _Method((JOINT, META), "by joint training, then meta-learning (Reptile)"),
    "basis": _Method((BASIS,), "by the bases of its two-sided subspace"),
}
"""What each choice of `public.method` but `none` does."""


def _key(pupil: _Pupil) -> str:
    """A hash of everything that decides the start, but for the stages: data, backbone, adapter, code and machine."""
    config = pupil.config
    return _hash(
        {name: source.hash_with(b"") for name, source in pupil.sources.items()},
        (pupil.backbone.fingerprint, repr(pupil.backbone.model.config)),
        (dataclasses.asdict(config.adapter), config.hyperparameter.rank, config.public.seed),
        hash_of(pupil.parameters),
        (config.data.template, config.environment.sequence_length, config.environment.precision),
        (config.compute.device, config.compute.threads, torch.backends.cpu.get_cpu_capability()),
        (code_version(), [metadata.version(name) for name in PACKAGES]),
    )


def _hash(*parts: object) -> str:
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()[:32]


def _described(source: StartSource) -> dict[str, str | int]:
    return {"from": source.label, "records": len(source.examples), "fingerprint": source.fingerprint}


def _make(stage: _Stage, pupil: _Pupil, folder: Path) -> None:
    """Do a stage, and put the weights where it ends into a folder."""
    steps, begin = stage.steps(pupil), time.monotonic()
    said = begin
    for step, loss in enumerate(stage.teach(pupil), start=1):
        now = time.monotonic()
        if now - said > SAID_EVERY:
            said = now
            left = in_time((now - begin) * (steps / step - 1))
            pupil.say(
                f"start from public data ({stage.name}): step {step}/{steps}  loss {loss.item():.3f}  {left} left"
            )
    taught = pupil.taught(stage)
    if not all(value.isfinite().all() for value in taught.values()):
        raise ConfigError(
            f"public.{stage.settings[0]}: training on public data diverged; lower it, or take public=none"
        )
    weights = {key: value.detach().cpu().contiguous() for key, value in taught.items()}
    save_file(weights, folder / WEIGHTS_FILE, {"format": "pt"})
    described = {
        "digest": hash_of(taught),
        "public": dataclasses.asdict(pupil.public),
        "sources": {key: _described(source) for key, source in pupil.sources.items()},
        "seconds": round(time.monotonic() - begin, 1),
    }
    write_atomically(folder / START_FILE, json.dumps(described, indent=1) + "\n")


@torch.no_grad()
def _load(parameters: Parameters, folder: Path) -> str:
    """Put kept weights into an adapter; gives their digest."""
    damaged = f"{folder} is damaged: remove it, and it is made again"
    try:
        weights = load_file(folder / WEIGHTS_FILE)
        digest = str(json.loads((folder / START_FILE).read_text(encoding="utf-8"))["digest"])
        for name, value in parameters.items():
            value.copy_(weights[name])
    except (OSError, ValueError, KeyError, RuntimeError, SafetensorError) as error:
        raise ConfigError(f"{damaged} ({' '.join(str(error).split())[:120]})") from None
    if hash_of(parameters) != digest:
        raise ConfigError(damaged)
    return digest

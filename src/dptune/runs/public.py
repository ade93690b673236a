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
from dptune.data.relabel import Relabelling
from dptune.data.schema import Example
from dptune.data.sources import StartSource
from dptune.models.adapters import trainable_parameters
from dptune.models.backbones import Backbone
from dptune.models.cache import made_once
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
        key = _hash(key, stage.__name__, _settings(config.public, stage))
        folder = made_once(Path(config.compute.cache_dir) / "public", key, partial(_make, stage, pupil))
        digest = _load(pupil.parameters, folder)
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


_Stage = Callable[[_Pupil], Iterator[torch.Tensor]]


@dataclass(frozen=True)
class _Method:
    stages: tuple[_Stage, ...]
    in_words: str


METHODS: Mapping[str, _Method] = {
    "joint": _Method((_joint,), "by joint training"),
    "meta": _Method((_meta,), "by meta-learning (Reptile)"),
    "joint_meta": _Method((_joint, _meta), "by joint training, then meta-learning (Reptile)"),
}
"""What each choice of `public.method` but `none` does."""


def _settings(public: PublicConfig, stage: _Stage) -> dict[str, float]:
    """What decides a stage, beside what it starts from."""
    names = ["batch_size", "seed"]
    if stage is _joint:
        names += ["steps", "learning_rate"]
    else:
        names += ["meta_steps", "meta_rate", "inner_steps", "inner_learning_rate", "relabel"]
    return {name: getattr(public, name) for name in names}


def _steps(public: PublicConfig, stage: _Stage) -> int:
    return public.steps if stage is _joint else public.meta_steps


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
    steps, name = _steps(pupil.public, stage), stage.__name__.strip("_")
    begin = said = time.monotonic()
    for step, loss in enumerate(stage(pupil), start=1):
        now = time.monotonic()
        if now - said > SAID_EVERY:
            said = now
            left = in_time((now - begin) * (steps / step - 1))
            pupil.say(f"start from public data ({name}): step {step}/{steps}  loss {loss.item():.3f}  {left} left")
    if not all(value.isfinite().all() for value in pupil.parameters.values()):
        rate = "public.learning_rate" if stage is _joint else "public.inner_learning_rate"
        raise ConfigError(f"{rate}: training on public data diverged; lower it, or take public=none")
    weights = {key: value.detach().cpu().contiguous() for key, value in pupil.parameters.items()}
    save_file(weights, folder / WEIGHTS_FILE, {"format": "pt"})
    described = {
        "digest": hash_of(pupil.parameters),
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

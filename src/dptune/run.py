"""One run: a config becomes a plan, the plan trains an adapter, the result becomes a record. Knows nothing of Hydra."""

from __future__ import annotations

import dataclasses
import functools
import importlib.metadata
import json
import math
import os
import platform
import resource
import shutil
import subprocess
import sys
import time
import traceback
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
import torch
from omegaconf import OmegaConf

from dptune import evaluation, tracking
from dptune.config import Config, ConfigError, has_fixed_batches, noise_mode, run_id
from dptune.data.batches import Layout, collate, example_losses
from dptune.data.encoding import Encoded, encode_examples
from dptune.data.schema import Example
from dptune.data.sources import Dataset
from dptune.data.sources import load as load_data
from dptune.data.templates import prompt_of, token_counter
from dptune.lease import Claim, ClaimLost, claimed, holder
from dptune.models import adapters, backbones
from dptune.models.backbones import Backbone
from dptune.models.state import AdapterState
from dptune.privacy.accounting import Reported, calibrate, rounded_up
from dptune.privacy.accounting import epsilon as accountant
from dptune.privacy.allocation import lora_group_weights
from dptune.privacy.batch_shape import fixed_shape_engine
from dptune.privacy.engines import checked_engine
from dptune.privacy.events import Event
from dptune.privacy.gradients import Engine
from dptune.privacy.ledger import WriteAheadLedger
from dptune.privacy.mechanism import groups_of
from dptune.privacy.plan import Allocation, Clipping, PlanError, PrivacyPlan, QuantileTracking, Schedule
from dptune.privacy.selection import noisy_score, score_event
from dptune.privacy.streams import KeyRing, Purpose
from dptune.records import (
    ADAPTER_FOLDER,
    EVALUATION_FILE,
    HISTORY_FILE,
    Cost,
    GroupPrivacy,
    Metrics,
    Privacy,
    RunRecord,
    code_version,
    read,
    write_atomically,
)
from dptune.text_metrics import Written
from dptune.training import checkpoint
from dptune.training.checkpoint import Checkpoint, CheckpointError
from dptune.training.loop import Step, train
from dptune.training.projection import make_projection
from dptune.training.ranks import Ranks, joined

LOG_FILE, LEDGER_FILE, CHECKPOINT_FOLDER = "run.log", "ledger.jsonl", "checkpoint"

SKIPPED_FILE = "NON_PRIVATE_skipped.txt"
"""Bad records that `data.on_bad=skip` left out; not to be published."""

Report = Callable[[str], None]
"""Receives one line of progress."""


@dataclass(frozen=True)
class Prepared:
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


def run(config: Config, overrides: Sequence[str] = (), report: Report | None = None) -> RunRecord:
    """Do one run, or give its record if it is finished already.

    Args:
        config: the checked config.
        overrides: what was said on the command line, for the record.
        report: receives progress, one line at a time.

    Raises:
        ConfigError: when the data, the model or the privacy settings cannot be used; nothing is written then.
        BlockingIOError: when another process is doing this run.
        OSError: when the run's folder cannot be written.
    """
    torch.set_num_threads(config.compute.threads)
    with joined() as ranks:
        return lead(config, overrides, ranks, report or (lambda line: None)) if ranks.first else follow(config, ranks)


def lead(config: Config, overrides: Sequence[str], ranks: Ranks, say: Report) -> RunRecord:
    """Do a run as the only process, or as the one of several that writes."""
    identity = run_id(config)
    folder = Path(config.compute.output_root) / identity
    if (finished := finished_record(folder, config)) is not None:
        say(f"{identity} is finished: {folder}")
        ranks.told(Agreement(go=False).to_bytes())
        return finished
    if (other := holder(folder)) is not None:
        raise BlockingIOError(f"run {identity} is being done by {other}")
    prepared = prepare(config, identity)
    with claimed(folder) as claim:
        if claim is None:
            raise BlockingIOError(f"run {identity} is being done by another process")
        if (finished := finished_record(folder, config)) is not None:
            say(f"{identity} was finished by another process: {folder}")
            ranks.told(Agreement(go=False).to_bytes())
            return finished
        return do(config, prepared, overrides, RunFolder(folder, claim, say), ranks)


def do(config: Config, prepared: Prepared, overrides: Sequence[str], folder: RunFolder, ranks: Ranks) -> RunRecord:
    """Do a run in a folder that is this process's, from the checkpoint if there is one."""
    begin = time.perf_counter()
    record = RunRecord(
        run_id=folder.path.name,
        status="running",
        config=dataclasses.asdict(config),
        sweep=config.sweep,
        method=config.method,
        provenance=provenance(config, prepared, overrides),
    )
    # A forced run replaces a finished record only by a finished one.
    replaces = (before := read(folder.path)) is not None and before.status == "done"
    if not replaces:
        record.write(folder.path)
    start = start_of(prepared, folder)
    write_atomically(folder.path / ".hydra" / "config.yaml", OmegaConf.to_yaml(OmegaConf.structured(config)))
    write_atomically(folder.path / ".hydra" / "overrides.yaml", OmegaConf.to_yaml(list(overrides)))
    ranks.told(Agreement(True, start.step if start else 0, prepared.keys.master).to_bytes())
    if prepared.data.skipped.count:
        # How many, and which, is known to the data's holder alone: it is neither in the record nor in the log.
        folder.say(f"{prepared.data.skipped.count} records were skipped: {folder.path / SKIPPED_FILE}")
        skipped = "".join(f"{line}\n" for line in prepared.data.skipped.messages)
        write_atomically(folder.path / SKIPPED_FILE, skipped)
    tracker = tracking.start(config.tracking, record, folder.path)
    try:
        execute(config, prepared, record, folder, tracker, ranks, start, begin)
        folder.claim.check()
        record.status = "done"
        record.write(folder.path)
        checkpoint.remove(folder.path / CHECKPOINT_FOLDER)
        ranks.wait()
    except ClaimLost:
        raise
    except Exception as error:
        record.status = "failed"
        record.error = " ".join(f"{type(error).__name__}: {error}".split())
        log_traceback(folder.path)
        if not replaces:
            record.write(folder.path)
    except BaseException:
        folder.log("interrupted; the same command goes on from the last checkpoint")
        raise
    finally:
        tracker.finish(record)
    return record


def follow(config: Config, ranks: Ranks) -> RunRecord:
    """Do the share of a process that writes nothing, and give the record that the first one wrote."""
    identity = run_id(config)
    folder = Path(config.compute.output_root) / identity
    agreed = Agreement.from_bytes(ranks.told(Agreement(go=False).to_bytes()))
    try:
        if agreed.go:
            prepared = prepare(config, identity)
            prepared = dataclasses.replace(prepared, keys=dataclasses.replace(prepared.keys, master=agreed.master))
            start = checkpoint.load(folder / CHECKPOINT_FOLDER, prepared.stamp) if agreed.step else None
            if prepared.plan.steps:
                fit(config, prepared, ranks, start)
            ranks.wait()
    except Exception:
        log_traceback(folder)
        raise
    record = read(folder)
    assert record is not None
    return record


@dataclass(frozen=True)
class Agreement:
    """What the first rank tells the others before a run."""

    go: bool
    step: int = 0
    """Number of steps that are in the checkpoint; 0 without one."""
    master: bytes = field(default=bytes(32), repr=False)
    """Keys of the run."""

    def to_bytes(self) -> bytes:
        """37 bytes."""
        return bytes([self.go]) + self.step.to_bytes(4, "little") + self.master

    @classmethod
    def from_bytes(cls, message: bytes) -> Agreement:
        """Inverse of `to_bytes`."""
        return cls(bool(message[0]), int.from_bytes(message[1:5], "little"), message[5:])


@dataclass(frozen=True)
class RunFolder:
    """The folder of a run, for the process that has claimed it."""

    path: Path
    claim: Claim
    say: Report

    def log(self, line: str) -> None:
        """Write a line to the log and report it."""
        with (self.path / LOG_FILE).open("a", encoding="utf-8") as stream:
            stream.write(f"{datetime.now(UTC):%Y-%m-%d %H:%M:%S} {line}\n")
        self.say(line)


def log_traceback(folder: Path) -> None:
    """Write the exception that is being handled to a run's log, or to standard error when that cannot be written."""
    try:
        with (folder / LOG_FILE).open("a", encoding="utf-8") as stream:
            stream.write(traceback.format_exc())
    except OSError:
        traceback.print_exc()


def finished_record(folder: Path, config: Config) -> RunRecord | None:
    """The record of a finished run that is not to be done again."""
    record = read(folder)
    return record if record is not None and record.status == "done" and not config.compute.force else None


def start_of(prepared: Prepared, folder: RunFolder) -> Checkpoint | None:
    """The checkpoint that a run goes on from; without one, what an earlier attempt left is removed."""
    place = folder.path / CHECKPOINT_FOLDER
    try:
        start = checkpoint.load(place, prepared.stamp)
    except CheckpointError as error:
        folder.log(f"the checkpoint cannot be used: {error}; starting anew")
        start = None
    if start is None:
        checkpoint.remove(place)
        for name in (HISTORY_FILE, EVALUATION_FILE):
            (folder.path / name).unlink(missing_ok=True)
    else:
        folder.log(f"going on after step {start.step} of {prepared.plan.steps}")
        write_atomically(folder.path / HISTORY_FILE, "".join(json.dumps(row) + "\n" for row in start.history))
    return start


def prepare(config: Config, identity: str) -> Prepared:
    """Data, plan, backbone with its fresh adapter, and keys. Raises ConfigError; writes nothing but caches."""
    data = data_of(config)
    plan = make_plan(config, data)
    backbone = load_backbone(config)
    check_free_form(backbone, data)
    prompt_of(data.test[0], backbone.tokenizer, config.data.template)
    seed = config.environment.seed
    # Initialisation is public and depends on the seed alone, so that methods start from the same point.
    start = KeyRing.reproducible(seed, "public").stream(Purpose.INIT).seed()
    engine = config.environment.engine
    if engine == "auto":
        architecture = adapters.architecture_of(backbone.model)
        engine = adapters.engine_of(config.adapter.name, architecture, embeddings=config.adapter.embeddings)
    hyper = config.hyperparameter
    model = adapters.attach(backbone.model, config.adapter, rank=hyper.rank, steps=hyper.steps, seed=start)
    # The same seed must never draw the same noise for other data, another backbone or another plan.
    name = "/".join((identity, data.fingerprint, backbone.fingerprint, plan.fingerprint()))
    keys = KeyRing.secure(name) if plan.noise_mode == "secure" else KeyRing.reproducible(seed, name)
    return Prepared(data, plan, backbone, model, keys, engine)


def data_of(config: Config) -> Dataset:
    """The data of a run; the tokenizer is loaded only where records that are too long are bad."""
    tokens: Callable[[Example], int] | None = None
    if config.data.on_long == "error":
        tokens = token_counter(load_backbone(config).tokenizer, config.data.template)
    return load_data(config, tokens)


def load_backbone(config: Config) -> Backbone:
    """A fresh copy of the frozen backbone of a run."""
    return backbones.load(
        config.model,
        precision=config.environment.precision,
        device=config.compute.device,
        cache_dir=Path(config.compute.cache_dir),
        quantization=config.environment.backbone_quantization,
    )


def check_free_form(backbone: Backbone, data: Dataset) -> None:
    """Raises ConfigError when an encoder, which ranks options only, would have to write."""
    free = sorted({example.task for example in data.test if not example.options})
    if free and backbone.layout.architecture == "encoder":
        raise ConfigError(
            f"an encoder cannot write, and {', '.join(free)} has no options to rank: leave it out with data.tasks=[...]"
            " or choose a decoder"
        )


def make_plan(config: Config, data: Dataset) -> PrivacyPlan:
    """The privacy plan of a run, calibrated to its target epsilon.

    Raises:
        ConfigError: when no plan with these settings can be true, or the target cannot be reached.
    """
    # Any: the values are names that the config has checked and the plan checks again.
    privacy: Any = config.privacy
    hyper, mode = config.hyperparameter, noise_mode(config)
    users = {example.user for example in data.train}
    if privacy.unit != "example" and None in users:
        raise ConfigError(
            f"privacy.unit={privacy.unit} needs the author of every training record; "
            "map it with data.columns.user or set privacy.unit=example"
        )
    num_units = len(users) if privacy.unit == "user_uls" else len(data.train)
    try:
        if not privacy.enabled:
            return PrivacyPlan.non_private(
                num_units=num_units, expected_batch_size=hyper.expected_batch_size, steps=hyper.steps
            )
        plan = PrivacyPlan(
            num_units=num_units,
            expected_batch_size=hyper.expected_batch_size,
            steps=hyper.steps,
            delta=privacy.delta,
            noise_multiplier=privacy.noise_multiplier or 1.0,
            max_grad_norm=hyper.max_grad_norm,
            unit=privacy.unit,
            examples_per_user=privacy.examples_per_user,
            clipping=Clipping(kind=privacy.clipping, stability=privacy.clipping_stability),
            grouping=privacy.grouping,
            allocation=Allocation(
                rule=privacy.allocation,
                weights=privacy.allocation_weights,
                ema=privacy.allocation_ema,
                floor=privacy.allocation_floor,
            ),
            quantile=None
            if privacy.quantile is None
            else QuantileTracking(
                quantile=privacy.quantile,
                learning_rate=privacy.quantile_learning_rate,
                share=privacy.quantile_share,
            ),
            schedule=Schedule(kind=privacy.schedule, ratio=privacy.schedule_ratio),
            one_shot=()
            if privacy.projection != "private"
            else (Event(privacy.projection_noise_multiplier, 1.0, 1, privacy.examples_per_user or 1),),
            noise_mode=mode,
        )
        if privacy.target_epsilon is not None and plan.events():
            plan = calibrated(plan, privacy.target_epsilon)
        if privacy.score_noise_multiplier is not None:
            check_score(privacy.score_noise_multiplier, privacy.target_epsilon, plan, len(data.validation))
        return plan
    except PlanError as error:
        raise ConfigError(str(error)) from None


def check_score(noise_multiplier: float, target_epsilon: float | None, plan: PrivacyPlan, records: int) -> None:
    """Raises ConfigError when the score on so many validation records would cost more than the run may."""
    field = f"privacy.score_noise_multiplier={noise_multiplier:g}"
    if not records:
        raise ConfigError(f"{field} needs validation records, there are none; see data.validation_size and data.splits")
    if plan.delta > 1 / records:
        raise ConfigError(f"{field}: privacy.delta={plan.delta:g} is above one over the {records} validation records")
    limit = target_epsilon or plan.epsilon()
    if limit and (own := score_epsilon(noise_multiplier, plan.delta)) > limit:
        least = calibrate(lambda sigma: [score_event(sigma)], limit, plan.delta)
        raise ConfigError(
            f"{field} alone costs epsilon {rounded_up(own):.3f}, more than the {limit:g} of the run; "
            f"take at least {least:g}, or leave the score out"
        )


@functools.lru_cache(maxsize=64)
def score_epsilon(noise_multiplier: float, delta: float) -> float:
    """Epsilon of the score alone."""
    return accountant([score_event(noise_multiplier)], delta)


@functools.lru_cache(maxsize=256)
def calibrated(plan: PrivacyPlan, target_epsilon: float) -> PrivacyPlan:
    """The plan with the least noise that keeps the target; the runs of a sweep share the search."""
    return plan.calibrate(target_epsilon)


def execute(
    config: Config,
    prepared: Prepared,
    record: RunRecord,
    folder: RunFolder,
    tracker: tracking.Tracker,
    ranks: Ranks,
    start: Checkpoint | None,
    begin: float,
) -> None:
    """Measure, train, measure, and fill the record."""
    data, plan, model = prepared.data, prepared.plan, prepared.model
    sequence_length = config.environment.sequence_length
    seen = {example.input for example in data.train} if data.public or not plan.private else None

    def judged(
        model: torch.nn.Module, examples: Sequence[Example], seen: Collection[str] | None
    ) -> tuple[list[evaluation.Judgement], list[Written]]:
        return evaluation.judge(
            model.eval(),
            prepared.backbone.tokenizer,
            examples,
            seen,
            layout=prepared.backbone.layout,
            sequence_length=sequence_length,
            batch_size=config.compute.evaluation_batch_size,
            max_new_tokens=config.evaluation.max_new_tokens,
            template=config.data.template,
        )

    examples = evaluation.judged(data.test, config.evaluation.prompts)

    def measure(model: torch.nn.Module) -> tuple[list[evaluation.Judgement], Metrics]:
        judgements, written = judged(model, examples, seen)
        return judgements, evaluation.summarise(judgements, written)

    record.parameters = adapters.count(model)
    if not plan.steps:
        record.parameters = dataclasses.replace(record.parameters, trainable=0, groups={})
    floor = (
        prepared.backbone.fingerprint,
        data.fingerprint,
        sequence_length,
        config.data.template,
        dataclasses.astuple(config.evaluation),
        seen is None,
    )
    if floor not in _zero_shot:
        # Most fresh adapters change nothing; a soft prompt does.
        bare = model if adapters.KINDS[config.adapter.name].unchanged else load_backbone(config).model
        _zero_shot[floor] = measure(bare)[1]
    record.zero_shot = _zero_shot[floor]
    folder.log(f"zero-shot accuracy {record.zero_shot.accuracy:.3f}; {describe(plan)}")

    earlier = start.seconds if start else 0.0
    training_begin = time.perf_counter() - earlier
    record.privacy = privacy_of(plan, config, data, 0)
    if plan.steps:
        record.privacy = fit(config, prepared, ranks, start, folder, tracker)
    training_seconds = time.perf_counter() - training_begin
    judgements, record.metrics = measure(model)
    if not math.isfinite(record.metrics.response_perplexity):
        raise FloatingPointError("training diverged: the tuned model's loss is not finite; lower the learning rate")
    lines = (json.dumps(dataclasses.asdict(item)) + "\n" for item in judgements)
    folder.claim.check()
    write_atomically(folder.path / EVALUATION_FILE, "".join(lines))
    save_adapter(model, folder.path / ADAPTER_FOLDER)
    if config.privacy.score_noise_multiplier is not None:
        # One at a time: beside others a record would be padded, and its rounding would depend on them.
        right = sum(judged(model, [example], None)[0][0].correct for example in data.validation)
        record.privacy = scored(record.privacy, right, len(data.validation), config, prepared)
    record.cost = Cost(
        seconds=time.perf_counter() - begin + earlier,
        training_seconds=training_seconds,
        examples_per_second=plan.steps * plan.expected_batch_size / max(training_seconds, 1e-9),
        peak_memory_mb=peak_memory_mb(config.compute.device),
        device=f"{config.compute.device}, {config.compute.threads} thread(s)",
    )
    folder.log(summary(record))


_zero_shot: dict[tuple[object, ...], Metrics] = {}


def fit(
    config: Config,
    prepared: Prepared,
    ranks: Ranks,
    start: Checkpoint | None,
    folder: RunFolder | None = None,
    tracker: tracking.Tracker = tracking.NONE,
) -> Privacy:
    """Train the adapter in place, write ledger, checkpoints and history, and say what it guarantees.

    Args:
        config: of the run.
        prepared: its parts.
        ranks: the processes that do it together.
        start: go on from there.
        folder: where to write; None for a process that leaves this to another one.
        tracker: gets the history.
    """
    data, plan, model, keys = prepared.data, prepared.plan, prepared.model, prepared.keys
    tokenizer, sequence_length = prepared.backbone.tokenizer, config.environment.sequence_length
    adapters.set_modes(model)
    template = config.data.template
    rows = training_rows(prepared, sequence_length, template)
    parameters = adapters.trainable(model)
    layout = training_layout(config, prepared)
    groups = groups_of({name: value.shape for name, value in parameters.items()}, plan.grouping)
    sampler = plan.sampler(keys, users=[example.user for example in data.train])
    engine = make_engine(config, prepared)
    ledger = None
    if plan.private and folder is not None:
        ledger = WriteAheadLedger(folder.path / LEDGER_FILE, plan, keys, keys.run, code_version())
        if plan.one_shot and start is None:
            ledger.begin(0)

    def public_rows() -> list[Encoded]:
        embedded = dataclasses.replace(config.data, organisation="dev", on_long="truncate")
        public = load_data(dataclasses.replace(config, data=embedded))
        return encode_examples(public.train, tokenizer, sequence_length, template)

    projection = make_projection(
        config,
        groups,
        plan=plan,
        keys=keys,
        engine=engine,
        private_rows=[rows[row] for row in sampler.all_rows.tolist()],
        public_rows=public_rows,
        layout=layout,
        stored=start.state["projection"] if start else None,
    )
    mechanism = plan.mechanism(projection.groups, keys)

    def before_step(step: int) -> None:
        if folder is not None:
            folder.claim.check()
        if ledger is not None:
            ledger.begin(step)
        ranks.wait()
        if plan.allocation.rule == "lora_weight_space":
            # Weights of the adapter as it is now are a function of past releases: free (SPECIFICATION.md 2.5).
            norms = {name: float(value.detach().square().sum()) for name, value in model.named_parameters()}
            mechanism.set_public_weights(lora_group_weights(groups, norms))

    history = list(start.history) if start else []
    shown = 0
    spent = epsilon_marks(plan)

    def let_out(step: Step) -> None:
        """Make a checkpoint, and show its rows only then: what was seen is never drawn again with other noise."""
        nonlocal shown
        if folder is not None:
            folder.claim.check()
            made = Checkpoint(step.step, step.seconds, history, step.state())
            checkpoint.save(folder.path / CHECKPOINT_FOLDER, made, prepared.stamp)
            with (folder.path / HISTORY_FILE).open("a", encoding="utf-8") as stream:
                stream.writelines(json.dumps(row) + "\n" for row in history[max(shown, start.step if start else 0) :])
            for row in history[shown:]:
                tracker.step(row)
            shown = len(history)

    try:
        for step in train(
            parameters,
            rows,
            sampler=sampler,
            engine=engine,
            mechanism=mechanism,
            groups=groups,
            projection=projection,
            hyperparameter=config.hyperparameter,
            environment=config.environment,
            layout=layout,
            physical_batch_size=config.compute.physical_batch_size,
            before_step=before_step,
            after_step=lambda step, released: adapters.after_step(model, step, released),
            ranks=ranks,
            adapter=AdapterState(model),
            start=start,
        ):
            history.append(history_row(step, spent.get(step.step)))
            if step.step % config.compute.checkpoint_every == 0 or step.step == plan.steps:
                let_out(step)
            if folder is not None and (step.step in spent or step.step == plan.steps):
                folder.log(progress(step, plan, config, spent.get(step.step)))
    except Exception as error:
        if folder is not None and keys.mode == "secure" and not isinstance(error, OSError):
            # That it failed may be due to what it drew: drawing again for free would be choosing. A new attempt counts.
            checkpoint.remove(folder.path / CHECKPOINT_FOLDER)
        raise
    engine.close()
    dimensions = {group.name: group.dimension for group in projection.groups}
    noise = {
        name: GroupPrivacy(dimension, history[-1][f"noise_std/{name}"] * plan.expected_batch_size)
        for name, dimension in dimensions.items()
    }
    guarantee = privacy_of(plan, config, data, plan.steps, noise)
    return dataclasses.replace(guarantee, attempts=ledger.attempts if ledger else 0)


def training_rows(prepared: Prepared, sequence_length: int, template: str) -> list[Encoded]:
    """The encoded training split; runs of a process on the same data share it."""
    key = (prepared.data.fingerprint, prepared.backbone.fingerprint, sequence_length, template)
    if key not in _training_rows:
        _training_rows.clear()
        tokenizer = prepared.backbone.tokenizer
        _training_rows[key] = encode_examples(prepared.data.train, tokenizer, sequence_length, template)
    return _training_rows[key]


_training_rows: dict[tuple[str, str, int, str], list[Encoded]] = {}


def training_layout(config: Config, prepared: Prepared) -> Layout:
    """How training reads an example: in batches of one public shape where that is asked for or needed."""
    length = config.environment.sequence_length if has_fixed_batches(config) else None
    return dataclasses.replace(prepared.backbone.layout, length=length)


def make_engine(config: Config, prepared: Prepared) -> Engine:
    """The engine of per-example gradients, checked on made-up records: the check needs no data."""
    vocabulary, size = len(prepared.backbone.tokenizer), config.compute.physical_batch_size
    few = (7, 9, 5)

    def batch(records: Sequence[Encoded], layout: Layout) -> dict[str, torch.Tensor]:
        return collate(records, layout, config.compute.device)

    rows = made_up_rows(vocabulary, few)
    changed = [*rows[:-1], made_up_rows(vocabulary, few, shift=101)[-1]]
    alone, plain = [[row] for row in rows], prepared.backbone.layout
    engine = checked_engine(
        prepared.engine,
        prepared.model,
        example_losses,
        [batch(row, plain) for row in alone],
        batch(rows, plain),
        batch(changed, plain),
    )
    layout = training_layout(config, prepared)
    if layout.length is None:
        return engine
    longest, shortest = layout.length, 5
    # Long rows at odd places, and others between them: replaced by `others`, all are long, or none is.
    lengths = [longest if row % 2 else shortest + 7 * row % (longest - shortest) for row in range(size)]
    others = [shortest if row % 2 else longest for row in range(size)]
    return fixed_shape_engine(
        engine,
        prepared.model,
        batch(made_up_rows(vocabulary, lengths), layout),
        batch(made_up_rows(vocabulary, others, shift=101), layout),
    )


def made_up_rows(vocabulary: int, lengths: Sequence[int], shift: int = 0) -> list[Encoded]:
    """Rows of made-up tokens, two or three of them the response; another `shift` makes other tokens."""
    return [
        Encoded(tuple((31 * row + 17 * at + shift) % vocabulary for at in range(length)), 2 + row % 2)
        for row, length in enumerate(lengths)
    ]


@functools.lru_cache(maxsize=256)
def epsilon_marks(plan: PrivacyPlan) -> dict[int, float]:
    """Epsilon after about every tenth of the steps; all of it depends on the plan alone."""
    if not plan.private:
        return {}
    marks = np.unique(np.linspace(0, plan.steps, 11)[1:].round().astype(int))
    return {int(step): plan.epsilon(int(step)) for step in marks}


def describe(plan: PrivacyPlan) -> str:
    """The plan in one line."""
    start = f"{plan.steps} steps of {plan.expected_batch_size:g} of {plan.num_units} expected"
    if not plan.private:
        return f"{start}, not private"
    return f"{start}, noise multiplier {plan.noise_multiplier:.4f}, delta {plan.delta:g}, {plan.noise_mode} noise"


def progress(step: Step, plan: PrivacyPlan, config: Config, epsilon: float | None) -> str:
    """Steps, examples a second, epsilon spent, time left."""
    rate = step.step * plan.expected_batch_size / step.seconds
    left = step.seconds / step.step * (plan.steps - step.step)
    target = f" of {config.privacy.target_epsilon:g}" if config.privacy.target_epsilon else ""
    spent = "not private" if epsilon is None else f"epsilon {rounded_up(epsilon):.3f}{target}"
    return f"step {step.step}/{plan.steps}  {rate:.0f} examples/s  {spent}  {left:.0f} s left"


def summary(record: RunRecord) -> str:
    """The finished run in one line."""
    metrics, floor, privacy, parameters = record.metrics, record.zero_shot, record.privacy, record.parameters
    assert metrics and floor and privacy and parameters and record.cost
    if privacy.epsilon is None:
        spent = "not private"
    else:
        target = f"/{privacy.target_epsilon:g}" if privacy.target_epsilon else ""
        spent = f"epsilon {rounded_up(privacy.epsilon):.3f}{target} at delta {privacy.delta:g}"
    return (
        f"accuracy {metrics.accuracy:.3f} (zero-shot {floor.accuracy:.3f})  {spent}  "
        f"{parameters.trainable:,} of {parameters.total:,} parameters trained  {record.cost.seconds:.1f} s"
    )


def history_row(step: Step, epsilon: float | None) -> dict[str, Any]:
    """One line of `history.jsonl`; keys that begin with NON_PRIVATE/ must not be published."""
    return {
        "step": step.step,
        "learning_rate": step.learning_rate,
        "epsilon": epsilon,
        "noise_multiplier": step.effective_noise_multiplier,
        "NON_PRIVATE/seconds": round(step.seconds, 3),
        **{f"noise_std/{group}": value for group, value in step.noise_std.items()},
        **{key: value if math.isfinite(value) else None for key, value in step.telemetry.items()},
    }


@functools.lru_cache(maxsize=256)
def side_by_side(plan: PrivacyPlan) -> dict[str, Reported]:
    """Epsilon by every accountant; runs that differ in their seed share it."""
    return plan.side_by_side()


def privacy_of(
    plan: PrivacyPlan, config: Config, data: Dataset, steps: int, groups: dict[str, GroupPrivacy] | None = None
) -> Privacy:
    """The guarantee after some steps, computed from the plan that the run was trained with."""
    if not plan.private:
        return Privacy(private=False, steps=steps, stand_in=data.public, plan=plan.to_dict())
    return Privacy(
        private=True,
        unit=plan.unit,
        epsilon=plan.epsilon(steps),
        target_epsilon=config.privacy.target_epsilon,
        delta=plan.delta,
        noise_multiplier=plan.noise_multiplier,
        sample_rate=plan.sample_rate,
        steps=steps,
        noise_mode=plan.noise_mode,
        stand_in=data.public,
        groups=groups or {},
        accountants={name: dataclasses.asdict(value) for name, value in side_by_side(plan).items()},
        plan=plan.to_dict(),
    )


def scored(guarantee: Privacy, right: int, records: int, config: Config, prepared: Prepared) -> Privacy:
    """The guarantee of a run that also releases its score.

    No record is both trained on and counted, so that the larger epsilon holds (SPECIFICATION.md 8.2).
    """
    sigma = config.privacy.score_noise_multiplier
    assert sigma is not None and guarantee.epsilon is not None
    return dataclasses.replace(
        guarantee,
        epsilon=max(guarantee.epsilon, score_epsilon(sigma, prepared.plan.delta)),
        score=noisy_score(right, sigma, prepared.keys),
        score_noise_multiplier=sigma,
        score_of=records,
    )


def save_adapter(model: torch.nn.Module, folder: Path) -> None:
    """Write the adapter; a half-written folder is never seen."""
    draft = folder.with_name(f".{folder.name}.{os.getpid()}")
    try:
        adapters.save(model, draft)
        if folder.exists():
            shutil.rmtree(folder)
        os.replace(draft, folder)
    finally:
        shutil.rmtree(draft, ignore_errors=True)


def provenance(config: Config, prepared: Prepared, overrides: Sequence[str]) -> dict[str, Any]:
    """Where the numbers come from."""
    return {
        "started": datetime.now(UTC).isoformat(timespec="seconds"),
        "overrides": list(overrides),
        "git": git_commit(),
        "code": code_version(),
        "versions": {name: importlib.metadata.version(name) for name in PACKAGES}
        | {"python": platform.python_version()},
        "data": prepared.data.fingerprint,
        "backbone": prepared.backbone.fingerprint,
        "engine": prepared.engine,
        "seed": config.environment.seed,
    }


PACKAGES = ("dptune", "torch", "transformers", "peft", "opacus", "dp-accounting", "hydra-core", "numpy")


@functools.cache
def git_commit() -> str | None:
    """Commit of the code, with `+` when the working tree differs; None outside a repository."""
    here = Path(__file__).parent
    try:
        commit, changes = (
            subprocess.run(["git", *arguments], cwd=here, capture_output=True, text=True, check=True).stdout.strip()
            for arguments in (["rev-parse", "HEAD"], ["status", "--porcelain", "--untracked-files=no"])
        )
    except (OSError, subprocess.CalledProcessError):
        return None
    return commit + ("+" if changes else "")


def peak_memory_mb(device: str) -> float:
    """Peak device memory on a GPU, else the peak resident memory of this process."""
    if device.startswith("cuda"):
        return torch.cuda.max_memory_allocated() / 2**20
    unit = 2**20 if sys.platform == "darwin" else 2**10
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / unit

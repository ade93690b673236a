"""One run: a config becomes a plan, the plan trains an adapter, the result becomes a record. Knows nothing of Hydra."""

from __future__ import annotations

import dataclasses
import functools
import json
import math
import os
import shutil
import time
import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch
from omegaconf import OmegaConf

from dptune import evaluation
from dptune.config.adapters import ADAPTERS
from dptune.config.schema import Config, ConfigError
from dptune.data.encoding import Encoded, encode_examples
from dptune.data.sources import SOURCES
from dptune.data.sources import load_dataset as load_data
from dptune.identity import keep_local_key, kept_key, local_key, run_id
from dptune.models import adapters
from dptune.models.state import AdapterState
from dptune.privacy.allocation import lora_group_weights
from dptune.privacy.guarantee import GUARANTEE_FILE, epsilon_text, rounded_up
from dptune.privacy.ledger import LedgerError, WriteAheadLedger
from dptune.privacy.mechanism import Mechanism, groups_of
from dptune.privacy.plan import PrivacyPlan
from dptune.privacy.selection import noisy_score
from dptune.records import mirror as tracking
from dptune.records.code import code_version
from dptune.records.files import write_atomically
from dptune.records.lock import LockLost, RunLock, holder, locked
from dptune.records.record import (
    ADAPTER_FOLDER,
    EVALUATION_FILE,
    HISTORY_FILE,
    LEDGER_FILE,
    Cost,
    GroupPrivacy,
    Metrics,
    Privacy,
    RunRecord,
    guarantee_of,
    guarantee_page,
    read,
)
from dptune.runs.privacy import describe, epsilon_marks, privacy_of, spent, uncovered_test
from dptune.runs.provenance import keep_cost, peak_memory_mb, provenance
from dptune.runs.setup import Setup, load_backbone, make_engine, set_up, training_format, training_rows
from dptune.sweeps.progress import in_time
from dptune.training import checkpoint
from dptune.training.checkpoint import Checkpoint, CheckpointError, CheckpointForged
from dptune.training.loop import Step, train
from dptune.training.projection import make_projection
from dptune.training.ranks import Ranks, process_group

LOG_FILE, CHECKPOINT_FOLDER = "run.log", "checkpoint"

SKIPPED_FILE = "NON_PRIVATE_skipped.txt"
"""Bad records that `data.on_bad=skip` left out; not to be published."""

Report = Callable[[str], None]
"""Receives one line of progress."""
Steps = Callable[[int, int], None]
"""Receives, after each step, its number and that of all."""


def run(
    config: Config, overrides: Sequence[str] = (), report: Report | None = None, steps: Steps | None = None
) -> RunRecord:
    """Do one run, or give its record if it is finished already.

    Args:
        config: the checked config.
        overrides: what was said on the command line, for the record.
        report: receives progress, one line at a time.
        steps: is told of each step, for a bar.

    Raises:
        ConfigError: when the data, the model or the privacy settings cannot be used; nothing is written then.
        BlockingIOError: when another process is doing this run.
        OSError: when the run's folder cannot be written.
    """
    torch.set_num_threads(config.compute.threads)
    keep_local_key(config)
    with process_group() as ranks:
        if not ranks.first:
            return run_as_other_rank(config, ranks)
        return run_as_first_rank(
            config, overrides, ranks, report or (lambda line: None), steps or (lambda step, of: None)
        )


def run_as_first_rank(config: Config, overrides: Sequence[str], ranks: Ranks, say: Report, steps: Steps) -> RunRecord:
    """Do a run as the only process, or as the one of several that writes."""
    identity = run_id(config)
    folder = Path(config.compute.output_root) / identity
    if (finished := finished_record(folder, config)) is not None:
        say(f"{identity} is finished: {folder}")
        ranks.broadcast(Agreement(go=False).to_bytes())
        return finished
    if (other := holder(folder)) is not None:
        raise BlockingIOError(f"run {identity} is being done by {other}")
    setup = set_up(config, identity)
    with locked(folder) as lock:
        if lock is None:
            raise BlockingIOError(f"run {identity} is being done by another process")
        if (finished := finished_record(folder, config)) is not None:
            say(f"{identity} was finished by another process: {folder}")
            ranks.broadcast(Agreement(go=False).to_bytes())
            return finished
        return run_in_folder(config, setup, overrides, RunFolder(folder, lock, say, steps), ranks)


def run_in_folder(config: Config, setup: Setup, overrides: Sequence[str], folder: RunFolder, ranks: Ranks) -> RunRecord:
    """Do a run in a folder that is this process's, from the checkpoint if there is one."""
    begin = time.perf_counter()
    check_checkpoint(setup, folder.path)
    record = RunRecord(
        run_id=folder.path.name,
        status="running",
        config=dataclasses.asdict(config),
        sweep=config.sweep,
        method=config.method,
        privacy=privacy_of(setup.plan, config, setup.data, 0),
        provenance=provenance(config, setup, overrides),
    )
    record.guarantee = guarantee_of(record, folder.path)
    # A forced run replaces a finished record only by a finished one.
    replaces = (before := read(folder.path)) is not None and before.status == "done"
    if not replaces:
        record.write(folder.path)
    start = start_of(setup, folder)
    write_atomically(folder.path / ".hydra" / "config.yaml", OmegaConf.to_yaml(OmegaConf.structured(config)))
    write_atomically(folder.path / ".hydra" / "overrides.yaml", OmegaConf.to_yaml(list(overrides)))
    ranks.broadcast(Agreement(True, start.step if start else 0, setup.keys.master).to_bytes())
    if setup.data.skipped.count:
        # How many, and which, is known to the data's holder alone: it is neither in the record nor in the log.
        folder.say(f"{setup.data.skipped.count} records were skipped: {folder.path / SKIPPED_FILE}")
        skipped = "".join(f"{line}\n" for line in setup.data.skipped.messages)
        write_atomically(folder.path / SKIPPED_FILE, skipped)
    if not setup.data.public:
        folder.log(uncovered_test(config, setup.data))
    tracker = tracking.start(config.tracking, record, folder.path)
    try:
        measure_and_train(config, setup, record, folder, tracker, ranks, start, begin)
        folder.lock.check()
        record.status = "done"
        record.write(folder.path)
        checkpoint.remove(folder.path / CHECKPOINT_FOLDER)
        ranks.barrier()
    except LockLost:
        raise
    except Exception as error:
        record.status = "failed"
        record.error = " ".join(f"{type(error).__name__}: {error}".split())
        record.guarantee = guarantee_of(record, folder.path)
        log_traceback(folder.path)
        if not replaces:
            record.write(folder.path)
    except BaseException:
        folder.log("interrupted; the same command goes on from the last checkpoint")
        raise
    finally:
        if record.status == "running":
            record.guarantee = guarantee_of(record, folder.path)
        tracker.finish(record)
    return record


def run_as_other_rank(config: Config, ranks: Ranks) -> RunRecord:
    """Do the share of a process that writes nothing, and give the record that the first one wrote."""
    identity = run_id(config)
    folder = Path(config.compute.output_root) / identity
    agreed = Agreement.from_bytes(ranks.broadcast(Agreement(go=False).to_bytes()))
    try:
        if agreed.go:
            setup = set_up(config, identity)
            setup = dataclasses.replace(setup, keys=dataclasses.replace(setup.keys, master=agreed.master))
            start = load_checkpoint(setup, folder) if agreed.step else None
            if setup.plan.steps:
                train_adapter(config, setup, ranks, start)
            ranks.barrier()
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
    """The folder of a run, for the process that has locked it."""

    path: Path
    lock: RunLock
    say: Report
    steps: Steps

    def log(self, line: str) -> None:
        """Write a line to the log and report it."""
        self.note(line)
        self.say(line)

    def note(self, line: str) -> None:
        """Write a line to the log."""
        with (self.path / LOG_FILE).open("a", encoding="utf-8") as stream:
            stream.write(f"{datetime.now(UTC):%Y-%m-%d %H:%M:%S} {line}\n")


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


def load_checkpoint(setup: Setup, folder: Path) -> Checkpoint | None:
    """The checkpoint of a run. Raises CheckpointError when it cannot go on from there."""
    return checkpoint.load_checkpoint(folder / CHECKPOINT_FOLDER, setup.stamp, local_key(folder.parent))


def check_checkpoint(setup: Setup, folder: Path) -> None:
    """Raises ConfigError for a checkpoint that is not what this run wrote last: going on from it would not be paid for.

    Neither is it started anew: that costs another attempt, which is for a person to decide.
    """
    try:
        start = load_checkpoint(setup, folder)
        if start is not None and setup.plan.private:
            ledger_of(setup, folder).check_start(start.step, start.ledger)
    except (CheckpointForged, LedgerError) as error:
        raise ConfigError(
            f"{folder / CHECKPOINT_FOLDER}: {error}; put the right one back, or remove it to start anew, which "
            "counts as another attempt at the run"
        ) from None
    except CheckpointError:
        return  # Damaged, or of other code: said, and started anew, below.


def ledger_of(setup: Setup, folder: Path) -> WriteAheadLedger:
    """The ledger of a private run, opened."""
    return WriteAheadLedger(
        folder / LEDGER_FILE, setup.plan, setup.keys, setup.keys.run, code_version(), stand_in=setup.data.public
    )


def start_of(setup: Setup, folder: RunFolder) -> Checkpoint | None:
    """The checkpoint that a run goes on from; without one, what an earlier attempt left is removed."""
    place = folder.path / CHECKPOINT_FOLDER
    try:
        start = load_checkpoint(setup, folder.path)
    except CheckpointError as error:
        folder.log(f"the checkpoint cannot be used: {error}; starting anew")
        start = None
    if start is None:
        checkpoint.remove(place)
        for name in (HISTORY_FILE, EVALUATION_FILE):
            (folder.path / name).unlink(missing_ok=True)
    else:
        folder.log(f"going on after step {start.step} of {setup.plan.steps}")
        write_atomically(folder.path / HISTORY_FILE, "".join(json.dumps(row) + "\n" for row in start.history))
    return start


def measure_and_train(
    config: Config,
    setup: Setup,
    record: RunRecord,
    folder: RunFolder,
    tracker: tracking.Tracker,
    ranks: Ranks,
    start: Checkpoint | None,
    begin: float,
) -> None:
    """Measure, train, measure, and fill the record."""
    data, plan, model = setup.data, setup.plan, setup.model
    sequence_length = config.environment.sequence_length
    seen = {example.input for example in data.train} if data.public or not plan.private else None

    judge = functools.partial(
        evaluation.evaluate,
        layout=setup.backbone.layout,
        sequence_length=sequence_length,
        batch_size=config.compute.evaluation_batch_size,
        max_new_tokens=config.evaluation.max_new_tokens,
        template=config.data.template,
    )
    tokenizer = setup.backbone.tokenizer
    examples = evaluation.evaluated_examples(data.test, config.evaluation.prompts)

    def measure(model: torch.nn.Module) -> tuple[list[evaluation.Answer], Metrics]:
        judgements, written = judge(model.eval(), tokenizer, examples, seen)
        return judgements, evaluation.metrics_of(judgements, written)

    record.parameters = adapters.count(model)
    if not plan.steps:
        record.parameters = dataclasses.replace(record.parameters, trainable=0, groups={})
    floor = (
        setup.backbone.fingerprint,
        data.fingerprint,
        sequence_length,
        config.data.template,
        dataclasses.astuple(config.evaluation),
        seen is None,
    )
    if floor not in _zero_shot:
        # Most fresh adapters change nothing; a soft prompt does.
        bare = model if ADAPTERS[config.adapter.name].unchanged else load_backbone(config).model
        folder.say(f"measuring the backbone before training: {len(examples)} test examples")
        _zero_shot[floor] = measure(bare)[1]
    record.zero_shot = _zero_shot[floor]
    folder.log(f"zero-shot accuracy {record.zero_shot.accuracy:.3f}; {describe(plan)}")

    earlier = start.seconds if start else 0.0
    training_begin = time.perf_counter() - earlier
    if plan.steps:
        record.privacy = train_adapter(config, setup, ranks, start, folder, tracker)
    training_seconds = time.perf_counter() - training_begin
    folder.say(f"measuring the tuned model: {len(examples)} test examples")
    judgements, record.metrics = measure(model)
    if not math.isfinite(record.metrics.response_perplexity):
        raise FloatingPointError("training diverged: the tuned model's loss is not finite; lower the learning rate")
    lines = (json.dumps(dataclasses.asdict(item)) + "\n" for item in judgements)
    folder.lock.check()
    write_atomically(folder.path / EVALUATION_FILE, "".join(lines))
    record.guarantee = guarantee_of(dataclasses.replace(record, status="done"), folder.path)
    save_adapter(model, folder.path / ADAPTER_FOLDER, guarantee_page(record))
    if config.privacy.score_noise_multiplier is not None:
        # One at a time: beside others a record would be padded, and its rounding would depend on them.
        right = sum(judge(model.eval(), tokenizer, [example], None)[0][0].correct for example in data.validation)
        assert record.privacy is not None
        record.privacy = scored(record.privacy, right, len(data.validation), config, setup)
    cost = Cost(
        seconds=time.perf_counter() - begin + earlier,
        training_seconds=training_seconds,
        examples_per_second=plan.steps * plan.expected_batch_size / max(training_seconds, 1e-9),
        peak_memory_mb=peak_memory_mb(config.compute.device),
        device=f"{config.compute.device}, {config.compute.threads} thread(s)",
    )
    record.cost = keep_cost(cost, folder.path, data.public)
    folder.note(in_one_line(record))  # Whoever asked for the run gets it from the record.


_zero_shot: dict[tuple[object, ...], Metrics] = {}


def train_adapter(
    config: Config,
    setup: Setup,
    ranks: Ranks,
    start: Checkpoint | None,
    folder: RunFolder | None = None,
    tracker: tracking.Tracker = tracking.NONE,
) -> Privacy:
    """Train the adapter in place, write ledger, checkpoints and history, and say what it guarantees.

    Args:
        config: of the run.
        setup: its parts.
        ranks: the processes that do it together.
        start: go on from there.
        folder: where to write; None for a process that leaves this to another one.
        tracker: gets the history.
    """
    data, plan, model, keys = setup.data, setup.plan, setup.model, setup.keys
    tokenizer, sequence_length = setup.backbone.tokenizer, config.environment.sequence_length
    adapters.set_modes(model)
    template = config.data.template
    rows = training_rows(setup, sequence_length, template)
    parameters = adapters.trainable_parameters(model)
    layout = training_format(config, setup)
    groups = groups_of({name: value.shape for name, value in parameters.items()}, plan.grouping)
    sampler = plan.sampler(keys, users=[example.user for example in data.train])
    engine = make_engine(config, setup)
    ledger = None
    if plan.private and folder is not None:
        ledger = ledger_of(setup, folder.path)
        if plan.one_shot and start is None:
            ledger.begin(0, checkpoint.hash_of(parameters))
        if start is not None:
            ledger.seen(start.step)  # It may have died between checkpoint and ledger.

    def public_rows() -> list[Encoded]:
        of_public = SOURCES[config.data.name].public
        assert of_public is not None  # the config was checked
        public = load_data(dataclasses.replace(config, data=of_public(config.data)))
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
    mechanism = Mechanism(plan, projection.groups, keys)

    def before_step(step: int) -> None:
        if folder is not None:
            folder.lock.check()
        if ledger is not None:
            ledger.begin(step, checkpoint.hash_of(parameters))
        ranks.barrier()
        if plan.allocation.row.takes_weights:
            # Weights of the adapter as it is now are a function of past releases: free (SPECIFICATION.md 2.5).
            norms = {name: float(value.detach().square().sum()) for name, value in model.named_parameters()}
            mechanism.set_public_weights(lora_group_weights(groups, norms))

    history = list(start.history) if start else []
    shown = 0
    marks: dict[int, float | None] = {}

    def let_out(step: Step) -> None:
        """Make a checkpoint, and show its rows only then: what was seen is never drawn again with other noise."""
        nonlocal shown
        if folder is not None:
            folder.lock.check()
            position = ledger.position if ledger else ""
            made = Checkpoint(step.step, step.seconds, history, step.state(), position)
            checkpoint.save(folder.path / CHECKPOINT_FOLDER, made, setup.stamp, kept_key(folder.path.parent))
            if ledger is not None:
                ledger.seen(step.step)
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
            marks = marks or epsilon_marks(plan, ledger.rows if ledger else ())
            history.append(history_row(step, marks.get(step.step)))
            if step.step % config.compute.checkpoint_every == 0 or step.step == plan.steps:
                let_out(step)
            if folder is not None:
                folder.steps(step.step, plan.steps)
                if step.step in marks:
                    folder.log(progress(step, plan, config, marks[step.step]))
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


def progress(step: Step, plan: PrivacyPlan, config: Config, epsilon: float | None) -> str:
    """Steps, examples a second, epsilon spent, time left."""
    rate = step.step * plan.expected_batch_size / step.seconds
    left = step.seconds / step.step * (plan.steps - step.step)
    target = f" of {config.privacy.target_epsilon:g}" if config.privacy.target_epsilon else ""
    so_far = "non-private" if epsilon is None else f"epsilon {epsilon_text(epsilon)}{target}"
    rest = f"  {in_time(left)} left" if step.step < plan.steps else ""
    return f"step {step.step}/{plan.steps}  {rate:.0f} examples/s  {so_far}{rest}"


def in_one_line(record: RunRecord) -> str:
    """The finished run in one line."""
    metrics, floor, guarantee, parameters = record.metrics, record.zero_shot, record.guarantee, record.parameters
    assert metrics and floor and guarantee and parameters
    time_taken = f"  {record.cost.seconds:.1f} s" if record.cost else ""
    delta = "" if guarantee.epsilon is None else f" at delta {guarantee.delta:g}"
    return (
        f"accuracy {metrics.accuracy:.3f} (zero-shot {floor.accuracy:.3f})  {spent(record)}{delta}  "
        f"{parameters.trainable:,} of {parameters.total:,} parameters trained{time_taken}"
    )


def history_row(step: Step, epsilon: float | None) -> dict[str, Any]:
    """One line of `history.jsonl`; keys that begin with NON_PRIVATE/ must not be published."""
    return {
        "step": step.step,
        "learning_rate": step.learning_rate,
        "epsilon": None if epsilon is None else rounded_up(epsilon),
        "noise_multiplier": step.effective_noise_multiplier,
        "NON_PRIVATE/seconds": round(step.seconds, 3),
        **{f"noise_std/{group}": value for group, value in step.noise_std.items()},
        **{key: value if math.isfinite(value) else None for key, value in step.telemetry.items()},
    }


def scored(guarantee: Privacy, right: int, records: int, config: Config, setup: Setup) -> Privacy:
    """How a run was trained that also releases its score."""
    sigma = config.privacy.score_noise_multiplier
    assert sigma is not None
    return dataclasses.replace(
        guarantee,
        score=noisy_score(right, sigma, setup.keys),
        score_noise_multiplier=sigma,
        score_of=records,
    )


def save_adapter(model: torch.nn.Module, folder: Path, page: str) -> None:
    """Write the adapter, with a page on what it guarantees; a half-written folder is never seen."""
    draft = folder.with_name(f".{folder.name}.{os.getpid()}")
    try:
        adapters.save(model, draft)
        write_atomically(draft / GUARANTEE_FILE, page)
        if folder.exists():
            shutil.rmtree(folder)
        os.replace(draft, folder)
    finally:
        shutil.rmtree(draft, ignore_errors=True)

"""One run: a config becomes a plan, the plan trains an adapter, the result becomes a record. Knows nothing of Hydra."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import math
import shutil
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch
from omegaconf import OmegaConf

from dptune import evaluation
from dptune.config.adapters import ADAPTERS
from dptune.config.schema import Config, ConfigError
from dptune.data.batches import Ladder
from dptune.identity import keep_local_key, run_id
from dptune.models import adapters
from dptune.privacy.guarantee import GUARANTEE_FILE
from dptune.privacy.ledger import LedgerError
from dptune.privacy.selection import noisy_score
from dptune.records import mirror as tracking
from dptune.records.files import whole_folder, write_atomically
from dptune.records.lock import LockLost, holder, locked
from dptune.records.record import (
    ADAPTER_FOLDER,
    CHECKPOINT_FOLDER,
    EVALUATION_FILE,
    HISTORY_FILE,
    Cost,
    Metrics,
    Privacy,
    RunRecord,
    guarantee_of,
    guarantee_page,
    read,
)
from dptune.runs.booking import book_run
from dptune.runs.budget import mark_begun, mark_done
from dptune.runs.card import CARD_FILE, adapter_card
from dptune.runs.folder import Report, RunFolder, Steps, log_traceback
from dptune.runs.privacy import describe, privacy_of, said_if_slow, spent, uncovered_test
from dptune.runs.provenance import keep_cost, peak_memory_mb, provenance
from dptune.runs.public import on_stderr
from dptune.runs.setup import Setup, load_backbone, said_of_cuts, set_up
from dptune.runs.training import AdapterTraining, ledger_of, load_checkpoint
from dptune.training import checkpoint
from dptune.training.checkpoint import Checkpoint, CheckpointError, CheckpointForged
from dptune.training.ranks import Ranks, process_group

SKIPPED_FILE = "NON_PRIVATE_skipped.txt"
"""Bad records that `data.on_bad=skip` left out; not to be published."""


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
        return run_as_first_rank(config, overrides, ranks, report or silent, steps or (lambda step, of: None))


def silent(line: str) -> None:
    """Reports nothing."""


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
    setup = set_up(config, identity, on_stderr if say is silent else say)
    check_checkpoint(setup, folder)
    book_run(config, setup, folder)
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
    replaces = (before := read(folder.path)) is not None and before.is_done
    if not replaces:
        record.write(folder.path)
    start = start_of(setup, folder)
    write_atomically(folder.path / ".hydra" / "config.yaml", OmegaConf.to_yaml(OmegaConf.structured(config)))
    write_atomically(folder.path / ".hydra" / "overrides.yaml", OmegaConf.to_yaml(list(overrides)))
    agreed = Agreement(True, start.step if start else 0, digest_of(setup), setup.keys.master)
    ranks.broadcast(agreed.to_bytes())
    for note in setup.path.notes:
        folder.log(f"not used: {note}")
    if setup.data.seen.layout not in (None, "records"):
        folder.say(f"{'' if setup.data.public else 'NON_PRIVATE, for this terminal alone: '}{setup.data.seen}")
    if setup.data.skipped.count:
        # How many, and which, is known to the data's holder alone: it is neither in the record nor in the log.
        folder.say(f"{setup.data.skipped.count} records were skipped: {folder.path / SKIPPED_FILE}")
        skipped = "".join(f"{line}\n" for line in setup.data.skipped.messages)
        write_atomically(folder.path / SKIPPED_FILE, skipped)
    if (lost := said_of_cuts(setup, config)) is not None:
        folder.say(lost)
    if not setup.data.public:
        folder.log(uncovered_test(config, setup.data))
    tracker = tracking.start(config.tracking, record, folder.path)
    try:
        measure_and_train(config, setup, record, folder, tracker, ranks, start, begin)
        folder.lock.check()
        mark_done(config, folder.path)
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
            if digest_of(setup) != agreed.digest:
                raise ConfigError(
                    "this process computes gradients in another way than the first one, or of another config or other "
                    "data, so that a record's gradient would depend on where it is computed: take machines, versions, "
                    "environment variables, files and settings alike"
                )
            start = load_checkpoint(setup, folder) if agreed.step else None
            if setup.plan.steps:
                AdapterTraining(config, setup, ranks, start).run()
            ranks.barrier()
    except Exception:
        if folder.is_dir():  # It is not this run's where the config is another one.
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
    digest: bytes = bytes(16)
    """What is computed and how: the ranks share out the same physical batches, clip alike and round alike."""
    master: bytes = field(default=bytes(32), repr=False)
    """Keys of the run."""

    def to_bytes(self) -> bytes:
        """53 bytes."""
        return bytes([self.go]) + self.step.to_bytes(4, "little") + self.digest + self.master

    @classmethod
    def from_bytes(cls, message: bytes) -> Agreement:
        """Inverse of `to_bytes`."""
        return cls(bool(message[0]), int.from_bytes(message[1:5], "little"), message[5:21], message[21:])


def digest_of(setup: Setup) -> bytes:
    """Equal for processes that make the same gradients and releases of the same data; 16 bytes."""
    return hashlib.sha256(setup.path.digest + json.dumps(setup.stamp, sort_keys=True).encode()).digest()[:16]


def finished_record(folder: Path, config: Config) -> RunRecord | None:
    """The record of a finished run that is not to be done again."""
    record = read(folder)
    return record if record is not None and record.is_done and not config.compute.force else None


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

    judge = evaluation.Evaluator(
        setup.backbone.tokenizer,
        Ladder(sequence_length, config.compute.evaluation_batch_size, setup.backbone.layout),
        config.evaluation.max_new_tokens,
        config.data.template,
    )
    examples = evaluation.evaluated_examples(data.test, config.evaluation.prompts)

    def measure(model: torch.nn.Module) -> tuple[list[evaluation.Answer], Metrics]:
        answers, written = judge(model.eval(), examples, seen)
        return answers, evaluation.metrics_of(answers, written)

    record.parameters = adapters.count(model)
    if not plan.steps:
        record.parameters = dataclasses.replace(record.parameters, trainable=0, groups={})
    floor = (
        (setup.backbone.fingerprint, repr(setup.backbone.model.config)),
        data.fingerprint,
        sequence_length,
        config.data.template,
        dataclasses.astuple(config.evaluation),
        seen is None,
    )
    if floor not in _zero_shot:
        # Most fresh adapters change nothing; a soft prompt does, and what has learned from public data.
        unchanged = ADAPTERS[config.adapter.name].unchanged and setup.start is None
        bare = model if unchanged else load_backbone(config).model
        folder.say(f"measuring the backbone before training: {len(examples)} test examples")
        _zero_shot[floor] = measure(bare)[1]
    record.zero_shot = _zero_shot[floor]
    folder.log(f"zero-shot accuracy {record.zero_shot.accuracy:.3f}; {describe(plan)}")

    earlier = start.seconds if start else 0.0
    training_begin = time.perf_counter() - earlier
    if plan.private and start is None:
        mark_begun(config, folder.path)
    if plan.steps:
        record.privacy = AdapterTraining(config, setup, ranks, start, folder, tracker).run()
    training_seconds = time.perf_counter() - training_begin
    folder.say(f"measuring the tuned model: {len(examples)} test examples")
    answers, record.metrics = measure(model)
    if not math.isfinite(record.metrics.response_perplexity):
        raise FloatingPointError("training diverged: the tuned model's loss is not finite; lower the learning rate")
    lines = (json.dumps(dataclasses.asdict(item)) + "\n" for item in answers)
    folder.lock.check()
    write_atomically(folder.path / EVALUATION_FILE, "".join(lines))
    with said_if_slow(f"accounting for {plan.steps:,} steps by every accountant"):
        record.guarantee = guarantee_of(dataclasses.replace(record, status="done"), folder.path)
    card = adapter_card(config, adapters.is_peft(model))
    save_adapter(model, folder.path / ADAPTER_FOLDER, {GUARANTEE_FILE: guarantee_page(record), CARD_FILE: card})
    if config.privacy.score_noise_multiplier is not None:
        assert record.privacy is not None
        right = sum(answer.correct for answer in judge(model.eval(), data.validation, None)[0])
        record.privacy = scored(record.privacy, right, config, setup)
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


def scored(guarantee: Privacy, right: int, config: Config, setup: Setup) -> Privacy:
    """How a run was trained that also releases its score."""
    sigma = config.privacy.score_noise_multiplier
    assert sigma is not None
    return dataclasses.replace(
        guarantee,
        score=noisy_score(right, sigma, setup.keys),
        score_noise_multiplier=sigma,
        # Of private data the exact number is nobody's business: nothing was paid for it.
        score_of=len(setup.data.validation) if setup.data.public else None,
    )


def save_adapter(model: torch.nn.Module, folder: Path, pages: Mapping[str, str]) -> None:
    """Write the adapter, with pages on what it is and guarantees; a half-written folder is never seen."""
    with whole_folder(folder) as draft:
        adapters.save(model, draft)
        for name, page in pages.items():
            write_atomically(draft / name, page)
        shutil.rmtree(folder, ignore_errors=True)

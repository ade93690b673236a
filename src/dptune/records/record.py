"""The record of one run: its documented schema, how it is written and read.

A run folder `outputs/<run_id>/` holds `record.json` (this schema), `history.jsonl` (one line a step),
`evaluation.jsonl` (one line a test example), `ledger.jsonl` (one line a private step, written before it), `adapter/`
(PEFT format, with `GUARANTEE.md`), `.hydra/`, `run.log`. Tables, figures and W&B
are views of it. No torch here.
"""

from __future__ import annotations

import dataclasses
import json
import math
import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from dptune.config.schema import DataSensitivityConfig
from dptune.privacy.guarantee import Guarantee, recipe
from dptune.records.files import write_atomically
from dptune.records.state import State

SCHEMA_VERSION = 2
"""Records of version 1, with an epsilon in `privacy`, are read too: their guarantee is made from what they hold."""


RECORD_FILE, HISTORY_FILE, EVALUATION_FILE = "record.json", "history.jsonl", "evaluation.jsonl"
LEDGER_FILE, CHECKPOINT_FOLDER = "ledger.jsonl", "checkpoint"


ADAPTER_FOLDER = "adapter"
COST_FILE = "NON_PRIVATE_cost.json"
"""What a run on private data cost: beside its record, not to be published."""


class RecordError(ValueError):
    """A record that cannot be read: path and reason in one line."""

    def __init__(self, path: Path, reason: str) -> None:
        super().__init__(f"{path}: {reason}")
        self.folder = path.parent


class RunFailed(RuntimeError):
    """A run that failed, after its record was written: which one, why, and where its log is."""


@dataclass
class Metrics:
    """What the tuned model does on the test split. Higher is better unless said otherwise; shares are in [0, 1]."""

    accuracy: float
    """Macro average over tasks: options by summed log-likelihood, free form by normalised exact match of greedy output
    (see also `bleu`)."""
    accuracy_by_task: dict[str, float]
    """Accuracy of each task."""
    worst_task: str
    """Name of the task with the lowest accuracy."""
    spread_over_tasks: float
    """Standard deviation of the accuracies over tasks (lower is better)."""
    accuracy_unseen: float | None
    """Macro accuracy on test inputs that do not occur in the training split; null when there are none, and for private
    data, about whose single records it would tell."""
    response_perplexity: float
    """exp of the mean over examples of their loss (lower is better)."""
    n: int
    """Number of test examples."""
    n_unseen: int | None
    """Number of test examples whose input does not occur in the training split; null for private data."""
    n_by_task: dict[str, int]
    """Number of test examples of each task."""
    bleu: float | None = None
    """Macro average over free-form tasks of corpus BLEU (sacreBLEU, in [0, 100]); null when none has references of
    four words or more."""
    bleu_by_task: dict[str, float] = field(default_factory=dict)
    """BLEU of each free-form task with such references."""
    rouge_l: float | None = None
    """Macro average over the same tasks of the mean F-measure of ROUGE-L."""
    rouge_l_by_task: dict[str, float] = field(default_factory=dict)
    """ROUGE-L of each of them."""


@dataclass(slots=True)
class GroupPrivacy:
    """Clip and noise of one group of parameters in the last step."""

    dimension: int
    """Number of coordinates."""
    noise_std: float
    """Standard deviation of the noise on the sum of clipped gradients."""


@dataclass
class Privacy:
    """How the run was trained privately. What that guarantees is in `guarantee`, and nowhere else."""

    private: bool
    """False: no guarantee at all."""
    unit: str | None = None
    """What one neighbouring data set lacks: an example, or a user."""
    target_epsilon: float | None = None
    """Epsilon asked for; null when the noise multiplier was given instead."""
    delta: float | None = None
    """Delta, fixed before training."""
    noise_multiplier: float | None = None
    """Noise standard deviation over sensitivity."""
    sample_rate: float | None = None
    """Probability that a unit is in a batch."""
    steps: int | None = None
    """Noisy steps that were done."""
    noise_mode: str | None = None
    """`secure`, or `reproducible`: epsilon accounted, not realised for anyone who knows the seed."""
    attempts: int = 1
    """Transcripts that were begun for this run, forced ones included; going on from a checkpoint begins none."""
    score: float | None = None
    """Number of right answers on the validation split, with noise: what a search chooses by. It is paid for."""
    score_noise_multiplier: float | None = None
    """Standard deviation of its noise."""
    score_of: int | None = None
    """Number of validation records; null of private data, of which it is not told."""
    stand_in: bool = False
    """The data is public: epsilon is stated as if it were private."""
    not_covered: list[str] = field(default_factory=list)
    """Whom or what the guarantee says nothing about, in words; of private data only."""
    groups: dict[str, GroupPrivacy] = field(default_factory=dict)
    """Clip and noise by group."""
    plan: dict[str, Any] = field(default_factory=dict)
    """The privacy plan, from which everything above can be computed again."""


@dataclass
class Parameters:
    """Counts of parameters."""

    total: int
    """Backbone and adapter."""
    trainable: int
    """Trained, and therefore clipped, noised and published."""
    groups: dict[str, int] = field(default_factory=dict)
    """The trained ones by kind, such as `lora_A` or `bias`."""

    @property
    def fraction(self) -> float:
        """Trainable over total."""
        return self.trainable / self.total


@dataclass
class Cost:
    """What the run cost. It depends a little on the batches that were drawn: of private data it is in `COST_FILE`."""

    seconds: float
    """Wall-clock seconds of the run, once data and backbone are loaded."""
    training_seconds: float
    """Wall-clock seconds of the steps."""
    examples_per_second: float
    """Training examples a second. Derived from the expected, not the realised number."""
    peak_memory_mb: float
    """Peak resident memory of the process, or peak device memory on a GPU, in MiB (2**20 bytes)."""
    device: str
    """Device and threads."""


@dataclass
class RunRecord:
    """Everything that is known of one run."""

    run_id: str
    """Hash of everything that can change the numbers; of what a search released, hash of what it chose from."""
    status: Literal["running", "done", "failed"]
    """State of the run; `running` also marks one that was killed."""
    config: dict[str, Any]
    """The whole resolved config."""
    sweep: str | None = None
    """Sweep that asked for it first."""
    method: str | None = None
    """Method of a comparison, if it was asked for by name."""
    metrics: Metrics | None = None
    """Test metrics of the tuned model."""
    zero_shot: Metrics | None = None
    """Test metrics of the backbone before training: the floor."""
    privacy: Privacy | None = None
    """How it was trained privately."""
    guarantee: Guarantee | None = None
    """What it guarantees, of all that was begun: the only thing that a view may say of its privacy."""
    parameters: Parameters | None = None
    """How much was trained."""
    cost: Cost | None = None
    """What it cost; null of private data."""
    provenance: dict[str, Any] = field(default_factory=dict)
    """git commit, version of the code, versions of packages, overrides, data fingerprint, backbone, engine, time. Of a
    start from public data, `public` says how it was made of which records. Of what a search released, `repetitions`
    says how many trials it may have had and what each may have cost."""
    error: str | None = None
    """One line, when failed; the traceback is in run.log."""
    schema_version: int = SCHEMA_VERSION
    """Version of this schema."""

    @property
    def is_done(self) -> bool:
        """Whether it has results."""
        return self.status == "done"

    def write(self, folder: Path) -> Path:
        """Write `record.json` atomically: a reader sees the old record or the new one, never half of it."""
        content = dataclasses.asdict(self)
        if self.parameters is not None:
            content["parameters"]["fraction"] = self.parameters.fraction
        content["schema_version"] = SCHEMA_VERSION
        return write_atomically(folder / RECORD_FILE, json.dumps(_finite(content), indent=1) + "\n")


def guarantee_of(record: RunRecord, folder: Path, first_version: bool = False, **stated: Any) -> Guarantee:
    """What a run guarantees now, by its record and the ledger in its folder: of all steps that were begun.

    Args:
        record: with its plan in `privacy`.
        folder: of the run.
        first_version: whether it was read from a file of version 1.
        **stated: its `epsilon` and `accountants`, where such a file has them.
    """
    made = _guarantee_of(record, folder, first_version, **stated)
    learned = record.provenance.get("public")
    return made if learned is None else dataclasses.replace(made, public_data=learned["in_words"])


def _guarantee_of(record: RunRecord, folder: Path, first_version: bool, **stated: Any) -> Guarantee:
    """The same without a word on public data."""
    from dptune.privacy import spent

    if record.privacy is None and (record.config.get("privacy") or {}).get("enabled") is False:
        return Guarantee("adapter", private=False)
    if record.privacy is None:
        return Guarantee("unknown", private=True, not_covered=("the record does not hold a privacy plan",))
    if not record.privacy.private:
        return Guarantee("adapter", private=False, stand_in=record.privacy.stand_in)

    if record.is_done and (folder / CHECKPOINT_FOLDER).exists() and not (folder / LEDGER_FILE).exists():
        gone = f"{CHECKPOINT_FOLDER} is of a run that was begun again, and {LEDGER_FILE}, which would tell, is gone"
        return Guarantee("unknown", private=True, stand_in=record.privacy.stand_in, not_covered=(gone,))

    def of_config(group: str) -> Mapping[str, Any]:
        return record.config.get(group) or {}

    tracking = of_config("tracking")
    circumstances = spent.Circumstances(
        status=record.status,
        stand_in=record.privacy.stand_in,
        score_noise_multiplier=record.privacy.score_noise_multiplier
        or of_config("privacy").get("score_noise_multiplier"),
        copies=copies_in(of_config("data_sensitivity")),
        # Where the config leaves it open, what the files were seen to hold.
        conversations=record.provenance.get("layout", of_config("data").get("layout")) == "messages",
        telemetry_is_shown=tracking.get("allow_private", False) and tracking.get("name") != "none",
        not_covered=tuple(record.privacy.not_covered),
        attempts=record.privacy.attempts,
        whole=first_version,
    )
    ledger, repetitions = folder / LEDGER_FILE, record.provenance.get("repetitions")
    return spent.guarantee_of(record.privacy.plan, ledger, circumstances, repetitions, **stated)


def copies_in(data_sensitivity: Mapping[str, Any] | DataSensitivityConfig) -> int:
    """How often one record may be in the training split because dptune itself writes it there again."""
    given = data_sensitivity if isinstance(data_sensitivity, Mapping) else vars(data_sensitivity)
    return 2 if given.get("duplicates") else 1


def guarantee_page(record: RunRecord) -> str:
    """The page on its guarantee that lies beside a run's adapter."""
    assert record.guarantee is not None
    return record.guarantee.page(record.run_id, recipe(record.guarantee, record.provenance.get("repetitions")))


def read(folder: Path) -> RunRecord | None:
    """The record in a run folder, or None when there is none.

    Of a run that is not done, or was begun again since its record was written, the guarantee is made anew: of the steps
    that its ledger says were begun by now.

    Raises:
        RecordError: naming the file, when it is not a record of this schema.
    """
    path = folder / RECORD_FILE
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return None
    except (OSError, ValueError) as error:
        raise RecordError(path, f"not readable as JSON ({error}); remove the folder to run it again") from None
    try:
        if not 1 <= (version := content["schema_version"]) <= SCHEMA_VERSION:
            other = "an older" if version < 1 else "a newer"
            raise RecordError(
                path,
                f"schema version {version} of {other} dptune, this one reads {SCHEMA_VERSION}; read it with "
                "the version that wrote it, or remove the folder to run it again",
            )
        record = _parse_first(content, folder) if version == 1 else _parse(content)
        if version > 1 and (record.guarantee is None or record.status != "done" or _has_more(record, folder)):
            record.guarantee = guarantee_of(record, folder)
        _check(record)
        return record
    except (KeyError, TypeError, AttributeError, ValueError) as error:
        if isinstance(error, RecordError):
            raise
        raise RecordError(path, f"not a run record ({type(error).__name__}: {error})") from None


@dataclass(frozen=True)
class RunState:
    """What the state of a run depends on."""

    folder: Path
    status: str
    sweep: str | None
    error: str | None
    code: str | None

    @property
    def is_done(self) -> bool:
        """Whether the run has results."""
        return self.status == State.DONE


def is_done(folder: Path) -> bool:
    """Whether a folder has the results of a run."""
    seen = run_state(folder)
    return seen is not None and seen.is_done


def has_ended(folder: Path) -> bool:
    """Whether the run of a folder is done or has failed."""
    seen = run_state(folder)
    return seen is not None and (seen.is_done or seen.status == State.FAILED)


def run_state(folder: Path) -> RunState | None:
    """A few fields of a record, ten times as fast as all of it; None when there is no record.

    Records are written one key a line, indented by its depth. A file that is not is read as a whole.

    Raises:
        RecordError: naming the file, when it is not a record of this schema.
    """
    try:
        content = (folder / RECORD_FILE).read_bytes()
    except FileNotFoundError:
        return None
    status, error = _value(content, b'\n "status": '), _value(content, b'\n "error": ')
    if status is None or error is None:
        record = read(folder)
        assert record is not None
        return RunState(folder, record.status, record.sweep, record.error, record.provenance.get("code"))
    sweep, code = (
        _value(content, b'\n "sweep": '),
        _value(content, b'\n  "code": ', content.rfind(b'\n "provenance": {')),
    )
    fields: list[Any] = [json.loads(value or b"null") for value in (status, sweep, error, code)]
    return RunState(folder, *fields)


def _value(content: bytes, key: bytes, start: int = 0) -> bytes | None:
    """What stands behind a key to the end of its line."""
    begin = content.find(key, start)
    if begin < 0:
        return None
    begin += len(key)
    return content[begin : content.find(b"\n", begin)].rstrip(b",")


def run_states(root: Path) -> Iterator[RunState | RecordError]:
    """Summaries of all records below `root`, in the order of their names; errors of those that cannot be read."""
    folders = sorted(entry.path for entry in os.scandir(root) if entry.is_dir()) if root.is_dir() else []
    for folder in folders:
        try:
            seen = run_state(Path(folder))
        except RecordError as error:
            yield error
            continue
        if seen is not None:
            yield seen


def _has_more(record: RunRecord, folder: Path) -> bool:
    """Whether other steps were begun than the record knows of, as by a forced run that did not end."""
    from dptune.privacy.ledger import LedgerError
    from dptune.privacy.spent import steps_begun

    if not (folder / LEDGER_FILE).exists():
        return (folder / CHECKPOINT_FOLDER).exists()
    try:
        return record.guarantee is None or steps_begun(folder / LEDGER_FILE) != record.guarantee.steps
    except LedgerError:
        return True


def _parse_first(content: dict[str, Any], folder: Path) -> RunRecord:
    """A record of version 1. What it states as epsilon holds where one transcript is all that there is to it."""
    privacy, provenance = dict(content["privacy"] or {}), dict(content["provenance"])
    stated = {name: privacy.pop(name, None) for name in ("epsilon", "accountants")}
    if repetitions := provenance.get("repetitions"):
        provenance["repetitions"] = {name: value for name, value in repetitions.items() if name != "epsilon"}
    record = _parse({**content, "privacy": privacy or None, "provenance": provenance, "guarantee": None})
    record.guarantee = guarantee_of(record, folder, first_version=True, **stated)
    record.schema_version = SCHEMA_VERSION
    return record


def _parse(content: dict[str, Any]) -> RunRecord:
    def metrics(part: Mapping[str, Any] | None) -> Metrics | None:
        return None if part is None else Metrics(**part)

    privacy = content["privacy"]
    if privacy is not None:
        groups = {name: GroupPrivacy(**group) for name, group in privacy["groups"].items()}
        privacy = Privacy(**{**privacy, "groups": groups})
    parameters, cost = content["parameters"], content["cost"]
    if parameters is not None:
        parameters = Parameters(parameters["total"], parameters["trainable"], parameters.get("groups", {}))
    return RunRecord(
        **{
            **content,
            "metrics": metrics(content["metrics"]),
            "zero_shot": metrics(content["zero_shot"]),
            "privacy": privacy,
            "guarantee": None if (stated := content["guarantee"]) is None else Guarantee.from_dict(stated),
            "parameters": parameters,
            "cost": None if cost is None else Cost(**cost),
        }
    )


def _check(record: RunRecord) -> None:
    """Refuse what would be shown as a result and cannot be one."""
    if record.status not in ("running", "done", "failed"):
        raise ValueError(f"status is {record.status!r}, not running, done or failed")
    if not isinstance(record.config, dict) or not isinstance(record.provenance, dict):
        raise ValueError("config and provenance must be objects")
    if record.is_done and (record.metrics is None or record.privacy is None):
        raise ValueError("a finished run needs metrics and privacy")
    for name, part in (("metrics", record.metrics), ("zero_shot", record.zero_shot)):
        shares = [] if part is None else [part.accuracy, *part.accuracy_by_task.values()]
        if any(isinstance(share, bool) or not 0 <= share <= 1 for share in shares):
            raise ValueError(f"{name} holds an accuracy outside [0, 1]")
        if part is not None and not (0 <= (part.bleu or 0) <= 100 and 0 <= (part.rouge_l or 0) <= 1):
            raise ValueError(f"{name} holds a BLEU outside [0, 100] or a ROUGE-L outside [0, 1]")
    privacy, guarantee = record.privacy, record.guarantee
    if record.is_done and privacy is not None and privacy.private:
        epsilon = None if guarantee is None else guarantee.epsilon
        # A run of no steps, such as zero-shot, looks at no training data: its epsilon is 0.
        if epsilon is not None and not (epsilon > 0 or epsilon == privacy.steps == 0):
            raise ValueError("epsilon of a private run that took steps must be above 0")
        stated = (privacy.delta, privacy.noise_multiplier)
        if any(value is not None and not value > 0 for value in stated):
            raise ValueError("delta and noise multiplier of a private run must be above 0")
    if privacy is not None and guarantee is not None and privacy.private != guarantee.private:
        raise ValueError("privacy and guarantee do not agree on whether the run is private")


def _finite(value: Any) -> Any:
    """JSON has no infinity and no NaN: both become null."""
    if isinstance(value, Mapping):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value

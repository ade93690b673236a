"""A search whose privacy can be stated: of a random, secret number of trials only the best is let out.

Which trials there are is drawn once and kept in a folder that no view reads; each trial is an ordinary run with a noisy
score. What must stay secret, and what the released run costs: SPECIFICATION.md 8.2.
"""

from __future__ import annotations

import dataclasses
import json
import math
import secrets
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from functools import cached_property
from pathlib import Path
from typing import Any

from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig, OmegaConf

from dptune.config.checks import strict
from dptune.config.extras import check_extras
from dptune.config.schema import Config, ConfigError, has_plain_hashes, is_open, is_public, noise_mode
from dptune.identity import KEY_FILE, keep_local_key, local_key, run_id
from dptune.privacy.budget import Spending
from dptune.privacy.events import Event
from dptune.privacy.guarantee import GUARANTEE_FILE
from dptune.privacy.selection import Repetitions, epsilon_best, score_event
from dptune.privacy.spent import group_size_of
from dptune.privacy.streams import KeyRing, Purpose
from dptune.records.files import whole_folder, write_atomically, write_once
from dptune.records.record import (
    ADAPTER_FOLDER,
    HISTORY_FILE,
    RunFailed,
    RunRecord,
    copies_in,
    guarantee_of,
    guarantee_page,
    has_ended,
    is_done,
    read,
)
from dptune.runs.budget import DRAW_FILE as DRAW_FILE
from dptune.runs.budget import SECRET_FOLDER as SECRET_FOLDER
from dptune.runs.budget import TOKEN_FILE, book, drawn_once
from dptune.runs.folder import LOG_FILE
from dptune.runs.privacy import make_plan
from dptune.runs.run import in_one_line as in_one_line
from dptune.runs.run import run
from dptune.runs.setup import data_of
from dptune.sweeps.expand import released_by
from dptune.sweeps.jobs import Job
from dptune.sweeps.progress import NotDone, tried

WARNING = (
    "NON-PRIVATE. How many trials a search had, which, how they did and how long they took must not be told:\n"
    "the epsilon of the released run rests on it. Keep this folder secret; when the search is finished, delete it.\n"
)
ZERO_SHOT = (
    "method=zero_shot",
    "adapter=lora",
    "hyperparameter.steps=0",
    "hyperparameter.warmup_steps=0",
    "privacy.score_noise_multiplier=null",
)
"""What is released when no trial was drawn: the backbone as it is."""
NOT_RELEASED = (LOG_FILE, "checkpoint", ".c*", "NON_PRIVATE*")
"""Files of a trial that would tell when it ran, or that are of use to a running one only."""


@dataclass(frozen=True)
class Draw:
    """The trials of a search: secret."""

    begun: str
    """When the search began."""
    candidates: tuple[int, ...]
    """Candidate of each trial."""
    seeds: tuple[int, ...]
    """Seed of each trial."""
    runs: tuple[str, ...] = ()
    """Run id of each trial: nothing else is done in the folder of the search."""
    nonce: str = ""
    """Random: a hash of the rest would tell how many there are to whoever tries all numbers."""


@dataclass(frozen=True)
class Search:
    """A search that is sound and whose cost is known."""

    candidates: tuple[Job, ...]
    """Every config that the prior can draw, each with the same probability."""
    repetitions: Repetitions
    """Distribution of the number of trials."""
    zero_shot: Job | None
    """Released if no trial is drawn, which a Poisson number permits."""

    @cached_property
    def released(self) -> Job:
        """The run that it lets out, whose config is that of a candidate until the search is finished."""
        return released_by(self.candidates, self.repetitions.mean, self.repetitions.eta)

    @property
    def root(self) -> Path:
        """Output folder."""
        return Path(self.candidates[0].config.compute.output_root)

    @property
    def folder(self) -> Path:
        """Folder of the released run."""
        return self.root / self.released.run_id

    @property
    def secret(self) -> Path:
        """Folder of the trials."""
        return self.root / SECRET_FOLDER / self.released.run_id

    @property
    def is_finished(self) -> bool:
        """Whether the best run has been released."""
        return is_done(self.folder)

    def check(self) -> None:
        """Refuse what has no epsilon, and what a search cannot do.

        Raises:
            ConfigError: naming the field.
        """
        first = self.candidates[0].config
        for config in (job.config for job in self.candidates):
            check_extras(config)
            if not config.privacy.enabled:
                raise ConfigError("a search with privacy=none has no epsilon: use a sweep without hydra/sweeper=random")
            if config.privacy.score_noise_multiplier is None:
                raise ConfigError(
                    "a search chooses by a score that is paid for: set privacy.score_noise_multiplier=..., "
                    "the standard deviation of the noise on the number of right answers"
                )
            if config.compute.force:
                raise ConfigError(
                    "compute.force=true: a search is drawn once; a second one, with another environment.seed=..., "
                    "costs as much again"
                )
            if config.tracking.name != "none":
                raise ConfigError(f"tracking={config.tracking.name} would show losing trials: use tracking=none")
            for name in ("data", "data_sensitivity"):
                if getattr(config, name) != getattr(first, name):
                    raise ConfigError(f"{name} must be the same in all trials of a search: scores on other data differ")
            for name, value in _common(first).items():
                if _common(config)[name] != value:
                    raise ConfigError(f"{name} must be the same in all trials of a search; give it one value")

    @cached_property
    def events(self) -> tuple[tuple[Event, ...], ...]:
        """What an accountant is told: the training of each candidate, and the scores; each kind once.

        Raises:
            ConfigError: when a candidate has no plan, or its score costs more than its training may.
        """
        data = data_of(self.candidates[0].config)
        kinds: dict[tuple[Event, ...], None] = {}
        for config in (job.config for job in self.candidates):
            assert config.privacy.score_noise_multiplier is not None
            copies = copies_in(config.data_sensitivity)
            kinds[tuple(group_size_of(event, copies) for event in make_plan(config, data).events())] = None
            kinds[(score_event(config.privacy.score_noise_multiplier),)] = None
        return tuple(kinds)

    @cached_property
    def epsilon(self) -> float:
        """Epsilon of the whole search."""
        return epsilon_best(self.events, self.repetitions, self.candidates[0].config.privacy.delta)

    def trials(self) -> list[Job]:
        """The trials, drawn at the first call of all processes and the same ever after."""
        drawn = self._draw()
        jobs = [(self.candidates[index], seed) for index, seed in zip(drawn.candidates, drawn.seeds, strict=True)]
        if not jobs:
            assert self.zero_shot is not None
            jobs = [(self.zero_shot, self.zero_shot.config.environment.seed)]
        return [self._trial(number, job, seed) for number, (job, seed) in enumerate(jobs)]

    def release(self) -> str | None:
        """Let out the run with the best score, the first of equal ones, and describe it; None if a trial is not done.

        Raises:
            RunFailed: when every trial failed.
        """
        trials = self.trials()
        records = [read(folder_of(trial)) for trial in trials]
        if not all(trial_is_done(trial) for trial in trials):
            return None
        scores = [score_of(record) for record in records]
        best = scores.index(max(scores))
        record = records[best]
        if record is None or not record.is_done:
            raise RunFailed(
                f"search {self.released.run_id}: every trial failed, nothing is released. NON-PRIVATE: the reasons are "
                f"in {self.secret}; a new search, with another environment.seed=..., costs as much again"
            )
        return f"{self.released.run_id}  {in_one_line(self._let_out(folder_of(trials[best]), record))}"

    def _draw(self) -> Draw:
        path = self.secret / DRAW_FILE
        if not path.exists():
            self._check_left()
            self._book()
            secret = self.secret.parent
            secret.mkdir(mode=0o700, parents=True, exist_ok=True)
            secret.chmod(0o700)
            write_atomically(secret / "README", WARNING)
        if not is_public(self.candidates[0].config.data):
            return Draw(**json.loads(drawn_once(self.secret, self._text)))
        if not path.exists():
            write_once(path, self._text().encode())
        return Draw(**json.loads(path.read_text(encoding="utf-8")))

    def _text(self) -> str:
        return f"{json.dumps(dataclasses.asdict(self._drawn()))}\n"

    def _check_left(self) -> None:
        """Raises ConfigError for trials of a draw that is gone: another number of them would be another search."""
        names = [path.name for path in self.secret.iterdir()] if self.secret.is_dir() else []
        left = any(name != TOKEN_FILE and not name.startswith((DRAW_FILE, ".")) for name in names)
        if left and not (self.secret / DRAW_FILE).exists():  # Another process may have begun in between.
            raise ConfigError(
                f"{self.secret / DRAW_FILE} is gone, although its trials are there: how many there are is drawn once; "
                f"put it back, or remove {self.secret} and start another search, which costs as much again"
            )

    def _book(self) -> None:
        """Book the whole search, before how many trials it has is drawn."""
        config = self.candidates[0].config
        keep_local_key(config)
        limits = [job.config.privacy.budget for job in self.candidates if job.config.privacy.budget is not None]
        lowest = dataclasses.replace(config.privacy, budget=min(limits, default=None))
        spending = Spending.of_search(self.events, self.repetitions, config.privacy.delta)
        book(
            dataclasses.replace(config, privacy=lowest),
            data_of(config),
            self.released.run_id,
            self.secret,
            spending,
        )

    def _drawn(self) -> Draw:
        config, name = self.candidates[0].config, f"search {self.released.run_id}"
        secure = noise_mode(config) == "secure"
        keys = KeyRing.secure(name) if secure else KeyRing.reproducible(config.environment.seed, name)
        trials = range(self.repetitions.draw(keys))
        shares = keys.stream(Purpose.SWEEP_K, group="candidates").uniform(len(trials))
        # Trials with the same keys would be one trial. In secure mode each run has fresh ones anyway.
        seeds = [keys.stream(Purpose.SWEEP_K, step=trial, group="seeds").seed() >> 32 for trial in trials]
        chosen = [int(share * len(self.candidates)) for share in shares]
        seeds = [config.environment.seed] * len(trials) if secure else seeds
        return Draw(
            datetime.now(UTC).isoformat(timespec="seconds"),
            tuple(chosen),
            tuple(seeds),
            tuple(run_id(_seeded(self.candidates[at], seed)) for at, seed in zip(chosen, seeds, strict=True)),
            secrets.token_hex(16),
        )

    def _trial(self, number: int, job: Job, seed: int) -> Job:
        root = self.secret / str(number)
        config = _seeded(job, seed)
        config = dataclasses.replace(config, compute=dataclasses.replace(config.compute, output_root=str(root)))
        if not has_plain_hashes(config.data):
            # Private data must have the same fingerprint in a trial as anywhere else.
            key = local_key(self.root)
            write_once(root / KEY_FILE, key)
        given = {"environment.seed": str(seed), "compute.output_root": quoted(root)}
        overrides = [item for item in job.overrides if item.partition("=")[0] not in given]
        overrides += [f"{name}={value}" for name, value in given.items()]
        return Job(run_id(config), config, tuple(overrides), job.varied)

    def _let_out(self, trial: Path, record: RunRecord) -> RunRecord:
        """Copy a trial without what tells which trial it was: its number, and when it ran; with the search's guarantee.

        Raises:
            OSError: when the folder cannot be written.
        """
        config = {**record.config, "compute": {**record.config["compute"], "output_root": str(self.root)}}
        overrides = [item for item in record.provenance["overrides"] if not item.startswith("compute.output_root=")]
        provenance = {
            **record.provenance,
            "started": self._draw().begun,
            "overrides": overrides,
            "repetitions": {
                "mean": self.repetitions.mean,
                "eta": self.repetitions.eta if math.isfinite(self.repetitions.eta) else "inf",
                "score_is_covered": True,
                "candidates": [[dataclasses.asdict(event) for event in events] for events in self.events],
                "delta": self.candidates[0].config.privacy.delta,
            },
        }
        public = is_open(self.candidates[0].config.data)
        released = dataclasses.replace(
            record,
            run_id=self.released.run_id,
            config=config,
            provenance=provenance,
            # The memory of a process is that of all trials that it did; the time of private runs is not told at all.
            cost=record.cost if public else None,
        )
        released.guarantee = guarantee_of(released, trial)
        try:
            # Filled where only the owner looks, so that a half-made copy tells nothing.
            with whole_folder(self.folder, within=self.secret) as draft:
                left_out = shutil.ignore_patterns(*NOT_RELEASED)
                shutil.copytree(trial, draft, ignore=left_out, copy_function=shutil.copyfile, dirs_exist_ok=True)
                write_atomically(draft / ".hydra" / "config.yaml", OmegaConf.to_yaml(OmegaConf.create(config)))
                write_atomically(draft / ".hydra" / "overrides.yaml", OmegaConf.to_yaml(overrides))
                if (draft / ADAPTER_FOLDER).is_dir():
                    write_atomically(draft / ADAPTER_FOLDER / GUARANTEE_FILE, guarantee_page(released))
                if (path := draft / HISTORY_FILE).is_file():
                    # The epsilons of a trial on its way are not what its release costs.
                    rows = (json.loads(line) for line in path.read_text(encoding="utf-8").splitlines())
                    write_atomically(path, "".join(json.dumps(row | {"epsilon": None}) + "\n" for row in rows))
                released.write(draft)
        except OSError:
            if not self.is_finished:  # Another process that does the same search may have been faster.
                raise
        return released


def trial(tree: DictConfig) -> NotDone | None:
    """What Hydra calls for each trial: a run of which nothing is said. A failed one is one with the worst score."""
    return tried(lambda: run(strict(tree), overrides=list(HydraConfig.get().overrides.task)))


def trial_is_done(job: Job) -> bool:
    """Whether a trial ended; one that failed is not done again, which would be choosing."""
    return has_ended(folder_of(job))


def folder_of(job: Job) -> Path:
    """Run folder of a trial."""
    return Path(job.config.compute.output_root) / job.run_id


def score_of(record: RunRecord | None) -> float:
    """Noisy score of a trial; the worst for one that failed."""
    if record is None or not record.is_done or record.privacy is None or record.privacy.score is None:
        return -math.inf
    return record.privacy.score


def quoted(path: Path) -> str:
    """A path as a value in Hydra's grammar."""
    return "'" + str(path).replace("\\", "\\\\").replace("'", "\\'") + "'"


def _seeded(job: Job, seed: int) -> Config:
    """The config of a candidate with the seed of a trial."""
    return dataclasses.replace(job.config, environment=dataclasses.replace(job.config.environment, seed=seed))


def _common(config: Config) -> Mapping[str, Any]:
    """What all trials of a search must have in common."""
    return {
        "compute.output_root": config.compute.output_root,
        "environment.seed": config.environment.seed,
        "privacy.delta": config.privacy.delta,
        "privacy.noise_mode": noise_mode(config),
    }

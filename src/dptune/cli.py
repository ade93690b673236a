"""The command line: Hydra composes, `run` runs. A person's mistake is one line and exit status 2."""

from __future__ import annotations

import os
import re
import shlex
import sys
import traceback
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from functools import partial
from pathlib import Path
from typing import NoReturn

import hydra
from hydra.core.hydra_config import HydraConfig
from hydra.errors import HydraException
from hydra.types import RunMode
from omegaconf import DictConfig
from omegaconf.errors import OmegaConfBaseException

from dptune.config.checks import strict, unknown_key
from dptune.config.extras import needs
from dptune.config.schema import Config, ConfigError
from dptune.records.frame import without_collector
from dptune.records.record import RecordError, RunFailed, RunRecord
from dptune.sweeps.expand import names
from dptune.sweeps.jobs import ROOT
from dptune.sweeps.progress import Display, NotDone, StepBar, tried

VIEWS = ("table", "tables", "figures", "claims", "report")
"""Views of the records: functions of dptune.report.commands."""
USAGE_ERROR, RUN_FAILED, INTERRUPTED = 2, 1, 130


def main(arguments: Sequence[str] | None = None) -> None:
    """Entry point of `dptune`."""
    argv = list(sys.argv[1:] if arguments is None else arguments)
    # Hydra hands exceptions through only then; `errors_for_people` shows them.
    os.environ["HYDRA_FULL_ERROR"] = "1"
    with errors_for_people():
        if argv and argv[0] in VIEWS:
            from dptune.report import commands

            with without_collector():
                getattr(commands, argv[0])(argv[1:])
        elif argv[:1] == ["status"]:
            status(argv[1:])
        elif argv[:1] == ["sync"]:
            from dptune.report.upload import sync

            sync(argv[1:])
        else:
            sys.argv = ["dptune", *argv]
            hydra.main(config_path=str(ROOT / "conf"), config_name="config", version_base="1.3")(job)()


@contextmanager
def errors_for_people() -> Iterator[None]:
    """A mistake in a config or in data is one line and exit status 2; a run that failed is one line and 1."""
    try:
        yield
    except KeyboardInterrupt:
        fail("interrupted; finished runs are kept, the same command does the rest", INTERRUPTED)
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # The reader, such as `head`, has seen enough.
    except (ConfigError, RecordError, HydraException, OmegaConfBaseException) as error:
        fail(in_one_line(error), USAGE_ERROR)
    except (RunFailed, BlockingIOError) as error:
        fail(in_one_line(error), RUN_FAILED)
    except OSError as error:
        fail(f"{in_one_line(error)}; finished runs are kept", RUN_FAILED)


def job(tree: DictConfig) -> NotDone | None:
    """What Hydra calls for each run. In a sweep nothing is printed here: the sweeper sees the record."""
    if HydraConfig.get().mode == RunMode.MULTIRUN:
        return tried(lambda: in_sweep(strict(tree)))
    with errors_for_people():
        config = strict(tree)
        if config.sweep is not None:
            raise ConfigError(f"sweeps={config.sweep} is a sweep: add -m (dptune -m sweeps={config.sweep} ...)")
        one_run(config)
    return None


def in_sweep(config: Config) -> None:
    """Do a run of a sweep. Raises RunFailed for one that failed."""
    from dptune.runs.run import run

    record = run(config, overrides=list(HydraConfig.get().overrides.task))
    if record.status == "failed":
        raise RunFailed(why_failed(record, config))


def why_failed(record: RunRecord, config: Config) -> str:
    """Why a run failed, and where to read more."""
    return f"{record.error}; its log is {config.compute.output_root}/{record.run_id}/run.log"


def one_run(config: Config) -> None:
    """Do a run and print its summary. Raises RunFailed after the record of a failed run is written."""
    from dptune.runs.run import in_one_line, run

    with Display() as display:
        record = run(
            config,
            overrides=list(HydraConfig.get().overrides.task),
            report=partial(display.say, error=True),
            steps=StepBar(display),
        )
    if record.status == "failed":
        raise RunFailed(f"run {record.run_id} failed: {why_failed(record, config)}")
    if os.environ.get("RANK", "0") == "0":
        print(f"{record.run_id}  {in_one_line(record)}", flush=True)


def status(argv: Sequence[str]) -> None:
    """`dptune status [SWEEP] [--watch [SECONDS]] [OVERRIDE ...]`: which runs are done, running, failed or missing."""
    from dptune.sweeps import status

    # As other programs have it, a flag's value may also stand by itself.
    argv = shlex.split(re.sub(r"(^| )--watch ([\d.]+)(?= |$)", r"\1--watch=\2", shlex.join(argv)))
    flags = [item for item in argv if item.startswith("-")]
    names = [item for item in argv if "=" not in item and item not in flags]
    arguments = [item for item in argv if "=" in item and item not in flags]
    if len(names) > 1:
        raise ConfigError(f"status {' '.join(names)}: give at most one sweep, and overrides as key=value")
    every = watch_every(flags)
    if names:
        from dptune.sweeps.expand import jobs_of_sweep

        jobs = jobs_of_sweep(names[0], arguments)
        print(status.of_sweep(names[0], jobs, arguments), flush=True)
        if every is not None:
            from dptune.runs.watch import look_on

            with suppress(KeyboardInterrupt):  # How one stops watching is no error.
                look_on(jobs, every)
    elif every is not None:
        raise ConfigError("status --watch needs the name of a sweep: dptune status SWEEP --watch")
    else:
        roots = [item.partition("=")[2] for item in arguments if item.startswith("compute.output_root=")]
        print(status.of_folder(Path(roots[-1] if roots else "outputs")))


def watch_every(flags: Sequence[str]) -> float | None:
    """Seconds between two looks that `--watch` asks for; None without it. Raises ConfigError for any other flag."""
    for flag in flags:
        name, _, value = flag.partition("=")
        try:
            every = float(value or WATCH_EVERY)
        except ValueError:
            every = 0.0
        if name != "--watch" or not 0.1 <= every <= 3600:
            raise ConfigError(f"status {flag}: the only flag is --watch [SECONDS], of 0.1 to 3600 seconds")
        return every
    return None


WATCH_EVERY = 2
"""Seconds between two looks, where none are given."""


def in_one_line(error: Exception) -> str:
    """What is wrong, for a person; Hydra's own words need some help."""
    text = str(error)
    if match := re.search(r"Could not override '([^']+)'", text):
        return unknown_key(match[1])
    if match := re.search(
        r"Could not find '([^']+)'\s*Available options in '[^']+':\s*(.*?)(Config search|$)", text, re.S
    ):
        group, _, choice = match[1].rpartition("/")
        choices = match[2].split()
        if match[1].startswith("sweeps/"):
            group, choice, choices = "sweeps", match[1].removeprefix("sweeps/"), names()
        return f"{group}={choice} does not exist; {group} can be: {', '.join(choices)}"
    if "Could not load 'hydra/launcher/submitit_slurm'" in text:
        return needs("slurm", "hydra/launcher=slurm")
    if text.startswith("Error merging override") and error.__cause__ is not None:
        text = f"{text.removeprefix('Error merging override ')}: {str(error.__cause__).partition(chr(10))[0]}"
    return " ".join(text.split())


def fail(message: str, status: int) -> NoReturn:
    """Say one line and leave; DPTUNE_TRACEBACK=1 shows where the error came from."""
    if os.environ.get("DPTUNE_TRACEBACK"):
        traceback.print_exc()
    print(f"dptune: {message}", file=sys.stderr)
    sys.exit(status)

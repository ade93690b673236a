"""The command line: Hydra composes, `run` runs. A person's mistake is one line and exit status 2."""

from __future__ import annotations

import os
import re
import sys
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import NoReturn

import hydra
from hydra.core.hydra_config import HydraConfig
from hydra.errors import HydraException
from hydra.types import RunMode
from omegaconf import DictConfig
from omegaconf.errors import OmegaConfBaseException

from dptune.config import Config, ConfigError, strict, unknown_key
from dptune.extras import needs
from dptune.records import RecordError, RunFailed, without_collector
from dptune.sweep import ROOT, names

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
            from dptune.sync import sync

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


def job(tree: DictConfig) -> None:
    """What Hydra calls for each run. In a sweep, errors go to the sweeper, so that the other runs go on."""
    if HydraConfig.get().mode == RunMode.MULTIRUN:
        try:
            one_run(strict(tree), report=lambda line: None)
        except BlockingIOError as error:
            print(f"left out: {error}", flush=True)
    else:
        with errors_for_people():
            config = strict(tree)
            if config.sweep is not None:
                raise ConfigError(f"sweeps={config.sweep} is a sweep: add -m (dptune -m sweeps={config.sweep} ...)")
            one_run(config, report=lambda line: print(line, file=sys.stderr, flush=True))


def one_run(config: Config, report: Callable[[str], None]) -> None:
    """Do a run and print its summary. Raises RunFailed after the record of a failed run is written."""
    from dptune.run import run, summary

    record = run(config, overrides=list(HydraConfig.get().overrides.task), report=report)
    if record.status == "failed":
        log = f"{config.compute.output_root}/{record.run_id}/run.log"
        raise RunFailed(f"run {record.run_id} failed: {record.error}; its log is {log}")
    if os.environ.get("RANK", "0") == "0":
        print(f"{record.run_id}  {summary(record)}", flush=True)


def status(argv: Sequence[str]) -> None:
    """`dptune status [SWEEP] [OVERRIDE ...]`: which runs are done, running, failed, missing, stale."""
    from dptune import status

    if argv and "=" not in argv[0]:
        from dptune.sweep import load

        arguments = [item for item in argv if "=" in item]
        print(status.of_sweep(argv[0], load(argv[0], arguments), arguments))
    else:
        roots = [item.partition("=")[2] for item in argv if item.startswith("compute.output_root=")]
        print(status.of_folder(Path(roots[-1] if roots else "outputs")))


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

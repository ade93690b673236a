"""The command line: Hydra composes, `run` runs. A person's mistake is one line and exit status 2."""

from __future__ import annotations

import difflib
import os
import re
import shlex
import sys
import textwrap
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import NoReturn

import hydra
from hydra.core.hydra_config import HydraConfig
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.errors import HydraException
from hydra.types import RunMode
from omegaconf import DictConfig
from omegaconf.errors import OmegaConfBaseException

from dptune.config.checks import strict, unknown_choice, unknown_key
from dptune.config.extras import needs
from dptune.config.schema import Config, ConfigError
from dptune.records.frame import without_collector
from dptune.records.record import RecordError, RunFailed, RunRecord
from dptune.sweeps.expand import names
from dptune.sweeps.jobs import ROOT
from dptune.sweeps.progress import Display, NotDone, StepBar, tried

USAGE_ERROR, RUN_FAILED, INTERRUPTED = 2, 1, 130


def main(arguments: Sequence[str] | None = None) -> None:
    """Entry point of `dptune`."""
    argv = list(sys.argv[1:] if arguments is None else arguments)
    # Hydra hands exceptions through only then; `errors_for_people` shows them.
    os.environ["HYDRA_FULL_ERROR"] = "1"
    with errors_for_people():
        name, rest = (argv[0], argv[1:]) if argv and is_word(argv[0]) else ("run", argv)
        if name not in VERBS:
            near = difflib.get_close_matches(name, VERBS, n=1)
            hint = f"did you mean dptune {near[0]}?" if near else f"dptune can: {', '.join(VERBS)}"
            raise ConfigError(f"{name} is no command, and no key=value; {hint}")
        if HELP & {*rest}:
            print(overview() if rest is argv else VERBS[name].page(name))
        else:
            VERBS[name].call(rest)


HELP = {"--help", "-h"}


def is_word(argument: str) -> bool:
    """Whether an argument can only be the name of a command or of a sweep: neither an override nor an option."""
    return "=" not in argument and not argument.startswith(("-", "+", "~"))


@dataclass(frozen=True)
class Verb:
    """A command of `dptune`."""

    call: Callable[[list[str]], None]
    usage: str
    """What follows its name."""
    does: str
    """What it does, in one line."""
    more: str = ""
    """What its page says besides."""

    def page(self, name: str) -> str:
        """What `dptune NAME --help` prints."""
        return "\n".join(filter(None, (f"dptune {name} {self.usage}\n\n{self.does}.", self.more and f"\n{self.more}")))


def compose_and_run(argv: list[str]) -> None:
    """Hand overrides and Hydra's own options to Hydra, which calls `job`.

    Raises:
        ConfigError: naming the argument that cannot be read.
    """
    if SHOWS & {*argv}:  # One config or what Hydra knows, whether or not it is a sweep's.
        argv = [item for item in argv if item not in ("-m", "--multirun")]
    check_values(argv)
    sys.argv = ["dptune", *argv]
    hydra.main(config_path=str(ROOT / "conf"), config_name="config", version_base="1.3")(job)()


def check_values(argv: Sequence[str]) -> None:
    """Raises ConfigError naming the first override whose value cannot be read."""
    for argument in argv:
        if "=" in argument and not argument.startswith("-"):
            try:
                OverridesParser.create().parse_override(argument)
            except HydraException:
                key, _, value = argument.partition("=")
                quoted = f"""'{key}="{value.strip("'")}"'"""
                raise ConfigError(
                    f"{argument}: its value cannot be read; quote it for the shell and for Hydra: {quoted}"
                ) from None


SHOWS = {"--cfg", "-c", "--info", "-i"}
"""Hydra's options that show something instead of running."""


def sweep(argv: list[str]) -> None:
    """`dptune sweep NAME [key=value ...]`: what `dptune -m sweeps=NAME` does.

    Raises:
        ConfigError: when the first argument is not the name of a sweep.
    """
    if not argv or not is_word(argv[0]):
        raise ConfigError(f"sweep needs a name first: {', '.join(names())}")
    if argv[0] not in names():
        raise ConfigError(unknown_choice(f"sweep {argv[0]}", argv[0], "sweeps", names()))
    compose_and_run(["-m", f"sweeps={argv[0]}", *argv[1:]])


def view(name: str) -> Callable[[list[str]], None]:
    """A view of the records: a function of `dptune.report.commands`."""

    def call(argv: list[str]) -> None:
        from dptune.report import commands

        with without_collector():
            getattr(commands, name)(argv)

    return call


def sync(argv: list[str]) -> None:
    """Upload finished records to W&B."""
    from dptune.report import upload

    upload.sync(argv)


def budget(argv: list[str]) -> None:
    """`dptune budget [group=choice ...] [key=value ...]`: what all runs on private data cost together.

    Raises:
        ConfigError: when the account, or the config, cannot be read.
    """
    from dptune.runs import budget

    print(budget.describe(budget.accounts_of(composed("budget", argv) if argv else None)))


def data(argv: list[str]) -> None:
    """`dptune data [group=choice ...] [key=value ...]`: what would be trained on."""
    config = composed("data", argv)
    from dptune.runs import preview

    print(preview.describe(config))


def composed(verb: str, argv: list[str]) -> Config:
    """The config of overrides, for a command that runs nothing. Raises ConfigError for anything else."""
    if words := [item for item in argv if "=" not in item]:
        raise ConfigError(f"{verb} {' '.join(words)}: give key=value only, such as data=files data.path=FILE")
    check_values(argv)
    with hydra.initialize_config_dir(config_dir=str(ROOT / "conf"), version_base="1.3"):
        config = strict(hydra.compose("config", overrides=argv))
    if config.sweep is not None:
        raise ConfigError(f"{verb}: sweeps={config.sweep} is many configs; give the keys of one")
    return config


def public(argv: list[str]) -> None:
    """`dptune public [group=choice ...] [key=value ...]`: make the start of an adapter from public data alone.

    Raises:
        ConfigError: when the config asks for none, or cannot be read.
    """
    if words := [item for item in argv if "=" not in item]:
        raise ConfigError(f"public {' '.join(words)}: give key=value only, such as public=joint model=nano")
    with hydra.initialize_config_dir(config_dir=str(ROOT / "conf"), version_base="1.3"):
        config = strict(hydra.compose("config", overrides=argv))
    if config.public.method == "none":
        raise ConfigError("public=none makes nothing: choose public=joint, public=meta or public=joint_meta")
    from dptune.runs.setup import make_start

    with Display() as display:
        start = make_start(config, partial(display.say, error=True))
    print(f"{start.folder}  {start.in_words}", flush=True)


def merge(argv: list[str]) -> None:
    """`dptune merge RUN [to=FOLDER]`: backbone and adapter of a run as one model."""
    from dptune.runs import merging

    merging.merge(argv)


def overview() -> str:
    """What `dptune --help` prints: commands, groups with their choices, sweeps."""
    lines = ["dptune: differentially private, parameter-efficient fine-tuning of language models on instructions", ""]
    lines += [f"  dptune {name:<8} {verb.does}" for name, verb in VERBS.items()]
    lines += ["", "dptune COMMAND --help says more, dptune --hydra-help what Hydra can (-m a=1,2, --cfg job, --info)."]
    lines += ["", "Groups and their choices, as in dptune run privacy=uniform model=nano:"]
    groups = sorted(path for path in (ROOT / "conf").iterdir() if path.is_dir() and path.name != "hydra")
    for group in groups:
        lines += listed(group.name, sorted(path.stem for path in group.glob("*.yaml")))
    lines += ["", "Sweeps, as in dptune sweep smoke:", *listed("", names())]
    return "\n".join(lines)


def listed(head: str, words: Sequence[str]) -> list[str]:
    """Words behind a head, in lines of at most 100 columns."""
    return textwrap.wrap(", ".join(words), 100, initial_indent=f"  {head:<17}", subsequent_indent=" " * 19)


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


def status(argv: list[str]) -> None:
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


FILTERS = "[SWEEP] [key=value ...]"
FILTERED = (
    "Without a sweep all records below compute.output_root=outputs are taken; key=value keeps those whose\n"
    "config has it.\n"
)
VERBS = {
    "run": Verb(
        compose_and_run,
        "[group=choice ...] [key=value ...]",
        "does one run; `dptune key=value ...` is the same",
        "The run lands in outputs/<run id>/; a finished one is not done again (compute.force=true does).\n"
        "--cfg job shows the whole config instead, -m runs a grid: dptune -m privacy.target_epsilon=1,2,4",
    ),
    "sweep": Verb(
        sweep,
        "NAME [key=value ...]",
        "does the runs of a sweep that are not done",
        "dptune sweep NAME is dptune -m sweeps=NAME. hydra/launcher=joblib hydra.launcher.n_jobs=2 does two runs at a\n"
        "time, hydra/launcher=slurm sends them to a cluster.",
    ),
    "status": Verb(
        status,
        "[SWEEP] [--watch [SECONDS]] [key=value ...]",
        "says which runs are done, running, failed or missing",
        "--watch goes on until all are done, or Ctrl-C.",
    ),
    "table": Verb(
        view("table"),
        "[SWEEP] [--wide] [key=value ...]",
        "prints the main table of each sweep",
        FILTERED + "--wide prints every column, as Markdown.",
    ),
    "tables": Verb(
        view("tables"), FILTERS, "writes all tables as CSV, LaTeX and HTML", FILTERED + "to=FOLDER: where to."
    ),
    "figures": Verb(view("figures"), FILTERS, "writes all figures as SVG and PNG", FILTERED + "to=FOLDER: where to."),
    "claims": Verb(
        view("claims"), FILTERS, "says what the records say of each claim", FILTERED + "to=FOLDER: where to."
    ),
    "report": Verb(view("report"), FILTERS, "writes one self-contained page", FILTERED + "to=FOLDER: where to."),
    "data": Verb(
        data,
        "[group=choice ...] [key=value ...]",
        "shows what would be trained on, before any budget is spent",
        "Detected format, splits, N, users, tasks, options, lengths, what is cut off, the largest sensible batch and\n"
        "delta, and three records as the model sees them. Of private data all of this is for your terminal alone;\n"
        "nothing is written. dptune data data=files data.path=FILE model=local model.path=FOLDER",
    ),
    "budget": Verb(
        budget,
        "[group=choice ...] [key=value ...]",
        "shows what all runs on private data cost together",
        "One account for each data set and unit of privacy, over all output folders of this machine; the file is\n"
        "budget.jsonl in $DPTUNE_HOME (else ~/.local/state/dptune). With arguments, such as data=files\n"
        "data.path=FILE, only that of their data. privacy.budget=EPSILON refuses a run that would exceed it.",
    ),
    "public": Verb(
        public,
        "[group=choice ...] [key=value ...]",
        "makes the start of an adapter from public data alone",
        "What a run with the same arguments starts from: dptune public public=joint_meta model=nano. It is made once,\n"
        "kept in compute.cache_dir and shared by all runs that ask for it; public.data names other sources. The run's\n"
        "own data are read only to refuse public records that are among them.",
    ),
    "merge": Verb(
        merge,
        "RUN [to=FOLDER] [key=value ...]",
        "writes backbone and adapter of a finished run as one model",
        "RUN is a run id, below compute.output_root=outputs, or the folder of a run. The model, in safetensors, lands\n"
        "in its folder merged/, or in to=FOLDER; it is opened again and compared with the adapter before it is there.",
    ),
    "sync": Verb(
        sync, FILTERS, "uploads finished records to W&B, each once", FILTERED + "tracking.project=NAME: where to."
    ),
}
"""Every command."""


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
        return unknown_choice(f"{group}={choice}", choice, group, choices)
    if "Could not load 'hydra/launcher/submitit_slurm'" in text:
        return needs("slurm", "hydra/launcher=slurm")
    if match := re.search(r"Error merging override \+?public\.data\.(\w+)\.", text):
        return f"public.data.{match[1]}: name the source first, as in +data@public.data.{match[1]}=files"
    if text.startswith("Error merging override") and error.__cause__ is not None:
        text = f"{text.removeprefix('Error merging override ')}: {str(error.__cause__).partition(chr(10))[0]}"
    return " ".join(text.split())


def fail(message: str, status: int) -> NoReturn:
    """Say one line and leave; DPTUNE_TRACEBACK=1 shows where the error came from."""
    if os.environ.get("DPTUNE_TRACEBACK"):
        traceback.print_exc()
    print(f"dptune: {message}", file=sys.stderr)
    sys.exit(status)

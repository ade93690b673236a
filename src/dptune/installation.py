"""Sets up a virtual environment, by the lock where the index still has its releases; needs nothing but Python itself.

    python src/dptune/installation.py .venv [EXTRA ...]      make it, or add extras to it
    python src/dptune/installation.py --intact .venv         status 0 if it is finished, and was made for this place
    python src/dptune/installation.py --lock [--upgrade]     make constraints.txt again

A lock holds for as long as the index keeps every release of it. One that is gone is left out, and pip chooses within
the ranges of pyproject.toml; what then differs is said in one line, and stands in the provenance of each record.
"""

import contextlib
import errno
import functools
import json
import os
import re
import shutil
import subprocess
import sys
import sysconfig
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

OLDEST, NEWEST = (3, 11), (3, 13)
USAGE_ERROR, INTERRUPTED = 2, 130

# Before anything that an old Python stumbles over; so the file must parse there, too.
if __name__ == "__main__" and not OLDEST <= sys.version_info[:2] <= NEWEST:
    print(
        "dptune: Python 3.%d to 3.%d is needed, and this is %d.%d: make PYTHON=python3.12 ..."  # noqa: UP031
        % (OLDEST[1], NEWEST[1], sys.version_info[0], sys.version_info[1]),
        file=sys.stderr,
    )
    sys.exit(USAGE_ERROR)

HERE, PYTHON = Path(__file__).resolve(), "{}.{}".format(*sys.version_info[:2])
LOCK = next(
    (path for path in (folder / "constraints.txt" for folder in (HERE.parent, HERE.parents[2])) if path.is_file()),
    HERE.parents[2] / "constraints.txt",
)
"""The exact versions: beside the package in the repository, or inside an installed one."""
MARKER, STAMP = ".dptune", ".installed-"
"""Files in the environment: what it was made for, and that an extra is in it (for make)."""
UNFINISHED, ADOPTED = "unfinished", "adopted"
"""What the marker says meanwhile, and of an environment that somebody else made, which is never removed."""


class SetupError(Exception):
    """What keeps dptune from being installed, in words that say what to do."""


class Unresolved(SetupError):
    """The same before anything in the environment was changed."""


def main(arguments: Sequence[str]) -> int:
    """Do what the command line asks for; the exit status."""
    try:
        if arguments[0] == "--intact":
            return 0 if is_intact(Path(arguments[1])) else 1
        if arguments[0] == "--lock":
            write_lock(upgrade="--upgrade" in arguments)
        else:
            set_up(Path(arguments[0]), arguments[1:])
    except SetupError as error:
        print(f"dptune: {error}", file=sys.stderr)
        return USAGE_ERROR
    except OSError as error:
        reason = DISK_FULL if error.errno == errno.ENOSPC else f"not installed: {error}"
        print(f"dptune: {reason}", file=sys.stderr)
        return USAGE_ERROR
    except KeyboardInterrupt:
        print("dptune: interrupted; the same command starts the set-up again", file=sys.stderr)
        return INTERRUPTED
    return 0


DISK_FULL = (
    "no space is left in the environment's folder or that of temporary files: free some (the base takes 1.4 GB), or "
    "choose others with VENV=... and TMPDIR=..."
)


def set_up(venv: Path, extras: Sequence[str]) -> None:
    """Make the environment if it is not whole, and install dptune with these extras and those that are in it already.

    Raises:
        SetupError: naming what is missing. An environment that was begun here is removed then.
    """
    root = HERE.parents[2]
    check_extras(extras, root)
    with alone(root):
        whole, adopted = is_intact(venv), is_adopted(venv)
        if not whole and not adopted:
            remove(venv)
            make(venv)
        wanted = sorted({*extras, *(path.name[len(STAMP) :] for path in venv.glob(f"{STAMP}*"))} - {"base"})
        print(f"dptune: installing {', '.join(['the base', *wanted])} into {venv}; minutes at first", file=sys.stderr)
        # While pip is at work, and if it is killed, the environment counts as broken.
        write_marker(venv, UNFINISHED, adopted)
        project = str(root) + (f"[{','.join(wanted)}]" if wanted else "")
        lock = read_lock()
        try:
            gone = install(python_of(venv), ["--editable", project], lock)
        except BaseException as error:
            if not whole and not adopted:
                remove(venv)
            elif isinstance(error, Unresolved) and whole:
                write_marker(venv, identity(venv), adopted)
            raise
        unlike = differences(lock, versions_in(venv)) if gone else {}
        if unlike:
            print(f"dptune: {not_as_locked(gone, unlike)}", file=sys.stderr)
        write_marker(venv, identity(venv), adopted)
        for extra in ("base", *wanted):
            (venv / f"{STAMP}{extra}").touch()


def not_as_locked(gone: Mapping[str, str], unlike: Mapping[str, str]) -> str:
    """One line on what differs from the lock, given the releases that the index no longer has."""
    listed = ", ".join(f"{name} {text}" for name, text in unlike.items())
    if set(unlike) <= set(gone):
        return f"not as locked, since the index has no such release: {listed}"
    missing = ", ".join(f"{name} {version}" for name, version in gone.items())
    return f"not as locked, since the index has no {missing}, without which the lock does not hold together: {listed}"


def check_extras(extras: Sequence[str], root: Path) -> None:
    """Raises Unresolved for an extra that pyproject.toml does not have: pip would only warn."""
    import tomllib

    content = tomllib.loads((root / "pyproject.toml").read_text(encoding="utf-8"))
    known = sorted(content["project"]["optional-dependencies"])
    for extra in extras:
        if extra != "base" and extra not in known:
            raise Unresolved(f"there is no extra {extra}; extras are: {', '.join(known)}")


@contextlib.contextmanager
def alone(root: Path) -> Iterator[None]:
    """One set-up at a time in a clone."""
    import fcntl

    handle = os.open(root, os.O_RDONLY)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX)
        yield
    finally:
        os.close(handle)


LEAST_FREE = 50_000_000
"""Bytes that an environment with nothing but pip may need."""

# The environment.


def python_of(venv: Path) -> str:
    """Its interpreter."""
    return str(venv / "bin" / "python")


def identity(venv: Path) -> str:
    """What an environment is made for: scripts in it name their own place, packages lie in a folder of the version.

    Empty if its interpreter does not run.
    """
    code = "import sys; print('%d.%d' % sys.version_info[:2])"
    try:
        version = subprocess.run([python_of(venv), "-ISc", code], stdout=subprocess.PIPE, text=True).stdout.strip()
    except OSError:
        return ""
    return f"{version} {os.path.abspath(venv)}"


def marker_of(venv: Path) -> tuple[str, bool]:
    """What the marker says, and whether somebody else made the environment."""
    try:
        text = (venv / MARKER).read_text(encoding="utf-8")
    except OSError:
        return "", False
    first, _, second = text.partition("\n")
    return first, second == ADOPTED


def write_marker(venv: Path, text: str, adopted: bool) -> None:
    """Say what the environment is made for, or that it is unfinished."""
    (venv / MARKER).write_text(f"{text}\n{ADOPTED if adopted else ''}", encoding="utf-8")


def is_intact(venv: Path) -> bool:
    """Whether it is finished, has not been moved, and its interpreter works and is of the version of then."""
    first, _ = marker_of(venv)
    return bool(first) and first == identity(venv)


def is_adopted(venv: Path) -> bool:
    """Whether somebody else made it: it is used as it is.

    Raises:
        Unresolved: when it cannot be used.
    """
    first, adopted = marker_of(venv)
    if (first and not adopted) or not venv.exists() or not any(venv.iterdir()):
        return False
    if not (venv / "pyvenv.cfg").is_file():
        raise Unresolved(f"{venv} is no virtual environment: choose a new folder with VENV=...")
    if not identity(venv) or pip(python_of(venv), "--version")[0]:
        raise Unresolved(f"{venv} is an environment without a pip that runs: remove it, or choose VENV=...")
    return True


def remove(venv: Path) -> None:
    """Remove an environment that was made here."""
    # Its contents, because the folder itself may be a link or a mounted disk.
    for path in venv.iterdir() if venv.exists() else ():
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        else:
            path.unlink()


def make(venv: Path) -> None:
    """A fresh environment with pip.

    Raises:
        SetupError: when this Python cannot make one.
    """
    venv.mkdir(parents=True, exist_ok=True)
    write_marker(venv, UNFINISHED, adopted=False)
    status, output = output_of([sys.executable, "-m", "venv", str(venv)])
    if status:
        # What ensurepip says is not shown by venv.
        full = is_disk_full(output) or shutil.disk_usage(venv).free < LEAST_FREE
        remove(venv)
        if full:
            raise SetupError(DISK_FULL)
        if "ensurepip" in output or "No module named venv" in output:
            raise SetupError(
                f"this Python ({sys.executable}) has no venv with pip: on Debian and Ubuntu `apt-get install "
                f"python{PYTHON}-venv` as root, or give another Python: make PYTHON=python3.12 ..."
            )
        raise SetupError(f"no environment: {(output.strip() or 'no reason given').splitlines()[-1]}")


# pip.


def pip(python: str, *arguments: str) -> tuple[int, str]:
    """Exit status and output of pip in an environment."""
    # Isolated: what PYTHONPATH or the user's site-packages have would count as installed.
    quiet = {"PIP_DISABLE_PIP_VERSION_CHECK": "1", "PIP_NO_INPUT": "1", "PIP_PROGRESS_BAR": "off"}
    return output_of([python, "-Im", "pip", *arguments], quiet)


def output_of(command: Sequence[str], variables: Mapping[str, str] | None = None) -> tuple[int, str]:
    """Exit status and output of a command, with some variables of the environment on top."""
    env = {**os.environ, **(variables or {})}
    done = subprocess.run(
        command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, errors="replace", env=env
    )
    return done.returncode, done.stdout


def install(python: str, requirements: Sequence[str], lock: Mapping[str, str]) -> dict[str, str]:
    """Install by the lock, without those of its releases that the index does not have.

    If the rest of the lock does not fit without them, nothing of it counts.

    Args:
        python: interpreter of the environment.
        requirements: arguments of `pip install`.
        lock: version by package.

    Returns:
        The releases of the lock that the index does not have.

    Raises:
        SetupError: when pip fails for another reason.
    """
    pins, gone = dict(lock), dict[str, str]()
    while True:
        with tempfile.TemporaryDirectory() as folder:
            file = Path(folder) / "constraints.txt"
            file.write_text("".join(f"{name}=={version}\n" for name, version in pins.items()), encoding="utf-8")
            status, output = pip(python, "install", "--constraint", str(file), *requirements)
        if status == 0:
            return gone
        missing = gone_from_index(python, pins, output)
        if missing:
            gone.update({name: pins.pop(name) for name in missing})
        elif gone and pins and "ResolutionImpossible" in output:
            pins = {}
        else:
            raise failure(output)


def gone_from_index(python: str, pins: Mapping[str, str], output: str) -> list[str]:
    """The pins that pip complains of and that the index does not have."""
    # What pip says of a pin differs between its versions; all of them name it together with its version.
    named = {canonical(name) for name in re.findall(r"([A-Za-z0-9][\w.-]*)==[^\s,;]+", _complaint(output))}
    found = []
    for name in sorted(named & set(pins)):
        status, answer = pip(python, "install", "--dry-run", "--no-deps", f"{name}=={pins[name]}")
        if status and is_unreachable(answer):
            raise failure(answer)
        if status and "No matching distribution found" in answer:
            found.append(name)
    return found


def _complaint(output: str) -> str:
    """The end of what pip says: its errors, and the reasons below them."""
    at = output.find("ERROR:")
    return output[at:] if at >= 0 else ""


def failure(output: str) -> SetupError:
    """What pip's output means for a person."""
    if is_disk_full(output):
        return SetupError(DISK_FULL)
    if is_unreachable(output):
        return Unresolved(
            "the package index cannot be reached: check the network and the proxy, or give another index in "
            "PIP_INDEX_URL; the same command starts again"
        )
    absent = re.search(r"No matching distribution found for (.+)", output)
    if absent:
        return Unresolved(
            f"the index has no {absent[1].strip()} for Python {PYTHON} on {sysconfig.get_platform()}: give an index "
            "that has it in PIP_EXTRA_INDEX_URL, or another Python (make PYTHON=python3.12 ...); if it has no release "
            "of it at all, check the network and the proxy, too"
        )
    kind = Unresolved if "ResolutionImpossible" in output else SetupError
    return kind("pip cannot install it:\n" + (_complaint(output) or output[-2000:]).strip())


def is_disk_full(output: str) -> bool:
    """Whether the disk is full, by what pip or venv says."""
    return "[Errno 28]" in output or "No space left on device" in output


def is_unreachable(output: str) -> bool:
    """Whether pip found nothing because it reached no index."""
    broken = r"after connection broken by|Could not fetch URL|ConnectTimeoutError|ReadTimeoutError|NameResolutionError"
    return bool(re.search(broken, output)) and ("from versions: none" in output or "ERROR: No matching" not in output)


# The lock.


def canonical(name: str) -> str:
    """A package's name as the index compares it."""
    return re.sub(r"[-_.]+", "-", name).lower()


def read_lock() -> dict[str, str]:
    """Version by package, as constraints.txt has them; empty without the file."""
    if not LOCK.is_file():
        return {}
    lines = (line.partition("#")[0].strip() for line in LOCK.read_text(encoding="utf-8").splitlines())
    return {canonical(name): version for name, _, version in (line.partition("==") for line in lines if line)}


def versions_in(venv: Path) -> dict[str, str]:
    """Version of each package of an environment."""
    return _versions([str(path) for path in venv.glob("lib/python*/site-packages")])


def _versions(path: Sequence[str]) -> dict[str, str]:
    import importlib.metadata

    found: dict[str, str] = {}
    for distribution in importlib.metadata.distributions(path=list(path)):
        found.setdefault(canonical(distribution.metadata["Name"]), distribution.version)  # The first one is imported.
    return found


def differences(lock: Mapping[str, str], installed: Mapping[str, str]) -> dict[str, str]:
    """What is installed in another version than the lock has, such as `{"soupsieve": "4.1.3 (lock 4.1.2)"}`."""
    return {
        name: f"{installed[name]} (lock {version})"
        for name, version in sorted(lock.items())
        # A local version, such as 2.13.0+cpu, is the same release in another build.
        if name in installed and installed[name].partition("+")[0] != version.partition("+")[0]
    }


@functools.cache
def unlike_lock() -> dict[str, str]:
    """How the running environment differs from the lock."""
    return differences(read_lock(), _versions(sys.path))


HEADER = """\
# Exact versions that the tests pass with, of the base and of every extra, on Linux with Python {}: `make lock`.
# No hashes: pip checks all or none, and has none of the project itself nor of a release that the fall-back chooses.
"""


def write_lock(upgrade: bool) -> None:
    """Resolve the base with every extra, and write constraints.txt.

    Args:
        upgrade: take the newest releases of all packages instead of keeping those of the lock that still exist.

    Raises:
        SetupError: when there is no solution, or no index.
    """
    root = HERE.parents[2]
    with tempfile.TemporaryDirectory() as folder:
        venv, report = Path(folder) / "venv", Path(folder) / "report.json"
        make(venv)
        wanted = ["--dry-run", "--ignore-installed", "--report", str(report), "--editable", f"{root}[dev]"]
        before = {} if upgrade else read_lock()
        gone = install(python_of(venv), wanted, before)
        found = [item["metadata"] for item in json.loads(report.read_text(encoding="utf-8"))["install"]]
    lines = sorted((canonical(item["name"]), item["version"].partition("+")[0]) for item in found)
    text = "".join(f"{name}=={version}\n" for name, version in lines if name != "dptune")
    LOCK.write_text(HEADER.format(PYTHON) + text, encoding="utf-8")
    if gone:
        print(f"dptune: no longer on the index: {', '.join(f'{name} {was}' for name, was in gone.items())}")


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

"""The set-up by a lock of which the index has not everything, and what is said when it cannot be done. No network."""

import os
import re
import subprocess
import sys
import tomllib
import zipfile
from collections.abc import Callable
from pathlib import Path

import pytest

from dptune import installation
from dptune.installation import SetupError, Unresolved, differences, failure, install, set_up, versions_in

ROOT = Path(__file__).parents[2]
SCRIPT = ROOT / "src" / "dptune" / "installation.py"


def wheel(folder: Path, name: str, version: str, *requirements: str) -> None:
    """The smallest wheel that pip installs."""
    info = f"{name}-{version}.dist-info"
    needs = "".join(f"Requires-Dist: {item}\n" for item in requirements)
    files = {
        f"{name}.py": f"VERSION = {version!r}\n",
        f"{info}/METADATA": f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n{needs}",
        f"{info}/WHEEL": "Wheel-Version: 1.0\nGenerator: test\nRoot-Is-Purelib: true\nTag: py3-none-any\n",
    }
    record = "".join(f"{path},,\n" for path in [*files, f"{info}/RECORD"])
    with zipfile.ZipFile(folder / f"{name}-{version}-py3-none-any.whl", "w") as archive:
        for path, text in (files | {f"{info}/RECORD": record}).items():
            archive.writestr(path, text)


@pytest.fixture(autouse=True)
def alone_with_its_index(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """A folder of wheels is the only index, whatever this machine tells pip."""
    for name in list(os.environ):
        if name.startswith("PIP_"):
            monkeypatch.delenv(name)
    monkeypatch.setenv("PIP_CONFIG_FILE", os.devnull)
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(tmp_path / "index"))
    (tmp_path / "index").mkdir()
    return tmp_path / "index"


@pytest.fixture(scope="module")
def shared(tmp_path_factory: pytest.TempPathFactory) -> Path:
    venv = tmp_path_factory.mktemp("installation") / "venv"
    installation.make(venv)
    return venv


@pytest.fixture
def venv(shared: Path) -> Path:
    installed = [name for name in versions_in(shared) if name not in ("pip", "setuptools")]
    if installed:
        installation.pip(installation.python_of(shared), "uninstall", "--yes", *installed)
    return shared


def installed(venv: Path) -> dict[str, str]:
    return {name: version for name, version in versions_in(venv).items() if name not in ("pip", "setuptools")}


def test_releases_that_vanished_are_left_out_of_the_lock_and_the_rest_stays(
    alone_with_its_index: Path, venv: Path
) -> None:
    index = alone_with_its_index
    wheel(index, "app", "1.0", "Odd_lib>=1", "kept>=1", "deep>=1")
    for version in ("1.3", "1.4"):
        wheel(index, "odd_lib", version)
    for version in ("1.0", "2.0"):
        wheel(index, "kept", version)
    wheel(index, "deep", "3.0", "odd_lib>=1")
    lock = {"app": "1.0", "odd-lib": "1.2", "kept": "1.0", "deep": "2.0", "elsewhere": "9"}
    gone = install(installation.python_of(venv), ["app"], lock)
    assert gone == {"odd-lib": "1.2", "deep": "2.0"}
    assert installed(venv) == {"app": "1.0", "odd-lib": "1.4", "kept": "1.0", "deep": "3.0"}
    unlike = differences(lock, versions_in(venv))
    assert unlike == {"odd-lib": "1.4 (lock 1.2)", "deep": "3.0 (lock 2.0)"}
    assert installation.not_as_locked(gone, unlike) == (
        "not as locked, since the index has no such release: deep 3.0 (lock 2.0), odd-lib 1.4 (lock 1.2)"
    )


def test_if_the_rest_of_the_lock_does_not_fit_any_more_ranges_alone_count(
    alone_with_its_index: Path, venv: Path
) -> None:
    index = alone_with_its_index
    wheel(index, "app", "1.0", "lib>=1", "base>=1")
    wheel(index, "lib", "1.1", "base>=2")
    for version in ("1.0", "2.0"):
        wheel(index, "base", version)
    lock = {"lib": "1.0", "base": "1.0"}
    gone = install(installation.python_of(venv), ["app"], lock)
    assert gone == {"lib": "1.0"} and installed(venv)["base"] == "2.0"
    said = installation.not_as_locked(gone, differences(lock, versions_in(venv)))
    assert said.startswith(
        "not as locked, since the index has no lib 1.0, without which the lock does not hold together:"
    )


def test_a_conflict_that_is_no_missing_release_stays_an_error(alone_with_its_index: Path, venv: Path) -> None:
    wheel(alone_with_its_index, "app", "1.0", "lib>=2")
    for version in ("1.0", "2.0"):
        wheel(alone_with_its_index, "lib", version)
    with pytest.raises(Unresolved, match=r"app 1.0 depends on lib>=2\n.*lib==1.0"):
        install(installation.python_of(venv), ["app"], {"lib": "1.0"})
    assert not installed(venv)


def test_what_the_index_does_not_have_at_all_is_named(alone_with_its_index: Path, venv: Path) -> None:
    wheel(alone_with_its_index, "app", "1.0", "torch<2.14,>=2.13")
    with pytest.raises(
        Unresolved, match=r"^the index has no torch<2.14,>=2.13.* for Python 3\.\d+ on .*: give an index"
    ):
        install(installation.python_of(venv), ["app"], {})


def test_an_index_out_of_reach_is_one_line(monkeypatch: pytest.MonkeyPatch, venv: Path) -> None:
    monkeypatch.delenv("PIP_NO_INDEX")
    monkeypatch.setenv("PIP_INDEX_URL", "http://127.0.0.1:9/simple")
    monkeypatch.setenv("PIP_RETRIES", "1")
    with pytest.raises(Unresolved, match="^the package index cannot be reached: .*PIP_INDEX_URL") as caught:
        install(installation.python_of(venv), ["app"], {"app": "1.0"})
    assert "\n" not in str(caught.value)


def test_a_full_disk_is_one_line() -> None:
    said = str(failure("ERROR: Could not install packages due to an OSError: [Errno 28] No space left on device\n"))
    assert "no space is left" in said and "\n" not in said


# The environment around it; pip is replaced.


@pytest.fixture
def pips(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, ...]]:
    """What pip is asked for; it always succeeds."""
    calls: list[tuple[str, ...]] = []

    def install(python: str, requirements: list[str], lock: dict[str, str]) -> dict[str, str]:
        calls.append(tuple(requirements))
        return {}

    monkeypatch.setattr(installation, "install", install)
    monkeypatch.setattr(installation, "make", quick)
    return calls


def quick(venv: Path) -> None:
    """An environment without pip, which takes seconds."""
    installation.write_marker(venv, installation.UNFINISHED, adopted=False) if venv.is_dir() else venv.mkdir()
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", venv], check=True)


def test_extras_are_added_to_those_that_are_there(pips: list[tuple[str, ...]], tmp_path: Path) -> None:
    venv = tmp_path / "venv"
    set_up(venv, [])
    assert installation.is_intact(venv) and (venv / ".installed-base").is_file()
    set_up(venv, ["text"])
    set_up(venv, ["gguf"])
    assert pips == [("--editable", f"{ROOT}{extras}") for extras in ("", "[text]", "[gguf,text]")]
    with pytest.raises(Unresolved, match=r"there is no extra nonsense; extras are: check, dev, gguf"):
        set_up(venv, ["nonsense"])


@pytest.mark.parametrize("how", ["moved", "interpreter gone", "cut off"])
def test_an_environment_that_is_not_whole_is_made_again(how: str, pips: list[tuple[str, ...]], tmp_path: Path) -> None:
    venv = tmp_path / "venv"
    set_up(venv, ["text"])
    if how == "moved":
        venv = venv.rename(tmp_path / "elsewhere")
    elif how == "interpreter gone":
        for path in (venv / "bin").glob("python*"):
            path.unlink()
        (venv / "bin" / "python").symlink_to(tmp_path / "vanished")
    else:
        installation.write_marker(venv, installation.UNFINISHED, adopted=False)
    (venv / "rest").touch()
    assert not installation.is_intact(venv)
    set_up(venv, [])
    assert installation.is_intact(venv) and not (venv / "rest").exists()
    assert pips[-1] == ("--editable", str(ROOT))


def test_what_was_begun_and_failed_is_removed_and_what_was_there_stays(
    pips: list[tuple[str, ...]], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    def failing(error: Exception) -> Callable[..., None]:
        def install(*arguments: object) -> None:
            raise error

        return install

    set_up(tmp_path / "there", [])
    monkeypatch.setattr(installation, "install", failing(Unresolved("no network")))
    for name in ("new", "there"):
        with pytest.raises(Unresolved):
            set_up(tmp_path / name, ["text"])
    assert not any((tmp_path / "new").iterdir()) and installation.is_intact(tmp_path / "there")
    # pip was at work when it failed: nobody knows what is in there.
    monkeypatch.setattr(installation, "install", failing(SetupError("disk full")))
    with pytest.raises(SetupError):
        set_up(tmp_path / "there", [])
    assert not installation.is_intact(tmp_path / "there")


def test_a_folder_of_something_else_is_never_removed(pips: list[tuple[str, ...]], tmp_path: Path) -> None:
    (tmp_path / "home").mkdir()
    (tmp_path / "home" / "letter.txt").touch()
    with pytest.raises(Unresolved, match="home is no virtual environment"):
        set_up(tmp_path / "home", [])
    quick(tmp_path / "own")
    with pytest.raises(Unresolved, match="own is an environment without a pip that runs"):
        set_up(tmp_path / "own", [])
    assert (tmp_path / "home" / "letter.txt").is_file() and (tmp_path / "own" / "pyvenv.cfg").is_file()


def test_a_python_without_venv_is_told_how_to_get_it(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    said = "The virtual environment was not created successfully because ensurepip is not\navailable."
    done = subprocess.CompletedProcess([], 1, stdout=said)
    monkeypatch.setattr(installation.subprocess, "run", lambda *arguments, **more: done)
    with pytest.raises(SetupError, match=r"apt-get install python3\.\d+-venv"):
        installation.make(tmp_path / "venv")
    assert not any((tmp_path / "venv").iterdir())


def test_errors_of_the_script_are_one_line_and_status_2(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    command = [sys.executable, SCRIPT, tmp_path, "text"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 2 and re.fullmatch(r"dptune: .* is no virtual environment: .*\n", done.stderr)


def test_an_old_python_is_told_so_before_it_stumbles() -> None:
    """What Python 3.6 would not parse, or would evaluate before the version is looked at, is not in the script."""
    import ast

    tree = ast.parse(SCRIPT.read_text(encoding="utf-8"), feature_version=(3, 7))
    checked = next(at for at, node in enumerate(tree.body) if isinstance(node, ast.If))
    before = tree.body[:checked]
    assert all(isinstance(node, ast.Import | ast.ImportFrom | ast.Assign | ast.Expr) for node in before)
    assert not {node.module for node in before if isinstance(node, ast.ImportFrom)} & {"__future__", "dataclasses"}


def project() -> dict[str, dict[str, object]]:
    return tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]


def direct() -> list[str]:
    content = project()
    listed = [
        *content["dependencies"],
        *(item for extra in content["optional-dependencies"].values() for item in extra),
    ]
    return [item for item in listed if not item.startswith("dptune[")]


def test_the_versions_of_python_are_those_of_the_project() -> None:
    oldest, newest = installation.OLDEST, installation.NEWEST
    assert project()["requires-python"] == f">={oldest[0]}.{oldest[1]},<{newest[0]}.{newest[1] + 1}"


def test_every_direct_dependency_has_both_bounds_and_is_in_the_lock() -> None:
    lock = installation.read_lock()
    for item in direct():
        match = re.fullmatch(r"([A-Za-z0-9_.-]+)>=[\d.]+,<[\d.]+", item)
        assert match is not None, item
        assert installation.canonical(match[1]) in lock, item


def test_the_difference_from_the_lock_ignores_local_builds_and_what_is_not_installed() -> None:
    lock = {"torch": "2.13.0", "soupsieve": "4.1.2", "absent": "1"}
    found = differences(lock, {"torch": "2.13.0+cpu", "soupsieve": "4.1.3", "other": "5"})
    assert found == {"soupsieve": "4.1.3 (lock 4.1.2)"}


def test_the_running_environment_is_compared_with_the_lock(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "constraints.txt").write_text("# made by hand\nPyTest==0.1\nnot-there==1\n")
    monkeypatch.setattr(installation, "LOCK", tmp_path / "constraints.txt")
    assert installation.unlike_lock.__wrapped__() == {"pytest": f"{pytest.__version__} (lock 0.1)"}

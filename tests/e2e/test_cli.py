"""The command line as a person uses it, in processes of its own."""

import json
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from processes import FRESH, dptune

SMALL = [
    "data.train_size=120",
    "data.validation_size=10",
    "data.test_size=20",
    "hyperparameter=smoke",
    "hyperparameter.steps=2",
    "hyperparameter.expected_batch_size=12",
]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["privacy.epsilom=3"], "unknown key privacy.epsilom; did you mean"),
        (["+privacy.epsilom=3"], "unknown key privacy.epsilom; did you mean"),
        (["adapter=nope"], "adapter=nope does not exist; adapter can be: "),
        (["adapter=lroa"], "adapter=lroa does not exist; did you mean lora? adapter can be: "),
        (["hyperparameter.steps=many"], "hyperparameter.steps=many: Value 'many'"),
        (["privacy.target_epsilon=-1"], "privacy.target_epsilon=-1 must be above 0"),
        (["sweeps=smoke"], "sweeps=smoke is a sweep: add -m"),
        (["-m", "sweeps=nope"], "sweeps=nope does not exist; sweeps can be: "),
        (
            ["-m", "sweeps=smoke", "hyperparameter.expected_batch_size=9999"],
            "is above the 512 training records",
        ),
        (["data=files"], "data=files needs data.path"),
        (
            ["data=files", "data.path=missing.jsonl", "data.train_size=null"],
            "data.path=missing.jsonl is not a file",
        ),
        (["model.path=."], "model.path=. is no model"),
        (["table", "nope"], "sweeps=nope does not exist"),
        (["status", "smoke", "--watch=soon"], "the only flag is --watch [SECONDS], of 0.1 to 3600 seconds"),
        (["status", "smoke", "--wotch"], "the only flag is --watch"),
        (["status", "--watch"], "needs the name of a sweep"),
        (["status", "smoke", "tasks"], "give at most one sweep"),
        (["-m", "sweeps=environment/nope"], "sweeps=environment/nope does not exist; did you mean environment/"),
    ],
)
def test_a_mistake_is_one_line_with_status_2_and_leaves_nothing(
    arguments: list[str], message: str, tmp_path: Path
) -> None:
    done = dptune(*arguments, cwd=tmp_path)
    assert done.returncode == 2, done.stderr
    assert done.stdout == "" and done.stderr.count("\n") == 1
    assert done.stderr.startswith("dptune: ") and message in done.stderr
    assert not [item for item in tmp_path.rglob("*") if item.is_file()]


def test_a_traceback_is_shown_when_asked_for(tmp_path: Path) -> None:
    done = dptune("+privacy.epsilom=3", cwd=tmp_path, DPTUNE_TRACEBACK="1")
    assert done.returncode == 2 and "Traceback" in done.stderr


@pytest.mark.parametrize(
    "arguments",
    [
        ["--help"],
        ["--cfg", "job"],
        ["+typo=1"],
        ["-m", "sweeps=nope"],
        ["table", "smoke"],
        ["status"],
        ["status", "smoke"],
    ],
)
def test_what_needs_no_training_imports_no_torch(arguments: list[str], tmp_path: Path) -> None:
    program = (
        "import sys\n"
        "from dptune.cli import main\n"
        "try:\n    main()\nfinally:\n"
        "    heavy = {'torch', 'transformers', 'peft', 'opacus', 'wandb'} & set(sys.modules)\n"
        "    assert not heavy, heavy\n"
    )
    done = subprocess.run([sys.executable, "-c", program, *arguments], cwd=tmp_path, capture_output=True, text=True)
    assert "AssertionError" not in done.stderr, done.stderr


def test_one_run_then_again(model_folder: Path, tmp_path: Path) -> None:
    arguments = [f"model.path={model_folder}", "model.name=local", "privacy=uniform", *SMALL]
    first = dptune(*arguments, cwd=tmp_path)
    assert first.returncode == 0, first.stderr
    assert "epsilon" in first.stdout and "of 8" in first.stderr and "zero-shot" in first.stdout
    (folder,) = (path.parent for path in (tmp_path / "outputs").glob("*/record.json"))
    assert json.loads((folder / "record.json").read_text())["status"] == "done"
    assert (folder / ".hydra" / "config.yaml").is_file() and (folder / ".hydra" / "overrides.yaml").is_file()
    again = dptune(*arguments, cwd=tmp_path)
    assert again.returncode == 0 and "is finished" in again.stderr


def test_a_sweep_goes_on_past_a_failing_run_and_does_only_what_is_missing(model_folder: Path, tmp_path: Path) -> None:
    arguments = [f"model.path={model_folder}", "model.name=local", *SMALL]
    # Weights that change their sign and grow a millionfold at each step.
    decay = ["environment.optimizer=sgd", "hyperparameter.weight_decay=1000"]
    sweep = ["-m", "sweeps=smoke", *arguments, *decay, "environment.seed=0"]
    rates = "hyperparameter.learning_rate=1e4,0.1"
    broken = dptune(*sweep, rates, "privacy=none", cwd=tmp_path)
    assert broken.returncode == 1 and "1 of 2 runs failed" in broken.stderr and "its log is outputs/" in broken.stderr
    assert "Traceback" not in broken.stderr
    states = [json.loads(path.read_text())["status"] for path in (tmp_path / "outputs").glob("*/record.json")]
    assert sorted(states) == ["done", "failed"]
    again = dptune(*sweep, rates, "privacy=none", cwd=tmp_path)
    assert "2 runs: 1 finished before, 1 to do" in again.stdout
    table = dptune(
        "table",
        "smoke",
        *arguments,
        *decay,
        "environment.seed=0",
        rates,
        "privacy=none",
        cwd=tmp_path,
    )
    assert table.returncode == 0 and "1 of 2 runs done" in table.stdout and "1 failed" in table.stdout


def test_watching_ends_with_an_interrupt_and_well(tmp_path: Path) -> None:
    command = [sys.executable, "-c", "from dptune.cli import main; main()", "status", "smoke", "--watch", "0.1"]
    watching = subprocess.Popen(command, cwd=tmp_path, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    assert watching.stdout is not None
    lines = [watching.stdout.readline() for _ in range(6)]
    assert lines[0] == "Sweep smoke: 4 runs: 4 missing\n" and lines[5].startswith("To do the 4")
    time.sleep(0.5)
    assert watching.poll() is None
    watching.send_signal(signal.SIGINT)
    out, errors = watching.communicate(timeout=20)
    assert (watching.returncode, out, errors) == (0, "", "")


def test_a_sweep_over_processes(model_folder: Path, tmp_path: Path) -> None:
    arguments = [f"model.path={model_folder}", "model.name=local", *SMALL]
    launcher = ["hydra/launcher=joblib", "hydra.launcher.n_jobs=2"]
    command = [*FRESH, "-m", "sweeps=smoke", *launcher, *arguments]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert len(list((tmp_path / "outputs").glob("*/record.json"))) == 4
    # In a pipe: a line a run, counted to the end, and nothing that moves a cursor.
    first, *lines = done.stdout.splitlines()
    assert first == "4 runs: 0 finished before, 4 to do" and done.stderr == "" and "\r" not in done.stdout
    assert [line[:5] for line in lines] == ["[1/4]", "[2/4]", "[3/4]", "[4/4]"]
    assert {line[7:].split("  ")[0] for line in lines} == {
        f"privacy={name}, seed={seed}" for name in ("uniform", "none") for seed in (0, 1)
    }
    assert all("accuracy 0." in line and ("/8" in line) == ("privacy=uniform" in line) for line in lines)
    assert ["left" in line for line in lines] == [True, True, True, False]
    table = dptune("table", "smoke", *arguments, cwd=tmp_path)
    assert "4 of 4 runs done" in table.stdout and "(ceiling)" in table.stdout and "(floor)" in table.stdout


def test_a_sweep_on_private_files_names_its_runs_as_its_workers_do(model_folder: Path, tmp_path: Path) -> None:
    """The key of the names is kept before there are workers: each would make one of its own."""
    rows = [{"instruction": "team?", "input": f"case {at}", "options": ["a", "b"], "output": "a"} for at in range(200)]
    (tmp_path / "mine.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    given = ["data=files", "data.path=mine.jsonl", *SMALL, "data.train_size=null"]
    asked = ["-m", "environment.seed=0,1", "model=local", f"model.path={model_folder}", *given]
    launcher = ["hydra/launcher=joblib", "hydra.launcher.n_jobs=2"]
    done = subprocess.run([*FRESH, *asked, *launcher], cwd=tmp_path, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0 and "[2/2]" in done.stdout, done.stderr
    assert "2 runs: 2 finished before, 0 to do" in dptune(*asked, cwd=tmp_path).stdout

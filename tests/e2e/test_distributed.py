"""One run on two processes is the run on one process, up to rounding."""

import os
import signal
import socket
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path

import pytest
from numerics import assert_close_to_largest
from processes import Started, dptune
from test_resume import arguments, command, composed, config, folder_of, lines, rows, wait_for, weights

from dptune.config.schema import Config
from dptune.identity import run_id
from dptune.records import record as records
from dptune.records.lock import holder
from dptune.runs import run

pytestmark = pytest.mark.numerical

__all__ = ["config"]

TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", "--no-python"]


def torchrun(config: Config, *more: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [*TORCHRUN, *command(config, *more)], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )


def one_process(config: Config, root: Path, *more: str) -> Path:
    config.compute.output_root = str(root)
    record = run.run(composed(config, *more))
    assert record.status == "done", record.error
    return root / record.run_id


def forked(config: Config, *more: str, second: Mapping[str, str] | None = None) -> list[Started]:
    """Both ranks as torchrun starts them, without its own process; `second` has variables or a setting of its own."""
    second = dict(second or {})
    own = [second.pop("given")] if "given" in second else []
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    shared = {"WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    return [
        Started(arguments(config, *more), **shared, RANK="0", LOCAL_RANK="0"),
        Started(arguments(config, *more, *own), **shared, **second, RANK="1", LOCAL_RANK="1"),
    ]


def two_processes(config: Config, root: Path, *more: str, by_torchrun: bool = False) -> Path:
    config.compute.output_root = str(root)
    started = [torchrun(config, *more)] if by_torchrun else forked(config, *more)
    ends = [process.communicate(timeout=300) for process in started]
    assert {process.returncode for process in started} == {0}, ends
    assert "".join(said for said, _ in ends).count("accuracy") == 1
    (path,) = root.glob("*/record.json")
    return path.parent


def assert_equal_up_to_rounding(one: Path, two: Path) -> None:
    # Released sums lie on a grid of a thousandth of the noise, of which another order of sums may take the next point.
    assert_close_to_largest(weights(two), weights(one), rtol=2e-3)
    before, after = records.read(one), records.read(two)
    assert before is not None and after is not None and before.status == after.status == "done"
    assert before.privacy is not None and after.privacy is not None
    assert before.guarantee == after.guarantee and before.privacy.attempts == after.privacy.attempts == 1
    # The same batches and the same noise, each once.
    begun, again = ([{**row, "state": None} for row in rows(folder / "ledger.jsonl")] for folder in (one, two))
    assert begun == again  # But for the weights, which are equal up to rounding.
    for left, right in zip(rows(one / "history.jsonl"), rows(two / "history.jsonl"), strict=True):
        assert left["NON_PRIVATE/batch_size"] == right["NON_PRIVATE/batch_size"]
        assert left["NON_PRIVATE/loss"] == pytest.approx(right["NON_PRIVATE/loss"], rel=1e-3)


@pytest.mark.parametrize(
    "more",
    [
        ["privacy=adaptive", "compute.physical_batch_size=3"],
        ["privacy=user_uls", "privacy.examples_per_user=3"],
    ],
    ids=["examples", "users"],
)
def test_two_processes_equal_one(config: Config, tmp_path: Path, more: list[str]) -> None:
    one = one_process(config, tmp_path / "one", *more)
    two = two_processes(config, tmp_path / "two", *more, by_torchrun="privacy=adaptive" in more)
    assert one.name == two.name
    assert_equal_up_to_rounding(one, two)


def test_killed_processes_are_gone_on_for_and_share_secure_keys(config: Config, tmp_path: Path) -> None:
    """With keys of their own two ranks would draw other batches, and the number of units would not fit."""
    config.hyperparameter.steps, config.compute.checkpoint_every = 60, 3
    config.compute.output_root = str(tmp_path)
    process = torchrun(config, "privacy.noise_mode=secure")
    wait_for(lambda: any(lines(path) >= 8 for path in tmp_path.glob("*/ledger.jsonl")))
    (folder,) = (path.parent for path in tmp_path.glob("*/ledger.jsonl"))
    first = holder(folder)
    assert first is not None
    os.kill(first.pid, signal.SIGKILL)
    process.communicate(timeout=60)
    assert process.returncode != 0 and holder(folder) is None
    found = two_processes(config, tmp_path, "privacy.noise_mode=secure")
    assert "going on after step" in (found / "run.log").read_text()
    record = records.read(found)
    assert record is not None and record.privacy is not None and record.privacy.attempts == 1


def test_a_process_that_dies_ends_the_others_with_its_traceback_in_the_log(config: Config, tmp_path: Path) -> None:
    program = (
        "import os, sys\nfrom dptune.runs import training\nfrom dptune.cli import main\n"
        "if os.environ['RANK'] == '1':\n"
        "    def collate(*_):\n        raise RuntimeError('the second one is ill')\n"
        "    training.training_rows = collate\n"
        "main(sys.argv[1:])"
    )
    config.compute.output_root = str(tmp_path)
    ill = [*TORCHRUN, sys.executable, "-c", program, *arguments(config)]
    done = subprocess.run(ill, capture_output=True, text=True, timeout=300)
    assert done.returncode != 0
    (log,) = tmp_path.glob("*/run.log")
    assert "the second one is ill" in log.read_text()
    assert run.run(composed(config)).status == "done"


@pytest.mark.parametrize(
    "other",
    [
        {"MKL_CBWR": "COMPATIBLE"},
        {"given": "environment.engine=loop"},
        {"given": "hyperparameter.max_grad_norm=50"},
        {"given": "data.seed=7"},
    ],
    ids=["kernels", "engine", "clip norm", "data"],
)
def test_a_process_that_would_compute_otherwise_ends_the_run_before_anything_is_released(
    config: Config, tmp_path: Path, other: dict[str, str]
) -> None:
    config.compute.output_root = str(tmp_path)
    first, second = forked(config, second=other)
    _, said = second.communicate(timeout=300)
    assert second.returncode == 2 and "in another way than the first one" in said
    assert said.count("\n") == 1
    _, said = first.communicate(timeout=300)
    assert first.returncode not in (0, None), said
    record = records.read(folder_of(config))
    assert record is not None and not record.is_done
    assert not (folder_of(config) / "history.jsonl").exists() and not list(tmp_path.rglob("*.safetensors"))


def test_a_sweep_takes_a_launcher_instead(config: Config, tmp_path: Path) -> None:
    config.compute.output_root = str(tmp_path)
    done = dptune(*arguments(config, "sweeps=smoke", "-m"), WORLD_SIZE="2", RANK="0")
    assert done.returncode == 2 and "torchrun is for one run" in done.stderr
    assert run_id(config) and not folder_of(config).exists()

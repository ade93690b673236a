"""Twenty kills at random moments of a sweep change nothing but its duration."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from processes import FRESH
from test_launchers import sweep
from test_resume import assert_the_same_run, lines, wait_for

from dptune.records import frame
from dptune.records.lock import holder

KILLS = 20

# Children are forked, so that kills hit runs and not the import of libraries.
DRIVER = """
import json, os, random, signal, sys, time
from pathlib import Path
from dptune.runs import run, setup
from dptune.cli import main
from dptune.sweeps.expand import jobs_of_sweep

kills, arguments, whole, killed = int(sys.argv[1]), sys.argv[4:], sys.argv[2], sys.argv[3]
for job in jobs_of_sweep("smoke", [item for item in arguments if "=" in item and not item.startswith("sweeps=")]):
    setup.set_up(job.config, job.run_id)

def start(root):
    if (child := os.fork()) == 0:
        code = 1
        try:
            os.setpgid(0, 0)
            sys.stdout = sys.stderr = open(os.devnull, "w")
            main([*arguments, f"compute.output_root={root}"])
            code = 0
        finally:
            os._exit(code)
    return child

begin = time.monotonic()
assert os.waitpid(start(whole), 0)[1] == 0
seconds = {"whole": round(time.monotonic() - begin, 1)}
coins, done, begin = random.Random(1), 0, time.monotonic()
while True:
    child = start(killed)
    limit = time.monotonic() + coins.uniform(0.1, seconds["whole"] / 5) if done < kills else float("inf")
    while (ended := os.waitpid(child, os.WNOHANG))[0] == 0 and time.monotonic() < limit:
        time.sleep(0.002)
    if ended[0]:
        assert ended[1] == 0, ended
        break
    os.killpg(child, signal.SIGKILL)
    os.waitpid(child, 0)
    done += 1
print(json.dumps({"kills": done, **seconds, "killed": round(time.monotonic() - begin, 1)}))
"""


@pytest.mark.slow
def test_a_sweep_killed_twenty_times_ends_as_if_it_had_not_been(model_folder: Path, tmp_path: Path) -> None:
    arguments = sweep(model_folder, tmp_path / "x", "environment.seed=0,1", "privacy=uniform,adaptive,none")
    arguments = [item for item in arguments if not item.startswith("compute.output_root=")]
    arguments += ["hyperparameter.steps=100", "compute.checkpoint_every=5"]
    arguments.remove("hyperparameter.steps=30"), arguments.remove("compute.checkpoint_every=2")
    roots = [tmp_path / "whole", tmp_path / "killed"]
    command = [sys.executable, "-c", DRIVER, str(KILLS), *map(str, roots), *arguments]
    driven = subprocess.run(command, capture_output=True, text=True)
    assert driven.returncode == 0, driven.stderr
    report = json.loads(driven.stdout.splitlines()[-1])
    assert report["kills"] >= KILLS, report
    found = frame.read_all(roots[0])
    assert len(found) == 6
    resumed = 0
    for record in found:
        assert_the_same_run(roots[0] / record.run_id, roots[1] / record.run_id)
        resumed += (roots[1] / record.run_id / "run.log").read_text().count("going on after step")
    print(report, "resumed", resumed)
    assert resumed >= 5


@pytest.mark.slow
def test_a_killed_worker_does_not_stop_the_sweep(model_folder: Path, tmp_path: Path) -> None:
    more = ["environment.seed=0,1", "hydra/launcher=joblib", "hydra.launcher.n_jobs=2"]
    whole = subprocess.run([*FRESH, *sweep(model_folder, tmp_path / "whole", *more)], capture_output=True, text=True)
    assert whole.returncode == 0, whole.stderr
    command = [*FRESH, *sweep(model_folder, tmp_path / "killed", *more)]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    wait_for(lambda: any(lines(path) >= 5 for path in (tmp_path / "killed").glob("*/ledger.jsonl")))
    workers = [found for path in (tmp_path / "killed").glob("*/.lock.0") if (found := holder(path.parent))]
    os.kill(workers[0].pid, signal.SIGKILL)
    said, errors = process.communicate()
    assert process.returncode == 0, errors
    assert "a worker process was killed" in said
    for record in frame.read_all(tmp_path / "whole"):
        assert_the_same_run(tmp_path / "whole" / record.run_id, tmp_path / "killed" / record.run_id)

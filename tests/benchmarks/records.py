"""Time to read many records and make their tables: `python tests/benchmarks/records.py [--runs 10000]`.

The records are copies of the sample with other run ids and seeds. CPU time of one process, each part once, what it
imports included; then of `dptune table` as a command. Nothing here is a test.
"""

from __future__ import annotations

import argparse
import json
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from dptune.records.frame import collect, without_collector
from dptune.report.commands import all_tables
from dptune.report.results import of_records
from dptune.sweeps.jobs import ROOT

SAMPLE = ROOT / "analysis" / "sample"


def write(runs: int, folder: Path) -> None:
    """Write records that differ in their id and seed; files beside the record are left out."""
    sources = [json.loads(path.read_text(encoding="utf-8")) for path in sorted(SAMPLE.glob("*/record.json"))]
    for at in range(runs):
        content = sources[at % len(sources)]
        content["run_id"] = f"{at:012x}"
        content["config"]["environment"]["seed"] = at // len(sources)
        (folder / content["run_id"]).mkdir()
        (folder / content["run_id"] / "record.json").write_text(json.dumps(content, indent=1), encoding="utf-8")


def timed(name: str, action: Callable[[], Any]) -> Any:
    """Do something and print its CPU time."""
    begin = time.process_time()
    result = action()
    print(f"| {name} | {time.process_time() - begin:.2f} |", flush=True)
    return result


def main() -> None:
    """Print a table of CPU seconds."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--runs", type=int, default=10_000)
    runs = parser.parse_args().runs
    with tempfile.TemporaryDirectory() as name:
        root = Path(name)
        write(runs, root)
        print(f"{runs} records\n| part | CPU s |\n| --- | --- |")
        with without_collector():
            records = timed("read records", lambda: collect(root)).records
            assert len(records) == runs
            results = timed("frame", lambda: of_records(records, root, items=False))
            timed("all tables", lambda: all_tables("sample", results))
        command = [sys.executable, "-c", "from dptune.cli import main; main()", "table", f"compute.output_root={root}"]
        subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
        used = resource.getrusage(resource.RUSAGE_CHILDREN)
        print(f"| dptune table | {used.ru_utime + used.ru_stime:.2f} |")


if __name__ == "__main__":
    main()

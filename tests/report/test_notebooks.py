"""The notebooks are thin, stored without output, and run on the sample records of a fresh clone."""

import json
import os
import re
from pathlib import Path

import pytest

from dptune.records.frame import collect
from dptune.sweeps.jobs import ROOT

nbformat = pytest.importorskip("nbformat", reason="make setup EXTRAS=notebooks, or make test")

ANALYSIS = ROOT / "analysis"
NOTEBOOKS = sorted(ANALYSIS.glob("*.ipynb"))


def test_the_notebooks_are_there() -> None:
    assert {path.stem for path in NOTEBOOKS} == {
        "hyperparameter",
        "environment",
        "data_sensitivity",
        "comparison",
        "privacy_utility",
    }


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_a_notebook_is_thin_and_stripped(path: Path) -> None:
    notebook = nbformat.read(path, as_version=4)
    words = 0
    for cell in notebook.cells:
        if cell.cell_type == "code":
            assert cell.outputs == [] and cell.execution_count is None
            lines = [line for line in cell.source.splitlines() if line.strip()]
            assert len(lines) <= 4 and not re.search(r"^\s*(def|for|if|class|while)\b", cell.source, re.MULTILINE)
        else:
            words += len(cell.source.split())
    assert words >= 60, "say how to read what is shown"


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
@pytest.mark.filterwarnings("ignore")  # Jupyter's own.
def test_a_notebook_runs_on_the_sample(path: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("DPTUNE_RECORDS", str(ANALYSIS / "sample"))
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(ROOT / "src"), os.environ.get("PYTHONPATH", "")]))
    monkeypatch.setenv("IPYTHONDIR", str(tmp_path / "ipython"))
    from nbclient import NotebookClient

    notebook = nbformat.read(path, as_version=4)
    NotebookClient(notebook, timeout=300, kernel_name="python3", resources={"metadata": {"path": ANALYSIS}}).execute()
    shown = json.dumps([cell.get("outputs", []) for cell in notebook.cells])
    assert "the SAMPLE" in shown and "image/svg+xml" in shown and ("undecided" in shown or "supported" in shown)
    assert "These runs do not hold" not in shown and "cdn" not in shown


def test_a_notebook_as_a_page_asks_the_network_for_nothing() -> None:
    from nbconvert import HTMLExporter

    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    assert "--TemplateExporter.extra_template_basedirs=analysis --template offline" in makefile
    exporter = HTMLExporter(template_name="offline", extra_template_basedirs=[str(ANALYSIS)])
    for path in NOTEBOOKS:
        page, _ = exporter.from_filename(path)
        assert "jp-Notebook" in page
        assert not re.search(r"<(script|link|img|iframe)[^>]*\s(src|href)=|\bimport\(|@import|url\(['\"]?http", page)


def test_the_sample_is_real_and_marked() -> None:
    found = collect(ANALYSIS / "sample")
    assert len(found.records) == 51 and not found.unreadable
    for record in found.records:
        assert record.sweep == "sample" and record.status == "done"
        assert record.provenance["git"] and record.provenance["versions"]["torch"]
        assert (ANALYSIS / "sample" / record.run_id / "evaluation.jsonl").is_file()

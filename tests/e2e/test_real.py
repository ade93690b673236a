"""A pretrained model from a GGUF file on real records: needs both, and minutes."""

import os
from pathlib import Path

import pytest

from dptune.runs import run
from dptune.sweeps.expand import jobs_of_sweep
from dptune.sweeps.jobs import ROOT

MODEL = Path(os.environ.get("DPTUNE_MODEL", ROOT / ".cache" / "models" / "SmolLM2-135M-Instruct.Q4_1.gguf"))
DATA = Path(os.environ.get("DPTUNE_DATA", ROOT.parent / "shared" / "data"))

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not MODEL.exists(), reason="needs a pretrained model: make smollm2, or set DPTUNE_MODEL"),
    pytest.mark.skipif(
        not list(DATA.glob("*sst2*")), reason="needs the shared data: a folder with an sst2 file, named by DPTUNE_DATA"
    ),
]


def test_a_short_private_run_of_a_pretrained_model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Four steps of the sweep real/sst2, with what it does not change: zero-shot, epsilon, parameters, files."""
    monkeypatch.setenv("DPTUNE_MODEL", str(MODEL))
    monkeypatch.setenv("DPTUNE_DATA", str(DATA))
    short = ["hyperparameter.steps=4", "hyperparameter.expected_batch_size=32", "data.test_size=40"]
    places = [f"compute.output_root={tmp_path}", f"compute.cache_dir={ROOT / '.cache'}"]
    config = jobs_of_sweep("real/sst2", [*short, *places])[0].config
    record = run.run(config)
    assert record.status == "done" and record.metrics is not None and record.privacy is not None, record.error
    assert record.metrics.n == 40 and record.zero_shot is not None and 0.3 <= record.zero_shot.accuracy <= 0.8
    assert record.guarantee.epsilon is not None and 7.9 < record.guarantee.epsilon <= 8
    assert record.parameters is not None and record.parameters.trainable == 460_800
    assert record.metrics.response_perplexity != record.zero_shot.response_perplexity
    assert (tmp_path / record.run_id / "adapter" / "adapter_model.safetensors").is_file()
    assert "smollm2" in record.config["model"]["name"]

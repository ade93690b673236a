"""The embedded backbone as it is used."""

from pathlib import Path

from dptune.config.schema import Config
from dptune.runs import run


def test_the_benchmark_has_something_to_learn(tmp_path: Path) -> None:
    """Zero-shot is low, and a short training without privacy learns a good part of the private conventions."""
    config = Config()
    config.compute.cache_dir, config.compute.output_root = str(tmp_path / "cache"), str(tmp_path)
    config.privacy.enabled, config.privacy.target_epsilon = False, None
    config.data.test_size = 200
    config.hyperparameter.steps, config.hyperparameter.expected_batch_size = 25, 128
    record = run.run(config)
    assert record.status == "done" and record.metrics is not None and record.zero_shot is not None
    assert record.zero_shot.accuracy < 0.35
    assert record.metrics.accuracy > record.zero_shot.accuracy + 0.2
    assert record.metrics.n_unseen == 200
    assert record.parameters is not None and record.parameters.total < 3_000_000

"""A run that takes a second."""

from pathlib import Path

import pytest

from dptune.config.schema import Config


@pytest.fixture
def config(model_folder: Path, tmp_path: Path) -> Config:
    made = Config()
    made.model.name, made.model.path = "local", str(model_folder)
    made.data.train_size, made.data.validation_size, made.data.test_size = 200, 20, 40
    made.hyperparameter.steps, made.hyperparameter.warmup_steps = 3, 1
    made.hyperparameter.expected_batch_size, made.hyperparameter.rank = 20, 2
    made.compute.output_root, made.compute.cache_dir = str(tmp_path / "outputs"), str(tmp_path / "cache")
    return made

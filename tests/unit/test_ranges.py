"""Every number of a config at its extremes: one line that names the field, or a plan with a finite epsilon."""

import dataclasses
import math
from collections.abc import Iterator
from typing import Any, get_type_hints

import pytest

from dptune.config.checks import strict, with_values
from dptune.config.ranges import RANGES, SMALLEST_STABILITY
from dptune.config.schema import Config, ConfigError
from dptune.data.sources import Dataset, load_dataset
from dptune.privacy import accounting
from dptune.runs import privacy
from dptune.runs.privacy import make_plan

SMALL: dict[str, Any] = {
    "data.train_size": 400,
    "data.validation_size": 60,
    "data.test_size": 60,
    "hyperparameter.expected_batch_size": 32,
    "hyperparameter.steps": 6,
}
EXTREMES = [0, -1, 5e-324, 1e-300, 1e-9, 1e-6, 1e9, 1e300, math.nan, math.inf, -math.inf, 10**30, 10**400]
# What makes a field count, where the defaults do not.
RELEVANT: dict[str, dict[str, Any]] = {
    "privacy.noise_multiplier": {"privacy.target_epsilon": None},
    "privacy.examples_per_user": {"privacy.unit": "user_els"},
    "privacy.quantile_learning_rate": {"privacy.quantile": 0.5},
    "privacy.quantile_share": {"privacy.quantile": 0.5},
    "privacy.schedule_ratio": {"privacy.schedule": "exponential"},
    "privacy.projection_noise_multiplier": {"privacy.projection": "private"},
    "privacy.clipping_stability": {"privacy.clipping": "auto_s"},
    "privacy.budget": {"data.public": False},
    "environment.adam_bc_floor": {"environment.optimizer": "dp_adam_bc"},
    "adapter.sparsity": {"adapter.name": "pst"},
}
NO_STEPS = {"hyperparameter.steps": 0, "hyperparameter.warmup_steps": 0}


def numbers(node: Any, prefix: str = "") -> Iterator[str]:
    hints = get_type_hints(type(node))
    for item in dataclasses.fields(node):
        value = getattr(node, item.name)
        if dataclasses.is_dataclass(value):
            yield from numbers(value, f"{prefix}{item.name}.")
        elif hints[item.name] in (int, float, int | None, float | None):
            yield f"{prefix}{item.name}"


@pytest.fixture(scope="module")
def data() -> Dataset:
    return load_dataset(with_values(Config(), SMALL.items()))


@pytest.mark.parametrize("name", list(numbers(Config())))
def test_no_number_ends_in_a_traceback(name: str, data: Dataset) -> None:
    fitting = RANGES.get(name)
    # At the ends of their ranges, users and steps take a minute to account.
    slow = ("privacy.examples_per_user", "hyperparameter.steps")
    ends = [fitting.least, fitting.most] if fitting and name not in slow else []
    plans = name.startswith(("privacy.", "hyperparameter."))
    refused = 0
    for value in [*EXTREMES, *ends]:
        for more in ({}, NO_STEPS):
            try:
                config = with_values(Config(), {**SMALL, **RELEVANT.get(name, {}), **more, name: value}.items())
                if plans and name not in NO_STEPS:
                    assert math.isfinite(make_plan(config, data).epsilon())
            except ConfigError as error:
                refused += 1
                assert "\n" not in str(error)
                assert len(str(error)) < 400
    assert refused >= 8  # nan, infinities, -1 and what is too large, twice


def test_the_ranges_are_of_fields_that_there_are_and_hold_their_defaults() -> None:
    known = set(numbers(Config()))
    assert set(RANGES) <= known
    for name, fitting in RANGES.items():
        group, _, leaf = name.rpartition(".")
        default = getattr(getattr(Config(), group), leaf)
        assert fitting.least < fitting.most
        assert default is None or fitting.least <= default <= fitting.most


def test_the_accountant_and_the_config_agree_on_the_noise() -> None:
    fitting = RANGES["privacy.noise_multiplier"]
    assert (fitting.least, fitting.most) == (
        accounting.SMALLEST_NOISE_MULTIPLIER,
        accounting.LARGEST_NOISE_MULTIPLIER,
    )
    assert RANGES["privacy.delta"].least == accounting.SMALLEST_DELTA


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"privacy.target_epsilon": 1e-9}, "privacy.target_epsilon=1e-09 must lie between 0.001 and 1000"),
        (
            {"privacy.schedule": "linear", "privacy.schedule_ratio": 1e-9},
            "privacy.schedule_ratio=1e-09 must lie between",
        ),
        ({"privacy.score_noise_multiplier": 1e-6, **NO_STEPS}, "privacy.score_noise_multiplier=1e-06 must lie between"),
        ({"hyperparameter.max_grad_norm": 1e300}, "hyperparameter.max_grad_norm=1e.300 must lie between"),
        ({"privacy.target_epsilon": None, "privacy.noise_multiplier": 0.05}, "use privacy=none"),
        ({"environment.seed": 10**400}, "environment.seed: an integer of 401 digits is too large"),
        ({"adapter.alpha": 10**400}, "adapter.alpha: the number is too large"),
    ],
)
def test_an_extreme_number_is_one_line_with_the_way_out(values: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message) as caught:
        with_values(Config(), values.items())
    assert "\n" not in str(caught.value)


def test_a_whole_tree_with_a_huge_integer_is_one_line_too() -> None:
    tree = dataclasses.asdict(Config())
    tree["privacy"]["target_epsilon"] = 10**400
    with pytest.raises(ConfigError, match="too large"):
        strict(tree)


@pytest.mark.parametrize("clipping", ["auto_s", "psac"])
def test_automatic_clipping_does_not_take_rounding_for_a_gradient(clipping: str) -> None:
    values = {"privacy.clipping": clipping, "hyperparameter.max_grad_norm": 10.0, "privacy.allocation": "uniform"}
    least = SMALLEST_STABILITY * 10.0
    assert with_values(Config(), {**values, "privacy.clipping_stability": least}.items())
    with pytest.raises(ConfigError, match=r"privacy.clipping_stability=0.0099 .* take at least 0.01"):
        with_values(Config(), {**values, "privacy.clipping_stability": 0.0099}.items())


def test_calibration_that_takes_long_says_what_it_does(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], data: Dataset
) -> None:
    monkeypatch.setattr(privacy, "PATIENCE", 0.0)
    make_plan(with_values(Config(), {**SMALL, "privacy.target_epsilon": 7.77}.items()), data)
    assert "dptune: calibrating the noise of 6 steps to epsilon 7.77" in capsys.readouterr().err

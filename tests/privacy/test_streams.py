"""Keyed streams: independence, determinism, distribution, secrecy of the key."""

from __future__ import annotations

import subprocess
import sys

import numpy as np
import pytest
from scipy import stats

from dptune.privacy.streams import KeyRing, Purpose

pytestmark = pytest.mark.numerical

KEYS = KeyRing.reproducible(7, "run")


def test_normal_is_standard_normal() -> None:
    values = KEYS.stream(Purpose.NOISE).normal(200_000)
    assert stats.kstest(values, "norm").pvalue > 1e-3
    # sum of squares ~ chi-square with n degrees of freedom, both tails
    assert 1e-3 < stats.chi2.cdf((values**2).sum(), values.size) < 1 - 1e-3
    assert abs(np.corrcoef(values[:-1], values[1:])[0, 1]) < 5 / np.sqrt(values.size)


@pytest.mark.parametrize("scale", [2 / 3, 3 / 2])
def test_the_same_test_rejects_a_wrong_standard_deviation(scale: float) -> None:
    values = scale * KEYS.stream(Purpose.NOISE).normal(2_000)
    assert stats.kstest(values, "norm").pvalue < 1e-9
    tail = stats.chi2.cdf((values**2).sum(), values.size)
    assert min(tail, 1 - tail) < 1e-9


def test_uniform_lies_inside_the_open_interval_on_a_53_bit_grid() -> None:
    values = KEYS.stream(Purpose.SAMPLING).uniform(100_000)
    assert stats.kstest(values, "uniform").pvalue > 1e-3
    assert values.min() > 0 and values.max() < 1
    assert np.all((values * 2.0**53) % 2 == 1)


def test_streams_of_different_labels_are_independent() -> None:
    labels = [
        {"purpose": Purpose.NOISE},
        {"purpose": Purpose.SAMPLING},
        {"purpose": Purpose.NOISE, "step": 1},
        {"purpose": Purpose.NOISE, "group": "1"},
        {"purpose": Purpose.NOISE, "rank": 1},
    ]
    draws = [KEYS.stream(**label).normal(20_000) for label in labels]  # type: ignore[arg-type]
    draws += [
        KeyRing.reproducible(8, "run").stream(Purpose.NOISE).normal(20_000),
        KeyRing.reproducible(7, "other run").stream(Purpose.NOISE).normal(20_000),
    ]
    correlation = np.corrcoef(draws) - np.eye(len(draws))
    assert np.abs(correlation).max() < 5 / np.sqrt(20_000)


def test_labels_cannot_run_into_each_other() -> None:
    step, group = (
        KEYS.stream(Purpose.NOISE, step=11, group="2").seed(),
        KEYS.stream(Purpose.NOISE, step=1, group="12").seed(),
    )
    assert step != group


def test_a_stream_continues_and_reopens_at_its_beginning() -> None:
    stream = KEYS.stream(Purpose.NOISE, step=3)
    first, second = stream.normal(8), stream.normal(8)
    assert not np.intersect1d(first, second).size
    assert np.array_equal(KEYS.stream(Purpose.NOISE, step=3).normal(8), first)


def test_long_draws_do_not_repeat() -> None:
    values = KEYS.stream(Purpose.NOISE).normal(300_000)
    assert np.unique(values).size == values.size


def test_deterministic_across_processes() -> None:
    code = (
        "from dptune.privacy.streams import *;"
        "print(KeyRing.reproducible(7, 'run').stream(Purpose.NOISE, step=2, group='g').normal(3).tolist())"
    )
    printed = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert printed.strip() == str(KEYS.stream(Purpose.NOISE, step=2, group="g").normal(3).tolist())


def test_golden_values() -> None:
    """A change of these numbers breaks the resuming and the reproducing of every recorded run."""
    assert KEYS.stream(Purpose.INIT).seed() == 1305997261896715110
    assert KEYS.stream(Purpose.NOISE).normal(2) == pytest.approx([-0.2799162370578002, 0.645721892008143])


def test_secure_keys_are_fresh() -> None:
    assert KeyRing.secure("run").master != KeyRing.secure("run").master


def test_the_key_is_never_shown() -> None:
    keys = KeyRing.secure("run")
    stream = keys.stream(Purpose.NOISE)
    shown = repr(keys) + str(keys) + repr(stream) + str(stream)
    for secret in (keys.master, stream._key):
        assert secret.hex() not in shown and repr(secret) not in shown
    assert keys.key_hash(Purpose.NOISE, 1) not in stream._key.hex()


def test_key_hash_tells_steps_apart() -> None:
    assert KEYS.key_hash(Purpose.NOISE, 1) != KEYS.key_hash(Purpose.NOISE, 2)
    assert KEYS.key_hash(Purpose.NOISE, 1) == KeyRing.reproducible(7, "run").key_hash(Purpose.NOISE, 1)


def test_wrong_keys_are_refused() -> None:
    with pytest.raises(ValueError, match="32 bytes"):
        KeyRing(b"short", "run", "secure")
    with pytest.raises(ValueError, match="mode"):
        KeyRing(bytes(32), "run", "sometimes")  # type: ignore[arg-type]

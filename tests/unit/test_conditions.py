from collections import Counter
from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dptune.config.schema import Config, ConfigError, DataSensitivityConfig
from dptune.data.conditions import (
    DISTRACTIONS,
    HEAVY_USERS,
    REWORDINGS,
    apply_to_test,
    apply_to_training,
    imbalance,
    perturbed,
)
from dptune.data.schema import Example
from dptune.data.sources import load_dataset
from dptune.data.supportdesk import is_held_out

OPTIONS = ("a", "b", "c", "d")


def records(count: int = 4000, split: str = "train") -> list[Example]:
    """Four tasks, four equally frequent answers, a hundred users."""
    return [
        Example(f"t{n % 4}", f"which {n % 4} ?", f"text {n}", OPTIONS, OPTIONS[n // 4 % 4], f"u{n % 100}", split)
        for n in range(count)
    ]


def training(seed: int = 0, **condition: Any) -> list[Example]:
    return apply_to_training(records(), DataSensitivityConfig(**condition), seed)


def test_a_clean_data_set_is_left_as_it_is() -> None:
    assert training() == records() and apply_to_test(records(), DataSensitivityConfig(), 0) == records()


ALL = {
    "label_noise": 0.3,
    "class_imbalance": 5.0,
    "task_imbalance": 5.0,
    "user_tail": 1.0,
    "instruction_perturbation": 0.5,
    "duplicates": 0.3,
}
OF_TEST = {"unseen_instructions": 0.5, "test_class_shift": 5.0, "test_distraction": 0.5}


@pytest.mark.parametrize("name", ALL)
def test_what_happens_to_a_training_record_depends_on_it_and_the_seed_alone(name: str) -> None:
    condition = DataSensitivityConfig(**{name: ALL[name]})
    whole = apply_to_training(records(), condition, 0)
    inputs = {example.input for example in records()[1000:]}
    assert apply_to_training(records()[1000:], condition, 0) == [item for item in whole if item.input in inputs]
    assert whole != records() and whole != apply_to_training(records(), condition, 1)
    assert apply_to_test(records(), condition, 0) == records()


@pytest.mark.parametrize("name", OF_TEST)
def test_conditions_of_the_test_split_leave_training_alone(name: str) -> None:
    condition = DataSensitivityConfig(**{name: OF_TEST[name]})
    whole = apply_to_test(records(), condition, 0)
    inputs = {example.input for example in apply_to_test(records()[1000:], condition, 0)}
    assert inputs <= {example.input for example in whole} and whole != records()
    assert apply_to_training(records(), condition, 0) == records()


def test_label_noise_and_the_training_fraction_are_as_strong_as_they_say() -> None:
    noisy = training(label_noise=0.2)
    changed = [one.output != two.output for one, two in zip(records(), noisy, strict=True)]
    assert sum(changed) / len(changed) == pytest.approx(0.2, abs=0.02)
    assert all(example.output in OPTIONS for example in noisy)
    few = training(train_fraction=0.25)
    assert len(few) == pytest.approx(1000, abs=120) and few != training(seed=1, train_fraction=0.25)


@given(st.integers(2, 20), st.floats(1, 100))
def test_imbalance_falls_from_one_to_the_inverse_ratio(count: int, ratio: float) -> None:
    shares = [imbalance(rank, count, ratio) for rank in range(count)]
    assert shares[0] == 1 and shares[-1] == pytest.approx(1 / ratio) and shares == sorted(shares, reverse=True)


@pytest.mark.parametrize("field", ["class_imbalance", "task_imbalance"])
def test_imbalanced_classes_and_tasks_have_the_ratio(field: str) -> None:
    kept = training(**{field: 8.0})
    # Each task has its own order of answers, so that no answer is rare in all tasks.
    counts = (
        Counter(item.task for item in kept)
        if field == "task_imbalance"
        else Counter(item.output for item in kept if item.task == "t0")
    )
    shares = sorted(counts.values())
    assert len(shares) == 4 and 5 < shares[-1] / shares[0] < 12


def test_a_free_form_record_has_no_class() -> None:
    free = [replace(example, options=None) for example in records()]
    assert apply_to_training(free, DataSensitivityConfig(class_imbalance=8.0, label_noise=1.0), 0) == free


def test_the_shifted_test_split_makes_rare_answers_frequent() -> None:
    rare = Counter(item.output for item in training(class_imbalance=8.0) if item.task == "t0")
    shifted = apply_to_test(records(), DataSensitivityConfig(test_class_shift=8.0), 0)
    frequent = Counter(item.output for item in shifted if item.task == "t0")
    assert [answer for answer, _ in rare.most_common()] == [answer for answer, _ in frequent.most_common()][::-1]


def test_a_tenth_of_the_users_keep_all_and_the_others_fewer_and_fewer() -> None:
    kept = Counter(item.user for item in training(user_tail=1.0))
    whole = sum(count == 40 for count in kept.values())
    assert abs(whole / 100 - HEAVY_USERS) < 0.08
    counts = sorted(kept.values())
    assert sum(counts) < 2000 and counts[len(counts) // 2] < 15
    with pytest.raises(ConfigError, match="user_tail needs the author of every training record"):
        apply_to_training([replace(records(1)[0], user=None)], DataSensitivityConfig(user_tail=1.0), 0)


def test_duplicates_stand_twice_and_nothing_is_lost() -> None:
    counts = Counter(training(duplicates=0.2))
    assert set(counts) == set(records()) and set(counts.values()) == {1, 2}
    assert sum(counts.values()) / 4000 == pytest.approx(1.2, abs=0.02)


@given(st.text(min_size=1, max_size=40), st.floats(0, 1, exclude_max=True))
def test_a_perturbed_instruction_is_another_one(instruction: str, choice: float) -> None:
    assert perturbed(instruction, choice) != instruction


def test_perturbation_changes_the_stated_share_of_instructions_and_nothing_else() -> None:
    made = training(instruction_perturbation=0.5)
    changed = [one.instruction != two.instruction for one, two in zip(records(), made, strict=True)]
    assert sum(changed) / 4000 == pytest.approx(0.5, abs=0.03)
    assert [replace(two, instruction=one.instruction) for one, two in zip(records(), made, strict=True)] == records()
    assert len({example.instruction for example in made if example.task == "t0"}) > 8


def test_unseen_instructions_and_longer_inputs_are_in_test_only() -> None:
    condition = DataSensitivityConfig(unseen_instructions=1.0, test_distraction=0.5)
    made = apply_to_test(records(), condition, 0)
    seen = {example.instruction for example in records()}
    assert not seen & {example.instruction for example in made}
    assert len({example.instruction for example in made}) == 4 * len(REWORDINGS)
    longer = [two for one, two in zip(records(), made, strict=True) if one.input != two.input]
    assert len(longer) / 4000 == pytest.approx(0.5, abs=0.03)
    assert all(item.input.startswith(DISTRACTIONS[0]) and " text " in item.input for item in longer)


def test_the_support_desk_has_held_out_wordings_of_its_own() -> None:
    config = Config()
    config.data.train_size, config.data.test_size = 400, 200
    usual = load_dataset(config)
    config.data_sensitivity.unseen_instructions = 1.0
    unseen = load_dataset(config)
    assert 60 < sum(map(is_held_out, usual.test)) < 140 and all(map(is_held_out, unseen.test))
    assert [item.input for item in unseen.test] == [item.input for item in usual.test] and unseen.train == usual.train
    for one, two in zip(usual.test, unseen.test, strict=True):
        assert one == two or not is_held_out(one)

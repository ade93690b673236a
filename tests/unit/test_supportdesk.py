"""The embedded support desk: reproducible, cleanly split, long-tailed, and not trivial."""

import hashlib
import json
from collections import Counter, defaultdict
from dataclasses import asdict

import pytest

from dptune.data import supportdesk
from dptune.data.schema import Example
from dptune.data.supportdesk import ORGANISATIONS, PUBLIC_ORGANISATIONS, TASKS, generate, is_held_out, public

SPLITS = ("train", "validation", "test")


@pytest.fixture(scope="module")
def private() -> dict[str, list[Example]]:
    return generate()


@pytest.fixture(scope="module")
def pretraining() -> list[Example]:
    return public(size=24_000)


def digest(records: object) -> str:
    return hashlib.sha256(json.dumps(records).encode()).hexdigest()


def fields(record: Example) -> dict[str, object]:
    found = asdict(record)
    assert found.pop("turns") == (), "no record of the desk is a conversation"
    return found


def inputs(records: list[Example]) -> set[tuple[str, str]]:
    return {(record.task, record.input) for record in records}


def test_the_same_seed_gives_the_same_records_everywhere(private, pretraining):
    assert (
        digest([fields(r) for split in SPLITS for r in private[split]])
        == "0c8182e57253ac09b5bd250e7e62cbcb9900f5eaec820fed5395362d13c681cb"
    )
    assert (
        digest([fields(r) for r in pretraining[:2000]])
        == "0f57290a9344d7b203fb683843ec67c81f9f04c6be0711fee75ce59297d5d589"
    )


def test_seeds_and_organisations_differ(private):
    small = {"train": 100, "validation": 10, "test": 10}
    assert generate("dev", 1, **small) == generate("dev", 1, **small)
    assert generate("dev", 1, **small) != generate("dev", 2, **small)
    assert generate("dev", 0, **small)["train"] != private["train"][:100]


def test_sizes_and_split_names(private):
    assert {split: len(records) for split, records in private.items()} == dict(train=4000, validation=400, test=800)
    assert all(record.split == split for split, records in private.items() for record in records)
    assert {record.split for record in public(size=7)} == {"public"}
    assert len(public(size=7)) == 7


def test_the_test_records_do_not_depend_on_the_size_of_other_splits(private):
    assert list(private) == list(SPLITS)
    assert generate(train=10, validation=0)["test"] == private["test"]


def test_an_unknown_organisation_is_refused_in_one_line():
    with pytest.raises(ValueError, match=r"^organisation: unknown name 'acme'; choose one of .*$"):
        generate("acme")


def test_splits_share_neither_inputs_nor_users(private, pretraining):
    for one, other in (("train", "validation"), ("train", "test"), ("validation", "test")):
        assert not inputs(private[one]) & inputs(private[other])
        assert not {r.user for r in private[one]} & {r.user for r in private[other]}
    assert not {r.user for r in pretraining} & {r.user for records in private.values() for r in records}
    assert not set(pretraining) & {record for records in private.values() for record in records}
    assert len(inputs(private["train"])) == len(private["train"])


def test_inputs_of_test_are_seldom_in_the_pretraining_split(private, pretraining):
    shared = inputs(private["test"]) & inputs(pretraining)
    assert len(shared) < 0.01 * len(private["test"])


def test_held_out_wordings_are_in_test_only(private, pretraining):
    assert not any(is_held_out(r) for r in [*private["train"], *private["validation"], *pretraining])
    share = sum(map(is_held_out, private["test"])) / len(private["test"])
    assert share == pytest.approx(supportdesk.HELD_OUT_SHARE, abs=0.05)
    for task in TASKS.values():
        assert not set(task.public) & set(task.train)
        assert not set(task.held_out) & {*task.public, *task.train}
        assert all("{desk}" in wording for wording in (*task.public, *task.train, *task.held_out))
        assert {r.instruction for r in private["test"] if r.task == task.name and is_held_out(r)} == {
            wording.format(desk="garnet") for wording in task.held_out
        }


def test_every_split_has_every_task_equally_often(private):
    assert len(TASKS) >= 8
    assert {task.kind for task in TASKS.values()} == {"option", "free_form"}
    for records in private.values():
        counts = Counter(record.task for record in records)
        assert counts == dict.fromkeys(TASKS, len(records) // len(TASKS))


def test_answers_are_among_the_options_and_free_form_has_none(private):
    for record in (r for records in private.values() for r in records):
        if TASKS[record.task].kind == "option":
            assert record.options is not None
            assert record.output in record.options
            assert len(set(record.options)) == len(record.options) == TASKS[record.task].categories
        else:
            assert record.options is None
            assert 0 < len(record.output) <= 32


def test_no_task_is_won_by_always_answering_the_same(private):
    outputs = defaultdict(Counter)
    for record in private["test"]:
        outputs[record.task][record.output] += 1
    for task, counts in outputs.items():
        chance = 1 / TASKS[task].categories if TASKS[task].categories else 0.05
        assert max(counts.values()) / counts.total() <= chance + 0.15, task


def test_free_form_responses_come_from_the_input(private):
    for record in private["train"]:
        if record.task == "order_number":
            digits = "".join(filter(str.isdigit, record.output))
            assert record.input.count(digits) >= 1
        elif record.task == "email":
            mailbox = next(word for word in record.input.split() if "@" in word).split("@")[0]
            assert mailbox in record.output


def test_activity_of_users_has_a_long_tail(private):
    counts = sorted(Counter(record.user for record in private["train"]).values(), reverse=True)
    busiest_tenth = sum(counts[: len(counts) // 10])
    assert len(counts) > 500
    assert counts[0] <= 0.05 * sum(counts)
    assert busiest_tenth > 0.3 * sum(counts)
    assert counts[len(counts) // 2] <= 4


def test_the_conventions_of_dev_and_private_are_unlike_every_public_one():
    known = [supportdesk._conventions(name) for name in PUBLIC_ORGANISATIONS]
    for name in ("dev", "private"):
        own = supportdesk._conventions(name)
        for public_one in known:
            for task, labels in own.labels.items():
                assert task == "policy" or labels != public_one.labels[task]
            for task, template in own.formats.items():
                assert template != public_one.formats[task]
            assert own.permitted != public_one.permitted
    assert set(ORGANISATIONS) - set(PUBLIC_ORGANISATIONS) == {"dev", "private"}

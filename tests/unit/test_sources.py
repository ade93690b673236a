import gzip
import json
import subprocess
import sys
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dptune.config.schema import Config, ConfigError, has_plain_hashes, is_open, is_public, noise_mode
from dptune.data import sources
from dptune.data.readers import DataError
from dptune.data.schema import Example
from dptune.data.subsets import Mixture, Share, Smallest
from dptune.identity import run_id
from dptune.sweeps.jobs import ROOT

ROW = {
    "task": "team",
    "instruction": "which ?",
    "input": "reset",
    "options": ["a", "b"],
    "output": "a",
    "user": 7,
}


def config(path: Path | str, **fields: Any) -> Config:
    """A config of a file; columns are given as `columns={...}`."""
    made = Config()
    made.data.name, made.data.path = "files", str(path)
    made.compute.output_root = str(Path(path).parent / "outputs")
    made.data.train_size = made.data.validation_size = made.data.test_size = None
    for name, value in fields.pop("columns", {}).items():
        setattr(made.data.columns, name, value)
    for name, value in fields.items():
        assert hasattr(made.data, name)
        setattr(made.data, name, value)
    return made


def write(path: Path, rows: list[Any]) -> Path:
    text = "".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows)
    path.write_bytes(gzip.compress(text.encode()) if path.suffix == ".gz" else text.encode())
    return path


def rows(count: int, **more: Any) -> list[Any]:
    return [
        {**ROW, "input": f"message {index}", "split": "train" if index % 2 else "test", **more}
        for index in range(count)
    ]


@pytest.mark.parametrize("name", ["data.jsonl", "data.jsonl.gz"])
def test_a_file_becomes_examples(tmp_path: Path, name: str) -> None:
    data = sources.load_dataset(config(write(tmp_path / name, rows(6))))
    assert len(data.train) == 3 and len(data.test) == 3 and not data.public
    assert data.test[0] == Example("team", "which ?", "message 0", ("a", "b"), "a", "7", "test")
    assert [item.input for item in data.test] == ["message 0", "message 2", "message 4"]


def test_columns_are_mapped_and_missing_ones_have_defaults(tmp_path: Path) -> None:
    plain = [{"question": f"q{index}", "answer": "yes"} for index in range(200)]
    path = write(tmp_path / "x.jsonl", plain)
    data = sources.load_dataset(config(path, columns={"instruction": "question", "output": "answer"}))
    assert {item.task for item in data.train} == {"instructions"} and data.train[0].options is None
    assert len(data.train) + len(data.validation) + len(data.test) == 200
    assert 130 < len(data.train) < 190 and 5 < len(data.test) < 40


def test_a_column_can_be_a_text_with_fields(tmp_path: Path) -> None:
    made = [{"title": f"t{index}", "body": "b", "task": "not one", "label": index % 2} for index in range(40)]
    columns = {"instruction": "=Is it good?", "input": "={title}: {body}", "output": "label", "task": "="}
    data = sources.load_dataset(config(write(tmp_path / "x.jsonl", made), columns=columns, options=["no", "yes"]))
    assert {(item.instruction, item.task, item.options) for item in data.train} == {
        ("Is it good?", "instructions", ("no", "yes"))
    }
    assert all(item.output == ("yes" if int(item.input[1:-3]) % 2 else "no") for item in data.train)


def test_the_options_of_the_source_count_positions_only_if_they_are_fixed(tmp_path: Path) -> None:
    made = [{"instruction": "pick", "output": "1", "split": split} for split in ("train", "test")]
    data = sources.load_dataset(config(write(tmp_path / "x.jsonl", made), options=["no", "yes"]))
    assert data.train[0].output == "yes"
    own = [{**row, "options": ["no", "yes"]} for row in made]
    with pytest.raises(DataError, match="field 'output' is not among the options"):
        sources.load_dataset(config(write(tmp_path / "y.jsonl", own)))


@pytest.mark.parametrize(
    ("row", "fields", "message"),
    [
        ("{broken", {}, "line 2 is not JSON"),
        ("[1]", {}, "line 2 is not a JSON object"),
        (
            {**ROW, "instruction": None},
            {},
            "line 2: field 'instruction' is missing; map it with data.columns.instruction=...; the row has",
        ),
        ({**ROW, "instruction": 5}, {}, "line 2: field 'instruction' is not text"),
        ({**ROW, "instruction": " "}, {}, "line 2: field 'instruction' is empty"),
        ({**ROW, "output": "  "}, {}, "line 2: field 'output' is empty"),
        ({**ROW, "output": "c"}, {}, "line 2: field 'output' is not among the options"),
        ({**ROW, "output": 2}, {}, "line 2: field 'output' is 2, which is no position among 2 options"),
        ({**ROW, "output": True}, {}, "line 2: field 'output' is not text"),
        ({**ROW, "options": "a,b"}, {}, "line 2: field 'options' is not a list"),
        ({**ROW, "options": []}, {}, "line 2: field 'options' is not a list of one or more texts"),
        ({**ROW, "split": "holdout"}, {}, "line 2: field 'split' is 'holdout'.*map it with data.splits"),
        (ROW, {"columns": {"input": "=see {page}"}}, "line 1: field 'page' is missing, but the text '=see {page}'"),
        (ROW, {"columns": {"user": "author"}}, "line 1: field 'author' is missing, but data.columns.user names it"),
        (ROW, {"columns": {"id": "key"}}, "line 1: field 'key' is missing, but data.columns.id names it"),
        ({**ROW, "user": None}, {"split_by": "user"}, "line 2: field 'user' is missing; data.split_by=user"),
    ],
)
def test_a_malformed_record_names_file_line_and_field(tmp_path: Path, row: Any, fields: Any, message: str) -> None:
    path = write(tmp_path / "bad.jsonl", [ROW, row])
    with pytest.raises(DataError, match=message) as caught:
        sources.load_dataset(config(path, **fields))
    assert str(path) in str(caught.value) and "\n" not in str(caught.value)
    assert isinstance(caught.value, ConfigError)


def test_bad_records_are_skipped_counted_and_listed_on_request(tmp_path: Path) -> None:
    bad = ["{broken", {**ROW, "output": ""}, {**ROW, "output": "c"}, b'{"instruction": "\xe9"}']
    lines = [json.dumps(row).encode() if isinstance(row, dict) else row for row in [*rows(10), *bad[1:], *rows(4)]]
    path = tmp_path / "some.jsonl"
    path.write_bytes(b"\n".join([*lines, b"{broken"]))
    data = sources.load_dataset(config(path, on_bad="skip"))
    assert len(data.train) == 7 and len(data.test) == 7
    assert data.skipped.count == 4
    assert [message.removeprefix(f"{path}: ").split(" (")[0] for message in data.skipped.messages] == [
        "line 11: field 'output' is empty",
        "line 12: field 'output' is not among the options",
        "line 13 is not UTF-8",
        "line 18 is not JSON",
    ]
    clean = sources.load_dataset(config(write(tmp_path / "clean.jsonl", [*rows(10), *rows(4)])))
    assert clean.skipped.count == 0 and clean.train == data.train and "skipped" not in repr(data)


def test_the_list_of_bad_records_is_bounded(tmp_path: Path) -> None:
    path = write(tmp_path / "x.jsonl", [*rows(4), *["[]"] * (sources.LISTED + 5)])
    skipped = sources.load_dataset(config(path, on_bad="skip")).skipped
    assert skipped.count == sources.LISTED + 5 and len(skipped.messages) == sources.LISTED


def test_a_truncated_gzip_and_another_encoding_are_named(tmp_path: Path) -> None:
    whole = gzip.compress(("".join(json.dumps(row) + "\n" for row in rows(2000))).encode())
    cut = tmp_path / "cut.jsonl.gz"
    cut.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(DataError, match="cut.jsonl.gz: not readable after line"):
        sources.load_dataset(config(cut))
    with pytest.raises(DataError, match="not readable after line .*on_bad=skip cannot leave that out"):
        sources.load_dataset(config(cut, on_bad="skip"))
    (tmp_path / "latin.jsonl").write_bytes('{"instruction": "é"}\n'.encode("latin-1"))
    with pytest.raises(DataError, match="latin.jsonl: line 1 is not UTF-8"):
        sources.load_dataset(config(tmp_path / "latin.jsonl"))
    (tmp_path / "wide.jsonl").write_text('{"instruction": "e"}\n', encoding="utf-16")
    with pytest.raises(DataError, match="wide.jsonl: line 1 is not UTF-8"):
        sources.load_dataset(config(tmp_path / "wide.jsonl"))


def test_an_identifier_that_occurs_twice_is_named(tmp_path: Path) -> None:
    made = [{**row, "key": index // 5 * 5} for index, row in enumerate(rows(6))]
    path = write(tmp_path / "x.jsonl", made)
    with pytest.raises(DataError, match="x.jsonl: line 2: field 'key' has occurred before"):
        sources.load_dataset(config(path, columns={"id": "key"}))
    with pytest.raises(DataError, match="has occurred before.*on_bad=skip cannot leave that out"):
        sources.load_dataset(config(path, columns={"id": "key"}, on_bad="skip"))
    # Without identifiers equal records are records: each is a unit of its own.
    twice = sources.load_dataset(config(write(tmp_path / "y.jsonl", rows(6) * 2)))
    assert len(twice.train) == 6


def test_a_user_in_two_splits_is_an_error_when_users_are_protected(tmp_path: Path) -> None:
    path = write(tmp_path / "x.jsonl", rows(4))
    assert len(sources.load_dataset(config(path)).train) == 2
    protected = config(path)
    protected.privacy.unit = "user_uls"
    for wanted in (protected, config(path, split_by="user")):
        with pytest.raises(DataError, match="line 2: field 'user': the same user is in test and in train; repair"):
            sources.load_dataset(wanted)


def test_a_long_record_is_bad_on_request_only(tmp_path: Path) -> None:
    path = write(tmp_path / "x.jsonl", [*rows(4), {**ROW, "input": "x" * 200, "split": "train"}])

    def tokens(example: Example) -> int:
        return len(example.input)

    assert len(sources.load_dataset(config(path), tokens).train) == 3
    with pytest.raises(DataError, match="line 5: 200 tokens are more than environment.sequence_length=96"):
        sources.load_dataset(config(path, on_long="error"), tokens)
    kept = sources.load_dataset(config(path, on_long="error", on_bad="skip"), tokens)
    assert len(kept.train) == 2 and kept.skipped.count == 1
    with pytest.raises(ValueError, match="needs the argument tokens"):
        sources.load_dataset(config(path, on_long="error"))


def test_an_empty_split_and_an_unknown_task_are_named(tmp_path: Path) -> None:
    path = write(tmp_path / "x.jsonl", [{**ROW, "split": "train"}])
    with pytest.raises(DataError, match="the test split is empty; .*data.splits"):
        sources.load_dataset(config(path))
    with pytest.raises(DataError, match="no record has the task nope"):
        sources.load_dataset(config(write(tmp_path / "y.jsonl", rows(4)), tasks=["nope"]))


def test_the_split_by_content_moves_no_other_record(tmp_path: Path) -> None:
    plain = [{"instruction": f"q{index}", "output": "yes"} for index in range(100)]
    whole = sources.load_dataset(config(write(tmp_path / "x.jsonl", plain)))
    fewer = sources.load_dataset(config(write(tmp_path / "y.jsonl", plain[1:])))
    assert {item.instruction for item in fewer.train} == {item.instruction for item in whole.train} - {"q0"}


def test_the_split_by_user_keeps_users_whole_and_moves_no_other(tmp_path: Path) -> None:
    plain = [{"instruction": f"q{index}", "output": "yes", "user": f"u{index % 600}"} for index in range(1200)]
    whole = sources.load_dataset(config(write(tmp_path / "x.jsonl", plain), split_by="user"))
    users = [{item.user for item in split} for split in (whole.train, whole.validation, whole.test)]
    assert sum(map(len, users)) == 600 and len(set.union(*users)) == 600 and 440 < len(users[0]) < 520
    fewer = [row for row in plain if row["user"] != "u0"]
    again = sources.load_dataset(config(write(tmp_path / "y.jsonl", fewer), split_by="user"))
    assert {item.user for item in again.train} == users[0] - {"u0"}


def test_splits_of_the_source_are_renamed_left_out_or_made_anew(tmp_path: Path) -> None:
    made = [{**ROW, "input": str(index), "split": name} for index in range(100) for name in ("learn", "dev", "secret")]
    path = write(tmp_path / "x.jsonl", made)
    data = sources.load_dataset(config(path, splits=["learn:train", "dev:test"]))
    assert (len(data.train), len(data.validation), len(data.test)) == (100, 0, 100)
    data = sources.load_dataset(config(path, splits=["learn:hash"]))
    assert len(data.train) + len(data.validation) + len(data.test) == 100 and data.validation and data.test


def test_the_fingerprint_follows_the_content(tmp_path: Path) -> None:
    one = sources.load_dataset(config(write(tmp_path / "a.jsonl", rows(6)))).fingerprint
    assert one == sources.load_dataset(config(write(tmp_path / "b.jsonl", rows(6)))).fingerprint
    changed = rows(6)
    changed[0] = {**ROW, "input": "other", "split": "test"}
    assert one != sources.load_dataset(config(write(tmp_path / "c.jsonl", changed))).fingerprint


def test_a_folder_and_a_pattern_are_read_file_by_file(tmp_path: Path) -> None:
    folder = tmp_path / "parts"
    folder.mkdir()
    unsplit = [{key: value for key, value in row.items() if key != "split"} for row in rows(6)]
    write(folder / "train.jsonl", unsplit[:4])
    write(folder / "test.jsonl.gz", unsplit[4:])
    (folder / "README.md").write_text("words")
    data = sources.load_dataset(config(folder))
    assert (len(data.train), len(data.test)) == (4, 2)
    pattern = config(f"{folder}/t*.jsonl*")
    assert sources.load_dataset(pattern).train == data.train
    before = run_id(pattern)
    write(folder / "test2.jsonl", unsplit[:1])
    assert run_id(pattern) != before
    with pytest.raises(DataError, match="README.md: not a kind of file that can be read; use .jsonl"):
        sources.load_dataset(config(folder / "README.md"))


def test_a_file_that_is_said_to_be_public_keeps_every_protection_that_has_a_key_of_its_own(tmp_path: Path) -> None:
    path = write(tmp_path / "x.jsonl", rows(4))
    assert not is_public(config(path).data) and is_public(Config().data)
    public, elsewhere = config(path, public=True), str(tmp_path / "elsewhere")
    assert is_public(public.data) and noise_mode(public) == "secure"
    assert not sources.load_dataset(public).public
    assert sources.load_dataset(public).fingerprint == sources.load_dataset(config(path)).fingerprint
    assert noise_mode(config(path, public=True, plain_hashes=True, diagnostics=True)) == "secure"
    assert sources.load_dataset(config(path, public=True, diagnostics=True)).public

    plain = config(path, public=True, plain_hashes=True)
    assert not sources.load_dataset(plain).public
    assert sources.load_dataset(plain).fingerprint != sources.load_dataset(public).fingerprint
    plain.compute.output_root = elsewhere
    assert run_id(plain) == run_id(config(path, public=True, plain_hashes=True)) and not Path(elsewhere).exists()
    public.compute.output_root = elsewhere
    assert run_id(public) != run_id(config(path, public=True))


def test_what_is_embedded_or_on_the_hub_is_public_where_everybody_can_look() -> None:
    hub = config("x", public=True)
    hub.data.path, hub.data.hub_id = None, "somebody/records"
    for made in (Config(), hub):
        assert noise_mode(made) == "reproducible" and is_open(made.data) and has_plain_hashes(made.data)
    hub.data.public = None
    assert noise_mode(hub) == "secure" and not is_open(hub.data) and not has_plain_hashes(hub.data)


examples = st.lists(st.integers(0, 50), max_size=80).map(
    lambda numbers: [Example(f"t{n % 3}", "do", f"text {n}", None, "yes", None, "train") for n in numbers]
)


@given(examples, st.integers(1, 30), st.randoms(use_true_random=False))
def test_which_records_are_kept_does_not_depend_on_their_order(found: list[Example], size: int, random: Any) -> None:
    def kept(offered: list[Example]) -> list[Example]:
        smallest = Smallest(size, 0)
        for example in offered:
            smallest.offer(example)
        return smallest.examples()

    other = random.sample(found, len(found))
    assert Counter(kept(found)) == Counter(kept(other)) and len(kept(found)) == min(size, len(found))
    places = iter(found)
    assert all(example in places for example in kept(found))  # in the order in which they came


@given(examples, st.integers(1, 60), st.none() | st.integers(1, 90))
def test_a_larger_share_holds_the_smaller_one(found: list[Example], size: int, count: int | None) -> None:
    smaller, larger = Share(size, 1, count), Share(size + 1, 1, count)
    for example in found:
        smaller.offer(example)
        larger.offer(example)
    few, many = iter(smaller.examples()), iter(larger.examples())
    assert all(example in many for example in few)


def test_a_share_has_the_stated_size_on_average_and_holds_no_more_while_it_reads() -> None:
    found = [Example("t", "do", f"text {number}", None, "yes", None, "train") for number in range(20_000)]
    counted, declared = Share(500, 0), Share(500, 0, 20_000)
    held = 0
    for example in found:
        counted.offer(example)
        declared.offer(example)
        held = max(held, len(counted.examples()))
    assert counted.examples() == declared.examples() and 440 < len(declared.examples()) < 560 and held < 600


@given(examples, st.none() | st.integers(3, 60))
def test_a_mixture_has_the_stated_proportions(found: list[Example], size: int | None) -> None:
    mixture = Mixture({"t0": 2.0, "t1": 1.0}, size, 0, None)
    # Ten of each, which differ, so that the numbers are near their averages.
    found = [
        replace(example, input=f"{example.input} {copy} {place}")
        for place, example in enumerate(found)
        if example.task != "t2"
        for copy in range(10)
    ]
    for example in found:
        mixture.offer(example)
    available = Counter(example.task for example in found)
    if not available["t0"] or not available["t1"]:
        with pytest.raises(ConfigError, match="no training record has the task t"):
            mixture.examples()
        return
    counts = Counter(example.task for example in mixture.examples())
    most = min(available["t0"] * 1.5, available["t1"] * 3, size or 10_000)
    for task, wanted in (("t0", most * 2 / 3), ("t1", most / 3)):
        assert abs(counts[task] - wanted) <= 6 * wanted**0.5 + 1
        assert counts[task] == available[task] or wanted < available[task]


def test_task_weights_change_training_only(tmp_path: Path) -> None:
    made = [{**row, "task": "abc"[index // 2 % 3]} for index, row in enumerate(rows(1200))]
    path = write(tmp_path / "x.jsonl", made)
    wanted = {"tasks": ["b", "a"], "task_weights": [1.0, 3.0], "declared_task_sizes": [200, 200]}
    data = sources.load_dataset(config(path, **wanted, train_size=100))
    found = Counter(item.task for item in data.train)
    assert 50 < found["a"] < 100 and 10 < found["b"] < 45 and len(found) == 2
    assert Counter(item.task for item in data.test) == {"a": 200, "b": 200}
    most = Counter(item.task for item in sources.load_dataset(config(path, **wanted)).train)
    assert most["a"] == 200 and 45 < most["b"] < 90
    counted = sources.load_dataset(config(path, **{**wanted, "declared_task_sizes": None}, public=True))
    assert Counter(item.task for item in counted.train) == most


def trees() -> list[dict[str, Any]]:
    made = []
    for tree in range(60):
        turns = [("prompter", None), ("assistant", 0), ("prompter", 1), ("assistant", 2), ("assistant", 0)]
        for turn, (role, parent) in enumerate(turns):
            made.append(
                {
                    "message_tree_id": f"m{tree}",
                    "message_id": f"m{tree}.{turn}",
                    "parent_id": None if parent is None else f"m{tree}.{parent}",
                    "role": role,
                    "text": f"{role} says {turn} in {tree}",
                    "lang": "en" if tree % 2 else "de",
                    "user_id": f"u{turn}-{tree % 20}",
                }
            )
    return made


def test_conversation_trees_become_pairs_with_the_user_of_the_reply(tmp_path: Path) -> None:
    columns = {"task": "lang", "user": "user_id", "id": "message_id"}
    wanted = config(
        write(tmp_path / "x.jsonl", trees()), columns=columns, layout="messages", split_by="user", tasks=["en"]
    )
    with pytest.raises(ConfigError, match="data.layout=messages: one message is in the examples of all of its replies"):
        sources.load_dataset(wanted)
    wanted.data.public = True
    data = sources.load_dataset(wanted)
    found = [*data.train, *data.validation, *data.test]
    assert len(found) == 30 * 3 and {item.task for item in found} == {"en"}
    one = next(item for item in found if item.output == "assistant says 3 in 1")
    assert one.instruction == "prompter says 2 in 1" and one.user == "u3-1"
    broken = [{**row, "parent_id": "gone"} if row["message_id"] == "m0.1" else row for row in trees()]
    with pytest.raises(DataError, match="line 2: field 'parent_id' names no message"):
        sources.load_dataset(
            config(write(tmp_path / "y.jsonl", broken), columns=columns, layout="messages", public=True)
        )
    with pytest.raises(DataError, match="line 1: field 'message_tree_id' is missing; data.layout=messages needs it"):
        sources.load_dataset(config(write(tmp_path / "z.jsonl", rows(4)), layout="messages", public=True))


def preset(name: str, *overrides: str) -> Config:
    from hydra import compose, initialize_config_dir

    from dptune.config.checks import strict
    from dptune.sweeps.expand import without_hydra

    with initialize_config_dir(str(ROOT / "conf"), version_base="1.3"):
        return strict(without_hydra(compose("config", [f"data={name}", *overrides])))


SAVED: dict[str, tuple[dict[str, Any], Example]] = {
    "dolly": (
        {"instruction": "say", "context": "c", "response": "yes", "category": "closed_qa"},
        Example("closed_qa", "say", "c", None, "yes", None, "train"),
    ),
    "alpaca": (
        {"instruction": "say", "input": "", "output": "yes", "text": "say ### yes"},
        Example("instructions", "say", "", None, "yes", None, "train"),
    ),
    "natural_instructions": (
        {"task_name": "task1", "id": "task1-a", "definition": "say", "inputs": "c", "targets": "yes"},
        Example("task1", "say", "c", None, "yes", None, "train"),
    ),
    "e2e_nlg": (
        {"meaning_representation": "name[Cocum]", "human_reference": "There is Cocum."},
        Example(
            "data2text/e2e",
            "Write a short restaurant description that states exactly the given facts.",
            "name[Cocum]",
            None,
            "There is Cocum.",
            None,
            "train",
        ),
    ),
    "glue_sst2": (
        {"sentence": "fine", "label": 1, "idx": 0},
        Example(
            "glue/sst2",
            "Classify the sentiment of the movie review excerpt. Answer with positive or negative.",
            "fine",
            ("negative", "positive"),
            "positive",
            None,
            "train",
        ),
    ),
    "glue_mnli": (
        {"premise": "a", "hypothesis": "b", "label": 2, "idx": 0},
        Example(
            "glue/mnli",
            "Does the first text entail the second, contradict it, or neither? "
            "Answer with entailment, neutral or contradiction.",
            "a\nb",
            ("entailment", "neutral", "contradiction"),
            "contradiction",
            None,
            "train",
        ),
    ),
}


@pytest.mark.parametrize("name", SAVED)
def test_a_preset_of_the_hub_reads_what_was_saved_to_disk(name: str, tmp_path: Path) -> None:
    """Rows with the fields that the data set has on the Hub, saved by its own library."""
    datasets = pytest.importorskip("datasets", reason="needs the extra hub: pip install 'dptune[hub]'")
    row, expected = SAVED[name]
    made = {split: datasets.Dataset.from_list([row] * 2) for split in ("train", "test", "validation")}
    if name == "glue_mnli":
        made["validation_matched"] = made["validation"]
    datasets.DatasetDict(made).save_to_disk(tmp_path / "saved")
    wanted = preset(name, f"data.path={tmp_path / 'saved'}", "hyperparameter.expected_batch_size=2")
    if wanted.data.splits == ["train:hash"]:
        wanted.data.splits = None
    data = sources.load_dataset(wanted)
    assert data.train == [expected] * 2 and len(data.test) == 2 and is_public(wanted.data)


def test_a_saved_data_set_of_one_split_is_split_here(tmp_path: Path) -> None:
    datasets = pytest.importorskip("datasets", reason="needs the extra hub: pip install 'dptune[hub]'")
    datasets.Dataset.from_list(trees()).save_to_disk(tmp_path / "saved")
    data = sources.load_dataset(preset("oasst1", f"data.path={tmp_path / 'saved'}"))
    users = [{item.user for item in split} for split in (data.train, data.test)]
    assert users[0] and users[1] and not users[0] & users[1]
    (tmp_path / "saved" / "state.json").write_text("{}")
    with pytest.raises(DataError, match="is no folder of save_to_disk"):
        sources.load_dataset(preset("oasst1", f"data.path={tmp_path / 'saved'}"))


def test_a_name_of_the_hub_without_network_is_one_line(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    pytest.importorskip("datasets", reason="needs the extra hub: pip install 'dptune[hub]'")
    monkeypatch.setattr("datasets.config.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path)
    with pytest.raises(DataError, match="data.hub_id=databricks/databricks-dolly-15k cannot be read from the Hub") as e:
        sources.load_dataset(preset("dolly"))
    assert "\n" not in str(e.value) and "save_to_disk" in str(e.value)


@pytest.mark.parametrize(("package", "name"), [("datasets", "dolly"), ("pyarrow", "files")])
def test_a_missing_package_is_named_with_its_extra(
    package: str, name: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    (tmp_path / "x.parquet").write_bytes(b"PAR1")
    monkeypatch.setitem(sys.modules, package, None)
    extra = [f"data.path={tmp_path / 'x.parquet'}"] if name == "files" else []
    with pytest.raises(ConfigError, match=r"needs the extra `hub`: pip install 'dptune\[hub\]'"):
        sources.load_dataset(preset(name, *extra))


MEASURE = """
import sys, tracemalloc
from dptune.config.schema import Config
from dptune.data import sources
config = Config()
config.data.name, config.data.path = "files", sys.argv[1]
config.data.train_size = config.data.validation_size = config.data.test_size = 100
config.data.declared_size = 16_000
config.compute.output_root = sys.argv[2]
arrow = None
if config.data.path.endswith(".parquet"):
    import pyarrow as arrow, pyarrow.parquet
tracemalloc.start()
data = sources.load_dataset(config)
assert 60 < len(data.train) < 140 and len(data.test) == 100 and "torch" not in sys.modules
print(tracemalloc.get_traced_memory()[1] + (arrow.default_memory_pool().max_memory() if arrow else 0))
"""


@pytest.mark.parametrize("kind", ["jsonl", "json", "csv", "parquet"])
def test_reading_does_not_take_the_memory_of_the_file(kind: str, tmp_path: Path) -> None:
    """The peak of a file of tens of megabytes, of which 300 records are kept, is a small part of it."""
    count, path = 20_000, tmp_path / f"large.{kind}"

    def made() -> Any:
        for index in range(count):
            yield {"instruction": "repeat it", "input": f"{index} " + f"{index:06}" * 160, "output": "yes"}

    if kind == "parquet":
        pyarrow = pytest.importorskip("pyarrow", reason="needs the extra hub: pip install 'dptune[hub]'")
        from pyarrow import parquet

        table = pyarrow.Table.from_pylist(list(made()))
        parquet.write_table(table, path, row_group_size=500, compression="none", use_dictionary=False)
    else:
        with path.open("w") as stream:
            if kind == "csv":
                stream.write("instruction,input,output\n")
            for index, row in enumerate(made()):
                match kind:
                    case "csv":
                        stream.write(",".join(row.values()) + "\n")
                    case "json":
                        stream.write(("[" if index == 0 else ",\n") + json.dumps(row))
                    case _:
                        stream.write(json.dumps(row) + "\n")
            stream.write("]" if kind == "json" else "")
    assert path.stat().st_size > 18_000_000
    command = [sys.executable, "-c", MEASURE, str(path), str(tmp_path / "outputs")]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert int(done.stdout) < 6_000_000


REAL = Path(__file__).parents[3] / "shared" / "data"

# The data is not part of the repository: its licences differ and it is large.
real = pytest.mark.skipif(not REAL.is_dir(), reason="needs the shared data: a folder shared/data beside the repository")


@real
@pytest.mark.parametrize(
    ("name", "train", "with_options", "with_users"),
    [
        ("sentiment_sst2", 30000, True, False),
        ("bigbench_mc", 36312, True, False),
        ("data2text_e2e", 7268, False, False),
        ("irc_users", 33629, True, True),
        ("sgd_dialogues", 12230, True, True),
    ],
)
def test_real_instruction_files_load(
    name: str, train: int, with_options: bool, with_users: bool, tmp_path: Path
) -> None:
    wanted = config(REAL / f"{name}.jsonl.gz")
    wanted.compute.output_root = str(tmp_path)
    if with_users:
        wanted.privacy.unit = "user_els"  # so that a user in two splits would be found
    data = sources.load_dataset(wanted)
    assert len(data.train) == train and data.validation and data.test and data.skipped.count == 0
    assert any(item.options for item in data.train) == with_options
    assert all(item.user for item in data.train) == with_users
    assert all(item.output in item.options for item in data.train if item.options)


@real
@pytest.mark.parametrize(
    ("name", "file", "train", "options"),
    [
        ("sst2", "sentiment_sst2", 30000, 2),
        ("intent", "bigbench_mc", 564, 7),
        ("sgd_domain", "sgd_dialogues", 7266, 19),
        ("e2e", "data2text_e2e", 7268, 0),
        ("irc", "irc_users", 33629, 2),
    ],
)
def test_presets_lack_nothing_but_the_path(name: str, file: str, train: int, options: int, tmp_path: Path) -> None:
    data = sources.load_dataset(preset(name, f"data.path={REAL / file}.jsonl.gz", f"compute.output_root={tmp_path}"))
    assert len(data.train) == train and max(len(item.options or ()) for item in data.train) == options


@real
def test_a_real_mixture_of_free_form_and_options_has_the_stated_weights(tmp_path: Path) -> None:
    wanted = preset(
        "irc",
        f"data.path={REAL / 'irc_users.jsonl.gz'}",
        f"compute.output_root={tmp_path}",
        "data.train_size=4000",
        "data.task_weights=[1,3]",
        "data.public=true",
    )
    found = Counter((item.task, item.options is None) for item in sources.load_dataset(wanted).train)
    assert 850 < found["irc/conversation_start", False] < 1150 and 2750 < found["irc/support_reply", True] < 3250

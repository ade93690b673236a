"""The stability map: complete, and no larger on random data with one record or user more than it says."""

import ast
import csv
import json
import math
import unicodedata
from collections import Counter
from collections.abc import Callable
from copy import deepcopy
from itertools import chain
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st

from dptune.config.checks import with_values
from dptune.config.schema import Config, ConfigError, DataConfig
from dptune.data import sources
from dptune.data.mapping import user_name
from dptune.data.readers import DataError, Fault, parts
from dptune.data.sources import Dataset, load_dataset, public_examples, words_of
from dptune.data.stability import STABILITY, declared_units, stability_of
from dptune.privacy.plan import PlanError
from dptune.privacy.sampling import rows_by_user
from dptune.privacy.streams import KeyRing
from dptune.runs.privacy import make_plan

DATA = Path(sources.__file__).parent

# What a batch or a token is comes after the training split; the map itself and the bare record do nothing to records.
AFTERWARDS = {"batches", "encoding", "stability", "schema", "__init__"}


def test_everything_that_is_done_to_records_is_in_the_map() -> None:
    defined = {
        f"{path.stem}.{node.name}"
        for path in DATA.glob("*.py")
        if path.stem not in AFTERWARDS
        for node in ast.parse(path.read_text(encoding="utf-8")).body
        if isinstance(node, ast.FunctionDef | ast.ClassDef)
    }
    assert {name for rule in STABILITY.values() for name in rule.functions} == defined


def test_what_has_no_bound_says_the_way_out_in_one_line() -> None:
    for rule in STABILITY.values():
        unbounded = math.isinf(rule.records) or math.isinf(rule.users)
        assert bool(rule.way_out) == unbounded and "\n" not in rule.way_out


def private(path: Path, **values: Any) -> Config:
    """A private run on a file, with fields of the config by their dotted names."""
    made = Config()
    made.data.name, made.data.path = "files", str(path)
    made.data.train_size = made.data.validation_size = made.data.test_size = None
    made.hyperparameter.expected_batch_size = 1
    made.compute.output_root = str(path.parent / "outputs")
    return with_values(made, [(name.replace("__", "."), value) for name, value in values.items()])


TASKS = ["a", "b", "c"]
TREES = {"data__layout": "trees", "data__examples_per_record": 2, "data__columns__user": "message_tree_id"}
CASES: dict[str, tuple[dict[str, Any], str]] = {
    # How the map's row is asked for, and the kind of file that it is measured on.
    "reading": ({}, ".jsonl"),
    "layout=conversations": ({"data__layout": "conversations"}, ".jsonl"),
    "layout=trees, instances": (TREES, ".jsonl"),
    "columns, split by a hash": ({"data__split_by": "user"}, ".csv"),
    "bad and long records": ({"data__on_bad": "skip", "data__split_by": "user"}, ".jsonl"),
    "putting together": ({"data__on_bad": "skip"}, ".json"),
    "validation_size, test_size": ({"data__validation_size": 2, "data__test_size": 3}, ".jsonl"),
    "train_size": ({"data__train_size": 8, "data__declared_size": 20}, ".jsonl"),
    "task_weights": (
        {
            "data__train_size": 12,
            "data__tasks": TASKS,
            "data__task_weights": [3.0, 1.0, 2.0],
            "data__declared_task_sizes": [9, 9, 9],
        },
        ".jsonl",
    ),
    "task_imbalance": ({"data_sensitivity__task_imbalance": 6.0, "data__tasks": TASKS}, ".jsonl"),
    "class_imbalance": ({"data_sensitivity__class_imbalance": 6.0}, ".csv"),
    "user_tail": ({"data_sensitivity__user_tail": 1.0}, ".jsonl"),
    "train_fraction": ({"data_sensitivity__train_fraction": 0.5}, ".jsonl"),
    "label_noise": ({"data_sensitivity__label_noise": 0.5}, ".jsonl"),
    "instruction_perturbation": ({"data_sensitivity__instruction_perturbation": 0.5}, ".jsonl"),
    "duplicates": ({"data_sensitivity__duplicates": 0.5}, ".jsonl"),
    "conditions of the test split": (
        {
            "data_sensitivity__unseen_instructions": 0.5,
            "data_sensitivity__test_class_shift": 4.0,
            "data_sensitivity__test_distraction": 0.5,
        },
        ".jsonl",
    ),
}
FORMATS: dict[str, tuple[dict[str, Any], str]] = {
    # What else is measured: each way to write records, and each layout.
    **{f"reading {kind}": ({}, kind) for kind in (".ndjson", ".csv", ".tsv", ".parquet", ".json")},
    **{
        f"reading {kind}": ({}, kind)
        for kind in ("columns.json", "split.json", "lists.json", "one object.json", "splits.json", "folder")
    },
    "instances": ({"data__layout": "instances", "data__examples_per_record": 3}, ".jsonl"),
    "conversations that are seen": ({}, ".jsonl"),
}
ELSEWHERE = {
    "making up the support desk": "its records are nobody's",
    "prompts": "a text of one record",
    "layout=articles": "test_what_has_no_bound_is_refused_for_private_data",
    "layout=messages": "test_one_conversation_changes_its_own_examples_only",
    "train_size, size unknown": "test_what_has_no_bound_is_refused_for_private_data",
    "task_weights, sizes unknown": "test_what_has_no_bound_is_refused_for_private_data",
    "task_imbalance, tasks unknown": "test_what_has_no_bound_is_refused_for_private_data",
}


def test_every_row_of_the_map_is_measured() -> None:
    assert CASES.keys() | ELSEWHERE.keys() == STABILITY.keys() and not CASES.keys() & ELSEWHERE.keys()
    for name, (values, _) in CASES.items():
        assert STABILITY[name].applies(private(DATA, **values)), name


# Few texts, so that records are alike, and users whose names can be written in two ways.
record = st.fixed_dictionaries(
    {
        "task": st.sampled_from(TASKS),
        "instruction": st.sampled_from(["which one ?", "do it", ""]),
        "input": st.integers(0, 5).map(lambda number: f"text {number}") | st.just('a "quote,\nand a line'),
        "options": st.just(["yes", "no", "why"]),
        "output": st.sampled_from(["yes", "no", "why", "other"]),
        "user": st.sampled_from(["7", 7, 7.0, "Zoé", unicodedata.normalize("NFD", "Zoé"), "b ", "c"]),
    }
)
conversation = st.fixed_dictionaries(
    {
        "user": st.sampled_from(["7", 7, "Zoé"]),
        "messages": st.lists(st.sampled_from(["hi", "why ?", "no"]), min_size=2, max_size=7).map(
            lambda said: [{"role": ["user", "assistant"][at % 2], "content": text} for at, text in enumerate(said)]
        ),
    }
)
replies = st.recursive(
    st.just([]),
    lambda more: st.lists(st.fixed_dictionaries({"text": st.sampled_from("abc"), "replies": more}), max_size=3),
    max_leaves=6,
)
tree = st.fixed_dictionaries(
    {
        "message_tree_id": st.sampled_from(["7", 7, "Zoé"]),
        "prompt": st.fixed_dictionaries(
            {
                "text": st.sampled_from(["hi", "why ?"]),
                "replies": st.lists(
                    st.fixed_dictionaries({"text": st.sampled_from("abc"), "replies": replies}), min_size=1, max_size=3
                ),
            }
        ).map(lambda prompt: by_turns(prompt, "prompter")),
    }
)
instance = st.fixed_dictionaries(
    {
        "Definition": st.just(["say it"]),
        "input": st.integers(0, 5).map(str),
        "output": st.lists(st.sampled_from("abcd"), min_size=1, max_size=5, unique=True),
        "user": st.sampled_from(["7", 7, "Zoé"]),
    }
)
article = st.fixed_dictionaries(
    {
        "title": st.sampled_from(["7", 7, "Zoé"]),
        "paragraphs": st.lists(
            st.fixed_dictionaries(
                {
                    "context": st.sampled_from("abc"),
                    "qas": st.lists(
                        st.just({"question": "what ?", "answers": [{"text": "a"}]})
                        | st.just({"question": "why ?", "answers": []}),
                        max_size=3,
                    ),
                }
            ),
            max_size=3,
        ),
    }
)


def by_turns(message: dict[str, Any], role: str) -> dict[str, Any]:
    """The same message with its role, and those of its replies."""
    other = "assistant" if role == "prompter" else "prompter"
    return {**message, "role": role, "replies": [by_turns(reply, other) for reply in message["replies"]]}


good = record.filter(lambda row: row["instruction"] != "" and row["output"] != "other")


def drawn(name: str, values: dict[str, Any], kind: str) -> st.SearchStrategy[dict[str, Any]]:
    """Rows that a case is measured on."""
    layouts = {"conversations": conversation, "trees": tree, "instances": instance, "articles": article}
    if name == "conversations that are seen":
        return conversation
    if (layout := values.get("data__layout")) in layouts:
        return layouts[layout]
    if kind in (".tsv", ".parquet"):  # Of tables, each column has one type; a user of a text file is text.
        return good.map(lambda row: {**row, "user": str(row["user"])})
    return record if values.get("data__on_bad") == "skip" else good


NAMES = ["task", "instruction", "input", "options", "output", "user"]
ONE_OBJECT: dict[str, Callable[[list[dict[str, Any]]], Any]] = {
    "columns.json": lambda rows: {name: {str(at): row[name] for at, row in enumerate(rows)} for name in NAMES},
    "split.json": lambda rows: {"columns": NAMES, "data": [[row[name] for name in NAMES] for row in rows]},
    "lists.json": lambda rows: {name: [row[name] for row in rows] for name in NAMES},
    "one object.json": lambda rows: {"version": 1, "data": rows},
    "splits.json": lambda rows: {
        "train": [row for row in rows if user_name(row["user"]) != "c"],
        "dev": [row for row in rows if user_name(row["user"]) == "c"],
    },
}


def write(path: Path, rows: list[dict[str, Any]]) -> Path:
    if path.suffix in (".csv", ".tsv"):
        with path.open("w", encoding="utf-8", newline="") as stream:
            writer = csv.DictWriter(stream, NAMES, delimiter="\t" if path.suffix == ".tsv" else ",")
            writer.writeheader()
            writer.writerows({**row, "options": json.dumps(row["options"])} for row in rows)
    elif path.suffix == ".parquet":
        pyarrow = pytest.importorskip("pyarrow", reason="needs the extra hub: pip install 'dptune[hub]'")
        from pyarrow import parquet

        fields = [(name, pyarrow.list_(pyarrow.string()) if name == "options" else pyarrow.string()) for name in NAMES]
        parquet.write_table(pyarrow.Table.from_pylist(rows, pyarrow.schema(fields)), path)
    elif path.name.removeprefix("rows") in ONE_OBJECT:
        path.write_text(json.dumps(ONE_OBJECT[path.name.removeprefix("rows")](rows)))
    elif path.name == "rowsfolder":
        path.mkdir(exist_ok=True)
        write(path / "train-00000-of-00001.jsonl", rows)
        write(path / "dev.jsonl", [])
        write(path / "test.jsonl", [])
    elif path.suffix == ".json":
        path.write_text(json.dumps(rows))
    else:
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.fixture(autouse=True)
def with_a_test_record(monkeypatch: pytest.MonkeyPatch) -> None:
    """A split that is empty is an error: data that random rows leave empty is no counterexample."""
    monkeypatch.setattr(sources, "_mapped", _never_empty(sources._mapped))
    monkeypatch.setattr(sources, "FILES", sources.Source(sources._mapped))


def _never_empty(mapped: Callable[..., Any]) -> Callable[..., Any]:
    def more(data: Any, seen: Any) -> Any:
        yield from mapped(data, seen)
        for split in ("train", "test"):
            for task in TASKS:
                for number in range(4):
                    yield (
                        "",
                        sources.Example(
                            task, "fixed", f"{split} {number}", ("yes", "no"), "yes", f"of {split} {number}", split
                        ),
                    )

    return more


def difference(one: list[Any], two: list[Any]) -> Counter[Any]:
    """Rows of one list that are not in the other one, with their numbers."""
    return (Counter(one) - Counter(two)) + (Counter(two) - Counter(one))


def loaded(folder: Path, kind: str, rows: list[dict[str, Any]], values: dict[str, Any]) -> Dataset:
    try:
        return load_dataset(private(write(folder / f"rows{kind}", rows), **values))
    except DataError:
        assume(False)
        raise


MEASURED = CASES | FORMATS


@pytest.mark.parametrize("name", MEASURED)
@settings(max_examples=30, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.data())
def test_one_record_more_changes_no_more_rows_than_the_map_says(name: str, tmp_path: Path, data: Any) -> None:
    values, kind = MEASURED[name]
    one = drawn(name, values, kind)
    rows, new = data.draw(st.lists(one, max_size=25)), data.draw(one)
    before = loaded(tmp_path, kind, rows, values)
    place = data.draw(st.integers(0, len(rows)))
    after = loaded(tmp_path, kind, [*rows[:place], new, *rows[place:]], values)
    bound = stability_of(private(tmp_path, **values)).records
    assert difference(before.train, after.train).total() <= bound
    for split in ("validation", "test"):
        held_out = max(rule.held_out for rule in STABILITY.values() if rule.applies(private(tmp_path, **values)))
        assert difference(getattr(before, split), getattr(after, split)).total() <= max(held_out, bound)


ARTICLES = {"data__layout": "articles", "data__columns__user": "title"}


@pytest.mark.parametrize("name", [*MEASURED, "articles"])
@settings(max_examples=15, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.data())
def test_one_user_more_changes_rows_of_that_user_only(name: str, tmp_path: Path, data: Any) -> None:
    values, kind = MEASURED.get(name, (ARTICLES, ".jsonl"))
    one = drawn(name, {key: value for key, value in values.items() if key != "data__on_bad"}, kind)
    values = {**values, "data__split_by": "user", "privacy__unit": "user_els", "privacy__examples_per_user": 2}
    field = values.get("data__columns__user", "user")
    rows = data.draw(st.lists(one, max_size=25))
    gone = user_name(data.draw(one)[field])
    before = loaded(tmp_path, kind, rows, values)
    after = loaded(tmp_path, kind, [row for row in rows if user_name(row[field]) != gone], values)
    assert {example.user for example in difference(before.train, after.train)} <= {gone}
    assert gone not in {example.user for example in after.train}
    assert stability_of(private(tmp_path, **values)).users == 1


@settings(max_examples=200)
@given(st.lists(st.text('ab"\t', max_size=6), max_size=12), st.text('ab"\t', max_size=6), st.data())
def test_a_line_more_of_a_file_with_tabs_is_a_row_more_or_stops_the_run(
    tmp_path_factory: pytest.TempPathFactory, lines: list[str], new: str, data: Any
) -> None:
    path = tmp_path_factory.getbasetemp() / "lines.tsv"

    def rows(lines: list[str]) -> Counter[str]:
        path.write_text("".join(f"{line}\n" for line in ("x\ty", *lines)))
        (part,) = parts(DataConfig(name="files", path=str(path), on_bad="skip"))
        items = list(part.items)
        assume(not any(isinstance(item, Fault) and item.stops for item in items))
        return Counter(json.dumps(item[1]) for item in items if not isinstance(item, Fault))

    place = data.draw(st.integers(0, len(lines)))
    before, after = rows(lines), rows([*lines[:place], new, *lines[place:]])
    assert (after - before).total() <= 1 and not before - after


def test_the_measure_finds_a_choice_by_place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The test above can fail: the rule that once was, of a record's place, differs in nearly every row."""
    rows = [{"instruction": f"q{number}", "output": "yes", "split": "train"} for number in range(200)]
    monkeypatch.setattr("dptune.data.conditions.content", lambda example: ())
    monkeypatch.setattr("dptune.data.conditions.repr", lambda value: "", raising=False)
    values = {"data_sensitivity__train_fraction": 0.5}
    whole, fewer = loaded(tmp_path, ".jsonl", rows, values), loaded(tmp_path, ".jsonl", rows[1:], values)
    assert difference(whole.train, fewer.train).total() > 50


def messages(tree: int, replies: int) -> list[dict[str, Any]]:
    told = {"message_tree_id": f"m{tree}", "lang": "en"}
    first = {**told, "message_id": f"{tree}", "parent_id": None, "role": "prompter", "text": f"asks {tree}"}
    return [
        {**first, "user": "asker"},
        *(
            {**told, "message_id": f"{tree}.{reply}", "parent_id": f"{tree}", "role": "assistant", "text": f"{reply}"}
            | {"user": f"u{reply}"}
            for reply in range(replies)
        ),
    ]


CONVERSATION = {
    "data__layout": "messages",
    "data__columns__user": "message_tree_id",
    "data__split_by": "user",
    "privacy__unit": "user_els",
    "privacy__examples_per_user": 2,
}


def test_one_conversation_changes_its_own_examples_only(tmp_path: Path) -> None:
    rows = [messages(tree, 1 + tree % 4) for tree in range(40)]
    whole = loaded(tmp_path, ".jsonl", [*chain(*rows)], CONVERSATION)
    for gone in range(40):
        fewer = loaded(tmp_path, ".jsonl", [*chain(*rows[:gone], *rows[gone + 1 :])], CONVERSATION)
        assert {example.user for example in difference(whole.train, fewer.train)} <= {f"m{gone}"}


def test_words_of_another_user_are_in_no_example_of_a_user_unit(tmp_path: Path) -> None:
    path = write(tmp_path / "rows.jsonl", messages(0, 3))
    with pytest.raises(ConfigError, match="the words of two users.*set data.columns.user=message_tree_id"):
        private(path, **{**CONVERSATION, "data__columns__user": "user"})


UNBOUNDED: list[tuple[dict[str, Any], str]] = [
    ({"data__train_size": 4}, "data.declared_size=... or .*data.train_size=null|data.declared_size="),
    ({"data__tasks": TASKS, "data__task_weights": [1.0, 1.0, 2.0]}, r"data.declared_task_sizes=\[...\]"),
    ({"data_sensitivity__task_imbalance": 2.0}, r"data.tasks=\[...\]"),
    ({"data__layout": "messages"}, "privacy=user_els data.columns.user=message_tree_id"),
    ({}, "privacy=user_els data.columns.user=message_tree_id"),  # Seen to be messages.
    ({"data__layout": "articles"}, "privacy=user_els data.columns.user=title"),
]


@pytest.mark.parametrize(("values", "way_out"), UNBOUNDED)
def test_what_has_no_bound_is_refused_for_private_data(values: dict[str, Any], way_out: str, tmp_path: Path) -> None:
    path = write(tmp_path / "rows.jsonl", messages(0, 3))
    with pytest.raises(ConfigError, match=way_out) as caught:
        load_dataset(private(path, **values))
    assert "\n" not in str(caught.value)
    stability_of(private(path, **values, data__public=True), "messages")
    free = {"privacy__enabled": False, "privacy__target_epsilon": None}
    stability_of(private(path, **values, **free))


def test_several_examples_of_a_record_cost_as_many_and_have_no_score(tmp_path: Path) -> None:
    rows = [{"Definition": "say", "input": f"{at}", "output": ["a", "b", "c"]} for at in range(200)]
    path = write(tmp_path / "rows.jsonl", rows)
    plans = []
    for most in (1, 2):
        wanted = private(path, data__examples_per_record=most, hyperparameter__steps=20, privacy__delta=1e-3)
        plans.append(make_plan(wanted, load_dataset(wanted)))
    assert [plan.rows_per_record for plan in plans] == [1, 2]
    assert {event.group_size for event in plans[1].events()} == {2}
    scored = private(path, data__examples_per_record=2, privacy__score_noise_multiplier=50.0)
    with pytest.raises(ConfigError, match="data.examples_per_record=2: one record would move the score.*set it to 1"):
        load_dataset(scored)


SKIPPED = [
    (
        "a.csv",
        'instruction,output,split\nq1,yes,train\n"q2,yes,train\nq3,yes,train\nq4",yes\nq5,yes,train\nq6,yes,test\n',
        "line 5 ends a quoted field that begins in line 3",
    ),
    # As many fields as the header has: only the lines tell that a row has swallowed others.
    ("a.csv", 'instruction,output\nq1,"yes\nq2,yes\nq3,yes\nno"\nq4,yes\n', "line 5 ends a quoted field"),
    ("a.csv", 'instruction,output\nq1,yes\n"q2,yes\nq3,yes\n', "unexpected end of data"),
    ("a.json", '[{"instruction": "q", "output": "yes"}, {"instr', "not readable after it"),
]


@pytest.mark.parametrize(("name", "text", "message"), SKIPPED)
def test_a_fault_that_swallows_other_records_is_not_skipped(name: str, text: str, message: str, tmp_path: Path) -> None:
    (tmp_path / name).write_text(text)
    with pytest.raises(DataError, match=message) as caught:
        load_dataset(private(tmp_path / name, data__on_bad="skip"))
    assert "\n" not in str(caught.value) and "on_bad=skip cannot leave that out" in str(caught.value)


def test_a_message_without_the_one_that_it_answers_is_not_skipped(tmp_path: Path) -> None:
    rows = [*messages(0, 2)[1:], *messages(1, 2)]
    with pytest.raises(DataError, match="field 'parent_id' names no message.*on_bad=skip cannot leave that out"):
        load_dataset(private(write(tmp_path / "rows.jsonl", rows), **CONVERSATION, data__on_bad="skip"))


def test_a_user_in_two_splits_is_not_skipped(tmp_path: Path) -> None:
    rows = [
        {"instruction": f"q{number}", "output": "yes", "user": "a", "split": "train" if number else "test"}
        for number in range(9)
    ]
    with pytest.raises(DataError, match="the same user is in test and in train.*cannot leave that out"):
        load_dataset(private(write(tmp_path / "rows.jsonl", rows), data__split_by="user", data__on_bad="skip"))


@pytest.mark.parametrize(
    ("spellings", "name"),
    [
        ([7, 7.0, "7", "7.0", "7.00", " 7 ", "７"], "7"),
        (["Zoé", unicodedata.normalize("NFD", "Zoé"), " Zoé\u200b"], "Zoé"),
        ([0, -0.0, "0", "-0"], "0"),
        ([1e16, 10**16, "10000000000000000"], "10000000000000000"),
        (["007"], "007"),
        ([7.5, "7.5"], "7.5"),
        (["a b", "a\u00a0b", "a  b"], "a b"),
        ([None, math.nan, math.inf, "", " ", "\u200b", "nan", "NaN", "None", "null", "<NA>"], None),
    ],
)
def test_a_user_has_one_name_however_it_is_written(spellings: list[Any], name: str | None) -> None:
    assert {user_name(spelling) for spelling in spellings} == {name}


def test_a_user_of_several_fields_has_one_name_too(tmp_path: Path) -> None:
    rows = [
        {"instruction": "q", "output": "yes", "split": "train", "a": a, "b": b}
        for a, b in [(7, "x"), (7.0, "x "), ("7", "x"), (math.nan, "x"), (7, "")]
    ]
    wanted = private(write(tmp_path / "rows.jsonl", rows), data__columns__user="={a}/{b}")
    users = Counter(example.user for example in load_dataset(wanted).train if example.instruction == "q")
    assert users == {"7/x": 3, None: 2}


@given(st.text(max_size=8) | st.integers() | st.floats() | st.none() | st.booleans())
def test_the_name_of_a_user_is_its_own_name(value: Any) -> None:
    name = user_name(value)
    assert name is None or (user_name(name) == name and rows_by_user([name]).keys() == {name})


@pytest.mark.parametrize("user", [7.0, unicodedata.normalize("NFD", "Zoé")])
def test_the_plan_refuses_users_that_could_be_written_otherwise(user: Any) -> None:
    with pytest.raises(PlanError, match="can be written in other ways too"):
        rows_by_user([user, "b"])


def test_records_without_a_user_are_not_one_user(tmp_path: Path) -> None:
    rows = [{"instruction": f"q{number}", "output": "yes", "user": math.nan, "split": "train"} for number in range(40)]
    wanted = private(
        write(tmp_path / "rows.jsonl", rows),
        privacy__unit="user_uls",
        privacy__examples_per_user=2,
        privacy__delta=1e-3,
    )
    with pytest.raises(ConfigError, match="needs the author of every training record"):
        make_plan(wanted, load_dataset(wanted))


def test_a_record_that_is_written_twice_is_accounted_twice(tmp_path: Path) -> None:
    rows = [{"instruction": f"q{number}", "output": "yes", "split": "train"} for number in range(300)]
    path = write(tmp_path / "rows.jsonl", rows)
    fixed = {"privacy__target_epsilon": None, "privacy__noise_multiplier": 1.0, "hyperparameter__steps": 20}
    fixed |= {"hyperparameter__expected_batch_size": 60}
    plain, doubled = (
        make_plan(wanted, load_dataset(wanted))
        for wanted in (private(path, **fixed), private(path, **fixed, data_sensitivity__duplicates=0.5))
    )
    assert (plain.rows_per_record, doubled.rows_per_record) == (1, 2)
    assert {event.group_size for event in doubled.events()} == {2} and doubled.epsilon() > 1.5 * plain.epsilon()
    assert type(doubled).from_dict(doubled.to_dict()) == doubled and "rows_per_record" not in plain.to_dict()
    users = {"privacy__unit": "user_els", "privacy__examples_per_user": 3, "data__columns__user": "instruction"}
    capped = private(path, **fixed, **users, data_sensitivity__duplicates=0.5)
    assert {event.group_size for event in make_plan(capped, load_dataset(capped)).events()} == {3}


def test_a_declared_size_is_the_plan_s_whatever_the_file_holds(tmp_path: Path) -> None:
    rows = [{"instruction": f"q{number}", "output": "yes", "split": "train"} for number in range(300)]
    plans = []
    for count in (300, 299):
        wanted = private(write(tmp_path / "rows.jsonl", rows[:count]), data__declared_size=320, data__train_size=160)
        data = load_dataset(wanted)
        assert stability_of(wanted).size == "declared" and declared_units(wanted) == 160
        plans.append(make_plan(wanted, data))
        assert plans[-1].sampler(KeyRing.secure("x"), users=[None] * len(data.train)).sample_rate == 1 / 160
    assert plans[0] == plans[1] and plans[0].num_units == 160
    counted = private(tmp_path / "rows.jsonl")
    assert stability_of(counted).size == "public" and make_plan(counted, load_dataset(counted)).num_units == 311


def test_public_gradients_do_not_come_from_the_protected_records() -> None:
    wanted = Config()
    wanted.privacy.projection = "public"
    wanted.data.train_size = wanted.data.test_size = wanted.data.validation_size = 200
    assert len(public_examples(wanted, load_dataset(wanted))) == 200
    with pytest.raises(ConfigError, match="data.organisation=dev protects"):
        with_values(wanted, [("data.organisation", "dev")])
    same = deepcopy(wanted)
    same.data.organisation = "dev"
    same.data_sensitivity.instruction_perturbation = 1.0
    with pytest.raises(ConfigError, match="shares records with data=supportdesk") as caught:
        public_examples(same, load_dataset(same))
    assert not any(letter.isdigit() for letter in str(caught.value))


def test_a_record_is_known_however_it_is_spelled_or_answered() -> None:
    plain = sources.Example("t", "Say it:", "zoé is here", None, "yes", None, "train")
    other = sources.Example("s", "say  it", unicodedata.normalize("NFD", "ZOÉ is\there."), None, "no", "u", "train")
    assert words_of(plain) == words_of(other) != words_of(sources.Example("t", "say", "so", None, "yes", None, "train"))

"""What a row is: which layout files are seen to have, and what becomes of their rows."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hydra import compose, initialize_config_dir

from dptune.config.checks import strict
from dptune.config.schema import Config, DataConfig
from dptune.data.layouts import Seen
from dptune.data.readers import Fault
from dptune.data.schema import Example
from dptune.data.sources import FILES
from dptune.sweeps.expand import without_hydra
from dptune.sweeps.jobs import ROOT

# A record of each format, as its makers publish it.
OPENAI = {
    "messages": [
        {"role": "system", "content": "Marv is a factual chatbot that is also sarcastic."},
        {"role": "user", "content": "What's the biggest city in France?"},
        {"role": "assistant", "content": "Paris", "weight": 0},
        {"role": "user", "content": "Can you be more sarcastic?"},
        {"role": "assistant", "content": "Paris, as if everyone doesn't know that already.", "weight": 1},
    ]
}
SHAREGPT = {
    "id": "identity_0",
    "conversations": [
        {"from": "human", "value": "Who are you?"},
        {"from": "gpt", "value": "I am Vicuna, a language model."},
        {"from": "human", "value": "Have a nice day!"},
        {"from": "gpt", "value": "You too!"},
    ],
}
CAPITALS = {
    "Contributors": ["Ravsehaj Singh Puri"],
    "Categories": ["Answer Generation", "Fact Based"],
    "Definition": "In this task, you are given a country and you need to return the capital city of the given country",
    "Positive Examples": [{"input": "India", "output": "New Delhi", "explanation": "New Delhi is the capital city"}],
    "Negative Examples": [],
    "Instances": [{"input": "Afghanistan", "output": ["Kabul"]}, {"input": "Belgium", "output": ["Bruxelles"]}],
}
TREE = {
    "message_tree_id": "14fbb664-a620-45ce-bee4-7c519b16a793",
    "tree_state": "ready_for_export",
    "prompt": {
        "message_id": "14fbb664-a620-45ce-bee4-7c519b16a793",
        "text": "Why can't we divide by 0?",
        "role": "prompter",
        "lang": "en",
        "replies": [
            {
                "message_id": "894d30b6-56b4-4605-a504-89dd15d4d1c8",
                "text": "The reason we cannot divide by zero is because",
                "role": "assistant",
                "lang": "en",
                "replies": [
                    {
                        "message_id": "1c9210e9-af9e-4507-abc5-3b3c7bca4dce",
                        "text": "Can you explain why we created a definition",
                        "role": "prompter",
                        "lang": "en",
                        "replies": [
                            {
                                "message_id": "534c7711-afb5-4410-9006-489dc885280e",
                                "text": "The historical origin of the imaginary",
                                "role": "assistant",
                                "lang": "en",
                                "replies": [],
                            }
                        ],
                    }
                ],
            }
        ],
    },
}
QUESTION = "To whom did the Virgin Mary allegedly appear in 1858 in Lourdes France?"
SQUAD = {
    "version": "1.1",
    "data": [
        {
            "title": "University_of_Notre_Dame",
            "paragraphs": [
                {
                    "context": "It is a replica of the grotto at Lourdes, France where the Virgin Mary reputedly "
                    "appeared to Saint Bernadette Soubirous in 1858.",
                    "qas": [
                        {
                            "id": "5733be284776f41900661182",
                            "question": QUESTION,
                            "answers": [{"answer_start": 91, "text": "Saint Bernadette Soubirous"}],
                        },
                        {"id": "none", "question": "Who was it?", "answers": [], "is_impossible": True},
                    ],
                }
            ],
        }
    ],
}
ROW_OF_SQUAD = {
    "id": "5733be284776f41900661182",
    "title": "University_of_Notre_Dame",
    "context": "where the Virgin Mary reputedly appeared to Saint Bernadette Soubirous in 1858.",
    "question": QUESTION,
    "answers": {"text": ["Saint Bernadette Soubirous"], "answer_start": [91]},
}
DEFINITION, TREE_ID = str(CAPITALS["Definition"]), str(TREE["message_tree_id"])

PRESETS: dict[str, tuple[str, Any, str, dict[str, Any]]] = {
    # Name of the file, what it holds, what is seen, and what the first record becomes.
    "chat": (
        "a.jsonl",
        OPENAI,
        "1 conversations, 5.0 turns, roles system/user/assistant",
        {"output": "Paris, as if everyone doesn't know that already.", "user": None},
    ),
    "sharegpt": (
        "a.json",
        [SHAREGPT],
        "1 conversations, 4.0 turns, roles user/assistant",
        {"instruction": "Who are you?\n> I am Vicuna, a language model.\nHave a nice day!"},
    ),
    "task_json": (
        "task1146_country_capital.json",
        CAPITALS,
        "2 instances",
        {"task": "task1146_country_capital", "instruction": DEFINITION, "input": "Afghanistan", "output": "Kabul"},
    ),
    "oasst_trees": (
        "a.trees.jsonl",
        TREE,
        "1 conversation trees, 4.0 turns, roles user/assistant",
        {"user": TREE_ID, "task": "en", "output": "The historical origin of the imaginary"},
    ),
    "squad_json": (
        "train-v1.1.json",
        SQUAD,
        "1 articles",
        {"instruction": QUESTION, "output": "Saint Bernadette Soubirous", "user": "University_of_Notre_Dame"},
    ),
    "squad": (
        "rows.json",
        {"train": [ROW_OF_SQUAD]},
        "1 records",
        {"instruction": QUESTION, "output": "Saint Bernadette Soubirous", "user": "University_of_Notre_Dame"},
    ),
}


def read(data: DataConfig) -> tuple[list[Any], Seen]:
    """Examples, or what is wrong in their places, and what was seen."""
    seen = Seen()
    found = [item.message if isinstance(item, Fault) else item for _, item in FILES.read(data, seen)]
    return found, seen


def files(path: Path, **fields: Any) -> DataConfig:
    return DataConfig(name="files", path=str(path), **fields)


def write(path: Path, *rows: Any) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.mark.parametrize("name", PRESETS)
def test_a_preset_reads_a_record_as_its_makers_publish_it(name: str, tmp_path: Path) -> None:
    file, content, words, fields = PRESETS[name]
    path = write(tmp_path / file, content)
    more = ["privacy=user_els"] if name == "squad_json" else []
    with initialize_config_dir(str(ROOT / "conf"), version_base="1.3"):
        config: Config = strict(without_hydra(compose("config", [f"data={name}", f"data.path={path}", *more])))
    found, seen = read(config.data)
    assert str(seen) == words and {key: getattr(found[0], key) for key in fields} == fields
    if name != "squad":
        # Without the preset it is seen what the file holds, and the key says the same.
        assert read(files(path))[1].layout == seen.layout == config.data.layout


def test_all_replies_of_a_conversation_are_learned_but_those_without_weight(tmp_path: Path) -> None:
    path = write(tmp_path / "a.jsonl", SHAREGPT, OPENAI)
    (one, other), _ = read(files(path))
    assert [learned for _, _, learned in one.turns] == [False, True, False] and one.output == "You too!"
    assert not any(learned for _, _, learned in other.turns)
    last = {"messages": [*OPENAI["messages"][:3], {"role": "user", "content": "thanks"}]}
    (found,), _ = read(files(write(tmp_path / "b.jsonl", last)))
    assert "field 'messages' has no reply of the assistant" in found


def test_turns_may_be_written_in_many_ways(tmp_path: Path) -> None:
    said = [{"role": "User", "content": [{"type": "text", "text": "hi"}]}, {"role": "MODEL", "content": "yes"}]
    rows = [
        {"messages": said},
        {"conversation": said},
        {"messages": json.dumps(said)},
        {"prompt": said[:1], "completion": said[1:]},
        {"messages": [{"role": "human", "content": "hi"}, {"from": "gpt", "value": "yes"}]},
    ]
    found, _ = read(files(write(tmp_path / "a.jsonl", *rows)))
    assert {(item.turns, item.output) for item in found} == {((("user", "hi", False),), "yes")}
    twice = {"system": "be kind", "messages": [*said[:1], {"role": "user", "content": "there"}, *said[1:]]}
    (item,), _ = read(files(write(tmp_path / "b.jsonl", twice)))
    assert item.turns == (("system", "be kind", False), ("user", "hi\nthere", False))


def said(*texts: Any, roles: tuple[str, ...] = ("user", "assistant")) -> dict[str, Any]:
    return {"messages": [{"role": roles[at % len(roles)], "content": text} for at, text in enumerate(texts)]}


BAD = [
    ({"messages": []}, "line 2: field 'messages' has no reply"),
    (said("hi"), "line 2: field 'messages' has no reply"),
    (said("hi", "yes", roles=("user", "tool")), "line 2: field 'messages': the role 'tool' is none of"),
    (said("hi", None), "line 2: field 'messages': turn 2 has no text"),
    (said("hi", [{"type": "image_url"}]), "line 2: field 'messages': turn 2 has parts that are no text"),
    (said("hi\ud800", "yes"), "line 2: field 'messages': turn 1 has half a character"),
    ({"messages": "hi"}, "line 2: field 'messages' or 'conversations' is not a list of turns"),
]


@pytest.mark.parametrize(("row", "message"), BAD)
def test_a_conversation_that_is_none_is_one_bad_record(row: dict[str, Any], message: str, tmp_path: Path) -> None:
    found, _ = read(files(write(tmp_path / "a.jsonl", said("hi", "yes"), row, said("hi", "no"))))
    assert found[1].startswith(message) and [item.output for item in (found[0], found[2])] == ["yes", "no"]


@pytest.mark.parametrize("first", [True, False])
def test_rows_of_two_layouts_stop_the_run_and_a_key_overrules(first: bool, tmp_path: Path) -> None:
    rows = [said("hi", "yes"), {"instruction": "hi", "output": "yes"}]
    path = write(tmp_path / "a.jsonl", *(rows if first else reversed(rows)))
    found = [item for _, item in FILES.read(files(path), Seen())]
    assert isinstance(found[-1], Fault) and found[-1].stops and "looks like" in found[-1].message
    named, _ = read(files(path, layout="records"))
    assert sum(isinstance(item, Example) for item in named) == 1


def test_columns_that_are_named_are_read_from_rows_as_they_are(tmp_path: Path) -> None:
    rows = [{**said("hi", "yes"), "q": "which ?", "a": {"text": ["b"]}}]
    made = files(write(tmp_path / "a.jsonl", *rows))
    made.columns.instruction, made.columns.output = "q", "a.text.0"
    (item,), seen = read(made)
    assert (item.instruction, item.output, item.turns, seen.layout) == ("which ?", "b", (), "records")
    made.columns.output = "a.text.1"
    assert "field 'a.text.1' is missing" in read(made)[0][0]


def test_of_a_tree_so_many_paths_are_taken_as_were_asked_for_and_they_stay_together(tmp_path: Path) -> None:
    def tree(name: str, replies: int) -> dict[str, Any]:
        last = [{"role": "assistant", "text": f"r{at}", "replies": []} for at in range(replies)]
        return {"message_tree_id": name, "prompt": {"role": "prompter", "text": f"why {name}?", "replies": last}}

    path = write(tmp_path / "a.jsonl", *(tree(f"t{at}", 1 + at % 4) for at in range(40)))
    for most in (1, 2, 9):
        found, _ = read(files(path, examples_per_record=most))
        of_tree: dict[str, list[Example]] = {}
        for item in found:
            of_tree.setdefault(item.instruction, []).append(item)
        assert sorted(map(len, of_tree.values())) == sorted(min(most, 1 + at % 4) for at in range(40))
        assert all(len({item.split for item in items}) == 1 for items in of_tree.values())


def test_a_deep_tree_is_read(tmp_path: Path) -> None:
    message: dict[str, Any] = {"role": "assistant", "text": "last", "replies": []}
    for at in range(400):
        message = {"role": "assistant" if at % 2 else "prompter", "text": f"{at}", "replies": [message]}
    message = {"role": "prompter", "text": "first", "replies": [message]}
    path = write(tmp_path / "a.jsonl", {"message_tree_id": "t", "prompt": message})
    (item,), _ = read(files(path))
    assert item.output == "last" and len(item.turns) == 401


def test_of_several_outputs_one_is_drawn_by_the_instance_alone(tmp_path: Path) -> None:
    made = [{"input": f"text {at}", "output": ["yes", "no"]} for at in range(60)]
    whole = read(files(write(tmp_path / "t.json", {**CAPITALS, "Instances": made})))[0]
    fewer = read(files(write(tmp_path / "t.json", {**CAPITALS, "Instances": made[1:]})))[0]
    assert whole[1:] == fewer and {item.output for item in whole} == {"yes", "no"}
    bad = [5, {"input": "x"}, {"input": "x", "output": []}]
    found, _ = read(files(write(tmp_path / "t.json", {**CAPITALS, "Instances": [*made[:1], *bad]})))
    assert [isinstance(item, Example) for item in found] == [True, False, False, False]


def test_every_question_of_an_article_is_an_example(tmp_path: Path) -> None:
    found, seen = read(files(write(tmp_path / "a.json", SQUAD)))
    assert [item.input.split()[-1] for item in found] == ["1858."] and seen.rows == 1
    half = {"data": [{**SQUAD["data"][0], "title": "\ud800", "task": "reading"}]}
    assert read(files(write(tmp_path / "a.json", half)))[0][0].task == "reading"
    broken = {"data": [{"title": "x", "paragraphs": [{"qas": [{"answers": [{"text": "a"}]}]}]}]}
    (message,), _ = read(files(write(tmp_path / "a.json", broken)))
    assert "record 1: field 'paragraphs' is not a list of a context and its qas" in message


ORIENTS: dict[str, Callable[[list[dict[str, str]]], Any]] = {
    "records": lambda rows: rows,
    "columns": lambda rows: {name: {str(at): row[name] for at, row in enumerate(rows)} for name in rows[0]},
    "index": lambda rows: {str(at): row for at, row in enumerate(rows)},
    "index of names": lambda rows: {f"r{at}": row for at, row in enumerate(rows)},
    "split": lambda rows: {"columns": [*rows[0]], "index": [0, 1], "data": [[*row.values()] for row in rows]},
    "table": lambda rows: {"schema": {"fields": []}, "data": [{"index": at, **row} for at, row in enumerate(rows)]},
    "lists": lambda rows: {name: [row[name] for row in rows] for name in rows[0]},
    "examples": lambda rows: {"name": "mine", "examples": rows},
}


@pytest.mark.parametrize("orient", ORIENTS)
def test_what_pandas_and_others_write_as_one_object_is_read(orient: str, tmp_path: Path) -> None:
    rows = [{"instruction": "a ?", "output": "yes"}, {"instruction": "b ?", "output": "no"}]
    found, _ = read(files(write(tmp_path / "a.json", ORIENTS[orient](rows))))
    assert [(item.instruction, item.output) for item in found] == [("a ?", "yes"), ("b ?", "no")]


def test_lists_of_values_are_read_under_the_names_that_are_given(tmp_path: Path) -> None:
    path = write(tmp_path / "a.json", [["a ?", "yes"], ["b ?"], 5])
    assert "record 1 is not a JSON object; name its values with data.field_names" in read(files(path))[0][0]
    found, _ = read(files(path, field_names=["instruction", "output"]))
    assert found[0].output == "yes" and found[1:] == [
        "record 2 has 1 values but data.field_names has 2",
        "record 3 is not a JSON object",
    ]


def test_one_object_with_a_list_for_each_split_says_the_split(tmp_path: Path) -> None:
    rows = [{"instruction": f"{at} ?", "output": "yes"} for at in range(3)]
    found, _ = read(files(write(tmp_path / "a.json", {"train": rows[:1], "dev": rows[1:2], "test": rows[2:]})))
    assert [item.split for item in found] == ["train", "validation", "test"]


@pytest.mark.parametrize("row", [{"instruction": "a ?", "output": "yes"}, SHAREGPT])
def test_one_object_that_is_a_record_is_one_record(row: dict[str, Any], tmp_path: Path) -> None:
    found, _ = read(files(write(tmp_path / "a.json", row)))
    assert len(found) == 1 and isinstance(found[0], Example)

"""What a row is: an example, a conversation, a message of one, an instance of a task or an article. No torch here.

A layout turns rows into rows that are examples. Which layout rows have is seen by the names of their fields, unless
`data.layout` says it; rows that differ in it stop the run, because one of them would decide how the others are read.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import chain
from typing import Any

from dptune.config.schema import ColumnsConfig, DataConfig
from dptune.data.readers import Fault, Items, Row, unpaired
from dptune.data.schema import Turn
from dptune.data.subsets import uniform
from dptune.data.templates import spoken

RECORD, PART, TURNS = "\0record", "\0part", "\0turns"
"""Fields that layouts add to rows: what all examples of a record share, which of them it is, and a prompt in turns."""

ROLES: Mapping[str, str] = {
    **dict.fromkeys(("system", "developer"), "system"),
    **dict.fromkeys(("user", "human", "prompter"), "user"),
    **dict.fromkeys(("assistant", "gpt", "chatgpt", "model", "bot", "bard", "bing"), "assistant"),
}
"""What files call who speaks."""

FLAT = ("message_tree_id", "message_id", "parent_id", "role", "text")
"""Fields of a message of a conversation tree."""


class BadRow(ValueError):
    """What is wrong with a row that a layout reads, beginning with its field."""


@dataclass
class Seen:
    """What was seen while reading. Exact numbers of private data: for the terminal, never for a record."""

    layout: str | None = None
    """What rows are."""
    rows: int = 0
    """How many there were."""
    turns: int = 0
    """How many things were said in them, where they are conversations."""
    roles: dict[str, int] = field(default_factory=dict)
    """By whom."""
    parts: list[tuple[str, str | None]] = field(default_factory=list)
    """Files, and the split that the name of each says."""

    def __str__(self) -> str:
        if self.layout in (None, "records"):
            return f"{self.rows} records"
        if not self.turns:
            return f"{self.rows} {self.layout}"
        name = "conversation trees" if self.layout == "trees" else self.layout
        if self.layout == "messages":
            return f"{self.rows} messages, roles {'/'.join(self.roles)}"
        return f"{self.rows} {name}, {self.turns / max(self.rows, 1):.1f} turns, roles {'/'.join(self.roles)}"


def laid_out(items: Items, data: DataConfig, seen: Seen) -> Items:
    """Rows as examples, by the layout that the config names or that they are seen to have."""
    before: list[tuple[str, Row] | Fault] = []
    for item in items if seen.layout is None else ():
        before.append(item)
        if not isinstance(item, Fault):
            seen.layout = layout_of(item[1], data)
        if seen.layout is not None or len(before) == LOOKED_AT:
            break
    layout = seen.layout or "records"
    return LAYOUTS[layout](_alike(chain(before, items), layout, data, seen), data, seen)


LOOKED_AT = 1000
"""Rows, from the first, among which one must show the layout; each other one must have the same."""


def _alike(items: Items, layout: str, data: DataConfig, seen: Seen) -> Items:
    """The rows, none of which may look like another layout."""
    for item in items:
        if not isinstance(item, Fault):
            seen.rows += 1
            if (other := layout_of(item[1], data)) not in (layout, None):
                what = f"looks like {other}, but what stands before like {layout}; name one with data.layout={layout}"
                yield Fault(f"{item[0]}: {what}", stops=True)
                return
        yield item


def layout_of(row: Row, data: DataConfig) -> str | None:
    """The layout that the config names, or else the one that a row has by its fields; None where none fits."""
    columns = data.columns
    if data.layout != "auto":
        return data.layout
    if (columns.instruction, columns.output) != (_PLAIN.instruction, _PLAIN.output):
        return "records"  # They say where both stand in a row.
    if columns.instruction in row and columns.output in row:
        return "records"
    if _said(row) is not None:
        return "conversations"
    if "message_tree_id" in row and isinstance(row.get("prompt"), dict):
        return "trees"
    if all(name in row for name in FLAT):
        return "messages"
    if isinstance(row.get("paragraphs"), list):
        return "articles"
    return "instances" if "Definition" in row else None


_PLAIN = ColumnsConfig()


def records(items: Items, data: DataConfig, seen: Seen) -> Items:
    """Each row is an example."""
    return items


def messages(items: Items, data: DataConfig, seen: Seen) -> Items:
    """Conversation trees as pairs: what an assistant said (`output`) and the message it answers (`instruction`).

    A row has `message_tree_id`, `message_id`, `parent_id`, `role` and `text`, as in oasst1 (arXiv:2304.07327); rows of
    a tree follow each other, a message after the one that it answers. Its other fields stay.
    """
    tree, said = None, dict[str, str]()
    for item in items:
        if isinstance(item, Fault):
            yield item
            continue
        place, row = item
        missing = [name for name in FLAT if name not in row]
        if missing:
            yield Fault(f"{place}: field {missing[0]!r} is missing; data.layout=messages needs it")
            continue
        if row["message_tree_id"] != tree:
            tree, said = row["message_tree_id"], {}
        said[row["message_id"]] = row["text"]
        _count(seen, [ROLES.get(str(row["role"]), str(row["role"]))])
        if row["role"] != "assistant":
            continue
        if row["parent_id"] in said:
            yield place, {**row, "instruction": said[row["parent_id"]], "output": row["text"]}
        else:
            yield Fault(f"{place}: field 'parent_id' names no message that stands before it in its tree", stops=True)


def conversations(items: Items, data: DataConfig, seen: Seen) -> Items:
    """Each conversation is one example: its last reply of the assistant (`output`) after all that was said before.

    Its earlier replies are learned in the same pass. `"weight": 0` at a turn, as OpenAI has it, says that it is not to
    be learned.
    """
    for item in items:
        if isinstance(item, Fault):
            yield item
            continue
        place, row = item
        try:
            name, turns = _turns(row)
        except BadRow as error:
            yield Fault(f"{place}: {error}")
            continue
        _count(seen, [role for role, _, _ in turns])
        if replies := [at for at, (_, _, learned) in enumerate(turns) if learned]:
            yield place, {**row, **_prompt(turns[: replies[-1]]), "input": None, "output": turns[replies[-1]][1]}
        else:
            yield Fault(f"{place}: field {name!r} has no reply of the assistant, to something that was said before it")


def _prompt(turns: Sequence[Turn]) -> Row:
    """What was said before a reply as fields of a row."""
    return {"instruction": "".join(text for text, _ in spoken(turns)), TURNS: tuple(turns)}


def trees(items: Items, data: DataConfig, seen: Seen) -> Items:
    """Conversation trees, one a row as in oasst1, as examples: a path from its root to a last reply of the assistant.

    Of a tree at most `data.examples_per_record` paths, drawn by a hash of it. Fields of the reply go before fields of
    the tree.
    """

    def read(row: Row) -> Iterator[Row]:
        tree = {name: value for name, value in row.items() if name != "prompt"}
        todo: list[tuple[tuple[Turn, ...], Any]] = [((), row.get("prompt"))]
        while todo:
            before, message = todo.pop()
            if not isinstance(message, dict):
                raise BadRow("field 'prompt' is not a message with replies; data.layout=trees needs it")
            role, text = _role(message.get("role"), "prompt"), _text(message.get("text"), "prompt", len(before) + 1)
            _count(seen, [role])
            replies = message.get("replies") or []
            if not isinstance(replies, list):
                raise BadRow("field 'prompt': the replies of a message are not a list")
            if role == "assistant" and before and not any(_is_answered(reply) for reply in replies):
                own = {name: value for name, value in message.items() if name != "replies"}
                yield {**tree, **own, **_prompt(before), "input": None, "output": text}
            todo += [
                ((*before, (role, text, role == "assistant" and bool(before))), reply) for reply in reversed(replies)
            ]

    return _drawn(items, data, read, "a reply of the assistant")


def _is_answered(message: Any) -> bool:
    """Whether a message of a tree has a reply, somewhere after it, that the assistant wrote."""
    todo = list(message.get("replies") or ()) if isinstance(message, dict) else []
    while todo:
        reply = todo.pop()
        if isinstance(reply, dict):
            if ROLES.get(str(reply.get("role")).lower()) == "assistant":
                return True
            todo += reply.get("replies") or ()
    return False


def instances(items: Items, data: DataConfig, seen: Seen) -> Items:
    """Instances of a task of Natural Instructions (arXiv:2204.07705): definition, input, and one of the outputs.

    Of several outputs at most `data.examples_per_record`, drawn by a hash of the instance.
    """

    def read(row: Row) -> Iterator[Row]:
        definition, outputs = row.get("Definition"), row.get("output")
        whole = " ".join(str(part).strip() for part in definition) if isinstance(definition, list) else definition
        for output in outputs if isinstance(outputs, list) else [outputs]:
            yield {**row, "instruction": whole, "output": output}

    return _drawn(items, data, read, "an output")


def articles(items: Items, data: DataConfig, seen: Seen) -> Items:
    """Articles with questions, as in SQuAD (arXiv:1606.05250): question, paragraph and its first answer.

    Questions that have no answer are left out.
    """
    for item in items:
        if isinstance(item, Fault):
            yield item
            continue
        place, row = item
        whole = {name: value for name, value in row.items() if name != "paragraphs"}
        key = json.dumps(row, default=str)
        try:
            found = [
                {**whole, **question, "input": paragraph["context"], "instruction": question["question"]}
                | {"output": question["answers"][0]["text"], RECORD: key}
                for paragraph in row["paragraphs"]
                for question in paragraph["qas"]
                if question.get("answers")
            ]
        except (KeyError, TypeError, IndexError, AttributeError):
            yield Fault(f"{place}: field 'paragraphs' is not a list of a context and its qas; data.layout says what is")
            continue
        yield from ((place, made) for made in found)


def _drawn(items: Items, data: DataConfig, read: Callable[[Row], Iterator[Row]], what: str) -> Items:
    """Of the examples of each row a bounded number, whose choice depends on the row alone."""
    for item in items:
        if isinstance(item, Fault):
            yield item
            continue
        place, row = item
        try:
            found = list(read(row))
            if not found:
                raise BadRow(f"no part of it is {what}")
        except BadRow as error:
            yield Fault(f"{place}: {error}")
            continue
        key = json.dumps([(made["instruction"], made.get("input"), made["output"]) for made in found], default=str)
        order = sorted(range(len(found)), key=lambda at: uniform(data.seed, "example of a record", key, str(at)))
        for part, at in enumerate(sorted(order[: data.examples_per_record])):
            yield place, {**found[at], RECORD: key, PART: part}


def _said(row: Row) -> tuple[str, Any] | None:
    """The field of a row that is a conversation, and its turns."""
    for name in ("messages", "conversations", "conversation"):
        value = row.get(name)
        if isinstance(value, str) and value.startswith("["):  # A cell of a CSV file.
            try:
                value = json.loads(value)
            except (ValueError, RecursionError):
                continue
        if isinstance(value, list) and all(isinstance(turn, dict) for turn in value):
            return name, value
    prompt, completion = row.get("prompt"), row.get("completion")
    if isinstance(prompt, list) and isinstance(completion, list):
        return "prompt", [*prompt, *completion]
    return None


def _turns(row: Row) -> tuple[str, list[Turn]]:
    """The field with the turns of a row, and these; what one role says twice in a row is one turn."""
    found = _said(row)
    if found is None:
        raise BadRow("field 'messages' or 'conversations' is not a list of turns; data.layout=conversations needs it")
    name, said = found
    system = row.get("system")
    turns: list[Turn] = [("system", system, False)] if isinstance(system, str) and system.strip() else []
    for number, turn in enumerate(said, start=1):
        role = _role(turn.get("role", turn.get("from")), name)
        text = _text(turn.get("content", turn.get("value")), name, number)
        learned = role == "assistant" and bool(turns) and turn.get("weight") not in (0, "0")
        if turns and (turns[-1][0], turns[-1][2]) == (role, learned):
            turns[-1] = (role, f"{turns[-1][1]}\n{text}", learned)
        else:
            turns.append((role, text, learned))
    return name, turns


def _role(name: Any, where: str) -> str:
    role = ROLES.get(str(name).lower())
    if role is None:
        raise BadRow(f"field {where!r}: the role {name!r} is none of {', '.join(ROLES)}")
    return role


def _text(content: Any, where: str, number: int) -> str:
    """Text of a turn; of several parts, those of text joined."""
    if isinstance(content, list):
        kinds = {part.get("type") if isinstance(part, dict) else None for part in content}
        if kinds != {"text"}:
            raise BadRow(f"field {where!r}: turn {number} has parts that are no text")
        content = "\n".join(str(part.get("text")) for part in content)
    if not isinstance(content, str) or not content.strip():
        raise BadRow(f"field {where!r}: turn {number} has no text")
    if unpaired(content):
        raise BadRow(f"field {where!r}: turn {number} has half a character (a lone surrogate); repair its text")
    return content


def _count(seen: Seen, roles: Sequence[str]) -> None:
    seen.turns += len(roles)
    for role in roles:
        seen.roles[role] = seen.roles.get(role, 0) + 1


LAYOUTS: dict[str, Callable[[Items, DataConfig, Seen], Items]] = {
    "records": records,
    "conversations": conversations,
    "messages": messages,
    "trees": trees,
    "instances": instances,
    "articles": articles,
}

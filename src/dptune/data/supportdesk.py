"""An embedded multi-task instruction set: the inbox of a customer-support desk, made up and deterministic.

Every organisation answers the same ten tasks (`TASKS`) about the same kinds of message, but has conventions
of its own: which label word stands for which latent category, what the policy permits, how a date is written.
So a backbone that was pretrained on the public organisations knows the formats of the tasks but not the
conventions of another organisation: its zero-shot accuracy is low and fine-tuning has something to learn.

* `PUBLIC_ORGANISATIONS` make up the pretraining split (`public`).
* `dev` is public too but is not in the pretraining split: choose hyperparameters on it.
* `private` stands for the data to protect; nothing may be decided on it without paying for it.

Messages carry made-up personal data (names, cities, e-mail addresses, order numbers, dates). They are written
by users whose activity has a long tail. No user and no input occurs in two splits of an organisation. Each
task has instruction wordings for pretraining, others for the private splits, and held-out ones for test only.
"""

import json
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cache
from itertools import accumulate, combinations
from pathlib import Path
from random import Random
from typing import Literal, TypeVar

from dptune.config.schema import PRETRAINED_ON
from dptune.data.schema import Example

_Choice = TypeVar("_Choice")

PUBLIC_ORGANISATIONS = PRETRAINED_ON
"""Organisations of the pretraining split."""

ORGANISATIONS = (*PUBLIC_ORGANISATIONS, "dev", "private")
"""All organisations that records can be generated for."""

HELD_OUT_SHARE = 0.5
"""Probability that the instruction of a test record uses a held-out wording."""

# The name in the instructions, where it is not the organisation's own.
_DESKS = {"dev": "fjord", "private": "garnet"}

OTHER_NAMES = (
    *("hazel", "iris", "jasper", "kestrel", "lagoon", "maple", "nectar", "orchid"),
    *("prairie", "quartz", "raven", "saffron", "tundra", "umber", "velvet", "willow"),
)
"""Names of desks that are not there, for public records under another name (`renamed`)."""


@dataclass(frozen=True, slots=True)
class Task:
    """One task of the desk: what is asked, in which words, and what can be answered."""

    name: str
    """Name of the task, as in `Example.task`."""

    kind: Literal["option", "free_form"]
    """`option`: one of a few labels; `free_form`: copied from the input, rewritten."""

    categories: int
    """Number of latent categories that the organisation maps to label words; 0 for free form."""

    answers: tuple[str, ...]
    """Where organisations draw their convention from: label words, or the formats of a free-form response."""

    public: tuple[str, ...]
    """Instruction wordings of the pretraining split."""

    train: tuple[str, ...]
    """Wordings of train and validation, and of a part of test."""

    held_out: tuple[str, ...]
    """Wordings that occur in test only."""


_TASKS = (
    Task(
        "intent",
        "option",
        6,
        ("ask", "claim", "fix", "halt", "track", "pay", "prove", "swap", "query", "trace"),
        ("{desk}: what is wanted?", "{desk}: intent", "{desk}: name the purpose", "{desk} intent code"),
        ("{desk}: which intent?", "{desk}: purpose", "what is wanted, {desk}?"),
        ("{desk}: name what is wanted", "purpose code, {desk}"),
    ),
    Task(
        "urgency",
        "option",
        4,
        ("red", "amber", "green", "blue", "white", "black", "violet", "grey"),
        ("{desk}: how urgent?", "{desk}: urgency", "{desk}: grade the haste", "{desk} urgency grade"),
        ("{desk}: which urgency?", "{desk}: haste", "how urgent, {desk}?"),
        ("{desk}: grade how urgent", "haste grade, {desk}"),
    ),
    Task(
        "sentiment",
        "option",
        4,
        ("sun", "rain", "storm", "fog", "wind", "snow", "frost", "hail"),
        ("{desk}: how do they feel?", "{desk}: mood", "{desk}: name the feeling", "{desk} mood sign"),
        ("{desk}: which mood?", "{desk}: feeling", "how do they feel, {desk}?"),
        ("{desk}: name the mood", "feeling sign, {desk}"),
    ),
    Task(
        "team",
        "option",
        5,
        ("atlas", "birch", "cobalt", "delta", "ember", "falcon", "granite", "harbor", "indigo", "juniper"),
        ("{desk}: which team?", "{desk}: team", "{desk}: route this", "{desk} team name"),
        ("{desk}: name the team", "{desk}: route to", "which team, {desk}?"),
        ("{desk}: team to route to", "route this, {desk}"),
    ),
    Task(
        "language",
        "option",
        5,
        ("north", "south", "east", "west", "river", "coast", "valley", "summit", "island", "bridge"),
        ("{desk}: which office?", "{desk}: language", "{desk}: name the office", "{desk} language office"),
        ("{desk}: which language?", "{desk}: office", "which office, {desk}?"),
        ("{desk}: name the language", "language office, {desk}"),
    ),
    Task(
        "policy",
        "option",
        2,
        ("yes/no", "allowed/refused", "fine/never", "granted/denied"),
        ("{desk}: is it permitted?", "{desk}: policy", "{desk}: decide by the rules", "{desk} policy answer"),
        ("{desk}: which policy?", "{desk}: rules", "is it permitted, {desk}?"),
        ("{desk}: decide by policy", "policy rules, {desk}"),
    ),
    Task(
        "reply",
        "option",
        6,
        (
            "we call you",
            "we send a form",
            "we ask a colleague",
            "we open a case",
            "we check the stock",
            "we write a letter",
            "we visit you",
            "we need a photo",
            "we pay today",
            "we close it",
        ),
        ("{desk}: what do we answer?", "{desk}: reply", "{desk}: choose the answer", "{desk} reply text"),
        ("{desk}: which reply?", "{desk}: answer", "what do we answer, {desk}?"),
        ("{desk}: choose the reply", "answer text, {desk}"),
    ),
    Task(
        "order_number",
        "free_form",
        0,
        ("#{0}", "{0}", "id {0}", "no. {0}", "ord-{0}", "<{0}>", "{0}/a", "nr {0}", "{0}!", "({0})"),
        ("{desk}: which order?", "{desk}: order number", "{desk}: copy the order", "{desk} order digits"),
        ("{desk}: order", "{desk}: find the order", "which order, {desk}?"),
        ("{desk}: copy the number", "order number, {desk}"),
    ),
    Task(
        "email",
        "free_form",
        0,
        ("{0}@{1}", "{0}", "{0} at {1}", "to {0}", "mail {0}", "{0}, {1}", "{0} @", "box {0}", "at {1}: {0}"),
        ("{desk}: which address?", "{desk}: e-mail", "{desk}: copy the address", "{desk} e-mail address"),
        ("{desk}: address", "{desk}: find the address", "which address, {desk}?"),
        ("{desk}: copy the e-mail", "e-mail address, {desk}"),
    ),
    Task(
        "date",
        "free_form",
        0,
        (
            "{1}/{0}",
            "{0}/{1}",
            "{2} {0}",
            "{0} {2}",
            "{1}-{0}",
            "{0}-{1}",
            "{0}.{1}.",
            "{2}-{0}",
            "{0}{2}",
            "{1} {0}",
        ),
        ("{desk}: which day?", "{desk}: date", "{desk}: copy the day", "{desk} date of this"),
        ("{desk}: day", "{desk}: find the date", "which day, {desk}?"),
        ("{desk}: copy the date", "date of this, {desk}"),
    ),
)

TASKS: dict[str, Task] = {task.name: task for task in _TASKS}
"""The tasks by name.

`intent` and `reply` depend on what a message is about, `team` and `policy` on the product, `urgency` and
`sentiment` on the tone, `language` on the language; `order_number`, `email` and `date` are extracted.
"""

_PRODUCTS = (
    ("laptop", "tablet", "camera", "printer"),
    ("sofa", "shelf", "chair", "wardrobe"),
    ("jacket", "scarf", "dress", "hat"),
    ("kettle", "toaster", "blender", "oven"),
    ("bike", "racket", "tent", "kayak"),
)
_TOPICS = (
    ("my {p} never arrived", "still no {p} here", "where is my {p}", "the {p} is late", "my {p} got lost"),
    ("my {p} came broken", "my {p} is cracked", "the {p} is faulty", "my {p} stopped working"),
    ("money back for the {p}", "refund the {p}", "repay me the {p}", "charged twice for a {p}"),
    ("cancel the {p}", "i no longer want a {p}", "stop my {p} order", "do not ship the {p}"),
    ("invoice for the {p}", "i need a bill for my {p}", "no receipt with my {p}", "print the {p} receipt"),
    ("is the {p} in stock", "when can i buy a {p}", "do you sell a {p}", "how much is a {p}"),
)
_HASTE = (
    ("i need it today", "this is an emergency", "right now", "it cannot wait", "at once"),
    ("by friday", "within the week", "in a few days", "before the weekend"),
    ("no rush", "whenever you can", "take your time", "it can wait"),
    ("just so you know", "no answer needed", "only for your files", "this is a note"),
)
_MOODS = (
    ("this is outrageous", "i am furious", "terrible shop", "shame on you"),
    ("i love your shop", "thanks a lot", "you are wonderful", "great service"),
    ("i do not understand", "i am confused", "this makes no sense", "i am puzzled"),
    ("i am worried", "i fear the worst", "i hope nothing is wrong", "i am nervous"),
)
_LANGUAGES = (
    ("where is order {n}", "order {n} is missing", "please check order {n}", "thanks for order {n}"),
    ("wo ist auftrag {n}", "auftrag {n} fehlt", "bitte auftrag {n} ansehen", "danke für auftrag {n}"),
    ("où est la commande {n}", "commande {n} absente", "voyez la commande {n}", "merci pour la commande {n}"),
    ("dónde está el pedido {n}", "falta el pedido {n}", "miren el pedido {n}", "gracias por el pedido {n}"),
    ("dove è l'ordine {n}", "manca l'ordine {n}", "guardate l'ordine {n}", "grazie per l'ordine {n}"),
)
_REQUESTS = (
    "may i return a {p}",
    "can i swap a {p}",
    "may i rent a {p}",
    "can i insure a {p}",
    "may i try a {p}",
)
_MONTHS = ("jan", "feb", "mar", "apr", "may", "jun", "jul", "aug", "sep", "oct", "nov", "dec")
_MAIL_HOSTS = ("example.com", "example.org", "example.net")  # reserved by RFC 2606: no mail can reach anybody


@dataclass(frozen=True, slots=True)
class _Conventions:
    """How an organisation answers."""

    labels: dict[str, tuple[str, ...]]  # label word of each latent category, by option task
    formats: dict[str, str]  # how a response is written, by free-form task
    permitted: tuple[int, ...]  # product categories that the policy says yes to


@dataclass(frozen=True, slots=True)
class _User:
    """The author of records, with personal data that stay the same in all of them."""

    key: str
    first: str
    last: str
    city: str
    mailbox: str
    mail_host: str


def is_held_out(example: Example) -> bool:
    """Whether the instruction of a record has a wording that occurs in test only."""
    desks = (_DESKS.get(name, name) for name in ORGANISATIONS)
    wordings = TASKS[example.task].held_out
    return any(example.instruction == wording.format(desk=desk) for desk in desks for wording in wordings)


def held_out(example: Example, choice: float) -> Example:
    """The record with one of its task's wordings that occur in test only, as `choice` in [0, 1) says."""
    if is_held_out(example):
        return example
    task = TASKS[example.task]
    desk = next(
        desk
        for desk in (_DESKS.get(name, name) for name in ORGANISATIONS)
        for wording in (*task.public, *task.train)
        if example.instruction == wording.format(desk=desk)
    )
    return replace(example, instruction=task.held_out[int(choice * len(task.held_out))].format(desk=desk))


def renamed(example: Example, choice: float) -> Example:
    """A record of a public organisation under a name that no organisation has, as `choice` in [0, 1) says."""
    name = OTHER_NAMES[int(choice * len(OTHER_NAMES))]
    own = next(name for name in (*PUBLIC_ORGANISATIONS, "dev") if (example.user or "").startswith(f"{name}-"))
    return replace(example, instruction=example.instruction.replace(_DESKS.get(own, own), name))


def generate(
    organisation: str = "private", seed: int = 0, train: int = 4000, validation: int = 400, test: int = 800
) -> dict[str, list[Example]]:
    """Records of one organisation, with every task equally frequent in each split.

    Args:
        organisation: One of `ORGANISATIONS`; decides the conventions, which do not depend on the seed.
        seed: Decides everything else.
        train: Number of training records.
        validation: Number of validation records.
        test: Number of test records; each has a held-out wording with probability `HELD_OUT_SHARE`.

    Returns:
        The records by split: `train`, `validation` and `test`.

    Raises:
        ValueError: The organisation is unknown.
    """
    if organisation not in ORGANISATIONS:
        raise ValueError(f"organisation: unknown name {organisation!r}; choose one of {', '.join(ORGANISATIONS)}")
    seen: set[tuple[str, str]] = set()
    # In this order the test records do not depend on how many others there are.
    sizes = {"test": test, "validation": validation, "train": train}
    splits = {split: _records(organisation, split, seed, size, seen) for split, size in sizes.items()}
    return dict(reversed(splits.items()))


def public(seed: int = 0, size: int = 24_000) -> list[Example]:
    """The pretraining split: `size` records, shared equally by the public organisations, in random order."""
    share = -(-size // len(PUBLIC_ORGANISATIONS))
    records = [r for name in PUBLIC_ORGANISATIONS for r in _records(name, "public", seed, share, set())]
    Random(f"public order {seed}").shuffle(records)
    return records[:size]


def _records(organisation: str, split: str, seed: int, size: int, seen: set[tuple[str, str]]) -> list[Example]:
    """Records whose inputs are not in `seen`, which grows by them."""
    rng = Random(f"{organisation} {split} {seed}")
    conventions = _conventions(organisation)
    users = [_user(f"{organisation}-{split}-{rank}", rng) for rank in range(1 + size // 5)]
    # Zipf-Mandelbrot: the busiest author writes about 2 % of the records, the median author three of them.
    activity = list(accumulate(1 / (rank + 10) for rank in range(len(users))))
    examples: list[Example] = []
    while len(examples) < size:
        task = _TASKS[len(examples) % len(_TASKS)]
        user = rng.choices(users, cum_weights=activity)[0]
        text, output = _message(task, user, conventions, rng)
        if (task.name, text) in seen:
            continue
        seen.add((task.name, text))
        # A start from public data must not know the wordings of the private splits.
        wordings = task.public if organisation in PUBLIC_ORGANISATIONS else task.train
        if split == "test" and rng.random() < HELD_OUT_SHARE:
            wordings = task.held_out
        instruction = rng.choice(wordings).format(desk=_DESKS.get(organisation, organisation))
        options = tuple(sorted(conventions.labels[task.name])) if task.kind == "option" else None
        examples.append(Example(task.name, instruction, text, options, output, user.key, split))
    rng.shuffle(examples)
    return examples


def _message(task: Task, user: _User, conventions: _Conventions, rng: Random) -> tuple[str, str]:
    """A message of `user` and the organisation's response to it."""
    number = f"{rng.randrange(1000):03}"
    product = rng.randrange(len(_PRODUCTS))
    about = {"p": rng.choice(_PRODUCTS[product]), "n": number}
    topic = rng.randrange(len(_TOPICS))
    body = rng.choice(_TOPICS[topic]).format(**about)
    match task.name:
        case "intent" | "reply":
            category = topic
        case "team":
            category = product
        case "urgency" | "sentiment":
            tones = _HASTE if task.name == "urgency" else _MOODS
            category = rng.randrange(len(tones))
            body = f"{body}, {rng.choice(tones[category])}"
        case "language":
            category = rng.randrange(len(_LANGUAGES))
            body = rng.choice(_LANGUAGES[category]).format(**about)
        case "policy":
            category = int(product not in conventions.permitted)
            body = rng.choice(_REQUESTS).format(**about)
        case "order_number":
            return _signed(f"{body}, order {number}", user, rng), conventions.formats[task.name].format(number)
        case "email":
            text = f"{body}, {user.mailbox}@{user.mail_host}"
            return _signed(text, user, rng), conventions.formats[task.name].format(user.mailbox, user.mail_host)
        case "date":
            day, month = rng.randint(1, 28), rng.randrange(12)
            parts = f"{day:02}", f"{month + 1:02}", _MONTHS[month]
            text = f"{body}, {parts[0]} {parts[2]}"
            return _signed(text, user, rng), conventions.formats[task.name].format(*parts)
    return _signed(body, user, rng), conventions.labels[task.name][category]


def _signed(body: str, user: _User, rng: Random) -> str:
    """The message with its author's name, in one of a few forms."""
    forms = ("{first}: {body}", "{body}, {first} {last}", "{first}, {city}: {body}")
    return rng.choice(forms).format(body=body, first=user.first, last=user.last, city=user.city)


def _user(key: str, rng: Random) -> _User:
    """A made-up person."""
    firsts, lasts, cities = _personal_data()
    first = rng.choice(firsts)
    mailbox = f"{first[0]}{rng.randrange(100):02}"
    return _User(key, first, rng.choice(lasts), rng.choice(cities), mailbox, rng.choice(_MAIL_HOSTS))


@cache
def _personal_data() -> tuple[tuple[str, ...], tuple[str, ...], tuple[str, ...]]:
    """First names, last names and cities, public lists in a file, which no release of a package moves."""
    names = json.loads(Path(__file__).with_name("names.json").read_text(encoding="utf-8"))
    return tuple(names["first_names"]), tuple(names["last_names"]), tuple(names["cities"])


@cache
def _conventions(organisation: str) -> _Conventions:
    """The conventions of an organisation, drawn at random once for each name."""
    rng = Random(f"conventions of {organisation}")
    labels = {task.name: tuple(rng.sample(task.answers, task.categories)) for task in _TASKS if task.categories}
    labels["policy"] = tuple(rng.choice(TASKS["policy"].answers).split("/"))
    formats = {task.name: _dealt(task.answers, organisation) for task in _TASKS if task.kind == "free_form"}
    permitted = _dealt(list(combinations(range(len(_PRODUCTS)), len(_PRODUCTS) // 2)), organisation)
    return _Conventions(labels, formats, permitted)


def _dealt(choices: Sequence[_Choice], organisation: str) -> _Choice:
    """One of the choices at random, such that no two organisations have the same."""
    return Random(repr(choices)).sample(choices, len(ORGANISATIONS))[ORGANISATIONS.index(organisation)]

"""From examples to tokens: what is kept of a prompt and of its response."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from dptune.data.schema import Example
from dptune.data.templates import prompt_of, response_of

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


@dataclass(frozen=True, slots=True)
class Encoded:
    """One example as tokens: a prompt and the response that is learned or scored."""

    tokens: tuple[int, ...]
    response: int
    """Number of response tokens at the end, the end-of-sequence token included."""


def encode(
    pairs: Sequence[tuple[str, str]],
    tokenizer: PreTrainedTokenizerBase,
    sequence_length: int,
    begin: tuple[int, ...] = (),
) -> list[Encoded]:
    """Tokens of (prompt, response) pairs, as a template has made them, with the end of sequence after the response.

    A public rule keeps `sequence_length` tokens: the prompt is cut from the left, and a response that is too long by
    itself from the right. Each row depends on its own text only.

    Args:
        pairs: prompts and their responses.
        tokenizer: of the backbone.
        sequence_length: most tokens of a row.
        begin: tokens before each prompt (`InputFormat.beginning`), which are never cut away.
    """
    prompts = tokenizer([first for first, _ in pairs], add_special_tokens=False)["input_ids"]
    responses = tokenizer([second for _, second in pairs], add_special_tokens=False)["input_ids"]
    rows = []
    for head, tail in zip(prompts, responses, strict=True):
        tail = [*tail, tokenizer.eos_token_id][: sequence_length - len(begin) - 1]
        rows.append(Encoded((*_cut(head, sequence_length - len(tail), begin), *tail), len(tail)))
    return rows


def encode_prompts(
    prompts: Sequence[str], tokenizer: PreTrainedTokenizerBase, longest: int, begin: tuple[int, ...] = ()
) -> list[Encoded]:
    """The same of prompts that are to be gone on with: rows without a response."""
    tokens = tokenizer(list(prompts), add_special_tokens=False)["input_ids"]
    return [Encoded(_cut(head, longest, begin), 0) for head in tokens]


def _cut(head: Sequence[int], room: int, begin: tuple[int, ...]) -> tuple[int, ...]:
    """What is kept of a prompt, behind the tokens that begin a text, which it may bring along."""
    if begin and tuple(head[: len(begin)]) == begin:
        head = head[len(begin) :]
    return (*begin, *head[-max(room - len(begin), 1) :])


def encode_examples(
    examples: Sequence[Example],
    tokenizer: PreTrainedTokenizerBase,
    sequence_length: int,
    template: str = "plain",
    begin: tuple[int, ...] = (),
) -> list[Encoded]:
    """Tokens of examples with their own responses."""
    return encode(
        [(prompt_of(example, tokenizer, template), response_of(example.output, template)) for example in examples],
        tokenizer,
        sequence_length,
        begin,
    )


FEWEST_PROMPT_TOKENS = 4
"""With fewer left, a prompt asks for nothing."""


@dataclass(frozen=True)
class Cuts:
    """How many records of a data set lose something to `sequence_length`."""

    records: int = 0
    cut: int = 0
    """Something of prompt or response is cut off."""
    no_instruction: int = 0
    """Nothing of the instruction is left."""
    few_tokens: int = 0
    """Fewer than `FEWEST_PROMPT_TOKENS` tokens of the prompt are left."""
    same_options: int = 0
    """Two options are equal as far as they are kept, so that the first of them is always chosen."""

    def in_words(self, sequence_length: int) -> str | None:
        """What to say of it, in one line; None when nothing is cut."""
        parts = [
            (self.no_instruction, "lose their whole instruction"),
            (self.few_tokens, f"keep fewer than {FEWEST_PROMPT_TOKENS} tokens of their prompt"),
            (self.same_options, "have options that are equal as far as they are kept"),
        ]
        if not self.cut:
            return None
        said = "".join(f"; {count} {what}" for count, what in parts if count)
        return f"environment.sequence_length={sequence_length}: {self.cut} of {self.records} records are cut{said}"


def cuts(
    examples: Sequence[Example],
    tokenizer: PreTrainedTokenizerBase,
    sequence_length: int,
    template: str = "plain",
    begin: tuple[int, ...] = (),
) -> Cuts:
    """What `encode` cuts off, with every option of a record."""
    if not examples:
        return Cuts()
    prompts = [prompt_of(example, tokenizer, template) for example in examples]
    heads = tokenizer(prompts, add_special_tokens=False)["input_ids"]
    texts = sorted({text for example in examples for text in (example.output, *(example.options or ()))})
    spoken = tokenizer([response_of(text, template) for text in texts], add_special_tokens=False)["input_ids"]
    tails = {text: (*tokens, tokenizer.eos_token_id) for text, tokens in zip(texts, spoken, strict=True)}
    most = sequence_length - len(begin) - 1
    found = dict.fromkeys(("cut", "no_instruction", "few_tokens", "same_options"), 0)
    for example, prompt, head in zip(examples, prompts, heads, strict=True):
        whole = [tails[text] for text in dict.fromkeys(example.options or (example.output,))]
        longest = min(max(map(len, whole)), most)
        kept = min(len(head), sequence_length - longest - len(begin))
        found["cut"] += kept < len(head) or any(len(tail) > most for tail in whole)
        found["same_options"] += len({tail[:most] for tail in whole}) < len({*whole})
        if kept < len(head):
            found["few_tokens"] += kept < FEWEST_PROMPT_TOKENS
            before = prompt[: prompt.find(example.instruction) + len(example.instruction)]
            instruction = tokenizer(before, add_special_tokens=False)["input_ids"]
            found["no_instruction"] += len(head) - kept >= len(instruction)
    return Cuts(len(examples), **found)

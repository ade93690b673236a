"""How good a model is: options ranked by log-likelihood, free form by exact match of greedy output."""

from __future__ import annotations

import math
import statistics
from collections import defaultdict
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from dptune.data.batches import Layout, collate, token_log_probabilities
from dptune.data.encoding import Encoded, encode
from dptune.data.schema import Example
from dptune.data.templates import prompt_of, response_of
from dptune.records import Metrics

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

MAX_NEW_TOKENS = 32
"""Longest greedy output, a public constant."""


@dataclass(frozen=True)
class Judgement:
    """What the model made of one example."""

    task: str
    correct: bool
    loss: float
    """Mean negative log-likelihood of the right response's tokens."""
    unseen: bool | None
    """The input does not occur in the training split; None where that must not be told."""


@torch.no_grad()
def judge(
    model: torch.nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    examples: Sequence[Example],
    seen_inputs: Collection[str] | None,
    *,
    layout: Layout,
    sequence_length: int,
    batch_size: int,
    template: str = "plain",
) -> list[Judgement]:
    """One judgement an example, in their order.

    Args:
        model: language model in evaluation mode.
        tokenizer: its tokenizer.
        examples: what to judge on.
        seen_inputs: inputs of the training split; None when they are private, because telling which test inputs
            occur among them would tell about single training records.
        layout: how the model reads an example.
        sequence_length: longest example in tokens.
        batch_size: sequences in one forward pass.
        template: what a prompt looks like, `plain` or `chat`.
    """
    candidates = [
        (index, option) for index, example in enumerate(examples) for option in (example.options or (example.output,))
    ]
    pairs = [(prompt_of(examples[i], tokenizer, template), response_of(option, template)) for i, option in candidates]
    rows = encode(pairs, tokenizer, sequence_length)
    scores = [0.0] * len(rows)
    device = next(model.parameters()).device
    order = sorted(range(len(rows)), key=lambda item: len(rows[item].tokens))
    for start in range(0, len(order), batch_size):
        piece = order[start : start + batch_size]
        batch = collate([rows[item] for item in piece], layout, device)
        for item, score in zip(piece, token_log_probabilities(model, batch).sum(dim=1).tolist(), strict=True):
            scores[item] = score

    best: dict[int, tuple[float, str]] = {}
    losses: dict[int, float] = {}
    for (index, option), row, score in zip(candidates, rows, scores, strict=True):
        if option == examples[index].output:
            losses[index] = -score / row.response
        if index not in best or score > best[index][0]:
            best[index] = (score, option)
    answers = {index: best[index][1] for index, example in enumerate(examples) if example.options}
    free = [index for index, example in enumerate(examples) if not example.options]
    answers |= zip(
        free,
        greedy(model, tokenizer, [examples[i] for i in free], layout, sequence_length, batch_size, template),
        strict=True,
    )
    return [
        Judgement(
            task=example.task,
            correct=is_correct(answers[index], example),
            loss=losses[index],
            unseen=None if seen_inputs is None else example.input not in seen_inputs,
        )
        for index, example in enumerate(examples)
    ]


def greedy(
    model: torch.nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    examples: Sequence[Example],
    layout: Layout,
    sequence_length: int,
    batch_size: int,
    template: str = "plain",
) -> list[str]:
    """Greedy output of each example, cut at the end-of-sequence token or after `MAX_NEW_TOKENS`."""
    if not examples:
        return []  # The tokenizer does not take an empty list.
    # A row without a response is a prompt.
    texts = [prompt_of(example, tokenizer, template) for example in examples]
    tokens: list[list[int]] = tokenizer(texts, add_special_tokens=False)["input_ids"]
    rows = [Encoded(tuple(row[-sequence_length:]), 0) for row in tokens]
    outputs = [""] * len(rows)
    device = next(model.parameters()).device
    order = sorted(range(len(rows)), key=lambda item: len(rows[item].tokens))
    for start in range(0, len(order), batch_size):
        piece = order[start : start + batch_size]
        batch = collate([rows[item] for item in piece], layout, device)
        generated = model.generate(  # type: ignore[operator]
            input_ids=batch["input_ids"],
            attention_mask=batch["attention_mask"],
            max_new_tokens=MAX_NEW_TOKENS,
            do_sample=False,
            pad_token_id=tokenizer.pad_token_id,
            eos_token_id=tokenizer.eos_token_id,
        )
        # A decoder repeats what it read; the decoder of an encoder-decoder begins with its start token.
        read = 1 if layout.architecture == "encoder_decoder" else batch["input_ids"].shape[1]
        written = tokenizer.batch_decode(generated[:, read:], skip_special_tokens=True)
        for item, text in zip(piece, written, strict=True):
            outputs[item] = text
    return outputs


def is_correct(answer: str, example: Example) -> bool:
    """The chosen option is the right one, or the free-form answer equals the response after normalisation."""
    if example.options:
        return answer == example.output
    return normalised(answer) == normalised(example.output)


def normalised(text: str) -> str:
    """Lower case, white space folded, no full stop at the end."""
    return " ".join(text.lower().split()).removesuffix(".")


def summarise(judgements: Sequence[Judgement]) -> Metrics:
    """Macro averages over tasks. Raises ValueError when there is nothing to average."""
    by_task = _accuracy_by_task(judgements)
    unseen = [item for item in judgements if item.unseen]
    counts = {task: sum(item.task == task for item in judgements) for task in by_task}
    return Metrics(
        accuracy=statistics.fmean(by_task.values()),
        accuracy_by_task=by_task,
        worst_task=min(by_task, key=by_task.__getitem__),
        spread_over_tasks=statistics.pstdev(by_task.values()),
        accuracy_unseen=statistics.fmean(_accuracy_by_task(unseen).values()) if unseen else None,
        response_perplexity=math.exp(min(statistics.fmean(item.loss for item in judgements), 700.0)),
        n=len(judgements),
        n_unseen=None if judgements[0].unseen is None else len(unseen),
        n_by_task=counts,
    )


def _accuracy_by_task(judgements: Sequence[Judgement]) -> dict[str, float]:
    correct: dict[str, list[bool]] = defaultdict(list)
    for item in judgements:
        correct[item.task].append(item.correct)
    return {task: statistics.fmean(correct[task]) for task in sorted(correct)}

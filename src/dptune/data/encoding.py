"""From examples to tensors: prompt template, tokens, response labels, batches sorted by length."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch
from numpy.typing import NDArray

from dptune.data.schema import Example

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

IGNORED = -100
"""Label of a position that is not part of the response."""

Batch = dict[str, torch.Tensor]
"""`input_ids` and `attention_mask` [b, t], padded on the left; `labels` [b, k], the last k tokens of each row with
`IGNORED` before the response, so that logits are computed for the k + 1 last positions only."""


@dataclass(frozen=True, slots=True)
class Encoded:
    """One example as tokens: a prompt and the response that is learned or scored."""

    tokens: tuple[int, ...]
    response: int
    """Number of response tokens at the end, the end-of-sequence token included."""


def prompt(instruction: str, text: str) -> str:
    """What the model reads before its response."""
    return f"{instruction}\n{text}\n>" if text else f"{instruction}\n>"


def encode(pairs: Sequence[tuple[str, str]], tokenizer: PreTrainedTokenizerBase, sequence_length: int) -> list[Encoded]:
    """Tokens of (prompt, response) pairs.

    A public rule keeps `sequence_length` tokens: the prompt is cut from the left, and a response that is too long by
    itself from the right. Each row depends on its own text only.
    """
    prompts = tokenizer([first for first, _ in pairs], add_special_tokens=False)["input_ids"]
    responses = tokenizer([f" {second}" for _, second in pairs], add_special_tokens=False)["input_ids"]
    rows = []
    for head, tail in zip(prompts, responses, strict=True):
        tail = [*tail, tokenizer.eos_token_id][: sequence_length - 1]
        head = head[-(sequence_length - len(tail)) :]
        rows.append(Encoded((*head, *tail), len(tail)))
    return rows


def encode_examples(
    examples: Sequence[Example], tokenizer: PreTrainedTokenizerBase, sequence_length: int
) -> list[Encoded]:
    """Tokens of examples with their own responses."""
    return encode(
        [(prompt(example.instruction, example.input), example.output) for example in examples],
        tokenizer,
        sequence_length,
    )


def collate(rows: Sequence[Encoded], pad: int, device: torch.device | str = "cpu") -> Batch:
    """A batch of rows, padded on the left so that all responses end together."""
    width = max(len(row.tokens) for row in rows)
    answer = max(row.response for row in rows)
    tokens = np.full((len(rows), width), pad, dtype=np.int64)
    mask = np.zeros((len(rows), width), dtype=np.int64)
    labels = np.full((len(rows), answer), IGNORED, dtype=np.int64)
    for index, row in enumerate(rows):
        tokens[index, width - len(row.tokens) :] = row.tokens
        mask[index, width - len(row.tokens) :] = 1
        if row.response:
            labels[index, answer - row.response :] = row.tokens[-row.response :]
    return {
        "input_ids": torch.from_numpy(tokens).to(device),
        "attention_mask": torch.from_numpy(mask).to(device),
        "labels": torch.from_numpy(labels).to(device),
    }


def physical_batches(rows: Sequence[Encoded], units: NDArray[np.int64], size: int) -> Iterator[NDArray[np.int64]]:
    """Positions of a logical batch cut into pieces of about `size`, short rows together, units never split.

    Args:
        rows: the logical batch.
        units: privacy unit of each row; rows of one unit stay in one piece.
        size: rows in a piece; a unit with more rows makes a larger one.
    """
    members: dict[int, list[int]] = {}
    for position, unit in enumerate(units.tolist()):
        members.setdefault(unit, []).append(position)
    piece: list[int] = []
    for group in sorted(members.values(), key=lambda group: max(len(rows[item].tokens) for item in group)):
        if piece and len(piece) + len(group) > size:
            yield np.array(piece)
            piece = []
        piece.extend(group)
    if piece:
        yield np.array(piece)


def token_log_probabilities(model: torch.nn.Module, batch: Mapping[str, torch.Tensor]) -> torch.Tensor:
    """Log-probability of each label given what stands before it: [b, k], zero where there is no label."""
    labels, mask = batch["labels"], batch["attention_mask"]
    positions = (mask.cumsum(dim=1) - 1).clamp(min=0)
    logits: torch.Tensor = model(
        input_ids=batch["input_ids"],
        attention_mask=mask,
        position_ids=positions,
        logits_to_keep=labels.shape[1] + 1,
        use_cache=False,
    ).logits[:, :-1]
    known = labels != IGNORED
    chosen = logits.float().log_softmax(dim=-1).gather(2, labels.where(known, 0).unsqueeze(2)).squeeze(2)
    return chosen.where(known, 0.0)


def example_losses(model: torch.nn.Module, batch: Mapping[str, torch.Tensor]) -> torch.Tensor:
    """Loss of each example [b]: mean over its own response tokens, zero when it has none (SPECIFICATION.md 1.3)."""
    tokens = (batch["labels"] != IGNORED).sum(dim=1)
    return -token_log_probabilities(model, batch).sum(dim=1) / tokens.clamp(min=1)

"""From tokens to tensors: physical batches of public shapes, how each architecture reads them, losses of rows.

A physical batch has one of a few public shapes, and a row's shape depends on its own length only. Which kernels run,
and how they cut up their work, depends on the shape, so that within one a row's result does not depend on the other
rows, not even in its last bits (SPECIFICATION.md 10.3). A batch is filled up with rows that do not count.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray

from dptune.data.encoding import Encoded

IGNORED = -100
"""Label of a position that is not part of the response."""

FILLER = Encoded((0,), 0)
"""A row that does not count: without a response it has no loss and no gradient."""

Architecture = Literal["decoder", "encoder", "encoder_decoder"]

Tensors = dict[str, torch.Tensor]
"""Inputs of the model, padded on the right, and what is wanted of it: `labels` [b, k], the response's tokens, with
`IGNORED` where there is none, and `label_positions` [b, k], where in the input they are predicted.

- decoder: `input_ids` [b, t]. No token sees what comes after it, so that padding on the right needs no mask, and never
  stands between a soft prompt and the text.
- encoder: the response is masked in `input_ids` and predicted in place; `attention_mask` hides the padding.
- encoder-decoder: the encoder reads the prompt, `decoder_input_ids` [b, k] are the labels moved by one.
"""


@dataclass(frozen=True)
class InputFormat:
    """How a backbone reads an example."""

    pad: int
    """Token that pads."""
    architecture: Architecture = "decoder"
    """Decoder: the response follows the prompt. Encoder: it is masked. Encoder-decoder: the decoder writes it."""
    prefix: tuple[int, ...] = ()
    """Tokens that an encoder wants before the prompt, such as [CLS]."""
    end: int | None = None
    """End token: what an encoder may see of the response, and what ends the prompt of an encoder-decoder."""
    mask: int | None = None
    """Mask token of an encoder."""
    start: int | None = None
    """First token that the decoder of an encoder-decoder reads."""
    first_position: int | None = 0
    """Number of the first position; None for a backbone that takes no position ids."""
    begin: tuple[int, ...] = ()
    """Tokens that the tokenizer's own call puts before a text, and that the backbone was trained with; what stands in
    `prefix` is not repeated here."""
    positions: int | None = None
    """How many positions there are; None without an end."""

    @property
    def extra(self) -> int:
        """Columns of the input beside a row's own tokens.

        The last one is padding in every row: to a batch without any, a backbone that masks would give other kernels.
        """
        return {"decoder": 0, "encoder": len(self.prefix) + 1, "encoder_decoder": 2}[self.architecture]

    @property
    def longest(self) -> int | None:
        """Most tokens of a row that its positions last for; None without an end."""
        if self.positions is None:
            return None
        if self.architecture != "encoder":
            return self.positions - self.extra
        # Position ids that are given stop before the column that no row fills.
        return self.positions - (self.extra if self.first_position is None else len(self.prefix) + self.first_position)

    def beginning(self, template: str) -> tuple[int, ...]:
        """Tokens before a prompt; a chat template writes its own."""
        return self.begin if template == "plain" else ()

    def width_of(self, row: Encoded) -> int:
        """Columns of the input that a row needs."""
        response = row.response if self.architecture == "encoder_decoder" else 0
        return len(row.tokens) - response + self.extra


@dataclass(frozen=True, order=True)
class Shape:
    """The public shape of a physical batch."""

    width: int
    """Columns of the input."""
    labels: int
    """Most tokens of a response."""
    rows: int


SHORTEST_WIDTH, GROWTH = 16, 1.3

FEWEST_LABELS = 8
"""Responses up to this length have shapes of their own: an option is short, and logits are large."""

TOKENS_A_ROW = 64
"""Tokens of a row for which `Ladder.rows` is meant."""


@dataclass(frozen=True)
class Ladder:
    """The shapes that rows of up to `longest` tokens come in: a public choice.

    Widths are multiples of 8 that grow by less than a third: a row is padded by about a tenth of its length. They are
    few, because the last batch of each is filled up, and because each is checked.
    """

    longest: int
    """Most tokens of a row (`environment.sequence_length`)."""
    rows: int
    """Rows of a batch of short rows; longer ones come in fewer, so that the tokens of a batch stay about the same."""
    layout: InputFormat

    @property
    def widths(self) -> tuple[int, ...]:
        """All widths, in ascending order; the last is the least that takes every row."""
        most, width, widths = self.longest + self.layout.extra, SHORTEST_WIDTH, []
        while width * 1.08 < most:
            widths.append(width)
            width = max(width + 8, int(width * GROWTH) // 8 * 8)
        return (*widths, most)

    @property
    def shapes(self) -> tuple[Shape, ...]:
        """Every shape that a row can have, in ascending order."""
        found = {self._shape(width, labels) for width in self.widths for labels in self._labels()}
        return tuple(sorted(found))

    def shape_of(self, row: Encoded) -> Shape:
        """The shape of the batches that a row stands in: a function of its own length and of its response's."""
        width = next(width for width in self.widths if width >= self.layout.width_of(row))
        return self._shape(width, next(labels for labels in self._labels() if labels >= row.response))

    def _labels(self) -> tuple[int, ...]:
        return (FEWEST_LABELS, self.longest) if self.longest > FEWEST_LABELS else (self.longest,)

    def _shape(self, width: int, labels: int) -> Shape:
        if self.layout.architecture != "encoder_decoder":
            labels = min(labels, width)
        return Shape(width, labels, max(1, self.rows * TOKENS_A_ROW // max(width, TOKENS_A_ROW)))


@dataclass(frozen=True)
class Piece:
    """A physical batch: rows of one shape, by their positions in what was cut up."""

    shape: Shape
    positions: NDArray[np.int64]
    """Shape (n,), n at most `shape.rows`; the rows after them are fillers."""

    def padded(self, values: NDArray[np.int64], value: int) -> torch.Tensor:
        """What belongs to each row of the batch, and `value` for the fillers; shape (rows,)."""
        full = np.full(self.shape.rows, value, dtype=np.int64)
        full[: len(self.positions)] = values[self.positions]
        return torch.from_numpy(full)


def physical_batches(rows: Sequence[Encoded], ladder: Ladder) -> Iterator[Piece]:
    """Rows cut into physical batches, shape by shape, in their order within a shape."""
    members: dict[Shape, list[int]] = {}
    for position, row in enumerate(rows):
        members.setdefault(ladder.shape_of(row), []).append(position)
    for shape, positions in sorted(members.items()):
        for start in range(0, len(positions), shape.rows):
            yield Piece(shape, np.array(positions[start : start + shape.rows]))


def collate(
    rows: Sequence[Encoded], layout: InputFormat, shape: Shape | None = None, device: torch.device | str = "cpu"
) -> Tensors:
    """A physical batch of the given shape, filled up with rows that do not count; without one, of the least shape.

    Raises:
        ValueError: when the rows do not have the shape.
    """
    if shape is None:
        shape = Shape(max(map(layout.width_of, rows)), max(1, *(row.response for row in rows)), len(rows))
    if len(rows) > shape.rows:
        raise ValueError(f"{len(rows)} rows do not fit into a physical batch of {shape.rows}")
    arrays = _LAYOUTS[layout.architecture]([*rows, *[FILLER] * (shape.rows - len(rows))], layout, shape)
    return {name: torch.from_numpy(value).to(device) for name, value in arrays.items()}


def _decoder(rows: Sequence[Encoded], layout: InputFormat, shape: Shape) -> dict[str, NDArray[np.int64]]:
    labels, positions = [], []
    for row in rows:
        # A token is predicted where the one before it is read: nothing predicts the first of all.
        begin = max(len(row.tokens) - row.response, 1)
        labels.append(row.tokens[begin:])
        positions.append(tuple(range(begin - 1, len(row.tokens) - 1)))
    batch = {
        "input_ids": _padded([row.tokens for row in rows], layout.pad, shape.width),
        "labels": _padded(labels, IGNORED, shape.labels),
        "label_positions": _padded(positions, 0, shape.labels),
    }
    if layout.first_position is not None:
        # A backbone would make them once for all rows, of which no engine can tell each row's share.
        batch["position_ids"] = np.tile(np.arange(shape.width), (len(rows), 1))
    return batch


def _encoder(rows: Sequence[Encoded], layout: InputFormat, shape: Shape) -> dict[str, NDArray[np.int64]]:
    assert layout.mask is not None
    tokens, labels, positions = [], [], []
    for row in rows:
        begin = len(row.tokens) - row.response
        ends = row.response > 1 and row.tokens[-1] == layout.end
        hidden = row.tokens[begin : len(row.tokens) - ends]
        shown = (layout.mask,) * len(hidden) + row.tokens[len(row.tokens) - ends :]
        tokens.append((*layout.prefix, *row.tokens[:begin], *shown))
        labels.append(hidden)
        positions.append(tuple(range(len(layout.prefix) + begin, len(layout.prefix) + begin + len(hidden))))
    batch = {
        "input_ids": _padded(tokens, layout.pad, shape.width),
        "attention_mask": _padded([(1,) * len(row) for row in tokens], 0, shape.width),
        "labels": _padded(labels, IGNORED, shape.labels),
        "label_positions": _padded(positions, 0, shape.labels),
    }
    if layout.first_position is not None:
        # The column that no row fills may be beyond the backbone's last position.
        places = np.arange(shape.width).clip(max=max(shape.width - 2, 0)) + layout.first_position
        batch["position_ids"] = np.tile(places, (len(rows), 1))
    return batch


def _encoder_decoder(rows: Sequence[Encoded], layout: InputFormat, shape: Shape) -> dict[str, NDArray[np.int64]]:
    assert layout.start is not None and layout.end is not None
    prompts = [(*row.tokens[: len(row.tokens) - row.response], layout.end) for row in rows]
    labels = [row.tokens[len(row.tokens) - row.response :] for row in rows]
    shifted = [(layout.start, *row)[: len(row)] for row in labels]
    return {
        "input_ids": _padded(prompts, layout.pad, shape.width),
        "attention_mask": _padded([(1,) * len(row) for row in prompts], 0, shape.width),
        "decoder_input_ids": _padded(shifted, layout.pad, shape.labels),
        "labels": _padded(labels, IGNORED, shape.labels),
    }


_LAYOUTS = {"decoder": _decoder, "encoder": _encoder, "encoder_decoder": _encoder_decoder}


def _padded(rows: Sequence[tuple[int, ...]], value: int, width: int, left: bool = False) -> NDArray[np.int64]:
    padded = np.full((len(rows), width), value, dtype=np.int64)
    for index, row in enumerate(rows):
        begin = width - len(row) if left else 0
        padded[index, begin : begin + len(row)] = row
    return padded


def collate_prompts(
    prompts: Sequence[tuple[int, ...]], layout: InputFormat, shape: Shape, device: torch.device | str = "cpu"
) -> Tensors:
    """Prompts that are to be gone on with, filled up with the last one: a decoder's end where it goes on."""
    full, left = [*prompts, *[prompts[-1]] * (shape.rows - len(prompts))], layout.architecture == "decoder"
    if layout.architecture == "encoder_decoder":
        assert layout.end is not None
        full = [(*prompt, layout.end) for prompt in full]
    arrays = {
        "input_ids": _padded(full, layout.pad, shape.width, left),
        "attention_mask": _padded([(1,) * len(row) for row in full], 0, shape.width, left),
    }
    return {name: torch.from_numpy(value).to(device) for name, value in arrays.items()}


def token_log_probabilities(model: torch.nn.Module, batch: Mapping[str, torch.Tensor]) -> torch.Tensor:
    """Log-probability of each label given what the model reads: [b, k], zero where there is no label."""
    labels, places = batch["labels"], batch.get("label_positions")
    inputs: dict[str, Any] = {name: batch[name] for name in batch if name not in ("labels", "label_positions")}
    if "attention_mask" not in inputs or "decoder_input_ids" in inputs:
        inputs["use_cache"] = False  # An encoder has none.
    if places is None:
        logits = model(**inputs).logits
    else:
        with _read_by_the_head(model, places, inputs["input_ids"].shape[1]) as chosen:
            logits = model(**inputs).logits
        if not chosen:
            logits = logits.gather(1, places.unsqueeze(2).expand(-1, -1, logits.shape[2]))
    known = labels != IGNORED
    found: torch.Tensor = logits.float().log_softmax(dim=-1).gather(2, labels.where(known, 0).unsqueeze(2)).squeeze(2)
    return found.where(known, 0.0)


@contextmanager
def _read_by_the_head(model: torch.nn.Module, places: torch.Tensor, width: int) -> Iterator[list[bool]]:
    """Inside, the output head reads the given places [b, k] of each row only; a list with an entry says that it did.

    Logits of all places would be most of a step where the vocabulary is large, and a slice that is not contiguous is
    copied by torch together with the whole head. What the model does to its logits after the head stays in force. A
    head that is trained reads everything.
    """
    chosen: list[bool] = []
    outputs = getattr(model, "get_output_embeddings", None)
    head = outputs() if outputs is not None else None
    if head is not None and any(value.requires_grad for value in head.parameters()):
        head = None  # An engine may do a trained layer again, without what is hung on it here.

    def select(layer: torch.nn.Module, args: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor, ...]:
        hidden, *rest = args
        # What stands before the text is a soft prompt.
        at = (places + (hidden.shape[1] - width)).unsqueeze(2).expand(-1, -1, hidden.shape[2])
        chosen.append(True)
        return (hidden.gather(1, at), *rest)

    handle = None if head is None else head.register_forward_pre_hook(select)
    try:
        yield chosen
    finally:
        if handle is not None:
            handle.remove()


def example_losses(model: torch.nn.Module, batch: Mapping[str, torch.Tensor]) -> torch.Tensor:
    """Loss of each example [b]: mean over its own response tokens, zero when it has none (SPECIFICATION.md 1.3)."""
    tokens = (batch["labels"] != IGNORED).sum(dim=1)
    losses: torch.Tensor = -token_log_probabilities(model, batch).sum(dim=1) / tokens.clamp(min=1)
    return losses

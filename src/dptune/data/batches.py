"""From tokens to tensors: how each architecture reads an example, batches sorted by length, losses of single rows.

Nothing that one row gets depends on the other rows of its batch, not even on how much padding they cause; with a
`Layout.length` not even in its last bits.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from numpy.typing import NDArray

from dptune.data.encoding import Encoded

IGNORED = -100
"""Label of a position that is not part of the response."""

Architecture = Literal["decoder", "encoder", "encoder_decoder"]

Batch = dict[str, torch.Tensor]
"""Inputs of the model [b, t] and `labels` [b, k], the response's tokens, with `IGNORED` where there is none.

- decoder: `input_ids` padded on the left, so that all responses end together and logits are computed for the last
  positions only; `labels` are the last k tokens of each row.
- encoder: the response is masked in `input_ids` and predicted in place, at `label_positions` [b, k].
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
    length: int | None = None
    """Most tokens of a row, for batches whose shape does not depend on their rows: a public number. None: each batch is
    as wide as its longest row.

    Tokens get one column more, which is padding in every row: a batch without any would be given to other kernels."""


def collate(rows: Sequence[Encoded], layout: InputFormat, device: torch.device | str = "cpu") -> Batch:
    """A batch of rows in the layout of their backbone."""
    arrays = _LAYOUTS[layout.architecture](rows, layout)
    return {name: torch.from_numpy(value).to(device) for name, value in arrays.items()}


def _decoder(rows: Sequence[Encoded], layout: InputFormat) -> dict[str, NDArray[np.int64]]:
    labels = [row.tokens[len(row.tokens) - row.response :] for row in rows]
    mask = _padded([(1,) * len(row.tokens) for row in rows], 0, _plus(layout.length, 1), left=True)
    return {
        "input_ids": _padded([row.tokens for row in rows], layout.pad, _plus(layout.length, 1), left=True),
        "attention_mask": mask,
        "position_ids": (mask.cumsum(axis=1) - 1).clip(0),
        "labels": _padded(labels, IGNORED, _plus(layout.length, -1), left=True),
    }


def _encoder(rows: Sequence[Encoded], layout: InputFormat) -> dict[str, NDArray[np.int64]]:
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
    width = _plus(layout.length, len(layout.prefix) + 1)
    batch = {
        "input_ids": _padded(tokens, layout.pad, width),
        "attention_mask": _padded([(1,) * len(row) for row in tokens], 0, width),
        "labels": _padded(labels, IGNORED, layout.length),
        "label_positions": _padded(positions, 0, layout.length),
    }
    if layout.first_position is not None:
        places = np.arange(batch["input_ids"].shape[1])
        # The column that no row fills may be beyond the backbone's last position.
        places = places if layout.length is None else places.clip(max=len(places) - 2)
        batch["position_ids"] = np.tile(places + layout.first_position, (len(rows), 1))
    return batch


def _encoder_decoder(rows: Sequence[Encoded], layout: InputFormat) -> dict[str, NDArray[np.int64]]:
    assert layout.start is not None and layout.end is not None
    prompts = [(*row.tokens[: len(row.tokens) - row.response], layout.end) for row in rows]
    labels = [row.tokens[len(row.tokens) - row.response :] for row in rows]
    shifted = [(layout.start, *row)[: len(row)] for row in labels]
    return {
        "input_ids": _padded(prompts, layout.pad, _plus(layout.length, 1)),
        "attention_mask": _padded([(1,) * len(row) for row in prompts], 0, _plus(layout.length, 1)),
        "decoder_input_ids": _padded(shifted, layout.pad, layout.length),
        "labels": _padded(labels, IGNORED, layout.length),
    }


_LAYOUTS = {"decoder": _decoder, "encoder": _encoder, "encoder_decoder": _encoder_decoder}


def _plus(length: int | None, more: int) -> int | None:
    return None if length is None else length + more


def _padded(
    rows: Sequence[tuple[int, ...]], value: int, width: int | None = None, left: bool = False
) -> NDArray[np.int64]:
    width = max(len(row) for row in rows) if width is None else width
    padded = np.full((len(rows), width), value, dtype=np.int64)
    for index, row in enumerate(rows):
        begin = width - len(row) if left else 0
        padded[index, begin : begin + len(row)] = row
    return padded


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
    """Log-probability of each label given what the model reads: [b, k], zero where there is no label."""
    labels = batch["labels"]
    inputs = {name: value for name, value in batch.items() if name not in ("labels", "label_positions")}
    if "label_positions" in batch:
        logits = model(**inputs).logits
        logits = logits.gather(1, batch["label_positions"].unsqueeze(2).expand(-1, -1, logits.shape[2]))
    elif "decoder_input_ids" in batch:
        logits = model(**inputs, use_cache=False).logits
    else:
        logits = model(**inputs, logits_to_keep=labels.shape[1] + 1, use_cache=False).logits[:, :-1]
    known = labels != IGNORED
    chosen: torch.Tensor = logits.float().log_softmax(dim=-1).gather(2, labels.where(known, 0).unsqueeze(2)).squeeze(2)
    return chosen.where(known, 0.0)


def example_losses(model: torch.nn.Module, batch: Mapping[str, torch.Tensor]) -> torch.Tensor:
    """Loss of each example [b]: mean over its own response tokens, zero when it has none (SPECIFICATION.md 1.3)."""
    tokens = (batch["labels"] != IGNORED).sum(dim=1)
    losses: torch.Tensor = -token_log_probabilities(model, batch).sum(dim=1) / tokens.clamp(min=1)
    return losses

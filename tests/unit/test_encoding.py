import dataclasses
import json
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from backbones_for_tests import layout_of, tiny_llama
from hypothesis import given, settings
from hypothesis import strategies as st
from numerics import FLOAT32, assert_close_to_largest

from dptune.data.batches import (
    IGNORED,
    InputFormat,
    Ladder,
    Shape,
    collate,
    example_losses,
    physical_batches,
    token_log_probabilities,
)
from dptune.data.encoding import Cuts, Encoded, cuts, encode, encode_prompts
from dptune.data.schema import Example
from dptune.data.templates import plain as prompt

pytestmark = pytest.mark.numerical

LAYOUT = InputFormat(pad=0)

PAIRS = [
    (prompt("which team ?", "reset my code"), " support"),
    (prompt("is it urgent ?", ""), " no"),
    ("x", " y"),
]


def test_tokens_are_the_text_and_its_response(tokenizer) -> None:
    for (head, tail), row in zip(PAIRS, encode(PAIRS, tokenizer, 64), strict=True):
        assert tokenizer.decode(row.tokens) == f"{head}{tail}<eos>"
        assert tokenizer.decode(row.tokens[-row.response :]) == f"{tail}<eos>"


def test_a_long_prompt_is_cut_from_the_left_and_a_long_response_from_the_right(tokenizer) -> None:
    whole = encode([("abcdefghij" * 3, "no")], tokenizer, 200)[0]
    cut = encode([("abcdefghij" * 3, "no")], tokenizer, 12)[0]
    assert cut.tokens == whole.tokens[-12:] and cut.response == whole.response
    only = encode([("abc", "klmnopqrst" * 3)], tokenizer, 12)[0]
    assert len(only.tokens) == 12 and only.response == 11


def test_what_begins_a_text_stands_before_each_prompt_once_and_is_never_cut_away(tokenizer) -> None:
    begin = (7, 8)
    bare, begun = encode(PAIRS, tokenizer, 64), encode(PAIRS, tokenizer, 64, begin)
    assert [row.tokens for row in begun] == [(*begin, *row.tokens) for row in bare]
    assert [row.response for row in begun] == [row.response for row in bare]
    for pair in (("abcdefghij" * 3, "no"), ("abc", "klmnopqrst" * 3)):
        (row,) = encode([pair], tokenizer, 12, begin)
        assert len(row.tokens) == 12 and row.tokens[:2] == begin
    prompts = [head for head, _ in PAIRS]
    assert [row.tokens for row in encode_prompts(prompts, tokenizer, 64, begin)] == [
        row.tokens[: -row.response] for row in begun
    ]
    # A prompt that brings it along has it once.
    first = tuple(tokenizer("which")["input_ids"][:2])
    assert encode([("which", "no")], tokenizer, 64, first) == encode([("which", "no")], tokenizer, 64)


def example(instruction: str, text: str, *options: str) -> Example:
    return Example("task", instruction, text, options or None, options[0] if options else "no", None, "train")


@pytest.mark.parametrize(
    ("record", "expected"),
    [
        (example("is it ?", "x", "yes", "no"), Cuts(1)),
        (example("is it ?", "late " * 30, "yes", "no"), Cuts(1, cut=1, no_instruction=1)),
        (example("w" * 40, "late", "yes", "no"), Cuts(1, cut=1)),
        (example("is it ?", "x", "z" * 60 + "a", "z" * 60 + "b"), Cuts(1, cut=1, few_tokens=1, same_options=1)),
        (example("is it ?", "x", "z" * 60 + "a", "z" * 60 + "a", "no"), Cuts(1, cut=1, few_tokens=1)),
        (example("is it ?", "x", "a" + "z" * 60, "b" + "z" * 60), Cuts(1, cut=1, few_tokens=1)),
    ],
)
def test_what_is_cut_off_is_counted(tokenizer, record: Example, expected: Cuts) -> None:
    found = cuts([record], tokenizer, 32)
    assert dataclasses.replace(found, no_instruction=expected.no_instruction) == expected
    assert found.no_instruction >= expected.no_instruction
    assert cuts([record] * 3, tokenizer, 32).cut == 3 * expected.cut and cuts([], tokenizer, 32) == Cuts()


def test_cuts_are_said_in_one_line_and_nothing_is_said_of_none(tokenizer) -> None:
    assert cuts([example("is it ?", "x", "yes", "no")], tokenizer, 32).in_words(32) is None
    said = Cuts(9, cut=4, no_instruction=1, same_options=2).in_words(32)
    assert said is not None and said.startswith("environment.sequence_length=32: 4 of 9 records are cut; 1 lose")
    assert "2 have options that are equal" in said and "tokens of their prompt" not in said


def test_a_batch_is_padded_on_the_right(tokenizer) -> None:
    rows = encode(PAIRS, tokenizer, 64)
    batch = collate(rows, LAYOUT)
    for index, row in enumerate(rows):
        assert batch["input_ids"][index, : len(row.tokens)].tolist() == list(row.tokens)
        assert batch["input_ids"][index, len(row.tokens) :].eq(LAYOUT.pad).all()
        labels = batch["labels"][index]
        assert labels[labels != IGNORED].tolist() == list(row.tokens[-row.response :])
        places = batch["label_positions"][index, : row.response] + 1
        assert [row.tokens[place] for place in places.tolist()] == list(row.tokens[-row.response :])


def test_the_first_token_of_all_is_not_predicted() -> None:
    batch = collate([Encoded((4, 5, 6), 3)], LAYOUT)
    assert batch["labels"].tolist() == [[5, 6, IGNORED]] and batch["label_positions"].tolist() == [[0, 1, 0]]


def test_the_loss_is_the_mean_over_the_examples_own_response(tokenizer) -> None:
    """Against a forward pass of each example alone, without padding, over all logits."""
    model = tiny_llama().double().eval()
    rows = encode(PAIRS, tokenizer, 64)
    losses = example_losses(model, collate(rows, LAYOUT))
    for row, loss in zip(rows, losses, strict=True):
        logits = model(torch.tensor([row.tokens])).logits[0].log_softmax(-1)
        places = range(len(row.tokens) - row.response, len(row.tokens))
        expected = -sum(logits[place - 1, row.tokens[place]] for place in places) / row.response
        assert_close_to_largest(loss, expected)


def test_an_example_without_response_has_no_loss_and_no_gradient(tokenizer) -> None:
    model = tiny_llama()
    rows = [Encoded((5, 6, 7), 0), *encode(PAIRS[:1], tokenizer, 64)]
    losses = example_losses(model, collate(rows, LAYOUT))
    assert losses[0].item() == 0.0 and losses[1].item() > 0
    losses[0].backward()
    assert all(not parameter.grad.any() for parameter in model.parameters() if parameter.grad is not None)


def test_log_probabilities_do_not_depend_on_the_rest_of_the_batch(tokenizer) -> None:
    model = tiny_llama().eval()
    rows = encode(PAIRS, tokenizer, 64)
    alone = token_log_probabilities(model, collate(rows[1:2], LAYOUT)).sum()
    together = token_log_probabilities(model, collate(rows, LAYOUT))[1].sum()
    assert_close_to_largest(together, alone)


def test_physical_batches_cover_the_batch_once_short_rows_first() -> None:
    ladder = Ladder(40, 2, LAYOUT)
    rows = [Encoded(tuple(range(length)), 1) for length in (39, 2, 17, 16, 5)]
    pieces = list(physical_batches(rows, ladder))
    assert [piece.positions.tolist() for piece in pieces] == [[1, 3], [4], [2], [0]]
    assert [piece.shape for piece in pieces] == [Shape(16, 8, 2), Shape(16, 8, 2), Shape(24, 8, 2), Shape(40, 8, 2)]
    assert list(physical_batches([], ladder)) == []


@given(lengths=st.lists(st.integers(2, 60), min_size=1, max_size=30), out=st.integers(0, 29), data=st.data())
@settings(max_examples=60, deadline=None)
def test_the_shape_of_a_row_is_a_function_of_that_row(lengths: list[int], out: int, data: st.DataObject) -> None:
    ladder = Ladder(60, 4, layout_of(data.draw(st.sampled_from(("llama", "bert", "t5")))))
    rows = [Encoded((1,) * length, data.draw(st.integers(1, length - 1))) for length in lengths]

    def shapes(some: list[Encoded]) -> list[Shape]:
        pieces = list(physical_batches(some, ladder))
        assert {piece.shape for piece in pieces} <= set(ladder.shapes)
        for piece in pieces:
            taken = [some[at] for at in piece.positions]
            assert all(len(value) == piece.shape.rows for value in collate(taken, ladder.layout, piece.shape).values())
        found = {int(at): piece.shape for piece in pieces for at in piece.positions}
        return [found[at] for at in range(len(some))]

    out %= len(rows)
    everyone = shapes(rows)
    assert [*everyone[:out], *everyone[out + 1 :]] == shapes([*rows[:out], *rows[out + 1 :]])


@pytest.mark.parametrize("name", ["loss-mask", "loss-empty"])
def test_the_loss_equals_its_reference_vector(name: str) -> None:
    path = Path(__file__).parents[1] / "privacy" / "vectors.json"
    (vector,) = (item for item in json.loads(path.read_text())["vectors"] if item["id"] == name)
    chosen = torch.tensor(vector["inputs"]["logp"], dtype=torch.float64)
    # Two classes of which the label's has the vector's log-probability; the last position predicts nothing.
    logits = torch.stack([chosen, torch.log1p(-chosen.exp())], dim=1)
    logits = torch.cat([logits, torch.zeros(1, 2)])[None]
    mask = torch.tensor(vector["inputs"]["response_mask"], dtype=torch.bool)
    batch = {
        "input_ids": torch.zeros(1, len(mask) + 1, dtype=torch.long),
        "labels": torch.where(mask, 0, IGNORED)[None],
        "label_positions": torch.arange(len(mask))[None],
    }
    found = example_losses(lambda **_: SimpleNamespace(logits=logits), batch)
    assert_close_to_largest(found[0], vector["expected"], FLOAT32)

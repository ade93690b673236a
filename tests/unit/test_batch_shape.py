"""Batches of one public shape, and the check that a row's gradient is then the same to the last bit."""

import dataclasses
from collections.abc import Callable

import numpy as np
import pytest
import torch
from backbones_for_tests import BACKBONES, layout_of
from numerics import assert_close_to_largest

from dptune.config.schema import AdapterConfig
from dptune.data.batches import InputFormat, collate, example_losses, physical_batches
from dptune.data.encoding import Encoded
from dptune.models import adapters
from dptune.models.layers import model_type_of
from dptune.privacy.batch_shape import FixedShapeEngine, fixed_shape_engine
from dptune.privacy.engines import ENGINES
from dptune.privacy.gradients import Batch, Engine, EngineError, Gradients, LoopEngine, moved
from dptune.runs.setup import made_up_rows

pytestmark = pytest.mark.numerical

LENGTH, SIZE = 16, 6


def fixed(backbone: str) -> InputFormat:
    return dataclasses.replace(layout_of(backbone), length=LENGTH)


def probes(layout: InputFormat) -> tuple[Batch, Batch]:
    """Long rows at odd places, others between; and the other way round."""
    lengths = [LENGTH if row % 2 else 5 + 2 * row for row in range(SIZE)]
    others = [5 if row % 2 else LENGTH for row in range(SIZE)]
    return collate(made_up_rows(290, lengths), layout), collate(made_up_rows(290, others, shift=101), layout)


def adapted(backbone: str, dtype: torch.dtype = torch.bfloat16, name: str = "lora") -> tuple[torch.nn.Module, Engine]:
    model = BACKBONES[backbone]().to(dtype)
    engine = adapters.engine_of(name, model_type_of(model))
    model = adapters.attach(model, AdapterConfig(name=name, virtual_tokens=3), rank=2, steps=10, seed=0)
    return model, ENGINES[engine](model, example_losses)


@pytest.mark.parametrize("backbone", list(BACKBONES))
def test_the_shape_of_a_batch_is_public_and_the_losses_stay(backbone: str) -> None:
    layout = fixed(backbone)
    # The longest row whose response is as long as can be, and short ones.
    rows = [Encoded(tuple(range(40, 40 + LENGTH)), LENGTH - 1), *made_up_rows(290, (5, LENGTH, 9))]
    model = BACKBONES[backbone]().double()
    shapes = set()
    for some in (rows, rows[:1] * 4, rows[1:] + rows[1:2]):
        batch = collate(some, layout)
        shapes.add(tuple((name, value.shape) for name, value in batch.items()))
        column = 0 if layout.architecture == "decoder" else -1
        assert bool((batch["attention_mask"][:, column] == 0).all())
        with torch.no_grad():
            expected = torch.cat([example_losses(model, collate([row], layout_of(backbone))) for row in some])
            assert_close_to_largest(example_losses(model, batch), expected)
    assert len(shapes) == 1


def test_an_encoder_may_be_as_long_as_its_position_table() -> None:
    """The column that no row fills lies beyond the table of 128 positions."""
    layout = dataclasses.replace(layout_of("bert"), length=127)
    batch = collate(made_up_rows(290, (127, 9)), layout)
    assert batch["input_ids"].shape == (2, 129) and int(batch["position_ids"].max()) == 127
    assert bool(example_losses(BACKBONES["bert"](), batch).isfinite().all())


def test_a_row_that_is_longer_than_the_public_length_is_an_error() -> None:
    for backbone in ("llama", "bert", "t5"):
        with pytest.raises(ValueError, match="broadcast"):
            collate([Encoded(tuple(range(40, 44 + LENGTH)), 2)], fixed(backbone))


@pytest.mark.parametrize("count", [1, SIZE, SIZE + 1, 2 * SIZE + 3])
def test_rows_are_filled_up_and_the_fill_is_dropped(count: int) -> None:
    model, engine = adapted("llama", torch.float32)
    seen: list[int] = []

    class Watched:
        def __call__(self, batch: Batch) -> tuple[torch.Tensor, Gradients]:
            seen.append(len(batch["labels"]))
            return engine(batch)

        def close(self) -> None:
            engine.close()

    shapes = {name: value.shape for name, value in probes(fixed("llama"))[0].items()}
    batch = collate(made_up_rows(290, [5 + row % 9 for row in range(count)]), fixed("llama"))
    made = FixedShapeEngine(Watched(), shapes)
    losses, found = made(batch)
    assert seen == [SIZE] * -(-count // SIZE)
    made.close()
    expected_losses, expected = LoopEngine(model, example_losses)(batch)
    assert_close_to_largest(losses, expected_losses)
    assert_close_to_largest(found, expected)
    assert all(
        found[name].shape == (count, *value.shape) for name, value in adapters.trainable_parameters(model).items()
    )
    with pytest.raises(EngineError, match="input_ids of a physical batch has not the public shape"):
        made(collate(made_up_rows(290, (5, 7)), layout_of("llama")))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("backbone", list(BACKBONES))
def test_other_rows_and_places_do_not_change_a_bit(backbone: str, dtype: torch.dtype) -> None:
    """As in training: a record is taken out of a logical batch, so that all others move.

    Where this machine's kernels are of another kind the check says so, and what it advises keeps the promise."""
    model, engine = adapted(backbone, dtype)
    before = {name: value.clone() for name, value in adapters.trainable_parameters(model).items()}
    layout, size = fixed(backbone), SIZE
    rows, others = probes(layout)
    try:
        made = fixed_shape_engine(engine, model, rows, others)
    except EngineError as refused:
        assert "set compute.physical_batch_size=1" in str(refused)
        size = 1
        made = fixed_shape_engine(
            engine, model, *({name: value[:1] for name, value in batch.items()} for batch in (rows, others))
        )
    assert all(torch.equal(before[name], value) for name, value in adapters.trainable_parameters(model).items())
    records = made_up_rows(290, [5 + 7 * row % (LENGTH - 4) for row in range(20)])

    def gradients(some: list[Encoded]) -> dict[Encoded, dict[str, torch.Tensor]]:
        found = {}
        for piece in physical_batches(some, np.arange(len(some)), size):
            part = made(collate([some[at] for at in piece], layout))[1]
            found |= {some[at]: {name: value[i] for name, value in part.items()} for i, at in enumerate(piece.tolist())}
        return found

    with moved(adapters.trainable_parameters(model)):
        everyone = gradients(records)
        for out in (0, 7, 19):
            for row, values in gradients(records[:out] + records[out + 1 :]).items():
                assert all(torch.equal(value, everyone[row][name]) for name, value in values.items())


@pytest.mark.parametrize("backbone", list(BACKBONES))
def test_without_a_public_length_the_longest_row_decides_the_shape_of_all(backbone: str) -> None:
    """What one shape is for: of another shape a kernel may compute another row's gradient in other bits."""
    row, longest = made_up_rows(290, (9,)), made_up_rows(290, (LENGTH,))
    shapes = [
        [{name: value.shape[1:] for name, value in collate(some, layout).items()} for some in (row, [*row, *longest])]
        for layout in (layout_of(backbone), fixed(backbone))
    ]
    assert shapes[0][0] != shapes[0][1] and shapes[1][0] == shapes[1][1]


Fault = Callable[[Batch, torch.Tensor], torch.Tensor]

FAULTS: dict[str, Fault] = {
    "chance": lambda batch, value: value * (1 + 1e-6 * torch.rand(())),
    "a row's place in its batch": lambda batch, value: value * (1 + 1e-6 * torch.arange(len(value))).reshape(-1, 1, 1),
    "the other rows of its batch": lambda batch, value: (
        value * (1 + 1e-6 * float(batch["attention_mask"].all(0).sum()))
    ),
}


@pytest.mark.parametrize("what", list(FAULTS))
def test_the_check_names_what_a_gradient_depends_on(what: str) -> None:
    model, engine = adapted("llama")

    class Faulty:
        def __call__(self, batch: Batch) -> tuple[torch.Tensor, Gradients]:
            losses, found = engine(batch)
            name = next(name for name in found if ".v_proj." in name)
            return losses, found | {name: FAULTS[what](batch, found[name])}

        def close(self) -> None:
            engine.close()

    with pytest.raises(
        EngineError, match=rf"v_proj.* depend on {what}; set compute.physical_batch_size=1, or"
    ) as error:
        fixed_shape_engine(Faulty(), model, *probes(fixed("llama")))
    assert "\n" not in str(error.value)


def test_one_row_a_batch_has_no_mates() -> None:
    model, engine = adapted("llama")
    rows, others = ({name: value[:1] for name, value in batch.items()} for batch in probes(fixed("llama")))
    made = fixed_shape_engine(engine, model, rows, others)
    losses, found = made({name: torch.cat([value, others[name]]) for name, value in rows.items()})
    assert len(losses) == 2 and all(len(value) == 2 for value in found.values())

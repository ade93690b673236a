"""Batches of public shapes, and the check that a row's gradient is its own to the last bit."""

import dataclasses
import json
import shutil
import warnings
from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path

import pytest
import torch
from backbones_for_tests import BACKBONES, layout_of
from numerics import assert_close_to_largest

from dptune.config.schema import SHIPPED, AdapterConfig, ConfigError
from dptune.data.batches import FILLER, Ladder, Shape, collate, example_losses, physical_batches
from dptune.data.encoding import Encoded
from dptune.models import adapters
from dptune.models.layers import model_type_of
from dptune.privacy.engines import ENGINES
from dptune.privacy.gradients import Batch, Engine, EngineError, Gradients, LoopEngine, moved
from dptune.privacy.independence import check_independence
from dptune.runs.engine import made_up_rows, probes

pytestmark = pytest.mark.numerical

LONGEST, SIZE = 24, 6


def adapted(backbone: str, dtype: torch.dtype = torch.bfloat16, name: str = "lora") -> tuple[torch.nn.Module, Engine]:
    return adapt(BACKBONES[backbone]().to(dtype), name)


def adapt(model: torch.nn.Module, name: str = "lora") -> tuple[torch.nn.Module, Engine]:
    engine = adapters.engine_of(name, model_type_of(model))
    model = adapters.attach(model, AdapterConfig(name=name, virtual_tokens=3), rank=2, steps=10, seed=0)
    return model, ENGINES[engine](model, example_losses)


def checked(model: torch.nn.Module, engine: Engine, ladder: Ladder) -> None:
    check_independence(engine, model, example_losses, list(probes(ladder, 290, "cpu")))


def right_ladder(model: torch.nn.Module, engine: Engine, ladder: Ladder) -> Ladder:
    """One that passes the check, as a run finds it: with one row a batch where this machine's kernels want that."""
    try:
        checked(model, engine, ladder)
    except EngineError as refused:
        assert "last bits" in str(refused)
        ladder = dataclasses.replace(ladder, rows=1)
        checked(model, engine, ladder)
    return ladder


@pytest.mark.parametrize("backbone", list(BACKBONES))
def test_a_row_fits_into_its_shape_and_its_loss_stays(backbone: str) -> None:
    layout = layout_of(backbone)
    ladder = Ladder(LONGEST, SIZE, layout)
    # The longest row whose response is as long as can be, and short ones.
    rows = [Encoded(tuple(range(40, 40 + LONGEST)), LONGEST - 1), *made_up_rows(290, (5, LONGEST, 9))]
    model = BACKBONES[backbone]().double()
    for piece in physical_batches(rows, ladder):
        own = [rows[at] for at in piece.positions]
        batch = collate(own, layout, piece.shape)
        assert batch["input_ids"].shape == (piece.shape.rows, piece.shape.width)
        assert batch["labels"].shape == (piece.shape.rows, piece.shape.labels)
        with torch.no_grad():
            expected = torch.cat([example_losses(model, collate([row], layout)) for row in own])
            found = example_losses(model, batch)
        assert_close_to_largest(found[: len(own)], expected)
        assert not found[len(own) :].any()


def test_an_encoder_may_be_as_long_as_its_position_table() -> None:
    """The column that no row fills lies beyond the table of 128 positions."""
    ladder = Ladder(127, 2, layout_of("bert"))
    (piece,) = physical_batches(made_up_rows(290, (127,)), ladder)
    batch = collate(made_up_rows(290, (127,)), ladder.layout, piece.shape)
    assert batch["input_ids"].shape[1] == 129 and int(batch["position_ids"].max()) == 127
    assert bool(example_losses(BACKBONES["bert"](), batch).isfinite().all())


def test_rows_that_do_not_fit_are_an_error() -> None:
    for backbone in ("llama", "bert", "t5"):
        with pytest.raises(ValueError, match="broadcast"):
            collate([Encoded(tuple(range(40, 60)), 2)], layout_of(backbone), Shape(16, 8, 2))
        with pytest.raises(ValueError, match="3 rows do not fit"):
            collate([FILLER] * 3, layout_of(backbone), Shape(16, 8, 2))


@pytest.mark.parametrize("longest", [8, 17, 96, 512])
@pytest.mark.parametrize("backbone", ["llama", "bert", "t5"])
def test_the_probes_have_every_shape_and_rows_of_the_lengths_that_it_takes(backbone: str, longest: int) -> None:
    ladder = Ladder(longest, 4, layout_of(backbone))
    found = {
        (len(probe.rows["labels"]), probe.rows["labels"].shape[1], probe.rows["input_ids"].shape[1]): probe
        for probe in probes(ladder, 290, "cpu")
    }
    assert set(found) == {(shape.rows, shape.labels, shape.width) for shape in ladder.shapes}
    for length in range(2, longest + 1):
        for response in {1, 2, length // 2 or 1, length - 1}:
            shape = ladder.shape_of(Encoded((1,) * length, response))
            assert (shape.rows, shape.labels, shape.width) in found
    assert all(probe.rows["labels"].shape == probe.other["labels"].shape for probe in found.values())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("backbone", list(BACKBONES))
def test_other_rows_and_places_do_not_change_a_bit(backbone: str, dtype: torch.dtype) -> None:
    """As in training: a record is taken out of a logical batch, so that all others move.

    Where this machine's kernels are of another kind the check says so, and one row a batch keeps the promise."""
    model, engine = adapted(backbone, dtype)
    before = {name: value.clone() for name, value in adapters.trainable_parameters(model).items()}
    ladder = right_ladder(model, engine, Ladder(LONGEST, SIZE, layout_of(backbone)))
    assert all(torch.equal(before[name], value) for name, value in adapters.trainable_parameters(model).items())
    records = made_up_rows(290, [5 + 7 * row % (LONGEST - 4) for row in range(20)])

    def gradients(some: list[Encoded]) -> dict[Encoded, dict[str, torch.Tensor]]:
        found = {}
        for piece in physical_batches(some, ladder):
            own = [some[at] for at in piece.positions]
            part = engine(collate(own, ladder.layout, piece.shape))[1]
            found |= {row: {name: value[at] for name, value in part.items()} for at, row in enumerate(own)}
        return found

    with moved(adapters.trainable_parameters(model)):
        everyone = gradients(records)
        for out in (0, 7, 19):
            for row, values in gradients(records[:out] + records[out + 1 :]).items():
                assert all(torch.equal(value, everyone[row][name]) for name, value in values.items())


class Wrapped:
    """An engine whose gradient of a value projection is tampered with."""

    def __init__(self, engine: Engine, fault: Callable[["Wrapped", Batch, torch.Tensor], torch.Tensor]) -> None:
        self.engine, self.fault, self.widest = engine, fault, 0

    def __call__(self, batch: Batch) -> tuple[torch.Tensor, Gradients]:
        self.widest = max(self.widest, batch["input_ids"].shape[1])
        losses, found = self.engine(batch)
        name = next(name for name in found if ".v_proj." in name)
        return losses, found | {name: self.fault(self, batch, found[name])}

    def paused(self) -> AbstractContextManager[None]:
        return self.engine.paused()

    def close(self) -> None:
        self.engine.close()


def _last_row(batch: Batch) -> float:
    return float(batch["input_ids"][-1].sum() % 7)


FAULTS: dict[str, Callable[[Wrapped, Batch, torch.Tensor], torch.Tensor]] = {
    "chance": lambda engine, batch, value: value * (1 + 1e-6 * torch.rand(())),
    "place": lambda engine, batch, value: value * (1 + 1e-6 * torch.arange(len(value))).reshape(-1, 1, 1),
    "another row": lambda engine, batch, value: value * (1 + 1e-6 * _last_row(batch)),
    "earlier batches": lambda engine, batch, value: value * (1 + 1e-6 * engine.widest),
    "one shape": lambda engine, batch, value: (
        value * (1 + 1e-6 * _last_row(batch)) if batch["labels"].shape[1] == 16 else value
    ),
}


@pytest.mark.parametrize("fault", list(FAULTS))
def test_the_check_sees_a_millionth_of_anything_else(fault: str) -> None:
    model, engine = adapted("llama", torch.float32)
    with pytest.raises(EngineError, match=r"last bits of the gradient of .*v_proj") as error:
        checked(model, Wrapped(engine, FAULTS[fault]), Ladder(LONGEST, SIZE, layout_of("llama")))
    assert "\n" not in str(error.value)


def test_the_check_sees_that_padding_is_read() -> None:
    model, engine = adapted("llama", torch.float32)
    read = Wrapped(engine, lambda _, batch, value: value * (1 + 0.01 * batch["input_ids"].shape[1]))
    with pytest.raises(EngineError, match=r"v_proj.* depends on padding"):
        checked(model, read, Ladder(LONGEST, SIZE, layout_of("llama")))


def test_one_row_a_batch_has_no_mates_but_a_past() -> None:
    model, engine = adapted("llama", torch.float32)
    ladder = Ladder(LONGEST, 1, layout_of("llama"))
    checked(model, Wrapped(engine, FAULTS["another row"]), ladder)
    with pytest.raises(EngineError, match="earlier batches"):
        checked(model, Wrapped(engine, FAULTS["earlier batches"]), ladder)


SMALL = {
    "vocab_size": 300,
    "hidden_size": 16,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
}
TWO_LAYERS = {"intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "num_key_value_heads": 2}


def gpt_neo() -> torch.nn.Module:
    from transformers import GPTNeoConfig, GPTNeoForCausalLM

    torch.manual_seed(0)
    settings = {"attention_types": [[["global", "local"], 1]], "window_size": 8}
    return GPTNeoForCausalLM(GPTNeoConfig(**SMALL, num_layers=2, num_heads=2, **settings)).eval()


def mistral() -> torch.nn.Module:
    from transformers import MistralConfig, MistralForCausalLM

    torch.manual_seed(0)
    return MistralForCausalLM(MistralConfig(**SMALL, **TWO_LAYERS, sliding_window=8)).eval()


@pytest.mark.parametrize("adapter", ["prompt", "p_tuning", "prefix", "lora"])
@pytest.mark.parametrize("make", [gpt_neo, mistral])
def test_a_window_that_slides_never_loses_a_soft_prompt_to_padding(make, adapter: str) -> None:
    """Padding between prompt and text changed a short row's gradient by up to its own size."""
    model, engine = adapt(make(), adapter)
    layout = layout_of("llama")
    row, longest = made_up_rows(290, (5,)), made_up_rows(290, (5, 40))[1:]
    with moved(adapters.trainable_parameters(model)):
        with engine.paused():
            alone = LoopEngine(model, example_losses)(collate(row, layout))[1]
        together = engine(collate([*row, *longest], layout))[1]
    for name, value in alone.items():
        assert_close_to_largest(together[name][:1], value)
    right_ladder(model, engine, Ladder(LONGEST, SIZE, layout))


@pytest.mark.parametrize("kind", ["dynamic", "longrope"])
def test_positions_that_stretch_with_the_batch_are_refused(kind: str) -> None:
    """What a row gets would depend on longer ones, in its batch or before."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    rope = {"rope_type": kind, "rope_theta": 10000.0, "factor": 4.0}
    if kind == "longrope":
        rope |= {"short_factor": [1.0] * 4, "long_factor": [4.0] * 4, "original_max_position_embeddings": 12}
    model, engine = adapt(
        LlamaForCausalLM(
            LlamaConfig(**SMALL | {"max_position_embeddings": 12}, **TWO_LAYERS, rope_parameters=rope)
        ).eval()
    )
    with pytest.raises(EngineError, match="depends? on (padding|their place)"):
        checked(model, engine, Ladder(LONGEST, SIZE, layout_of("llama")))
    # Below the length that the backbone was made for, nothing stretches.
    checked(model, engine, Ladder(10, SIZE, layout_of("llama")))


def test_an_engine_that_is_paused_sees_nothing() -> None:
    for name in ENGINES:
        model = adapters.attach(BACKBONES["llama"](), AdapterConfig(), rank=2, steps=10, seed=0)
        adapters.set_modes(model)
        engine = ENGINES[name](model, example_losses)
        batch = collate(made_up_rows(290, (7, 9)), layout_of("llama"))
        with moved(adapters.trainable_parameters(model)):
            warnings.filterwarnings("ignore", message="Full backward hook is firing")
            expected = engine(batch)[1]
            with engine.paused():
                LoopEngine(model, example_losses)(batch)
            found = engine(batch)[1]
        assert all(torch.equal(found[key], value) for key, value in expected.items())
        engine.close()


def test_a_verdict_is_kept_for_the_same_weights_in_the_same_model_only(tmp_path: Path) -> None:
    """What positions stretch with is in the config, not in the weights."""
    from dptune.config.schema import Config
    from dptune.models import backbones
    from dptune.runs.engine import checked_path

    found = []
    for kind in ("default", "linear", "dynamic"):
        config = Config()
        config.model.name, config.model.path = "local", str(tmp_path / kind)
        config.compute.cache_dir = str(tmp_path / "cache")
        config.environment.sequence_length = 24
        shutil.copytree(SHIPPED / "nano", tmp_path / kind)
        settings = json.loads((tmp_path / kind / "config.json").read_text())
        settings["max_position_embeddings"] = 12
        settings["rope_parameters"] |= {"rope_type": kind, "factor": 4.0}
        (tmp_path / kind / "config.json").write_text(json.dumps(settings))
        backbone = backbones.load_backbone(config.model, precision="float32", device="cpu", cache_dir=tmp_path)
        model = adapters.attach(backbone.model, config.adapter, rank=2, steps=10, seed=0)
        if kind != "dynamic":
            found.append(checked_path(config, backbone, model, private=True).digest)
            assert found[-1] == checked_path(config, backbone, model, private=True).digest
        else:
            with pytest.raises(ConfigError, match="its positions stretch with the longest text"):
                checked_path(config, backbone, model, private=True)
    assert found[0] != found[1]

"""Rounded weights against brute force, and adapters on them against a float backbone that holds the same weights."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from backbones_for_tests import BACKBONES, layout_of
from numerics import FLOAT32, assert_close_to_largest
from peft import PeftModel
from scipy.stats import norm
from transformers.pytorch_utils import Conv1D

from dptune.config.adapters import ADAPTERS
from dptune.config.schema import AdapterConfig, ConfigError
from dptune.data.batches import collate, example_losses
from dptune.data.encoding import Encoded
from dptune.models import adapters
from dptune.models.layers import linear_layers, model_type_of, output_head
from dptune.models.quantization import BLOCK, FORMATS, NF4_LEVELS, quantize, quantized_layers
from dptune.models.state import AdapterState
from dptune.privacy.engines import ENGINES
from dptune.privacy.gradients import LoopEngine

pytestmark = pytest.mark.numerical

ROWS = [Encoded((40, 51, 62, 73, 84, 95, 26, 1), 3), Encoded((141, 52, 163, 1), 2), Encoded((242, 53, 64, 75, 1), 2)]
LEVELS = np.array(NF4_LEVELS)


def weight(rows: int, columns: int) -> torch.Tensor:
    """Normal weights of very different rows, one of them zero."""
    made = torch.randn(rows, columns, generator=torch.Generator().manual_seed(0))
    made *= torch.logspace(-8, 2, rows).unsqueeze(1)
    made[rows // 2] = 0
    return made


def rounded(kind: str, of: torch.Tensor) -> torch.Tensor:
    codes, scales = FORMATS[kind].encode(of)
    return FORMATS[kind].decode(codes, scales, of.shape)


def test_int8_takes_the_nearest_of_all_255_multiples_of_the_scale() -> None:
    given = weight(7, 33)
    codes, scales = FORMATS["int8"].encode(given)
    assert codes.dtype == torch.int8 and codes.shape == given.shape and scales.shape == (7, 1)
    found = rounded("int8", given).double()
    for row, scale, values in zip(given.double(), scales.double(), found, strict=True):
        distances = (row.unsqueeze(1) - torch.arange(-127.0, 128.0, dtype=torch.float64) * scale).abs().amin(dim=1)
        assert float(((row - values).abs() - distances).abs().max()) <= FLOAT32 * float(scale)
        assert float(distances.max()) <= 0.50001 * float(scale)
    assert bool((found[3] == 0).all())
    for largest, right in zip(found.abs().amax(dim=1), given.double().abs().amax(dim=1), strict=True):
        assert_close_to_largest(largest, right, FLOAT32)


@pytest.mark.parametrize("shape", [(4, 64), (5, 37), (1, 1), (3, 43), (2, 200)])
def test_nf4_takes_the_nearest_level_of_each_block(shape: tuple[int, int]) -> None:
    given = weight(*shape)
    codes, scales = FORMATS["nf4"].encode(given)
    assert codes.dtype == torch.uint8
    assert len(codes) == (given.numel() + 1) // 2 and len(scales) == -(-given.numel() // BLOCK)
    flat, found = given.flatten().double().numpy(), rounded("nf4", given).flatten().double().numpy()
    for start in range(0, len(flat), BLOCK):
        block, values = flat[start : start + BLOCK], found[start : start + BLOCK]
        scale = np.abs(block).max()
        distances = np.abs(block[:, None] - scale * LEVELS).min(axis=1)
        assert np.abs(np.abs(block - values) - distances).max() <= FLOAT32 * scale
        assert distances.max(initial=0) <= scale * np.diff(LEVELS).max() / 2
    assert codes[0] >> 4 == np.abs(flat[0] / max(np.abs(flat[:BLOCK]).max(), 1e-300) - LEVELS).argmin()


def test_nf4_codes_are_those_of_bitsandbytes() -> None:
    """Bytes that version 0.50.2 made with blocks of 64 and scales that are not rounded."""
    index = torch.arange(140)
    given = ((index * 7919 % 101 - 50) * (1 + index // 64)).float().reshape(2, 70) / 32
    codes, scales = FORMATS["nf4"].encode(given)
    assert bytes(codes.tolist()).hex() == (
        "05d2a06e2b06e3b17e3c18f4c18f4d19f5d2a05e2b06e2b17e3c18e3c18f4d19f5d2a0"
        "5e2a06e2b07e3c17e3c18f4d19f4d1905d2a06e2b06e3b17e3c18f4c18f4d19f5d2a05"
    )
    assert scales.flatten().tolist() == [1.5625, 3.125, 4.6875]


def test_nf4_levels_are_quantiles_of_a_normal_distribution() -> None:
    """Eight above and seven below zero, each side evenly spaced in probability up to 0.9677083 (arXiv:2305.14314)."""
    end = 0.5 * ((1 - 1 / 30) + (1 - 1 / 32))
    above, below = norm.ppf(np.linspace(end, 0.5, 9)[:-1]), -norm.ppf(np.linspace(end, 0.5, 8)[:-1])
    expected = np.sort(np.concatenate([above, below, [0.0]])) / above.max()
    assert_close_to_largest(LEVELS, expected, rtol=1e-6)  # they are stated in float32


def stored_bytes(model: torch.nn.Module) -> int:
    """Bytes of all parameters and buffers; a tied one counts once."""
    tensors = {id(value): value for value in [*model.parameters(), *model.buffers()]}
    return sum(value.numel() * value.element_size() for value in tensors.values())


@pytest.mark.parametrize("kind", list(FORMATS))
@pytest.mark.parametrize("backbone", list(BACKBONES))
def test_all_linear_layers_but_the_head_are_rounded_and_memory_falls(backbone: str, kind: str) -> None:
    plain, model = BACKBONES[backbone](), BACKBONES[backbone]()
    total = adapters.count(plain).total
    quantize(model, kind)
    layers, before = quantized_layers(model), linear_layers(plain)
    assert layers.keys() == before.keys() == linear_layers(model).keys() and layers
    assert not quantized_layers(output_head(model)[1]) and adapters.count(model).total == total
    for name, layer in layers.items():
        assert isinstance(layer, Conv1D) == isinstance(before[name], Conv1D)
        assert isinstance(layer, torch.nn.Linear) == isinstance(before[name], torch.nn.Linear)
        assert "weight" not in dict(layer.named_parameters())
        old: Any = before[name].weight
        expected = rounded(kind, old.T.contiguous()).T if layer.transposed else rounded(kind, old)
        assert torch.equal(layer.weight, expected)
    size = [layer.shape for layer in layers.values()]
    saved = sum(4 * shape.numel() for shape in size)
    if kind == "int8":
        kept = sum(shape.numel() + 4 * shape[0] for shape in size)
    else:
        kept = sum((shape.numel() + 1) // 2 + 4 * -(-shape.numel() // BLOCK) for shape in size)
    assert stored_bytes(model) == stored_bytes(plain) - saved + kept
    assert kept < {"int8": 0.52, "nf4": 0.15}[kind] * saved


def pair(backbone: str, kind: str) -> tuple[torch.nn.Module, torch.nn.Module]:
    """A rounded backbone, and a float one with the same weights."""
    model, same = BACKBONES[backbone](), BACKBONES[backbone]()
    quantize(model, kind)
    floats: Any = linear_layers(same)
    for name, layer in quantized_layers(model).items():
        floats[name].weight.data = layer.weight.clone()
    return model, same


def adapted(model: torch.nn.Module, name: str) -> torch.nn.Module:
    config = AdapterConfig(name=name, virtual_tokens=3)
    made = adapters.attach(model, config, rank=2, steps=10, seed=0)
    with torch.no_grad():
        for number, value in enumerate(adapters.trainable_parameters(made).values()):
            value += 0.1 * (torch.arange(value.numel()) + number).sin().reshape(value.shape)
    return made


MATRIX = [(name, "llama", "nf4") for name in ADAPTERS] + [
    (name, backbone, kind)
    for name in ("lora", "dora", "ia3", "bitfit", "houlsby", "prefix")
    for backbone in ("gpt2", "bert", "t5")
    for kind in FORMATS
]


@pytest.mark.parametrize(("name", "backbone", "kind"), MATRIX)
def test_gradients_on_a_rounded_backbone_are_those_on_its_weights(name: str, backbone: str, kind: str) -> None:
    rough, same = pair(backbone, kind)
    if ADAPTERS[name].changes_matrices:
        with pytest.raises(
            ConfigError, match=rf"adapter={name} changes .*q_proj is rounded to nf4; set .*=none, or"
        ) as error:
            adapted(rough, name)
        assert "\n" not in str(error.value)
        return
    engine = adapters.engine_of(name, model_type_of(rough))
    rough, same = adapted(rough, name), adapted(same, name)
    batch = collate(ROWS, layout_of(backbone))
    losses, expected = LoopEngine(same, example_losses)(batch)
    for each in (engine, "loop"):
        found_losses, found = ENGINES[each](rough, example_losses)(batch)
        assert_close_to_largest(found_losses, losses, what=each)
        assert_close_to_largest(found, expected, what=each)


@pytest.mark.parametrize("name", ["lora", "dora", "vera", "oft", "houlsby", "bitfit"])
@pytest.mark.parametrize("kind", list(FORMATS))
def test_a_saved_adapter_opens_on_the_rounded_backbone(name: str, kind: str, tmp_path: Path) -> None:
    model = adapted(pair("llama", kind)[0], name)
    batch = collate(ROWS, layout_of("llama"))
    with torch.no_grad():
        before = example_losses(model, batch)
    adapters.save(model, tmp_path / "adapter")
    opened = adapters.load_adapter(pair("llama", kind)[0], tmp_path / "adapter")
    with torch.no_grad():
        assert_close_to_largest(example_losses(opened, batch), before)
    assert not any("codes" in path.read_text(errors="ignore") for path in (tmp_path / "adapter").iterdir())
    if isinstance(opened, PeftModel):
        for each in (model, opened):
            with pytest.raises(
                ValueError, match=r"cannot be merged into rounded weights; open it on the backbone with"
            ):
                each.merge_and_unload()
        plain = PeftModel.from_pretrained(pair("llama", kind)[0], tmp_path / "adapter").eval()
        with torch.no_grad():
            assert_close_to_largest(example_losses(plain, batch), before)


@pytest.mark.parametrize("kind", list(FORMATS))
def test_no_float_weight_is_kept_for_the_backward_pass(kind: str) -> None:
    def kept(model: torch.nn.Module) -> int:
        shapes = {tuple(layer.weight.shape) for layer in linear_layers(model).values()}  # type: ignore[union-attr]
        found: list[torch.Tensor] = []
        with torch.autograd.graph.saved_tensors_hooks(
            lambda value: (found.append(value), value)[1], lambda value: value
        ):
            example_losses(model, collate(ROWS, layout_of("llama"))).sum()
        return sum(
            tuple(value.shape) in shapes or tuple(value.T.shape) in shapes for value in found if value.dim() == 2
        )

    rough, same = pair("llama", kind)
    for model in (rough, same):
        model.requires_grad_(False).get_input_embeddings().requires_grad_(True)
    assert kept(same) >= len(linear_layers(same)) and kept(rough) == 0


def test_rounded_layers_keep_the_number_format_of_the_backbone() -> None:
    model = BACKBONES["gpt2"]().to(torch.bfloat16)
    quantize(model, "nf4")
    assert all(layer.weight.dtype == torch.bfloat16 for layer in quantized_layers(model).values())
    losses = example_losses(adapted(model, "lora"), collate(ROWS, layout_of("gpt2")))
    losses.sum().backward()
    assert all(
        value.grad is not None and value.grad.dtype == torch.float32
        for value in adapters.trainable_parameters(model).values()
    )


def test_a_checkpoint_holds_no_rounded_weight() -> None:
    """Their layers own the biases that BitFit trains."""
    model = adapted(pair("gpt2", "int8")[0], "bitfit")
    assert AdapterState(model).state_dict()["tensors"].keys() == adapters.trainable_parameters(model).keys()


def test_none_leaves_the_backbone_as_it_is() -> None:
    model = BACKBONES["llama"]()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    quantize(model, "none")
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())

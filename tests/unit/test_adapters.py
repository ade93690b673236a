"""Every adapter on every architecture: what is trained, where it starts, what is saved, what is refused."""

from __future__ import annotations

import json
import warnings
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from backbones_for_tests import BACKBONES, layout_of
from numerics import assert_close_to_largest, differs
from peft import PeftModel
from safetensors import safe_open

from dptune.config.adapters import ADAPTERS
from dptune.config.schema import AdapterConfig, ConfigError
from dptune.data.batches import collate, example_losses
from dptune.data.encoding import Encoded
from dptune.models import adapters
from dptune.models.adapters import attach
from dptune.models.layers import model_type_of
from dptune.models.peft_adapters import quiet
from dptune.models.pst import PrunedLinear, sparsity_after
from dptune.privacy.engines import ENGINES

pytestmark = pytest.mark.numerical

RANK = 2

CELLS = [
    (backbone, name)
    for backbone in BACKBONES
    for name, kind in ADAPTERS.items()
    if not (backbone == "gpt2" and "gpt2" in kind.impossible)
]

EACH_CELL = pytest.mark.parametrize(("backbone", "name"), CELLS)


def made(backbone: str, name: str = "lora", *, rank: int = RANK, steps: int = 10, seed: int = 3, **settings: Any):
    """A backbone with a fresh adapter."""
    return attach(BACKBONES[backbone](), AdapterConfig(name=name, **settings), rank=rank, steps=steps, seed=seed)


def moved(model: torch.nn.Module) -> torch.nn.Module:
    """The same, trained parameters changed, in evaluation mode."""
    with torch.no_grad():
        for parameter in adapters.trainable_parameters(model).values():
            parameter.add_(0.1 * torch.arange(parameter.numel()).reshape(parameter.shape).sin())
    return model.eval()


@torch.no_grad()
def logits(model: Any) -> torch.Tensor:
    """Of three made-up rows of five tokens [3, 5, 300]; of a decoder behind an encoder for three tokens."""
    tokens = torch.tensor([[5, 6, 7, 8, 9], [11, 12, 13, 14, 15], [21, 22, 23, 24, 25]])
    more = {"decoder_input_ids": tokens[:, :3]} if model.config.is_encoder_decoder else {}
    return model(input_ids=tokens, attention_mask=torch.ones_like(tokens), **more).logits


# Inputs and outputs of the linear layers but the head, and of everything else that counts, written down by hand.
SQUARE, UP, DOWN = (16, 16), (16, 24), (24, 16)
LINEAR = {
    "llama": 2 * [*4 * [SQUARE], UP, UP, DOWN],
    "qwen2": 2 * [SQUARE, (16, 8), (16, 8), SQUARE, UP, UP, DOWN],
    "gpt2": 2 * [(16, 48), SQUARE, UP, DOWN],
    "bert": [*2 * [*4 * [SQUARE], UP, DOWN], SQUARE],
    "roberta": [*2 * [*4 * [SQUARE], UP, DOWN], SQUARE],
    "t5": [*2 * [*4 * [SQUARE], UP, DOWN], *2 * [*8 * [SQUARE], UP, DOWN]],
}
NORMS = {"llama": 5, "qwen2": 5, "gpt2": 5, "bert": 6, "roberta": 6, "t5": 12}
NORM_BIASES = {"llama": 0, "qwen2": 0, "gpt2": 5, "bert": 6, "roberta": 6, "t5": 0}
BLOCKS = {"llama": 2, "qwen2": 2, "gpt2": 2, "bert": 2, "roberta": 2, "t5": 4}
KEYS_AND_VALUES = {"llama": 64, "qwen2": 32, "gpt2": 96, "bert": 64, "roberta": 64, "t5": 64 + 128}
PREFIXED = {"llama": 64, "qwen2": 32, "gpt2": 64, "bert": 64, "roberta": 64, "t5": 64}
KRONECKER = {8: (2, 4), 16: (4, 4), 24: (4, 6), 48: (6, 8)}
BOTTLENECK = 16 * 16 + 16 + 16 * 16 + 16


def over(count: Callable[[int, int], int]) -> Callable[[str], int]:
    """Sum over the linear layers of a backbone."""
    return lambda backbone: sum(count(i, o) for i, o in LINEAR[backbone])


def kronecker(i: int, o: int) -> int:
    (i_small, i_large), (o_small, o_large) = KRONECKER[i], KRONECKER[o]
    low_rank = max(i_large, o_large) / 2 > RANK
    return i_small * o_small + (RANK * (i_large + o_large) if low_rank else i_large * o_large)


def narrowest(backbone: str) -> int:
    return min(min(shape) for shape in LINEAR[backbone])


COUNTS: dict[str, Callable[[str], int]] = {
    "lora": over(lambda i, o: RANK * (i + o)),
    "ffa_lora": over(lambda i, o: RANK * o),
    "lora_xs": over(lambda i, o: RANK**2),
    "dora": over(lambda i, o: RANK * (i + o) + o),
    "adalora": over(lambda i, o: 3 * (i + 1 + o)),
    "vera": over(lambda i, o: RANK + o),
    "ia3": lambda backbone: KEYS_AND_VALUES[backbone] + 24 * BLOCKS[backbone],
    "loha": over(lambda i, o: 2 * RANK * (i + o)),
    "lokr": over(kronecker),
    "oft": over(lambda i, o: i // 2),
    "boft": over(lambda i, o: i // 2 * 4 + o),
    "fourierft": lambda backbone: RANK * narrowest(backbone) * len(LINEAR[backbone]),
    "prompt": lambda backbone: 10 * 16,
    "p_tuning": lambda backbone: 10 * 16 + 3 * (16 * 16 + 16),
    "prefix": lambda backbone: 10 * PREFIXED[backbone],
    "houlsby": lambda backbone: 2 * BLOCKS[backbone] * BOTTLENECK,
    "pfeiffer": lambda backbone: BLOCKS[backbone] * BOTTLENECK,
    "parallel": lambda backbone: BLOCKS[backbone] * BOTTLENECK,
    "bitfit": lambda backbone: over(lambda i, o: o)(backbone) + 16 * NORM_BIASES[backbone],
    "ln_tuning": lambda backbone: 16 * (NORMS[backbone] + NORM_BIASES[backbone]),
    "head": lambda backbone: 300 * 16 + (300 if "bert" in backbone else 0),
    "full": lambda backbone: sum(value.numel() for value in BACKBONES[backbone]().parameters()),
    "pst": over(lambda i, o: 2 * RANK * (i + o) + i + o),
}


@EACH_CELL
def test_a_fresh_adapter_trains_what_it_should_and_starts_at_the_backbone(backbone: str, name: str) -> None:
    before = logits(BACKBONES[backbone]().eval())
    model = made(backbone, name)
    count = adapters.count(model)
    assert count.trainable == sum(count.groups.values()) == COUNTS[name](backbone)
    assert count.total == sum(value.numel() for value in model.parameters())
    assert all(value.dtype == torch.float32 for value in adapters.trainable_parameters(model).values())
    owners = {
        key.rpartition(".")[0] for key, value in model.named_parameters(remove_duplicate=False) if value.requires_grad
    }
    assert owners == {key for key, module in model.named_modules() if module.training}
    assert torch.equal(logits(model), before) is ADAPTERS[name].unchanged


@EACH_CELL
def test_a_saved_adapter_gives_the_same_logits_on_a_fresh_backbone(backbone: str, name: str, tmp_path: Path) -> None:
    model = made(backbone, name)
    fresh = logits(model)
    before = logits(moved(model))
    assert differs(before, fresh)
    adapters.save(model, tmp_path / "adapter")
    after = [logits(adapters.load_adapter(BACKBONES[backbone](), tmp_path / "adapter"))]
    if isinstance(model, PeftModel):
        with quiet():
            opened = PeftModel.from_pretrained(BACKBONES[backbone](), tmp_path / "adapter").eval()
        # PEFT gives logits of an encoder's soft prompt, too.
        after.append(logits(opened)[:, -before.shape[1] :])
    for found in after:
        assert_close_to_largest(found, before)


@EACH_CELL
def test_the_engine_of_each_cell_gives_every_row_its_own_gradient(backbone: str, name: str) -> None:
    """Rows of different lengths together, against plain backward passes of each row without any padding."""
    model = moved(made(backbone, name))
    adapters.set_modes(model)
    layout, values = layout_of(backbone), adapters.trainable_parameters(model)
    rows = [Encoded(tuple(range(10, 10 + length)), response) for length, response in ((7, 2), (9, 3), (5, 2))]
    engine = ENGINES[adapters.engine_of(name, model_type_of(model))](model, example_losses)
    _, found = engine(collate(rows, layout))
    engine.close()
    alone = [
        torch.autograd.grad(example_losses(model, collate([row], layout)).sum(), list(values.values())) for row in rows
    ]
    expected = {key: torch.stack(right) for key, right in zip(values, zip(*alone, strict=True), strict=True)}
    assert_close_to_largest(found, expected)


@pytest.mark.parametrize("name", ["loha", "lokr", "oft", "boft"])
def test_what_peft_has_for_linear_layers_only_is_refused_on_conv1d(name: str) -> None:
    with pytest.raises(ConfigError, match=f"adapter={name} .*GPT-2's are Conv1D; choose adapter=lora"):
        made("gpt2", name)


def test_architectures() -> None:
    found = {name: model_type_of(make()) for name, make in BACKBONES.items()}
    assert found == {
        "llama": "decoder",
        "qwen2": "decoder",
        "gpt2": "gpt2",
        "bert": "encoder",
        "roberta": "encoder",
        "t5": "encoder_decoder",
    }
    assert model_type_of(made("t5")) == "encoder_decoder"


@pytest.mark.parametrize("name", ["lora", "lora_xs", "vera", "fourierft", "prompt", "p_tuning", "houlsby", "pst"])
def test_the_seed_alone_decides_the_initialisation(name: str) -> None:
    torch.manual_seed(5)
    before = torch.random.get_rng_state()
    one, again, other = (made("llama", name, seed=seed).state_dict() for seed in (1, 1, 2))
    assert torch.equal(torch.random.get_rng_state(), before)
    assert all(torch.equal(one[key], again[key]) for key in one)
    if name == "fourierft":  # What is drawn is no tensor of the model but a seed in its config.
        seeds = [made("llama", name, seed=seed).peft_config["default"].random_loc_seed for seed in (1, 1, 2)]
        assert seeds[0] == seeds[1] != seeds[2]
    elif name != "lora_xs":
        assert any(not torch.equal(one[key], other[key]) for key in one)


def names_of(model: torch.nn.Module) -> list[str]:
    return list(adapters.trainable_parameters(model))


@pytest.mark.parametrize("name", ["lora", "ia3", "ln_tuning", "houlsby", "bitfit", "full", "pst"])
@pytest.mark.parametrize("backbone", ["llama", "gpt2", "bert", "t5"])
def test_top_layers(backbone: str, name: str) -> None:
    last = {"llama": ["layers.1."], "gpt2": ["h.1."], "bert": ["layer.1."], "t5": ["block.1."]}[backbone]
    found, everywhere = (names_of(made(backbone, name, top_layers=top)) for top in (1, None))
    assert found == [key for key in everywhere if any(part in key for part in last)]


def test_target_modules_and_the_choices_that_lora_has() -> None:
    model = made("llama", target_modules=["q_proj", "v_proj", "not_here"], top_layers=1, rank=4, rslora=True, alpha=6.0)
    assert {key.split(".")[-4] for key in names_of(model)} == {"q_proj", "v_proj"}
    assert model.get_submodule("base_model.model.model.layers.1.self_attn.q_proj").scaling["default"] == 3.0
    assert len(names_of(model)) == 4


@pytest.mark.parametrize("backbone", list(BACKBONES))
def test_lora_on_embeddings_and_head(backbone: str, tmp_path: Path) -> None:
    model = made(backbone, embeddings=True)
    embeddings = 2 if backbone == "t5" else 1
    assert adapters.count(model).trainable == COUNTS["lora"](backbone) + (embeddings + 1) * RANK * (300 + 16)
    assert torch.equal(logits(model), logits(BACKBONES[backbone]().eval()))
    before = logits(moved(model))
    gradients = torch.autograd.grad(
        example_losses(model, collate([Encoded((5, 6, 7, 8, 9), 3)], layout_of(backbone))).sum(),
        list(adapters.trainable_parameters(model).values()),
    )
    assert all(float(gradient.abs().max()) > 0 for gradient in gradients)
    adapters.save(model, tmp_path / "adapter")
    opened = adapters.load_adapter(BACKBONES[backbone](), tmp_path / "adapter")
    assert_close_to_largest(logits(opened), before)
    tied = any(value.data_ptr() == model.get_output_embeddings().weight.data_ptr() for value in embeddings_of(model))
    assert tied == (backbone != "llama")
    if tied:
        with pytest.raises(ValueError, match="share one weight.*dptune merge"):
            model.merge_and_unload()
    # PEFT merges what was saved into layers that no longer share a weight.
    with quiet(), warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="(Model with .tie|Input and output embeddings are no longer tied)")
        assert_close_to_largest(logits(opened.merge_and_unload()), before)


def embeddings_of(model: torch.nn.Module) -> list[torch.Tensor]:
    return [part.weight for part in model.modules() if isinstance(part, torch.nn.Embedding)]


def test_the_head_is_untied_and_full_keeps_ties() -> None:
    model = made("gpt2", "head")
    embeddings = model.transformer.wte.weight
    assert not embeddings.requires_grad and model.lm_head.weight is not embeddings
    model = made("gpt2", "full")
    assert model.lm_head.weight is model.transformer.wte.weight
    assert "lm_head.weight" not in names_of(model)


def test_bitfit_makes_biases_but_never_trains_relative_attention_bias() -> None:
    names = names_of(made("t5", "bitfit"))
    assert names and all(key.endswith(".bias") for key in names)
    assert all(key.endswith(".bias") for key in names_of(made("gpt2", "bitfit")))
    assert not any("relative_attention_bias" in key for key in names)


def test_lora_xs_sits_between_the_leading_singular_vectors(tmp_path: Path) -> None:
    model = made("gpt2", "lora_xs")
    layer = model.get_submodule("base_model.model.transformer.h.0.attn.c_attn")
    left, values, right = torch.linalg.svd(layer.base_layer.weight.T)
    product = layer.lora_B["default"].up.weight @ layer.lora_A["default"].weight
    assert_close_to_largest(product, left[:, :RANK] * values[:RANK] @ right[:RANK])
    adapters.save(moved(model), tmp_path)
    with safe_open(tmp_path / "adapter_model.safetensors", "pt") as stored:
        assert {key.rpartition(".lora_")[2] for key in stored.keys()} == {"A.weight", "B.weight"}  # noqa: SIM118


def released(model: torch.nn.Module, step: int) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(step)
    return {
        name: torch.randn(value.shape, generator=generator)
        for name, value in adapters.trainable_parameters(model).items()
    }


def trained(model: torch.nn.Module, steps: int, poison: float | None = None) -> Iterator[int]:
    """Made-up steps; with `poison` parameters carry another gradient meanwhile, which nothing may look at."""
    for step in range(steps):
        gradients = released(model, step)
        with torch.no_grad():
            for name, parameter in adapters.trainable_parameters(model).items():
                parameter.sub_(0.05 * gradients[name])
                parameter.grad = None if poison is None else torch.full_like(parameter, poison)
        adapters.after_step(model, step, gradients)
        yield step


@pytest.mark.parametrize("steps", [1, 2, 10])
@pytest.mark.parametrize("backbone", ["llama", "t5"])
def test_adalora_reaches_its_budget_by_released_gradients_alone(backbone: str, steps: int, tmp_path: Path) -> None:
    model, other = made(backbone, "adalora", steps=steps), made(backbone, "adalora", steps=steps)
    assert list(trained(model, steps)) == list(trained(other, steps, poison=7.0))
    assert all(torch.equal(one, two) for one, two in zip(model.parameters(), other.parameters(), strict=True))
    assert all(parameter.grad is None for parameter in other.parameters())
    diagonals = [value for name, value in adapters.trainable_parameters(model).items() if ".lora_E." in name]
    ranks = [int(value.count_nonzero()) for value in diagonals]
    if steps > 1:
        assert sum(ranks) == RANK * len(ranks)
        assert len(set(ranks)) > 1
    before = logits(model)
    adapters.save(model, tmp_path / "adapter")
    reopened = adapters.load_adapter(BACKBONES[backbone](), tmp_path / "adapter")
    assert_close_to_largest(logits(reopened), before)
    adapters.save(reopened, tmp_path / "again")
    twice = logits(adapters.load_adapter(BACKBONES[backbone](), tmp_path / "again"))
    assert_close_to_largest(twice, before)


def test_adalora_keeps_rows_that_an_average_of_weights_has_revived(tmp_path: Path) -> None:
    model = made("llama", "adalora")
    list(trained(model, 10))
    before = logits(moved(model))
    adapters.save(model, tmp_path)
    assert_close_to_largest(logits(adapters.load_adapter(BACKBONES["llama"](), tmp_path)), before)


def test_pst_ramps_up_to_exactly_its_sparsity() -> None:
    ramp = [sparsity_after(step, 20, 0.8) for step in range(20)]
    assert ramp[:2] == [0.0, 0.0] and ramp[2] > 0
    assert ramp[13:] == [pytest.approx(0.8)] * 7 and ramp[12] < 0.8
    assert ramp == sorted(ramp)
    # Half way along the ramp an eighth of the way is left.
    assert ramp[7] == pytest.approx(0.8 * 7 / 8)
    model = made("gpt2", "pst", sparsity=0.7, steps=20)
    for step in trained(model, 20):
        for name, kept in nonzeros(model).items():
            size = model.get_submodule(name).pst_mask.numel()
            assert kept == size - int(sparsity_after(step, 20, 0.7) * size)
    for layer in model.modules():
        if isinstance(layer, PrunedLinear):
            assert layer.scores()[layer.pst_mask].min() >= layer.scores()[~layer.pst_mask].max()


def nonzeros(model: Any) -> dict[str, int]:
    """Exact number of weights that are not zero in each pruned layer."""
    layers = {name: module for name, module in model.named_modules() if isinstance(module, PrunedLinear)}
    return {name: int(layer.released().count_nonzero()) for name, layer in layers.items()}


def test_pst_masks_are_stored_as_they_are(tmp_path: Path) -> None:
    model = made("llama", "pst", sparsity=0.6)
    list(trained(model, 10))
    before = logits(moved(model))  # The scores do not make these masks any more.
    adapters.save(model, tmp_path)
    opened = adapters.load_adapter(BACKBONES["llama"](), tmp_path)
    assert nonzeros(opened) == nonzeros(model)
    assert torch.equal(logits(opened), before)
    layer = opened.model.layers[0].mlp.down_proj
    stored = (tmp_path / "adapter_model.safetensors").stat().st_size
    layer.prune(9)
    assert not torch.equal(layer.pst_mask, model.model.layers[0].mlp.down_proj.pst_mask)
    assert stored < 4 * adapters.count(model).trainable + sum(map(prod, LINEAR["llama"])) // 8 + 12_000


def prod(shape: Sequence[int]) -> int:
    return shape[0] * shape[1]


def test_pst_gradients_are_the_papers() -> None:
    """dL/dU = (M * G) V^T and so on; scores get G * (W + U V), where G is the gradient of the pruned weight."""
    torch.manual_seed(0)
    layer = PrunedLinear(torch.nn.Linear(5, 4), rank=2, steps=10, sparsity=0.5)
    moved(layer)
    layer.prune(9)
    x, grad = torch.randn(3, 5), torch.randn(3, 4)
    layer(x).backward(grad)
    g = grad.T @ x
    mask, scored = layer.pst_mask.float(), g * layer.dense()
    expected = {
        "pst_U": (mask * g) @ layer.pst_V.T,
        "pst_V": layer.pst_U.T @ (mask * g),
        "pst_A": scored @ layer.pst_B.T,
        "pst_B": layer.pst_A.T @ scored,
        "pst_R": scored.sum(dim=1, keepdim=True),
        "pst_C": scored.sum(dim=0, keepdim=True),
    }
    for name, right in expected.items():
        assert_close_to_largest(layer.get_parameter(name).grad, right)


def test_other_adapters_are_left_alone_after_a_step() -> None:
    model = made("llama")
    before = {name: value.clone() for name, value in model.state_dict().items()}
    adapters.after_step(model, 0, released(model, 0))
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


@pytest.mark.parametrize("name", ["lora", "lora_xs", "adalora", "vera", "prompt", "prefix", "pst", "full"])
def test_files_hold_no_path_of_this_machine(name: str, tmp_path: Path) -> None:
    backbone = BACKBONES["llama"]()
    backbone.save_pretrained(tmp_path / "backbone")
    model = type(backbone).from_pretrained(tmp_path / "backbone")
    model.name_or_path = model.config._name_or_path = "backbone"
    adapters.save(attach(model, AdapterConfig(name=name), rank=RANK, steps=10, seed=0), tmp_path / "adapter")
    written = [path for path in (tmp_path / "adapter").rglob("*") if path.is_file()]
    assert any(path.suffix == ".safetensors" for path in written)
    assert not any(str(tmp_path.parent).encode() in path.read_bytes() for path in written)


def test_the_config_names_each_adapted_layer_in_order(tmp_path: Path) -> None:
    adapters.save(made("llama", target_modules=["down_proj", "q_proj"]), tmp_path)
    content = json.loads((tmp_path / "adapter_config.json").read_text())
    layers = [f"model.layers.{index}.{name}" for index in range(2) for name in ("mlp.down_proj", "self_attn.q_proj")]
    assert content["target_modules"] == layers


@pytest.mark.parametrize(("name", "other"), [("houlsby", "gpt2"), ("lora", "gpt2"), ("lora", "qwen2"), ("head", "t5")])
def test_an_adapter_of_another_backbone_is_refused(name: str, other: str, tmp_path: Path) -> None:
    adapters.save(made("llama", name, rank=3), tmp_path)
    with pytest.raises(ConfigError, match="does not fit this backbone"):
        model = BACKBONES[other]()
        if other == "t5":
            model.set_output_embeddings(torch.nn.Linear(16, 301))
        adapters.load_adapter(model, tmp_path)


def test_a_folder_without_an_adapter_is_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=f"{tmp_path.name}/nothing holds no adapter"):
        adapters.load_adapter(BACKBONES["llama"](), tmp_path / "nothing")


REFUSED = {
    "no such layer": (
        "llama",
        "lora",
        {"target_modules": ["nowhere"]},
        r"adapter\.target_modules.*choose from down_pr",
    ),
    "no such norm": ("llama", "ln_tuning", {"target_modules": ["q_proj"]}, r"adapter\.target_modules.*input_layernorm"),
    "rank": ("llama", "lora", {"rank": 17}, r"hyperparameter\.rank=17 is above the width 16 of model\.layers\.0\."),
    "rank of pst": ("qwen2", "pst", {"rank": 9}, r"rank=9 is above the width 8 of model\.layers\.0\.self_attn\.k_proj"),
    "dropout": ("llama", "lora", {"dropout": 0.1}, r"adapter\.dropout=0\.1 .*leave it 0"),
    "top layers": ("t5", "lora", {"top_layers": 3}, r"adapter\.top_layers=3 is above the backbone's 2 layers"),
    "top layers of the head": ("llama", "head", {"top_layers": 1}, r"adapter\.top_layers has no meaning for"),
    "targets of bottlenecks": ("llama", "houlsby", {"target_modules": ["o_proj"]}, r"adapter\.target_modules has no"),
    "embeddings": ("llama", "dora", {"embeddings": True}, r"adapter\.embeddings=true is for adapter=lora"),
}


@pytest.mark.parametrize(("backbone", "name", "settings", "reason"), REFUSED.values(), ids=list(REFUSED))
def test_settings_that_cannot_be_are_refused(backbone: str, name: str, settings: dict[str, Any], reason: str) -> None:
    with pytest.raises(ConfigError, match=reason):
        made(backbone, name, **settings)


@pytest.mark.parametrize("name", ["oft", "boft"])
def test_blocks_must_divide_the_widths(name: str) -> None:
    model = BACKBONES["llama"]()
    for part in ("gate_proj", "up_proj"):
        setattr(model.model.layers[0].mlp, part, torch.nn.Linear(16, 15))
    model.model.layers[0].mlp.down_proj = torch.nn.Linear(15, 16)
    with pytest.raises(ConfigError, match=r"no block of 2 to 2 divides .*common divisor 1\)"):
        attach(model, AdapterConfig(name=name), rank=2, steps=1, seed=0)


@pytest.mark.parametrize("name", ["ia3", "houlsby", "parallel"])
def test_unknown_blocks_are_named(name: str) -> None:
    model = BACKBONES["llama"]()
    model.config.model_type = "novel"
    with pytest.raises(ConfigError, match="does not know the blocks of model type novel"):
        attach(model, AdapterConfig(name=name), rank=2, steps=1, seed=0)


def test_backbones_that_couple_records_are_refused() -> None:
    model = BACKBONES["llama"]()
    model.model.layers[1].mlp.normal = torch.nn.BatchNorm1d(16)
    with pytest.raises(ConfigError, match=r"model\.layers\.1\.mlp\.normal is a batch norm.*layer norm or group norm"):
        attach(model, AdapterConfig(), rank=2, steps=1, seed=0)
    for field in ("num_experts", "num_local_experts", "router_aux_loss_coef"):
        model = BACKBONES["llama"]()
        setattr(model.config, field, 4)
        with pytest.raises(ConfigError, match=f"{field}=4 is a mixture of experts.*choose a dense backbone"):
            attach(model, AdapterConfig(), rank=2, steps=1, seed=0)


def test_low_precision_backbones_carry_adapters_in_float32_but_are_not_trained_themselves() -> None:
    for name, rules in ADAPTERS.items():
        model = BACKBONES["llama"]().to(torch.bfloat16)
        if rules.own_weights:
            with pytest.raises(ConfigError, match="is not float32; set environment.precision=float32"):
                attach(model, AdapterConfig(name=name), rank=2, steps=10, seed=0)
            continue
        adapted = attach(model, AdapterConfig(name=name), rank=2, steps=10, seed=0)
        example_losses(adapted, collate([Encoded((5, 6, 7), 1)], layout_of("llama"))).sum().backward()
        gradients = [value.grad for value in adapters.trainable_parameters(adapted).values()]
        assert all(gradient is not None and gradient.dtype == torch.float32 for gradient in gradients), name

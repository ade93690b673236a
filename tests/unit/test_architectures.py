"""What people load: each architecture is trained privately, opened by PEFT and computed again without padding."""

from pathlib import Path
from typing import Any

import pytest
import torch
from architectures import ARCHITECTURES, REFUSED, build, trained
from backbones_for_tests import BACKBONES

from dptune.config.schema import AdapterConfig, ConfigError
from dptune.models import adapters
from dptune.models.layers import linear_layers, used

pytestmark = pytest.mark.numerical

SIMILAR = {
    *("Ministral", "Phi3", "OLMo", "OLMo3", "SmolLM3", "StableLM", "Starcoder2", "Cohere", "Granite", "Helium"),
    *("Nemotron", "GLM", "EXAONE4", "Arcee", "SeedOSS", "Persimmon", "GPT-BigCode", "GPT-J", "CodeGen", "XGLM"),
    *("BioGPT", "FalconMamba", "Bamba", "RWKV", "XLM-RoBERTa", "CamemBERT", "ERNIE", "MegatronBERT", "RoFormer"),
    *("XMOD", "mT5", "UMT5", "mBART", "Pegasus", "Marian", "M2M100", "PLBart", "Qwen3-MoE", "OLMoE", "PhiMoE"),
}
"""Architectures of which another one with the same parts is tried in every run of the tests."""
TRAINED = [
    pytest.param(name, marks=pytest.mark.slow if name in SIMILAR else ())
    for name in ARCHITECTURES
    if name not in REFUSED
]
SOFT = ("OPT", "MPT", "Mamba", "Falcon-H1", "ALBERT", "ELECTRA", "DeBERTa-v2", "LED")
"""Where prompts once failed: other widths of embeddings, no heads, rows that only the loop can tell apart."""


@pytest.mark.parametrize("name", TRAINED)
def test_losses_are_those_of_the_adapter_opened_by_peft_row_by_row(name: str, tokenizer: Any, tmp_path: Path) -> None:
    assert trained(name, tokenizer, tmp_path).error <= 1e-5


@pytest.mark.parametrize("name", SOFT)
def test_a_soft_prompt_works_there_too(name: str, tokenizer: Any, tmp_path: Path) -> None:
    assert trained(name, tokenizer, tmp_path, "prompt").error <= 1e-5


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=pytest.mark.slow if name in SIMILAR else ()) for name in REFUSED]
)
def test_a_backbone_that_cannot_be_right_is_refused_in_one_line(name: str, tokenizer: Any, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=REFUSED[name]) as refused:
        trained(name, tokenizer, tmp_path)
    assert "\n" not in str(refused.value) and not (tmp_path / "outputs").exists()


def test_auto_falls_back_to_the_loop_where_rows_cannot_be_told_apart(tokenizer: Any, tmp_path: Path) -> None:
    assert trained("OPT", tokenizer, tmp_path / "opt").engine == "loop"
    assert trained("DeBERTa-v2", tokenizer, tmp_path / "deberta").engine == "loop"
    assert trained("Llama", tokenizer, tmp_path / "llama").engine == "hooks"


@pytest.mark.parametrize(
    ("name", "unused"),
    [
        ("Longformer", "query_global"),
        ("BigBird", "pooler"),
        ("FNet", "pooler"),
        ("ESM", "contact_head"),
        ("LED", "_global"),
    ],
)
def test_layers_that_the_logits_do_not_depend_on_carry_no_adapter(name: str, unused: str) -> None:
    model = build(name)
    every = linear_layers(model)
    assert any(unused in layer for layer in every) and not any(unused in layer for layer in used(model, every))
    adapted = adapters.attach(model, AdapterConfig(), rank=2, steps=3, seed=0)
    assert not any(unused in parameter for parameter in adapters.trainable_parameters(adapted))


def test_asking_for_unused_layers_alone_is_an_error() -> None:
    with pytest.raises(ConfigError, match="target_modules: the logits do not depend on .*query_global"):
        adapters.attach(build("Longformer"), AdapterConfig(target_modules=["query_global"]), rank=2, steps=3, seed=0)


def test_looking_for_used_layers_leaves_no_trace() -> None:
    model = BACKBONES["llama"]()
    tokens = torch.tensor([[5, 6, 7]])
    before = model(tokens).logits
    assert used(model, linear_layers(model)) == linear_layers(model)
    assert torch.equal(model(tokens).logits, before) and all(value.grad is None for value in model.parameters())


def test_what_peft_does_not_put_on_state_spaces_is_left_out_or_named(tokenizer: Any, tmp_path: Path) -> None:
    adapted = adapters.attach(build("Mamba"), AdapterConfig(), rank=2, steps=3, seed=0)
    assert not any("out_proj" in name for name in adapters.trainable_parameters(adapted))
    with pytest.raises(ConfigError, match="matches no layer of the backbone"):
        adapters.attach(build("Mamba"), AdapterConfig(target_modules=["out_proj"]), rank=2, steps=3, seed=0)


def test_the_readme_has_a_row_for_each_architecture() -> None:
    readme = (Path(__file__).parents[2] / "src" / "dptune" / "models" / "README.md").read_text(encoding="utf-8")
    rows = [line.split("|")[1].strip() for line in readme.splitlines() if line.count("|") == 5]
    assert [row for row in rows if row in ARCHITECTURES] == list(ARCHITECTURES)
    assert "## Architectures" in readme and len(ARCHITECTURES) - len(REFUSED) >= 40

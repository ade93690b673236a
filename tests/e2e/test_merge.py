"""`dptune merge`: one model whose outputs are those of backbone and adapter; and the card beside both."""

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from dptune.config.schema import Config, ConfigError
from dptune.models import adapters
from dptune.privacy.guarantee import GUARANTEE_FILE
from dptune.runs.card import CARD_FILE
from dptune.runs.merging import merge, merged
from dptune.runs.run import run

TOKENS = torch.tensor([[9, 8, 7, 6, 20, 30, 40]])


def trained(config: Config) -> Path:
    config.data.tasks = ["team", "urgency"]
    config.hyperparameter.expected_batch_size, config.hyperparameter.learning_rate = 8, 0.05
    record = run(config)
    assert record.status == "done", record.error
    return Path(config.compute.output_root) / record.run_id


@torch.no_grad()
def logits(model: Any) -> torch.Tensor:
    return model.eval()(input_ids=TOKENS).logits


def test_the_merged_model_is_opened_by_transformers_alone_and_gives_the_adapters_outputs(
    config: Config, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = trained(config)
    merge([folder.name, f"compute.output_root={folder.parent}"])
    assert capsys.readouterr().out.strip() == str(folder / "merged")
    opened = AutoModelForCausalLM.from_pretrained(folder / "merged")
    backbone = AutoModelForCausalLM.from_pretrained(str(config.model.path))
    before = logits(backbone)
    expected = logits(adapters.load_adapter(backbone, folder / "adapter"))
    assert float((expected - before).abs().max()) > 0.01
    assert torch.allclose(logits(opened), expected, atol=1e-5)
    assert AutoTokenizer.from_pretrained(folder / "merged")("ab")["input_ids"]
    assert {path.suffix for path in (folder / "merged").iterdir()} == {".safetensors", ".json", ".md"}
    for page in (folder / "adapter", folder / "merged"):
        card = (page / CARD_FILE).read_text(encoding="utf-8")
        assert f"]({GUARANTEE_FILE})" in card and (page / GUARANTEE_FILE).is_file() and "epsilon" not in card
        assert str(config.model.path) not in card and card.startswith("---\nlibrary_name: ")
    with pytest.raises(ConfigError, match="merged is there already"):
        merge([str(folder)])


def test_tied_embeddings_are_untied_in_the_merged_model(config: Config, tmp_path: Path) -> None:
    config.model.name, config.model.path, config.adapter.embeddings = "nano", None, True
    folder = trained(config)
    to = merged(folder, tmp_path / "one")
    assert not AutoModelForCausalLM.from_pretrained(to).config.tie_word_embeddings


@pytest.mark.parametrize(
    ("adapter", "reason"),
    [("prompt", "stands before the text"), ("houlsby", "adds layers that the backbone's class does not have")],
)
def test_what_no_weight_can_hold_is_refused(config: Config, adapter: str, reason: str) -> None:
    config.adapter.name = adapter
    folder = trained(config)
    with pytest.raises(ConfigError, match=f"adapter={adapter} {reason}"):
        merged(folder, folder / "merged")
    assert not (folder / "merged").exists()


def test_a_run_on_rounded_weights_is_not_merged(config: Config) -> None:
    config.environment.backbone_quantization = "int8"
    folder = trained(config)
    with pytest.raises(ConfigError, match="rounded to int8"):
        merged(folder, folder / "merged")


@pytest.mark.parametrize(
    ("argv", "reason"),
    [
        ([], "give one run"),
        (["one", "two"], "give one run"),
        (["one", "form=x"], "form is no key of it"),
        (["no-such-run"], "holds no finished run"),
    ],
)
def test_a_wrong_command_is_one_line(argv: list[str], reason: str) -> None:
    with pytest.raises(ConfigError, match=reason):
        merge(argv)

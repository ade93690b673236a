"""A GGUF file is the model that was written into it, is converted once, and a damaged one is one clear error."""

import json
import sys
from pathlib import Path

import pytest
import torch
from backbones_for_tests import tiny_llama
from numerics import assert_close_to_largest

from dptune.config.schema import Config, ConfigError, ModelConfig
from dptune.identity import run_id
from dptune.models import gguf as module
from dptune.models.backbones import Backbone, load_backbone

pytestmark = pytest.mark.numerical

gguf = pytest.importorskip("gguf", reason="needs the extra gguf: pip install 'dptune[gguf]'")


def interleaved(weight: torch.Tensor, heads: int) -> torch.Tensor:
    """The order of rotary dimensions in a GGUF file: pairs beside each other instead of in two halves."""
    return weight.reshape(heads, 2, -1, weight.shape[1]).transpose(1, 2).reshape(weight.shape)


@pytest.fixture(scope="module")
def file(tmp_path_factory: pytest.TempPathFactory, tokenizer) -> Path:
    """The random Llama of the other tests in single precision."""
    path = tmp_path_factory.mktemp("gguf") / "tiny.gguf"
    model = tiny_llama()
    shape = model.config
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_context_length(shape.max_position_embeddings)
    writer.add_embedding_length(shape.hidden_size)
    writer.add_block_count(shape.num_hidden_layers)
    writer.add_feed_forward_length(shape.intermediate_size)
    writer.add_head_count(shape.num_attention_heads)
    writer.add_head_count_kv(shape.num_key_value_heads)
    writer.add_rope_dimension_count(shape.head_dim)
    writer.add_rope_freq_base(shape.rope_parameters["rope_theta"])
    writer.add_layer_norm_rms_eps(shape.rms_norm_eps)
    writer.add_vocab_size(shape.vocab_size)
    table = json.loads(tokenizer.backend_tokenizer.to_str())["model"]
    tokens = sorted(table["vocab"], key=table["vocab"].__getitem__)
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list(tokens)
    writer.add_token_types([gguf.TokenType.CONTROL] * 3 + [gguf.TokenType.NORMAL] * (len(tokens) - 3))
    writer.add_token_merges([" ".join(pair) for pair in table["merges"]])
    writer.add_pad_token_id(0)
    writer.add_eos_token_id(1)
    writer.add_bos_token_id(1)
    writer.add_unk_token_id(2)
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, shape.num_hidden_layers)
    for name, weight in model.state_dict().items():
        for part, heads in (("q_proj", shape.num_attention_heads), ("k_proj", shape.num_key_value_heads)):
            if part in name:
                weight = interleaved(weight, heads)
        writer.add_tensor(names.get_name(name, try_suffixes=(".weight",)), weight.contiguous().numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def opened(path: Path, cache: Path) -> Backbone:
    return load_backbone(ModelConfig(name="local", path=str(path)), precision="float32", device="cpu", cache_dir=cache)


def test_it_is_the_model_that_was_written(file: Path, tokenizer, tmp_path: Path) -> None:
    backbone, model = opened(file, tmp_path), tiny_llama()
    text = "is it urgent ? the order is late"
    assert backbone.tokenizer(text).input_ids == tokenizer(text).input_ids
    assert (backbone.tokenizer.eos_token_id, backbone.tokenizer.pad_token_id) == (1, 0)
    tokens = torch.tensor([tokenizer(text).input_ids])
    assert_close_to_largest(backbone.model(tokens).logits, model(tokens).logits)
    assert all(not parameter.requires_grad for parameter in backbone.model.parameters())
    assert backbone.model.name_or_path == "tiny"


def test_it_is_converted_once(file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first = module.load_gguf(file, tmp_path)
    assert {"config.json", "model.safetensors", "tokenizer.json"} <= {path.name for path in first.iterdir()}
    monkeypatch.setattr(module, "_convert", lambda *_: pytest.fail("converted again"))
    assert module.load_gguf(file, tmp_path) == first
    copied = tmp_path / "elsewhere" / "tiny.gguf"
    copied.parent.mkdir()
    copied.write_bytes(file.read_bytes())
    assert module.load_gguf(copied, tmp_path) == first


def test_a_run_is_named_by_its_content(file: Path, tmp_path: Path) -> None:
    copied = tmp_path / "other.gguf"
    copied.write_bytes(file.read_bytes())
    changed = tmp_path / "changed.gguf"
    changed.write_bytes(file.read_bytes()[:-4] + b"\0\0\x80?")
    here, there, other = (Config(model=ModelConfig(name="local", path=str(path))) for path in (file, copied, changed))
    assert run_id(here) == run_id(there) != run_id(other)


@pytest.mark.parametrize("kept", [2, 1000, -64], ids=["no header", "half a header", "half a tensor"])
def test_a_damaged_file_is_one_clear_error(kept: int, file: Path, tmp_path: Path) -> None:
    damaged = tmp_path / "damaged.gguf"
    damaged.write_bytes(file.read_bytes()[:kept])
    with pytest.raises(ConfigError, match=r"model.path=.*damaged.gguf is no GGUF file that can be read") as caught:
        opened(damaged, tmp_path / "cache")
    assert "\n" not in str(caught.value)
    assert not [path for path in (tmp_path / "cache").iterdir() if path.suffix != ".lock"]


def test_without_the_package_the_extra_is_named(file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "gguf", None)
    with pytest.raises(ConfigError, match=r"pip install 'dptune\[gguf\]'"):
        opened(file, tmp_path)

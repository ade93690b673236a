"""Backbones from GGUF files, the format of llama.cpp: dequantised once, then read like any other folder."""

import importlib.metadata
import json
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

from dptune.config.extras import require
from dptune.config.schema import ConfigError
from dptune.identity import content_hash
from dptune.models.cache import made_once


def load_gguf(path: Path, cache_dir: Path) -> Path:
    """Folder in Hugging Face format with the dequantised single-precision weights and the tokenizer of a GGUF file.

    Args:
        path: the file.
        cache_dir: folder of the cache; the result is kept there under a hash of the file.

    Raises:
        ConfigError: when the file is damaged, its architecture is not known, or the package that reads it is missing.
    """
    # What transformers makes of a file may change with its version.
    version = importlib.metadata.version("transformers")
    return made_once(
        cache_dir, f"{path.stem}-{version}-{content_hash(path)[:16]}", lambda folder: _convert(path, folder)
    )


def _convert(path: Path, folder: Path) -> None:
    require("gguf", f"model.path={path}")
    source: dict[str, Any] = {
        "pretrained_model_name_or_path": path.parent,
        "gguf_file": path.name,
        "local_files_only": True,
    }
    try:
        tokenizer = AutoTokenizer.from_pretrained(**source)
        quantised = AutoModelForCausalLM.from_pretrained(
            **source, quantization_config=GgufConfig(dequantize=True), dtype=torch.float32
        )
    except Exception as error:  # The reader trusts the file: a damaged one can raise anything.
        reason = " ".join(str(error).split())[:200]
        raise ConfigError(
            f"model.path={path} is no GGUF file that can be read ({type(error).__name__}: {reason}); fetch it again, "
            "or give a folder in Hugging Face format"
        ) from None
    # What was loaded counts as quantised, which can be neither trained nor saved; a fresh model with its weights can.
    config = quantised.config
    config.__dict__.pop("quantization_config", None)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    model.load_state_dict(quantised.state_dict())
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    _drop_tokens_beyond(folder / "tokenizer.json", config.vocab_size)


def _drop_tokens_beyond(path: Path, rows: int) -> None:
    """Take out the tokens that transformers adds to those of the file, and that have no embedding."""
    content = json.loads(path.read_text(encoding="utf-8"))
    content["added_tokens"] = [token for token in content["added_tokens"] if token["id"] < rows]
    path.write_text(json.dumps(content, ensure_ascii=False), encoding="utf-8")

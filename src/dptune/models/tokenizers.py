"""Where a backbone lies, and its tokenizer, which is all that looking at data needs. No torch here."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from dptune.config.schema import ConfigError, ModelConfig
from dptune.models.embedded import folder_of

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedTokenizerBase

    from dptune.data.batches import Architecture


def load_tokenizer(config: ModelConfig, cache_dir: Path) -> tuple[PreTrainedTokenizerBase, Architecture]:
    """The tokenizer of a backbone, as `backbones.load_backbone` has it, and what kind of model it is for.

    Raises:
        ConfigError: when there is none at the place given.
    """
    from transformers import AutoConfig, AutoTokenizer

    folder, _, where = located(config, cache_dir)
    try:
        tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True)
        architecture = architecture_of(AutoConfig.from_pretrained(folder, local_files_only=True))
    except (OSError, ValueError, KeyError) as error:
        reason = str(error).strip().partition("\n")[0]
        raise ConfigError(f"{where} holds no tokenizer: {reason}") from None
    with_ends(tokenizer, where)
    return tokenizer, architecture


def with_ends(tokenizer: PreTrainedTokenizerBase, where: str) -> None:
    """Give a tokenizer the tokens that end and pad; raises ConfigError where nothing ends a text."""
    if tokenizer.eos_token_id is None and tokenizer.sep_token_id is not None:
        tokenizer.eos_token = tokenizer.sep_token
    if tokenizer.eos_token_id is None:
        raise ConfigError(f"{where}: the tokenizer has no end-of-sequence token; set one in its config")
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token


def architecture_of(config: PretrainedConfig) -> Architecture:
    """What kind of model a config describes; a masked language model is an encoder."""
    if config.is_encoder_decoder:
        return "encoder_decoder"
    names = config.architectures or []
    masked = any(name.endswith(("ForMaskedLM", "ForPreTraining")) for name in names)
    return "encoder" if masked else "decoder"


def beginning_of(tokenizer: PreTrainedTokenizerBase) -> tuple[int, ...]:
    """Tokens that the tokenizer's own call puts before a text: Llama and Gemma begin with `<s>` or the like."""
    called, bare = (tokenizer("a", add_special_tokens=special)["input_ids"] for special in (True, False))
    count = next((at for at in range(len(called)) if called[at : at + len(bare)] == bare), 0)
    return tuple(called[:count])


def located(config: ModelConfig, cache_dir: Path) -> tuple[Path, str, str]:
    """Folder of a backbone in Hugging Face format, its name, and for messages the setting that names it."""
    if config.path is not None:
        path, where = Path(config.path), f"model.path={config.path}"
        if path.suffix == ".gguf":
            from dptune.models.gguf import load_gguf

            return load_gguf(path, cache_dir), path.stem, where
        return path, path.resolve().name, where
    if config.repo is not None:
        return _downloaded(config), config.repo, f"model.repo={config.repo}"
    return folder_of(config.name), config.name, f"model={config.name}"


def _downloaded(config: ModelConfig) -> Path:
    """The pinned snapshot of a model on the Hub, downloaded if the Hub's own cache does not hold it."""
    from huggingface_hub import snapshot_download

    try:
        folder = snapshot_download(
            str(config.repo),
            revision=config.revision,
            # Weights that cannot run code, and what the tokenizer needs; subfolders hold other formats of the same.
            allow_patterns=["*.safetensors", "*.json", "*.txt", "*.model", "*.jinja"],
            ignore_patterns=["*/*"],
        )
    except (OSError, ValueError) as error:
        reason = " ".join(str(error).split())[:200]
        raise ConfigError(
            f"model.repo={config.repo} cannot be read from the Hub ({reason}); with network, set HF_HUB_OFFLINE=0; "
            "without, give a folder in Hugging Face format or a .gguf file as model.path"
        ) from None
    return Path(folder)

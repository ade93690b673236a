"""Frozen language models: embedded, from a local folder or GGUF file, or from the Hub. Remote code is never run."""

from __future__ import annotations

import copy
import functools
import hashlib
import inspect
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForMaskedLM,
    AutoModelForSeq2SeqLM,
    AutoTokenizer,
    GenerationConfig,
    PretrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.utils import logging as transformers_logging

from dptune.config.schema import ConfigError, ModelConfig
from dptune.data.batches import Architecture, InputFormat
from dptune.models.quantization import quantize
from dptune.models.tokenizers import architecture_of, beginning_of, located, with_ends


@dataclass(frozen=True)
class Backbone:
    """A frozen language model and its tokenizer."""

    model: torch.nn.Module
    tokenizer: PreTrainedTokenizerBase
    fingerprint: str
    """Hash of the weights."""
    layout: InputFormat
    """How it reads an example."""


def load_backbone(
    config: ModelConfig, *, precision: str, device: str, cache_dir: Path, quantization: str = "none"
) -> Backbone:
    """A fresh copy of a frozen backbone in evaluation mode; the files are read once per process.

    `quantization` is `none` or what the weights of its linear layers are rounded to, a key of `quantization.FORMATS`.

    Raises:
        ConfigError: when there is no language model with a tokenizer at the place given, or the device does not exist.
    """
    check_device(device)
    transformers_logging.disable_progress_bar()
    folder, name, where = located(config, cache_dir)
    loaded = _read(folder.resolve(), name, where, precision, quantization)
    # The adapter is injected into the module tree, so that every run needs a tree of its own.
    model: torch.nn.Module = copy.deepcopy(loaded.model)
    return Backbone(model.to(torch.device(device)), loaded.tokenizer, loaded.fingerprint, loaded.layout)


def attend_by_products(model: Any) -> None:
    """Attention by products and a softmax: torch's fused kernel takes four times as long in 16 bits on a CPU."""
    if getattr(model.config, "_attn_implementation", None) == "sdpa":
        model.set_attn_implementation("eager")


@torch.no_grad()
def is_causal(model: torch.nn.Module) -> bool:
    """Whether no token's output depends on later tokens; encoders can be loaded as language models, too."""
    tokens = torch.tensor([[5, 6, 7, 8], [5, 6, 7, 9]])
    first, second = model(input_ids=tokens, use_cache=False).logits[:, :3].float()
    return bool(torch.allclose(first, second, rtol=1e-3, atol=1e-4))


def check_device(name: str) -> None:
    """Raises ConfigError when torch does not know the device or the machine does not have it."""
    try:
        torch.empty(0, device=torch.device(name))
    except (RuntimeError, AssertionError) as error:
        reason = str(error).partition("\n")[0]
        raise ConfigError(f"compute.device={name} cannot be used here ({reason}); set compute=cpu") from None


@functools.lru_cache(maxsize=2)
def _read(folder: Path, name: str, where: str, precision: str, quantization: str) -> Backbone:
    try:
        tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True)
        architecture = architecture_of(AutoConfig.from_pretrained(folder, local_files_only=True))
        model, report = CLASSES[architecture].from_pretrained(
            folder,
            local_files_only=True,
            use_safetensors=True,
            dtype=getattr(torch, precision),
            output_loading_info=True,
        )
    except (OSError, ValueError, KeyError) as error:
        reason = str(error).strip().partition("\n")[0]
        raise ConfigError(
            f"{where} holds no language model with safetensors weights and a tokenizer: {reason}"
        ) from None
    if report["missing_keys"]:
        raise ConfigError(
            f"{where} has no weights for {sorted(report['missing_keys'])[0]}: it was saved without its "
            "language-model head; take a checkpoint that has one"
        )
    with_ends(tokenizer, where)
    check_vocabulary(model, tokenizer, where)
    if architecture == "encoder" and tokenizer.mask_token_id is None:
        raise ConfigError(f"{where}: the tokenizer has no mask token, with which an encoder is asked")
    # An adapter is made to be passed on: PEFT writes this name into it, and it must not be a path of this machine.
    model.name_or_path = model.config._name_or_path = name
    if model.can_generate():
        # Output is greedy: what a checkpoint says of sampling, or of repetition, is left out.
        model.generation_config = GenerationConfig.from_model_config(model.config)
    model.requires_grad_(False).eval()
    if architecture == "decoder" and not is_causal(model):
        raise ConfigError(f"{where} reads ahead: an encoder cannot be trained as a causal language model")
    quantize(model, quantization)
    digest = hashlib.sha256()
    for name, tensor in sorted(model.state_dict().items()):
        digest.update(name.encode())
        digest.update(tensor.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
    return Backbone(model, tokenizer, digest.hexdigest()[:16], input_format_of(model, tokenizer))


def check_vocabulary(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, where: str) -> None:
    """Raises ConfigError when the tokenizer has tokens that the backbone has no embedding for."""
    rows = len(model.get_input_embeddings().weight)  # type: ignore[arg-type]
    token, number = max(tokenizer.get_vocab().items(), key=lambda item: item[1])
    if number >= rows:
        raise ConfigError(
            f"{where}: the tokenizer goes up to token {number} ({token!r}) and the backbone has {rows} embeddings; "
            f"take the tokenizer that belongs to it, or save it after model.resize_token_embeddings({number + 1})"
        )


CLASSES: dict[Architecture, Any] = {
    "decoder": AutoModelForCausalLM,
    "encoder": AutoModelForMaskedLM,
    "encoder_decoder": AutoModelForSeq2SeqLM,
}


def input_format_of(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> InputFormat:
    """How a backbone reads an example."""
    architecture = architecture_of(model.config)
    positions: int | None = 0
    if "position_ids" not in inspect.signature(model.forward).parameters:
        positions = None
    elif architecture == "encoder":
        # RoBERTa and its kin count from after the padding token's number, and say so in their position table.
        table = [module for name, module in model.named_modules() if name.endswith("position_embeddings")]
        padding = getattr(table[0], "padding_idx", None) if table else None
        positions = 0 if padding is None else padding + 1
    prefix = (tokenizer.cls_token_id,) if architecture == "encoder" and tokenizer.cls_token_id is not None else ()
    return InputFormat(
        pad=tokenizer.pad_token_id,
        architecture=architecture,
        prefix=prefix,
        end=tokenizer.eos_token_id,
        mask=tokenizer.mask_token_id,
        start=model.config.decoder_start_token_id if architecture == "encoder_decoder" else None,
        first_position=positions,
        begin=() if architecture == "encoder" else beginning_of(tokenizer),
        positions=positions_of(model.config),
    )


def positions_of(config: PretrainedConfig) -> int | None:
    """Number of positions that a backbone has, or was trained with; None without an end, as T5 and Mamba are."""
    found = [getattr(config, name, None) for name in POSITIONS]
    known = [value for value in found if isinstance(value, int) and value > 0]
    return min(known, default=None)


POSITIONS = ("max_position_embeddings", "max_encoder_position_embeddings", "max_decoder_position_embeddings")
"""Fields of a config; `n_positions` is the first one under another name."""

"""`dptune merge RUN`: the adapter of a finished run becomes part of its backbone, as one model in safetensors."""

from __future__ import annotations

import shutil
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel

from dptune.config.checks import strict
from dptune.config.schema import Config, ConfigError
from dptune.models import adapters, backbones
from dptune.models.backbones import Backbone
from dptune.models.peft_adapters import quiet
from dptune.privacy.guarantee import GUARANTEE_FILE
from dptune.records.files import whole_folder
from dptune.records.record import ADAPTER_FOLDER, read
from dptune.runs.card import CARD_FILE, merged_card

MERGED_FOLDER = "merged"
"""Where a merged model is written, in its run's folder."""
TOLERANCE = 1e-4
"""Largest difference of a merged model's logits from the adapter's, relative to the largest one."""


def merge(argv: Sequence[str]) -> None:
    """`dptune merge RUN [to=FOLDER] [compute.output_root=FOLDER]`; RUN is a run id or the folder of a run.

    Raises:
        ConfigError: when there is no such run with an adapter that its backbone's class can hold.
    """
    words = [item for item in argv if "=" not in item]
    keys = dict(item.split("=", 1) for item in argv if "=" in item)
    if len(words) != 1 or (unknown := keys.keys() - {"to", "compute.output_root"}):
        said = f"merge {' '.join(argv)}".rstrip()
        wrong = f"{sorted(unknown)[0]} is no key of it" if len(words) == 1 else "give one run"
        raise ConfigError(f"{said}: {wrong}; dptune merge RUN [to=FOLDER] [compute.output_root=outputs]")
    run = Path(words[0])
    if not run.is_dir():
        run = Path(keys.get("compute.output_root", "outputs")) / words[0]
    print(merged(run, Path(keys["to"]) if "to" in keys else run / MERGED_FOLDER))


def merged(run: Path, to: Path) -> Path:
    """Write the merged model of a run's folder, and give where.

    What was written is opened again, and compared with backbone and adapter, before it is there.

    Raises:
        ConfigError: when it cannot be made.
    """
    record = read(run)
    if record is None or not record.is_done or not (run / ADAPTER_FOLDER).is_dir():
        raise ConfigError(f"merge: {run} holds no finished run with an adapter; dptune status lists runs")
    if to.exists():
        raise ConfigError(f"merge: {to} is there already; remove it, or choose another one with to=FOLDER")
    config = strict(record.config)
    backbone = _backbone(config)
    # Merging rounds a weight to the format that it has, so that nothing but float32 keeps the outputs.
    model = adapters.load_adapter(backbone.model, run / ADAPTER_FOLDER)
    expected = _logits(model, backbone)
    plain = _merged_in_memory(model, config.adapter.name)
    with whole_folder(to) as draft:
        plain.save_pretrained(draft, safe_serialization=True)
        backbone.tokenizer.save_pretrained(draft)
        again = backbones.CLASSES[backbone.layout.architecture].from_pretrained(draft, dtype=torch.float32)
        difference = float((_logits(again.eval(), backbone) - expected).abs().max())
        if not difference <= TOLERANCE * max(1.0, float(expected.abs().max())):
            raise ConfigError(
                f"merge: adapter={config.adapter.name} cannot be part of a {type(again).__name__}: opened again, its "
                f"logits differ by {difference:.2g}; use the adapter beside its backbone"
            )
        if (page := run / ADAPTER_FOLDER / GUARANTEE_FILE).is_file():
            shutil.copyfile(page, draft / GUARANTEE_FILE)
        (draft / CARD_FILE).write_text(merged_card(config, record.run_id), encoding="utf-8")
    return to


def _backbone(config: Config) -> Backbone:
    if config.environment.backbone_quantization != "none":
        raise ConfigError(
            f"merge: the run's adapter was trained on weights rounded to {config.environment.backbone_quantization}, "
            "and a merged weight cannot be rounded again without changing its outputs; use the adapter beside its "
            "backbone"
        )
    return backbones.load_backbone(
        config.model, precision="float32", device="cpu", cache_dir=Path(config.compute.cache_dir)
    )


def _merged_in_memory(model: Any, name: str) -> Any:
    if not isinstance(model, PeftModel):
        if name in ("full", "head"):
            return model
        raise ConfigError(
            f"merge: adapter={name} adds layers that the backbone's class does not have; open it with "
            "dptune.models.adapters.load_adapter"
        )
    if model.peft_config["default"].is_prompt_learning:
        raise ConfigError(f"merge: adapter={name} stands before the text and is part of no weight; use it with PEFT")
    with quiet(), warnings.catch_warnings():
        # Adapters of tied layers are saved so that each has a weight of its own.
        warnings.filterwarnings("ignore", message="Model with `tie_word_embeddings=True`")
        warnings.filterwarnings("ignore", message="Input and output embeddings are no longer tied")
        return model.merge_and_unload()


@torch.no_grad()
def _logits(model: Any, backbone: Backbone) -> torch.Tensor:
    """Logits of made-up tokens."""
    spare = min(8, len(backbone.tokenizer) - 1)
    tokens = torch.tensor([[spare + 31 * at % (len(backbone.tokenizer) - spare) for at in range(12)]])
    inputs = {"decoder_input_ids": tokens} if backbone.layout.architecture == "encoder_decoder" else {}
    logits: torch.Tensor = model(input_ids=tokens, **inputs).logits.float()
    return logits

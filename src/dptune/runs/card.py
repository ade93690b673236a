"""The model card (README.md) of what a run leaves: what it is, how to open it, and where its guarantee stands.

It says nothing of the data and no number of the guarantee, which has one place.
"""

from __future__ import annotations

from dptune.config.schema import Config
from dptune.privacy.guarantee import GUARANTEE_FILE

CARD_FILE = "README.md"


def adapter_card(config: Config, peft: bool) -> str:
    """The card of a saved adapter.

    Args:
        config: of the run.
        peft: whether PEFT opens it.
    """
    opened = (
        'from peft import PeftModel\n\nmodel = PeftModel.from_pretrained(backbone, "FOLDER")'
        if peft
        else "from pathlib import Path\n\nfrom dptune.models.adapters import load_adapter\n\n"
        'model = load_adapter(backbone, Path("FOLDER"))'
    )
    library = "peft" if peft else "dptune"
    text = (
        f"# An adapter ({config.adapter.name}) for {_name(config)}\n\n"
        f"Trained with dptune{_privately(config)}. It belongs to this backbone alone, and holds nothing of it that was "
        f"not trained.\n\n```python\n{opened}\n```\n"
    )
    return _card(config, library, text)


def merged_card(config: Config, run_id: str) -> str:
    """The card of a backbone with its adapter merged in."""
    text = (
        f"# {_name(config)} with an adapter ({config.adapter.name}) merged in\n\n"
        f"The adapter was trained with dptune{_privately(config)}, as run {run_id}; its backbone's licence holds.\n"
    )
    return _card(config, "transformers", text)


def _card(config: Config, library: str, text: str) -> str:
    tags = ["dptune", *(["differential-privacy"] if config.privacy.enabled else [])]
    listed = "".join(f"- {tag}\n" for tag in tags)
    base = f"base_model: {config.model.repo}\n" if config.model.repo is not None else ""
    head = f"---\nlibrary_name: {library}\n{base}tags:\n{listed}---\n\n"
    prompts = (
        "the chat template of the tokenizer"
        if config.data.template == "chat"
        else "`{instruction}\\n{input}\\n>` and a space before the response"
    )
    return (
        f"{head}{text}\nPrompts are {prompts}.\n\n## What is guaranteed\n\n[{GUARANTEE_FILE}]({GUARANTEE_FILE}) says "
        "what training guarantees, to whom and for what it does not, with a recipe that computes it again.\n"
    )


def _name(config: Config) -> str:
    return config.model.repo or config.model.name


def _privately(config: Config) -> str:
    return " under differential privacy" if config.privacy.enabled else ", without differential privacy"

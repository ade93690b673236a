"""What a backbone reads: the plain prompt, or the chat template of its tokenizer. No torch here."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

from dptune.config.schema import ConfigError
from dptune.data.schema import Example

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


def prompt_of(example: Example, tokenizer: PreTrainedTokenizerBase, template: str) -> str:
    """What the model reads before its response; tokenise it without adding special tokens.

    Args:
        example: instruction and input.
        tokenizer: tokenizer of the backbone.
        template: `plain` or `chat`, as `data.template`.

    Raises:
        ConfigError: when the tokenizer has no chat template.
    """
    if template == "plain":
        return plain(example.instruction, example.input)
    if not getattr(tokenizer, "chat_template", None):
        raise ConfigError("data.template=chat: the backbone's tokenizer has no chat template; use data.template=plain")
    said = "\n".join(part for part in (example.instruction, example.input) if part)
    turns = [{"role": role, "content": text} for role, text in example.turns] or [{"role": "user", "content": said}]
    made = tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=True)
    assert isinstance(made, str)
    return made


def plain(instruction: str, text: str) -> str:
    """The plain prompt."""
    return f"{instruction}\n{text}\n>" if text else f"{instruction}\n>"


def response_of(text: str, template: str) -> str:
    """A response as it stands after the prompt; the end-of-sequence token follows. A chat template ends in its gap."""
    return f" {text}" if template == "plain" else text


def token_counter(tokenizer: PreTrainedTokenizerBase, template: str) -> Callable[[Example], int]:
    """Number of tokens of an example: prompt, response and end of sequence. For `data.on_long=error`."""

    def count(example: Example) -> int:
        texts = prompt_of(example, tokenizer, template), response_of(example.output, template)
        return 1 + sum(len(tokenizer(text, add_special_tokens=False)["input_ids"]) for text in texts)

    return count

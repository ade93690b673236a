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
        raise ConfigError(f"data.template={template}: {_NONE}")
    said = "\n".join(part for part in (example.instruction, example.input) if part)
    try:
        return _rendered(said, tokenizer)
    except Exception as error:
        # Its words may be the record's.
        raise ConfigError(
            f"data.template=chat: the chat template cannot render a record ({type(error).__name__})"
        ) from (error)


def check_template(tokenizer: PreTrainedTokenizerBase, template: str) -> None:
    """Raises ConfigError, with the template's own reason, when it cannot make a prompt of one turn of a user."""
    if template != "plain":
        if not getattr(tokenizer, "chat_template", None):
            raise ConfigError(f"data.template={template}: {_NONE}")
        try:
            _rendered("made up", tokenizer)
        except Exception as error:
            reason = " ".join(str(error).split())[:200] or type(error).__name__
            raise ConfigError(
                f"data.template={template}: the chat template of the backbone's tokenizer cannot make a prompt of one "
                f"user turn ({reason}); mend tokenizer.chat_template, or use data.template=plain"
            ) from error


def _rendered(said: str, tokenizer: PreTrainedTokenizerBase) -> str:
    # A template is a program of whoever made the model: it may raise anything.
    turns = [{"role": "user", "content": said}]
    made = tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=True)
    if not isinstance(made, str) or not made:
        raise ValueError("it gives no text")
    return made


_NONE = "the backbone's tokenizer has no chat template; use data.template=plain"


def plain(instruction: str, text: str) -> str:
    """The plain prompt."""
    return f"{instruction}\n{text}\n>" if text else f"{instruction}\n>"


def response_of(text: str, template: str) -> str:
    """A response as it stands after the prompt; the end-of-sequence token follows. A chat template ends in its gap."""
    return f" {text}" if template == "plain" else text


def token_counter(tokenizer: PreTrainedTokenizerBase, template: str, begin: int = 0) -> Callable[[Example], int]:
    """Number of tokens of an example: prompt, behind `begin` tokens, response and end. For `data.on_long=error`."""

    def count(example: Example) -> int:
        texts = prompt_of(example, tokenizer, template), response_of(example.output, template)
        return begin + 1 + sum(len(tokenizer(text, add_special_tokens=False)["input_ids"]) for text in texts)

    return count

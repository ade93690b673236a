"""What a backbone reads: the plain prompt, or the chat template of its tokenizer. No torch here."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

from dptune.config.schema import ConfigError
from dptune.data.schema import Example, Turn

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
    return "".join(text for text, _ in pieces_of(example, tokenizer, template))


def pieces_of(example: Example, tokenizer: PreTrainedTokenizerBase, template: str) -> list[tuple[str, bool]]:
    """The same in pieces, each with whether it is a reply of a conversation that is learned, too."""
    if template == "plain":
        if example.turns:
            return [*spoken(example.turns), ("\n>", False)]
        return [(plain(example.instruction, example.input), False)]
    if not getattr(tokenizer, "chat_template", None):
        raise ConfigError(f"data.template={template}: {_NONE}")
    said = "\n".join(part for part in (example.instruction, example.input) if part)
    try:
        return _chat_pieces(example.turns or (("user", said, False),), tokenizer)
    except Exception as error:
        # Its words may be the record's.
        raise ConfigError(
            f"data.template={template}: the chat template cannot render a record ({type(error).__name__})"
        ) from error


def spoken(turns: Sequence[Turn]) -> list[tuple[str, bool]]:
    """Turns as plain text, where a reply stands as it does after a plain prompt; in pieces, as above."""
    pieces, text = list[tuple[str, bool]](), ""
    for number, (role, said, learned) in enumerate(turns):
        text += "\n" if number else ""
        if role != "assistant":
            text += said
        elif learned:
            pieces += [(f"{text}>", False), (response_of(said, "plain"), True)]
            text = ""
        else:
            text += f">{response_of(said, 'plain')}"
    return [*pieces, (text, False)] if text else pieces


def _chat_pieces(turns: Sequence[Turn], tokenizer: PreTrainedTokenizerBase) -> list[tuple[str, bool]]:
    """A conversation as its chat template has it.

    A reply is learned where the template shows it as it would ask for it, with the token that ends it.
    """
    try:
        whole = _rendered(turns, tokenizer)
    except Exception:
        if (other := _for_strict_templates(turns)) == turns:
            raise
        turns = other
        whole = _rendered(turns, tokenizer)
    pieces, at = list[tuple[str, bool]](), 0
    for number, (role, said, learned) in enumerate(turns):
        if role != "assistant" or not learned or not number:
            continue
        asked = _rendered(turns[:number], tokenizer)
        begin = whole.find(said.strip(), len(asked))
        if len(asked) < at or not whole.startswith(asked) or begin < 0 or whole[len(asked) : begin].strip():
            continue
        end = begin + len(said.strip())
        if whole.startswith(str(tokenizer.eos_token), end):
            end += len(str(tokenizer.eos_token))
        pieces += [(whole[at : len(asked)], False), (whole[len(asked) : end], True)]
        at = end
    return [*pieces, (whole[at:], False)]


def _for_strict_templates(turns: Sequence[Turn]) -> Sequence[Turn]:
    """The same for templates that know no system, or begin with a user: as the first words of the user."""
    for number, (role, said, _) in enumerate(turns):
        if role == "user":
            before = [text for role, text, _ in turns[:number] if role == "system"]
            return (("user", "\n".join((*before, said)), False), *turns[number + 1 :])
    return turns


def check_template(tokenizer: PreTrainedTokenizerBase, template: str) -> None:
    """Raises ConfigError, with the template's own reason, when it cannot make a prompt of one turn of a user."""
    if template != "plain":
        if not getattr(tokenizer, "chat_template", None):
            raise ConfigError(f"data.template={template}: {_NONE}")
        try:
            _rendered((("user", "made up", False),), tokenizer)
        except Exception as error:
            reason = " ".join(str(error).split())[:200] or type(error).__name__
            raise ConfigError(
                f"data.template={template}: the chat template of the backbone's tokenizer cannot make a prompt of one "
                f"user turn ({reason}); mend tokenizer.chat_template, or use data.template=plain"
            ) from error


def _rendered(turns: Sequence[Turn], tokenizer: PreTrainedTokenizerBase) -> str:
    # A template is a program of whoever made the model: it may raise anything.
    said = [{"role": role, "content": text} for role, text, _ in turns]
    made = tokenizer.apply_chat_template(said, tokenize=False, add_generation_prompt=True)
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

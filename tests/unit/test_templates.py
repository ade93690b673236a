from typing import Any

import pytest

from dptune.config.schema import ConfigError
from dptune.data.schema import Example
from dptune.data.templates import prompt_of, response_of, token_counter

EXAMPLE = Example("team", "which team ?", "reset my code", None, "billing", None, "train")
CHAT = (
    "{% for m in messages %}<{{ m.role }}>{{ m.content }}</s>{% endfor %}{% if add_generation_prompt %}<a>{% endif %}"
)


@pytest.fixture
def chatting(tokenizer: Any, monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.setattr(tokenizer, "chat_template", CHAT)
    return tokenizer


def test_the_plain_template_is_the_same_for_every_tokenizer(tokenizer: Any) -> None:
    assert prompt_of(EXAMPLE, tokenizer, "plain") == "which team ?\nreset my code\n>"
    alone = Example("team", "say", "", None, "billing", None, "train")
    assert prompt_of(alone, tokenizer, "plain") == "say\n>" and response_of("billing", "plain") == " billing"


def test_the_chat_template_is_the_tokenizers(chatting: Any) -> None:
    assert prompt_of(EXAMPLE, chatting, "chat") == "<user>which team ?\nreset my code</s><a>"
    assert response_of("billing", "chat") == "billing"


def test_a_tokenizer_without_chat_template_is_named(tokenizer: Any) -> None:
    with pytest.raises(ConfigError, match="data.template=chat: .* use data.template=plain"):
        prompt_of(EXAMPLE, tokenizer, "chat")


@pytest.mark.parametrize("template", ["plain", "chat"])
def test_the_length_counts_prompt_response_and_end(chatting: Any, template: str) -> None:
    text = prompt_of(EXAMPLE, chatting, template), response_of(EXAMPLE.output, template)
    expected = sum(len(chatting(part, add_special_tokens=False)["input_ids"]) for part in text) + 1
    assert token_counter(chatting, template)(EXAMPLE) == expected

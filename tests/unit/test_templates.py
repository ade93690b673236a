from typing import Any

import pytest

from dptune.config.schema import ConfigError
from dptune.data.schema import Example
from dptune.data.templates import check_template, prompt_of, response_of, token_counter

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


@pytest.mark.parametrize(
    ("template", "reason"),
    [
        ("{{ raise_exception('a system turn must come first') }}", "a system turn must come first"),
        ("{{ messages | unheard_of }}", "unheard_of"),
        ("{% for m in messages %}", "Unexpected end of template"),
        ({"rag": CHAT, "tool_use": CHAT}, "multiple chat templates"),
        ("", "has no chat template"),
        ("{# nothing #}", "it gives no text"),
    ],
)
def test_a_chat_template_that_cannot_make_a_prompt_is_named(
    tokenizer: Any, monkeypatch: pytest.MonkeyPatch, template: Any, reason: str
) -> None:
    monkeypatch.setattr(tokenizer, "chat_template", template)
    with pytest.raises(ConfigError, match=f"data.template=chat: .*{reason}.*data.template=plain"):
        check_template(tokenizer, "chat")
    check_template(tokenizer, "plain")


def test_a_chat_template_that_stumbles_over_a_record_does_not_repeat_it(
    tokenizer: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    picky = "{% if 'code' in messages[0].content %}{{ raise_exception(messages[0].content) }}{% endif %}<a>"
    monkeypatch.setattr(tokenizer, "chat_template", picky)
    check_template(tokenizer, "chat")
    with pytest.raises(ConfigError) as refused:
        prompt_of(EXAMPLE, tokenizer, "chat")
    assert "TemplateError" in str(refused.value) and "code" not in str(refused.value)


@pytest.mark.parametrize("template", ["plain", "chat"])
def test_the_length_counts_prompt_response_and_end(chatting: Any, template: str) -> None:
    text = prompt_of(EXAMPLE, chatting, template), response_of(EXAMPLE.output, template)
    expected = sum(len(chatting(part, add_special_tokens=False)["input_ids"]) for part in text) + 1
    assert token_counter(chatting, template)(EXAMPLE) == expected
    assert token_counter(chatting, template, begin=2)(EXAMPLE) == expected + 2

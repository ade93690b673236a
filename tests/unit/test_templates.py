from typing import Any

import pytest

from dptune.config.schema import ConfigError
from dptune.data.schema import Example
from dptune.data.templates import check_template, pieces_of, prompt_of, response_of, token_counter

EXAMPLE = Example("team", "which team ?", "reset my code", None, "billing", None, "train")
CHAT = (
    "{% for m in messages %}<{{ m.role }}>{{ m.content }}</s>{% endfor %}{% if add_generation_prompt %}<a>{% endif %}"
)

TURNS = (
    ("system", "be kind", False),
    ("user", "hi", False),
    ("assistant", "hello", True),
    ("user", "why ?", False),
    ("assistant", "no idea", False),
    ("user", "really ?", False),
)
TALK = Example("chat", "be kind\nhi\n> hello\nwhy ?\n> no idea\nreally ?", "", None, "yes", None, "train", TURNS)


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


@pytest.mark.parametrize("template", ["plain", "chat"])
def test_the_pieces_of_a_prompt_are_the_prompt(chatting: Any, template: str) -> None:
    for example in (EXAMPLE, TALK):
        assert "".join(text for text, _ in pieces_of(example, chatting, template)) == prompt_of(
            example, chatting, template
        )


def test_a_conversation_has_its_turns_and_its_replies_are_learned(chatting: Any) -> None:
    assert prompt_of(TALK, chatting, "plain") == f"{TALK.instruction}\n>"
    assert [text for text, learned in pieces_of(TALK, chatting, "plain") if learned] == [" hello"]
    assert prompt_of(TALK, chatting, "chat") == (
        "<system>be kind</s><user>hi</s><assistant>hello</s><user>why ?</s><assistant>no idea</s><user>really ?</s><a>"
    )
    assert not any(learned for _, learned in pieces_of(TALK, chatting, "chat"))  # It asks for <a>, and shows another.


ASKS = CHAT.replace("<a>", "<assistant>")


def test_a_reply_is_learned_with_its_end_where_the_template_shows_it_as_it_asks_for_it(
    tokenizer: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tokenizer, "chat_template", ASKS.replace("</s>", tokenizer.eos_token))
    assert [text for text, learned in pieces_of(TALK, tokenizer, "chat") if learned] == ["hello<eos>"]
    monkeypatch.setattr(tokenizer, "chat_template", ASKS.replace("{{ m.content }}", " {{ m.content | trim }}"))
    assert [text for text, learned in pieces_of(TALK, tokenizer, "chat") if learned] == [" hello"]
    monkeypatch.setattr(tokenizer, "chat_template", ASKS.replace("{{ m.content }}", "{{ m.content[:2] }}"))
    assert not any(learned for _, learned in pieces_of(TALK, tokenizer, "chat"))


def test_a_template_without_a_system_gets_its_words_with_those_of_the_user(
    tokenizer: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    strict = (
        "{% for m in messages %}{% if (m.role == 'user') != (loop.index0 % 2 == 0) %}{{ raise_exception('alternate') }}"
        f"{{% endif %}}{{% endfor %}}{ASKS}"
    )
    monkeypatch.setattr(tokenizer, "chat_template", strict)
    prompt = prompt_of(TALK, tokenizer, "chat")
    assert prompt.startswith("<user>be kind\nhi</s><assistant>hello</s>")
    first = Example("chat", "x", "", None, "yes", None, "train", (("assistant", "welcome", False), *TURNS[1:]))
    assert prompt_of(first, tokenizer, "chat") == prompt.replace("be kind\n", "")

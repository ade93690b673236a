import dataclasses
import math

import pytest
import torch
from backbones_for_tests import layout_of, tiny_gpt2, tiny_llama, tiny_t5
from numerics import FLOAT32, assert_close_to_largest

from dptune.data.batches import InputFormat, Ladder
from dptune.data.encoding import encode
from dptune.data.schema import Example
from dptune.data.templates import plain as prompt
from dptune.evaluation import Answer, Evaluator, Written, evaluated_examples, metrics_of, normalised

pytestmark = pytest.mark.numerical

LAYOUT = InputFormat(pad=0)
EXAMPLES = [
    Example(
        "team",
        "which team ?",
        "reset my code",
        ("support", "billing", "orders and more"),
        "billing",
        None,
        "test",
    ),
    Example("urgent", "is it urgent ?", "the order is late", ("yes", "no"), "no", None, "test"),
    Example("number", "which number ?", "kim 12", None, "12", None, "test"),
]


def judged_by(model, tokenizer, examples, seen, batch_size: int = 4, layout: InputFormat = LAYOUT):
    return Evaluator(tokenizer, Ladder(64, batch_size, layout), 8)(model, examples, seen)


def greedy(model, tokenizer, examples, layout: InputFormat, longest: int, batch_size: int, most: int) -> list[str]:
    return Evaluator(tokenizer, Ladder(longest, batch_size, layout), most).outputs(model, examples)


@torch.no_grad()
def summed(model, tokenizer, example: Example, option: str) -> float:
    """Summed log-likelihood of an option, one example at a time, without padding."""
    row = encode([(prompt(example.instruction, example.input), f" {option}")], tokenizer, 64)[0]
    logits = model(torch.tensor([row.tokens])).logits[0].log_softmax(-1)
    places = range(len(row.tokens) - row.response, len(row.tokens))
    return float(sum(logits[place - 1, row.tokens[place]] for place in places))


def test_options_are_ranked_by_summed_log_likelihood(tokenizer) -> None:
    correct = []
    for seed in range(6):
        model = tiny_llama(seed).eval()
        judgements, _ = judged_by(model, tokenizer, EXAMPLES, {"kim 12"}, batch_size=2)
        for example, judgement in list(zip(EXAMPLES, judgements, strict=True))[:2]:
            scores = {option: summed(model, tokenizer, example, option) for option in example.options}
            assert judgement.correct == (max(scores, key=scores.__getitem__) == example.output)
            tokens = encode([("", f" {example.output}")], tokenizer, 64)[0].response
            assert_close_to_largest(judgement.loss, -scores[example.output] / tokens, FLOAT32)
            correct.append(judgement.correct)
        assert [item.unseen for item in judgements] == [True, True, False]
    assert True in correct and False in correct


def test_greedy_output_does_not_depend_on_the_batch(tokenizer) -> None:
    model = tiny_llama().eval()
    together = greedy(model, tokenizer, EXAMPLES, LAYOUT, 64, 3, 8)
    alone = [greedy(model, tokenizer, [example], LAYOUT, 64, 1, 8)[0] for example in EXAMPLES]
    assert together == alone and any(together)


def test_free_form_answers_match_after_normalisation(tokenizer, monkeypatch: pytest.MonkeyPatch) -> None:
    from dptune import evaluation

    for output, expected in [(" 12.", True), ("12\n", True), ("1 2", False), ("", False)]:
        monkeypatch.setattr(evaluation.Evaluator, "outputs", lambda *_, output=output: [output])
        found, _ = judged_by(tiny_llama().eval(), tokenizer, EXAMPLES[2:], ())
        assert found[0].correct is expected
    assert normalised("  Two  Words. ") == "two words"


def test_metrics_are_macro_averages() -> None:
    items = [Answer("a", True, 1.0, True)] * 3 + [
        Answer("a", False, 1.0, False),
        Answer("b", False, 2.0, False),
    ]
    metrics = metrics_of(items)
    assert metrics.accuracy_by_task == {"a": 0.75, "b": 0.0}
    assert metrics.accuracy == 0.375 and metrics.worst_task == "b" and metrics.spread_over_tasks == 0.375
    assert metrics.accuracy_unseen == 1.0 and metrics.n == 5 and metrics.n_unseen == 3
    assert metrics.n_by_task == {"a": 4, "b": 1}
    assert metrics.response_perplexity == pytest.approx(math.exp(1.2))


def test_what_occurs_in_private_training_data_is_not_told(tokenizer) -> None:
    found, _ = judged_by(tiny_llama().eval(), tokenizer, EXAMPLES, None)
    metrics = metrics_of(found)
    assert {item.unseen for item in found} == {None}
    assert metrics.accuracy_unseen is None and metrics.n_unseen is None


@pytest.mark.parametrize("kept", [slice(0, 2), slice(2, 3)], ids=["options only", "free form only"])
def test_data_of_one_kind_only_is_judged(kept: slice, tokenizer) -> None:
    found, _ = judged_by(tiny_llama().eval(), tokenizer, EXAMPLES[kept], ())
    assert [item.task for item in found] == [example.task for example in EXAMPLES[kept]]


PLACES = [
    Example("place", "describe", text, None, output, None, "test")
    for text, output in [("cat", "a cat sat there"), ("dog", "the dog ran off"), ("cat", "there a cat sat")]
]


@pytest.mark.parametrize("kind", ["llama", "t5"])
def test_records_with_the_same_prompt_are_references_of_one_text(kind: str, tokenizer) -> None:
    model = (tiny_llama if kind == "llama" else tiny_t5)().eval()
    layout = layout_of(kind)
    judgements, written = judged_by(model, tokenizer, [*EXAMPLES[:2], *PLACES], (), layout=layout)
    assert [item.task for item in judgements] == ["team", "urgent", "place", "place", "place"]
    assert [item.references for item in written] == [("a cat sat there", "there a cat sat"), ("the dog ran off",)]
    alone = [greedy(model, tokenizer, [example], layout, 64, 1, 8)[0].strip() for example in PLACES[:2]]
    assert [item.output for item in written] == alone


@torch.no_grad()
def test_output_is_what_steps_without_a_cache_give(tokenizer) -> None:
    model = tiny_llama(3).eval()
    tokens = tokenizer(prompt("describe", "the cat"), add_special_tokens=False).input_ids
    begin = len(tokens)
    while len(tokens) < begin + 8 and tokens[-1] != tokenizer.eos_token_id:
        tokens.append(int(model(torch.tensor([tokens]), use_cache=False).logits[0, -1].argmax()))
    example = Example("place", "describe", "the cat", None, "x", None, "test")
    longer = Example("place", "describe the colour of", "the dog and the cat", None, "x", None, "test")
    expected = tokenizer.decode(tokens[begin:], skip_special_tokens=True)
    assert greedy(model, tokenizer, [longer, example], LAYOUT, 64, 2, 8)[1] == expected != ""


def test_the_first_prompts_of_a_free_form_task_are_judged_with_all_their_records() -> None:
    examples = [*EXAMPLES[:2], *PLACES]
    assert evaluated_examples(examples, 1) == [*EXAMPLES[:2], PLACES[0], PLACES[2]]
    assert evaluated_examples(examples, 2) == evaluated_examples(examples, None) == examples


def test_text_metrics_are_macro_averages_over_free_form_tasks() -> None:
    items = [Answer("a", False, 1.0, False), Answer("b", False, 1.0, False), Answer("c", True, 1.0, False)]
    written = [
        Written("a", "the cat sat on a mat", ("the cat sat on the mat",)),
        Written("b", "one two three four", ("one two three four",)),
        Written("c", "12", ("12",)),
    ]
    metrics = metrics_of(items, written)
    assert metrics.bleu_by_task == pytest.approx({"a": 53.728, "b": 100.0}, abs=1e-3)
    assert metrics.bleu == pytest.approx((53.728 + 100) / 2, abs=1e-3)
    assert metrics.rouge_l == pytest.approx((5 / 6 + 1) / 2) and set(metrics.rouge_l_by_task) == {"a", "b"}
    bare = metrics_of(items)
    assert bare.bleu is None and bare.rouge_l is None and bare.bleu_by_task == {}


def test_a_long_prompt_leaves_room_for_the_answer(tokenizer) -> None:
    model = tiny_gpt2().eval()
    long = Example("place", "describe", "the cat and the dog " * 20, None, "x", None, "test")
    layout = dataclasses.replace(LAYOUT, positions=model.config.n_positions)
    assert layout.positions is not None and len(tokenizer(long.input).input_ids) > layout.positions
    assert isinstance(greedy(model, tokenizer, [long], layout, 512, 1, 100)[0], str)

import math

import pytest
import torch
from backbones_for_tests import tiny_llama

from dptune.data.batches import Layout
from dptune.data.encoding import encode
from dptune.data.schema import Example
from dptune.data.templates import plain as prompt
from dptune.evaluation import Judgement, greedy, judge, normalised, summarise

LAYOUT = Layout(pad=0)
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
        judgements = judge(model, tokenizer, EXAMPLES, {"kim 12"}, layout=LAYOUT, sequence_length=64, batch_size=2)
        for example, judgement in list(zip(EXAMPLES, judgements, strict=True))[:2]:
            scores = {option: summed(model, tokenizer, example, option) for option in example.options}
            assert judgement.correct == (max(scores, key=scores.__getitem__) == example.output)
            tokens = encode([("", f" {example.output}")], tokenizer, 64)[0].response
            assert judgement.loss == pytest.approx(-scores[example.output] / tokens, abs=1e-4)
            correct.append(judgement.correct)
        assert [item.unseen for item in judgements] == [True, True, False]
    assert True in correct and False in correct


def test_greedy_output_does_not_depend_on_the_batch(tokenizer) -> None:
    model = tiny_llama().eval()
    together = greedy(model, tokenizer, EXAMPLES, LAYOUT, 64, 3)
    alone = [greedy(model, tokenizer, [example], LAYOUT, 64, 1)[0] for example in EXAMPLES]
    assert together == alone and any(together)


def test_free_form_answers_match_after_normalisation(tokenizer, monkeypatch: pytest.MonkeyPatch) -> None:
    from dptune import evaluation

    for output, expected in [(" 12.", True), ("12\n", True), ("1 2", False), ("", False)]:
        monkeypatch.setattr(evaluation, "greedy", lambda *_, output=output: [output])
        found = judge(tiny_llama().eval(), tokenizer, EXAMPLES[2:], (), layout=LAYOUT, sequence_length=64, batch_size=4)
        assert found[0].correct is expected
    assert normalised("  Two  Words. ") == "two words"


def test_metrics_are_macro_averages() -> None:
    items = [Judgement("a", True, 1.0, True)] * 3 + [
        Judgement("a", False, 1.0, False),
        Judgement("b", False, 2.0, False),
    ]
    metrics = summarise(items)
    assert metrics.accuracy_by_task == {"a": 0.75, "b": 0.0}
    assert metrics.accuracy == 0.375 and metrics.worst_task == "b" and metrics.spread_over_tasks == 0.375
    assert metrics.accuracy_unseen == 1.0 and metrics.n == 5 and metrics.n_unseen == 3
    assert metrics.n_by_task == {"a": 4, "b": 1}
    assert metrics.response_perplexity == pytest.approx(math.exp(1.2))


def test_what_occurs_in_private_training_data_is_not_told(tokenizer) -> None:
    found = judge(tiny_llama().eval(), tokenizer, EXAMPLES, None, layout=LAYOUT, sequence_length=64, batch_size=4)
    metrics = summarise(found)
    assert {item.unseen for item in found} == {None}
    assert metrics.accuracy_unseen is None and metrics.n_unseen is None


@pytest.mark.parametrize("kept", [slice(0, 2), slice(2, 3)], ids=["options only", "free form only"])
def test_data_of_one_kind_only_is_judged(kept: slice, tokenizer) -> None:
    found = judge(tiny_llama().eval(), tokenizer, EXAMPLES[kept], (), layout=LAYOUT, sequence_length=64, batch_size=4)
    assert [item.task for item in found] == [example.task for example in EXAMPLES[kept]]

"""BLEU and ROUGE-L against values worked out by hand."""

import math

import pytest

from dptune.evaluation import Written, bleu, by_task, rouge_l

pytest.importorskip("sacrebleu", reason="make setup EXTRAS=text, or make test")
pytest.importorskip("rouge_score", reason="make setup EXTRAS=text, or make test")

MAT = "the cat sat on the mat"


def written(output: str, *references: str, task: str = "a") -> Written:
    return Written(task, output, references)


def test_identical_text_is_perfect_and_unlike_text_is_the_floor() -> None:
    same, unlike, nothing = ([written(text, MAT)] for text in (MAT, "quite other words stand here", ""))
    assert bleu(same) == pytest.approx(100) and rouge_l(same) == 1
    assert bleu(unlike) == rouge_l(unlike) == bleu(nothing) == rouge_l(nothing) == 0


def test_values_by_hand() -> None:
    one = [written("the cat sat on a mat", MAT)]
    # Of 6, 5, 4 and 3 runs of one to four words 5, 3, 2 and 1 are in the reference; both have six words.
    assert bleu(one) == pytest.approx(100 * (5 / 6 * 3 / 5 * 2 / 4 * 1 / 3) ** 0.25)
    # "the cat sat on mat" is common: precision and recall are 5/6.
    assert rouge_l(one) == pytest.approx(5 / 6)
    short = [written("the cat sat on", MAT)]
    assert bleu(short) == pytest.approx(100 * math.exp(1 - 6 / 4))
    assert rouge_l(short) == pytest.approx(2 * 1 * (4 / 6) / (1 + 4 / 6))


def test_bleu_is_over_the_corpus_and_each_text_has_its_own_references() -> None:
    pair = [written(MAT, "a cat sat on a mat", MAT), written("a b c d", "x y z w")]
    # Runs that are in a reference: 6, 5, 4, 3 of 10, 8, 6, 4.
    assert bleu(pair) == pytest.approx(100 * (6 / 10 * 5 / 8 * 4 / 6 * 3 / 4) ** 0.25)
    assert rouge_l(pair) == pytest.approx(0.5)


def test_a_task_of_short_answers_has_none() -> None:
    texts = [written("12 may", "12 may", task="date"), written(MAT, "yes", MAT, task="reply")]
    assert by_task(texts) == {"reply": (pytest.approx(100), 1.0)}

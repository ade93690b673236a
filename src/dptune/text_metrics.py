"""How near free-form text comes to its references: BLEU and ROUGE-L. No torch here."""

from __future__ import annotations

import itertools
import statistics
from collections.abc import Sequence
from dataclasses import dataclass

SHORTEST = 4
"""Words of the longest reference below which a task has no text metrics: BLEU counts runs of four words."""


@dataclass(frozen=True)
class Written:
    """What the model wrote for one prompt. Text of the data: it enters no record."""

    task: str
    output: str
    references: tuple[str, ...]
    """The right responses of all test records with this prompt."""


def bleu(texts: Sequence[Written]) -> float:
    """Corpus BLEU in [0, 100] with several references each, case-sensitive, sacreBLEU's "13a" tokens.

    Source: arXiv:1804.08771; higher is better.
    """
    import sacrebleu

    # One list for the first references of all texts, one for the second, and so on.
    streams = list(itertools.zip_longest(*(text.references for text in texts)))
    return float(sacrebleu.corpus_bleu([text.output for text in texts], streams).score)


def rouge_l(texts: Sequence[Written]) -> float:
    """Mean over texts of the F-measure of ROUGE-L against the nearest reference, in [0, 1], without stemming.

    Source: Lin 2004, "ROUGE: A Package for Automatic Evaluation of Summaries"; higher is better.
    """
    from rouge_score.rouge_scorer import RougeScorer

    scorer = RougeScorer(["rougeL"])
    return statistics.fmean(scorer.score_multi(text.references, text.output)["rougeL"].fmeasure for text in texts)


def by_task(texts: Sequence[Written]) -> dict[str, tuple[float, float]]:
    """BLEU and ROUGE-L of each task whose references are not all shorter than `SHORTEST` words."""
    found = {}
    for task in sorted({text.task for text in texts}):
        own = [text for text in texts if text.task == task]
        if max(len(reference.split()) for text in own for reference in text.references) >= SHORTEST:
            found[task] = bleu(own), rouge_l(own)
    return found

"""How good a model is: options ranked by log-likelihood, free form by what greedy output has of its references."""

from __future__ import annotations

import dataclasses
import itertools
import math
import statistics
from collections import defaultdict
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from dptune.data.batches import Ladder, collate, collate_prompts, physical_batches, token_log_probabilities
from dptune.data.encoding import Encoded, encode, encode_prompts
from dptune.data.schema import Example
from dptune.data.templates import prompt_of, response_of
from dptune.records.record import Metrics

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


@dataclass(frozen=True)
class Answer:
    """What the model made of one example."""

    task: str
    correct: bool
    loss: float
    """Mean negative log-likelihood of the right response's tokens."""
    unseen: bool | None
    """The input does not occur in the training split; None where that must not be told."""


def evaluated_examples(examples: Sequence[Example], prompts: int | None) -> list[Example]:
    """The test records that are judged: those with options, and all that share one of a task's first free prompts.

    Args:
        examples: the test split, in its public order.
        prompts: number of prompts of each free-form task (None: all), because writing is slow.
    """
    kept: dict[str, set[tuple[str, str]]] = defaultdict(set)
    for example in examples:
        if not example.options and (prompts is None or len(kept[example.task]) < prompts):
            kept[example.task].add((example.instruction, example.input))
    return [item for item in examples if item.options or (item.instruction, item.input) in kept[item.task]]


@dataclass(frozen=True)
class Evaluator:
    """How a model is judged: the shapes in which it reads, and how long it may write.

    What an example gets does not depend on the others: the shapes are public (`data.batches`).
    """

    tokenizer: PreTrainedTokenizerBase
    ladder: Ladder
    """Shapes of the batches; `longest` is the longest example in tokens."""
    max_new_tokens: int
    """Longest free-form output in tokens."""
    template: str = "plain"
    """What a prompt looks like, `plain` or `chat`."""

    @torch.no_grad()
    def __call__(
        self, model: torch.nn.Module, examples: Sequence[Example], seen_inputs: Collection[str] | None
    ) -> tuple[list[Answer], list[Written]]:
        """One answer an example, in their order, and what was written for each prompt of free form.

        Args:
            model: language model in evaluation mode.
            examples: what to judge on.
            seen_inputs: inputs of the training split; None when they are private, because telling which test inputs
                occur among them would tell about single training records.
        """
        chosen, losses = self._ranked(model, examples)
        written, answers = self._written(model, examples)
        answers |= {index: chosen[index] for index, example in enumerate(examples) if example.options}
        judged = [
            Answer(
                task=example.task,
                correct=is_correct(answers[index], example),
                loss=losses[index],
                unseen=None if seen_inputs is None else example.input not in seen_inputs,
            )
            for index, example in enumerate(examples)
        ]
        return judged, written

    def _ranked(self, model: torch.nn.Module, examples: Sequence[Example]) -> tuple[dict[int, str], dict[int, float]]:
        """The likeliest option of each example, and the loss of its right response."""
        candidates = [
            (index, option)
            for index, example in enumerate(examples)
            for option in (example.options or (example.output,))
        ]
        rows = encode(
            [
                (prompt_of(examples[index], self.tokenizer, self.template), response_of(option, self.template))
                for index, option in candidates
            ],
            self.tokenizer,
            self.ladder.longest,
            self.ladder.layout.beginning(self.template),
        )
        best: dict[int, tuple[float, str]] = {}
        losses: dict[int, float] = {}
        for (index, option), row, score in zip(candidates, rows, self._scores(model, rows), strict=True):
            if option == examples[index].output:
                losses[index] = -score / row.response
            if index not in best or score > best[index][0]:
                best[index] = (score, option)
        return {index: option for index, (_, option) in best.items()}, losses

    def _scores(self, model: torch.nn.Module, rows: Sequence[Encoded]) -> list[float]:
        """Log-probability of each row's response."""
        scores = [0.0] * len(rows)
        device = next(model.parameters()).device
        for piece in physical_batches(rows, self.ladder):
            taken = piece.positions.tolist()
            batch = collate([rows[row] for row in taken], self.ladder.layout, piece.shape, device)
            found = token_log_probabilities(model, batch).sum(dim=1).tolist()
            for row, score in zip(taken, found, strict=False):
                scores[row] = score
        return scores

    def _written(self, model: torch.nn.Module, examples: Sequence[Example]) -> tuple[list[Written], dict[int, str]]:
        """What the model writes for each prompt of free form, once, and for each example."""
        asked: dict[tuple[str, str, str], list[int]] = defaultdict(list)
        for index, example in enumerate(examples):
            if not example.options:
                asked[example.task, example.instruction, example.input].append(index)
        outputs = self.outputs(model, [examples[indices[0]] for indices in asked.values()])
        written: list[Written] = []
        answers: dict[int, str] = {}
        for indices, output in zip(asked.values(), outputs, strict=True):
            answers |= dict.fromkeys(indices, output)
            references = tuple(examples[index].output for index in indices)
            written.append(Written(examples[indices[0]].task, output.strip(), references))
        return written, answers

    @torch.no_grad()
    def outputs(self, model: torch.nn.Module, examples: Sequence[Example]) -> list[str]:
        """Greedy output of each example, cut at the end-of-sequence token or after `max_new_tokens`."""
        if not examples:
            return []  # The tokenizer does not take an empty list.
        layout, longest = self.ladder.layout, self.ladder.longest
        texts = [prompt_of(example, self.tokenizer, self.template) for example in examples]
        if layout.architecture == "decoder" and layout.positions is not None:
            # What is written takes positions after the prompt, and a soft prompt those before it.
            taken = getattr(getattr(model, "active_peft_config", None), "num_virtual_tokens", 0) + self.max_new_tokens
            longest = min(longest, max(layout.positions - taken, 1))
        ladder = dataclasses.replace(self.ladder, longest=longest)
        rows = encode_prompts(texts, self.tokenizer, longest, layout.beginning(self.template))
        outputs = [""] * len(rows)
        device = next(model.parameters()).device
        for piece in physical_batches(rows, ladder):
            taken = piece.positions.tolist()
            batch = collate_prompts([rows[row].tokens for row in taken], layout, piece.shape, device)
            generated = model.generate(  # type: ignore[operator]
                **batch,
                max_new_tokens=self.max_new_tokens,
                do_sample=False,
                use_cache=True,
                pad_token_id=self.tokenizer.pad_token_id,
                eos_token_id=self.tokenizer.eos_token_id,
            )
            # A decoder repeats what it read; the decoder of an encoder-decoder begins with its start token.
            read = 1 if layout.architecture == "encoder_decoder" else piece.shape.width
            texts = self.tokenizer.batch_decode(generated[:, read:], skip_special_tokens=True)
            for row, text in zip(taken, texts, strict=False):
                outputs[row] = text
        return outputs


def is_correct(answer: str, example: Example) -> bool:
    """The chosen option is the right one, or the free-form answer equals the response after normalisation."""
    if example.options:
        return answer == example.output
    return normalised(answer) == normalised(example.output)


def normalised(text: str) -> str:
    """Lower case, white space folded, no full stop at the end."""
    return " ".join(text.lower().split()).removesuffix(".")


def metrics_of(test_items: Sequence[Answer], written: Sequence[Written] = ()) -> Metrics:
    """Macro averages over tasks. Raises ValueError when there is nothing to average."""
    accuracies = _accuracy_by_task(test_items)
    texts = by_task(written)
    unseen = [item for item in test_items if item.unseen]
    counts = {task: sum(item.task == task for item in test_items) for task in accuracies}
    return Metrics(
        accuracy=statistics.fmean(accuracies.values()),
        accuracy_by_task=accuracies,
        worst_task=min(accuracies, key=accuracies.__getitem__),
        spread_over_tasks=statistics.pstdev(accuracies.values()),
        accuracy_unseen=statistics.fmean(_accuracy_by_task(unseen).values()) if unseen else None,
        response_perplexity=math.exp(min(statistics.fmean(item.loss for item in test_items), 700.0)),
        n=len(test_items),
        n_unseen=None if test_items[0].unseen is None else len(unseen),
        n_by_task=counts,
        bleu=statistics.fmean(score for score, _ in texts.values()) if texts else None,
        bleu_by_task={task: score for task, (score, _) in texts.items()},
        rouge_l=statistics.fmean(score for _, score in texts.values()) if texts else None,
        rouge_l_by_task={task: score for task, (_, score) in texts.items()},
    )


def _accuracy_by_task(test_items: Sequence[Answer]) -> dict[str, float]:
    correct: dict[str, list[bool]] = defaultdict(list)
    for item in test_items:
        correct[item.task].append(item.correct)
    return {task: statistics.fmean(correct[task]) for task in sorted(correct)}


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

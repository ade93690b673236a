"""How the embedded backbones were made: Llamas of a million parameters and less, pretrained on public records.

Tokenizer and weights come from the public split of the embedded support desk alone, not from the `dev` or `private`
organisation. What is used is shipped (`models/embedded.py`), because another CPU gives other weights; `make backbones`
makes them again and says how far they are from the shipped ones.
"""

from __future__ import annotations

import argparse
import hashlib
import importlib.metadata
import json
import shutil
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Protocol

import torch
from safetensors.torch import load_file
from tokenizers import Tokenizer, decoders, pre_tokenizers
from tokenizers.models import BPE
from tokenizers.trainers import BpeTrainer
from torch import Tensor
from torch.nn import functional as F
from torch.nn.utils.rnn import pad_sequence
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from dptune import evaluation
from dptune.config.schema import CHECKSUMS, SHIPPED, EvaluationConfig, ModelConfig
from dptune.data import supportdesk, templates
from dptune.data.batches import Ladder
from dptune.data.encoding import Encoded, encode_examples
from dptune.data.schema import Example
from dptune.models import backbones


@dataclass(frozen=True, slots=True)
class Recipe:
    """Everything that decides the weights, besides the public data and the versions of the libraries."""

    name: str = "tiny"
    """What the backbone is called."""
    vocabulary: int = 2048
    """Size of the byte-level BPE vocabulary, special tokens included."""
    layers: int = 3
    """Number of decoder layers."""
    width: int = 128
    """Size of the hidden states."""
    feed_forward: int = 384
    """Size of the feed-forward layers."""
    heads: int = 4
    """Number of attention heads."""
    records: int = 32_000
    """Number of public records."""
    steps: int = 2_200
    """Number of optimizer steps."""
    batch_size: int = 32
    """Records in a step."""
    learning_rate: float = 3e-3
    """Peak learning rate of AdamW, reached after `warmup` steps and followed by linear decay to zero."""
    warmup: int = 100
    """Number of warm-up steps."""
    weight_decay: float = 0.01
    """Weight decay of AdamW."""
    prompt_weight: float = 0.2
    """Weight of the loss on prompt tokens; without it, what the words mean is learned much later."""
    initializer_range: float = 0.08
    """Standard deviation of the initial weights; with the usual 0.02, copying is learned much later."""
    seed: int = 0
    """Seed of data, initial weights and batches."""
    threads: int = 1
    """Threads to train with: fixed, because the order of floating-point sums depends on it."""


RECIPES = {
    "tiny": Recipe(),
    "nano": Recipe(name="nano", layers=2, width=64, feed_forward=192, learning_rate=6e-3),
}
"""The embedded backbones by name: `tiny` has 881,280 parameters, `nano` 227,520."""


def pretrain(recipe: Recipe, folder: Path, *, progress: Callable[[str], None] | None = None) -> None:
    """Make a backbone by its recipe, as a folder in Hugging Face format with a model card and checksums.

    The weights are rounded once, to 16 bits; they are read into 32.

    Args:
        recipe: how to make it.
        folder: where to; made when missing.
        progress: called with a line about step, loss and time left now and then.
    """
    records = supportdesk.public(recipe.seed, recipe.records)
    tokenizer = train_tokenizer(records, recipe.vocabulary)
    model = _trained(records, tokenizer, recipe, progress or (lambda line: None)).half()
    tokenizer.save_pretrained(folder)
    model.save_pretrained(folder)
    hashes = {name: hashlib.sha256((folder / name).read_bytes()).hexdigest() for name in DECISIVE}
    (folder / CHECKSUMS).write_text("".join(f"{digest}  {name}\n" for name, digest in hashes.items()))
    (folder / "README.md").write_text(model_card(recipe, model.num_parameters(), hashes["model.safetensors"]))


DECISIVE = ("config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json")
"""Files that decide numbers; the card does not."""


def model_card(recipe: Recipe, parameters: int, digest: str) -> str:
    """What a stranger must know of a backbone."""
    versions = {name: importlib.metadata.version(name) for name in ("torch", "transformers", "tokenizers")}
    return f"""---
license: apache-2.0
library_name: transformers
pipeline_tag: text-generation
---
# dptune/{recipe.name}

A Llama of {recipe.layers} layers and width {recipe.width} ({parameters:,} parameters), small enough to tune privately
in seconds. It is the public starting point of dptune's embedded benchmark, and of no use elsewhere.

- **Data**: {recipe.records:,} made-up records of a customer-support desk, from the organisations
  {", ".join(supportdesk.PUBLIC_ORGANISATIONS)} (`dptune.data.supportdesk.public({recipe.seed}, {recipe.records})`).
  They are public. It has seen no record of the organisations `dev` and `private`.
- **Recipe**: `dptune.runs.pretraining.RECIPES["{recipe.name}"]`:
  `{json.dumps(asdict(recipe))}`
- **Made with**: {", ".join(f"{name} {version}" for name, version in versions.items())}, one thread. Weights are
  rounded once to float16. Another CPU makes other weights: `make backbones` says how far off.
- **SHA-256 of `model.safetensors`**: `{digest}`
- **Licence**: Apache-2.0, as dptune.
"""


def train_tokenizer(records: list[Example], vocabulary: int) -> PreTrainedTokenizerFast:
    """Byte-level BPE with single digits, and with padding, end and unknown tokens."""
    tokenizer = Tokenizer(BPE(unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = BpeTrainer(
        vocab_size=vocabulary,
        special_tokens=["<pad>", "<eos>", "<unk>"],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(("".join(_text(record)) for record in records), trainer)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<pad>", eos_token="<eos>", unk_token="<unk>")


def _text(record: Example) -> tuple[str, str]:
    """Prompt and response, in the template that fine-tuning uses."""
    return templates.plain(record.instruction, record.input), templates.response_of(record.output, "plain")


def _trained(
    records: list[Example],
    tokenizer: PreTrainedTokenizerFast,
    recipe: Recipe,
    progress: Callable[[str], None],
) -> LlamaForCausalLM:
    """Train a new model on the public records."""
    with _deterministic(recipe):
        model = _new_model(tokenizer, recipe).train()
        optimizer = torch.optim.AdamW(model.parameters(), lr=recipe.learning_rate, weight_decay=recipe.weight_decay)
        schedule = torch.optim.lr_scheduler.LambdaLR(
            optimizer,
            lambda step: min((step + 1) / recipe.warmup, (recipe.steps - step) / (recipe.steps - recipe.warmup + 1)),
        )
        start, recent = time.monotonic(), 0.0
        rows = encode_examples(records, tokenizer, model.config.max_position_embeddings)
        for step, batch in enumerate(batches(rows, recipe), start=1):
            loss = _loss(model, batch, recipe.prompt_weight)
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            schedule.step()
            recent = loss.item() if step == 1 else 0.95 * recent + 0.05 * loss.item()
            if step % 50 == 0 or step == recipe.steps:
                left = (time.monotonic() - start) * (recipe.steps / step - 1)
                progress(f"pretraining {recipe.name}: step {step}/{recipe.steps}, loss {recent:.3f}, {left:.0f} s left")
    return model.eval()


def _new_model(tokenizer: PreTrainedTokenizerFast, recipe: Recipe) -> LlamaForCausalLM:
    """A Llama with random weights."""
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=len(tokenizer),
            hidden_size=recipe.width,
            intermediate_size=recipe.feed_forward,
            num_hidden_layers=recipe.layers,
            num_attention_heads=recipe.heads,
            num_key_value_heads=recipe.heads,
            max_position_embeddings=512,
            initializer_range=recipe.initializer_range,
            tie_word_embeddings=True,
            bos_token_id=None,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
        )
    )


@contextmanager
def _deterministic(recipe: Recipe) -> Iterator[None]:
    """Seed torch and fix its thread count inside the block; leave both as they were after it."""
    threads = torch.get_num_threads()
    torch.set_num_threads(recipe.threads)
    try:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(recipe.seed)
            yield
    finally:
        torch.set_num_threads(threads)


class Batching(Protocol):
    """What decides which rows are in which batch."""

    @property
    def seed(self) -> int:
        """Of the order."""
        ...

    @property
    def batch_size(self) -> int:
        """Rows in a batch."""
        ...

    @property
    def steps(self) -> int:
        """Number of batches."""
        ...


def batches(rows: Sequence[Encoded], recipe: Batching) -> Iterator[list[Encoded]]:
    """One batch a step: epochs in random order, where each block of 16 batches is cut by length."""
    generator = torch.Generator().manual_seed(recipe.seed)
    size = recipe.batch_size
    queue: list[list[int]] = []
    for _ in range(recipe.steps):
        if not queue:
            order = torch.randperm(len(rows), generator=generator).tolist()
            for start in range(0, len(order), 16 * size):
                block = sorted(order[start : start + 16 * size], key=lambda index: len(rows[index].tokens))
                cuts = [block[i : i + size] for i in range(0, len(block), size)]
                queue += [cuts[i] for i in torch.randperm(len(cuts), generator=generator).tolist()]
        yield [rows[index] for index in queue.pop()]


def _loss(model: LlamaForCausalLM, rows: Sequence[Encoded], prompt_weight: float) -> Tensor:
    """Mean over rows of the mean loss on response tokens and, times `prompt_weight`, on prompt tokens."""
    tokens = pad_sequence([torch.tensor(row.tokens) for row in rows], batch_first=True)
    # Padding is on the right, where causal attention never looks: no mask is needed.
    hidden = model.model(input_ids=tokens).last_hidden_state
    responses = torch.tensor([row.response for row in rows])[:, None]
    prompts = torch.tensor([len(row.tokens) for row in rows])[:, None] - responses
    positions = torch.arange(tokens.shape[1])
    weights = torch.where(positions < prompts, prompt_weight / prompts, 1 / responses)
    scored = (positions > 0) & (positions < prompts + responses)
    losses = F.cross_entropy(model.lm_head(hidden[scored.roll(-1, 1)]), tokens[scored], reduction="none")
    return (losses * weights[scored]).sum() / len(rows)


@dataclass(frozen=True)
class Distance:
    """How far a backbone is from the shipped one of its name."""

    zero_shot: tuple[float, float]
    """Accuracy on the test records of the private organisation: shipped, made again."""
    public: tuple[float, float]
    """Accuracy on public records that neither has seen."""
    largest_difference: float
    """Largest difference of two weights, as a share of the largest weight; infinite when the shapes differ."""


def distance(shipped: Path, made: Path) -> Distance:
    """Compare two backbones of one recipe."""
    sets = (supportdesk.generate(train=0, validation=0)["test"], supportdesk.public(seed=1, size=800))
    zero_shot, public = ((_accuracy(shipped, examples), _accuracy(made, examples)) for examples in sets)
    first, second = (load_file(folder / "model.safetensors") for folder in (shipped, made))
    if {name: value.shape for name, value in first.items()} != {name: value.shape for name, value in second.items()}:
        return Distance(zero_shot, public, float("inf"))
    largest = max(value.abs().max().item() for value in first.values())
    apart = max((first[name].float() - second[name].float()).abs().max().item() for name in first)
    return Distance(zero_shot, public, apart / largest)


def _accuracy(folder: Path, examples: Sequence[Example]) -> float:
    """Share of examples that a backbone answers rightly before any tuning."""
    rules = EvaluationConfig()
    loaded = backbones.load_backbone(
        ModelConfig("local", str(folder)), precision="float32", device="cpu", cache_dir=folder
    )
    judge = evaluation.Evaluator(loaded.tokenizer, Ladder(96, 64, loaded.layout), rules.max_new_tokens)
    answers, written = judge(loaded.model, evaluation.evaluated_examples(examples, rules.prompts), None)
    return evaluation.metrics_of(answers, written).accuracy


def main(arguments: Sequence[str] | None = None) -> None:
    """`make backbones`: pretrain the embedded backbones again and compare them with the shipped ones."""
    parser = argparse.ArgumentParser(prog="make backbones", description=main.__doc__)
    parser.add_argument("names", nargs="*", choices=[*RECIPES, []], metavar="NAME", help=", ".join(RECIPES))
    parser.add_argument("--to", type=Path, default=Path(".cache/backbones"), help="folder for the new ones")
    parser.add_argument("--ship", action="store_true", help="put them in the place of the shipped ones")
    asked = parser.parse_args(arguments)
    for name in asked.names or RECIPES:
        made = asked.to / name
        shutil.rmtree(made, ignore_errors=True)
        pretrain(RECIPES[name], made, progress=lambda line: print(line, file=sys.stderr, flush=True))
        if (SHIPPED / name).is_dir():
            found = distance(SHIPPED / name, made)
            print(
                f"{name}, shipped and made again: zero-shot {found.zero_shot[0]:.3f} and {found.zero_shot[1]:.3f}, "
                f"public {found.public[0]:.3f} and {found.public[1]:.3f}, largest weight difference "
                f"{found.largest_difference:.1%} of the largest weight; it is in {made}",
                flush=True,
            )
        if asked.ship:
            shutil.rmtree(SHIPPED / name, ignore_errors=True)
            shutil.copytree(made, SHIPPED / name)


if __name__ == "__main__":
    main()

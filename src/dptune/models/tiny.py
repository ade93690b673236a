"""The embedded backbones: Llamas of a million parameters and less, pretrained on public data at first use.

They need no network. Tokenizer and weights come from the public split of the embedded support desk alone, not
from the `dev` or `private` organisation, so that using them costs no privacy budget.
"""

import hashlib
import importlib.metadata
import json
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, pre_tokenizers
from tokenizers.models import BPE
from tokenizers.trainers import BpeTrainer
from torch import Tensor
from torch.nn import functional as F
from torch.nn.utils.rnn import pad_sequence
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from dptune.data import encoding, supportdesk, templates
from dptune.data.encoding import Encoded, encode_examples
from dptune.data.schema import Example
from dptune.models.cache import made_once


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
"""The embedded backbones by name: of a million and of a quarter of a million parameters."""


def load_tiny(cache_dir: Path, recipe: Recipe, *, progress: Callable[[str], None] | None = None) -> Path:
    """Folder of an embedded backbone in Hugging Face format; pretrains it when the cache does not hold it.

    Args:
        cache_dir: Folder of the cache; made when missing.
        recipe: How to make it.
        progress: Called with a line about step, loss and time left now and then.

    Returns:
        A folder for `AutoModelForCausalLM.from_pretrained` and `AutoTokenizer.from_pretrained`.
    """

    def make(folder: Path) -> None:
        records = supportdesk.public(recipe.seed, recipe.records)
        tokenizer = train_tokenizer(records, recipe.vocabulary)
        model = _pretrain(records, tokenizer, recipe, progress or (lambda line: None))
        tokenizer.save_pretrained(folder)
        model.save_pretrained(folder)

    return made_once(cache_dir, f"{recipe.name}-{content_hash(recipe)}", make)


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


def content_hash(recipe: Recipe) -> str:
    """Short hash of the recipe, of the code that makes text, tokens and weights, and of the libraries' versions."""
    versions = {name: importlib.metadata.version(name) for name in ("torch", "transformers", "tokenizers", "faker")}
    digest = hashlib.sha256(json.dumps([asdict(recipe), versions]).encode())
    for module in (__file__, supportdesk.__file__, encoding.__file__, templates.__file__):
        digest.update(Path(module).read_bytes())
    return digest.hexdigest()[:16]


def _pretrain(
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
        for step, batch in enumerate(_batches(rows, recipe), start=1):
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


def _batches(rows: Sequence[Encoded], recipe: Recipe) -> Iterator[list[Encoded]]:
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

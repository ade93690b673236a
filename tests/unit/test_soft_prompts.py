"""Prompt tuning and p-tuning: PEFT's forward pass breaks per-example gradients, ours does not."""

import pytest
import torch
from backbones_for_tests import tiny_llama
from numerics import assert_close_to_largest
from peft import PeftModel, PromptEncoderConfig, PromptTuningConfig, get_peft_model

from dptune.data.batches import InputFormat, collate, example_losses, token_log_probabilities
from dptune.data.encoding import encode
from dptune.data.templates import plain as prompt
from dptune.models.adapters import set_modes
from dptune.models.soft_prompts import attach_soft_prompt
from dptune.privacy.engines import ENGINES, checked_engine
from dptune.privacy.gradients import EngineError, trainable_parameters
from dptune.runs.engine import made_up_rows

pytestmark = pytest.mark.numerical

LAYOUT = InputFormat(pad=0)
PAIRS = [(prompt("which team ?", "reset my code"), "support"), ("x", "no"), (prompt("is it late ?", "kim 12"), "yes")]
CONFIGS = {
    "prompt": lambda: PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=4),
    "p_tuning": lambda: PromptEncoderConfig(task_type="CAUSAL_LM", num_virtual_tokens=4, encoder_hidden_size=8),
}


def attached(kind: str, attach=attach_soft_prompt) -> torch.nn.Module:
    torch.manual_seed(3)
    model = attach(tiny_llama().requires_grad_(False), CONFIGS[kind]())
    set_modes(model)
    return model


def forgetful(model: torch.nn.Module, batch: dict[str, torch.Tensor]) -> torch.Tensor:
    """The loss as PEFT's forward pass allows it: without positions, which it drops with a warning."""
    return example_losses(model, {name: value for name, value in batch.items() if name != "position_ids"})


def alone(model: torch.nn.Module, pair: tuple[str, str], tokenizer) -> dict[str, torch.Tensor]:
    """Gradient of one record from PEFT's own forward pass, unpadded, over all logits: an independent oracle."""
    row = encode([pair], tokenizer, 64)[0]
    logits = model(input_ids=torch.tensor([row.tokens]), attention_mask=torch.ones(1, len(row.tokens))).logits
    loss = torch.nn.functional.cross_entropy(
        logits[0, -row.response - 1 : -1], torch.tensor(row.tokens[-row.response :])
    )
    values = trainable_parameters(model)
    return dict(zip(values, torch.autograd.grad(loss, list(values.values())), strict=True))


@pytest.mark.parametrize("kind", list(CONFIGS))
@pytest.mark.parametrize("engine", list(ENGINES))
def test_every_engine_gives_each_record_its_own_gradient(kind: str, engine: str, tokenizer) -> None:
    oracle = attached(kind, get_peft_model)
    expected = [alone(oracle, pair, tokenizer) for pair in PAIRS]
    made = ENGINES[engine](attached(kind), example_losses)
    _, found = made(collate(encode(PAIRS, tokenizer, 64), LAYOUT))
    assert_close_to_largest(found, {name: torch.stack([right[name] for right in expected]) for name in expected[0]})


@pytest.mark.filterwarnings("ignore:Full backward hook is firing")
def test_opacus_on_pefts_own_forward_pass_has_one_row_for_all_records(tokenizer) -> None:
    """What a user of both gets: no error, a grad_sample of one row, and a clipped sum that is not one of clipped rows.

    The one row is the sum over all records, so that one record moves it by more than any clip allows."""
    from opacus import GradSampleModule

    model = attached("prompt", get_peft_model)
    wrapped = GradSampleModule(model, batch_first=True, loss_reduction="sum", strict=False)
    forgetful(wrapped, collate(encode(PAIRS, tokenizer, 64), LAYOUT)).sum().backward()
    (parameter,) = trainable_parameters(model).values()
    assert parameter.grad_sample.shape[0] == 1 != len(PAIRS)
    assert_close_to_largest(parameter.grad_sample[0], parameter.grad)
    with pytest.raises(EngineError, match=r"shape \(1, 4, 16\)"):
        ENGINES["opacus"](attached("prompt", get_peft_model), forgetful)(collate(encode(PAIRS, tokenizer, 64), LAYOUT))


@pytest.mark.parametrize("kind", list(CONFIGS))
def test_pefts_own_forward_pass_is_refused_because_all_rows_share_one_prompt(kind: str, tokenizer) -> None:
    """Of a prompt that is made once for all rows, the hooks see one row."""
    rows = made_up_rows(len(tokenizer), (7, 9, 5))
    changed = [*rows[:-1], made_up_rows(len(tokenizer), (7, 9, 5), shift=101)[-1]]
    batches = collate(rows, LAYOUT), collate(changed, LAYOUT)
    with pytest.raises(EngineError, match="is not used once for each row"):
        checked_engine("hooks", attached(kind, get_peft_model), forgetful, *batches)
    checked_engine("hooks", attached(kind), example_losses, *batches)


@pytest.mark.parametrize("kind", list(CONFIGS))
def test_peft_alone_opens_what_was_saved(kind: str, tokenizer, tmp_path) -> None:
    model = attached(kind).eval()
    model.save_pretrained(tmp_path)
    opened = PeftModel.from_pretrained(tiny_llama(), tmp_path).eval()
    together = token_log_probabilities(model, collate(encode(PAIRS, tokenizer, 64), LAYOUT)).sum(dim=1)
    for row, expected in zip(encode(PAIRS, tokenizer, 64), together, strict=True):
        tokens = torch.tensor([row.tokens])
        logits = opened(input_ids=tokens, attention_mask=torch.ones_like(tokens)).logits[0].log_softmax(dim=-1)
        found = sum(logits[at - 1, row.tokens[at]] for at in range(-row.response, 0))
        assert_close_to_largest(found, expected)


def test_generation_does_not_depend_on_padding(tokenizer) -> None:
    model = attached("prompt").eval()
    rows = [row.tokens for row in encode(PAIRS, tokenizer, 64)]
    width = max(map(len, rows))
    tokens = torch.tensor([(0,) * (width - len(row)) + row for row in rows])
    mask = torch.tensor([[0] * (width - len(row)) + [1] * len(row) for row in rows])
    settings = {"max_new_tokens": 5, "do_sample": False, "pad_token_id": 0, "eos_token_id": None}
    together = model.generate(input_ids=tokens, attention_mask=mask, **settings)[:, width:]
    for row, written in zip(rows, together, strict=True):
        single = model.generate(
            input_ids=torch.tensor([row]), attention_mask=torch.ones(1, len(row)).long(), **settings
        )
        assert single[0, len(row) :].tolist() == written.tolist()


def test_generation_has_its_padding_before_the_prompt(tokenizer) -> None:
    """A window that slides would otherwise have lost the prompt before a short text begins."""
    from transformers import MistralConfig, MistralForCausalLM

    torch.manual_seed(0)
    settings = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    backbone = MistralForCausalLM(
        MistralConfig(vocab_size=300, num_key_value_heads=2, sliding_window=6, pad_token_id=0, **settings)
    )
    model = attach_soft_prompt(backbone.requires_grad_(False).eval(), CONFIGS["prompt"]()).eval()
    row = [20, 21, 22]
    greedy = {"max_new_tokens": 4, "do_sample": False, "pad_token_id": 0, "eos_token_id": None}
    alone = model.generate(input_ids=torch.tensor([row]), attention_mask=torch.ones(1, 3).long(), **greedy)[0, 3:]
    padded = torch.tensor([[0] * 20 + row, list(range(30, 53))])
    mask = torch.tensor([[0] * 20 + [1] * 3, [1] * 23])
    assert model.generate(input_ids=padded, attention_mask=mask, **greedy)[0, 23:].tolist() == alone.tolist()

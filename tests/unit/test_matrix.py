"""Every adapter on every architecture by every engine, against gradients that are written here from the formulas.

A cell is right, or it says why it cannot be; no cell is silently wrong. Adapters and engines are taken from their
tables, so that a new one is tested as soon as it is in them.
"""

import pytest
import torch
from backbones_for_tests import BACKBONES
from numerics import assert_close_to_largest

from dptune.config.adapters import ADAPTERS
from dptune.config.schema import AdapterConfig, ConfigError
from dptune.data.batches import collate, example_losses
from dptune.data.encoding import Encoded
from dptune.models import adapters
from dptune.models.backbones import architecture_of, input_format_of
from dptune.models.layers import model_type_of
from dptune.privacy.engines import ENGINES
from dptune.privacy.gradients import EngineError

pytestmark = pytest.mark.numerical

ROWS = [
    Encoded((40, 51, 62, 73, 84, 95, 26, 1), 3),
    Encoded((141, 52, 163, 1), 2),
    Encoded((242, 53, 64, 75, 286, 97, 108, 119, 1), 4),
]
CLS, MASK, END = 3, 4, 1


class Tokenizer:
    """What is asked of a tokenizer that puts nothing before a text."""

    pad_token_id, cls_token_id, mask_token_id, eos_token_id = 0, CLS, MASK, END

    def __call__(self, text: str, add_special_tokens: bool) -> dict[str, list[int]]:
        return {"input_ids": [5]}


def loss_alone(model: torch.nn.Module, architecture: str, row: Encoded) -> torch.Tensor:
    """Mean over the response of one record, unpadded, over all logits."""
    prompt, response = list(row.tokens[: -row.response]), list(row.tokens[-row.response :])
    if architecture == "decoder":
        tokens = torch.tensor([prompt + response])
        logits = model(input_ids=tokens, attention_mask=torch.ones_like(tokens)).logits[0, -len(response) - 1 : -1]
    elif architecture == "encoder":
        # The end token is shown; the rest of the response is masked and predicted in place.
        tokens = torch.tensor([[CLS, *prompt, *[MASK] * (len(response) - 1), END]])
        logits = model(input_ids=tokens, attention_mask=torch.ones_like(tokens)).logits[0, -len(response) : -1]
        response = response[:-1]
    else:
        tokens = torch.tensor([[*prompt, END]])
        logits = model(
            input_ids=tokens,
            attention_mask=torch.ones_like(tokens),
            decoder_input_ids=torch.tensor([[model_start(model), *response[:-1]]]),
        ).logits[0]
    return torch.nn.functional.cross_entropy(logits, torch.tensor(response))


def model_start(model: torch.nn.Module) -> int:
    return next(module.config.decoder_start_token_id for module in model.modules() if hasattr(module, "config"))


@pytest.mark.parametrize("backbone", list(BACKBONES))
@pytest.mark.parametrize("kind", list(ADAPTERS))
def test_a_cell_is_right_or_says_why_not(kind: str, backbone: str) -> None:
    model = BACKBONES[backbone]()
    model.config.architectures = [type(model).__name__]  # as in a saved one
    architecture = architecture_of(model.config)
    reading = input_format_of(model, Tokenizer())
    try:
        chosen = adapters.engine_of(kind, model_type_of(model))
        model = adapters.attach(model, AdapterConfig(name=kind, virtual_tokens=3), rank=2, steps=10, seed=0)
    except ConfigError as error:
        assert "; choose" in str(error) and "\n" not in str(error)
        return
    trained = adapters.trainable_parameters(model)
    with torch.no_grad():
        for number, value in enumerate(trained.values()):
            # Zeros would hide the partner of a product.
            value += 0.1 * (torch.arange(value.numel()) + number).sin().reshape(value.shape)
    alone = [loss_alone(model, architecture, row) for row in ROWS]
    rows = [torch.autograd.grad(loss, list(trained.values())) for loss in alone]
    expected = {name: torch.stack(values) for name, values in zip(trained, zip(*rows, strict=True), strict=True)}
    works = set()
    for engine, make in ENGINES.items():
        model.zero_grad(set_to_none=True)
        try:
            made = make(model, example_losses)
        except EngineError as error:
            assert "set environment.engine=" in str(error)
            continue
        try:
            losses, found = made(collate(ROWS, reading))
        except EngineError as error:
            assert "set environment.engine=" in str(error)
            continue
        finally:
            made.close()
        assert_close_to_largest(losses, torch.stack(alone), what=engine)
        if engine not in SILENTLY_WRONG:
            assert_close_to_largest(found, expected, what=engine)
        works.add(engine)
    assert {chosen, "loop"} <= works


SILENTLY_WRONG = {"opacus"}
"""Not ours to repair: the check before training refuses it where it is."""

import pytest
import torch
from backbones_for_tests import tiny_llama
from numerics import assert_close_to_largest, differs

from dptune.config.schema import AdapterConfig
from dptune.data.batches import InputFormat, collate, example_losses
from dptune.data.encoding import encode
from dptune.data.templates import plain as prompt
from dptune.models import adapters
from dptune.privacy.engines import ENGINES, HookEngine, OpacusEngine, checked_engine
from dptune.privacy.gradients import EngineError, LoopEngine

pytestmark = pytest.mark.numerical

LAYOUT = InputFormat(pad=0)

PAIRS = [
    (prompt("which team ?", "reset my code"), "support"),
    (prompt("is it urgent ?", "the order is late and kim waits"), "no"),
    ("billing", "yes"),
    ("order 12", "billing support"),
    ("code", "no"),
]


def adapted(name: str = "lora") -> torch.nn.Module:
    model = adapters.attach(tiny_llama().requires_grad_(False), AdapterConfig(name=name), rank=2, steps=10, seed=0)
    with torch.no_grad():
        for parameter in adapters.trainable_parameters(model).values():
            # B is zero at first, and A would then have no gradient.
            parameter.copy_(torch.linspace(-0.3, 0.3, parameter.numel()).reshape(parameter.shape))
    return model


def batch(tokenizer, count: int = len(PAIRS)):
    return collate(encode(PAIRS[:count], tokenizer, 64), LAYOUT)


@pytest.mark.parametrize("adapter", ["lora", "ffa_lora"])
@pytest.mark.parametrize("engine", list(ENGINES))
def test_engines_equal_plain_backward_passes(engine: str, adapter: str, tokenizer) -> None:
    """Each example alone, unpadded, with loss over all logits: the independent oracle. Batch size is not the length."""
    model = adapted(adapter)
    expected = []
    for row in encode(PAIRS, tokenizer, 64):
        logits = model(input_ids=torch.tensor([row.tokens])).logits[0, -row.response - 1 : -1]
        loss = torch.nn.functional.cross_entropy(logits, torch.tensor(row.tokens[-row.response :]))
        model.zero_grad()
        loss.backward()
        expected.append({name: value.grad.clone() for name, value in adapters.trainable_parameters(model).items()})
        model.zero_grad(set_to_none=True)
    made = ENGINES[engine](model, example_losses)
    _, gradients = made(batch(tokenizer))
    made.close()
    assert_close_to_largest(gradients, {name: torch.stack([row[name] for row in expected]) for name in expected[0]})
    assert gradients.keys() == adapters.trainable_parameters(model).keys()


@pytest.mark.parametrize("engine", [OpacusEngine, HookEngine])
def test_changing_one_record_changes_only_its_row(engine, tokenizer) -> None:
    model = adapted()
    engine = engine(model, example_losses)
    rows = encode(PAIRS, tokenizer, 64)
    _, before = engine(collate(rows, LAYOUT))
    rows[1] = encode([("something else", "kim")], tokenizer, 64)[0]
    _, after = engine(collate(rows, LAYOUT))
    others = [0, 2, 3, 4]
    assert_close_to_largest(*({name: value[others] for name, value in of.items()} for of in (after, before)))
    assert all(differs(before[name][1], after[name][1]) for name in before)


@pytest.mark.parametrize("engine", [OpacusEngine, HookEngine])
def test_the_engine_leaves_nothing_behind(engine, tokenizer) -> None:
    model = adapted()
    engine = engine(model, example_losses)
    engine(batch(tokenizer))
    engine.close()
    for parameter in model.parameters():
        assert parameter.grad is None
        assert getattr(parameter, "grad_sample", None) is None
    example_losses(model, batch(tokenizer)).sum().backward()
    assert all(getattr(value, "grad_sample", None) is None for value in model.parameters())


def test_what_opacus_cannot_do_is_an_error_not_a_wrong_gradient() -> None:
    """A ParameterDict has no forward, so that no hook sees its parameters; IA3 and VeRA are built like that."""

    class Shifted(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear = torch.nn.Linear(3, 1)
            self.shift = torch.nn.ParameterDict({"a": torch.nn.Parameter(torch.zeros(1))})

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.linear(x) + self.shift["a"]

    def loss(model: torch.nn.Module, rows: dict[str, torch.Tensor]) -> torch.Tensor:
        return model(rows["x"]).squeeze(1) ** 2

    rows = {"x": torch.ones(4, 3, requires_grad=True)}
    for engine in (OpacusEngine, HookEngine):
        with pytest.raises(EngineError, match="shift"):
            engine(Shifted(), loss)(rows)
    _, gradients = LoopEngine(Shifted(), loss)(rows)
    assert gradients["shift.a"].shape == (4, 1)


def test_no_dropout_and_no_frozen_gradient(tokenizer) -> None:
    model = adapted("ffa_lora")
    names = adapters.trainable_parameters(model)
    assert names and all(".lora_B." in name for name in names)
    training = [name for name, module in model.named_modules() if module.training]
    assert training and all(".lora_B" in name for name in training)
    count = adapters.count(model)
    assert count.trainable == sum(value.numel() for value in names.values())
    assert count.total == sum(value.numel() for value in model.parameters())


def test_an_adapter_that_matches_nothing_is_refused() -> None:
    from dptune.config.schema import ConfigError

    with pytest.raises(ConfigError, match=r"adapter.target_modules=\['nowhere'\] matches no layer"):
        adapters.attach(tiny_llama(), AdapterConfig(target_modules=["nowhere"]), rank=2, steps=10, seed=0)


def test_the_same_seed_gives_the_same_adapter_and_leaves_the_global_stream_alone() -> None:
    torch.manual_seed(5)
    before = torch.random.get_rng_state()
    one, two, other = (
        adapters.trainable_parameters(adapters.attach(tiny_llama(), AdapterConfig(), rank=2, steps=10, seed=seed))
        for seed in (1, 1, 2)
    )
    assert torch.equal(before, torch.random.get_rng_state())
    assert all(torch.equal(one[name], two[name]) for name in one)
    assert any(not torch.equal(one[name], other[name]) for name in one)


@pytest.mark.parametrize("reentrant", [True, False])
def test_hooks_are_exact_under_gradient_checkpointing(reentrant: bool, tokenizer) -> None:
    expected = LoopEngine(adapted(), example_losses)(batch(tokenizer))[1]
    model = adapted()
    model.get_base_model().train()
    model.get_base_model().activation_checkpointing_enable({"use_reentrant": reentrant})
    model.enable_input_require_grads()
    found = HookEngine(model, example_losses)(batch(tokenizer))[1]
    assert_close_to_largest(found, expected)


def test_hooks_are_exact_for_a_shared_layer_and_for_biases() -> None:
    class Twice(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear = torch.nn.Linear(3, 3)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.linear(torch.tanh(self.linear(x)))

    def loss(model: torch.nn.Module, rows: dict[str, torch.Tensor]) -> torch.Tensor:
        return model(rows["x"]).square().sum(dim=(1, 2))

    torch.manual_seed(0)
    model, rows = Twice(), {"x": torch.randn(5, 4, 3)}
    expected = LoopEngine(model, loss)(rows)[1]
    found = HookEngine(model, loss)(rows)[1]
    assert_close_to_largest(found, expected)


def test_hooks_refuse_a_layer_that_does_not_see_every_row() -> None:
    class Halved(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear = torch.nn.Linear(3, 1)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.linear(x[: len(x) // 2]).repeat(2, 1)

    rows = {"x": torch.ones(4, 3)}
    with pytest.raises(EngineError, match="linear"):
        HookEngine(Halved(), lambda model, batch: model(batch["x"]).squeeze(1))(rows)


def probes(tokenizer):
    from dptune.runs.engine import made_up_rows

    rows = made_up_rows(len(tokenizer), (7, 9, 5))
    changed = [*rows[:-1], made_up_rows(len(tokenizer), (7, 9, 5), shift=101)[-1]]
    return collate(rows, LAYOUT), collate(changed, LAYOUT)


@pytest.mark.parametrize("engine", list(ENGINES))
@pytest.mark.parametrize("adapter", ["lora", "ffa_lora"])
def test_the_self_check_passes_what_is_right_and_leaves_the_weights(engine: str, adapter: str, tokenizer) -> None:
    model = adapters.attach(tiny_llama().requires_grad_(False), AdapterConfig(name=adapter), rank=2, steps=10, seed=0)
    before = {name: value.clone() for name, value in model.named_parameters()}
    checked_engine(engine, model, example_losses, *probes(tokenizer)).close()
    assert all(torch.equal(before[name], value) for name, value in model.named_parameters())


class Wrong(HookEngine):
    """An engine with one thing wrong with it."""

    def __init__(self, model, loss, fault: str) -> None:
        super().__init__(model, loss)
        self.fault = fault
        self.first: dict[str, torch.Tensor] = {}

    def __call__(self, batch):
        losses, gradients = super().__call__(batch)
        name = next(name for name in gradients if ".v_proj." in name)
        if self.fault == "one row for all":
            gradients[name] = gradients[name][:1]
        elif self.fault == "left out":
            del gradients[name]
        elif self.fault == "scaled":
            gradients[name] = gradients[name] * 1.01
        elif self.fault == "mixed":
            gradients[name][0] += gradients[name][-1] - self.first.setdefault(name, gradients[name][-1].clone())
        return losses, gradients


@pytest.mark.parametrize(
    ("fault", "message"),
    [
        ("one row for all", "no gradient for each row of .*v_proj"),
        ("left out", "no gradient for each row of .*v_proj"),
        ("scaled", "gradient of .*v_proj.* differs from the loop"),
        ("mixed", "gradient of .*v_proj.* depends on other records"),
    ],
)
def test_the_self_check_refuses_what_is_wrong(fault: str, message: str, tokenizer, monkeypatch) -> None:
    monkeypatch.setitem(ENGINES, "wrong", lambda model, loss: Wrong(model, loss, fault))
    with pytest.raises(EngineError, match=message):
        checked_engine("wrong", adapted(), example_losses, *probes(tokenizer))


def test_the_self_check_refuses_a_batch_norm_by_name(tokenizer) -> None:
    """What a row gets depends on the others: Opacus and hooks would train it without a word."""

    class Normed(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear, self.norm = torch.nn.Linear(3, 3), torch.nn.BatchNorm1d(3, affine=False)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.norm(self.linear(x)).pow(3).sum(dim=1)

    def loss(model: torch.nn.Module, rows: dict[str, torch.Tensor]) -> torch.Tensor:
        return model(rows["x"])

    batch = {"x": torch.arange(12.0).reshape(4, 3).sin()}
    changed = {"x": torch.cat([batch["x"][:-1], torch.full((1, 3), 2.0)])}
    with pytest.raises(EngineError, match="norm is in training mode"):
        checked_engine("hooks", Normed().train(), loss, batch, changed)
    checked_engine("hooks", Normed().train(False).requires_grad_(), loss, batch, changed)

"""The recipe of the embedded backbones on a few steps, and what is shipped of them."""

import hashlib
import json
from dataclasses import asdict, replace
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from transformers import AutoModelForCausalLM, AutoTokenizer

from dptune.config.schema import EMBEDDED, SHIPPED, Config, ConfigError, ModelConfig
from dptune.data import supportdesk
from dptune.data.schema import Example
from dptune.identity import run_id
from dptune.models import backbones, embedded
from dptune.runs import pretraining
from dptune.runs.pretraining import RECIPES, Recipe, pretrain, train_tokenizer

SMALL = Recipe(
    vocabulary=400, layers=1, width=16, feed_forward=32, heads=2, records=200, steps=3, warmup=1, batch_size=8
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    made = tmp_path_factory.mktemp("small")
    pretrain(SMALL, made)
    return made


@pytest.mark.parametrize("name", EMBEDDED)
def test_what_is_shipped_is_what_the_card_and_the_checksums_say(name):
    folder, card = SHIPPED / name, (SHIPPED / name / "README.md").read_text()
    found = {file: hashlib.sha256((folder / file).read_bytes()).hexdigest() for file in pretraining.DECISIVE}
    assert embedded.checksums(folder) == found
    assert f"`{found['model.safetensors']}`" in card
    assert json.dumps(asdict(RECIPES[name])) in card
    assert "license: apache-2.0" in card


@pytest.mark.parametrize(("name", "most"), [("nano", 1e6), ("tiny", 2e6)])
def test_what_is_shipped_is_small_and_has_sixteen_bits(name, most):
    weights = SHIPPED / name / "model.safetensors"
    assert weights.stat().st_size <= most
    with safe_open(weights, "pt") as content:
        assert {content.get_tensor(key).dtype for key in content.keys()} == {torch.float16}  # noqa: SIM118 (no mapping)


@pytest.mark.parametrize("name", EMBEDDED)
def test_what_is_shipped_is_read_into_single_precision_and_named_by_its_content(name, tmp_path):
    loaded = backbones.load_backbone(ModelConfig(name), precision="float32", device="cpu", cache_dir=tmp_path)
    assert {value.dtype for value in loaded.model.parameters()} == {torch.float32}
    assert len(loaded.tokenizer) == loaded.model.config.vocab_size <= RECIPES[name].vocabulary
    assert loaded.model.config.num_hidden_layers == RECIPES[name].layers
    assert not list(tmp_path.iterdir())
    assert loaded.fingerprint == FINGERPRINTS[name]


FINGERPRINTS = {"nano": "ec8bafd64f740596", "tiny": "a6a6631ddf096a06"}
"""Hashes of the weights in single precision: equal on every machine."""


@pytest.mark.parametrize("file", pretraining.DECISIVE)
def test_a_shipped_file_that_was_changed_is_refused(file, tmp_path, monkeypatch):
    copy = tmp_path / "nano"
    copy.mkdir()
    for path in (SHIPPED / "nano").iterdir():
        (copy / path.name).write_bytes(path.read_bytes())
    monkeypatch.setattr(embedded, "SHIPPED", tmp_path)
    embedded.folder_of.cache_clear()
    assert embedded.folder_of("nano") == copy
    content = bytearray((copy / file).read_bytes())
    content[-2] ^= 1
    (copy / file).write_bytes(content)
    embedded.folder_of.cache_clear()
    with pytest.raises(ConfigError, match=rf"model=nano: .*{file} is not as it was shipped"):
        embedded.folder_of("nano")
    embedded.folder_of.cache_clear()


def test_a_run_is_named_by_the_content_of_its_shipped_backbone(tmp_path, monkeypatch):
    before = run_id(Config())
    (tmp_path / "tiny").mkdir()
    (tmp_path / "tiny" / "SHA256SUMS").write_text("0  model.safetensors\n")
    monkeypatch.setattr("dptune.identity.SHIPPED", tmp_path)
    assert run_id(Config()) != before


def test_the_folder_loads_offline_in_hugging_face_format(folder, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    model = AutoModelForCausalLM.from_pretrained(folder)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    assert model.config.vocab_size == len(tokenizer)
    assert (model.config.eos_token_id, model.config.pad_token_id) == (
        tokenizer.eos_token_id,
        tokenizer.pad_token_id,
    )
    prompt = tokenizer("garnet: name the team\nwo ist auftrag 12, anna\n>", return_tensors="pt")
    assert model(**prompt).logits.shape == (1, prompt.input_ids.shape[1], len(tokenizer))


@pytest.mark.parametrize("text", ["a b\n> <ann12@example.org>", "où  est\n", " 28-feb.", "日本 #0042"])
def test_text_survives_the_tokenizer(folder, text):
    tokenizer = AutoTokenizer.from_pretrained(folder)
    ids = tokenizer(text).input_ids
    assert tokenizer.decode(ids) == text
    assert tokenizer.unk_token_id not in ids


def test_digits_are_tokens_of_their_own(folder):
    tokenizer = AutoTokenizer.from_pretrained(folder)
    assert tokenizer.tokenize("4711") == ["4", "7", "1", "1"]


def test_prompt_and_response_can_be_encoded_apart(folder):
    tokenizer = AutoTokenizer.from_pretrained(folder)
    for record in supportdesk.generate(train=100, validation=0, test=0)["train"]:
        prompt, response = pretraining._text(record)
        assert tokenizer(prompt + response).input_ids == tokenizer(prompt).input_ids + tokenizer(response).input_ids


def test_the_default_recipe_has_at_most_three_million_parameters():
    recipe = Recipe(steps=1, records=500)
    tokenizer = train_tokenizer(supportdesk.public(size=500), recipe.vocabulary)
    model = pretraining._new_model(tokenizer, recipe)
    assert 500_000 < model.num_parameters() <= 3_000_000


@pytest.mark.parametrize("prompt_weight", [0.0, 0.3])
def test_the_loss_is_the_mean_of_each_example_by_itself(folder, prompt_weight):
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    rows = pretraining.encode_examples(supportdesk.public(size=7), tokenizer, 512)
    expected = []
    for row in rows:
        logits = model(input_ids=torch.tensor([row.tokens])).logits[0, :-1]
        losses = torch.nn.functional.cross_entropy(logits, torch.tensor(row.tokens[1:]), reduction="none")
        length = len(row.tokens) - row.response
        expected.append(losses[length - 1 :].mean() + prompt_weight * losses[: length - 1].sum() / length)
    torch.testing.assert_close(pretraining._loss(model, rows, prompt_weight), torch.stack(expected).mean())


def test_training_lowers_the_loss_and_reports_it(tmp_path):
    lines: list[str] = []
    pretrain(replace(SMALL, steps=100, learning_rate=1e-2), tmp_path, progress=lines.append)
    losses = [float(line.split("loss ")[1].split(",")[0]) for line in lines]
    assert lines[0].startswith("pretraining tiny: step 50/100, loss ")
    assert lines[0].endswith("s left")
    assert losses[-1] < losses[0]


def test_training_again_gives_the_same_bits(folder, tmp_path):
    torch.manual_seed(123)
    before = torch.get_rng_state()
    pretrain(SMALL, tmp_path)
    for name in pretraining.DECISIVE:
        assert (tmp_path / name).read_bytes() == (folder / name).read_bytes()
    assert torch.equal(torch.get_rng_state(), before)


def test_make_backbones_says_how_far_the_new_one_is_from_the_shipped(folder, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(pretraining, "RECIPES", {"small": SMALL, "other": replace(SMALL, steps=4)})
    monkeypatch.setattr(pretraining, "SHIPPED", tmp_path / "shipped")
    examples = supportdesk.public(seed=1, size=20)
    monkeypatch.setattr(supportdesk, "public", lambda seed=0, size=0: examples * (1 + size // 20))
    monkeypatch.setattr(supportdesk, "generate", lambda **_: {"test": examples})
    made = tmp_path / "made"
    pretraining.main(["--to", str(made), "--ship"])
    assert not capsys.readouterr().out  # Nothing was shipped before.
    assert {path.name for path in (tmp_path / "shipped").iterdir()} == {"small", "other"}
    pretraining.main(["small", "--to", str(made)])
    said = capsys.readouterr().out
    assert "zero-shot" in said and "largest weight difference 0.0% of the largest weight" in said
    assert pretraining.distance(made / "small", made / "other").largest_difference > 0


def test_tokenizer_and_weights_see_public_records_only(tmp_path, monkeypatch):
    seen: list[Example] = []
    train, encode = pretraining.train_tokenizer, pretraining.encode_examples

    def train_seen(records: list[Example], vocabulary: int) -> object:
        seen.extend(records)
        return train(records, vocabulary)

    def encode_seen(records: list[Example], *rest: object) -> object:
        seen.extend(records)
        return encode(records, *rest)

    monkeypatch.setattr(pretraining, "train_tokenizer", train_seen)
    monkeypatch.setattr(pretraining, "encode_examples", encode_seen)
    monkeypatch.setattr(supportdesk, "generate", lambda *_: pytest.fail("private records were generated"))
    pretrain(SMALL, tmp_path)
    assert len(seen) == 2 * SMALL.records
    assert {record.split for record in seen} == {"public"}
    assert {record.user.split("-")[0] for record in seen} <= set(supportdesk.PUBLIC_ORGANISATIONS)
    assert not any("garnet" in record.instruction or "fjord" in record.instruction for record in seen)

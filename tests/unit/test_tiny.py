"""The embedded backbone: small, public, cached in one piece."""

import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from dptune.data import supportdesk
from dptune.data.schema import Example
from dptune.models import tiny
from dptune.models.tiny import Recipe, load_tiny, train_tokenizer

SMALL = Recipe(
    vocabulary=400, layers=1, width=16, feed_forward=32, heads=2, records=200, steps=3, warmup=1, batch_size=8
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return load_tiny(tmp_path_factory.mktemp("cache"), SMALL)


def test_the_folder_loads_offline_in_hugging_face_format(folder, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    model = AutoModelForCausalLM.from_pretrained(folder)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    assert {"config.json", "model.safetensors", "tokenizer.json"} <= {path.name for path in folder.iterdir()}
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
        prompt, response = tiny._text(record)
        assert tokenizer(prompt + response).input_ids == tokenizer(prompt).input_ids + tokenizer(response).input_ids


def test_the_default_backbone_has_at_most_three_million_parameters():
    recipe = Recipe(steps=1, records=500)
    tokenizer = train_tokenizer(supportdesk.public(size=500), recipe.vocabulary)
    model = tiny._new_model(tokenizer, recipe)
    assert 500_000 < model.num_parameters() <= 3_000_000


@pytest.mark.parametrize("prompt_weight", [0.0, 0.3])
def test_the_loss_is_the_mean_of_each_example_by_itself(folder, prompt_weight):
    model, tokenizer = AutoModelForCausalLM.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
    rows = tiny.encode_examples(supportdesk.public(size=7), tokenizer, 512)
    expected = []
    for row in rows:
        logits = model(input_ids=torch.tensor([row.tokens])).logits[0, :-1]
        losses = torch.nn.functional.cross_entropy(logits, torch.tensor(row.tokens[1:]), reduction="none")
        length = len(row.tokens) - row.response
        expected.append(losses[length - 1 :].mean() + prompt_weight * losses[: length - 1].sum() / length)
    torch.testing.assert_close(tiny._loss(model, rows, prompt_weight), torch.stack(expected).mean())


def test_training_lowers_the_loss_and_reports_it(tmp_path):
    lines: list[str] = []
    load_tiny(tmp_path, replace(SMALL, steps=100, learning_rate=1e-2), progress=lines.append)
    losses = [float(line.split("loss ")[1].split(",")[0]) for line in lines]
    assert lines[0].startswith("pretraining tiny: step 50/100, loss ")
    assert lines[0].endswith("s left")
    assert losses[-1] < losses[0]


def test_the_cache_is_used_and_keyed_by_the_recipe(folder, monkeypatch):
    def refuse(*_: object) -> None:
        raise AssertionError("trained again")

    monkeypatch.setattr(tiny, "_pretrain", refuse)
    assert load_tiny(folder.parent, SMALL) == folder
    with pytest.raises(AssertionError, match="trained again"):
        load_tiny(folder.parent, replace(SMALL, steps=4))


def test_training_again_gives_the_same_bits(folder, tmp_path):
    torch.manual_seed(123)
    before = torch.get_rng_state()
    again = load_tiny(tmp_path, SMALL)
    assert again.name == folder.name
    for name in ("model.safetensors", "tokenizer.json"):
        assert (again / name).read_bytes() == (folder / name).read_bytes()
    assert torch.equal(torch.get_rng_state(), before)


def test_an_interrupted_pretraining_leaves_no_folder(tmp_path):
    def interrupt(line: str) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        load_tiny(tmp_path, SMALL, progress=interrupt)
    assert not [path for path in tmp_path.iterdir() if path.is_dir()]
    assert load_tiny(tmp_path, SMALL).is_dir()


def test_threads_that_ask_at_once_get_one_folder(tmp_path, monkeypatch):
    trained: list[int] = []
    pretrain = tiny._pretrain

    def counted(*arguments: object) -> object:
        trained.append(1)
        return pretrain(*arguments)

    monkeypatch.setattr(tiny, "_pretrain", counted)
    with ThreadPoolExecutor(3) as pool:
        folders = set(pool.map(lambda _: load_tiny(tmp_path, SMALL), range(3)))
    assert len(folders) == len(trained) == 1


def test_processes_that_ask_at_once_get_one_folder(tmp_path):
    program = (
        "import sys, pathlib; from dptune.models.tiny import Recipe, load_tiny;"
        f"print(load_tiny(pathlib.Path(sys.argv[1]), {SMALL!r}, progress=print))"
    )
    command = [sys.executable, "-c", program, str(tmp_path)]
    started = [subprocess.Popen(command, stdout=subprocess.PIPE, text=True) for _ in range(2)]
    outputs = [process.communicate(timeout=120)[0].splitlines() for process in started]
    assert outputs[0][-1] == outputs[1][-1]
    assert sorted(len(lines) for lines in outputs) == [1, 2]  # one of them reported its training
    assert len([path for path in tmp_path.iterdir() if path.is_dir()]) == 1


def test_tokenizer_and_weights_see_public_records_only(tmp_path, monkeypatch):
    seen: list[Example] = []
    train, encode = tiny.train_tokenizer, tiny.encode_examples

    def train_seen(records: list[Example], vocabulary: int) -> object:
        seen.extend(records)
        return train(records, vocabulary)

    def encode_seen(records: list[Example], *rest: object) -> object:
        seen.extend(records)
        return encode(records, *rest)

    monkeypatch.setattr(tiny, "train_tokenizer", train_seen)
    monkeypatch.setattr(tiny, "encode_examples", encode_seen)
    monkeypatch.setattr(supportdesk, "generate", lambda *_: pytest.fail("private records were generated"))
    load_tiny(tmp_path, SMALL)
    assert len(seen) == 2 * SMALL.records
    assert {record.split for record in seen} == {"public"}
    assert {record.user.split("-")[0] for record in seen} <= set(supportdesk.PUBLIC_ORGANISATIONS)
    assert not any("garnet" in record.instruction or "fjord" in record.instruction for record in seen)

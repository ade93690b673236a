"""Small models and data that the tests share."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Generator

# Set before torch and transformers are imported: one thread a test process, and no test may need a network.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["WANDB_MODE"] = "offline"
# Runs on private data are booked; not in the account of whoever runs the tests.
os.environ["DPTUNE_HOME"] = tempfile.mkdtemp(prefix="dptune-tests-")

from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from hypothesis import settings

# No assertion on time, and the same cases in every run.
settings.register_profile("dptune", deadline=None, derandomize=True)
settings.load_profile("dptune")

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

TEXT = ["which team ? reset my code", "is it urgent ? the order is late", "yes no billing support kim 12"]


@pytest.hookimpl(wrapper=True)
def pytest_runtest_call(item: pytest.Item) -> Generator[None, object, object]:
    """A test that met a package of an extra that is not installed is skipped, saying which."""
    from dptune.config.extras import MODULES, needs

    try:
        return (yield)
    except ModuleNotFoundError as error:
        for extra, names in MODULES.items():
            if (error.name or "").partition(".")[0] in names:
                pytest.skip(needs(extra, "the test"))
        raise


@pytest.fixture(scope="session")
def tokenizer() -> PreTrainedTokenizerFast:
    """A byte-level tokenizer of a few hundred tokens."""
    return make_tokenizer()


def make_tokenizer() -> PreTrainedTokenizerFast:
    """The same, for what is no test."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    made = Tokenizer(models.BPE(unk_token="<unk>"))
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=300,
        special_tokens=["<pad>", "<eos>", "<unk>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    made.train_from_iterator(TEXT, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=made, pad_token="<pad>", eos_token="<eos>", unk_token="<unk>", padding_side="left"
    )


@pytest.fixture(scope="session")
def model_folder(tmp_path_factory: pytest.TempPathFactory, tokenizer: PreTrainedTokenizerFast) -> Path:
    """A random model in Hugging Face format."""
    from backbones_for_tests import tiny_llama

    folder = tmp_path_factory.mktemp("model")
    tiny_llama().save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder

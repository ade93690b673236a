"""Each kind of adapter trained by a whole run, then opened by PEFT alone, or by one call of ours, elsewhere."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from dptune.config.adapters import ADAPTERS
from dptune.config.schema import Config
from dptune.data.sources import load_dataset
from dptune.models import adapters
from dptune.runs import run

pytestmark = pytest.mark.numerical

OURS = {"houlsby", "pfeiffer", "parallel", "bitfit", "head", "full", "pst"}
"""Kinds that PEFT 0.21 does not have."""

SCORE = """
import json, sys, warnings
from collections import defaultdict
from pathlib import Path
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer

backbone, folders, examples = json.load(sys.stdin)
warnings.filterwarnings("ignore")
tokenizer = AutoTokenizer.from_pretrained(backbone)

def opened(kind, folder, ours):
    model = AutoModelForCausalLM.from_pretrained(backbone)
    if ours:
        from dptune.models.adapters import load_adapter
        return load_adapter(model, Path(folder))
    assert not any(name.split(".")[0] == "dptune" for name in sys.modules)
    return PeftModel.from_pretrained(model, folder)

result = {}
for kind, folder, ours in folders:
    model, right = opened(kind, folder, ours).eval(), defaultdict(list)
    for task, instruction, text, options, answer in examples:
        scores = []
        for option in options:
            head = tokenizer(f"{instruction}\\n{text}\\n>" if text else f"{instruction}\\n>").input_ids
            tail = [*tokenizer(f" {option}").input_ids, tokenizer.eos_token_id]
            tokens = torch.tensor([head + tail])
            with torch.no_grad():
                logits = model(input_ids=tokens, attention_mask=torch.ones_like(tokens)).logits[0].log_softmax(-1)
            scores.append(sum(float(logits[-len(tail) + at - 1, token]) for at, token in enumerate(tail)))
        right[task].append(options[scores.index(max(scores))] == answer)
    result[kind] = {task: sum(values) / len(values) for task, values in right.items()}
print(json.dumps(result))
"""


def test_a_fresh_process_gets_the_recorded_accuracy(config: Config, model_folder: Path) -> None:
    records = {}
    config.data.test_size = 16  # every option of each is scored by itself, for every kind
    for kind in sorted(ADAPTERS, key=OURS.__contains__):  # what needs no dptune first
        config.adapter.name, config.adapter.virtual_tokens = kind, 3
        # A strong update, so that the adapter decides the answers.
        config.hyperparameter.learning_rate, config.hyperparameter.max_grad_norm = 0.1, 1.0
        record = records[kind] = run.run(config)
        assert record.status == "done", record.error
        assert record.metrics is not None and record.parameters is not None and record.privacy is not None
        assert record.guarantee.epsilon is not None and record.guarantee.epsilon <= 8
        assert sum(record.parameters.groups.values()) == record.parameters.trainable
        assert record.provenance["engine"] == adapters.engine_of(kind, "decoder")
        assert record.metrics.response_perplexity != record.zero_shot.response_perplexity
    root = Path(config.compute.output_root)
    folders = [(kind, str(root / record.run_id / "adapter"), kind in OURS) for kind, record in records.items()]
    examples = [
        (item.task, item.instruction, item.input, item.options, item.output)
        for item in load_dataset(config).test
        if item.options
    ]
    found = subprocess.run(
        [sys.executable, "-c", SCORE],
        input=json.dumps((str(model_folder), folders, examples)),
        capture_output=True,
        text=True,
        check=False,
    )
    assert found.returncode == 0, found.stderr[-2000:]
    for kind, accuracy in json.loads(found.stdout).items():
        recorded = records[kind].metrics.accuracy_by_task
        assert accuracy == {task: recorded[task] for task in accuracy}, kind

"""Speed and memory of the engines beside plain, non-private training: `python tests/benchmarks/engines.py`.

Speed is CPU time of one process in which the engines take turns, so that all see the same machine; memory is the peak
of a process of its own for each. Both are printed as ratios to plain training. Nothing here is a test.
"""

from __future__ import annotations

import argparse
import resource
import statistics
import subprocess
import sys
import time
import warnings
from collections.abc import Callable

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from dptune.config.schema import AdapterConfig
from dptune.data.batches import InputFormat, collate, example_losses
from dptune.data.encoding import Encoded
from dptune.models import adapters
from dptune.privacy.engines import ENGINES

Step = Callable[[], None]


def step_of(name: str, adapter: str, rows: int, length: int, layers: int) -> Step:
    """One forward and backward pass of a random Llama of width 576 with an adapter; `plain` sums the gradients."""
    torch.manual_seed(0)
    size = {"hidden_size": 576, "intermediate_size": 1536, "num_hidden_layers": layers, "num_attention_heads": 9}
    model = LlamaForCausalLM(LlamaConfig(vocab_size=8192, num_key_value_heads=3, tie_word_embeddings=True, **size))
    adapted = adapters.attach(model, AdapterConfig(name=adapter), rank=8, steps=10, seed=0)
    batch = collate([Encoded(tuple(range(5 + row, 5 + row + length)), 8) for row in range(rows)], InputFormat(pad=0))
    if name == "plain":

        def plain() -> None:
            example_losses(adapted, batch).sum().backward()
            adapted.zero_grad(set_to_none=True)

        return plain
    engine = ENGINES[name](adapted, example_losses)

    def private() -> None:
        engine(batch)

    return private


def main() -> None:
    """Print two tables."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--adapter", default="lora")
    parser.add_argument("--engines", default="hooks,functional,opacus")
    parser.add_argument("--rows", type=int, default=8)
    parser.add_argument("--length", type=int, default=64)
    parser.add_argument("--layers", type=int, default=10)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--memory-of", help="internal: do three steps with this engine and print the peak in MiB")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    warnings.filterwarnings("ignore")
    shape = (arguments.adapter, arguments.rows, arguments.length, arguments.layers)
    if arguments.memory_of:
        step = step_of(arguments.memory_of, *shape)
        for _ in range(3):
            step()
        print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024)
        return
    names = ["plain", *arguments.engines.split(",")]
    steps = {name: step_of(name, *shape) for name in names}
    times: dict[str, list[float]] = {name: [] for name in names}
    for _ in range(arguments.rounds + 1):
        for name, step in steps.items():
            begin = time.process_time()
            step()
            times[name].append(time.process_time() - begin)
    medians = {name: statistics.median(values[1:]) for name, values in times.items()}  # the first warms up
    command = [sys.executable, __file__, *sys.argv[1:], "--memory-of"]
    peaks = {name: float(subprocess.check_output([*command, name], text=True)) for name in names}
    print(f"{arguments.adapter}, {arguments.rows} rows of {arguments.length} tokens, {arguments.layers} layers of 576")
    print("| engine | CPU time | peak memory |\n| --- | --- | --- |")
    for name in names:
        print(f"| {name} | {medians[name] / medians['plain']:.2f} | {peaks[name] / peaks['plain']:.2f} |")


if __name__ == "__main__":
    main()

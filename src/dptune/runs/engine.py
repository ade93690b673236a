"""Which engine gives a run its gradients, and in which shapes: checked on made-up records before anything is spent.

The check needs no data, so that what it decides is public.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
import platform
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path

import torch

from dptune.config.schema import Config, ConfigError
from dptune.data.batches import InputFormat, Ladder, Shape, Tensors, collate, example_losses
from dptune.data.encoding import Encoded
from dptune.models import adapters
from dptune.models.backbones import Backbone
from dptune.models.layers import model_type_of
from dptune.privacy.engines import ENGINES, checked_engine
from dptune.privacy.gradients import Engine, EngineError
from dptune.privacy.independence import Probe, check_independence
from dptune.records.code import code_version
from dptune.records.files import write_atomically


@dataclass(frozen=True)
class GradientPath:
    """An engine and the shapes of its batches, as they passed the check."""

    engine: str
    """A name of `ENGINES`."""
    ladder: Ladder
    notes: tuple[str, ...] = ()
    """What was tried before, and why it is not used; for the log."""
    key: str = ""
    """A digest of all that the check depended on."""

    @property
    def digest(self) -> bytes:
        """Equal for processes that compute alike; 16 bytes."""
        return hashlib.sha256(f"{self.key} {self.engine} {self.ladder.rows}".encode()).digest()[:16]

    def to_json(self) -> str:
        """For the cache; what the ladder is made of is in its key."""
        return json.dumps({"engine": self.engine, "rows": self.ladder.rows, "notes": self.notes})

    @classmethod
    def from_json(cls, text: str, ladder: Ladder) -> GradientPath:
        """Inverse of `to_json`."""
        stored = json.loads(text)
        return cls(stored["engine"], dataclasses.replace(ladder, rows=stored["rows"]), tuple(stored["notes"]))

    def start(self, model: torch.nn.Module) -> Engine:
        """The engine, on the model that was checked; an evaluation may have come between."""
        return ENGINES[self.engine](model, example_losses)


def checked_path(config: Config, backbone: Backbone, model: torch.nn.Module, private: bool) -> GradientPath:
    """The first engine that is right for the adapter, with batches in which each row's gradient is its own.

    Raises:
        ConfigError: when there is none, with the reason.
    """
    adapters.set_modes(model)
    if private:
        _check_positions(config, backbone)
    ladder = Ladder(config.environment.sequence_length, config.compute.physical_batch_size, backbone.layout)
    names = _candidates(config, model)
    key = _key(config, backbone, names, ladder, private)
    place = Path(config.compute.cache_dir) / "engines" / f"{key}.json"
    if key not in _checked and place.exists():
        _checked[key] = GradientPath.from_json(place.read_text(encoding="utf-8"), ladder)
    if key not in _checked:
        _checked[key] = _first_right(config, backbone, model, ladder, names, private)
        write_atomically(place, _checked[key].to_json())
    return dataclasses.replace(_checked[key], key=key)


_checked: dict[str, GradientPath] = {}


def _check_positions(config: Config, backbone: Backbone) -> None:
    """Raises ConfigError for positions that stretch with what was read before, an evaluation for instance."""
    settings = backbone.model.config
    dynamic = '"dynamic"' in json.dumps(getattr(settings, "rope_parameters", None), default=str)
    longest = config.environment.sequence_length + config.evaluation.max_new_tokens
    most = getattr(settings, "max_position_embeddings", None)
    if dynamic and (most is None or longest > most):
        raise ConfigError(
            f"model={config.model.name}: its positions stretch with the longest text that was read (rope_type=dynamic),"
            " so that a gradient would depend on other records; set environment.sequence_length and "
            f"evaluation.max_new_tokens to at most {most} together"
        )


def _key(config: Config, backbone: Backbone, names: Sequence[str], ladder: Ladder, private: bool) -> str:
    """A digest of everything that the outcome of the check can depend on: what is computed, and with which kernels."""
    versions = [f"{name} {metadata.version(name)}" for name in ("torch", "transformers", "peft")]
    kernels = [
        *versions,
        torch.__config__.show(),
        torch.backends.cpu.get_cpu_capability(),
        platform.processor(),
        _processor(),
    ]
    switches = sorted(item for item in os.environ.items() if item[0].startswith(_SWITCHES))
    parts = (
        code_version(),
        (backbone.fingerprint, repr(backbone.model.config)),
        dataclasses.astuple(config.adapter),
        (config.hyperparameter.rank, config.hyperparameter.steps, config.environment.precision),
        (config.compute.device, config.compute.threads, kernels, switches),
        [repr(ENGINES[name]) for name in names],
        (ladder, private),
    )
    return hashlib.sha256(repr(parts).encode()).hexdigest()[:32]


_SWITCHES = ("ATEN_", "CUBLAS_", "CUDA_", "DNNL_", "MKL_", "NVIDIA_", "OMP_", "ONEDNN_", "TORCH_")
"""Beginnings of the environment variables that choose kernels."""


def _processor() -> str:
    """Name of what computes, as far as the system tells."""
    if torch.cuda.is_available():
        return str(torch.cuda.get_device_name())
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return platform.machine()
    return " ".join(sorted({line for line in lines if line.startswith(("model name", "flags", "Features"))}))


def _candidates(config: Config, model: torch.nn.Module) -> tuple[str, ...]:
    if config.environment.engine != "auto":
        return (config.environment.engine,)
    architecture = model_type_of(model)
    best = adapters.engine_of(config.adapter.name, architecture, embeddings=config.adapter.embeddings)
    return tuple(dict.fromkeys((best, "functional", "loop")))


def _first_right(
    config: Config, backbone: Backbone, model: torch.nn.Module, ladder: Ladder, names: Sequence[str], private: bool
) -> GradientPath:
    vocabulary, device = len(backbone.tokenizer), config.compute.device
    notes: list[str] = []
    try:
        _check_padding(model, ladder, vocabulary, device)
    except adapters.REFUSALS as error:
        raise ConfigError(f"adapter={config.adapter.name} on model={config.model.name}: {_in_words(error)}") from error
    for name in names:
        for rows in dict.fromkeys((ladder.rows, 1)):
            path = GradientPath(name, dataclasses.replace(ladder, rows=rows), tuple(notes))
            try:
                engine = checked_engine(name, model, example_losses, *_few(vocabulary, ladder, device))
            except adapters.REFUSALS as error:
                notes.append(f"engine {name}: {_in_words(error)}")
                break
            try:
                if private:
                    check_independence(engine, model, example_losses, list(probes(path.ladder, vocabulary, device)))
            except adapters.REFUSALS as error:
                notes.append(f"engine {name}, {rows} row(s) in a batch: {_in_words(error)}")
            else:
                return path
            finally:
                engine.close()
    raise ConfigError(f"adapter={config.adapter.name} on model={config.model.name}: {notes[-1]}")


def _in_words(error: Exception) -> str:
    """What an engine says, or what a library says of the backbone on made-up records."""
    if isinstance(error, EngineError):
        return str(error)
    return f"the backbone fails on made-up records ({type(error).__name__}: {' '.join(str(error).split())[:200]})"


def _check_padding(model: torch.nn.Module, ladder: Ladder, vocabulary: int, device: str) -> None:
    """Raise EngineError when the loss of a row depends on its padding: with and without are compared in each shape."""
    if any(value.is_floating_point() and value.itemsize < 4 for value in model.parameters()):
        return  # What rounds otherwise is more than what is looked for.
    layout = ladder.layout
    for shape in ladder.shapes:
        every = _rows_of(shape, ladder, vocabulary)
        # The shortest has most padding, and one in between has more to pay attention to.
        rows = [every[at] for at in dict.fromkeys(min(at, len(every) - 1) for at in (1, 2))]
        with torch.no_grad():
            padded = example_losses(model, collate(rows, layout, shape, device)).tolist()
            bare = [float(example_losses(model, _bare(row, layout, device))[0]) for row in rows]
        for one, other in zip(bare, padded, strict=False):
            if not abs(one - other) <= LOSS_TOLERANCE * max(1.0, abs(one)):
                raise EngineError(
                    f"the loss of a row is {one:.4f} without padding and {other:.4f} in batches of up to "
                    f"{shape.width - layout.extra} tokens: the backbone reads padding, so choose another one"
                )


def _bare(row: Encoded, layout: InputFormat, device: str) -> Tensors:
    """A batch of one row, without the column that no row fills, and without position ids of ours."""
    spare = 0 if layout.architecture == "decoder" else 1
    batch = collate([row], layout, Shape(layout.width_of(row) - spare, row.response, 1), device)
    batch.pop("position_ids", None)
    return batch


LOSS_TOLERANCE = 3e-5
"""Largest difference of a loss with and without padding, of the loss: what rounds otherwise is a hundredth of it."""


def _few(vocabulary: int, ladder: Ladder, device: str) -> tuple[Tensors, Tensors]:
    """Three short records, and the same with another last one."""
    lengths = (7, 9, 5)
    rows = made_up_rows(vocabulary, lengths)
    changed = [*rows[:-1], made_up_rows(vocabulary, lengths, shift=101)[-1]]
    first, second = (collate(each, ladder.layout, device=device) for each in (rows, changed))
    return first, second


def probes(ladder: Ladder, vocabulary: int, device: str) -> Iterator[Probe]:
    """Made-up batches of every shape, with rows of the lengths that it takes."""
    for shape in ladder.shapes:
        rows = _rows_of(shape, ladder, vocabulary)
        yield Probe(
            name=f"{shape.rows} rows of up to {shape.width - ladder.layout.extra} tokens",
            rows=collate(rows, ladder.layout, shape, device),
            other=collate(_rows_of(shape, ladder, vocabulary, shift=101)[-1:], ladder.layout, shape, device),
            alone=collate(rows[:1], ladder.layout, device=device),
        )


def _rows_of(shape: Shape, ladder: Ladder, vocabulary: int, shift: int = 0) -> list[Encoded]:
    """A batch full of rows that have the given shape: the longest, the shortest, and those between."""
    layout = ladder.layout
    below = max((width for width in ladder.widths if width < shape.width), default=0)
    most, least = shape.width - layout.extra, max(below - layout.extra + 1, 1)
    sizes = [(most + least + 1) // 2, least, most, *(most - 7 * at % (most - least + 1) for at in range(shape.rows))]
    responses = [(shape.labels + 1) // 2, 2, shape.labels, *(1 + 3 * at % shape.labels for at in range(shape.rows))]
    rows = []
    for at, (size, response) in enumerate(zip(sizes[: shape.rows], responses, strict=False)):
        if layout.architecture == "encoder_decoder":
            length = max(size, 1) + response
        else:
            length, response = max(size, 2), min(response, max(size, 2) - 1)
        rows.append(made_up_row(vocabulary, length, response, at, shift))
    return rows


def made_up_rows(vocabulary: int, lengths: Sequence[int], shift: int = 0) -> list[Encoded]:
    """Rows of made-up tokens, two or three of them the response; another `shift` makes other tokens."""
    return [made_up_row(vocabulary, length, 2 + at % 2, at, shift) for at, length in enumerate(lengths)]


def made_up_row(vocabulary: int, length: int, response: int, number: int, shift: int) -> Encoded:
    """One row of made-up tokens; not of the first ones, which pad or are special, and may have no embedding."""
    spare = min(8, vocabulary - 1)
    tokens = ((31 * number + 17 * at + shift) % (vocabulary - spare) for at in range(length))
    return Encoded(tuple(spare + token for token in tokens), response)

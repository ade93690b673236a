"""One run from config to record, on a small random model: everything but good accuracy."""

import contextlib
import copy
import dataclasses
import json
import struct
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from backbones_for_tests import seeded
from numerics import assert_close_to_largest
from peft import PeftModel
from transformers import AutoModelForCausalLM

from dptune.config.schema import Config, ConfigError
from dptune.data.batches import Ladder, collate, physical_batches
from dptune.data.encoding import Encoded, encode_examples
from dptune.data.sources import Dataset, load_dataset
from dptune.evaluation import Evaluator, metrics_of
from dptune.identity import run_id
from dptune.models import adapters, backbones
from dptune.privacy.ledger import WriteAheadLedger
from dptune.privacy.plan import PrivacyPlan
from dptune.records import record as records
from dptune.runs import privacy as guarantee
from dptune.runs import run
from dptune.runs import setup as preparation

pytestmark = pytest.mark.numerical


def weights(folder: Path) -> dict[str, torch.Tensor]:
    from safetensors.torch import load_file

    return load_file(folder / "adapter" / "adapter_model.safetensors")


def test_a_private_run_leaves_a_whole_record(config: Config) -> None:
    lines: list[str] = []
    record = run.run(config, overrides=["x=1"], report=lines.append)
    folder = Path(config.compute.output_root) / run_id(config)
    assert records.read(folder) == record and record.status == "done"
    privacy, guarantee = record.privacy, record.guarantee
    assert privacy is not None and guarantee is not None and privacy.private and guarantee.private
    assert guarantee.stand_in and not guarantee.realised and guarantee.released == "adapter"
    assert 0.5 * 8 < guarantee.epsilon <= 8 and privacy.target_epsilon == 8
    assert privacy.noise_mode == "reproducible" and privacy.steps == 3 and privacy.sample_rate == 0.1
    # The record alone gives the epsilon again, by the plan and by an independent accountant.
    assert PrivacyPlan.from_dict(privacy.plan).epsilon() == guarantee.epsilon
    assert guarantee.accountants["prv"]["value"] == pytest.approx(guarantee.epsilon, abs=0.02)
    assert guarantee.accountants["gdp_clt"]["kind"] == "estimate"
    assert record.parameters is not None and 0 < record.parameters.trainable < record.parameters.total
    assert sum(group.dimension for group in privacy.groups.values()) == record.parameters.trainable
    assert record.metrics is not None and record.metrics.n == 40 and record.zero_shot is not None
    assert record.provenance["overrides"] == ["x=1"] and record.provenance["engine"] == "hooks"
    history = [json.loads(line) for line in (folder / "history.jsonl").read_text().splitlines()]
    assert [row["step"] for row in history] == [1, 2, 3] and history[-1]["epsilon"] == guarantee.shown
    assert "noise multiplier" in (folder / "run.log").read_text()
    progress = [line for line in lines if line.startswith("step 3/3")]
    assert "examples/s" in progress[0] and "of 8" in progress[0] and "left" not in progress[0]


@pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing. is deprecated")  # PEFT 0.21 reads it
def measured_again(
    model: torch.nn.Module, backbone: backbones.Backbone, data: Dataset
) -> tuple[records.Metrics, list[bool]]:
    """What a run writes down of its model, and which answers were right, in other batches."""
    judge = Evaluator(backbone.tokenizer, Ladder(96, 16, backbone.layout), 64)
    found, written = judge(model, data.test, {example.input for example in data.train})
    return metrics_of(found, written), [item.correct for item in found]


def test_the_saved_adapter_gives_the_recorded_accuracy(config: Config, model_folder: Path) -> None:
    config.privacy.enabled, config.privacy.target_epsilon = False, None
    config.hyperparameter.learning_rate = 0.1
    record = run.run(config)
    folder = Path(config.compute.output_root) / record.run_id
    model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(model_folder), folder / "adapter").eval()
    data = load_dataset(config)
    backbone = backbones.load_backbone(
        config.model, precision="float32", device="cpu", cache_dir=Path(config.compute.cache_dir)
    )
    metrics, right = measured_again(model, backbone, data)
    assert record.metrics is not None
    assert metrics.accuracy_by_task == record.metrics.accuracy_by_task
    assert metrics.response_perplexity == pytest.approx(record.metrics.response_perplexity, rel=1e-4)
    assert record.metrics.response_perplexity != pytest.approx(record.zero_shot.response_perplexity, rel=1e-3)
    published = "".join(path.read_text() for path in (folder / "adapter").iterdir() if path.suffix != ".safetensors")
    assert str(model_folder.parent) not in published
    saved = [json.loads(line) for line in (folder / "evaluation.jsonl").read_text().splitlines()]
    assert [item["correct"] for item in saved] == right


def test_a_finished_run_is_not_done_again_unless_forced(config: Config) -> None:
    first = run.run(config)
    folder = Path(config.compute.output_root) / first.run_id
    before = (folder / "record.json").stat().st_mtime_ns
    lines: list[str] = []
    assert run.run(config, report=lines.append) == first
    assert (folder / "record.json").stat().st_mtime_ns == before and "is finished" in lines[0]
    adapter = weights(folder)
    config.compute.force = True
    config.compute.physical_batch_size = 7
    again = run.run(config)
    assert again.run_id == first.run_id and (folder / "record.json").stat().st_mtime_ns > before
    # Released sums lie on a grid of a thousandth of the noise, of which another order of sums may take the next point.
    assert_close_to_largest(weights(folder), adapter, rtol=2e-3)


def test_the_same_seed_is_bit_equal_and_another_is_not(config: Config, tmp_path: Path) -> None:
    one = weights(Path(config.compute.output_root) / run.run(config).run_id)
    config.compute.output_root = str(tmp_path / "again")
    two = weights(Path(config.compute.output_root) / run.run(config).run_id)
    config.environment.seed = 1
    three = weights(Path(config.compute.output_root) / run.run(config).run_id)
    assert all(torch.equal(one[name], two[name]) for name in one)
    assert any(not torch.equal(one[name], three[name]) for name in one)


def test_secure_noise_is_never_the_same_twice(config: Config) -> None:
    config.privacy.noise_mode, config.compute.force = "secure", True
    folder = Path(config.compute.output_root) / run_id(config)
    run.run(config)
    one = weights(folder)
    record = run.run(config)
    assert record.privacy is not None and record.privacy.noise_mode == "secure"
    assert any(not torch.equal(value, one[name]) for name, value in weights(folder).items())


def test_a_run_that_fails_says_so_in_its_record_and_log(config: Config, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: object, **__: object) -> None:
        raise RuntimeError("the disk\nis on fire")

    monkeypatch.setattr(run, "save_adapter", broken)
    record = run.run(config)
    folder = Path(config.compute.output_root) / record.run_id
    found = records.read(folder)
    assert found is not None and found.status == "failed" and found.error == "RuntimeError: the disk is on fire"
    assert "Traceback" in (folder / "run.log").read_text()
    monkeypatch.undo()
    assert run.run(config).status == "done"


def test_weights_that_are_not_finite_fail_the_run(config: Config) -> None:
    config.privacy.enabled, config.privacy.target_epsilon = False, None
    config.environment.optimizer, config.hyperparameter.learning_rate = "sgd", 1e30
    record = run.run(config)
    assert record.status == "failed" and record.error is not None and "not finite" in record.error


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("target_epsilon", 1e-9, "epsilon"),
        ("delta", 0.01, "delta"),
        ("allocation", "joint", "quantile"),
    ],
)
def test_a_plan_that_cannot_be_true_is_refused_before_anything_is_written(
    config: Config, field: str, value: object, message: str
) -> None:
    setattr(config.privacy, field, value)
    with pytest.raises(ConfigError, match=message) as caught:
        run.run(config)
    assert "\n" not in str(caught.value)
    assert not Path(config.compute.output_root).exists()


def test_users_are_asked_of_data_that_has_them(config: Config, tmp_path: Path) -> None:
    path = tmp_path / "plain.jsonl"
    row = {"instruction": "say", "output": "yes"}
    path.write_text("".join(json.dumps({**row, "split": split}) + "\n" for split in ["train"] * 50 + ["test"] * 5))
    config.data.name, config.data.path, config.data.train_size = "jsonl", str(path), None
    config.privacy.unit, config.privacy.examples_per_user = "user_els", 2
    with pytest.raises(ConfigError, match="author of every training record"):
        run.run(config)


@pytest.mark.parametrize("unit", ["user_els", "user_uls"])
def test_user_level_runs_are_accounted_for_users(config: Config, unit: str) -> None:
    config.privacy.unit, config.privacy.examples_per_user = unit, 2
    config.hyperparameter.expected_batch_size = 10
    record = run.run(config)
    assert record.status == "done" and record.privacy is not None
    assert record.privacy.unit == unit and record.guarantee.epsilon <= 8
    data = load_dataset(config)
    units = len({example.user for example in data.train}) if unit == "user_uls" else len(data.train)
    assert record.privacy.sample_rate == pytest.approx(10 / units)


def test_a_folder_that_is_no_language_model_is_named(config: Config, tmp_path: Path) -> None:
    folder = tmp_path / "empty"
    folder.mkdir()
    (folder / "config.json").write_text("{}")
    config.model.path = str(folder)
    with pytest.raises(ConfigError, match="holds no language model") as caught:
        run.run(config)
    assert "\n" not in str(caught.value) and not Path(config.compute.output_root).exists()


def test_telemetry_that_is_not_paid_for_stays_out_of_the_record(config: Config) -> None:
    record = run.run(config)
    assert "NON_PRIVATE" not in json.dumps(dataclasses.asdict(record))


def offline_records(path: Path) -> Iterator[Any]:
    """Records of a W&B offline file: protobufs in the LevelDB log format (blocks of 32 KiB, 7-byte headers)."""
    from wandb.proto import wandb_internal_pb2

    content, at, whole = path.read_bytes(), 7, b""
    while at + 7 <= len(content):
        if 32768 - at % 32768 < 7:
            at += 32768 - at % 32768
            continue
        _, length, kind = struct.unpack("<IHB", content[at : at + 7])
        whole += content[at + 7 : at + 7 + length]
        at += 7 + length
        if kind in (1, 4):
            record = wandb_internal_pb2.Record()
            record.ParseFromString(whole)
            yield record
            whole = b""


def finished_records(path: Path) -> list[Any]:
    """The same once W&B's own process has written the last of them, which may be after the run."""
    from google.protobuf.message import DecodeError

    found: list[Any] = []
    for _ in range(600):
        with contextlib.suppress(DecodeError):
            found = list(offline_records(path))
        if any(item.HasField("exit") for item in found):
            break
        time.sleep(0.1)
    return found


def test_wandb_mirrors_config_history_and_summary_offline(config: Config) -> None:
    config.tracking.name, config.sweep = "wandb_offline", "smoke"
    record = run.run(config)
    (path,) = (Path(config.compute.output_root) / record.run_id).glob("wandb/offline-run-*/run-*.wandb")
    header, history, summary = None, [], {}
    for item in finished_records(path):
        if item.HasField("run"):
            header = item.run
        if item.HasField("history"):
            history.append({(e.key or "/".join(e.nested_key)): json.loads(e.value_json) for e in item.history.item})
        if item.HasField("summary"):
            summary |= {(e.key or "/".join(e.nested_key)): json.loads(e.value_json) for e in item.summary.update}
    assert header is not None and header.run_id == record.run_id and header.run_group == "smoke"
    settings = {entry.key: json.loads(entry.value_json) for entry in header.config.update}
    assert settings["privacy"]["target_epsilon"] == 8
    assert [row["step"] for row in history] == [1, 2, 3]
    assert not any("NON_PRIVATE" in key for row in history for key in row)
    assert summary["metrics/accuracy"] == record.metrics.accuracy
    assert summary["privacy/epsilon"] == summary["epsilon"] == record.guarantee.shown
    assert summary["parameters/trainable"] == record.parameters.trainable


def test_offline_files_of_private_data_tell_no_time_and_no_test_metric(config: Config, tmp_path: Path) -> None:
    """Every record of the real file is read, and every text beside it."""
    path = tmp_path / "mine.jsonl"
    splits = ["train"] * 50 + ["test"] * 10
    rows = [{"instruction": "say", "input": f"message {n}", "output": "yes", "split": s} for n, s in enumerate(splits)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    config.data.name, config.data.path, config.data.train_size = "jsonl", str(path), None
    config.tracking.name, config.compute.checkpoint_every = "wandb_offline", 1

    begin = WriteAheadLedger.begin

    def slow(ledger: WriteAheadLedger, step: int, state: str = "") -> None:
        time.sleep(0.3 * step)
        begin(ledger, step, state)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(WriteAheadLedger, "begin", slow)
        record = run.run(config)
    assert record.status == "done", record.error
    (found,) = (Path(config.compute.output_root) / record.run_id).glob("wandb/offline-run-*/run-*.wandb")
    items = finished_records(found)
    history = [
        {(e.key or "/".join(e.nested_key)): json.loads(e.value_json) for e in item.history.item}
        for item in items
        if item.HasField("history")
    ]
    assert [row["step"] for row in history] == [1, 2, 3]
    assert len({row["_timestamp"] for row in history}) == 1
    # How long the mirror was open: all rows are handed in at once, after steps that took 0.9 s and more.
    opened = [row.get("_runtime", 0) for row in history]
    assert max(opened) - min(opened) < 0.5
    keys = {key for row in history for key in row}
    for item in (item.summary for item in items if item.HasField("summary")):
        keys |= {entry.key or "/".join(entry.nested_key) for entry in item.update}
    assert not [key for key in keys if key.startswith(("NON_PRIVATE", "cost/", "metrics/", "tasks/", "zero_shot/"))]
    assert "privacy/epsilon" in keys and "evaluation/by_task" not in keys
    (runtime,) = (item.exit.runtime for item in items if item.HasField("exit"))
    (header, *_) = (item.run for item in items if item.HasField("run"))
    assert record.provenance["started"] not in str(header) and record.provenance["started"][:10] in str(header)
    assert runtime <= 2 + max(opened)


def test_a_tracker_that_cannot_start_does_not_stop_the_run(config: Config, monkeypatch, capsys) -> None:
    import wandb

    def refuse(**_: object) -> None:
        raise RuntimeError("no wandb today")

    config.tracking.name = "wandb_offline"
    monkeypatch.setattr(wandb, "init", refuse)
    assert run.run(config).status == "done"
    assert "no wandb today" in capsys.readouterr().err


@pytest.mark.parametrize(
    "settings",
    [
        {"clipping": "flat", "allocation": "uniform", "allocation_weights": "static", "grouping": "all"},
        {"clipping": "group", "allocation": "equal_snr", "allocation_weights": "static", "grouping": "layer"},
        {"clipping": "auto_s", "allocation": "min_energy", "grouping": "kind"},
        {"clipping": "psac", "allocation": "equal_budget", "grouping": "module"},
        {"clipping": "group", "allocation": "joint", "quantile": 0.5},
        {"allocation": "lora_weight_space"},
        {"allocation_weights": "adam", "quantile": 0.6, "quantile_share": 0.05},
        {"schedule": "cosine", "schedule_ratio": 0.5},
        {"projection": "random", "projection_dimension": 4, "projection_refresh": 2},
        {"projection": "history", "projection_dimension": 4, "projection_refresh": 1},
        {"projection": "public", "projection_dimension": 4},
        {"projection": "scale"},
        {"projection": "rgp", "projection_dimension": 1, "projection_refresh": 1},
    ],
    ids=lambda settings: "-".join(map(str, settings.values())),
)
def test_every_way_of_sharing_clip_and_noise_keeps_the_target(config: Config, settings: dict[str, Any]) -> None:
    for name, value in settings.items():
        setattr(config.privacy, name, value)
    record = run.run(config)
    assert record.status == "done", record.error
    folder = Path(config.compute.output_root) / record.run_id
    privacy = record.privacy
    assert privacy is not None and record.guarantee.epsilon <= 8
    history = [json.loads(line) for line in (folder / "history.jsonl").read_text().splitlines()]
    planned = PrivacyPlan.from_dict(privacy.plan).noise_multipliers()
    for row, sigma in zip(history, planned, strict=True):
        # Everything released in a step together, thresholds included, has the planned multiplier.
        assert row["noise_multiplier"] == pytest.approx(sigma, rel=1e-6)
    ledger = [json.loads(line) for line in (folder / "ledger.jsonl").read_text().splitlines()]
    assert [row["noise_multiplier"] for row in ledger if "step" in row] == planned.tolist() and privacy.attempts == 1


def test_a_record_of_private_data_tells_nothing_about_single_records(config: Config, tmp_path: Path) -> None:
    path = tmp_path / "mine.jsonl"
    rows = [{"instruction": "say", "input": f"message {index}", "output": "yes"} for index in range(60)]
    splits = ["train"] * 50 + ["test"] * 10
    path.write_text(
        "".join(json.dumps({**row, "split": split}) + "\n" for row, split in zip(rows, splits, strict=True))
    )
    config.data.name, config.data.path, config.data.train_size = "jsonl", str(path), None
    record = run.run(config)
    folder = Path(config.compute.output_root) / record.run_id
    assert record.status == "done" and record.privacy is not None and record.metrics is not None
    assert record.privacy.noise_mode == "secure" and not record.privacy.stand_in
    assert record.privacy.not_covered == ["the 10 records of the test split: metrics are exact functions of them"]
    assert record.cost is None and '"cost": null' in (folder / "record.json").read_text()
    cost = json.loads((folder / "NON_PRIVATE_cost.json").read_text())
    assert cost["seconds"] > cost["training_seconds"] > 0 and cost["peak_memory_mb"] > 0
    assert "test split: no guarantee for its 10 records" in (folder / "run.log").read_text()
    assert record.metrics.n_unseen is None and record.zero_shot is not None and record.zero_shot.n_unseen is None
    judged = [json.loads(line) for line in (folder / "evaluation.jsonl").read_text().splitlines()]
    assert {row["unseen"] for row in judged} == {None}
    assert "message" not in (folder / "record.json").read_text()
    # Names are hashes under a key that stays beside the runs.
    (Path(config.compute.output_root) / ".fingerprint-key").write_bytes(bytes(32))
    assert run_id(config) != record.run_id and load_dataset(config).fingerprint != record.provenance["data"]


def test_a_run_without_steps_releases_nothing(config: Config) -> None:
    config.hyperparameter.steps = config.hyperparameter.warmup_steps = 0
    record = run.run(config)
    assert record.status == "done" and record.privacy is not None, record.error
    assert record.guarantee.epsilon == 0.0 and record.privacy.private and record.metrics == record.zero_shot
    assert record.parameters is not None and record.parameters.trainable == 0


@pytest.mark.parametrize("unit", ["example", "user_els"])
def test_a_private_subspace_is_paid_for_inside_the_target(config: Config, unit: str) -> None:
    plain = guarantee.make_plan(config, load_dataset(config)).noise_multiplier
    config.privacy.projection, config.privacy.projection_noise_multiplier = "private", 3.0
    config.privacy.projection_dimension = 4
    if unit == "user_els":
        config.privacy.unit, config.privacy.examples_per_user = unit, 2
    record = run.run(config)
    assert record.status == "done" and record.privacy is not None, record.error
    assert record.guarantee.epsilon <= 8 and record.privacy.noise_multiplier > plain
    assert [event["group_size"] for event in record.privacy.plan["one_shot"]] == [2 if unit == "user_els" else 1]


def test_a_non_private_run_may_have_a_bfloat16_backbone(config: Config) -> None:
    config.privacy.enabled, config.privacy.target_epsilon = False, None
    config.environment.precision = "bfloat16"
    record = run.run(config)
    assert record.status == "done", record.error
    dtypes = {value.dtype for value in weights(Path(config.compute.output_root) / record.run_id).values()}
    assert dtypes == {torch.float32}


@pytest.mark.parametrize("quantization", ["none", "int8"])
def test_a_private_run_with_a_bfloat16_backbone(config: Config, quantization: str) -> None:
    config.environment.precision, config.environment.backbone_quantization = "bfloat16", quantization
    config.environment.sequence_length, config.compute.physical_batch_size = 48, 7
    record = run.run(config)
    assert record.status == "done" and record.privacy is not None, record.error
    assert record.privacy.private and record.guarantee.epsilon <= 8
    dtypes = {value.dtype for value in weights(Path(config.compute.output_root) / record.run_id).values()}
    assert dtypes == {torch.float32}


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_a_record_that_is_taken_out_changes_no_bit_of_the_others_gradients(config: Config, precision: str) -> None:
    """As a private run would compute them: its engine, its physical batches."""
    config.environment.precision, config.environment.sequence_length = precision, 48
    config.compute.physical_batch_size = 8
    prepared = preparation.set_up(config, "one")
    adapters.set_modes(prepared.model)
    engine, ladder = prepared.path.start(prepared.model), prepared.path.ladder
    rows = list(enumerate(encode_examples(prepared.data.train[:30], prepared.backbone.tokenizer, 48)))

    def gradients(some: list[tuple[int, Encoded]]) -> dict[int, list[torch.Tensor]]:
        found = {}
        for piece in physical_batches([row for _, row in some], ladder):
            at = piece.positions.tolist()
            part = engine(collate([some[row][1] for row in at], ladder.layout, piece.shape))[1]
            found |= {some[row][0]: [value[i] for value in part.values()] for i, row in enumerate(at)}
        return found

    everyone = gradients(rows)
    for out in (0, 11, 29):
        others = gradients(rows[:out] + rows[out + 1 :])
        assert others.keys() == everyone.keys() - {out}
        assert all(
            torch.equal(value, whole)
            for key, values in others.items()
            for value, whole in zip(values, everyone[key], strict=True)
        )


def test_a_gradient_that_depends_on_its_place_is_found_before_anything_is_spent(
    config: Config, monkeypatch: pytest.MonkeyPatch
) -> None:
    from dptune.privacy import engines

    class Placed(engines.HookEngine):
        def __call__(self, batch):
            losses, found = super().__call__(batch)
            scale = 1 + 1e-6 * torch.arange(len(losses)).reshape(-1, 1, 1)
            return losses, {name: value * scale for name, value in found.items()}

    monkeypatch.setitem(engines.ENGINES, "hooks", Placed)
    record = run.run(config)
    # Alone in its batch a row has no other place, and the log says why it is.
    assert record.status == "done"
    log = (Path(config.compute.output_root) / record.run_id / "run.log").read_text()
    assert "not used: engine hooks, 24 row(s) in a batch: the last bits of the gradient of" in log

    class Random(engines.HookEngine):
        def __call__(self, batch):
            losses, found = super().__call__(batch)
            return losses, {name: value * (1 + 1e-6 * torch.rand(())) for name, value in found.items()}

    monkeypatch.setitem(engines.ENGINES, "hooks", Random)
    config.environment.engine, config.environment.seed = "hooks", 5
    with pytest.raises(ConfigError, match="the last bits of the gradient of .* depend on"):
        run.run(config)
    assert not (Path(config.compute.output_root) / run_id(config)).exists()


@pytest.mark.parametrize("quantization", ["int8", "nf4"])
def test_an_adapter_of_a_rounded_backbone_opens_with_the_recorded_accuracy(config: Config, quantization: str) -> None:
    config.environment.backbone_quantization = quantization
    config.privacy.enabled, config.privacy.target_epsilon = False, None
    config.hyperparameter.learning_rate = 0.1
    record = run.run(config)
    assert record.status == "done" and record.metrics is not None, record.error
    backbone = preparation.load_backbone(config)
    assert record.provenance["backbone"] == backbone.fingerprint
    model = adapters.load_adapter(backbone.model, Path(config.compute.output_root) / record.run_id / "adapter")
    data = load_dataset(config)
    metrics, _ = measured_again(model, backbone, data)
    assert metrics.accuracy_by_task == record.metrics.accuracy_by_task
    assert metrics.response_perplexity == pytest.approx(record.metrics.response_perplexity, rel=1e-4)
    config.environment.backbone_quantization = "none"
    assert preparation.load_backbone(config).fingerprint != backbone.fingerprint


def test_an_adapter_that_changes_rounded_weights_is_refused_before_anything_is_written(config: Config) -> None:
    config.adapter.name, config.environment.backbone_quantization = "full", "nf4"
    with pytest.raises(ConfigError, match="adapter=full changes .* is rounded to nf4; set environment.backbone_quant"):
        run.run(config)
    assert not Path(config.compute.output_root).exists()


@pytest.mark.parametrize("device", ["cuda:63", "abacus"])
def test_a_device_that_is_not_there_is_named(config: Config, device: str) -> None:
    config.compute.device = device
    with pytest.raises(ConfigError, match=f"compute.device={device} cannot be used here") as caught:
        run.run(config)
    assert "\n" not in str(caught.value) and not Path(config.compute.output_root).exists()


SIZE = {"vocab_size": 300, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2}
SMALL = {
    "gpt2": lambda: seeded("GPT2LMHeadModel", 0, vocab_size=300, n_positions=128, n_embd=16, n_layer=2, n_head=2),
    "qwen2": lambda: seeded("Qwen2ForCausalLM", 0, **SIZE, num_key_value_heads=1, tie_word_embeddings=True),
    "qwen3": lambda: seeded("Qwen3ForCausalLM", 0, **SIZE, num_key_value_heads=1),
    "olmo2": lambda: seeded("Olmo2ForCausalLM", 0, **SIZE, num_key_value_heads=1),
    "gpt_neox": lambda: seeded("GPTNeoXForCausalLM", 0, **SIZE),
    "bert": lambda: seeded("BertForMaskedLM", 0, **SIZE),
    "t5": lambda: seeded(
        "T5ForConditionalGeneration",
        0,
        **{"vocab_size": 300, "d_model": 16, "d_kv": 8, "d_ff": 24, "num_layers": 2, "num_heads": 2},
        decoder_start_token_id=0,
    ),
}
"""Random models of other architectures, with the special tokens that their configs have by themselves."""


@pytest.mark.parametrize("kind", ["gpt2", "qwen2", "qwen3", "olmo2", "gpt_neox"])
def test_other_causal_models_are_trained_privately(kind: str, config: Config, tokenizer, tmp_path: Path) -> None:
    """Each passes the check of its engine against the loop, or training would have been refused."""
    SMALL[kind]().save_pretrained(tmp_path / kind)
    tokenizer.save_pretrained(tmp_path / kind)
    config.model.path = str(tmp_path / kind)
    record = run.run(config)
    assert record.status == "done", record.error


def test_a_model_that_reads_ahead_is_no_decoder(config: Config, tokenizer, tmp_path: Path) -> None:
    """It says that it is one, as converted encoders do."""
    model = seeded("BertLMHeadModel", 0, **SIZE, is_decoder=False)
    model.save_pretrained(tmp_path / "bert")
    tokenizer.save_pretrained(tmp_path / "bert")
    config.model.path = str(tmp_path / "bert")
    with pytest.raises(ConfigError, match="reads ahead"):
        run.run(config)
    assert not Path(config.compute.output_root).exists()


@pytest.mark.parametrize("kind", ["bert", "t5"])
def test_encoders_and_encoder_decoders_are_trained_privately(
    kind: str, config: Config, tokenizer, tmp_path: Path
) -> None:
    reader = copy.deepcopy(tokenizer)
    reader.add_special_tokens({"mask_token": "<unk>", "cls_token": "<eos>"})
    SMALL[kind]().save_pretrained(tmp_path / kind)
    reader.save_pretrained(tmp_path / kind)
    config.model.path = str(tmp_path / kind)
    if kind == "bert":
        with pytest.raises(ConfigError, match=r"cannot write, and date, email, order_number .* leave it out with data"):
            run.run(config)
        assert not Path(config.compute.output_root).exists()
        config.data.tasks = sorted({example.task for example in load_dataset(config).test if example.options})
    record = run.run(config)
    assert record.status == "done" and record.privacy is not None, record.error
    assert record.guarantee.epsilon is not None and record.guarantee.epsilon <= 8
    assert record.metrics is not None and record.metrics.n_by_task == record.zero_shot.n_by_task


def test_an_engine_that_is_wrong_is_found_before_anything_is_spent(
    config: Config, monkeypatch: pytest.MonkeyPatch
) -> None:
    from dptune.privacy import engines

    class Doubled(engines.HookEngine):
        def __call__(self, batch):
            losses, found = super().__call__(batch)
            return losses, {name: 2 * value if ".o_proj." in name else value for name, value in found.items()}

    monkeypatch.setitem(engines.ENGINES, "hooks", Doubled)
    config.environment.engine = "hooks"
    with pytest.raises(ConfigError, match=r"o_proj.* differs from the loop"):
        run.run(config)
    assert not list(Path(config.compute.output_root).glob("*/record.json"))


def test_noise_keys_follow_data_plan_and_run(config: Config) -> None:
    """The same seed must not draw the same noise for anything else: the difference would cancel it."""
    from dptune.privacy.streams import Purpose

    def key(**changes: object) -> str:
        prepared = preparation.set_up(config, str(changes.pop("identity", "one")))
        return prepared.keys.key_hash(Purpose.NOISE, 0)

    first = key()
    assert key() == first and key(identity="two") != first
    config.data.seed = 1
    other_data = key()
    config.data.seed, config.hyperparameter.max_grad_norm = 0, 0.7
    assert len({first, other_data, key()}) == 3


def test_bad_records_are_skipped_for_the_holders_eyes_only(config: Config, tmp_path: Path) -> None:
    path = tmp_path / "mine.jsonl"
    rows = [
        {"instruction": "say", "input": f"message {index}", "output": "yes" if index else ""} for index in range(60)
    ]
    splits = ["train"] * 50 + ["test"] * 10
    path.write_text(
        "".join(json.dumps({**row, "split": split}) + "\n" for row, split in zip(rows, splits, strict=True))
    )
    config.data.name, config.data.path, config.data.train_size = "files", str(path), None
    with pytest.raises(ConfigError, match=r"mine.jsonl: line 1: field 'output' is empty"):
        run.run(config)
    config.data.on_bad = "skip"
    said: list[str] = []
    record = run.run(config, report=said.append)
    folder = Path(config.compute.output_root) / record.run_id
    assert record.status == "done", record.error
    assert any("1 records were skipped" in line for line in said)
    assert "line 1" in (folder / "NON_PRIVATE_skipped.txt").read_text()
    for name in ("record.json", "run.log"):
        assert "were skipped" not in (folder / name).read_text()


def test_conversations_are_trained_on_and_their_number_is_for_the_holders_eyes_only(
    config: Config, tmp_path: Path
) -> None:
    path = tmp_path / "mine.jsonl"
    turns = [("human", "hi"), ("gpt", "hello"), ("human", "and now ?"), ("gpt", "bye")]
    path.write_text(
        "".join(
            json.dumps({"conversations": [{"from": role, "value": f"{text} {at}"} for role, text in turns]}) + "\n"
            for at in range(177)
        )
    )
    config.data.name, config.data.path, config.data.train_size = "files", str(path), None
    said: list[str] = []
    record = run.run(config, report=said.append)
    assert record.status == "done", record.error
    assert said[0] == "NON_PRIVATE, for this terminal alone: 177 conversations, 4.0 turns, roles user/assistant"
    folder = Path(config.compute.output_root) / record.run_id
    assert record.provenance["layout"] == "conversations"
    for file in folder.rglob("*"):
        assert not file.is_file() or b"177 conversations" not in file.read_bytes(), file


def test_a_record_that_is_too_long_is_an_error_when_asked_for(config: Config) -> None:
    config.data.on_long, config.environment.sequence_length = "error", 12
    with pytest.raises(ConfigError, match="tokens"):
        run.run(config)
    assert not Path(config.compute.output_root).exists()


def test_a_chat_template_that_is_not_there_is_named(config: Config) -> None:
    config.data.template = "chat"
    with pytest.raises(ConfigError, match="no chat template; use data.template=plain"):
        run.run(config)
    assert not Path(config.compute.output_root).exists()


def test_what_a_checkpoint_says_of_sampling_is_left_out(config: Config, tokenizer, tmp_path: Path) -> None:
    import transformers as t

    model = SMALL["qwen2"]()
    model.generation_config = t.GenerationConfig(do_sample=True, temperature=0.5, repetition_penalty=1.5)
    model.save_pretrained(tmp_path / "qwen2")
    tokenizer.save_pretrained(tmp_path / "qwen2")
    config.model.path = str(tmp_path / "qwen2")
    loaded = backbones.load_backbone(config.model, precision="float32", device="cpu", cache_dir=tmp_path).model
    settings = loaded.generation_config
    assert settings.repetition_penalty in (None, 1.0) and not settings.do_sample


def test_free_form_text_has_bleu_and_rouge(config: Config, tmp_path: Path) -> None:
    rows = [
        {"instruction": "describe", "input": str(n // 2), "output": f"the cat {n} sat on a mat", "split": split}
        for split, count in (("train", 30), ("test", 10))
        for n in range(count)
    ]
    (tmp_path / "texts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    config.data.name, config.data.path, config.data.public = "texts", str(tmp_path / "texts.jsonl"), True
    config.evaluation.prompts, config.evaluation.max_new_tokens = 3, 8
    record = run.run(config)
    assert record.metrics is not None and record.zero_shot is not None, record.error
    assert record.metrics.n == 6
    for metrics in (record.metrics, record.zero_shot):
        (task,) = metrics.accuracy_by_task
        assert metrics.bleu is not None and metrics.bleu_by_task == {task: metrics.bleu}
        assert metrics.rouge_l is not None and metrics.rouge_l_by_task == {task: metrics.rouge_l}
    folder = Path(config.compute.output_root) / record.run_id
    assert not [path for path in folder.glob("*.json*") if "the cat" in path.read_text()]

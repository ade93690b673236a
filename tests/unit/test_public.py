"""The start from public data: what it depends on, what it may not know, how it is kept, and what is said of it."""

import dataclasses
import json
from collections.abc import Iterator
from copy import deepcopy
from pathlib import Path
from random import Random
from typing import Any

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from dptune.cli import main
from dptune.config.adapters import ADAPTERS
from dptune.config.checks import from_values, strict, with_values
from dptune.config.schema import PRETRAINED_ON, SHIPPED, Config, ConfigError, DataConfig, public_sources
from dptune.data import supportdesk
from dptune.data.batches import collate, example_losses
from dptune.data.relabel import Relabelling
from dptune.data.schema import Example
from dptune.data.sources import StartSource, load_dataset, start_sources
from dptune.identity import run_id
from dptune.models import adapters
from dptune.models.peft_adapters import frozen_factors, two_sided_layers
from dptune.privacy.streams import KeyRing, Purpose
from dptune.records.record import ADAPTER_FOLDER
from dptune.runs import public
from dptune.runs.public import WEIGHTS_FILE, Start, start_from_public
from dptune.runs.run import run
from dptune.runs.setup import load_backbone, set_up

SMALL = {
    "model.name": "nano",
    "data.train_size": 40,
    "data.validation_size": 5,
    "data.test_size": 20,
    "hyperparameter.steps": 2,
    "hyperparameter.warmup_steps": 0,
    "hyperparameter.expected_batch_size": 10,
    "public.method": "joint_meta",
    "public.data": {name: DataConfig(organisation=name, train_size=60) for name in ("acorn", "beacon")},
    "public.steps": 3,
    "public.batch_size": 6,
    "public.meta_steps": 3,
    "public.inner_steps": 2,
}


def small(folder: Path, **values: Any) -> Config:
    """A small run; `public__seed` is `public.seed`."""
    made = with_values(Config(), SMALL.items())
    made.compute.cache_dir, made.compute.output_root = str(folder / "cache"), str(folder / "outputs")
    return with_values(made, [(name.replace("__", "."), value) for name, value in values.items()])


def start_of(config: Config, said: list[str] | None = None) -> Start:
    """The start of a run, without the rest of its set-up."""
    backbone = load_backbone(config)
    coins = KeyRing.reproducible(config.public.seed, "public").stream(Purpose.INIT)
    model = adapters.attach(backbone.model, config.adapter, rank=4, steps=2, seed=coins.seed())
    sources = start_sources(config, load_dataset(config))
    return start_from_public(config, sources, backbone, model, [].append if said is None else said.append)


def records(path: Path, texts: Iterator[str] | list[str]) -> str:
    rows = [{"instruction": "Is it good?", "input": text, "output": "yes", "split": "train"} for text in texts]
    rows += [{**rows[0], "input": f"held {split}", "split": split} for split in ("validation", "test")]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def on_files(folder: Path, private: str, other: str) -> Config:
    made = small(folder, public__data={"other": DataConfig(name="other", path=other)})
    made.data = dataclasses.replace(made.data, name="mine", path=private, train_size=None)
    return made


def test_the_same_config_makes_the_same_start_to_the_last_bit(tmp_path: Path) -> None:
    once = start_of(small(tmp_path / "a"))
    again = start_of(small(tmp_path / "b", environment__seed=7))
    assert once.digest == again.digest and once.folder.name == again.folder.name
    assert (once.folder / WEIGHTS_FILE).read_bytes() == (again.folder / WEIGHTS_FILE).read_bytes()


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("public.seed", 1),
        ("public.learning_rate", 0.02),
        ("public.relabel", 0.9),
        ("public.inner_steps", 3),
        ("public.method", "meta"),
        ("public.data.acorn.seed", 1),
        ("public.data.acorn.organisation", "cypress"),
        ("adapter.alpha", 16.0),
    ],
)
def test_another_recipe_is_another_start_and_another_run(name: str, value: Any, tmp_path: Path) -> None:
    usual = small(tmp_path)
    other = with_values(usual, [(name, value)])
    assert run_id(usual) != run_id(other)
    assert start_of(usual).digest != start_of(other).digest


def test_without_a_start_the_recipe_names_nothing(tmp_path: Path) -> None:
    cold = small(tmp_path, public__method="none", public__data={})
    identities = {run_id(cold), run_id(with_values(cold, [("public.steps", 7), ("public.seed", 3)]))}
    assert identities == {run_id(dataclasses.replace(cold, public=type(cold.public)()))}
    assert not public_sources(cold.public)


def test_a_private_record_has_no_part_in_the_start(tmp_path: Path) -> None:
    other = records(tmp_path / "other.jsonl", [f"public text {i}" for i in range(20)])
    starts = []
    for at, last in enumerate(("a secret", "quite another one")):
        mine = records(tmp_path / f"mine{at}.jsonl", [*(f"private text {i}" for i in range(20)), last])
        starts.append(start_of(on_files(tmp_path / str(at), mine, other)))
    assert starts[0].digest == starts[1].digest


def test_public_records_that_are_protected_are_refused_however_they_are_written(tmp_path: Path) -> None:
    mine = records(tmp_path / "mine.jsonl", [f"private text {i}" for i in range(20)])
    other = records(tmp_path / "other.jsonl", [*(f"public text {i}" for i in range(20)), "PRIVATE  text, 7"])
    with pytest.raises(ConfigError, match=r"public\.data\.other shares records with data=mine") as caught:
        start_of(on_files(tmp_path, mine, other))
    assert "7" not in str(caught.value)


def test_a_public_file_is_named_by_its_content_under_the_local_key(tmp_path: Path) -> None:
    mine = records(tmp_path / "mine.jsonl", ["private text"])
    usual = on_files(tmp_path, mine, records(tmp_path / "a.jsonl", ["one", "two"]))
    moved = on_files(tmp_path, mine, records(tmp_path / "b.jsonl", ["one", "two"]))
    changed = on_files(tmp_path, mine, records(tmp_path / "c.jsonl", ["one", "three"]))
    assert run_id(usual) == run_id(moved) != run_id(changed)
    found = start_sources(usual, load_dataset(usual))["other"]
    assert found.fingerprint != found.hash_with(b"") and found.label == "a.jsonl"


def test_a_start_that_is_interrupted_is_gone_and_goes_on_from_the_stage_before(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config, whole = small(tmp_path), start_of(small(tmp_path / "other"))
    learn, calls = public._Pupil.learn, []

    def interrupted(self: Any, rows: Any, optimizer: torch.optim.Optimizer) -> torch.Tensor:
        calls.append(type(optimizer).__name__)
        if len(calls) == 5:
            raise KeyboardInterrupt
        return learn(self, rows, optimizer)

    monkeypatch.setattr(public._Pupil, "learn", interrupted)
    with pytest.raises(KeyboardInterrupt):
        start_of(config)
    kept = [item for item in (tmp_path / "cache" / "public").iterdir() if item.is_dir()]
    assert len(kept) == 1 and calls == ["AdamW"] * 3 + ["Adam"] * 2
    assert start_of(config).digest == whole.digest
    assert calls[5:] == ["Adam"] * 6
    start_of(config)
    assert len(calls) == 11, "a start that is kept is not made again"


def test_joint_training_is_shared_by_the_methods_that_begin_with_it(tmp_path: Path) -> None:
    start_of(small(tmp_path, public__method="joint"))
    before = set((tmp_path / "cache" / "public").iterdir())
    start_of(small(tmp_path))
    assert len([item for item in set((tmp_path / "cache" / "public").iterdir()) - before if item.is_dir()]) == 1


def test_a_start_that_was_changed_on_the_disk_is_refused(tmp_path: Path) -> None:
    config = small(tmp_path, public__method="joint")
    file = start_of(config).folder / WEIGHTS_FILE
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(content)
    with pytest.raises(ConfigError, match="is damaged: remove it"):
        start_of(config)
    file.write_bytes(content[:100])
    with pytest.raises(ConfigError, match="is damaged: remove it"):
        start_of(config)


def test_training_that_diverges_is_said_and_not_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def diverge(self: Any, rows: Any, optimizer: torch.optim.Optimizer) -> torch.Tensor:
        next(iter(self.parameters.values())).data.fill_(torch.nan)
        return torch.tensor(torch.nan)

    monkeypatch.setattr(public._Pupil, "learn", diverge)
    with pytest.raises(ConfigError, match=r"public\.learning_rate: training on public data diverged"):
        start_of(small(tmp_path))
    assert not [item for item in (tmp_path / "cache" / "public").iterdir() if item.is_dir()]


def test_how_far_it_is_and_the_time_left_are_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(public, "SAID_EVERY", 0.0)
    said: list[str] = []
    start_of(small(tmp_path), said)
    assert len(said) == 6 and said[0].startswith("start from public data (joint): step 1/3  loss ")
    assert said[3].startswith("start from public data (meta): step 1/3") and said[3].endswith("s left")


@pytest.mark.parametrize("name", [name for name, kind in ADAPTERS.items() if kind.after_step is not None])
def test_an_adapter_that_changes_its_shape_is_refused_in_one_line(name: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=f"adapter={name}, which changes its shape") as caught:
        small(tmp_path, adapter__name=name)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("name", ["ffa_lora", "lora_xs", "vera", "houlsby", "prompt", "full"])
def test_other_adapters_start_from_public_data_too(name: str, tmp_path: Path) -> None:
    config = small(tmp_path, adapter__name=name, public__learning_rate=1e-3, public__inner_learning_rate=1e-3)
    backbone = load_backbone(config)
    model = adapters.attach(backbone.model, config.adapter, rank=4, steps=2, seed=0)
    fresh = {key: value.detach().clone() for key, value in adapters.trainable_parameters(model).items()}
    start_from_public(config, start_sources(config, load_dataset(config)), backbone, model, [].append)
    taught = adapters.trainable_parameters(model)
    assert taught.keys() == fresh.keys()
    assert any(not torch.equal(value, fresh[key]) for key, value in taught.items())


def test_bases_span_what_another_answer_changes(tmp_path: Path) -> None:
    """The frozen factors turn to it, are orthonormal, and stay frozen; the core starts at zero."""
    config = small(tmp_path, adapter__name="lora_xs", public__method="basis", public__batch_size=4)
    config.public.data = {"acorn": DataConfig(organisation="acorn", tasks=["policy"])}
    backbone = load_backbone(config)
    model = adapters.attach(backbone.model, config.adapter, rank=4, steps=2, seed=0)
    fresh = {key: value.detach().clone() for key, value in frozen_factors(model).items()}
    sources = start_sources(config, load_dataset(config))
    start = start_from_public(config, sources, backbone, model, [].append)
    found = frozen_factors(model)
    assert found.keys() == fresh.keys() and all(not torch.equal(value, fresh[key]) for key, value in found.items())
    assert all(not value.any() for value in adapters.trainable_parameters(model).values())
    assert not any(value.requires_grad for name, value in model.named_parameters() if ".latent." not in name)
    assert load_file(start.folder / WEIGHTS_FILE).keys() == {*found, *adapters.trainable_parameters(model)}

    # What is left of the counterfactual gradient of one class, in the bases and in those of the weights.
    layer, pupil = two_sided_layers(model)[-1], public._Pupil(config, backbone, model, sources, print)
    examples, options = public._classes(pupil)[0]
    layer.weight.requires_grad_(True)
    gradients = []
    for option in options:
        rows = pupil.rows([dataclasses.replace(example, output=option) for example in examples])
        loss = example_losses(model, collate(rows, backbone.layout)).mean()
        gradients.append(torch.autograd.grad(loss, layer.weight)[0])
    changes = torch.stack(gradients) - torch.stack(gradients).mean(dim=0)
    down, up = (next(name for name, value in found.items() if value is factor) for factor in layer.factors)
    kept = []
    for factors in (found, fresh):
        left, right = torch.linalg.qr(factors[up]).Q, torch.linalg.qr(factors[down].T).Q
        kept.append(float((left @ (left.T @ changes @ right) @ right.T).norm() / changes.norm()))
    assert kept[0] > 0.99 and kept[1] < 0.2
    torch.testing.assert_close(found[down] @ found[down].T, torch.eye(4), atol=1e-5, rtol=0)


def test_bases_need_tasks_with_options(tmp_path: Path) -> None:
    values = {"adapter__name": "lora_xs", "public__method": "basis"}
    config = small(tmp_path, **values)
    config.public.data["acorn"].tasks = config.public.data["beacon"].tasks = ["date"]
    with pytest.raises(ConfigError, match="public=basis needs public tasks with options"):
        start_of(config)
    with pytest.raises(ConfigError, match="public=basis is for adapter=lora_xs, not for adapter=lora"):
        small(tmp_path, public__method="basis")
    with pytest.raises(ConfigError, match="backbone_quantization=int8 rounds"):
        small(tmp_path, environment__backbone_quantization="int8", **values)


def test_by_default_nothing_of_dev_or_of_the_private_organisation_is_in_it(tmp_path: Path) -> None:
    config = small(tmp_path, public__data={})
    found = start_sources(config, load_dataset(config))
    assert found.keys() == set(PRETRAINED_ON) == set(supportdesk.PUBLIC_ORGANISATIONS)
    examples = [example for source in found.values() for example in source.examples]
    assert {(example.user or "").split("-")[0] for example in examples} == set(PRETRAINED_ON)
    own = [wording for task in supportdesk.TASKS.values() for wording in (*task.train, *task.held_out)]
    names = [*PRETRAINED_ON, *supportdesk.OTHER_NAMES, "fjord", "garnet"]
    assert not {example.instruction for example in examples} & {w.format(desk=name) for w in own for name in names}


def test_names_that_are_put_in_are_nobody_s_and_no_answer() -> None:
    taken = {*supportdesk.ORGANISATIONS, *supportdesk._DESKS.values()}
    words = {word for task in supportdesk.TASKS.values() for answer in task.answers for word in answer.split("/")}
    assert not {*supportdesk.OTHER_NAMES} & (taken | words)
    example = supportdesk.generate("acorn", train=1, validation=0, test=0)["train"][0]
    for at in range(len(supportdesk.OTHER_NAMES)):
        other = supportdesk.renamed(example, at / len(supportdesk.OTHER_NAMES))
        assert supportdesk.OTHER_NAMES[at] in other.instruction and "acorn" not in other.instruction


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"public.data.acorn.organisation": "private"}, "public.data.acorn.organisation=private stands for data to"),
        (
            {"public.data.acorn.organisation": "dev", "data.organisation": "dev"},
            "is what data.organisation=dev protect",
        ),
        ({"data.organisation": "acorn"}, "data.organisation=acorn: the embedded backbones were pretrained on it"),
        ({"public.data.acorn.public": False}, "public.data.acorn.public=false: a start is made of public data alone"),
        ({"public.data.acorn.name": "files"}, "needs public.data.acorn.path="),
        ({"public.data.acorn.train_size": 0}, "public.data.acorn.train_size=0 must be at least 1"),
        ({"public.data.acorn.organisation": "acme"}, "public.data.acorn.organisation=acme is not one of"),
        ({"public.data.acorn.typo": 1}, "unknown key public.data.acorn.typo"),
        ({"public.method": "none"}, "public.data is given, but public=none uses none"),
        ({"public.method": "jiont"}, "did you mean joint"),
    ],
)
def test_what_cannot_be_a_start_is_refused_in_one_line(values: dict[str, Any], message: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError) as caught:
        with_values(small(tmp_path), values.items())
    assert message in str(caught.value) and "\n" not in str(caught.value)


def test_sources_are_read_from_a_tree_and_from_a_record(tmp_path: Path) -> None:
    config = small(tmp_path)
    assert from_values(dataclasses.asdict(config)) == config == strict(dataclasses.asdict(config))
    tree = dataclasses.asdict(config)
    tree["public"]["data"]["acorn"]["typo"] = 1
    with pytest.raises(ConfigError, match=r"unknown key public\.data\.acorn\.typo"):
        strict(tree)


def test_a_source_without_training_records_is_named(tmp_path: Path) -> None:
    other = tmp_path / "other.jsonl"
    other.write_text(json.dumps({"instruction": "q", "output": "a", "split": "test"}) + "\n")
    config = small(tmp_path, public__data={"other": DataConfig(name="other", path=str(other))})
    with pytest.raises(ConfigError, match=r"public\.data\.other: .* has no training records"):
        start_of(config)


def example(task: str, output: str, options: tuple[str, ...] | None) -> Example:
    return Example(task, "q", f"{task} {output}", options, output, None, "train")


ONE = [example("mood", word, ("sun", "rain", "fog")) for word in ("sun", "rain", "fog")]
ONE += [example("ok", word, ("yes", "no")) for word in ("yes", "no")]
OTHER = [example("mood", word, ("hail", "snow", "wind")) for word in ("hail", "snow", "wind")]
OTHER += [example("ok", word, ("fine", "never")) for word in ("fine", "never")]
FREE = [example("copy", "text", None), example("quiz", "a", ("a", "b")), example("quiz", "c", ("c", "d"))]


def test_answers_are_renamed_one_to_one_to_public_answers_of_the_same_task() -> None:
    relabelling, coins = Relabelling([[*ONE, *FREE], OTHER]), Random(0)
    seen: dict[str, set[tuple[str, ...]]] = {"mood": set(), "ok": set()}
    for _ in range(2000):
        made = relabelling.drawn([*ONE, *FREE], coins)
        assert made[5:] == FREE, "free form, and options that are another list in each record, stay as they are"
        for task, rows in (("mood", made[:3]), ("ok", made[3:5])):
            answers = tuple(row.output for row in rows)
            assert len(set(answers)) == len(rows) and all(row.output in (row.options or ()) for row in rows)
            seen[task].add(answers)
    assert len(seen["mood"]) == 6 * 5 * 4 and {word for each in seen["mood"] for word in each} == {
        *("sun", "rain", "fog", "hail", "snow", "wind")
    }
    assert seen["ok"] == {("yes", "no"), ("no", "yes"), ("fine", "never"), ("never", "fine")}
    assert relabelling.drawn(ONE, Random(1)) == relabelling.drawn(ONE, Random(1))


def test_of_a_single_source_the_lessons_are_its_tasks() -> None:
    one = StartSource(DataConfig(), [*ONE, *FREE], None)
    assert [{row.task for row in lesson.examples} for lesson in public._lessons({"one": one})] == [
        *({"copy"}, {"mood"}, {"ok"}, {"quiz"})
    ]
    assert public._lessons({"one": one, "other": one}) == [one, one]


def test_a_run_says_what_it_started_from_and_its_adapter_opens_with_peft(tmp_path: Path) -> None:
    """Without steps the adapter is the start; the floor is that of the backbone."""
    config = small(tmp_path, hyperparameter__steps=0)
    record, cold = run(config), run(with_values(config, [("public.method", "none"), ("public.data", {})]))
    assert record.status == cold.status == "done"
    used = record.provenance["public"]
    words = (
        "120 public records (supportdesk acorn, supportdesk beacon), by joint training, then meta-learning (Reptile)"
    )
    assert used["in_words"] == words and used["records"] == 120 and used["sources"].keys() == {"acorn", "beacon"}
    assert "public" not in cold.provenance
    assert record.zero_shot == cold.zero_shot == cold.metrics != record.metrics

    assert record.guarantee is not None and cold.guarantee is not None
    assert record.guarantee.public_data == words and record.guarantee.epsilon == 0
    assert dataclasses.replace(record.guarantee, public_data="") == cold.guarantee
    folder = Path(config.compute.output_root) / record.run_id / ADAPTER_FOLDER
    assert f"The adapter started from {words}: nothing protects these." in (folder / "GUARANTEE.md").read_text()

    opened = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(SHIPPED / "nano"), folder)
    start = load_file(start_of(config).folder / WEIGHTS_FILE)
    assert used["start"] == start_of(config).digest
    named = dict(opened.named_parameters())
    assert start and all(torch.equal(named[name], value) for name, value in start.items())


def test_training_goes_on_from_the_start_and_its_keys_are_named_by_it(tmp_path: Path) -> None:
    config = small(tmp_path)
    setup = set_up(config, run_id(config), [].append)
    assert setup.start is not None and setup.start.digest in setup.keys.run
    weights = load_file(setup.start.folder / WEIGHTS_FILE)
    assert all(torch.equal(value, weights[key]) for key, value in adapters.trainable_parameters(setup.model).items())
    assert run(config).status == "done"


def test_the_command_makes_the_start_that_a_run_uses(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = small(tmp_path, public__method="joint", public__data={})
    arguments = [f"compute.cache_dir={tmp_path}/cache", f"compute.output_root={tmp_path}/outputs", "public=joint"]
    arguments += [f"{name}={value}" for name, value in SMALL.items() if name not in ("public.method", "public.data")]
    main(["public", *(item.replace("model.name=", "model=") for item in arguments)])
    printed = capsys.readouterr().out
    assert printed.startswith(str(tmp_path / "cache" / "public")) and "16,000 public records" in printed
    assert Path(printed.split()[0]) == set_up(config, "x", pytest.fail).start.folder  # type: ignore[union-attr]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "public=none makes nothing"),
        (["joint"], "give key=value only"),
        (["public=join"], "did you mean joint?"),
        (["public=joint", "+public.data.mine.path=x"], "name the source first, as in +data@public.data.mine=files"),
    ],
)
def test_the_command_without_a_method_says_what_to_choose(
    arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as caught:
        main(["public", *arguments])
    assert caught.value.code == 2 and message in capsys.readouterr().err


def test_a_config_is_copied_with_its_sources(tmp_path: Path) -> None:
    config = small(tmp_path)
    other = with_values(deepcopy(config), [("public.data.acorn.seed", 5)])
    assert config.public.data["acorn"].seed == 0 and other.public.data["acorn"].seed == 5
    assert SMALL["public.data"]["acorn"].seed == 0  # type: ignore[index]

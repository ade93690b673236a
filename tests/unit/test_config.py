import dataclasses
import json
import re
from pathlib import Path

import pytest
from hydra import compose, initialize_config_dir
from hydra.core.override_parser.overrides_parser import OverridesParser
from omegaconf import OmegaConf

from dptune.config.checks import from_values, strict, with_values
from dptune.config.schema import Config, ConfigError, noise_mode
from dptune.identity import keep_local_key, run_id
from dptune.sweeps.expand import without_hydra
from dptune.sweeps.jobs import ROOT


def tree(*overrides: str):
    return OmegaConf.merge(OmegaConf.create(dataclasses.asdict(Config())), OmegaConf.from_dotlist(list(overrides)))


def test_the_defaults_are_a_config() -> None:
    assert strict(tree()) == Config() == from_values(dataclasses.asdict(Config()))


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("privacy.epsilom=3", "unknown key privacy.epsilom; did you mean privacy"),
        ("privacy.target_epsilon=-1", "privacy.target_epsilon=-1 must be above 0"),
        ("privacy.target_epsilon=.inf", "privacy.target_epsilon=inf must be"),
        ("privacy.delta=1", "privacy.delta=1 must be above 0 and below 1"),
        ("privacy.clipping=flta", "privacy.clipping=flta is not one of .*did you mean flat"),
        ("hyperparameter.steps=many", "hyperparameter.steps: Value 'many'"),
        ("hyperparameter.steps=-1", "hyperparameter.steps=-1 must be at least 0"),
        ("hyperparameter.steps=0", "leaves nothing of hyperparameter.steps=0"),
        ("hyperparameter.expected_batch_size=9999", "is above the 4000 training records"),
        ("hyperparameter.warmup_steps=50", "leaves nothing of hyperparameter.steps=50"),
        (
            "privacy.noise_multiplier=1.0",
            "exactly one of privacy.target_epsilon and privacy.noise_multiplier",
        ),
        ("privacy.enabled=false", "privacy.target_epsilon=8 with privacy=none"),
        ("privacy.unit=user_els", "needs privacy.examples_per_user"),
        ("privacy.examples_per_user=4", "privacy.examples_per_user is for users"),
        ("data.name=jsonl", "data=jsonl needs data.path"),
        ("adapter.dropout=0.1", "adapter.dropout=0.1 would be noise that the privacy plan did not draw"),
        ("data.path=nowhere.jsonl", "data=supportdesk is embedded"),
        ("data.hub_id=some/data", "data.hub_id is given but data=supportdesk is embedded"),
        ("data.splits=[train:learn]", "data.splits: train:learn is not SOURCE:OURS, with one of train, validation"),
        ("data.task_weights=[1]", "data.task_weights must have one number for each of data.tasks"),
        ("data={tasks: [intent], task_weights: [0]}", "data.task_weights must be above 0"),
        ("data_sensitivity.class_imbalance=0.5", "data_sensitivity.class_imbalance=0.5 must be at least 1"),
        ("privacy.projection=private", "paid for with privacy.projection_noise_multiplier"),
        ("environment.backbone_quantization=int4", "int4 is not one of none, int8, nf4"),
        ("model.name=local", "model=local needs model.path"),
        ("model.path=nowhere", "model.path=nowhere is no model"),
    ],
)
def test_a_wrong_config_is_one_line_that_names_the_field(override: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message) as caught:
        strict(tree(override))
    assert "\n" not in str(caught.value)


def test_run_id_changes_with_numbers_only() -> None:
    base = run_id(strict(tree()))
    assert base == run_id(strict(tree("compute.threads=7", "tracking.name=wandb", "method=x", "sweep=y")))
    assert base != run_id(strict(tree("environment.seed=1")))
    assert base != run_id(strict(tree("privacy.allocation_ema=0.5")))
    assert run_id(strict(tree("hyperparameter.learning_rate=1e-2"))) == run_id(
        strict(tree("hyperparameter.learning_rate=0.01"))
    )


def test_run_id_follows_the_content_of_a_file_not_its_place(tmp_path: Path) -> None:
    one, same, other = (tmp_path / name for name in ("one.jsonl", "same.jsonl", "other.jsonl"))
    one.write_text("a")
    same.write_text("a")
    other.write_text("b")
    here = ["data.name=jsonl", "data.train_size=null", f"compute.output_root={tmp_path / 'outputs'}"]
    ids = [run_id(strict(tree(f"data.path={path}", *here))) for path in (one, same, other)]
    assert ids[0] == ids[1] != ids[2]
    # Naming writes nothing; what makes runs keeps the key, under which the names stay.
    assert not (tmp_path / "outputs").exists()
    assert not keep_local_key(strict(tree(f"data.path={one}", *here)))
    assert run_id(strict(tree(f"data.path={one}", *here))) == ids[0]
    # The key stays beside the runs; under another one the same file has another name.
    key = tmp_path / "outputs" / ".fingerprint-key"
    assert len(key.read_bytes()) == 32 and key.stat().st_mode & 0o077 == 0
    key.write_bytes(bytes(32))
    assert run_id(strict(tree(f"data.path={one}", *here))) != ids[0]


def test_a_file_that_was_changed_has_another_name_in_the_same_process(tmp_path: Path) -> None:
    file = tmp_path / "data.jsonl"
    file.write_text("a")
    config = strict(tree("data.name=jsonl", "data.train_size=null", f"data.path={file}", "data.public=true"))
    before = run_id(config)
    file.write_text("ab")
    assert run_id(config) != before


def test_noise_of_private_data_is_secure_unless_told_otherwise(tmp_path: Path) -> None:
    file = tmp_path / "data.jsonl"
    file.write_text("{}")
    assert noise_mode(strict(tree())) == "reproducible"
    assert noise_mode(strict(tree("data.name=jsonl", f"data.path={file}"))) == "secure"
    assert noise_mode(strict(tree("privacy.noise_mode=secure"))) == "secure"


def test_noise_that_can_be_computed_again_is_refused_on_private_data_unless_somebody_says_so(tmp_path: Path) -> None:
    file = tmp_path / "data.jsonl"
    file.write_text("{}")
    private = ["data.name=jsonl", f"data.path={file}", "privacy.noise_mode=reproducible"]
    with pytest.raises(ConfigError, match="privacy.allow_known_noise=true") as caught:
        strict(tree(*private))
    assert "\n" not in str(caught.value)
    assert noise_mode(strict(tree(*private, "privacy.allow_known_noise=true"))) == "reproducible"
    assert noise_mode(strict(tree(*private, "data.public=true"))) == "reproducible"
    with pytest.raises(ConfigError, match="allow_known_noise"):
        strict(tree("data.public=false", "privacy.noise_mode=reproducible"))
    assert noise_mode(strict(tree("data.public=false"))) == "secure"


@pytest.mark.parametrize("name", ["plain_hashes", "diagnostics"])
def test_what_tells_about_single_records_needs_public_ones(tmp_path: Path, name: str) -> None:
    file = tmp_path / "data.jsonl"
    file.write_text("{}")
    private = ["data.name=jsonl", f"data.path={file}", f"data.{name}=true"]
    with pytest.raises(ConfigError, match=f"data.{name}=true would tell about single private records"):
        strict(tree(*private))
    strict(tree(*private, "data.public=true"))


@pytest.mark.parametrize("name", ["privacy.allow_known_noise", "data.plain_hashes", "data.diagnostics"])
def test_a_permission_names_a_run_only_when_it_is_given(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    group, _, leaf = name.partition(".")
    hashed: list[str] = []
    monkeypatch.setattr(json, "dumps", lambda value, **_: hashed.append(repr(value)) or hashed[-1])
    given = strict(tree())
    before = run_id(given)
    setattr(getattr(given, group), leaf, True)
    assert run_id(given) != before
    assert [f"'{leaf}': True" in text for text in hashed] == [False, True] and leaf not in hashed[0]


def test_a_key_of_another_length_is_refused(tmp_path: Path) -> None:
    """An empty one would make plain hashes of private records, and sign nothing."""
    file, root = tmp_path / "data.jsonl", tmp_path / "outputs"
    file.write_text("{}")
    root.mkdir()
    (root / ".fingerprint-key").write_bytes(b"")
    with pytest.raises(ConfigError, match="fingerprint-key must have 32 bytes"):
        run_id(strict(tree("data.name=jsonl", f"data.path={file}", f"compute.output_root={root}")))


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (("adapter.name=full", "environment.precision=bfloat16"), "adapter=full trains the backbone's own weights"),
        (("adapter.name=pst", "environment.backbone_quantization=nf4"), "backbone_quantization=nf4 rounds"),
        (("adapter.name=prompt", "adapter.top_layers=1"), "adapter.top_layers has no meaning for adapter=prompt"),
    ],
)
def test_what_cannot_be_on_any_backbone_is_said_before_one_is_loaded(overrides: tuple[str, ...], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        strict(tree(*overrides))


def test_values_put_on_a_shared_config_make_what_composing_makes() -> None:
    """Types, lists, null and nested fields; an unknown key and a wrong type are the same error."""
    overrides = [
        "hyperparameter.learning_rate=1",
        "adapter.target_modules=[q_proj,v_proj]",
        "data.columns.instruction='=Say {text}'",
        "privacy.target_epsilon=null",
        "privacy.noise_multiplier=1.5",
        "data.task_weights=null",
    ]
    with initialize_config_dir(str(ROOT / "conf"), version_base="1.3"):
        shared, slow = (strict(without_hydra(compose("config", given))) for given in ([], overrides))
    values = [(item.key_or_group, item.value()) for item in OverridesParser.create().parse_overrides(overrides)]
    assert with_values(shared, values) == slow
    assert isinstance(with_values(Config(), values).hyperparameter.learning_rate, float)
    for name, value, message in (
        ("hyperparameter.steps", "many", "hyperparameter.steps: Value 'many'"),
        ("hyperparameter.stepz", 3, "unknown key hyperparameter.stepz; did you mean hyperparameter.steps?"),
        ("nothing.here", 3, "unknown key nothing.here"),
        ("hyperparameter.steps", -1, "hyperparameter.steps=-1 must be at least 0"),
    ):
        with pytest.raises(ConfigError, match=re.escape(message)):
            with_values(Config(), [(name, value)])

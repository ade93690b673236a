from pathlib import Path

import pytest

from dptune import sweep
from dptune.config import EMBEDDED, Config, ConfigError, run_id, strict
from dptune.sweep import ROOT, expand, load, without_hydra

SWEEPS = sorted(str(path.relative_to(ROOT / "sweeps").with_suffix("")) for path in (ROOT / "sweeps").rglob("*.yaml"))
FILES = ("files", "sst2", "intent", "sgd_domain", "e2e", "irc")
HUB_MODELS = sorted(
    path.stem for path in (ROOT / "conf" / "model").glob("*.yaml") if path.stem not in (*EMBEDDED, "local")
)
CHOICES = sorted(
    f"{path.parent.relative_to(ROOT / 'conf')}={path.stem}"
    for path in (ROOT / "conf").rglob("*.yaml")
    if path.parent != ROOT / "conf" and "hydra" not in path.parts
)


def test_axes_are_joined_and_the_reference_is_one_job() -> None:
    jobs = expand({"seed": "0,1"}, [{}, {"lr": "0.1,0.2"}, {"rank": 2}], [])
    assert [job for job, _ in jobs] == [
        ["seed=0"],
        ["seed=1"],
        ["seed=0", "lr=0.1"],
        ["seed=0", "lr=0.2"],
        ["seed=1", "lr=0.1"],
        ["seed=1", "lr=0.2"],
        ["seed=0", "rank=2"],
        ["seed=1", "rank=2"],
    ]
    assert jobs[2][1] == ["seed=0", "lr=0.1"]


def test_the_command_line_wins_over_the_file() -> None:
    jobs = expand({"seed": "0,1"}, [{}, {"lr": "0.1,0.2"}], ["seed=7", "lr=0.3,0.4"])
    assert jobs == [(["seed=7", "lr=0.3"], ["lr=0.3"]), (["seed=7", "lr=0.4"], ["lr=0.4"])]


@pytest.mark.parametrize("name", SWEEPS)
def test_every_sweep_composes_and_says_how_many_runs_it_has(name: str) -> None:
    jobs = load(name)
    header = (ROOT / "sweeps" / f"{name}.yaml").read_text().split("\ndefaults")[0]
    assert f"Runs:         {len(jobs)}" in header
    assert "Claim tested:" in header and f"make sweep SWEEP={name}" in header
    assert len({job.run_id for job in jobs}) == len(jobs)
    assert all(job.config.sweep == name for job in jobs)


@pytest.mark.parametrize("choice", CHOICES)
def test_every_choice_of_every_group_composes(choice: str) -> None:
    from hydra import compose, initialize_config_dir

    group, _, name = choice.partition("=")
    # A choice that needs a path says so; the path of this file stands in for it.
    lacking = {"model=local": "model", **{f"data={name}": "data" for name in FILES}}
    lacking |= {f"model={name}": "model" for name in HUB_MODELS}
    extra = [f"{lacking[choice]}.path=x"] if choice in lacking else []
    with initialize_config_dir(str(ROOT / "conf"), version_base="1.3"):
        tree = compose("config", [choice, *extra])
    if extra:
        with pytest.raises(ConfigError, match="is no model|is not a file"):
            strict(without_hydra(tree))
    else:
        config = strict(without_hydra(tree))
        part = getattr(config, group)
        # Several files of conf/adapter set one kind of adapter differently.
        assert group == "adapter" or part == name or getattr(part, "name", name) == name


@pytest.mark.parametrize("name", HUB_MODELS)
def test_a_model_of_the_hub_is_pinned_and_without_network_one_clear_error(
    name: str, model_folder: Path, tmp_path: Path
) -> None:
    from hydra import compose, initialize_config_dir

    from dptune.models.backbones import load as load_model

    def composed(*overrides: str) -> Config:
        return strict(without_hydra(compose("config", [f"model={name}", *overrides])))

    with initialize_config_dir(str(ROOT / "conf"), version_base="1.3"):
        with pytest.raises(ConfigError, match=r"model.revision is missing: set model.revision=<commit>"):
            composed()
        with pytest.raises(ConfigError, match="model.revision main is no full commit"):
            composed("model.revision=main")
        pinned, local = composed(f"model.revision={'0' * 40}"), composed(f"model.path={model_folder}")
        moved = composed(f"model.path={model_folder}", "model.revision=main")
    with pytest.raises(ConfigError, match=rf"model.repo={pinned.model.repo} cannot be read from the Hub") as caught:
        load_model(pinned.model, precision="float32", device="cpu", cache_dir=tmp_path)
    assert "\n" not in str(caught.value) and not list(tmp_path.iterdir())
    # A local path is what is loaded: what would have come from the Hub does not name the run.
    assert run_id(local) == run_id(moved) != run_id(pinned)


def test_an_unknown_sweep_is_an_error() -> None:
    from hydra.errors import HydraException

    with pytest.raises(HydraException, match="sweeps/nope"):
        load("nope")


def test_a_job_that_cannot_run_stops_the_sweep_before_it_starts() -> None:
    with pytest.raises(ConfigError, match="above the 512 training records"):
        load("smoke", ["hyperparameter.expected_batch_size=64,600"])


def test_configs_and_sweeps_are_found_from_any_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert len(load("smoke")) == 4
    assert sweep.ROOT.is_absolute()

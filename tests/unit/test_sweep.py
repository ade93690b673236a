import dataclasses
import re
from pathlib import Path

import pytest
from hydra import initialize_config_dir
from hydra.core.global_hydra import GlobalHydra

from dptune.config.checks import strict
from dptune.config.schema import EMBEDDED, Config, ConfigError
from dptune.identity import run_id
from dptune.report.claims import FEWEST_SEEDS, TESTS
from dptune.report.effects import FEWEST_CONDITIONS
from dptune.sweeps import expand as sweep
from dptune.sweeps import jobs, readme
from dptune.sweeps.expand import expand, grid, included, jobs_of_sweep, names, parts, without_hydra
from dptune.sweeps.jobs import ROOT

FILES = (
    *("files", "sst2", "intent", "sgd_domain", "e2e", "irc"),
    *("chat", "sharegpt", "task_json", "oasst_trees", "squad_json"),
)
HUB_MODELS = sorted(
    path.stem for path in (ROOT / "conf" / "model").glob("*.yaml") if path.stem not in (*EMBEDDED, "local")
)
CHOICES = sorted(
    f"{path.parent.relative_to(ROOT / 'conf')}={path.stem}"
    for path in (ROOT / "conf").rglob("*.yaml")
    if path.parent != ROOT / "conf" and "hydra" not in path.parts
)


@pytest.fixture(autouse=True)
def places(model_folder: Path, tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    """What sweeps on files are told by the environment."""
    folder = tmp_path_factory.mktemp("data")
    for source in ("sst2", "bigbench", "sgd", "e2e", "irc"):
        (folder / f"{source}.jsonl").write_text(source)
    monkeypatch.setenv("DPTUNE_MODEL", str(model_folder))
    monkeypatch.setenv("DPTUNE_DATA", str(folder))


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


def test_a_sweep_on_files_says_which_path_is_not_given(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as patch:
        patch.delenv("DPTUNE_MODEL")
        with pytest.raises(ConfigError, match=r"model.path: .* DPTUNE_MODEL is not set; set it, or give model.path="):
            jobs_of_sweep("real/sst2")
    monkeypatch.setenv("DPTUNE_DATA", str(tmp_path))
    with pytest.raises(ConfigError, match=r"data.path=.*sst2\* is not a file"):
        jobs_of_sweep("real/sst2")


def test_sweeps_in_folders_are_found() -> None:
    assert {"smoke", "hyperparameter/rank", "environment/seed", "data_sensitivity/fraction"} <= set(names())


@pytest.mark.parametrize("name", names())
def test_every_sweep_composes_and_says_how_many_runs_it_has(name: str) -> None:
    jobs = jobs_of_sweep(name)
    head = readme.header(name)
    assert head.claim and head.time and head.runs == len(jobs)
    assert f"make sweep SWEEP={name}" in head.command
    assert len({job.run_id for job in jobs}) == len(jobs)
    assert all(job.config.sweep == name for job in jobs)


def test_the_page_of_the_sweeps_is_what_their_headers_make(tmp_path: Path) -> None:
    now = (ROOT / "sweeps" / "README.md").read_text(encoding="utf-8")
    again = tmp_path / "README.md"
    again.write_text(re.sub(rf"(?s)(?<={readme.BEGIN}).*(?={readme.END})", "of yesterday", now), encoding="utf-8")
    readme.main(again)
    assert again.read_text(encoding="utf-8") == now, "make sweeps-readme makes it again"
    assert sorted(re.findall(r"^\| \[([^\]]+)\]", now, re.MULTILINE)) == names()


def test_a_page_without_its_marks_and_a_file_without_its_header_are_refused(folder: Path) -> None:
    with pytest.raises(ConfigError, match="stands between two lines"):
        readme.page("# Sweeps\n")
    write(folder / "bare.yaml", "", "axes: [{}]")
    with pytest.raises(ConfigError, match=r"sweeps/bare.yaml: its header must say `Claim tested"):
        readme.table()


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A place for sweeps of one's own, with the groups of the real ones."""
    (tmp_path / "conf").symlink_to(ROOT / "conf")
    (tmp_path / "sweeps" / "some").mkdir(parents=True)
    for module in (sweep, jobs):
        monkeypatch.setattr(module, "ROOT", tmp_path)
    return tmp_path / "sweeps"


def write(path: Path, body: str, sweeper: str) -> None:
    name = path.parts[path.parts.index("sweeps") + 1 :]
    head = f"# @package _global_\nsweep: {'/'.join(name).removesuffix('.yaml')}\n"
    path.write_text(f"{head}{body}\nhydra: {{sweeper: {{{sweeper}}}}}\n")


def test_a_sweep_may_be_made_of_others(folder: Path) -> None:
    layers = "adapter: {target_modules: [v_proj, down_proj], top_layers: null}\ndata: {train_size: 900}"
    write(
        folder / "some" / "rank.yaml", layers, 'params: {environment.seed: "0,1"}, axes: [{}, {hyperparameter.rank: 2}]'
    )
    write(folder / "some" / "seed.yaml", "", 'axes: [{environment.seed: "0,5"}, {hyperparameter.rank: 9}]')
    write(folder / "both.yaml", "", "axes: [{privacy: none}], include: [some/rank, some/seed]")
    write(folder / "all.yaml", "", "include: [both, some/seed]")
    write(folder / "set.yaml", "", "params: {hyperparameter.rank: 3, environment.seed: 7}, include: [some/seed]")

    ids = {name: [job.run_id for job in jobs_of_sweep(name)] for name in names()}
    assert ids["all"] == ids["both"] and ids["both"][1:] == ids["some/rank"] + ids["some/seed"]
    assert {job.config.sweep for job in jobs_of_sweep("all")} == {"all"}
    assert jobs_of_sweep("both")[1].config.adapter.target_modules == ["v_proj", "down_proj"]
    assert included("some/seed") == [{"environment.seed": "0,5"}, {"hyperparameter.rank": 9}]

    own = [(job.config.hyperparameter.rank, job.config.environment.seed) for job in jobs_of_sweep("set")]
    assert own == [(3, 0), (3, 5), (9, 7)], "an axis of an included file wins over `params`"
    told = [
        (job.config.hyperparameter.rank, job.config.environment.seed)
        for job in jobs_of_sweep("set", ["environment.seed=1"])
    ]
    assert told == [(3, 1), (9, 1)], "the command line wins over all"

    assert parts("all") == ["both", "some/seed"] and parts("both") == ["both"] and parts("some/rank") == ["some/rank"]


def test_what_cannot_be_included_is_an_error(folder: Path) -> None:
    write(folder / "groups.yaml", "defaults: [override /hyperparameter: smoke]", "axes: [{}]")
    write(folder / "one.yaml", "", "include: [groups]")
    write(folder / "two.yaml", "", "include: [some/nope]")
    with pytest.raises(ConfigError, match="sweeps=groups cannot be included"):
        jobs_of_sweep("one")
    with pytest.raises(ConfigError, match="sweeps=some/nope does not exist; sweeps can be: groups, one, two"):
        jobs_of_sweep("two")


def test_the_reference_is_the_same_run_in_all_dimensions() -> None:
    """Records of one dimension serve the others, so that claims compare under equal conditions."""
    dimensions = ("hyperparameter/rank", "environment/sequence_length", "data_sensitivity/fraction", "tasks")
    shared = set.intersection(*({job.run_id for job in jobs_of_sweep(name)} for name in dimensions))
    assert len(shared) == 2 * 3, "uniform and adaptive noise, three seeds"


@pytest.mark.parametrize(
    ("name", "field"),
    [
        ("hyperparameter/learning_rate", "hyperparameter"),
        ("environment/sequence_length", "environment"),
        ("data_sensitivity/label_noise", "data_sensitivity"),
    ],
)
def test_a_claim_about_stability_finds_its_conditions(name: str, field: str) -> None:
    conditions: dict[str, dict[str, set[int]]] = {"uniform": {}, "adaptive": {}}
    for job in jobs_of_sweep(name, ["privacy.target_epsilon=8"] if name.endswith("rate") else []):
        if job.config.privacy.enabled:
            group = dataclasses.asdict(getattr(job.config, field)) | {"seed": None}
            seeds = conditions[job.config.privacy.name].setdefault(repr(group), set())
            seeds.add(job.config.environment.seed)
    assert conditions["uniform"] == conditions["adaptive"]
    assert len(conditions["adaptive"]) >= FEWEST_CONDITIONS
    assert all(len(seeds) >= FEWEST_SEEDS for seeds in conditions["adaptive"].values())


def test_the_sweeps_that_would_decide_a_claim_exist() -> None:
    said = [re.search(r"`make sweep SWEEP=(\S+)`", test.needs) for test in TESTS]
    assert {match[1] for match in said if match} <= set(names()) and sum(match is not None for match in said) >= 6


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

    from dptune.models.backbones import load_backbone as load_model

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
        jobs_of_sweep("nope")


def test_a_job_that_cannot_run_stops_the_sweep_before_it_starts() -> None:
    with pytest.raises(ConfigError, match="above the 512 training records"):
        jobs_of_sweep("smoke", ["hyperparameter.expected_batch_size=64,600"])


def test_configs_and_sweeps_are_found_from_any_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert len(jobs_of_sweep("smoke")) == 4
    assert sweep.ROOT.is_absolute()


def test_an_expanded_sweep_is_remembered_until_a_file_or_the_question_changes(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cache = tmp_path / "cache"
    for name in ("part", "other"):
        write(folder / f"{name}.yaml", "", 'axes: [{environment.seed: "0,1"}]')
    arguments = [f"compute.cache_dir={cache}", "hyperparameter.steps=7"]
    first = jobs_of_sweep("part", arguments)
    assert len(list((cache / "sweeps").iterdir())) == 1

    def refuse(*_: object) -> None:
        raise AssertionError("composed again")

    with monkeypatch.context() as patch:
        patch.setattr("dptune.sweeps.expand._composed_jobs", refuse)
        assert jobs_of_sweep("part", arguments) == first
        for asked in (["part", [*arguments, "environment.seed=9"]], ["other", arguments]):
            with pytest.raises(AssertionError, match="composed again"):
                jobs_of_sweep(*asked)
        damaged = next((cache / "sweeps").iterdir())
        damaged.write_text("[{")
        with pytest.raises(AssertionError, match="composed again"):
            jobs_of_sweep("part", arguments)
    assert jobs_of_sweep("part", arguments) == first
    (folder / "part.yaml").write_text(
        (folder / "part.yaml").read_text().replace("sweep: part", "sweep: part\nmethod: x")
    )
    assert {job.config.method for job in jobs_of_sweep("part", arguments)} == {"x"}


def test_a_sweep_on_a_file_is_not_remembered(folder: Path, tmp_path: Path) -> None:
    file, cache = tmp_path / "data.jsonl", tmp_path / "cache"
    write(folder / "part.yaml", "", 'axes: [{environment.seed: "0,1"}]')
    arguments = ["data=files", f"data.path={file}", "data.public=true", f"compute.cache_dir={cache}"]
    ids = []
    for text in ("{}", "[]\n"):
        file.write_text(text)
        ids.append([job.run_id for job in jobs_of_sweep("part", arguments)])
    assert ids[0] != ids[1] and not cache.exists()


def test_a_glob_stands_for_the_choices_of_a_group() -> None:
    with initialize_config_dir(str(ROOT / "conf"), version_base="1.3"):
        jobs = grid(["adapter=glob(lora*)", "environment.seed=0,1"], GlobalHydra.instance().config_loader())
    assert ["adapter=lora_xs", "environment.seed=1"] in jobs and len(jobs) == 10

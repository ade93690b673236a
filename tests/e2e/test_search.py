"""A search: what it releases, what it keeps secret, and that it is the same search after an interruption."""

import dataclasses
import hashlib
import json
import math
import shutil
import signal
from collections import Counter
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from processes import Started, dptune
from test_launchers import sweep
from test_resume import lines, wait_for

from dptune.config.checks import strict
from dptune.config.schema import Config, ConfigError
from dptune.identity import run_id
from dptune.privacy.accounting import epsilon
from dptune.privacy.events import Event
from dptune.privacy.renyi import optimum, renyi_curve
from dptune.privacy.selection import Repetitions, epsilon_best, score_event
from dptune.records import frame
from dptune.records.record import RunFailed, RunRecord
from dptune.report.composition import compositions
from dptune.report.results import load_results as results
from dptune.runs import run
from dptune.runs.budget import TOKEN_FILE, accounts_of
from dptune.runs.privacy import make_plan
from dptune.runs.search import DRAW_FILE, SECRET_FOLDER, Draw, Search, trial_is_done
from dptune.runs.setup import data_of
from dptune.sweeps import status
from dptune.sweeps.expand import jobs_of_sweep
from dptune.sweeps.jobs import ROOT, Job

pytestmark = pytest.mark.numerical


def with_values(config: Config, **values: dict[str, Any]) -> Config:
    """A copy of a config with some fields of its groups changed."""
    parts = {group: dataclasses.replace(getattr(config, group), **changes) for group, changes in values.items()}
    return dataclasses.replace(config, **parts)


def search_of(config: Config, mean: float = 3.0, eta: float = math.inf, **privacy: Any) -> Search:
    """A search among two learning rates."""
    config = with_values(config, privacy={"score_noise_multiplier": 2.0, **privacy})
    configs = [with_values(config, hyperparameter={"learning_rate": rate}) for rate in (0.02, 0.3)]
    bare = with_values(config, hyperparameter={"steps": 0, "warmup_steps": 0}, privacy={"score_noise_multiplier": None})
    jobs = [Job(run_id(item), item, ("compute.output_root=x",), ()) for item in (*configs, bare)]
    return Search((jobs[0], jobs[1]), Repetitions(mean, eta), jobs[2])


def draw(search: Search, candidates: list[int], seeds: list[int]) -> None:
    """Decide what a search tries."""
    search.secret.mkdir(parents=True)
    content = {"begun": "2026-01-01T00:00:00+00:00", "candidates": candidates, "seeds": seeds}
    (search.secret / DRAW_FILE).write_text(json.dumps(content))


def tried(search: Search) -> list[RunRecord]:
    """Do the trials."""
    search.check()
    return [run.run(job.config, job.overrides) for job in search.trials()]


def released(search: Search) -> RunRecord:
    """Finish the search."""
    assert search.release() is not None
    (record,) = frame.read_all(search.root)
    assert record.run_id == search.released.run_id == search.folder.name
    return record


def scores(found: list[RunRecord]) -> list[float]:
    return [record.privacy.score for record in found if record.privacy and record.privacy.score is not None]


def test_the_best_score_is_released_and_nothing_tells_which_trial_it_was(config: Config) -> None:
    search = search_of(config)
    draw(search, [1, 0, 1], [11, 12, 13])
    found = tried(search)
    assert [record.config["environment"]["seed"] for record in found] == [11, 12, 13]
    assert [record.config["hyperparameter"]["learning_rate"] for record in found] == [0.3, 0.02, 0.3]
    assert len(set(scores(found))) == 3
    best = found[scores(found).index(max(scores(found)))]
    record = released(search)
    assert (record.privacy, record.metrics, record.cost) == (best.privacy, best.metrics, best.cost)
    # Whoever knows the cost of this trial alone knows nothing of what it cost to choose it.
    assert record.guarantee is not None and record.guarantee.of_search
    assert record.guarantee.epsilon == search.epsilon > best.guarantee.epsilon
    history = [json.loads(line) for line in (search.folder / "history.jsonl").read_text().splitlines()]
    assert [row["epsilon"] for row in history] == [None] * 3
    assert record.config["environment"] == best.config["environment"]
    assert record.provenance["started"] == "2026-01-01T00:00:00+00:00" and record.provenance["overrides"] == [
        f"environment.seed={best.config['environment']['seed']}"
    ]
    files = [path for path in search.folder.rglob("*") if path.is_file()]
    assert not any(SECRET_FOLDER.encode() in path.read_bytes() for path in files)
    assert {"record.json", "history.jsonl", "evaluation.jsonl", "ledger.jsonl"} <= {path.name for path in files}
    assert "run.log" not in {path.name for path in files}


def test_the_record_says_what_the_search_cost(config: Config) -> None:
    search = search_of(config)
    draw(search, [0], [5])
    tried(search)
    record = released(search)
    assert record.privacy is not None and record.privacy.noise_multiplier is not None
    trained, score = [Event(record.privacy.noise_multiplier, 0.1, 3)], [Event(2.0, 1.0)]
    stated = record.provenance["repetitions"]
    assert stated["candidates"] == [[vars(event) for event in trained], [vars(event) for event in score]]
    curve = Repetitions(3.0, math.inf).renyi_curve(renyi_curve(trained))  # the larger one at every order
    assert "epsilon" not in stated and record.guarantee is not None
    assert record.guarantee.epsilon == search.epsilon == optimum(curve, 1e-5)[0] > epsilon(trained, 1e-5)
    (procedure,) = compositions(results(search.root).runs)
    assert procedure.epsilon == pytest.approx(search.epsilon)


def test_the_sweep_file_costs_what_it_says() -> None:
    (job,) = jobs_of_sweep("tune")
    plan = make_plan(job.config, data_of(job.config))
    noise = job.config.privacy.score_noise_multiplier
    assert noise is not None
    assert 7.9 < epsilon_best([plan.events(), [score_event(noise)]], Repetitions(8.0, math.inf), plan.delta) <= 8
    assert "Here 8 for the whole search" in (ROOT / "sweeps" / "tune.yaml").read_text()


def test_no_view_sees_a_trial(config: Config) -> None:
    search = search_of(config)
    draw(search, [0, 0], [1, 2])
    job = search.released
    tried(search)
    assert len(list(search.secret.rglob("record.json"))) == 2 and not len(results(search.root).runs)
    assert "1 missing" in (said := status.of_sweep("tune", [job], [])) and "the search is not finished" in said
    released(search)
    assert len(results(search.root).runs) == 1
    assert "1 done" in status.of_sweep("tune", [job], [])


def test_failed_trials_have_the_worst_score_and_are_not_done_again(config: Config) -> None:
    search = search_of(config)
    draw(search, [0, 0], [1, 2])
    found = tried(search)
    order = sorted(range(2), key=scores(found).__getitem__)
    jobs = search.trials()
    for left, index in zip((1, 0), reversed(order), strict=True):
        folder = Path(jobs[index].config.compute.output_root) / jobs[index].run_id
        dataclasses.replace(found[index], status="failed", error="x").write(folder)
        assert all(trial_is_done(job) for job in jobs)
        if left:
            record = released(search)
            assert record.privacy is not None and record.privacy.score == min(scores(found))
            shutil.rmtree(search.folder)
    with pytest.raises(RunFailed, match="every trial failed, nothing is released"):
        search.release()
    assert not search.folder.exists()


@pytest.mark.parametrize("what", ["all of it", "its folder", "its record"])
def test_a_trial_that_is_removed_is_not_done_again(config: Config, what: str) -> None:
    search = search_of(config, noise_mode="secure")
    draw(search, [0, 0], [config.environment.seed] * 2)
    tried(search)
    job = search.trials()[1]
    folder = Path(job.config.compute.output_root) / job.run_id
    if what == "its record":
        (folder / "record.json").unlink()
    else:
        shutil.rmtree(folder if what == "its folder" else folder.parent)
    with pytest.raises(ConfigError, match="was begun, and its record is gone: a trial of a search is done once"):
        run.run(job.config, job.overrides)
    assert search.release() is None


def test_without_any_trial_the_backbone_is_released(config: Config) -> None:
    search = search_of(config)
    draw(search, [], [])
    tried(search)
    record = released(search)
    assert record.metrics == record.zero_shot and record.privacy is not None
    assert record.privacy.steps == 0 and record.privacy.score is None
    assert record.guarantee is not None and record.guarantee.epsilon == search.epsilon
    (procedure,) = compositions(results(search.root).runs)
    assert procedure.epsilon == pytest.approx(search.epsilon)


def test_trials_on_private_data_share_nothing_but_the_key_of_their_names(
    config: Config, monkeypatch: pytest.MonkeyPatch
) -> None:
    search = search_of(with_values(config, data={"public": False}))
    runs = (search.candidates[0].run_id,) * 2
    drawn = Draw("2026-01-01T00:00:00+00:00", (0, 0), (config.environment.seed,) * 2, runs)
    monkeypatch.setattr(Search, "_drawn", lambda _: drawn)
    found = tried(search)
    assert found[0].run_id == found[1].run_id == search.candidates[0].run_id
    assert {record.provenance["data"] for record in found} == {data_of(search.candidates[0].config).fingerprint}
    assert scores(found)[0] != scores(found)[1]
    adapters = [path.read_bytes() for path in search.secret.rglob("adapter_model.safetensors")]
    assert len(adapters) == 2 and adapters[0] != adapters[1]
    record = released(search)
    assert record.cost is None and record.privacy is not None and record.privacy.noise_mode == "secure"
    # Exact numbers of records are not told: nothing was paid for them.
    assert record.privacy.score is not None and record.privacy.score_of is None


def test_the_draw_is_made_once_and_follows_the_seed(config: Config, tmp_path: Path) -> None:
    search = search_of(config, mean=8.0)
    first = search.trials()
    assert first == search.trials() and search.secret.parent.stat().st_mode & 0o777 == 0o700
    elsewhere = search_of(with_values(config, compute={"output_root": str(tmp_path / "other")}), mean=8.0)
    assert [job.run_id for job in elsewhere.trials()] == [job.run_id for job in first]
    other = search_of(with_values(config, environment={"seed": 1}), mean=8.0)
    assert other.released.run_id != search.released.run_id
    assert len({job.config.environment.seed for job in first}) == len(first)
    secure = [search_of(config, mean=30.0, noise_mode="secure")._drawn() for _ in range(2)]
    assert secure[0].candidates != secure[1].candidates


@pytest.fixture
def private(config: Config, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Search:
    """A search on private data, that has drawn its trials."""
    monkeypatch.setenv("DPTUNE_HOME", str(tmp_path / "home"))
    search = search_of(with_values(config, data={"public": False}), mean=30.0)
    assert search.trials() == search.trials()
    return search


def only(folder: Path, *names: str) -> None:
    """Remove all but some files of a folder."""
    for path in folder.iterdir():
        if path.name not in names:
            shutil.rmtree(path) if path.is_dir() else path.unlink()


def test_a_draw_that_is_lost_is_not_drawn_again(private: Search) -> None:
    trials, text = private.trials(), (private.secret / DRAW_FILE).read_bytes()
    (private.secret / DRAW_FILE).unlink()
    with pytest.raises(ConfigError, match="search.json is gone, although its trials are there.*put it back, or remove"):
        private.trials()
    only(private.secret, TOKEN_FILE)  # There are no trials either, but it was drawn.
    with pytest.raises(ConfigError, match="search.json is gone, although it was drawn"):
        private.trials()
    assert not (private.secret / DRAW_FILE).exists()
    (private.secret / DRAW_FILE).write_bytes(text)
    assert private.trials() == trials


def test_a_search_that_is_removed_and_drawn_again_is_booked_again(private: Search) -> None:
    shutil.rmtree(private.secret)
    private.trials()
    (account,) = accounts_of()
    assert [booking.run for booking in account.bookings] == [private.released.run_id] * 2
    assert len(account.draws) == 2


def test_a_run_that_hides_in_the_folder_of_a_search_is_refused(private: Search, tmp_path: Path) -> None:
    """Trials are not booked: whatever else is in their folder would be free."""
    trial = private.trials()[0]
    own = Path(trial.config.compute.output_root)
    places = {
        own.parent / "99": "is no trial of a search",
        own.parent / "x": "is no trial of a search",
        tmp_path / SECRET_FOLDER / "search" / "0": "search.json is gone|is not what was drawn",
    }
    for place, why in places.items():
        config = with_values(trial.config, compute={"output_root": str(place)})
        with pytest.raises(ConfigError, match=why):
            run.run(config)
    cheaper = with_values(trial.config, privacy={"target_epsilon": 8.5})
    with pytest.raises(ConfigError, match="is no trial of a search"):
        run.run(cheaper)
    assert run.run(trial.config, trial.overrides).status == "done"


def test_a_draw_that_was_written_by_hand_or_copied_is_refused(private: Search) -> None:
    path = private.secret / DRAW_FILE
    drawn = json.loads(path.read_text())
    drawn["candidates"], drawn["seeds"] = drawn["candidates"][:1], drawn["seeds"][:1]
    path.write_text(json.dumps(drawn))
    with pytest.raises(ConfigError, match="search.json is not what was drawn here"):
        private.trials()
    other = search_of(with_values(private.candidates[0].config, environment={"seed": 9}), mean=30.0)
    shutil.copytree(private.secret, other.secret)
    with pytest.raises(ConfigError, match="search.json is not what was drawn here"):
        other.trials()


def test_the_account_does_not_tell_how_many_trials_were_drawn(private: Search) -> None:
    """Whoever reads it could try all numbers, if the hash were of them alone."""
    (known,) = accounts_of()[0].draws.values()
    drawn = Draw(**json.loads((private.secret / DRAW_FILE).read_text()))
    assert len(drawn.nonce) == 32
    assert known == hash_of(drawn) != hash_of(dataclasses.replace(drawn, nonce=""))


def hash_of(drawn: Draw) -> str:
    return hashlib.sha256(f"{json.dumps(dataclasses.asdict(drawn))}\n".encode()).hexdigest()


def test_a_draw_on_public_data_is_not_made_again_beside_its_trials(config: Config) -> None:
    search = search_of(config, mean=8.0, noise_mode="secure")
    search.trials()
    (search.secret / "0").mkdir()
    (search.secret / DRAW_FILE).unlink()
    with pytest.raises(ConfigError, match="search.json is gone, although its trials are there"):
        search.trials()


def test_candidates_are_drawn_alike(config: Config) -> None:
    draws = [search_of(with_values(config, environment={"seed": seed}), mean=8.0)._drawn() for seed in range(200)]
    counts = Counter(index for item in draws for index in item.candidates)
    total = sum(counts.values())
    assert abs(total - 1600) < 4 * math.sqrt(1600) and abs(counts[0] - total / 2) < 2 * math.sqrt(total)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"privacy": {"score_noise_multiplier": None}}, "set privacy.score_noise_multiplier"),
        ({"privacy": {"enabled": False}}, "a search with privacy=none has no epsilon"),
        ({"privacy": {"delta": 1e-6}}, "privacy.delta must be the same"),
        ({"environment": {"seed": 3}}, "environment.seed must be the same"),
        ({"data": {"seed": 3}}, "data must be the same"),
        ({"data_sensitivity": {"label_noise": 0.1}}, "data_sensitivity must be the same"),
        ({"compute": {"force": True}}, "compute.force=true: a search is drawn once"),
        ({"tracking": {"name": "wandb"}}, "tracking=wandb would show losing trials"),
    ],
)
def test_what_has_no_epsilon_is_refused(config: Config, changes: dict[str, Any], message: str) -> None:
    search = search_of(config)
    changed = with_values(search.candidates[1].config, **changes)
    odd = dataclasses.replace(search, candidates=(search.candidates[0], Job("x", changed, (), ())))
    with pytest.raises(ConfigError, match=message):
        odd.check()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"privacy": {"unit": "user_els", "examples_per_user": 2}}, "one user may change many answers"),
        ({"privacy": {"enabled": False, "target_epsilon": None}}, "a non-private run cannot be chosen privately"),
    ],
)
def test_a_score_whose_proof_would_not_hold_is_refused(config: Config, changes: dict[str, Any], message: str) -> None:
    privacy = {"score_noise_multiplier": 2.0, **changes.get("privacy", {})}
    with pytest.raises(ConfigError, match=message):
        strict(dataclasses.asdict(with_values(config, **{**changes, "privacy": privacy})))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"privacy": {"score_noise_multiplier": 0.5}}, r"alone costs epsilon .*, more than the 8 of the run; take at "),
        ({"data": {"validation_size": 0}}, "needs validation records, there are none"),
    ],
)
def test_a_score_that_is_not_paid_for_stops_before_training(
    config: Config, changes: dict[str, Any], message: str
) -> None:
    scored = with_values(config, **{"privacy": {"score_noise_multiplier": 2.0}, **changes})
    with pytest.raises(ConfigError, match=message):
        run.run(scored)
    assert not list(Path(config.compute.output_root).glob("*/record.json"))


def test_the_score_counts_right_answers_on_the_validation_split(
    config: Config, monkeypatch: pytest.MonkeyPatch
) -> None:
    counted: list[int] = []

    def exact(right: int, noise_multiplier: float, keys: object) -> float:
        counted.append(right)
        return float(right)

    monkeypatch.setattr(run, "noisy_score", exact)
    judged: list[Any] = []
    judge = run.evaluation.Evaluator.__call__

    def spy(self: Any, model: Any, examples: Any, seen: Any) -> Any:
        found = judge(self, model, examples, seen)
        judged.append([examples, seen, found])
        return found

    monkeypatch.setattr(run.evaluation.Evaluator, "__call__", spy)
    scored = with_values(config, privacy={"score_noise_multiplier": 2.0}, hyperparameter={"learning_rate": 0.3})
    record = run.run(scored)
    data = data_of(scored)
    examples, seen, found = judged[-1]
    assert examples == data.validation and seen is None
    assert counted == [sum(item.correct for item in found[0])]
    assert record.privacy is not None and (record.privacy.score, record.privacy.score_of) == (counted[0], 20)
    assert record.guarantee.epsilon == max(epsilon([Event(2.0, 1.0)], 1e-5), make_plan(scored, data).epsilon())


def contents(folder: Path) -> dict[str, Any]:
    """What a released folder holds, without the times and the place where it lies."""
    record = json.loads((folder / "record.json").read_text())
    record["cost"] = record["config"]["compute"] = record["provenance"]["overrides"] = None
    record["provenance"]["started"] = None
    names = ("evaluation.jsonl", "ledger.jsonl", "adapter/adapter_model.safetensors")
    return {"record": record, **{name: (folder / name).read_bytes() for name in names}}


def has_begun(trial: Path) -> bool:
    return any(lines(path) >= 5 for path in trial.glob("*/ledger.jsonl"))


def test_an_interrupted_search_goes_on_to_the_same_result_and_is_done_once(model_folder: Path, tmp_path: Path) -> None:
    told = []
    for name in ("whole", "killed"):
        root = tmp_path / name
        command = sweep(model_folder, root, "hydra.sweeper.mean=2", "compute.checkpoint_every=1")
        command[command.index("sweeps=smoke")] = "sweeps=tune"
        (job,) = jobs_of_sweep("tune", command[2:])
        secret = root / SECRET_FOLDER / job.run_id
        secret.mkdir(parents=True)
        drawn = {"begun": "2026-01-01T00:00:00+00:00", "candidates": [3, 7], "seeds": [21, 22]}
        (secret / DRAW_FILE).write_text(json.dumps(drawn))
        if name == "killed":
            process = Started(command)
            wait_for(partial(has_begun, secret / "1"))
            process.send_signal(signal.SIGKILL)
            process.communicate()
            assert not (root / job.run_id).exists()
        done = dptune(*command)
        assert done.returncode == 0, done.stderr
        told.append(done.stdout.replace(str(root), "").rpartition("parameters trained")[0])
        assert done.stdout.count("accuracy") == 1 and "NON-PRIVATE: keep" in done.stdout
        assert len(list(secret.glob("*/*/record.json"))) == 2
    first, second = (tmp_path / name / job.run_id for name in ("whole", "killed"))
    assert contents(first) == contents(second) and told[0] == told[1]
    logs = [path.read_text() for path in (tmp_path / "killed").rglob("run.log")]
    assert sum("going on after step" in log for log in logs) == 1
    written = (second / "record.json").stat().st_mtime_ns
    shutil.rmtree(secret)
    again = dptune(*command)
    assert again.stdout == f"search {job.run_id} is finished: {second}\n"
    assert (second / "record.json").stat().st_mtime_ns == written and not secret.exists()

"""One guarantee, and every view shows that one: a run of each kind is planted, and all views are read."""

import ast
import dataclasses
import json
import math
import os
import re
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from report.planted import PLAN, config, plant
from report.test_sync import FakeWandb

from dptune.cli import main
from dptune.config.schema import TrackingConfig
from dptune.privacy.accounting import epsilon
from dptune.privacy.events import Event
from dptune.privacy.guarantee import GUARANTEE_FILE, epsilon_text, odds_text, rounded_up
from dptune.privacy.selection import Repetitions, epsilon_best, score_event
from dptune.records.mirror import WandbTracker
from dptune.records.record import Privacy, RunRecord, guarantee_of, guarantee_page, read
from dptune.report import page
from dptune.report.commands import all_tables
from dptune.report.results import history

ONE = PLAN.epsilon()
TARGET = 8.125
"""Asked for in every run that is planted, and no epsilon of any of them."""


@dataclass(frozen=True)
class Kind:
    """A planted run: what it truly guarantees, what a view might show instead, and what it must say."""

    record: RunRecord
    truth: float
    false: tuple[float, ...] = ()
    words: tuple[str, ...] = ()


def rows(*steps: int, keys: str = "a") -> list[dict[str, Any]]:
    """Lines of a ledger."""
    return [
        {"step": step, "sample_rate": PLAN.sample_rate, "noise_multiplier": 1.0, "noise_key": f"{keys}{step}"}
        for step in steps
    ]


def planted(root: Path, ledger: list[dict[str, Any]] | None = None, status: str = "done", **given: Any) -> RunRecord:
    """A run as it is on disk: its ledger, and the record that it wrote when it began or ended."""
    fields = {name: given.pop(name) for name in list(given) if "__" in name}
    made = config("uniform", 0, TARGET, **fields)
    repetitions = given.pop("repetitions", None)
    stated = {"stand_in": False, "noise_mode": "secure"} | given
    stated["plan"] = dataclasses.replace(given.get("plan", PLAN), noise_mode=stated["noise_mode"]).to_dict()
    record = plant(root, made, 0.5, 0.5, **stated)
    folder = root / record.run_id
    if ledger is not None:
        (folder / "ledger.jsonl").write_text("".join(json.dumps(row) + "\n" for row in ledger))
        os.utime(folder / "ledger.jsonl", (1, 1))
    if repetitions is not None:
        record.provenance["repetitions"] = repetitions
    record.status = status  # type: ignore[assignment]
    if status != "done":
        record.metrics, record.cost, record.error = None, None, "x" if status == "failed" else None
    record.guarantee = guarantee_of(record, folder)
    lines = [json.loads(line) for line in (folder / "history.jsonl").read_text().splitlines()]
    for line in lines if repetitions is None else ():  # A search lets no epsilon of a trial out.
        line["epsilon"] = rounded_up(steps(line["step"]))
    (folder / "history.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    (folder / "adapter").mkdir()
    (folder / "adapter" / GUARANTEE_FILE).write_text(guarantee_page(record))
    record.write(folder)
    return record


def steps(count: int, group: int = 1) -> float:
    """Epsilon of some steps of the plan, without any of the code that makes a guarantee."""
    return epsilon([Event(1.0, PLAN.sample_rate, count, group)], PLAN.delta)


def searched(root: Path) -> Kind:
    candidates = [list(PLAN.events()), [score_event(1.5)]]
    repetitions = {
        "mean": 10.0,
        "eta": "inf",
        "score_is_covered": True,
        "candidates": [[vars(event) for event in events] for events in candidates],
        "delta": PLAN.delta,
    }
    truth = epsilon_best(candidates, Repetitions(10.0, math.inf), PLAN.delta)
    record = planted(root, rows(0, 1, 2, 3), repetitions=repetitions, score_noise_multiplier=1.5)
    return Kind(record, truth, (ONE, TARGET, epsilon([score_event(1.5)], PLAN.delta)), ("best of K",))


def failed(root: Path) -> Kind:
    return Kind(planted(root, rows(0, 1, 2), "failed"), steps(3), (0.0, ONE))


def killed(root: Path) -> Kind:
    """What is on disk is what the run wrote when it began."""
    record = planted(root, [], "running")
    path = root / record.run_id / "ledger.jsonl"
    assert record.guarantee is not None and record.guarantee.epsilon == 0.0
    path.write_text("".join(json.dumps(row) + "\n" for row in rows(0, 1)) + '{"step": 2, "sam')
    return Kind(record, steps(2), (0.0, ONE, steps(3)))


def forced(root: Path) -> Kind:
    """A finished run that was begun again, and killed: its record is the old one."""
    record = planted(root, rows(0, 1, 2, 3))
    path = root / record.run_id / "ledger.jsonl"
    path.write_text(path.read_text() + "".join(json.dumps(row) + "\n" for row in rows(0, 1, keys="b")))
    os.utime(path, (1, 1))  # As in a copy: times tell nothing.
    return Kind(record, steps(6), (ONE,), ("begun more than once",))


def resumed(root: Path) -> Kind:
    """Steps that nobody saw are drawn again, for free."""
    return Kind(planted(root, rows(0, 1, 2) + rows(2, 3, keys="b")), ONE, (steps(5),))


def begun_again(root: Path) -> Kind:
    """A failed attempt, whose history was seen, and a whole one."""
    record = planted(root, rows(0, 1) + rows(0, 1, 2, 3, keys="b"), attempts=2)
    return Kind(record, steps(6), (ONE, steps(8)), ("begun more than once",))


def scored(root: Path) -> Kind:
    record = planted(root, rows(0, 1, 2, 3), privacy__score_noise_multiplier=0.5, score_noise_multiplier=0.5)
    return Kind(record, epsilon([score_event(0.5)], PLAN.delta), (ONE,))


def of_users(root: Path) -> Kind:
    plan = dataclasses.replace(PLAN, unit="user_els", examples_per_user=2)
    record = planted(root, rows(0, 1, 2, 3), plan=plan, unit="user_els", data__layout="messages")
    return Kind(record, steps(4, group=2), (ONE,), ("one user, as the training examples under their name",))


def stand_in(root: Path) -> Kind:
    return Kind(planted(root, rows(0, 1, 2, 3), stand_in=True), ONE, (), ("stand-in",))


def reproducible(root: Path) -> Kind:
    return Kind(planted(root, rows(0, 1, 2, 3), noise_mode="reproducible"), ONE, (), ("accounted, not realised",))


def duplicated(root: Path) -> Kind:
    record = planted(root, rows(0, 1, 2, 3), data_sensitivity__duplicates=0.2)
    return Kind(record, steps(4, group=2), (ONE,), ("all copies of a record",))


KINDS: dict[str, Callable[[Path], Kind]] = {
    kind.__name__: kind
    for kind in (
        *(searched, failed, killed, forced, resumed, begun_again, scored, of_users, stand_in, reproducible),
        duplicated,
    )
}
VIEWS = ("table", "tables", "figures", "page", "wandb", "card")


def shown(view: str, root: Path, kind: Kind, patch: pytest.MonkeyPatch, out: Callable[[], str]) -> str:
    """What a view says of the only run below a folder."""
    folder = root / kind.record.run_id
    if view == "table":
        main(["table", f"compute.output_root={root}"])
        main(["table", "--wide", f"compute.output_root={root}"])
        return out()
    if view == "tables":
        pytest.importorskip("great_tables", reason="make setup EXTRAS=report, or make test")
        main(["tables", f"compute.output_root={root}", f"to={root / 'to'}"])
        files = sorted((root / "to").rglob("*.*"))
        assert {path.suffix for path in files} == {".csv", ".tex", ".html"}
        return "\n".join(path.read_text() for path in files)
    if view in ("figures", "page"):
        pytest.importorskip("altair", reason="make setup EXTRAS=report, or make test")
        from dptune.report.figures import all_figures
        from dptune.report.results import load_results

        results = load_results(root)
        if view == "figures":
            return json.dumps([chart.to_dict() for chart in all_figures(results).values()])
        patch.setattr(page, "vega", lambda: "")
        made = page.page([("all", "All", results, all_tables("all", results))], results)
        (content,) = re.findall(r'<script type="application/json" id="content">(.*?)</script>', made, re.S)
        for run in json.loads(content)["runs"].values():
            curve = [step["epsilon"] for step in run["history"] if "epsilon" in step]
            assert not curve or curve[-1] == rounded_up(kind.truth)
        return re.sub(r'"history":\[.*?\]', "", made)
    if view == "wandb":
        fake = FakeWandb()
        patch.setitem(sys.modules, "wandb", fake)
        record = read(folder)
        assert record is not None
        tracker = WandbTracker(TrackingConfig(name="wandb_offline", allow_private=True), record, folder)
        for row in history(folder):
            tracker.step(row)
        tracker.finish(record)
        return json.dumps(fake.runs[0].shown | {"rows": {}}, default=vars)
    record = read(folder)
    assert record is not None
    return guarantee_page(record)


NEAR = re.compile(r"(?:ε|epsilon|privacy/epsilon)[^0-9]{0,60}?(\d+\.\d{2,})")
"""A number that is told as an epsilon."""


@pytest.mark.parametrize("view", VIEWS)
@pytest.mark.parametrize("name", KINDS)
def test_every_view_shows_the_guarantee_and_no_other_epsilon(
    name: str, view: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    kind = KINDS[name](tmp_path)
    text = shown(view, tmp_path, kind, monkeypatch, lambda: capsys.readouterr().out)
    truth = epsilon_text(kind.truth)
    if not (view == "figures" and name in ("failed", "killed")):  # Figures are of runs that have an accuracy.
        assert truth in text or str(rounded_up(kind.truth)) in text
    told = {number for number in NEAR.findall(text)} - {f"{TARGET:g}"}
    assert all(rounded_up(float(number)) == rounded_up(kind.truth) for number in told), told
    near = {f"{wrong:.{digits}f}" for wrong in kind.false if wrong and wrong != TARGET for digits in (2, 3)}
    for number in near | {"ε = 0.000" for wrong in kind.false if not wrong}:
        assert number not in text.replace(truth, ""), number


@pytest.mark.parametrize("name", KINDS)
def test_the_record_on_disk_and_its_guarantee_are_the_truth(name: str, tmp_path: Path) -> None:
    kind = KINDS[name](tmp_path)
    record = read(tmp_path / kind.record.run_id)
    assert record is not None and record.guarantee is not None
    assert record.guarantee.epsilon == pytest.approx(kind.truth, rel=1e-12)
    assert record.guarantee.delta == PLAN.delta and "zero-out" in record.guarantee.adjacency
    assert record.guarantee.not_covered and record.guarantee.composed_of


def test_what_a_guarantee_does_not_cover_is_said(tmp_path: Path) -> None:
    of = {name: " ".join(kind(tmp_path / name).record.guarantee.not_covered) for name, kind in KINDS.items()}  # type: ignore[union-attr]
    assert all("test records" in text for text in of.values())
    assert "knows the seed" in of["reproducible"] and "knows the seed" not in of["resumed"]
    assert "stated as if it were private" in of["stand_in"] and "stand-in" not in of["resumed"]
    assert "stay secret" in of["searched"] and "choice of this run" in of["resumed"]
    assert "in the examples of those" in of["of_users"] and "in the examples of those" not in of["resumed"]


def test_a_damaged_ledger_leaves_no_epsilon_to_state(tmp_path: Path) -> None:
    record = failed(tmp_path).record
    (tmp_path / record.run_id / "ledger.jsonl").write_text('{"step": 0}\n')
    found = read(tmp_path / record.run_id)
    assert found is not None and found.guarantee is not None
    assert found.guarantee.epsilon is None and "is damaged" in found.guarantee.not_covered[0]


def test_a_finished_run_did_all_its_steps_whatever_is_left_of_its_ledger(tmp_path: Path) -> None:
    assert planted(tmp_path / "a", rows(0, 1)).guarantee.epsilon >= ONE  # type: ignore[union-attr,operator]
    assert planted(tmp_path / "b", None).guarantee.epsilon == ONE  # type: ignore[union-attr]


@pytest.mark.parametrize("name", ["searched", "failed", "begun_again", "scored", "of_users"])
def test_the_page_beside_an_adapter_computes_its_epsilon_again(
    name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    kind = KINDS[name](tmp_path)
    text = (tmp_path / kind.record.run_id / "adapter" / GUARANTEE_FILE).read_text()
    (code,) = re.findall(r"```python\n(.*?)```", text, re.S)
    exec(code, {})
    assert float(capsys.readouterr().out) == pytest.approx(kind.truth, rel=1e-12)
    assert f"{odds_text(kind.truth)} times as likely" in text and "What it does not cover" in text


def test_what_people_read_is_rounded_up() -> None:
    assert epsilon_text(7.9990001) == "8.000" and epsilon_text(0.0) == "0.000"
    for value in (0.0, 0.1, 1.0, 2.5, 7.999, 13.0, 40.0, 800.0):
        text = odds_text(value).replace(",", "")
        shown = math.log(float(text)) if value < 700 else math.log(10) * int(text.partition("e")[2])
        assert value - 1e-9 <= shown + (0.01 if value < 700 else 3) and shown <= value + 0.01
    assert [odds_text(value) for value in (0.0, 1.0, 8.0)] == ["1.00", "2.72", "2,990"]


OLD = {"epsilon": 4.25, "accountants": {"rdp": {"value": 4.5, "kind": "bound"}}}


def old(root: Path, status: str = "done", **privacy: Any) -> RunRecord:
    """A record of version 1, as it is read."""
    record = planted(root, None, status)
    path = root / record.run_id / "record.json"
    content = json.loads(path.read_text()) | {"schema_version": 1}
    del content["guarantee"]
    content["privacy"] |= OLD | privacy
    path.write_text(json.dumps(content))
    found = read(root / record.run_id)
    assert found is not None and found.guarantee is not None
    return found


def test_records_of_the_first_version_are_read_with_what_they_state(tmp_path: Path) -> None:
    found = old(tmp_path / "done").guarantee
    assert found is not None and (found.epsilon, found.released) == (4.25, "adapter")
    assert found.accountants["rdp"]["value"] == 4.5
    # Of two transcripts it stated the cost of one, and of a failed run that it cost nothing.
    assert old(tmp_path / "twice", attempts=2).guarantee.epsilon == steps(8)  # type: ignore[union-attr]
    assert old(tmp_path / "failed", "failed", epsilon=0.0).guarantee.epsilon == ONE  # type: ignore[union-attr]


def test_a_search_of_the_first_version_has_its_own_epsilon(tmp_path: Path) -> None:
    kind = searched(tmp_path)
    path = tmp_path / kind.record.run_id / "record.json"
    content = json.loads(path.read_text()) | {"schema_version": 1}
    del content["guarantee"]
    content["privacy"] |= OLD
    content["provenance"]["repetitions"]["epsilon"] = 5.55
    path.write_text(json.dumps(content))
    found = read(path.parent)
    assert found is not None and found.guarantee is not None and found.guarantee.of_search
    assert found.guarantee.epsilon == kind.truth and "epsilon" not in found.provenance["repetitions"]


SOURCE = Path(page.__file__).parents[1]
PLUGINS = sorted((SOURCE.parent / "hydra_plugins").glob("*.py"))
FORMATTING = {"format", "round", "str", "repr"}


def told_epsilons(tree: ast.AST) -> Iterator[ast.expr]:
    """What a file turns into text that is called epsilon and is not the one that was asked for."""
    for node in ast.walk(tree):
        if isinstance(node, ast.FormattedValue):
            values = [node.value]
        elif isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id in FORMATTING:
            values = list(node.args[:1])
        else:
            continue
        for value in values:
            names = re.findall(r"\w*epsilon\w*", ast.unparse(value))
            if set(names) - {"target_epsilon", "epsilon_text"} and not ast.unparse(value).startswith("epsilon_text("):
                yield value


@pytest.mark.parametrize(
    "path",
    [path for path in sorted(SOURCE.rglob("*.py")) if "privacy" not in path.relative_to(SOURCE).parts[:1]] + PLUGINS,
    ids=lambda path: path.name,
)
def test_only_one_function_turns_an_epsilon_into_text(path: Path) -> None:
    tree = ast.parse(path.read_text(encoding="utf-8"))
    assert not [ast.unparse(value) for value in told_epsilons(tree)]


@pytest.mark.parametrize(
    "code", ['f"{epsilon:.3f}"', 'f"{run.epsilon}"', "format(epsilon, 'g')", "round(x.epsilon, 2)"]
)
def test_an_epsilon_that_is_formatted_by_hand_is_found(code: str) -> None:
    assert list(told_epsilons(ast.parse(code)))


def test_no_view_reads_an_epsilon_from_anywhere_but_the_guarantee() -> None:
    for path in sorted((SOURCE / "report").glob("*.py")):
        text = path.read_text(encoding="utf-8")
        assert not re.search(r"privacy\.(epsilon|accountants)\b|repetitions\.epsilon|\.epsilon\(", text), path.name
    assert not {"epsilon", "accountants"} & {item.name for item in dataclasses.fields(Privacy)}


def test_a_checkpoint_beside_a_finished_record_without_its_ledger_leaves_no_epsilon_to_state(tmp_path: Path) -> None:
    record = planted(tmp_path, rows(0, 1, 2, 3))
    folder = tmp_path / record.run_id
    (folder / "checkpoint").mkdir()
    (folder / "ledger.jsonl").unlink()
    found = read(folder)
    assert found is not None and found.guarantee is not None and found.guarantee.epsilon is None
    assert "is gone" in found.guarantee.not_covered[0]

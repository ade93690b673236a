import json
import re
import shutil
import subprocess
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
from report.planted import compare, config, plant

from dptune.cli import main

pytest.importorskip("vl_convert", reason="make setup EXTRAS=report, or make test")

CHROMIUM = next(
    (found for name in ("chromium", "google-chrome", "chromium-browser") if (found := shutil.which(name))), ""
)
needs_chromium = pytest.mark.skipif(not CHROMIUM, reason="needs chromium: apt-get install chromium")


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("page")
    compare(root / "outputs", gain=0.1, seeds=3)
    hostile = config("uniform", 9)
    hostile.data_sensitivity.name = "</script><script>document.title='broken'</script>"
    plant(root / "outputs", hostile, 0.5, 0.5)
    (root / "outputs" / "bad").mkdir()
    (root / "outputs" / "bad" / "record.json").write_text("{")
    main(["report", f"compute.output_root={root / 'outputs'}", f"to={root}"])
    return root / "report.html"


class Outline(HTMLParser):
    """Tags with their attributes."""

    def __init__(self) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))


def content(page: Path) -> dict[str, Any]:
    match = re.search(r'<script type="application/json" id="content">(.*?)</script>', page.read_text(encoding="utf-8"))
    assert match is not None
    found: dict[str, Any] = json.loads(match[1])
    return found


def test_the_page_opens_with_the_answer_and_names_what_was_left_out(page: Path) -> None:
    text = page.read_text(encoding="utf-8")
    order = [text.index(f'id="{key}"') for key in ("answer", "left-out", "claims", "sweep-planted", "runs", "how")]
    assert order == sorted(order)
    assert "Higher accuracy than the baselines at equal epsilon: supported" in text
    assert "At ε ≤ 8 (δ = 1e-05, unit example) the highest mean accuracy is" in text
    assert f"{page.parent / 'outputs' / 'bad' / 'record.json'}: not readable" in text


def test_the_page_says_how_to_make_it_again(page: Path) -> None:
    root = page.parent / "outputs"
    text = page.read_text(encoding="utf-8")
    assert f"make sweep SWEEP=planted ARGS=compute.output_root={root}" in text
    assert f"make report RECORDS={root} " in text


def test_the_page_asks_the_network_for_nothing(page: Path) -> None:
    outline = Outline()
    outline.feed(page.read_text(encoding="utf-8"))
    for tag, attributes in outline.tags:
        assert not (attributes.get("src") or "").startswith(("http", "//")), tag
        if tag == "link":
            assert attributes["href"] == "data:,"
    policy = next(attributes for tag, attributes in outline.tags if attributes.get("http-equiv"))
    assert "default-src 'none'" in str(policy["content"])


def test_every_link_leads_somewhere(page: Path) -> None:
    outline = Outline()
    outline.feed(page.read_text(encoding="utf-8"))
    ids = {attributes["id"] for _, attributes in outline.tags if "id" in attributes}
    runs = content(page)["runs"]
    for tag, attributes in outline.tags:
        if tag == "a":
            target = str(attributes["href"]).removeprefix("#")
            assert target in ids or target.removeprefix("run-") in runs, target
    assert len(runs) == 16


def test_a_run_says_in_plain_words_what_it_guarantees(page: Path) -> None:
    runs = content(page)["runs"].values()
    private = next(run for run in runs if "adaptive" in run["setting"] and run["config"]["privacy.target_epsilon"] == 1)
    # exp(1) = 2.718.
    assert "ε = 1.000 at δ = 1e-05: whatever they conclude is at most 2.72 times as likely" in private["statement"][0]
    assert any("accounted, not realised" in text for text in private["statement"])
    assert [row["loss"] for row in private["history"]] == [3.0, 1.5, 1.0, 0.75]
    assert private["results"]["accuracy"] == 0.5 and private["results"]["zero_shot.accuracy"] == 0.25
    ceiling = next(run for run in runs if "none" in run["setting"])
    assert "guarantees nothing" in ceiling["statement"][0]


def test_losses_of_private_data_stay_out_of_the_page(tmp_path: Path) -> None:
    plant(tmp_path / "outputs", config(), 0.5, 0.5, stand_in=False, noise_mode="secure")
    main(["report", f"compute.output_root={tmp_path / 'outputs'}", f"to={tmp_path}"])
    text = (tmp_path / "report.html").read_text(encoding="utf-8")
    (run,) = content(tmp_path / "report.html")["runs"].values()
    assert all("loss" not in row for row in run["history"]) and len(run["history"]) == 4
    assert "withheld" in text


def test_views_of_private_data_do_without_costs_and_name_the_records_without_a_guarantee(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    root = tmp_path / "outputs"
    for name, seed in (("uniform", 0), ("uniform", 1), ("adaptive", 0), ("none", 0)):
        record = plant(root, config(name, seed), 0.5, 0.5, stand_in=False, noise_mode="secure")
        assert record.privacy is not None
        record.cost, record.privacy.stand_in = None, False
        record.write(root / record.run_id)
    main(["report", f"compute.output_root={root}", f"to={tmp_path}"])
    text = (tmp_path / "report.html").read_text(encoding="utf-8")
    assert "There is no guarantee for the 60 records of the test split" in text and "left out: 0" not in text
    main(["tables", f"compute.output_root={root}", f"to={tmp_path / 'tables'}"])
    main(["figures", f"compute.output_root={root}", f"to={tmp_path / 'figures'}"])
    note = "Test split of private data: no guarantee for its 60 records, whose metrics are exact."
    files = [path.read_text(encoding="utf-8") for path in (tmp_path / "tables").rglob("*") if path.is_file()]
    assert any(note in file for file in files) and note in text
    plant(tmp_path / "public", config("uniform", 2), 0.5, 0.5)
    main(["tables", f"compute.output_root={tmp_path / 'public'}", f"to={tmp_path / 'other'}"])
    capsys.readouterr()
    assert not any("no guarantee" in path.read_text() for path in (tmp_path / "other").rglob("*") if path.is_file())


PROBE = """
<script>
window.problems = [];
window.addEventListener("error", (event) => problems.push(String(event.message)));
window.addEventListener("unhandledrejection", (event) => problems.push(String(event.reason)));
for (const name of ["error", "warn"]) console[name] = (...words) => problems.push(words.join(" "));
</script>
"""
ACTIONS = """
<script type="module">
const table = document.querySelector("table.sortable");
const column = () => [...table.tBodies[0].rows].map((row) => parseFloat(row.cells[2].dataset.value));
const button = table.querySelectorAll("thead button")[2];
button.click();
const up = column();
button.click();
const down = column();
const field = document.querySelector("input[data-filters]");
field.value = "adaptive epsilon=8";
field.dispatchEvent(new Event("input"));
const kept = [...table.tBodies[0].rows].filter((row) => !row.hidden).length;
location.hash = document.querySelector('a[href^="#run-"]').getAttribute("href");
const drawn = () => document.querySelectorAll("[data-figure] svg").length;
const figures = document.querySelectorAll("[data-figure]").length;
for (let turn = 0; turn < 300 && drawn() < figures; turn++) await new Promise((done) => setTimeout(done, 100));
const result = {
  up, down, kept, problems, title: document.title,
  figures,
  drawn: drawn(),
  run: document.getElementById("run").textContent,
  wide: document.documentElement.scrollWidth - document.documentElement.clientWidth,
  requests: performance.getEntriesByType("resource").map((entry) => entry.name),
};
const probe = Object.assign(document.createElement("pre"), { id: "probe", textContent: JSON.stringify(result) });
document.body.replaceChildren(probe);
</script>
"""


@needs_chromium
@pytest.mark.parametrize("width", [375, 1440])
def test_the_page_works_in_a_browser(page: Path, tmp_path: Path, width: int) -> None:
    # The last one: Vega's code has the same words in a string.
    start, _, end = page.read_text(encoding="utf-8").rpartition("</body>")
    text = start.replace("<style>", PROBE + "<style>", 1) + ACTIONS + "</body>" + end
    probed = tmp_path / "probed.html"
    probed.write_text(text, encoding="utf-8")
    command = [CHROMIUM, "--headless", "--no-sandbox", "--disable-gpu", f"--user-data-dir={tmp_path / 'profile'}"]
    # Tall enough that every figure is in view.
    command += [f"--window-size={width},20000", "--virtual-time-budget=60000", "--dump-dom", probed.as_uri()]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    match = re.search(r'<pre id="probe">(.*?)</pre>', done.stdout, re.DOTALL)
    assert match is not None, done.stderr[-2000:]
    found = json.loads(match[1].replace("&lt;", "<").replace("&gt;", ">").replace("&amp;", "&"))
    assert found["problems"] == [] and found["requests"] == [] and found["title"] == "dptune: results"
    assert found["up"] == sorted(found["up"]) and found["down"] == sorted(found["down"], reverse=True)
    assert found["kept"] == 1
    assert found["drawn"] == found["figures"] > 4
    assert "Whoever sees everything" in found["run"] or "not private" in found["run"]
    assert found["wide"] <= 0

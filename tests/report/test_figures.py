import json
import re
from pathlib import Path
from typing import Any

import pytest
from report.planted import compare, config, plant

from dptune.report.results import Results, load_results

pytest.importorskip("altair", reason="make setup EXTRAS=report, or make test")

from dptune.report.figures import FIGURES, all_figures, write


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> Results:
    root = tmp_path_factory.mktemp("outputs")
    compare(root, gain=0.1, seeds=3)
    for seed in range(3):
        for rate in (0.01, 0.04):
            plant(root, config("uniform", seed, hyperparameter__learning_rate=rate), 0.5, 0.5)
    return load_results(root)


def axes(spec: Any) -> list[dict[str, Any]]:
    """Every position encoding in a specification."""
    found = []
    if isinstance(spec, dict):
        for key, value in spec.items():
            if key == "encoding":
                found += [value[name] for name in ("x", "y") if isinstance(value.get(name), dict)]
            found += axes(value)
    elif isinstance(spec, list):
        found = [item for part in spec for item in axes(part)]
    return found


def test_every_figure_can_be_drawn(results: Results, tmp_path: Path) -> None:
    charts = all_figures(results)
    assert set(charts) == set(FIGURES)
    written = write(charts, tmp_path)
    assert len(written) == 2 * len(FIGURES)
    for path in written:
        content = path.read_bytes()
        assert len(content) > 5000 and content.startswith(b"<svg" if path.suffix == ".svg" else b"\x89PNG"), path


@pytest.mark.parametrize("name", FIGURES)
def test_axes_say_what_they_show_and_are_not_cut(results: Results, name: str) -> None:
    chart = FIGURES[name](results)
    assert chart is not None
    spec = chart.to_dict()
    titles = [axis["title"] for axis in axes(spec) if axis.get("title")]
    assert titles and spec["title"]
    for axis in axes(spec):
        if axis.get("field") == "accuracy" and axis.get("type") == "quantitative":
            assert axis["scale"]["domain"] == [0, 1]
        scale = axis.get("scale") or {}
        if scale.get("type") == "log":
            assert "log scale" in axis["title"]
        if axis.get("field") == "value" and name == "cost":
            assert axis["title"].endswith((", s", ", MiB")) and scale.get("zero", True)


def test_a_line_joins_settings_that_differ_in_epsilon_only(results: Results) -> None:
    spec = json.dumps(FIGURES["privacy_utility"](results).to_dict())
    chart = json.loads(spec)
    line = next(
        layer for layer in chart["layer"] if isinstance(layer.get("mark"), dict) and layer["mark"]["type"] == "line"
    )
    rows = chart["datasets"][line["data"]["name"]]
    assert len(rows) == 4  # Two methods at two epsilons, without the settings at other learning rates.


def scales(spec: Any, channel: str) -> list[dict[str, Any]]:
    """Domain and range of every encoding of methods by this channel."""
    if isinstance(spec, list):
        return [item for part in spec for item in scales(part, channel)]
    if not isinstance(spec, dict):
        return []
    encoding = spec.get(channel)
    own = [encoding["scale"]] if isinstance(encoding, dict) and encoding.get("field") == "method" else []
    return own + [item for part in spec.values() for item in scales(part, channel)]


@pytest.mark.parametrize("channel", ["color", "shape", "strokeDash"])
def test_a_method_looks_the_same_in_every_figure(tmp_path: Path, channel: str) -> None:
    compare(tmp_path, gain=0.1, seeds=2)
    for seed in range(2):
        plant(tmp_path, config("none", seed), 0.9, 0.9)
    found: dict[str, set[str]] = {}
    figures = [chart.to_dict() for chart in all_figures(load_results(tmp_path)).values()]
    for scale in (scale for spec in figures for scale in scales(spec, channel)):
        for method, look in zip(scale["domain"], scale["range"], strict=True):
            found.setdefault(method, set()).add(str(look))
    assert set(found) == {"lora + adaptive", "lora + none", "lora + uniform"}
    assert all(len(looks) == 1 for looks in found.values()) and len(set.union(*found.values())) == 3


@pytest.mark.parametrize("name", ["privacy_utility", "parameters", "pareto", "sensitivity", "stability", "training"])
def test_a_legend_names_the_methods(results: Results, name: str, tmp_path: Path) -> None:
    (drawing, _) = write({name: FIGURES[name](results)}, tmp_path)
    assert re.search(r"<text[^>]*>lora \+ adaptive</text>", drawing.read_text(encoding="utf-8"))


def test_figures_without_their_runs_are_left_out(tmp_path: Path) -> None:
    plant(tmp_path, config("none"), 0.5, 0.5)
    assert (
        FIGURES["privacy_utility"](load_results(tmp_path)) is None
        and FIGURES["sensitivity"](load_results(tmp_path)) is None
    )


def test_losses_and_times_of_private_data_are_not_drawn(tmp_path: Path) -> None:
    for seed in range(2):
        plant(tmp_path, config("uniform", seed), 0.5, 0.5, stand_in=False, noise_mode="secure")
    assert FIGURES["training"](load_results(tmp_path)) is None and FIGURES["cost"](load_results(tmp_path)) is None

"""The table that ends a sweep, as a terminal shows it."""

import dataclasses
import fcntl
import os
import pty
import struct
import termios
from collections.abc import Callable
from pathlib import Path

import pytest
from report.planted import compare, config, plant

from dptune.cli import main
from dptune.identity import run_id
from dptune.records.record import RunRecord
from dptune.report import commands
from dptune.report.render import markdown
from dptune.report.results import load_results
from dptune.report.tables import NONE, SETTING_COLUMNS, Cell, Parts, Table, main_table
from dptune.report.terminal import NARROWEST, WIDEST, narrow, width_of, wrapped

SAMPLE = Path(__file__).parents[2] / "analysis" / "sample"
WIDTHS = (NARROWEST, 72, 80, 92, WIDEST)


@pytest.fixture(scope="module")
def sample() -> Table:
    return main_table("sample", load_results(SAMPLE), "Sweep sample")


def grid(text: str) -> tuple[list[str], list[list[list[str]]]]:
    """The heads of a table, and the lines of each cell of each row: columns are parted by two blanks in every line."""
    lines = [*text.splitlines(), ""]
    rule = next(at for at, line in enumerate(lines) if set(line) == {"─"})
    head, body = lines[2:rule], lines[rule + 1 : lines.index("", rule)]
    width = len(lines[rule])
    filled = [any(line[at : at + 1].strip() for line in [*head, *body]) for at in range(width)]
    starts = [at for at in range(width) if filled[at] and not any(filled[max(at - 2, 0) : at])]
    cuts = list(zip(starts, [*starts[1:], width], strict=True))
    parted = [[line[start:end].rstrip() for start, end in cuts] for line in body]
    rows: list[list[list[str]]] = []
    for cells in parted:
        if cells[0]:
            rows.append([[] for _ in cuts])
        for cell, piece in zip(rows[-1], cells, strict=True):
            cell.extend([piece] if piece else [])
    heads = [" ".join(" ".join(line[start:end] for line in head).split()) for start, end in cuts]
    return heads, rows


def notes(text: str) -> str:
    """What is said below the rows, as if it were not wrapped."""
    return " ".join(text.rpartition("─\n")[2].partition("\n\n")[2].split())


def joined(lines: list[str] | str) -> str:
    """Text without its spaces, which a wrapped line does not keep."""
    return "".join("".join(lines).split())


def by_hand(*rows: dict[str, Cell], notes: tuple[str, ...] = (), title: str = "t") -> Table:
    """A table with these rows."""
    columns = tuple(
        dataclasses.replace(column, direction="")
        for column in SETTING_COLUMNS
        if column.key in ("row", "setting", "accuracy", "epsilon")
    )
    numbers = [{"row": Cell(str(at), parts=Parts(str(at))), "accuracy": Cell(NONE)} for at in range(1, len(rows) + 1)]
    return Table("t", title, columns, tuple(a | b for a, b in zip(numbers, rows, strict=True)), notes)


@pytest.mark.parametrize("width", WIDTHS)
def test_no_line_is_wider_than_the_terminal(sample: Table, width: int) -> None:
    assert max(map(width_of, narrow(sample, width).splitlines())) <= width


@pytest.mark.parametrize("width", WIDTHS)
def test_every_setting_number_and_interval_is_still_there(sample: Table, width: int) -> None:
    text = narrow(sample, width)
    heads, rows = grid(text)
    keys = ["setting", "accuracy", "difference", "epsilon", "trainable"][: len(heads) - 1]
    assert len(keys) >= 4 and len(rows) == len(sample.rows)
    assert ("trainable (%)" in notes(text)) == ("trainable" not in keys)
    for wanted, (_, *cells) in zip(sample.rows, rows, strict=True):
        for key, lines in zip(keys, cells, strict=True):
            cell = wanted.get(key, Cell(NONE))
            if cell.parts is None:
                assert joined(lines) == joined(cell.text)
            else:
                parts = (cell.parts.number, cell.parts.interval, cell.parts.tail)
                assert sorted(joined(lines)) == sorted(joined("".join(parts)))
                assert all(joined(part) in joined(lines) for part in parts)


def test_words_of_a_setting_are_whole_at_full_width(sample: Table) -> None:
    shown = {word for row in grid(narrow(sample))[1] for line in row[1] for word in line.split()}
    wanted = {word for row in sample.rows for word in row["setting"].text.split()}
    assert "data_sensitivity=label_noise" in wanted and wanted == shown


@pytest.mark.parametrize("width", WIDTHS)
def test_decimal_points_are_below_each_other(sample: Table, width: int) -> None:
    for column in (2, 3, 4):
        first = [row[column][0] for row in grid(narrow(sample, width))[1]]
        points = {text.index(".") for text in first if "." in text}
        assert len(points) == 1 and sum("." in text for text in first) >= 8
    intervals = [line for row in grid(narrow(sample, width))[1] for line in row[3] if "[" in line]
    assert len({(line.index("["), line.index(","), line.index("]")) for line in intervals}) == 1


def test_numbers_of_different_lengths_are_aligned() -> None:
    cells = [Parts("9.5", "[0.0, 100.0]", "to 9"), Parts("29.55", "[10.0, 35.0]", "to 10"), Parts("-3")]
    table = by_hand(*({"setting": Cell("s"), "accuracy": Cell("", parts=parts)} for parts in cells))
    accuracy = [row[2][0] for row in grid(narrow(table))[1]]
    assert accuracy == [" 9.5  [ 0.0, 100.0]  to 9", "29.55 [10.0,  35.0] to 10", "-3"]


def test_the_columns_that_matter_are_shown_and_the_rest_is_named(sample: Table) -> None:
    text = narrow(sample)
    assert grid(text)[0] == [
        "#",
        "setting",
        "accuracy [95 %] ↑",
        "difference by seed [95 %] ↑",
        "ε spent/ target ↓",
        "trainable (%) ↓",
    ]
    assert "`dptune table --wide`" in notes(text)
    assert notes(text).endswith(": unseen inputs, worst task, spread over tasks, δ, time.")


def test_what_all_rows_share_is_said_once(sample: Table) -> None:
    text = narrow(sample)
    assert not any(mark in text for mark in ("(3)", "(n)", "(r,p)", "(r)", "(p)"))
    assert "Each setting: 3 runs (seeds)." in notes(text)
    assert " Noise mode reproducible: ε is accounted" in notes(text) and " The data is a public stand-in" in notes(text)


def test_what_rows_do_not_share_is_said_in_them(tmp_path: Path) -> None:
    for seed in range(3):
        plant(tmp_path, config("uniform", seed), 0.5, 0.4)
    plant(tmp_path, config("adaptive", 0), 0.6, 0.5, stand_in=False)
    text = narrow(main_table("t", load_results(tmp_path)))
    heads, (floor, *rows) = grid(text)
    told = {joined(row[1]): row for row in rows}
    assert heads[2:4] == ["accuracy [95 %] (n) ↑", "difference by seed [95 %] ↑"]
    assert [joined(row[2])[-3:] for row in (floor, told["privacy=uniform"], told["privacy=adaptive"])] == [
        "(1)",
        "(3)",
        "(1)",
    ]
    assert joined(told["privacy=uniform"][4]) == "8.000/8(p)" and joined(told["privacy=adaptive"][4]) == "8.000/8"
    assert "(n): number of runs." in notes(text) and "Each setting" not in text
    assert "(p) The data is a public stand-in" in notes(text)


def test_missing_and_failed_runs_are_seen(tmp_path: Path) -> None:
    plant(tmp_path, config("uniform", 0), 0.5, 0.4)
    for made, status in ((config("uniform", 1), "failed"), (config("none", 0), "running")):
        RunRecord(run_id(made), status, dataclasses.asdict(made), "planted", error="x").write(tmp_path / run_id(made))
    table = main_table("t", load_results(tmp_path))
    for width in WIDTHS:
        _, (_, first, second) = grid(narrow(table, width))
        assert joined(first[2]).endswith("]1failed") and joined(second[2]) == "1runningorstopped"


def test_the_price_of_a_search_is_below_that_of_a_run() -> None:
    parts = Parts("7.999/8", words="best of K 12.346", marks=("r",))
    text = narrow(by_hand({"setting": Cell("s"), "epsilon": Cell("", parts=parts)}, {"setting": Cell("t")}))
    assert grid(text)[1][0][-1] == ["7.999/8", "best of K 12.346"]


def test_text_metrics_stay_where_there_is_room(tmp_path: Path) -> None:
    made = plant(tmp_path, config(), 0.5, 0.4)
    assert made.metrics is not None
    made.metrics.bleu, made.metrics.rouge_l = 12.3, 0.25
    made.write(tmp_path / made.run_id)
    table = main_table("t", load_results(tmp_path))
    heads, (_, row) = grid(narrow(table))
    assert "BLEU ↑" in heads and ["12.3"] in row and ["0.250"] in row and "trainable (%) ↓" in heads


def test_a_column_without_room_is_named_below() -> None:
    columns = {"setting": "setting", "accuracy": "a", "bleu": "BLEU", "rouge_l": "ROUGE-L", "trainable": "trainable"}
    numbers = {key: Cell("", parts=Parts("0.123", "[0.000, 1.000]")) for key in ("accuracy", "bleu", "rouge_l")}
    row = {"setting": Cell("seventeen=letters"), **numbers, "trainable": Cell("", parts=Parts("1,234,567,890"))}
    known = {column.key: column for column in SETTING_COLUMNS}
    made = tuple(dataclasses.replace(known[key], title=title, direction="") for key, title in columns.items())
    table = Table("t", "t", made, (row,))
    text = narrow(table, NARROWEST)
    lines = text.splitlines()
    assert "BLEU" in lines[2] and "ROUGE-L" in lines[2] and "trainable" not in lines[2]
    assert notes(text).endswith("`dptune tables`: trainable.") and max(map(len, lines)) <= NARROWEST


@pytest.mark.parametrize("width", WIDTHS)
def test_long_settings_go_on_below(width: int) -> None:
    label = "method_with_a_name, " + ", ".join(f"option_{at}={'long_value_' * at}" for at in range(9))
    label += f", {'x' * 300}"
    number = Parts("0.500", "[0.400, 0.600]")
    text = narrow(by_hand({"setting": Cell(label), "accuracy": Cell("", parts=number)}), width)
    (row,) = grid(text)[1]
    assert joined(row[1]) == joined(label) and max(map(len, text.splitlines())) <= width


def test_wide_letters_count_as_two_columns() -> None:
    label = "方法=" + "差分隐私" * 20
    text = narrow(by_hand({"setting": Cell(label)}, notes=("注" * 120,)), NARROWEST)
    assert max(map(width_of, text.splitlines())) <= NARROWEST < max(map(width_of, text.splitlines())) + 2
    assert width_of("差分") == 4 and width_of("e\u0301") == 1
    assert text.count("差") == 20 and text.count("注") == 120


@pytest.mark.parametrize("shown", [narrow, markdown], ids=["narrow", "wide"])
def test_what_a_terminal_would_obey_does_not_reach_it(shown: Callable[[Table], str]) -> None:
    bad = "\x1b[2J\x07a\r\nb\x9b31mc\u202ed\u2028e\ud800f\tg"
    row = {"setting": Cell(bad), "accuracy": Cell(bad), "epsilon": Cell(bad)}
    text = shown(by_hand(row, notes=(bad,), title=bad))
    assert not set(text) & set("\x1b\x07\r\x9b\u202e\u2028\ud800\t")
    assert "".join(text.split()).count("[2J") == 5 and "".join(text.split()).encode()


def test_a_hostile_record_cannot_write_to_the_terminal(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    compare(tmp_path, 0.1, seeds=2)
    for path in tmp_path.glob("*/record.json"):
        path.write_text(path.read_text().replace('"adaptive"', '"\\u001b]0;owned\\u0007"'))
    for options in ([], ["--wide"]):
        main(["table", f"compute.output_root={tmp_path}", *options])
        said = capsys.readouterr()
        assert "owned" in said.out and not set(said.out + said.err) & {"\x1b", "\x07"}


def test_lines_are_broken_between_words_and_else_at_signs() -> None:
    assert wrapped("one two three", 7) == ["one two", "three"]
    assert wrapped("data_sensitivity=label_noise", 20) == ["data_sensitivity=", "label_noise"]
    assert wrapped("data_sensitivity=label_noise", 12) == ["data_", "sensitivity=", "label_noise"]
    assert wrapped("abcdefgh", 3) == ["abc", "def", "gh"]
    assert wrapped("", 3) == [""]


def test_wide_prints_the_whole_table_as_markdown(sample: Table, capsys: pytest.CaptureFixture[str]) -> None:
    main(["table", "--wide", f"compute.output_root={SAMPLE}"])
    said = capsys.readouterr().out
    assert said == markdown(sample) + "\n"
    assert "| unseen inputs ↑ | worst task ↑ | spread over tasks ↓ | ε spent/target ↓ | δ | trainable (%) ↓ |" in said
    assert "| 0.282 [0.210, 0.353] (3) | +0.007 [-0.224, +0.237] (3) to 9 |" in said
    assert "| 1.000/1 (r,p) | 1e-05 | 3,072 (1.33) |" in said


def test_without_a_terminal_lines_have_a_hundred_columns(sample: Table, capsys: pytest.CaptureFixture[str]) -> None:
    main(["table", f"compute.output_root={SAMPLE}"])
    assert capsys.readouterr().out == narrow(sample, WIDEST) + "\n"


def test_all_tables_are_announced_by_the_main_one(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    compare(tmp_path, 0.1, seeds=2)
    arguments = ["tables", f"compute.output_root={tmp_path}", f"to={tmp_path / 'report'}"]
    main(arguments)
    *lines, last = capsys.readouterr().out.splitlines()
    assert max(map(len, lines)) <= WIDEST and any(set(line) == {"─"} for line in lines)
    assert last == f"CSV, LaTeX and HTML: {tmp_path / 'report' / 'tables'}"
    main([*arguments, "--wide"])
    assert "| --- |" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("columns", "width"), [(0, WIDEST), (40, NARROWEST), (60, 60), (83, 83), (100, WIDEST), (220, WIDEST)]
)
def test_a_terminal_says_how_wide_it_is(monkeypatch: pytest.MonkeyPatch, columns: int, width: int) -> None:
    ours, theirs = pty.openpty()
    fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("HHHH", 24, columns, 0, 0))
    with os.fdopen(theirs, "w") as stream:
        monkeypatch.setattr("sys.stdout", stream)
        assert commands.terminal_width() == width
    os.close(ours)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["table", "--json"], "there is no option --json: this view has --wide"),
        (["table", "smoke", "--wide=1"], "there is no option --wide=1"),
        (["figures", "--wide"], "there is no option --wide: this view has none (dptune table has --wide)"),
        (["table", "smoke", "light", "--wide"], "smoke light: give at most one sweep"),
    ],
)
def test_other_options_are_refused_in_one_line(
    capsys: pytest.CaptureFixture[str], arguments: list[str], message: str
) -> None:
    with pytest.raises(SystemExit) as stopped:
        main(arguments)
    said = capsys.readouterr()
    assert stopped.value.code == 2 and not said.out and said.err.count("\n") == 1 and message in said.err

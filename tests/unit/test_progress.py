"""What is printed while work goes on: plain lines in a log, a bar on a terminal."""

import fcntl
import io
import os
import select
import struct
import termios
import threading
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stderr, redirect_stdout

import pytest

from dptune.records.record import RecordError, RunFailed
from dptune.sweeps.progress import Display, StepBar, in_time, time_left, tried, workers_of


@contextmanager
def terminal(out: io.StringIO | None = None) -> Iterator[int]:
    """A terminal of 60 columns as standard error, and output if that is not given; yields the end for a person."""
    person, program = os.openpty()
    fcntl.ioctl(program, termios.TIOCSWINSZ, struct.pack("HHHH", 24, 60, 0, 0))
    with open(program, "w", encoding="utf-8") as stream, redirect_stdout(out or stream), redirect_stderr(stream):
        yield person
    os.close(person)


def seen(person: int) -> str:
    text = b""
    while select.select([person], [], [], 0.5)[0]:  # It comes in pieces.
        text += os.read(person, 100_000)
    return text.decode()


def test_a_terminal_gets_a_bar_below_the_lines() -> None:
    before = threading.active_count()
    with terminal() as person:
        with Display(4) as display:
            display.show(1, "5 min left")
            display.say("[2/4]  a line")
            display.show(2, "4 min left")
            assert threading.active_count() == before, "nothing is left behind by an interrupt"
        text = seen(person)
    assert "| 1/4  5 min left" in text and "| 2/4  4 min left" in text
    # The bar is wiped before a line, which stands alone in its row.
    assert "\r[2/4]  a line\r\n" in text
    assert max(map(len, text.replace("\n", "\r").split("\r"))) <= 60
    assert text.endswith("\r" + " " * len(text.rsplit("\r", 2)[1]) + "\r"), "the bar is wiped at the end"


def test_a_log_gets_lines_and_nothing_else(capsys: pytest.CaptureFixture[str]) -> None:
    with Display(4) as display:
        display.show(1, "5 min left")
        display.say("a line")
        display.say("a failure", error=True)
    assert capsys.readouterr() == ("a line\n", "a failure\n")


def test_half_a_terminal_is_a_log() -> None:
    """A pipe of one of the two streams would mix its lines into the bar."""
    with terminal(io.StringIO()) as person:
        with Display(4) as display:
            display.show(1, "5 min left")
            display.say("a failure", error=True)
        assert seen(person) == "a failure\r\n"


def test_lines_come_through_while_a_library_is_kept_silent(capsys: pytest.CaptureFixture[str]) -> None:
    from dptune.records.mirror import without_words

    with Display() as display, without_words():
        print("hello from a library")
        display.say("a line")
    assert capsys.readouterr().out == "a line\n"


def test_the_bar_of_a_run_shows_its_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    with terminal() as person:
        with Display() as display:
            bar = StepBar(display)
            monkeypatch.setattr("dptune.sweeps.progress.time.monotonic", lambda: 10.0)
            bar(21, 30)  # Going on after step 20.
            monkeypatch.setattr("dptune.sweeps.progress.time.monotonic", lambda: 14.0)
            bar(23, 30)
        text = seen(person)
    assert "| 21/30  steps" in text and "| 23/30  steps  14 s left" in text


def test_times_are_as_exact_as_one_cares() -> None:
    assert [in_time(value) for value in (0.4, 89, 90, 7000, 7200, 36000)] == [
        "0 s",
        "89 s",
        "2 min",
        "117 min",
        "2 h 0 min",
        "10 h 0 min",
    ]


def test_the_time_left_follows_from_the_rate_so_far() -> None:
    assert time_left(9, 0, 100) is None
    assert time_left(9, 1, 100) == 900
    # Two workers: the other one is half done when one ends.
    assert time_left(9, 1, 100, workers=2) == 600
    assert time_left(1, 9, 500, workers=2) == pytest.approx(500 / 9.5)
    assert time_left(0, 9, 500, workers=8) == 0


@pytest.mark.parametrize(
    ("settings", "workers"),
    [({}, 1), ({"n_jobs": 3}, 3), ({"array_parallelism": 64}, 64), ({"n_jobs": -1}, os.cpu_count())],
)
def test_the_number_of_workers_is_that_of_the_launcher(settings: dict[str, int], workers: int) -> None:
    assert workers_of(settings) == workers


def test_what_goes_wrong_in_a_job_is_told_in_words() -> None:
    def fails(error: Exception) -> object:
        raise error

    assert tried(lambda: None) is None
    busy = tried(lambda: fails(BlockingIOError("node7 does it")))
    assert busy is not None and busy.why == "node7 does it" and not busy.failed
    known = tried(lambda: fails(RunFailed("ValueError: no; its log is x")))
    assert known is not None and known.why == "ValueError: no; its log is x" and known.failed and not known.trace
    # An exception like this one cannot be sent from one process to another.
    other = tried(lambda: fails(RecordError.__new__(RecordError, "of\ntwo lines")))
    assert (
        other is not None and other.why == "RecordError: of two lines" and other.failed and "Traceback" in other.trace
    )

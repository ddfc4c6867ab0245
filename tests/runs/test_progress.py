"""Progress says how much, how fast and how long, seldom enough to be read."""

from __future__ import annotations

import io

import pytest

from handful.runs.progress import Bar, Lines, Progress, duration, progress_for


def test_lines_come_every_few_seconds_with_rate_and_time_left():
    stream, now = io.StringIO(), [0.0]
    lines = Lines(stream, seconds=5, clock=lambda: now[0])
    lines.begin(total=100, done=20)
    for _ in range(40):
        now[0] += 1
        lines.advance(1)
    lines.end()
    said = stream.getvalue().splitlines()
    assert said[0] == "generating 80 images (20 of 100 exist already)"
    assert said[1] == "generated 25 of 100 images, 1 images/s, 1 min 15 s left"
    assert len(said) == 1 + 8 + 1


def test_quiet_says_nothing_and_a_pipe_gets_lines(capsys: pytest.CaptureFixture[str]):
    quiet = progress_for(quiet=True)
    quiet.begin(1, 0)
    quiet.advance(1)
    quiet.note("x")
    quiet.end()
    assert capsys.readouterr() == ("", "")
    assert isinstance(progress_for(), Lines)
    assert type(quiet) is Progress


def test_the_bar_draws_on_stderr_alone(capsys: pytest.CaptureFixture[str]):
    bar = Bar()
    bar.note("before")
    bar.begin(10, 5)
    bar.advance(5)
    bar.note("[3/4] within")
    bar.end()
    bar.end()
    said = capsys.readouterr()
    assert said.out == ""
    assert "10/10 images" in said.err
    assert "[3/4] within" in said.err


@pytest.mark.parametrize(("seconds", "text"), [(0.4, "0 s"), (59.6, "1 min 0 s"), (200, "3 min 20 s"), (7500, "2 h 5 min")])
def test_durations_read_naturally(seconds: float, text: str):
    assert duration(seconds) == text

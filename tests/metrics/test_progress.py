"""What people see of long work: how much is done, how fast, and when it ends."""

import sys
import time

import pytest

from jaxgpt.metrics.progress import Bar, elapsed


@pytest.fixture
def clock(monkeypatch):
    """The time in seconds that `progress` reads, in a list of one."""
    now = [100.0]
    monkeypatch.setattr(time, "monotonic", lambda: now[0])
    return now


def test_a_bar_prints_a_line_every_five_seconds(clock, capsys):
    with Bar("evaluate ", 100, "windows") as bar:
        for _ in range(60):
            clock[0] += 0.2
            bar.advance(2)
    lines = capsys.readouterr().err.splitlines()
    assert lines == [
        "evaluate  50/100 windows | 10/s | eta 5.0s",
        "evaluate  100/100 windows | 10/s | eta 0.0s",
    ]


def test_bytes_of_unknown_number(clock, capsys):
    with Bar("data      tokenizing", 0) as bar:
        clock[0] += 10
        bar.advance(25_000_000)
    assert capsys.readouterr().err == "data      tokenizing 25 MB | 2.5/s\n"


def test_on_a_terminal_one_line_is_drawn_again_and_cleared(clock, capsys, monkeypatch):
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    with Bar("import   ", 4_000_000) as bar:
        for _ in range(4):
            clock[0] += 1
            bar.advance(1_000_000)
    shown = capsys.readouterr().err
    assert "\n" not in shown and shown.count("\rimport   ") == 4 and shown.endswith("\r\x1b[K")


def test_the_seconds_so_far_of_what_cannot_say_how_far_it_is(capsys, monkeypatch):
    monkeypatch.setattr("jaxgpt.metrics.progress.INTERVAL", 0.02)
    with elapsed("compile   the step:"):
        time.sleep(0.2)
    before = capsys.readouterr().err
    assert before.startswith("compile   the step: 0.") and "so far\n" in before
    time.sleep(0.1)
    assert not capsys.readouterr().err, "it ends with the block"

"""Long work says what it is at: a bar on a terminal, lines in a log."""

import io

import pytest

from gemma_deploy.progress import BYTES, Bars, Lines, Report, Silent, amount, counted, shown, ticks, watch_on


class Clock:
    def __init__(self):
        self.now = 100.0

    def __call__(self):
        return self.now


class Terminal(io.StringIO):
    def isatty(self):
        return True


@pytest.fixture
def log():
    clock, stream = Clock(), io.StringIO()
    return Lines(stream, clock), clock, stream


def lines(stream):
    return stream.getvalue().splitlines()


def test_a_stage_is_named_when_it_begins_and_a_short_one_says_no_more_in_a_log(log):
    watcher, clock, stream = log
    watcher.started("files")
    assert lines(stream) == ["files ..."]
    clock.now += 1
    watcher.advanced("files", 5, 10, unit="windows")
    watcher.ended("files")
    assert lines(stream) == ["files ..."]


def test_a_long_stage_has_a_line_for_each_tenth(log):
    watcher, clock, stream = log
    watcher.started("quantize")
    for layer in range(1, 19):
        clock.now += 3
        watcher.advanced("quantize", layer, 18, unit="layers")
    assert lines(stream)[:2] == ["quantize ...", "quantize   11 %  2 of 18 layers"]
    assert len(lines(stream)) == 10
    assert "18 of 18" not in stream.getvalue()


def test_a_very_long_stage_is_never_silent_for_longer_than_half_a_minute(log):
    watcher, clock, stream = log
    watcher.started("quantize")
    for window in range(1, 400):  # the first tenth alone takes over an hour
        clock.now += 10
        watcher.advanced("quantize", window, 5760, unit="windows")
    assert len(lines(stream)) >= 399 * 10 / 30 - 1
    assert lines(stream)[1] == "quantize    0 %  3 of 5760 windows"


def test_every_stage_counts_from_its_own_beginning(log):
    watcher, clock, stream = log
    for stage in ("parameters", "parity"):
        watcher.started(stage)
        clock.now += 5
        watcher.advanced(stage, 64 << 20, 256 << 20, unit=BYTES)
    assert lines(stream)[1::2] == ["parameters   25 %  64 of 256 MiB", "parity   25 %  64 of 256 MiB"]


def test_steps_of_a_stage_are_named_and_counted_each_from_its_own_beginning(log):
    watcher, clock, stream = log
    watcher.started("parity")
    report = Report(watcher, "parity")
    for source in ("hf", "strict"):
        report(f"running {source}")
        clock.now += 5
        counted(report, "layers")(9, 18)
    assert counted(print, "layers") is None  # takes words alone
    assert lines(stream) == [
        "parity ...",
        "parity  running hf",
        "parity   50 %  9 of 18 layers, running hf",
        "parity  running strict",
        "parity   50 %  9 of 18 layers, running strict",
    ]


def test_a_terminal_shows_stage_unit_and_amount_and_clears_the_line():
    stream = Terminal()
    watcher = watch_on(stream)
    assert isinstance(watcher, Bars)
    watcher.started("quantize")
    watcher.advanced("quantize", 5, 18, unit="layers")
    watcher._bar.refresh()
    assert "quantize" in stream.getvalue()
    assert "5 of 18 layers" in stream.getvalue()
    watcher.ended("quantize")
    before = stream.getvalue()
    watcher.advanced("quantize", 6, 18, unit="layers")  # of a stage that is over
    assert stream.getvalue() == before
    watcher.started("parity")
    watcher.said("parity", "running hf")
    watcher._bar.refresh()
    assert "running hf" in stream.getvalue()[len(before) :]
    watcher.ended("parity")


def test_shares_are_shown_in_the_unit_that_means_something():
    seen = []

    class Kept(Silent):
        def advanced(self, stage, done, total, unit):
            seen.append((stage, done, total, unit))

    ticks(Kept(), "quantize", "layers", of=18)(3200, 5760)
    ticks(Kept(), "parameters", BYTES)(1, 4)
    assert seen == [("quantize", 10.0, 18, "layers"), ("parameters", 1, 4, BYTES)]
    assert amount(*seen[0][1:]) == "10 of 18 layers"


def test_what_is_shown_ends_with_the_work_even_when_that_fails():
    stream = Terminal()

    def work():
        with shown("eval", "windows", stream) as tick:
            tick(1, 2)
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        work()
    assert "\x1b[?25h" in stream.getvalue()  # the cursor is back

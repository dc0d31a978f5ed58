"""Figures, rows of the gate and pictures: three digits with units, what failed first, ticks at round values."""

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gemma_deploy.artifact.charts import bars, column_chart, line_chart
from gemma_deploy.artifact.gate_rows import gate_rows, headline
from gemma_deploy.artifact.manifest import LineRecord
from gemma_deploy.artifact.pages import rendered
from gemma_deploy.parity.compare import ParityResult
from gemma_deploy.parity.gates import Line
from gemma_deploy.tables import console, figure, table_of

HEIGHT = 280


@pytest.mark.parametrize(
    ("value", "said"),
    [
        (0.0012836307118032344, "0.00128"),
        (41.8321, "41.8"),
        (0.0, "0"),
        (1, "1"),
        (262144, "262,144"),
        (1234.5, "1,230"),
        (999.6, "1,000"),
        (8.1234e-6, "8.12e-6"),
        (1e-5, "1e-5"),
        (-0.00385, "-0.00385"),
        (12_345_678.0, "1.23e7"),
        (math.nan, "none"),
        (None, "none"),
    ],
)
def test_figures_have_three_digits(value, said):
    assert figure(value) == said


@given(st.floats(min_value=1e-30, max_value=1e30))
def test_a_figure_is_the_value_to_half_a_unit_of_its_third_digit(value):
    assert float(figure(value).replace(",", "")) == pytest.approx(value, rel=0.00501)


def test_rows_of_the_gate_have_signs_units_and_what_failed_first():
    lines = [
        Line("hf = strict", "mean KL", 0.0012836, 0.015, True),
        Line("hf = strict", "perplexity change less 2 standard errors", 0.0123, 0.005, False),
        Line("hf", "headroom of float16 (x reaches 2)", 8.0, 4.0, True),
        Line("weights", "lowest SQNR in dB (layer 3)", 43.4321, 38.0, True),
        Line("a = b", "relative error", math.nan, 1e-5, False),
        Line("a = b", "others", 0, 0, True),
    ]
    assert gate_rows(lines) == [
        ("hf = strict", "perplexity change less 2 standard errors", "1.23%", "<= 0.50%", "FAILED"),
        ("a = b", "relative error", "no number", "<= 1e-5", "FAILED"),
        ("hf = strict", "mean KL", "0.00128 nats", "<= 0.015 nats", "ok"),
        ("hf", "headroom of float16 (x reaches 2)", "8 x", ">= 4 x", "ok"),
        ("weights", "lowest SQNR (layer 3)", "43.4 dB", ">= 38 dB", "ok"),
        ("a = b", "others", "0", "<= 0", "ok"),
    ]
    of_manifest = [LineRecord(**line.to_json()) for line in lines]
    assert gate_rows(of_manifest) == gate_rows(lines)
    assert headline(ParityResult(lines=lines)) == "FAILED, 2 of 6 gates"


def test_the_headline_counts_and_names_the_largest_kl():
    lines = [Line("hf = strict", "mean KL", 0.0013, 0.005, True), Line("hf = shipped", "mean KL", 0.0023, 0.015, True)]
    assert headline(ParityResult(lines=lines)) == "passed, 2 gates; mean KL 0.0023 nats (limit 0.015 nats)"
    assert headline(ParityResult(lines=[Line("a = b", "relative error", 0.0, 1e-5, True)])) == "passed, 1 gate"
    assert headline(ParityResult()) == "FAILED: nothing was compared"


def test_a_table_is_as_wide_as_the_terminal_and_its_figures_stay_whole(monkeypatch, capsys):
    row = ["a" * 70, "b" * 70, "0.00128 nats", "<= 0.015 nats", "ok"]
    for columns in (60, 80, 200):
        monkeypatch.setenv("COLUMNS", str(columns))
        console().print(table_of(("compared", "measure", "value", "limit", "verdict"), [row], words=("measure",)))
        shown = capsys.readouterr().out
        assert max(map(len, shown.splitlines())) <= columns
        assert "0.00128 nats" in shown
        assert (shown.count("a"), shown.count("b")) == (
            70 + sum(map(str.count, ("compared", "measure", "value", "nats", "nats"), "aaaaa")),
            70,
        )
    monkeypatch.delenv("COLUMNS")
    assert console().width == 110  # a log
    assert console(log_width=160).width == 160


def ticks_of(chart):
    return [float(tick.text) for tick in chart.y_ticks]


@given(st.lists(st.floats(min_value=-1e6, max_value=1e6), min_size=1, max_size=40))
def test_lines_lie_inside_their_picture_and_where_the_ticks_say(values):
    chart = line_chart({"x": dict(enumerate(values))}, label="x", unit="dB")
    marks = chart.series[0].marks
    assert all(0 <= mark.x <= 560 and 0 <= mark.y <= HEIGHT for mark in marks)
    assert 2 <= len(chart.y_ticks) <= 8
    (low, high), (first, last) = (chart.y_ticks[0].at, chart.y_ticks[-1].at), (ticks_of(chart)[0], ticks_of(chart)[-1])
    spread = last - first
    for value, mark in zip(values, marks, strict=True):
        place = low + (value - first) / spread * (high - low)
        assert mark.y == pytest.approx(place, abs=0.2 + 1e-5 * max(abs(first), abs(last)) / spread * HEIGHT)


@given(st.lists(st.floats(min_value=-1, max_value=10), min_size=1, max_size=60))
def test_columns_stand_on_the_ground_and_are_as_high_as_their_values(values):
    chart = column_chart(values, label="x", unit="nats")
    assert len(chart.columns) == len(values)
    grounds = {round(column.y + column.height, 1) for column in chart.columns}
    assert max(grounds) - min(grounds) <= 0.11
    largest = max(max(values), 0.0)
    highest = max(column.height for column in chart.columns)
    for value, column in zip(values, chart.columns, strict=True):
        share = max(value, 0.0) / largest if largest else 0.0
        assert column.height == pytest.approx(share * highest, abs=0.2)


def test_bars_are_as_long_as_their_amounts():
    drawn = bars([("a", 8.0, "8"), ("b", 2.0, "2"), ("c", 0.0, "0")], label="x").bars
    assert [round(bar.width / drawn[0].width, 2) for bar in drawn] == [1.0, 0.25, 0.0]


def test_tens_are_equally_far_apart_on_a_logarithmic_axis():
    chart = line_chart({"x": {0: 1.0, 1: 10.0, 2: 100.0}}, label="x", unit="", log=True, rule=(65504.0, "most"))
    first, second, third = (mark.y for mark in chart.series[0].marks)
    assert first - second == pytest.approx(second - third, abs=0.2)
    assert 0 <= chart.rule.at < third


def test_a_value_that_a_template_lacks_is_an_error():
    import jinja2

    with pytest.raises(jinja2.UndefinedError):
        rendered("parity.html.j2", title="x")

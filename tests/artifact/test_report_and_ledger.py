"""The report shows what the manifest says, the ledger lists every allowed difference with its measured effect."""

import copy
import json
import re
from dataclasses import asdict
from html.parser import HTMLParser

import pytest

from gemma_deploy.artifact.census import op_census
from gemma_deploy.artifact.manifest import Manifest
from gemma_deploy.artifact.report import write_report
from gemma_deploy.backends import backend_of


def ledger_of(manifest):
    found = Manifest.of(manifest)
    return [asdict(entry) for entry in backend_of(found).ledger(found)]


@pytest.fixture(scope="module")
def manifest(demo_artifact):
    return json.loads((demo_artifact / "manifest.json").read_text())


@pytest.fixture(scope="module")
def html(demo_artifact):
    return (demo_artifact / "report.html").read_text()


class Page(HTMLParser):
    """Elements in order with their texts; refuses what is not closed in the order in which it was opened."""

    def __init__(self, html):
        super().__init__()
        self.open, self.elements, self.tables, self.declared = [], [], [], None
        self.feed(html)
        assert not self.open

    def handle_decl(self, decl):
        self.declared = decl

    def handle_starttag(self, tag, attrs):
        element = {"tag": tag, "text": "", **dict(attrs)}
        self.elements.append(element)
        if tag not in ("meta", "line", "rect", "circle", "polyline", "br") or tag == "rect":
            self.open.append(element)
        if tag == "table":
            self.tables.append([])
        elif tag == "tr":
            self.tables[-1].append([])
        elif tag in ("td", "th"):
            self.tables[-1][-1].append(element)

    def handle_startendtag(self, tag, attrs):
        self.elements.append({"tag": tag, "text": "", **dict(attrs)})

    def handle_endtag(self, tag):
        if tag not in ("circle",) or self.open[-1]["tag"] == tag:
            assert self.open.pop()["tag"] == tag

    def handle_data(self, data):
        for element in self.open:
            element["text"] += data

    def all(self, tag, **attributes):
        return [one for one in self.elements if one["tag"] == tag and attributes.items() <= one.items()]

    def table(self, first):
        """Cells' texts of the table whose first heading it is, without the headings."""
        (found,) = (table for table in self.tables if table[0][0]["text"] == first)
        return [tuple(cell["text"].strip() for cell in row) for row in found[1:]]


@pytest.fixture(scope="module")
def parsed(html):
    return Page(html)


def test_the_report_is_one_page_that_loads_nothing(html, parsed):
    assert parsed.declared == "doctype html"
    assert html.startswith("<!doctype html>")
    assert not re.search(r"<(script|link|img|iframe)\b|@import|url\(|https?:|src=|href=", html)
    assert len(html) < 60_000


def test_the_page_is_for_phones_and_for_dark_rooms(html, parsed):
    (viewport,) = parsed.all("meta", name="viewport")
    assert viewport["content"] == "width=device-width, initial-scale=1"
    assert parsed.all("meta", name="color-scheme")[0]["content"] == "light dark"
    style = parsed.all("style")[0]["text"]
    assert "@media (prefers-color-scheme: dark)" in style
    assert "@media (max-width: 44rem)" in style
    light, dark = (set(re.findall(r"(--[\w-]+):", block)) for block in re.findall(r":root \{(.*?)\}", style, re.S)[:2])
    assert light == dark  # no color is forgotten in the dark
    used = set(re.findall(r"var\((--[\w-]+)\)", html))
    assert used <= light
    assert not re.search(r"#[0-9a-f]{3,6}\b", html.partition("</style>")[2])  # every color has a name
    for table in parsed.tables:  # on a phone the headings stand beside the cells
        headings = [cell["text"] for cell in table[0]]
        assert all([cell["data-label"] for cell in row] == headings for row in table[1:])
    widths = [float(w) for w in re.findall(r"width: ([\d.]+)px", style)]
    assert not widths  # nothing is wider than the page
    assert all(svg["viewbox"] for svg in parsed.all("svg"))


def test_colors_can_be_read_on_their_grounds(parsed):
    """WCAG's contrast of text, 4.5 to 1, of lines in pictures 3 to 1; computed by its definition."""

    def luminance(color):
        digits = color[1:] if len(color) == 7 else "".join(2 * one for one in color[1:])
        parts = [int(digits[at : at + 2], 16) / 255 for at in (0, 2, 4)]
        linear = [part / 12.92 if part <= 0.04045 else ((part + 0.055) / 1.055) ** 2.4 for part in parts]
        return sum(weight * part for weight, part in zip((0.2126, 0.7152, 0.0722), linear, strict=True))

    def contrast(one, other):
        high, low = sorted((luminance(one), luminance(other)), reverse=True)
        return (high + 0.05) / (low + 0.05)

    style = parsed.all("style")[0]["text"]
    for block in re.findall(r":root \{(.*?)\}", style, re.S)[:2]:
        named = dict(re.findall(r"--([\w-]+): (#\w+)", block))
        for ink, ground in (*((ink, g) for ink in ("fg", "soft", "ok", "bad") for g in ("bg", "card")),
                            ("fg", "ok-bg"), ("fg", "bad-bg"), ("ok", "ok-bg"), ("bad", "bad-bg")):  # fmt: skip
            assert contrast(named[ink], named[ground]) >= 4.5, (ink, ground)
        for number in range(8):
            assert contrast(named[f"c{number}"], named["bg"]) >= 3, number


def test_the_verdict_comes_first(parsed, manifest):
    first = [one for one in parsed.elements if one["tag"] in ("h1", "h2", "table") or "verdict" in one.get("class", "")]
    assert [one["tag"] for one in first[:2]] == ["h1", "div"]
    assert first[0]["text"] == manifest["name"]
    count = len(manifest["parity"]["lines"])
    assert first[1]["text"].split(";")[0].strip() == f"passed, {count} gates"
    assert first[1]["class"] == "verdict"


def test_the_report_shows_parity_operators_ledger_and_stages(parsed, manifest):
    operators = manifest["op_census"]
    assert parsed.table("operator") == [
        (op, str(operators["iter0"].get(op, 0)), str(operators["iter1"].get(op, 0)))
        for op in sorted({*operators["iter0"], *operators["iter1"]})
    ]
    gates = [row for table in parsed.tables for row in table[1:] if table[0][-1]["text"] == "verdict"]
    assert len(gates) == len(manifest["parity"]["lines"])
    for cells, line in zip(gates, manifest["parity"]["lines"], strict=True):
        compared, measure, value, limit, verdict = (cell["text"] for cell in cells)
        assert (compared, verdict) == (line["comparison"], "ok")
        assert measure == line["name"].replace(" in dB", "")
        number = float(value.rstrip("% natsdBx"))
        percent = "%" in value
        assert number == pytest.approx(line["value"] * (100 if percent else 1), rel=0.006, abs=0.0051 if percent else 0)
        assert limit[:2] == (">=" if line["name"].startswith("lowest") else "<=")
        assert len(re.sub(r"e-?\d+", "", value).replace("0.", "").strip("-0.% natsdB").replace(".", "")) <= 3
    assert [row[1] for row in parsed.table("what")] == [entry["where"] for entry in manifest["ledger"]]
    assert [row[0] for row in parsed.table("stage")] == [stage["name"] for stage in manifest["stages"]]


def test_sizes_are_a_picture_whose_words_add_up(parsed, manifest):
    texts = [one["text"] for one in parsed.all("text")]
    said = [re.fullmatch(r"([\d.,]+) MiB in (\d+) tensors", text) for text in texts]
    found = [(float(one[1].replace(",", "")), int(one[2])) for one in said if one]
    total = sum(row["nbytes"] for row in manifest["params"]) / 2**20
    assert sum(mib for mib, _ in found) == pytest.approx(total, rel=0.01)
    assert sum(tensors for _, tensors in found) == len(manifest["params"])
    assert [mib for mib, _ in found] == sorted((mib for mib, _ in found), reverse=True)


def test_the_picture_has_a_line_for_each_kind_of_linear_and_a_point_for_each_layer(parsed, manifest):
    titles = [one["text"] for one in parsed.all("title")]
    for name in ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"):
        for layer in range(4):
            (said,) = (text for text in titles if text.startswith(f"{name}, layer {layer}: "))
            (row,) = (
                row for row in manifest["params"]
                if row["sqnr_db"] is not None and f".layers.{layer}." in row["name"] and f".{name}." in row["name"]
            )  # fmt: skip
            assert float(said.split(": ")[1].removesuffix(" dB")) == pytest.approx(row["sqnr_db"], abs=0.051)
    assert [one["text"] for one in parsed.all("li")] == [
        *("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
    ]


def test_same_numbers_same_bytes(manifest, tmp_path):
    pages = set()
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        pages.add(write_report(tmp_path / name, Manifest.of(manifest)).read_bytes())
    assert len(pages) == 1


def test_names_from_outside_are_escaped(manifest, tmp_path):
    evil = copy.deepcopy(manifest)
    script = "<script>alert(1)</script>"
    evil["name"] = evil["checkpoint"]["path"] = evil["parity"]["lines"][0]["name"] = script
    evil["model"]["model_type"] = '"><img src=x onerror=alert(1)>'
    evil["op_census"]["iter0"][script] = evil["op_census"]["iter0"].pop("Add")
    quantized = next(row for row in evil["params"] if row["sqnr_db"] is not None and ".layers." in row["name"])
    quantized["name"] = f"model.layers.0.mlp.{script}.weight"
    evil["ledger"][0]["effect"] = {script: script}
    evil["parity"]["notes"] = [script]
    html = write_report(tmp_path, Manifest.of(evil)).read_text()
    assert "<script" not in html
    assert "<img" not in html
    page = Page(html)
    assert page.all("h1")[0]["text"] == page.all("title")[0]["text"] == script
    assert any(script in one["text"] for one in page.all("title")[1:])  # in a picture, too


def test_a_failed_gate_and_a_gate_that_never_ran_are_said(manifest, tmp_path):
    failed = copy.deepcopy(manifest)
    failed["parity"]["passed"] = failed["parity"]["lines"][0]["passed"] = False
    failed["parity"]["divergence"] = {"text": "first differs in model.layers.2.mlp.down_proj"}
    failed["parity"]["lines"][2]["passed"] = False
    page = Page(write_report(tmp_path, Manifest.of(failed)).read_text())
    (verdict,) = page.all("div", **{"class": "verdict bad"})
    assert verdict["text"].strip().startswith(f"FAILED, 2 of {len(failed['parity']['lines'])} gates")
    assert "first differs in model.layers.2.mlp.down_proj" in verdict["text"]
    assert "must be <= 1e-5" in verdict["text"]
    verdicts = [row[-1]["text"] for row in page.tables[0][1:4]]
    assert verdicts == ["FAILED", "FAILED", "ok"]  # what failed comes first
    page = Page(write_report(tmp_path, Manifest.of(manifest | {"parity": None})).read_text())
    (verdict,) = page.all("div", **{"class": "verdict bad"})
    assert "nothing is proven about this artifact" in verdict["text"]


def test_the_census_counts_every_node(demo_artifact, manifest):
    import onnx

    for graph in ("iter0", "iter1"):
        nodes = onnx.load(str(demo_artifact / f"{graph}.onnx"), load_external_data=False).graph.node
        census = op_census(demo_artifact / f"{graph}.onnx")
        assert census == manifest["op_census"][graph]
        assert sum(census.values()) == len(nodes)
        assert census["Vastai::QuantizedLinearPerChannel"] == 7 * 4 + 1


def test_the_ledger_has_the_measured_effect_of_quantizing(manifest):
    entry = next(entry for entry in manifest["ledger"] if "int8" in entry["what"])
    (kl,) = (line for line in manifest["parity"]["lines"] if line["name"] == "mean KL")
    assert entry["effect"]["kl_mean"] == pytest.approx(kl["value"])
    rows = [row for row in manifest["params"] if row["sqnr_db"] is not None]
    assert entry["effect"]["lowest_sqnr_db"] == min(row["sqnr_db"] for row in rows)
    assert f"{len(rows)} tensors" in entry["where"]


def test_a_limited_context_is_in_the_ledger_and_a_full_one_is_not(manifest):
    def whats(changed):
        return [entry["what"] for entry in ledger_of(changed)]

    longest = manifest["model"]["max_position_embeddings"]
    assert f"context limited to 256 of {longest} positions" in whats(manifest)
    full = manifest | {"contract": manifest["contract"] | {"context": longest}}
    assert not any("context limited" in what for what in whats(full))


@pytest.mark.parametrize(
    ("scheme", "words"), [("fp32", "no rounding"), ("bf16", "rounded to bfloat16"), ("fp16", "cache float16")]
)
def test_every_scheme_says_how_it_stores(manifest, scheme, words):
    found = ledger_of(manifest | {"scheme": scheme})
    assert words in found[0]["what"]
    effect = found[0]["effect"]
    assert effect["positions"] == manifest["parity"]["effect"]["positions"]
    assert not ledger_of(manifest | {"scheme": scheme, "parity": None})[0]["effect"]

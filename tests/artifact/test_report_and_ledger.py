"""The report shows what the manifest says, the ledger lists every allowed difference with its measured effect."""

import copy
import json
import re
from dataclasses import asdict

import pytest

from gemma_deploy.artifact.manifest import Manifest, op_census
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


def test_the_report_is_one_page_that_loads_nothing(html):
    assert not re.search(r"<(script|link|img)\b|@import|url\(http", html)
    assert html.count("<svg") == 1


def test_the_report_shows_size_operators_parity_ledger_and_stages(html, manifest):
    for op, count in manifest["op_census"]["iter1"].items():
        assert f"<td>{op}</td>" in html, (op, count)
    for line in manifest["parity"]["lines"]:
        assert line["comparison"] in html
        assert str(line["value"]) in html
    for entry in manifest["ledger"]:
        assert entry["where"].replace("'", "&#39;") in html
    for stage in manifest["stages"]:
        assert f"<td>{stage['name']}</td>" in html
    total = sum(row["nbytes"] for row in manifest["params"]) / 2**20
    sizes = re.search(r"<h2>Size</h2>.*?</table>", html, re.S).group()
    assert sum(map(float, re.findall(r">([\d.]+)</td></tr>", sizes))) == pytest.approx(total, abs=0.05)


def test_the_plot_has_a_line_for_each_kind_of_linear(html):
    for name in ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"):
        assert f"<!-- {name} -->" in html


def test_same_numbers_same_bytes(manifest, tmp_path):
    pages = set()
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        pages.add(write_report(tmp_path / name, Manifest.of(manifest)).read_bytes())
    assert len(pages) == 1


def test_names_from_outside_are_escaped(manifest, tmp_path):
    evil = copy.deepcopy(manifest)
    evil["name"] = evil["checkpoint"]["path"] = "<script>alert(1)</script>"
    assert "<script>" not in write_report(tmp_path, Manifest.of(evil)).read_text()


def test_a_failed_gate_and_a_gate_that_never_ran_are_said(manifest, tmp_path):
    failed = copy.deepcopy(manifest)
    failed["parity"]["passed"] = failed["parity"]["lines"][0]["passed"] = False
    failed["parity"]["divergence"] = {"text": "first differs in model.layers.2.mlp.down_proj"}
    page = write_report(tmp_path, Manifest.of(failed)).read_text()
    assert ">FAILED</p>" in page
    assert "model.layers.2.mlp.down_proj" in page
    page = write_report(tmp_path, Manifest.of(manifest | {"parity": None})).read_text()
    assert "nothing is proven about this artifact" in page


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

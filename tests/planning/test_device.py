"""Device files: typed, refused with key and line, and every number of a shipped one says where it is from."""

from pathlib import Path

import pytest
import yaml

from gemma_deploy.cli import main
from gemma_deploy.errors import UsageError
from gemma_deploy.planning.device import Device, shipped_devices

GOOD = """name: mine
kind: gpu
count: 2
memory_gb: 24
bandwidth_gb_s: 900.5
int8_tops: null
fp16_tflops: 100
fp32_tflops: 20
link_gb_s: 32
backends: [vllm]
"""


def test_a_file_is_read_with_its_defaults():
    device = Device.from_text(GOOD)
    assert (device.count, device.memory_gb, device.usable, device.int8_tops) == (2, 24.0, 0.9, None)
    assert device.room_bytes == 21_600_000_000
    assert Device.from_text(device.to_yaml()) == device


REFUSED = {
    "a key with a slip": (
        "memory_gb: 24",
        "memroy_gb: 24",
        ["line 4: memroy_gb: unknown key; did you mean `memory_gb`?"],
    ),
    "text for a number": (
        "memory_gb: 24",
        "memory_gb: lots",
        ["line 4: memory_gb: got 'lots' (text), expected a number"],
    ),
    "nothing to read": ("bandwidth_gb_s: 900.5", "bandwidth_gb_s: 0", ["line 5: bandwidth_gb_s: got 0.0 (a number)"]),
    "no such kind": (
        "kind: gpu",
        "kind: gup",
        ["line 2: kind: got 'gup' (text), expected one of", "did you mean `gpu`?"],
    ),
    "no such back end": ("[vllm]", "[vlm]", ["line 10: backends[0]: got 'vlm' (text)", "did you mean `vllm`?"]),
    "no back end": ("[vllm]", "[]", ["line 10: backends: "]),
    "half a device": ("count: 2", "count: 2.5", ["line 3: count: got 2.5 (a number), expected a whole number"]),
    "more than all": ("count: 2", "usable: 1.5", ["line 3: usable: got 1.5 (a number), expected at most 1"]),
    "a key that is missing": ("fp32_tflops: 20\n", "", ["fp32_tflops: missing, and required"]),
    "a source of nothing": ("count: 2", "sources: {speed: data sheet}", ["line 3: sources.speed: is no key"]),
    "a key given twice": ("count: 2", "kind: cpu", ["kind: the key is given twice, here and on line 3"]),
    "no YAML": ("[vllm]", "[vllm", ["not valid YAML"]),
    "a list": (GOOD, "- 1\n", ["expected a mapping"]),
}


@pytest.mark.parametrize(("old", "new", "said"), REFUSED.values(), ids=REFUSED)
def test_what_is_wrong_is_told_with_key_and_line(old, new, said):
    assert old in GOOD
    with pytest.raises(UsageError) as caught:
        Device.from_text(GOOD.replace(old, new), where="mine.yaml")
    message = str(caught.value)
    assert [words for words in said if words not in message] == []
    assert "mine.yaml" in message
    assert "docs/plan.md" in message


def test_all_mistakes_are_told_at_once():
    wrong = GOOD.replace("memory_gb: 24", "memory_gb: x").replace("kind: gpu", "kind: y")
    with pytest.raises(UsageError) as caught:
        Device.from_text(wrong)
    assert [line.partition(":")[0] for line in caught.value.problems] == ["line 2", "line 4"]


@pytest.mark.parametrize("name", shipped_devices())
def test_every_number_of_a_shipped_device_says_where_it_is_from(name):
    device = Device.load(name)
    numbers = {key for key in Device.model_fields if key.endswith(("_gb", "_gb_s", "tops", "tflops"))}
    told = {key for key in numbers if getattr(device, key) is not None}
    assert told <= set(device.sources)
    assert Device.from_text(device.to_yaml()) == device


def test_shipped_devices_are_those_of_the_help_and_a_file_that_is_none_is_refused(capsys):
    assert main(["plan", "--help"]) == 0
    shown = capsys.readouterr().out
    assert [name for name in shipped_devices() if name not in shown] == []
    assert main(["plan", "demo", "--device", "gpu-800gb"]) == 2
    said = capsys.readouterr().err
    assert "gpu-800gb" in said
    assert "gpu-80gb" in said


def test_a_refused_file_ends_the_command_with_2(tmp_path, capsys):
    file = tmp_path / "device.yaml"
    file.write_text(GOOD.replace("count: 2", "count: -1"))
    assert main(["plan", "demo", "--device", str(file)]) == 2
    assert "line 3: count: got -1 (a number), expected at least 1" in capsys.readouterr().err


def test_this_machine_becomes_a_file_that_is_read_again(tmp_path, monkeypatch, capsys):
    from gemma_deploy.planning import measure

    rates = {"fp32": 2.5e11, "fp16": None, "int8": 1.234e12}
    monkeypatch.setattr(measure, "product_rates", lambda threads: rates)
    monkeypatch.setattr(measure, "bandwidth_bytes_s", lambda threads: 5.4321e10)
    assert main(["plan", "--measure", str(tmp_path / "here.yaml")]) == 0
    assert str(tmp_path / "here.yaml") in capsys.readouterr().out
    device = Device.load(str(tmp_path / "here.yaml"))
    assert (device.int8_tops, device.fp16_tflops, device.fp32_tflops) == (1.23, 0.25, 0.25)
    assert device.bandwidth_gb_s == 54.3
    values = yaml.safe_load((tmp_path / "here.yaml").read_text())
    lines = Path("/proc/meminfo").read_text().splitlines()
    total = int(next(line for line in lines if line.startswith("MemTotal")).split()[1]) * 1024
    assert values["memory_gb"] <= total / 1e9 * 1.01
    assert values["kind"] == "cpu"


def test_products_are_timed_in_a_process_of_its_own(monkeypatch):
    from gemma_deploy.planning import measure, rates

    monkeypatch.setattr(rates, "SECONDS", 0.0)
    found = measure.product_rates(1)
    assert found["fp32"] > 1e8  # a product of a second would be 1e9
    assert all(rate is None or rate > 1e8 for rate in found.values())

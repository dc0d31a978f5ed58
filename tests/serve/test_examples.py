"""The programs and files of examples/serving: run against a server, checked by the tools that read them."""

import json
import re
import runpy
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("uvicorn")
pytest.importorskip("llguidance")

import yaml

from gemma_deploy.commands import serve
from tests.serve.test_bounds import running_server
from tests.serve.test_http import engine  # noqa: F401

FOLDER = Path(__file__).parent.parent.parent / "examples" / "serving"


def load(name):
    return runpy.run_path(str(FOLDER / name))


def text_of(name):
    return (FOLDER / name).read_text(encoding="utf-8")


def test_the_loop_calls_functions_and_gives_back_what_they_gave(speaker):
    program = load("tool_calls.py")
    with running_server(speaker) as ((host, port), _):
        url = f"http://{host}:{port}/v1"
        messages = program["converse"](url, "the list of a window", seed=1, max_tokens=200)
    question, call, result, *_ = messages
    assert question == {"role": "user", "content": "the list of a window"}
    (made,) = call["tool_calls"]
    arguments = json.loads(made["function"]["arguments"])
    assert made["function"]["name"] == "get_weather"
    assert result["tool_call_id"] == made["id"]
    assert json.loads(result["content"]) == json.loads(program["get_weather"](**arguments))
    assert messages[-1]["role"] in ("assistant", "tool")


def test_a_call_that_is_wrong_is_told_to_the_model():
    called = load("tool_calls.py")["called"]
    for name, arguments in (("none", "{}"), ("get_weather", "{"), ("get_weather", '{"town": "x"}')):
        assert "error" in json.loads(called({"function": {"name": name, "arguments": arguments}}))


def test_the_loop_ends_with_the_words_of_the_server(engine):  # noqa: F811
    with running_server(engine) as ((host, port), _), pytest.raises(SystemExit, match="no form of its own"):
        load("tool_calls.py")["converse"](f"http://{host}:{port}/v1", "a")


def test_the_script_asks_for_everything(speaker, tmp_path):
    curl = shutil.which("curl")
    if curl is None:
        pytest.skip("needs curl")
    (tmp_path / "key").write_text("a-key-of-a-test\n")
    with running_server(speaker) as ((host, port), _):
        command = ["sh", str(FOLDER / "ask.sh"), f"http://{host}:{port}", str(tmp_path / "key")]
        said = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert said.returncode == 0, said.stderr + said.stdout
    asked = re.findall(r"^ask (/\S+)", text_of("ask.sh"), re.MULTILINE)
    assert re.findall(r"^== (/\S+)$", said.stdout, re.MULTILINE) == asked
    assert "data: [DONE]" in said.stdout
    assert '\\"colour\\": ' in said.stdout
    assert "a-key-of-a-test" not in said.stdout + said.stderr


def test_openai_s_client_asks_for_everything(speaker, capsys):
    pytest.importorskip("openai")
    with running_server(speaker) as ((host, port), _):
        load("openai_client.py")["main"](f"http://{host}:{port}/v1", "none")
    said = capsys.readouterr().out
    assert {"completion:", "chat:", "logprobs:", "responses:"} <= set(re.findall(r"^\w+:", said, re.MULTILINE))
    assert "tokens read" in said


@pytest.mark.parametrize("program", ["openai_client.py", "tool_calls.py"])
def test_a_program_without_its_arguments_says_how_it_is_used(program, monkeypatch):
    if program == "openai_client.py":
        pytest.importorskip("openai")
    monkeypatch.setattr(sys, "argv", [program])
    with pytest.raises(SystemExit) as ended:
        runpy.run_path(str(FOLDER / program), run_name="__main__")
    assert f"\nUse: python examples/serving/{program} " in ended.value.code


def options_of(words):
    """Options in a command line, of which the program has to have each."""
    known = {option for parameter in serve.command.params for option in parameter.opts}
    found = [word for word in words if word.startswith("--")]
    assert set(found) <= known
    return found


def test_the_unit_is_one_that_systemd_takes(tmp_path):
    text = text_of("gemma-deploy.service")
    (command,) = re.findall(r"^ExecStart=(.*)$", text, re.MULTILINE)
    assert command.split()[:2] == ["/opt/gemma-deploy/bin/gemma-deploy", "serve"]
    assert "--api-key-file" in options_of(command.split())
    for line in ("DynamicUser=yes", "ProtectSystem=strict", "NoNewPrivileges=yes", "CapabilityBoundingSet="):
        assert line in text.splitlines()
    analyze = shutil.which("systemd-analyze")
    if analyze is None:
        pytest.skip("needs systemd-analyze")
    unit = tmp_path / "gemma-deploy.service"
    unit.write_text(text.replace(command.split()[0], sys.executable))
    said = subprocess.run([analyze, "verify", str(unit)], capture_output=True, text=True, timeout=60)
    assert (said.returncode, said.stderr) == (0, "")


def test_the_container_and_what_stands_beside_it_agree():
    lines = text_of("Dockerfile").splitlines()
    (entry,) = [json.loads(line.removeprefix("ENTRYPOINT ")) for line in lines if line.startswith("ENTRYPOINT")]
    (more,) = [json.loads(line.removeprefix("CMD ")) for line in lines if line.startswith("CMD")]
    assert entry[:2] == ["gemma-deploy", "serve"]
    options_of([*entry, *more])
    assert "USER 10001:10001" in lines
    services = yaml.safe_load(text_of("compose.yaml"))["services"]
    ours, webui = services["gemma"], services["open-webui"]
    assert ours["read_only"]
    assert ours["cap_drop"] == ["ALL"]
    assert "ports" not in ours
    assert ours["volumes"][0]["target"] == entry[2]
    assert more[1] == f"/run/secrets/{ours['secrets'][0]}"
    port = entry[entry.index("--port") + 1]
    assert webui["environment"]["OPENAI_API_BASE_URL"] == f"http://gemma:{port}/v1"
    assert all(one.startswith("127.0.0.1:") for one in webui["ports"])

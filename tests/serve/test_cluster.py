"""`serve --cluster`: replicas and stages on two nodes of a Ray cluster give one process's tokens, or say why not."""

import dataclasses
import importlib.util
import json
import shutil
import signal
import threading
from pathlib import Path

import numpy as np
import psutil
import pytest

pytest.importorskip("uvicorn")

import httpx2
from starlette.testclient import TestClient

from gemma_deploy.cli import main
from gemma_deploy.engine import open_engine
from gemma_deploy.errors import ArtifactError, DeployError, UsageError
from gemma_deploy.serve.http.app import Server
from gemma_deploy.serve.http.served import Served
from gemma_deploy.serve.opening import scheduling_of, worker_of
from gemma_deploy.serve.request import LostError
from tests.serve import test_command
from tests.serve.test_command import BODY, Process, gauge

ROOT = Path(__file__).parent.parent.parent
COMPLETIONS = "/v1/completions"
PROMPT = [2, *range(40, 90)]
ASKED = [
    {"prompt": [2, 50, 60], "temperature": 0, "logprobs": 2},
    {"prompt": PROMPT, "temperature": 0, "echo": True, "logprobs": 1},
    {"prompt": PROMPT, "temperature": 1, "seed": 7, "n": 3, "logprobs": 0},
    {"prompt": [2, 50, 60], "temperature": 0.8, "seed": 3, "top_p": 0.9, "repetition_penalty": 1.2},
]
LONG = BODY | {"n": 100}  # minutes, where nobody ends it


def until(what):
    """Wait for what Ray starts and ends, which takes long where a machine does other work."""
    test_command.until(what, seconds=120)


@pytest.mark.parametrize(
    ("words", "code", "said"),
    [
        (["--replicas", "2"], 2, "--replicas: of which cluster?"),
        (["--cluster", "head"], 2, "no address of a Ray cluster"),
        (["--cluster", "ray://127.0.0.1:10001"], 2, "auto or HOST:PORT"),
        (["--cluster", "127.0.0.1:1"], 1, "no Ray cluster answers: Connection refused"),
        (["--cluster", "127.0.0.1:1", "--adapter", "a"], 2, "take no adapters"),
        (["--cluster", "127.0.0.1:1", "--allow-adapters", "."], 2, "take no adapters"),
    ],
)
def test_what_is_no_cluster_is_told_before_any_work(monkeypatch, capsys, words, code, said):
    known = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: name if name == "ray" else known(name))
    assert main(["serve", "nowhere", *words]) == code  # the artifact is not looked at
    assert said in capsys.readouterr().err


def test_without_ray_the_command_to_install_it_is_given(monkeypatch, capsys):
    known = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "ray" else known(name))
    assert main(["serve", "nowhere", "--cluster", "127.0.0.1:6379"]) == 2
    assert 'pip install "gemma-deploy[ray]"' in capsys.readouterr().err


@pytest.fixture(scope="module")
def cluster():
    """Two nodes of two CPUs each, that somebody else started."""
    pytest.importorskip("ray", reason='ray is not installed: pip install -c constraints.txt ".[ray]"')
    from ray.cluster_utils import Cluster

    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", str(ROOT))
        patch.setenv("RAY_USAGE_STATS_ENABLED", "0")
        node = {"num_cpus": 2, "object_store_memory": 100 << 20}
        made = Cluster(initialize_head=True, head_node_args={**node, "include_dashboard": False})
        made.add_node(**node)
    yield made
    made.shutdown()


def actors(cluster, name):
    """Processes of its nodes that are actors of a class, in the order of their begin."""
    found = []
    for node in cluster.list_all_nodes():
        raylet = psutil.Process(node.all_processes["raylet"][0].process.pid)
        found += [one for one in raylet.children() if one.name().startswith(f"ray::{name}"[:15])]
    return sorted(found, key=lambda one: (one.create_time(), one.pid))


def up(url):
    text = httpx2.get(f"{url}/metrics").text
    return [line.endswith(" 1") for line in text.splitlines() if line.startswith("gemma_deploy_actor_up")]


def waiting(url):
    """Texts that replicas have to compute."""
    text = httpx2.get(f"{url}/metrics").text
    return sum(int(line[-3:]) for line in text.splitlines() if line.startswith("gemma_deploy_actor_requests"))


def choices(answer):
    assert answer.status_code == 200, answer.text
    body = answer.json()
    return body["choices"], body["usage"]["completion_tokens"]


def answers(ask):
    return [choices(ask(COMPLETIONS, json={**body, "max_tokens": 30})) for body in ASKED]


def alone(artifact):
    """What one process answers."""
    engine = open_engine(artifact, threads=1)
    served = Served(engine, worker_of(engine, scheduling_of(engine, cache_bytes=1 << 26)), ["x"])
    with TestClient(Server([served]).app()) as client:
        return answers(client.post)


@pytest.fixture
def front(cluster, served):
    found = Process(served, "--cluster", cluster.address, "--replicas", 2)
    yield found
    found.process.kill()
    found.process.communicate()
    until(lambda: not actors(cluster, "Replica"))


def asking(url, count, body):
    """Threads that ask, and what they get: (status, Retry-After, body)."""
    got = []

    def ask():
        answer = httpx2.post(f"{url}{COMPLETIONS}", json=body, timeout=120)
        got.append((answer.status_code, answer.headers.get("retry-after"), answer.json()))

    threads = [threading.Thread(target=ask) for _ in range(count)]
    for one in threads:
        one.start()
    return threads, got


def test_replicas_answer_as_one_process_does_and_a_signal_ends_them_alone(cluster, served, front):
    import ray

    expected = alone(served)
    nodes = {line for line in httpx2.get(f"{front.url}/metrics").text.splitlines() if "actor_up{" in line}
    assert len({line.partition("node=")[2] for line in nodes}) == 2  # one on each
    for _ in range(2):  # either of them, and what it has read before
        with httpx2.Client(base_url=front.url, timeout=120) as client:
            assert [texts for texts, _ in answers(client.post)] == [texts for texts, _ in expected]
    guided = {"prompt": [2, 50, 60], "guided_choice": ["ab", "ba"], "max_tokens": 9, "n": 2}
    assert {one["text"] for one in choices(httpx2.post(f"{front.url}{COMPLETIONS}", json=guided, timeout=120))[0]} <= {
        "ab",
        "ba",
    }
    wrong = httpx2.post(f"{front.url}{COMPLETIONS}", json={"prompt": [2], "guided_regex": "("}, timeout=120)
    assert wrong.status_code == 400
    # A stream whose client leaves.
    with httpx2.stream("POST", f"{front.url}{COMPLETIONS}", json=LONG | {"stream": True}, timeout=120) as stream:
        assert next(stream.iter_lines()).startswith("data: {")
    until(lambda: gauge(front.url, "requests_running") == 0)
    assert gauge(front.url, "generation_tokens_total") < 100 * 700
    # Somebody else's actor, and a stream that is running when the program is to end.
    ray.init(address=cluster.address, log_to_driver=False, namespace="other")
    try:
        other = ray.remote(Others).options(lifetime="detached", name="other", num_cpus=0).remote()
        assert ray.get(other.here.remote())
        with httpx2.stream("POST", f"{front.url}{COMPLETIONS}", json=BODY | {"stream": True}, timeout=120) as stream:
            lines = stream.iter_lines()
            first = next(lines)
            front.process.send_signal(signal.SIGTERM)
            events = [json.loads(line[6:]) for line in (first, *lines) if line.startswith("data: {")]
        assert events[-1]["choices"][0]["finish_reason"] == "length"
        assert "".join(event["choices"][0]["text"] for event in events) == "c" * 700
        _, said = front.process.communicate(timeout=120)
        assert front.process.returncode == 0
        assert "Traceback" not in said
        until(lambda: not actors(cluster, "Replica"))
        assert ray.get(other.here.remote())
        assert ray.available_resources()["CPU"] == 4
        ray.kill(other)
    finally:
        ray.shutdown()


class Others:
    def here(self):
        return True


def test_a_killed_replica_is_started_again_and_nobody_waits_for_ever(cluster, served, front):
    url, body = front.url, BODY | {"max_tokens": 300}
    text = choices(httpx2.post(f"{url}{COMPLETIONS}", json=body, timeout=120))[0]
    # One that computes nothing, as a machine that stands still: what it was given is computed by the other.
    first = actors(cluster, "Replica")[0]
    first.suspend()
    threads, got = asking(url, 4, body)
    until(lambda: len(got) == 2)
    first.kill()
    for one in threads:
        one.join(timeout=120)
    assert [status for status, _, _ in got] == [200] * 4
    assert all(body["choices"] == text for _, _, body in got)
    until(lambda: up(url) == [True, True])
    assert not first.is_running()
    # Texts that are being said, one of them streamed, when both die.
    with httpx2.stream("POST", f"{url}{COMPLETIONS}", json=LONG | {"stream": True}, timeout=120) as stream:
        lines = stream.iter_lines()
        next(lines)
        threads, got = asking(url, 2, LONG)
        until(lambda: waiting(url) >= 200)
        for one in actors(cluster, "Replica"):
            one.kill()
        said = [json.loads(line[6:]) for line in lines if line.startswith("data: {")]
    assert said[-1]["error"]["code"] == "replica_lost"
    for one in threads:
        one.join(timeout=120)
    for status, again, error in got:
        assert (status, again, error["error"]["code"]) == (503, "1", "replica_lost")
    assert httpx2.get(f"{url}/health").status_code in (200, 503)
    until(lambda: up(url) == [True, True])
    assert httpx2.get(f"{url}/health").status_code == 200
    assert choices(httpx2.post(f"{url}{COMPLETIONS}", json=body, timeout=120))[0] == text
    restarts = [line for line in httpx2.get(f"{url}/metrics").text.splitlines() if "actor_restarts_total{" in line]
    assert [line[-2:] for line in restarts] == [" 2", " 1"] or [line[-2:] for line in restarts] == [" 1", " 2"]


@pytest.fixture
def joined(cluster, served):
    """(artifact) -> a cluster joined for it by this process."""
    import ray

    from gemma_deploy.artifact.check import open_whole
    from gemma_deploy.serve.cluster.opening import Joined

    made = Joined(cluster.address, [open_whole(served)], replicas=1, threads=1)
    yield made
    made.close()
    assert not ray.is_initialized()
    until(lambda: not actors(cluster, "Replica"))


def without_weights(path):
    """A copy beside it, whose manifest and small files are there."""
    copy = Path(f"{path}-without")
    if not copy.exists():
        shutil.copytree(path, copy, ignore=shutil.ignore_patterns("*.safetensors"))
    return str(copy)


LIMITS = {"together": 4, "queue": 4, "context": 0, "cache_bytes": 1 << 26}


@pytest.mark.parametrize(
    ("change", "kind", "said"),
    [
        (lambda wanted: {"path": wanted.path + "-elsewhere"}, ArtifactError, "has no artifact there"),
        (lambda wanted: {"manifest": "0" * 64}, ArtifactError, "another version of the artifact"),
        (lambda wanted: {"path": without_weights(wanted.path)}, ArtifactError, "No such file"),
        (lambda wanted: {"versions": {**wanted.versions, "numpy": "0.1"}}, DeployError, "this Ray node has numpy "),
    ],
)
def test_a_node_that_lacks_something_is_refused_by_its_name(joined, cluster, served, monkeypatch, change, kind, said):
    from gemma_deploy.serve.cluster import opening

    known = opening.wanted_of
    monkeypatch.setattr(
        opening, "wanted_of", lambda *given: dataclasses.replace(known(*given), **change(known(*given)))
    )
    with pytest.raises(kind, match=said) as caught:
        joined.computing(open_engine(served), LIMITS)
    names = [node.node_id[:8] for node in cluster.list_all_nodes()]
    assert any(f"node {name}" in caught.value.where for name in names)


def test_a_cluster_that_is_too_small_is_refused_and_nothing_of_it_is_kept(cluster, served):
    import ray

    from gemma_deploy.artifact.check import open_whole
    from gemma_deploy.serve.cluster.opening import Joined

    made = Joined(cluster.address, [open_whole(served)], replicas=3, threads=2)
    try:
        with pytest.raises(UsageError, match="room for 2 of 3 actors of 2 processors"):
            made.computing(open_engine(served), LIMITS)
        assert ray.available_resources()["CPU"] == 4
    finally:
        made.close()


@pytest.fixture(scope="module")
def staged(once):
    """A tiny Gemma 3 in int8 in two stages; read only."""

    def make(root):
        from gemma_deploy.compile import compile_recipe
        from gemma_deploy.recipe import Recipe
        from tests.native.test_backend import recipe_of

        root.mkdir()
        recipe_of(root, "gemma3_text", "w8a16", type="tvm_vacc", context=400)
        file = root / "recipe.json"
        told = json.loads(file.read_text()) | {"split": {"points": [2]}}
        told["frontend"]["shape"]["input_ids"] = [[64], [400]]
        file.write_text(json.dumps(told))
        compile_recipe(Recipe.load(file), parity=False)

    return once("served-stages", make) / "w" / "x"


def test_stages_answer_as_one_process_does_and_one_that_dies_is_started_again(cluster, staged):
    expected = alone(staged)
    front = Process(staged, "--cluster", cluster.address)
    try:
        url = front.url
        with httpx2.Client(base_url=url, timeout=120) as client:
            assert [texts for texts, _ in answers(client.post)] == [texts for texts, _ in expected]
        assert up(url) == [True, True]
        body = BODY | {"max_tokens": 300}
        text = choices(httpx2.post(f"{url}{COMPLETIONS}", json=body, timeout=120))[0]
        # One dies in the middle of a text, the other while nothing is asked of it.
        with httpx2.stream("POST", f"{url}{COMPLETIONS}", json=LONG | {"stream": True}, timeout=120) as stream:
            lines = stream.iter_lines()
            next(lines)
            actors(cluster, "StageActor")[0].kill()
            said = [json.loads(line[6:]) for line in lines if line.startswith("data: {")]
        assert said[-1]["error"]["code"] == "replica_lost"
        assert choices(httpx2.post(f"{url}{COMPLETIONS}", json=body, timeout=120))[0] == text
        actors(cluster, "StageActor")[0].kill()
        assert choices(httpx2.post(f"{url}{COMPLETIONS}", json=body, timeout=120))[0] == text
        code, said = front.end()
        assert code == 0
        assert "Traceback" not in said
    finally:
        front.process.kill()
        front.process.communicate()
    until(lambda: not actors(cluster, "StageActor"))


def test_a_stage_that_has_another_text_refuses_to_go_on(staged):
    """As one that was started again would be asked to: an empty cache gives other words, and no error."""
    from gemma_deploy.serve.cluster.stage import StageActor

    actor, stages = StageActor(), open_engine(staged, threads=1)
    actor._stage, actor._check, actor._text = stages.stage("bottom"), lambda: None, 0
    ids = np.zeros((1, 64), np.int64) + 50
    given = {"input_ids": ids, "attention_mask": np.ones_like(ids), "position_ids": np.arange(64)[None]}
    step = {"input_ids": ids[:, :1], "position_ids": np.array([[64]])}
    assert isinstance(actor.step(step, {}, text=1, position=64, passing=()), LostError)  # nothing was read
    assert set(actor.prefill(given, {}, text=1, passing=())) == {"inputs_embeds"}
    assert isinstance(actor.step(step, {}, text=2, position=64, passing=()), LostError)  # another text
    assert isinstance(actor.step(step, {}, text=1, position=65, passing=()), LostError)  # a step is missing
    assert set(actor.step(step, {}, text=1, position=64, passing=())) == {"inputs_embeds"}
    lost = LostError("x", next_step="y")
    assert actor.step(step, lost, text=1, position=65, passing=()) is lost  # and passes on what went wrong before


def test_replicas_of_a_divided_artifact_are_refused(cluster, staged, capsys):
    assert main(["serve", str(staged), "--cluster", cluster.address, "--replicas", "2"]) == 2
    assert "divided into stages" in capsys.readouterr().err

"""`gemma-deploy bench --server`: figures of known times, and what is asked of a server and kept of its answers."""

import json

import numpy as np
import pytest

from gemma_deploy.bench import picture
from gemma_deploy.bench import server as measuring
from gemma_deploy.bench.requests import Answer, Load, summary
from gemma_deploy.bench.server import measure_server
from gemma_deploy.cli import main
from gemma_deploy.client import Target
from gemma_deploy.errors import DeployError, UsageError

httpx2 = pytest.importorskip("httpx2")
URL = "http://127.0.0.1:1"


def events(*told):
    return "".join(f"data: {one if isinstance(one, str) else json.dumps(one)}\n\n" for one in told)


def pieces(count, usage=None):
    made = [{"choices": [{"text": "a"}]} for _ in range(count)]
    usage = {"completion_tokens": count} if usage is None else usage
    return events(*made, {"choices": [], "usage": usage}, "[DONE]")


class Server:
    """Answers as told; keeps requests, and how many were there at once."""

    def __init__(self, answer=None, models=("m",), status=200):
        self.answer, self.models, self.status = answer, models, status
        self.bodies, self.headers = [], []

    async def __call__(self, request):
        self.headers.append(request.headers)
        if request.url.path.endswith("/models"):
            return httpx2.Response(200, json={"data": [{"id": name} for name in self.models]})
        body = json.loads(request.content)
        self.bodies.append(body)
        text = pieces(body["max_tokens"]) if self.answer is None else self.answer
        kind = "text/event-stream" if self.status == 200 else "application/json"
        return httpx2.Response(self.status, text=text, headers={"content-type": kind})

    def measure(self, *loads, target=None, **options):
        transport = httpx2.MockTransport(self)
        return measure_server(target or Target(URL), loads or [Load(7, 3, 2, 5)], transport=transport, **options)


def test_figures_follow_from_times():
    random = np.random.default_rng(0)
    answers = []
    for sent in (0.0, 0.5, 1.0, 3.0):
        times = sent + 0.1 + np.cumsum(random.uniform(0.01, 0.2, 5))
        answers.append(Answer(sent, list(times), times[-1] + 0.01, tokens=6, cached=2))
    answers.append(Answer(2.0, ended=9.0, problem="no"))
    found = summary(Load(50, 6, 2, 5), answers, {"ttft": 200.0})
    good = answers[:4]
    first = np.array([one.pieces[0] - one.sent for one in good]) * 1e3
    whole = np.array([one.ended - one.sent for one in good]) * 1e3
    gaps = np.concatenate([np.diff(one.pieces) for one in good]) * 1e3
    for name, values in {"ttft": first, "e2el": whole, "tpot": (whole - first) / 5, "itl": gaps}.items():
        expected = {"mean": values.mean(), "median": np.median(values)}
        expected |= {f"p{part}": np.percentile(values, part) for part in (95, 99)}
        assert found[f"{name}_ms"] == pytest.approx(expected)
    assert found["seconds"] == 9.0
    assert (found["output_tok_s"], found["total_tok_s"]) == pytest.approx((24 / 9, 224 / 9))
    assert found["goodput_requests_s"] == pytest.approx((first <= 200).sum() / 9)
    assert 0 < found["goodput_requests_s"] < 4 / 9
    assert (found["requests"], found["failed"], found["problems"], found["cached_tokens"]) == (5, 1, ["no"], 8)


def test_nothing_but_failures_has_no_times():
    found = summary(Load(5, 5, 1, 1), [Answer(0.0, ended=1.0, problem="no")], {})
    assert found["ttft_ms"] is found["goodput_requests_s"] is None
    assert found["output_tok_s"] == 0


def test_a_token_without_text_is_a_piece_and_the_end_is_none(monkeypatch):
    kept = []
    monkeypatch.setattr(measuring, "summary", lambda load, answers, limits: kept.extend(answers) or {})
    tokens = [{"choices": [{"text": text, "finish_reason": None}]} for text in ("", "a", "")]
    end = {"choices": [{"text": "", "finish_reason": "length"}], "usage": {"completion_tokens": 3}}
    Server(events(*tokens, end, "[DONE]")).measure(Load(5, 3, 1, 1))
    assert [len(one.pieces) for one in kept] == [3]
    only = {"choices": [{"text": "", "finish_reason": "length"}], "usage": {"completion_tokens": 1}}
    Server(events(only, "[DONE]")).measure(Load(5, 1, 1, 1))
    assert [(len(one.pieces), one.problem) for one in kept[1:]] == [(1, "")]


def test_requests_are_of_the_lengths_and_no_prompt_comes_twice():
    server = Server()
    found = server.measure(Load(7, 3, 2, 5), Load(4, 1, 1, 2), target=Target(f"{URL}/v1/", key="k", vocabulary=50))
    assert [(load["requests"], load["failed"], load["output_tokens_made"]) for load in found["loads"]] == [
        (5, 0, 15),
        (2, 0, 2),
    ]
    assert found["loads"][1]["tpot_ms"] is None
    assert len(server.bodies) == 5 + 2 + 2  # one that does not count before each
    prompts = [tuple(body["prompt"]) for body in server.bodies]
    assert [len(prompt) for prompt in prompts] == [7] * 6 + [4] * 3
    assert len(set(prompts)) == len(prompts)
    assert all(0 < token < 50 for prompt in prompts for token in prompt)
    body = server.bodies[0]
    assert (body["ignore_eos"], body["min_tokens"], body["max_tokens"], body["model"]) == (True, 3, 3, "m")
    assert {headers.get("authorization") for headers in server.headers} == {"Bearer k"}
    assert "proxy-authorization" not in server.headers[0]


def test_as_many_as_asked_are_under_way():
    import asyncio

    now = most = 0

    class Slow(Server):
        async def __call__(self, request):
            nonlocal now, most
            now += 1
            most = max(most, now)
            for _ in range(20):
                await asyncio.sleep(0)
            now -= 1
            return await super().__call__(request)

    Slow().measure(Load(2, 2, 3, 9))
    assert most == 3


@pytest.mark.parametrize(
    ("answer", "problem"),
    [
        (pieces(2), "answered 2 tokens instead of 3"),
        (pieces(3, {}), "a piece of the stream is not"),
        (events({"choices": [{"text": "a"}]}), "the stream ended early"),
        (events({"choices": 5}), "a piece of the stream is not"),
        (events("{"), "a piece of the stream is not"),
        (events([]), "a piece of the stream is not"),
        (events({"error": {"message": "out of pages"}}), "out of pages"),
        (events({"choices": [], "usage": {"completion_tokens": 3}}, "[DONE]"), "an answer without text"),
        ("data: " + "a" * (measuring.EVENT_BYTES + 1), "SSEError"),
    ],
)
def test_answers_that_are_none_are_said(answer, problem):
    with pytest.raises(DeployError, match=problem):
        Server(answer).measure()


def test_errors_of_a_server_are_said_and_counted():
    with pytest.raises(DeployError, match="429: busy"):
        Server('{"error": {"message": "busy"}}', status=429).measure()
    with pytest.raises(DeployError, match="500: oh oh") as refused:
        Server("oh  oh" + "!" * 99_999, status=500).measure()
    assert len(str(refused.value)) < 700

    class Once(Server):
        async def __call__(self, request):
            self.status = 200 if len(self.bodies) < 2 else 503
            return await super().__call__(request)

    found = Once().measure(Load(2, 2, 1, 3))["loads"][0]
    assert (found["requests"], found["failed"]) == (3, 2)
    assert found["problems"][0].startswith("503: ")


def test_the_model_is_the_only_one_or_named():
    with pytest.raises(UsageError, match="several models") as refused:
        Server(models=("a", "b")).measure()
    assert "a, b" in str(refused.value)
    with pytest.raises(UsageError, match="no model named 'c'"):
        Server(models=("a", "b")).measure(target=Target(URL, "c"))
    assert Server(models=("a", "b")).measure(target=Target(URL, "b"))["model"] == "b"


def test_pictures_have_a_line_for_each_pair_of_lengths(tmp_path):
    found = Server().measure(Load(7, 3, 1, 2), Load(7, 3, 2, 2), Load(9, 1, 2, 2))
    picture.draw_server(found, tmp_path / "a.svg")
    assert "9 in, 1 out" in (text := (tmp_path / "a.svg").read_text()) or text.count("<use") > 6


def test_the_command_shows_and_writes(monkeypatch, tmp_path, capsys):
    server = Server()
    real = measuring.measure_server
    monkeypatch.setattr(
        measuring, "measure_server", lambda *words, **rest: real(*words, **rest, transport=httpx2.MockTransport(server))
    )
    (tmp_path / "key").write_text("secret\n")
    out = tmp_path / "a.json"
    sizes = ["--input-lens", "3,5", "--output-lens", "2", "--concurrencies", "1,2", "--requests", "3"]
    more = ["--goodput", "ttft:60000", "--api-key-file", str(tmp_path / "key"), "--json", str(out)]
    assert main(["bench", "--server", URL, *sizes, *more]) == 0
    said = capsys.readouterr()
    assert "secret" not in said.out + said.err
    assert server.headers[0]["authorization"] == "Bearer secret"
    written = json.loads(out.read_text())
    keys = [(load["input_tokens"], load["output_tokens"], load["concurrency"]) for load in written["loads"]]
    assert keys == [(3, 2, 1), (3, 2, 2), (5, 2, 1), (5, 2, 2)]
    assert all(load["goodput_requests_s"] == load["requests_s"] for load in written["loads"])
    server.answer = pieces(2)
    server.status = 200
    server.answer = None
    calls = len(server.bodies)

    async def failing(request, reply=server.__call__):
        if len(server.bodies) > calls:
            return httpx2.Response(503, text="no")
        return await reply(request)

    monkeypatch.setattr(
        measuring,
        "measure_server",
        lambda *words, **rest: real(*words, **rest, transport=httpx2.MockTransport(failing)),
    )
    assert main(["bench", "--server", URL, *sizes[:2], "--concurrencies", "1", "--requests", "2"]) == 1


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ([], "name one thing to measure"),
        (["a", "--server", URL], "name one thing to measure"),
        (["--server", URL, "--threads", "2"], "--threads: of an artifact only"),
        (["a", "--model", "m", "--requests", "1"], "--model, --requests: of a server only"),
        (["--server", URL, "--concurrencies", "none"], "--concurrencies: at least one number"),
        (["--server", URL, "--goodput", "ttft"], "expected ttft:MS"),
        (["--server", URL, "--goodput", "itl:5"], "expected ttft:MS"),
        (["--server", URL, "--goodput", "ttft:nan"], "expected ttft:MS"),
        (["--server", URL, "--api-key-file", "nothing"], "nothing"),
        (["--server", "no address"], "no answer"),
        (["--server", "ftp://127.0.0.1"], "no answer"),
    ],
)
def test_what_makes_no_sense_is_refused(words, said, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert main(["bench", *words]) in (1, 2)
    assert said in capsys.readouterr().err

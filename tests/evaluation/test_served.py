"""`eval --server`: what a server computes is judged as what is on this machine; what it cannot do is said."""

import json
from functools import lru_cache

import numpy as np
import pytest

from gemma_deploy.client import Target
from gemma_deploy.errors import DeployError, UsageError
from gemma_deploy.evaluation import served
from gemma_deploy.evaluation.tasks import ExamRequest, TextRequest
from tests.evaluation.conftest import BOS, log_softmax, logits_of, run, stock_model, tokens_of
from tests.evaluation.make import questions, write_exam

httpx2 = pytest.importorskip("httpx2")
URL = "http://127.0.0.1:1"
WINDOWS = ("--windows", 3, "--seqlen", 24)


class Server:
    """transformers' model behind OpenAI's protocol."""

    def __init__(self, checkpoint, longest=None):
        model, self.checkpoint, self.bodies = stock_model(checkpoint), checkpoint, []
        self.told = {"id": "m"} | ({"max_model_len": longest} if longest else {})
        self.scores = lru_cache(None)(lambda ids: log_softmax(logits_of(model, ids)))

    def __call__(self, request):
        if request.url.path == "/v1/models":
            return httpx2.Response(200, json={"data": [self.told]})
        body = json.loads(request.content)
        if request.url.path == "/tokenize":
            first = [BOS] if body["add_special_tokens"] else []
            text = body["prompt"] if body.get("parse_special") else body["prompt"].replace("<", "< ")
            return httpx2.Response(200, json={"tokens": first + tokens_of(self.checkpoint, text)})
        assert request.url.path == "/v1/completions"
        self.bodies.append(body)
        choices = [self.choice(index, tuple(ids)) for index, ids in enumerate(body["prompt"])]
        return httpx2.Response(200, json={"choices": choices[::-1]})  # the order is not said to be that of the prompts

    def choice(self, index, ids):
        scores = self.scores(ids)
        given = [float(scores[at, token]) for at, token in enumerate(ids[1:])]
        return {"index": index, "logprobs": {"token_logprobs": [None, *given, float(scores[-1].max())]}}

    def open(self, **options):
        return served.open_server(Target(URL, **options), httpx2.MockTransport(self))


@pytest.fixture(scope="module")
def server(checkpoint):
    return Server(checkpoint)


def test_perplexity_is_that_of_the_same_weights_here(server, checkpoint, text_file, tmp_path, capfd):
    file = tmp_path / "a.json"
    code, _, err = run(capfd, "eval", checkpoint, "--task", "ppl", "--text", text_file, *WINDOWS, "--json", file)
    assert code == 0, err
    here = json.loads(file.read_text())
    request = TextRequest(text_file, 3, 24)
    with server.open() as model:
        there = [served.run_text(model, request, tokenizer=place) for place in (None, checkpoint)]
    assert there[0] == there[1]
    assert there[0]["settings"] == here["settings"]
    assert there[0]["scored_tokens"] == here["scored_tokens"] == 3 * 23
    for key in ("perplexity", "perplexity_error"):  # float32 here, float64 there: 6e-8 apart
        assert there[0][key] == pytest.approx(here[key], rel=1e-6)
    spelled = tmp_path / "spelled.txt"
    spelled.write_text(text_file.read_text().replace(" ", " <unk> "))  # WikiText is full of it
    with server.open() as model:
        there = [served.run_text(model, TextRequest(spelled, 3, 24), tokenizer=place) for place in (None, checkpoint)]
    assert there[0] == there[1]
    assert all(body["echo"] and body["logprobs"] == 1 and body["temperature"] == 0 for body in server.bodies)
    assert all(ids[0] == BOS and BOS not in ids[1:] for body in server.bodies for ids in body["prompt"])


def test_choices_are_those_of_the_same_weights_here(server, checkpoint, tmp_path, capfd):
    exam, file = write_exam(tmp_path / "exam.zip", questions(6)), tmp_path / "a.json"
    words = ("--task", "ceval", "--path", exam, "--shots", 1, "--json", file)
    code, _, err = run(capfd, "eval", checkpoint, *words)
    assert code == 0, err
    here = json.loads(file.read_text())
    with server.open() as model:
        there = served.run_exam(model, ExamRequest(exam, shots=1))
    assert there["prompts_sha256"] == here["prompts_sha256"]
    assert there["subjects"] == here["subjects"]
    for one, other in zip(there["answers"], here["answers"], strict=True):
        assert {**one, "logits": 0} == {**other, "logits": 0}
        assert np.diff(one["logits"]) == pytest.approx(np.diff(other["logits"]), abs=2e-5)
    assert len({one["choice"] for one in there["answers"]}) > 1


def test_the_servers_length_counts(checkpoint, text_file):
    short = Server(checkpoint, longest=13)  # one is for the token behind the prompt
    with short.open() as model:
        assert served.run_text(model, TextRequest(text_file, 2, None))["settings"]["seqlen"] == 12
        with pytest.raises(UsageError, match="windows of 13 tokens are longer than the 12"):
            served.run_text(model, TextRequest(text_file, 2, 13))


def test_positions_without_a_number_are_counted_and_left_out(server, text_file, monkeypatch):
    real = server.choice

    def holes(index, ids):
        made = real(index, ids)
        made["logprobs"]["token_logprobs"][5] = None
        return made

    def nothing(index, ids):
        return {"index": index, "logprobs": {"token_logprobs": [None] * len(ids)}}

    with server.open() as model:
        whole = served.run_text(model, TextRequest(text_file, 3, 24))
        monkeypatch.setattr(server, "choice", holes)
        found = served.run_text(model, TextRequest(text_file, 3, 24))
        monkeypatch.setattr(server, "choice", nothing)
        with pytest.raises(DeployError, match="inf or NaN"):
            served.run_exam(model, ExamRequest(shots=0, limit=1))
    assert (found["bad_positions"], found["scored_tokens"]) == (3, 66)
    assert found["perplexity"] != whole["perplexity"]


@pytest.mark.parametrize(
    ("answer", "said"),
    [
        (httpx2.Response(200, json={"choices": [{"index": 0, "text": "a"}]}), "no log-probabilities of prompts"),
        (
            httpx2.Response(200, json={"choices": [{"index": 0, "logprobs": {"token_logprobs": [None]}}]}),
            "no log-probabilities of prompts",
        ),
        (httpx2.Response(200, json=[]), "no JSON object"),
        (httpx2.Response(200, text="{"), "no JSON"),
        (httpx2.Response(400, json={"error": {"message": "echo is not built"}}), "400: echo is not built"),
    ],
)
def test_servers_that_cannot_are_refused(checkpoint, text_file, answer, said):
    def reply(request):
        return httpx2.Response(200, json={"data": [{"id": "m"}]}) if request.url.path == "/v1/models" else answer

    opened = served.open_server(Target(URL), httpx2.MockTransport(reply))
    with opened as model, pytest.raises(DeployError, match=said):
        served.run_text(model, TextRequest(text_file, 2, 9), tokenizer=checkpoint)


def test_a_server_without_tokenizer_or_bos_is_told(text_file):
    def reply(request):
        data = {"data": [{"id": "m"}], "tokens": [5] if request.url.path == "/tokenize" else None}
        return httpx2.Response(200, json=data)

    opened = served.open_server(Target(URL), httpx2.MockTransport(reply))
    with opened as model, pytest.raises(DeployError, match="puts no BOS in front"):
        served.run_text(model, TextRequest(text_file, 2, 9))
    lost = httpx2.MockTransport(
        lambda request: httpx2.Response(200, json={"data": [{"id": "m"}]} if "models" in request.url.path else {})
    )
    with served.open_server(Target(URL), lost) as model, pytest.raises(DeployError, match="holds no tokens"):
        served.run_text(model, TextRequest(text_file, 2, 9))


def test_the_command(server, text_file, capfd, tmp_path, monkeypatch):
    real = served.open_server
    monkeypatch.setattr(served, "open_server", lambda target: real(target, httpx2.MockTransport(server)))
    file = tmp_path / "a.json"
    words = ("--task", "ppl", "--text", text_file, *WINDOWS, "--json", file)
    code, out, err = run(capfd, "eval", "--server", URL, *words)
    assert code == 0, err
    assert f"m at {URL}" in " ".join(out.split())
    assert json.loads(file.read_text())["target"] == {"path": "m", "kind": "server", "scheme": ""}


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ([], "name one thing to evaluate"),
        (["a", "--server", URL], "name one thing to evaluate"),
        (["--server", URL, "--against", "hf", "--kernels", "strict"], "--against, --kernels: not with --server"),
        (["a", "--model", "m", "--tokenizer", "x"], "--model, --tokenizer: not without --server"),
        (["--server", "no address"], "no answer"),
    ],
)
def test_what_does_not_go_together_is_refused(words, said, capfd):
    code, _, err = run(capfd, "eval", *words, "--task", "ppl")
    assert code in (1, 2)
    assert said in err

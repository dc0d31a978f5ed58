"""`/v1/embeddings`: the vectors of `open_embedder`, beside an artifact that makes text."""

import base64

import numpy as np
import pytest

pytest.importorskip("starlette")

from starlette.testclient import TestClient

from gemma_deploy.artifact.opened import Artifact
from gemma_deploy.engine import open_embedder
from gemma_deploy.serve.http.app import Server
from gemma_deploy.serve.http.embeddings import ServedEncoder
from gemma_deploy.serve.http.served import Served
from gemma_deploy.serve.opening import scheduling_of, worker_of
from gemma_deploy.testing import TINY_PROMPTS
from tests.serve.test_http import COMPLETIONS, engine, post  # noqa: F401
from tests.test_embed import TEXTS, checkpoint, dynamic  # noqa: F401

EMBEDDINGS = "/v1/embeddings"


@pytest.fixture(scope="module")
def embedder(dynamic):  # noqa: F811
    return open_embedder(dynamic, threads=1)


@pytest.fixture(scope="module")
def client(engine, embedder, dynamic):  # noqa: F811
    texts = Served(engine, worker_of(engine, scheduling_of(engine, cache_bytes=1 << 26)), ["tiny"])
    encoder = ServedEncoder(embedder, Artifact.open(dynamic), ["vectors", "text-embedding-3-small"])
    with TestClient(Server([texts], encoders=[encoder]).app()) as found:
        yield found


def test_vectors_are_those_of_the_encoder(client, embedder):
    whole = post(client, EMBEDDINGS, input=TEXTS, model="vectors")
    assert [one["index"] for one in whole["data"]] == [0, 1, 2]
    np.testing.assert_array_equal(
        np.array([one["embedding"] for one in whole["data"]], np.float32), embedder.embed(TEXTS)
    )
    assert whole["usage"]["prompt_tokens"] == whole["usage"]["total_tokens"] > 20
    one = post(client, EMBEDDINGS, input=TEXTS[0], encoding_format="base64", model="text-embedding-3-small")
    vector = np.frombuffer(base64.b64decode(one["data"][0]["embedding"]), "<f4")
    np.testing.assert_array_equal(vector, embedder.embed(TEXTS[:1])[0])
    size, name = embedder.sizes[-1], next(iter(TINY_PROMPTS))
    cut = post(client, EMBEDDINGS, input=TEXTS[0], dimensions=size, prompt_name=name)["data"][0]["embedding"]
    expected = embedder.embed(TEXTS[:1], dimensions=size, prompt_name=name)[0]
    np.testing.assert_array_equal(np.array(cut, np.float32), expected)
    assert len(cut) == size


@pytest.mark.parametrize(
    ("body", "param"),
    [
        ({}, "input"),
        ({"input": []}, "input"),
        ({"input": [1, 2]}, "input"),
        ({"input": ["x"] * 2049}, "input"),
        ({"input": "x", "dimensions": 3}, "dimensions"),
        ({"input": "x", "prompt_name": "nobody"}, "prompt_name"),
        ({"input": "x", "encoding_format": "hex"}, "encoding_format"),
        ({"input": "x", "model": "tiny"}, "model"),
    ],
)
def test_what_is_wrong_is_told_with_its_field(client, body, param):
    answer = client.post(EMBEDDINGS, json=body)
    assert (answer.status_code, answer.json()["error"]["param"]) == (400, param), answer.text


def test_each_model_answers_what_it_is_for(client):
    assert client.post(COMPLETIONS, json={"model": "vectors", "prompt": "x"}).status_code == 400
    assert post(client, COMPLETIONS, prompt="x", max_tokens=1)["model"] == "tiny"
    cards = {one["id"]: one for one in client.get("/v1/models").json()["data"]}
    assert list(cards) == ["tiny", "vectors", "text-embedding-3-small"]
    assert cards["vectors"]["dimensions"] > 0
    assert client.get("/v1/models/vectors").json()["id"] == "vectors"

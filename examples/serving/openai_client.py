"""OpenAI's own client (pip install openai) talks to `gemma-deploy serve`: text, chat, log-probabilities, vectors.

Use: python examples/serving/openai_client.py http://127.0.0.1:9000/v1

GEMMA_API_KEY is the key, where the server has one. An encoder that is served beside the model makes the vectors.
"""

import os
import sys

from openai import BadRequestError, OpenAI

QUESTION = "Name three colours."


def completion(client: OpenAI, model: str) -> None:
    """Text goes on."""
    answer = client.completions.create(model=model, prompt="The list of", max_tokens=20, temperature=0)
    print("completion:", answer.choices[0].text)


def chat(client: OpenAI, model: str) -> None:
    """A reply, printed while it comes, and what it took."""
    stream = client.chat.completions.create(
        model=model,
        messages=[{"role": "user", "content": QUESTION}],
        max_tokens=60,
        temperature=0.7,
        seed=1,
        stream=True,
        stream_options={"include_usage": True},
        extra_body={"top_k": 64, "min_p": 0.02},  # what OpenAI's API does not have goes here
    )
    print("chat: ", end="")
    for chunk in stream:
        if chunk.choices and chunk.choices[0].delta.content:
            print(chunk.choices[0].delta.content, end="", flush=True)
        if chunk.usage is not None:
            known = chunk.usage.prompt_tokens_details
            cached = known.cached_tokens if known is not None else 0
            print(f"\n({chunk.usage.prompt_tokens} tokens read, {cached} known, {chunk.usage.completion_tokens} said)")


def logprobs(client: OpenAI, model: str) -> None:
    """How likely a text is: the prompt's own log-probabilities, without a word said."""
    answer = client.completions.create(model=model, prompt="The sky is blue.", max_tokens=0, echo=True, logprobs=1)
    logs = answer.choices[0].logprobs
    assert logs is not None
    assert logs.tokens is not None
    assert logs.token_logprobs is not None
    for token, log in zip(logs.tokens, logs.token_logprobs, strict=True):
        print(f"logprobs: {token!r} {'' if log is None else round(log, 3)}")


def embeddings(client: OpenAI, model: str) -> None:
    """Vectors, which the encoder makes."""
    answer = client.embeddings.create(model=model, input=["a red car", "an automobile"])
    first, second = (one.embedding for one in answer.data)
    print("embeddings: cosine", round(sum(a * b for a, b in zip(first, second, strict=True)), 3))


def responses(client: OpenAI, model: str) -> None:
    """The newer interface; nothing is stored, so that every request brings the whole conversation."""
    answer = client.responses.create(model=model, input=QUESTION, max_output_tokens=40, temperature=0)
    print("responses:", answer.output_text)


def main(url: str, key: str) -> None:
    """Ask for all of it."""
    client = OpenAI(base_url=url, api_key=key)
    cards = list(client.models.list())
    encoders = [one.id for one in cards if "dimensions" in (one.model_extra or {})]
    for one in [card.id for card in cards if card.id not in encoders][:1]:
        for ask in (completion, logprobs, chat, responses):
            try:
                ask(client, one)
            except BadRequestError as error:  # a model that was not taught to talk, for one
                print(f"{ask.__name__}: {error.message}")
    for one in encoders[:1]:
        embeddings(client, one)


if __name__ == "__main__":
    if len(sys.argv) != 2:
        sys.exit(__doc__)
    main(sys.argv[1], os.environ.get("GEMMA_API_KEY", "none"))

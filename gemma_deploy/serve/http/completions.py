"""`/v1/completions`: texts go on, or are only read, with log-probabilities of every token."""

from __future__ import annotations

import time
import uuid
from collections.abc import AsyncIterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from gemma_deploy.errors import UsageError
from gemma_deploy.serve.guiding import Guide
from gemma_deploy.serve.http.errors import told, wrong
from gemma_deploy.serve.http.fields import MOST_CHOICES, CompletionFields
from gemma_deploy.serve.http.served import Served
from gemma_deploy.serve.http.speech import Piece, Speech
from gemma_deploy.serve.http.streaming import merged
from gemma_deploy.serve.request import Request, Scores
from gemma_deploy.text import TextStream

DEFAULT_TOKENS = 16


@dataclass(frozen=True)
class Prompt:
    """A text to go on with.

    Args:
        ids: its tokens; text: as it was given, None where token ids were.
        hidden: tokens at its beginning that the server put there, and that no array of log-probabilities shows.
    """

    ids: list[int]
    text: str | None
    hidden: int = 0


def prompts_of(served: Served, fields: CompletionFields) -> list[Prompt]:
    """The prompts of a request: a text, token ids, or a list of either.

    Raises:
        ApiError: it is something else, or cannot become tokens.
    """
    given = fields.prompt
    if isinstance(given, str) or (isinstance(given, list) and given and all(type(one) is int for one in given)):
        given = [given]
    if not isinstance(given, list) or not given:
        raise wrong("prompt", "a text, a list of token ids, or a list of either, not empty")
    found = []
    for one in given:
        if isinstance(one, str):
            try:
                found.append(Prompt(served.encode(one, special=bool(fields.parse_special)), one))
            except UsageError as error:
                raise told(error, "prompt") from None
        elif isinstance(one, list) and one and all(type(token) is int for token in one):
            hidden = int(served.add_bos and one[0] != served.tokenizer.bos_id)
            found.append(Prompt([served.tokenizer.bos_id] * hidden + one, None, hidden))
        else:
            raise wrong("prompt", "a text, a list of token ids, or a list of either, not empty")
    return found


class Completion:
    """One request, and its answer.

    Args:
        name: of the model, as it was asked for; guide: what every text follows.

    Raises:
        ApiError: it cannot be answered.
    """

    kind = "text_completion"

    def __init__(self, served: Served, fields: CompletionFields, name: str, *, guide: Guide | None = None) -> None:
        self.id, self.created = f"cmpl-{uuid.uuid4().hex}", int(time.time())
        self._served, self._fields, self._name = served, fields, name
        copies = fields.n or 1
        if fields.best_of not in (None, copies):
            raise wrong("best_of", "this server gives all that it makes: leave it out, or give n")
        if fields.suffix:
            raise wrong("suffix", "these models have no place for it")
        stops = fields.stops()
        self._prompts = prompts_of(served, fields)
        if len(self._prompts) * copies > MOST_CHOICES:
            raise wrong("n", f"{len(self._prompts)} prompts, {copies} times each: at most {MOST_CHOICES} texts")
        self._copies = copies
        scored = fields.logprobs if fields.echo else None
        requests = [
            Request(
                prompt.ids,
                fields.choice(served.vocabulary, place),
                DEFAULT_TOKENS if fields.max_tokens is None else fields.max_tokens,
                fields.stop_ids(served.stop_ids, served.vocabulary, guided=guide is not None),
                fields.logprobs,
                scored,
                None if guide is None else guide.copy(),
            )
            for prompt in self._prompts
            for place in range(copies)
        ]
        self.asked = served.ask(requests, "prompt")
        self.speeches = [Speech(served, one, stops=stops) for one in self.asked]

    @property
    def prompt_tokens(self) -> int:
        """Of all prompts, each once."""
        return sum(len(prompt.ids) for prompt in self._prompts)

    def usage(self) -> dict[str, Any]:
        """Tokens so far."""
        return usage_of(self.prompt_tokens, self.speeches, self._copies)

    async def whole(self) -> dict[str, Any]:
        """The answer at once."""
        choices = []
        for index, speech in enumerate(self.speeches):
            pieces = [piece async for piece in speech.pieces()]
            before, logs = self._before(index, speech)
            said = "".join(piece.text for piece in pieces)
            choices.append(self._choice(index, before + said, pieces, logs, len(before)))
        return self._body(choices, usage=self.usage())

    async def chunks(self) -> AsyncIterator[Mapping[str, Any]]:
        """The answer in pieces."""
        async for body in merged([self._chunks_of(index, speech) for index, speech in enumerate(self.speeches)]):
            yield body
        if self._fields.with_usage:
            yield self._body([], usage=self.usage())

    async def _chunks_of(self, index: int, speech: Speech) -> AsyncIterator[Mapping[str, Any]]:
        await speech.begin()
        before, logs = self._before(index, speech)
        if self._fields.echo:
            yield self._body([self._choice(index, before, [], logs, 0)])
        async for piece in speech.pieces():  # also one without text: who measures counts pieces
            yield self._body([self._choice(index, piece.text, [piece], None, len(before))])

    def _before(self, index: int, speech: Speech) -> tuple[str, dict[str, list[Any]] | None]:
        """What stands before the answer: with `echo` the prompt, and its log-probabilities."""
        if not self._fields.echo:
            return "", None
        prompt = self._prompts[index // self._copies]
        stream, offsets, text = TextStream(self._served.tokenizer), [], ""
        for token in prompt.ids:
            offsets.append(len(text))
            text += stream.push(token)
        text = prompt.text if prompt.text is not None else text + stream.flush()
        scores = speech.began.scores if speech.began is not None else None
        if scores is None:
            return text, None
        logs = _arrays()
        for place in range(prompt.hidden, len(prompt.ids)):
            _add(self._served, logs, prompt.ids[place], scores.part(place, place + 1), offsets[place])
        return text, logs

    def _choice(
        self, index: int, text: str, pieces: Sequence[Piece], logs: dict[str, list[Any]] | None, before: int
    ) -> dict[str, Any]:
        if self._fields.logprobs is not None:
            logs = logs if logs is not None else _arrays()
            for token in (piece.token for piece in pieces):
                if token is not None and token.scores is not None:
                    _add(self._served, logs, token.id, token.scores, before + token.offset)
        last = pieces[-1] if pieces else Piece("")
        return {
            "index": index, "text": text, "logprobs": logs, "finish_reason": last.finish, "stop_reason": last.stop,
        }  # fmt: skip

    def _body(self, choices: list[dict[str, Any]], usage: dict[str, Any] | None = None) -> dict[str, Any]:
        body = {
            "id": self.id, "object": self.kind, "created": self.created, "model": self._name, "choices": choices,
        }  # fmt: skip
        return body if usage is None else {**body, "usage": usage}


def usage_of(prompt_tokens: int, speeches: Sequence[Speech], copies: int) -> dict[str, Any]:
    """`usage` of an answer: a prompt counts once, whatever `n` is."""
    said = sum(speech.tokens for speech in speeches)
    cached = sum(speech.cached for speech in speeches[::copies])
    return {
        "prompt_tokens": prompt_tokens,
        "completion_tokens": said,
        "total_tokens": prompt_tokens + said,
        "prompt_tokens_details": {"cached_tokens": cached},
    }


def _arrays() -> dict[str, list[Any]]:
    return {"tokens": [], "token_logprobs": [], "top_logprobs": [], "text_offset": []}


def _add(served: Served, logs: dict[str, list[Any]], token: int, scores: Scores, offset: int) -> None:
    text, own = served.text_of(token), float(scores.own[0])
    logs["tokens"].append(text)
    logs["text_offset"].append(offset)
    if own != own:  # NaN: nothing predicts the first token
        logs["token_logprobs"].append(None)
        logs["top_logprobs"].append(None)
        return
    top: dict[str, float] = {}
    for one, log in zip(scores.ids[0].tolist(), scores.top[0].tolist(), strict=True):
        top.setdefault(served.text_of(one), log)
    top.setdefault(text, own)
    logs["token_logprobs"].append(own)
    logs["top_logprobs"].append(top)

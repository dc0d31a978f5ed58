"""Perplexity and C-Eval of a server, through OpenAI's protocol: log-probabilities of prompts (`echo` with `logprobs`).

Texts become tokens here, with a tokenizer on this machine or by the server's `/tokenize`, and go as ids: nothing puts
a BOS in front, or leaves one out. Perplexity is that of `eval` for artifacts: the same windows, the same tokens scored.
Of C-Eval the four prompts that end in A, B, C and D are sent; the choice is the likeliest of the four last tokens.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from gemma_deploy.artifact.tools import tool_versions
from gemma_deploy.client import Target, beginning, connected, model_of, reason, said
from gemma_deploy.errors import DeployError
from gemma_deploy.evaluation import ceval
from gemma_deploy.evaluation.models import Tokens, without_bos
from gemma_deploy.evaluation.perplexity import Measured, Perplexity
from gemma_deploy.evaluation.tasks import (
    SEQLEN,
    WINDOWS,
    ExamRequest,
    TextRequest,
    exam_notes,
    exam_settings,
    prompts_digest,
    refuse_long_windows,
    text_notes,
    text_settings,
)
from gemma_deploy.evaluation.texts import make_windows, read_text
from gemma_deploy.progress import Tick
from gemma_deploy.text import Tokenizer

if TYPE_CHECKING:
    import httpx2
    from anyio.from_thread import BlockingPortal

AT_ONCE = 8  # requests under way
LONGEST = 1 << 20  # tokens of a prompt where a server does not say


class Served:
    """A model of a server.

    Attributes:
        name: as the server calls it; longest: tokens of a prompt at most, as far as the server says.
    """

    def __init__(self, portal: BlockingPortal, client: httpx2.AsyncClient, target: Target) -> None:
        self._portal, self._client, self._target = portal, client, target
        told = portal.call(model_of, client, target)
        self.name, longest = str(told["id"]), told.get("max_model_len")
        # One token is asked for behind the prompt.
        self.longest = longest - 1 if isinstance(longest, int) and longest > 1 else LONGEST

    def tokens(self, text: str, special: bool = False) -> list[int]:
        """Ids of a text by `/tokenize`; special tokens that it spells are tokens, as a tokenizer here has them.

        Args:
            special: with what the tokenizer puts around it.

        Raises:
            DeployError: the server has none.
        """
        where = f"{self._target.root}/tokenize"
        body = {"model": self.name, "prompt": text, "add_special_tokens": special, "parse_special": True}
        try:
            return [int(one) for one in self._portal.call(self._post, where, body)["tokens"]]
        except (TypeError, KeyError, ValueError) as error:
            raise DeployError(
                "the answer holds no tokens", where=where, next_step="name a tokenizer of the model with --tokenizer"
            ) from error

    def likelihoods(
        self, requests: Sequence[Sequence[Tokens]], tick: Callable[[int], None] = lambda done: None
    ) -> list[list[np.ndarray]]:
        """Log-probabilities, in nats, of the tokens of prompts, each given those before it.

        Args:
            requests: prompts that go in one request; tick: called with the requests that are answered.

        Returns:
            For each prompt [tokens] float64; NaN for the first, and where the server has no number.

        Raises:
            DeployError: the server refuses, or gives no such numbers.
        """
        return self._portal.call(self._all, requests, tick)

    async def _all(self, requests: Sequence[Sequence[Tokens]], tick: Callable[[int], None]) -> list[list[np.ndarray]]:
        import anyio

        found: list[list[np.ndarray]] = [[] for _ in requests]
        left, done = iter(range(len(requests))), 0

        async def worker() -> None:
            nonlocal done
            for number in left:
                found[number] = await self._ask(requests[number])
                done += 1
                tick(done)

        try:
            async with anyio.create_task_group() as group:
                for _ in range(min(AT_ONCE, len(requests))):
                    group.start_soon(worker)
        except BaseExceptionGroup as errors:
            raise _first(errors) from errors
        return found

    async def _ask(self, prompts: Sequence[Tokens]) -> list[np.ndarray]:
        where = f"{self._target.base}/completions"
        body = {
            "model": self.name,
            "prompt": [list(ids) for ids in prompts],
            "max_tokens": 1,
            "temperature": 0,
            "echo": True,
            "logprobs": 1,
        }
        told = await self._post(where, body)
        try:
            choices = sorted(told["choices"], key=lambda one: int(one["index"]))
            numbers = [one["logprobs"]["token_logprobs"] for one in choices]
            found = [
                np.array([math.nan if one is None else float(one) for one in values[: len(ids)]])
                for ids, values in zip(prompts, numbers, strict=True)
            ]
        except (TypeError, KeyError, ValueError, AttributeError):
            found = []
        if [len(values) for values in found] != [len(ids) for ids in prompts]:
            raise DeployError(
                "the server gives no log-probabilities of prompts",
                where=where,
                expected="choices[].logprobs.token_logprobs of every token of the prompt, for echo with logprobs",
                next_step="evaluate with a server that answers echo (`gemma-deploy serve`, vLLM), or `eval ARTIFACT`",
            )
        return found

    async def _post(self, where: str, body: dict[str, Any]) -> dict[str, Any]:
        import httpx2

        try:
            async with self._client.stream("POST", where, json=body) as answer:
                if answer.status_code != 200:
                    raise DeployError(
                        f"the server answers {said(answer.status_code, await beginning(answer))}",
                        where=where,
                        next_step="see the server's log; shorter windows (--seqlen), or --tokenizer, may help",
                    )
                await answer.aread()
                told = answer.json()
        except httpx2.HTTPError as error:
            raise DeployError(
                f"no answer: {reason(error)}", where=where, next_step="see whether the server still runs"
            ) from error
        except ValueError as error:
            raise DeployError("the answer is no JSON", where=where, next_step="see the server's log") from error
        if not isinstance(told, dict):
            raise DeployError("the answer is no JSON object", where=where, next_step="see the server's log")
        return told


def _first(errors: BaseExceptionGroup[BaseException]) -> BaseException:
    """One error of those that workers ended with."""
    error: BaseException = errors
    while isinstance(error, BaseExceptionGroup):
        error = error.exceptions[0]
    return error


@contextmanager
def open_server(target: Target, transport: httpx2.AsyncBaseTransport | None = None) -> Iterator[Served]:
    """Ask a server for its model.

    Args:
        transport: instead of a network.

    Raises:
        UsageError, DeployError: see `model_of`.
    """
    from anyio.from_thread import start_blocking_portal

    with (
        start_blocking_portal() as portal,
        portal.wrap_async_context_manager(connected(target, AT_ONCE, transport)) as client,
    ):
        yield Served(portal, client, target)


def encoder(served: Served, tokenizer: Path | None) -> tuple[Callable[[str], list[int]], int]:
    """Text -> ids without BOS, and the id of BOS.

    Args:
        tokenizer: a directory with tokenizer.json; None asks the server.

    Raises:
        DeployError: there is none, or it puts no BOS in front.
    """
    if tokenizer is not None:
        here = Tokenizer(tokenizer)
        return (lambda text: without_bos(here.bos_id, here.encode(text))), here.bos_id
    probe = "a"
    framed, bare = served.tokens(probe, special=True), served.tokens(probe)
    if framed[1:] != bare or len(framed) != len(bare) + 1:
        raise DeployError(
            "the server's tokenizer puts no BOS in front of a text",
            where=served.name,
            expected="that of a Gemma",
            next_step="name the directory of the model's tokenizer with --tokenizer",
        )
    return (lambda text: without_bos(framed[0], served.tokens(text))), framed[0]


def run_text(
    served: Served, request: TextRequest, *, tokenizer: Path | None = None, progress: Tick | None = None
) -> dict[str, Any]:
    """Perplexity, as `tasks.run_text` states it.

    Raises:
        UsageError: the text is missing or empty, or the windows are too long; DeployError: see `Served`.
    """
    seqlen = min(SEQLEN, served.longest) if request.seqlen is None else request.seqlen
    refuse_long_windows(seqlen, served.longest)
    text, name = read_text(request.text)
    encode, bos = encoder(served, tokenizer)
    asked = WINDOWS if request.windows is None else request.windows
    windows = make_windows(text, encode, bos, count=asked, seqlen=seqlen, name=name)
    found = served.likelihoods([[ids] for ids in windows.ids], _ticks(progress, len(windows.ids)))
    scores = np.concatenate([-values[1:] for (values,) in found])
    finite = scores[np.isfinite(scores)]
    measured = Measured(Perplexity.of(finite), None, None, len(scores) - len(finite))
    return {
        **_head("ppl", served),
        "settings": text_settings(text, name, windows),
        **measured.to_json(),
        "notes": text_notes(windows),
    }


def run_exam(
    served: Served, request: ExamRequest, *, tokenizer: Path | None = None, progress: Tick | None = None
) -> dict[str, Any]:
    """Accuracy on C-Eval, as `tasks.run_exam` states it; `logits` of an answer are logarithms of probabilities.

    Raises:
        UsageError, CalibrationError: see `tasks.run_exam`; DeployError: see `Served`.
    """
    chosen = ceval.read(request.path, request.split, request.shots, subjects=request.subjects, limit=request.limit)
    encode, bos = encoder(served, tokenizer)
    asked = ceval.ask(chosen, encode, bos, longest=served.longest - 1, where=served.name)
    requests = [[(*one.ids, choice) for choice in one.choices] for one in asked]
    found = served.likelihoods(requests, _ticks(progress, len(asked)))
    logits = np.array([[[values[-1] for values in four]] for four in found])
    ceval.refuse_no_numbers(asked, logits, [served.name])
    answered = [ceval.Answered(one, values) for one, values in zip(asked, logits, strict=True)]
    return {
        **_head("ceval", served),
        "settings": exam_settings(request, chosen),
        **ceval.summary(answered, 0),
        **prompts_digest(asked, request),
        "notes": exam_notes(asked, request, served.longest - 1),
        "answers": [one.to_json(0) for one in answered],
    }


def _ticks(progress: Tick | None, total: int) -> Callable[[int], None]:
    return lambda done: progress(done, total) if progress is not None else None


def _head(task: str, served: Served) -> dict[str, Any]:
    target = {"path": served.name, "kind": "server", "scheme": ""}
    return {"task": task, "target": target, "against": None, "tool": tool_versions()}

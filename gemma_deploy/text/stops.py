"""The tokens that end a text: all that the model's files declare, and the one its chat template ends a turn with.

config.json, generation_config.json and the keys of a GGUF file are read when a checkpoint is opened. Added here are
`eos_token` of tokenizer_config.json and the token that follows a reply in the chat template: fine-tunes are trained to
say it, and many declare it nowhere.
"""

from __future__ import annotations

from collections.abc import Container
from dataclasses import dataclass

from gemma_deploy.errors import UsageError
from gemma_deploy.text.template import ChatTemplateError
from gemma_deploy.text.tokenizer import Tokenizer

BEHIND_CALLS = "behind tool calls: taken as a stop token, though no file says so"
ASKED, REPLY, NEXT = "Kx1Asked", "Kx2Reply", "Kx3Next"  # words that no template has


@dataclass(frozen=True)
class EndOfTurn:
    """How a chat template ends a model's turn.

    Args:
        token: the first token behind a reply that is no text; None where there is none before the next turn.
        text: what follows a reply.
    """

    token: int | None
    text: str


@dataclass(frozen=True)
class Stops:
    """Tokens that end a text.

    Args:
        ids: in the order in which they were found.
        notes: what the user should know about them.
    """

    ids: tuple[int, ...]
    notes: tuple[str, ...] = ()


def stop_tokens(tokenizer: Tokenizer, declared: tuple[int, ...]) -> Stops:
    """Every token that ends a text.

    Args:
        tokenizer: of the model, with its chat template.
        declared: by the model's config, the config for generation or the keys of a GGUF file.

    Raises:
        DeployError: the chat template's file is damaged.
    """
    ids: list[int | None] = list(declared)
    notes: list[str] = []
    eos = tokenizer.special_tokens.get("eos_token")
    if eos is not None:
        ids.append(tokenizer.id_of(eos))
    if tokenizer.chat:
        try:
            end = end_of_turn(tokenizer)
        except UsageError as error:  # the template refuses, or spells a token that the model does not have
            notes.append(f"chat will not work: {error.what}")
        else:
            ids.append(end.token)
            notes += _notes(tokenizer, end, tuple(ids[:-1]))
        form = tokenizer.chat_format()
        for number, text in tokenizer.tokens_of(form.stops if form else ()).items():
            if number not in ids:
                notes.append(f"{text} (token {number}) ends a reply {BEHIND_CALLS}")
                ids.append(number)
    limit = tokenizer.table_size if tokenizer.table_size is not None else tokenizer.vocab_size
    kept = dict.fromkeys(one for one in ids if one is not None and 0 <= one < limit)
    return Stops(tuple(kept), tuple(notes))


def end_of_turn(tokenizer: Tokenizer) -> EndOfTurn:
    """Render a trial conversation and look behind the reply.

    Raises:
        ChatTemplateError: the template refuses a message of the user, or a reply to it.
        UsageError: it spells a token that the model does not have.
    """
    asked = {"role": "user", "content": ASKED}
    reply = {"role": "assistant", "content": REPLY}
    turns = [asked, reply, {"role": "user", "content": NEXT}]
    try:
        text = tokenizer.chat.render(turns, add_generation_prompt=False)
    except ChatTemplateError:
        text = tokenizer.chat.render(turns[:2], add_generation_prompt=False)
    before, found, after = text.partition(REPLY)
    if not found:
        raise ChatTemplateError("the chat template leaves replies out", where=str(tokenizer.path))
    after = after.partition(NEXT)[0]
    begins = set(tokenizer.encode_more(before.partition(ASKED)[0])) & tokenizer.added_ids
    for token in tokenizer.encode_more(after):
        if token in begins and token != tokenizer.bos_id:
            break
        if token in tokenizer.added_ids and tokenizer.decode_all([token]).strip():
            return EndOfTurn(token, after)
    return EndOfTurn(None, after)


def unended(tokenizer: Tokenizer, stop_ids: Container[int]) -> str | None:
    """What to tell somebody who is about to chat where no stop token ends a reply; None where one does.

    Args:
        tokenizer: of the model, with its chat template.
        stop_ids: tokens that end a text in the runtime.
    """
    try:
        end = end_of_turn(tokenizer)
    except UsageError:  # told when the conversation comes to what the template refuses
        return None
    if end.token in stop_ids:
        return None
    if end.token is None:
        return _text_alone(end)
    token = tokenizer.backend.id_to_token(end.token)
    return (
        f"replies end with {token} (token {end.token}) in the chat template, which is none of the artifact's stop "
        "tokens: they go on until -n (compile it again)"
    )


def _text_alone(end: EndOfTurn) -> str:
    return (
        f"the chat template puts {end.text[:40]!r} behind a reply, which is text alone: no stop token will end a reply "
        "(declare what ends it as eos_token_id in generation_config.json, or set a limit: -n)"
    )


def _notes(tokenizer: Tokenizer, end: EndOfTurn, declared: Container[int | None]) -> list[str]:
    if end.token is None:
        return [_text_alone(end)]
    if end.token in declared:
        return []
    token = tokenizer.backend.id_to_token(end.token)
    return [
        f"{token} (token {end.token}) ends a reply in the chat template: taken as a stop token, though no file says so"
    ]

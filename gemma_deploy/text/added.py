"""Which tokens transformers adds to a vocabulary, in which order, and which of them have a name (`bos_token`).

The rules are those of `PreTrainedTokenizerBase._from_pretrained` and `TokenizersBackend.__init__` of transformers 5.23.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from gemma_deploy.errors import DeployError

if TYPE_CHECKING:
    from tokenizers import AddedToken

NAMED = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")
DECODER, EXTRA, ADDITIONAL = "added_tokens_decoder", "extra_special_tokens", "additional_special_tokens"
FLAGS = ("single_word", "lstrip", "rstrip", "normalized", "special")
Named = Mapping[str, str]
Wrong = Callable[[str], DeployError]


@dataclass(frozen=True)
class Plan:
    """What is added.

    Args:
        tokens: in the order in which they are added.
        names: text of each special token that has a name.
    """

    tokens: tuple[AddedToken, ...]
    names: Named


def plan_tokens(
    settings: Mapping[str, Any],
    special_tokens: Mapping[str, Any] | None,
    added_tokens: Mapping[str, Any] | None,
    *,
    found: Sequence[tuple[int, AddedToken]],
    defaults: Named,
    wrong: Wrong,
) -> Plan:
    """Work out what is added.

    Args:
        settings: of tokenizer_config.json.
        special_tokens, added_tokens: of special_tokens_map.json and added_tokens.json, None where they are not there.
        found: added tokens of tokenizer.json.
        defaults: names whose token no file says.
        wrong: the error that says what is wrong with a token.

    Raises:
        DeployError: a token is none.
    """
    values = dict(settings)
    if ADDITIONAL in values and not values.get(EXTRA):
        values[EXTRA] = values.pop(ADDITIONAL)
    decoder = values.get(DECODER)
    if isinstance(decoder, Mapping):
        numbered = {_number(key, wrong): token_of(value, wrong) for key, value in decoder.items()}
    else:
        values |= _legacy(special_tokens or {}, values)
        numbered = _listed(added_tokens or {}, values, wrong)
        numbered |= dict(found)
    names = _names(values, defaults, wrong)
    tokens = [token for _, token in sorted(numbered.items(), key=lambda one: one[0])]
    known = {token.content for token in tokens} | {token.content for _, token in found if not defaults}
    special = {token.content for token in names.values()}
    for token in (*names.values(), *_extra(values, wrong)):
        if token.content not in known:
            known.add(token.content)
            tokens.append(token)
    tokens = [_special(token) if token.content in special and not token.special else token for token in tokens]
    return Plan(tuple(tokens), {name: token.content for name, token in names.items()})


def token_of(value: Any, wrong: Wrong, *, special: bool | None = None) -> AddedToken:
    """A token of a JSON file: a text, or an object with `content` and flags.

    Args:
        special: whether it is one, whatever the object says.
    """
    from tokenizers import AddedToken

    flags: dict[str, Any] = {}
    if isinstance(value, AddedToken):
        return value
    if isinstance(value, Mapping):
        flags = {key: value[key] for key in FLAGS if key in value}
        value = value.get("content")
    else:
        flags["special"] = True
    if special is not None:
        flags["special"] = special
    if not isinstance(value, str) or not all(isinstance(flag, bool) for flag in flags.values()):
        raise wrong(f"holds a token that is none: {str(value)[:80]!r}")
    try:
        return AddedToken(value, **flags)
    except UnicodeEncodeError as error:
        raise wrong(f"holds a token with half a surrogate pair: {value[:80]!r}") from error


def _special(token: AddedToken) -> AddedToken:
    token.special = True
    return token


def _number(key: str, wrong: Wrong) -> int:
    try:
        return int(key[:20])
    except ValueError:
        raise wrong(f"{DECODER} has the key {key[:80]!r}, expected the number of a token") from None


def _legacy(special_tokens: Mapping[str, Any], values: Mapping[str, Any]) -> dict[str, Any]:
    """special_tokens_map.json, which counts where there is no `added_tokens_decoder`."""
    merged: dict[str, Any] = {}
    for key, value in special_tokens.items():
        if key == EXTRA and isinstance(value, list):
            before = values.get(EXTRA)
            before = list(before) if isinstance(before, (list, tuple)) else []
            value = before + [{**one, "special": True} if isinstance(one, Mapping) else one for one in value]
        elif isinstance(value, Mapping) and key != EXTRA:
            value = {**value, "special": True}
        merged[EXTRA if key == ADDITIONAL and not values.get(EXTRA) else key] = value
    return merged


def _listed(added_tokens: Mapping[str, Any], values: Mapping[str, Any], wrong: Wrong) -> dict[int, AddedToken]:
    """added_tokens.json: text -> id."""
    from tokenizers import AddedToken

    extra = values.get(EXTRA)
    listed = extra if isinstance(extra, (list, tuple)) else ()
    special = {_text(values.get(key)) for key in NAMED} | {_text(one) for one in listed}
    numbered = {}
    for text, number in added_tokens.items():
        if type(number) is not int:
            raise wrong(f"added_tokens.json gives {text[:80]!r} the id {str(number)[:40]!r}")
        flag = text in special
        try:
            numbered[number] = AddedToken(text, normalized=not flag, special=flag)
        except UnicodeEncodeError as error:
            raise wrong(f"added_tokens.json holds half a surrogate pair: {text[:80]!r}") from error
    return numbered


def _names(values: Mapping[str, Any], defaults: Named, wrong: Wrong) -> dict[str, AddedToken]:
    """Special tokens by name: the seven that every tokenizer may have, and the model's own (`image_token`)."""
    own = {key: value for key, value in values.items() if key.endswith("_token") and key not in NAMED}
    own = {key: value for key, value in own.items() if isinstance(value, str) or _text(value)}
    if isinstance(values.get(EXTRA), Mapping):
        own |= values[EXTRA]
    found = {}
    for key in NAMED:
        value = values.get(key, defaults.get(key))
        if value is not None:
            found[key] = token_of(value, wrong)
    return found | {key: token_of(value, wrong) for key, value in own.items() if value is not None}


def _extra(values: Mapping[str, Any], wrong: Wrong) -> list[AddedToken]:
    extra = values.get(EXTRA)
    if extra is None or isinstance(extra, Mapping):
        return []
    if not isinstance(extra, (list, tuple)):
        raise wrong(f"{EXTRA} is a {type(extra).__name__}, expected a list of tokens")
    return [token_of(value, wrong) for value in extra]


def _text(value: Any) -> str | None:
    value = value.get("content") if isinstance(value, Mapping) else value
    return value if isinstance(value, str) else None

"""What the bodies of requests hold, as pydantic models; a wrong value is told with its field's name."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from typing import Annotated, Any, TypeVar, cast

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from gemma_deploy.reading import NotJsonError, parse_json
from gemma_deploy.serve.choosing import Choice
from gemma_deploy.serve.guiding import Grammar, Kind
from gemma_deploy.serve.http.errors import ApiError, wrong

log = logging.getLogger(__name__)
MOST_CHOICES = 256  # texts of one request: prompts times n
MOST_STOPS, LONGEST_STOP = 64, 1000
MOST_TOP = 20  # alternatives of a token, as OpenAI has it
MOST_TOKENS = 1 << 30
MOST_SEED = (1 << 63) - 1
MOST_UNKNOWN = 1000  # names of fields that are remembered
SHOWN = 40
# Fields that other servers obey, and that would change the answer: refused, since leaving them out is a wrong answer.
NOT_BUILT = (
    "prompt_logprobs", "allowed_token_ids", "bad_words", "use_beam_search", "prompt_embeds", "functions",
    "function_call", "audio", "prediction",
)  # fmt: skip
# Fields of clients that change nothing here.
WITHOUT_EFFECT = (
    "user", "store", "metadata", "service_tier", "safety_identifier", "prompt_cache_key",
    "skip_special_tokens", "spaces_between_special_tokens", "verbosity", "modalities",
)  # fmt: skip
KINDS: tuple[Kind, ...] = ("json", "regex", "choice", "grammar")
FORMS: Mapping[Kind, type | tuple[type, ...]] = {"json": (dict, str), "regex": str, "choice": list, "grammar": str}
_unknown: set[str] = set()

Count = Annotated[int, Field(ge=1, le=MOST_CHOICES)]
Tokens = Annotated[int, Field(ge=0, le=MOST_TOKENS)]
Body = TypeVar("Body", bound="Fields")


class Fields(BaseModel):
    """Of every request; None is what stands for a field that is not given."""

    model_config = ConfigDict(extra="allow", strict=True, protected_namespaces=())

    model: str | None = None


class StreamOptions(Fields):
    """`stream_options`."""

    include_usage: bool | None = None


class Choosing(Fields):
    """How any answer is made."""

    stream: bool | None = None
    seed: Annotated[int, Field(ge=-MOST_SEED, le=MOST_SEED)] | None = None
    temperature: Annotated[float, Field(ge=0, allow_inf_nan=False)] | None = None
    top_p: Annotated[float, Field(gt=0, le=1)] | None = None
    top_k: Annotated[int, Field(ge=-1, le=MOST_TOKENS)] | None = None
    min_p: Annotated[float, Field(ge=0, le=1)] | None = None
    repetition_penalty: Annotated[float, Field(gt=0, allow_inf_nan=False)] | None = None
    presence_penalty: Annotated[float, Field(ge=-2, le=2)] | None = None
    frequency_penalty: Annotated[float, Field(ge=-2, le=2)] | None = None
    logit_bias: dict[str, Annotated[float, Field(ge=-100, le=100)]] | None = None
    min_tokens: Tokens | None = None
    ignore_eos: bool | None = None
    stop: str | list[str] | None = None
    stop_token_ids: list[int] | None = None
    guided_json: dict[str, Any] | str | None = None
    guided_regex: str | None = None
    guided_choice: list[str] | None = None
    guided_grammar: str | None = None
    structured_outputs: dict[str, Any] | None = None


class Generating(Choosing):
    """What completions and chat have in common."""

    stream_options: StreamOptions | None = None
    n: Count | None = None
    max_tokens: Tokens | None = None
    response_format: dict[str, Any] | None = None

    def grammar(self) -> tuple[Grammar, str] | None:
        """What the answer has to follow, and the field that says so; None: nothing.

        Raises:
            ApiError: several fields say so, or one has a form that nobody knows.
        """
        found: dict[str, tuple[Kind, Any]] = {
            f"guided_{kind}": (kind, value) for kind in KINDS if (value := getattr(self, f"guided_{kind}")) is not None
        }
        outputs = self.structured_outputs
        if outputs is not None:
            given: list[tuple[Kind, Any]] = [(kind, outputs[kind]) for kind in KINDS if outputs.get(kind) is not None]
            if len(given) != 1 or not isinstance(given[0][1], FORMS[given[0][0]]):
                raise wrong("structured_outputs", f"one of {', '.join(KINDS)}")
            found["structured_outputs"] = given[0]
        if self.response_format is not None and (schema := _schema(self.response_format)) is not None:
            found["response_format"] = ("json", schema)
        if len(found) > 1:
            first, second, *_ = found
            raise wrong(second, f"{first} says already what the answer has to follow")
        return next(((Grammar(*what), field) for field, what in found.items()), None)

    def choice(self, vocabulary: int, place: int = 0) -> Choice:
        """How tokens are chosen.

        Args:
            vocabulary: tokens there are; place: of several texts with one seed, so that they differ.

        Raises:
            ApiError: `logit_bias` names no token.
        """
        bias: dict[int, float] = {}
        for key, value in (self.logit_bias or {}).items():
            if not key.isascii() or not key.isdigit() or int(key[:12]) >= vocabulary or len(key) > 12:
                raise wrong("logit_bias", f"{key[:SHOWN]!r} is no token: 0 to {vocabulary - 1}")
            bias[int(key)] = value
        return Choice(
            1.0 if self.temperature is None else self.temperature,
            max(self.top_k or 0, 0),
            1.0 if self.top_p is None else self.top_p,
            None if self.seed is None else (self.seed + place) % (1 << 64),
            min_p=self.min_p or 0.0,
            repetition=1.0 if self.repetition_penalty is None else self.repetition_penalty,
            presence=self.presence_penalty or 0.0,
            frequency=self.frequency_penalty or 0.0,
            bias=bias,
            min_tokens=self.min_tokens or 0,
        )

    def stops(self) -> tuple[str, ...]:
        """Texts that end the answer.

        Raises:
            ApiError: there are too many, too long ones, or an empty one.
        """
        found = (self.stop,) if isinstance(self.stop, str) else tuple(self.stop or ())
        if len(found) > MOST_STOPS or any(not 0 < len(one) <= LONGEST_STOP for one in found):
            raise wrong("stop", f"at most {MOST_STOPS} texts of 1 to {LONGEST_STOP} characters")
        return found

    def stop_ids(self, own: frozenset[int], vocabulary: int, *, guided: bool) -> frozenset[int]:
        """Tokens that end the answer, the model's `own` among them where they count.

        Args:
            guided: the answer follows a grammar.

        Raises:
            ApiError: one is no token.
        """
        for token in self.stop_token_ids or ():
            if not 0 <= token < vocabulary:
                raise wrong("stop_token_ids", f"{token} is no token: 0 to {vocabulary - 1}")
        go_on = self.ignore_eos and not guided  # behind what a grammar ends with nothing comes
        return frozenset(self.stop_token_ids or ()) | (frozenset() if go_on else own)

    @property
    def with_usage(self) -> bool:
        """Whether a stream ends with what was used."""
        return self.stream_options is not None and bool(self.stream_options.include_usage)


class CompletionFields(Generating):
    """`/v1/completions`."""

    prompt: Any = None
    echo: bool | None = None
    logprobs: Annotated[int, Field(ge=0, le=MOST_TOP)] | None = None
    best_of: int | None = None
    suffix: str | None = None
    parse_special: bool | None = None


class ChatFields(Generating):
    """`/v1/chat/completions`."""

    messages: list[dict[str, Any]]
    max_completion_tokens: Tokens | None = None
    logprobs: bool | None = None
    top_logprobs: Annotated[int, Field(ge=0, le=MOST_TOP)] | None = None
    tools: list[dict[str, Any]] | None = None
    tool_choice: str | dict[str, Any] | None = None
    parallel_tool_calls: bool | None = None
    chat_template_kwargs: dict[str, Any] | None = None


class TokenizeFields(Fields):
    """`/tokenize`: a text, or messages."""

    prompt: str | None = None
    messages: list[dict[str, Any]] | None = None
    add_special_tokens: bool | None = None
    parse_special: bool | None = None
    chat_template_kwargs: dict[str, Any] | None = None


class DetokenizeFields(Fields):
    """`/detokenize`."""

    tokens: list[int]


def _schema(given: Mapping[str, Any]) -> Mapping[str, Any] | None:
    """The JSON schema that `response_format` asks for; None: text."""
    kind = given.get("type")
    if kind == "text":
        return None
    if kind == "json_object":
        return {"type": "object"}
    named = given.get("json_schema")
    if kind != "json_schema" or not isinstance(named, dict) or not isinstance(named.get("schema"), dict):
        raise wrong("response_format", 'type "text", "json_object", or "json_schema" with json_schema: {name, schema}')
    return cast(Mapping[str, Any], named["schema"])


def read(kind: type[Body], body: bytes) -> Body:
    """The fields of a body.

    Raises:
        ApiError: it is no JSON object, or a field has a wrong value.
    """
    try:
        found = parse_json(body, finite=True, whole_characters=True)
    except (NotJsonError, UnicodeDecodeError) as error:
        raise wrong(None, f"the body is no JSON: {error}", "invalid_json") from None
    if not isinstance(found, dict):
        raise wrong(None, "the body is no JSON object", "invalid_json")
    try:
        fields = kind.model_validate(found)
    except ValidationError as error:
        raise _first(error) from None
    _tell_unknown(fields.model_extra or {})
    return fields


def _first(error: ValidationError) -> ApiError:
    """The first field that is wrong: OpenAI's errors name one."""
    problem = error.errors(include_url=False, include_context=False, include_input=False)[0]
    return wrong(str(problem["loc"][0]) if problem["loc"] else None, _where(problem["loc"]) + str(problem["msg"]))


def _where(place: tuple[int | str, ...]) -> str:
    rest = [str(one)[:SHOWN] for one in place[1:]]
    return f"at {'.'.join(rest)}: " if rest else ""


def _tell_unknown(extra: Mapping[str, Any]) -> None:
    for name, value in extra.items():
        if value is None or name in WITHOUT_EFFECT:
            continue
        if name in NOT_BUILT:
            raise wrong(name, "this server does not have it yet; leave it out", "unsupported")
        if name not in _unknown and len(_unknown) < MOST_UNKNOWN:
            _unknown.add(name)
            log.warning("requests hold the field %r, which nothing is done with", name[:SHOWN])

"""`/openapi.json`: what may be asked, for programs that make clients of it, and for `/docs`."""

from __future__ import annotations

from typing import Any

from gemma_deploy.serve.http.adapters import LoadFields, UnloadFields
from gemma_deploy.serve.http.embeddings import EmbeddingFields
from gemma_deploy.serve.http.fields import ChatFields, CompletionFields, DetokenizeFields, Fields, TokenizeFields
from gemma_deploy.serve.http.response_fields import ResponseFields
from gemma_deploy.serve.http.words import ANSWERS, FIELDS

SCHEMAS = "#/components/schemas/"
POSTS: dict[str, tuple[type[Fields], str]] = {
    "/v1/completions": (CompletionFields, "Go on with texts, or read them."),
    "/v1/chat/completions": (ChatFields, "Answer a conversation."),
    "/v1/responses": (ResponseFields, "Answer a conversation with items."),
    "/v1/embeddings": (EmbeddingFields, "Vectors of texts."),
    "/tokenize": (TokenizeFields, "Token ids of a text or a conversation."),
    "/detokenize": (DetokenizeFields, "The text of token ids."),
    "/v1/load_lora_adapter": (LoadFields, "Load an adapter, where that is allowed."),
    "/v1/unload_lora_adapter": (UnloadFields, "Unload an adapter, where that is allowed."),
}
GETS = {
    "/v1/models": "What is served.",
    "/v1/models/{name}": "One model that is served.",
    "/health": "Whether requests are computed; needs no key.",
    "/metrics": "Counters and histograms for Prometheus.",
    "/openapi.json": "All of this for programs.",
}
WORSE = {
    "400": "A field has a wrong value; param names it.",
    "401": "No API key, or an unknown one.",
    "403": "This server does not do that, or not for pages of other sites.",
    "404": "No such model.",
    "408": "The body came too slowly.",
    "413": "The body is too large.",
    "429": "Too many requests wait; Retry-After says when to come again.",
    "503": "Nothing is computed any more; the log tells why.",
}
OF_GETS = ("401", "404")
ERROR = {
    "type": "object",
    "properties": {
        "error": {
            "type": "object",
            "properties": {
                "message": {"type": "string", "description": "What is wrong, in words."},
                "type": {"type": "string", "description": "The kind of error."},
                "param": {"type": ["string", "null"], "description": "The field that is wrong."},
                "code": {"type": ["string", "null"], "description": "A word for programs."},
            },
        }
    },
}


def description(version: str) -> dict[str, Any]:
    """The interface in OpenAPI 3.1.

    Args:
        version: of this program.
    """
    schemas: dict[str, Any] = {"Error": ERROR}
    paths: dict[str, Any] = {}
    for path, (fields, words) in POSTS.items():
        schema = fields.model_json_schema(ref_template=SCHEMAS + "{model}")
        inner = schema.pop("$defs", {})
        schemas |= inner
        schemas[fields.__name__] = schema
        for one in (schema, *inner.values()):
            for name, field in one["properties"].items():
                field["description"] = FIELDS[name]
        body = {"required": True, "content": _json({"$ref": SCHEMAS + fields.__name__})}
        answers = {"200": _answer(path, "stream" in fields.model_fields), **_refusals(WORSE)}
        paths[path] = {"post": {"summary": words, "requestBody": body, "responses": answers}}
    for path, words in GETS.items():
        answers = {"200": _answer(path, False), **_refusals(OF_GETS)}
        paths[path] = {"get": {"summary": words, "responses": answers}}
        if path.endswith("{name}"):
            named = {"name": "name", "in": "path", "required": True, "schema": {"type": "string"}}
            paths[path]["get"]["parameters"] = [named]
    return {
        "openapi": "3.1.0",
        "info": {"title": "gemma-deploy", "version": version},
        "paths": paths,
        "components": {"schemas": schemas, "securitySchemes": {"key": {"type": "http", "scheme": "bearer"}}},
    }


def _json(schema: dict[str, Any]) -> dict[str, Any]:
    return {"application/json": {"schema": schema}}


def _answer(path: str, streams: bool) -> dict[str, Any]:
    """What comes where all is well."""
    known = ANSWERS.get(path)
    if known is None:
        return {"description": "Text of Prometheus." if path == "/metrics" else "This description."}
    content = _json({"type": "object", "properties": {name: {"description": words} for name, words in known.items()}})
    if streams:
        content["text/event-stream"] = {"schema": {"type": "string", "description": "The same in pieces."}}
    return {"description": "The answer.", "content": content}


def _refusals(which: Any) -> dict[str, Any]:
    found = {status: {"description": WORSE[status], "content": _json({"$ref": SCHEMAS + "Error"})} for status in which}
    return {status: answer for status, answer in sorted(found.items())}

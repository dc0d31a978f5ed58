"""`/openapi.json`: what may be asked, for programs that make clients of it."""

from __future__ import annotations

from typing import Any

from gemma_deploy.serve.http.adapters import LoadFields, UnloadFields
from gemma_deploy.serve.http.embeddings import EmbeddingFields
from gemma_deploy.serve.http.fields import ChatFields, CompletionFields, DetokenizeFields, Fields, TokenizeFields
from gemma_deploy.serve.http.response_fields import ResponseFields

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
    "/health": "Whether requests are computed.",
    "/metrics": "Counters and histograms for Prometheus.",
}


def description(version: str) -> dict[str, Any]:
    """The interface in OpenAPI 3.1.

    Args:
        version: of this program.
    """
    schemas: dict[str, Any] = {}
    paths: dict[str, Any] = {path: {"get": _operation(words)} for path, words in GETS.items()}
    for path, (fields, words) in POSTS.items():
        schema = fields.model_json_schema(ref_template=SCHEMAS + "{model}")
        schemas |= schema.pop("$defs", {})
        schemas[fields.__name__] = schema
        content = {"application/json": {"schema": {"$ref": SCHEMAS + fields.__name__}}}
        paths[path] = {"post": {**_operation(words), "requestBody": {"required": True, "content": content}}}
    return {
        "openapi": "3.1.0",
        "info": {"title": "gemma-deploy", "version": version},
        "paths": paths,
        "components": {"schemas": schemas, "securitySchemes": {"key": {"type": "http", "scheme": "bearer"}}},
    }


def _operation(words: str) -> dict[str, Any]:
    return {
        "summary": words,
        "responses": {"200": {"description": "The answer."}, "default": {"description": "Why not."}},
    }

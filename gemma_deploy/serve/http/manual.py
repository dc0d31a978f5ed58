"""`/docs`: what `/openapi.json` says, as a page for people. No script, and nothing from elsewhere."""

from __future__ import annotations

import html
import re
from collections.abc import Mapping
from typing import Any

from starlette.requests import Request
from starlette.responses import HTMLResponse, Response
from starlette.routing import Route

from gemma_deploy.serve.webui import SAFE_HEADERS

POLICY = (
    "default-src 'none'; style-src 'self'; img-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
)
LIMITS = {"minimum": "{} or more", "maximum": "at most {}", "exclusiveMinimum": "above {}", "maxLength": "{} long"}
Schema = Mapping[str, Any]


def manual_route(described: Schema) -> Route:
    """The page at `/docs`.

    Args:
        described: the interface, as `/openapi.json` has it.
    """
    page, headers = manual(described), {**SAFE_HEADERS, "content-security-policy": POLICY}

    async def answer(request: Request) -> Response:
        return HTMLResponse(page, headers=headers)

    return Route("/docs", answer)


def manual(described: Schema) -> str:
    """The page."""
    info, schemas = described["info"], described["components"]["schemas"]
    every = [
        (method.upper(), path, operation)
        for path, methods in described["paths"].items()
        for method, operation in methods.items()
    ]
    links = "".join(f'<li><a href="#{_anchor(path)}"><code>{_text(path)}</code></a></li>' for _, path, _ in every)
    parts = "".join(_part(method, path, operation, schemas) for method, path, operation in every)
    title = f"{_text(info['title'])} {_text(info['version'])}"
    return f"""<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{title}</title>
<link rel="icon" href="/icon.svg">
<link rel="stylesheet" href="/colours.css">
<link rel="stylesheet" href="/docs.css">
</head>
<body>
<nav><p><a href="/">The chat page</a></p><ul>{links}</ul></nav>
<main>
<h1>{title}</h1>
<p>Bodies and answers are JSON. Where the server has keys, a request brings one: <code>Authorization: Bearer KEY</code>.
For programs: <a href="/openapi.json"><code>/openapi.json</code></a>.</p>
{parts}</main>
</body>
</html>
"""


def _part(method: str, path: str, operation: Schema, schemas: Schema) -> str:
    """One path."""
    lines = [f'<section id="{_anchor(path)}"><h2><b>{method}</b> <code>{_text(path)}</code></h2>']
    lines.append(f"<p>{_text(operation['summary'])}</p>")
    if "requestBody" in operation:
        schema = schemas[operation["requestBody"]["content"]["application/json"]["schema"]["$ref"].rsplit("/", 1)[1]]
        required = schema.get("required", ())
        rows = [
            (f"<code>{_text(name)}</code>{' (required)' if name in required else ''}", _kind(field), _said(field))
            for name, field in schema["properties"].items()
        ]
        lines.append(_table("Fields", ("field", "value", "meaning"), rows))
    answers = []
    for status, answer in operation["responses"].items():
        kinds = ", ".join(answer.get("content", ()))
        answers.append((f"<code>{_text(status)}</code>", _text(kinds), _text(answer["description"])))
    lines.append(_table("Answers", ("status", "kind", "meaning"), answers))
    good = operation["responses"]["200"].get("content", {}).get("application/json", {}).get("schema", {})
    if good.get("properties"):
        told = [(f"<code>{_text(name)}</code>", _said(field)) for name, field in good["properties"].items()]
        lines.append(_table("In the answer", ("field", "meaning"), told))
    return "\n".join([*lines, "</section>\n"])


def _table(title: str, heads: tuple[str, ...], rows: list[Any]) -> str:
    """A table; its cells are HTML already."""
    head = "".join(f'<th scope="col">{one}</th>' for one in heads)
    body = "".join("<tr>" + "".join(f"<td>{cell}</td>" for cell in row) + "</tr>\n" for row in rows)
    return f"<table><caption>{title}</caption><thead><tr>{head}</tr></thead>\n<tbody>\n{body}</tbody></table>"


def _kind(schema: Schema) -> str:
    """What values a field has, in words."""
    several = [one for one in schema.get("anyOf", ()) if one.get("type") != "null"]
    if several:
        return " or ".join(map(_kind, several))
    if "$ref" in schema:
        return "object"
    if "enum" in schema:
        return " or ".join(f"<code>{_text(str(one))}</code>" for one in schema["enum"])
    kind = schema.get("type", "any")
    words = [f"list of {_kind(schema['items'])}" if kind == "array" and schema.get("items") else _text(str(kind))]
    words += [form.format(schema[name]) for name, form in LIMITS.items() if name in schema]
    return ", ".join(words)


def _said(schema: Schema) -> str:
    return _text(schema.get("description", ""))


def _anchor(path: str) -> str:
    return re.sub(r"\W+", "-", path).strip("-")


def _text(text: str) -> str:
    return html.escape(text)

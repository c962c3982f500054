"""The API's documentation as one page without scripts; the usual viewers load theirs from elsewhere."""

from __future__ import annotations

import json
from html import escape
from typing import Any

_HEAD = """<!doctype html><html lang="en"><meta charset="utf-8"><title>shotstream API</title>
<meta name="viewport" content="width=device-width, initial-scale=1">
<h1>shotstream API</h1>
<p>The same as <a href="openapi.json">OpenAPI</a>. Two addresses also speak WebSocket: <code>.../events</code> sends
each event as JSON, and <code>.../media</code> sends fragmented MP4 after a first message such as
<code>{"types": ["video/mp4; codecs=\\"avc1.42E01F\\""]}</code>.</p>
"""


def docs_page(openapi: dict[str, Any]) -> str:
    """HTML of an OpenAPI document: every operation, then every schema."""
    operations = [
        _operation(method, path, operation)
        for path, methods in openapi["paths"].items()
        for method, operation in methods.items()
    ]
    schemas = [_schema(name, schema) for name, schema in openapi["components"]["schemas"].items()]
    return "\n".join((_HEAD, "<h2>Operations</h2>", *operations, "<h2>Schemas</h2>", *schemas))


def _operation(method: str, path: str, operation: dict[str, Any]) -> str:
    parameters = [f"<code>{escape(p['name'])}</code> ({p['in']})" for p in operation.get("parameters", ())]
    body = operation.get("requestBody", {}).get("content", {}).get("application/json", {}).get("schema")
    answers = [f"{code} {escape(answer['description'])}" for code, answer in operation["responses"].items()]
    rows = (("Parameters", ", ".join(parameters)), ("Body", body and _link(body)), ("Answers", "; ".join(answers)))
    listed = "".join(f"<dt>{name}<dd>{value}" for name, value in rows if value)
    title = f"<summary><b>{method.upper()}</b> <code>{escape(path)}</code></summary>"
    return f"<details>{title}<p>{escape(operation.get('description', ''))}</p><dl>{listed}</dl></details>"


def _link(schema: dict[str, Any]) -> str:
    names = [ref["$ref"].rpartition("/")[2] for ref in (schema, *schema.get("oneOf", ())) if "$ref" in ref]
    return ", ".join(f'<a href="#{escape(name)}">{escape(name)}</a>' for name in names)


def _schema(name: str, schema: dict[str, Any]) -> str:
    text = escape(json.dumps(schema, indent=2, ensure_ascii=False))
    return f'<details id="{escape(name)}"><summary>{escape(name)}</summary><pre>{text}</pre></details>'

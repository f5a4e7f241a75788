"""JSON answers of handlers that are not turns."""

from typing import Any

import orjson
from aiohttp import web


def json_answer(value: Any, *, status: int = 200) -> web.Response:
    """`value` as JSON."""
    return web.Response(body=orjson.dumps(value), status=status, content_type="application/json")

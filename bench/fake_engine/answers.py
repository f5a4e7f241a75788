"""What is said: the text of each token of an answer and why it ends.

Text is kept as JSON escapes without quotes (see `wire.inner`), so that it is escaped once, not per request.
How an answer is written out belongs to the surfaces.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import cycle, islice
from typing import Any, Final

import orjson

from bench.fake_engine import checks
from bench.fake_engine.knobs import Knobs
from bench.fake_engine.wire import inner

_STORY: Final = (
    "Once upon a time in a land far away there was a small caf\u00e9 by the river where the fox and the owl "
    "met every evening to talk about the weather, the harvest and the long road to the city.\n"
)
_TOKEN: Final = re.compile(r"\s?\w+|\s?[^\w\s]|\s+")
_STOCK: Final = [inner(token) for token in _TOKEN.findall(_STORY)]


@dataclass(frozen=True, slots=True)
class Answer:
    """One choice. Every token has an entry in `pieces`, empty if it shows no text; `text` is all of them."""

    pieces: Sequence[bytes]
    text: bytes
    finish: str
    stop_reason: str | None = None
    tool: str | None = None


def split_tokens(text: str) -> list[str]:
    return _TOKEN.findall(text)


def compose(body: dict[str, Any], knobs: Knobs, room: int, index: int) -> Answer:
    """Choice `index` of the answer to a body whose prompt leaves `room` tokens of context."""
    asked = checks.most_tokens(body)
    most = room if asked is None else min(asked, room)
    special = _constrained(body, knobs)
    if special is not None:
        pieces, finish, tool = special
        return _cut(pieces, most, finish, tool)
    if knobs.answer is None and not body.get("stop"):
        return _stock_answer(body, knobs, most)
    pieces, finish = _scripted(body, knobs, most, index)
    stopped = _stop(pieces[:most], body) if body.get("stop") else None
    return stopped or _cut(pieces, most, finish, None)


@lru_cache(maxsize=2048)
def stock(size: int, textless_every: int, *, ends: bool) -> Answer:
    """`size` stock tokens; if the answer `ends`, the last is the end-of-sequence token, without text."""
    pieces = list(islice(cycle(_STOCK), size))
    if textless_every:
        for index in range(textless_every - 1, size - 1, textless_every):
            pieces[index] = b""
    if ends:
        pieces[-1:] = [b""]
    return Answer(tuple(pieces), b"".join(pieces), "stop" if ends else "length")


def _stock_answer(body: dict[str, Any], knobs: Knobs, most: int) -> Answer:
    natural = max(knobs.tokens, body.get("min_tokens") or 0, 1)
    if body.get("ignore_eos") or natural > most:
        return stock(most, knobs.textless_every, ends=False)
    return stock(natural, knobs.textless_every, ends=True)


def _scripted(body: dict[str, Any], knobs: Knobs, most: int, index: int) -> tuple[list[bytes], str]:
    said = knobs.answer
    if said is None:
        pieces = list(islice(cycle(_STOCK), max(knobs.tokens - 1, 1)))
    else:
        if isinstance(said, list) and said and isinstance(said[0], list):
            said = said[index % len(said)]
        pieces = [inner(token) for token in (split_tokens(said) if isinstance(said, str) else said)]
    if body.get("ignore_eos"):
        return list(islice(cycle(pieces), most)), "length"
    return [*pieces, b""], "stop"


def _cut(pieces: list[bytes], most: int, finish: str, tool: str | None) -> Answer:
    if len(pieces) > most:
        pieces, finish = pieces[:most], "length"
    return Answer(tuple(pieces), b"".join(pieces), finish, tool=tool)


def _stop(pieces: list[bytes], body: dict[str, Any]) -> Answer | None:
    """The answer cut where a stop string first completes; its tokens count, its text does not show."""
    stops = [body["stop"]] if isinstance(body["stop"], str) else body["stop"]
    texts = [orjson.loads(b'"' + piece + b'"') for piece in pieces]
    said = ""
    for index, text in enumerate(texts):
        said += text
        hits = [(said.find(stop), stop) for stop in stops if stop and stop in said]
        if hits:
            start, stop = min(hits)
            shown = said[: start + len(stop) * bool(body.get("include_stop_str_in_output"))]
            return _shown(texts[: index + 1], shown, stop)
    return None


def _shown(texts: list[str], shown: str, stop: str) -> Answer:
    left = len(shown)
    pieces: list[bytes] = []
    for text in texts:
        pieces.append(inner(text[:left]))
        left = max(0, left - len(text))
    return Answer(tuple(pieces), b"".join(pieces), "stop", stop_reason=stop)


def _constrained(body: dict[str, Any], knobs: Knobs) -> tuple[list[bytes], str, str | None] | None:
    """Tool calls and structured outputs: text made to fit, whatever the answer knobs say."""
    tool, finish = _tool(body, knobs)
    if tool is not None:
        arguments = knobs.tool_arguments
        tokens = split_tokens(arguments) if isinstance(arguments, str) else arguments
        return [*map(inner, tokens), b""], finish, tool
    text = _structured(body)
    if text is None or knobs.answer is not None:
        return None
    return [*map(inner, split_tokens(text)), b""], "stop", None


def _tool(body: dict[str, Any], knobs: Knobs) -> tuple[str | None, str]:
    choice, tools = body.get("tool_choice"), body.get("tools")
    if not tools or choice == "none":
        return None, ""
    if isinstance(choice, dict):
        return str(choice.get("function", choice)["name"]), "stop"
    if choice == "required" or knobs.auto_tool:
        first = tools[0]
        return str(first.get("function", first)["name"]), "tool_calls"
    return None, ""


def _structured(body: dict[str, Any]) -> str | None:
    wanted = body.get("response_format") or {}
    if wanted.get("type") == "json_object":
        return '{"a": 1}'
    if wanted.get("type") == "json_schema":
        return orjson.dumps(instance_of(wanted["json_schema"].get("schema", {}))).decode()
    choices = (body.get("structured_outputs") or {}).get("choice")
    return str(choices[0]) if choices else None


def instance_of(schema: dict[str, Any]) -> Any:
    """The smallest value that fits a schema of the usual kinds."""
    if "enum" in schema:
        return schema["enum"][0]
    if "const" in schema:
        return schema["const"]
    kind = schema.get("type", "object")
    if kind == "object":
        wanted = schema.get("required", list(schema.get("properties", {})))
        return {
            name: instance_of(schema.get("properties", {}).get(name, {"type": "null"})) for name in wanted
        }
    if kind == "array":
        return [instance_of(schema.get("items", {"type": "null"}))] * schema.get("minItems", 0)
    if kind in ("integer", "number"):
        return schema.get("minimum", 0)
    plain: dict[str, Any] = {
        "string": "a" * max(1, schema.get("minLength", 1)),
        "boolean": True,
        "null": None,
    }
    return plain[kind]

"""Turns what the validator found wrong into one error in OpenAI's words: message, param and code.

The declarations decide what is wrong; here is only how it is said. Nothing of the request is repeated beyond
short names and short values.
"""

from collections.abc import Callable
from typing import Any, Literal, TypeAlias

from pydantic import ValidationError
from pydantic_core import ErrorDetails, from_json

from gateway.api.openai.schemas_parts import DATA_URL_PATTERN
from gateway.errors import BadRequest

NAME_SHOWN_MAX = 64
PARAM_SHOWN_MAX = 256

_EXPECTED = {
    "string_type": "a string",
    "int_type": "an integer",
    "float_type": "a decimal",
    "bool_type": "a boolean",
    "list_type": "an array",
    "dict_type": "an object",
}

Explained: TypeAlias = tuple[str, str | None]
"""Message and code."""

Say: TypeAlias = Callable[[ErrorDetails, str], Explained]

Place: TypeAlias = tuple[str | int, ...]
"""Keys and indexes from the request's top to one value."""


def explain(error: ValidationError, body: bytes) -> BadRequest:
    """The error to answer `body` with: the first field that is wrong, where its fault is clearest."""
    found = error.errors(include_url=False)
    if found[0]["type"] == "json_invalid":
        return _not_json(found[0])
    document = from_json(body)
    places = [_place(item, document) for item in found]
    worst = _clearest(found, places)
    same = [item for item, place in zip(found, places, strict=True) if place == worst]
    param = _written(worst)
    message, code = _say(same, param)
    return BadRequest(message, param=param or None, code=code)


def _clearest(found: list[ErrorDetails], places: list[Place]) -> Place:
    """Of the complaints about the first wrong field, the place to report.

    A union complains once for each branch that it tried. A branch whose type fits and whose bound does not is
    the one that was meant; else the deepest place says most ("the third part has no text", not "no string").
    """
    mine = [(item, place) for item, place in zip(found, places, strict=True) if place[:1] == places[0][:1]]
    for item, place in mine:
        if item["type"] in _BOUNDS:
            return place
    return max((place for _, place in mine), key=len)


def _not_json(item: ErrorDetails) -> BadRequest:
    why = str(item["ctx"]["error"])[: 2 * NAME_SHOWN_MAX]
    return BadRequest(f"We could not parse the JSON body of your request: {why}.")


def _place(item: ErrorDetails, document: Any) -> Place:
    """Where `item` is: its location without the names of union branches, which are no keys of the request."""
    steps: list[str | int] = []
    here = document
    for step in item["loc"]:
        if isinstance(here, list) and isinstance(step, int) and step < len(here):
            here = here[step]
        elif isinstance(here, dict) and step in here:
            here = here[str(step)]
        else:
            continue
        steps.append(step)
    if item["type"] == "missing":
        steps.append(item["loc"][-1])
    elif item["type"] in ("union_tag_invalid", "union_tag_not_found") and isinstance(here, dict):
        # pydantic quotes the name of a field that tells branches apart; a function that does looks at `type`.
        teller = item["ctx"]["discriminator"]
        steps.append(teller.strip("'") if teller.startswith("'") else "type")
    return tuple(steps)


def _written(place: Place) -> str:
    text = ""
    for step in place:
        if isinstance(step, int):
            text += f"[{step}]"
        else:
            text += ("." if text else "") + step[:NAME_SHOWN_MAX]
    return text if len(text) <= PARAM_SHOWN_MAX else text[:PARAM_SHOWN_MAX] + "..."


def _say(same: list[ErrorDetails], param: str) -> Explained:
    item = same[0]
    kind = item["type"]
    if any(other["type"] in _EXPECTED for other in same):
        return _wrong_type(same, param)
    say = _WORDS.get(kind)
    if say is not None:
        return say(item, param)
    return f"Invalid value for '{param}'.", "invalid_value"


def _wrong_type(same: list[ErrorDetails], param: str) -> Explained:
    """A value of the wrong type, for each branch that was tried; one of the right type has another fault."""
    expected = list(dict.fromkeys(_EXPECTED[item["type"]] for item in same if item["type"] in _EXPECTED))
    others = [item for item in same if item["type"] not in _EXPECTED and item["type"] in _WORDS]
    if others and (fits := [item for item in others if _fits(item)]):
        return _WORDS[fits[0]["type"]](fits[0], param)
    if any(item["type"] == "literal_error" for item in others) and "a string" not in expected:
        expected.insert(0, "a string")
    wanted = expected[0] if len(expected) == 1 else f"one of {' or '.join(expected)}"
    where = f"'{param}'" if param else "the request body"
    return (
        f"Invalid type for {where}: expected {wanted}, but got {_named(same[0]['input'])} instead.",
        "invalid_type",
    )


def _fits(item: ErrorDetails) -> bool:
    """Whether the value had the type that this branch wants, so that its complaint is the one that helps."""
    return item["type"] != "literal_error" or isinstance(item["input"], str)


def _named(value: Any) -> str:
    names = (
        (bool, "a boolean"),
        (int, "an integer"),
        (float, "a decimal number"),
        (str, "a string"),
        (list, "an array"),
        (dict, "an object"),
    )
    return next((name for kind, name in names if isinstance(value, kind)), "null")


def _missing(item: ErrorDetails, param: str) -> Explained:
    return f"Missing required parameter: '{param}'.", "missing_required_parameter"


def _bound(side: Literal["below minimum", "above maximum"], limit: str, sign: str) -> Say:
    def say(item: ErrorDetails, param: str) -> Explained:
        most = item["ctx"][limit]
        kind = "decimal" if isinstance(most, float) else "integer"
        wanted = (
            f"Expected a value {sign} {most:g}" if kind == "decimal" else f"Expected a value {sign} {most}"
        )
        got = str(item["input"])[:NAME_SHOWN_MAX]
        message = f"Invalid '{param}': {kind} {side} value. {wanted}, but got {got} instead."
        return message, f"{kind}_{side[:9].replace(' ', '_')}_value"

    return say


def _too_short(item: ErrorDetails, param: str) -> Explained:
    text = (
        f"Expected an array with minimum length {item['ctx']['min_length']}, but got an empty array instead."
    )
    return f"Invalid '{param}': empty array. {text}", "empty_array"


def _too_long(item: ErrorDetails, param: str) -> Explained:
    kind = "object" if isinstance(item["input"], dict) else "array"
    text = (
        f"Expected an {kind} with maximum length {item['ctx']['max_length']}, but got a longer one instead."
    )
    return f"Invalid '{param}': {kind} too long. {text}", f"{kind}_above_max_length"


def _string_short(item: ErrorDetails, param: str) -> Explained:
    text = (
        f"Expected a string with minimum length {item['ctx']['min_length']}, but got an empty string instead."
    )
    return f"Invalid '{param}': empty string. {text}", "empty_string"


def _string_long(item: ErrorDetails, param: str) -> Explained:
    most = item["ctx"]["max_length"]
    text = (
        f"Expected a string with maximum length {most}, but got one with length {len(item['input'])} instead."
    )
    return f"Invalid '{param}': string too long. {text}", "string_above_max_length"


def _pattern(item: ErrorDetails, param: str) -> Explained:
    if item["ctx"]["pattern"] == DATA_URL_PATTERN:
        text = "Only base64 data: URLs ('data:image/png;base64,...') are taken; nothing is fetched."
        return f"Invalid '{param}'. {text}", "invalid_value"
    return f"Invalid '{param}': expected a string of the form {item['ctx']['pattern']}.", "invalid_value"


def _literal(item: ErrorDetails, param: str) -> Explained:
    if not isinstance(item["input"], str):
        return (
            f"Invalid type for '{param}': expected a string, but got {_named(item['input'])} instead.",
            "invalid_type",
        )
    return _unsupported_value(item["input"], str(item["ctx"]["expected"]))


def _tag(item: ErrorDetails, param: str) -> Explained:
    return _unsupported_value(str(item["ctx"]["tag"]), str(item["ctx"]["expected_tags"]))


def _no_tag(item: ErrorDetails, param: str) -> Explained:
    if isinstance(item["input"], dict):
        return _missing(item, param)
    return (
        f"Invalid type for '{param}': expected an object, but got {_named(item['input'])} instead.",
        "invalid_type",
    )


def _unsupported_value(value: str, supported: str) -> Explained:
    shown = value if len(value) <= NAME_SHOWN_MAX else value[:NAME_SHOWN_MAX] + "..."
    listed = supported.replace(" or ", ", ")
    return f"Invalid value: '{shown}'. Supported values are: {listed}.", "invalid_value"


def _unsupported(item: ErrorDetails, param: str) -> Explained:
    return f"Unsupported parameter: '{param}'. {item['ctx']['reason']}", "unsupported_parameter"


def _number(item: ErrorDetails, param: str) -> Explained:
    return f"Invalid '{param}': numbers must be finite, and integers fit in 64 bits.", "invalid_value"


_BOUNDS: dict[str, Say] = {
    "greater_than_equal": _bound("below minimum", "ge", ">="),
    "greater_than": _bound("below minimum", "gt", ">"),
    "less_than_equal": _bound("above maximum", "le", "<="),
    "less_than": _bound("above maximum", "lt", "<"),
    "too_short": _too_short,
    "too_long": _too_long,
    "string_too_short": _string_short,
    "string_too_long": _string_long,
    "string_pattern_mismatch": _pattern,
}

_WORDS: dict[str, Say] = {
    **_BOUNDS,
    "missing": _missing,
    "literal_error": _literal,
    "union_tag_invalid": _tag,
    "union_tag_not_found": _no_tag,
    "finite_number": _number,
    "number": _number,
    "unsupported": _unsupported,
}

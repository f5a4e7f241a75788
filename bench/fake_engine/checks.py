"""What vLLM refuses in a body, in its words; each function raises `Refusal` or returns what was asked.

Texts follow tests/captures/err_*.resp. The order (declaration, then model, then meaning) is vLLM's.
"""

import json
from collections.abc import Iterable
from typing import Any, Final

import orjson

from bench.fake_engine.wire import Refusal, refusal

MAX_LOGPROBS: Final = 20
_FLOATS: Final = (
    "temperature",
    "top_p",
    "presence_penalty",
    "frequency_penalty",
    "min_p",
    "repetition_penalty",
)
_INTS: Final = (
    "max_tokens",
    "max_completion_tokens",
    "max_output_tokens",
    "n",
    "min_tokens",
    "top_k",
    "seed",
)
_BOOLS: Final = ("stream", "ignore_eos", "echo")
_SCHEMA_TYPES: Final = {"object", "array", "string", "number", "integer", "boolean", "null"}
_TRUE_OR_FALSE: Final = {"true", "false", "1", "0", "yes", "no", "on", "off", "t", "f", "y", "n"}


def read_body(content_type: str | None, raw: bytes, required: str) -> dict[str, Any]:
    """Decode the body and check the declared types of the fields that this engine reads."""
    if content_type is None or content_type.split(";")[0].strip().lower() != "application/json":
        message = "1 validation error:\n  Unsupported Media Type: Only 'application/json' is allowed"
        raise refusal(400, message, "Bad Request")
    if not raw:
        raise _invalid("missing", "body", "Field required", "None")
    body = _decode(raw)
    if not isinstance(body, dict):
        raise _invalid("model_attributes_type", "body", "Input should be a valid dictionary", repr(body))
    if required not in body:
        raise _invalid("missing", f"body.{required}", "Field required", f"<dict of {len(body)} items>")
    _check_types(body)
    return body


def check_model(body: dict[str, Any], models: Iterable[str], base: str) -> str:
    """The model that answers; a body without one gets the base model."""
    model = body.get("model")
    if model is None or model == "":
        return base
    if model not in models:
        message = f"The model `{model}` does not exist. Valid aliases: {', '.join(models)}."
        raise refusal(404, message, "NotFoundError", "model")
    return str(model)


def check_options(body: dict[str, Any]) -> None:
    """Rules that the declarations themselves enforce, before the model is looked at."""
    if body.get("stream_options") is not None and not body.get("stream"):
        raise _bad(
            "Stream options can only be defined when `stream=True`.", "stream_options", in_brackets=True
        )
    choice = body.get("tool_choice")
    if isinstance(choice, dict):
        names = [tool.get("function", {}).get("name") for tool in body.get("tools") or []]
        if choice.get("function", choice).get("name") not in names:
            text = "The tool specified in `tool_choice` does not match any of the specified `tools`"
            raise _bad(text, "tool_choice", in_brackets=True)


def check_chat(body: dict[str, Any], model: str, *, auto_tools: bool) -> None:
    messages = body["messages"]
    if body.get("tools") and body.get("tool_choice") in (None, "auto") and not auto_tools:
        message = '"auto" tool choice requires --enable-auto-tool-choice and --tool-call-parser to be set'
        raise refusal(400, message)
    if not messages:
        text = "Cannot apply chat template to an empty conversation. Provide at least one message."
        raise refusal(400, text)
    for message in messages:
        content = message.get("content") if isinstance(message, dict) else None
        if isinstance(content, list) and any(
            part.get("type") not in ("text", "input_text") for part in content
        ):
            raise refusal(400, f"{model} is not a multimodal model")


def check_sampling(body: dict[str, Any], max_model_len: int) -> None:
    """The numbers: what SamplingParams says of them."""
    n = body.get("n")
    if n is not None and n < 1:
        raise refusal(400, f"n must be at least 1, got {n}.")
    temperature = body.get("temperature")
    if temperature is not None and not 0 <= temperature <= 2:
        rule = "must be non-negative" if temperature < 0 else "must be in [0, 2]"
        raise _number("temperature", rule, float(temperature))
    top_p = body.get("top_p")
    if top_p is not None and not 0 < top_p <= 1:
        raise _number("top_p", "must be in (0, 1]", float(top_p))
    check_max_tokens(body, max_model_len)
    asked = body.get("top_logprobs") if "messages" in body else body.get("logprobs")
    if isinstance(asked, int) and asked > MAX_LOGPROBS:
        text = f"Requested sample logprobs of {asked}, which is greater than max allowed: {MAX_LOGPROBS}"
        raise refusal(400, f"{text} (parameter=logprobs, value={asked})", param="logprobs")


def check_max_tokens(body: dict[str, Any], max_model_len: int) -> None:
    most = most_tokens(body)
    if most is None:
        return
    if most > max_model_len:
        text = (
            f"max_tokens={most} cannot be greater than max_model_len={max_model_len}. "
            f"Please request fewer output tokens. (parameter=max_tokens, value={most})"
        )
        raise refusal(400, text, param="max_tokens")
    if most < 1:
        raise _number("max_tokens", "must be at least 1", most)
    least = body.get("min_tokens") or 0
    if least > most:
        text = f"min_tokens must be less than or equal to max_tokens={most}, got {least}."
        raise refusal(400, text)


def check_prompt(tokens: int, max_model_len: int) -> None:
    if tokens >= max_model_len:
        seen = max_model_len + 1
        text = (
            f"This model's maximum context length is {max_model_len} tokens. However, your prompt contains "
            f"at least {seen} input tokens, which exceeds this limit even without any output tokens. Please "
            f"reduce the length of the input prompt. (parameter=input_tokens, value={seen})"
        )
        raise refusal(400, text, param="input_tokens")


def check_schema(schema: Any) -> None:
    """A JSON schema whose `type` words exist, all the way down."""
    if isinstance(schema, list):
        for part in schema:
            check_schema(part)
    elif isinstance(schema, dict):
        kind = schema.get("type")
        if isinstance(kind, str) and kind not in _SCHEMA_TYPES:
            raise refusal(400, f"Grammar error: Invalid type: {kind}")
        for name, part in schema.items():
            if name == "properties" and isinstance(part, dict):
                check_schema(list(part.values()))
            elif name in ("items", "anyOf", "oneOf", "allOf"):
                check_schema(part)


def most_tokens(body: dict[str, Any]) -> int | None:
    for name in ("max_completion_tokens", "max_tokens", "max_output_tokens"):
        value = body.get(name)
        if value is not None:
            return int(value)
    return None


def _decode(raw: bytes) -> Any:
    try:
        return orjson.loads(raw)
    except orjson.JSONDecodeError:
        pass
    try:
        return json.loads(raw)
    except json.JSONDecodeError as error:
        extra = f", 'ctx': {{'error': '{error.msg}'}}"
        raise _invalid(
            "json_invalid", f"body.{error.pos}", "JSON decode error", "<dict of 0 items>", extra
        ) from error
    except UnicodeDecodeError as error:
        raise refusal(400, "There was an error parsing the body", "Bad Request") from error


def _check_types(body: dict[str, Any]) -> None:
    for name in _FLOATS:
        value = body.get(name)
        if value is not None and not isinstance(value, (int, float)):
            raise _unparsable("float", "number", name, value)
    for name in _INTS:
        value = body.get(name)
        if value is not None and not isinstance(value, int):
            raise _unparsable("int", "integer", name, value)
    for name in _BOOLS:
        value = body.get(name)
        if (
            value is not None
            and not isinstance(value, (bool, int))
            and str(value).lower() not in _TRUE_OR_FALSE
        ):
            text = "Input should be a valid boolean, unable to interpret input"
            raise _invalid("bool_parsing", f"body.{name}", text, str(value))
    for name in ("messages", "tools"):
        value = body.get(name)
        if value is not None and not isinstance(value, list):
            raise _invalid("list_type", f"body.{name}", "Input should be a valid list", str(value))


def _unparsable(kind: str, noun: str, name: str, value: object) -> Refusal:
    if isinstance(value, str):
        text = f"Input should be a valid {noun}, unable to parse string as a{'n' * (noun[0] == 'i')} {noun}"
        return _invalid(f"{kind}_parsing", f"body.{name}", text, value)
    return _invalid(f"{kind}_type", f"body.{name}", f"Input should be a valid {noun}", str(value))


def _invalid(kind: str, where: str, text: str, given: str, extra: str = "") -> Refusal:
    line = f"{{'type': '{kind}', 'loc': '{where}', 'msg': '{text}', 'input': '{given}'{extra}}}"
    return refusal(400, f"1 validation error:\n  {line}", "Bad Request", where)


def _bad(text: str, param: str, *, in_brackets: bool) -> Refusal:
    return refusal(400, f"{text} (parameter={param})" if in_brackets else text, param=param)


def _number(name: str, rule: str, value: float) -> Refusal:
    return refusal(400, f"{name} {rule}, got {value}. (parameter={name}, value={value})", param=name)

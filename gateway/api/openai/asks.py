"""What a chat or completion request asks of the lifecycle: its checked body, and the filter of its stream."""

from functools import partial

from billing.holds import COMPLETION_TOKENS_DEFAULT, text_bytes
from config.defaults import Settings
from gateway.api.inference import stream_options
from gateway.api.openai.decode import Body, decode_chat, decode_completion, prompt_count
from gateway.relay.tap_openai import OpenAITap
from gateway.turn import Ask


def chat_ask(raw: bytes, _: Settings) -> Ask:
    """What a chat request asks. Raises BadRequest."""
    body = decode_chat(raw)
    return openai_ask("/v1/chat/completions", body, text_bytes(raw), choices=body.get("n", 1))


def completion_ask(raw: bytes, _: Settings) -> Ask:
    """What a completion request asks. Raises BadRequest."""
    body = decode_completion(raw)
    prompts = prompt_count(body)
    body.setdefault("max_tokens", COMPLETION_TOKENS_DEFAULT)
    return openai_ask(
        "/v1/completions", body, text_bytes(raw), choices=body.get("n", 1) * prompts, prompts=prompts
    )


def openai_ask(route: str, body: Body, body_bytes: int, *, choices: int, prompts: int = 1) -> Ask:
    """The Ask of a chat or completion body; its path is the engine's path too."""
    is_stream = bool(body.get("stream"))
    tap = None
    if is_stream:
        wants_usage, wants_every = stream_options(body)
        tap = partial(
            OpenAITap, wants_usage=wants_usage, wants_every=wants_every, choices=choices, prompts=prompts,
            asked=body.get("messages") or body.get("prompt"),
        )  # fmt: skip
    return Ask(
        route=route,
        engine_path=route,
        kind="generate",
        provider_id=body.pop("provider_id", None),
        body=body,
        body_bytes=body_bytes,
        is_stream=is_stream,
        limit_field="max_tokens",
        tap=tap,
    )

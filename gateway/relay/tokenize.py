"""How long a prompt is by the model's own tokenizer: an engine is asked, when the bound by bytes is more than a wallet has.

It is a help and never needed: where no count comes in time, the bound stands. What is bounded how is `billing.holds`.
"""

import logging
from typing import Any

import orjson

from config.defaults import Settings
from gateway.reach.ask import NoAnswer
from gateway.reach.ask import ask as ask_engine
from gateway.relay.upstream import ConnectFailed
from gateway.relay.upstreams import Upstreams
from gateway.turn import Ask
from nodes.routing.snapshot import Engine

log = logging.getLogger("poolgate.turns")

BODY_BYTES_MAX = 2**20
"""Longer requests are not counted: they exceed most contexts, and the engine's answer has each token's id, up to 8 MB."""

ANSWER_BYTES_MAX = 2**24
"""An id takes at most some eight bytes as text, and there is at most about one a byte."""

PROMPTS_MAX = 16
"""Prompts of one request that are counted, each by a request of its own."""

CHAT_FIELDS = ("messages", "tools", "add_generation_prompt", "continue_final_message", "add_special_tokens")
"""What of a chat decides about its prompt; /tokenize knows these fields by the same names and defaults."""


async def count_prompt(upstreams: Upstreams, settings: Settings, ask: Ask, engine: Engine) -> int | None:
    """Tokens of all prompts of `ask` as `engine` counts them; None if that can't be known within `tokenize_timeout_s`."""
    bodies = tokenize_bodies(ask) if ask.body_bytes <= BODY_BYTES_MAX else None
    if bodies is None:
        return None
    pool = upstreams.pool(engine)
    tokens = 0
    try:
        for number, body in enumerate(bodies):
            request = pool.request("/tokenize", f"tokenize-{number}", orjson.dumps(body))
            status, answer = await ask_engine(
                pool, request, timeout_s=settings.tokenize_timeout_s, bytes_max=ANSWER_BYTES_MAX
            )
            if status != 200:
                raise NoAnswer(f"the engine answered {status}")  # noqa: TRY301 - told below, like the others
            tokens += _count(orjson.loads(answer))
    except (NoAnswer, ConnectFailed, ValueError) as error:
        log.info(
            "%s counted no prompt: %s", engine.key, str(error) or type(error).__name__,
            extra={"action": "prompt_uncounted", "engine": engine.key},
        )  # fmt: skip
        return None
    return tokens


def tokenize_bodies(ask: Ask) -> list[dict[str, Any]] | None:
    """What /tokenize is asked, once for each prompt. None: it can't be asked so, or the bound is as good (token ids)."""
    body = ask.body
    if "messages" in body:
        chat = {name: body[name] for name in CHAT_FIELDS if name in body}
        if "reasoning_effort" in body:  # engines hand it to the template
            chat["chat_template_kwargs"] = {"reasoning_effort": body["reasoning_effort"]}
        return [{"model": body["model"]} | chat]
    if ask.engine_path == "/v1/responses":
        return _response_bodies(body)
    prompts = body["prompt"] if "prompt" in body else body["input"]
    if isinstance(prompts, str):
        prompts = [prompts]
    if len(prompts) > PROMPTS_MAX or not all(isinstance(prompt, str) for prompt in prompts):
        return None
    marks = body.get("add_special_tokens", True)
    return [{"model": body["model"], "prompt": prompt, "add_special_tokens": marks} for prompt in prompts]


def _response_bodies(body: dict[str, Any]) -> list[dict[str, Any]] | None:
    """Only of a plain text: what an engine makes of items and of tools is its own."""
    if not isinstance(body["input"], str) or body.get("tools"):
        return None
    messages = [{"role": "user", "content": body["input"]}]
    if "instructions" in body:
        messages.insert(0, {"role": "system", "content": body["instructions"]})
    return [{"model": body["model"], "messages": messages}]


def _count(answer: Any) -> int:
    count = answer.get("count") if isinstance(answer, dict) else None
    if not isinstance(count, int) or isinstance(count, bool) or count < 0:
        raise ValueError("an answer without a count")
    return count

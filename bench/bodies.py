"""Request bodies of an exact size, each with a number of its own where the load generator puts it."""

import json
from typing import Any

MODEL = "smollm2-135m"
NUMBER = "########"
"""Eight digits stand here in each request. Half of a prompt comes before it and is the same in all of them, as a system
prompt is; the other half is new to every prefix cache and index."""

WORDS = "a few words "


def chat_body(size: int, *, tokens: int, stream: bool = False) -> dict[str, Any]:
    """A chat request of `size` bytes as JSON, or as few as it can have, for an answer of `tokens` tokens."""
    body: dict[str, Any] = {
        "model": MODEL, "messages": [{"role": "user", "content": NUMBER}], "max_tokens": tokens, "ignore_eos": True,
        **({"stream": True} if stream else {}),
    }  # fmt: skip
    room = max(0, size - len(json.dumps(body)))
    text = (WORDS * (room // len(WORDS) + 1))[:room]
    body["messages"][0]["content"] = text[: room // 2] + NUMBER + text[room // 2 :]
    return body

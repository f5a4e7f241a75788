"""Owns what `poolgate up` tells when the system answers: address, key, and requests that work when pasted.

Only text; when it is shown is up.py's.
"""

from dataclasses import dataclass

RULE = "─" * 78


@dataclass(frozen=True, slots=True, kw_only=True)
class Greeting:
    """What a first user needs. `model` is empty while no engine serves one."""

    base_url: str
    key: str
    balance: str
    model: str
    logs: str
    note: str = ""


def greeting(facts: Greeting) -> str:
    """The whole text; every snippet can be pasted as it stands."""
    model = facts.model or "MODEL"
    parts = [
        RULE,
        f"poolgate answers at {facts.base_url}",
        "",
        f"  base URL   {facts.base_url}/v1",
        f"  API key    {facts.key}",
        f"  balance    {facts.balance} (account development)",
        f"  model      {facts.model or 'none yet'}",
        f"  API docs   {facts.base_url}/api/docs/ui",
        f"  logs       {facts.logs}",
    ]
    if facts.note:
        parts += ["", facts.note]
    parts += [
        "",
        "A first request:",
        "",
        curl(facts.base_url, facts.key, model),
        "",
        "The same as a stream:",
        "",
        curl_stream(facts.base_url, facts.key, model),
        "",
        "From Python (pip install openai):",
        "",
        python(facts.base_url, facts.key, model),
        "",
        "Ctrl-C stops everything.",
        RULE,
    ]
    return "\n".join(parts)


def curl(base_url: str, key: str, model: str) -> str:
    return f"""\
curl {base_url}/v1/chat/completions \\
  -H 'Authorization: Bearer {key}' -H 'Content-Type: application/json' -d '{{
    "model": "{model}", "max_tokens": 40,
    "messages": [{{"role": "user", "content": "Say hello in one sentence."}}]
  }}'"""


def curl_stream(base_url: str, key: str, model: str) -> str:
    return f"""\
curl -N {base_url}/v1/chat/completions \\
  -H 'Authorization: Bearer {key}' -H 'Content-Type: application/json' -d '{{
    "model": "{model}", "max_tokens": 60, "stream": true,
    "messages": [{{"role": "user", "content": "Count to ten."}}]
  }}'"""


def python(base_url: str, key: str, model: str) -> str:
    return f"""\
from openai import OpenAI

client = OpenAI(base_url="{base_url}/v1", api_key="{key}")
messages = [{{"role": "user", "content": "Say hello in one sentence."}}]
for chunk in client.chat.completions.create(model="{model}", messages=messages, max_tokens=40, stream=True):
    print(chunk.choices[0].delta.content or "", end="", flush=True)
print()"""

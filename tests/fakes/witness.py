"""A stand-in engine whose record outlives its own SIGKILL: a witness of what was produced beside the gateway's books.

Each request of its is also in a file, written when it begins and when it ends; the last line of one counts.
"""

import json
import uuid
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tests.fakes.engine import FakeEngine


@dataclass(frozen=True, slots=True)
class Work:
    """What one engine did for one request. `tokens_written` of all answers together; `how` None: killed amid it."""

    node_id: str
    request_id: str
    number: int  # of the client's question, which its prompt ends with
    model: str
    prompt_tokens: int
    cached_tokens: int
    tokens_max: int  # what all answers together could have at most
    tokens_written: int
    how: str | None

    @property
    def is_finished(self) -> bool:
        return self.how == "finished"


class WitnessEngine(FakeEngine):
    """`async with WitnessEngine(folder, "e0", tokens=8) as engine:`; it may be killed and started again."""

    def __init__(self, folder: Path, name: str, *flags: str, **knobs: Any) -> None:
        self.node_id = str(uuid.uuid4())
        self.file = folder / f"{name}.jsonl"
        told = ("--record-file", str(self.file), "--record-bodies", "--enable-prompt-tokens-details")
        super().__init__(*told, *flags, **knobs)

    def work(self) -> list[Work]:
        """All that it was asked for in all its lives, less what it refused."""
        lines: dict[tuple[int, int], dict[str, Any]] = {}
        if self.file.exists():
            for line in self.file.read_bytes().splitlines():
                row = json.loads(line)
                lines[row["pid"], row["serial"]] = row
        return [self._work(row) for row in lines.values() if row["how"] != "refused"]

    def _work(self, row: dict[str, Any]) -> Work:
        body = row["body"]
        limit = body.get("max_tokens") or body.get("max_completion_tokens") or 10**9
        return Work(
            self.node_id, row["request_id"], number_in(body), row["model"], row["prompt_tokens"],
            row["cached_tokens"], limit * (body.get("n") or 1), row["tokens_written"], row["how"],
        )  # fmt: skip


def numbered(words: str, number: int) -> str:
    """A prompt by which an engine's request is found again, whatever became of the answer and its id."""
    return f"{words} #{number}"


def number_in(body: dict[str, Any]) -> int:
    """The number at the end of what was asked; -1 where there is none."""
    said = body["messages"][-1]["content"] if "messages" in body else body.get("prompt", "")
    _, mark, number = str(said).rpartition("#")
    return int(number) if mark and number.isdigit() else -1

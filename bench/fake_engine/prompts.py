"""Prompts as an engine counts them: a deterministic token count and a prefix cache of hashed blocks.

A token is four bytes of text here; a chat template costs 30 tokens. What an answer costs is in `answers`.
"""

from collections import OrderedDict
from collections.abc import Iterable
from typing import Any
from zlib import crc32

TEMPLATE_TOKENS = 30
BYTES_A_TOKEN = 4


def chat_text(messages: Iterable[Any]) -> str:
    """The text of a conversation; parts that are not text count nothing."""
    pieces: list[str] = []
    for message in messages:
        content = message.get("content") if isinstance(message, dict) else message
        if isinstance(content, str):
            pieces.append(content)
        elif isinstance(content, list):
            pieces.extend(part["text"] for part in content if isinstance(part, dict) and "text" in part)
    return "\n".join(pieces) if len(pieces) != 1 else pieces[0]


def count_tokens(data: bytes, *, template: bool) -> int:
    size = len(data) // BYTES_A_TOKEN
    return size + TEMPLATE_TOKENS if template else max(1, size)


def token_ids(messages: Iterable[Any]) -> list[int]:
    """A chat's tokens: those of its template, then one for each four bytes."""
    data = chat_text(messages).encode()
    words = (data[place : place + BYTES_A_TOKEN] for place in range(0, len(data), BYTES_A_TOKEN))
    return [*range(TEMPLATE_TOKENS), *(100 + crc32(word) % 100_000 for word in words)]


class PrefixCache:
    """Blocks of prompts, least recently used out first; a block is known by the hashes before it too."""

    def __init__(self, block_size: int, capacity: int) -> None:
        self.block_size = block_size
        self.capacity = capacity
        self.queries = 0
        self.hits = 0
        self._blocks: OrderedDict[int, None] = OrderedDict()

    def __len__(self) -> int:
        return len(self._blocks)

    def clear(self) -> None:
        self._blocks.clear()

    def admit(self, data: bytes, tokens: int, salt: str, *, template: bool) -> tuple[int, int]:
        """Look a prompt up and keep it: (tokens found cached, tokens newly cached).

        The last token is always computed, so a prompt of whole blocks still misses its last one.
        """
        self.queries += tokens
        blocks = tokens // self.block_size
        if blocks == 0:
            return 0, 0
        chain = self._chain(data, blocks, salt, template=template)
        found = 0
        for block in chain[: (tokens - 1) // self.block_size]:
            if block not in self._blocks:
                break
            found += 1
        created = sum(block not in self._blocks for block in chain)
        for block in chain:
            self._blocks[block] = None
            self._blocks.move_to_end(block)
        while len(self._blocks) > self.capacity:
            self._blocks.popitem(last=False)
        self.hits += found * self.block_size
        return found * self.block_size, created * self.block_size

    def _chain(self, data: bytes, blocks: int, salt: str, *, template: bool) -> list[int]:
        if template:
            data = b"\0" * (TEMPLATE_TOKENS * BYTES_A_TOKEN) + data
        width = self.block_size * BYTES_A_TOKEN
        chain: list[int] = []
        previous = hash(salt)
        for index in range(blocks):
            previous = hash((previous, data[index * width : (index + 1) * width]))
            chain.append(previous)
        return chain

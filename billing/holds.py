"""The upper bound of a turn, known before it begins: its prompt's tokens, its answer's tokens, and what they cost at most.

Pure, from the request alone; whose money is set aside is `billing.leases`, and what a turn did cost `billing.prices`.

Why the bytes of a request bound the tokens of its prompt. A token of a byte-level tokenizer, or of one that falls back to
bytes, stands for at least one byte of text. JSON never writes a text shorter than its UTF-8: a character stands for itself
or is escaped, as two bytes for one (`\\n`), six for at most three (`\\u00e9`) or twelve for four (a surrogate pair). So the
length of the request's JSON is at least that of all its texts together, special tokens spelled out in them included, and
each message's own JSON (`{"role":"user","content":""}`) is longer than what templates write around a message.
What a model may see beyond that is added: its template, tools and arguments that a template writes anew, texts that grow
when they are normalized, and media, whose bytes are no text.
"""

import unicodedata
from dataclasses import dataclass
from typing import Any, Final, Literal, TypeAlias

import orjson

from billing.prices import ONLINE_PERCENT, TOKENS_PER_PRICE, Price, cost_nano
from config.defaults import Settings

Body: TypeAlias = dict[str, Any]
Shape = Literal["chat", "completion", "response", "embedding"]
MediaKind = Literal["image", "audio", "video"]

SHAPES: dict[str, Shape] = {
    "/v1/chat/completions": "chat",
    "/v1/completions": "completion",
    "/v1/responses": "response",
    "/v1/embeddings": "embedding",
}
"""How a request is read, by the engine's path that it goes to."""

TOKENS_MAX: Final = 2**31 - 1
"""The largest token limit that can be asked for: what money without end buys."""

COMPLETION_TOKENS_DEFAULT: Final = 16
"""What /v1/completions generates if no limit is named; OpenAI's number, and vLLM's."""

USUAL_OUTPUT_TOKENS: Final = 256
"""What an answer without a token limit is taken for where a likely number is asked for, not a bound."""

BYTES_PER_TOKEN: Final = 4
"""Of a usual text. It makes estimates, never bounds."""

SPECIAL_TOKENS: Final = 2
"""What a tokenizer may put around each bare prompt: the marks of its beginning and end."""

TOOL_TOKENS: Final = 64
"""What a template may write for each tool beyond its JSON: fields that were left out as nulls, and a heading."""

INDENT_GROWTH: Final = 2
"""Templates write tools with indents of up to 4 (Llama's), twice those that orjson can measure."""

ARGUMENTS_GROWTH: Final = 4
"""A call's arguments are read and written anew: `1e15,` becomes `1000000000000000.0, `, the most that JSON can grow so."""

NORMAL_GROWTH: dict[Literal["NFC", "NFKC"], int] = {"NFC": 3, "NFKC": 11}
"""How many times longer UTF-8 can become when normalized (Unicode's FAQ on normalization). Tokenizers of models that
generate leave text alone or use NFC (Qwen), those of embeddings use NFKC (XLM-R). Escaped text has the room in its escapes:
six bytes are as much as NFC makes of any character that one escape can stand for (NFKC makes up to 33 of one)."""

ESCAPE: Final = b"\\u"
"""How JSON writes a character in ASCII."""

NORMAL_CHECK_BYTES: Final = 2**18
"""Longer texts are not looked at (0.5 ms) but taken to grow; they exceed most contexts, which bound them instead."""

MEDIA: dict[str, MediaKind] = {
    "image_url": "image",
    "input_image": "image",
    "audio_url": "audio",
    "input_audio": "audio",
    "video_url": "video",
}
"""Parts that are no text, by their type in chats and responses."""


class UnpricedMedia(ValueError):
    """The price book has no ceiling for this kind of media, so what it costs can't be held."""

    def __init__(self, kind: MediaKind, model: str) -> None:
        self.kind = kind
        super().__init__(
            f"{kind} input is not offered for this model ({model}): the price book has no {kind}_tokens"
        )


@dataclass(slots=True, init=False)
class Bound:
    """What a turn can use at most, in tokens."""

    prompt_tokens: int  # of all its prompts together
    output_tokens: int  # of each answer
    choices: int  # answers: n times prompts
    is_limited: (
        bool  # the request names `output_tokens`; else it is the model's ceiling, which may be clamped
    )
    has_media: bool
    usual_prompt_tokens: int  # a likely number, no bound

    # Written out, because a generated one is not compiled, and one is made for each turn.
    def __init__(
        self, prompt_tokens: int, output_tokens: int, choices: int, is_limited: bool, has_media: bool,
        usual_prompt_tokens: int,
    ) -> None:  # fmt: skip
        self.prompt_tokens = prompt_tokens
        self.output_tokens = output_tokens
        self.choices = choices
        self.is_limited = is_limited
        self.has_media = has_media
        self.usual_prompt_tokens = usual_prompt_tokens

    @property
    def completion_tokens(self) -> int:
        """Of all answers together."""
        return self.choices * self.output_tokens


def text_bytes(raw: bytes, form: Literal["NFC", "NFKC"] = "NFC") -> int:
    """Length of a request's JSON, or what its texts may grow to when a tokenizer normalizes them: `bound_of`'s `raw_bytes`.

    `form`: NFKC for embeddings.
    """
    size = len(raw)
    is_escaped = form == "NFKC" and ESCAPE in raw
    if raw.isascii() and not is_escaped:
        return size
    if size <= NORMAL_CHECK_BYTES and unicodedata.is_normalized(form, _written_out(raw, is_escaped)):
        return size
    return size * NORMAL_GROWTH[form]


def _written_out(raw: bytes, is_escaped: bool) -> str:
    """JSON with its characters as themselves."""
    return (orjson.dumps(orjson.loads(raw)) if is_escaped else raw).decode(errors="replace")


def bound_of(
    body: Body, raw_bytes: int, shape: Shape, price: Price, context: int | None, settings: Settings
) -> Bound:
    """The bound of a validated `body`; `raw_bytes` is `text_bytes` of the JSON that it was read from.

    `context`: the longest context length among the engines that may get it, None where nobody told (what the price book
    says of a model binds no engine). An engine refuses a prompt, and a token limit, that exceed its own: with a context
    known, no prompt is longer, however many bytes it has. Raises UnpricedMedia.
    """
    choices = body.get("n", 1)
    has_media = False
    prompts = 1
    if shape == "chat" or shape == "response":
        extra, media_bytes, media_tokens = _conversation(body, shape, price)
        has_media = media_bytes > 0
        text = raw_bytes - media_bytes
        usual = text // BYTES_PER_TOKEN + media_tokens
        prompt_tokens = text + extra + media_tokens + settings.template_tokens_max
    else:
        prompts, ids = _prompts(body["prompt" if shape == "completion" else "input"])
        prompt_tokens = (raw_bytes if ids is None else ids) + SPECIAL_TOKENS * prompts
        usual = raw_bytes // BYTES_PER_TOKEN if ids is None else ids
    if context is not None and prompt_tokens > prompts * context:
        prompt_tokens = prompts * context
    if usual > prompt_tokens:
        usual = prompt_tokens
    limit = _limit(body, shape)
    if limit is None:
        output_tokens = context or settings.output_tokens_ceiling
    else:
        output_tokens = limit if context is None or limit < context else context
    return Bound(prompt_tokens, output_tokens, choices * prompts, limit is not None, has_media, usual)


def hold_nano(
    price: Price, bound: Bound, percent: int = ONLINE_PERCENT, *, output_tokens: int | None = None
) -> int:
    """What a turn within `bound` costs at most; `output_tokens`: with this limit for each answer instead.

    All prompt tokens count as uncached: the price book has no cached price above that of the prompt.
    """
    output = bound.output_tokens if output_tokens is None else output_tokens
    return cost_nano(price, bound.prompt_tokens, 0, bound.choices * output, percent)


def least_nano(price: Price, bound: Bound, clamp_tokens_min: int, percent: int = ONLINE_PERCENT) -> int:
    """The smallest hold that is of use to a request without a token limit: one that buys `clamp_tokens_min` an answer."""
    return hold_nano(price, bound, percent, output_tokens=min(clamp_tokens_min, bound.output_tokens))


def clamped_tokens(
    price: Price, prompt_tokens: int, choices: int, amount_nano: int, percent: int = ONLINE_PERCENT
) -> int:
    """The largest token limit for each of `choices` answers whose hold `amount_nano` buys, at most TOKENS_MAX.

    The hold is `⌈exact · percent / 10⁸⌉` for exact = prompt · its price + choices · limit · theirs. That is at most a whole
    amount just if exact ≤ ⌊amount · 10⁸ / percent⌋, of which the limit follows by one more floor. 0: not even the prompt.
    """
    if percent == 0:
        return TOKENS_MAX
    left = amount_nano * ONLINE_PERCENT * TOKENS_PER_PRICE // percent - prompt_tokens * price.prompt_nano
    if left < 0:
        return 0
    each = choices * price.completion_nano
    return TOKENS_MAX if each == 0 else min(TOKENS_MAX, left // each)


def limit_tokens(bound: Bound) -> int:
    """What a request counts against token limits when it is admitted: a likely number, trued up when it has ended.

    A fourth of the prompt's bytes (token ids and media by their count), and of each answer its limit or, without one, 256.
    The bound itself would let nobody with a usual limit use more than a fourth of it at once.
    """
    output = bound.output_tokens if bound.is_limited else min(USUAL_OUTPUT_TOKENS, bound.output_tokens)
    return bound.usual_prompt_tokens + bound.choices * output


def _limit(body: Body, shape: Shape) -> int | None:
    """The token limit of each answer, whichever field names it (decode put `max_completion_tokens` in `max_tokens`)."""
    limit: int | None
    if shape == "chat":
        limit = body.get("max_tokens")
    elif shape == "completion":
        limit = body.get("max_tokens", COMPLETION_TOKENS_DEFAULT)
    elif shape == "response":
        limit = body.get("max_output_tokens")
    else:
        limit = 0
    return limit


def _prompts(prompt: Any) -> tuple[int, int | None]:
    """How many prompts there are, and how many token ids in them; None where they are texts."""
    if isinstance(prompt, str):
        return 1, None
    first = prompt[0]
    if isinstance(first, str):
        return len(prompt), None
    if isinstance(first, int):
        return 1, len(prompt)
    return len(prompt), sum(map(len, prompt))


def _conversation(body: Body, shape: Shape, price: Price) -> tuple[int, int, int]:
    """Tokens that a template may add to what was written, bytes that are no text, and the tokens of those at most."""
    extra = media_bytes = media_tokens = 0
    tools = body.get("tools")
    if tools:
        extra += TOOL_TOKENS * len(tools)
        extra += INDENT_GROWTH * len(orjson.dumps(tools, option=orjson.OPT_INDENT_2))
    items = body["messages" if shape == "chat" else "input"]
    if type(items) is str:
        return extra, 0, 0
    for each in items:
        item: Body = each
        content = item.get("content")
        if type(content) is not str and content:
            size, tokens = _media(content, price)
            media_bytes += size
            media_tokens += tokens
        if shape == "chat":
            if item.get("tool_calls"):
                calls = [call["function"]["arguments"] for call in item["tool_calls"]]
                extra += ARGUMENTS_GROWTH * sum(map(len, calls))
        elif "arguments" in item:
            extra += ARGUMENTS_GROWTH * len(item["arguments"])
        elif type(item.get("output")) is list:
            size, tokens = _media(item["output"], price)
            media_bytes += size
            media_tokens += tokens
    return extra, media_bytes, media_tokens


def _media(parts: list[Body], price: Price) -> tuple[int, int]:
    """Bytes of the parts that are no text, at least one for each and never more than they have; their tokens at most."""
    size = tokens = 0
    for part in parts:
        kind = MEDIA.get(part["type"])
        if kind is None:
            continue
        ceiling = getattr(price, f"{kind}_tokens")
        if ceiling is None:
            raise UnpricedMedia(kind, price.model)
        source = part[part["type"]] if part["type"] != "input_image" else part["image_url"]
        # Its characters, of at least one byte each; an empty sound still has its quotes.
        size += max(1, len(source if isinstance(source, str) else source.get("url", source.get("data", ""))))
        tokens += ceiling
    return size, tokens

"""What answers under /v1 look like, for the document; tests hold real answers against these.

Engines write most of these fields, and newer engines write more: nothing here checks or cuts an answer.
"""

from typing import Annotated, Any, Literal, Required, TypeAlias

from pydantic import Field
from typing_extensions import TypedDict

from gateway.api.routes import Media

CostHalala: TypeAlias = Annotated[
    int, Field(ge=0, description="Cost in minor units of the currency, rounded up; the wallet moves exactly")
]
FinishReason: TypeAlias = Literal["stop", "length", "tool_calls", "content_filter", "function_call", "abort"]


class ErrorBody(TypedDict):
    """What went wrong, in OpenAI's terms."""

    message: str
    type: str
    param: str | None
    code: str | None


class OpenAiError(TypedDict):
    """OpenAI's error envelope."""

    error: ErrorBody


class Usage(TypedDict, total=False):
    """Tokens of one turn."""

    prompt_tokens: Required[int]
    completion_tokens: Required[int]
    total_tokens: Required[int]
    prompt_tokens_details: dict[str, Any] | None
    completion_tokens_details: dict[str, Any] | None


class AnsweredFunction(TypedDict):
    """A function call as the model wrote it."""

    name: str
    arguments: str


class AnsweredToolCall(TypedDict):
    """A tool call of the model."""

    id: str
    type: Literal["function"]
    function: AnsweredFunction


class AnswerMessage(TypedDict, total=False):
    """What the model says."""

    role: Required[str]
    content: Required[str | None]
    refusal: str | None
    reasoning: str | None
    tool_calls: list[AnsweredToolCall] | None


class ChatChoice(TypedDict, total=False):
    """One of the n answers."""

    index: Required[int]
    message: Required[AnswerMessage]
    finish_reason: Required[FinishReason | None]
    logprobs: dict[str, Any] | None
    stop_reason: int | str | None


class ChatAnswer(TypedDict, total=False):
    """A whole chat completion."""

    id: Required[str]
    object: Required[Literal["chat.completion"]]
    created: Required[int]
    model: Required[str]
    choices: Required[list[ChatChoice]]
    usage: Required[Usage]
    cost_halala: Required[CostHalala]
    system_fingerprint: str | None
    service_tier: str | None


class Delta(TypedDict, total=False):
    """What one event adds."""

    role: str
    content: str | None
    reasoning: str | None
    tool_calls: list[dict[str, Any]]


class ChunkChoice(TypedDict, total=False):
    """One choice in an event."""

    index: Required[int]
    delta: Required[Delta]
    finish_reason: FinishReason | None
    logprobs: dict[str, Any] | None


class ChatChunk(TypedDict, total=False):
    """One event of a streamed chat; `usage` and `cost_halala` only where they were asked for."""

    id: Required[str]
    object: Required[Literal["chat.completion.chunk"]]
    created: Required[int]
    model: Required[str]
    choices: Required[list[ChunkChoice]]
    usage: Usage | None
    cost_halala: CostHalala
    system_fingerprint: str | None


class CompletionChoice(TypedDict, total=False):
    """One of the n completions of one prompt."""

    index: Required[int]
    text: Required[str]
    finish_reason: Required[FinishReason | None]
    logprobs: dict[str, Any] | None
    stop_reason: int | str | None


class CompletionAnswer(TypedDict, total=False):
    """A whole completion, and with fewer fields each event of a streamed one."""

    id: Required[str]
    object: Required[Literal["text_completion"]]
    created: Required[int]
    model: Required[str]
    choices: Required[list[CompletionChoice]]
    usage: Usage | None
    cost_halala: CostHalala
    system_fingerprint: str | None


class Embedding(TypedDict):
    """The vector of one input; base64 of little-endian float32 where that was asked for."""

    object: Literal["embedding"]
    index: int
    embedding: list[float] | str


class EmbeddingsAnswer(TypedDict, total=False):
    """The vectors of all inputs, in order."""

    id: str
    object: Required[Literal["list"]]
    model: Required[str]
    data: Required[list[Embedding]]
    usage: Required[Usage]
    cost_halala: CostHalala


class ResponsesUsage(TypedDict, total=False):
    """Tokens of one response."""

    input_tokens: Required[int]
    output_tokens: Required[int]
    total_tokens: Required[int]
    input_tokens_details: dict[str, Any] | None
    output_tokens_details: dict[str, Any] | None


class ResponsesAnswer(TypedDict, total=False):
    """A response object; the items of `output` are messages, function calls and reasoning."""

    id: Required[str]
    object: Required[Literal["response"]]
    created_at: Required[int]
    model: Required[str]
    status: Required[Literal["completed", "incomplete", "in_progress", "failed"]]
    output: Required[list[dict[str, Any]]]
    usage: ResponsesUsage | None
    incomplete_details: dict[str, Any] | None
    cost_halala: CostHalala


class ModelEntry(TypedDict, total=False):
    """A model that can be asked for."""

    id: Required[str]
    object: Required[Literal["model"]]
    created: Required[int]
    owned_by: Required[str]
    context_length: Required[int | None]
    max_tokens: Required[int | None]
    vram_required_gb: Required[float | None]
    available: Required[Annotated[bool, Field(description="Some node serves it right now")]]


class ModelList(TypedDict):
    """All models, or those that the key may use; `models` is the same list again."""

    object: Literal["list"]
    data: list[ModelEntry]
    models: list[ModelEntry]


class CompleteChoice(TypedDict):
    """The one choice of /v1/complete."""

    index: int
    text: str
    finish_reason: Literal["stop", "length", "timeout"]


class PlainUsage(TypedDict):
    """Tokens of one turn."""

    prompt_tokens: int
    completion_tokens: int
    total_tokens: int


class CompleteAnswer(TypedDict):
    """Answer of /v1/complete."""

    id: str
    model: str
    choices: list[CompleteChoice]
    usage: PlainUsage
    cost_halala: CostHalala
    latency_ms: int


class CompleteEvent(TypedDict, total=False):
    """An event of /v1/complete/stream: text with its index, or at the end the rest."""

    text: str
    index: int
    finish_reason: Literal["stop", "length", "timeout"]
    usage: PlainUsage
    cost_halala: CostHalala


EVENTS = "text/event-stream"

CHAT_ANSWERS = (
    Media(shape=ChatAnswer, description="The completion; where `stream` is true, its events"),
    Media(
        EVENTS,
        ChatChunk,
        "`data: ` and a `chat.completion.chunk` an event, last `data: [DONE]`. "
        "A failure after the start is an event with `error`, and no `[DONE]` follows it.",
    ),
)

COMPLETION_ANSWERS = (
    Media(shape=CompletionAnswer, description="The completion; where `stream` is true, its events"),
    Media(EVENTS, CompletionAnswer, "`data: ` and a part of the completion an event, last `data: [DONE]`."),
)

RESPONSES_ANSWERS = (
    Media(shape=ResponsesAnswer, description="The response; where `stream` is true, its events"),
    Media(
        EVENTS,
        description="Events named as OpenAI's; `response.completed` is the last one, without `[DONE]`.",
    ),
)

COMPLETE_STREAM = Media(
    EVENTS,
    CompleteEvent,
    'Token delta events: `data: {"text": "...", "index": 0}\\n\\n`. '
    'Final event: `data: {"finish_reason": "stop", "usage": {...}, "cost_halala": N}\\n\\n`. '
    "Terminator: `data: [DONE]\\n\\n`",
)

"""The pieces that requests under /v1 are made of: bounded scalars, messages, tools, output formats.

Each is declared once, for validation and for the document. What belongs to one endpoint is in
`schemas_requests` and `schemas_responses`; the words of errors are in `explain`.
"""

from dataclasses import dataclass
from typing import Annotated, Any, Literal, Required, TypeAlias

from pydantic import AfterValidator, ConfigDict, Field, GetCoreSchemaHandler, GetJsonSchemaHandler
from pydantic.json_schema import JsonSchemaValue
from pydantic_core import CoreSchema, PydanticCustomError, core_schema
from typing_extensions import TypedDict

STRICT = ConfigDict(strict=True, extra="ignore", allow_inf_nan=False)
"""JSON's own types, no conversions; unknown fields are dropped; NaN and Infinity are no numbers. A part
gets it from the request that it is in."""

# Bounds on lists keep one body from becoming millions of objects; they are OpenAI's where it documents one.
MESSAGES_MAX = 2048
PARTS_MAX = 2048
TOOLS_MAX = 128
STOPS_MAX = 64  # OpenAI takes 4, vLLM any number; each is searched for in every token's text
STOP_CHARS_MAX = 1024
TOKEN_IDS_MAX = 2**18  # the largest vocabularies of today
BIASES_MAX = 1024
WORDS_MAX = 1024
NAME_CHARS_MAX = 256
INT32_MAX = 2**31 - 1
INT64_MIN, INT64_MAX = -(2**63), 2**63 - 1

DATA_URL_PATTERN = r"^data:[A-Za-z0-9.+-]+/[A-Za-z0-9.+-]+;base64,"
"""A node would fetch any other URL from inside its network, and vLLM takes no other encoding."""


def plain_json(value: Any) -> Any:
    """`value` if each number in it can be written as JSON again. The parser bounds its depth (200 levels)."""
    kind = type(value)
    if kind is dict:
        for item in value.values():
            plain_json(item)
    elif kind is list:
        for item in value:
            plain_json(item)
    elif kind is float:
        # A NaN is unequal to itself; 1e999 is read as infinite.
        if value != value or value in (float("inf"), float("-inf")):
            raise PydanticCustomError("number", "numbers must be finite")
    elif kind is int and not INT64_MIN <= value <= INT64_MAX:
        raise PydanticCustomError("number", "integers must fit in 64 bits")
    return value


@dataclass(frozen=True)
class Refused:
    """Marks a field that would change an answer's meaning and that no engine honours: 400 with `reason`.

    null and the `harmless` values ask for what happens anyway; they read as null, and nulls are dropped.
    """

    reason: str
    harmless: tuple[Any, ...] = ()

    def __get_pydantic_core_schema__(self, source: Any, handler: GetCoreSchemaHandler) -> CoreSchema:
        return core_schema.no_info_plain_validator_function(self.check)

    def __get_pydantic_json_schema__(
        self, schema: CoreSchema, handler: GetJsonSchemaHandler
    ) -> JsonSchemaValue:
        return {"enum": [*self.harmless, None], "description": f"Not supported. {self.reason}"}

    def check(self, value: Any) -> None:
        """Raise unless `value` is one of those that change nothing."""
        same = (type(value) is type(item) and value == item for item in self.harmless)
        if value is not None and not any(same):
            raise PydanticCustomError("unsupported", "{reason}", {"reason": self.reason})


def at_most(count: int, *, least: int = 0) -> Any:
    """The bound of a list. It stops at the first bad item: a huge bad list must not become as many errors."""
    return Field(min_length=least, max_length=count, fail_fast=True)


Json: TypeAlias = Annotated[Any, AfterValidator(plain_json)]
JsonObject: TypeAlias = Annotated[dict[str, Any], AfterValidator(plain_json)]
Name: TypeAlias = Annotated[str, Field(min_length=1, max_length=NAME_CHARS_MAX)]
Model: TypeAlias = Annotated[
    str, Field(min_length=1, max_length=NAME_CHARS_MAX, description="Model id from GET /v1/models")
]
DataUrl: TypeAlias = Annotated[str, Field(pattern=DATA_URL_PATTERN, description="A base64 `data:` URL")]
Tokens: TypeAlias = Annotated[int, Field(ge=1, le=INT32_MAX)]
TokenId: TypeAlias = Annotated[int, Field(ge=0, le=INT32_MAX)]
Stop: TypeAlias = Annotated[str, Field(min_length=1, max_length=STOP_CHARS_MAX)]


class TextPart(TypedDict):
    """Text in a message."""

    type: Literal["text"]
    text: str


class RefusalPart(TypedDict):
    """A refusal of the model, in an assistant message."""

    type: Literal["refusal"]
    refusal: str


class ImageSource(TypedDict, total=False):
    """Where an image is."""

    url: Required[DataUrl]
    detail: Literal["auto", "low", "high"] | None


class MediaSource(TypedDict):
    """Where a sound or a film is."""

    url: DataUrl


class ImagePart(TypedDict):
    """An image in a message."""

    type: Literal["image_url"]
    image_url: ImageSource


class VideoPart(TypedDict):
    """A film in a message (vLLM's extension)."""

    type: Literal["video_url"]
    video_url: MediaSource


class AudioPart(TypedDict):
    """A sound in a message (vLLM's extension)."""

    type: Literal["audio_url"]
    audio_url: MediaSource


class SoundBytes(TypedDict):
    """A sound as base64."""

    data: str
    format: Annotated[str, Field(min_length=1, max_length=16)]


class InputAudioPart(TypedDict):
    """A sound in a message, as OpenAI has it."""

    type: Literal["input_audio"]
    input_audio: SoundBytes


AssistantPart: TypeAlias = Annotated[TextPart | RefusalPart, Field(discriminator="type")]
UserPart: TypeAlias = Annotated[
    TextPart | ImagePart | InputAudioPart | VideoPart | AudioPart, Field(discriminator="type")
]
# A string is by far the most common: it is tried first, and a hit ends the search.
TextContent: TypeAlias = Annotated[
    str | Annotated[list[TextPart], at_most(PARTS_MAX)], Field(union_mode="left_to_right")
]
UserContent: TypeAlias = Annotated[
    str | Annotated[list[UserPart], at_most(PARTS_MAX)], Field(union_mode="left_to_right")
]
AssistantContent: TypeAlias = Annotated[
    str | Annotated[list[AssistantPart], at_most(PARTS_MAX)], Field(union_mode="left_to_right")
]


class CalledFunction(TypedDict):
    """The function that a tool call names, with its arguments as the model wrote them (not always JSON)."""

    name: Name
    arguments: str


class ToolCall(TypedDict):
    """A call that the model made earlier."""

    id: Name
    type: Literal["function"]
    function: CalledFunction


class SystemMessage(TypedDict, total=False):
    """Instructions; `developer` is OpenAI's newer word for them."""

    role: Required[Literal["system", "developer"]]
    content: Required[TextContent]
    name: Name | None


class UserMessage(TypedDict, total=False):
    """What the user says."""

    role: Required[Literal["user"]]
    content: Required[UserContent]
    name: Name | None


class AssistantMessage(TypedDict, total=False):
    """What the model said earlier; content may be missing beside tool calls."""

    role: Required[Literal["assistant"]]
    content: AssistantContent | None
    name: Name | None
    refusal: str | None
    reasoning: str | None
    reasoning_content: str | None
    tool_calls: Annotated[list[ToolCall], at_most(TOOLS_MAX)] | None


class ToolMessage(TypedDict, total=False):
    """The result of a tool call."""

    role: Required[Literal["tool"]]
    content: Required[TextContent]
    tool_call_id: Required[Name]


Message: TypeAlias = Annotated[
    SystemMessage | UserMessage | AssistantMessage | ToolMessage, Field(discriminator="role")
]


class FunctionDefinition(TypedDict, total=False):
    """A function that the model may call; `parameters` is a JSON schema."""

    name: Required[Name]
    description: str | None
    parameters: JsonObject | None
    strict: bool | None


class Tool(TypedDict):
    """A tool of a chat."""

    type: Literal["function"]
    function: FunctionDefinition


class FunctionName(TypedDict):
    """A function by its name."""

    name: Name


class NamedToolChoice(TypedDict):
    """Demands a call of this function."""

    type: Literal["function"]
    function: FunctionName


class JsonSchema(TypedDict, total=False):
    """The JSON schema that an answer must fit."""

    name: Required[Name]
    description: str | None
    schema: JsonObject | None
    strict: bool | None


class TextFormat(TypedDict):
    """Plain text."""

    type: Literal["text"]


class JsonObjectFormat(TypedDict):
    """Any JSON object."""

    type: Literal["json_object"]


class JsonSchemaFormat(TypedDict):
    """JSON of this schema."""

    type: Literal["json_schema"]
    json_schema: JsonSchema


class StructuralTagFormat(TypedDict, total=False):
    """Structure between tags (vLLM's extension)."""

    type: Required[Literal["structural_tag"]]
    format: Json
    structures: Annotated[list[Any], AfterValidator(plain_json)] | None
    triggers: Annotated[list[str], at_most(WORDS_MAX)] | None


ResponseFormat: TypeAlias = Annotated[
    TextFormat | JsonObjectFormat | JsonSchemaFormat | StructuralTagFormat, Field(discriminator="type")
]


class StructuredOutputs(TypedDict, total=False):
    """What an answer must fit, in vLLM's terms; exactly one of the kinds."""

    json: Json
    regex: str | None
    choice: Annotated[list[str], at_most(WORDS_MAX, least=1)] | None
    grammar: str | None
    json_object: bool | None
    structural_tag: str | None
    whitespace_pattern: str | None
    disable_any_whitespace: bool | None
    disable_additional_properties: bool | None


class StreamOptions(TypedDict, total=False):
    """`include_usage` adds a last event with the token counts, `continuous_usage_stats` puts them in each."""

    include_usage: bool | None
    continuous_usage_stats: bool | None

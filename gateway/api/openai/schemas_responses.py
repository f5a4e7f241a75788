"""What a request to /v1/responses may say.

It is stateless: nothing is stored, so what names stored things is refused, and so are tools that a server
would run. Parts that chats have too are in `schemas_parts`.
"""

from typing import Annotated, Any, Literal, Required, TypeAlias

from pydantic import Discriminator, Field, Tag, with_config
from typing_extensions import TypedDict

from gateway.api.openai.schemas_parts import (
    INT32_MAX,
    PARTS_MAX,
    STRICT,
    TOOLS_MAX,
    DataUrl,
    Json,
    JsonObject,
    JsonObjectFormat,
    Model,
    Name,
    Refused,
    StructuredOutputs,
    TextFormat,
    Tokens,
    at_most,
)
from gateway.api.openai.schemas_requests import (
    LogitBias,
    Penalty,
    Probability,
    ProviderId,
    Seed,
    Stops,
    Temperature,
    TopLogprobs,
)

ITEMS_MAX = 2048
METADATA_MAX = 16  # OpenAI's, as are the lengths below
METADATA_KEY_CHARS_MAX = 64
METADATA_VALUE_CHARS_MAX = 512

_STATELESS = "Responses are not stored here: send the whole conversation as 'input'."


class InputTextPart(TypedDict):
    """Text of the user."""

    type: Literal["input_text"]
    text: str


class InputImagePart(TypedDict, total=False):
    """An image of the user."""

    type: Required[Literal["input_image"]]
    image_url: Required[DataUrl]
    detail: Literal["auto", "low", "high"] | None


class OutputTextPart(TypedDict, total=False):
    """Text of the model, as an earlier answer had it."""

    type: Required[Literal["output_text"]]
    text: Required[str]
    annotations: Json
    logprobs: Json


class OutputRefusalPart(TypedDict):
    """A refusal of the model."""

    type: Literal["refusal"]
    refusal: str


class ReasoningText(TypedDict):
    """A piece of reasoning, or of its summary."""

    type: Literal["reasoning_text", "summary_text"]
    text: str


ContentPart: TypeAlias = Annotated[
    InputTextPart | OutputTextPart | InputImagePart | OutputRefusalPart, Field(discriminator="type")
]
ItemContent: TypeAlias = Annotated[
    str | Annotated[list[ContentPart], at_most(PARTS_MAX)], Field(union_mode="left_to_right")
]


class MessageItem(TypedDict, total=False):
    """A message; `type` may be missing."""

    type: Literal["message"] | None
    role: Required[Literal["user", "assistant", "system", "developer"]]
    content: Required[ItemContent]
    id: Name | None
    status: Name | None


class FunctionCallItem(TypedDict, total=False):
    """A call that the model made earlier."""

    type: Required[Literal["function_call"]]
    call_id: Required[Name]
    name: Required[Name]
    arguments: Required[str]
    id: Name | None
    status: Name | None


class FunctionOutputItem(TypedDict, total=False):
    """The result of a call."""

    type: Required[Literal["function_call_output"]]
    call_id: Required[Name]
    output: Required[ItemContent]
    id: Name | None
    status: Name | None


class ReasoningItem(TypedDict, total=False):
    """Reasoning of an earlier answer."""

    type: Required[Literal["reasoning"]]
    id: Name | None
    summary: Annotated[list[ReasoningText], at_most(PARTS_MAX)] | None
    content: Annotated[list[ReasoningText], at_most(PARTS_MAX)] | None
    encrypted_content: str | None
    status: Name | None


def kind_of_item(item: Any) -> str | None:
    """The tag of an input item: its type, `message` where it has none."""
    if not isinstance(item, dict):
        return None
    kind = item.get("type")
    return "message" if kind is None else str(kind)


Item: TypeAlias = Annotated[
    Annotated[MessageItem, Tag("message")]
    | Annotated[FunctionCallItem, Tag("function_call")]
    | Annotated[FunctionOutputItem, Tag("function_call_output")]
    | Annotated[ReasoningItem, Tag("reasoning")],
    Discriminator(kind_of_item),
]


class FunctionTool(TypedDict, total=False):
    """A function that the model may call."""

    type: Required[Literal["function"]]
    name: Required[Name]
    description: str | None
    parameters: JsonObject | None
    strict: bool | None


class FunctionChoice(TypedDict):
    """Demands a call of this function."""

    type: Literal["function"]
    name: Name


class SchemaFormat(TypedDict, total=False):
    """JSON of this schema."""

    type: Required[Literal["json_schema"]]
    name: Required[Name]
    schema: Required[JsonObject]
    description: str | None
    strict: bool | None


class TextOptions(TypedDict, total=False):
    """The form of the answer's text."""

    format: Annotated[TextFormat | JsonObjectFormat | SchemaFormat, Field(discriminator="type")] | None


class Reasoning(TypedDict, total=False):
    """How much the model thinks first, and what it tells of it."""

    effort: Literal["none", "minimal", "low", "medium", "high", "xhigh", "max"] | None
    summary: Literal["auto", "concise", "detailed"] | None


Metadata: TypeAlias = Annotated[
    dict[
        Annotated[str, Field(max_length=METADATA_KEY_CHARS_MAX)],
        Annotated[str, Field(max_length=METADATA_VALUE_CHARS_MAX)],
    ],
    Field(max_length=METADATA_MAX, fail_fast=True),
]


@with_config(STRICT)
class ResponsesRequest(TypedDict, total=False):
    """Body of POST /v1/responses. null means the default."""

    model: Required[Model]
    provider_id: ProviderId | None
    input: Required[
        Annotated[str | Annotated[list[Item], at_most(ITEMS_MAX, least=1)], Field(union_mode="left_to_right")]
    ]
    instructions: str | None
    stream: bool | None
    max_output_tokens: Tokens | None
    max_tool_calls: Tokens | None
    temperature: Temperature | None
    top_p: Probability | None
    top_logprobs: TopLogprobs | None
    include: (
        Annotated[
            list[
                Literal[
                    "code_interpreter_call.outputs",
                    "computer_call_output.output.image_url",
                    "file_search_call.results",
                    "message.input_image.image_url",
                    "message.output_text.logprobs",
                    "reasoning.encrypted_content",
                ]
            ],
            at_most(16),
        ]
        | None
    )
    text: TextOptions | None
    tools: Annotated[list[FunctionTool], at_most(TOOLS_MAX)] | None
    tool_choice: (
        Annotated[Literal["none", "auto", "required"] | FunctionChoice, Field(union_mode="left_to_right")]
        | None
    )
    parallel_tool_calls: bool | None
    reasoning: Reasoning | None
    truncation: Literal["auto", "disabled"] | None
    metadata: Metadata | None
    # vLLM's extensions
    top_k: Annotated[int, Field(ge=-1, le=INT32_MAX)] | None
    seed: Seed | None
    stop: Stops | None
    logit_bias: LogitBias | None
    presence_penalty: Penalty | None
    frequency_penalty: Penalty | None
    repetition_penalty: Annotated[float, Field(gt=0, le=100)] | None
    ignore_eos: bool | None
    skip_special_tokens: bool | None
    include_stop_str_in_output: bool | None
    structured_outputs: StructuredOutputs | None
    # refused
    background: Annotated[Any, Refused("Responses are answered at once, not in the background.", (False,))]
    previous_response_id: Annotated[Any, Refused(_STATELESS)]
    previous_response: Annotated[Any, Refused(_STATELESS)]
    previous_input_messages: Annotated[Any, Refused(_STATELESS)]
    conversation: Annotated[Any, Refused(_STATELESS)]
    prompt: Annotated[Any, Refused("Stored prompts are not offered here.")]
    context_management: Annotated[Any, Refused("The context is yours to manage: send what should count.")]
    moderation: Annotated[Any, Refused("Moderation is not offered.")]

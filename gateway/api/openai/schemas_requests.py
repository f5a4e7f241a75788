"""What a chat, a completion, an embedding and a /v1/complete request may say.

The fields are OpenAI's and vLLM's documented sampling extensions. A field that is not here is dropped, among
them those that only the gateway sets (`priority`, `cache_salt`, `kv_transfer_params`, `request_id`, chat
templates, media processor options); one that would silently change the answer's meaning is refused.
"""

from typing import Annotated, Any, Literal, Required, TypeAlias

from pydantic import Field, with_config
from typing_extensions import TypedDict

from gateway.api.openai.schemas_parts import (
    BIASES_MAX,
    INT32_MAX,
    INT64_MAX,
    INT64_MIN,
    MESSAGES_MAX,
    STOPS_MAX,
    STRICT,
    TOKEN_IDS_MAX,
    TOOLS_MAX,
    WORDS_MAX,
    Message,
    Model,
    NamedToolChoice,
    Refused,
    ResponseFormat,
    Stop,
    StreamOptions,
    StructuredOutputs,
    TokenId,
    Tokens,
    Tool,
    at_most,
)

PROMPTS_MAX = 1024
INPUTS_MAX = 2048  # OpenAI's
CHOICES_MAX = 128  # OpenAI's

_USE_TOOLS = "Use 'tools' and 'tool_choice'."
_USE_STRUCTURED = "Use 'structured_outputs' or 'response_format'."

# Each is made once: pydantic then shares its validator between the fields that have it.
Probability: TypeAlias = Annotated[float, Field(ge=0, le=1)]
Temperature: TypeAlias = Annotated[float, Field(ge=0, le=2)]
Penalty: TypeAlias = Annotated[float, Field(ge=-2, le=2)]
Seed: TypeAlias = Annotated[int, Field(ge=INT64_MIN, le=INT64_MAX)]
TopLogprobs: TypeAlias = Annotated[int, Field(ge=0, le=20)]
LogitBias: TypeAlias = Annotated[
    dict[Annotated[str, Field(pattern=r"^[0-9]{1,9}$")], Annotated[float, Field(ge=-100, le=100)]],
    Field(max_length=BIASES_MAX, fail_fast=True),
]
Stops: TypeAlias = Annotated[
    Stop | Annotated[list[Stop], at_most(STOPS_MAX)], Field(union_mode="left_to_right")
]
TokenIds: TypeAlias = Annotated[list[TokenId], at_most(TOKEN_IDS_MAX)]
ProviderId: TypeAlias = Annotated[
    int, Field(ge=0, le=INT64_MAX, description="Pin to one provider; omit to let the gateway choose")
]


class Sampling(TypedDict, total=False):
    """What chats and completions share. null means the default."""

    model: Required[Model]
    provider_id: ProviderId | None
    stream: bool | None
    stream_options: StreamOptions | None
    max_tokens: Tokens | None
    temperature: Temperature | None
    top_p: Probability | None
    n: Annotated[int, Field(ge=1, le=CHOICES_MAX)] | None
    seed: Seed | None
    stop: Stops | None
    presence_penalty: Penalty | None
    frequency_penalty: Penalty | None
    logit_bias: LogitBias | None
    response_format: ResponseFormat | None
    # vLLM's extensions
    top_k: Annotated[int, Field(ge=-1, le=INT32_MAX)] | None
    min_p: Probability | None
    repetition_penalty: Annotated[float, Field(gt=0, le=100)] | None
    length_penalty: Annotated[float, Field(ge=-100, le=100)] | None
    min_tokens: Annotated[int, Field(ge=0, le=INT32_MAX)] | None
    stop_token_ids: Annotated[list[TokenId], at_most(STOPS_MAX)] | None
    include_stop_str_in_output: bool | None
    ignore_eos: bool | None
    skip_special_tokens: bool | None
    spaces_between_special_tokens: bool | None
    add_special_tokens: bool | None
    bad_words: Annotated[list[Stop], at_most(WORDS_MAX)] | None
    allowed_token_ids: TokenIds | None
    prompt_logprobs: TopLogprobs | None
    truncate_prompt_tokens: Annotated[int, Field(ge=-1, le=INT32_MAX)] | None
    return_tokens_as_token_ids: bool | None
    return_token_ids: bool | None
    thinking_token_budget: Annotated[int, Field(ge=-1, le=INT32_MAX)] | None
    structured_outputs: StructuredOutputs | None
    # refused
    use_beam_search: Annotated[Any, Refused("Beam search is not offered.", (False,))]
    best_of: Annotated[Any, Refused("Only one candidate per choice is generated.", (1,))]
    guided_json: Annotated[Any, Refused(_USE_STRUCTURED)]
    guided_regex: Annotated[Any, Refused(_USE_STRUCTURED)]
    guided_choice: Annotated[Any, Refused(_USE_STRUCTURED)]
    guided_grammar: Annotated[Any, Refused(_USE_STRUCTURED)]
    moderation: Annotated[Any, Refused("Moderation is not offered.")]


@with_config(STRICT)
class ChatRequest(Sampling, total=False):
    """Body of POST /v1/chat/completions."""

    messages: Required[Annotated[list[Message], at_most(MESSAGES_MAX, least=1)]]
    max_completion_tokens: Tokens | None
    logprobs: bool | None
    top_logprobs: TopLogprobs | None
    tools: Annotated[list[Tool], at_most(TOOLS_MAX, least=1)] | None
    tool_choice: (
        Annotated[Literal["none", "auto", "required"] | NamedToolChoice, Field(union_mode="left_to_right")]
        | None
    )
    parallel_tool_calls: bool | None
    reasoning_effort: Literal["none", "minimal", "low", "medium", "high", "xhigh", "max"] | None
    include_reasoning: bool | None
    add_generation_prompt: bool | None
    continue_final_message: bool | None
    # refused
    modalities: Annotated[Any, Refused("Only text is generated.", (["text"],))]
    audio: Annotated[Any, Refused("Only text is generated.")]
    functions: Annotated[Any, Refused(_USE_TOOLS)]
    function_call: Annotated[
        Any,
        Refused(
            _USE_TOOLS,
            (
                "none",
                "auto",
            ),
        ),
    ]
    web_search_options: Annotated[Any, Refused("Web search is not offered.")]


@with_config(STRICT)
class CompletionRequest(Sampling, total=False):
    """Body of POST /v1/completions. `max_tokens` 0 is for `echo`: it scores the prompt."""

    prompt: Required[
        Annotated[
            str
            | Annotated[list[str], at_most(PROMPTS_MAX, least=1)]
            | Annotated[list[TokenId], at_most(INT32_MAX, least=1)]
            | Annotated[list[TokenIds], at_most(PROMPTS_MAX, least=1)],
            Field(union_mode="left_to_right"),
        ]
    ]
    max_tokens: Annotated[int, Field(ge=0, le=INT32_MAX)] | None
    logprobs: TopLogprobs | None
    echo: bool | None
    # refused
    suffix: Annotated[Any, Refused("Only prompts without a suffix are completed.", ("",))]
    prompt_embeds: Annotated[Any, Refused("Prompts are text or tokens.")]


@with_config(STRICT)
class EmbeddingsRequest(TypedDict, total=False):
    """Body of POST /v1/embeddings."""

    model: Required[Model]
    provider_id: ProviderId | None
    input: Required[
        Annotated[
            str
            | Annotated[list[str], at_most(INPUTS_MAX, least=1)]
            | Annotated[list[TokenId], at_most(TOKEN_IDS_MAX, least=1)]
            | Annotated[list[TokenIds], at_most(INPUTS_MAX, least=1)],
            Field(union_mode="left_to_right"),
        ]
    ]
    encoding_format: Literal["float", "base64"] | None
    dimensions: Tokens | None
    # vLLM's extensions
    truncate_prompt_tokens: Annotated[int, Field(ge=-1, le=INT32_MAX)] | None
    add_special_tokens: bool | None


@with_config(STRICT)
class CompleteRequest(TypedDict, total=False):
    """Body of POST /v1/complete and /v1/complete/stream: one prompt, sent as one user message."""

    model: Required[Model]
    prompt: Required[Annotated[str, Field(min_length=1)]]
    max_tokens: Annotated[int, Field(ge=1, le=4096, json_schema_extra={"default": 512})] | None
    temperature: Annotated[float, Field(ge=0, le=2, json_schema_extra={"default": 0.7})] | None
    top_p: Annotated[float, Field(ge=0, le=1, json_schema_extra={"default": 1})] | None
    stop: Annotated[list[Stop], at_most(STOPS_MAX)] | None
    provider_id: ProviderId | None

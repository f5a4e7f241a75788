"""What admins see of routing and tell it: why a node is chosen, the whole pool; region, tier and price of a node."""

import uuid
from collections.abc import Mapping
from typing import Annotated, Any

import orjson
from aiohttp import web
from pydantic import BaseModel, ConfigDict, Field, TypeAdapter, ValidationError

from config.postgres import AWAY
from gateway.api.credentials import admin_of
from gateway.api.inference import read_body
from gateway.api.routes import Query, Routes
from gateway.api.services import NODES, PLACEMENT, REGISTRY
from gateway.api.system.answers import json_answer
from gateway.errors import BadRequest, NotFound, Unavailable
from nodes.routing.explain import load_of
from nodes.routing.filters import Wishes
from nodes.routing.router import Need
from nodes.routing.snapshot import UNCAPPED, Engine

routes = Routes(surface="plain", tag="Admin")

SHOWN_MAX = 1000
"""Nodes and engines that are shown: a terminal has fewer lines."""

BODY_BYTES_MAX = 4096


class ExplainQuery(BaseModel):
    """The turn that would be routed."""

    model_config = ConfigDict(extra="forbid")

    model: str = Field(min_length=1, max_length=512)
    kind: str = Field("generate", pattern="^(generate|pooling)$")
    prompt: str = Field("", max_length=4096)
    tokens: int | None = Field(None, ge=0, le=10**9)
    provider_id: int | None = Field(None, ge=1, lt=2**63)
    account_id: int = Field(0, ge=0, lt=2**63)
    session: str = Field("", max_length=128)
    region: str = Field("", max_length=128)
    tier_min: int = Field(0, ge=0, le=32_000)
    price_percent_max: int | None = Field(None, ge=0, le=32_000)


class Scores(BaseModel):
    """Parts of an engine's cost in tokens; the least total gets the turn."""

    load: float
    late_turns: float
    uncached: int
    region: int
    reputation: float
    total: float


class EngineLoad(BaseModel):
    """Work on an engine: this worker's, the other workers', and what it last said of itself."""

    turns: int
    tokens: int
    others_turns: int
    others_tokens: int
    running: int
    waiting: int
    kv_usage: float


class Candidate(BaseModel):
    """One engine. `failed` names the filters that keep the turn from it."""

    engine: str
    failed: list[str]
    is_roomy: bool
    has_its_share: bool
    cached_tokens: int
    drawn_tokens: int
    scores: Scores
    load: EngineLoad


class Explanation(BaseModel):
    """The candidates, those that may get the turn first, by their cost."""

    model: str
    kind: str
    policy: str
    prompt_beginnings: int
    engines: int
    candidates: list[Candidate]
    cached_on: list[str]


class NodeSeen(BaseModel):
    """A node as it last reported."""

    node_id: str
    account_id: int
    hostname: str
    state: str
    epoch: int
    agent_version: str
    cached_models: list[str]
    gpu_status: dict[str, Any]
    heartbeat_age_s: float | None
    region: str
    tier: int
    price_percent: int
    reputation: float


class EngineSeen(BaseModel):
    """An engine that turns may go to. `cap`: turns that it takes since it said that it is full; null: as many as come."""

    engine: str
    node_id: str
    account_id: int
    models: list[str]
    is_open: bool
    cap: int | None
    held_tokens: int
    load: EngineLoad


class LineSeen(BaseModel):
    """Turns that wait for the same engines."""

    model: str
    kind: str
    provider_id: int | None
    waiting: int


class QueueSeen(BaseModel):
    """The turns that wait: those of this worker by line, and how many the other workers have."""

    waiting: int
    others: int
    lines: list[LineSeen]


class Pool(BaseModel):
    """The pool as this worker sees it."""

    nodes_online: int
    nodes: list[NodeSeen]
    engines: list[EngineSeen]
    queue: QueueSeen


class NodeFactsBody(BaseModel):
    """What routing goes by; what is left out stays as it is."""

    model_config = ConfigDict(extra="forbid")

    region: Annotated[str | None, Field(max_length=128, pattern="^[^\\x00]*$")] = None
    tier: Annotated[int | None, Field(ge=0, le=32_000)] = None
    price_percent: Annotated[int | None, Field(ge=0, le=10_000)] = None
    reputation: Annotated[float | None, Field(ge=0, le=1)] = None


class Changed(BaseModel):
    """It is done; workers hear of it within a second."""

    success: bool


@routes.get(
    "/api/admin/routing/explain", summary="Why a node would be chosen", answers={200: Explanation},
    errors=(400, 403, 503), auth="admin",
    query=(
        Query("model", str, "The model that is asked for", required=True),
        Query("kind", str, "`generate` or `pooling`"),
        Query("prompt", str, "The beginning of a user message, whose cached part counts"),
        Query("tokens", int, "The turn's size as load, prompt and answer; else that of the prompt"),
        Query("provider_id", int, "Only this provider's nodes"),
        Query("account_id", int, "Whose turn it is: caches are kept apart"),
        Query("session", str, "As the header x-poolgate-session"),
        Query("region", str, "As the header x-poolgate-region"),
        Query("tier_min", int, "As the header x-poolgate-tier-min"),
        Query("price_percent_max", int, "As the header x-poolgate-price-percent-max"),
    ),
)  # fmt: skip
async def explain(request: web.Request) -> web.StreamResponse:
    """Each candidate, the filters that it failed and its scores, as the worker that answers sees them now. A turn itself
    tells the same in its answer's header `x-poolgate-explain` where an admin asked so with `x-poolgate-explain: 1`."""
    await admin_of(request)
    asked = _checked(ExplainQuery, {name: value for name, value in request.query.items() if name != "key"})
    return json_answer(request.app[PLACEMENT].explain(_need(asked), 64))


@routes.get(
    "/api/admin/routing/pool", summary="The pool", answers={200: Pool}, errors=(403, 503), auth="admin",
)  # fmt: skip
async def pool(request: web.Request) -> web.StreamResponse:
    """Nodes, engines, their load and the queue: what `poolgate top` shows."""
    await admin_of(request)
    try:
        nodes = await request.app[NODES].overview(SHOWN_MAX)
    except AWAY:
        raise Unavailable(retry_after_s=2) from None
    snapshot, queue = request.app[REGISTRY].snapshot, request.app[PLACEMENT].queue
    engines = sorted(snapshot.engines, key=lambda engine: (-engine.load.in_tokens, engine.key))[:SHOWN_MAX]
    lines = [
        {"model": model, "kind": kind, "provider_id": provider_id, "waiting": waiting}
        for (model, kind, provider_id), waiting in queue.lines()
    ]
    return json_answer(
        {
            "nodes_online": snapshot.nodes_online,
            "nodes": nodes,
            "engines": [_seen(engine) for engine in engines],
            "queue": {"waiting": queue.waiting, "others": queue.others, "lines": lines},
        }
    )


@routes.declare(
    "PUT", "/api/admin/routing/nodes/{node_id}", summary="What routing goes by for a node", body=NodeFactsBody,
    answers={200: Changed}, errors=(400, 403, 404, 413, 503), auth="admin",
)  # fmt: skip
async def set_facts(request: web.Request) -> web.StreamResponse:
    """Its region and tier, what its owner asks in percent of the price book, its reputation from 0 to 1."""
    await admin_of(request)
    body = await read_body(request, BODY_BYTES_MAX)
    try:
        facts = TypeAdapter(NodeFactsBody).validate_json(body)
        node_id = str(uuid.UUID(request.match_info["node_id"]))
    except ValidationError as error:
        raise _bad(error) from None
    except ValueError:
        raise NotFound("There is no such node.") from None
    try:
        is_known = await request.app[NODES].set_facts(node_id, facts.model_dump())
    except AWAY:
        raise Unavailable(retry_after_s=2) from None
    if not is_known:
        raise NotFound("There is no such node.")
    return json_answer({"success": True})


def _need(asked: ExplainQuery) -> Need:
    prompt = {"messages": [{"role": "user", "content": asked.prompt}]}
    body = orjson.dumps(prompt)
    tokens = len(asked.prompt.encode()) // 4 if asked.tokens is None else asked.tokens
    wishes = Wishes(asked.session, asked.region, asked.tier_min, asked.price_percent_max)
    return Need(
        asked.model, asked.kind, tokens, asked.provider_id, (), tokens, body, asked.account_id, wishes
    )


def _seen(engine: Engine) -> dict[str, Any]:
    cap = engine.load.cap
    return {
        "engine": engine.key, "node_id": engine.node_id, "account_id": engine.account_id,
        "models": sorted(engine.models), "is_open": engine.breaker.is_open,
        "cap": None if cap >= UNCAPPED else cap, "held_tokens": engine.held.tokens, "load": load_of(engine),
    }  # fmt: skip


def _checked(shape: type[ExplainQuery], given: Mapping[str, str]) -> ExplainQuery:
    try:
        return shape.model_validate(given)
    except ValidationError as error:
        raise _bad(error) from None


def _bad(error: ValidationError) -> BadRequest:
    """The first thing that is wrong, by name; never what was sent."""
    first = error.errors(include_url=False, include_input=False)[0]
    place = ".".join(str(part) for part in first["loc"]) or "the body"
    return BadRequest(f"{place}: {first['msg']}.", param=place)

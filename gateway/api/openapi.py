"""Writes the OpenAPI 3.1 document of all declared routes.

Everything in it comes from `gateway/api/routes.py`'s declarations, the types that also validate requests, and
the table of errors; nothing is written twice. Serving it is `gateway/api/system/docs.py`'s.
"""

import re
from collections.abc import Iterable
from typing import Any, Literal

from pydantic import TypeAdapter
from pydantic.json_schema import GenerateJsonSchema
from typing_extensions import TypedDict

from gateway.api.openai.schemas_answers import OpenAiError
from gateway.api.routes import Answer, Media, Query, Route, RouteSet
from gateway.errors import ApiError, Surface

REF = "#/components/schemas/{model}"

SECURITY_SCHEMES: dict[str, dict[str, str]] = {
    "Bearer": {"type": "http", "scheme": "bearer", "description": "API key, as the OpenAI SDKs send it"},
    "ApiKey": {"type": "apiKey", "in": "header", "name": "x-api-key", "description": "API key"},
    "RenterKey": {
        "type": "apiKey",
        "in": "header",
        "name": "x-renter-key",
        "description": "API key of a renter",
    },
    "RenterApiKey": {
        "type": "apiKey",
        "in": "query",
        "name": "key",
        "description": "API key in the query; prefer a header, which ends up in fewer logs",
    },
}

PROVIDER_SCHEMES: dict[str, dict[str, str]] = {
    "ProviderKey": {
        "type": "apiKey",
        "in": "header",
        "name": "x-provider-key",
        "description": "Provider key",
    },
    "ProviderApiKey": {
        "type": "apiKey",
        "in": "query",
        "name": "key",
        "description": "Provider key in the query; prefer the header, which ends up in fewer logs",
    },
}

ADMIN_SCHEMES: dict[str, dict[str, str]] = {
    "AdminToken": {
        "type": "apiKey",
        "in": "header",
        "name": "x-admin-token",
        "description": "The setting `admin_token`, or a key with the scope `admin`; also as Bearer",
    },
}


class CustomerErrorBody(TypedDict):
    """What went wrong."""

    code: str
    message: str
    request_id: str
    details: dict[str, Any]


class CustomerError(TypedDict):
    """Error of the customer API."""

    error: CustomerErrorBody


class Error(TypedDict):
    """Error of the other paths."""

    error: str
    request_id: str


ERROR_SHAPES: dict[Surface, Any] = {"openai": OpenAiError, "customer": CustomerError, "plain": Error}


def openapi_document(
    route_sets: Iterable[RouteSet], *, title: str, version: str, server_url: str, description: str = ""
) -> dict[str, Any]:
    """The document as plain data, ready for JSON or YAML."""
    routes = [route for routes in route_sets for route in routes if route.is_documented]
    schemas = Schemas(shape for route in routes for shape in _shapes(route))
    paths: dict[str, dict[str, Any]] = {}
    for route in routes:
        paths.setdefault(documented_path(route.path), {})[route.method.lower()] = _operation(route, schemas)
    return {
        "openapi": "3.1.0",
        "info": {"title": title, "version": version, "description": description},
        "servers": [{"url": server_url}],
        "tags": [{"name": tag} for tag in dict.fromkeys(route.tag for route in routes)],
        "paths": paths,
        "components": {
            "schemas": schemas.components,
            "securitySchemes": SECURITY_SCHEMES | PROVIDER_SCHEMES | ADMIN_SCHEMES,
            "headers": {
                "RequestId": {"description": "Names this request in our logs", "schema": {"type": "string"}}
            },
            "responses": _error_responses(routes, schemas),
        },
    }


def documented_path(path: str) -> str:
    """`path` without the patterns of its parameters: /v1/models/{model:.+} is /v1/models/{model}."""
    return re.sub(r"\{(\w+):[^{}]*\}", r"{\1}", path)


class _Plain(GenerateJsonSchema):
    """Without a title a field: it would repeat the field's name."""

    def field_title_should_be_set(self, schema: Any) -> bool:
        return False


class Schemas:
    """JSON schemas of declared types, each named type once under components."""

    def __init__(self, shapes: Iterable[Any]) -> None:
        kept: list[Any] = []
        for shape in shapes:
            if shape is not None and not any(shape is other for other in kept):
                kept.append(shape)
        inputs: list[tuple[int, Literal["validation"], TypeAdapter[Any]]] = [
            (place, "validation", TypeAdapter(shape)) for place, shape in enumerate(kept)
        ]
        made, rest = TypeAdapter.json_schemas(inputs, ref_template=REF, schema_generator=_Plain)
        self._kept = kept
        self._made = {place: schema for (place, _), schema in made.items()}
        self.components: dict[str, Any] = rest.get("$defs", {})

    def of(self, shape: Any) -> dict[str, Any]:
        """The schema of a type that was given at the start: a reference where the type has a name."""
        place = next(place for place, kept in enumerate(self._kept) if kept is shape)
        return self._made[place]


def _shapes(route: Route) -> Iterable[Any]:
    yield route.body
    yield ERROR_SHAPES[route.surface]
    for query in route.query:
        yield query.shape
    for answer in route.answers.values():
        for media in answer.media:
            yield media.shape


def _operation(route: Route, schemas: Schemas) -> dict[str, Any]:
    path = documented_path(route.path)
    operation: dict[str, Any] = {
        "operationId": re.sub(r"\W+", "_", f"{route.method.lower()}{path}").strip("_"),
        "tags": [route.tag],
        "summary": route.summary,
        "security": _security(route),
        "responses": {
            **{str(status): _response(answer, schemas) for status, answer in route.answers.items()},
            **{str(status): _error_reference(route.surface, status) for status in _error_statuses(route)},
        },
    }
    if route.description:
        operation["description"] = route.description
    if parameters := [*_path_parameters(path), *(_query_parameter(query, schemas) for query in route.query)]:
        operation["parameters"] = parameters
    if route.body is not None:
        content = {"application/json": {"schema": schemas.of(route.body)}}
        operation["requestBody"] = {"required": True, "content": content}
    return operation


def _security(route: Route) -> list[dict[str, list[str]]]:
    by_key: list[dict[str, list[str]]] = [{name: []} for name in SECURITY_SCHEMES]
    if route.auth == "key":
        return by_key
    if route.auth == "provider":
        return [{name: []} for name in (*PROVIDER_SCHEMES, "Bearer", "ApiKey")]
    if route.auth == "admin":
        return [{name: []} for name in (*ADMIN_SCHEMES, "Bearer")]
    return [{}, *by_key] if route.auth == "optional" else []


def _path_parameters(path: str) -> list[dict[str, Any]]:
    return [
        {"name": name, "in": "path", "required": True, "schema": {"type": "string"}}
        for name in re.findall(r"\{(\w+)\}", path)
    ]


def _query_parameter(query: Query, schemas: Schemas) -> dict[str, Any]:
    found = {"name": query.name, "in": "query", "required": query.required, "schema": schemas.of(query.shape)}
    return {**found, "description": query.description} if query.description else found


def _response(answer: Answer, schemas: Schemas) -> dict[str, Any]:
    response: dict[str, Any] = {
        "description": answer.description,
        "headers": {"x-request-id": {"$ref": "#/components/headers/RequestId"}},
    }
    if answer.media:
        response["content"] = {media.media_type: _media(media, schemas) for media in answer.media}
    return response


def _media(media: Media, schemas: Schemas) -> dict[str, Any]:
    if media.shape is not None and media.media_type.endswith("json"):
        return {"schema": schemas.of(media.shape)}
    schema: dict[str, Any] = {"type": "string"}
    if media.description:
        schema["description"] = media.description
    if media.shape is not None:  # what each event of a stream holds; OpenAPI 3.1 has no word for it
        schema["x-event-schema"] = schemas.of(media.shape)
    return {"schema": schema}


def _error_statuses(route: Route) -> list[int]:
    """The statuses that the edge may answer for any route of this kind, and those that the route declares."""
    statuses = {500, *route.errors}
    if route.auth in ("key", "optional", "provider", "admin"):
        statuses |= {401, 429}
    if route.body is not None:
        statuses |= {400, 413}
    return sorted(statuses - set(route.answers))


def _error_reference(surface: Surface, status: int) -> dict[str, str]:
    return {"$ref": f"#/components/responses/{surface}_{status}"}


def _error_responses(routes: list[Route], schemas: Schemas) -> dict[str, Any]:
    asked = sorted({(route.surface, status) for route in routes for status in _error_statuses(route)})
    words = _words_of_errors()
    return {
        f"{surface}_{status}": {
            "description": words.get(status, "Error"),
            "headers": {"x-request-id": {"$ref": "#/components/headers/RequestId"}},
            "content": {"application/json": {"schema": schemas.of(ERROR_SHAPES[surface])}},
        }
        for surface, status in asked
    }


def _words_of_errors() -> dict[int, str]:
    """What each status means: the default messages of the errors that have it."""
    words: dict[int, list[str]] = {}
    waiting: list[type[ApiError]] = [ApiError]
    while waiting:
        error = waiting.pop(0)
        words.setdefault(error.status, []).append(" ".join((error.__doc__ or "").split()))
        waiting += error.__subclasses__()
    return {status: " ".join(said) for status, said in words.items()}

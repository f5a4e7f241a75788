"""What the OpenAPI document says about the declared routes."""

from pathlib import Path
from typing import Any, Literal

import orjson
import pytest
import yaml
from aiohttp import web
from openapi_spec_validator import validate
from yarl import URL

from gateway.api.openapi import documented_path, openapi_document
from gateway.api.routes import Answer, Handler, Media, Query, Routes, add_to, as_answer, route_of, surface_of
from gateway.api.system.docs import PAGE, START, UI_FILES, ApiDocs, routes_of, swagger_ui_folder, wants_json
from gateway.app import ROUTES
from gateway.errors import ApiError, BadRequest, NotFound, render

CONTRACTS = Path(__file__).parents[1] / "contracts"


@pytest.fixture(scope="module")
def document() -> dict[str, Any]:
    docs = ApiDocs()
    return openapi_document([*ROUTES, docs.routes], title="poolgate", version="1", server_url="/")


@pytest.fixture(scope="module")
def contract() -> dict[str, Any]:
    found: dict[str, Any] = orjson.loads((CONTRACTS / "gpu_marketplace_v1.json").read_bytes())
    return found


def operations(paths: dict[str, Any]) -> set[tuple[str, str]]:
    return {(method, path) for path, item in paths.items() for method in item}


def resolved(document: dict[str, Any], schema: dict[str, Any]) -> dict[str, Any]:
    """The schema behind a reference."""
    if "$ref" not in schema:
        return schema
    found: Any = document
    for step in schema["$ref"].removeprefix("#/").split("/"):
        found = found[step]
    return resolved(document, found)


def json_answer(document: dict[str, Any], path: str, method: str = "get") -> dict[str, Any]:
    answer = document["paths"][path][method]["responses"]["200"]
    return resolved(document, answer["content"]["application/json"]["schema"])


async def handler(request: web.Request) -> web.StreamResponse:
    """Says hello."""
    return web.Response()


def made_from(**declared: Any) -> dict[str, Any]:
    """The document of one route."""
    routes = Routes(surface="openai", tag="T")
    routes.post("/v1/x/{id:.+}", summary="S", **declared)(handler)
    return openapi_document([routes], title="t", version="1", server_url="/")


# --- the document of all routes ---------------------------------------------------------------------------------


def test_the_document_is_valid_openapi_3_1(document: dict[str, Any]) -> None:
    assert document["openapi"] == "3.1.0"
    validate(document)


def test_every_documented_route_is_in_it_once(document: dict[str, Any]) -> None:
    declared = [
        (route.method.lower(), documented_path(route.path))
        for routes in ROUTES
        for route in routes
        if route.is_documented
    ]
    assert sorted(declared) == sorted(operations(document["paths"]) - operations_of_docs())


def operations_of_docs() -> set[tuple[str, str]]:
    return {("get", "/api/docs"), ("get", "/api/docs/ui")}


def test_the_contracts_operations_are_in_it(document: dict[str, Any], contract: dict[str, Any]) -> None:
    assert operations(contract["paths"]) <= operations(document["paths"])


def test_operation_ids_are_unique(document: dict[str, Any]) -> None:
    ids = [item[method]["operationId"] for item in document["paths"].values() for method in item]
    assert len(ids) == len(set(ids))


def test_every_reference_leads_somewhere(document: dict[str, Any]) -> None:
    waiting: list[Any] = [document]
    while waiting:
        here = waiting.pop()
        if isinstance(here, dict):
            if isinstance(here.get("$ref"), str):
                assert resolved(document, here)
            waiting += here.values()
        elif isinstance(here, list):
            waiting += here


@pytest.mark.parametrize("path", ["/v1/chat/completions", "/v1/complete", "/v1/complete/stream"])
def test_requests_take_every_field_of_the_contract(
    path: str, document: dict[str, Any], contract: dict[str, Any]
) -> None:
    def body(of: dict[str, Any]) -> dict[str, Any]:
        found = of["paths"][path]["post"]["requestBody"]["content"]["application/json"]["schema"]
        return resolved(document, found)

    asked, ours = body(contract), body(document)
    assert asked["properties"].keys() <= ours["properties"].keys()
    assert set(ours["required"]) == set(asked["required"])


@pytest.mark.parametrize("path", ["/v1/chat/completions", "/v1/complete"])
def test_answers_have_every_field_of_the_contract(
    path: str, document: dict[str, Any], contract: dict[str, Any]
) -> None:
    asked = json_answer(contract, path, "post")
    assert asked["properties"].keys() <= json_answer(document, path, "post")["properties"].keys()


def test_the_defaults_and_bounds_of_complete_are_the_contracts(
    document: dict[str, Any], contract: dict[str, Any]
) -> None:
    asked = contract["paths"]["/v1/complete"]["post"]["requestBody"]["content"]["application/json"]["schema"]
    for name in ("max_tokens", "temperature", "top_p"):
        number = document["components"]["schemas"]["CompleteRequest"]["properties"][name]["anyOf"][0]
        assert {key: number[key] for key in ("default", "minimum", "maximum")} == {
            key: asked["properties"][name][key] for key in ("default", "minimum", "maximum")
        }


def test_models_have_the_contracts_fields_in_both_lists(
    document: dict[str, Any], contract: dict[str, Any]
) -> None:
    asked = json_answer(contract, "/v1/models")["properties"]["models"]["items"]["properties"]
    ours = json_answer(document, "/v1/models")["properties"]
    assert ours["data"] == ours["models"]
    assert asked.keys() <= resolved(document, ours["models"]["items"])["properties"].keys()


def test_streams_are_documented_beside_whole_answers(document: dict[str, Any]) -> None:
    for path in ("/v1/chat/completions", "/v1/completions", "/v1/responses"):
        answers = document["paths"][path]["post"]["responses"]["200"]["content"]
        assert answers.keys() == {"application/json", "text/event-stream"}


def test_each_surface_has_its_own_error_shape(document: dict[str, Any]) -> None:
    error = document["paths"]["/v1/chat/completions"]["post"]["responses"]["401"]
    shape = resolved(document, error)["content"]["application/json"]["schema"]
    assert resolved(document, shape)["properties"].keys() == {"error"}
    assert shape["$ref"].endswith("/OpenAiError")


# --- one declaration --------------------------------------------------------------------------------------------


def test_path_parameters_are_named_without_their_patterns() -> None:
    item = made_from()["paths"]["/v1/x/{id}"]["post"]
    assert item["parameters"] == [
        {"name": "id", "in": "path", "required": True, "schema": {"type": "string"}}
    ]


def test_query_parameters_have_their_type_and_words() -> None:
    query = Query("kind", Literal["a", "b"], "Which kind", required=True)
    parameter = made_from(query=[query])["paths"]["/v1/x/{id}"]["post"]["parameters"][1]
    assert parameter == {
        "name": "kind", "in": "query", "required": True, "schema": {"enum": ["a", "b"], "type": "string"},
        "description": "Which kind",
    }  # fmt: skip


def test_a_handlers_docstring_describes_its_route() -> None:
    assert made_from()["paths"]["/v1/x/{id}"]["post"]["description"] == "Says hello."
    assert made_from(description="D")["paths"]["/v1/x/{id}"]["post"]["description"] == "D"


@pytest.mark.parametrize(
    ("auth", "first"), [("key", {"Bearer": []}), ("optional", {}), ("open", None), ("node", None)]
)
def test_security_follows_who_may_call(auth: str, first: dict[str, Any] | None) -> None:
    security = made_from(auth=auth)["paths"]["/v1/x/{id}"]["post"]["security"]
    assert (security[0] if security else None) == first


def test_a_declared_answer_replaces_the_tables_error() -> None:
    document = made_from(answers={200: None, 401: Answer("Bad key")})
    assert document["paths"]["/v1/x/{id}"]["post"]["responses"]["401"]["description"] == "Bad key"


def test_an_undocumented_route_is_served_and_not_listed() -> None:
    assert made_from(is_documented=False)["paths"] == {}


def test_answers_are_declared_in_several_ways() -> None:
    assert as_answer(None).media == ()
    assert as_answer(int) == Answer("The answer", (Media(shape=int),))
    assert as_answer((int, Media("text/plain", description="T"))).description == "T"
    assert as_answer(Answer("A")) == Answer("A")


# --- routes -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("path", "surface"),
    [
        ("/v1", "openai"), ("/v1/nope", "openai"), ("/v1nope", "plain"), ("/", "plain"), ("/api/v1/x", "plain"),
        ("/api/v1/customer", "customer"), ("/api/v1/customer/keys", "customer"), ("/api/v1/customers", "plain"),
        ("/api/v2/jobs", "customer"), ("/api/v20", "plain"), ("/health", "plain"),
    ],
)  # fmt: skip
def test_the_surface_of_a_path(path: str, surface: str) -> None:
    assert surface_of(path) == surface


@pytest.mark.parametrize("method", ["GET", "HEAD"])
async def test_the_declaration_of_a_matched_route_is_found(aiohttp_client: Any, method: str) -> None:
    async def tell(request: web.Request) -> web.StreamResponse:
        found = route_of(request)
        return web.Response(headers={"x-path": found.path if found else ""})

    routes = Routes(surface="openai", tag="T")
    routes.get("/v1/x/{id}", summary="S")(tell)
    app = web.Application()
    add_to(app, [routes])
    client = await aiohttp_client(app)
    async with client.request(method, "/v1/x/5") as answer:
        assert answer.headers["x-path"] == "/v1/x/{id}"


# --- how it is served -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("form", "accept", "is_json"),
    [
        (None, "", False), (None, "*/*", False), (None, "application/json", True),
        (None, "text/html, application/json;q=0.9", True), (None, "application/yaml, application/json", False),
        ("json", "application/yaml", True), ("yaml", "application/json", False),
    ],
)  # fmt: skip
def test_yaml_is_the_default_and_json_on_request(form: str | None, accept: str, is_json: bool) -> None:
    assert wants_json(form, accept) is is_json


def test_another_format_is_refused() -> None:
    with pytest.raises(BadRequest):
        wants_json("xml", "")


def test_both_forms_say_the_same(document: dict[str, Any]) -> None:
    docs = ApiDocs()
    docs.publish(document)
    assert yaml.safe_load(docs._yaml) == orjson.loads(docs._json) == document


def test_the_packages_swagger_ui_is_version_5_and_whole() -> None:
    folder = swagger_ui_folder()
    assert all((folder / name).is_file() for name in UI_FILES)
    assert 'PACKAGE_VERSION:"5.' in (folder / "swagger-ui-bundle.js").read_text()


def test_the_page_names_only_files_that_are_served() -> None:
    named = {part.split('"')[0] for part in PAGE.split('"ui/')[1:]}
    assert named == {*UI_FILES, "start.js"}
    assert "http" not in PAGE + START


@web.middleware
async def plain_errors(request: web.Request, handler: Handler) -> web.StreamResponse:
    """The edge's part, as far as these tests need it."""
    try:
        return await handler(request)
    except ApiError as error:
        status, headers, body = render(error, "plain", "req_1")
    except web.HTTPNotFound:
        status, headers, body = render(NotFound(), "plain", "req_1")
    return web.Response(status=status, body=body, headers={**headers, "content-type": "application/json"})


@pytest.mark.parametrize(
    ("path", "status", "media_type"),
    [
        ("/api/docs", 200, "application/yaml"),
        ("/api/docs?format=json", 200, "application/json"),
        ("/api/docs/ui", 200, "text/html"),
        ("/api/docs/ui/swagger-ui.css", 200, "text/css"),
        ("/api/docs/ui/swagger-ui-bundle.js", 200, "text/javascript"),
        ("/api/docs/ui/favicon-32x32.png", 200, "image/png"),
        ("/api/docs/ui/start.js", 200, "text/javascript"),
        ("/api/docs/ui/swagger-editor.js", 404, "application/json"),
        ("/api/docs/ui/..%2f..%2fcore.py", 404, "application/json"),
        ("/api/docs/ui/%2e%2e/index.css", 404, "application/json"),
        ("/api/docs/ui/%2fetc%2fpasswd", 404, "application/json"),
    ],
)
async def test_documents_and_files_are_served_and_nothing_else(
    aiohttp_client: Any, path: str, status: int, media_type: str
) -> None:
    app = web.Application(middlewares=[plain_errors])
    add_to(app, [routes_of([])])
    client = await aiohttp_client(app)
    async with client.get(URL(path, encoded=True)) as answer:
        assert (answer.status, answer.content_type) == (status, media_type)
        if path.startswith("/api/docs/ui") and status == 200:
            assert "script-src 'self';" in answer.headers["content-security-policy"]
            assert answer.headers["x-content-type-options"] == "nosniff"


async def test_the_page_with_a_slash_leads_to_the_one_without(aiohttp_client: Any) -> None:
    app = web.Application(middlewares=[plain_errors])
    add_to(app, [routes_of([])])
    client = await aiohttp_client(app)
    async with client.get("/api/docs/ui/") as answer:
        assert (answer.status, str(answer.url.path)) == (200, "/api/docs/ui")

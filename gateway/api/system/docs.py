"""Serves the OpenAPI document at /api/docs and Swagger UI at /api/docs/ui.

The document is written once and kept as bytes; Swagger UI's files come from a package, so nothing is fetched
from elsewhere. What the document says is `gateway/api/openapi.py`'s.
"""

import importlib.metadata
import importlib.util
from collections.abc import Iterable
from pathlib import Path
from typing import Any, Literal

import orjson
import yaml
from aiohttp import hdrs, web

from gateway.api.openapi import openapi_document
from gateway.api.routes import Media, Query, Routes, RouteSet
from gateway.errors import BadRequest, NotFound

UI_FILES = {
    "swagger-ui.css": "text/css",
    "swagger-ui-bundle.js": "text/javascript",
    "favicon-16x16.png": "image/png",
    "favicon-32x32.png": "image/png",
}
"""The files that are served, by name: a path is looked up here and never joined to a folder."""

UI_HEADERS = {
    # Swagger UI sets style attributes; its scripts need no eval and nothing from other hosts.
    "content-security-policy": (
        "default-src 'none'; script-src 'self'; style-src 'self' 'unsafe-inline'; img-src 'self' data:; "
        "connect-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
    ),
    "x-content-type-options": "nosniff",
    "referrer-policy": "no-referrer",
}

PAGE = """<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>poolgate API</title>
<link rel="stylesheet" href="ui/swagger-ui.css">
<link rel="icon" type="image/png" sizes="32x32" href="ui/favicon-32x32.png">
<link rel="icon" type="image/png" sizes="16x16" href="ui/favicon-16x16.png">
</head>
<body>
<div id="swagger-ui"></div>
<script src="ui/swagger-ui-bundle.js"></script>
<script src="ui/start.js"></script>
</body>
</html>
"""

# Without a validator URL, Swagger UI would show an image from a server on the internet.
START = """window.ui = SwaggerUIBundle({
  url: "../docs?format=json",
  dom_id: "#swagger-ui",
  deepLinking: true,
  validatorUrl: null,
  layout: "BaseLayout",
  presets: [SwaggerUIBundle.presets.apis],
});
"""


INTRODUCTION = """One OpenAI-compatible endpoint over a pool of GPU hosts.

Point an OpenAI SDK at `/v1` with a key of yours. Amounts named `*_halala` are integers in minor units of the
currency. Every answer carries `x-request-id`; name it when you ask about a request. Unknown request fields are
ignored, and null means a field's default."""


def routes_of(route_sets: Iterable[RouteSet], *, server_url: str = "/") -> Routes:
    """The routes that serve the document of `route_sets` and of themselves; it is written here, once."""
    docs = ApiDocs()
    document = openapi_document(
        [*route_sets, docs.routes],
        title="poolgate",
        version=_version(),
        server_url=server_url,
        description=INTRODUCTION,
    )
    docs.publish(document)
    return docs.routes


class ApiDocs:
    """The routes of the document; `publish` gives them what to serve, once all routes are declared."""

    def __init__(self, ui_folder: Path | None = None) -> None:
        self._ui_folder = ui_folder or swagger_ui_folder()
        self._json = b""
        self._yaml = b""
        self.routes = Routes(surface="plain", tag="System")
        self._declare()

    def publish(self, document: dict[str, Any]) -> None:
        """Keep `document` in both forms."""
        self._json = orjson.dumps(document)
        dumper = getattr(yaml, "CSafeDumper", yaml.SafeDumper)  # libyaml where it is there: ten times faster
        text: str = yaml.dump(document, Dumper=dumper, sort_keys=False, allow_unicode=True, width=110)
        self._yaml = text.encode()

    def _declare(self) -> None:
        words = "OpenAPI document of this API"
        self.routes.add(
            "GET",
            "/api/docs",
            self.document,
            summary="OpenAPI 3.1 document (this document)",
            auth="open",
            answers={200: (Media("application/yaml", description=words), Media(shape=dict[str, Any]))},
            query=[Query("format", Literal["yaml", "json"], "`json`, or `yaml` (the default)")],
            errors=(400,),
        )
        page = Media("text/html", description="Swagger UI")
        self.routes.add(
            "GET",
            "/api/docs/ui",
            self.page,
            summary="Swagger UI: try the API out",
            auth="open",
            answers={200: page},
        )
        self.routes.add("GET", "/api/docs/ui/", self.to_page, summary="", auth="open", is_documented=False)
        self.routes.add("GET", "/api/docs/ui/{file}", self.file, summary="", auth="open", is_documented=False)

    async def document(self, request: web.Request) -> web.StreamResponse:
        """The document, in the form that the query or the Accept header asks for."""
        if wants_json(request.query.get("format"), request.headers.get(hdrs.ACCEPT, "")):
            return _cached(self._json, "application/json")
        return _cached(self._yaml, "application/yaml")

    async def page(self, request: web.Request) -> web.StreamResponse:
        """Swagger UI's page."""
        return web.Response(text=PAGE, content_type="text/html", headers=UI_HEADERS)

    async def to_page(self, request: web.Request) -> web.StreamResponse:
        """The page's links are relative to the path without the slash."""
        return web.Response(status=308, headers={"location": "../ui"})

    async def file(self, request: web.Request) -> web.StreamResponse:
        """A file of Swagger UI, or the script that starts it."""
        name = request.match_info["file"]
        if name == "start.js":
            return web.Response(text=START, content_type="text/javascript", headers=UI_HEADERS)
        media_type = UI_FILES.get(name)
        if media_type is None:
            raise NotFound
        headers = {**UI_HEADERS, hdrs.CONTENT_TYPE: media_type, hdrs.CACHE_CONTROL: "max-age=3600"}
        return web.FileResponse(self._ui_folder / name, headers=headers)


def wants_json(form: str | None, accept: str) -> bool:
    """Whether JSON is asked for: by name, or by an Accept header that takes JSON and does not name YAML."""
    if form is not None:
        if form not in ("json", "yaml"):
            raise BadRequest("'format' is 'json' or 'yaml'.", param="format")
        return form == "json"
    taken = accept.lower()
    return "application/json" in taken and "yaml" not in taken


def swagger_ui_folder() -> Path:
    """Where the package keeps Swagger UI's files. It is found, not imported: importing it brings more in."""
    found = importlib.util.find_spec("swagger_ui")
    if found is None or not found.submodule_search_locations:
        raise RuntimeError("swagger-ui-py is not installed; `pip install poolgate` brings it")
    return Path(found.submodule_search_locations[0]) / "static"


def _version() -> str:
    try:
        return importlib.metadata.version("poolgate")
    except importlib.metadata.PackageNotFoundError:  # run from the tree without an install
        return "0"


def _cached(body: bytes, media_type: str) -> web.Response:
    headers = {hdrs.CACHE_CONTROL: "no-cache", hdrs.VARY: hdrs.ACCEPT, "x-content-type-options": "nosniff"}
    return web.Response(body=body, content_type=media_type, charset="utf-8", headers=headers)

"""How an HTTP route is declared: one decorator that names its body, answers, credentials and documentation.

It owns the declarations and their registration in aiohttp; checking credentials and rendering errors is the
edge's work in `gateway/app.py`, and `gateway/api/openapi.py` writes the document from what is declared here.
"""

import inspect
from collections.abc import Awaitable, Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, TypeAlias

from aiohttp import web

from gateway.errors import Surface

Handler: TypeAlias = Callable[[web.Request], Awaitable[web.StreamResponse]]
Auth: TypeAlias = Literal["open", "optional", "key", "node", "provider", "admin"]
"""Who may call: anyone; anyone, and a key changes the answer; the holder of an API key; a node's agent, whose
provider key is in the body; a provider, whose key may be there, too; an admin."""


@dataclass(frozen=True, slots=True)
class Media:
    """An answer in one media type; `shape` is a declared type, or None for bytes without a schema."""

    media_type: str = "application/json"
    shape: Any = None
    description: str = ""


@dataclass(frozen=True, slots=True)
class Answer:
    """What one status of a route carries; no media means an empty body."""

    description: str
    media: tuple[Media, ...] = ()


@dataclass(frozen=True, slots=True)
class Query:
    """One query parameter."""

    name: str
    shape: Any = str
    description: str = ""
    required: bool = False


@dataclass(frozen=True, slots=True)
class Route:
    """One method of one path, as declared. Path parameters are those in braces."""

    method: str
    path: str
    handler: Handler
    surface: Surface
    tag: str
    summary: str
    description: str = ""
    auth: Auth = "key"
    body: Any = None
    answers: Mapping[int, Answer] = field(default_factory=dict)
    errors: tuple[int, ...] = ()
    query: tuple[Query, ...] = ()
    is_documented: bool = True


class Routes:
    """The routes of one group: they share a surface and a tag."""

    def __init__(self, *, surface: Surface, tag: str) -> None:
        self.surface = surface
        self.tag = tag
        self._routes: list[Route] = []

    def get(self, path: str, **declared: Any) -> Callable[[Handler], Handler]:
        """Declare a GET; the keywords are those of `add`."""
        return self.declare("GET", path, **declared)

    def post(self, path: str, **declared: Any) -> Callable[[Handler], Handler]:
        """Declare a POST; the keywords are those of `add`."""
        return self.declare("POST", path, **declared)

    def declare(self, method: str, path: str, **declared: Any) -> Callable[[Handler], Handler]:
        """Decorate a module-level handler."""

        def add(handler: Handler) -> Handler:
            self.add(method, path, handler, **declared)
            return handler

        return add

    def add(
        self,
        method: str,
        path: str,
        handler: Handler,
        *,
        summary: str,
        description: str = "",
        auth: Auth = "key",
        body: Any = None,
        answers: Mapping[int, Any] | None = None,
        errors: Iterable[int] = (),
        query: Iterable[Query] = (),
        is_documented: bool = True,
    ) -> Route:
        """Declare a route whose handler is at hand, as a method of an object built in `gateway/app.py` is.

        `answers` maps a status to a declared type (JSON), a `Media`, a tuple of these, or an `Answer`; None
        is an empty body. `errors` are the statuses of errors to document beside those that every route has.
        The description is the handler's docstring unless one is given.
        """
        route = Route(
            method=method.upper(),
            path=path,
            handler=handler,
            surface=self.surface,
            tag=self.tag,
            summary=summary,
            description=description or inspect.getdoc(handler) or "",
            auth=auth,
            body=body,
            errors=tuple(errors),
            query=tuple(query),
            answers={status: as_answer(given) for status, given in (answers or {200: None}).items()},
            is_documented=is_documented,
        )
        self._routes.append(route)
        return route

    def __iter__(self) -> Iterator[Route]:
        return iter(self._routes)

    def __len__(self) -> int:
        return len(self._routes)


RouteSet: TypeAlias = Iterable[Route]

ROUTE_OF_HANDLER: web.AppKey[dict[Any, Route]] = web.AppKey("route_of_handler", dict)


def add_to(app: web.Application, route_sets: Iterable[RouteSet]) -> None:
    """Register every route of `route_sets` in `app`. A GET also answers HEAD."""
    known = app.setdefault(ROUTE_OF_HANDLER, {})
    for routes in route_sets:
        for route in routes:
            known[app.router.add_route(route.method, route.path, route.handler)] = route
            if route.method == "GET":
                known[app.router.add_route("HEAD", route.path, route.handler)] = route


def route_of(request: web.Request) -> Route | None:
    """The declaration behind the route that `request` matched, None for an unknown path or method."""
    known = request.app.get(ROUTE_OF_HANDLER)
    return known.get(request.match_info.route) if known else None


def surface_of(path: str) -> Surface:
    """The surface that renders an error of `path`, known or not (contracts decision 5)."""
    if path == "/v1" or path.startswith("/v1/"):
        return "openai"
    if path.startswith(("/api/v1/customer/", "/api/v2/")) or path in ("/api/v1/customer", "/api/v2"):
        return "customer"
    return "plain"


def as_answer(given: Any) -> Answer:
    """`given` of a declaration as an `Answer`."""
    if isinstance(given, Answer):
        return given
    if given is None:
        return Answer("Done")
    parts = given if isinstance(given, tuple) else (given,)
    media = tuple(part if isinstance(part, Media) else Media(shape=part) for part in parts)
    words = next((part.description for part in media if part.description), "The answer")
    return Answer(words, media)

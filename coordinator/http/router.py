"""Path and method to handler, and who may call it."""

from __future__ import annotations

import hmac
from collections.abc import Callable
from dataclasses import dataclass

from baton.contract.errors import Draining
from coordinator.http import chat, completions, service
from coordinator.http.errors import MethodNotAllowed, NoSuchRoute, Unauthorized
from coordinator.http.exchange import Exchange
from coordinator.http.requests import Door

Handler = Callable[[Door, Exchange], None]


@dataclass(frozen=True, slots=True)
class Route:
    method: bytes
    handler: Handler
    is_open: bool = False
    """Answered without API key: probes and scrapers have none."""
    is_work: bool = False
    """Refused while draining."""


ROUTES: dict[str, Route] = {
    "/v1/completions": Route(b"POST", completions.complete, is_work=True),
    "/v1/chat/completions": Route(b"POST", chat.chat, is_work=True),
    "/fleet": Route(b"GET", service.fleet),
    "/v1/models": Route(b"GET", service.models),
    "/tokenize": Route(b"POST", service.tokenize),
    "/detokenize": Route(b"POST", service.detokenize),
    "/health": Route(b"GET", service.health, is_open=True),
    "/live": Route(b"GET", service.live, is_open=True),
    "/ready": Route(b"GET", service.ready, is_open=True),
    "/ping": Route(b"GET", service.health, is_open=True),
    "/version": Route(b"GET", service.version, is_open=True),
    "/metrics": Route(b"GET", service.metrics, is_open=True),
}
ROUTES |= {path + "z": ROUTES[path] for path in ("/live", "/ready")} | {"/healthz": ROUTES["/health"]}

_MODEL = Route(b"GET", service.model)


def dispatch(door: Door, exchange: Exchange) -> None:
    """Raises ServingError; a handler may also answer later."""
    request = exchange.request
    route = ROUTES.get(request.path)
    if route is None:
        if not request.path.startswith("/v1/models/"):
            raise NoSuchRoute(f"no route {request.path[:200]}; see {', '.join(sorted(ROUTES))}")
        route = _MODEL
    # HEAD is a GET whose body the exchange leaves away.
    if request.method != route.method and not (request.method == b"HEAD" and route.method == b"GET"):
        _other_method(exchange, route)
        return
    if not route.is_open and door.settings.api_key is not None:
        _check_key(door.settings.api_key, request.headers.get(b"authorization", b""))
    if route.is_work and door.is_draining:
        raise Draining("this coordinator is draining and takes no new requests")
    route.handler(door, exchange)


def _other_method(exchange: Exchange, route: Route) -> None:
    method = exchange.request.method
    allowed = b"GET, HEAD, OPTIONS" if route.method == b"GET" else b"POST, OPTIONS"
    headers = b"allow: %b\r\n" % allowed
    if method == b"OPTIONS":
        exchange.respond(200, b"", headers=headers)
        return
    shown = method.decode("latin-1")
    error = MethodNotAllowed(f"{exchange.request.path} does not take {shown}, it takes {allowed.decode()}")
    exchange.fail(error, headers)


def _check_key(key: str, given: bytes) -> None:
    scheme, _, token = given.partition(b" ")
    if scheme.lower() != b"bearer" or not hmac.compare_digest(token.strip(), key.encode("utf-8")):
        raise Unauthorized("this server wants its API key as `Authorization: Bearer KEY`")

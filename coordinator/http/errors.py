"""Errors as OpenAI clients read them: {"error": {message, type, param, code}}.

`code` is the stable string of `baton.contract.errors`; the HTTP status travels in the status line.
Errors only HTTP knows (wrong path, too large, too slow) are ServingErrors too, so that a failure
takes the same way out wherever it began.
"""

from __future__ import annotations

import math

import msgspec

from baton.contract.errors import RequestError, ServingError

_encode = msgspec.json.Encoder().encode

_TYPES = {
    400: "invalid_request_error",
    401: "authentication_error",
    404: "not_found_error",
    405: "method_not_allowed",
    408: "timeout_error",
    409: "conflict_error",
    413: "invalid_request_error",
    429: "rate_limit_error",
    431: "invalid_request_error",
    503: "service_unavailable",
    504: "timeout_error",
}


class MalformedHttp(RequestError):
    code = "malformed_http"


class Unauthorized(RequestError):
    code = "invalid_api_key"
    http_status = 401


class NoSuchRoute(RequestError):
    code = "not_found"
    http_status = 404


class MethodNotAllowed(RequestError):
    code = "method_not_allowed"
    http_status = 405


class TooSlow(RequestError):
    code = "request_timeout"
    http_status = 408


class BodyTooLarge(RequestError):
    code = "body_too_large"
    http_status = 413


class HeadTooLarge(RequestError):
    code = "headers_too_large"
    http_status = 431


class TooManyConnections(ServingError):
    code = "too_many_connections"
    http_status = 503
    retryable = True


def error_body(error: ServingError) -> bytes:
    """The JSON body; phase and worker ride along when known, clients ignore what they do not know."""
    fields: dict[str, str | None] = {
        "message": error.message,
        "type": _TYPES.get(error.http_status, "api_error"),
        "param": error.param,
        "code": error.code,
    }
    if error.phase is not None:
        fields["phase"] = error.phase
    if error.worker_id is not None:
        fields["worker_id"] = error.worker_id
    return _encode({"error": fields})


def error_headers(error: ServingError) -> bytes:
    """Header lines: Retry-After where the core knows when a retry makes sense."""
    lines = b""
    if error.retry_after_s is not None and math.isfinite(error.retry_after_s):
        lines = b"retry-after: %d\r\n" % max(1, math.ceil(error.retry_after_s))
    if error.http_status == 401:
        lines += b"www-authenticate: Bearer\r\n"
    return lines

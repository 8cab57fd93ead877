"""What the HTTP door accepts from strangers, each bound with its reason."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True, kw_only=True)
class HttpSettings:
    served_model_names: tuple[str, ...] = ()
    """Names clients may use. Empty: the model string of the workers and its last path component."""
    api_key: str | None = None
    """None: no check. Otherwise every route but health, version and metrics wants it as a bearer."""
    tool_call_parser: str | None = None
    """`hermes` maps <tool_call> text to tool_calls when tool_choice is auto; None leaves it as text."""

    max_body_bytes: int = 16 * 1024 * 1024
    """A prompt of a million token ids is about 7 MB of JSON; the ZeroMQ door has the same bound."""
    max_head_bytes: int = 64 * 1024
    """Request line and headers; browsers and proxies stay far below."""
    max_connections: int = 16_384
    """Above the client pools we know (1,000); the next connection hears 503 and is closed."""
    max_pipelined: int = 8
    """Complete requests waiting on one connection before we stop reading from it."""
    max_unread_bytes: int = 4 * 1024 * 1024
    """Events kept for a streaming client that does not read (about 16,000 tokens), then it is dropped."""

    head_timeout_s: float = 15.0
    """First byte of a request to the end of its headers."""
    body_timeout_s: float = 60.0
    """End of headers to end of body: 16 MiB at 280 kB/s."""
    idle_timeout_s: float = 120.0
    """Keep-alive; longer than the usual client pool (openai-python: 5 s) so that clients close first."""
    write_timeout_s: float = 60.0
    """A client that takes no byte of what waits for it for this long is dropped."""
    linger_s: float = 2.0
    """After refusing a request we did not read to its end: time to receive the answer before we close."""

    max_sequences: int = 256
    """Prompts x n of one HTTP request."""

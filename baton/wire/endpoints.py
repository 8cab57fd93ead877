"""Addresses, and who binds.

    socket   coordinator            peer
    fleet    ROUTER binds   <────   DEALER connects   one per worker
    client   ROUTER binds   <────   DEALER connects   one per client

The coordinator binds both, so workers and clients need one address and may sit on other hosts.
A coordinator address is `host:port` of the fleet socket; loopback unless the user says otherwise.
"""

from __future__ import annotations

DEFAULT_HOST = "127.0.0.1"
DEFAULT_HTTP_PORT = 8000
DEFAULT_FLEET_PORT = 5570
DEFAULT_CLIENT_PORT = 5571
DEFAULT_CLIENT_ADDRESS = f"{DEFAULT_HOST}:{DEFAULT_CLIENT_PORT}"


def tcp(host: str, port: int) -> str:
    return f"tcp://[{host}]:{port}" if ":" in host else f"tcp://{host}:{port}"


def parse_address(address: str, default_port: int) -> tuple[str, int]:
    """`host`, `host:port` or `tcp://host:port`. Raises ValueError with the text that was given."""
    text = address.removeprefix("tcp://")
    host, separator, port = text.rpartition(":")
    if not separator or text.endswith("]"):
        host, port = text, str(default_port)
    if not port.isdigit() or not 0 < int(port) < 65536 or not host.strip("[]"):
        raise ValueError(f"not an address of the form host:port: {address!r}")
    return host.strip("[]"), int(port)

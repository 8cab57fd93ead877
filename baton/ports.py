"""TCP ports that are free, chosen where nobody else looks.

A port is chosen here and bound by another process, sometimes many seconds later. Ports of the range
from which systems serve outgoing connections get taken meanwhile, so these come from below it.
"""

from __future__ import annotations

import random
import socket

CANDIDATES = range(20_000, 32_000)

LOOPBACK = "127.0.0.1"


def is_port_free(host: str, port: int) -> bool:
    """Whether it could be bound a moment ago."""
    with socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((host, port))
        except (OSError, OverflowError):
            return False
        return True


def free_port(host: str = LOOPBACK, *, num_ports: int = 1) -> int:
    """The first of `num_ports` free ports in a row. Raises OSError when none is found."""
    for first in random.sample(CANDIDATES, 200):
        if all(is_port_free(host, first + offset) for offset in range(num_ports)):
            return first
    raise OSError(f"found no {num_ports} free ports in a row on {host}")

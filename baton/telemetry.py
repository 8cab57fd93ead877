"""Log lines are events with fields, so that one `request_id` tells one story across processes:

2026-11-21 02:40:07.113 info prefill leg started handoff_id=h1 request_id=r1 num_prompt_tokens=512
"""

from __future__ import annotations

import logging
import sys
from typing import TextIO

LIFECYCLE_LOGGER = "baton.lifecycle"
"""For the few lines that people and scripts wait for (ready, draining, stopped): always shown."""


def configure_logging(role: str, level: str, stream: TextIO | None = None) -> None:
    """One line per event on `stream` (standard output), naming the role. Call once per process."""
    handler = logging.StreamHandler(stream or sys.stdout)
    handler.setFormatter(_EventFormatter(role))
    root = logging.getLogger()
    root.handlers[:] = [handler]
    root.setLevel(level.upper())
    logging.getLogger(LIFECYCLE_LOGGER).setLevel(logging.INFO)


def event(logger: logging.Logger, name: str, *, level: int = logging.INFO, **fields: object) -> None:
    """Costs one comparison when the level is off. A field that is None is left out."""
    if logger.isEnabledFor(level):
        logger.log(level, "%s", event_line(name, fields))


def event_line(name: str, fields: dict[str, object]) -> str:
    return " ".join([name, *(f"{key}={_shown(value)}" for key, value in fields.items() if value is not None)])


def _shown(value: object) -> str:
    if isinstance(value, float):
        return f"{value:.6g}"
    text = str(value)
    # Quoted if it would not read as one word: a client's id or text must not forge fields or lines.
    return text if text.isprintable() and text and not set(text) & set(' "=') else repr(text)


class _EventFormatter(logging.Formatter):
    def __init__(self, role: str) -> None:
        super().__init__(f"%(asctime)s.%(msecs)03d %(level)s {role} %(message)s", "%Y-%m-%d %H:%M:%S")

    def format(self, record: logging.LogRecord) -> str:
        record.level = record.levelname.lower()
        return super().format(record)

"""Event lines: one line each, fields that cannot be forged, lifecycle always shown."""

import io
import logging
import re

import pytest

from baton.telemetry import LIFECYCLE_LOGGER, configure_logging, event, event_line


@pytest.fixture
def log():
    """What a process at level `warning` prints."""
    root, lifecycle = logging.getLogger(), logging.getLogger(LIFECYCLE_LOGGER)
    before = (root.handlers[:], root.level, lifecycle.level)
    stream = io.StringIO()
    configure_logging("decode", "warning", stream)
    yield stream
    root.handlers[:] = before[0]
    root.setLevel(before[1])
    lifecycle.setLevel(before[2])


def test_an_event_is_a_name_and_its_fields():
    fields = {"handoff_id": "h1", "num_blocks": 3, "transfer_s": 0.01800004, "reason": None}
    assert (
        event_line("handoff finished", fields)
        == "handoff finished handoff_id=h1 num_blocks=3 transfer_s=0.018"
    )


@pytest.mark.parametrize(
    ("value", "shown"),
    [
        ("two words", "'two words'"),
        ("", "''"),
        ("a=b", "'a=b'"),
        ("line\nbreak", r"'line\nbreak'"),
        ("esc\x1b[2J", r"'esc\x1b[2J'"),
        ("größe", "größe"),
    ],
)
def test_a_value_cannot_pass_for_more_than_a_value(value, shown):
    assert event_line("e", {"request_id": value}) == f"e request_id={shown}"


def test_lines_name_time_level_and_role_and_obey_the_level(log):
    logger = logging.getLogger("baton.test")
    event(logger, "leg started", handoff_id="h1")
    event(logger, "kv late", level=logging.WARNING, handoff_id="h1")
    event(logging.getLogger(LIFECYCLE_LOGGER), "worker ready", worker_id="w1")
    first, second = log.getvalue().splitlines()
    assert re.fullmatch(r"\d{4}-\d\d-\d\d \d\d:\d\d:\d\d\.\d{3} warning decode kv late handoff_id=h1", first)
    assert second.endswith("info decode worker ready worker_id=w1")

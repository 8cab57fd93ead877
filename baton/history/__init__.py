"""What a run of the fleet looked like from outside and from inside, and whether it kept the promise.

A run is a folder: what each client saw (`requests.jsonl`), what was done to the fleet and what it said of
itself (`run.jsonl`), and the logs of all its processes. `checker` holds the rules, `story` tells all that
happened to one request. Nothing here talks to a fleet; contract and standard library only.
"""

from baton.history.checker import RULES, Violation, check
from baton.history.facts import History
from baton.history.held import what_is_held
from baton.history.reader import BrokenRun, read_run
from baton.history.records import (
    Ask,
    Chunk,
    End,
    FleetSnapshot,
    Kill,
    Limits,
    Pause,
    RunWriter,
    Usage,
)
from baton.history.story import story

__all__ = [
    "Ask",
    "BrokenRun",
    "Chunk",
    "End",
    "FleetSnapshot",
    "History",
    "Kill",
    "Limits",
    "Pause",
    "RULES",
    "RunWriter",
    "Usage",
    "Violation",
    "check",
    "read_run",
    "story",
    "what_is_held",
]

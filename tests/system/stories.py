"""What a failed test should have shown: the whole story of the requests it is about. Imported, not
collected."""

from __future__ import annotations

import re
from pathlib import Path

from baton.contract.lifecycle import Outcome
from baton.history import story
from baton.history.reader import read_processes

MAX_STORIES = 3
WELL_ENDED = (Outcome.COMPLETED, Outcome.ABORTED)


def stories(folder: Path, failure: str) -> str:
    """Of the requests that the failure's text names; of the latest that did not end well, if it names none.
    Empty if there is neither."""
    coordinators, _ = read_processes(folder)
    ended_well: dict[str, bool] = {}
    for coordinator in coordinators:
        for request_id in coordinator.accepted:
            words = coordinator.finished.get(request_id, [])
            ended_well[request_id] = bool(words) and words[-1].report.outcome in WELL_ENDED
    named = [name for name in dict.fromkeys(re.findall(r"[\w~.-]+", failure)) if name in ended_well]
    wanted = named or [name for name, is_well in ended_well.items() if not is_well]
    return "\n\n".join(story(folder, request_id) for request_id in wanted[-MAX_STORIES:])

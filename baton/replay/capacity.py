"""How much a fleet can take of a trace, and arrivals at a share of it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import numpy as np

from baton.replay.settings import ReplaySettings
from baton.replay.simulation import replay
from baton.workload import Trace, at_rate


def capacity_per_s(
    trace: Trace, settings: ReplaySettings, on_finished: Callable[[int], None] | None = None
) -> float:
    """Requests per second that finish between the 10th and the 90th percent, with all of them waiting
    at the coordinator from the start, in the trace's order."""
    at_once = replace(trace, arrival_s=np.zeros(len(trace)))
    patient = replace(settings, queue_timeout_s=None, is_closed_loop=False)
    return replay(at_once, patient, on_finished).throughput_per_s


def at_capacity_share(trace: Trace, load: float, capacity: float) -> Trace:
    """The same shape of arrivals at `load` times `capacity` requests per second."""
    return at_rate(trace, load * capacity)

"""Other arrival times for the same requests. Lengths, prefixes and order stay as they are.

Think times are not scaled: people do not think faster because more of them came. A closed-loop replay
is loaded more by starting sessions at a higher rate (`sped_up` does, it divides the sessions' starts).
"""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from baton.workload.trace import NO_SESSION, Floats, Trace, WorkloadError


def gamma_gaps(num_gaps: int, rate_per_s: float, cv: float, rng: np.random.Generator) -> Floats:
    """Times between arrivals at a mean rate. Coefficient of variation 1 is a Poisson process, 0 an even
    pace, more than 1 bursts."""
    if not rate_per_s > 0 or not np.isfinite(rate_per_s):
        raise WorkloadError(f"an arrival rate of {rate_per_s:g} per second, expected more than 0")
    if not cv >= 0 or not np.isfinite(cv):
        raise WorkloadError(f"a burstiness (CV of the gaps) of {cv:g}, expected 0 or more")
    if cv == 0:
        return np.full(num_gaps, 1 / rate_per_s)
    shape = 1 / cv**2
    return rng.gamma(shape, 1 / (rate_per_s * shape), num_gaps)


def sped_up(trace: Trace, factor: float) -> Trace:
    """All arrivals `factor` times as early."""
    if not factor > 0 or not np.isfinite(factor):
        raise WorkloadError(f"a speed-up of {factor:g}, expected more than 0")
    return replace(trace, arrival_s=trace.arrival_s / factor)


def at_rate(trace: Trace, rate_per_s: float) -> Trace:
    """Sped up or slowed down to a mean rate; the shape of the arrivals is kept."""
    if trace.rate_per_s <= 0:
        raise WorkloadError(f"{trace.name} has no arrival times that could be scaled to a rate")
    return sped_up(trace, rate_per_s / trace.rate_per_s)


def retimed(trace: Trace, rate_per_s: float, *, cv: float = 1.0, seed: int) -> Trace:
    """The same requests in the same order, arriving with gamma-distributed gaps (CV 1: Poisson)."""
    rng = np.random.default_rng(seed)
    arrival_s = np.cumsum(gamma_gaps(len(trace), rate_per_s, cv, rng))
    return replace(trace, arrival_s=arrival_s, has_arrivals=True)


def spread(trace: Trace, window_s: float, *, seed: int) -> Trace:
    """Each arrival later by a random part of `window_s`, for recordings with a coarse clock (Mooncake's
    conversation file has one of 3 s). Turns of one session keep their order."""
    if not window_s >= 0 or not np.isfinite(window_s):
        raise WorkloadError(f"a window of {window_s:g} s, expected 0 or more")
    moved = trace.arrival_s + np.random.default_rng(seed).uniform(0, window_s, len(trace))
    for index, previous in enumerate(trace.previous_turn.tolist()):
        if previous >= 0:
            moved[index] = max(moved[index], moved[previous])
    return _reordered(trace, moved)


def with_session_starts(trace: Trace, rate_per_s: float, *, cv: float = 1.0, seed: int) -> Trace:
    """Sessions start one after the other at `rate_per_s`, in their order in the trace; inside a session
    times stay as they are. For files whose clock starts anew with each conversation."""
    if not len(trace.session_ids) or np.any(trace.session_ids == NO_SESSION):
        raise WorkloadError(f"{trace.name} has requests without a session")
    _, first, session_of = np.unique(trace.session_ids, return_index=True, return_inverse=True)
    starts = np.cumsum(gamma_gaps(len(first), rate_per_s, cv, np.random.default_rng(seed)))
    order = np.empty(len(first), np.int64)
    order[np.argsort(first, kind="stable")] = np.arange(len(first))
    shift = starts[order] - trace.arrival_s[first]
    return _reordered(trace, trace.arrival_s + shift[session_of])


def _reordered(trace: Trace, arrival_s: Floats) -> Trace:
    order = np.argsort(arrival_s, kind="stable")
    columns = Trace.take(replace(trace, arrival_s=np.zeros(len(trace))), order)
    return replace(columns, arrival_s=arrival_s[order])

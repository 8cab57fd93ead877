"""The guard for the one case in which a hit-seeking score fails: a prefix too popular for its holders.

LMetric (OSDI'26, 5.2): class c = requests that share a prefix, x = its share of all requests,
M = the workers that hold the prefix, N = all workers. As long as x <= |M|/N even sending all of c
to M leaves the fleet balanced. Beyond it, the score may keep choosing M although it gains nothing.

    alarm    x > |M|/N
    act      2|M| consecutive requests of c in alarm were drawn to M: take M out of c's candidates
    release  x <= |M|/N again (the workers c now goes to become holders, so M grows), or
             the score itself prefers a worker outside M (a decision that would gain: the streak breaks)

What the paper leaves open, and our choice:

*Class key.* The prefix of the longest power of two of blocks that the best worker holds of this
prompt, if that is at least half of the prompt: only long hits make the score accept an imbalance
(1/(1-h) at hit fraction h), and requests with one shared prefix and their own endings fall into one
class. *Window.* Ten seconds, in six parts that leave one by one. The paper sampled minutes, but a
quiet minute hides a burst for its first seconds, in which most of the harm is done: with 16 workers,
hit fraction 0.95 and 60 % of arrivals the largest batch reached 6 times the mean, with ten seconds
3 times (benchmarks/routing_replay.py). *Sample size.* No alarm below `min_requests` of the class in
the window: with few, x is noise. *Holders* count expected ones too (`expectations`), else the release
would lag a prefill behind.

`observe` runs after the request is sent. The decision itself only asks `excludes`, one look-up
while some class is acted on and nothing at all otherwise.
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from baton.policy.base import Candidates
from baton.policy.prefix_hash import PromptHashes

_NUM_PARTS = 6


@dataclass(slots=True)
class GuardCounters:
    num_alarms: int = 0
    """Times a class went into alarm."""
    num_acted: int = 0
    num_released: int = 0
    num_diverted: int = 0
    """Requests whose candidates were reduced."""


@dataclass(slots=True)
class _Alarm:
    streak: int = 0
    is_acting: bool = False
    last_seen_s: float = 0.0


class HotspotGuard:
    def __init__(
        self, *, window_s: float = 10.0, min_requests: int = 16, min_hit: float = 0.5, max_classes: int = 4096
    ) -> None:
        self.counters = GuardCounters()
        self._window_s = window_s
        self._part_s = window_s / _NUM_PARTS
        self._min_requests = min_requests
        self._min_hit = min_hit
        self._max_classes = max_classes
        self._parts: deque[tuple[float, dict[int, int], list[int]]] = deque()
        """Start, requests per class, and requests in all (a list of one, so that it can grow)."""
        self._in_window: dict[int, int] = {}
        self._num_in_window = 0
        self._alarms: dict[int, _Alarm] = {}
        self._num_acting = 0

    # ── the decision ─────────────────────────────────────────────────────────────────────────

    @property
    def is_acting(self) -> bool:
        return self._num_acting > 0

    def excludes(self, prompt: PromptHashes, candidates: Candidates, block_size_tokens: int) -> int | None:
        """Depth in blocks at which this request's holders are to be left out; None: leave nobody out."""
        key = self._key(prompt, candidates, block_size_tokens)
        if key is None:
            return None
        alarm = self._alarms.get(key[0])
        return key[1] if alarm is not None and alarm.is_acting else None

    # ── after the decision ───────────────────────────────────────────────────────────────────

    def observe(
        self, prompt: PromptHashes, candidates: Candidates, wanted: int, block_size_tokens: int
    ) -> None:
        """`candidates` are all of them, `wanted` the position the score prefers among them (it may
        have gone elsewhere). Once per request."""
        now_s = candidates.now_s
        self._slide(now_s)
        key = self._key(prompt, candidates, block_size_tokens)
        part = self._parts[-1]
        part[2][0] += 1
        self._num_in_window += 1
        if key is None:
            return
        value, depth = key
        if value not in self._in_window and len(self._in_window) >= self._max_classes:
            return
        num_class = self._in_window[value] = self._in_window.get(value, 0) + 1
        part[1][value] = part[1].get(value, 0) + 1
        is_holder = candidates.hit_tokens >= depth * block_size_tokens
        num_holders = int(np.count_nonzero(is_holder))
        # x > |M|/N, without a division
        is_hot = (
            num_class >= self._min_requests
            and num_class * len(candidates) > num_holders * self._num_in_window
        )
        alarm = self._alarms.get(value)
        if not is_hot:
            if alarm is not None:
                self._drop(value)
            return
        if alarm is None:
            alarm = self._alarms[value] = _Alarm()
            self.counters.num_alarms += 1
        alarm.last_seen_s = now_s
        self._advance(alarm, num_holders, is_drawn=bool(is_holder[wanted]))

    def _advance(self, alarm: _Alarm, num_holders: int, *, is_drawn: bool) -> None:
        if not is_drawn:
            alarm.streak = 0
            if alarm.is_acting:
                alarm.is_acting = False
                self._num_acting -= 1
                self.counters.num_released += 1
            return
        alarm.streak += 1
        if alarm.is_acting:
            self.counters.num_diverted += 1
        elif alarm.streak >= 2 * num_holders:
            alarm.is_acting = True
            self._num_acting += 1
            self.counters.num_acted += 1

    def _drop(self, value: int) -> None:
        alarm = self._alarms.pop(value)
        if alarm.is_acting:
            self._num_acting -= 1
            self.counters.num_released += 1

    def _key(
        self, prompt: PromptHashes, candidates: Candidates, block_size_tokens: int
    ) -> tuple[int, int] | None:
        best = int(candidates.hit_tokens.max())
        if best < self._min_hit * candidates.facts.num_prompt_tokens or best < block_size_tokens:
            return None
        depth = 1 << (min(best // block_size_tokens, prompt.num_blocks).bit_length() - 1)
        return prompt.value(depth), depth

    def _slide(self, now_s: float) -> None:
        if not self._parts or now_s >= self._parts[-1][0] + self._part_s:
            self._parts.append((now_s, {}, [0]))
            for value in [
                v for v, alarm in self._alarms.items() if alarm.last_seen_s < now_s - self._window_s
            ]:
                self._drop(value)
        while self._parts[0][0] <= now_s - self._window_s:
            _, counts, total = self._parts.popleft()
            self._num_in_window -= total[0]
            for value, count in counts.items():
                left = self._in_window[value] - count
                if left:
                    self._in_window[value] = left
                else:
                    del self._in_window[value]


def without_holders(candidates: Candidates, num_hit_tokens: int) -> npt.NDArray[np.intp]:
    """Positions of the candidates that hold less than this; empty if all hold it."""
    return np.flatnonzero(candidates.hit_tokens < num_hit_tokens)

"""Which prefill and decode workers do not get KV to each other. Facts and the time in, names out; no I/O.

A transfer needs both ends and what lies between them: each of two workers may serve everybody else well.
So failed hand-offs are counted per pair, and a pair that failed MAX_FAILURES times in a row is *fenced*:
not chosen together while another pair can serve.

    fine ──3 failures in a row──> fenced ──FENCE_S──> one request is tried
     ^                              ^                        │
     └──────────── success ─────────┼────────────────────────┤
                                    └──────── failure ───────┘

Choosing it for the trial closes the fence again, so one request in FENCE_S pays for a link that stays
broken, however its trial ends. A pair is two processes, not two names or addresses: when either leaves
the fleet the pair is forgotten, and whoever comes in its place starts afresh.

Where every pair is fenced all are chosen as if none were: what is left may work, refusing certainly
does not, and a hand-off that fails is recomputed by policy.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

MAX_FAILURES = 3
FENCE_S = 30.0


@dataclass(slots=True)
class Pair:
    prefill: int
    """Ledger slots."""
    decode: int
    num_failures: int = 0
    """In a row."""
    fenced_until_s: float = 0.0

    @property
    def is_bad(self) -> bool:
        """Fenced, or due for a trial."""
        return self.num_failures >= MAX_FAILURES


class PairHealth:
    def __init__(self) -> None:
        self._pairs: dict[tuple[int, int], Pair] = {}
        """Those whose last hand-off failed."""
        self._num_bad = 0

    def __iter__(self) -> Iterator[Pair]:
        return iter(self._pairs.values())

    @property
    def has_bad(self) -> bool:
        """False, nearly always: then nothing else need be asked."""
        return self._num_bad > 0

    def failed(self, prefill: int, decode: int, now_s: float) -> Pair:
        pair = self._pairs.setdefault((prefill, decode), Pair(prefill, decode))
        pair.num_failures += 1
        if pair.num_failures == MAX_FAILURES:
            self._num_bad += 1
        if pair.is_bad:
            pair.fenced_until_s = now_s + FENCE_S
        return pair

    def succeeded(self, prefill: int, decode: int) -> None:
        if self._pairs:
            self._forget((prefill, decode))

    def chosen(self, prefill: int, decode: int, now_s: float) -> None:
        """The next hand-off goes there: if the pair is bad, this is its trial."""
        pair = self._pairs.get((prefill, decode))
        if pair is not None and pair.is_bad:
            pair.fenced_until_s = now_s + FENCE_S

    def left(self, slot: int) -> None:
        """A worker is gone."""
        for key in [key for key in self._pairs if slot in key]:
            self._forget(key)

    def fenced_with(self, decode: int, now_s: float) -> frozenset[int]:
        """Prefill workers that should not hand over to this decode worker now."""
        return frozenset(
            pair.prefill
            for pair in self._pairs.values()
            if pair.decode == decode and pair.is_bad and now_s < pair.fenced_until_s
        )

    def _forget(self, key: tuple[int, int]) -> None:
        pair = self._pairs.pop(key, None)
        if pair is not None and pair.is_bad:
            self._num_bad -= 1

"""KV of finished prefill legs that a decode worker may still read.

It is not part of vLLM's request any more. It is remembered until its lease is over, so that `abort` can still
give it back early.
"""

from __future__ import annotations


class HeldKv:
    def __init__(self, *, kv_lease_s: float) -> None:
        self._kv_lease_s = kv_lease_s
        self._holds: dict[str, tuple[str, float]] = {}
        """Its vLLM request and when to forget it, in order of that time."""

    def keep(self, handoff_id: str, vllm_id: str, *, lease_end_s: float, now_s: float) -> None:
        for held_id, (_, forget_at_s) in list(self._holds.items()):
            if now_s < forget_at_s:
                break
            del self._holds[held_id]
        # A waiting reader's heartbeats may have prolonged it, so an abort is of use a while longer.
        self._holds[handoff_id] = (vllm_id, lease_end_s + 2.0 * self._kv_lease_s)

    def take(self, handoff_id: str) -> str | None:
        """The vLLM request that left it; None: nothing is known of it."""
        hold = self._holds.pop(handoff_id, None)
        return hold[0] if hold else None

"""KV on its way to the decode legs of one simulated engine.

A leg's lease counts from the moment the engine was given it. It may be asked for once the leg has
blocks (`begin`); what arrives in time is handed on, and for everything else, be it a dead source, a
lease that ended or nonsense, the engine is told why. One answer per leg; afterwards whatever may
still arrive is ignored.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable

from baton.clock import Clock
from baton.contract.messages import KvSource
from baton.engine.simulated_transfer import KvReader


class _Fetch:
    __slots__ = ("end_s", "handoff_id", "hold_id", "late_timer", "num_prompt_tokens", "source")

    def __init__(self, handoff_id: str, source: KvSource, num_prompt_tokens: int, end_s: float) -> None:
        self.handoff_id = handoff_id
        self.source = source
        self.num_prompt_tokens = num_prompt_tokens
        self.end_s = end_s
        self.hold_id = ""
        self.late_timer: asyncio.TimerHandle | None = None


class Fetches:
    def __init__(
        self,
        clock: Clock,
        transfer_s: float,
        on_kv: Callable[[str, int, int], None],
        on_no_kv: Callable[[str, str], None],
    ) -> None:
        """on_kv(handoff_id, kv, num_tokens): KV of so many prompt tokens. on_no_kv(handoff_id, reason)."""
        self._clock = clock
        self._transfer_s = transfer_s
        self._on_kv = on_kv
        self._on_no_kv = on_no_kv
        self._fetches: dict[str, _Fetch] = {}
        self._by_hold: dict[str, _Fetch] = {}
        self._reader = KvReader(self._on_read)

    def expect(self, handoff_id: str, source: KvSource, num_prompt_tokens: int) -> None:
        fetch = _Fetch(handoff_id, source, num_prompt_tokens, self._clock.now_s() + source.lease_s)
        self._fetches[handoff_id] = fetch
        loop = asyncio.get_running_loop()
        fetch.late_timer = loop.call_later(max(0.0, source.lease_s), self._on_late, fetch)

    def begin(self, handoff_id: str, *, late_s: float = 0.0) -> None:
        """The leg has its blocks. `late_s`: more than a transfer takes."""
        fetch = self._fetches[handoff_id]
        transfer_s = self._transfer_s + late_s
        if transfer_s > 0:
            asyncio.get_running_loop().call_later(transfer_s, self._read, fetch)
        else:
            self._read(fetch)

    def reset(self, handoff_id: str) -> None:
        """The link to this leg's source breaks, under all transfers on it."""
        fetch = self._fetches[handoff_id]
        self._reader.reset(str(fetch.source.transfer_params.get("endpoint")))
        if handoff_id in self._fetches:
            self._give_up(fetch, "the link was reset")

    def forget(self, handoff_id: str) -> None:
        fetch = self._fetches.pop(handoff_id, None)
        if fetch is not None:
            self._by_hold.pop(fetch.hold_id, None)
            if fetch.late_timer is not None:
                fetch.late_timer.cancel()

    def stop(self) -> None:
        for handoff_id in list(self._fetches):
            self.forget(handoff_id)
        self._reader.stop()

    def _read(self, fetch: _Fetch) -> None:
        if self._fetches.get(fetch.handoff_id) is not fetch:
            return
        params = fetch.source.transfer_params
        endpoint, hold_id = params.get("endpoint"), params.get("hold_id")
        num_tokens = fetch.source.num_tokens
        if not isinstance(endpoint, str) or not isinstance(hold_id, str):
            self._give_up(fetch, "transfer_params name no endpoint and hold_id")
        elif not 0 < num_tokens <= fetch.num_prompt_tokens or hold_id in self._by_hold:
            self._give_up(fetch, f"the source's {num_tokens} tokens cannot be this leg's")
        else:
            fetch.hold_id = hold_id
            self._by_hold[hold_id] = fetch
            self._reader.read(endpoint, hold_id)

    def _on_read(self, hold_id: str, kv: int | None, reason: str) -> None:
        fetch = self._by_hold.get(hold_id)
        if fetch is None:
            return
        if kv is None:
            self._give_up(fetch, reason)
        elif self._clock.now_s() >= fetch.end_s:
            self._give_up(fetch, f"KV came after the lease of {fetch.source.lease_s:.3f} s")
        else:
            self.forget(fetch.handoff_id)
            self._on_kv(fetch.handoff_id, kv, fetch.source.num_tokens)

    def _on_late(self, fetch: _Fetch) -> None:
        self._give_up(fetch, f"no KV within the lease of {fetch.source.lease_s:.3f} s")

    def _give_up(self, fetch: _Fetch, reason: str) -> None:
        self.forget(fetch.handoff_id)
        self._on_no_kv(fetch.handoff_id, reason)

"""Moves NIXL along while the engine computes.

A transfer needs both agents to be polled. NIXL's own progress thread does it without pause and takes
a core; without it nothing moves between two engine steps, and a step of a busy prefill worker takes
as long as its prompts: the decode worker waits for its blocks although they are ready. This thread
polls once a millisecond, and only while something is in flight.

Needs an agent with NIXL's strict locking: the engine's thread uses it at the same time.
"""

from __future__ import annotations

import threading
from typing import Any

POLL_INTERVAL_S = 0.001


class TransferProgress:
    """Polls an agent in a thread of its own. `get_new_notifs` of the agent is replaced by one that
    also returns what the thread found, so that its callers miss nothing."""

    def __init__(self, agent: Any) -> None:
        self._poll = agent.get_new_notifs
        self._found: dict[str, list[bytes]] = {}
        self._lock = threading.Lock()
        self._is_in_flight = threading.Event()
        self._is_stopped = threading.Event()
        agent.get_new_notifs = self._take
        self._thread = threading.Thread(target=self._run, name="kv-transfer-progress", daemon=True)
        self._thread.start()

    def set_in_flight(self, is_in_flight: bool) -> None:
        if is_in_flight != self._is_in_flight.is_set():
            if is_in_flight:
                self._is_in_flight.set()
            else:
                self._is_in_flight.clear()

    def stop(self) -> None:
        """Idempotent. The agent may be taken down afterwards."""
        self._is_stopped.set()
        self._is_in_flight.set()
        self._thread.join()

    def _run(self) -> None:
        while not self._is_stopped.is_set():
            self._is_in_flight.wait()
            if self._is_stopped.wait(POLL_INTERVAL_S):
                return
            with self._lock:
                self._keep(self._poll())

    def _take(self) -> dict[str, list[bytes]]:
        with self._lock:
            self._keep(self._poll())
            found, self._found = self._found, {}
        return found

    def _keep(self, notifications: dict[str, list[bytes]]) -> None:
        for agent_name, messages in notifications.items():
            self._found.setdefault(agent_name, []).extend(messages)

"""NIXL's agent, but every so manieth transfer of some hand-offs goes wrong.

(UCX can be built to fail by itself; the one that comes with NIXL is not.) Hand-offs are told by their name,
which every transfer carries in its notice: of those called `unlucky16-…` every sixteenth transfer fails. In
turn: one that NIXL refuses, one that fails after its bytes have moved, one that stays pending for ever,
and one that is told late.
"""

from __future__ import annotations

import re
import time
from collections import Counter
from typing import Any

FAULTS = ("refused", "failed", "stuck", "late")
LATE_S = 0.3
UNLUCKY = re.compile(rb"unlucky(\d+)-")


class FaultyAgent:
    def __init__(self, agent: Any) -> None:
        self._agent = agent
        self._every: dict[Any, int] = {}
        """Unlucky handles until they are posted."""
        self._num_posted: Counter[int] = Counter()
        self._faults: dict[Any, tuple[str, float]] = {}
        """Handle → what is wrong with it since when, until it is released."""

    def __getattr__(self, name: str) -> Any:
        return getattr(self._agent, name)

    def make_prepped_xfer(self, *arguments: Any, notif_msg: bytes = b"", **named: Any) -> Any:
        handle = self._agent.make_prepped_xfer(*arguments, notif_msg=notif_msg, **named)
        if unlucky := UNLUCKY.search(notif_msg):
            self._every[handle] = int(unlucky[1])
        return handle

    def transfer(self, handle: Any) -> Any:
        every = self._every.pop(handle, 0)
        self._num_posted[every] += 1
        if not every or self._num_posted[every] % every:
            return self._agent.transfer(handle)
        fault = FAULTS[(self._num_posted[every] // every - 1) % len(FAULTS)]
        if fault == "refused":
            raise RuntimeError("planted: transfer refused")
        self._faults[handle] = (fault, time.monotonic())
        if fault != "stuck":
            self._agent.transfer(handle)
        return "PROC"

    def check_xfer_state(self, handle: Any) -> Any:
        fault, posted_s = self._faults.get(handle, ("", 0.0))
        if fault == "stuck" or (fault == "late" and time.monotonic() < posted_s + LATE_S):
            return "PROC"
        state = self._agent.check_xfer_state(handle)
        return "ERR" if fault == "failed" and state == "DONE" else state

    def release_xfer_handle(self, handle: Any) -> None:
        self._agent.release_xfer_handle(handle)
        self._faults.pop(handle, None)

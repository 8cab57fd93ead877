"""Kills the fleet's processes in turn, and starts each again as a supervisor would. Imported, not
collected."""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable, Iterable
from contextlib import suppress

from baton.history import Kill, RunWriter
from tests.system.fleet import Fleet, wait_for

RESTART_DELAY_S = 0.25
"""A supervisor's own: systemd waits 0.1 s."""

RECOVERY_TIMEOUT_S = 240.0


class Supervised:
    """A fleet whose processes can be started again with the arguments they had."""

    def __init__(self, fleet: Fleet, writer: RunWriter) -> None:
        self.fleet = fleet
        self.kills: list[Kill] = []
        self._writer = writer
        self._start: dict[str, Callable[[], object]] = {}

    def start_coordinator(self, *arguments: str) -> None:
        self._start["coordinator"] = lambda: self.fleet.start_coordinator(*arguments)
        self._start["coordinator"]()

    def start_worker(self, role: str, name: str, *arguments: str) -> None:
        self._start[name] = lambda: self.fleet.start_worker(role, name, *arguments)
        self._start[name]()

    def kill_and_restart(self, name: str) -> None:
        """SIGKILL; its successor has been started, and need not be ready, when this returns."""
        at_s = time.time()  # before: nobody may notice it earlier than it is recorded
        self.fleet.kill(name)
        time.sleep(RESTART_DELAY_S)
        self._start[name]()
        kill = Kill(at_s=at_s, name=name, back_s=time.time())
        self._writer.note(kill)
        self.kills.append(kill)

    def wait_until_whole(self) -> None:
        """Until every worker is registered, by the process that was started last: the coordinator may not
        have missed its predecessor yet."""
        expected = {name: member.pid for name, member in self.fleet.members.items() if name != "coordinator"}

        def look() -> bool:
            with suppress(OSError, ValueError):
                registered = {name: worker["pid"] for name, worker in self.fleet.workers().items()}
                return registered == expected and self.fleet.is_ready()
            return False

        wait_for("a whole fleet", look, RECOVERY_TIMEOUT_S)


def in_turn(num_prefill: int, num_decode: int) -> Iterable[str]:
    """coordinator, prefill-1, decode-1, coordinator, prefill-2, decode-2, …"""
    prefill = itertools.cycle(f"prefill-{n}" for n in range(1, num_prefill + 1))
    decode = itertools.cycle(f"decode-{n}" for n in range(1, num_decode + 1))
    while True:
        yield "coordinator"
        yield next(prefill)
        yield next(decode)


def workers_in_turn(num_prefill: int, num_decode: int) -> Iterable[str]:
    """The same without the coordinator."""
    return (name for name in in_turn(num_prefill, num_decode) if name != "coordinator")

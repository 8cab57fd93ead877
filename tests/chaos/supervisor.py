"""What is done to a fleet: processes are killed and started again as a supervisor would, or stand still for a
while. Imported, not collected."""

from __future__ import annotations

import itertools
import random
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass

from baton.history import Kill, Pause, RunWriter
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

    def pause(self, name: str, pause_s: float) -> None:
        """Returns when it goes on."""
        at_s = time.time()
        self.fleet.pause(name)
        time.sleep(pause_s)
        self.fleet.resume(name)
        self._writer.note(Pause(at_s=at_s, name=name, until_s=time.time()))

    def disturb(self, disturbance: Disturbance) -> None:
        for name in disturbance.kills:
            self.kill_and_restart(name)
        if disturbance.pauses is not None:
            self.pause(disturbance.pauses, disturbance.pause_s)


@dataclass(frozen=True, slots=True, kw_only=True)
class Disturbance:
    after_s: float
    """Since the one before was due."""
    kills: Sequence[str] = ()
    pauses: str | None = None
    pause_s: float = 0.0


def kills_of(names: Iterable[str], every_s: float) -> Iterator[Disturbance]:
    return (Disturbance(after_s=every_s, kills=[name]) for name in names)


def storm(names: Sequence[str], seed: int = 0) -> Iterator[Disturbance]:
    """Anybody at any time, two at once, some killed again before they are back; workers also stand still for
    longer than it takes to be given up, and then go on."""
    dice = random.Random(seed)
    workers = [name for name in names if name != "coordinator"]
    while True:
        after_s = dice.uniform(0.5, 6.0)
        kind = dice.choice(["kill", "kill two", "pause", "pause"])
        if kind == "pause":
            yield Disturbance(after_s=after_s, pauses=dice.choice(workers), pause_s=dice.uniform(0.5, 7.0))
        else:
            yield Disturbance(after_s=after_s, kills=dice.sample(names, 2 if kind == "kill two" else 1))


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

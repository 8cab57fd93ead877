"""Ends this process when the process that owns it is gone, however that one died.

An engine runs in child processes. When their owner is killed with SIGKILL nobody tells them: they
would live on, holding ports, shared memory and gigabytes. So each child watches its owner.

The owner is a pid together with its start time, so a pid given to somebody else is not mistaken
for it, and grandchildren can watch the same owner. The kernel wakes the watcher through a pidfd; it
then kills the process at once, because an orderly exit would wait for peers that are gone as well.
PR_SET_PDEATHSIG is not used: it fires when the *thread* that forked the child ends, and engines are
started from a thread.
"""

from __future__ import annotations

import os
import select
import signal
import threading
from dataclasses import dataclass
from pathlib import Path
from typing import Any

POLL_INTERVAL_S = 0.5
"""Only where the kernel has no pidfd."""

_watched: set[ProcessIdentity] = set()
_lock = threading.Lock()


@dataclass(frozen=True, slots=True)
class ProcessIdentity:
    """A process, told apart from a later one with the same pid."""

    pid: int
    start_ticks: int
    """Clock ticks between boot and the start of the process."""

    @classmethod
    def of(cls, pid: int) -> ProcessIdentity:
        """Raises ProcessLookupError if there is no such process, or only its zombie."""
        try:
            stat = Path(f"/proc/{pid}/stat").read_text(encoding="utf-8", errors="replace")
        except OSError as error:
            raise ProcessLookupError(f"no process {pid}") from error
        # The second field is the name in parentheses and may hold anything, even ") ".
        fields = stat[stat.rindex(")") + 2 :].split()
        if fields[0] in "ZX":
            raise ProcessLookupError(f"process {pid} is dead")
        return cls(pid=pid, start_ticks=int(fields[19]))

    @classmethod
    def current(cls) -> ProcessIdentity:
        return cls.of(os.getpid())

    @classmethod
    def parent(cls) -> ProcessIdentity:
        return cls.of(os.getppid())

    def is_alive(self) -> bool:
        try:
            return ProcessIdentity.of(self.pid) == self
        except ProcessLookupError:
            return False

    def to_dict(self) -> dict[str, int]:
        return {"pid": self.pid, "start_ticks": self.start_ticks}

    @classmethod
    def from_dict(cls, fields: dict[str, Any]) -> ProcessIdentity:
        return cls(pid=int(fields["pid"]), start_ticks=int(fields["start_ticks"]))


def die_with(owner: ProcessIdentity) -> None:
    """From now on this process is killed when `owner` ends; at once, if it has ended already.

    Repeated calls for one owner are free.
    """
    with _lock:
        if owner in _watched:
            return
        _watched.add(owner)
    try:
        pidfd = os.pidfd_open(owner.pid)
    except ProcessLookupError:
        _die()
        return
    except OSError:
        pidfd = None
    if not owner.is_alive():  # checked after opening: the pidfd cannot be of a later process now
        _die()
    threading.Thread(target=_watch, args=(owner, pidfd), name="process-guard", daemon=True).start()


def _watch(owner: ProcessIdentity, pidfd: int | None) -> None:
    if pidfd is not None:
        poll = select.poll()
        poll.register(pidfd, select.POLLIN)
        poll.poll()
    else:
        pause = threading.Event()
        while owner.is_alive():
            pause.wait(POLL_INTERVAL_S)
    _die()


def _die() -> None:
    os.kill(os.getpid(), signal.SIGKILL)

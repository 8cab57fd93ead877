"""What can be made to go wrong with a simulated engine: rules, each for one moment in a leg's life. No I/O.

    POINT:ACTION[:KEY=VALUE,…]

    accept     a leg is given to the engine    ignore, error, die, kill
    queue      it waits, and holds nothing     stall
    prefill    its prompt is computed here     stall, error, die, kill
    transfer   its KV may come, or another     stall, fail, slow, reset
               worker registers for it
    first      its first token is computed     stall, error, die, kill
               and not told
    token      a decode leg gave tokens        stall, error, die, kill

    ignore     nothing is ever heard of it again, not even after an abort
    stall      it stays there for ever with all it has; an abort ends it
    error      the leg fails, with code=CODE (engine_failed)
    die        the engine dies, and the worker says so
    kill       the process is gone that instant
    fail       no KV comes; at its source a write fails
    slow       it comes s=SECONDS later
    reset      the link breaks, under all transfers with this peer, and is opened again

    nth=N      the N-th time only             every=N   each N-th time            first=N   N times
    peer=NAME  transfer: with this worker (id, or a source's host:port) alone; counted alone
    after=N    prefill: when so many tokens of the prompt are computed (0);
               token: when so many are given (1)

Counted from 1, per rule, in the order in which this engine comes to that point, so the same work has the
same faults. `first`, `token` and `prefill` are counted when the leg is given.
"""

from __future__ import annotations

import os
import signal
from collections.abc import Iterable
from dataclasses import dataclass

from baton.contract.errors import ERROR_TYPES, EngineFailed, ServingError

LEG_ACTIONS = ("stall", "error", "die", "kill")
ACTIONS = {
    "accept": ("ignore", "error", "die", "kill"),
    "queue": ("stall",),
    "prefill": LEG_ACTIONS,
    "transfer": ("stall", "fail", "slow", "reset"),
    "first": LEG_ACTIONS,
    "token": LEG_ACTIONS,
}
HOW_OFTEN = ("nth", "every", "first")


@dataclass(frozen=True, slots=True, kw_only=True)
class Fault:
    text: str
    point: str
    action: str
    nth: int | None = None
    every: int | None = None
    first: int | None = None
    peer: str | None = None
    after: int = 0
    s: float = 0.0
    code: str = EngineFailed.code

    def is_due(self, count: int) -> bool:
        """At the so many-th time, from 1."""
        if self.nth is not None:
            return count == self.nth
        if self.every is not None:
            return count % self.every == 0
        return self.first is None or count <= self.first

    def error(self) -> ServingError:
        return ERROR_TYPES[self.code](f"fault {self.text}")


def parse_fault(text: str) -> Fault:
    """Raises ValueError with a sentence that names what is allowed."""
    point, _, rest = text.partition(":")
    action, _, keys = rest.partition(":")
    if point not in ACTIONS:
        raise ValueError(f"{text!r}: no point is called {point!r}; there are {', '.join(ACTIONS)}")
    if action not in ACTIONS[point]:
        raise ValueError(f"{text!r}: at {point} there are {', '.join(ACTIONS[point])}")
    allowed = {
        *HOW_OFTEN,
        *({"peer"} if point == "transfer" else ()),
        *({"after"} if point in ("prefill", "token") else ()),
        *({"s"} if action == "slow" else ()),
        *({"code"} if action == "error" else ()),
    }
    values = {}
    for pair in keys.split(",") if keys else ():
        key, _, value = pair.partition("=")
        if key not in allowed:
            raise ValueError(f"{text!r}: {point}:{action} takes {', '.join(sorted(allowed))}, not {key!r}")
        values[key] = value
    if len(values.keys() & set(HOW_OFTEN)) > 1:
        raise ValueError(f"{text!r}: one of {', '.join(HOW_OFTEN)} says how often")
    code, s = values.get("code", EngineFailed.code), values.get("s", "")
    if code not in ERROR_TYPES:
        raise ValueError(f"{text!r}: no error has the code {code!r}; there are {', '.join(ERROR_TYPES)}")
    if values.get("peer") == "":
        raise ValueError(f"{text!r}: peer names nobody")
    return Fault(
        text=text,
        point=point,
        action=action,
        nth=_number(text, values, "nth", 1),
        every=_number(text, values, "every", 1),
        first=_number(text, values, "first", 1),
        peer=values.get("peer"),
        after=_number(text, values, "after", 0) or 0 if "after" in values else int(point == "token"),
        s=_seconds(text, s) if action == "slow" else 0.0,
        code=code,
    )


def _number(text: str, values: dict[str, str], key: str, least: int) -> int | None:
    value = values.get(key)
    if value is None:
        return None
    if not value.isascii() or not value.isdigit() or int(value) < least:
        raise ValueError(f"{text!r}: {key} is {value!r}, expected a whole number of at least {least}")
    return int(value)


def _seconds(text: str, value: str) -> float:
    try:
        seconds = float(value)
    except ValueError:
        seconds = -1.0
    if not 0 <= seconds < float("inf"):
        raise ValueError(f"{text!r}: s is {value!r}, expected seconds")
    return seconds


def kill_process() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


class Faults:
    """The rules of one engine and how often each was asked. `set` may be called at any time."""

    def __init__(self, *texts: str) -> None:
        self.kill = kill_process
        """For tests that have several workers in a process."""
        self.num_struck = 0
        self.set(*texts)

    def set(self, *texts: str) -> None:
        """From now on these, counted from 1. Raises ValueError."""
        self._rules = [parse_fault(text) for text in texts]
        self._counts = [0] * len(self._rules)

    def at(self, point: str, peers: Iterable[str] = ()) -> Fault | None:
        """What goes wrong this time; the first of the rules that are due. `peers`: the names of the one
        worker at the other end."""
        struck = None
        for index, rule in enumerate(self._rules):
            if rule.point != point or (rule.peer is not None and rule.peer not in peers):
                continue
            self._counts[index] += 1
            if struck is None and rule.is_due(self._counts[index]):
                struck = rule
        self.num_struck += struck is not None
        return struck

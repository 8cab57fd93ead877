"""Whether two workers can pass each other KV, from what they said when they registered. No I/O.

Found out by the engines it would be a request that hangs or is computed twice; found out here it is a
sentence with the field and both values, in the worker's log and in the 503 of whoever needs it.
"""

from __future__ import annotations

from typing import NamedTuple

import msgspec

from baton.contract.lifecycle import WorkerRole
from baton.contract.messages import KvLayout, RegisterWorker


class Kind(NamedTuple):
    """What a fleet has few of: workers of one kind are alike in everything compared here."""

    layout: KvLayout
    tensor_parallel_size: int
    pipeline_parallel_size: int
    role: WorkerRole

    @classmethod
    def of(cls, registration: RegisterWorker) -> Kind:
        return cls(
            registration.layout,
            registration.tensor_parallel_size,
            registration.pipeline_parallel_size,
            registration.role,
        )


def difference(newcomer: Kind, present: Kind) -> str | None:
    """What keeps the two from one fleet, with both values; None: nothing known does. What either of
    them does not know is not compared."""
    ours, theirs = msgspec.structs.asdict(present.layout), msgspec.structs.asdict(newcomer.layout)
    for field, here in ours.items():
        there = theirs[field]
        if here is not None and there is not None and here != there:
            return _sentence(field, there, here)
    if newcomer.pipeline_parallel_size != present.pipeline_parallel_size:
        # Each stage hands its own layers to its counterpart.
        return _sentence(
            "pipeline_parallel_size", newcomer.pipeline_parallel_size, present.pipeline_parallel_size
        )
    smaller, larger = sorted((newcomer.tensor_parallel_size, present.tensor_parallel_size))
    if _meet(newcomer.role, present.role) and larger % smaller:
        return (
            _sentence("tensor_parallel_size", newcomer.tensor_parallel_size, present.tensor_parallel_size)
            + ", and neither divides the other"
        )
    return None


def _sentence(field: str, there: object, here: object) -> str:
    return f"{field} is {there!r}, this fleet has {here!r}"


def _meet(one: WorkerRole, other: WorkerRole) -> bool:
    """One may hand KV to the other."""
    return one is not other or one is WorkerRole.BOTH

"""What a decode worker can be told, beside what any worker can."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from baton.settings import SettingsError, option
from baton.worker.settings import WorkerSettings


@dataclass(frozen=True, slots=True, kw_only=True)
class DecodeWorkerSettings(WorkerSettings):
    kv_load_failure_policy: Literal["recompute", "fail"] = option(
        "fail",
        "when KV does not arrive, or too late to be trusted: fail the leg, so that the coordinator decides "
        "(--transfer-failure-policy), counts it and learns which pair it was; or compute the prompt here",
    )
    scheduler: Literal["fcfs", "skip-join-mlfq"] = option(
        "fcfs",
        "who gets the next step: first come first served, or whoever has received least, so that short "
        "answers do not wait behind long ones (docs/scheduling.md)",
    )
    max_resident_sequences: int | None = option(
        None, "skip-join-mlfq: sequences with KV in memory, running or parked; absent: 4 x max_batch_size"
    )
    host_kv_gib: float = option(
        0.0, "skip-join-mlfq: host memory per rank for KV of preempted sequences; 0: computed again"
    )

    def __post_init__(self) -> None:
        # Not super(): slots=True makes a new class, which the implicit one does not know (3.11).
        WorkerSettings.__post_init__(self)
        if self.host_kv_gib < 0:
            raise SettingsError(f"host_kv_gib is {self.host_kv_gib}, expected at least 0")
        num_residents = self.max_resident_sequences
        if num_residents is not None and num_residents < self.max_batch_size:
            raise SettingsError(
                f"max_resident_sequences is {num_residents}, expected at least max_batch_size, "
                f"which is {self.max_batch_size}"
            )
        if self.scheduler == "fcfs" and (num_residents is not None or self.host_kv_gib):
            raise SettingsError("max_resident_sequences and host_kv_gib need scheduler skip-join-mlfq")
        if self.scheduler != "fcfs" and self.engine == "simulated":
            raise SettingsError(f"the simulated engine is first come first served, not {self.scheduler}")

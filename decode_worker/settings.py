"""What a decode worker can be told, beside what any worker can."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from baton.settings import option
from baton.worker.settings import WorkerSettings


@dataclass(frozen=True, slots=True, kw_only=True)
class DecodeWorkerSettings(WorkerSettings):
    kv_load_failure_policy: Literal["recompute", "fail"] = option(
        "recompute",
        "when KV does not arrive, or too late to be trusted: compute the prompt here, or fail the leg",
    )

"""`baton both` and `python -m baton.worker.both`: one worker for both phases.

The same runtime around the same engine as the two roles. A request whose prefill and decode land
here is one decode leg that computes its prompt: nothing is held and nothing moves. It also takes
part in hand-offs with prefill and decode workers of a mixed fleet. It is the colocated baseline,
and what a fleet too small for two roles is made of.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass
from typing import Literal

from baton.contract.lifecycle import WorkerRole
from baton.settings import SettingsError, load, option
from baton.worker.engines import build_engine, prefill_window_tokens
from baton.worker.process import run_worker
from baton.worker.settings import WorkerSettings


@dataclass(frozen=True, slots=True, kw_only=True)
class BothWorkerSettings(WorkerSettings):
    kv_lease_s: int = option(30, "how long KV is held for another decode worker, seconds")
    prefill_window_tokens: int | None = option(
        None,
        "prompt tokens this worker takes ahead of what it has computed; a longer prompt comes alone, the "
        "rest waits at the coordinator; absent: 512 on cpu, 32768 on cuda",
    )
    kv_load_failure_policy: Literal["recompute", "fail"] = option(
        "fail",
        "when another worker's KV does not arrive in time: fail the leg, for the coordinator to decide; or "
        "compute the prompt here",
    )

    def __post_init__(self) -> None:
        # Not super(): slots=True makes a new class, which the implicit one does not know (3.11).
        WorkerSettings.__post_init__(self)
        for name in ("kv_lease_s", "prefill_window_tokens"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise SettingsError(f"{name} is {value}, expected at least 1")


def run(settings: BothWorkerSettings) -> int:
    role = WorkerRole.BOTH
    return run_worker(
        settings,
        role,
        lambda worker_id: build_engine(
            settings,
            role,
            worker_id=worker_id,
            kv_lease_s=settings.kv_lease_s,
            kv_load_failure_policy=settings.kv_load_failure_policy,
        ),
        prefill_window_tokens=prefill_window_tokens(settings, settings.prefill_window_tokens),
    )


def main(argv: list[str]) -> int:
    description = "Runs one worker that prefills and decodes."
    return run(load(BothWorkerSettings, argv, prog="baton both", description=description))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

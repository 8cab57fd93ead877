"""The fleets that are disturbed: 2P2D, simulated or real. Imported, not collected."""

from __future__ import annotations

from pathlib import Path

from baton.history import Limits, RunWriter
from tests.chaos.jobs import MAX_MODEL_LEN
from tests.chaos.supervisor import Supervised
from tests.system.conftest import REAL_WORKER
from tests.system.fleet import Fleet

NUM_PREFILL, NUM_DECODE = 2, 2


def coordinator_flags(limits: Limits) -> list[str]:
    flags = {
        "--queue-timeout-s": limits.queue_s,
        "--prefill-timeout-s": limits.prefill_s,
        "--handoff-timeout-s": limits.handoff_s,
        "--decode-stall-timeout-s": limits.stall_s,
        "--heartbeat-timeout-s": limits.heartbeat_s,
        "--max-attempts": limits.max_attempts,
    }
    return [str(part) for flag in flags.items() for part in flag]


def start_fleet(
    folder: Path,
    writer: RunWriter,
    limits: Limits,
    *,
    engine: str,
    model: Path | None = None,
    worker: tuple[str, ...] = (),
    prefill: tuple[str, ...] = (),
    decode: tuple[str, ...] = (),
) -> Supervised:
    """Up and idle. Flags are of all workers, and by role."""
    supervised = Supervised(Fleet(folder, engine=engine, model=model), writer)
    try:
        supervised.start_coordinator(*coordinator_flags(limits))
        for number in range(1, NUM_PREFILL + 1):
            lease = ("--kv-lease-s", f"{limits.lease_s:g}")
            supervised.start_worker("prefill", f"prefill-{number}", *worker, *lease, *prefill)
        for number in range(1, NUM_DECODE + 1):
            supervised.start_worker("decode", f"decode-{number}", *worker, *decode)
        supervised.fleet.wait_until_ready()
    except BaseException:
        supervised.fleet.stop()
        raise
    return supervised


SIMULATED_LIMITS = Limits(
    queue_s=60.0, prefill_s=30.0, handoff_s=9.0, stall_s=30.0, heartbeat_s=4.0, lease_s=10.0, max_attempts=3
)

REAL_LIMITS = Limits(
    queue_s=120.0,
    prefill_s=60.0,
    handoff_s=20.0,
    stall_s=60.0,
    heartbeat_s=10.0,
    lease_s=30.0,
    max_attempts=3,
)
"""The defaults, but for the prefill's, which is shorter."""


def start_simulated(
    folder: Path, writer: RunWriter, *, step_s: float, worker: tuple[str, ...] = ()
) -> Supervised:
    """Room for every request on one worker of each role, so that the other may be dead."""
    return start_fleet(
        folder,
        writer,
        SIMULATED_LIMITS,
        engine="simulated",
        worker=(
            "--max-model-len", str(MAX_MODEL_LEN), "--num-blocks", "65536", "--max-batch-size", "4096",
            "--max-num-batched-tokens", "8192", *worker,
        ),
        prefill=("--simulated-step-s", "0.01", "--simulated-prefill-tokens-per-s", "200000"),
        decode=("--simulated-step-s", f"{step_s:g}"),
    )  # fmt: skip


def start_real(folder: Path, writer: RunWriter, model: Path, *, worker: tuple[str, ...] = ()) -> Supervised:
    """vLLM and NIXL on CPU. Long prompts are computed in chunks."""
    return start_fleet(
        folder, writer, REAL_LIMITS, engine="vllm", model=model, worker=(*REAL_WORKER, *worker)
    )

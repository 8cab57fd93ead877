"""The coordinator as a process: event loop, doors, signals, exit code.

first SIGTERM or Ctrl-C    refuse new requests, let accepted ones finish, then exit 0
second one                 exit now with 128 + signal
address taken              exit 1 with one sentence, before anything is served
bad setting                exit 2
"""

from __future__ import annotations

import asyncio
import gc
import logging
import os
import secrets
import signal
import sys
import time
from pathlib import Path

import msgspec
import uvloop

from baton.clock import SystemClock
from baton.contract.lifecycle import WorkerRole
from baton.contract.messages import RegisterWorker
from baton.policy import registry
from baton.process_guard import ProcessIdentity, die_with
from baton.settings import resolved
from baton.telemetry import configure_logging, event
from baton.wire.endpoints import tcp
from coordinator.app import Coordinator
from coordinator.core import Core, CoreSettings
from coordinator.decision_log import DecisionLog
from coordinator.given_pace import given_pace
from coordinator.http import HttpDoor, HttpSettings
from coordinator.metrics import Metrics
from coordinator.prompts import FleetPrompts
from coordinator.served_names import ServedNames
from coordinator.settings import CoordinatorSettings
from coordinator.tokenizer import FleetTokenizer
from coordinator.workload_log import WorkloadLog
from coordinator.zmq_door import ZmqDoor

logger = logging.getLogger("baton.coordinator")

EXIT_OK, EXIT_FAILURE = 0, 1

GC_THRESHOLD = 20_000
"""New objects between two looks at the youngest; Python's 700 means one per two requests."""


def run_coordinator(settings: CoordinatorSettings) -> int:
    """Blocks until the coordinator has left; the exit code."""
    if settings.exit_with_parent:
        die_with(ProcessIdentity.parent())
    configure_logging("coordinator", settings.log_level)
    print(f"coordinator settings\n{resolved(settings)}", flush=True)
    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        return runner.run(_live(settings))


async def _live(settings: CoordinatorSettings) -> int:
    boot_id = secrets.token_hex(8)
    core = Core(
        _core_settings(settings),
        registry.by_name(settings.prefill_policy),
        registry.by_name(settings.decode_policy),
        boot_id[:8],
    )
    try:
        log = None if settings.decision_log is None else DecisionLog(Path(settings.decision_log))
        asked_for = settings.workload_log
        workload_log = None if asked_for is None else WorkloadLog(Path(asked_for), time.time)
    except OSError as error:
        event(logger, "start failed", level=logging.ERROR, reason=f"{error.filename}: {error.strerror}")
        return EXIT_FAILURE
    coordinator = Coordinator(
        core,
        SystemClock(),
        decision_log=log,
        boot_id=boot_id,
        heartbeat_interval_s=settings.heartbeat_interval_s,
        heartbeat_timeout_s=settings.heartbeat_timeout_s,
    )
    tokenizer = FleetTokenizer()
    _load_tokenizer_when_known(settings, coordinator, tokenizer)
    names = ServedNames(settings.served_model_name, coordinator)
    metrics = Metrics()
    coordinator.on_finished.append(metrics.on_finished)
    if workload_log is not None:
        coordinator.on_finished.append(workload_log.on_finished)
    _add_gauges(metrics, core)
    http = HttpDoor(
        coordinator,
        HttpSettings(
            served_model_names=settings.served_model_name,
            api_key=settings.api_key,
            tool_call_parser=settings.tool_call_parser,
        ),
        tokenizer,
        metrics,
    )
    door = ZmqDoor(coordinator, FleetPrompts(tokenizer, coordinator), names, metrics.on_refused)
    asked = _signals()
    try:
        fleet = coordinator.start(tcp(settings.host, settings.fleet_port))
        client = door.start(tcp(settings.host, settings.client_port))
        http_port = await http.start(settings.host, settings.http_port)
    except OSError as error:
        event(logger, "start failed", level=logging.ERROR, reason=error.strerror or error)
        return EXIT_FAILURE
    event(
        logger, "coordinator ready", boot_id=boot_id, pid=os.getpid(), fleet=fleet, client=client,
        http=f"http://{settings.host}:{http_port}",
    )  # fmt: skip
    # What start-up made lives as long as the process: the collector need not walk it for each
    # burst of requests, and requests leave few cycles behind.
    gc.collect()
    gc.freeze()
    gc.set_threshold(GC_THRESHOLD)
    await asked.wait()
    await http.stop_accepting()
    await coordinator.drain(settings.drain_timeout_s)
    await coordinator.stop()
    door.close()
    await http.close(grace_s=1.0)
    tokenizer.close()
    if log is not None:
        log.close()
    if workload_log is not None:
        workload_log.close()
    event(logger, "coordinator stopped")
    return EXIT_OK


def _add_gauges(metrics: Metrics, core: Core) -> None:
    def workers() -> dict[str, float]:
        counts = dict.fromkeys((role.value for role in WorkerRole), 0.0)
        for worker in core.fleet:
            if worker.takes_legs:
                counts[worker.role.value] += 1
        return counts

    metrics.add_gauge("baton_requests_in_flight", "Accepted, not finished.", lambda: core.num_requests)
    metrics.add_gauge("baton_requests_queued", "Waiting for a worker.", lambda: core.num_queued)
    metrics.add_gauge(
        "baton_discarded_tokens",
        "Generated so far and sent to nobody: their request was over, or they were known already.",
        lambda: core.num_discarded_tokens,
    )
    prefixes = core.prefixes
    metrics.add_gauge("baton_kv_index_blocks", "Blocks in the prefix index.", lambda: prefixes.num_blocks)
    metrics.add_gauge("baton_kv_index_bytes", "Its memory, estimated.", lambda: prefixes.num_bytes)
    metrics.add_gauge(
        "baton_kv_index_events",
        "What the index was told, and what went wrong.",
        prefixes.counts,
        label="what",
    )
    metrics.add_gauge(
        "baton_pace_measurements",
        "What the fleet's pace is learnt from, for stay or go.",
        lambda: core.pace.num_measured,
        label="what",
    )
    metrics.add_gauge(
        "baton_pair_handoff_failures",
        "Hand-offs from a prefill to a decode worker that failed in a row; from 3 on the pair is fenced.",
        lambda: {f"{p.prefill_worker} > {p.decode_worker}": p.num_failures for p in core.bad_pairs(0.0)},
        label="pair",
    )
    metrics.add_gauge("baton_workers", "Registered and taking requests.", workers, label="role")

    def transfers() -> dict[str, float]:
        loads = [worker.account.load for worker in core.fleet]
        return {
            "done": sum(load.num_kv_transfers for load in loads),
            "failed": sum(load.num_kv_transfer_failures for load in loads),
            "digest_mismatch": sum(load.num_kv_digest_mismatches for load in loads),
        }

    metrics.add_gauge(
        "baton_kv_transfers",
        "KV transfers of the workers present; a mismatch is a failure whose KV was not what was signed.",
        transfers,
        label="what",
    )

    def preemption() -> dict[str, float]:
        totals: dict[str, float] = {}
        for worker in core.fleet:
            if (counters := worker.account.load.scheduler) is not None:
                for name, value in msgspec.structs.asdict(counters).items():
                    totals[name] = totals.get(name, 0.0) + value
        return totals

    metrics.add_gauge(
        "baton_preemption",
        "What preemption cost the workers present: swaps, bytes, recomputed tokens, stalls, fallbacks.",
        preemption,
        label="what",
    )


def _core_settings(settings: CoordinatorSettings) -> CoreSettings:
    return CoreSettings(
        max_queued=settings.max_queued,
        max_attempts=settings.max_attempts,
        decode_loss_policy=settings.decode_loss_policy,
        transfer_failure_policy=settings.transfer_failure_policy,
        queue_timeout_s=settings.queue_timeout_s,
        prefill_timeout_s=settings.prefill_timeout_s,
        handoff_timeout_s=settings.handoff_timeout_s,
        decode_stall_timeout_s=settings.decode_stall_timeout_s,
        pace=None if settings.step_time is None else given_pace(settings.step_time),
        keeps_records=settings.decision_log is not None,
        tests_joins=settings.join_test,
        kv_index_bytes=int(settings.kv_index_gib * 1024**3),
    )


def _load_tokenizer_when_known(
    settings: CoordinatorSettings, coordinator: Coordinator, tokenizer: FleetTokenizer
) -> None:
    if settings.tokenizer == "none":
        return
    if settings.model is not None:
        tokenizer.start_loading(settings.model)
        return

    def on_worker(registration: RegisterWorker) -> None:
        tokenizer.start_loading(registration.layout.model)

    coordinator.on_worker_registered.append(on_worker)


def _signals() -> asyncio.Event:
    """Set by the first signal; the second ends the process."""
    asked = asyncio.Event()

    def on_signal(number: signal.Signals) -> None:
        if asked.is_set():
            sys.stdout.flush()
            os._exit(128 + number)
        event(logger, "drain asked", signal=number.name)
        asked.set()

    loop = asyncio.get_running_loop()
    for number in (signal.SIGINT, signal.SIGTERM):
        loop.add_signal_handler(number, on_signal, number)
    return asked

"""`bench.sh e2e`: real vLLM engines, 1P1D, the same engine settings on both sides.

    baton             coordinator, prefill worker and decode worker (engines embedded)
    vllm-router P/D   the router before two vLLM API servers: same executor, threads and progress
                      thread (off)
    vllm-router P/D, our connector   the same with all that Baton's connector does for an engine: what
                      is left is the coordinator's part. Printed beside, one round
    vllm-router P/D, stock   the same with vLLM's own connector as a user would start it, NIXL's progress
                      thread spinning: what the settings are worth. Printed beside, one round
    colocated vllm    one vLLM API server, no connector: printed beside. One round

Engines of several fleets would share two cores, so fleets are never up together: each round starts
one, warms it up, measures it and stops it, then the next (A B C, A B C, ...). CPU is that of all
processes of a fleet, engines included.

`--rows` names subjects here (their names may be cut short); a quick run has only the first two.
"""

from __future__ import annotations

import csv
import dataclasses
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from benchmarks import fleets
from benchmarks.cpu_time import quiet_check
from benchmarks.figures import Bar, Figure, Report
from benchmarks.fleets import BATON, URL, VLLM_PD, Subject
from benchmarks.layout import SCRATCH
from benchmarks.load import LoadFailed, completion_body, ids_prompt, run_load
from benchmarks.peers import VLLM_ROUTER
from benchmarks.samples import Spread, paired_ratios, percentile, spread
from benchmarks.servers import Server, answers, cpu_seconds, free_port

VLLM_PD_STOCK = "vllm-router P/D, stock"
VLLM_PD_OURS = "vllm-router P/D, our connector"
CONNECTOR_OF = {VLLM_PD: "settings", VLLM_PD_OURS: "ours", VLLM_PD_STOCK: "stock"}
COLOCATED = "colocated vllm"
NUM_PROMPT_TOKENS = 512
NUM_OUTPUT_TOKENS = 32
MAX_BATCH_SIZE = 32
MAX_NUM_BATCHED_TOKENS = 2048
START_TIMEOUT_S = 180.0


@dataclass(frozen=True, slots=True)
class Plan:
    rounds: int
    requests: dict[int, int]
    """By concurrency, in each round."""
    warm_up: dict[int, int]
    subjects: tuple[str, ...]
    """In every round."""
    subjects_once: tuple[str, ...] = ()
    """In the last round only: printed beside, judged by no bar."""


FULL = Plan(5, {1: 40, 8: 130}, {1: 10, 8: 32}, (BATON, VLLM_PD), (COLOCATED, VLLM_PD_OURS, VLLM_PD_STOCK))
QUICK = Plan(1, {1: 8, 8: 24}, {1: 3, 8: 8}, (BATON, VLLM_PD))


@dataclass(frozen=True, slots=True)
class RoundResult:
    ttft_p50_ms: float
    ttft_p99_ms: float
    tpot_p50_ms: float
    tpot_p99_ms: float
    e2e_p50_ms: float
    e2e_p99_ms: float
    requests_per_s: float
    cpu_ms: float
    num_stalls: int
    num_failed: int
    num_requests: int
    cpu_ms_by_server: dict[str, float]


# ── fleets ───────────────────────────────────────────────────────────────────────────────────────


@contextmanager
def baton_fleet() -> Iterator[Subject]:
    model = str(fleets.demo_model())
    http, fleet, client = (free_port() for _ in range(3))
    with ExitStack() as stack:
        coordinator = Server(
            "e2e-coordinator",
            [
                sys.executable, "-m", "coordinator", "--model", model, "--log-level", "warning",
                "--http-port", http, "--fleet-port", fleet, "--client-port", client,
            ],
        )  # fmt: skip
        servers = [stack.enter_context(coordinator)]
        for role in ("prefill", "decode"):
            argv = [
                sys.executable, "-m", f"{role}_worker", "--coordinator", f"127.0.0.1:{fleet}",
                "--model", model, "--log-level", "warning", "--max-batch-size", MAX_BATCH_SIZE,
                "--max-num-batched-tokens", MAX_NUM_BATCHED_TOKENS,
            ]  # fmt: skip
            servers.append(stack.enter_context(Server(f"e2e-{role}-worker", argv)))
        _wait_for_all(servers, answers(f"{URL}:{http}/ready"), "GET /ready")
        yield Subject(name=BATON, port=http, servers=servers, model=model)


@contextmanager
def vllm_router_fleet(name: str = VLLM_PD) -> Iterator[Subject]:
    model = str(fleets.demo_model())
    with ExitStack() as stack:
        ports = {role: free_port() for role in ("prefill", "decode")}
        servers = [
            stack.enter_context(_vllm_server(role, model, port, CONNECTOR_OF[name]))
            for role, port in ports.items()
        ]
        for role, port in ports.items():
            _wait_for_all(servers, answers(f"{URL}:{port}/health"), f"GET /health of {role}")
        router_port, metrics_port = free_port(), free_port()
        router = Server(
            "e2e-vllm-router",
            [
                VLLM_ROUTER.folder / "bin" / "vllm-router", "--log-level", "warning", "--host", "127.0.0.1",
                "--port", router_port, "--prometheus-port", metrics_port, "--vllm-pd-disaggregation",
                "--prefill", f"{URL}:{ports['prefill']}", "--decode", f"{URL}:{ports['decode']}",
                "--kv-connector", "nixl", "--policy", "round_robin",
            ],
        )  # fmt: skip
        servers.append(stack.enter_context(router))
        _wait_for_all(servers, answers(f"{URL}:{router_port}/health"), "GET /health of the router")
        yield Subject(name=name, port=router_port, servers=servers, model=model)


@contextmanager
def colocated_server() -> Iterator[Subject]:
    model = str(fleets.demo_model())
    port = free_port()
    with _vllm_server("colocated", model, port) as server:
        _wait_for_all([server], answers(f"{URL}:{port}/health"), "GET /health")
        yield Subject(name=COLOCATED, port=port, servers=[server], model=model)


def _vllm_server(role: str, model: str, port: int, connector: str = "settings") -> Server:
    argv = [
        sys.executable, "-m", "benchmarks.vllm_server", "--role", role, "--model", model,
        "--port", port, "--side-channel-port", free_port(), "--max-batch-size", MAX_BATCH_SIZE,
        "--max-num-batched-tokens", MAX_NUM_BATCHED_TOKENS, "--connector", connector,
    ]  # fmt: skip
    return Server(f"e2e-vllm-{role}", argv)


def _wait_for_all(servers: list[Server], is_ready: Callable[[], bool], what: str) -> None:
    """Until the fleet is ready; the first of its processes that ends instead is named."""

    def look() -> bool:
        for server in servers:
            server.check_alive()
        return is_ready()

    servers[0].wait_until(look, START_TIMEOUT_S, what)


FLEETS: dict[str, Callable[[], AbstractContextManager[Subject]]] = {
    BATON: baton_fleet,
    VLLM_PD: vllm_router_fleet,
    VLLM_PD_OURS: partial(vllm_router_fleet, VLLM_PD_OURS),
    VLLM_PD_STOCK: partial(vllm_router_fleet, VLLM_PD_STOCK),
    COLOCATED: colocated_server,
}


# ── measuring ────────────────────────────────────────────────────────────────────────────────────


def measure(subject: Subject, concurrency: int, num_requests: int, seed: int) -> RoundResult:
    records = SCRATCH / "records.csv"
    cpu_before = {server.name: cpu_seconds([server]) for server in subject.servers}
    result = run_load(
        subject.port, _body(subject), concurrency=concurrency, num_requests=num_requests, seed=seed,
        records=records, may_fail=True,
    )  # fmt: skip
    cpu_after = {server.name: cpu_seconds([server]) for server in subject.servers}
    if not result.num_requests:
        raise LoadFailed(f"{subject.name}: none of {num_requests} requests succeeded: {result.message}")
    ttft, tpot, e2e = _latencies_ms(records)
    cpu_ms_by_server = {
        name.removeprefix("e2e-"): (cpu_after[name] - before) / result.num_requests * 1e3
        for name, before in cpu_before.items()
    }
    return RoundResult(
        ttft_p50_ms=percentile(ttft, 0.5),
        ttft_p99_ms=percentile(ttft, 0.99),
        tpot_p50_ms=percentile(tpot, 0.5),
        tpot_p99_ms=percentile(tpot, 0.99),
        e2e_p50_ms=percentile(e2e, 0.5),
        e2e_p99_ms=percentile(e2e, 0.99),
        requests_per_s=result.requests_per_s,
        cpu_ms=sum(cpu_ms_by_server.values()),
        num_stalls=result.num_stalls,
        num_failed=result.num_errors,
        num_requests=result.num_requests,
        cpu_ms_by_server=cpu_ms_by_server,
    )


def _latencies_ms(records: Path) -> tuple[list[float], list[float], list[float]]:
    """TTFT, TPOT and end-to-end of the requests that succeeded. TPOT divides by tokens, not by
    events: a server may put several tokens into one event."""
    ttft, tpot, e2e = [], [], []
    with records.open(encoding="utf-8", newline="") as file:
        for row in csv.DictReader(file):
            if row["status"] == "200":
                first, last = float(row["first_s"]), float(row["last_s"])
                ttft.append(first * 1e3)
                tpot.append((last - first) / (NUM_OUTPUT_TOKENS - 1) * 1e3)
                e2e.append(float(row["end_s"]) * 1e3)
    return ttft, tpot, e2e


def _body(subject: Subject) -> bytes:
    extra = {"min_tokens": NUM_OUTPUT_TOKENS, "ignore_eos": True}
    prompt = ids_prompt(NUM_PROMPT_TOKENS, all_unique=True)
    return completion_body(
        prompt, model=subject.model, max_tokens=NUM_OUTPUT_TOKENS, stream=True, extra=extra
    )


def run(plan: Plan, *, rounds: int | None, has_baton: bool, rows: Sequence[str] | None) -> Report:
    if rounds:
        plan = dataclasses.replace(plan, rounds=rounds)

    def is_wanted(name: str) -> bool:
        return (rows is None or any(name.startswith(row) for row in rows)) and (has_baton or name != BATON)

    report = Report("e2e")
    found: dict[tuple[str, int], list[RoundResult]] = {}
    for number in range(plan.rounds):
        is_last = number == plan.rounds - 1
        for name in filter(is_wanted, plan.subjects + (plan.subjects_once if is_last else ())):
            report.busy_before[f"round {number + 1}, {name} (nothing up)"] = quiet_check()
            started_s = time.monotonic()
            with FLEETS[name]() as subject:
                up_s = time.monotonic() - started_s
                for concurrency, num_requests in plan.warm_up.items():
                    measure(subject, concurrency, num_requests, seed=10_000 + concurrency)
                for concurrency, num_requests in plan.requests.items():
                    # A seed of its own: the same prompts again would come from the prefix cache.
                    seed = 100 * (number + 1) + concurrency
                    result = measure(subject, concurrency, num_requests, seed=seed)
                    found.setdefault((name, concurrency), []).append(result)
            took_s = time.monotonic() - started_s
            print(
                f"round {number + 1} {name}: up in {up_s:.0f} s, {took_s:.0f} s", file=sys.stderr, flush=True
            )
    _figures(report, found, list(plan.requests))
    report.remarks.append(
        "The colocated server computes in one thread, a 1P1D fleet in two: compare it by CPU per request, "
        "where it wins. This shows what the serving layer costs, not what disaggregation is worth."
    )
    report.remarks.append("Baton streams KV, as its workers do by default; the other pairs pull it.")
    return report


# ── figures ──────────────────────────────────────────────────────────────────────────────────────

PER_ROUND = (
    ("ttft_p50", "ttft_p50_ms", "ms", Bar("<=", 0.8)),
    ("ttft_p99", "ttft_p99_ms", "ms", Bar("<=", 0.5)),
    ("tpot_p50", "tpot_p50_ms", "ms", None),
    ("tpot_p99", "tpot_p99_ms", "ms", None),
    ("e2e_p50", "e2e_p50_ms", "ms", None),
    ("e2e_p99", "e2e_p99_ms", "ms", None),
    ("requests_per_s", "requests_per_s", "1/s", Bar(">=", 1.2)),
    ("cpu_per_request", "cpu_ms", "ms", Bar("<=", 0.7)),
)
"""Row, field, unit, and the bar on Baton's ratio to vllm-router P/D."""


def _figures(
    report: Report, found: dict[tuple[str, int], list[RoundResult]], concurrencies: list[int]
) -> None:
    for concurrency in concurrencies:
        here = {name: rounds for (name, c), rounds in found.items() if c == concurrency}
        for row, field, unit, bar in PER_ROUND:
            label = f"c{concurrency} {row}"
            values = {name: [float(getattr(r, field)) for r in rounds] for name, rounds in here.items()}
            for name, numbers in values.items():
                report.figures.append(Figure(row=label, subject=name, unit=unit, spread=spread(numbers)))
            if BATON in values and VLLM_PD in values:
                # At concurrency 1 the rate is the inverse of latency; the bar is for 8.
                is_judged = row != "requests_per_s" or concurrency == max(concurrencies)
                ratios = paired_ratios(values[BATON], values[VLLM_PD])
                report.figures.append(
                    Figure(
                        row=f"{label} ratio", subject=f"{BATON} / {VLLM_PD}", unit="x",
                        spread=spread(ratios), bar=bar if is_judged else None,
                    )
                )  # fmt: skip
        for name, rounds in here.items():
            for server in rounds[0].cpu_ms_by_server:
                parts = [r.cpu_ms_by_server[server] for r in rounds]
                figure = Figure(
                    row=f"c{concurrency} cpu_per_request of {server}", subject=name, unit="ms",
                    spread=spread(parts), note="its share of the sum above",
                )  # fmt: skip
                report.figures.append(figure)
    for name in dict.fromkeys(name for name, _ in found):
        rounds = [r for (n, _), several in found.items() if n == name for r in several]
        num_requests = sum(r.num_requests + r.num_failed for r in rounds)
        bar = Bar("<=", 0) if name == BATON else None
        for row, total in (
            ("stalls_over_1s", sum(r.num_stalls for r in rounds)),
            ("failed_requests", sum(r.num_failed for r in rounds)),
        ):
            count = Spread(float(total), float(total), float(total), len(rounds) // len(concurrencies))
            note = f"of {num_requests} requests, all concurrencies and rounds together"
            report.figures.append(
                Figure(row=row, subject=name, unit="requests", spread=count, bar=bar, note=note)
            )

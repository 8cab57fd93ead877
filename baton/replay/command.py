"""`baton replay`: traces, loads, policies and seeds, one table.

Exit codes: 0 done, 1 the picture cannot be written, 2 something asked for makes no sense.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace

from baton.policy.registry import by_name
from baton.replay.capacity import at_capacity_share, capacity_per_s
from baton.replay.options import parser
from baton.replay.plot import plot
from baton.replay.settings import ReplaySettings
from baton.replay.simulation import replay
from baton.replay.table import Row, table
from baton.scheduling.registry import by_name as scheduler_by_name
from baton.simulation import SimulatedWorkerSettings
from baton.step_time import (
    KvLink,
    gpu_by_name,
    kv_link,
    kv_tokens_that_fit,
    load_shape,
    roofline,
)
from baton.workload import Trace, WorkloadError, read_trace, retimed, sped_up, spread, with_session_starts

EXIT_FAILED = 1
EXIT_USAGE = 2
DEFAULT_BLOCK_TOKENS = 64
SESSIONS_PER_S = 1.0
"""Where a file's clock starts anew in each session."""
PCIE_BYTES_PER_S = 50e9
"""Gen 5 x16 with large copies, one direction."""


def main(argv: list[str] | None = None) -> int:
    arguments = parser().parse_args(argv)
    try:
        rows = _run(arguments)
    except (ValueError, OSError) as error:
        print(f"baton replay: {error}", file=sys.stderr)
        return EXIT_USAGE
    if arguments.json:
        for row in rows:
            print(json.dumps(row.as_json(arguments.slo)))
    else:
        print(table(rows, arguments.slo))
    if arguments.plot:
        try:
            plot(rows, arguments.slo, arguments.plot)
        except (OSError, ValueError) as error:
            print(f"baton replay: {arguments.plot} cannot be written: {error}", file=sys.stderr)
            return EXIT_FAILED
    return 0


def _run(arguments: argparse.Namespace) -> list[Row]:
    if arguments.seeds < 1:
        raise ValueError(f"--seeds is {arguments.seeds}, expected at least 1")
    for name in (*arguments.policy, arguments.decode_policy):
        by_name(name)
    for name in (arguments.scheduler, arguments.prefill_scheduler):
        scheduler_by_name(name)
    rows: list[Row] = []
    for path in arguments.trace:
        trace = _read(path, arguments)
        settings = _settings(arguments, trace)
        trace = trace.at_most(settings.worker.num_blocks * settings.worker.block_size_tokens)
        loads: list[float | None] = arguments.load or [None]
        capacity = None
        if arguments.load:
            with _progress(f"{trace.name}: capacity", len(trace)) as on_finished:
                capacity = capacity_per_s(trace, settings, on_finished)
            print(f"{trace.name}: {arguments.fleet} finishes {capacity:.2f} requests/s", file=sys.stderr)
        for load in loads:
            for policy in arguments.policy:
                results = []
                for seed in range(arguments.seeds):
                    timed = _timed(trace, arguments, seed)
                    if load is not None and capacity is not None:
                        timed = at_capacity_share(timed, load, capacity)
                    what = f"{trace.name} {policy}" + (f" at {load:g}" if load is not None else "")
                    with _progress(what, len(timed)) as on_finished:
                        chosen = replace(settings, prefill_policy=policy, seed=seed)
                        results.append(replay(timed, chosen, on_finished))
                rows.append(
                    Row(
                        trace=trace.name,
                        fleet=str(arguments.fleet),
                        policy=policy,
                        load=load,
                        rate_per_s=timed.rate_per_s,
                        results=tuple(results),
                    )
                )
    return rows


def _read(path: str, arguments: argparse.Namespace) -> Trace:
    trace = read_trace(path)
    if arguments.first is not None:
        trace = trace.first(arguments.first)
    if arguments.closed and not len(trace.session_ids):
        raise WorkloadError(f"{trace.name} has no sessions, --closed needs them")
    if len(trace.session_ids) and (trace.turns == 0).any() and not trace.arrival_s[trace.turns == 0].any():
        trace = with_session_starts(trace, SESSIONS_PER_S, seed=0)
    if not trace.has_arrivals and arguments.rate is None and not arguments.load:
        raise WorkloadError(f"{trace.name} has no arrival times: give --rate or --load")
    return trace


def _timed(trace: Trace, arguments: argparse.Namespace, seed: int) -> Trace:
    if arguments.rate is not None:
        return retimed(trace, arguments.rate, seed=seed)
    if not trace.has_arrivals:
        trace = retimed(trace, 1.0, seed=seed)
    if arguments.spread:
        trace = spread(trace, arguments.spread, seed=seed)
    return trace if arguments.speedup is None else sped_up(trace, arguments.speedup)


def _settings(arguments: argparse.Namespace, trace: Trace) -> ReplaySettings:
    gpu, shape = gpu_by_name(arguments.gpu), load_shape(arguments.model)
    block = arguments.block_size or min(DEFAULT_BLOCK_TOKENS, trace.block_size_tokens or DEFAULT_BLOCK_TOKENS)
    num_blocks = arguments.num_blocks
    if num_blocks is None:
        num_blocks = kv_tokens_that_fit(gpu, shape, arguments.tp) // block
        if not num_blocks:
            raise ValueError(f"{shape.name} leaves no room for KV on {arguments.tp} x {gpu.name}")
    step_time = roofline(gpu, shape, arguments.tp)
    return ReplaySettings(
        fleet=arguments.fleet,
        worker=SimulatedWorkerSettings(
            num_blocks=num_blocks,
            block_size_tokens=block,
            max_batch_size=arguments.max_batch_size,
            max_num_batched_tokens=arguments.max_num_batched_tokens,
        ),
        prefill_time=step_time,
        decode_time=step_time,
        decode_policy=arguments.decode_policy,
        link=kv_link(gpu, is_same_node=False, num_pairs=arguments.tp),
        kv_bytes_per_token=shape.kv_bytes_per_token,
        expected_output_tokens=arguments.expected_output,
        prefill_window_tokens=arguments.prefill_window,
        has_stay_or_go=not arguments.no_stay,
        report_delay_s=arguments.report_delay,
        has_guard=not arguments.no_guard,
        queue_timeout_s=arguments.queue_timeout,
        is_closed_loop=arguments.closed,
        prefill_scheduler=arguments.prefill_scheduler,
        decode_scheduler=arguments.scheduler,
        swap_link=KvLink(bytes_per_s=PCIE_BYTES_PER_S) if arguments.swap else None,
    )


@contextmanager
def _progress(what: str, total: int) -> Iterator[Callable[[int], None] | None]:
    """A bar on a terminal, nothing elsewhere."""
    if not sys.stderr.isatty():
        yield None
        return
    from tqdm import tqdm

    with tqdm(total=total, desc=what, unit="req", leave=False, file=sys.stderr) as bar:
        yield lambda num_finished: bar.update(1) and None

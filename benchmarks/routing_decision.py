"""What one routing decision costs, in process: tokens in, both workers out.

Hashing the prompt, matching it against every worker's cache, scoring all prefill workers, checking
room and scoring all decode workers are inside the clock; every worker holds the whole prompt (hit)
or nothing of it (miss). As many decode workers as prefill workers stand beside them.

    python -m benchmarks.routing_decision [--peer-python DYNAMO_VENV/bin/python] [--repeats 5]

With a peer, Dynamo's `SelectionService.select` (one choice, not two) answers in its own process in
turns with ours, cell by cell, repeat by repeat; CPU is that of all threads of the process. `packed`
is what the live coordinator holds (four bytes per token), `list` starts from a Python list as the
peer's binding does. The bars: at most
half the peer's CPU in every cell, and p99 at most 1 ms at 256 workers and 60,000 tokens in blocks
of 16. Exit status 4 if a bar is missed. Rows `decision` of `bench.sh routing`.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from baton.contract.messages import WorkerCapacity
from baton.contract.tokens import pack_token_ids
from baton.policy import registry
from baton.policy.base import RequestFacts
from baton.policy.expectations import Expectations
from baton.policy.hotspot import HotspotGuard
from baton.policy.kv_index import KvIndex
from baton.policy.ledger import Ledger, Pool
from baton.policy.router import Router
from benchmarks.figures import Bar, Figure, Report
from benchmarks.samples import paired_ratios, percentile, spread

EXIT_BAR_MISSED = 4
MAX_SHARE_OF_PEER = 0.5
MAX_P99_US = 1000.0
Cells = Sequence[tuple[int, int]]
DYNAMO = "dynamo SelectionService"
CELLS: Cells = [(workers, blocks) for workers in (16, 256, 1024) for blocks in (64, 512)]
BLOCK = 64
LONG = (256, 16, 3750)
"""Workers, block size, blocks: 60,000 tokens."""


def prompt(num_tokens: int, seed: int) -> list[int]:
    rng = random.Random(seed)
    return [rng.randrange(128_000) for _ in range(num_tokens)]


@dataclass(frozen=True, slots=True)
class Cost:
    cpu_us: float
    p50_us: float
    p99_us: float
    cpu_p99_us: float
    """Without what others took from this core: on a busy machine the wall's p99 is their time slice."""


class Subject:
    """A fleet of prefill and as many decode workers, loaded unevenly, caches as asked."""

    def __init__(
        self, num_workers: int, block_size: int, num_blocks: int, *, is_ragged: bool = False
    ) -> None:
        """Ragged: every worker holds another length of the prompt, the worst case for the match."""
        rng = random.Random(0)
        capacity = WorkerCapacity(
            num_blocks=100_000, max_batch_size=256, max_model_len=131_072, kv_bytes_per_block=1
        )
        self.ledger, self.index = Ledger(), KvIndex(block_size)
        self.prefill = prefill = Pool()
        decode = Pool()
        for worker in range(num_workers):
            for pool, role in ((prefill, "p"), (decode, "d")):
                account = self.ledger.open(f"{role}{worker}", capacity, block_size)
                pool.add(account)
                self.index.open(account.slot)
                for leg in range(rng.randint(0, 4 if pool is prefill else 60)):
                    queued = rng.randint(1, 5000) if pool is prefill else 0
                    account.commit(f"{leg}", num_queued_tokens=queued, num_blocks=9, num_kv_tokens=500)
        self.tokens = prompt(num_blocks * block_size, 1)
        self.hit = [*self.tokens, 1]
        self.miss = prompt(num_blocks * block_size + 1, 2)
        self.facts = RequestFacts(num_prompt_tokens=len(self.hit), num_expected_output_tokens=256)
        packed = pack_token_ids(self.tokens)
        start_s = time.process_time()
        for account in prefill:
            length = rng.randint(1, num_blocks) if is_ragged else num_blocks
            self.index.stored(
                account.slot, list(range(1, length + 1)), None, packed[: length * block_size * 4]
            )
        self.stored_us_per_block = (time.process_time() - start_s) * 1e6 / (num_blocks * num_workers)
        self.router = Router(
            self.ledger,
            prefill,
            decode,
            prefill_policy=registry.by_name("lmetric"),
            decode_policy=registry.by_name("smallest-batch"),
            index=self.index,
            expectations=Expectations(),
            guard=HotspotGuard(),
        )

    def decide(self, packed: bytes) -> int:
        hits = self.router.known_hits(packed)
        prefill = self.router.choose_prefill(self.facts, hits, 0.0)
        decode = self.router.choose_decode(self.facts, hits, 0.0)
        assert prefill is not None and decode is not None
        return prefill.choice.hit_tokens

    def cost(self, tokens: list[int], num_calls: int, *, is_list: bool) -> Cost:
        packed = pack_token_ids(tokens)
        decide: Callable[[], int] = (
            (lambda: self.decide(pack_token_ids(tokens))) if is_list else (lambda: self.decide(packed))
        )
        for _ in range(5):
            hit_tokens = decide()
        assert (hit_tokens > 0) == (tokens is self.hit)
        walls, cpus = [], []
        for _ in range(num_calls):
            start_s, cpu_s = time.perf_counter(), time.process_time()
            decide()
            cpus.append((time.process_time() - cpu_s) * 1e6)
            walls.append((time.perf_counter() - start_s) * 1e6)
        return Cost(
            sum(cpus) / num_calls, percentile(walls, 0.5), percentile(walls, 0.99), percentile(cpus, 0.99)
        )

    def cost_after(self, num_calls: int) -> float:
        """CPU of what follows the decision: the guard's look, the expectation, the two commits."""
        packed = pack_token_ids(self.miss)
        cpu_s = 0.0
        for call in range(num_calls):
            hits = self.router.known_hits(packed)
            prefill = self.router.choose_prefill(self.facts, hits, 0.0)
            decode = self.router.choose_decode(self.facts, hits, 0.0)
            assert prefill is not None and decode is not None
            name = f"after{call}"
            start_s = time.process_time()
            for choice in (prefill.choice, decode):
                choice.account.commit(name, num_queued_tokens=9, num_blocks=9, num_kv_tokens=9)
            self.router.committed(name, prefill, hits)
            cpu_s += time.process_time() - start_s
            self.router.leg_ended(name)
            for choice in (prefill.choice, decode):
                choice.account.release(name)
        return cpu_s / num_calls * 1e6


class Peer:
    def __init__(self, python: str) -> None:
        script = Path(__file__).with_name("dynamo_selection.py")
        self._process = subprocess.Popen(
            [python, str(script)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env={**os.environ, "DYN_LOG": "error"},
        )

    def ask(self, command: dict[str, Any]) -> dict[str, Any]:
        assert self._process.stdin is not None and self._process.stdout is not None
        self._process.stdin.write(json.dumps(command) + "\n")
        self._process.stdin.flush()
        line = self._process.stdout.readline()
        if not line:
            raise SystemExit(f"the peer ended with status {self._process.wait()}")
        answer: dict[str, Any] = json.loads(line)
        return answer

    def close(self) -> None:
        assert self._process.stdin is not None
        self._process.stdin.close()
        self._process.wait(timeout=20)


def measure(
    report: Report, peer_python: str | None, *, repeats: int, calls: int, cells: Cells = CELLS
) -> None:
    """`calls`: decisions per repeat; the peer makes a quarter of them."""
    peer = Peer(peer_python) if peer_python else None
    for num_workers, num_blocks in cells:
        _cell(report, num_workers, num_blocks, peer, repeats, calls)
    if peer is not None:
        peer.close()
    _long(report, repeats, max(1000, calls))


def _add(
    report: Report,
    row: str,
    subject: str,
    values: list[float],
    unit: str,
    *,
    bar: float | None = None,
    note: str = "",
) -> None:
    report.figures.append(
        Figure(
            row=row, subject=subject, unit=unit, spread=spread(values), note=note,
            bar=None if bar is None else Bar("<=", bar),
        )
    )  # fmt: skip


def _cell(
    report: Report, num_workers: int, num_blocks: int, peer: Peer | None, repeats: int, calls: int
) -> None:
    subject = Subject(num_workers, BLOCK, num_blocks)
    if peer is not None:
        peer.ask({"setup": [num_workers, BLOCK, num_blocks]})
    for kind, tokens in (("hit", subject.hit), ("miss", subject.miss)):
        ours: list[Cost] = []
        from_list: list[Cost] = []
        theirs: list[dict[str, Any]] = []
        for _ in range(repeats):
            ours.append(subject.cost(tokens, calls, is_list=False))
            from_list.append(subject.cost(tokens, max(50, calls // 4), is_list=True))
            if peer is not None:
                theirs.append(peer.ask({"select": max(25, calls // 4), "is_hit": kind == "hit"}))
        row = f"decision_cpu {num_workers} workers, {num_blocks} blocks, {kind}"
        if theirs:
            p50 = spread([answer["p50_us"] for answer in theirs]).median
            _add(report, row, DYNAMO, [answer["cpu_us"] for answer in theirs], "us", note=f"p50 {p50:.0f} us")
        for name, costs in (("packed", ours), ("list", from_list)):
            p50, p99 = (spread([getattr(c, f"{p}_us") for c in costs]).median for p in ("p50", "p99"))
            cpus = [cost.cpu_us for cost in costs]
            _add(report, row, f"baton, {name}", cpus, "us", note=f"p50 {p50:.0f}, p99 {p99:.0f} us")
            if theirs:
                ratios = paired_ratios(cpus, [answer["cpu_us"] for answer in theirs])
                _add(report, row, f"baton, {name} / {DYNAMO}", ratios, "x", bar=MAX_SHARE_OF_PEER)
    size = f"{num_workers} workers, {num_blocks} blocks"
    _add(report, f"after_decision_cpu {size}", "baton", [subject.cost_after(100)], "us")
    subject = Subject(num_workers, BLOCK, num_blocks, is_ragged=True)
    ragged = [subject.cost(subject.hit, calls, is_list=False).cpu_us for _ in range(repeats)]
    _add(report, f"decision_cpu {size}, every worker another length", "baton, packed", ragged, "us")


def _event_costs() -> tuple[list[float], list[float]]:
    """Events of prompts nobody shares: 100 chains of 128 blocks of 16, stored, then evicted."""
    stored, removed = [], []
    for repeat in range(3):
        index = KvIndex(16)
        index.open(0)
        chains = [pack_token_ids(prompt(128 * 16, 1000 * repeat + i)) for i in range(100)]
        names = [list(range(i * 128 + 1, i * 128 + 129)) for i in range(100)]
        start_s = time.process_time()
        for name, packed in zip(names, chains, strict=True):
            index.stored(0, name, None, packed)
        middle_s = time.process_time()
        for name in names:
            index.removed(0, name[::-1])
        stored.append((middle_s - start_s) * 1e6 / 12_800)
        removed.append((time.process_time() - middle_s) * 1e6 / 12_800)
        assert index.num_blocks == 0
    return stored, removed


def _long(report: Report, repeats: int, calls: int) -> None:
    num_workers, block_size, num_blocks = LONG
    subject = Subject(num_workers, block_size, num_blocks)
    for kind, tokens in (("hit", subject.hit), ("miss", subject.miss)):
        costs = [subject.cost(tokens, calls, is_list=False) for _ in range(repeats)]
        row = f"{num_workers} workers, 60k tokens in blocks of {block_size}, {kind}"
        _add(report, f"decision_cpu {row}", "baton", [cost.cpu_us for cost in costs], "us")
        _add(
            report,
            f"decision_p99 {row}",
            "baton, wall",
            [cost.p99_us for cost in costs],
            "us",
            bar=MAX_P99_US,
        )
        _add(
            report, f"decision_p99 {row}", "baton, cpu", [cost.cpu_p99_us for cost in costs], "us",
            bar=MAX_P99_US, note="without what others took from this core",
        )  # fmt: skip
    _add(report, "after_decision_cpu 60k tokens", "baton", [subject.cost_after(100)], "us")
    stored_us, removed_us = _event_costs()
    _add(report, "index_cpu_per_block", "held elsewhere already", [subject.stored_us_per_block], "us")
    _add(report, "index_cpu_per_block", "new", stored_us, "us")
    _add(report, "index_cpu_per_block", "removed", removed_us, "us")


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.routing_decision")
    parser.add_argument("--peer-python", metavar="PATH", help="an interpreter with ai-dynamo-runtime")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--calls", type=int, default=400, help="decisions per repeat (the peer: a quarter)")
    options = parser.parse_args(argv)
    report = Report("routing")
    measure(report, options.peer_python, repeats=options.repeats, calls=options.calls)
    print(report.table())
    return EXIT_BAR_MISSED if report.missed else 0


if __name__ == "__main__":
    sys.exit(main())

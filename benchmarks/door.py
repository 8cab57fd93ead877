"""`bench.sh door`: what the coordinator costs, before engines that answer at once.

Every row runs its subjects one after the other, repeat after repeat (A B C, A B C, ...), on the
same machine, with the same request body. CPU is that of the subject's own process tree: the
router, the coordinator or the frontend; backends and the load generator are not in it.

    cpu_per_request_*   closed loop, CPU of the tree / requests completed
    cpu_per_token       (200-token streams - 2-token streams) / 198, 256 streams, 5 ms steps: the
                        cost of one more token once both legs of a request run
    added_latency_*     open loop, 50 requests/s, percentile - the backend's own percentile
    tokenising_*        text prompts, tokenised inside, the same tokenizer file on both sides
"""

from __future__ import annotations

import dataclasses
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass

from benchmarks import fleets
from benchmarks.cpu_time import quiet_check
from benchmarks.figures import Bar, Figure, Report
from benchmarks.fleets import (
    BATON,
    DIRECT,
    SGLANG_PD,
    SGLANG_PLAIN,
    VLLM_PD,
    VLLM_PD_TEXT,
    VLLM_PLAIN,
    Subject,
)
from benchmarks.load import LoadFailed, LoadResult, completion_body, ids_prompt, run_load, text_prompt
from benchmarks.samples import paired_ratios, per_token, spread
from benchmarks.servers import cpu_seconds

FEW, MANY = 2, 200
NUM_STREAMS = 256
TICK_US = 5_000
LATENCY_RATE_PER_S = 50.0
CHARS_PER_TOKEN = 4
"""How long a text prompt stands for one of n token ids, as in the peers' own benchmarks."""


@dataclass(frozen=True, slots=True)
class Effort:
    """How long and how often; `quick` is a functional check, not a measurement."""

    repeats: int
    cpu_s: float
    tokens_s: float
    latency_1k_s: float
    latency_32k_s: float
    warm_up_s: float
    quiet_s: float


FULL = Effort(5, 2.5, 3.0, 8.0, 5.0, 0.5, 0.6)
QUICK = Effort(1, 0.6, 1.0, 1.5, 1.0, 0.1, 0.2)

BESIDE = "not part of the figure above"
OF_THIS_MACHINE = "client, router and backend share its cores"

Found = dict[str, list[dict[str, float]]]
"""By subject, one entry per repeat."""
Measure = Callable[[Subject, int], dict[str, float]]


class Door:
    def __init__(self, effort: Effort, *, has_baton: bool, rows: Sequence[str] | None) -> None:
        self.report = Report("door")
        self._effort = effort
        self._has_baton = has_baton
        self._rows = rows

    # ── the three fleets and their rows ────────────────────────────────────────────────────────

    def run(self) -> Report:
        if self._wants("cpu_per_request", "added_latency"):
            with self._fleet(0) as subjects:
                self._cpu_rows(subjects)
                self._latency_rows(subjects)
        if self._wants("cpu_per_token"):
            with self._fleet(TICK_US) as subjects:
                self._token_row(subjects)
        if self._wants("tokenising"):
            self._tokenising_rows()
        return self.report

    def _wants(self, *prefixes: str) -> bool:
        """Whether any wanted row starts with one of these, or is the start of one."""
        return self._rows is None or any(
            row.startswith(prefix) or prefix.startswith(row) for row in self._rows for prefix in prefixes
        )

    @contextmanager
    def _fleet(self, tick_us: int) -> Iterator[dict[str, Subject]]:
        with ExitStack() as stack:
            subjects = stack.enter_context(fleets.routers(tick_us))
            if self._has_baton:
                subjects |= stack.enter_context(fleets.baton(tick_us, has_tokenizer=False))
            yield subjects

    def _cpu_rows(self, all_subjects: dict[str, Subject]) -> None:
        for label, num_ids, concurrency, limit in (("1k", 1000, 32, 0.5), ("32k", 32_000, 16, 1.0)):
            for max_tokens, legs in ((1, "one token"), (FEW, "two tokens, both legs")):
                row = f"cpu_per_request_{label}" + ("" if max_tokens == 1 else "_both_legs")
                if self._wants(row):
                    beside = [SGLANG_PD, VLLM_PLAIN, SGLANG_PLAIN] if max_tokens == 1 else []
                    subjects = _chosen(all_subjects, [BATON, VLLM_PD, VLLM_PD_TEXT, *beside])
                    note = f"{legs}, stream, closed loop c={concurrency}"
                    found = self._request_row(row, subjects, num_ids, max_tokens, concurrency, note)
                    for peer in (VLLM_PD, VLLM_PD_TEXT):
                        self._ratio(row, found, "cpu_us", peer, Bar("<=", limit))

    def _request_row(
        self, row: str, subjects: list[Subject], size: int, max_tokens: int, concurrency: int, note: str
    ) -> Found:
        bodies = {s.name: self._body(s, size, max_tokens) for s in subjects}

        def measure(subject: Subject, repeat: int) -> dict[str, float]:
            return self._cpu(subject, bodies[subject.name], concurrency, repeat)

        found = self._alternate(row, subjects, measure)
        for key, name_of_row, unit, remark in (
            ("cpu_us", row, "us", note),
            ("backend_us", f"{row}_backends", "us", BESIDE),
            ("per_s", f"{row}_rate", "1/s", OF_THIS_MACHINE),
        ):
            for name, repeats in found.items():
                self._add(name_of_row, name, unit, [r[key] for r in repeats], note=remark)
        return found

    def _token_row(self, all_subjects: dict[str, Subject]) -> None:
        row = "cpu_per_token"
        subjects = _chosen(all_subjects, [BATON, VLLM_PD, VLLM_PLAIN, SGLANG_PLAIN])

        def measure(subject: Subject, repeat: int) -> dict[str, float]:
            few = self._cpu(subject, self._body(subject, 1000, FEW), NUM_STREAMS, repeat)
            body = self._body(subject, 1000, MANY)
            many = self._cpu(subject, body, NUM_STREAMS, repeat, self._effort.tokens_s)
            return {
                "cpu_us": per_token(many["cpu_us"], few["cpu_us"], MANY, FEW),
                "backend_us": per_token(many["backend_us"], few["backend_us"], MANY, FEW),
                "tokens_per_s": many["per_s"] * MANY,
                "gap_p99_ms": many["gap_p99_ms"],
            }

        found = self._alternate(row, subjects, measure)
        note = f"{NUM_STREAMS} streams, {TICK_US / 1000:g} ms steps"
        for name, repeats in found.items():
            self._add(row, name, "us", [r["cpu_us"] for r in repeats], note=note)
        for name, repeats in found.items():
            self._add("tokens_per_s", name, "1/s", [r["tokens_per_s"] for r in repeats], note=note)
            backend = [r["backend_us"] for r in repeats]
            self._add("backend_cpu_per_token", name, "us", backend, note=BESIDE)
        self._ratio(row, found, "cpu_us", VLLM_PD, Bar("<=", 0.7))
        best = min(
            (VLLM_PLAIN, SGLANG_PLAIN), key=lambda name: spread([r["cpu_us"] for r in found[name]]).median
        )
        self._ratio(row, found, "cpu_us", best, Bar("<=", 1.0))

    def _latency_rows(self, all_subjects: dict[str, Subject]) -> None:
        for label, num_ids, seconds in (
            ("1k", 1000, self._effort.latency_1k_s), ("32k", 32_000, self._effort.latency_32k_s),
        ):  # fmt: skip
            for kind, key in (("first_sse_byte", "first"), ("plain", "total")):
                row = f"added_latency_{label}_{kind}"
                if not self._wants(row):
                    continue
                names = [DIRECT, BATON, VLLM_PD] + ([SGLANG_PD] if label == "1k" else [])
                subjects = _chosen(all_subjects, names)

                def measure(
                    s: Subject, repeat: int, n: int = num_ids, k: str = key, seconds: float = seconds
                ) -> dict[str, float]:
                    body = self._body(s, n, FEW, is_stream=k == "first")
                    result = run_load(
                        s.port, body, rate_per_s=LATENCY_RATE_PER_S, duration_s=seconds, seed=repeat + 1
                    )
                    return result.first_ms if k == "first" else result.total_ms

                found = self._alternate(row, subjects, measure)
                for p in ("p50", "p99"):
                    direct = [r[p] for r in found[DIRECT]]
                    self._add(f"{row}_{p}", f"{DIRECT} (absolute)", "ms", direct)
                    added = {
                        name: [{p: r[p] - d} for r, d in zip(repeats, direct, strict=True)]
                        for name, repeats in found.items()
                        if name != DIRECT
                    }
                    for name, repeats in added.items():
                        self._add(f"{row}_{p}", name, "ms", [r[p] for r in repeats])
                    self._ratio(f"{row}_{p}", added, p, VLLM_PD, Bar("<=", 0.7 if p == "p50" else 1.0))

    def _tokenising_rows(self) -> None:
        fleets.demo_model()
        with ExitStack() as stack:
            subjects = stack.enter_context(fleets.dynamo())
            if self._has_baton:
                subjects |= stack.enter_context(fleets.baton(0, has_tokenizer=True))
            for num_chars in (400, 4000):
                row = f"tokenising_{num_chars}_chars"
                if not self._wants(row):
                    continue
                chosen = _chosen(subjects, [BATON, fleets.DYNAMO_PD, fleets.DYNAMO_PLAIN])
                note = "two tokens, stream, closed loop c=32"
                found = self._request_row(row, chosen, num_chars // CHARS_PER_TOKEN, FEW, 32, note)
                self._ratio(row, found, "cpu_us", fleets.DYNAMO_PD, Bar("<=", 0.7))
                self._ratio(row, found, "cpu_us", fleets.DYNAMO_PLAIN, None)

    # ── measuring ──────────────────────────────────────────────────────────────────────────────

    def _body(self, subject: Subject, size: int, max_tokens: int, *, is_stream: bool = True) -> bytes:
        """`size` counts token ids, or tokens' worth of characters, as the subject takes them."""
        prompt = ids_prompt(size) if subject.prompt == "ids" else text_prompt(size * CHARS_PER_TOKEN)
        return completion_body(
            prompt, model=subject.model, max_tokens=max_tokens, stream=is_stream, extra={"ignore_eos": True}
        )

    def _cpu(
        self, subject: Subject, body: bytes, concurrency: int, repeat: int, seconds: float | None = None
    ) -> dict[str, float]:
        own, backends = cpu_seconds(subject.servers), cpu_seconds(subject.backends)
        result = run_load(
            subject.port, body, concurrency=concurrency,
            duration_s=self._effort.cpu_s if seconds is None else seconds, seed=repeat + 1,
        )  # fmt: skip
        return {
            "cpu_us": (cpu_seconds(subject.servers) - own) / result.num_requests * 1e6,
            "backend_us": (cpu_seconds(subject.backends) - backends) / result.num_requests * 1e6,
            "per_s": result.requests_per_s,
            "gap_p99_ms": result.gap_ms["p99"],
        }

    def _alternate(self, row: str, subjects: list[Subject], measure: Measure) -> Found:
        for subject in subjects:
            self._warm_up(subject)
        self.report.busy_before[row] = quiet_check(self._effort.quiet_s)
        found: Found = {subject.name: [] for subject in subjects}
        for repeat in range(self._effort.repeats):
            for subject in subjects:
                found[subject.name].append(measure(subject, repeat))
        print(f"{time.strftime('%H:%M:%S')} {row}", file=sys.stderr, flush=True)
        return found

    def _warm_up(self, subject: Subject) -> None:
        """Until requests succeed: a fleet may list its model before its parts have met."""
        deadline = time.monotonic() + 30.0
        while True:
            body = self._body(subject, 200, FEW)
            result: LoadResult = run_load(
                subject.port, body, concurrency=8, duration_s=self._effort.warm_up_s, may_fail=True
            )
            if not result.num_errors:
                return
            if time.monotonic() > deadline:
                raise LoadFailed(f"{subject.name} does not answer: {result.message}")
            time.sleep(0.2)

    # ── figures ────────────────────────────────────────────────────────────────────────────────

    def _add(
        self,
        row: str,
        subject: str,
        unit: str,
        values: list[float],
        *,
        bar: Bar | None = None,
        note: str = "",
    ) -> None:
        figure = Figure(row=row, subject=subject, unit=unit, spread=spread(values), bar=bar, note=note)
        self.report.figures.append(figure)

    def _ratio(self, row: str, found: Found, key: str, peer: str, bar: Bar | None) -> None:
        if BATON in found:
            ratios = paired_ratios([r[key] for r in found[BATON]], [r[key] for r in found[peer]])
            self._add(f"{row} ratio", f"{BATON} / {peer}", "x", ratios, bar=bar)


def run(effort: Effort, *, repeats: int | None, has_baton: bool, rows: Sequence[str] | None) -> Report:
    if repeats:
        effort = dataclasses.replace(effort, repeats=repeats)
    return Door(effort, has_baton=has_baton, rows=rows).run()


def _chosen(subjects: dict[str, Subject], names: list[str]) -> list[Subject]:
    return [subjects[name] for name in names if name in subjects]

"""The engine's own counters, kept current by vLLM after each of its steps.

vLLM runs one stat logger per engine in the process that owns it and calls `record` after the outputs
of a step have been handed out. That call is also the moment at which a step is known to be
complete, so whoever collects outputs is told here.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from vllm.v1.metrics.loggers import StatLoggerBase

from baton.contract.messages import SchedulerCounters, WorkerLoad

DIGEST_DIFFERS = 2
"""The connector's word for it; its module loads nixl, which only the engine's child processes need."""

SCHEDULER_STATS = "baton_"
"""How names of our scheduler's running totals begin among vLLM's counts of a step."""


class LoadGauge:
    """Owns the running totals and the latest `WorkerLoad`."""

    def __init__(
        self, on_step_end: Callable[[], None], on_transfer: Callable[[float], None] | None = None
    ) -> None:
        self._on_step_end = on_step_end
        self._on_transfer = on_transfer
        self._num_blocks = 0
        self._reads_per_transfer = 1
        self._num_running = 0
        self._num_waiting = 0
        self._num_free_blocks = 0
        self._num_prefill_tokens = 0
        self._num_stored_tokens = 0
        self._num_tail_tokens = 0
        self._num_kv_bytes = 0
        self._num_kv_reads = 0
        self._num_kv_failures = 0
        self._num_kv_mismatches = 0
        self._num_preemptions = 0
        self._num_scheduler_fallbacks = 0
        self._swap_counters: dict[str, int] = {}

    def set_capacity(self, *, num_blocks: int, reads_per_transfer: int) -> None:
        """`reads_per_transfer`: each rank reads its own part and counts it."""
        self._num_blocks = self._num_free_blocks = num_blocks
        self._reads_per_transfer = reads_per_transfer

    def forget_warm_up(self) -> None:
        """Prompt tokens count from here on."""
        self._num_prefill_tokens = 0

    def count_stored(self, num_tokens: int) -> None:
        """Prompt tokens in blocks that one step has filled. vLLM itself counts a prompt's tokens at its
        end only; these, and what is left of a prompt behind its last full block, are known before."""
        self._num_stored_tokens += num_tokens

    def count_tail(self, num_tokens: int) -> None:
        """Of a prompt that is done."""
        self._num_tail_tokens += num_tokens

    def count_scheduler_fallback(self) -> None:
        """The engine starts with vLLM's own scheduler although another was asked for."""
        self._num_scheduler_fallbacks += 1

    def load(self) -> WorkerLoad:
        return WorkerLoad(
            num_running=self._num_running,
            num_waiting=self._num_waiting,
            num_free_blocks=self._num_free_blocks,
            num_prefill_tokens_done=max(
                self._num_prefill_tokens, self._num_stored_tokens + self._num_tail_tokens
            ),
            num_kv_bytes_received=self._num_kv_bytes,
            num_kv_transfers=self._num_kv_reads // self._reads_per_transfer,
            num_kv_transfer_failures=self._num_kv_failures,
            num_preemptions=self._num_preemptions,
            scheduler=self._scheduler_counters(),
            num_kv_digest_mismatches=self._num_kv_mismatches,
        )

    def _scheduler_counters(self) -> SchedulerCounters | None:
        counters = self._swap_counters
        if not counters and not self._num_scheduler_fallbacks:
            return None
        return SchedulerCounters(
            num_swaps_out=counters.get("num_swaps_out", 0),
            num_swaps_in=counters.get("num_swaps_in", 0),
            num_swapped_bytes=counters.get("num_bytes_out", 0) + counters.get("num_bytes_in", 0),
            num_recomputed_tokens=counters.get("num_recomputed_tokens", 0),
            num_stalls=counters.get("num_stalls", 0),
            num_fallbacks=self._num_scheduler_fallbacks,
        )

    def logger_factory(self) -> Callable[..., StatLoggerBase]:
        """What `AsyncLLM(stat_loggers=[...])` wants: called with the configuration and an index."""

        def make_logger(vllm_config: Any, engine_index: int = 0) -> StatLoggerBase:
            return _GaugeLogger(self)

        return make_logger

    def record(self, scheduler_stats: Any, iteration_stats: Any) -> None:
        if scheduler_stats is not None:
            self._num_running = scheduler_stats.num_running_reqs
            self._num_waiting = scheduler_stats.num_waiting_reqs + scheduler_stats.num_skipped_waiting_reqs
            # Usage is the fraction in use of all blocks that can be handed out.
            self._num_free_blocks = round((1.0 - scheduler_stats.kv_cache_usage) * self._num_blocks)
            connectors = scheduler_stats.kv_connector_stats or {}
            for name, count in scheduler_stats.num_kv_fetch_reqs_by_stage.items():
                if name.startswith(SCHEDULER_STATS):
                    self._swap_counters[name.removeprefix(SCHEDULER_STATS)] = count
            # With several connectors each has its own part, by name.
            if transfers := connectors.get("LeasedNixlConnector", _own(connectors)):
                self._num_kv_bytes += int(sum(transfers["bytes_transferred"]))
                self._num_kv_reads += len(transfers["bytes_transferred"])
                if self._on_transfer is not None:
                    for duration_s in transfers["transfer_duration"]:
                        self._on_transfer(duration_s)
                self._num_kv_failures += len(transfers["num_failed_transfers"])
                self._num_kv_mismatches += transfers["num_failed_transfers"].count(DIGEST_DIFFERS)
                self._num_kv_failures += len(transfers["num_failed_handshakes"])
        if iteration_stats is not None:
            self._num_prefill_tokens += iteration_stats.prompt_token_stats.computed
            self._num_preemptions += iteration_stats.num_preempted_reqs
        self._on_step_end()


def _own(stats: dict[str, Any]) -> dict[str, Any]:
    """NIXL's numbers of a step, if there was a transfer."""
    return stats if "bytes_transferred" in stats else {}


class _GaugeLogger(StatLoggerBase):
    def __init__(self, gauge: LoadGauge) -> None:
        self._gauge = gauge

    def record(
        self,
        scheduler_stats: Any,
        iteration_stats: Any,
        mm_cache_stats: Any = None,
        engine_idx: int = 0,
    ) -> None:
        self._gauge.record(scheduler_stats, iteration_stats)

    def log_engine_initialized(self) -> None:
        return

"""vLLM's scheduler, silent in steps in which nothing happened. vLLM loads it by name.

While a prefill engine holds KV for a reader it steps about a thousand times a second, only to drive
the transfer, and each step sends the engine's counters to the process that owns it: a seventh of a
core there, for numbers that did not change. Those are left out.

Only where vLLM does not schedule asynchronously, as on CPU: that needs another base class.
"""

from __future__ import annotations

from typing import Any

from vllm.v1.core.sched.scheduler import Scheduler

from baton.engine.vllm.first_token import FirstTokenMixin


class QuietScheduler(FirstTokenMixin, Scheduler):
    _last_counters: tuple[Any, ...] | None = None

    def make_stats(
        self,
        spec_decoding_stats: Any = None,
        kv_connector_stats: Any = None,
        *arguments: Any,
        **named_arguments: Any,
    ) -> Any:
        """None means: say nothing. Outputs of the step are sent all the same."""
        counters = (*self.get_request_counts(), len(self.deferred_waiting), self.kv_cache_manager.usage)
        is_unchanged = counters == self._last_counters
        self._last_counters = counters
        if is_unchanged and (kv_connector_stats is None or kv_connector_stats.is_empty()):
            return None
        return super().make_stats(spec_decoding_stats, kv_connector_stats, *arguments, **named_arguments)

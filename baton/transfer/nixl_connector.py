"""vLLM's NIXL pull connector with leases that are checked by the reader.

vLLM loads this module by name inside its engine processes
(`kv_connector="LeasedNixlConnector"`, `kv_connector_module_path="baton.transfer.nixl_connector"`).
One instance lives beside the scheduler, one in each worker; both derive from vLLM's own classes,
and a request that carries none of our keys is treated exactly as those treat it.

What is different, and why:

* **Lease.** vLLM's decode side reads whenever it gets round to it. If that is after the prefill
  side's lease, it reads blocks that hold another prompt by now and nobody notices. Here the
  prefill side says when the lease ends, and the decode side refuses to start a read too late,
  gives up one that is stuck, and discards one that ended too late. The engine's load-failure policy
  then recomputes or fails the request.
* **One token more.** After the prefill worker's first token the decode prompt is one longer than
  the held KV. Only held tokens are claimed.
* **Nothing held for nothing.** A prompt whose first token ends the sequence is not held, and a hold
  that nobody will read can be released before its lease ends.
* **No spinning thread.** NIXL's progress thread polls without pause and takes half a core per idle
  process. It is off here unless asked for, with NIXL's strict locking. That is sound because a
  prefill engine steps about once a millisecond while it holds blocks, which drives NIXL, and late
  reads (when it does not) are refused.
* **Pipeline stages.** vLLM's pull connector refuses pipeline parallelism. With as many stages on both
  sides each stage holds the same layers as its counterpart, and the transfer is one ordinary
  transfer per stage: stage `i` listens on side-channel port + i, and talks to stage `i` only.
* **All cores.** On CPU the base class moves the calling thread to the last core of each NUMA node,
  "for kv transfer". With the single-process executor that thread runs the model, so every engine of
  a host would compute on the same core. Here the thread stays where it was.
* **Idle engines rest.** An engine that only waits for others steps more slowly after a while
  (`idle_pace.py`).
* **Signed blocks.** If asked for, what arrives is compared with what the source signed for these tokens
  before the engine may use it (`kv_digest.py`); what differs is treated as a read that came too late.
* **No orphans.** With an owner named, the process dies with it.

Keys in `kv_connector_extra_config`: `is_progress_thread_enabled`, `is_affinity_kept`,
`is_idle_pace_enabled`, `is_kv_digest_enabled`, `kv_lease_margin_s`, `kv_pull_timeout_s`, `owner`. Keys
in a request's `kv_transfer_params`: the constants below.
"""

from __future__ import annotations

import contextlib
import functools
import os
import signal
import threading
import time
from collections.abc import Iterator
from typing import Any

from vllm.distributed.kv_transfer.kv_connector.v1.base import KVConnectorRole, KVConnectorTransferResults
from vllm.distributed.kv_transfer.kv_connector.v1.nixl import base_worker
from vllm.distributed.kv_transfer.kv_connector.v1.nixl.connector import NixlBaseConnector, NixlPullConnector
from vllm.distributed.kv_transfer.kv_connector.v1.nixl.metadata import NixlConnectorMetadata, ReqMeta
from vllm.distributed.parallel_state import get_pp_group
from vllm.logger import init_logger
from vllm.v1.request import RequestStatus

from baton.ports import is_port_free
from baton.process_guard import ProcessIdentity, die_with
from baton.transfer.digest_orders import DigestOrders
from baton.transfer.idle_pace import IdlePace
from baton.transfer.lease import (
    DEFAULT_MARGIN_S,
    DEFAULT_PULL_TIMEOUT_S,
    ReadWindow,
    num_tokens_to_pull,
)
from baton.transfer.nixl_digest import SigningScheduler, SigningWorker

CONNECTOR_NAME = "LeasedNixlConnector"
CONNECTOR_MODULE = __name__

HOLD_UNLESS_STOPPED = "baton_hold_unless_stopped"
"""In a prefill request: keep no KV if the first token already ends the sequence."""
LEASE_END_S = "baton_lease_end_s"
"""In a prefill request's result: when the lease ends on the prefill host's monotonic clock. In a
decode request: when the reader must take it to end on the decode host's."""
RELEASE_HELD = "baton_release_held"
"""In a request that is aborted on arrival: ids of finished prefill requests to let go of."""
NUM_STAGES = "baton_num_stages"
"""In a prefill request's result: its pipeline stages, where there are several. A reader with another
number must not read: it would take one stage's layers for all."""

RELEASE_GRACE_S = 1.0
"""How long a hold outlives its release. Its reader may be at work, and when it has just connected its read
only ends if this engine takes steps; without holds it takes none, and the reader's blocks would wait
for the pull time-out."""

# vLLM's logger, so that lines of engine processes look alike and reach the same place.
logger = init_logger(f"vllm.{__name__}")


class LeasedMetadata(NixlConnectorMetadata):
    """What the scheduler tells the workers in one step, plus leases, releases and digests."""

    def __init__(self, stock: NixlConnectorMetadata) -> None:
        super().__init__()
        self.__dict__.update(stock.__dict__)
        self.windows: dict[str, ReadWindow] = {}
        self.released_req_ids: set[str] = set()
        self.digests = DigestOrders()
        self.rest_s = 0.0
        """Nothing to compute: the workers may rest so long before they say what has become of transfers."""


class LeasedNixlConnector(NixlPullConnector):
    """See the module. Constructed by vLLM, once per role and process."""

    scheduler_class: type[LeasedPullScheduler]
    worker_class: type[LeasedPullWorker]
    is_strict = False
    """A second thread of ours calls NIXL: strict locking, whether or not NIXL's own thread runs."""

    def __init__(self, vllm_config: Any, role: KVConnectorRole, kv_cache_config: Any) -> None:
        extra_config = vllm_config.kv_transfer_config.kv_connector_extra_config
        if owner := extra_config.get("owner"):
            _belong_to(ProcessIdentity.from_dict(owner))
        # NixlPullConnector's own constructor would build the stock pair; only its base is wanted.
        NixlBaseConnector.__init__(self, vllm_config, role, kv_cache_config)
        self.connector_scheduler: LeasedPullScheduler | None = None
        self.connector_worker: LeasedPullWorker | None = None
        if role == KVConnectorRole.SCHEDULER:
            self.connector_scheduler = self.scheduler_class(vllm_config, self.engine_id, kv_cache_config)
        else:
            is_spinning = bool(extra_config.get("is_progress_thread_enabled", True))
            with (
                _agents(is_spinning, is_strict=self.is_strict or not is_spinning),
                _as_one_stage(vllm_config.parallel_config),
            ):
                self.connector_worker = self.worker_class(vllm_config, self.engine_id, kv_cache_config)

    def wait_for_save(self) -> None:
        super().wait_for_save()
        if isinstance(metadata := self._connector_metadata, LeasedMetadata):
            assert self.connector_worker is not None
            self.connector_worker.sign(metadata.digests)


class LeasedPullScheduler(SigningScheduler):
    """Scheduler side: what to claim, what to hold, what to tell the workers."""

    side_channel_port: int
    _nixl_handshake_listener_t: threading.Thread | None

    def __init__(self, vllm_config: Any, engine_id: str, kv_cache_config: Any) -> None:
        super().__init__(vllm_config, engine_id, kv_cache_config)
        extra_config = vllm_config.kv_transfer_config.kv_connector_extra_config
        self._margin_s = float(extra_config.get("kv_lease_margin_s", DEFAULT_MARGIN_S))
        self._pull_timeout_s = float(extra_config.get("kv_pull_timeout_s", DEFAULT_PULL_TIMEOUT_S))
        self._released_req_ids: set[str] = set()
        self._num_stages: int = vllm_config.parallel_config.pipeline_parallel_size
        self._listeners: list[threading.Thread] = []
        self._pace = IdlePace() if extra_config.get("is_idle_pace_enabled", False) else None

    def set_xfer_handshake_metadata(self, metadata: dict[tuple[int, int], Any]) -> None:
        """One listener per stage, each serving its stage as if there were no other."""
        first_port = self.side_channel_port
        # The base class's thread binds the port and is waited for without a deadline: were the port
        # taken since it was chosen, the thread would die and the engine hang.
        for port in range(first_port, first_port + self._num_stages):
            if not is_port_free(self.side_channel_host, port):
                raise OSError(f"side-channel port {self.side_channel_host}:{port} is taken")
        for stage in range(self._num_stages):
            self.side_channel_port = first_port + stage
            super().set_xfer_handshake_metadata(
                {(0, tp_rank): payload for (owner, tp_rank), payload in metadata.items() if owner == stage}
            )
            self._listeners.append(self._take_listener())
        self.side_channel_port = first_port

    def _take_listener(self) -> threading.Thread:
        """The base class starts a listener only while it has none."""
        listener = self._nixl_handshake_listener_t
        assert listener is not None
        self._nixl_handshake_listener_t = None
        return listener

    def shutdown(self) -> None:
        super().shutdown()  # sets the event that all of them watch
        for listener in self._listeners:
            listener.join()

    def get_num_new_matched_tokens(self, request: Any, num_computed_tokens: int) -> tuple[int | None, bool]:
        params = request.kv_transfer_params or {}
        num_held = params.get("remote_num_tokens")
        if params.get("do_remote_prefill") and params.get(NUM_STAGES, 1) != self._num_stages:
            logger.error(
                "kv read impossible: request_id=%s num_stages=%d here, %d there",
                request.request_id, self._num_stages, params.get(NUM_STAGES, 1),
            )  # fmt: skip
            return 0, False
        if not params.get("do_remote_prefill") or num_held is None:
            result: tuple[int, bool] = super().get_num_new_matched_tokens(request, num_computed_tokens)
            return result
        num_tokens = num_tokens_to_pull(
            num_held=num_held,
            num_wanted=self._get_remote_prefill_token_count(request.num_prompt_tokens),
            num_cached=num_computed_tokens,
        )
        return num_tokens, num_tokens > 0

    def build_connector_meta(self, scheduler_output: Any) -> LeasedMetadata:
        windows = {
            req_id: ReadWindow(
                lease_end_s=float(lease_end_s),
                margin_s=self._margin_s,
                pull_timeout_s=self._pull_timeout_s,
            )
            for req_id, (request, *_) in self._reqs_need_recv.items()
            if (lease_end_s := (request.kv_transfer_params or {}).get(LEASE_END_S)) is not None
        }
        digests = self.digest_orders(scheduler_output)
        metadata = LeasedMetadata(super().build_connector_meta(scheduler_output))
        metadata.windows, metadata.digests = windows, digests
        metadata.released_req_ids, self._released_req_ids = self._released_req_ids, set()
        if self._pace is not None:
            metadata.rest_s = self._pace.sleep_s(has_work=scheduler_output.total_num_scheduled_tokens > 0)
        return metadata

    def request_finished(self, request: Any, block_ids: Any) -> tuple[bool, dict[str, Any] | None]:
        self.end_signing(request.request_id)
        params = request.kv_transfer_params or {}
        if released := params.get(RELEASE_HELD):
            self._released_req_ids.update(released)
            return False, None
        if self._is_over_with_prefill(request):
            # As for an aborted prefill: the workers forget the request, the blocks go back at once.
            self._reqs_not_processed.add(request.request_id)
            self._reqs_need_save.pop(request.request_id, None)
            return False, None
        must_hold, result = super().request_finished(request, block_ids)
        if must_hold and result is not None and params.get(HOLD_UNLESS_STOPPED):
            # Only for an owner that knows the key: it turns a clock reading into time left.
            result[LEASE_END_S] = time.monotonic() + self._kv_lease_duration
        if result is not None and self._num_stages > 1:
            result[NUM_STAGES] = self._num_stages
            result["pp_size"] = 1  # each of our stages is a source of its own
        return must_hold, result

    def _is_over_with_prefill(self, request: Any) -> bool:
        """Its first token ended it: nobody will read its KV."""
        params = request.kv_transfer_params or {}
        return bool(params.get(HOLD_UNLESS_STOPPED)) and request.status == RequestStatus.FINISHED_STOPPED


class LeasedPullWorker(SigningWorker):
    """Worker side: refuses, gives up and discards reads; releases holds early."""

    def __init__(self, vllm_config: Any, engine_id: str, kv_cache_config: Any) -> None:
        extra_config = vllm_config.kv_transfer_config.kv_connector_extra_config
        with _same_cores() if extra_config.get("is_affinity_kept", False) else contextlib.nullcontext():
            super().__init__(vllm_config, engine_id, kv_cache_config)
        self._rest_s = 0.0
        self._windows: dict[str, ReadWindow] = {}
        self._read_started_s: dict[str, float] = {}
        self._to_report_sent: set[str] = set()
        self._release_due_s: dict[str, float] = {}
        self._released_at_s: dict[str, float] = {}
        self._forget_released_after_s = 2.0 * float(
            vllm_config.kv_transfer_config.get_from_extra_config("kv_lease_duration", 30)
        )

    def start_load_kv(self, metadata: NixlConnectorMetadata) -> None:
        if isinstance(metadata, LeasedMetadata):
            self._windows.update(metadata.windows)
            self.expect(metadata.digests)
        if (stage := get_pp_group().rank_in_group) > 0:
            # With several stages every worker has its own copy of the metadata.
            for meta in metadata.reqs_to_recv.values():
                meta.remote.port += stage
            for heartbeat in metadata.heartbeat_by_engine.values():
                heartbeat.port += stage
        super().start_load_kv(metadata)
        if isinstance(metadata, LeasedMetadata):
            self._rest_s = metadata.rest_s
            # After the base class has taken over this step's new holds: they may be among these.
            due_s = time.monotonic() + RELEASE_GRACE_S
            for req_id in metadata.released_req_ids & self._reqs_to_send.keys():
                self._release_due_s.setdefault(req_id, due_s)

    def _read_blocks_for_req(self, req_id: str, meta: ReqMeta) -> None:
        window = self._windows.get(req_id)
        if window is not None and meta.awaiting_kvs and not window.may_start(now_s := time.monotonic()):
            logger.warning(
                "kv read refused: request_id=%s lease_left_s=%.3f margin_s=%.3f",
                req_id, window.lease_end_s - now_s, window.margin_s,
            )  # fmt: skip
            self._fail_read(req_id)
            return
        super()._read_blocks_for_req(req_id, meta)
        if window is not None and req_id in self._recving_transfers:
            self._read_started_s[req_id] = time.monotonic()

    def _pop_done_transfers(self, transfers: dict[str, list[int]]) -> tuple[set[str], set[str]]:
        done: set[str]
        failed: set[str]
        done, failed = super()._pop_done_transfers(transfers)
        if not self._read_started_s:
            return done, failed
        now_s = time.monotonic()
        for req_id, started_s in list(self._read_started_s.items()):
            window = self._windows[req_id]
            if req_id in done:
                if req_id not in failed and not window.is_trusted(ended_s=now_s):
                    logger.warning(
                        "kv read discarded: request_id=%s took_s=%.3f lease_left_s=%.3f margin_s=%.3f",
                        req_id, now_s - started_s, window.lease_end_s - now_s, window.margin_s,
                    )  # fmt: skip
                    self.xfer_stats.record_failed_transfer()
                    failed.add(req_id)
            elif req_id in transfers and now_s >= window.deadline_s(started_s):
                self._give_up(req_id, transfers, done, failed, took_s=now_s - started_s)
        return done, failed

    def _give_up(
        self, req_id: str, transfers: dict[str, list[int]], done: set[str], failed: set[str], *, took_s: float
    ) -> None:
        """Cancel a read that is stuck. What NIXL will not cancel may still be written to: then the
        request keeps its blocks and this is tried again in the next step."""
        if req_id not in self._recv_failures:
            logger.warning("kv read given up: request_id=%s took_s=%.3f", req_id, took_s)
            self.xfer_stats.record_failed_transfer()
        failed.add(req_id)
        transfers[req_id] = [
            handle for handle in transfers[req_id] if not self._try_release_xfer_handle(req_id, handle)
        ]
        if not transfers[req_id]:
            del transfers[req_id]
            done.add(req_id)

    def _fail_read(self, req_id: str) -> None:
        self.xfer_stats.record_failed_transfer()
        self._handle_failed_transfer(req_id, None, self._recv_failures, record_failed_transfer=False)

    def get_transfer_results(self) -> KVConnectorTransferResults:
        rest_s, self._rest_s = self._rest_s, 0.0
        if rest_s > 0.0:
            self.rest(rest_s)
        results = super().get_transfer_results()
        for req_id in results.finished_recving:
            self._windows.pop(req_id, None)
            self._read_started_s.pop(req_id, None)
        self._release_due(results.finished_sending)
        if self._released_at_s:
            # Reported when they were released; a reader's late notice must not free them twice.
            results.finished_sending -= self._released_at_s.keys()
            self._forget_old_releases()
        if self._to_report_sent:
            results.finished_sending |= self._to_report_sent
            self._to_report_sent = set()
        return results

    def rest(self, rest_s: float) -> None:
        """There was nothing to compute."""
        time.sleep(rest_s)

    def _release_due(self, read_req_ids: set[str]) -> None:
        """A read under way needs this engine's steps, and it steps while it holds something."""
        now_s = time.monotonic()
        for req_id, due_s in list(self._release_due_s.items()):
            if req_id not in read_req_ids and now_s < due_s:
                continue
            del self._release_due_s[req_id]
            if self._reqs_to_send.pop(req_id, None) is not None:
                # Stays in _reqs_to_process: a notice that is under way is then nothing to log.
                self._to_report_sent.add(req_id)
                self._released_at_s[req_id] = now_s

    def _forget_old_releases(self) -> None:
        now_s = time.monotonic()
        for req_id, released_s in list(self._released_at_s.items()):
            if now_s - released_s < self._forget_released_after_s:
                break  # in order of time
            del self._released_at_s[req_id]
            self._reqs_to_process.discard(req_id)


@contextlib.contextmanager
def _same_cores() -> Iterator[None]:
    """Undoes a change of this thread's CPU affinity."""
    cores = os.sched_getaffinity(0)
    try:
        yield
    finally:
        os.sched_setaffinity(0, cores)


def _belong_to(owner: ProcessIdentity) -> None:
    die_with(owner)
    if threading.current_thread() is threading.main_thread():
        # Ctrl-C reaches the whole foreground group; the owner drains and then ends us itself.
        signal.signal(signal.SIGINT, signal.SIG_IGN)


@contextlib.contextmanager
def _as_one_stage(parallel_config: Any) -> Iterator[None]:
    """vLLM's worker refuses to be built when there are several stages; ours serves one."""
    num_stages = parallel_config.pipeline_parallel_size
    parallel_config.pipeline_parallel_size = 1
    try:
        yield
    finally:
        parallel_config.pipeline_parallel_size = num_stages


@contextlib.contextmanager
def _agents(is_spinning: bool, *, is_strict: bool) -> Iterator[None]:
    """NIXL agents made inside have a progress thread or not. vLLM has no setting for it."""
    from nixl._api import nixl_agent_config, nixl_thread_sync_t

    stock = base_worker.nixl_agent_config
    base_worker.nixl_agent_config = functools.partial(
        nixl_agent_config,
        enable_prog_thread=is_spinning,
        # Without its thread NIXL's default is no locking at all, and the handshake thread calls too.
        sync_mode=nixl_thread_sync_t.NIXL_THREAD_SYNC_STRICT if is_strict else None,
    )
    try:
        yield
    finally:
        base_worker.nixl_agent_config = stock


LeasedNixlConnector.scheduler_class = LeasedPullScheduler
LeasedNixlConnector.worker_class = LeasedPullWorker

"""Worker side of streaming: carries out the destination's half here, hands the source's half to a thread.

A decode engine steps all the time while it waits for KV, so its half needs no thread: notices are read
in every step, and end its rests. A prefill engine may be deep in another prompt's chunk, so its half has one
(`nixl_stream_writer`). Both halves are the machines of `baton.handoff`.
"""

from __future__ import annotations

import queue
import socket
import threading
import time
from collections import deque
from concurrent.futures import Future
from typing import Any

import torch
from vllm.distributed.kv_transfer import get_kv_transfer_group
from vllm.distributed.kv_transfer.kv_connector.v1.base import KVConnectorTransferResults
from vllm.distributed.parallel_state import get_pp_group
from vllm.logger import init_logger

from baton.handoff.destination import (
    Activate,
    Cancel,
    CancelAcknowledged,
    DestinationAction,
    DestinationEvent,
    DestinationTable,
    FirstTokenArrived,
    Free,
    GiveUp,
    OwnerAborted,
    Probe,
    Register,
    Reserve,
    SourceFailed,
    SourceLost,
    SourceReassured,
    WriteArrived,
)
from baton.handoff.source import (
    BlocksComputed,
    PrefillEnded,
    PrefillPreempted,
    ReleaseWanted,
    SourceTable,
)
from baton.handoff.timing import MAX_OUTSTANDING_BYTES, REASSURE_EVERY_S, RESEND_S, SILENCE_S, TIMER_S
from baton.transfer.idle_pace import rest_until
from baton.transfer.lease import DEFAULT_PULL_TIMEOUT_S
from baton.transfer.nixl_connector import LeasedPullWorker
from baton.transfer.nixl_stream_peers import KvMemory
from baton.transfer.nixl_stream_scheduler import (
    FirstTokens,
    StreamMetadata,
    StreamProgress,
    StreamReservation,
)
from baton.transfer.nixl_stream_writer import NoticeSorter, StreamWriter
from baton.transfer.stream_wire import (
    PREFIX,
    BlocksWritten,
    CancelDone,
    CancelStream,
    FirstToken,
    Hello,
    RegisterStream,
    StreamFailed,
    StreamKnown,
    StreamMessage,
    decode,
    encode,
)

logger = init_logger(f"vllm.{__name__}")

WRITES_IN_LINE = 3
"""A write may wait behind others, so it is given this many times what a read is."""
PROBE_TIMEOUT_S = 1.0


class StreamWorker(LeasedPullWorker):
    """Adds streams; everything else is the pull worker's."""

    def __init__(self, vllm_config: Any, engine_id: str, kv_cache_config: Any) -> None:
        super().__init__(vllm_config, engine_id, kv_cache_config)
        self._is_source = vllm_config.kv_transfer_config.kv_role == "kv_producer"
        extra_config = vllm_config.kv_transfer_config.kv_connector_extra_config
        pull_timeout_s = float(extra_config.get("kv_pull_timeout_s", DEFAULT_PULL_TIMEOUT_S))
        self._write_patience_s = WRITES_IN_LINE * pull_timeout_s
        self._layer_index: dict[str, int] = {}
        self._own: KvMemory | None = None
        self.refusal: str | None = None
        """Why this rank cannot stream; known with the first look at its KV."""
        self._notices = NoticeSorter(self.nixl_wrapper, lambda notice: notice.startswith(PREFIX))
        # Source half.
        self._writer: StreamWriter | None = None
        self._streamed: dict[str, str] = {}
        """Prefill request → hand-off id, until its blocks are released."""
        self._request_of: dict[str, str] = {}
        # Destination half.
        self._table = DestinationTable(silence_s=SILENCE_S, resend_s=RESEND_S)
        self._reservations: dict[str, StreamReservation] = {}
        """By vLLM's request id, which is the table's hand-off id too: unique per process."""
        self._epoch = time.monotonic_ns()
        self._by_epoch: dict[int, str] = {}
        """Epoch → request, of all reservations that a source was told of."""
        self._registered: set[tuple[int, str]] = set()
        self._first_write_s: dict[str, float] = {}
        self._greeted: set[str] = set()
        self._handshaken: queue.SimpleQueue[tuple[str, bool]] = queue.SimpleQueue()
        self._aborted_early: set[str] = set()
        self._probes: set[str] = set()
        self._lost: queue.SimpleQueue[str] = queue.SimpleQueue()
        self._done: set[str] = set()
        self._failed: set[str] = set()
        self._given_up: set[str] = set()
        self._first_tokens: dict[str, int] = {}
        self._timer_s = 0.0

    def _on_write(self, num_layer_blocks: int, took_s: float) -> None:
        """From the writer's thread: a write was copied at once, in so many seconds."""

    # ── set-up ────────────────────────────────────────────────────────────────────────────────

    def register_kv_caches(self, kv_caches: dict[str, torch.Tensor]) -> None:
        super().register_kv_caches(kv_caches)
        self._layer_index = {name: index for index, name in enumerate(kv_caches)}
        self.refusal = self._reason_not_to_stream(len(kv_caches))
        self._own = KvMemory(
            tp_rank=self.tp_rank,
            tp_size=self.world_size,
            device_id=self.device_id,
            num_blocks=self.num_blocks,
            base_addresses=self.kv_caches_base_addr[self.engine_id][self.tp_rank],
            block_bytes=self.block_len_per_layer,
            block_strides=self.block_stride_per_layer,
        )
        if self._is_source:
            self._writer = StreamWriter(
                self.nixl_wrapper,
                SourceTable(
                    num_layers=len(self._own.base_addresses),
                    bytes_per_block_layer=max(self._own.block_bytes),
                    max_outstanding_bytes=MAX_OUTSTANDING_BYTES,
                    reassure_every_s=REASSURE_EVERY_S,
                ),
                self._own,
                self.region_mem_types[0] if self.region_mem_types else self.nixl_memory_type,
                self._notices,
                refusal=self.refusal,
                patience_s=self._write_patience_s,
                on_write=self._on_write,
            )
            self._writer.start()

    def _reason_not_to_stream(self, num_layers: int) -> str | None:
        assert self.transfer_topo is not None
        reasons = {
            "the KV of this model is staged in host memory": self.use_host_buffer,
            "this model has state-space layers": self._has_mamba,
            "this model shares one latent KV between heads (MLA)": self.use_mla,
            "this model has several groups of KV blocks": len(self.kv_cache_config.transfer_groups) != 1,
            "KV lies in different kinds of memory": self._mixed_mem_types,
            "a block is several kernel blocks": self._physical_blocks_per_logical_kv_block != 1,
            f"{self.num_layer_regions} KV regions for {num_layers} layers": self.num_layer_regions
            != num_layers,
            "KV heads are replicated over ranks": self.world_size > self.transfer_topo.total_num_kv_heads,
            "context parallelism": self.dcp_size > 1,
        }
        return next((reason for reason, applies in reasons.items() if applies), None)

    def shutdown(self) -> None:
        if (writer := getattr(self, "_writer", None)) is not None:
            self._writer = None
            writer.stop()
        super().shutdown()

    # ── steps ─────────────────────────────────────────────────────────────────────────────────

    def begin_step(self, metadata: StreamMetadata) -> None:
        """Before the step may write into blocks that streams still read. What the step before has ended is
        told here too, and not after the model has run again: first tokens are waited for."""
        if self._writer is None:
            return
        for handoff_id in metadata.orders.preempted.values():
            self._writer.tell(PrefillPreempted(handoff_id=handoff_id))
            self._writer.wait_until_quiet(handoff_id)
        for req_id, ended in metadata.orders.ended.items():
            handoff_id = self._streamed[req_id]
            self._writer.tell(
                PrefillEnded(handoff_id=handoff_id, lease_s=ended.lease_s, first_token=ended.first_token)
            )

    def save_layer(self, metadata: StreamMetadata, layer_name: str) -> None:
        """This layer's KV of the step is computed (queued, on a GPU)."""
        if self._writer is None:
            return
        layer_wise = [p for p in metadata.orders.progress.values() if p.writes == "layer"]
        if layer_wise:
            event = _recorded_event()
            for progress in layer_wise:
                self._writer.tell(_computed(progress, self._layer_index[layer_name]), event)

    def save_step(self, metadata: StreamMetadata) -> None:
        if self._writer is None or not metadata.orders.progress:
            return
        event = _recorded_event()
        for req_id, progress in metadata.orders.progress.items():
            if req_id not in self._streamed:
                self._streamed[req_id] = progress.handoff_id
                self._request_of[progress.handoff_id] = req_id
            if progress.writes != "end" or progress.num_ready == progress.num_total:
                self._writer.tell(_computed(progress, None), event)

    def start_load_kv(self, metadata: StreamMetadata) -> None:
        super().start_load_kv(metadata)
        for req_id in metadata.orders.reservations.keys() - self._reservations.keys():
            self._begin(req_id, metadata.orders.reservations[req_id])
        for req_id in metadata.orders.aborted:
            self._on_owner_aborted(req_id)
        for req_id in metadata.orders.ended.keys() & self._reqs_to_send.keys():
            self._reqs_to_send[req_id] = float("inf")  # the stream's own lease decides

    def get_transfer_results(self) -> KVConnectorTransferResults:
        results = super().get_transfer_results()
        if self._writer is not None:
            self._report_released(results)
        if self._reservations:
            self._step_destination()
        if self._done or self._failed:
            results.finished_recving |= self._done | self._failed
            results.failed_recving |= self._failed
            self._done, self._failed = set(), set()
        return results

    def rest(self, rest_s: float) -> None:
        """A client waits for a stream's last notice, so a notice ends the rest."""
        if self._reservations:
            rest_until(self._notices.has_ours, rest_s)
        else:
            super().rest(rest_s)

    def take_first_tokens(self) -> FirstTokens | None:
        if not self._first_tokens:
            return None
        tokens, self._first_tokens = self._first_tokens, {}
        return FirstTokens(tokens)

    # ── source half ───────────────────────────────────────────────────────────────────────────

    def _report_released(self, results: KVConnectorTransferResults) -> None:
        assert self._writer is not None
        for req_id in results.finished_sending & self._streamed.keys():
            # A pull has taken it instead, or its owner let go: once no write reads it either.
            results.finished_sending.discard(req_id)
            self._writer.tell(ReleaseWanted(handoff_id=self._streamed[req_id]))
        for handoff_id in self._writer.take_released():
            req_id = self._request_of.pop(handoff_id)
            del self._streamed[req_id]
            self._reqs_to_send.pop(req_id, None)
            self._reqs_to_process.discard(req_id)
            self._released_at_s.pop(req_id, None)
            results.finished_sending.add(req_id)

    # ── destination half ──────────────────────────────────────────────────────────────────────

    def _begin(self, req_id: str, reservation: StreamReservation) -> None:
        self._reservations[req_id] = reservation
        if self.refusal is not None:
            self._end(req_id, is_good=False)
            return
        stage = get_pp_group().rank_in_group
        handshake: Future[Any] | None = self._ensure_handshake(
            reservation.engine_id, reservation.host, reservation.port + stage, reservation.tp_size
        )
        if handshake is None:
            self._handshaken.put((req_id, True))
        else:
            handshake.add_done_callback(lambda done: self._handshaken.put((req_id, done.exception() is None)))

    def _on_owner_aborted(self, req_id: str) -> None:
        if req_id in self._by_epoch.values():
            self._tell(OwnerAborted(req_id))
        elif req_id in self._reservations:
            self._aborted_early.add(req_id)  # nobody knows of its blocks yet

    def _step_destination(self) -> None:
        while not self._handshaken.empty():
            req_id, is_good = self._handshaken.get()
            if req_id in self._aborted_early:
                self._aborted_early.discard(req_id)
                self._end(req_id, is_good=True)
            elif not is_good:
                self._end(req_id, is_good=False)
            else:
                self._reserve(req_id)
        while not self._lost.empty():
            self._tell(SourceLost(self._lost.get()))
        for notice in self._notices.take_ours():
            self._on_notice(notice)
        now_s = time.monotonic()
        if now_s - self._timer_s >= TIMER_S:
            self._timer_s = now_s
            self._carry_out(self._table.on_time(now_s))

    def _reserve(self, req_id: str) -> None:
        reservation = self._reservations[req_id]
        self._engine_last_active[reservation.engine_id] = time.perf_counter()
        self._epoch += 1
        self._by_epoch[self._epoch] = req_id
        self._tell(
            Reserve(
                handoff_id=req_id,
                epoch=self._epoch,
                sources=tuple(map(_text, self._remote_agents[reservation.engine_id].values())),
                lease_s=reservation.lease_s,
                wants_first_token=reservation.wants_first_token,
            )
        )

    def _tell(self, event: DestinationEvent) -> None:
        self._carry_out(self._table.on_event(event, time.monotonic()))

    def _on_notice(self, notice: bytes) -> None:
        try:
            message = decode(notice)
        except ValueError as error:
            logger.warning("kv stream notice dropped: %s", error)
            return
        if isinstance(message, Hello | RegisterStream | CancelStream):
            logger.warning("kv stream notice dropped: %s is for sources", type(message).__name__)
            return
        req_id = self._by_epoch.get(message.epoch)
        if req_id is None or self._reservations[req_id].handoff_id != message.handoff_id:
            logger.debug("kv stream notice dropped: handoff_id=%s is over", message.handoff_id)
            return
        source, epoch = message.source, message.epoch
        match message:
            case BlocksWritten(seq=seq, total=total):
                self._first_write_s.setdefault(req_id, time.monotonic())
                self._tell(WriteArrived(handoff_id=req_id, epoch=epoch, source=source, seq=seq, total=total))
            case FirstToken(token_id=token_id):
                self._tell(
                    FirstTokenArrived(handoff_id=req_id, epoch=epoch, source=source, token_id=token_id)
                )
            case StreamKnown():
                self._tell(SourceReassured(handoff_id=req_id, epoch=epoch, source=source))
            case StreamFailed(reason=reason):
                self._tell(SourceFailed(handoff_id=req_id, epoch=epoch, source=source, reason=reason))
            case CancelDone():
                self._tell(CancelAcknowledged(handoff_id=req_id, epoch=epoch, source=source))

    def _carry_out(self, actions: list[DestinationAction]) -> None:
        pending = deque(actions)
        while pending:
            match pending.popleft():
                case Register(req_id, epoch, source):
                    self._register(req_id, epoch, source)
                case Cancel(req_id, epoch, source):
                    handoff_id = self._reservations[req_id].handoff_id
                    self._send(
                        source,
                        CancelStream(handoff_id=handoff_id, destination=self.nixl_wrapper.name, epoch=epoch),
                    )
                case Activate(req_id, first_token):
                    self._count_arrived(req_id)
                    is_intact = self.is_intact(req_id)
                    if first_token is not None and is_intact:
                        self._first_tokens[req_id] = first_token
                    self._end(req_id, is_good=is_intact)
                case GiveUp(req_id, reason):
                    logger.warning(
                        "kv stream given up: handoff_id=%s reason=%s",
                        self._reservations[req_id].handoff_id, reason,
                    )  # fmt: skip
                    self.xfer_stats.record_failed_transfer()
                    self._given_up.add(req_id)
                case Free(req_id):
                    self._end(req_id, is_good=req_id not in self._given_up)
                case Probe(source):
                    self._probe(source)

    def _register(self, req_id: str, epoch: int, source: str) -> None:
        reservation = self._reservations[req_id]
        assert self._own is not None
        if source not in self._greeted or (epoch, source) in self._registered:
            # Also with every repetition: what was lost may be the greeting.
            self._greeted.add(source)
            self._send(
                source,
                Hello(
                    destination=self.nixl_wrapper.name,
                    agent_metadata=self.nixl_wrapper.get_agent_metadata(),
                    tp_rank=self._own.tp_rank,
                    tp_size=self._own.tp_size,
                    device_id=self._own.device_id,
                    num_blocks=self._own.num_blocks,
                    base_addresses=list(self._own.base_addresses),
                    block_bytes=list(self._own.block_bytes),
                    block_strides=list(self._own.block_strides),
                ),
            )
        self._registered.add((epoch, source))
        self._send(
            source,
            RegisterStream(
                handoff_id=reservation.handoff_id,
                destination=self.nixl_wrapper.name,
                epoch=epoch,
                num_destinations=max(1, self._own.tp_size // reservation.tp_size),
                num_skipped=reservation.num_skipped,
                block_ids=reservation.block_ids,
                ttl_s=reservation.lease_s,
                wants_first_token=reservation.wants_first_token,
            ),
        )

    def _send(self, source: str, message: StreamMessage) -> None:
        try:
            self.nixl_wrapper.send_notif(source, notif_msg=encode(message))
        except Exception as error:  # NIXL's own types
            logger.warning("kv stream notice not sent: source=%s %s", source, error)
            self._probe(source)

    def _count_arrived(self, req_id: str) -> None:
        """As a read would be counted; the time is that from the first write to the last."""
        assert self._own is not None
        num_blocks = len(self._reservations[req_id].block_ids)
        data = self.xfer_stats.data
        data["transfer_duration"].append(time.monotonic() - self._first_write_s[req_id])
        data["post_duration"].append(0.0)
        data["bytes_transferred"].append(num_blocks * sum(self._own.block_bytes))
        data["num_descriptors"].append(num_blocks * len(self._own.base_addresses))

    def _end(self, req_id: str, *, is_good: bool) -> None:
        """vLLM may use the blocks, or free them: nobody writes to them any more."""
        del self._reservations[req_id]
        for epoch in [epoch for epoch, known in self._by_epoch.items() if known == req_id]:
            del self._by_epoch[epoch]
        self._registered = {entry for entry in self._registered if entry[0] in self._by_epoch}
        self._given_up.discard(req_id)
        self._first_write_s.pop(req_id, None)
        self._to_compare.pop(req_id, None)
        (self._done if is_good else self._failed).add(req_id)

    def _probe(self, source: str) -> None:
        """Is the process that owns `source` gone? Its side channel says: nobody else has that port, and
        who has it since is another engine. Silence alone is no proof, and is asked about again."""
        if source in self._probes:
            return
        owner = next(
            (
                reservation
                for reservation in self._reservations.values()
                if source in map(_text, self._remote_agents.get(reservation.engine_id, {}).values())
            ),
            None,
        )
        if owner is None:
            return
        self._probes.add(source)
        stage = get_pp_group().rank_in_group

        def ask() -> None:
            try:
                socket.create_connection((owner.host, owner.port + stage), PROBE_TIMEOUT_S).close()
            except ConnectionRefusedError:
                self._lost.put(source)
            except OSError:
                pass
            else:
                if self._is_another_engine(owner, owner.port + stage):
                    self._lost.put(source)
            finally:
                self._probes.discard(source)

        threading.Thread(target=ask, name="kv-stream-probe", daemon=True).start()

    def _is_another_engine(self, owner: StreamReservation, port: int) -> bool:
        try:
            self._nixl_handshake(owner.host, port, owner.tp_size, owner.engine_id)
        except RuntimeError as error:
            return "engine ID mismatch" in str(error)
        except Exception:  # a timeout, an unreadable answer: no proof
            return False
        return False


class StreamRefusal:
    """A base that vLLM gives its worker: the engine calls the method by name (`collective_rpc`)."""

    def kv_stream_refusal(self) -> str | None:
        """Why this rank cannot stream; None: it can. Known once the model is loaded."""
        connector = get_kv_transfer_group()
        assert isinstance(connector.connector_worker, StreamWorker)
        return connector.connector_worker.refusal


def _computed(progress: StreamProgress, layer: int | None) -> BlocksComputed:
    return BlocksComputed(
        handoff_id=progress.handoff_id,
        block_ids=progress.block_ids,
        num_ready=progress.num_ready,
        num_total=progress.num_total,
        layer=layer,
    )


def _text(agent_name: str | bytes) -> str:
    """NIXL gives names of peers as bytes and takes them as either."""
    return agent_name.decode() if isinstance(agent_name, bytes) else agent_name


def _recorded_event() -> Any:
    """None on CPU, where a layer's KV is in memory when its hook is called."""
    if not torch.cuda.is_available():
        return None
    event = torch.cuda.Event()
    event.record()
    return event

"""Every message that crosses a process, grouped by direction. One frozen struct each.

Workers talk to the coordinator over one ZeroMQ connection (DEALER to ROUTER); clients over a
second one. A message is one frame holding one MessagePack map with a `type` key. A worker's
messages need no worker id: after registration the connection is the identity.

Keys: `request_id` names a client's job for its whole life, `handoff_id` one attempt to serve it.
Worker legs are keyed by `handoff_id`, so that a late message of an abandoned attempt is
recognised and dropped.
"""

from __future__ import annotations

from typing import Any

import msgspec

from baton.contract.errors import ErrorReport
from baton.contract.lifecycle import Outcome, Transfer, Way, WorkerRole
from baton.contract.sampling import SamplingSpec


class Message(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True, tag=True):
    """Base of all messages; the `type` key is the class name."""


# ── what both directions carry ────────────────────────────────────────────────────────────────


class KvLayout(msgspec.Struct, frozen=True, kw_only=True):
    """All that must agree before KV blocks of one worker mean anything to another."""

    model: str
    """The model path or name exactly as both engines were given it: vLLM compares the string."""
    engine: str
    """Engine and version, for example `vllm 0.32.0`."""
    transfer: str
    """Transfer and version, for example `nixl 1.5.1`."""
    dtype: str
    num_layers: int
    num_kv_heads: int
    head_dim: int
    block_size_tokens: int
    cache_dtype: str = "auto"
    """Of KV; `auto` is the model's."""
    attention_backend: str | None = None
    """It decides how a block's heads and tokens are ordered. None, here and below: the worker does not
    know, and nobody compares."""
    weights: str | None = None
    """Digest of the weight files, or the hub's revision: one path may hold different weights on two hosts."""


class WorkerCapacity(msgspec.Struct, frozen=True, kw_only=True):
    num_blocks: int
    """KV blocks the engine can hand out."""
    max_batch_size: int
    max_model_len: int
    """Longest prompt + output in tokens."""
    kv_bytes_per_block: int
    """Over all layers and all tensor-parallel ranks."""


class SchedulerCounters(msgspec.Struct, frozen=True, kw_only=True, array_like=True):
    """What preemption cost since the worker started (running totals)."""

    num_swaps_out: int = 0
    """Sequences whose KV left the device for host memory."""
    num_swaps_in: int = 0
    num_swapped_bytes: int = 0
    """Both ways, per rank."""
    num_recomputed_tokens: int = 0
    """Computed a second time, after a preemption without a copy."""
    num_stalls: int = 0
    """Swaps that had to copy more than the last block at the moment of need."""
    num_fallbacks: int = 0
    """1: the engine's own scheduler runs although another was asked for."""


class WorkerLoad(msgspec.Struct, frozen=True, kw_only=True, array_like=True):
    """The engine's own counters after its latest step."""

    num_running: int = 0
    num_waiting: int = 0
    num_free_blocks: int = 0
    num_prefill_tokens_done: int = 0
    """Uncached prompt tokens computed since the worker started (a running total)."""
    num_kv_bytes_received: int = 0
    """KV bytes pulled from other workers since the worker started (a running total)."""
    num_kv_transfers: int = 0
    num_kv_transfer_failures: int = 0
    num_preemptions: int = 0
    scheduler: SchedulerCounters | None = None
    """Of engines with a preempting scheduler."""
    num_kv_digest_mismatches: int = 0
    """Among the failures: KV that arrived and was not what its source had signed."""


class TopLogprob(msgspec.Struct, frozen=True, array_like=True):
    token_id: int
    logprob: float
    rank: int | None
    decoded: str | None


TokenLogprobs = list[TopLogprob]
"""Alternatives for one position; the first entry is the token that was sampled."""


class SequenceDelta(msgspec.Struct, frozen=True, array_like=True):
    """New tokens of one leg in one engine step."""

    handoff_id: str
    token_ids: list[int]
    text: str
    """Text that became final with these tokens; may be empty while a character is incomplete."""
    finish_reason: str | None = None
    """`stop`, `length`; None while the sequence goes on. Aborts and errors travel as LegFailed."""
    stop_reason: int | str | None = None
    """The stop string or stop token id that matched; None for the model's own end token."""
    logprobs: list[TokenLogprobs] | None = None
    num_cached_tokens: int | None = None
    """Prompt tokens the engine had in its own prefix cache; sent with the leg's last delta."""
    prompt_logprobs: list[TokenLogprobs | None] | None = None
    """Of a decode leg that computed the prompt itself and was asked for them; with its first delta."""
    has_lost_kv: bool = False
    """The KV it was told to fetch did not arrive in time, it computed the prompt; with its first delta.
    vLLM does not tell its front end: there a lost transfer is seen where it fails the leg."""


class BlocksStored(msgspec.Struct, frozen=True, kw_only=True, array_like=True, tag="stored"):
    """Consecutive full blocks that the engine can now serve as a prefix. An engine that keeps several
    copies of equal blocks tells of each."""

    block_hashes: list[int]
    """The engine's own names of these blocks, 64-bit."""
    parent_hash: int | None
    """The block before them; None: they begin a prompt."""
    token_ids: bytes
    """Packed, of all these blocks."""
    namespace: str = ""
    """What separates equal tokens (LoRA adapter, cache salt), or empty."""


class BlocksRemoved(msgspec.Struct, frozen=True, kw_only=True, array_like=True, tag="removed"):
    """One copy of each of these blocks is gone."""

    block_hashes: list[int]


class AllBlocksCleared(msgspec.Struct, frozen=True, array_like=True, tag="cleared"):
    """The engine's prefix cache is empty."""


KvEvent = BlocksStored | BlocksRemoved | AllBlocksCleared


class KvSource(msgspec.Struct, frozen=True, kw_only=True):
    """Where a prompt's finished KV lies and for how long."""

    lease_s: float
    """Time left until the source may free the blocks, counted from when this message was sent.
    Whoever forwards it subtracts the time it kept it. Never a clock reading: clocks differ."""
    num_tokens: int
    """Prompt tokens whose KV is held."""
    num_bytes: int
    """Bytes of the held blocks; what the decode worker must receive if it has none of them."""
    transfer_params: dict[str, Any]
    """Opaque to everybody but the transfer adapter of the two workers."""
    is_streamed: bool = False
    """The KV is not there yet: the source writes it while it computes, into blocks that the decode worker
    reserves now. `lease_s` is then how long the reservation may stand."""
    has_first_token: bool = False
    """Streamed: the prefill worker samples the first token, and it comes with the KV. The decode worker
    goes on from it and tells it as the first of its own."""


# ── worker → coordinator ──────────────────────────────────────────────────────────────────────


class RegisterWorker(Message, frozen=True, kw_only=True):
    protocol_version: int
    worker_id: str
    boot_id: str
    """New for each process; the worker id may be reused after a restart, this never."""
    role: WorkerRole
    layout: KvLayout
    capacity: WorkerCapacity
    tensor_parallel_size: int
    pipeline_parallel_size: int
    transfer_endpoint: str
    """host:port of the transfer's side channel; empty for an engine without one."""
    host: str
    pid: int
    prefill_window_tokens: int | None = None
    """Prompt tokens this worker wants to have ahead of what it has computed; a longer prompt comes
    alone. The rest waits at the coordinator. None: no limit."""
    stream_params: dict[str, Any] | None = None
    """For `KvSource.transfer_params` of KV that this worker streams; None: it neither streams nor takes
    streams."""
    streams_first_token: bool = False
    """Its streams bring the first token along, or take one; see `KvSource.has_first_token`."""
    has_kv_events: bool = False
    """It tells which prompt blocks it holds (`KvEvents`); otherwise no hits are predicted for it."""
    has_passed_join_test: bool = False
    """A coordinator has told this process `JoinTestPassed`: this one or one before it."""
    sent_s: float | None = None
    """The worker's own clock; see `Heartbeat.sent_s`."""


class Heartbeat(Message, frozen=True, kw_only=True):
    load: WorkerLoad
    num_legs: int
    """Legs the worker believes it is serving; the coordinator compares and logs a difference."""
    sent_s: float | None = None
    """The worker's own clock when it sent this; comes back in `StartDecode.sent_s`."""


class StepOutputs(Message, frozen=True, kw_only=True):
    """All tokens of one engine step, one message. Decode workers send nothing per token beside it. A
    prefill worker sends it without tokens, for the progress in `load`."""

    deltas: list[SequenceDelta]
    load: WorkerLoad


class PrefillFinished(Message, frozen=True, kw_only=True):
    """A prefill leg ended well. Its one token is in `delta`; decode continues from `kv_source`."""

    delta: SequenceDelta
    kv_source: KvSource | None
    """None when the sequence is over after its first token, or the engine kept nothing."""
    prompt_logprobs: list[TokenLogprobs | None] | None = None
    queue_s: float
    """Time the leg waited in the worker's engine before its first step."""
    prefill_s: float
    """First step to first token."""
    load: WorkerLoad


class LegFailed(Message, frozen=True, kw_only=True):
    """A leg ended without finishing: aborted on request, or an error of the engine or transfer."""

    handoff_id: str
    error: ErrorReport


class KvEvents(Message, frozen=True, kw_only=True):
    """Changes of a worker's prefix cache in one engine step, in order."""

    sequence: int
    """Consecutive from 0 at the worker's boot, whoever listened; a jump is a gap, see `AskKvReplay`."""
    events: list[KvEvent]
    load: WorkerLoad
    is_fresh_start: bool = False
    """Forget what came before this number: this batch, and those that follow, tell all there is. The
    first after each registration of a worker that holds something, and the answer to a question for
    batches that the worker no longer has."""


class WorkerLeaving(Message, frozen=True, kw_only=True):
    """The worker wants no new legs. Those that were promised to it still come, until `NoMoreLegs`. It says
    this a second time when it goes."""

    reason: str


# ── coordinator → worker ──────────────────────────────────────────────────────────────────────


class WorkerAccepted(Message, frozen=True, kw_only=True):
    protocol_version: int
    coordinator_boot_id: str
    heartbeat_interval_s: float


class WorkerRefused(Message, frozen=True, kw_only=True):
    error: ErrorReport


class JoinTestPassed(Message, frozen=True, kw_only=True):
    """A hand-off with this worker was seen to be right. It says so when it registers again, so that a new
    coordinator has a fleet to serve with at once."""


class RegisterAgain(Message, frozen=True, kw_only=True):
    """The coordinator does not know this connection (it restarted, or gave the worker up)."""


class StartPrefill(Message, frozen=True, kw_only=True):
    handoff_id: str
    request_id: str
    prompt_token_ids: bytes
    """Packed, see tokens.py."""
    sampling: SamplingSpec
    """The client's spec; the worker itself stops after the first token."""
    keep_kv: bool
    """False: this is the whole answer (max_tokens = 1), nothing will fetch the KV."""
    num_given_tokens: int = 0
    """So many tokens at the prompt's end are output that the client has from an earlier attempt. The model
    need not know; text and stop strings go on as if they had been generated here."""


class StartDecode(Message, frozen=True, kw_only=True):
    handoff_id: str
    request_id: str
    prompt_token_ids: bytes
    """Packed. Ends with the first output token when the prefill worker's token counts."""
    sampling: SamplingSpec
    """Already reduced by the tokens the client has (max_tokens, min_tokens)."""
    kv_source: KvSource | None
    """None: compute the prompt here (recompute policy, or nothing to fetch)."""
    num_given_tokens: int = 0
    """As in `StartPrefill`."""
    sent_s: float | None = None
    """A time on the *worker's* clock at or before which this was not yet sent: its latest heartbeat's,
    plus the time since that arrived. How long this message lay somewhere is then known, whatever the
    two clocks say, and comes off the lease. Never too short: the heartbeat's own way counts as well."""


class AbortLeg(Message, frozen=True, kw_only=True):
    """Stop and free; the worker answers with LegFailed(code=aborted) unless the leg is already over."""

    handoff_id: str


class StillThere(Message, frozen=True, kw_only=True):
    """Nothing to do. Whether it can be sent tells if the worker's connection is there."""


class AskKvReplay(Message, frozen=True, kw_only=True):
    """Batches of `KvEvents` did not arrive: send them again, or start afresh."""

    first: int
    last: int
    """Included."""


class DrainWorker(Message, frozen=True, kw_only=True):
    """Take no new legs, finish the ones you have, then leave."""


class NoMoreLegs(Message, frozen=True, kw_only=True):
    """To a worker that is leaving: every leg that was planned with it is over, its KV has been read, and it
    gets no new one."""


# ── client → coordinator ──────────────────────────────────────────────────────────────────────


class SubmitRequest(Message, frozen=True, kw_only=True):
    protocol_version: int
    request_id: str
    """Chosen by the client, unique among its requests in flight."""
    prompt: str | None = None
    prompt_token_ids: bytes | None = None
    """Packed. Exactly one of `prompt`, `prompt_token_ids` and `messages` is given."""
    messages: list[dict[str, Any]] | None = None
    """Chat turns, rendered with the model's chat template."""
    model: str | None = None
    sampling: SamplingSpec | None = None
    """None: greedy-free defaults with as many tokens as fit."""


class AbortRequest(Message, frozen=True, kw_only=True):
    request_id: str


# ── coordinator → client ──────────────────────────────────────────────────────────────────────


class Placement(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """Which workers served a request, what of its prompt was cached, and why the first token came from
    where it came."""

    prefill_worker: str | None = None
    decode_worker: str | None = None
    way: Way | None = None
    way_reason: str | None = None
    transfer: Transfer | None = None
    """None: nothing is handed over."""
    transfer_reason: str | None = None
    """Why it is pulled."""
    first_token_by: WorkerRole | None = None
    first_token_reason: str | None = None
    num_attempts: int = 1
    predicted_hit_tokens: int | None = None
    """Prompt tokens the coordinator expected in the prefill worker's prefix cache; None: it knew nothing."""
    hit_tokens: int | None = None
    """Prompt tokens the engine found there; None: it did not say."""


class PhaseTimes(msgspec.Struct, frozen=True, kw_only=True):
    """Seconds at the coordinator, end to end: they add up to the request's latency.

    queue: submit → prefill dispatched · prefill: → prefill finished · handoff: → first token of
    the decode worker · decode: → last token. A phase that did not happen is 0.
    """

    queue_s: float = 0.0
    prefill_s: float = 0.0
    handoff_s: float = 0.0
    decode_s: float = 0.0


class RequestReport(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """The final word on a request: exactly one per accepted request."""

    outcome: Outcome
    error: ErrorReport | None = None
    finish_reason: str | None = None
    stop_reason: int | str | None = None
    phase: str | None = None
    """In which it ended; None: it completed."""
    num_prompt_tokens: int = 0
    num_prefilled_tokens: int = 0
    """Prompt tokens computed for it, over all attempts whose prefill ended; without cached ones."""
    num_output_tokens: int = 0
    """Sent to the client, whatever the outcome."""
    num_cached_tokens: int = 0
    """Prompt tokens the prefill worker had in its prefix cache."""
    num_resumes: int = 0
    """Attempts that went on from tokens the client had of an earlier one."""
    kv_bytes: int = 0
    """Bytes of KV handed from prefill to decode worker, over all attempts."""
    placement: Placement = Placement()
    phases: PhaseTimes = PhaseTimes()
    prompt_logprobs: list[TokenLogprobs | None] | None = None


class RequestDelta(Message, frozen=True, kw_only=True):
    request_id: str
    token_ids: list[int]
    text: str
    logprobs: list[TokenLogprobs] | None = None


class RequestFinished(Message, frozen=True, kw_only=True):
    request_id: str
    report: RequestReport


class RequestRefused(Message, frozen=True, kw_only=True):
    """Never accepted: nothing was computed, nothing will follow. request_id is empty when the
    frame was too broken to tell."""

    request_id: str
    error: ErrorReport


WorkerMessage = (
    RegisterWorker | Heartbeat | StepOutputs | PrefillFinished | LegFailed | KvEvents | WorkerLeaving
)
"""What a coordinator may receive from a worker."""

CoordinatorMessage = (
    WorkerAccepted
    | WorkerRefused
    | JoinTestPassed
    | RegisterAgain
    | StartPrefill
    | StartDecode
    | AbortLeg
    | StillThere
    | AskKvReplay
    | DrainWorker
    | NoMoreLegs
)
"""What a worker may receive from a coordinator."""

ClientMessage = SubmitRequest | AbortRequest
"""What a coordinator may receive from a client."""

ClientReply = RequestDelta | RequestFinished | RequestRefused
"""What a client may receive from a coordinator."""

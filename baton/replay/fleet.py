"""The coordinator's side of a replay: the production router, ledger and index over simulated workers."""

from __future__ import annotations

from dataclasses import dataclass, field, replace

from baton.contract.messages import KvEvent, WorkerCapacity, WorkerLoad
from baton.policy.chooser import Chooser
from baton.policy.expectations import Expectations
from baton.policy.fleet_pace import FleetPace, StepClock
from baton.policy.hotspot import HotspotGuard
from baton.policy.kv_feed import KvFeeds
from baton.policy.kv_index import KvIndex
from baton.policy.ledger import Ledger, Pool, WorkerAccount
from baton.policy.registry import by_name
from baton.policy.router import Router
from baton.replay.settings import ReplaySettings
from baton.scheduling.registry import by_name as scheduler_by_name
from baton.simulation import SimulatedWorker
from baton.workload import Trace, WorkloadError

BOOT_ID = "replay"


@dataclass(slots=True)
class Member:
    """One worker and what the coordinator keeps of it."""

    number: int
    worker: SimulatedWorker
    account: WorkerAccount
    has_events: bool
    num_batches: int = 0
    is_beginning: bool = False
    version: int = 0
    """Of its planned end: an end that was cut short is still in the queue of events, with an older one."""
    step_clock: StepClock = field(default_factory=StepClock)
    num_heard: int = 0
    """Steps of its plan that the coordinator has heard of."""


class Fleet:
    def __init__(self, settings: ReplaySettings, trace: Trace) -> None:
        self.settings = settings
        shape, base = settings.fleet, settings.worker
        block = trace.block_size_tokens or base.block_size_tokens
        if block % base.block_size_tokens:
            raise WorkloadError(
                f"{trace.name} hashes {block} tokens at a time, which is no multiple of the engine's "
                f"{base.block_size_tokens} per block"
            )
        self.ledger = Ledger()
        self.index: KvIndex | None = None
        if len(trace.block_hashes) and base.has_prefix_cache:
            self.index = KvIndex(block, seed=settings.seed)
            self.feeds = KvFeeds(self.index)
        self.guard = HotspotGuard() if settings.has_guard else None
        self.pace: FleetPace | None = None
        """None: stay or go is never a question, and what decode workers hold and do is not followed."""
        if settings.has_stay_or_go and self.index is not None and not shape.is_colocated:
            self.pace = FleetPace(settings.pace)
        pools = {role: Pool() for role in ("prefill", "decode", "both")}
        self.members: list[Member] = []
        roles = ["prefill"] * shape.num_prefill + ["decode"] * shape.num_decode + ["both"] * shape.num_both
        for number, role in enumerate(roles):
            has_events = self.index is not None and (role != "decode" or self.pace is not None)
            scheduler = settings.prefill_scheduler if role == "prefill" else settings.decode_scheduler
            worker = SimulatedWorker(
                replace(
                    base,
                    blocks_per_hash=block // base.block_size_tokens,
                    has_kv_events=has_events,
                    can_swap=settings.swap_link is not None,
                    # Readers come; when, is what a replay is for.
                ),
                settings.prefill_time if role == "prefill" else settings.decode_time,
                None if scheduler == "fcfs" else scheduler_by_name(scheduler),
            )
            account = self.ledger.open(
                f"{role}-{number}",
                WorkerCapacity(
                    num_blocks=base.num_blocks,
                    max_batch_size=base.max_batch_size,
                    max_model_len=base.num_blocks * base.block_size_tokens,
                    kv_bytes_per_block=settings.kv_bytes_per_token * base.block_size_tokens,
                ),
                base.block_size_tokens,
                None if role == "decode" else settings.prefill_window_tokens,
            )
            account.observe(worker.load())  # as the first heartbeat: progress counts from here
            for pool in ("prefill", "decode", "both") if role == "both" else (role,):
                pools[pool].add(account)
            self.members.append(Member(number, worker, account, has_events))
            if has_events:
                self.feeds.joined(account.slot, BOOT_ID)
        self.by_slot = {member.account.slot: member for member in self.members}
        policy = settings.prefill_policy
        if isinstance(policy, str):
            policy = by_name(policy)
        self.router = Router(
            self.ledger,
            pools["prefill"],
            pools["decode"],
            pools["both"],
            prefill_policy=policy,
            decode_policy=by_name(settings.decode_policy),
            colocated_policy=policy,
            index=self.index,
            expectations=None if self.index is None else Expectations(),
            guard=self.guard,
            seed=settings.seed,
        )
        self.chooser = Chooser(self.router, self.pace)
        self.followed: list[Member] = []
        """Workers whose decode steps matter to stay-or-go."""
        if self.pace is not None:
            self.followed = self.members[shape.num_prefill :]

    def heard(self, member: Member, sequence: int, events: tuple[KvEvent, ...], load: WorkerLoad) -> None:
        """A worker's report of one step has reached the coordinator."""
        if events:
            self.feeds.received(member.account.slot, BOOT_ID, sequence, events)
        member.account.observe(load)

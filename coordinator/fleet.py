"""The workers that are registered now: who they are, whether they may serve together, how loaded.

No I/O: the app tells it of messages and of time passing.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator

from baton.contract.codec import PROTOCOL_VERSION
from baton.contract.errors import ProtocolMismatch, RegistrationRefused, WorkerIdTaken
from baton.contract.lifecycle import PHASES, WorkerRole
from baton.contract.messages import KvLayout, RegisterWorker
from baton.policy.fleet_pace import StepClock
from baton.policy.ledger import Ledger, Pool, WorkerAccount
from coordinator.compatibility import Kind, difference

MAX_REFUSALS = 8
"""Kept for the sentence of a 503."""


class Worker:
    """One registered worker. `peer` is its connection, opaque here."""

    __slots__ = (
        "_clock_ahead_s", "account", "is_dismissed", "is_leaving", "is_on_trial", "is_refused",
        "last_heard_s", "peer", "registration", "step_clock",
    )  # fmt: skip

    def __init__(
        self, registration: RegisterWorker, peer: bytes, account: WorkerAccount, now_s: float
    ) -> None:
        self.registration = registration
        self.peer = peer
        self.last_heard_s = now_s
        self.is_leaving = False
        self.is_dismissed = False
        """Told that it may go."""
        self.is_on_trial = False
        """It gets no requests yet; see `join_test`."""
        self.is_refused = False
        """It has been told that it may not join, and will leave."""
        self.account = account
        self.step_clock = StepClock()
        self._clock_ahead_s: float | None = None
        self.hear_clock(registration.sent_s, now_s)

    def hear_clock(self, sent_s: float | None, now_s: float) -> None:
        """The worker's clock when it sent what has just been read."""
        if sent_s is not None:
            self._clock_ahead_s = sent_s - now_s

    def clock_s(self, now_s: float) -> float | None:
        """Its clock now, or less: the way of the message that told it is not known."""
        return None if self._clock_ahead_s is None else self._clock_ahead_s + now_s

    @property
    def worker_id(self) -> str:
        return self.registration.worker_id

    @property
    def role(self) -> WorkerRole:
        return self.registration.role

    @property
    def can_be_used(self) -> bool:
        return not (self.is_leaving or self.is_refused)

    @property
    def takes_legs(self) -> bool:
        """Of requests."""
        return self.can_be_used and not self.is_on_trial


class FleetView:
    """Registered workers, by id and by connection."""

    def __init__(self) -> None:
        self._by_id: dict[str, Worker] = {}
        self._by_peer: dict[bytes, Worker] = {}
        self.ledger = Ledger()
        self._accounts: dict[WorkerRole, Pool] = {phase: Pool() for phase in PHASES}
        self.colocated = Pool()
        """Those that serve both phases; they are in the pool of each phase too."""
        self.layout: KvLayout | None = None
        """What all registered workers agree on; None while there is none."""
        # Asked for every request, changed by every few thousand: kept instead of computed.
        self.has_pair = False
        """Each phase has a worker that takes new legs; one that serves both is enough."""
        self.max_model_len: int | None = None
        """Longest prompt + output that every worker accepts, in tokens; None without workers."""
        self.largest_cache_tokens = dict.fromkeys(PHASES, 0)
        """Tokens in the KV cache of the largest worker of a phase."""
        self.num_changes = 0
        self._kinds: Counter[Kind] = Counter()
        self._refusals: dict[str, tuple[WorkerRole, str]] = {}

    def __iter__(self) -> Iterator[Worker]:
        return iter(self._by_id.values())

    def get(self, worker_id: str) -> Worker | None:
        return self._by_id.get(worker_id)

    def at(self, peer: bytes) -> Worker | None:
        return self._by_peer.get(peer)

    def accounts(self, phase: WorkerRole) -> Pool:
        """Accounts of the workers that take new legs of a phase."""
        return self._accounts[phase]

    def _pools_of(self, worker: Worker) -> list[Pool]:
        pools = [self._accounts[phase] for phase in worker.role.phases]
        return [*pools, self.colocated] if worker.role is WorkerRole.BOTH else pools

    def check(self, registration: RegisterWorker, peer: bytes) -> None:
        """Raises ProtocolMismatch, RegistrationRefused or WorkerIdTaken with the reason."""
        if registration.protocol_version != PROTOCOL_VERSION:
            raise ProtocolMismatch(
                f"worker {registration.worker_id} speaks protocol {registration.protocol_version}, "
                f"this coordinator speaks {PROTOCOL_VERSION}"
            )
        if not registration.worker_id or len(registration.worker_id) > 128:
            raise RegistrationRefused(
                f"a worker id has 1 to 128 characters, this one has {len(registration.worker_id)}"
            )
        capacity = registration.capacity
        for name in ("num_blocks", "max_batch_size", "max_model_len"):
            if getattr(capacity, name) < 1:
                raise RegistrationRefused(
                    f"capacity.{name} is {getattr(capacity, name)}, expected at least 1"
                )
        if registration.layout.block_size_tokens < 1:
            raise RegistrationRefused(
                f"layout.block_size_tokens is {registration.layout.block_size_tokens}, expected at least 1"
            )
        here = self._by_id.get(registration.worker_id)
        if here is not None and here.peer != peer and here.registration.boot_id != registration.boot_id:
            raise WorkerIdTaken(
                f"worker id {registration.worker_id} is in use by process {here.registration.pid} "
                f"on {here.registration.host}"
            )
        at_peer = self._by_peer.get(peer)
        if at_peer is not None and at_peer.worker_id != registration.worker_id:
            raise RegistrationRefused(
                f"this connection is already registered as {at_peer.worker_id}, not {registration.worker_id}"
            )
        self._check_compatible(registration, here)

    def _check_compatible(self, registration: RegisterWorker, itself: Worker | None) -> None:
        newcomer = Kind.of(registration)
        own = None if itself is None else Kind.of(itself.registration)
        for kind, count in self._kinds.items():
            if count == 1 and kind == own:  # what it was before it registered again
                continue
            if (why := difference(newcomer, kind)) is not None:
                raise RegistrationRefused(f"worker {registration.worker_id} cannot join: {why}")

    def refused(self, registration: RegisterWorker, reason: str) -> None:
        """Remembered until somebody serves those phases, for `why_not_ready`."""
        self._refusals[registration.worker_id] = (registration.role, reason)
        while len(self._refusals) > MAX_REFUSALS:
            del self._refusals[next(iter(self._refusals))]
        self._changed()

    def why_not_ready(self) -> str | None:
        """None: there is a pair."""
        missing = [phase for phase in PHASES if not self._accounts[phase]]
        if not missing:
            return None
        reasons = [
            reason
            for role, reason in self._refusals.values()
            if any(phase in missing for phase in role.phases)
        ]
        text = f"no {' and no '.join(phase.value for phase in missing)} worker is ready"
        return f"{text}; {'; '.join(reasons)}" if reasons else text

    def add(self, registration: RegisterWorker, peer: bytes, now_s: float) -> Worker:
        """Call after `check`; a worker that registers again starts with an empty account."""
        self.remove(registration.worker_id)
        account = self.ledger.open(
            registration.worker_id,
            registration.capacity,
            registration.layout.block_size_tokens,
            registration.prefill_window_tokens,
        )
        worker = Worker(registration, peer, account, now_s)
        self._by_id[worker.worker_id] = worker
        self._by_peer[peer] = worker
        for pool in self._pools_of(worker):
            pool.add(worker.account)
        self.layout = registration.layout
        self._kinds[Kind.of(registration)] += 1
        served = set(worker.role.phases)
        self._refusals = {
            worker_id: refusal
            for worker_id, refusal in self._refusals.items()
            if worker_id != worker.worker_id and not served.issuperset(refusal[0].phases)
        }
        self._changed()
        return worker

    def mark_leaving(self, worker: Worker) -> None:
        """The worker gets no new legs; those it has go on."""
        self._remove_from_pools(worker)
        worker.is_leaving = True
        self._changed()

    def put_on_trial(self, worker: Worker) -> None:
        """It is a member and gets no legs of requests, until `let_in`."""
        self._remove_from_pools(worker)
        worker.is_on_trial = True
        self._changed()

    def let_in(self, worker: Worker) -> None:
        if worker.is_on_trial:
            worker.is_on_trial = False
            if worker.takes_legs:
                for pool in self._pools_of(worker):
                    pool.add(worker.account)
            self._changed()

    def _remove_from_pools(self, worker: Worker) -> None:
        if worker.takes_legs:
            for pool in self._pools_of(worker):
                pool.remove(worker.account)

    def remove(self, worker_id: str) -> Worker | None:
        worker = self._by_id.pop(worker_id, None)
        if worker is None:
            return None
        self._by_peer.pop(worker.peer, None)
        self._remove_from_pools(worker)
        self.ledger.close(worker.account)
        self._kinds -= Counter([Kind.of(worker.registration)])
        if not self._by_id:
            self.layout = None
        self._changed()
        return worker

    def _changed(self) -> None:
        self.num_changes += 1
        self.has_pair = all(self._accounts.values())
        self.max_model_len = min((w.registration.capacity.max_model_len for w in self), default=None)
        for phase, accounts in self._accounts.items():
            sizes = (a.capacity.num_blocks * a.block_size_tokens for a in accounts)
            self.largest_cache_tokens[phase] = max(sizes, default=0)

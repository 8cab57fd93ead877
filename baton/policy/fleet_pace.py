"""How fast this fleet is, learnt from what its workers report. No I/O.

    prefill   tokens, pairs      → seconds from first step to first token, of prompts computed alone
    decode    batch, context     → seconds between two steps of a decode worker, every eighth
    hand-off  bytes to move      → seconds from prefill's end to the decode worker's first token

Each is a non-negative fit over about the last thousand measurements. Workers of one phase are taken
to be alike, and a prompt to cost a decode worker what it costs a prefill worker on top of a step of
its own. Nothing is known until each has been measured often enough, and until prompts differed in
length: from equal ones nobody can tell what half of one costs. Until then every prompt goes.
"""

from __future__ import annotations

from collections.abc import Callable

from baton.policy.ledger import WorkerAccount
from baton.policy.stay_or_go import Pace
from baton.step_time.base import prefill_pairs
from baton.step_time.linear import LinearStepTime
from baton.step_time.running_fit import RunningFit

MIN_MEASURED = 32
MIN_SPREAD = 0.1
"""Of prompt lengths: standard deviation over mean."""
STEPS_PER_MEASUREMENT = 8
"""A step's time differs little from the next one's, and this is the hot path."""
MANY_MEASURED = 256
REQUESTS_PER_MEASUREMENT = 4
"""Once there are many."""
UNKNOWN = Pace(
    prefill=LinearStepTime(base_s=0.0),
    decode=LinearStepTime(base_s=0.0),
    handoff_s=0.0,
    handoff_per_byte_s=0.0,
)
BETWEEN_LOOKS, MAX_BETWEEN_FITS = 4, 512
"""Measurements between two looks whether the pace can be known, and at most between two fits."""


class StepClock:
    """When a worker's latest step was heard of, if the next one follows at once."""

    __slots__ = ("last_s",)

    def __init__(self) -> None:
        self.last_s: float | None = None


class FleetPace:
    def __init__(self, given: Pace | None = None) -> None:
        """`given`: known already, nothing is learnt."""
        self._given = given
        self._prefill = RunningFit(3)
        self._decode = RunningFit(3)
        self._handoff = RunningFit(2)
        self._num_prefills = self._num_steps = self._num_handoffs = 0
        self._pace: Pace | None = None
        self._next_fit_at = 0
        self._least = UNKNOWN
        self._next_least_at = MIN_MEASURED

    @property
    def num_measured(self) -> dict[str, float]:
        return {
            "prefill": self._prefill.num_added,
            "decode": self._decode.num_added,
            "handoff": self._handoff.num_added,
        }

    def prefilled(self, num_new_tokens: int, num_hit_tokens: int, prefill_s: float) -> None:
        """A prompt that was alone on its worker."""
        self._num_prefills += 1
        if self._num_prefills > MANY_MEASURED and self._num_prefills % REQUESTS_PER_MEASUREMENT:
            return
        pairs = prefill_pairs(num_new_tokens, num_hit_tokens)
        self._prefill.add((1.0, float(num_new_tokens), pairs), prefill_s)

    def stepped(self, num_decodes: int, num_context_tokens: int, step_s: float) -> None:
        """A decode step that followed another one at once, without prompts in it."""
        self._num_steps += 1
        if self._num_steps % STEPS_PER_MEASUREMENT == 0:
            self._decode.add((1.0, float(num_decodes), float(num_context_tokens)), step_s)

    def heard_step(self, clock: StepClock, account: WorkerAccount, num_decodes: int, now_s: float) -> None:
        """After `account.observe`. A step that only got prompts on, and one after a pause, tell nothing."""
        last_s = clock.last_s
        is_busy = num_decodes > 0 and account.load.num_running > 0 and not account.num_waiting
        clock.last_s = now_s if is_busy else None
        if last_s is not None and num_decodes and not account.num_waiting:
            self.stepped(num_decodes, account.num_kv_tokens, now_s - last_s)

    def heard_row(
        self,
        clock: StepClock,
        account: WorkerAccount,
        num_decodes: int,
        num_steps: int,
        end_s: Callable[[int], float],
    ) -> None:
        """As `heard_step` for each of several steps of the same sequences, one right after the other;
        before their tokens are put on the account. `end_s(n)`: when the n-th of them ended, from 1."""
        if account.num_waiting or not num_decodes:
            clock.last_s = None
            return
        start_s = clock.last_s
        first = 1 if start_s is not None else 2
        num_context_tokens = account.num_kv_tokens
        skipped = -(self._num_steps + 1) % STEPS_PER_MEASUREMENT
        for n in range(first + skipped, num_steps + 1, STEPS_PER_MEASUREMENT):
            began_s = end_s(n - 1) if n > 1 else start_s
            assert began_s is not None
            context = num_context_tokens + num_decodes * (n - 1)
            self._decode.add((1.0, float(num_decodes), float(context)), end_s(n) - began_s)
        self._num_steps += max(0, num_steps + 1 - first)
        clock.last_s = end_s(num_steps) if account.load.num_running > 0 else None

    def handed_over(self, num_bytes: float, handoff_s: float) -> None:
        self._num_handoffs += 1
        if self._num_handoffs > MANY_MEASURED and self._num_handoffs % REQUESTS_PER_MEASUREMENT:
            return
        self._handoff.add((1.0, num_bytes), handoff_s)

    def pace(self) -> Pace | None:
        """As given or last fitted; None while too little is known."""
        if self._given is not None:
            return self._given
        num_added = self._prefill.num_added + self._handoff.num_added
        if num_added >= self._next_fit_at:
            self._pace = self._fit()
            is_known = self._pace is not None
            self._next_fit_at = num_added + (
                min(MAX_BETWEEN_FITS, max(MIN_MEASURED, num_added // 4)) if is_known else BETWEEN_LOOKS
            )
        return self._pace

    def least(self) -> Pace:
        """As far as it is known: what has not been measured often enough takes no time."""
        if (pace := self.pace()) is not None:
            return pace
        num_added = self._prefill.num_added + self._decode.num_added + self._handoff.num_added
        if num_added >= self._next_least_at:
            self._next_least_at = num_added + MIN_MEASURED
            self._least = self._fit_known()
        return self._least

    def _fit(self) -> Pace | None:
        is_known = _is_known(self._prefill, MIN_SPREAD) and all(map(_is_known, (self._decode, self._handoff)))
        return self._fit_known() if is_known else None

    def _fit_known(self) -> Pace:
        prefill_base, per_token, per_pair = _coefficients(self._prefill, 3, MIN_SPREAD)
        decode_base, per_decode, per_context = _coefficients(self._decode, 3)
        handoff_base, per_byte = _coefficients(self._handoff, 2)
        return Pace(
            prefill=LinearStepTime(
                base_s=prefill_base, per_prefill_token_s=per_token, per_prefill_pair_s=per_pair
            ),
            decode=LinearStepTime(
                base_s=decode_base,
                per_prefill_token_s=per_token,
                per_prefill_pair_s=per_pair,
                per_decode_s=per_decode,
                per_context_token_s=per_context,
            ),
            handoff_s=handoff_base,
            handoff_per_byte_s=per_byte,
        )


def _is_known(fit: RunningFit, min_spread: float = 0.0) -> bool:
    return fit.num_added >= MIN_MEASURED and (not min_spread or fit.spread(1) >= min_spread)


def _coefficients(fit: RunningFit, num_terms: int, min_spread: float = 0.0) -> tuple[float, ...]:
    return fit.coefficients() if _is_known(fit, min_spread) else (0.0,) * num_terms

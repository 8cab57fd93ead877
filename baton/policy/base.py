"""The two choices of routing, as interfaces. One small class per policy, each in its own file."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from baton.policy.ledger import WorkerAccount


@dataclass(frozen=True, slots=True, kw_only=True)
class RequestFacts:
    """What a policy may know of a request before it runs."""

    num_prompt_tokens: int
    num_expected_output_tokens: int


class PrefillPolicy(Protocol):
    """Chooses who computes the prompt."""

    name: str

    def choose(self, facts: RequestFacts, accounts: Sequence[WorkerAccount]) -> WorkerAccount | None:
        """`accounts` holds the workers that may take the request now. None: wait."""


class DecodePolicy(Protocol):
    """Chooses who continues, among workers with room for prompt and expected growth."""

    name: str

    def choose(self, facts: RequestFacts, accounts: Sequence[WorkerAccount]) -> WorkerAccount | None:
        """None: nobody has room; the request stays queued."""


def num_blocks_wanted(facts: RequestFacts, account: WorkerAccount) -> int:
    """Blocks for the prompt and the output we expect. Never more than the worker has in all, so
    that a request the worker can serve is not kept waiting for ever by a pessimistic estimate."""
    tokens = facts.num_prompt_tokens + facts.num_expected_output_tokens
    wanted = account.num_blocks_for(tokens)
    return min(wanted, max(account.capacity.num_blocks, account.num_blocks_for(facts.num_prompt_tokens + 1)))

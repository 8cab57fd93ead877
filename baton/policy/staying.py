"""Whether a prompt is computed where it will be decoded: gathers the facts for `stay_or_go`. No I/O.

The question comes up only where the decode worker holds more of the prompt than the prefill worker
does. Otherwise staying means at least as much work, done by a worker that has other things to do: an
idle moment of the decode worker is no reason, since prompts that stay there harm those that come.
"""

from __future__ import annotations

from baton.policy.decision import StayOrGo
from baton.policy.ledger import WorkerAccount
from baton.policy.router import KnownHits
from baton.policy.stay_or_go import Pace, Question, Rest, costs

NO_HITS = "what workers hold is not known"
NOT_MORE = "the decode worker holds no more of the prompt"
NO_PACE = "the fleet's pace is not known yet"


def ask(
    num_prompt_tokens: int,
    hits: KnownHits | None,
    prefill: WorkerAccount,
    decode: WorkerAccount,
    pace: Pace | None,
) -> StayOrGo | str:
    """Or why the question does not come up: then the prompt goes."""
    if hits is None:
        return NO_HITS
    held = hits.tokens_by_slot
    num_there, num_at_prefill = held.item(decode.slot), held.item(prefill.slot)
    if num_there <= num_at_prefill:
        return NOT_MORE
    if pace is None:
        return NO_PACE
    question = Question(
        num_prompt_tokens=num_prompt_tokens,
        there=_rest(decode, num_there),
        # The engine counts prompts it is computing as running; those are queued tokens here.
        num_decodes=max(0, decode.load.num_running - decode.num_waiting),
        num_context_tokens=decode.num_kv_tokens,
        prefill=_rest(prefill, num_at_prefill),
        num_bytes_to_move=num_bytes_to_move(num_prompt_tokens - num_there, decode),
    )
    return StayOrGo(question=question, pace=pace, costs=costs(question, pace))


def num_bytes_to_move(num_missing_tokens: int, decode: WorkerAccount) -> int:
    """A decode worker reads only the blocks that it does not hold."""
    return decode.num_blocks_for(num_missing_tokens) * decode.capacity.kv_bytes_per_block


def _rest(account: WorkerAccount, num_hit_tokens: int) -> Rest:
    return Rest(
        num_hit_tokens=num_hit_tokens,
        num_queued_tokens=account.num_queued_tokens,
        num_waiting=account.num_waiting,
    )

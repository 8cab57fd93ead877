"""Whether two greedy answers to one prompt came from the same numbers. No I/O.

Tokens alone do not tell. Two right answers may part at a near tie, because batches and kernels round
differently; two wrong ones may agree by chance, and a tiny model may say one token for ever. Log
probabilities tell both: rounding moves them by hundredths, other weights or other KV by whole numbers.
"""

from __future__ import annotations

from collections.abc import Sequence

from baton.contract.messages import TokenLogprobs

NUM_ALTERNATIVES = 10
"""Asked for per position. A right answer's token is never out of them: ten tokens would have to lie
within rounding of the likeliest."""

MAX_LOGPROB_GAP = 0.5
"""Nats. Rounding in bfloat16 moves a log probability by 0.02 to 0.1."""


def difference(ours: Sequence[TokenLogprobs], theirs: Sequence[TokenLogprobs]) -> str | None:
    """What is not the same, as the end of a sentence; None: the same numbers. Positions count up to the
    first at which another token was sampled: after it the two continue different texts."""
    if len(ours) != len(theirs) or not all(ours) or not all(theirs):
        return f"it has {len(ours)} tokens with log probabilities instead of {len(theirs)}"
    for position, (mine, other) in enumerate(zip(ours, theirs, strict=True)):
        sampled, wanted = mine[0].token_id, other[0].token_id
        here = {entry.token_id: entry.logprob for entry in mine}
        there = {entry.token_id: entry.logprob for entry in other}
        if sampled not in there or wanted not in here:
            return f"token {position} is {sampled} instead of {wanted}"
        token_id, gap = max(
            ((token_id, abs(here[token_id] - there[token_id])) for token_id in here if token_id in there),
            key=lambda pair: pair[1],
        )
        if gap > MAX_LOGPROB_GAP:
            return (
                f"the log probability of {token_id} as token {position} is {here[token_id]:.2f} instead of "
                f"{there[token_id]:.2f}"
            )
        if sampled != wanted:
            return None
    return None

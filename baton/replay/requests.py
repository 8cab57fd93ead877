"""A trace's requests as the router and the workers want them: packed tokens and lists of hashes.

Tokens are made so that two prompts agree exactly where their hashes do: a block's tokens all equal the
number of its hash, and what no hash names belongs to the request alone. Hashes are renumbered from 1,
so that a number is a token.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from baton.policy.router import KnownHits
from baton.workload import Trace

TOKEN_DTYPE = np.dtype("<u4")


class Request:
    """One request on its way through the replay."""

    __slots__ = (
        "arrival_s", "decode", "dispatched_s", "finished_s", "first_token_s", "hashes", "hits", "index",
        "is_alone", "is_expired", "is_stay", "leg_id", "num_bytes_to_move", "num_cached_tokens",
        "num_output_tokens", "num_predicted_tokens", "num_prompt_tokens", "packed", "prefill", "prefilled_s",
    )  # fmt: skip

    def __init__(self, index: int, arrival_s: float, num_prompt_tokens: int, num_output_tokens: int) -> None:
        self.index = index
        self.leg_id = str(index)
        self.arrival_s = arrival_s
        self.num_prompt_tokens = num_prompt_tokens
        self.num_output_tokens = num_output_tokens
        self.hashes: list[int] = []
        self.packed = b""
        self.hits: KnownHits | None = None
        self.prefill = -1
        """Number of the worker, -1 before dispatch."""
        self.decode = -1
        self.is_stay = False
        """The decode worker computes the prompt, since it holds most of it."""
        self.is_alone = False
        """No other prompt waited where it is computed."""
        self.num_bytes_to_move = 0
        """KV that the decode worker did not hold when it was chosen."""
        self.dispatched_s = 0.0
        self.prefilled_s = 0.0
        self.first_token_s = 0.0
        self.finished_s = 0.0
        self.num_predicted_tokens = 0
        """Hits, when it was dispatched."""
        self.num_cached_tokens = 0
        """Hits, as the worker found them."""
        self.is_expired = False


class Prompts:
    def __init__(self, trace: Trace) -> None:
        self._trace = trace
        self._numbers: list[NDArray[np.uint32]] = []
        self._num_known = 0
        if len(trace.block_hashes):
            lengths = [len(hashes) for hashes in trace.block_hashes]
            known, numbers = np.unique(np.concatenate(list(trace.block_hashes)), return_inverse=True)
            self._num_known = len(known)
            self._numbers = np.split((numbers + 1).astype(np.uint32), np.cumsum(lengths)[:-1])

    def with_first_token(self, request: Request) -> bytes:
        """`packed` for a decode worker that continues from the first token. It makes a block full that
        the prompt leaves one short; then it is one of the tokens that block's hash stands for."""
        packed, block_size = request.packed, self._trace.block_size_tokens
        if self.has_hashes and (request.num_prompt_tokens + 1) % block_size == 0:
            packed += packed[-TOKEN_DTYPE.itemsize :]
        return packed

    @property
    def has_hashes(self) -> bool:
        return self._num_known > 0

    def fill(self, request: Request) -> None:
        """Before its dispatch; a whole trace's tokens would be gigabytes."""
        if not self.has_hashes:
            return
        numbers = self._numbers[request.index]
        request.hashes = numbers.tolist()
        tokens = np.repeat(numbers, self._trace.block_size_tokens)[: request.num_prompt_tokens]
        missing = request.num_prompt_tokens - len(tokens)
        if missing:
            own = np.full(missing, self._num_known + 1 + request.index, TOKEN_DTYPE)
            tokens = np.concatenate([tokens, own])
        request.packed = tokens.astype(TOKEN_DTYPE, copy=False).tobytes()

"""The simulated engine's model: the next token follows from everything before it, by checksum.

The "KV cache" of a token sequence is the CRC-32 of its packed ids. It can be continued from any
prefix, so a decode worker that was handed the right KV prints exactly what one worker alone would
have printed, and one that was handed another prompt's KV prints something else: the hand-off is
tested, not assumed. The checksum is picked apart into one of 27 characters, so a token's text is
that character. A seed (with temperature > 0) changes the sequence; without a seed sampling is
greedy, whatever the temperature. Alternatives have probability 1/2, 1/4, 1/8 … by rank.

What the model cannot do it refuses (`unsupported`), rather than answer as if it had.
"""

from __future__ import annotations

import math
from zlib import crc32

from baton.contract.messages import SequenceDelta, TokenLogprobs, TopLogprob
from baton.contract.sampling import SamplingSpec
from baton.contract.tokens import TOKEN_BYTES, num_token_ids, unpack_token_ids

EOS_TOKEN_ID = 0
VOCABULARY = tuple(ord(character) for character in "abcdefghijklmnopqrstuvwxyz ")
_SIZE = len(VOCABULARY)
_PACKED = {token: token.to_bytes(TOKEN_BYTES, "little") for token in (EOS_TOKEN_ID, *VOCABULARY)}
_TEXT = {token: chr(token) for token in VOCABULARY} | {EOS_TOKEN_ID: ""}

# Odd multipliers spread neighbouring checksums over all bits (Knuth's golden-ratio hash).
_SPREAD = 0x9E3779B1
_SPREAD_SEED = 0x85EBCA6B
_MASK = 0xFFFFFFFF


def unsupported(sampling: SamplingSpec) -> str | None:
    """The field this model cannot honour, or None. Knobs that only reshape probabilities
    (temperature, top_p, penalties …) are accepted: the greedy answer does not depend on them."""
    for name in ("structured_output", "logit_bias", "bad_words", "allowed_token_ids"):
        if getattr(sampling, name):
            return name
    return None


def kv_of(packed: bytes | memoryview, kv: int = 0) -> int:
    """The KV after `packed`, continued from the KV of what came before it."""
    return crc32(packed, kv)


def token_text(token_id: int) -> str:
    return _TEXT.get(token_id, f" w{token_id}")


def ranked(tokens: list[int]) -> TokenLogprobs:
    return [
        TopLogprob(token, -(rank + 1) * math.log(2), rank + 1, token_text(token))
        for rank, token in enumerate(tokens)
    ]


def prompt_logprobs(packed: bytes, num_alternatives: int) -> list[TokenLogprobs | None]:
    """As vLLM lays them out: nothing for the first token; every other one was the likeliest."""
    view = memoryview(packed)
    positions: list[TokenLogprobs | None] = [None]
    kv = kv_of(view[:TOKEN_BYTES])
    for start in range(TOKEN_BYTES, len(packed), TOKEN_BYTES):
        token_bytes = view[start : start + TOKEN_BYTES]
        token = int.from_bytes(token_bytes, "little")
        others = [other for other in _by_rank(kv) if other != token][: max(0, num_alternatives - 1)]
        positions.append(ranked([token, *others]))
        kv = kv_of(token_bytes, kv)
    return positions


def _by_rank(kv: int, salt: int = 0) -> list[int]:
    first = (((kv ^ salt) * _SPREAD & _MASK) >> 16) % _SIZE
    return [VOCABULARY[(first + rank) % _SIZE] for rank in range(_SIZE)]


class SimulatedSequence:
    """Prompt and output of one leg. `kv` is None until the prompt is computed or fetched."""

    __slots__ = (
        "_is_plain", "_kv", "_limit", "_mean_output_tokens", "_num_tail_characters", "_salt", "_sampling",
        "_stop_tokens", "_tail", "handoff_id", "num_output_tokens", "num_prompt_tokens", "packed_prompt",
    )  # fmt: skip

    def __init__(
        self,
        handoff_id: str,
        packed_prompt: bytes,
        sampling: SamplingSpec,
        *,
        max_model_len: int,
        mean_output_tokens: int | None,
        num_given_tokens: int = 0,
    ) -> None:
        """`num_given_tokens`: as in `StartDecode`."""
        self.handoff_id = handoff_id
        self.packed_prompt = packed_prompt
        self.num_prompt_tokens = num_token_ids(packed_prompt)
        self.num_output_tokens = 0
        self._sampling = sampling
        self._limit = min(sampling.max_tokens, max_model_len - self.num_prompt_tokens)
        self._mean_output_tokens = None if sampling.ignore_eos else mean_output_tokens
        seed = sampling.seed if sampling.temperature > 0 else None
        self._salt = 0 if seed is None else (seed + 1) * _SPREAD_SEED & _MASK
        self._stop_tokens = frozenset(sampling.stop_token_ids)
        # As vLLM: text that may turn out to be the start of a stop string is not given out yet,
        # unless the stop string is wanted in the output.
        self._num_tail_characters = max(0, max(map(len, sampling.stop), default=0) - 1)
        self._tail = self._tail_of(num_given_tokens)
        self._is_plain = not (sampling.stop or self._stop_tokens or self._mean_output_tokens) and (
            sampling.logprobs is None
        )
        self._kv: int | None = None

    def _tail_of(self, num_given_tokens: int) -> str:
        """What of output that another worker generated may be the beginning of a stop string."""
        num_tokens = min(num_given_tokens, self._num_tail_characters)
        if not num_tokens:
            return ""
        given = unpack_token_ids(self.packed_prompt[-num_tokens * TOKEN_BYTES :])
        return "".join(map(token_text, given))[-self._num_tail_characters :]

    @property
    def num_tokens(self) -> int:
        return self.num_prompt_tokens + self.num_output_tokens

    @property
    def num_tokens_at_most(self) -> int:
        return self.num_prompt_tokens + self._limit

    def compute(self) -> None:
        """The prompt's KV, computed here."""
        self._kv = kv_of(self.packed_prompt)

    def continue_from(self, kv: int, num_tokens: int) -> None:
        """The KV of the first `num_tokens` came from elsewhere; the rest is computed here."""
        self._kv = kv_of(memoryview(self.packed_prompt)[num_tokens * TOKEN_BYTES :], kv)

    @property
    def has_kv(self) -> bool:
        return self._kv is not None

    @property
    def kv(self) -> int:
        assert self._kv is not None, f"{self.handoff_id} has no KV yet"
        return self._kv

    def advance(self, given: int | None = None) -> SequenceDelta:
        """Sample one token, or take the one that another worker has sampled."""
        if given is not None or not self._is_plain:
            return self._advance_carefully(given)
        kv = self.kv
        token = VOCABULARY[(((kv ^ self._salt) * _SPREAD & _MASK) >> 16) % _SIZE]
        self._kv = crc32(_PACKED[token], kv)
        self.num_output_tokens += 1
        if self.num_output_tokens >= self._limit:
            return SequenceDelta(self.handoff_id, [token], _TEXT[token], "length", num_cached_tokens=0)
        return SequenceDelta(self.handoff_id, [token], _TEXT[token])

    def _advance_carefully(self, given: int | None) -> SequenceDelta:
        """`advance` for a sequence that may stop early or that reports logprobs."""
        sampling = self._sampling
        token, *others = self._candidates()
        if given is not None and given != token:
            token, others = given, [token, *(other for other in others if other != given)]
        self._kv = crc32(token.to_bytes(TOKEN_BYTES, "little"), self.kv)
        self.num_output_tokens += 1
        finish_reason: str | None = None
        stop_reason: int | str | None = None
        text = token_text(token)
        if self.num_output_tokens >= self._limit:
            finish_reason = "length"
        # Checked after the length, so that a stop in the last token is reported as a stop.
        if token == EOS_TOKEN_ID:
            finish_reason = "stop"
        elif token in self._stop_tokens and self.num_output_tokens > sampling.min_tokens:
            finish_reason, stop_reason = "stop", token
            if not sampling.include_stop_str_in_output:
                text = ""
        if sampling.stop:
            text, match = self._cut_at_stop_string(text, is_last=finish_reason is not None)
            if match is not None:
                finish_reason, stop_reason = "stop", match
        logprobs = None
        if sampling.logprobs is not None:
            logprobs = [ranked([token, *others[: max(0, sampling.logprobs - 1)]])]
        return SequenceDelta(
            self.handoff_id, [token], text, finish_reason, stop_reason, logprobs, 0 if finish_reason else None
        )

    def _cut_at_stop_string(self, text: str, *, is_last: bool) -> tuple[str, str | None]:
        """(the text to give out now, the stop string that ended the sequence)"""
        is_tail_given = self._sampling.include_stop_str_in_output
        text = self._tail + text
        start = len(self._tail) if is_tail_given else 0
        if self.num_output_tokens > self._sampling.min_tokens:
            # A match must end in the new text: an earlier one was looked for, or was before min_tokens.
            found = [
                (at, stop)
                for stop in self._sampling.stop
                if stop and (at := text.find(stop, max(0, len(self._tail) + 1 - len(stop)))) >= 0
            ]
            if found:
                at, stop = min(found)
                return text[start : at + len(stop) if is_tail_given else at], stop
        end = len(text) if is_last or is_tail_given else max(0, len(text) - self._num_tail_characters)
        self._tail = text[max(0, len(text) - self._num_tail_characters) :]
        return text[start:end], None

    def _candidates(self) -> list[int]:
        """Tokens by rank; the likeliest is sampled. Before `min_tokens` nothing that stops is among
        them, unless everything does."""
        tokens = _by_rank(self.kv, self._salt)
        if self.num_output_tokens < self._sampling.min_tokens:
            return [token for token in tokens if token not in self._stop_tokens] or tokens
        mean = self._mean_output_tokens
        if mean is not None and ((self.kv ^ self._salt) * _SPREAD_SEED & _MASK) >> 8 < (_MASK >> 8) // mean:
            return [EOS_TOKEN_ID, *tokens]
        return tokens

"""Text of a leg that goes on from tokens another worker generated.

To the model those tokens are the end of the prompt. To the client they are output: a character may be
half given, and a stop string may begin in them. So they are read again here by vLLM's own detokenizer, token
by token as when they were generated, and what that yields is thrown away because the client has it. What
is left is the detokenizer's state of a run that was never interrupted. (Primed with a prompt that ends inside
a character it would give the whole prompt as new text.)
"""

from __future__ import annotations

import copy
from typing import Any

from vllm.v1.engine.detokenizer import IncrementalDetokenizer

NUM_NAMED_BY = 4
"""Tokens before it that vLLM looks at to name a token of a logprob: a UTF-8 character has so many bytes."""


def read_again(output_processor: Any, request: Any, num_given_tokens: int) -> None:
    """`request` has just been added to vLLM's output processor."""
    state = output_processor.request_states[request.request_id]
    given = request.prompt_token_ids[-num_given_tokens:]
    state.detokenizer = _detokenizer_after(output_processor.tokenizer, request, given)
    positions = state.logprobs_processor.logprobs
    if isinstance(positions, list):
        # Their values are never given out: deltas are cut from the end.
        positions.extend({token_id: None} for token_id in given[-NUM_NAMED_BY:])


def _detokenizer_after(tokenizer: Any, request: Any, given: list[int]) -> Any:
    earlier = copy.copy(request)
    earlier.prompt_token_ids = request.prompt_token_ids[: -len(given)]
    detokenizer: Any = IncrementalDetokenizer.from_new_request(tokenizer, earlier)
    if not hasattr(detokenizer, "stop"):  # without a tokenizer there is no text
        return detokenizer
    # Whatever they were looked for in these tokens, they were not found, or it was too early.
    stop, detokenizer.stop = detokenizer.stop, []
    for token_id in given:
        detokenizer.update([token_id], False)
        detokenizer.get_next_output_text(False, True)
    detokenizer.stop = stop
    if detokenizer.min_tokens:
        detokenizer.min_tokens += len(given)  # it counts all output
    return detokenizer

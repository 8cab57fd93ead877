"""Text that goes on after tokens of another worker is the text of one run, wherever it was cut. Imports
vLLM (seconds), starts nothing."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

pytestmark = pytest.mark.filterwarnings("default")

TEXT = "wörld € 😀 end STOP more"  # characters of 1 to 4 bytes, each byte a token


def request(prompt: list[int], sampling: dict[str, Any]) -> Any:
    from vllm.sampling_params import RequestOutputKind, SamplingParams

    params = SamplingParams(max_tokens=100, output_kind=RequestOutputKind.DELTA, **sampling)
    return SimpleNamespace(
        request_id="r", prompt_token_ids=prompt, prompt_embeds=None, sampling_params=params
    )


def read(detokenizer: Any, token_ids: list[int]) -> tuple[list[str], str | None]:
    """(text of each token, the stop string that ended it)"""
    texts = []
    for token_id in token_ids:
        stop = detokenizer.update([token_id], False)
        texts.append(detokenizer.get_next_output_text(stop is not None, True))
        if stop is not None:
            return texts, stop
    return texts, None


@pytest.mark.parametrize(
    "sampling",
    [
        {},
        {"stop": ["d ST"]},
        {"stop": ["d ST"], "include_stop_str_in_output": True},
        {"stop": ["€", "nd S"], "min_tokens": 17},  # the first is too early to end it
    ],
    ids=["plain", "stop", "stop-in-output", "min-tokens"],
)
def test_text_after_a_cut_is_that_of_an_uncut_run(demo_model: Path, sampling: dict[str, Any]) -> None:
    """Cut after each token: inside characters, inside the stop string, inside the text that is held back
    because a stop string may begin in it."""
    from transformers import AutoTokenizer
    from vllm.v1.engine.detokenizer import IncrementalDetokenizer

    from baton.engine.vllm.given_tokens import read_again

    tokenizer = AutoTokenizer.from_pretrained(str(demo_model))
    prompt, output = tokenizer.encode("hello "), tokenizer.encode(TEXT)
    whole, stop = read(IncrementalDetokenizer.from_new_request(tokenizer, request(prompt, sampling)), output)
    assert "".join(whole) in TEXT and (stop is not None) == ("stop" in sampling)
    for num_given in range(1, len(whole)):
        left = sampling | {"min_tokens": max(0, sampling.get("min_tokens", 0) - num_given)}
        again = request(prompt + output[:num_given], left)
        state = SimpleNamespace(detokenizer=None, logprobs_processor=SimpleNamespace(logprobs=None))
        processor = SimpleNamespace(tokenizer=tokenizer, request_states={"r": state})
        read_again(processor, again, num_given)
        assert read(state.detokenizer, output[num_given:]) == (whole[num_given:], stop), num_given

"""Impossible sampling options are refused by name before anything is computed."""

from __future__ import annotations

import pytest

from baton.contract.errors import InvalidRequest
from baton.contract.sampling import SamplingSpec, ServiceWish, StructuredOutput, check_sampling


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"max_tokens": 0}, "max_tokens is 0, accepted: at least 1"),
        ({"min_tokens": 9}, "min_tokens is 9, accepted: 0 to max_tokens .8."),
        ({"temperature": -1.0}, "temperature is -1.0"),
        ({"temperature": float("nan")}, "temperature is nan"),
        ({"top_p": 0.0}, "top_p is 0.0"),
        ({"top_k": -5}, "top_k is -5"),
        ({"presence_penalty": 3.0}, "presence_penalty is 3.0, accepted: -2 to 2"),
        ({"logprobs": 21}, "logprobs is 21, accepted: 0 to 20"),
        ({"stop": ["x"] * 17}, "stop has 17 strings, at most 16"),
        ({"stop": [""]}, "empty string"),
        ({"service": ServiceWish(priority=2**40)}, "priority is 1099511627776"),
        ({"service": ServiceWish(key="k" * 129)}, "service.key has 129 characters, at most 128"),
        ({"service": ServiceWish(deadline_s=0.0)}, "deadline_s is 0.0, accepted: more than 0 seconds"),
        ({"service": ServiceWish(expected_output_tokens=0)}, "expected_output_tokens is 0"),
        ({"logit_bias": {3: 200.0}}, "logit_bias of token 3 is 200.0"),
        (
            {"structured_output": StructuredOutput(regex="a", choice=["b"])},
            "sets 2 constraints .regex, choice., expected one",
        ),
    ],
    ids=lambda v: str(v)[:40],
)
def test_refused_with_numbers(options, sentence):
    with pytest.raises(InvalidRequest, match=sentence):
        check_sampling(SamplingSpec(**{"max_tokens": 8} | options))


def test_ordinary_options_pass():
    check_sampling(SamplingSpec(max_tokens=8, min_tokens=8, temperature=0.0, top_k=-1, seed=-3, stop=["\n"]))

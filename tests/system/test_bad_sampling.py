"""Requests that are well formed and yet nobody's to serve, on the real engine: each ends in an answer or a
typed error in bounded time, and no engine dies of one."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest

from baton.client import AsyncBatonClient
from baton.contract.errors import RequestError, ServingError
from baton.contract.sampling import StructuredOutput
from tests.system.fleet import Fleet

GREEDY = {"max_tokens": 6, "temperature": 0.0}
ANSWER_WITHIN_S = 30.0

DEEP_SCHEMA: dict[str, Any] = {"type": "object"}
for _ in range(200):
    DEEP_SCHEMA = {"type": "object", "properties": {"a": DEEP_SCHEMA}}

NASTY: dict[str, dict[str, Any]] = {
    "stop id beyond the vocabulary": {"stop_token_ids": [10**6]},
    "stop id beyond the vocabulary with min_tokens": {"stop_token_ids": [10**6], "min_tokens": 3},
    "stop id beyond 32 bits with min_tokens": {"stop_token_ids": [2**40], "min_tokens": 3},
    "negative stop id with min_tokens": {"stop_token_ids": [-7], "min_tokens": 3},
    "bias of a token beyond the vocabulary": {"logit_bias": {10**6: 1.0}},
    "bias of a negative token": {"logit_bias": {-3: 1.0}},
    "allowed token beyond the vocabulary": {"allowed_token_ids": [5, 10**6]},
    "no allowed token": {"allowed_token_ids": []},
    "all allowed tokens stop": {"allowed_token_ids": [5], "stop_token_ids": [5], "min_tokens": 3},
    "bad word of nothing": {"bad_words": [""]},
    "bad word of a space": {"bad_words": [" "]},
    "bad word nobody can say": {"bad_words": ["\x00\ud7ff" * 50]},
    "regex that is none": {"structured_output": StructuredOutput(regex="(((")},
    "regex that explodes": {"structured_output": StructuredOutput(regex="((a{1,50}){1,50}){1,50}")},
    "grammar that is none": {"structured_output": StructuredOutput(grammar="root ::= ((")},
    "schema that is none": {"structured_output": StructuredOutput(json_schema="not json")},
    "schema of a wrong shape": {"structured_output": StructuredOutput(json_schema={"type": 5})},
    "schema that refers to nothing": {
        "structured_output": StructuredOutput(json_schema={"$ref": "#/$defs/x"})
    },
    "schema two hundred deep": {"structured_output": StructuredOutput(json_schema=DEEP_SCHEMA)},
    "empty choice": {"structured_output": StructuredOutput(choice=[""])},
    "tag that is none": {"structured_output": StructuredOutput(structural_tag="{}")},
    "JSON that must be false": {"structured_output": StructuredOutput(json_object=False)},
    "seed at the edge": {"seed": -(2**63), "temperature": 1.0},
    "temperature next to nothing": {"temperature": 1e-30, "seed": 1},
    "top_k beyond 32 bits": {"top_k": 2**40, "temperature": 1.0, "seed": 1},
    "top_p next to nothing": {"top_p": 1e-30, "temperature": 1.0, "seed": 1},
    "repetition penalty next to nothing": {"repetition_penalty": 1e-30},
    "stop string of a hundred thousand": {"stop": ["x" * 100_000]},
}


@pytest.fixture
def golden(real_fleet: Fleet) -> Any:
    """After the test the same processes give the same answer."""
    before = real_fleet.complete(list(range(300, 340)), **GREEDY).json["choices"]
    boot_ids = {name: worker["boot_id"] for name, worker in real_fleet.workers().items()}
    yield before
    assert {name: worker["boot_id"] for name, worker in real_fleet.workers().items()} == boot_ids
    assert real_fleet.complete(list(range(300, 340)), **GREEDY).json["choices"] == before
    real_fleet.wait_until_idle(40.0)


async def _end_of(fleet: Fleet, prompt: list[int], sampling: dict[str, Any]) -> str:
    """`answered`, or the code of the typed error."""
    async with AsyncBatonClient(fleet.client_address, timeout_s=ANSWER_WITHIN_S) as client:
        try:
            async for _ in client.submit(prompt, **GREEDY | sampling):
                pass
        except RequestError as error:
            return error.code
        except ServingError as error:
            raise AssertionError(f"not the caller's fault? {error.code}: {error.message}") from error
        return "answered"


@pytest.mark.usefixtures("golden")
@pytest.mark.parametrize("name", NASTY)
def test_odd_sampling_is_answered_or_refused(real_fleet: Fleet, name: str) -> None:
    prompt = list(range(300, 340))
    asyncio.run(asyncio.wait_for(_end_of(real_fleet, prompt, NASTY[name]), ANSWER_WITHIN_S))


@pytest.mark.usefixtures("golden")
@pytest.mark.parametrize("token_id", [2**31, 2**32 - 1, 10**6, 2300])
def test_token_ids_that_the_model_does_not_have_are_refused(real_fleet: Fleet, token_id: int) -> None:
    end = asyncio.run(asyncio.wait_for(_end_of(real_fleet, [5, token_id, 6], {}), ANSWER_WITHIN_S))
    assert end == "invalid_request"

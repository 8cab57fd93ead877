"""What the openai package hands to its users, field by field: from prefill and decode workers the same as
from one worker that does both, whichever way the KV goes."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from typing import Any

from openai import OpenAI

from baton.worker.settings import WorkerSettings
from tests.system.cases import random_prompt
from tests.system.fleet import Fleet

USER = [{"role": "user", "content": "Once upon a time there was a little house by the sea"}]
PROMPT = random_prompt(100, "every field")
SCHEMA = {
    "type": "object",
    "properties": {"is_red": {"type": "boolean"}, "size": {"enum": ["small", "large"]}},
    "required": ["is_red", "size"],
    "additionalProperties": False,
}
TOOL = {"type": "function", "function": {"name": "paint", "parameters": SCHEMA}}

COMPLETIONS: dict[str, dict[str, Any]] = {
    "plain": {},
    "logprobs": {"logprobs": 3},
    "echo": {"echo": True, "logprobs": 2},
    "echo alone": {"echo": True, "max_tokens": 1},
    "two choices": {"n": 2, "temperature": 0.9, "seed": 5},
    "two prompts": {"prompt": [PROMPT, PROMPT[:40]], "logprobs": 1},
    "seed": {"temperature": 0.8, "top_p": 0.9, "seed": 7, "logprobs": 2},
    "penalties": {"presence_penalty": 1.1, "frequency_penalty": 0.6},
    "bias": {"logit_bias": {"101": 4, "1200": 6}},
    "stop": {"stop": ["e", "never to be seen"], "max_tokens": 40},
    "prompt logprobs": {"extra_body": {"prompt_logprobs": 1}},
    "one token": {"max_tokens": 1, "logprobs": 2},
}
CHATS: dict[str, dict[str, Any]] = {
    "chat": {},
    "chat logprobs": {"logprobs": True, "top_logprobs": 3},
    "chat, two choices": {"n": 2, "temperature": 0.9, "seed": 3},
    "json schema": {
        "max_tokens": 200,
        "response_format": {"type": "json_schema", "json_schema": {"name": "thing", "schema": SCHEMA}},
    },
    "json object": {"response_format": {"type": "json_object"}},
    "tool": {"tools": [TOOL], "tool_choice": "required", "max_tokens": 200},
    "named tool": {
        "tools": [TOOL], "max_tokens": 200,
        "tool_choice": {"type": "function", "function": {"name": "paint"}},
    },
}  # fmt: skip

NOT_STREAMED = {"echo", "prompt logprobs"}
OF_ONE_ANSWER = {"id", "created", "baton"}
TOLERANCE = 1e-4

NUMBERED = {"choices", "tool_calls"}
GROWING = {"text", "content", "arguments", "tokens", "token_logprobs", "top_logprobs", "text_offset"}

DEFAULT = next(field.default for field in dataclasses.fields(WorkerSettings) if field.name == "transfer")
FLAGS = {way: () if way == DEFAULT else ("--transfer", way) for way in ("pull", "stream")}

Answers = dict[str, Any]


def answers(fleet: Fleet) -> Answers:
    """Each request whole and, where that is possible, streamed. All have one prompt, so from the second on
    there are cached tokens."""
    got: Answers = {}
    with OpenAI(base_url=f"{fleet.url}/v1", api_key="none", max_retries=0, timeout=60) as client:
        model = client.models.list().data[0].id
        for name, options in (COMPLETIONS | CHATS).items():
            create: Any = client.completions.create if name in COMPLETIONS else client.chat.completions.create
            asked = {"prompt": PROMPT} if name in COMPLETIONS else {"messages": USER}
            wanted = {"model": model, **asked, "max_tokens": 12, "temperature": 0, **options}
            got[name] = create(**wanted).model_dump()
            if name not in NOT_STREAMED:
                chunks = create(**wanted, stream=True, stream_options={"include_usage": True})
                got[f"{name}, streamed"] = merged([chunk.model_dump() for chunk in chunks])
    fleet.wait_until_idle(40.0)
    return got


def merged(chunks: list[dict[str, Any]]) -> dict[str, Any]:
    """A stream as one document: where it is cut into chunks depends on the moment."""
    whole: dict[str, Any] = {}
    for chunk in chunks:
        _add(whole, chunk)
    return whole


def _add(whole: dict[str, Any], part: dict[str, Any]) -> None:
    for name, value in part.items():
        if name in NUMBERED and value:
            value = {item["index"]: item for item in value}
        if isinstance(value, dict):
            if not isinstance(whole.get(name), dict):
                whole[name] = {}
            _add(whole[name], value)
        elif value and name in GROWING:
            whole[name] = whole[name] + value if whole.get(name) else value
        elif value or name not in whole:
            whole[name] = value


def differences(ours: Any, theirs: Any, path: str = "") -> list[str]:
    """Named by where they are; log probabilities may differ by rounding."""
    if isinstance(ours, dict) and isinstance(theirs, dict):
        found = [f"{path}.{name}: only on one side" for name in sorted(map(str, ours.keys() ^ theirs.keys()))]
        for name in ours.keys() & theirs.keys():
            if name not in OF_ONE_ANSWER:
                found += differences(ours[name], theirs[name], f"{path}.{name}")
        return found
    if isinstance(ours, list) and isinstance(theirs, list) and len(ours) == len(theirs):
        return [
            d
            for i, pair in enumerate(zip(ours, theirs, strict=True))
            for d in differences(*pair, f"{path}[{i}]")
        ]
    if (
        isinstance(ours, float)
        and isinstance(theirs, float)
        and math.isclose(ours, theirs, abs_tol=TOLERANCE)
    ):
        return []
    return [] if ours == theirs else [f"{path}: {ours!r} instead of {theirs!r}"]


def test_every_field_is_that_of_one_worker_alone(start_real_fleet: Callable[..., Fleet]) -> None:
    """vllm#50792, sglang#40298, vllm#46898: crashes over prompt logprobs, the first token's are lost, all
    tokens are reported as cached."""
    got = {}
    for transfer, flags in FLAGS.items():
        fleet = start_real_fleet(prefill=flags, decode=flags)
        fleet.wait_until_idle(40.0)
        moved = fleet.workers()["decode-1"]["load"]["num_kv_transfers"]
        got[transfer] = answers(fleet)
        moved = fleet.workers()["decode-1"]["load"]["num_kv_transfers"] - moved
        assert moved >= len(COMPLETIONS) + len(CHATS) - 4, f"{transfer}: {moved} hand-offs"
    colocated = answers(start_real_fleet(roles=("both",)))
    assert colocated["logprobs"]["usage"]["prompt_tokens_details"]["cached_tokens"] == 96  # 3 blocks of 100
    found = [
        f"{transfer}, {name}{difference}"
        for transfer, all_answers in got.items()
        for name, answer in all_answers.items()
        for difference in differences(answer, colocated[name])
    ]
    assert not found, "\n".join(found)

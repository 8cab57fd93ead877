"""The real openai package in front of a real fleet: what its users write, and the exceptions they catch."""

from __future__ import annotations

import json
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import openai
import pytest
from openai import OpenAI

from tests.system.fleet import Fleet, wait_for

USER = [{"role": "user", "content": "Once upon a time"}]
WEATHER = {
    "type": "function",
    "function": {
        "name": "get_weather",
        "parameters": {
            "type": "object",
            "properties": {"city": {"type": "string", "enum": ["Oslo", "Rome"]}},
            "required": ["city"],
            "additionalProperties": False,
        },
    },
}


@pytest.fixture
def client(real_fleet: Fleet) -> Iterator[Any]:
    with OpenAI(base_url=f"{real_fleet.url}/v1", api_key="none", max_retries=0, timeout=60) as client:
        yield client


@pytest.fixture
def model_id(client: Any) -> str:
    """As clients find it: the first of /v1/models."""
    models = client.models.list().data
    assert client.models.retrieve(models[-1].id).id == models[-1].id
    return str(models[0].id)


def test_chat_whole_and_streamed_say_the_same(client: Any, model_id: str) -> None:
    wanted = {"model": model_id, "messages": USER, "temperature": 0, "max_completion_tokens": 12}
    whole = client.chat.completions.create(**wanted)
    assert whole.choices[0].message.role == "assistant"
    assert whole.usage.completion_tokens <= 12
    assert whole.usage.total_tokens == whole.usage.prompt_tokens + whole.usage.completion_tokens
    assert whole._request_id
    text, usage, finish_reason = "", None, None
    with client.chat.completions.create(
        **wanted, stream=True, stream_options={"include_usage": True}
    ) as stream:
        for chunk in stream:
            if chunk.choices:
                text += chunk.choices[0].delta.content or ""
                finish_reason = chunk.choices[0].finish_reason or finish_reason
            usage = chunk.usage or usage
    assert text == whole.choices[0].message.content
    assert finish_reason == whole.choices[0].finish_reason
    assert usage is not None
    assert usage.completion_tokens == whole.usage.completion_tokens
    assert usage.prompt_tokens == whole.usage.prompt_tokens


def test_completions_with_several_prompts_and_choices(client: Any, model_id: str) -> None:
    wanted = {"model": model_id, "prompt": ["a", "of the house"], "n": 2, "max_tokens": 6, "seed": 5,
              "extra_body": {"ignore_eos": True}}  # fmt: skip
    first, second = (client.completions.create(**wanted) for _ in range(2))
    assert [choice.index for choice in first.choices] == [0, 1, 2, 3]
    assert [choice.text for choice in first.choices] == [choice.text for choice in second.choices]
    assert len({choice.text for choice in first.choices}) == 4
    assert first.usage.completion_tokens == 4 * 6


def test_logprobs_in_both_shapes(client: Any, model_id: str) -> None:
    chat = client.chat.completions.create(
        model=model_id, messages=USER, max_tokens=4, temperature=0, logprobs=True, top_logprobs=3
    )
    content = chat.choices[0].logprobs.content
    assert "".join(entry.token for entry in content) == chat.choices[0].message.content
    assert all(entry.logprob == entry.top_logprobs[0].logprob for entry in content)
    assert all(len(entry.top_logprobs) == 3 for entry in content)
    text = client.completions.create(
        model=model_id, prompt="the sea", max_tokens=4, logprobs=2, temperature=0
    )
    logprobs = text.choices[0].logprobs
    assert "".join(logprobs.tokens) == text.choices[0].text
    assert len(logprobs.token_logprobs) == len(logprobs.top_logprobs) == 4


def test_stop_ends_before_the_string(client: Any, model_id: str) -> None:
    wanted = {"model": model_id, "prompt": "the sea", "max_tokens": 16, "temperature": 0}
    free = client.completions.create(**wanted).choices[0].text
    stop = free[9:12]
    stopped = client.completions.create(**wanted, stop=[stop]).choices[0]
    assert (stopped.text, stopped.finish_reason) == (free[: free.index(stop)], "stop")


@pytest.mark.parametrize("is_stream", [False, True], ids=["whole", "streamed"])
@pytest.mark.parametrize(
    "choice",
    ["required", {"type": "function", "function": {"name": "get_weather"}}],
    ids=["required", "named"],
)
def test_tools_are_called_with_valid_arguments(
    client: Any, model_id: str, choice: Any, is_stream: bool
) -> None:
    wanted = {"model": model_id, "messages": USER, "tools": [WEATHER], "tool_choice": choice,
              "temperature": 0, "max_tokens": 200, "parallel_tool_calls": False}  # fmt: skip
    if is_stream:
        with client.chat.completions.stream(**wanted) as stream:
            for _ in stream:
                pass
            answer = stream.get_final_completion()
    else:
        answer = client.chat.completions.create(**wanted)
    (call,) = answer.choices[0].message.tool_calls
    assert call.function.name == "get_weather"
    assert json.loads(call.function.arguments)["city"] in ("Oslo", "Rome")


def test_a_json_schema_is_kept(client: Any, model_id: str) -> None:
    schema = {
        "type": "object",
        "properties": {"is_red": {"type": "boolean"}, "size": {"enum": ["small", "large"]}},
        "required": ["is_red", "size"],
        "additionalProperties": False,
    }
    answer = client.chat.completions.create(
        model=model_id, messages=USER, max_tokens=200, temperature=0,
        response_format={"type": "json_schema", "json_schema": {"name": "thing", "schema": schema}},
    )  # fmt: skip
    document = json.loads(answer.choices[0].message.content)
    assert isinstance(document["is_red"], bool)
    assert document["size"] in ("small", "large")


def test_errors_are_the_classes_that_users_catch(client: Any, model_id: str) -> None:
    with pytest.raises(openai.NotFoundError, match="gpt-nobody") as not_found:
        client.completions.create(model="gpt-nobody", prompt="a")
    assert (not_found.value.code, not_found.value.param) == ("model_not_found", "model")
    assert not_found.value.request_id
    with pytest.raises(openai.BadRequestError, match=r"3000.*2048") as too_long:
        client.completions.create(model=model_id, prompt=[1] * 3000)
    assert too_long.value.code == "context_length_exceeded"
    with pytest.raises(openai.BadRequestError, match="temperature"):
        client.chat.completions.create(model=model_id, messages=USER, temperature=9)
    with pytest.raises(openai.BadRequestError, match="regex"):  # found by the engine, not by the door
        client.completions.create(
            model=model_id, prompt="a", extra_body={"structured_outputs": {"regex": "((("}}
        )


def test_the_sdk_retries_until_a_pair_of_workers_is_there(tmp_path: Path) -> None:
    """
    1. a coordinator without workers answers 503 with Retry-After: with no retries, that is what a user sees
    2. with retries the SDK asks again, says so in its header, and succeeds once the workers are up
    """
    fleet = Fleet(tmp_path, engine="simulated")
    try:
        fleet.start_coordinator()
        wait_for("a coordinator", lambda: _is_alive(fleet), 30.0)
        with OpenAI(base_url=f"{fleet.url}/v1", api_key="none", max_retries=0, timeout=30) as client:
            with pytest.raises(openai.InternalServerError) as refused:
                client.completions.create(model="simulated", prompt=[1, 2], max_tokens=3)
            assert refused.value.status_code == 503
            assert refused.value.code == "no_workers"
            assert int(refused.value.response.headers["retry-after"]) >= 1
            patient = client.with_options(max_retries=60)
            with ThreadPoolExecutor(1) as threads:
                asked = threads.submit(
                    patient.completions.with_raw_response.create,
                    model="simulated", prompt=[1, 2], max_tokens=3,
                )  # fmt: skip
                fleet.start_worker("prefill", "prefill-1")
                fleet.start_worker("decode", "decode-1")
                answer = asked.result(60)
        assert answer.parse().choices[0].finish_reason == "length"
        assert answer.retries_taken >= 1
    finally:
        fleet.stop()


def _is_alive(fleet: Fleet) -> bool:
    try:
        return fleet.ask("GET", "/live", timeout_s=5.0).status == 200
    except OSError:
        return False

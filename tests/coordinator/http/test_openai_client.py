"""The real openai package against the door."""

from __future__ import annotations

import openai
import pytest

from baton.contract.errors import QueueFull
from tests.coordinator.http.fake_intake import Script


def client_of(site):
    return openai.AsyncOpenAI(base_url=f"http://127.0.0.1:{site.port}/v1", api_key="sesame", max_retries=0)


def test_completions_and_chat_whole_and_streamed(at_site):
    async def scenario(site):
        async with client_of(site) as client:
            models = [model.id async for model in client.models.list()]
            assert models == ["/models/demo", "demo"]
            whole = await client.completions.create(model="demo", prompt="the fox", max_tokens=3, n=2)
            assert [choice.text for choice in whole.choices] == [" t0 t1 t2"] * 2
            assert whole.usage.completion_tokens == 6
            stream = await client.completions.create(
                model="demo", prompt=[1, 2], max_tokens=3, stream=True, stream_options={"include_usage": True}
            )
            chunks = [chunk async for chunk in stream]
            assert "".join(chunk.choices[0].text for chunk in chunks if chunk.choices) == " t0 t1 t2"
            assert chunks[-1].usage.prompt_tokens_details.cached_tokens == 2
            chat = await client.chat.completions.create(
                model="demo", messages=[{"role": "user", "content": "hi"}], max_completion_tokens=2,
                logprobs=True, top_logprobs=1,
            )  # fmt: skip
            assert chat.choices[0].message.content == " t0 t1"
            assert chat.choices[0].logprobs.content[0].top_logprobs[0].token == " t0"

    at_site(scenario, api_key="sesame")


def test_chat_streams_through_the_accumulating_helper(at_site):
    async def scenario(site):
        site.intake.script = lambda s: Script(texts=list('{"city": "Bern"}'), finish_reason="stop")
        tool = {"type": "function", "function": {"name": "weather", "parameters": {"type": "object"}}}
        async with (
            client_of(site) as client,
            client.chat.completions.stream(
                model="demo", messages=[{"role": "user", "content": "hi"}], tools=[tool],
                tool_choice={"type": "function", "function": {"name": "weather"}},
            ) as stream,
        ):  # fmt: skip
            final = await stream.get_final_completion()
        call = final.choices[0].message.tool_calls[0]
        assert (call.function.name, call.function.arguments) == ("weather", '{"city": "Bern"}')

    at_site(scenario)


def test_errors_become_the_classes_users_catch(at_site):
    async def scenario(site):
        async with client_of(site) as client:
            with pytest.raises(openai.BadRequestError) as bad:
                await client.completions.create(model="demo", prompt="x", max_tokens=0)
            assert (bad.value.code, bad.value.param) == ("invalid_request", "max_tokens")
            with pytest.raises(openai.NotFoundError):
                await client.completions.create(model="nope", prompt="x")
            site.intake.refusal = QueueFull("full", retry_after_s=4.0)
            with pytest.raises(openai.RateLimitError) as full:
                await client.completions.create(model="demo", prompt="x")
            assert full.value.request_id
            assert full.value.response.headers["retry-after"] == "4"
            site.intake.refusal = None
            site.intake.script = lambda s: Script(fails_after=1)
            stream = await client.completions.create(model="demo", prompt="x", stream=True)
            with pytest.raises(openai.APIError, match="decode-0 left"):
                [chunk async for chunk in stream]

    at_site(scenario)


def test_closing_a_stream_aborts_the_request(at_site):
    async def scenario(site):
        site.intake.script = lambda s: Script(is_endless=True)
        async with client_of(site) as client:
            stream = await client.completions.create(model="demo", prompt="x", stream=True)
            async for _ in stream:
                break
            await stream.close()
        await site.until(lambda: not site.intake.in_flight)
        assert len(site.intake.aborted) == 1

    at_site(scenario)

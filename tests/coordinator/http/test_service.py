"""Health, models, tokenize, metrics, draining."""

from __future__ import annotations

import asyncio

import pytest

from coordinator.http.router import ROUTES
from tests.coordinator.http.conftest import read_answer, request_bytes
from tests.coordinator.http.fake_intake import Script


@pytest.mark.parametrize(
    "path", ["/health", "/healthz", "/live", "/livez", "/ready", "/readyz", "/ping", "/version"]
)
def test_probes_answer(at_site, path):
    async def scenario(site):
        answer = await site.ask("GET", path)
        assert answer.status == 200
        assert answer.json
        head = await site.ask("HEAD", path)
        assert (head.status, head.headers["content-length"]) == (200, str(len(answer.body)))

    at_site(scenario)


def test_draining_refuses_work_says_so_and_finishes_what_runs(at_site):
    """
    1. a request runs; the door stops accepting
    2. new work hears 503, /health 503, /ready 503, /live 200
    3. the running request ends well, and close() waited for it
    """

    async def scenario(site):
        site.intake.script = lambda s: Script(is_held=True)
        reader, writer = await site.connect()
        writer.write(request_bytes("POST", "/v1/completions", {"prompt": [1], "max_tokens": 1}))
        await site.until(lambda: bool(site.intake.in_flight))
        await site.door.stop_accepting()
        refused = await site.complete()
        assert (refused.status, refused.error["code"]) == (503, "draining")
        statuses = [(await site.ask("GET", path)).status for path in ("/health", "/ready", "/live")]
        assert statuses == [503, 503, 200]
        closing = asyncio.ensure_future(site.door.close(grace_s=10))
        await asyncio.sleep(0)
        site.intake.release()
        assert (await read_answer(reader)).status == 200
        await closing

    at_site(scenario)


def test_close_without_grace_aborts_what_runs(at_site):
    async def scenario(site):
        site.intake.script = lambda s: Script(is_held=True)
        _, writer = await site.connect()
        writer.write(request_bytes("POST", "/v1/completions", {"prompt": [1], "n": 2, "max_tokens": 1}))
        await site.until(lambda: len(site.intake.in_flight) == 2)
        await site.door.close(grace_s=0)
        assert len(site.intake.aborted) == 2

    at_site(scenario)


def test_models_list_the_path_and_its_last_component(at_site):
    async def scenario(site):
        answer = await site.ask("GET", "/v1/models")
        assert [card["id"] for card in answer.json["data"]] == ["/models/demo", "demo"]
        assert {card["max_model_len"] for card in answer.json["data"]} == {512}
        assert (await site.ask("GET", "/v1/models/demo")).json["id"] == "demo"
        assert (await site.ask("GET", "/v1/models//models/demo")).json["id"] == "/models/demo"
        assert (await site.ask("GET", "/v1/models/nope")).status == 404

    at_site(scenario)


def test_tokenize_and_back(at_site):
    async def scenario(site):
        answer = (await site.post("/tokenize", {"prompt": "the fox", "return_token_strs": True})).json
        assert answer["count"] == len(answer["tokens"]) == len(answer["token_strs"])
        assert answer["token_strs"][0] == "<s>"
        assert answer["max_model_len"] == 512
        back = await site.post("/detokenize", {"tokens": answer["tokens"][1:]})
        assert back.json == {"prompt": "the fox"}
        chat = await site.post("/tokenize", {"messages": [{"role": "user", "content": "hi"}]})
        assert chat.json["tokens"].count(0) == 1
        for path, body in (
            ("/tokenize", {}),
            ("/tokenize", {"prompt": "a", "messages": [{"role": "user"}]}),
            ("/detokenize", {"tokens": [10**9]}),
            ("/detokenize", {"tokens": ["a"]}),
        ):
            assert (await site.post(path, body)).status == 400

    at_site(scenario)


def test_metrics_count_refusals(at_site):
    async def scenario(site):
        await site.complete(max_tokens=0)
        answer = await site.ask("GET", "/metrics")
        assert answer.headers["content-type"].startswith("text/plain")
        assert 'baton_requests_refused_total{code="invalid_request"} 1.0' in answer.body.decode()

    at_site(scenario)


def test_unknown_paths_and_methods(at_site):
    async def scenario(site):
        answer = await site.ask("GET", "/nope")
        assert (answer.status, answer.error["code"]) == (404, "not_found")
        answer = await site.ask("GET", "/v1/completions")
        assert (answer.status, answer.error["code"], answer.headers["allow"]) == (
            405, "method_not_allowed", "POST, OPTIONS",
        )  # fmt: skip
        for path, route in ROUTES.items():
            answer = await site.ask("OPTIONS", path)
            assert answer.status == 200
            assert route.method.decode() in answer.headers["allow"]

    at_site(scenario)


@pytest.mark.parametrize(
    ("given", "returned"),
    [("abc-1:2.3", "abc-1:2.3"), ("a b\tc/é", "abc"), ("x" * 300, "x" * 128)],
    ids=["clean", "cleaned", "cut"],
)
def test_request_ids_are_echoed_clean(at_site, given, returned):
    async def scenario(site):
        for answer in (
            await site.ask("GET", "/live", headers={"x-request-id": given}),
            await site.ask("GET", "/nope", headers={"x-request-id": given}),
        ):
            assert answer.headers["x-request-id"] == returned

    at_site(scenario)

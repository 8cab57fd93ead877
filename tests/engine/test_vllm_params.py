"""The contract's sampling words in vLLM's. Imports vLLM (seconds), starts nothing."""

from __future__ import annotations

from dataclasses import replace

import msgspec
import pytest

from baton.contract.lifecycle import WorkerRole
from baton.contract.messages import TopLogprob
from baton.contract.sampling import SamplingSpec, ServiceWish, StructuredOutput
from baton.engine.vllm.settings import VllmEngineSettings, engine_arguments, transfer_arguments

pytestmark = pytest.mark.filterwarnings("default")

FULL = SamplingSpec(
    max_tokens=40, min_tokens=3, temperature=0.5, top_p=0.9, top_k=20, min_p=0.1, presence_penalty=0.1,
    frequency_penalty=0.2, repetition_penalty=1.1, seed=5, stop=["x"], stop_token_ids=[9],
    include_stop_str_in_output=True, ignore_eos=True, logprobs=2, prompt_logprobs=1, logit_bias={3: 1.5},
    bad_words=["bad"], allowed_token_ids=[1, 2], skip_special_tokens=False,
    spaces_between_special_tokens=False, structured_output=StructuredOutput(regex="a+"),
)  # fmt: skip


def test_a_decode_leg_says_what_the_client_said() -> None:
    from baton.engine.vllm.params import decode_params

    params = decode_params(FULL, {"do_remote_prefill": True})
    own_words = {"structured_output", "prompt_logprobs", "service"}
    for field in msgspec.structs.fields(SamplingSpec):
        if field.name not in own_words:
            assert getattr(params, field.name) == getattr(FULL, field.name), field.name
    assert params.structured_outputs is not None
    assert params.structured_outputs.regex == "a+"
    assert params.prompt_logprobs is None  # the prefill leg gave them
    assert decode_params(FULL, None).prompt_logprobs == 1  # there was none: the prompt is computed here
    assert params.extra_args == {"kv_transfer_params": {"do_remote_prefill": True}}
    assert params.n == 1
    assert params.detokenize


def test_what_the_scheduler_is_told_travels_beside_the_sampling() -> None:
    from baton.engine.vllm.mlfq_scheduler import OPTIONS
    from baton.engine.vllm.params import decode_params

    wish = ServiceWish(priority=-1, key="tenant-a", deadline_s=2.0, expected_output_tokens=80)
    params = decode_params(SamplingSpec(max_tokens=4, service=wish), None)
    assert params.extra_args == {
        OPTIONS: {
            "priority": -1,
            "key": "tenant-a",
            "deadline_left_s": 2.0,
            "num_expected_output_tokens": 80,
        }
    }


def test_a_prefill_leg_makes_one_token() -> None:
    from baton.engine.vllm.params import prefill_params

    params = prefill_params(FULL, None)
    assert (params.max_tokens, params.min_tokens, params.prompt_logprobs) == (1, 1, 1)
    assert params.extra_args is None
    assert prefill_params(msgspec.structs.replace(FULL, min_tokens=0), None).min_tokens == 0


def test_defaults_are_vllms() -> None:
    from vllm.sampling_params import SamplingParams

    from baton.engine.vllm.params import decode_params

    ours, theirs = decode_params(SamplingSpec(max_tokens=16), None), SamplingParams(max_tokens=16)
    for field in msgspec.structs.fields(SamplingSpec):
        if field.name not in ("structured_output", "service"):
            assert getattr(ours, field.name) == getattr(theirs, field.name), field.name


@pytest.mark.parametrize(
    ("wanted", "name", "value"),
    [
        (StructuredOutput(json_schema={"type": "object"}), "json", {"type": "object"}),
        (StructuredOutput(json_object=True), "json_object", True),
        (StructuredOutput(choice=["a", "b"]), "choice", ["a", "b"]),
        (StructuredOutput(grammar='root ::= "a"'), "grammar", 'root ::= "a"'),
        (StructuredOutput(structural_tag="{}"), "structural_tag", "{}"),
    ],
    ids=["schema", "object", "choice", "grammar", "tag"],
)
def test_structured_output(wanted: StructuredOutput, name: str, value: object) -> None:
    from baton.engine.vllm.params import decode_params

    params = decode_params(SamplingSpec(max_tokens=1, structured_output=wanted), None)
    assert getattr(params.structured_outputs, name) == value


def test_logprobs_keep_vllms_order() -> None:
    from vllm.logprobs import Logprob

    from baton.engine.vllm.params import output_logprobs, prompt_logprobs

    position = {7: Logprob(-2.0, 5, "g"), 1: Logprob(-0.5, 1, "a"), 2: Logprob(-1.0, 2, "b")}
    entries = [
        TopLogprob(token_id=7, logprob=-2.0, rank=5, decoded="g"),
        TopLogprob(token_id=1, logprob=-0.5, rank=1, decoded="a"),
        TopLogprob(token_id=2, logprob=-1.0, rank=2, decoded="b"),
    ]
    assert output_logprobs([position]) == [entries]
    assert output_logprobs(None) is None
    assert prompt_logprobs([None, position]) == [None, entries]


def test_the_engine_and_the_connector_use_the_same_keys() -> None:
    from baton.engine.vllm import transfer_params
    from baton.transfer import nixl_connector, nixl_stream_connector, nixl_stream_scheduler

    assert transfer_params.STREAM_ID == nixl_stream_scheduler.STREAM_ID
    for name in ("HOLD_UNLESS_STOPPED", "LEASE_END_S", "RELEASE_HELD"):
        assert getattr(transfer_params, name) == getattr(nixl_connector, name)
    settings = VllmEngineSettings(model="m", role=WorkerRole.DECODE)
    arguments = transfer_arguments(settings)
    assert arguments["kv_connector_module_path"] == nixl_connector.CONNECTOR_MODULE
    assert arguments["kv_connector"] == nixl_connector.CONNECTOR_NAME
    assert hasattr(nixl_connector, arguments["kv_connector"])
    streaming = VllmEngineSettings(model="m", role=WorkerRole.DECODE, transfer="stream")
    arguments = transfer_arguments(streaming)
    assert arguments["kv_connector_module_path"] == nixl_stream_connector.CONNECTOR_MODULE
    assert arguments["kv_connector"] == nixl_stream_connector.CONNECTOR_NAME
    assert hasattr(nixl_stream_connector, arguments["kv_connector"])
    both = VllmEngineSettings(model="m", role=WorkerRole.BOTH, transfer="stream")
    assert transfer_arguments(both)["kv_connector"] == nixl_connector.CONNECTOR_NAME
    assert transfer_params.STREAM_LEASE_S == nixl_stream_scheduler.STREAM_LEASE_S
    assert transfer_params.NUM_STAGES == nixl_connector.NUM_STAGES


def test_host_memory_for_kv_comes_behind_nixl() -> None:
    """On CPU one connector of ours, on CUDA two of vLLM's list: NIXL is always asked first. Streams go with
    the first and not with the second."""
    from baton.engine.vllm import swap_connector

    decode = VllmEngineSettings(model="m", role=WorkerRole.DECODE, host_kv_bytes=1 << 20)
    arguments = transfer_arguments(decode)
    assert arguments["kv_connector"] == "SwappingNixlConnector"
    assert arguments["kv_connector_extra_config"]["host_kv_bytes"] == 1 << 20
    arguments = transfer_arguments(replace(decode, device="cuda"))
    assert arguments["kv_connector"] == "MultiConnector"
    children = arguments["kv_connector_extra_config"]["connectors"]
    assert [child["kv_connector"] for child in children] == [
        "LeasedNixlConnector",
        "SimpleCPUOffloadConnector",
    ]
    streaming = replace(decode, transfer="stream")
    arguments = transfer_arguments(streaming)
    assert arguments["kv_connector"] == swap_connector.STREAMING_CONNECTOR_NAME
    assert hasattr(swap_connector, arguments["kv_connector"])
    on_cuda = replace(streaming, device="cuda")
    assert on_cuda.reason_not_to_stream == "host memory for KV is another connector's there"
    assert transfer_arguments(on_cuda) == transfer_arguments(replace(decode, device="cuda"))


def test_on_cuda_both_ends_of_a_stream_schedule_for_the_first_token() -> None:
    """The decode engine takes it up; the prefill engine plans no step ahead of telling it."""
    decode = VllmEngineSettings(model="m", role=WorkerRole.DECODE, device="cuda", transfer="stream")
    arguments = engine_arguments(decode)
    assert arguments["scheduler_cls"].endswith("AsyncFirstTokenScheduler") and arguments["async_scheduling"]
    assert "scheduler_cls" not in engine_arguments(replace(decode, transfer="pull"))
    prefill = replace(decode, role=WorkerRole.PREFILL, scheduler="shortest-prefill")
    arguments = engine_arguments(prefill)
    assert arguments["scheduler_cls"].endswith(".MlfqScheduler") and not arguments["async_scheduling"]


def test_residents_are_more_than_places_and_drift_brings_vllms_own_scheduler_back() -> None:
    decode = VllmEngineSettings(
        model="m", role=WorkerRole.DECODE, scheduler="skip-join-mlfq", max_batch_size=8
    )
    arguments = engine_arguments(decode)
    assert arguments["max_num_seqs"] == 32  # 4 x 8
    assert arguments["scheduler_cls"].endswith("vllm.mlfq_scheduler.MlfqScheduler")
    assert arguments["additional_config"]["baton_scheduler"]["max_batch_size"] == 8
    on_cuda = engine_arguments(replace(decode, device="cuda"))
    assert on_cuda["scheduler_cls"].endswith("AsyncMlfqScheduler") and on_cuda["async_scheduling"]
    drifted = engine_arguments(decode, has_drifted=True)
    assert drifted["max_num_seqs"] == 8
    assert drifted["scheduler_cls"].endswith("QuietScheduler")
    prefill = replace(decode, role=WorkerRole.PREFILL, scheduler="shortest-prefill")
    assert engine_arguments(prefill)["max_num_seqs"] == 8

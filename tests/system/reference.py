"""The reference: stock vLLM in one process, no connector, nothing of Baton between case and answer.

    python -m tests.system.reference MODEL CASES ANSWERS

Reads cases as MessagePack, writes their answers, ends. Engine settings are those that the fleet's
workers use. Imported by the tests for its types only, so vLLM is imported late.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Any

import msgspec

from tests.system.cases import MAX_MODEL_LEN, Case


class Choice(msgspec.Struct, kw_only=True):
    token_ids: list[int]
    text: str
    finish_reason: str | None
    stop_reason: int | str | None
    logprobs: list[dict[int, float]] | None
    """By position: the alternatives and the token itself."""


class Expected(msgspec.Struct, kw_only=True):
    params: dict[str, Any]
    """With everything that was to be derived."""
    prompt_token_ids: list[int]
    choices: list[Choice]
    prompt_logprobs: list[dict[int, float] | None] | None


def main(model: str, cases_path: str, answers_path: str) -> None:
    cases = msgspec.msgpack.decode(Path(cases_path).read_bytes(), type=list[Case])
    os.environ |= {
        "OMP_NUM_THREADS": "1", "KMP_BLOCKTIME": "0", "VLLM_CPU_OMP_THREADS_BIND": "nobind",
        "VLLM_NO_USAGE_STATS": "1", "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
    }  # fmt: skip
    from vllm import LLM

    llm = LLM(
        model=model, dtype="float32", block_size=32, max_model_len=MAX_MODEL_LEN, max_num_seqs=64,
        kv_cache_memory_bytes=256 << 20, enforce_eager=True, enable_prefix_caching=True, seed=0,
        # Stock vLLM on CPU dies of a seeded request whose prompt is cut into chunks.
        enable_chunked_prefill=False, max_num_batched_tokens=MAX_MODEL_LEN,
        distributed_executor_backend="vllm.v1.executor.uniproc_executor.UniProcExecutor",
    )  # fmt: skip
    prompts = [_prompt(llm, case) for case in cases]
    derived = [number for number, case in enumerate(cases) if case.derive]
    plain = _generate(llm, [prompts[i] for i in derived], [_without_stops(cases[i].params) for i in derived])
    resolved = [dict(case.params) for case in cases]
    for number, output in zip(derived, plain, strict=True):
        resolved[number] |= _derive(str(cases[number].derive), output.outputs[0])
    outputs = _generate(llm, prompts, resolved)
    answers = [_expected(params, output) for params, output in zip(resolved, outputs, strict=True)]
    Path(answers_path).write_bytes(msgspec.msgpack.encode(answers))


def _prompt(llm: Any, case: Case) -> list[int]:
    tokenizer = llm.get_tokenizer()
    if isinstance(case.prompt, list):
        return case.prompt
    if case.door == "chat":
        turns = [{"role": "user", "content": case.prompt}]
        text = tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=True)
        return list(tokenizer(text, add_special_tokens=False).input_ids)
    return list(tokenizer(case.prompt).input_ids)


def _generate(llm: Any, prompts: list[list[int]], params: list[dict[str, Any]]) -> list[Any]:
    from vllm import SamplingParams
    from vllm.sampling_params import StructuredOutputsParams

    def sampling(fields: dict[str, Any]) -> Any:
        fields = dict(fields)
        if structured := fields.pop("structured_outputs", None):
            fields["structured_outputs"] = StructuredOutputsParams(**structured)
        if bias := fields.pop("logit_bias", None):
            fields["logit_bias"] = {int(token): value for token, value in bias.items()}
        return SamplingParams(**fields)

    tokens = [{"prompt_token_ids": prompt} for prompt in prompts]
    outputs: list[Any] = llm.generate(tokens, [sampling(fields) for fields in params], use_tqdm=False)
    return outputs


def _without_stops(params: dict[str, Any]) -> dict[str, Any]:
    return {**params, "min_tokens": 0, "ignore_eos": True}


def _derive(what: str, output: Any) -> dict[str, Any]:
    """Constraints that bite: they name what the unconstrained answer holds near its middle."""
    text, token_ids = output.text, list(output.token_ids)
    middle = len(token_ids) // 2
    if what == "stop_token_ids":
        return {"stop_token_ids": [token_ids[middle]]}
    if what == "stop":
        start = len(text) // 2
        return {"stop": [text[start : start + 3] or "x", "never to be seen"]}
    assert what == "bad_words"
    return {"bad_words": [text[1:4].strip() or "x", "the"]}


def _expected(params: dict[str, Any], output: Any) -> Expected:
    return Expected(
        params=params,
        prompt_token_ids=list(output.prompt_token_ids),
        choices=[
            Choice(
                token_ids=list(choice.token_ids),
                text=choice.text,
                finish_reason=choice.finish_reason,
                stop_reason=choice.stop_reason,
                logprobs=None if choice.logprobs is None else [_values(p) for p in choice.logprobs],
            )
            for choice in output.outputs
        ],
        prompt_logprobs=None
        if output.prompt_logprobs is None
        else [None if p is None else _values(p) for p in output.prompt_logprobs],
    )


def _values(position: Any) -> dict[int, float]:
    return {token: entry.logprob for token, entry in position.items()}


if __name__ == "__main__":
    main(*sys.argv[1:])

"""A decode engine's first token that came with the KV, put where the engine would have sampled it.

The prefill engine has sampled it, and the client has it already. At the moment the KV is complete, before
vLLM's scheduler has looked at the request again, the token

* is checked as if it had been sampled here: an end token, a stop token or the length limit ends the
  request now, with the reason that a colocated run would give;
* otherwise becomes the last token of the *prompt* of vLLM's engine, exactly as if the request had come
  with it (as it does where KV is pulled): the worker is given prompt and token in one piece, computes that
  one position, and samples the second token. What is left of `max_tokens` and `min_tokens` is one less;
* is told to vLLM's frontend as the first token of the *output*, so that detokenising goes on from it and
  counts, text and limits there are those of the client's request.

Nothing is appended to a request that is running, no step is run for the token, and the model runner does not
know that any of this happened. Requests whose answer depends on telling prompt from output do not come here
(`coordinator.first_token`).
"""

from __future__ import annotations

from typing import Any

from vllm.v1.core.sched.async_scheduler import AsyncScheduler
from vllm.v1.core.sched.utils import check_stop
from vllm.v1.engine import EngineCoreOutput, EngineCoreOutputs
from vllm.v1.request import Request, RequestStatus


class FirstTokenMixin:
    """Before `Scheduler` or `AsyncScheduler` in the bases of a class."""

    def update_from_output(self, scheduler_output: Any, model_runner_output: Any) -> dict[int, Any]:
        outputs: dict[int, Any] = super().update_from_output(scheduler_output, model_runner_output)  # type: ignore[misc]
        this: Any = self
        take = getattr(this.connector, "take_first_tokens", None)
        for request_id, token_id in take().items() if take is not None else ():
            request = this.requests.get(request_id)
            if request is None or request.status != RequestStatus.WAITING_FOR_REMOTE_KVS:
                continue  # its client has left
            output = self._give_first_token(request, token_id)
            outputs.setdefault(request.client_index, EngineCoreOutputs()).outputs.append(output)
        return outputs

    def _give_first_token(self, request: Request, token_id: int) -> EngineCoreOutput:
        this: Any = self
        # As with a first token that was sampled: how much of the prompt came from where.
        prefill_stats = request.take_prefill_stats()
        if prefill_stats is not None:
            prefill_stats.finalize(this.kv_cache_manager.estimate_cached_tokens(request))
        request.append_output_token_ids(token_id)
        finish_reason = None
        if check_stop(request, this.max_model_len):
            finish_reason = request.get_finished_reason()
            status, request.status = request.status, RequestStatus.WAITING_FOR_REMOTE_KVS
            this.finish_requests(request.request_id, status)
        else:
            _make_prompt_of_output(request, token_id)
        return EngineCoreOutput(
            request_id=request.request_id,
            new_token_ids=[token_id],
            finish_reason=finish_reason,
            stop_reason=request.stop_reason,
            events=request.take_events(),
            prefill_stats=prefill_stats,
        )


def _make_prompt_of_output(request: Request, token_id: int) -> None:
    """Its block hashes cover prompt and output alike and stay."""
    assert request.prompt_token_ids is not None and request.sampling_params is not None
    request._output_token_ids.clear()
    request.prompt_token_ids.append(token_id)
    request.num_prompt_tokens += 1
    request.max_tokens -= 1
    request.sampling_params.max_tokens = request.max_tokens
    request.sampling_params.min_tokens = max(0, request.sampling_params.min_tokens - 1)


class AsyncFirstTokenScheduler(FirstTokenMixin, AsyncScheduler):
    """For devices other than CPU, where vLLM plans a step while the one before is computed."""

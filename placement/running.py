"""A fleet file as the simulator sees it: what the workers that the file starts will take for each step."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from baton.launch.fleet_file import FleetFile
from baton.step_time import LinearStepTime, StepTime
from baton.step_time.profile import Profile
from baton.step_time.text import parse_step_time
from baton.worker.engines import PREFILL_WINDOW_TOKENS
from placement.simulator import UNLIMITED, ColocatedFleet, Fleet, Links, SplitFleet
from placement.step_table import StepTable, tabulate, tabulate_mixed

DEFAULT_BATCH = 64
DEFAULT_SIMULATED_STEP_TOKENS = 32_768
"""As the worker's own settings have them."""


class NotPredictable(ValueError):
    """A sentence: what is missing to predict this fleet."""


@dataclass(frozen=True, slots=True, kw_only=True)
class WorkerFacts:
    step_time: StepTime
    kv_tokens: int
    max_batch: int
    step_tokens: int
    window_tokens: int
    link_base_s: float
    link_token_s: float
    num_stages: int

    def table(self, longest_prompt: int) -> StepTable:
        return tabulate(
            self.step_time,
            num_stages=self.num_stages,
            max_batch=self.max_batch,
            max_tokens=max(longest_prompt, self.step_tokens),
        )


def predicted_fleet(file: FleetFile, profile: Profile | None, *, longest_prompt: int) -> Fleet:
    """Raises NotPredictable. Workers that hand KV over all lie on one host or have a link each."""
    num_both = file.num_workers("both")
    num_prefill, num_decode = file.num_workers("prefill"), file.num_workers("decode")
    if num_both and (num_prefill or num_decode):
        raise NotPredictable(
            f"{num_both} workers for both phases beside {num_prefill} prefill and {num_decode} decode "
            "workers: mixed fleets are not simulated"
        )
    if num_both:
        facts = worker_facts(file.settings.get("both", {}), profile)
        return ColocatedFleet(
            table=facts.table(longest_prompt),
            num_workers=num_both,
            kv_tokens=facts.kv_tokens,
            batch_tokens=facts.step_tokens,
            mixed=tabulate_mixed(
                facts.step_time,
                num_stages=facts.num_stages,
                max_batch=facts.max_batch,
                budget_tokens=facts.step_tokens,
            ),
        )
    prefill = worker_facts(file.settings.get("prefill", {}), profile)
    decode = worker_facts(file.settings.get("decode", {}), profile)
    return SplitFleet(
        prefill=prefill.table(longest_prompt),
        num_prefill=num_prefill,
        prefill_kv_tokens=prefill.kv_tokens,
        batch_tokens=prefill.step_tokens,
        window_tokens=prefill.window_tokens,
        decode=decode.table(longest_prompt),
        num_decode=num_decode,
        decode_kv_tokens=decode.kv_tokens,
        links=Links.inside_one_node(
            num_prefill, num_decode, token_s=decode.link_token_s, base_s=decode.link_base_s
        ),
    )


def worker_facts(settings: dict[str, Any], profile: Profile | None) -> WorkerFacts:
    """From the settings of a role; engines that compute need a profile."""
    max_batch = settings.get("max_batch_size", DEFAULT_BATCH)
    wished_window = settings.get("prefill_window_tokens")
    if settings.get("engine") == "simulated":
        block = settings.get("block_size_tokens", 32)
        num_blocks = settings.get("num_blocks")
        longest = settings.get("max_model_len") or DEFAULT_SIMULATED_STEP_TOKENS
        return WorkerFacts(
            step_time=_simulated_step_time(settings),
            kv_tokens=UNLIMITED if num_blocks is None else num_blocks * block,
            max_batch=max_batch,
            step_tokens=settings.get("max_num_batched_tokens") or longest,
            window_tokens=wished_window or UNLIMITED,
            link_base_s=settings.get("simulated_transfer_s", 0.0),
            link_token_s=0.0,
            num_stages=1,
        )
    if profile is None:
        raise NotPredictable(
            "the fleet runs vllm: its step times come from a profile (baton profile …), give it as --profile"
        )
    for name, measured in (
        ("tensor_parallel_size", profile.tensor_parallel_size),
        ("pipeline_parallel_size", profile.pipeline_parallel_size),
    ):
        if settings.get(name, 1) != measured:
            raise NotPredictable(
                f"the profile was measured with {name} {measured}, the fleet has {settings.get(name, 1)}"
            )
    link = profile.kv_link()
    device = settings.get("device", "cpu")
    return WorkerFacts(
        step_time=profile.step_time(),
        kv_tokens=profile.kv_tokens,
        max_batch=max_batch,
        step_tokens=settings.get("max_num_batched_tokens") or profile.max_step_tokens,
        window_tokens=wished_window or PREFILL_WINDOW_TOKENS[device],
        link_base_s=0.0 if link is None else link.latency_s,
        link_token_s=0.0 if link is None else profile.model_shape().kv_bytes_per_token / link.bytes_per_s,
        num_stages=profile.pipeline_parallel_size,
    )


def _simulated_step_time(settings: dict[str, Any]) -> StepTime:
    text = settings.get("simulated_step_time")
    if text is not None:
        try:
            return parse_step_time(text)
        except ValueError as error:
            raise NotPredictable(f"simulated_step_time: {error}") from None
    rate = settings.get("simulated_prefill_tokens_per_s")
    base_s = settings.get("simulated_step_s", 0.0)
    if not base_s and not rate:
        raise NotPredictable("the simulated workers take no time at all: give them simulated_step_time")
    return LinearStepTime(base_s=base_s, per_prefill_token_s=1 / rate if rate else 0.0)

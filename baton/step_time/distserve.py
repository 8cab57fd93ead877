"""DistServe's published step times: OPT-13B and OPT-66B on A100-80G SXM, FP16, its own engine.

Constants are from LLMServe/DistServe at 82831f1 (Apache-2.0), simdistserve/estimators/profile_data/
profiler-a100-80g.distserve.json and max_num_tokens.csv; the forms are those of its time_estimator.py:

    prefill ms = a + b * tokens + c * sum of squared prompt lengths
    decode ms  = a + b * context tokens + c * batch, one fit below a batch of 95 and one from there on

The two decode fits do not meet: at batch 95 the published time drops by up to 10 %. Goodput searches
need more work never to be faster, so the step time here keeps the higher of what the two pieces say:
`DecodePieces.published_ms` is the fit as it stands, `worst_jump` how far the two are apart.

Left out on purpose: the simulator's extra 1 ms per stage and its 2 ms "Ray" overhead, which are additions
of its event loop. No constants of OPT-175B are in that version.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

from baton.step_time.base import StepWork
from baton.step_time.region import Region

THRESHOLD_DECODES = 95


class Fit(NamedTuple):
    """Milliseconds, as published."""

    base_ms: float
    per_token_ms: float
    other_ms: float
    """Per squared token (prefill) or per sequence (decode)."""


class Published(NamedTuple):
    prefill: Fit
    few: Fit
    """Decode below `THRESHOLD_DECODES` sequences."""
    many: Fit


CONSTANTS: dict[tuple[str, int], Published] = {
    ("OPT-13B", 1): Published(
        Fit(18.102546, 0.10191226, 7.1222643e-06),
        Fit(19.934703, 0.00062693565, 0.038506977),
        Fit(7.1661889, 0.00057980004, 0.15831096),
    ),
    ("OPT-13B", 2): Published(
        Fit(14.742974, 0.068577207, 2.4495727e-06),
        Fit(13.294796, 0.0003410922, 0.062963932),
        Fit(10.638742, 0.0003118337, 0.085629136),
    ),
    ("OPT-13B", 4): Published(
        Fit(12.062297, 0.038081401, 5.2262497e-07),
        Fit(10.256232, 0.00018786702, 0.032692736),
        Fit(10.483515, 0.00017120889, 0.045666485),
    ),
    ("OPT-66B", 2): Published(
        Fit(43.058813, 0.27422929, 2.2478042e-05),
        Fit(48.288015, 0.00094243435, 0.1275502),
        Fit(28.727694, 0.00047448475, 0.29617792),
    ),
    ("OPT-66B", 3): Published(
        Fit(32.99823, 0.19568257, 1.2205249e-05),
        Fit(35.801544, 0.00058450048, 0.095266976),
        Fit(22.653862, 0.00053584892, 0.20851444),
    ),
    ("OPT-66B", 4): Published(
        Fit(29.441636, 0.15135218, 8.3174508e-06),
        Fit(30.760285, 0.0004519476, 0.063284196),
        Fit(27.470821, 0.00040468455, 0.12480668),
    ),
    ("OPT-66B", 8): Published(
        Fit(25.490662, 0.10659178, 3.3910503e-06),
        Fit(23.155111, 0.00022691488, 0.048006384),
        Fit(21.717728, 0.00037580897, 0.089786142),
    ),
}
"""By (model, TP). Its prefill rows are 1.1 times those of the file's earlier versions; no reason is given."""

KV_TOKENS: dict[str, dict[tuple[int, int], int]] = {
    "OPT-13B": {
        (1, 1): 66_144,
        (1, 2): 163_008,
        (1, 4): 356_752,
        (1, 8): 744_224,
        (2, 1): 163_008,
        (2, 2): 356_752,
        (2, 4): 744_224,
        (4, 1): 356_736,
        (4, 2): 744_224,
        (4, 4): 1_519_168,
    },
    "OPT-66B": {
        (2, 1): 11_600,
        (2, 2): 78_512,
        (2, 4): 212_320,
        (2, 8): 479_952,
        (3, 1): 45_056,
        (3, 2): 145_408,
        (4, 1): 78_496,
        (4, 2): 212_320,
        (4, 4): 479_936,
        (8, 1): 212_304,
        (8, 2): 479_936,
        (8, 4): 1_015_184,
    },
}
"""KV tokens one worker holds, by model and (TP, PP)."""


@dataclass(frozen=True, slots=True)
class DecodePieces:
    few: Fit
    many: Fit

    def published_ms(self, num_decodes: int, num_context_tokens: int) -> float:
        """As DistServe's simulator computes it, drop and all."""
        base, per_token, per_decode = self.few if num_decodes < THRESHOLD_DECODES else self.many
        return base + per_token * num_context_tokens + per_decode * num_decodes

    def line_ms(self, num_decodes: int) -> tuple[float, float]:
        """(without context, per context token) of a batch, neither falling with the batch."""
        base, per_token, per_decode = self.few
        if num_decodes < THRESHOLD_DECODES:
            return base + per_decode * num_decodes, per_token
        before_ms = base + per_decode * (THRESHOLD_DECODES - 1)
        after_ms = self.many.base_ms + self.many.other_ms * num_decodes
        return max(before_ms, after_ms), max(per_token, self.many.per_token_ms)

    def worst_jump(self, max_context_tokens: int = 2_048) -> float:
        """Largest relative drop (negative: a rise) at the threshold, over contexts up to OPT's longest."""
        drops = []
        for context in range(0, max_context_tokens + 1, 64):
            tokens = context * THRESHOLD_DECODES
            below = self.published_ms(THRESHOLD_DECODES - 1, tokens)
            drops.append(1 - self.published_ms(THRESHOLD_DECODES, tokens) / below)
        return max(drops)


@dataclass(frozen=True, slots=True, kw_only=True)
class DistServeStepTime:
    """A StepTime. A step with prompts and decodes together, which DistServe never runs, pays the larger
    of the two constants and both of the rest."""

    prefill: Fit
    decode: DecodePieces
    num_stages: int = 1
    region: Region

    def step_s(self, work: StepWork) -> float:
        base_ms = rest_ms = 0.0
        if work.num_prefill_tokens:
            base_ms, per_token, per_square = self.prefill
            # Squares of lengths from pairs: n * n = 2 * n (n + 1) / 2 - n.
            rest_ms = (per_token - per_square) * work.num_prefill_tokens
            rest_ms += 2 * per_square * work.num_prefill_pairs
        if work.num_decodes:
            without_context_ms, per_context_token = self.decode.line_ms(work.num_decodes)
            base_ms = max(base_ms, self.decode.few.base_ms)
            rest_ms += without_context_ms - self.decode.few.base_ms
            rest_ms += per_context_token * work.num_context_tokens
        return (base_ms + rest_ms) / 1e3

    def cadence_s(self, work: StepWork) -> float:
        return self.step_s(work) / self.num_stages


def distserve(model: str, tensor_parallel_size: int, pipeline_parallel_size: int = 1) -> DistServeStepTime:
    """Raises ValueError naming what is published when this is not."""
    constants = CONSTANTS.get((model, tensor_parallel_size))
    if constants is None:
        published = ", ".join(f"{name} TP {tp}" for name, tp in CONSTANTS)
        raise ValueError(
            f"DistServe published no constants of {model} with TP {tensor_parallel_size}, only of {published}"
        )
    notes: tuple[str, ...] = ()
    if pipeline_parallel_size > 1:
        notes = (
            f"PP {pipeline_parallel_size}: DistServe divides by the stages, it published no measurement",
        )
    return DistServeStepTime(
        prefill=constants.prefill,
        decode=DecodePieces(constants.few, constants.many),
        num_stages=pipeline_parallel_size,
        region=Region(max_prefill_tokens=2_048, max_decodes=256, max_context_tokens=2_048, notes=notes),
    )

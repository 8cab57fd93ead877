"""The fit finds the constants of an engine that behaves as it assumes."""

import pytest

from baton.contract.lifecycle import Outcome
from baton.contract.messages import PhaseTimes, RequestReport
from baton.step_time import prefill_pairs
from benchmarks.measured_pace import CONCURRENCIES, NUM_OUTPUT_TOKENS, PROMPT_LENGTHS, Observed, fit_pace
from benchmarks.trace_load import Answered


def answered(length: int, batch: int, num_output_tokens: int) -> Answered:
    step_s = 0.004 + 0.001 * batch + 1e-6 * batch * (length + NUM_OUTPUT_TOKENS / 2)
    first_step_s = 0.004 + 0.001 + 1e-6 * length
    phases = PhaseTimes(
        prefill_s=0.01 + 5e-5 * length + 1e-8 * prefill_pairs(length),
        handoff_s=first_step_s + 0.003 + 2e-6 * length,
        decode_s=step_s * (num_output_tokens - 2),
    )
    total_s = phases.prefill_s + phases.handoff_s + phases.decode_s
    return Answered(
        0,
        0.0,
        phases.prefill_s,
        total_s,
        num_output_tokens,
        RequestReport(outcome=Outcome.COMPLETED, phases=phases),
    )


def test_constants_are_found_again():
    observed = Observed(
        {length: [answered(length, 1, 8)] * 3 for length in PROMPT_LENGTHS},
        [
            (length, [answered(length, size, NUM_OUTPUT_TOKENS)] * size)
            for size in CONCURRENCIES
            for length in (128, 1024)
        ],
    )
    pace = fit_pace([observed, observed])
    assert pace.prefill.base_s == pytest.approx(0.01)
    assert pace.prefill.per_prefill_token_s == pytest.approx(5e-5)
    assert pace.prefill.per_prefill_pair_s == pytest.approx(1e-8)
    assert pace.decode.base_s == pytest.approx(0.004)
    assert pace.decode.per_decode_s == pytest.approx(0.001)
    assert pace.decode.per_context_token_s == pytest.approx(1e-6)
    assert pace.handoff.transfer_s(1000) == pytest.approx(0.005)

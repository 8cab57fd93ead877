import random

import pytest

from baton.step_time import (
    LinearStepTime,
    RooflineStepTime,
    Scales,
    StepWork,
    gpu_by_name,
    prefill_pairs,
    roofline,
    shape_by_name,
)
from baton.step_time.fit import (
    Observation,
    every_third,
    fit_linear,
    fit_scales,
    mean_absolute_error,
    residuals,
)
from benchmarks.published_step_times import H100_QWEN3_32B

TRUE = LinearStepTime(
    base_s=5e-3,
    per_prefill_token_s=9e-5,
    per_prefill_pair_s=6e-9,
    per_decode_s=4e-5,
    per_context_token_s=6e-7,
)
STEPS = [
    *(StepWork(tokens, prefill_pairs(tokens)) for tokens in (32, 128, 512, 1_024, 2_048, 4_096)),
    *(StepWork(0, 0, batch, batch * context) for batch in (1, 4, 16, 32) for context in (64, 512, 2_048)),
]


def h100(tensor_parallel_size: int, scales: Scales) -> RooflineStepTime:
    return roofline(gpu_by_name("h100"), shape_by_name("Qwen3-32B"), tensor_parallel_size, scales=scales)


def test_an_exact_linear_model_is_found_again():
    fitted = fit_linear([Observation(work, TRUE.step_s(work)) for work in STEPS])
    for name in (
        "base_s",
        "per_prefill_token_s",
        "per_prefill_pair_s",
        "per_decode_s",
        "per_context_token_s",
    ):
        assert getattr(fitted, name) == pytest.approx(getattr(TRUE, name), rel=1e-6)


def test_noise_of_five_percent_stays_five_percent():
    random_ = random.Random(5)
    noisy = [Observation(work, TRUE.step_s(work) * random_.uniform(0.95, 1.05)) for work in STEPS]
    truth = [Observation(work, TRUE.step_s(work)) for work in STEPS]
    assert mean_absolute_error(residuals(fit_linear(noisy), truth)) < 0.05


def test_a_step_that_seems_to_get_faster_by_work_gets_a_zero_not_a_negative_coefficient():
    falling = [Observation(StepWork(0, 0, batch, 0), 1e-2 - batch * 1e-4) for batch in (1, 10, 50)]
    fitted = fit_linear(falling)
    assert fitted.per_decode_s == 0
    # Least relative error of a constant: sum of 1/t over sum of 1/t², t = 9.9, 9 and 5 ms.
    assert fitted.base_s == pytest.approx(412.1 / 62_549, rel=1e-3)


def test_errors_are_relative():
    """A constant 10 % on everything costs the same on 5 ms as on 500 ms."""
    doubled = [Observation(work, TRUE.step_s(work) / 1.1) for work in STEPS]
    assert [r.relative_error for r in residuals(TRUE, doubled)] == pytest.approx([0.1] * len(STEPS))


def test_scales_that_measurements_speak_about_are_found():
    true = Scales(compute=1.5, weight_read=0.8, kv_read=1.3)
    steps = [Observation(work, h100(2, true).step_s(work), 2) for work in STEPS]
    found = fit_scales(steps, h100)
    assert found.compute == pytest.approx(1.5, rel=0.06)
    assert found.weight_read == pytest.approx(0.8, rel=0.06)
    assert mean_absolute_error(residuals(h100(2, found), steps)) < 0.02 < 0.15
    assert mean_absolute_error(residuals(h100(2, Scales()), steps)) > 0.15


def test_scales_that_no_measurement_speaks_about_stay_as_shipped():
    decode_only = [
        Observation(work, 1.4 * h100(1, Scales()).step_s(work), 1) for work in STEPS if work.num_decodes
    ]
    found = fit_scales(decode_only, h100)
    assert found.attention == pytest.approx(1.0)
    assert found.all_reduce_latency == pytest.approx(1.0)  # TP 1 has none
    assert found.weight_read > 1.2


@pytest.mark.parametrize("start", [0, 1, 2])
def test_a_third_of_the_published_h100_times_predicts_the_rest(start: int):
    published = [
        Observation(point.work, point.seconds, point.tensor_parallel_size) for point in H100_QWEN3_32B
    ]
    third, rest = every_third(published, start)
    assert len(third) <= 10
    scales = fit_scales(third, h100)
    errors = [abs(h100(tp, scales).step_s(work) / seconds - 1) for work, seconds, tp in rest]
    assert sum(errors) / len(errors) <= 0.05


def test_nothing_to_fit_and_impossible_times_are_refused():
    with pytest.raises(ValueError, match="no measured steps to fit"):
        fit_linear([])
    with pytest.raises(ValueError, match="a measured step took 0 s"):
        fit_linear([Observation(StepWork(1, 1), 0.0)])
    with pytest.raises(ValueError, match="no measured steps to compare"):
        mean_absolute_error([])

import pytest

from baton.step_time import LinearStepTime, StepWork, prefill_pairs

MODEL = LinearStepTime(
    base_s=1e-3,
    per_prefill_token_s=1e-5,
    per_prefill_pair_s=1e-9,
    per_decode_s=1e-5,
    per_context_token_s=1e-8,
)


def test_pairs_of_chunks_add_up_to_the_pairs_of_the_whole_prompt():
    whole = prefill_pairs(1000)
    chunks = prefill_pairs(300) + prefill_pairs(500, 300) + prefill_pairs(200, 800)
    assert chunks == whole == sum(range(1, 1001))


def test_an_empty_step_takes_no_time_and_any_work_pays_the_base():
    assert MODEL.step_s(StepWork()) == 0.0
    assert MODEL.step_s(StepWork(num_decodes=1)) == pytest.approx(1e-3 + 1e-5)


def test_stages_shorten_the_cadence_not_the_latency():
    work = StepWork(num_prefill_tokens=100, num_prefill_pairs=prefill_pairs(100))
    staged = LinearStepTime(base_s=1e-3, per_prefill_token_s=1e-5, per_prefill_pair_s=1e-9, num_stages=2)
    assert staged.step_s(work) == MODEL.step_s(work)
    assert staged.cadence_s(work) == pytest.approx(MODEL.step_s(work) / 2)


def test_a_negative_coefficient_is_refused_with_its_value():
    with pytest.raises(ValueError, match=r"per_decode_s is -1e-05"):
        LinearStepTime(base_s=0.0, per_decode_s=-1e-5)

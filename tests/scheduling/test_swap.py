"""Who leaves memory and who comes back."""

from __future__ import annotations

from baton.scheduling import Holding, SwapChoice, SwapRule


def choose(rule: SwapRule, holdings: dict[str, Holding], away: str = "", **facts) -> SwapChoice:
    order = list(holdings)
    waits = {job_id: float(max(0, position - 1)) for position, job_id in enumerate(order)}
    numbers = {"num_places": 2, "num_free_blocks": 0, "num_growth_blocks": 0} | facts
    return rule.choose(order, waits, set(away), holdings.__getitem__, **numbers)


def test_nothing_moves_while_memory_suffices():
    rule = SwapRule(reserve_blocks=4, lookahead_blocks=4)
    holdings = {name: Holding(num_blocks=5) for name in "abcd"}
    assert choose(rule, holdings, num_free_blocks=20, num_growth_blocks=2) == SwapChoice()


def test_who_waits_longest_is_backed_up_ahead_of_need_and_stays():
    rule = SwapRule(reserve_blocks=4, lookahead_blocks=4)
    holdings = {name: Holding(num_blocks=5) for name in "abcd"}
    choice = choose(rule, holdings, num_free_blocks=6)
    assert choice == SwapChoice(back_up=("d",))


def test_only_backed_up_ones_are_evicted_longest_wait_first():
    rule = SwapRule(reserve_blocks=4, lookahead_blocks=4)
    holdings = {
        "a": Holding(num_blocks=5),
        "b": Holding(num_blocks=5),
        "c": Holding(num_blocks=5, num_backed_blocks=5),
        "d": Holding(num_blocks=5, num_backed_blocks=4),
        "e": Holding(num_blocks=5, num_backed_blocks=5),
    }
    choice = choose(rule, holdings, num_free_blocks=1, num_growth_blocks=2)
    # 2 wanted + 4 reserved - 1 free = 5 short: e's five; d is copied for the next time.
    assert choice.evict == ("e",) and "d" in choice.back_up and choice.num_blocks_short == 0


def test_runners_of_the_next_step_are_never_evicted():
    rule = SwapRule(reserve_blocks=0)
    holdings = {name: Holding(num_blocks=5, num_backed_blocks=5) for name in "ab"}
    choice = choose(rule, holdings, num_free_blocks=0, num_growth_blocks=2)
    assert choice.evict == () and choice.num_blocks_short == 2


def test_whose_turn_it_is_comes_back_first_then_the_next_one_if_the_reserve_stays():
    rule = SwapRule(reserve_blocks=4)
    holdings = {name: Holding(num_blocks=5) for name in "abcd"}
    assert choose(rule, holdings, away="bcd", num_free_blocks=9).bring_back == ("b",)
    assert choose(rule, holdings, away="bcd", num_free_blocks=14).bring_back == ("b", "c")


def test_room_for_whose_turn_it_is_comes_from_the_far_end():
    rule = SwapRule(reserve_blocks=0)
    backed = Holding(num_blocks=5, num_backed_blocks=5)
    holdings = dict.fromkeys("abcd", backed)
    choice = choose(rule, holdings, away="b", num_free_blocks=0)
    assert choice.evict == ("d",) and choice.bring_back == ("b",)


def test_only_as_many_are_looked_at_as_have_to_be_ready():
    """A hundred residents, each with a copy: two of them are what the next steps may take."""
    rule = SwapRule(reserve_blocks=4, lookahead_blocks=10)
    asked: list[str] = []

    def holding(job_id: str) -> Holding:
        asked.append(job_id)
        return Holding(num_blocks=5, num_backed_blocks=5)

    order = [str(i) for i in range(100)]
    waits = {job_id: float(job_id) for job_id in order}
    choice = rule.choose(order, waits, (), holding, num_places=2, num_free_blocks=6, num_growth_blocks=0)
    assert choice == SwapChoice() and asked == ["99", "98"]


def test_what_moves_already_is_left_alone():
    rule = SwapRule(reserve_blocks=0, lookahead_blocks=10)
    busy = Holding(num_blocks=5, num_backed_blocks=5, is_movable=False)
    holdings = {"a": Holding(num_blocks=5), "b": Holding(num_blocks=5), "c": busy}
    choice = choose(rule, holdings, num_free_blocks=0, num_growth_blocks=1)
    assert choice.evict == () and choice.num_blocks_short == 1

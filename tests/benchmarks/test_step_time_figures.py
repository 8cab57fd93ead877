from benchmarks.step_time import figures


def test_every_bar_of_the_step_time_model_holds():
    found = figures(quick=True)
    assert [figure.name for figure in found if figure.holds is False] == []
    assert sum(figure.bar is not None for figure in found) == 2

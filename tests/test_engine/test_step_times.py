from mmela.engine.step_times import StepTimeSummary, step_time_table
from tests.test_engine.test_tables import cells


def test_summary():
    """Quartiles of 1, 2, ..., 9 are 3, 5 and 7."""
    found = StepTimeSummary.of([9, 1, 8, 2, 7, 3, 6, 4, 5])
    assert found == StepTimeSummary(median=5, lower=3, upper=7, count=9)


def test_change_needs_middle_halves_apart():
    first = StepTimeSummary(0.5, 0.45, 0.55, 100)
    assert StepTimeSummary(0.4, 0.35, 0.44, 50).change_from(first) == 0.4 / 0.5 - 1
    assert StepTimeSummary(0.6, 0.56, 0.7, 50).change_from(first) == 0.6 / 0.5 - 1
    assert StepTimeSummary(0.4, 0.35, 0.46, 50).change_from(first) is None
    assert StepTimeSummary(0.6, 0.54, 0.7, 50).change_from(first) is None
    assert StepTimeSummary(0.4, 0.35, 0.44, 4).change_from(first) is None


def test_table():
    rows = [
        (8, StepTimeSummary(0.5, 0.45, 0.55, 100)),
        (7, StepTimeSummary(0.47, 0.44, 0.5, 60)),
        (6, StepTimeSummary(0.4, 0.35, 0.44, 50)),
    ]
    assert cells(step_time_table(rows)) == [
        ['8', '0.5', '0.45 to 0.55', '', '100'],
        ['7', '0.47', '0.44 to 0.5', 'not clear', '60'],
        ['6', '0.4', '0.35 to 0.44', '-20.0 %', '50'],
    ]

import math

import pytest

from mmela.pruning import Divergence, PruningDecision, deviation, has_learned


def divergences(*ratios):
    """With totals of so many times the baseline, in a stage of as many."""
    found = [None]
    for t, ratio in enumerate(ratios, 1):
        total = ratio * math.log((t + 1) / t)
        found.append(Divergence(0.5 * total, 0.5 * total, t, 1))
    return found


def test_deviation_by_hand():
    assert deviation(divergences(1.1, 0.8, 1.0)) == pytest.approx(0.1)
    # An outlier says nothing of the others.
    assert deviation(divergences(1.1, 0.9, 50.0)) == pytest.approx(0.1)
    assert deviation(divergences(3.0, 0.2, 1.5)) == pytest.approx(0.8)
    assert deviation([None, None]) is None


@pytest.mark.parametrize(
    'found, moved, learned',
    [
        (0.05, 1.4, False),  # the position decides
        (3.0, 0.01, False),  # the random start does, on large features
        (0.05, 0.01, False),
        (0.6, 0.4, True),
        (0.6, None, True),  # no query and key that could be compared
        (None, 0.4, None),
    ],
)
def test_has_learned(found, moved, learned):
    assert has_learned(found, moved) is learned
    decision = PruningDecision((), dict(type='EBQM'), deviation=found, movement=moved)
    assert decision.learned is learned
    assert bool(decision.warning) == (learned is False)
    control = dict(type='EBQM', criterion='random')
    decision = PruningDecision((), control, deviation=found, movement=moved)
    assert decision.warning is None


def test_warning_names_what_decides():
    decision = PruningDecision((), {}, deviation=0.09, movement=1.0)
    assert 'within 9% of uniform attention (25% needed)' in decision.warning
    assert 'random start' not in decision.warning
    decision = PruningDecision((), {}, deviation=2.0, movement=0.034)
    assert 'moved 3.4% from their random start (40% needed)' in decision.warning
    assert 'uniform' not in decision.warning

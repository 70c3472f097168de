import math

import numpy as np
import pytest

from mmela.pruning import ebqm

nan = math.nan


def test_coco_values_by_hand():
    """alpha 2, beta 5: CDF(x) = 1 - (1 - x)^6 - 6 x (1 - x)^5."""
    result = ebqm([0.1, 0.9, 0.2, 0.5, 0.3, 0.7], gamma=0.5)
    # Sorted: 0.1 0.2 0.3 0.5 0.7 0.9; the median lies halfway from 0.3 to 0.5.
    assert result.quantile == pytest.approx(0.4)
    assert result.selected.tolist() == [1, 0, 1, 0, 1, 0]
    np.testing.assert_allclose(result.normalized, [0, nan, 0.5, nan, 1, nan])
    # CDF(1/2) = 1 - 1/64 - 6/64 = 57/64
    np.testing.assert_allclose(result.mapped, [0, nan, 57 / 64, nan, 1, nan])
    assert result.skip.tolist() == [1, 0, 0, 0, 0, 0]


def test_cifar_values_by_hand():
    """alpha 5, beta 1: CDF(x) = x^5."""
    result = ebqm([1, 2, 3, 4, 5], gamma=1, alpha=5, beta=1, mu=0.3)
    # x = 0, 1/4, 1/2, 3/4, 1
    np.testing.assert_allclose(
        result.mapped, [0, 1 / 1024, 1 / 32, 243 / 1024, 1], atol=1e-12
    )
    assert result.skip.tolist() == [1, 1, 1, 1, 0]


def test_threshold_is_strict():
    # x = 1/2 has the CDF 57/64 exactly at mu
    assert ebqm([0, 1, 2], gamma=1, mu=57 / 64).skip.tolist() == [1, 0, 0]
    assert ebqm([0, 1, 2], gamma=1, mu=0).skip.tolist() == [0, 0, 0]


@pytest.mark.parametrize('kl', [[], [1.0], [2.0, 2.0, 2.0], [1.0, 5.0]])
def test_nothing_to_tell_apart(kl):
    """No value, one value up to the median, or equal values."""
    assert not ebqm(kl, mu=1).skip.any()


@pytest.mark.parametrize('value', [nan, math.inf, -math.inf])
def test_values_must_be_finite(value):
    with pytest.raises(ValueError, match=f'layer 1 is {value}'):
        ebqm([0.1, value, 0.3])


@pytest.mark.parametrize(
    'name, values',
    [
        ('gamma', [0, -0.5, 1.01, nan, '0.5', True, None]),
        ('alpha', [0, -1, nan, math.inf]),
        ('beta', [0, -1, nan, math.inf]),
        ('mu', [-0.1, 1.1, nan]),
    ],
)
def test_bad_arguments_are_named(name, values):
    for value in values:
        with pytest.raises(ValueError, match=f'{name}={value!r} is not'):
            ebqm([1, 2, 3], **{name: value})

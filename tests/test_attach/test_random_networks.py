"""Random networks have no silent fault; ``MMELA_SEEDS=1000`` for a large run."""

import os

import pytest
from random_networks import check

SEEDS = int(os.environ.get('MMELA_SEEDS', 20))


@pytest.mark.parametrize('seed', range(SEEDS))
def test_random_network(seed):
    assert check(seed) in ('right', 'refused', 'refused later', 'does not train')

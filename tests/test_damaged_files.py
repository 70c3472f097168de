"""Damaged files, few of each kind; tests/helpers/record_fuzz.py tries thousands."""

import pytest

from tests.helpers.record_fuzz import READERS, try_files


@pytest.mark.parametrize('name', READERS)
def test_read_or_refused_in_one_line(name):
    if name == 'Network':
        pytest.importorskip('mmpretrain')
    count = 12 if name == 'Network' else 60
    outcomes = try_files(name, 7, count)
    assert outcomes['refused'] and sum(outcomes.values()) == count

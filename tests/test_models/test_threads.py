"""One network used by many threads at once."""

import itertools
from concurrent.futures import ThreadPoolExecutor
from threading import Barrier

import pytest
import torch

from tests.helpers.backbones import BACKBONES, build
from tests.helpers.zoo import ATTENTIONS

THREADS = 4
# The three ways to keep what a pass has so far, in turn
KINDS = itertools.cycle(['MRLABase', 'MRLALight', 'KCLA'])


@pytest.mark.parametrize(
    'scope, name, attention', [(*key, kind) for key, kind in zip(BACKBONES, KINDS)]
)
def test_results_are_those_of_one_thread(scope, name, attention):
    model = build(scope, name, ATTENTIONS[attention])
    model.eval()
    sizes = [(64, 64)] * 2 if 'Vision' in name else [(64, 64), (65, 97)]
    images = [torch.randn(1, 3, *sizes[i % 2]) for i in range(THREADS)]
    with torch.no_grad():
        expected = [model(x) for x in images]
    start = Barrier(THREADS)

    def run(x):
        start.wait()
        with torch.no_grad():
            return [model(x) for _ in range(2)]

    with ThreadPoolExecutor(THREADS) as pool:
        for outs, e in zip(pool.map(run, images), expected):
            for out in outs:
                assert len(out) == len(e)
                assert all(torch.equal(a, b) for a, b in zip(out, e))
